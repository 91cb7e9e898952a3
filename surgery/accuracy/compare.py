"""Comparing outputs: Polygraphy's statistics, with the cases that it forgives judged here.

Polygraphy pairs outputs by substring and position, passes a candidate that drops an output or gives none, lets int64
differences overflow, fails NaN against NaN and (by default) inf against inf. Here names must be equal and complete,
types and shapes too; integers and strings are compared without arithmetic; non-finite values must stand at the same
places on both sides, and only finite ones are handed to `SimpleCompareFunc`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from polygraphy.comparator import SimpleCompareFunc
from polygraphy.comparator.struct import IterationResult

from surgery.accuracy.quiet import quiet_polygraphy
from surgery.accuracy.verdict import Gap
from surgery.claims import Claim, Measure
from surgery.contract import Effect, Tolerance

LOGITS = "logits"
QUANTILE = 0.999
QUANTILE_NEEDS = 1000  # elements
SQUARABLE = 1e150
INCOMPARABLE = Gap(float("inf"), float("inf"), None, is_exact=False)


class Limits(Protocol):
    """What may be done to the numbers."""

    @property
    def effect(self) -> Effect:
        """Whether anything may."""

    def __call__(self, output: str) -> Tolerance:
        """Return how far an output of the source may move."""


@dataclass(frozen=True)
class OutputResult:
    """The comparison of one output; true when it is within its limit, as Polygraphy's results are.

    `output1_name` names no output to Polygraphy (0.53.6), which after each comparison makes statistics of both sides
    for its log, muted or not: that takes seconds for big logits, fails on strings and overflows on integers.
    """

    output: str
    gap: Gap
    text: str = ""
    index: tuple[int, ...] = ()
    output1_name: ClassVar[str] = ""

    def __bool__(self) -> bool:
        return not self.text


class OutputComparison:
    """A Polygraphy comparison function for one claim.

    Args:
        claim: What the candidate must give, for what the reference gave.
        limits: What may be done to the numbers.
        whole: The claim of the candidate on the source, which knows the outputs by the source's names.
    """

    def __init__(self, claim: Claim, limits: Limits, whole: Claim | None = None) -> None:
        self.claim = claim
        self.limits = limits
        self.whole = whole or claim
        self.results: list[OutputResult] = []

    def __call__(self, reference: IterationResult, candidate: IterationResult) -> OrderedDict[str, OutputResult]:
        """Compare one sample's outputs; what was found is also left in `results`."""
        self.results = list(self._compare(self.claim.expect(dict(reference)), dict(candidate)))
        return OrderedDict((result.output, result) for result in self.results)

    def _compare(self, expected: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray]) -> Iterable[OutputResult]:
        if not expected:
            yield OutputResult("(none)", INCOMPARABLE, "is not there: nothing at all was compared")
        for name in given:
            if name not in expected and name not in self.claim.extra:
                yield OutputResult(name, INCOMPARABLE, f"is new; the reference gives {_names(expected)}")
        for name, array in expected.items():
            if name not in given:
                yield OutputResult(name, INCOMPARABLE, f"is missing; the candidate gives {_names(given)}")
            else:
                yield self._compare_output(name, array, given[name])

    def _compare_output(self, name: str, reference: np.ndarray, candidate: np.ndarray) -> OutputResult:
        origin = self.whole.origin(name)
        return compare_output(
            name,
            reference,
            candidate,
            self.limits.effect,
            self.limits(origin),
            is_logits=origin == LOGITS,
            measure=self.claim.measure,
        )


def _names(arrays: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in arrays) or "nothing"


