"""Comparing one output: every type, every way of being wrong, and what it costs."""

from __future__ import annotations

import time
from collections import OrderedDict

import ml_dtypes
import numpy as np
import pytest
from polygraphy.comparator.struct import IterationResult

from surgery import Claim, Effect, Tolerance
from surgery.accuracy.compare import OutputComparison, OutputResult, compare_output, polygraphy_errors
from surgery.accuracy.limits import Limits
from surgery.claims import Measure, Program, Take
from surgery.recipe import Check, OutputTolerance

LOOSE = Tolerance(max_error=0.5, p999_error=0.5, top1=0)
FLOATS = ("float16", "float32", "float64", "bfloat16", "float8_e4m3fn", "float8_e5m2")


def exact(reference: np.ndarray, candidate: np.ndarray, **options: object) -> OutputResult:
    return compare_output("y", reference, candidate, Effect.EXACT, Tolerance(), **options)  # type: ignore[arg-type]


def close(
    reference: np.ndarray, candidate: np.ndarray, tolerance: Tolerance = LOOSE, **options: object
) -> OutputResult:
    return compare_output("y", reference, candidate, Effect.CLOSE, tolerance, **options)  # type: ignore[arg-type]


def numbers(kind: str) -> np.ndarray:
    return np.array([1.0, -2.0, 0.5, 4.0]).astype(np.dtype(getattr(ml_dtypes, kind, kind)))


@pytest.mark.parametrize("kind", FLOATS)
def test_floats_of_every_width_are_equal_or_near_or_far(kind: str) -> None:
    reference, near, far = numbers(kind), numbers(kind), numbers(kind)
    near[1], far[1] = -2.5, 4.0
    assert exact(reference, numbers(kind)).gap.is_exact
    assert not exact(reference, near)
    assert close(reference, near)
    assert close(reference, near).index == (1,)
    assert "is off by 2.6 of its RMS, limit 0.5 (max_error)" in close(reference, far).text


@pytest.mark.parametrize("kind", FLOATS)
def test_nan_on_one_side_fails_and_on_both_passes(kind: str) -> None:
    reference, candidate = numbers(kind), numbers(kind)
    candidate[2] = np.nan
    assert close(reference, candidate).text == "is nan, not 0.5"
    assert close(candidate, reference).text == "is 0.5, not nan"
    assert exact(candidate, candidate.copy())


def test_nans_of_other_bits_are_equal() -> None:
    reference = np.array([0x7FC00000, 0x3F800000], dtype=np.uint32).view(np.float32)
    candidate = np.array([0xFFC00001, 0x3F800000], dtype=np.uint32).view(np.float32)
    assert exact(reference, candidate).gap.is_exact


def test_infinities_must_be_on_both_sides_and_of_one_sign() -> None:
    reference, candidate = np.array([np.inf, 1, -np.inf]), np.array([np.inf, 1, np.inf])
    assert exact(reference, reference.copy())
    assert close(reference, candidate).text == "is inf, not -inf"
    assert close(reference, candidate).index == (2,)


def test_what_is_not_finite_takes_no_part_in_the_scale() -> None:
    reference = np.array([1.0, *[-np.inf] * 99])
    candidate = np.array([1.001, *[-np.inf] * 99])
    assert close(reference, candidate).gap.max_error == pytest.approx(0.001)


def test_nothing_but_nan_is_equal_to_nothing_but_nan() -> None:
    reference = np.array([np.nan, np.nan], dtype=np.float32)
    assert exact(reference, np.array([0xFFC00001] * 2, dtype=np.uint32).view(np.float32))


@pytest.mark.parametrize("kind", ["complex64", "complex128"])
def test_the_imaginary_part_counts(kind: str) -> None:
    reference = np.array([[1 + 1j, 2 - 1j]], dtype=kind)
    candidate = np.array([[1 + 1j, 2 + 1j]], dtype=kind)
    assert exact(reference, reference.copy())
    assert not close(reference, candidate)
    assert close(reference, candidate).index == (0, 1)


@pytest.mark.parametrize("kind", ["int8", "int32", "int64", "uint64", "bool", "int4", "uint4"])
def test_integers_are_equal_or_not_however_loose_the_limit(kind: str) -> None:
    dtype = np.dtype(getattr(ml_dtypes, kind, kind))
    reference, candidate = np.array([[0, 1]]).astype(dtype), np.array([[0, 0]]).astype(dtype)
    assert exact(reference, reference.copy())
    assert "differs in 50.00% of its elements" in close(reference, candidate).text
    assert close(reference, candidate).index == (0, 1)


