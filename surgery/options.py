"""Options: declared once as pydantic fields, and from that one place checked, explained and completed in editors."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator

Location = tuple[str | int, ...]


class Options(BaseModel):
    """A frozen set of options; unknown keys are errors, scalars are never coerced.

    A YAML list is accepted for a tuple, a string for a `Path` or an `Enum`; `"3"` is not accepted for an integer,
    nor `1` for a boolean.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", strict=True, arbitrary_types_allowed=True, use_attribute_docstrings=False
    )

    @model_validator(mode="before")
    @classmethod
    def _from_yaml_forms(cls, values: Any) -> Any:
        if not isinstance(values, Mapping):
            return values
        annotations = {field.alias or name: field.annotation for name, field in cls.model_fields.items()}
        return {
            key: _yaml_form(annotations[key], value) if key in annotations else value for key, value in values.items()
        }


def _yaml_form(annotation: Any, value: Any) -> Any:
    """Turn the form in which YAML writes a value of this type into the type: list -> tuple, str -> Path or Enum."""
    origin = get_origin(annotation)
    arguments = get_args(annotation)
    if origin is Annotated:
        return _yaml_form(arguments[0], value)
    if origin in (Union, types.UnionType):
        return _first_that_changes(arguments, value)
    if origin in (tuple, Sequence) and isinstance(value, list):
        item = arguments[0] if arguments else Any
        return tuple(_yaml_form(item, entry) for entry in value)
    if origin in (set, frozenset) and isinstance(value, list):
        return origin(_yaml_form(arguments[0] if arguments else Any, entry) for entry in value)
    if origin in (dict, Mapping) and isinstance(value, Mapping) and len(arguments) == 2:
        return {key: _yaml_form(arguments[1], entry) for key, entry in value.items()}
    if annotation is Path and isinstance(value, str):
        return Path(value)
    if isinstance(annotation, type) and issubclass(annotation, Enum) and isinstance(value, str):
        return next((member for member in annotation if member.value == value), value)
    return value


def _first_that_changes(annotations: Iterable[Any], value: Any) -> Any:
    for annotation in annotations:
        form = _yaml_form(annotation, value)
        if form is not value:
            return form
    return value


def explain(error: ValidationError, known: Mapping[str, Iterable[str]], given: Any) -> list[tuple[Location, str]]:
    """Say each mistake of a validation as (path of the key, sentence), one for each place.

    Args:
        error: What pydantic raised.
        known: For the path of a mapping, joined by dots (`""` is the top), the keys that it knows.
        given: What was validated.
    """
    places: dict[Location, list[dict[str, Any]]] = {}
    for detail in error.errors(include_url=False):
        places.setdefault(_location(dict(detail), given), []).append(dict(detail))
    # A mapping or list is wrong wherever something in it is; only the innermost mistake tells anything.
    return [
        (place, _sentence(place, details, known))
        for place, details in places.items()
        if not any(len(other) > len(place) and other[: len(place)] == place for other in places)
    ]


def _location(detail: Mapping[str, Any], given: Any) -> Location:
    """Return the keys that lead to a mistake, without the names that pydantic adds for the branches of a union."""
    kept: list[str | int] = []
    node = given
    for part in detail["loc"]:
        if _holds(node, part):
            kept.append(part)
            node = node[part]
    if detail["type"] == "missing":
        kept.append(detail["loc"][-1])
    return tuple(kept)


def _holds(node: Any, part: str | int) -> bool:
    if isinstance(node, Mapping):
        return part in node
    return isinstance(node, (list, tuple)) and isinstance(part, int) and part < len(node)


def _sentence(location: Location, details: Sequence[Mapping[str, Any]], known: Mapping[str, Iterable[str]]) -> str:
    first = details[0]
    key = next((part for part in reversed(location) if isinstance(part, str)), "")
    if first["type"] == "extra_forbidden":
        parents = ".".join(str(part) for part in location[:-1])
        return f"unknown option {key!r}{did_you_mean(key, _keys_at(parents, known))}"
    if first["type"] == "missing":
        return f"needs the option {key!r}"
    if first["type"] == "invalid_key" or first["loc"][-1:] == ("[key]",):
        return f"keys are words, not {first['input']!r}"
    name = f"{key}: " if key else ""
    return f"{name}{_wish([str(detail['msg']) for detail in details])}, not {first['input']!r}"


def _wish(messages: Sequence[str]) -> str:
    """Join what the branches of a union ask for: `input should be a valid integer or a valid string`."""
    start = "Input should be "
    # YAML knows lists only.
    messages = [message.replace("valid tuple", "list") for message in messages]
    text = messages[0].removeprefix("Value error, ")
    others = dict.fromkeys(entry.removeprefix(start) for entry in messages[1:] if entry.startswith(start))
    if text.startswith(start):
        text = " or ".join([text, *(entry for entry in others if start + entry != text)])
    return f"{text[:1].lower()}{text[1:]}"


def _keys_at(path: str, known: Mapping[str, Iterable[str]]) -> Iterable[str]:
    """Return the known keys of the mapping at a path, or of the one that holds it under a name of the user's."""
    return known.get(path) or known.get(path.rpartition(".")[0], ())


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return `; did you mean 'x'?` for the nearest of the known words, else what there is, else nothing."""
    words = sorted(set(known))
    near = difflib.get_close_matches(word, words, n=1, cutoff=0.5)
    if near:
        return f"; did you mean {near[0]!r}?"
    if not words:
        return ""
    return f"; there is {', '.join(repr(entry) for entry in words[:12])}"
