"""`cast_fp16`: each rule as a picture with its reason, and what must not stay in float32."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from halving import assert_halves, cast_bundle, casting, halved, measured
from rewriting import ROLE, sample_feeds

from passes.cast_fp16 import CastFp16
from passes.cast_fp16.casting import KEPT
from surgery.contract import Bundle, Change
from surgery.errors import RecipeError
from surgery.graphs import graphs_of
from surgery.text import parse, pictures_of

TWO_PRODUCTS = """
g (float[2, 2] x) => (float[2, 2] y)
<float[2, 2] w = {1, 2, 3, 4}>
{
    [first] a = MatMul(x, w)
    b = Relu(a)
    [last] c = MatMul(b, w)
    y = Neg(c)
}
"""

DIFFERENCE = """
g (float[2, 2] x, float[2, 2] z) => (float[2, 2] y) {
    a = Exp(x)
    b = Exp(z)
    c = Sub(a, b)
    y = Relu(c)
}
"""
SAMPLING = """
g (float[1, 1, 2, 2] x, float[1, 2, 2, 2] grid) => (float[1, 1, 2, 2] y) {
    a = Relu(x)
    b = GridSample(a, grid)
    y = Neg(b)
}
"""


def test_the_picture_of_the_pass_is_true():
    pictures = pictures_of(CastFp16.__doc__ or "")
    assert pictures is not None
    assert_halves(*pictures)


# Overflow


def test_what_peaks_above_the_headroom_is_made_and_read_in_float32():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float big = {1000}, float small = {0.001}>
        {
            a = Mul(x, big)
            b = Mul(a, big)
            c = Mul(b, small)
            y = Mul(c, small)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <
            float16 big = {25552},
            float "big/float" = {1000},
            float16 small = {5145},
            float "small/float" = {0.001}
        >
        {
            "x/float16" = Cast <to = 10> (x)
            a = Mul("x/float16", big)
            "a/float" = Cast <to = 1> (a)
            b = Mul("a/float", "big/float")
            c = Mul(b, "small/float")
            "c/float16" = Cast <to = 10> (c)
            "y/float16" = Mul("c/float16", small)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert any("b: peaks at" in line for line in change.details)


def test_what_stays_within_the_headroom_is_float16():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float big = {1000}>
        {
            a = Mul(x, big)
            y = Mul(a, big)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float16 big = {25552}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Mul("x/float16", big)
            "y/float16" = Mul(a, big)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=[{"x": np.full((2, 2), 0.03, np.float32)}],
    )
    assert change.details == ()


def test_two_outputs_of_a_node_are_of_one_precision():
    change = assert_halves(
        """
        g (float[2, 4] x) => (float[2, 2] y, float[2, 2] z)
        <float big = {100000}, int64[2] half = {2, 2}>
        {
            a = Mul(x, big)
            b, c = Split <axis = 1> (a, half)
            d = Sigmoid(b)
            e = Tanh(c)
            y = Neg(d)
            z = Exp(e)
        }
        """,
        """
        g (float[2, 4] x) => (float[2, 2] y, float[2, 2] z)
        <float big = {1e+05}, int64[2] half = {2, 2}>
        {
            a = Mul(x, big)
            b, c = Split <axis = 1> (a, half)
            d = Sigmoid(b)
            "d/float16" = Cast <to = 10> (d)
            e = Tanh (c)
            "e/float16" = Cast <to = 10> (e)
            "y/float16" = Neg("d/float16")
            y = Cast <to = 1> ("y/float16")
            "z/float16" = Exp("e/float16")
            z = Cast <to = 1> ("z/float16")
        }
        """,
    )
    assert any("b: peaks at" in line for line in change.details)


# Counts


def test_positions_above_2_048_stay_whole():
    change = assert_halves(
        """
        g (int64[n] p, float[n] x) => (float[n] y)
        <float one = {1}, float part = {0.001}>
        {
            a = Cast <to = 1> (p)
            b = Add(a, one)
            c = Mul(b, part)
            y = Mul(x, c)
        }
        """,
        """
        g (int64[n] p, float[n] x) => (float[n] y)
        <float one = {1}, float part = {0.001}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Cast <to = 1> (p)
            b = Add(a, one)
            c = Mul(b, part)
            "c/float16" = Cast <to = 10> (c)
            "y/float16" = Mul("x/float16", "c/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=[{"p": np.array([5, 4097]), "x": np.ones(2, np.float32)}],
    )
    assert any("a: counts to 4,097, above 2,048" in line for line in change.details)