def test_both_ends_of_int64_do_not_overflow_into_each_other() -> None:
    ends = np.iinfo(np.int64)
    found = close(np.array([ends.max]), np.array([ends.min]))
    assert found.text == f"differs in 100.00% of its elements: {ends.min}, not {ends.max}"


@pytest.mark.parametrize("kind", [object, np.str_])
def test_strings_are_equal_or_not(kind: type) -> None:
    reference, candidate = np.array(["a", "b"], dtype=kind), np.array(["a", "c"], dtype=kind)
    assert exact(reference, reference.copy())
    assert close(reference, candidate).text == "differs in 50.00% of its elements: 'c', not 'b'"


@pytest.mark.parametrize("kind", ["float32", "int64", "bool", "object"])
def test_outputs_without_elements_are_equal_if_their_shapes_are(kind: str) -> None:
    empty = np.zeros((2, 0, 3), dtype=kind)
    assert exact(empty, empty.copy())
    assert close(empty, np.zeros((2, 0, 4), dtype=kind)).text == "has shape [2, 0, 4], not [2, 0, 3]"


@pytest.mark.parametrize(("one", "other"), [(1.5, 2.5), (1, 2), (True, False), (1.5, np.nan)])
def test_scalars_are_compared(one: float, other: float) -> None:
    reference, candidate = np.array(one), np.array(other, dtype=np.array(one).dtype)
    assert exact(reference, reference.copy())
    assert not exact(reference, candidate)
    assert exact(reference, candidate).index == ()


def test_types_and_shapes_are_compared() -> None:
    reference = np.ones((2, 3), dtype=np.float32)
    assert close(reference, reference.astype(np.float64)).text == "has type float64, not float32"
    assert close(reference, reference.T).text == "has shape [3, 2], not [2, 3]"
    assert close(reference, reference[None]).text == "has shape [1, 2, 3], not [2, 3]"
    assert not close(np.ones(1, np.int64), np.ones(1, bool))


def test_the_sign_of_a_zero_is_a_difference_without_size() -> None:
    reference, candidate = np.array([0.0, 1.0]), np.array([-0.0, 1.0])
    assert exact(reference, candidate).text == "differs in the sign of a zero; the step must be exact"
    assert close(reference, candidate, Tolerance(max_error=0, p999_error=0))


def test_huge_numbers_do_not_overflow_into_a_pass() -> None:
    reference, candidate = np.array([1e300, -1e300]), np.array([-1e300, 1e300])
    assert close(reference, candidate).gap.max_error == pytest.approx(2)
    assert not close(np.array([1.7e308, 1.0]), np.array([-1.7e308, 1.0]))


def test_an_output_of_zeros_is_measured_in_absolute_terms() -> None:
    assert close(np.zeros(3), np.full(3, 0.4)).gap.max_error == pytest.approx(0.4)


def test_the_999th_thousandth_has_a_limit_of_its_own() -> None:
    reference, candidate = np.ones(10_000), np.ones(10_000)
    candidate[:5] += 0.01
    limit = Tolerance(max_error=0.1, p999_error=1e-4)
    assert close(reference, candidate, limit)
    candidate[:50] += 0.01
    assert "in one of 1000 elements, limit 0.0001 (p999_error)" in close(reference, candidate, limit).text


def test_logits_are_compared_by_arg_max_and_other_outputs_are_not() -> None:
    reference = np.array([[1.0, 1.0001], [3.0, 1.0]])
    candidate = np.array([[1.0001, 1.0], [3.0, 1.0]])
    limit = Tolerance(max_error=0.1, p999_error=0.1, top1=0.9)
    assert close(reference, candidate, limit, is_logits=True).gap.top1 == 0.5
    assert not close(reference, candidate, limit, is_logits=True)
    assert close(reference, candidate, limit)


def test_masked_logits_keep_their_arg_max() -> None:
    """Were -inf taken for 0, it would be the arg max of these."""
    reference = np.array([[-np.inf, -5.0, -4.0]])
    assert close(reference, np.array([[-np.inf, -4.0, -5.0]]), is_logits=True).gap.top1 == 0


def test_tokens_are_counted() -> None:
    reference, candidate = np.array([[1, 2, 3, 4]]), np.array([[1, 2, 9, 9]])
    found = exact(reference, candidate, measure=Measure.TOKENS)
    assert found.text == "has 50.00% of its tokens as they were; the step must be exact"
    assert found.index == (0, 2)
    assert close(reference, candidate, Tolerance(top1=0.5), measure=Measure.TOKENS)
    assert "limit 60.00% (top1)" in close(reference, candidate, Tolerance(top1=0.6), measure=Measure.TOKENS).text


