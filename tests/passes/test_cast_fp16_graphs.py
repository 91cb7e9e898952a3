"""`cast_fp16`: types, interfaces, bodies and whatever else a graph may hold, as pictures."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from halving import assert_halves, cast_bundle, casting, halved
from rewriting import ROLE

from passes.audit_ranges import Ranges
from surgery.contract import Bundle
from surgery.graphs import graphs_of
from surgery.text import parse
from surgery.watchers.validity import find_problem

# Casts


def test_what_moves_numbers_goes_where_fewer_are_cast():
    change = assert_halves(
        """
        g (float[4, 2] x) => (float[1, 2] y)
        <int64[1] first = {0}>
        {
            a = Gather <axis = 0> (x, first)
            y = Relu(a)
        }
        """,
        """
        g (float[4, 2] x) => (float[1, 2] y)
        <int64[1] first = {0}>
        {
            a = Gather <axis = 0> (x, first)
            "a/float16" = Cast <to = 10> (a)
            "y/float16" = Relu("a/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_one_cast_serves_all_readers():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}>
        {
            a = MatMul(x, w)
            b = Sigmoid(x)
            c = Tanh(x)
            d = Add(a, b)
            y = Add(c, d)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float16[2, 2] w = {15360, 16384, 16896, 17408}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = MatMul("x/float16", w)
            b = Sigmoid("x/float16")
            c = Tanh("x/float16")
            d = Add(a, b)
            "y/float16" = Add(c, d)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_casts_of_integers_and_to_them_are_in_float16():
    change = assert_halves(
        """
        g (int64[2] n, float[2] x) => (int64[2] y)
        {
            a = Cast <to = 1> (n)
            b = Mul(a, x)
            y = Cast <to = 7> (b)
        }
        """,
        """
        g (int64[2] n, float[2] x) => (int64[2] y)
        {
            "x/float16" = Cast <to = 10> (x)
            a = Cast <to = 10> (n)
            b = Mul(a, "x/float16")
            y = Cast <to = 7> (b)
        }
        """,
    )
    assert change.details == ()


def test_doubles_stay_doubles():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            a = Relu(x)
            b = Cast <to = 11> (a)
            c = Exp(b)
            d = Cast <to = 1> (c)
            y = Neg(d)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            "x/float16" = Cast <to = 10> (x)
            a = Relu("x/float16")
            b = Cast <to = 11> (a)
            c = Exp(b)
            d = Cast <to = 10> (c)
            "y/float16" = Neg(d)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_a_cast_to_what_a_tensor_was_does_nothing_and_stays():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            a = Relu(x)
            b = Cast <to = 1> (a)
            y = Neg(b)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            "x/float16" = Cast <to = 10> (x)
            a = Relu("x/float16")
            b = Cast <to = 10> (a)
            "y/float16" = Neg(b)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_a_number_that_is_printed_is_printed_in_float32():
    change = assert_halves(
        """
        g (float[2] x) => (string[2] y) {
            a = Relu(x)
            y = Cast <to = 8> (a)
        }
        """,
        """
        g (float[2] x) => (string[2] y) {
            "x/float16" = Cast <to = 10> (x)
            a = Relu("x/float16")
            "a/float" = Cast <to = 1> (a)
            y = Cast <to = 8> ("a/float")
        }
        """,
        is_compared=False,
    )
    assert change.details == ()


# Operators that want float32


def test_scales_of_resize_are_float32():
    change = assert_halves(
        """
        g (float[1, 1, 2, 2] x) => (float[1, 1, 4, 4] y)
        <float[4] scales = {1, 1, 2, 2}>
        {
            a = Relu(x)
            y = Resize <mode = "nearest"> (a, "", scales)
        }
        """,
        """
        g (float[1, 1, 2, 2] x) => (float[1, 1, 4, 4] y)
        <float[4] scales = {1, 1, 2, 2}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Relu("x/float16")
            "y/float16" = Resize <mode = "nearest"> (a, "", scales)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_statistics_of_a_norm_are_float32():
    change = assert_halves(
        """
        g (float[2, 4] x) => (float[2, 4] y, float[2, 1] mean)
        <float[4] scale = {1, 1, 1, 1}, float[4] bias = {0, 0, 0, 0}>
        {
            y, m, s = LayerNormalization (x, scale, bias)
            mean = Neg(m)
        }
        """,
        """
        g (float[2, 4] x) => (float[2, 4] y, float[2, 1] mean)
        <float16[4] bias = {0, 0, 0, 0}, float16[4] scale = {15360, 15360, 15360, 15360}>
        {
            "x/float16" = Cast <to = 10> (x)
            "y/float16", m, s = LayerNormalization("x/float16", scale, bias)
            "m/float16" = Cast <to = 10> (m)
            y = Cast <to = 1> ("y/float16")
            "mean/float16" = Neg("m/float16")
            mean = Cast <to = 1> ("mean/float16")
        }
        """,
    )
    assert change.details == ()


def test_boxes_and_scores_of_non_max_suppression_are_float32():
    change = assert_halves(
        """
        g (float[1, 2, 4] boxes, float[1, 1, 2] x) => (int64[n, 3] y)
        <int64 most = {2}, float least = {0.5}>
        {
            a = Sigmoid(x)
            y = NonMaxSuppression(boxes, a, most, least, least)
        }
        """,
        """
        g (float[1, 2, 4] boxes, float[1, 1, 2] x) => (int64[n, 3] y)
        <float least = {0.5}, int64 most = {2}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Sigmoid("x/float16")
            "a/float" = Cast <to = 1> (a)
            y = NonMaxSuppression(boxes, "a/float", most, least, least)
        }
        """,
        is_compared=False,
    )
    assert change.details == ()


def test_range_counts_in_float32():
    change = assert_halves(
        """
        g (float n) => (float[m] y)
        <float zero = {0}, float one = {1}>
        {
            a = Range(zero, n, one)
            y = Neg(a)
        }
        """,
        """
        g (float n) => (float[m] y)
        <float one = {1}, float zero = {0}>
        {
            a = Range(zero, n, one)
            "a/float16" = Cast <to = 10> (a)
            "y/float16" = Neg("a/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=[{"n": np.array(3, np.float32)}],
    )
    assert change.details == ()


def test_an_unknown_operator_of_the_runtime_is_given_what_it_takes():
    change = assert_halves(
        """
        g (float[2, 4] x) => (float[2, 4] y)
        <float[4] bias = {1, 2, 3, 4}>
        {
            a = com.microsoft.BiasGelu(x, bias)
            y = Relu(a)
        }
        """,
        """
        g (float[2, 4] x) => (float[2, 4] y)
        <float16[4] bias = {15360, 16384, 16896, 17408}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = com.microsoft.BiasGelu("x/float16", bias)
            "y/float16" = Relu(a)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


# Types in attributes


def test_a_fill_is_float16():
    change = assert_halves(
        """
        g (int64[2] shape, float[2, 2] x) => (float[2, 2] y) {
            a = ConstantOfShape <value = float[1] {0.5}> (shape)
            y = Mul(x, a)
        }
        """,
        """
        g (int64[2] shape, float[2, 2] x) => (float[2, 2] y) {
            "x/float16" = Cast <to = 10> (x)
            a = ConstantOfShape <value = float16[1] {14336}> (shape)
            "y/float16" = Mul("x/float16", a)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=[{"shape": np.array([2, 2]), "x": np.ones((2, 2), np.float32)}],
    )
    assert change.details == ()


def test_a_fill_that_says_nothing_is_float16():
    change = assert_halves(
        """
        g (int64[2] shape, float[2, 2] x) => (float[2, 2] y) {
            a = ConstantOfShape(shape)
            y = Add(x, a)
        }
        """,
        """
        g (int64[2] shape, float[2, 2] x) => (float[2, 2] y) {
            "x/float16" = Cast <to = 10> (x)
            a = ConstantOfShape <value = float16[1] {0}> (shape)
            "y/float16" = Add("x/float16", a)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=[{"shape": np.array([2, 2]), "x": np.ones((2, 2), np.float32)}],
    )
    assert change.details == ()


def test_random_numbers_are_drawn_in_float32():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            a = RandomNormal <shape = [2, 2], seed = 1.0> ()
            b = RandomUniformLike <seed = 1.0> (x)
            c = Add(a, b)
            y = Mul(x, c)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            "x/float16" = Cast <to = 10> (x)
            a = RandomNormal <seed = 1.0, shape = [2, 2]> ()
            "a/float16" = Cast <to = 10> (a)
            b = RandomUniformLike <seed = 1.0> (x)
            "b/float16" = Cast <to = 10> (b)
            c = Add("a/float16", "b/float16")
            "y/float16" = Mul("x/float16", c)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        is_compared=False,
    )
    assert change.details == ()


def test_an_identity_matrix_is_float32():
    change = assert_halves(
        """
        g (int64[2, 2] like, float[2, 2] x) => (float[2, 2] y) {
            a = EyeLike <dtype = 1> (like)
            y = MatMul(x, a)
        }
        """,
        """
        g (int64[2, 2] like, float[2, 2] x) => (float[2, 2] y) {
            "x/float16" = Cast <to = 10> (x)
            a = EyeLike <dtype = 1> (like)
            "a/float16" = Cast <to = 10> (a)
            "y/float16" = MatMul("x/float16", "a/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_sums_and_largest_numbers_are_float16():
    change = assert_halves(
        """
        g (float[2, 4] x) => (float[2, 2] y, int64[2, 2] indices)
        <int64 axis = {1}, int64[1] k = {2}>
        {
            a = CumSum(x, axis)
            y, indices = TopK(a, k)
        }
        """,
        """
        g (float[2, 4] x) => (float[2, 2] y, int64[2, 2] indices)
        <int64 axis = {1}, int64[1] k = {2}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = CumSum("x/float16", axis)
            "y/float16", indices = TopK(a, k)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        is_compared=False,
    )
    assert change.details == ()


def test_a_constant_of_both_precisions_is_there_twice():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            k = Constant <value = float {300}> ()
            a = Mul(x, k)
            b = Mul(a, k)
            y = Sigmoid(b)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            "x/float16" = Cast <to = 10> (x)
            k = Constant <value = float16 {23728}> ()
            "k/float" = Constant <value = float {300}> ()
            a = Mul("x/float16", k)
            "a/float" = Cast <to = 1> (a)
            b = Mul("a/float", "k/float")
            y = Sigmoid(b)
        }
        """,
    )
    assert any("b: peaks at" in line for line in change.details)


# Inputs and outputs


def test_all_inputs_and_outputs_stay_float32():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            y = Relu(x)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            "x/float16" = Cast <to = 10> (x)
            "y/float16" = Relu("x/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_no_input_or_output_stays_float32():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            y = Relu(x)
        }
        """,
        """
        g (float16[2, 2] x) => (float16[2, 2] y) {
            y = Relu(x)
        }
        """,
        pass_=casting(keep_io="none"),
    )
    assert change.details == ()


def test_named_inputs_and_outputs_stay_float32():
    change = assert_halves(
        """
        g (float[2, 2] x, float[2, 2] z) => (float[2, 2] y) {
            a = Add(x, z)
            y = Relu(a)
        }
        """,
        """
        g (float16[2, 2] x, float[2, 2] z) => (float16[2, 2] y) {
            "z/float16" = Cast <to = 10> (z)
            a = Add(x, "z/float16")
            y = Relu(a)
        }
        """,
        pass_=casting(keep_io=["z"]),
    )
    assert change.details == ()


def test_an_output_that_float16_does_not_hold_stays_float32():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float big = {100}>
        {
            a = Mul(x, big)
            b = Mul(a, big)
            y = Mul(b, big)
        }
        """,
        """
        g (float16[2, 2] x) => (float[2, 2] y)
        <float16 big = {22080}, float "big/float" = {100}>
        {
            a = Mul(x, big)
            b = Mul(a, big)
            "b/float" = Cast <to = 1> (b)
            y = Mul("b/float", "big/float")
        }
        """,
        pass_=casting(keep_io="none"),
    )
    assert any("y: peaks at" in line for line in change.details)


def test_what_passes_through_stays_what_it_is():
    change = assert_halves(
        """
        g (float[2, 2] x, float[2, 2] z) => (float[2, 2] x, float[2, 2] y) {
            y = Relu(z)
        }
        """,
        """
        g (float[2, 2] x, float[2, 2] z) => (float[2, 2] x, float[2, 2] y) {
            "z/float16" = Cast <to = 10> (z)
            "y/float16" = Relu("z/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_a_result_that_others_read_too_keeps_its_name():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] a, float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}>
        {
            a = MatMul(x, w)
            y = MatMul(a, w)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] a, float[2, 2] y)
        <float16[2, 2] w = {15360, 16384, 16896, 17408}>
        {
            "x/float16" = Cast <to = 10> (x)
            "a/float16" = MatMul("x/float16", w)
            a = Cast <to = 1> ("a/float16")
            "y/float16" = MatMul("a/float16", w)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_a_weight_that_is_a_result_is_there_twice():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] w, float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}>
        {
            y = MatMul(x, w)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] w, float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}, float16[2, 2] "w/float16" = {15360, 16384, 16896, 17408}>
        {
            "x/float16" = Cast <to = 10> (x)
            "y/float16" = MatMul("x/float16", "w/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_a_weight_that_a_caller_may_override_is_cast():
    change = assert_halves(
        """
        g (float[2, 2] x, float[2, 2] w) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}>
        {
            y = MatMul(x, w)
        }
        """,
        """
        g (float[2, 2] x, float[2, 2] w) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}>
        {
            "w/float16" = Cast <to = 10> (w)
            "x/float16" = Cast <to = 10> (x)
            "y/float16" = MatMul("x/float16", "w/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


# Branches and bodies


def test_both_branches_give_float16_and_capture_float16():
    change = assert_halves(
        """
        g (bool c, float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}>
        {
            a = MatMul(x, w)
            b = If (c) <
                then_branch = t () => (float[2, 2] p) {
                    p = MatMul(a, w)
                },
                else_branch = e () => (float[2, 2] q) {
                    q = Neg(a)
                }
            >
            y = Relu(b)
        }
        """,
        """
        g (bool c, float[2, 2] x) => (float[2, 2] y)
        <float16[2, 2] w = {15360, 16384, 16896, 17408}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = MatMul("x/float16", w)
            b = If(c) <else_branch = e () => (float16[2, 2] q) {
                q = Neg(a)
            }, then_branch = t () => (float16[2, 2] p) {
                p = MatMul(a, w)
            }>
            "y/float16" = Relu(b)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_what_overflows_in_one_branch_is_float32_in_both():
    change = assert_halves(
        """
        g (bool c, float[2, 2] x) => (float[2, 2] y)
        <float big = {1000}>
        {
            b = If (c) <
                then_branch = t () => (float[2, 2] p) {
                    d = Mul(x, big)
                    p = Mul(d, big)
                },
                else_branch = e () => (float[2, 2] q) {
                    q = Neg(x)
                }
            >
            y = Sigmoid(b)
        }
        """,
        """
        g (bool c, float[2, 2] x) => (float[2, 2] y)
        <float16 big = {25552}, float "big/float" = {1000}>
        {
            "x/float16" = Cast <to = 10> (x)
            b = If(c) <else_branch = e () => (float[2, 2] "q/float") {
                q = Neg("x/float16")
                "q/float" = Cast <to = 1> (q)
            }, then_branch = t () => (float[2, 2] p) {
                d = Mul("x/float16", big)
                "d/float" = Cast <to = 1> (d)
                p = Mul("d/float", "big/float")
            }>
            y = Sigmoid(b)
        }
        """,
        ranges={"b.then_branch/p": {"high": 1e6}},
    )
    assert any("b.then_branch/p: peaks at 1,000,000, above 0.5 x 65,504" in line for line in change.details)


def test_the_state_of_a_loop_is_of_one_precision():
    change = assert_halves(
        """
        g (int64 n, float[2, 2] x) => (float[2, 2] y, float[m, 2, 2] all)
        <float[2, 2] w = {0.1, 0.2, 0.3, 0.4}, bool yes = {1}>
        {
            a = MatMul(x, w)
            b, all = Loop (n, yes, a) <
                body = body (int64 i, bool c, float[2, 2] s) => (bool d, float[2, 2] t, float[2, 2] u) {
                    d = Identity(c)
                    t = MatMul(s, w)
                    u = Relu(t)
                }
            >
            y = Neg(b)
        }
        """,
        """
        g (int64 n, float[2, 2] x) => (float[2, 2] y, float[m, 2, 2] all)
        <float16[2, 2] w = {11878, 12902, 13517, 13926}, bool yes = {1}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = MatMul("x/float16", w)
            b, all = Loop(n, yes, a) <
                body = body (int64 i, bool c, float16[2, 2] s) => (bool d, float16[2, 2] t, float[2, 2] "u/float") {
                    d = Identity(c)
                    t = MatMul(s, w)
                    u = Relu(t)
                    "u/float" = Cast <to = 1> (u)
                }
            >
            "y/float16" = Neg(b)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_a_state_that_overflows_is_float32_all_around():
    change = assert_halves(
        """
        g (int64 n, float[2, 2] x) => (float[2, 2] y)
        <float big = {1000}, bool yes = {1}>
        {
            a = Relu(x)
            b = Loop (n, yes, a) <
                body = body (int64 i, bool c, float[2, 2] s) => (bool d, float[2, 2] t) {
                    d = Identity(c)
                    u = Neg(s)
                    t = Mul(u, big)
                }
            >
            y = Sigmoid(b)
        }
        """,
        """
        g (int64 n, float[2, 2] x) => (float[2, 2] y)
        <float big = {1000}, bool yes = {1}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Relu("x/float16")
            "a/float" = Cast <to = 1> (a)
            b = Loop(n, yes, "a/float") <body = body (int64 i, bool c, float[2, 2] s) => (bool d, float[2, 2] t) {
                d = Identity(c)
                u = Neg(s)
                t = Mul(u, big)
            }>
            y = Sigmoid(b)
        }
        """,
        ranges={"b.body/t": {"high": 1e9}},
    )
    assert any("b.body/t: peaks at 1,000,000,000, above 0.5 x 65,504" in line for line in change.details)


def test_a_scan_takes_and_collects_float16():
    change = assert_halves(
        """
        g (float[2] x, float[3, 2] xs) => (float[2] y, float[3, 2] all)
        {
            a = Relu(xs)
            y, b = Scan (x, a) <
                num_scan_inputs = 1,
                body = body (float[2] s, float[2] e) => (float[2] t, float[2] u) {
                    t = Add(s, e)
                    u = Neg(t)
                }
            >
            all = Tanh(b)
        }
        """,
        """
        g (float[2] x, float[3, 2] xs) => (float[2] y, float[3, 2] all) {
            "xs/float16" = Cast <to = 10> (xs)
            "x/float16" = Cast <to = 10> (x)
            a = Relu("xs/float16")
            "y/float16", b = Scan("x/float16", a) <
                body = body (float16[2] s, float16[2] e) => (float16[2] t, float16[2] u) {
                    t = Add(s, e)
                    u = Neg(t)
                },
                num_scan_inputs = 1
            >
            y = Cast <to = 1> ("y/float16")
            "all/float16" = Tanh(b)
            all = Cast <to = 1> ("all/float16")
        }
        """,
    )
    assert change.details == ()


def test_two_bodies_deep_what_is_captured_is_cast_once_outside():
    change = assert_halves(
        """
        g (bool c, float[2, 2] x) => (float[2, 2] y)
        <float[2, 2] w = {1, 2, 3, 4}>
        {
            y = If (c) <
                then_branch = t () => (float[2, 2] p) {
                    p = If (c) <
                        then_branch = tt () => (float[2, 2] r) {
                            r = MatMul(x, w)
                        },
                        else_branch = te () => (float[2, 2] s) {
                            s = Relu(x)
                        }
                    >
                },
                else_branch = e () => (float[2, 2] q) {
                    q = Neg(x)
                }
            >
        }
        """,
        """
        g (bool c, float[2, 2] x) => (float[2, 2] y)
        <float16[2, 2] w = {15360, 16384, 16896, 17408}>
        {
            "x/float16" = Cast <to = 10> (x)
            "y/float16" = If(c) <else_branch = e () => (float16[2, 2] q) {
                q = Neg("x/float16")
            }, then_branch = t () => (float16[2, 2] p) {
                p = If(c) <else_branch = te () => (float16[2, 2] s) {
                    s = Relu("x/float16")
                }, then_branch = tt () => (float16[2, 2] r) {
                    r = MatMul("x/float16", w)
                }>
            }>
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_sequences_stay_float32():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <int64 first = {0}>
        {
            a = Relu(x)
            s = SequenceConstruct(a, a)
            b = SequenceAt(s, first)
            y = Neg(b)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <int64 first = {0}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Relu("x/float16")
            "a/float" = Cast <to = 1> (a)
            s = SequenceConstruct("a/float", "a/float")
            b = SequenceAt(s, first)
            "b/float16" = Cast <to = 10> (b)
            "y/float16" = Neg("b/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


# Odds and ends


def test_local_functions_are_inlined():
    change = assert_halves(
        """
        <ir_version: 10, opset_import: ["": 21, "own": 1]>
        g (float[2, 2] x) => (float[2, 2] y) {
            a = own.twice(x)
            y = own.twice(a)
        }
        <domain: "own", opset_import: ["": 21]>
        twice (a) => (b) {
            b = Add(a, a)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            "x/float16" = Cast <to = 10> (x)
            a = Add("x/float16", "x/float16")
            "y/float16" = Add(a, a)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_tensors_without_elements_are_cast_like_others():
    change = assert_halves(
        """
        g (float[0, 2] x) => (float[0, 2] y)
        <float[0, 2] w = {}>
        {
            a = Add(x, w)
            y = Relu(a)
        }
        """,
        """
        g (float[0, 2] x) => (float[0, 2] y)
        <float16[0, 2] w = {}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Add("x/float16", w)
            "y/float16" = Relu(a)
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_a_name_that_is_taken_gets_a_number():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            "x/float16" = Relu(x)
            y = Add("x/float16", x)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y) {
            "x/float16_1" = Cast <to = 10> (x)
            "x/float16" = Relu("x/float16_1")
            "y/float16" = Add("x/float16", "x/float16_1")
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_scattered_sums_are_computed_and_not_moved():
    change = assert_halves(
        """
        g (float[4] x, int64[2] i, float[2] u) => (float[4] y)
        {
            y = ScatterElements <reduction = "add"> (x, i, u)
        }
        """,
        """
        g (float[4] x, int64[2] i, float[2] u) => (float[4] y) {
            "u/float16" = Cast <to = 10> (u)
            "x/float16" = Cast <to = 10> (x)
            "y/float16" = ScatterElements <reduction = "add"> ("x/float16", i, "u/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert change.details == ()


def test_what_the_author_computes_in_float32_from_float16_stays():
    change = assert_halves(
        """
        g (float16[2, 4] x, float[2, 4] z) => (float16[2, 4] y, float[2, 4] v) {
            a = Relu(x)
            b = Cast <to = 1> (a)
            c = Mul(b, b)
            d = ReduceMean(c)
            e = Sqrt(d)
            f = Div(b, e)
            h = Cast <to = 10> (f)
            y = Neg(h)
            v = Relu(z)
        }
        """,
        """
        g (float16[2, 4] x, float[2, 4] z) => (float16[2, 4] y, float[2, 4] v) {
            "z/float16" = Cast <to = 10> (z)
            a = Relu(x)
            b = Cast <to = 1> (a)
            c = Mul(b, b)
            d = ReduceMean(c)
            e = Sqrt (d)
            f = Div(b, e)
            h = Cast <to = 10> (f)
            y = Neg(h)
            "v/float16" = Relu("z/float16")
            v = Cast <to = 1> ("v/float16")
        }
        """,
    )
    assert any("on purpose" in line for line in change.details)


def test_numbers_in_attributes_are_float32_and_so_is_what_they_are_compared_with():
    ensemble = """
    g (float[2, 1] x) => (float[2, 1] y) {
        a = Relu(x)
        b = ai.onnx.ml.TreeEnsemble <
            nodes_splits = float[1] {0.5}, nodes_featureids = [0], nodes_modes = uint8[1] {0},
            nodes_truenodeids = [0], nodes_trueleafs = [1], nodes_falsenodeids = [1], nodes_falseleafs = [1],
            leaf_targetids = [0, 0], leaf_weights = float[2] {1, 2}, tree_roots = [0], n_targets = 1
        > (INPUT)
        BETWEEN
        y = OUTPUT
    }
    """
    header = '<ir_version: 10, opset_import: ["": 21, "ai.onnx.ml": 5]>'
    before = ensemble.replace("INPUT", "a").replace("BETWEEN", "").replace("OUTPUT", "Neg(b)")
    after = (
        ensemble.replace("a = Relu(x)", '"x/float16" = Cast <to = 10> (x)\n a = Relu("x/float16")')
        .replace("(INPUT)", '("a/float")')
        .replace("b = ai", '"a/float" = Cast <to = 1> (a)\n b = ai')
        .replace("BETWEEN", '"b/float16" = Cast <to = 10> (b)\n "y/float16" = Neg("b/float16")')
        .replace("OUTPUT", 'Cast <to = 1> ("y/float16")')
    )
    assert_halves(header + before, header + after)


ISLAND_BEHIND_A_CHOICE = """
g (float16[2, 2] p, bool[2, 2] m, float[2, 2] x) => (float[2, 2] y, float16[2, 2] z) {
    y = Tanh(x)
    a = Mul(p, p)
    b = Where(m, a, p)
    c = Cast <to = 1> (b)
    d = Mul(c, c)
    e = Sqrt(d)
    z = Cast <to = 10> (e)
}
"""
ISLAND_IN_A_LOOP = """
g (float16[2, 2] p, float[2, 2] x, int64 n) => (float[2, 2] y, float16[2, 2] z) {
    y = Tanh(x)
    go = Constant <value = bool {1}> ()
    z = Loop (n, go, p) <body = body (int64 trip, bool before, float16[2, 2] s) => (bool after, float16[2, 2] next) {
        after = Identity(before)
        c = Cast <to = 1> (s)
        d = Mul(c, c)
        e = Sqrt(d)
        next = Cast <to = 10> (e)
    }>
}
"""
ISLAND_THAT_LEAVES_A_BRANCH = """
g (float16[2, 2] p, float[2, 2] x, bool flag) => (float[2, 2] y, float16[2, 2] z) {
    y = Tanh(x)
    a = Mul(p, p)
    b = If (flag) <
        then_branch = squared () => (float[2, 2] d) { c = Cast <to = 1> (a)  d = Mul(c, c) },
        else_branch = plain () => (float[2, 2] h) { f = Cast <to = 1> (a)  h = Abs(f) }
    >
    e = Sqrt(b)
    z = Cast <to = 10> (e)
}
"""


ISLAND_IN_BFLOAT16 = """
g (bfloat16[2, 2] p, float[2, 2] x) => (float[2, 2] y, bfloat16[2, 2] z) {
    y = Tanh(x)
    a = Identity(p)
    b = Add(a, a)
    c = Cast <to = 1> (b)
    d = Mul(c, c)
    e = Sqrt(d)
    z = Cast <to = 16> (e)
}
"""


@pytest.mark.parametrize("graph", [ISLAND_BEHIND_A_CHOICE, ISLAND_IN_A_LOOP, ISLAND_THAT_LEAVES_A_BRANCH])
def test_an_island_stays_whole_through_choices_branches_and_loops(graph: str):
    model, change = halved(graph)
    kept = {value.name: value.dtype for part in graphs_of(model.graph) for node in part for value in node.outputs}
    assert (kept["c"], kept["d"], kept["e"]) == (ir.DataType.FLOAT,) * 3
    assert any("on purpose" in line for line in change.details)


@pytest.mark.parametrize(
    "graph",
    [
        """
        g (float[1, 2, 4] x, float[1, 2, 4] s) => (float[1, 2, 4] y, float[1, 2, 4] z)
        <float[4] scale = {1, 1, 1, 1}, float[4] bias = {0, 0, 0, 0}>
        {
            a = Relu(x)
            y, mean, deviation, z = com.microsoft.SkipLayerNormalization(a, s, scale, bias)
        }
        """,
        """
        g (float[1, 2, 4] q, float[1, 2, 4] k, float[1, 2, 4] v, float[1, 1, 2, 2] bias) => (float[1, 2, 4] y) {
            y = com.microsoft.MultiHeadAttention <num_heads = 2> (q, k, v, "", "", bias)
        }
        """,
        """
        g (float[1, 32] x) => (float[1, 1] y)
        <uint8[1, 1, 16] w = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16}, float[1] scale = {0.5}>
        {
            a = com.microsoft.QuickGelu(x)
            y = com.microsoft.MatMulNBits <K = 32, N = 1, bits = 4, block_size = 32> (a, w, scale)
        }
        """,
    ],
)
def test_operators_of_the_runtime_are_cast_as_their_definitions_say(graph: str):
    header = '<ir_version: 8, opset_import: ["": 17, "com.microsoft": 1]>'
    model, _ = halved(header + graph)
    fused = [node for node in model.graph if node.domain == "com.microsoft"]
    assert fused
    for node in fused:
        kinds = {value.name: value.dtype for value in node.outputs if value.name not in ("mean", "deviation")}
        assert set(kinds.values()) == {ir.DataType.FLOAT16}, kinds


def test_an_island_among_bfloat16_stays():
    """ONNX Runtime's CPU provider runs no bfloat16, so the model is only written."""
    model = parse(ISLAND_IN_BFLOAT16)
    bundle, _ = cast_bundle(casting(), Bundle({ROLE: model}), {ROLE: Ranges(values={}, samples=1)})
    assert find_problem(bundle[ROLE]) == ""
    kinds = {value.name: value.dtype for node in bundle[ROLE].graph for value in node.outputs}
    assert [kinds[name] for name in "cde"] == [ir.DataType.FLOAT] * 3
    assert kinds["y/float16"] == ir.DataType.FLOAT16
