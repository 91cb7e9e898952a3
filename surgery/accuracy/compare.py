"""Comparing outputs: Polygraphy's statistics, with the cases that it forgives judged here.

Polygraphy pairs outputs by substring and position, passes a candidate that drops an output or gives none, lets int64
differences overflow, fails NaN against NaN and (by default) inf against inf. Here names must be equal and complete,
types and shapes too; integers and strings are compared without arithmetic; non-finite values must stand at the same
places on both sides, and only the finite ones are handed to `SimpleCompareFunc`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
from polygraphy.comparator import SimpleCompareFunc
from polygraphy.comparator.struct import IterationResult
from polygraphy.exception import PolygraphyException

from surgery.accuracy.verdict import Gap
from surgery.contract import Effect, Tolerance

LOGITS = "logits"
QUANTILE = 0.999


@dataclass(frozen=True)
class OutputResult:
    """The comparison of one output; true when it is within its limit, as Polygraphy's results are."""

    output: str
    gap: Gap
    text: str = ""
    index: tuple[int, ...] = ()

    def __bool__(self) -> bool:
        return not self.text


class OutputComparison:
    """A Polygraphy comparison function for one claim.

    Args:
        expect: Turns the reference's outputs into what the candidate must give.
        effect: What the step may do to the numbers.
        tolerance_of: The tolerance of an output, by its name.
        extra: Outputs of the candidate that the reference does not give.
    """

    def __init__(
        self,
        expect: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
        effect: Effect,
        tolerance_of: Callable[[str], Tolerance],
        extra: frozenset[str] = frozenset(),
    ) -> None:
        self.expect = expect
        self.effect = effect
        self.tolerance_of = tolerance_of
        self.extra = extra
        self.results: list[OutputResult] = []

    def __call__(self, reference: IterationResult, candidate: IterationResult) -> OrderedDict[str, OutputResult]:
        """Compare one sample's outputs; what was found is also left in `results`."""
        self.results = list(self._compare(self.expect(dict(reference)), dict(candidate)))
        return OrderedDict((result.output, result) for result in self.results)

    def _compare(
        self, expected: Mapping[str, np.ndarray], given: Mapping[str, np.ndarray]
    ) -> Iterable[OutputResult]:
        worst = Gap(float("inf"), float("inf"), None, is_exact=False)
        if not expected:
            yield OutputResult("(none)", worst, "is not there: nothing at all was compared")
        for name in given:
            if name not in expected and name not in self.extra:
                yield OutputResult(name, worst, f"is new; the reference gives {_names(expected)}")
        for name, array in expected.items():
            if name not in given:
                yield OutputResult(name, worst, f"is missing; the candidate gives {_names(given)}")
            else:
                yield compare_output(name, array, given[name], self.effect, self.tolerance_of(name))


def _names(arrays: Iterable[str]) -> str:
    return ", ".join(repr(name) for name in arrays) or "nothing"


def compare_output(
    name: str, reference: np.ndarray, candidate: np.ndarray, effect: Effect, tolerance: Tolerance
) -> OutputResult:
    """Compare one output of one sample.

    Args:
        name: The output; `logits` [..., vocabulary] are compared by arg max too.
        reference: What it should be.
        candidate: What it is, of any type and shape.
        effect: `EXACT` asks for equal bits (any NaN equals any NaN), `CLOSE` for errors within the tolerance.
        tolerance: The limits of `CLOSE`.
    """
    infinite = Gap(float("inf"), float("inf"), None, is_exact=False)
    if reference.dtype != candidate.dtype:
        return OutputResult(name, infinite, f"has type {candidate.dtype}, not {reference.dtype}")
    if reference.shape != candidate.shape:
        return OutputResult(name, infinite, f"has shape {list(candidate.shape)}, not {list(reference.shape)}")
    if _same_bits(reference, candidate):
        return OutputResult(name, Gap(top1=1.0 if name == LOGITS else None))
    if not _is_float(reference.dtype):
        return _compare_discrete(name, reference, candidate)
    return _compare_floats(name, reference, candidate, effect, tolerance)


def _is_float(dtype: np.dtype) -> bool:
    """Say whether values can be near each other: floats of any width, those of ml_dtypes included."""
    return dtype.kind in "fcV" or dtype.name.startswith(("bfloat", "float"))


def _same_bits(reference: np.ndarray, candidate: np.ndarray) -> bool:
    if reference.dtype.kind in "OUS":
        return bool(np.all(reference == candidate))
    return np.ascontiguousarray(reference).tobytes() == np.ascontiguousarray(candidate).tobytes()


