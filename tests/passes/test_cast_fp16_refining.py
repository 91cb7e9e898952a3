"""Refinement: a small list is found by few verdicts, whatever is needed."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest

from passes.cast_fp16.refining import Refiner

WEAK = tuple(("model", f"t{number}") for number in range(60))


@dataclass(frozen=True)
class Tried:
    """An attempt of which only the list matters."""

    units: tuple[Any, ...]
    weak: tuple[Any, ...] = WEAK


class Decider:
    """Casts nothing; tells which lists were asked about."""

    def __init__(self) -> None:
        self.asked: list[tuple[Any, ...]] = []

    def attempt(self, more: Iterable[Any] = ()) -> Any:
        self.asked.append(tuple(more))
        return Tried(self.asked[-1])


def refine(needed: set[int], most: int = 24) -> tuple[Any, str, Decider]:
    decider = Decider()
    wanted = {WEAK[number] for number in needed}
    refiner = Refiner(decider, Tried(()), lambda attempt: wanted <= set(attempt.units), most)  # type: ignore[arg-type]
    attempt, said = refiner.run()
    assert refiner.asked == len(decider.asked) + 1 <= most
    return attempt, said, decider


def test_what_is_accurate_by_rules_alone_costs_one_verdict():
    attempt, said, decider = refine(set())
    assert (attempt.units, said, decider.asked) == ((), "", [])


@pytest.mark.parametrize("needed", [{0}, {1}, {5}, {2, 3}, {0, 17}, {30, 31, 32}, {59}])
def test_the_list_that_is_kept_is_the_one_that_is_needed(needed: set[int]):
    attempt, said, _ = refine(needed, most=40)
    assert set(attempt.units) == {WEAK[number] for number in needed}
    assert said.startswith(f"{len(needed)} tensors more are kept, which ")


def test_few_verdicts_give_a_longer_list_that_is_enough():
    attempt, _, _ = refine({0, 17, 40}, most=10)
    assert {WEAK[number] for number in (0, 17, 40)} <= set(attempt.units)


def test_where_no_list_is_enough_the_rules_are_followed_and_that_is_said():
    attempt, said, _ = refine({60 - 1}, most=2)
    assert attempt.units == ()
    assert said == "2 verdicts found no list of nodes that would bring it within its limits"


def test_two_runs_ask_the_same():
    assert refine({3, 21})[2].asked == refine({3, 21})[2].asked