def compare_output(
    name: str,
    reference: np.ndarray,
    candidate: np.ndarray,
    effect: Effect,
    tolerance: Tolerance,
    *,
    is_logits: bool = False,
    measure: Measure = Measure.TENSORS,
) -> OutputResult:
    """Compare one output of one sample.

    Args:
        name: The output.
        reference: What it should be.
        candidate: What it is, of any type and shape.
        effect: `EXACT` asks for equal bits (any NaN equals any NaN), `CLOSE` for errors within the tolerance.
        tolerance: The limits of `CLOSE`.
        is_logits: It is [..., vocabulary] and compared by arg max too.
        measure: `TOKENS` counts the tokens [batch, length] that are equal.
    """
    if reference.dtype != candidate.dtype:
        return OutputResult(name, INCOMPARABLE, f"has type {candidate.dtype}, not {reference.dtype}")
    if _same_bits(reference, candidate):
        return OutputResult(name, Gap(top1=1.0 if is_logits or measure is Measure.TOKENS else None))
    if measure is Measure.TOKENS and reference.ndim == candidate.ndim == 2 and len(reference) == len(candidate):
        return _compare_tokens(name, reference, candidate, effect, tolerance)
    if reference.shape != candidate.shape:
        return OutputResult(name, INCOMPARABLE, f"has shape {list(candidate.shape)}, not {list(reference.shape)}")
    if not _is_float(reference.dtype):
        return _compare_discrete(name, reference, candidate)
    return _compare_floats(name, reference, candidate, effect, tolerance, is_logits)


def _is_float(dtype: np.dtype) -> bool:
    """Say whether values can be near each other: floats of any width, those of ml_dtypes included."""
    return dtype.kind in "fc" or dtype.name.startswith(("bfloat", "float"))


def _same_bits(reference: np.ndarray, candidate: np.ndarray) -> bool:
    if reference.shape != candidate.shape:
        return False
    if reference.dtype.kind in "OUS":
        return bool(np.all(reference == candidate))
    return bool(np.array_equal(_bits(reference), _bits(candidate)))


