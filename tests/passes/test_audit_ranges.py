"""audit_ranges: what is measured equals what numpy says of the same tensors, in every scope."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import pytest

from passes.audit_ranges import AuditRanges, Range, Ranges
from surgery.contract import Bundle, Context, Feeds
from surgery.errors import Refused, SurgeryError
from surgery.runtime.farm import run_all
from surgery.runtime.sessions import open_session
from surgery.text import parse

LARGE = np.float32(3e38)


def once(samples: Sequence[dict[str, np.ndarray]]) -> Feeds:
    """Return what gives samples of the user's own: in the first round, and none in others."""
    return lambda _, sampling=None: iter(() if sampling is not None and sampling.round else samples)


def audited(model: ir.Model | str, *samples: dict[str, np.ndarray], **options: object) -> Ranges:
    """Return the ranges of a model on samples."""
    bundle = Bundle({"model": parse(model) if isinstance(model, str) else model})

    def context(role: str) -> Context:
        return Context(role=role, run_all=run_all, feeds=once(samples))

    ranges = AuditRanges(patience=100, **options).analyze(bundle, context)["model"]
    assert isinstance(ranges, Ranges)
    return ranges


def floats(*numbers: float) -> np.ndarray:
    return np.array(numbers, np.float32)


def seen(range_: Range) -> dict[str, object]:
    """Return what was counted."""
    names = ("low", "high", "smallest", "elements", "infinite", "nan", "zero", "underflow", "subnormal")
    return {name: getattr(range_, name) for name in names}


def numpy_says(array: np.ndarray) -> dict[str, object]:
    """Return the same by numpy."""
    finite = array[np.isfinite(array)]
    others = np.abs(finite[finite != 0])
    with np.errstate(over="ignore"):
        halves = np.abs(others.astype(np.float16))
    return {
        "low": float(min(finite.min(initial=0), 0)),
        "high": float(max(finite.max(initial=0), 0)),
        "smallest": float(others.min()) if others.size else None,
        "elements": array.size,
        "infinite": int(np.isinf(array).sum()),
        "nan": int(np.isnan(array).sum()),
        "zero": int((array == 0).sum()),
        "underflow": int((halves == 0).sum()),
        "subnormal": int(((halves > 0) & (halves < np.finfo(np.float16).tiny)).sum()),
    }


NEGATED = "g (float[n] x) => (float[n] y) { y = Neg(x) }"


@pytest.mark.parametrize(
    "array",
    [
        floats(1, -2, 3.5),
        floats(0, -0.0, 1e-8, -3e-8, 6e-8, 5e-5, 6.2e-5),
        np.array([2**-14, 2**-14 - 2**-25, 2**-14 - 2**-24, 2**-25, 2**-25 + 2**-40, 2**-24], np.float32),
        floats(65504, -65520, 1e30, LARGE, -LARGE),
        floats(np.inf, -np.inf, np.nan, 2),
        floats(np.nan),
        floats(),
        np.random.default_rng(0).standard_normal(10_000).astype(np.float32) * np.float32(1e-4),
    ],
    ids=["ordinary", "small", "between two halves", "large", "not finite", "nothing but nan", "empty", "many"],
)
def test_what_is_counted_is_what_numpy_counts(array):
    ranges = audited(NEGATED, {"x": array})
    assert seen(ranges.values["x"]) == numpy_says(array)
    assert seen(ranges.values["y"]) == numpy_says(-array)


@pytest.mark.parametrize("opset", [11, 12, 13, 17, 18, 21, 23])
def test_every_operator_set_from_11_on_is_measured(opset):
    model = parse(f'<ir_version: 7, opset_import: ["" : {opset}]> {NEGATED}')
    assert seen(audited(model, {"x": floats(1, -4)}).values["y"]) == numpy_says(floats(-1, 4))


def test_an_older_operator_set_is_refused_with_a_way_out():
    model = parse(f'<ir_version: 5, opset_import: ["" : 10]> {NEGATED}')
    with pytest.raises(Refused, match="model: opset 10 is too old to be measured") as refusal:
        audited(model, {"x": floats(1)})
    assert "export for opset 11" in str(refusal.value.hint)


def test_samples_are_joined():
    ranges = audited(NEGATED, {"x": floats(1, 0)}, {"x": floats(-70_000)}, {"x": floats(1e-9, np.inf)})
    assert seen(ranges.values["x"]) == numpy_says(floats(1, 0, -70_000, 1e-9, np.inf))
    assert ranges.samples == 3