def _compare_discrete(name: str, reference: np.ndarray, candidate: np.ndarray) -> OutputResult:
    """Integers, booleans and strings are equal or not; no difference is taken, so none can overflow."""
    wrong = np.argwhere(reference != candidate)
    index = tuple(int(axis) for axis in wrong[0])
    share = len(wrong) / reference.size
    text = f"differs in {share:.2%} of its elements: {candidate[index]!r}, not {reference[index]!r}"
    return OutputResult(name, Gap(float("inf"), float("inf"), None, is_exact=False), text, index)


def _compare_floats(
    name: str, reference: np.ndarray, candidate: np.ndarray, effect: Effect, tolerance: Tolerance
) -> OutputResult:
    wide_reference, wide_candidate = reference.astype(np.float64), candidate.astype(np.float64)
    broken = _first_one_sided(wide_reference, wide_candidate)
    if broken is not None:
        text = f"is {wide_candidate[broken]:g}, not {wide_reference[broken]:g}"
        return OutputResult(name, Gap(float("inf"), float("inf"), None, is_exact=False), text, broken)
    finite = np.isfinite(wide_reference)
    wide_reference, wide_candidate = (np.where(finite, wide, 0.0) for wide in (wide_reference, wide_candidate))
    scale = float(np.sqrt(np.mean(np.square(wide_reference)))) or 1.0
    max_error, p999_error = (error / scale for error in _polygraphy_errors(name, wide_reference, wide_candidate))
    top1 = _agreement(wide_reference, wide_candidate) if name == LOGITS and reference.ndim else None
    is_exact = _equal_but_for_nan(reference, candidate, finite)
    gap = Gap(max_error, p999_error, top1, is_exact)
    distance = np.abs(wide_reference - wide_candidate)
    index = tuple(int(axis) for axis in np.unravel_index(int(np.argmax(distance)), distance.shape))
    return OutputResult(name, gap, _over_limit(gap, effect, tolerance), index)


def _first_one_sided(reference: np.ndarray, candidate: np.ndarray) -> tuple[int, ...] | None:
    """Return where one side is NaN or infinite and the other is not the same."""
    both_nan = np.isnan(reference) & np.isnan(candidate)
    non_finite = ~(np.isfinite(reference) & np.isfinite(candidate))
    wrong = np.argwhere(non_finite & ~both_nan & (reference != candidate))
    return tuple(int(axis) for axis in wrong[0]) if len(wrong) else None


def _equal_but_for_nan(reference: np.ndarray, candidate: np.ndarray, finite: np.ndarray) -> bool:
    same = np.array_equal(np.where(finite, reference, 0), np.where(finite, candidate, 0))
    signs = np.signbit(reference.astype(np.float64)) == np.signbit(candidate.astype(np.float64))
    return bool(same and np.all(signs | ~finite))


def _polygraphy_errors(name: str, reference: np.ndarray, candidate: np.ndarray) -> tuple[float, float]:
    """Return the largest and the 99.9th-percentile absolute error, as Polygraphy measures them."""
    measure = SimpleCompareFunc(
        check_error_stat="quantile", error_quantile=QUANTILE, find_output_func=lambda output, _, results: [output]
    )
    left = IterationResult(OrderedDict({name: reference}), runner_name="reference")
    right = IterationResult(OrderedDict({name: candidate}), runner_name="candidate")
    try:
        result = measure(left, right)[name]
    except PolygraphyException as error:  # pragma: no cover - both sides hold the same finite array
        raise AssertionError(f"Polygraphy could not compare {name!r}: {error}") from error
    return result.max_absdiff, result.quantile_absdiff


def _agreement(reference: np.ndarray, candidate: np.ndarray) -> float:
    same = reference.argmax(axis=-1) == candidate.argmax(axis=-1)
    return float(np.mean(same)) if same.size else 1.0


def _over_limit(gap: Gap, effect: Effect, tolerance: Tolerance) -> str:
    if gap.is_exact:
        return ""
    if effect is Effect.EXACT:
        return f"is off by {gap.max_error:.2g} of its RMS; the step must be exact"
    if gap.max_error > tolerance.max_error:
        return f"is off by {gap.max_error:.2g} of its RMS, limit {tolerance.max_error:g} (max_error)"
    if gap.p999_error > tolerance.p999_error:
        return f"is off by {gap.p999_error:.2g} of its RMS in one of 1000 elements, limit {tolerance.p999_error:g} (p999_error)"
    if gap.top1 is not None and gap.top1 < tolerance.top1:
        return f"has the same arg max in {gap.top1:.2%} of positions, limit {tolerance.top1:.2%} (top1)"
    return ""