def test_a_generation_that_ends_elsewhere_differs_in_its_rest() -> None:
    found = close(np.array([[1, 2, 3, 4]]), np.array([[1, 2]]), Tolerance(top1=0.6), measure=Measure.TOKENS)
    assert "has 50.00% of its tokens" in found.text
    assert exact(np.array([[1, 2]]), np.array([[1, 2]]), measure=Measure.TOKENS).gap.top1 == 1


@pytest.mark.parametrize("size", [1, 2, 7, 999, 1000, 1001, 2500])
def test_the_errors_are_those_of_the_whole(size: int) -> None:
    random = np.random.default_rng(size)
    reference = random.standard_normal(size)
    candidate = reference + 1e-3 * random.standard_normal(size)
    distance = np.abs(reference - candidate)
    errors = polygraphy_errors(reference, candidate, distance, np.ones(size, dtype=bool))
    assert errors == pytest.approx((distance.max(), np.quantile(distance, 0.999)), rel=1e-9)


def test_big_logits_are_compared_at_once() -> None:
    random = np.random.default_rng(0)
    reference = random.standard_normal((1, 100, 50257)).astype(np.float32)
    candidate = reference * np.float32(1 + 1e-6)
    close(reference[:, :1], candidate[:, :1])  # what is imported at the first use
    best = min(_seconds(reference, candidate) for _ in range(3))
    assert best < 0.6  # 0.2 on an idle machine, 2.5 were all of it given to Polygraphy


def _seconds(reference: np.ndarray, candidate: np.ndarray) -> float:
    start = time.process_time()
    close(reference, candidate, is_logits=True)
    return time.process_time() - start


def compare(claim: Claim, reference: dict[str, np.ndarray], candidate: dict[str, np.ndarray]) -> dict[str, str]:
    """Return what is wrong by output, as Polygraphy would get it."""
    limits = Limits([Tolerance(top1=0.9)], Check(outputs={"logits": OutputTolerance(max_error=0.1, p999_error=0.1)}))
    comparison = OutputComparison(claim, limits)
    results = comparison(
        IterationResult(OrderedDict(reference), runner_name="before"),
        IterationResult(OrderedDict(candidate), runner_name="after"),
    )
    return {name: result.text for name, result in results.items() if not result}


SAME = Claim.same("model")
ONE = np.ones((2, 3), dtype=np.float32)


def test_the_whole_set_of_outputs_must_be_there_by_exact_names() -> None:
    assert compare(SAME, {"a": ONE, "b": ONE}, {"b": ONE, "a": ONE}) == {}
    assert compare(SAME, {"a": ONE, "b": ONE}, {"a": ONE}) == {"b": "is missing; the candidate gives 'a'"}
    assert compare(SAME, {"a": ONE}, {"a": ONE, "b": ONE}) == {"b": "is new; the reference gives 'a'"}
    assert set(compare(SAME, {"logits": ONE}, {"logits_1": ONE})) == {"logits", "logits_1"}


def test_no_outputs_at_all_are_a_failure() -> None:
    assert list(compare(SAME, {}, {})) == ["(none)"]
    claim = Claim(Program("model"), Program("model"), drops=frozenset({"a"}), extra=frozenset({"b"}))
    assert list(compare(claim, {"a": ONE}, {"b": ONE})) == ["(none)"]


def test_a_renamed_output_keeps_its_own_tolerance_and_its_arg_max() -> None:
    claim = Claim(Program("model"), Program("model"), outputs={"scores": Take("logits")})
    assert compare(claim, {"logits": ONE}, {"scores": ONE * np.float32(1.05)}) == {}
    flipped = np.array([[1.01, 1, 1], [1, 1.01, 1]], dtype=np.float32)
    assert "same arg max in 50.00% of positions" in compare(claim, {"logits": ONE}, {"scores": flipped})["scores"]


def test_the_limits_of_several_steps_add_up_for_each_output() -> None:
    check = Check(outputs={"y": OutputTolerance(max_error=0.25)})
    limits = Limits([], check).plus(Tolerance(max_error=0.01)).plus(Tolerance(max_error=0.02, top1=0.99))
    assert limits.effect is Effect.CLOSE
    assert limits("y").max_error == 0.5
    assert limits("other").max_error == pytest.approx(0.03)
    assert limits("other").top1 == pytest.approx(0.989)


def test_no_recipe_loosens_what_is_exact() -> None:
    limits = Limits([], Check(outputs={"y": OutputTolerance(max_error=0.25)}))
    assert limits.effect is Effect.EXACT
    assert limits("y").max_error == 0