def test_joining_is_associative_and_commutative():
    parts = [audited(NEGATED, {"x": array}) for array in (floats(1, 0), floats(-70_000, 2e-9), floats(np.nan))]
    first, second, third = parts
    whole = first.joined(second).joined(third)
    assert whole == first.joined(second.joined(third))
    assert whole.values == third.joined(first).joined(second).values


def test_whole_numbers_are_told_from_others():
    ranges = audited(NEGATED, {"x": floats(3000, -1, 0)})
    assert ranges.values["y"].is_whole
    assert not audited(NEGATED, {"x": floats(3000, -1.5)}).values["y"].is_whole


def test_root_mean_squares_leave_out_what_is_not_finite():
    assert audited(NEGATED, {"x": floats(3, 4, np.inf)}).values["x"].rms == pytest.approx(np.sqrt(12.5))


def test_an_elementwise_node_has_the_error_that_numpy_makes_in_half_precision():
    random = np.random.default_rng(1)
    a, b = (random.standard_normal(1000).astype(np.float32) * 100 for _ in range(2))
    ranges = audited("g (float[n] a, float[n] b) => (float[n] y) { y = Add(a, b) }", {"a": a, "b": b})
    half = (a.astype(np.float16) + b.astype(np.float16)).astype(np.float32)
    errors = np.abs(a + b - half)
    assert ranges.values["y"].error == errors.max()
    assert ranges.values["y"].error_rms == pytest.approx(np.sqrt((errors**2).mean()), rel=1e-5)
    assert ranges.values["y"].broken == 0


def test_the_error_is_that_of_one_node_alone():
    """The square leaves float16; the mean of squares would fit if its input did."""
    ranges = audited(
        "g (float[n] x) => (float[1] y) { square = Mul(x, x)  y = ReduceMean <keepdims = 1> (square) }",
        {"x": floats(300, 1, 2)},
    )
    assert ranges.values["square"].broken == 1
    assert ranges.values["y"].broken == 1  # given 90,000 it is given infinity
    ranges = audited(
        "g (float[n] x) => (float[1] z) {"
        " square = Mul(x, x)  mean = ReduceMean <keepdims = 1> (square)  z = Sqrt(mean) }",
        {"x": floats(300, *[0.0] * 9)},
    )
    assert ranges.values["mean"].peak == 9000
    assert ranges.values["z"].broken == 0


def test_nodes_that_move_numbers_have_no_error():
    ranges = audited(
        "g (float[n] x) => (float[m,1] y) { axes = Constant <value_ints = [1]> ()  y = Unsqueeze(x, axes) }",
        {"x": floats(1.0001)},
    )
    assert ranges.values["y"].error is None
    assert seen(ranges.values["y"]) == seen(ranges.values["x"])


def test_a_reshaped_value_has_the_range_and_not_the_error_of_what_it_was():
    ranges = audited(
        "g (float[n] x) => (float[m,1] y) {"
        " s = Add(x, x)  axes = Constant <value_ints = [1]> ()  y = Unsqueeze(s, axes) }",
        {"x": floats(40_000)},
    )
    assert ranges.values["s"].broken == 1
    assert (ranges.values["y"].high, ranges.values["y"].broken) == (80_000, 0)


BRANCHES = """
g (bool flag, float[n] x) => (float[n] y) {
    y = If (flag) <
        then_branch = then_g () => (float[n] doubled) { doubled = Add(x, x) },
        else_branch = else_g () => (float[n] squared) { squared = Mul(x, x) }
    >
}
"""


def test_both_branches_are_seen():
    ranges = audited(BRANCHES, {"flag": np.array(True), "x": floats(3)}, {"flag": np.array(False), "x": floats(300)})
    assert ranges.values["y.then_branch/doubled"].high == 6
    assert ranges.values["y.else_branch/squared"].high == 90_000
    assert ranges.values["y.else_branch/squared"].broken == 1
    assert ranges.values["y"].high == 90_000
    assert ranges.unseen == ()


def test_a_branch_that_no_sample_takes_is_said():
    ranges = audited(BRANCHES, {"flag": np.array(True), "x": floats(3)})
    assert ranges.unseen == ("y.else_branch/squared",)
    assert "y.else_branch/squared" not in ranges.values


LOOP = """
g (int64 trips, float[n] x) => (float[n] y, float[t, n] all) {
    go = Constant <value = bool {1}> ()
    y, all = Loop (trips, go, x) <body = body (int64 trip, bool before, float[n] state) =>
        (bool after, float[n] next, float[n] next_too)
    {
        after = Identity(before)
        ten = Constant <value = float {10}> ()
        next = Mul(state, ten)
        next_too = Identity(next)
    }>
}
"""


