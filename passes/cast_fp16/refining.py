"""Keeping more tensors in float32 until a verdict is within its limits: few of them, by few verdicts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from passes.cast_fp16.deciding import Attempt, Decider, Unit

_GROWTH = 4

Units = tuple[Unit, ...]


@dataclass
class Refiner:
    """Looks for a small list of tensors that brings a verdict within its limits.

    Those with the largest measured error go first: one, four, sixteen, ..., then the distance to the last failure is
    halved, then blocks of what is left are given back while the verdict allows it.

    Args:
        decider: Casts the models.
        first: What it made of them by rules alone.
        is_accurate: Asks for a verdict.
        most: How many verdicts may be asked for.
    """

    decider: Decider
    first: Attempt
    is_accurate: Callable[[Attempt], bool]
    most: int
    asked: int = field(init=False, default=0)
    _best: Attempt = field(init=False)

    def run(self) -> tuple[Attempt, str]:
        """Return what is accurate, or else what rules alone made, and a sentence if that took more than one verdict."""
        self._best = self.first
        if self._accepts(self.first):
            return self.first, ""
        failed, units = self._enough()
        if not units:
            return self.first, f"{self.asked} verdicts found no list of nodes that would bring it within its limits"
        units = self._without_blocks(self._shortened(failed, units))
        return self._best, f"{len(units)} tensors more are kept, which {self.asked} verdicts needed"

    def _enough(self) -> tuple[int, Units]:
        """Return how many tensors were not enough, and the first that are; none if there are not enough."""
        failed, count = 0, 1
        while failed < len(self.first.weak):
            units = tuple(self.first.weak[:count])
            if self._tries(units):
                return failed, units
            if self.asked >= self.most:
                break
            failed, count = count, count * _GROWTH
        return failed, ()

    def _shortened(self, failed: int, units: Units) -> Units:
        """Return the shortest beginning that verdicts show to be enough."""
        while len(units) - failed > 1 and self.asked < self.most:
            middle = (failed + len(units)) // 2
            if self._tries(units[:middle]):
                units = units[:middle]
            else:
                failed = middle
        return units

    def _without_blocks(self, units: Units) -> Units:
        """Return what is left when blocks that are not needed are given back, large ones first."""
        size = len(units) // 2
        while size:
            start = 0
            while start < len(units) > 1 and self.asked < self.most:
                fewer = units[:start] + units[start + size :]
                if fewer and self._tries(fewer):
                    units = fewer
                else:
                    start += size
            size //= 2
        return units

    def _tries(self, units: Units) -> bool:
        if self.asked >= self.most:
            return False
        attempt = self.decider.attempt(units)
        if not self._accepts(attempt):
            return False
        self._best = attempt
        return True

    def _accepts(self, attempt: Attempt) -> bool:
        self.asked += 1
        return self.is_accurate(attempt)
