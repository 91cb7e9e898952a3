"""The manual that is derived from the passes themselves: the list, a page for each, the JSON schema of recipes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from rich.markup import escape
from rich.table import Table

from surgery import registry
from surgery.contract import Pass
from surgery.recipe import Sections, option_names


def list_passes() -> Table:
    """Return a table of all installed passes with their first sentences."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("pass", "effect", "what it does"):
        table.add_column(heading)
    for word in registry.words():
        cls = registry.find(word, Path())
        table.add_row(word, effect_of(cls), escape(summary(cls)))
    return table


def effect_of(cls: type[Pass]) -> str:
    """Return the effect of a pass, or that its options decide."""
    return "by option" if isinstance(inspect.getattr_static(cls, "effect"), property) else cls.effect.value


def summary(cls: type[Pass]) -> str:
    """Return the first sentence of a pass's docstring."""
    return (inspect.getdoc(cls) or "").split("\n\n")[0].replace("\n", " ")


def pass_page(word: str, cls: type[Pass]) -> str:
    """Return the page of one pass: its docstring, its effect, its options."""
    lines = [f"{word} ({effect_of(cls)})", "", inspect.getdoc(cls) or "", ""]
    for kind, facts in (("needs", cls.needs), ("gives", cls.gives)):
        if facts:
            lines.append(f"{kind}: {', '.join(fact.__name__ for fact in facts)}")
    lines.append("options:")
    for name, field in zip(option_names(cls), cls.model_fields.values(), strict=True):
        lines.append(f"  {name}: {_default(field)}")
        lines.append(f"      {field.description or ''}")
    return "\n".join(lines)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "(required)"
    default = field.get_default(call_default_factory=True, validated_data={})
    return "(left out)" if default is None else str(getattr(default, "value", default))


def recipe_schema() -> dict[str, Any]:
    """Return the JSON schema of a recipe, with every installed pass and its options."""
    schema = Sections.model_json_schema()
    definitions = schema.setdefault("$defs", {})
    choices: list[dict[str, Any]] = [
        {"enum": registry.words()},
        {"type": "object", "properties": {"pass": {"pattern": ":"}}, "required": ["pass"]},
    ]
    for word in registry.words():
        cls = registry.find(word, Path())
        own = cls.model_json_schema(by_alias=True)
        definitions.update(own.pop("$defs", {}))
        own["properties"] = {"pass": {"const": word, "description": summary(cls)}, **own.get("properties", {})}
        own["required"] = ["pass", *own.get("required", [])]
        choices.append(own)
    schema["properties"]["steps"]["items"] = {"anyOf": choices}
    for section in ("source", "output"):
        schema["properties"][section] = {
            "anyOf": [{"type": "string"}, {"$ref": f"#/$defs/{section.capitalize()}"}],
            "description": Sections.model_fields[section].description,
        }
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "surgery recipe"
    return schema
