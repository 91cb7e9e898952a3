"""Half precision emulated: bit for bit numpy's where there is one right answer, float32 inside where there is not."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from functools import partial

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from pydantic import ValidationError

from passes.clean_casts import CleanCasts
from surgery import Bundle, BundlePass, Change, Check, Context, Effect, Pipeline
from surgery.accuracy.half import holds_half, lower_half
from surgery.accuracy.half.assumptions import Assumption, assumption
from surgery.accuracy.judge import Judge
from surgery.accuracy.runners import ModelProgram
from surgery.claims import Claim
from surgery.contract import Tolerance, edits
from surgery.errors import StepFailed, SurgeryError
from surgery.manager import Stopped
from surgery.runtime.sessions import open_session
from surgery.text import parse
from surgery.watchers.validity import find_problem

EVERY_HALF = np.arange(1 << 16, dtype=np.uint16).view(np.float16)


def run(graph: str, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    """Run a graph in half precision as a verdict does, at all optimization levels, and prove that they agree."""
    model = parse(graph)
    assert find_problem(model) == "", find_problem(model)
    lowered = lower_half(model)
    assert find_problem(lowered) == "", find_problem(lowered)
    assert [value.type for value in lowered.graph.outputs] == [value.type for value in model.graph.outputs]
    plain = open_session(lowered)
    names = [value.name for value in plain.get_outputs()]
    found = dict(zip(names, plain.run(None, feeds), strict=True))
    for level in onnxruntime.GraphOptimizationLevel.__members__.values():
        session = open_session(lowered, prepacking=True, configure=partial(set_level, level))
        for name, array in zip(names, session.run(None, feeds), strict=True):
            assert_same_bits(array, found[name])
    return found


def set_level(level: object, options: onnxruntime.SessionOptions) -> None:
    options.graph_optimization_level = level


def assert_same_bits(given: np.ndarray, expected: np.ndarray) -> None:
    """Any NaN is any other."""
    assert given.dtype == expected.dtype
    assert given.shape == expected.shape
    if given.dtype == np.float16:
        same = (given.view(np.uint16) == expected.view(np.uint16)) | (np.isnan(given) & np.isnan(expected))
        assert same.all(), (given[~same][:5], expected[~same][:5])
    else:
        np.testing.assert_array_equal(given, expected)


def half(*numbers: float) -> np.ndarray:
    with np.errstate(over="ignore"):
        return np.array(numbers, np.float16)


def test_a_product_overflows():
    y = run("g (float16[n] x) => (float16[n] y) { a = Mul(x, x)  y = Sqrt(a) }", x=half(255, 256, -300, 4))["y"]
    assert_same_bits(y, half(255, np.inf, np.inf, 4))


def test_a_product_underflows_to_zero_and_through_subnormals():
    y = run("g (float16[n] x) => (float16[n] y) { y = Mul(x, x) }", x=half(1e-3, -2e-4, 1.2e-4, 1e-5))["y"]
    with np.errstate(under="ignore"):
        assert_same_bits(y, half(1e-3, -2e-4, 1.2e-4, 1e-5) * half(1e-3, -2e-4, 1.2e-4, 1e-5))
    assert 0 < y[1] < 6.2e-5  # subnormal
    assert y[3] == 0


def test_ties_round_to_even():
    x = np.array([2049, 2051, 2050.9999, 65519.99, 65520, -65520, 2.98e-8, 2.9802322e-8, 2.99e-8], np.float32)
    y = run("g (float[n] x) => (float16[n] y) { y = Cast <to = 10> (x) }", x=x)["y"]
    with np.errstate(over="ignore"):
        assert_same_bits(y, x.astype(np.float16))
    assert y[:2].tolist() == [2048, 2052]


def test_a_sum_forgets_what_is_below_its_last_bit():
    graph = """g (float16[n] x, float16 big) => (float16[n] y) { a = Add(x, big)  y = Sub(a, big) }"""
    assert_same_bits(run(graph, x=half(1, 2.5, 1.9, 6.1), big=np.array(4096, np.float16))["y"], half(0, 4, 0, 8))


def test_rms_normalization_of_400s_overflows_where_it_squares_in_half():
    graph = """
    g (float16[n] x) => (float16[n] y) <float16 eps = {16}> {
        square = Mul(x, x)
        mean = ReduceMean(square)
        safe = Add(mean, eps)
        root = Sqrt(safe)
        y = Div(x, root)
    }
    """
    assert_same_bits(run(graph, x=half(400, -400, 400))["y"], half(0, -0.0, 0))
    assert_same_bits(run(graph, x=half(200, -200, 200))["y"], half(1, -1, 1))


def test_an_island_of_float32_squares_400s():
    graph = """
    g (float16[n] x) => (float16[n] y) {
        wide = Cast <to = 1> (x)
        square = Mul(wide, wide)
        mean = ReduceMean(square)
        root = Sqrt(mean)
        quotient = Div(wide, root)
        y = Cast <to = 10> (quotient)
    }
    """
    assert_same_bits(run(graph, x=half(400, -400, 400))["y"], half(1, -1, 1))


@pytest.mark.parametrize("mask", [-np.inf, -65504.0])
def test_a_mask_hides_what_it_covers(mask):
    graph = "g (float16[2, n] x, float16[2, n] mask) => (float16[2, n] y) { a = Add(x, mask)  y = Softmax(a) }"
    y = run(graph, x=half(1, 1, 3, 2, 2, 2).reshape(2, 3), mask=half(0, 0, mask, mask, mask, mask).reshape(2, 3))["y"]
    assert_same_bits(y[0], half(0.5, 0.5, 0))
    # A row that is masked whole is evenly spread, or with infinities nothing at all: as in float32.
    expected = half(np.nan, np.nan, np.nan) if np.isinf(mask) else half(1 / 3, 1 / 3, 1 / 3)
    assert_same_bits(y[1], expected)


def test_the_smallest_float_becomes_infinite_when_it_is_a_mask_in_half():
    graph = """
    g (float[n] m, float16[n] keep) => (float16[n] y) { mask = Cast <to = 10> (m)  y = Mul(mask, keep) }
    """
    y = run(graph, m=np.full(2, np.finfo(np.float32).min), keep=half(1, 0))["y"]
    assert_same_bits(y, half(-np.inf, np.nan))


UNARY = {
    "Abs": np.abs,
    "Neg": np.negative,
    "Sqrt": np.sqrt,
    "Reciprocal": np.reciprocal,
    "Floor": np.floor,
    "Ceil": np.ceil,
    "Sign": np.sign,
    "Relu": lambda x: np.where(np.isnan(x), x, np.maximum(x, np.float16(0))),
}


@pytest.mark.parametrize("operator", UNARY)
def test_every_number_of_float16_through_an_elementwise_operator(operator):
    y = run(f"g (float16[n] x) => (float16[n] y) {{ y = {operator}(x) }}", x=EVERY_HALF)["y"]
    with np.errstate(all="ignore"):
        expected = UNARY[operator](EVERY_HALF)
    if operator == "Sign":  # ONNX Runtime says 0 of NaN
        expected = np.where(np.isnan(EVERY_HALF), y, expected)
    if operator == "Relu":  # and keeps the sign of a zero
        expected = np.where(EVERY_HALF == 0, y, expected)
    assert_same_bits(y, expected)


@pytest.mark.parametrize(
    ("operator", "function"),
    [("Add", np.add), ("Sub", np.subtract), ("Mul", np.multiply), ("Div", np.divide)],
)
def test_arithmetic_equals_numpy_bit_for_bit(operator, function):
    random = np.random.default_rng(0)
    left, right = random.permutation(EVERY_HALF), random.permutation(EVERY_HALF)
    with np.errstate(all="ignore"):
        near = (left.astype(np.float32) * random.uniform(0.5, 2, left.shape)).astype(np.float16)  # cancels
    for other in (right, near):
        y = run(f"g (float16[n] a, float16[n] b) => (float16[n] y) {{ y = {operator}(a, b) }}", a=left, b=other)["y"]
        with np.errstate(all="ignore"):
            assert_same_bits(y, function(left, other))


def test_every_float_type_is_cast_as_numpy_casts_it():
    random = np.random.default_rng(0)
    wide = random.integers(0, 1 << 32, 200_000, dtype=np.uint32).view(np.float32)
    y = run("g (float[n] x) => (float16[n] y) { y = Cast <to = 10> (x) }", x=wide)["y"]
    with np.errstate(all="ignore"):
        assert_same_bits(y, wide.astype(np.float16))
    back = run("g (float16[n] x) => (float[n] y) { y = Cast <to = 1> (x) }", x=EVERY_HALF)["y"]
    np.testing.assert_array_equal(back, EVERY_HALF.astype(np.float32))


def ulps(x: np.ndarray) -> np.ndarray:
    return np.spacing(np.abs(x).astype(np.float16)).astype(np.float64)


def test_products_and_reductions_are_float32_inside_and_rounded_once():
    random = np.random.default_rng(0)
    a, b = random.normal(size=(8, 512)).astype(np.float16), random.normal(size=(512, 16)).astype(np.float16)
    y = run("g (float16[m, k] a, float16[k, n] b) => (float16[m, n] y) { y = MatMul(a, b) }", a=a, b=b)["y"]
    exact = a.astype(np.float64) @ b.astype(np.float64)
    assert (np.abs(y - exact) / ulps(exact)).max() <= 0.52
    graph = "g (float16[m, k] a) => (float16[m] y) <int64[1] axes = {1}> { y = ReduceSum <keepdims = 0> (a, axes) }"
    total = run(graph, a=a)["y"]
    exact = a.astype(np.float64).sum(axis=1)
    assert (np.abs(total - exact) / ulps(exact)).max() <= 0.52
    soft = run("g (float16[m, k] a) => (float16[m, k] y) { y = Softmax(a) }", a=a)["y"]
    powers = np.exp(a.astype(np.float64))
    exact = powers / powers.sum(axis=1, keepdims=True)
    assert (np.abs(soft - exact) / ulps(exact)).max() <= 0.52


def test_weights_of_every_scope_are_widened_and_stay_what_they_are():
    graph = """
    g (bool c, float16[2] x) => (float16[2] y) <float16[2] w = {15360, 31744}> {
        y = If (c) <
            then_branch = then () => (float16[2] a) <float16[2] v = {16384, 15360}> { b = Mul(x, w)  a = Mul(b, v) },
            else_branch = other () => (float16[2] d) { k = Constant <value = float16[2] {1, 2}> ()  d = Add(x, k) }
        >
    }
    """
    yes = run(graph, c=np.array(True), x=half(3, 1))["y"]
    assert_same_bits(yes, half(6, np.inf))
    no = run(graph, c=np.array(False), x=half(0, 0))["y"]
    assert_same_bits(no, np.array([1, 2], np.uint16).view(np.float16))


def test_the_state_of_a_loop_is_rounded_on_every_trip():
    graph = """
    g (int64 trips, float16 x) => (float16 y, float16[k] all) <float16 one = {15360}> {
        yes = Constant <value = bool {1}> ()
        y, all = Loop (trips, yes, x) <body = body (int64 i, bool go, float16 s) => (bool on, float16 t, float16 seen) {
            on = Identity(go)
            t = Add(s, one)
            seen = Identity(s)
        }>
    }
    """
    found = run(graph, trips=np.array(5), x=np.array(2046, np.float16))
    assert_same_bits(found["y"], np.array(2048, np.float16))  # 2048 + 1 is 2048
    assert_same_bits(found["all"], half(2046, 2047, 2048, 2048, 2048))


def test_a_scan_rounds_its_running_sum():
    graph = """
    g (float16 start, float16[n] xs) => (float16 last, float16[n] sums) {
        last, sums = Scan <num_scan_inputs = 1, body = body (float16 s, float16 x) => (float16 t, float16 u) {
            t = Add(s, x)
            u = Identity(t)
        }> (start, xs)
    }
    """
    found = run(graph, start=np.array(4096, np.float16), xs=half(1, 3, 1))
    assert_same_bits(found["sums"], half(4096, 4100, 4100))


def test_a_local_function_is_rounded_inside():
    graph = """
    <ir_version: 10, opset_import: ["" : 21, "own" : 1]>
    g (float16[n] x) => (float16[n] y) { y = own.twice (x) }
    <domain: "own", opset_import: ["" : 21]>
    twice (x) => (y) { a = Mul(x, x)  y = Sqrt(a) }
    """
    assert_same_bits(run(graph, x=half(300, 3))["y"], half(np.inf, 3))


def test_bfloat16_is_rounded_to_its_own_bits():
    graph = "g (float[n] x) => (float[n] y) { a = Cast <to = 16> (x)  b = Add(a, a)  y = Cast <to = 1> (b) }"
    y = run(graph, x=np.array([1.00390625, 3e38], np.float32))["y"]
    np.testing.assert_array_equal(y, np.array([2.0, np.inf], np.float32))


def test_what_reads_the_bits_gets_the_bits():
    graph = "g (float16[n] x) => (string[n] text) { y = Add(x, x)  text = Cast <to = 8> (y) }"
    lowered = lower_half(parse(graph))
    cast = lowered.graph.outputs[0].producer()
    assert cast is not None
    assert cast.inputs[0].dtype == ir.DataType.FLOAT16
    assert run(graph, x=half(0.05))["text"].tolist() == [str(np.float32(half(0.1)[0]))]


def test_a_cast_to_the_type_of_another_value_still_rounds():
    graph = "g (float[n] x, float16 like) => (float16[n] y) { y = CastLike(x, like) }"
    y = run(graph, x=np.array([2049, 70000], np.float32), like=np.array(0, np.float16))["y"]
    assert_same_bits(y, half(2048, np.inf))


def test_operators_that_name_their_type_are_told_another():
    graph = """
    g (int64[1] shape) => (float16[n] y) {
        two = Constant <value_ints = [2, 2]> ()
        a = ConstantOfShape <value = float16[1] {15360}> (shape)
        m = ConstantOfShape (two)
        b = EyeLike <dtype = 10> (m)
        c = ReduceSum <keepdims = 0> (b)
        y = Add(a, c)
    }
    """
    assert_same_bits(run(graph, shape=np.array([2]))["y"], half(3, 3))


def test_inputs_outputs_and_weights_that_pass_through_stay_in_half():
    graph = """
    g (float16[n] x) => (float16[n] x, float16[n] y, float16[1] w) <float16[1] w = {1}> {
        y = Identity(x)
        z = Add(x, w)
    }
    """
    found = lower_half(parse(graph))
    assert [value.dtype for value in found.graph.outputs] == [ir.DataType.FLOAT16] * 3
    assert found.graph.outputs[0] is found.graph.inputs[0]


def test_models_without_half_precision_are_known():
    assert not holds_half(parse("g (float[n] x) => (float[n] y) { y = Neg(x) }"))
    assert holds_half(parse("g (float[n] x) => (float[n] y) { a = Cast <to = 10> (x)  y = Cast <to = 1> (a) }"))
    assert holds_half(
        parse(
            """
            g (bool c) => (float[1] y) {
                y = If (c) <
                    then_branch = t () => (float[1] a) <float16[1] w = {1}> { a = Cast <to = 1> (w) },
                    else_branch = e () => (float[1] b) { b = Constant <value_floats = [1.0]> () }
                >
            }
            """
        )
    )


def test_a_result_that_nobody_asked_for_is_not_rounded():
    ones = np.ones((2, 1, 1), np.float16)
    found = run(
        """
        g (float16[2, 1, 1] x) => (float16[1, 1, 1] y)
        <float16[1, 3, 1] w = {15360, 15360, 15360}, float16[1, 3, 1] r = {15360, 15360, 15360}>
        {
            "", y = GRU <hidden_size = 1> (x, w, r)
        }
        """,
        x=ones,
    )
    assert 0 < found["y"].item() < 1


def test_an_unknown_operator_is_named():
    graph = """
    <ir_version: 10, opset_import: ["" : 21, "their" : 1]>
    g (float16[n] x) => (float16[n] y) { a = their.Magic (x)  y = Neg(a) }
    """
    with pytest.raises(StepFailed, match=r"'a': nobody knows what 'Magic' gives for half precision"):
        lower_half(parse(graph))


def test_the_assumption_of_each_kind_of_operator():
    kinds = {
        "y = Gather(x, i)": Assumption.MOVES,
        "y = Add(x, x)": Assumption.ELEMENTWISE,
        "y = Softmax(x)": Assumption.INSIDE,
        "y = ScatterND(x, i, x)": Assumption.MOVES,
        'y = ScatterND <reduction = "add"> (x, i, x)': Assumption.INSIDE,
        "y = com.microsoft.SkipLayerNormalization(x, x, x)": Assumption.INSIDE,
        "y = own.Add(x, x)": Assumption.INSIDE,
    }
    for line, kind in kinds.items():
        model = parse(f"g (float16[n] x, int64[n] i) => (float16[n] y) {{ {line} }}")
        assert assumption(model.graph[0]) is kind, line


def test_a_verdict_runs_the_emulation():
    model = parse("g (float16[n] x) => (float16[n] y) { a = Mul(x, x)  y = Sqrt(a) }")
    with closing(ModelProgram(model)) as program:
        assert_same_bits(program.run({"x": half(300, 4)})["y"], half(np.inf, 4))


WHOLE = """
g (float[n, 4] x) => (float[n, 4] y) <float k = {1000}, float s = {0.001}> {
    a = Mul(x, k)
    b = Mul(a, k)
    c = Mul(b, s)
    y = Mul(c, s)
}
"""
HALVED = """
g (float[n, 4] x) => (float[n, 4] y) <float16 k = {25552}, float16 s = {5145}> {
    h = Cast <to = 10> (x)
    a = Mul(h, k)
    b = Mul(a, k)
    c = Mul(b, s)
    d = Mul(c, s)
    y = Cast <to = 1> (d)
}
"""


class Halve(BundlePass):
    """Compute in float16."""

    effect = Effect.CLOSE
    model: str = edits("model", "The model.")

    def transform(self, bundle: Bundle, context: Callable[[str], Context]) -> Change:
        bundle.models[self.model] = parse(HALVED)
        return Change(1, "everything is float16")


def test_what_overflows_on_a_gpu_is_caught_on_the_cpu():
    x = np.array([[1, 2, 3, 4]], np.float32)
    plain = open_session(parse(HALVED)).run(None, {"x": x})[0]
    np.testing.assert_allclose(plain, x, rtol=5e-3)  # which shows why it must not be asked
    free = Check(max_error=0.1, p999_error=0.1)
    with pytest.raises(Stopped, match=r"output 'y' is -?inf, not"):
        Pipeline([Halve()], free).run(Bundle({"model": parse(WHOLE)}))


def test_a_verdict_says_that_it_is_emulated():
    result = Pipeline([CleanCasts()]).run(
        Bundle(
            {
                "model": parse(
                    "g (float16[n] x) => (float16[n] y) { a = Cast <to = 1> (x)  b = Cast <to = 10> (a)  y = Neg(b) }"
                )
            }
        )
    )
    verdicts = [record.verdict for record in result.records]
    assert all(verdict is not None and "float16 emulated" in str(verdict.coverage["model"]) for verdict in verdicts)
    assert verdicts[1].step is not None
    assert verdicts[1].step.is_exact


CUDA = "CUDAExecutionProvider"
STANDING_IN = "AzureExecutionProvider"  # in every build for the CPU; it leaves all nodes to the CPU


@pytest.mark.skipif(STANDING_IN not in onnxruntime.get_available_providers(), reason=f"no {STANDING_IN} here")
def test_a_provider_is_judged_under_its_own_name_beside_the_emulation():
    """The provider that stands in computes no float16, so it shows what the emulation exists for."""
    free = Check(max_error=0.1, p999_error=0.1).model_copy(update={"provider": STANDING_IN})
    with pytest.raises(Stopped, match=r"^step 1 \(halve\): model: output 'y' is -?inf, not"):
        Pipeline([Halve()], free).run(Bundle({"model": parse(WHOLE)}))
    small = parse(WHOLE.replace("{1000}", "{10}").replace("{0.001}", "{0.1}"))
    with closing(judge_of(small, free)) as judge:
        halved = parse(HALVED.replace("{25552}", "{18688}").replace("{5145}", "{11878}"))
        before, after = Bundle({"model": small}), Bundle({"model": halved})
        verdict = judge.judge(before, after, [Claim.same("model")], Effect.CLOSE, Tolerance(max_error=0.1))
    assert "float16 emulated" in str(verdict.coverage["model"])
    assert f"float16 {STANDING_IN}" in str(verdict.coverage[f"model on {STANDING_IN}"])
    assert {"model.y", f"model on {STANDING_IN}.y"} == set(verdict.outputs)


def judge_of(model: ir.Model, check: Check) -> Judge:
    return Judge(Bundle({"model": model}), check)


def test_a_model_without_half_precision_is_not_run_on_the_provider():
    check = Check().model_copy(update={"provider": CUDA})
    model = parse("g (float[n] x) => (float[n] y) { a = Neg(x)  y = Neg(a) }")
    with closing(judge_of(model, check)) as judge:
        verdict = judge.judge(*(Bundle({"model": model}),) * 2, [Claim.same("model")], Effect.EXACT, Tolerance())
    assert set(verdict.outputs) == {"model.y"}


@pytest.mark.skipif(CUDA in onnxruntime.get_available_providers(), reason="there is a CUDA provider")
def test_a_provider_that_is_not_there_is_said():
    free = Check(max_error=9, p999_error=9, provider=CUDA)
    with closing(judge_of(parse(WHOLE), free)) as judge, pytest.raises(SurgeryError, match=CUDA):
        judge.judge(
            Bundle({"model": parse(WHOLE)}),
            Bundle({"model": parse(HALVED)}),
            [Claim.same("model")],
            Effect.CLOSE,
            Tolerance(),
        )


def test_the_cpu_is_no_provider_of_half_precision():
    with pytest.raises(ValidationError, match=CUDA):
        Check(provider="CPUExecutionProvider")


@pytest.mark.gpu
@pytest.mark.skipif(CUDA not in onnxruntime.get_available_providers(), reason="no CUDA provider here")
def test_a_gpu_computes_what_the_emulation_says():
    random = np.random.default_rng(0)
    model = parse(HALVED)
    x = random.standard_normal((64, 4)).astype(np.float32)
    emulated = ModelProgram(model).run({"x": x})["y"]
    real = ModelProgram(model, "CUDAExecutionProvider").run({"x": x})["y"]
    np.testing.assert_array_equal(emulated, real)
