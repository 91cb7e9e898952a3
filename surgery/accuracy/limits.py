"""Limits: what a step, or all steps together, may do to each output."""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce

from surgery.contract import Effect, Tolerance
from surgery.recipe import Check

NO_GAP = Tolerance(max_error=0, p999_error=0, top1=1)


class Limits:
    """The sum of what the given tolerances allow; of none at all, nothing.

    Args:
        tolerances: One for each `CLOSE` step.
        check: The recipe's tolerances of single outputs, which go before each of these.
    """

    def __init__(self, tolerances: Sequence[Tolerance], check: Check) -> None:
        self._tolerances = tuple(tolerances)
        self._check = check

    @property
    def effect(self) -> Effect:
        """`EXACT` where nothing is allowed; no recipe can loosen that."""
        return Effect.CLOSE if self._tolerances else Effect.EXACT

    def __call__(self, output: str) -> Tolerance:
        """Return how far an output of the source may move."""
        own = self._check.outputs.get(output)
        changes = own.model_dump(exclude_none=True) if own is not None else {}
        return reduce(Tolerance.plus, (each.model_copy(update=changes) for each in self._tolerances), NO_GAP)

    def plus(self, tolerance: Tolerance) -> Limits:
        """Return what is allowed with one more `CLOSE` step."""
        return Limits((*self._tolerances, tolerance), self._check)