def _bits(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _compare_tokens(
    name: str, reference: np.ndarray, candidate: np.ndarray, effect: Effect, tolerance: Tolerance
) -> OutputResult:
    """Count equal tokens; where one side is longer, what it has more of counts as different."""
    common = min(reference.shape[1], candidate.shape[1])
    longest = max(reference.shape[1], candidate.shape[1])
    same = np.zeros((len(reference), longest), dtype=bool)
    same[:, :common] = reference[:, :common] == candidate[:, :common]
    index = _first(~same)
    share = float(np.mean(same))
    gap = Gap(1 - share, 1 - share, share, is_exact=False)
    text = f"has {share:.2%} of its tokens as they were"
    if effect is Effect.EXACT:
        return OutputResult(name, gap, f"{text}; the step must be exact", index)
    if share < tolerance.top1:
        return OutputResult(name, gap, f"{text}, limit {tolerance.top1:.2%} (top1)", index)
    return OutputResult(name, gap)


def _compare_discrete(name: str, reference: np.ndarray, candidate: np.ndarray) -> OutputResult:
    """Integers, booleans and strings are equal or not; no difference is taken, so none can overflow."""
    wrong = np.asarray(reference != candidate)
    index = _first(wrong)
    given, wanted = _plain(candidate[index]), _plain(reference[index])
    text = f"differs in {np.mean(wrong):.2%} of its elements: {given}, not {wanted}"
    return OutputResult(name, INCOMPARABLE, text, index)


def _plain(value: Any) -> str:
    """Write an element as people do: 3, not `np.int64(3)`."""
    return repr(value.item() if isinstance(value, np.generic) else value)


def _first(wrong: np.ndarray) -> tuple[int, ...]:
    return tuple(int(axis) for axis in np.unravel_index(int(np.argmax(wrong)), np.shape(wrong)))


def _compare_floats(
    name: str, reference: np.ndarray, candidate: np.ndarray, effect: Effect, tolerance: Tolerance, is_logits: bool
) -> OutputResult:
    left, right = _widened(reference), _widened(candidate)
    finite = np.isfinite(left)
    if not (finite.all() and np.isfinite(right).all()):
        one_sided = _one_sided(left, right)
        if one_sided.any():
            index = _first(one_sided)
            text = f"is {right[index]:g}, not {left[index]:g}"
            return OutputResult(name, INCOMPARABLE, text, index[: reference.ndim])
        left, right = np.where(finite, left, 0.0), np.where(finite, right, 0.0)
    is_exact = bool(np.array_equal(left, right) and np.array_equal(np.signbit(left), np.signbit(right)))
    peak = float(np.max(np.abs(left), initial=0.0)) or 1.0
    if peak > SQUARABLE:  # neither squares nor differences may overflow
        left, right = left / peak, right / peak
    with np.errstate(over="ignore"):
        distance = np.abs(left - right)
    scale = float(np.sqrt(np.sum(np.square(left)) / np.count_nonzero(finite))) if finite.any() else 1.0
    max_error, p999_error = (error / (scale or 1.0) for error in polygraphy_errors(left, right, distance, finite))
    top1 = _agreement(reference, candidate) if is_logits and reference.ndim else None
    gap = Gap(max_error, p999_error, top1, is_exact)
    over = _over_limit(gap, effect, tolerance, reference.size)
    return OutputResult(name, gap, over, _first(distance)[: reference.ndim])


def _one_sided(left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Say where one side is NaN or infinite and the other is not the same."""
    both_nan = np.isnan(left) & np.isnan(right)
    either_is_not_finite = ~(np.isfinite(left) & np.isfinite(right))
    return np.asarray(either_is_not_finite & (left != right) & ~both_nan)


def _widened(array: np.ndarray) -> np.ndarray:
    """Return the elements in float64; complex ones as pairs in a last axis."""
    if array.dtype.kind == "c":
        array = np.stack((array.real, array.imag), axis=-1)
    wide: np.ndarray = array.astype(np.float64)
    return wide


def polygraphy_errors(
    reference: np.ndarray, candidate: np.ndarray, distance: np.ndarray, finite: np.ndarray
) -> tuple[float, float]:
    """Return the largest and the 99.9th-percentile absolute error, as Polygraphy measures them.

    `SimpleCompareFunc` sorts what it is given several times: 2.3 s for logits of 100 positions at GPT-2's vocabulary.
    So it gets only the elements that decide both numbers, the thousandth that is furthest apart, and the quantile among
    those; a test compares the result with the whole.

    Args:
        reference: Finite numbers of any shape.
        candidate: Likewise.
        distance: Their absolute differences.
        finite: Which elements count.
    """
    count = int(np.count_nonzero(finite))
    if not count:
        return 0.0, 0.0
    position = QUANTILE * (count - 1)  # among all errors from small to large
    kept = count - int(position)
    order = np.argpartition(distance, -kept, axis=None)[-kept:]
    quantile = (position - int(position)) / (kept - 1) if kept > 1 else 0.0
    measure = SimpleCompareFunc(
        check_error_stat="quantile", error_quantile=quantile, find_output_func=lambda output, _, results: [output]
    )
    left = IterationResult(OrderedDict(output=reference.reshape(-1)[order]), runner_name="reference")
    right = IterationResult(OrderedDict(output=candidate.reshape(-1)[order]), runner_name="candidate")
    with quiet_polygraphy(), np.errstate(all="ignore"):  # it also takes means in float32, which nobody reads
        result = measure(left, right)["output"]
    return result.max_absdiff, result.quantile_absdiff


def _agreement(reference: np.ndarray, candidate: np.ndarray) -> float:
    same = reference.argmax(axis=-1) == candidate.argmax(axis=-1)
    return float(np.mean(same)) if same.size else 1.0


def _over_limit(gap: Gap, effect: Effect, tolerance: Tolerance, size: int) -> str:
    """Say which limit a gap is over; a gap that is not a number is over every limit.

    Of fewer than a thousand elements the 99.9th percentile is all but the largest, for which there is `max_error`.
    """
    if gap.is_exact:
        return ""
    if effect is Effect.EXACT and not gap.max_error:
        return "differs in the sign of a zero; the step must be exact"
    if effect is Effect.EXACT:
        return f"is off by {gap.max_error:.2g} of its RMS; the step must be exact"
    if not gap.max_error <= tolerance.max_error:
        return f"is off by {gap.max_error:.2g} of its RMS, limit {tolerance.max_error:g} (max_error)"
    if size >= QUANTILE_NEEDS and not gap.p999_error <= tolerance.p999_error:
        share = f"{gap.p999_error:.2g} of its RMS in one of 1000 elements"
        return f"is off by {share}, limit {tolerance.p999_error:g} (p999_error)"
    if gap.top1 is not None and not gap.top1 >= tolerance.top1:
        return f"has the same arg max in {gap.top1:.2%} of positions, limit {tolerance.top1:.2%} (top1)"
    return ""