def test_ids_that_a_caller_gives_as_float_stay_whole():
    model, change = halved(
        """
        g (float[n] ids, float[3001, 1] table) => (float[n, 1] y) {
            a = Cast <to = 7> (ids)
            y = Gather(table, a)
        }
        """,
        feeds=[{"ids": np.array([3, 2999], np.float32), "table": np.arange(3001, dtype=np.float32)[:, None] / 3000}],
        pass_=casting(keep_io="none"),
    )
    assert [value.dtype for value in model.graph.inputs] == [ir.DataType.FLOAT, ir.DataType.FLOAT16]
    assert change.details == ("ids: counts to 2,999, above 2,048",)


def test_positions_up_to_2_048_are_whole_in_float16():
    change = assert_halves(
        """
        g (int64[n] p, float[n] x) => (float[n] y)
        <float part = {0.001}>
        {
            a = Cast <to = 1> (p)
            b = Mul(a, part)
            y = Mul(x, b)
        }
        """,
        """
        g (int64[n] p, float[n] x) => (float[n] y)
        <float16 part = {5145}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Cast <to = 10> (p)
            b = Mul(a, part)
            "y/float16" = Mul("x/float16", b)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=[{"p": np.array([5, 2048]), "x": np.ones(2, np.float32)}],
    )
    assert change.details == ()


# Underflow


def test_a_divisor_that_would_vanish_stays_float32():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float tiny = {1e-5}>
        {
            a = Mul(x, tiny)
            b = Mul(a, tiny)
            y = Div(a, b)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float16 tiny = {168}, float "tiny/float" = {1e-05}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Mul("x/float16", tiny)
            "a/float" = Cast <to = 1> (a)
            b = Mul("a/float", "tiny/float")
            y = Div("a/float", b)
        }
        """,
        feeds=[{"x": np.full((2, 2), 3, np.float32)}],
    )
    assert any("before Div" in line for line in change.details)