def test_all_trips_of_a_loop_are_seen():
    ranges = audited(LOOP, {"trips": np.array(5), "x": floats(1, -2)})
    inner = ranges.values["y.body/next"]
    assert (inner.low, inner.high, inner.elements, inner.broken) == (-200_000, 100_000, 10, 2)


def test_a_loop_without_a_trip_is_not_seen():
    ranges = audited(LOOP, {"trips": np.array(0), "x": floats(1)})
    assert "y.body/next" in ranges.unseen
    assert ranges.joined(audited(LOOP, {"trips": np.array(1), "x": floats(1)})).unseen == ()


SCAN = """
g (float[n, 2] x) => (float[2] total, float[n, 2] sums) {
    start = Constant <value = float[2] {0, 0}> ()
    total, sums = Scan <num_scan_inputs = 1, scan_output_axes = [0], body = body (float[2] before, float[2] row) =>
        (float[2] after, float[2] out)
    {
        after = Add(before, row)
        out = Identity(after)
    }> (start, x)
}
"""


def test_all_rows_of_a_scan_are_seen():
    ranges = audited(SCAN, {"x": np.array([[1, 2], [3, 4]], np.float32)})
    assert (ranges.values["total.body/after"].high, ranges.values["total.body/after"].elements) == (6, 4)


def test_a_branch_inside_a_loop_is_seen():
    model = """
    g (int64 trips, float[n] x) => (float[n] y) {
        go = Constant <value = bool {1}> ()
        y = Loop (trips, go, x) <body = body (int64 trip, bool before, float[n] state) => (bool after, float[n] next) {
            after = Identity(before)
            zero = Constant <value = int64 {0}> ()
            is_first = Equal(trip, zero)
            next = If (is_first) <
                then_branch = first () => (float[n] a) { a = Add(state, x) },
                else_branch = later () => (float[n] b) { b = Mul(state, x) }
            >
        }>
    }
    """
    ranges = audited(model, {"trips": np.array(3), "x": floats(10)})
    assert ranges.values["y.body/next.then_branch/a"].elements == 1
    assert (ranges.values["y.body/next.else_branch/b"].high, ranges.values["y.body/next.else_branch/b"].elements) == (
        2000,
        2,
    )


def test_what_a_local_function_computes_is_seen():
    ranges = audited(
        """
        <ir_version: 8, opset_import: ["" : 18, "own" : 1]>
        g (float[n] x) => (float[n] y) { y = own.twice(x) }
        <domain: "own", opset_import: ["" : 18]>
        twice (a) => (b) { c = Add(a, a)  b = Neg(c) }
        """,
        {"x": floats(40_000)},
    )
    assert ranges.values["y"].low == -80_000
    assert [range_.broken for key, range_ in ranges.values.items() if key not in ("x", "y")] == [1]


def test_a_body_that_nobody_can_see_into_is_refused_by_name():
    model = """
    g (seq(float[n]) s) => (seq(float[n]) y) {
        y = SequenceMap (s) <body = body (float[n] one) => (float[n] two) { two = Neg(one) }>
    }
    """
    with pytest.raises(Refused, match="model: nobody can see into 'SequenceMap' 'y'") as refusal:
        audited(model, {"s": floats(1)})
    assert "audit before" in str(refusal.value.hint)


def test_the_answers_of_the_model_are_not_touched_and_nothing_else_leaves_it():
    from passes.audit_ranges.instrumenting import instrument

    model = parse(LOOP)
    measured = instrument(model)
    assert measured is not None
    session = open_session(measured.model)
    feeds = {"trips": np.array(4), "x": floats(1, -2)}
    names = [value.name for value in session.get_outputs()]
    assert names == ["y", "all", *measured.tables.values()]
    outputs = dict(zip(names, session.run(None, feeds), strict=True))
    plain = open_session(model).run(None, feeds)
    np.testing.assert_array_equal(outputs["y"], plain[0])
    np.testing.assert_array_equal(outputs["all"], plain[1])
    assert all(outputs[name].ndim == 1 for name in measured.tables.values())


def test_of_a_model_without_float32_nothing_is_found_and_nothing_is_run():
    assert audited("g (int64[n] x) => (int64[n] y) { y = Neg(x) }") == Ranges(values={}, samples=0)


def test_a_model_without_samples_is_refused():
    with pytest.raises(Refused, match="no sample of 'model'"):
        audited(NEGATED)


