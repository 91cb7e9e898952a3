"""Options: scalars are never coerced; sequences, sets, paths and enums accept the form in which YAML writes them."""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Annotated

import pytest
from pydantic import Field, ValidationError

from surgery.options import Options, did_you_mean


class Colour(Enum):
    RED = "red"


class Many(Options):
    """One option of each kind."""

    whole: int = 0
    real: float = 0.0
    flag: bool = False
    text: str = ""
    path: Path | None = None
    colour: Colour | None = None
    words: tuple[str, ...] = ()
    pairs: tuple[tuple[int, float], ...] = ()
    unique: frozenset[int] = frozenset()
    paths: Mapping[str, Path] = {}
    sizes: tuple[Annotated[int, Field(ge=1)], ...] = ()


@pytest.mark.parametrize(
    ("given", "taken"),
    [
        ({"path": "a/b"}, Path("a/b")),
        ({"colour": "red"}, Colour.RED),
        ({"words": ["a", "b"]}, ("a", "b")),
        ({"words": []}, ()),
        ({"pairs": [[1, 2.5]]}, ((1, 2.5),)),
        ({"unique": [1, 1, 2]}, frozenset({1, 2})),
        ({"paths": {"x": "a"}}, {"x": Path("a")}),
        ({"sizes": [1, 2]}, (1, 2)),
        ({"real": 1}, 1.0),
        ({"path": None}, None),
    ],
)
def test_the_form_of_yaml_is_accepted(given: dict[str, object], taken: object) -> None:
    (name,) = given
    assert getattr(Many.model_validate(given), name) == taken


@pytest.mark.parametrize(
    "given",
    [
        {"whole": "3"},
        {"whole": 3.0},
        {"whole": True},
        {"real": "1e-5"},
        {"real": True},
        {"flag": 1},
        {"flag": "yes"},
        {"text": 3},
        {"text": None},
        {"path": 3},
        {"colour": "blue"},
        {"words": "abc"},
        {"words": [1]},
        {"pairs": [["1", 2.5]]},
        {"sizes": [0]},
        {"unknown": 1},
    ],
)
def test_a_scalar_of_another_type_is_refused(given: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        Many.model_validate(given)


def test_options_are_frozen() -> None:
    with pytest.raises(ValidationError):
        Many().whole = 1


def test_a_suggestion_is_near_or_lists_what_there_is() -> None:
    assert did_you_mean("min_byte", ["min_bytes", "models"]) == "; did you mean 'min_bytes'?"
    assert did_you_mean("zzz", ["b", "a"]) == "; there is 'a', 'b'"
    assert did_you_mean("zzz", []) == ""
