"""What an audit finds: how large and how small every float32 tensor of a model gets, and what half precision does."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from pydantic import Field

from passes.audit_ranges.instrumenting import Row
from passes.audit_ranges.kinds import Kind, Origin
from surgery.facts import Fact
from surgery.options import Options

LARGEST = 65504.0
"""The largest number of float16."""
HIDING = -1e4
"""A number of a mask from here on down hides what it is added to."""
NEWS = 1.1
"""What is not larger than what was known by this factor is nothing new."""
WHOLE_UP_TO = 2048.0
"""Up to here float16 holds every whole number."""


class Range(Options):
    """The numbers that one tensor held, over all samples, trips and branches.

    Every field joins with that of another run by the larger, the smaller or the sum, in any order.
    """

    kind: Kind = Field("activation", description="What it comes of: weights, positions and masks alone, or constants.")
    is_masked: bool = Field(False, description="A mask was put into it, so its large negative numbers hide.")
    low: float = Field(description="The most negative finite number, at most zero.")
    high: float = Field(description="The most positive finite number, at least zero.")
    smallest: float | None = Field(description="The smallest magnitude but zero, None if all were zero.")
    fraction: float = Field(description="The largest part behind the point; 0 where all numbers were whole.")
    elements: int = Field(description="How many numbers were seen.")
    infinite: int = Field(description="How many of them were infinite.")
    nan: int = Field(description="How many were not a number.")
    zero: int = Field(description="How many were zero.")
    underflow: int = Field(description="How many float16 would make zero that are not.")
    subnormal: int = Field(description="How many would have fewer digits in float16, being below 6.1e-5.")
    squares: float = Field(description="The sum of their squares.")
    error: float | None = Field(description="The largest error that half precision makes at its node alone.")
    compared: int = Field(description="How many results were compared for that.")
    squared_errors: float = Field(description="The sum of the squares of those errors.")
    broken: int = Field(description="How many finite results half precision alone made infinite or no number.")

    @property
    def peak(self) -> float:
        """The largest finite magnitude, but for numbers that only hide."""
        return self.high if self.is_masked or self.is_mask else max(-self.low, self.high)

    @property
    def is_mask(self) -> bool:
        """It is itself a mask to be added: positions say where its large negative numbers are."""
        return self.kind == "position" and self.low <= HIDING and self.high < -HIDING

    @property
    def rms(self) -> float:
        """The root mean square of the finite numbers."""
        finite = self.elements - self.infinite - self.nan
        return math.sqrt(self.squares / finite) if finite > 0 else 0.0

    @property
    def error_rms(self) -> float | None:
        """The root mean square of the errors that half precision makes at its node alone."""
        return math.sqrt(self.squared_errors / self.compared) if self.compared > 0 else None

    @property
    def is_whole(self) -> bool:
        """All numbers were whole."""
        return self.elements > 0 and self.fraction == 0

    def adds_to(self, known: Range | None) -> bool:
        """Return whether this says more than what was known, and it matters: how far the small are from zero does not.

        A peak matters within two decades of float16's largest number, errors where their root mean square is half a
        percent of the numbers'.
        """
        if known is None:
            return True
        if self.peak > max(NEWS * known.peak, LARGEST / 100):
            return True
        if (self.error_rms or 0.0) > max(NEWS * (known.error_rms or 0.0), self.rms / 200):
            return True
        sorts = ("infinite", "nan", "broken", *(("fraction",) if self.kind == "position" else ()))
        return any(getattr(self, name) and not getattr(known, name) for name in sorts)

    def joined(self, other: Range) -> Range:
        """Return what both saw."""
        least = [one.smallest for one in (self, other) if one.smallest is not None]
        errors = [one.error for one in (self, other) if one.error is not None]
        sums = (
            "elements",
            "infinite",
            "nan",
            "zero",
            "underflow",
            "subnormal",
            "squares",
            "compared",
            "squared_errors",
            "broken",
        )
        return self.model_copy(
            update={
                "low": min(self.low, other.low),
                "high": max(self.high, other.high),
                "smallest": min(least, default=None),
                "fraction": max(self.fraction, other.fraction),
                "error": max(errors, default=None),
                **{name: getattr(self, name) + getattr(other, name) for name in sums},
            }
        )


class Ranges(Fact):
    """The ranges of the float32 tensors of a model.

    Args:
        values: By the key of each value: its name, in a body after the names of what is around it.
        samples: How many samples were run.
    """

    values: dict[str, Range] = Field(
        description="By the name of the value, in a body after those of what is around it."
    )
    unseen: tuple[str, ...] = Field((), description="Values that were never computed: in a branch that no sample took.")
    samples: int = Field(description="How many samples were run.")

    def adds_to(self, known: Ranges) -> bool:
        """Return whether this says more than what was known."""
        return any(range_.adds_to(known.values.get(key)) for key, range_ in self.values.items())

    def joined(self, other: Ranges) -> Ranges:
        """Return what both audits saw; the order makes no difference."""
        keys = dict.fromkeys((*self.values, *other.values))
        values = {key: joined(one.values[key] for one in (self, other) if key in one.values) for key in keys}
        unseen = dict.fromkeys(key for key in (*self.unseen, *other.unseen) if key not in values)
        return Ranges(values=values, unseen=tuple(unseen), samples=self.samples + other.samples)


def shared(one: Ranges, other: Ranges, pairs: Iterable[tuple[str, str]]) -> tuple[Ranges, Ranges]:
    """Return both with equal ranges where they tell of one place, given the keys of such places in both."""
    ours, theirs = dict(one.values), dict(other.values)
    for key, like in pairs:
        if key in ours and like in theirs:
            ours[key], theirs[like] = ours[key].joined(theirs[like]), theirs[like].joined(ours[key])
    return one.model_copy(update={"values": ours}), other.model_copy(update={"values": theirs})


def joined(ranges: Iterable[Range]) -> Range:
    """Return what all saw."""
    first, *others = ranges
    for other in others:
        first = first.joined(other)
    return first


def as_ranges(
    rows: Sequence[Row], same: Mapping[str, str], tables: Mapping[str, np.ndarray], origins: Mapping[str, Origin]
) -> Ranges:
    """Read the tables that a model gives that measures itself.

    Args:
        rows: What the rows tell of; a value may have several, of either sort.
        same: Keys of values that hold the numbers of another, by that other's key.
        tables: By name of the table, one axis with the columns of all rows one after the other.
        origins: What each value comes of.
    """
    found: dict[str, dict[str, float]] = {}
    at = dict.fromkeys(tables, 0)
    for row in rows:
        numbers = found.setdefault(row.key, {})
        for table, columns in row.columns.items():
            start = at[table]
            at[table] += len(columns)
            for column, number in zip(columns, tables[table][start : at[table]].tolist(), strict=True):
                join = max if table == "maxima" else operator.add
                numbers[column] = join(numbers[column], number) if column in numbers else number
    seen = {key: numbers for key, numbers in found.items() if numbers["runs"]}
    values = {key: _as_range(numbers, origins.get(key, _ACTIVATION)) for key, numbers in seen.items()}
    for key, origin in same.items():
        if origin in values:
            values[key] = values[origin].model_copy(update={**_facts(origins.get(key, _ACTIVATION)), **_NO_ERROR})
    return Ranges(values=values, unseen=tuple(key for key in found if key not in seen), samples=1)


_ACTIVATION = Origin("activation")


def _facts(origin: Origin) -> dict[str, Any]:
    return {"kind": origin.kind, "is_masked": origin.is_masked}


# Values that only have another shape come of no arithmetic.
_NO_ERROR: Mapping[str, Any] = {"error": None, "compared": 0, "squared_errors": 0.0, "broken": 0}


def _as_range(numbers: Mapping[str, float], origin: Origin) -> Range:
    finite, infinite, nan, runs = (int(numbers[name]) for name in ("finite", "infinite", "nan", "runs"))
    compared = int(numbers.get("compared", finite))
    is_computed = "compared" in numbers
    return Range(
        **_facts(origin),
        low=-numbers["minus_low"] or 0.0,
        high=numbers["high"],
        smallest=-numbers["minus_smallest"] if math.isfinite(numbers["minus_smallest"]) else None,
        fraction=numbers["fraction"],
        elements=finite + infinite + nan - runs,
        infinite=infinite,
        nan=nan,
        zero=int(numbers["zero"]) - infinite - nan - runs,
        underflow=int(numbers["gone"] - numbers["zero"]),
        subnormal=int(numbers["small"] - numbers["gone"]),
        squares=numbers["squares"],
        error=numbers["error"] if is_computed else None,
        compared=compared - runs if is_computed else 0,
        squared_errors=numbers.get("squared_errors", 0.0),
        broken=finite - compared,
    )
