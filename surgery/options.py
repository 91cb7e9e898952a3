"""Options: declared once as pydantic fields, and from that one place checked, explained and completed in editors."""

from __future__ import annotations

import difflib
import types
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ConfigDict, ValidationError, model_validator


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


def explain(error: ValidationError, known: Mapping[str, Iterable[str]]) -> list[tuple[tuple[str | int, ...], str]]:
    """Say each mistake of a validation as (path of the key, sentence).

    Args:
        error: What pydantic raised.
        known: For the path of a mapping, joined by dots (`""` is the top), the keys that it knows.
    """
    return [(detail["loc"], _sentence(dict(detail), known)) for detail in error.errors(include_url=False)]


def _sentence(detail: dict[str, Any], known: Mapping[str, Iterable[str]]) -> str:
    location = detail["loc"]
    key = next((part for part in reversed(location) if isinstance(part, str)), "")
    if detail["type"] == "extra_forbidden":
        parents = ".".join(str(part) for part in location[:-1])
        return f"unknown option {key!r}{did_you_mean(key, _keys_at(parents, known))}"
    if detail["type"] == "missing":
        return f"needs the option {key!r}"
    given = detail["input"]
    message = str(detail["msg"])
    message = message.removeprefix("Value error, ")
    return f"{key}: {message[:1].lower()}{message[1:]}, not {given!r}"


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