def test_weights_are_not_measured_and_neither_are_their_views():
    ranges = audited(
        "g (float[n, 2] x) => (float[n, 3] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {"
        " turned = Transpose(w)  y = MatMul(x, turned) }",
        {"x": np.ones((1, 2), np.float32)},
    )
    assert set(ranges.values) == {"x", "y"}


KINDS = """
g (int64[b, n] ids, int64[b, n] mask, float[b, n, 2] hidden) => (float[b, n, 2] y, float[b, n, n] weights)
<float[9, 2] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17}, float one = {1},
 float lowest = {-3.4028235e38}, int64[1] axis = {1}> {
    words = Gather(table, ids)
    places = Cast <to = 1> (ids)
    present = Cast <to = 1> (mask)
    absent = Sub(one, present)
    hiding = Mul(absent, lowest)
    wide = Unsqueeze(hiding, axis)
    turned = Transpose <perm = [0, 2, 1]> (words)
    products = MatMul(hidden, turned)
    scores = Add(products, wide)
    weights = Softmax(scores)
    y = MatMul(weights, words)
}
"""


def test_masks_and_positions_are_told_from_activations():
    feeds = {
        "ids": np.array([[1, 2, 3]]),
        "mask": np.array([[0, 1, 1]]),
        "hidden": np.ones((1, 3, 2), np.float32),
    }
    values = audited(KINDS, feeds).values
    kinds = {key: range_.kind for key, range_ in values.items()}
    assert kinds == {
        **dict.fromkeys(("hidden", "words", "turned", "products", "scores", "weights", "y"), "activation"),
        **dict.fromkeys(("places", "present", "absent", "hiding", "wide"), "position"),
    }
    assert [key for key, range_ in values.items() if range_.is_mask] == ["hiding", "wide"]
    assert [key for key, range_ in values.items() if range_.is_masked] == ["scores"]
    assert values["scores"].low < -3e38
    assert values["scores"].peak == values["products"].peak
    assert values["places"].is_whole


@pytest.mark.parametrize(
    ("graph", "feeds"),
    [
        (
            "g (float[1, 1, n, n] x) => (float[a, b, c, d] y) <float[4] scales = {1, 1, 1.3, 2.9996}> {"
            " y = Resize(x, , scales) }",
            {"x": np.ones((1, 1, 70, 70), np.float32)},
        ),
        (
            "g (float n) => (float[m] y) <float zero = {0}, float one = {1}> { y = Range(zero, n, one) }",
            {"n": np.array(3001, np.float32)},
        ),
    ],
)
def test_what_a_node_cannot_be_given_in_float16_is_not_rounded(graph, feeds):
    """Rounded, the scales would give another size, and 3,001 numbers would be 3,000."""
    model = parse(graph)
    (expected,) = open_session(model).run(None, feeds)
    assert seen(audited(model, feeds).values["y"]) == numpy_says(expected)


def test_what_is_float16_already_is_emulated_and_not_measured():
    """ONNX Runtime's CPU provider would compute 300 * 300 / 300 in float32, and find 300."""
    ranges = audited(
        "g (float16[n] x) => (float[n] y) { a = Mul(x, x)  b = Div(a, x)  y = Cast <to = 1> (b) }",
        {"x": np.array([300, 2], np.float16)},
    )
    assert set(ranges.values) == {"y"}
    assert (ranges.values["y"].infinite, ranges.values["y"].high) == (1, 2)


def test_a_sample_that_the_model_cannot_run_is_said_in_a_sentence():
    with pytest.raises(SurgeryError, match=r"the model does not run with x float32\[3\]"):
        audited(
            "g (float[n] x) => (float[m] y) <int64[1] shape = {2}> { y = Reshape(x, shape) }", {"x": floats(1, 2, 3)}
        )


def test_a_body_in_a_float16_model_is_seen_under_the_name_of_its_result():
    """Emulated, the result of the model has another name inside."""
    ranges = audited(
        """
        g (float16[n] x, bool flag) => (float16[n] y) {
            y = If (flag) <
                then_branch = a () => (float16[n] d) { b = Cast <to = 1> (x)  c = Exp(b)  d = Cast <to = 10> (c) },
                else_branch = e () => (float16[n] f) { f = Neg(x) }
            >
        }
        """,
        {"x": np.array([0, 1], np.float16), "flag": np.array(True)},
    )
    assert set(ranges.values) == {"y.then_branch/b", "y.then_branch/c"}