def test_what_would_vanish_before_a_logarithm_stays_float32_also_through_what_moves_it():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[4] y)
        <float tiny = {1e-5}, int64[1] all = {-1}>
        {
            a = Mul(x, tiny)
            b = Mul(a, tiny)
            c = Reshape(b, all)
            y = Log(c)
        }
        """,
        """
        g (float[2, 2] x) => (float[4] y)
        <int64[1] all = {-1}, float16 tiny = {168}, float "tiny/float" = {1e-05}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Mul("x/float16", tiny)
            "a/float" = Cast <to = 1> (a)
            b = Mul("a/float", "tiny/float")
            c = Reshape(b, all)
            y = Log(c)
        }
        """,
        feeds=[{"x": np.full((2, 2), 3, np.float32)}],
    )
    assert any("before Log" in line for line in change.details)


def test_a_tiny_probability_is_no_reason():
    change = assert_halves(
        """
        g (float[2, 4] x, float[4, 2] v) => (float[2, 2] y) {
            p = Softmax(x)
            y = MatMul(p, v)
        }
        """,
        """
        g (float[2, 4] x, float[4, 2] v) => (float[2, 2] y) {
            "v/float16" = Cast <to = 10> (v)
            "x/float16" = Cast <to = 10> (x)
            p = Softmax("x/float16")
            "y/float16" = MatMul(p, "v/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=[{"x": np.array([[0, 30, 0, 1], [25, 0, 1, 2]], np.float32), "v": np.ones((4, 2), np.float32)}],
    )
    assert change.details == ()


def test_the_square_of_a_small_number_may_vanish():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float two = {2}, float one = {1}>
        {
            a = Pow(x, two)
            y = Add(a, one)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float16 one = {15360}, float16 two = {16384}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Pow("x/float16", two)
            "y/float16" = Add(a, one)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=[{"x": np.array([[1e-9, 1], [2, 3]], np.float32)}],
    )
    assert change.details == ()


# Own error


def test_a_difference_of_like_numbers_gets_them_in_float32():
    change = assert_halves(
        DIFFERENCE,
        """
        g (float[2, 2] x, float[2, 2] z) => (float[2, 2] y) {
            a = Exp(x)
            b = Exp(z)
            c = Sub(a, b)
            "c/float16" = Cast <to = 10> (c)
            "y/float16" = Relu("c/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
        ranges={"c": {"squared_errors": 4.0, "compared": 4, "squares": 400.0, "elements": 4}},
    )
    assert any("c: half precision alone is off by 10.0% there" in line for line in change.details)


def test_a_small_error_is_no_reason():
    change = assert_halves(
        DIFFERENCE,
        """
        g (float[2, 2] x, float[2, 2] z) => (float[2, 2] y) {
            "z/float16" = Cast <to = 10> (z)
            "x/float16" = Cast <to = 10> (x)
            a = Exp("x/float16")
            b = Exp("z/float16")
            c = Sub(a, b)
            "y/float16" = Relu(c)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        ranges={"c": {"squared_errors": 4.0, "compared": 4, "squares": 40000.0, "elements": 4}},
    )
    assert change.details == ()


# Weights


def test_a_weight_that_float16_does_not_hold_stays_float32_with_its_reader():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {100000, -100000, 1, 2}, float small = {1e-5}>
        {
            a = MatMul(x, w)
            b = Mul(a, small)
            y = Relu(b)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float small = {1e-05}, float[2, 2] w = {1e+05, -1e+05, 1, 2}>
        {
            a = MatMul(x, w)
            b = Mul(a, small)
            "b/float16" = Cast <to = 10> (b)
            "y/float16" = Relu("b/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert any("w: holds 100,000, beyond 65,504" in line for line in change.details)


def test_bounds_beyond_all_numbers_of_float16_are_infinite_there():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float low = {-1e30}, float high = {6}>
        {
            a = Clip(x, low, high)
            y = Relu(a)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float16 high = {17920}, float16 low = {64512}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Clip("x/float16", low, high)
            "y/float16" = Relu(a)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_infinite_weights_stay_infinite():
    change = assert_halves(
        """
        g (float[2, 2] x, bool[2, 2] c) => (float[2, 2] y)
        <float none = {-inf}>
        {
            a = Where(c, x, none)
            y = Exp(a)
        }
        """,
        """
        g (float[2, 2] x, bool[2, 2] c) => (float[2, 2] y)
        <float16 none = {64512}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Where(c, "x/float16", none)
            "y/float16" = Exp(a)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_a_weight_of_both_precisions_is_there_twice_and_the_float32_one_is_untouched():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {0.1, 300, -0.1, -300}>
        {
            a = MatMul(x, w)
            b = MatMul(a, w)
            y = Sigmoid(b)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float16[2, 2] w = {11878, 23728, 44646, 56496}, float[2, 2] "w/float" = {0.1, 300, -0.1, -300}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = MatMul("x/float16", w)
            "a/float" = Cast <to = 1> (a)
            b = MatMul("a/float", "w/float")
            y = Sigmoid(b)
        }
        """,
    )
    assert any("b: peaks at" in line for line in change.details)


def test_what_keeps_a_root_from_zero_stays_float32():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float least = {1e-12}>
        {
            s = Mul(x, x)
            a = Add(s, least)
            r = Sqrt(a)
            y = Div(x, r)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float least = {1e-12}>
        {
            "x/float16" = Cast <to = 10> (x)
            s = Mul("x/float16", "x/float16")
            "s/float" = Cast <to = 1> (s)
            a = Add("s/float", least)
            r = Sqrt(a)
            "r/float16" = Cast <to = 10> (r)
            "y/float16" = Div("x/float16", "r/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert any("least: 1e-12 is 0 in float16, and keeps Sqrt from it" in line for line in change.details)


def kept(graph: str, **arguments: Any) -> set[str]:
    """Return the names of the tensors of a model that stay float32, but for its inputs and outputs."""
    model, _ = halved(graph, **arguments)
    made = [value for part in graphs_of(model.graph) for node in part for value in node.outputs]
    return {value.name or "" for value in made if value.dtype == ir.DataType.FLOAT and not value.is_graph_output()}


def test_a_number_that_is_chosen_in_place_of_zero_stays_float32():
    """No sample has the zero that it is for."""
    graph = """
    g (float[2] x, float[2] z) => (float[2] y, float[2] w) <float tiny = {1e-9}, float zero = {0}> {
        a = Equal(x, zero)
        b = Where(a, tiny, x)
        y = Div(z, b)
        w = Tanh(z)
    }
    """
    assert kept(graph, feeds=[{"x": np.ones(2, np.float32), "z": np.ones(2, np.float32)}]) == {"b"}


def test_a_scale_that_vanishes_stays_float32():
    graph = """
    g (float[2] x, float[2] z) => (int8[2] y, float[2] w) <float scale = {1e-9}, int8 zero = {0}> {
        a = Neg(x)
        y = QuantizeLinear(a, scale, zero)
        w = Tanh(z)
    }
    """
    model, change = halved(
        graph,
        feeds=[{"x": np.ones(2, np.float32), "z": np.ones(2, np.float32)}],
        pass_=casting(runs_on="any"),
    )
    assert model.graph.initializers["scale"].dtype == ir.DataType.FLOAT
    assert any("scale: holds 1e-09, which is 0 in float16, for QuantizeLinear" in line for line in change.details)


def test_a_small_number_that_guards_nothing_vanishes():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float least = {1e-12}>
        {
            a = Add(x, least)
            y = Relu(a)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float16 least = {0}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Add("x/float16", least)
            "y/float16" = Relu(a)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert any("1 number is too small and become 0" in line for line in change.details)


# The user's list


def test_a_named_node_stays_float32():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}>
        {
            [hidden] a = MatMul(x, w)
            b = Relu(a)
            [last] c = MatMul(b, w)
            y = Neg(c)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float16[2, 2] w = {15360, 16384, 16896, 17408}, float[2, 2] "w/float" = {1, 2, 3, 4}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = MatMul("x/float16", w)
            b = Relu(a)
            "b/float" = Cast <to = 1> (b)
            c = MatMul("b/float", "w/float")
            "c/float16" = Cast <to = 10> (c)
            "y/float16" = Neg("c/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
        pass_=casting(keep=["last"]),
    )
    assert any("last: keep: last" in line for line in change.details)


def test_a_pattern_or_an_operator_keeps_all_that_it_matches():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}>
        {
            [block_0] a = MatMul(x, w)
            b = Relu(a)
            [block_1] c = MatMul(b, w)
            y = Neg(c)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}>
        {
            a = MatMul(x, w)
            "a/float16" = Cast <to = 10> (a)
            b = Relu("a/float16")
            "b/float" = Cast <to = 1> (b)
            c = MatMul("b/float", w)
            y = Neg(c)
        }
        """,
        pass_=casting(keep=["block_*", "Neg"]),
    )
    assert any("block_1: keep: block_*" in line for line in change.details)


# Kernels


def test_what_the_runtime_computes_in_float32_only_stays_float32():
    change = assert_halves(
        SAMPLING,
        """
        g (float[1, 1, 2, 2] x, float[1, 2, 2, 2] grid) => (float[1, 1, 2, 2] y) {
            "x/float16" = Cast <to = 10> (x)
            a = Relu("x/float16")
            "a/float" = Cast <to = 1> (a)
            b = GridSample("a/float", grid)
            "b/float16" = Cast <to = 10> (b)
            "y/float16" = Neg("b/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert any("cuda has no float16 kernel of GridSample" in line for line in change.details)


def test_with_all_kernels_that_is_no_reason():
    change = assert_halves(
        SAMPLING,
        """
        g (float[1, 1, 2, 2] x, float[1, 2, 2, 2] grid) => (float[1, 1, 2, 2] y) {
            "grid/float16" = Cast <to = 10> (grid)
            "x/float16" = Cast <to = 10> (x)
            a = Relu("x/float16")
            b = GridSample(a, "grid/float16")
            "y/float16" = Neg(b)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        pass_=casting(runs_on="any"),
    )
    assert change.details == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": ["lost"]}, "keep: no node is named 'lost'; did you mean 'last'?"),
        ({"keep": ["block_*"]}, "keep: no node is named 'block_*'"),
        ({"keep_io": ["yy"]}, "keep_io: no input or output is named 'yy'; did you mean 'y'?"),
    ],
)
def test_a_name_that_nothing_has_is_an_error_with_a_suggestion(options: dict[str, list[str]], message: str):
    with pytest.raises(RecipeError) as raised:
        halved(TWO_PRODUCTS, pass_=casting(**options))
    assert message in str(raised.value)


# What stays as it is


@pytest.mark.parametrize(
    "graph",
    [
        """
    g (int64[2] x) => (int64[2] y) {
        y = Add(x, x)
    }
    """,
        """
    g (float16[2, 2] x) => (float16[2, 2] y)
    <float16[2, 2] w = {15360, 16384, 16896, 17408}>
    {
        y = MatMul(x, w)
    }
    """,
        """
    g (double[2] x) => (double[2] y) {
        y = Exp(x)
    }
    """,
        """
    g (float[2, 2] x) => (float[2, 2] x) {}
    """,
        """
    g (float[1, 2, 4] boxes, float[1, 1, 2] scores) => (int64[n, 3] y)
    <int64 most = {2}, float least = {0.5}>
    {
        y = NonMaxSuppression(boxes, scores, most, least, least)
    }
    """,
    ],
)
def test_there_is_nothing_to_do_where_nothing_may_be_float16(graph: str):
    bundle = Bundle({ROLE: parse(graph)})
    after, change = cast_bundle(casting(), bundle, {ROLE: measured(bundle[ROLE], [])})
    assert change == Change(0, "")
    assert after.identities() == bundle.identities()


def test_nothing_is_float16_where_no_kernel_computes_in_it():
    bundle = Bundle({ROLE: parse(TWO_PRODUCTS)})
    ranges = {ROLE: measured(bundle[ROLE], sample_feeds(bundle[ROLE]))}
    _, change = cast_bundle(casting(runs_on="cpu"), bundle, ranges)
    assert change == Change(0, "")


def test_a_model_of_which_all_must_stay_is_left_alone():
    bundle = Bundle({ROLE: parse(TWO_PRODUCTS)})
    ranges = {ROLE: measured(bundle[ROLE], sample_feeds(bundle[ROLE]))}
    after, change = cast_bundle(casting(keep=["MatMul", "Relu", "Neg"]), bundle, ranges)
    assert change == Change(0, "")
    assert after.identities() == bundle.identities()


def test_nodes_say_why_they_stay_and_a_later_run_that_asks_for_less_leaves_them():
    model, _ = halved(TWO_PRODUCTS, pass_=casting(keep=["last"]))
    said = {node.name: node.metadata_props[KEPT] for node in model.graph if KEPT in node.metadata_props}
    assert said == {"last": "last: keep: last"}
    bundle = Bundle({ROLE: model})
    ranges = {ROLE: measured(model, sample_feeds(model))}
    _, change = cast_bundle(casting(), bundle, ranges)
    assert change == Change(0, "")
    _, change = cast_bundle(casting(keep_io="none"), bundle, ranges)
    assert change.count > 0
    assert "last: keep: last" in change.details


def test_the_summary_counts_what_the_user_counts():
    _, change = halved(TWO_PRODUCTS, pass_=casting(keep=["last"]))
    assert change.summary == "1 of 4 nodes compute in float32, 4 casts"
    _, change = halved(TWO_PRODUCTS)
    assert change.summary == "0 of 4 nodes compute in float32, 2 casts, 8 B of weights saved"


def test_a_name_with_brackets_is_a_name():
    _, change = halved(
        'g (float[2] x) => (float[2] y) { ["layers[0]/Mul"] a = Mul(x, x)  y = Neg(a) }',
        pass_=casting(keep=("layers[0]/Mul",)),
    )
    assert change.details == ("layers[0]/Mul: keep: layers[0]/Mul",)


def test_a_branch_that_is_named_stays_float32_with_all_that_it_computes():
    model, _ = halved(
        """
        g (float[2] x, bool flag) => (float[2] y) {
            [choice] a = If (flag) <
                then_branch = doubled () => (float[2] b) { b = Add(x, x) },
                else_branch = squared () => (float[2] c) { c = Mul(x, x) }
            >
            y = Neg(a)
        }
        """,
        pass_=casting(keep=("choice",)),
    )
    choice = next(node for node in model.graph if node.op_type == "If")
    inner = [node for name in ("then_branch", "else_branch") for node in choice.attributes[name].as_graph()]
    assert {value.dtype for node in inner for value in node.outputs} == {ir.DataType.FLOAT}


BUCKETS = """
g (int64[n] p, float[n] x) => (float[n] y)
<float[11] table = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10}, float eight = {8}, float base = {2.7725887}> {
    a = Cast <to = 1> (p)
    b = Div(a, eight)
    c = Log(b)
    d = Div(c, base)
    e = Mul(d, eight)
    f = Cast <to = 7> (e)
    h = Gather(table, f)
    y = Add(h, x)
}
"""


def test_positions_that_are_cut_to_buckets_are_computed_in_float32():
    """In float16 a distance of 181 is in the bucket of those from 182 on."""
    change = assert_halves(
        BUCKETS,
        """
        g (int64[n] p, float[n] x) => (float[n] y)
        <
            float base = {2.7725887},
            float eight = {8},
            float16[11] table = {0, 15360, 16384, 16896, 17408, 17664, 17920, 18176, 18432, 18560, 18688}
        >
        {
            "x/float16" = Cast <to = 10> (x)
            a = Cast <to = 1> (p)
            b = Div(a, eight)
            c = Log(b)
            d = Div(c, base)
            e = Mul(d, eight)
            f = Cast <to = 7> (e)
            h = Gather(table, f)
            "y/float16" = Add(h, "x/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=[{"p": np.arange(8, 200), "x": np.ones(192, np.float32)}],
    )
    assert "e: Cast makes other whole numbers of 1 of 200 positions" in change.details


def test_positions_that_are_cut_to_the_same_buckets_are_float16():
    change = assert_halves(
        BUCKETS,
        """
        g (int64[n] p, float[n] x) => (float[n] y)
        <
            float16 base = {16780},
            float16 eight = {18432},
            float16[11] table = {0, 15360, 16384, 16896, 17408, 17664, 17920, 18176, 18432, 18560, 18688}
        >
        {
            "x/float16" = Cast <to = 10> (x)
            a = Cast <to = 10> (p)
            b = Div(a, eight)
            c = Log(b)
            d = Div(c, base)
            e = Mul(d, eight)
            f = Cast <to = 7> (e)
            h = Gather(table, f)
            "y/float16" = Add(h, "x/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=[{"p": np.arange(8, 100), "x": np.ones(92, np.float32)}],
    )
    assert change.details == ()


ROTATED = """
g (int64[b, n] places, float[b, n] x) => (float[b, n] y)
<float frequency = {0.5}>
{
    steps = Cast <to = 1> (places)
    angles = Mul(steps, frequency)
    turned = Cos(angles)
    y = Mul(x, turned)
}
"""


def test_angles_that_float16_blurs_stay_float32():
    change = assert_halves(
        ROTATED,
        """
        g (int64[b, n] places, float[b, n] x) => (float[b, n] y)
        <float frequency = {0.5}>
        {
            "x/float16" = Cast <to = 10> (x)
            steps = Cast <to = 1> (places)
            angles = Mul(steps, frequency)
            turned = Cos(angles)
            "turned/float16" = Cast <to = 10> (turned)
            "y/float16" = Mul("x/float16", "turned/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=[{"places": np.arange(200)[None], "x": np.ones((1, 200), np.float32)}],
    )
    assert any("angles: angles up to 100 are off by up to 0.049 before Cos" in line for line in change.details), (
        change.details
    )


def test_small_angles_need_no_float32():
    change = assert_halves_all(ROTATED, feeds=[{"places": np.arange(20)[None], "x": np.ones((1, 20), np.float32)}])
    assert not any("angles" in line for line in change.details)


def assert_halves_all(graph: str, *, feeds: list[dict[str, np.ndarray]]) -> Change:
    """Prove that nothing that computes stays in float32, and return what is said."""
    model, change = halved(graph, feeds=feeds)
    assert change.summary.startswith("0 of "), change.summary
    assert model.graph.outputs[0].dtype == ir.DataType.FLOAT
    return change
