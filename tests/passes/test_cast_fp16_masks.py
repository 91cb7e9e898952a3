"""`cast_fp16`: masks stay masks, and a row in which all is masked is what it was in float32."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from halving import assert_halves, casting, halved
from rewriting import Feeds

from passes.cast_fp16.casting import KEPT

RANDOM = np.random.default_rng(0)
SCORES = RANDOM.standard_normal((2, 3, 3)).astype(np.float32)
# The last sequence of the second sample is masked as a whole; so are some rows of the others.
FEEDS = [{"mask": np.array(mask), "scores": SCORES} for mask in ([[1, 1, 0], [1, 0, 0]], [[1, 1, 1], [0, 0, 0]])]
SOME = RANDOM.random((2, 3, 3)) < 0.6
SOME[:, :, 0] = True
NONE = SOME.copy()
NONE[0, 1] = False
SELECTED = [{"c": shown, "scores": SCORES} for shown in (SOME, NONE)]
TWO = [{"c": shown, "d": np.roll(NONE, 1, axis=2), "scores": SCORES} for shown in (SOME, NONE)]
HEADS = {name: RANDOM.standard_normal((1, 2, 3, 4)).astype(np.float32) for name in "qkv"}
ATTENTION = [{"c": SOME[:1, None], **HEADS}]

FLAGS_TIMES_LOWEST = """
g (int64[b, n] mask, float[b, n, n] scores) => (float[b, n, n] y)
<float one = {1}, float lowest = {-3.4028234663852886e+38}, int64[1] axis = {1}>
{
    f = Cast <to = 1> (mask)
    i = Sub(one, f)
    m = Mul(i, lowest)
    u = Unsqueeze(m, axis)
    s = Add(scores, u)
    y = Softmax(s)
}
"""


def times(factor: int, feeds: Sequence[Feeds]) -> list[Feeds]:
    """Return feeds of larger scores."""
    return [{**sample, "scores": sample["scores"] * np.float32(factor)} for sample in feeds]


# Added


def test_the_fills_of_a_mask_become_the_lowest_number():
    change = assert_halves(
        FLAGS_TIMES_LOWEST,
        """
        g (int64[b, n] mask, float[b, n, n] scores) => (float[b, n, n] y)
        <int64[1] axis = {1}, float16 lowest = {64511}, float16 one = {15360}>
        {
            "scores/float16" = Cast <to = 10> (scores)
            f = Cast <to = 10> (mask)
            i = Sub(one, f)
            m = Mul(i, lowest)
            u = Unsqueeze(m, axis)
            s = Add("scores/float16", u)
            "y/float16" = Softmax(s)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=FEEDS,
    )
    assert any("lowest: fills of -3.4e+38 become -65,504" in line for line in change.details)


def test_fills_that_are_computed_otherwise_are_made_in_float32_and_raised():
    change = assert_halves(
        """
        g (int64[b, n] mask, float[b, n, n] scores) => (float[b, n, n] y)
        <float one = {1}, float most = {3.4028234663852886e+38}, int64[1] axis = {1}>
        {
            f = Cast <to = 1> (mask)
            i = Sub(f, one)
            m = Mul(i, most)
            u = Unsqueeze(m, axis)
            s = Add(scores, u)
            y = Softmax(s)
        }
        """,
        """
        g (int64[b, n] mask, float[b, n, n] scores) => (float[b, n, n] y)
        <
            int64[1] axis = {1},
            float "lowest/float" = {-65504},
            float most = {3.4028235e+38},
            float one = {1}
        >
        {
            "scores/float16" = Cast <to = 10> (scores)
            f = Cast <to = 1> (mask)
            i = Sub(f, one)
            m = Mul(i, most)
            "m/raised" = Max(m, "lowest/float")
            "m/float16" = Cast <to = 10> ("m/raised")
            u = Unsqueeze("m/float16", axis)
            s = Add("scores/float16", u)
            "y/float16" = Softmax(s)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=FEEDS,
    )
    assert any("m: fills of -3.4e+38 become -65,504" in line for line in change.details)


def test_where_scores_do_not_vanish_in_the_fill_sums_are_raised_to_it():
    change = assert_halves(
        FLAGS_TIMES_LOWEST,
        """
        g (int64[b, n] mask, float[b, n, n] scores) => (float[b, n, n] y)
        <
            int64[1] axis = {1},
            float lowest = {-3.4028235e+38},
            float16 "lowest/float16" = {64511},
            float one = {1}
        >
        {
            "scores/float16" = Cast <to = 10> (scores)
            f = Cast <to = 1> (mask)
            i = Sub(one, f)
            m = Mul(i, lowest)
            "m/float16" = Cast <to = 10> (m)
            u = Unsqueeze("m/float16", axis)
            s = Add("scores/float16", u)
            "s/raised" = Max(s, "lowest/float16")
            "y/float16" = Softmax("s/raised")
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=times(20, FEEDS),
    )
    assert any(
        "fills become -inf, and sums with them are raised to -65,504 at the end" in line for line in change.details
    )


def test_two_masks_one_over_the_other_stay_apart_as_in_float32():
    change = assert_halves(
        """
        g (bool[b, n, n] c, bool[b, n, n] d, float[b, n, n] scores) => (float[b, n, n] y)
        <float zero = {0}, float lowest = {-3.4028234663852886e+38}>
        {
            m = Where(d, zero, lowest)
            a = Where(c, scores, lowest)
            s = Add(a, m)
            y = Softmax(s)
        }
        """,
        """
        g (bool[b, n, n] c, bool[b, n, n] d, float[b, n, n] scores) => (float[b, n, n] y)
        <float16 lowest = {64511}, float16 zero = {0}>
        {
            "scores/float16" = Cast <to = 10> (scores)
            m = Where(d, zero, lowest)
            a = Where(c, "scores/float16", lowest)
            s = Add(a, m)
            "y/float16" = Softmax(s)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=TWO,
    )
    assert any("lowest: fills of -3.4e+38 become -65,504" in line for line in change.details)


def test_two_masks_whose_sum_is_finite_in_float32_stay_float32():
    """Of -65,504 twice float16 makes -inf, and a row that both mask whole would be no number."""
    change = assert_halves(
        """
        g (bool[b, n, n] c, bool[b, n, n] d, float[b, n, n] scores) => (float[b, n, n] y)
        <float zero = {0}, float fill = {-1e9}>
        {
            m = Where(c, zero, fill)
            o = Where(d, zero, fill)
            both = Add(m, o)
            s = Add(scores, both)
            shares = Softmax(s)
            y = Tanh(shares)
        }
        """,
        """
        g (bool[b, n, n] c, bool[b, n, n] d, float[b, n, n] scores) => (float[b, n, n] y)
        <float fill = {-1e+09}, float zero = {0}>
        {
            m = Where(c, zero, fill)
            o = Where(d, zero, fill)
            both = Add(m, o)
            s = Add(scores, both)
            shares = Softmax(s)
            "shares/float16" = Cast <to = 10> (shares)
            "y/float16" = Tanh("shares/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=[{**one, "c": np.zeros_like(one["c"]), "d": np.zeros_like(one["d"])} for one in TWO],
    )
    assert any("both: peaks at 2,000,000,000, above 0.5 x 65,504" in line for line in change.details)


def test_two_masks_under_large_scores_stay_float32():
    change = assert_halves(
        """
        g (bool[b, n, n] c, bool[b, n, n] d, float[b, n, n] scores) => (float[b, n, n] y)
        <float zero = {0}, float lowest = {-3.4028234663852886e+38}>
        {
            x = Neg(scores)
            m = Where(d, zero, lowest)
            a = Where(c, x, m)
            s = Add(x, a)
            t = Add(s, m)
            y = Softmax(t)
        }
        """,
        """
        g (bool[b, n, n] c, bool[b, n, n] d, float[b, n, n] scores) => (float[b, n, n] y)
        <float lowest = {-3.4028235e+38}, float zero = {0}>
        {
            "scores/float16" = Cast <to = 10> (scores)
            x = Neg("scores/float16")
            "x/float" = Cast <to = 1> (x)
            m = Where(d, zero, lowest)
            a = Where(c, "x/float", m)
            s = Add("x/float", a)
            t = Add (s, m)
            y = Softmax(t)
        }
        """,
        feeds=times(20, TWO),
    )
    assert any("s: peaks at 3.4e+38, above 0.5 x 65,504" in line for line in change.details)


# Selected


def test_a_fill_that_is_selected_becomes_the_lowest_number():
    change = assert_halves(
        """
        g (bool[b, n, n] c, float[b, n, n] scores) => (float[b, n, n] y)
        <float lowest = {-3.4028234663852886e+38}>
        {
            s = Where(c, scores, lowest)
            y = Softmax(s)
        }
        """,
        """
        g (bool[b, n, n] c, float[b, n, n] scores) => (float[b, n, n] y)
        <float16 lowest = {64511}>
        {
            "scores/float16" = Cast <to = 10> (scores)
            s = Where(c, "scores/float16", lowest)
            "y/float16" = Softmax(s)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=times(20, SELECTED),
    )
    assert any("lowest: fills of -3.4e+38 become -65,504" in line for line in change.details)


def test_an_infinite_fill_stays_infinite():
    change = assert_halves(
        """
        g (bool[b, n, n] c, float[b, n, n] scores) => (float[b, n, n] y)
        <float none = {-inf}>
        {
            s = Where(c, scores, none)
            y = Softmax(s)
        }
        """,
        """
        g (bool[b, n, n] c, float[b, n, n] scores) => (float[b, n, n] y)
        <float16 none = {64512}>
        {
            "scores/float16" = Cast <to = 10> (scores)
            s = Where(c, "scores/float16", none)
            "y/float16" = Softmax(s)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=SELECTED[:1],
    )
    assert change.details == ()


def test_a_fill_that_float16_holds_stays_what_it_is():
    change = assert_halves(
        """
        g (int64[b, n] mask, float[b, n, n] scores) => (float[b, n, n] y)
        <float one = {1}, float low = {-10000}, int64[1] axis = {1}>
        {
            f = Cast <to = 1> (mask)
            i = Sub(one, f)
            m = Mul(i, low)
            u = Unsqueeze(m, axis)
            s = Add(scores, u)
            y = Softmax(s)
        }
        """,
        """
        g (int64[b, n] mask, float[b, n, n] scores) => (float[b, n, n] y)
        <int64[1] axis = {1}, float16 low = {61666}, float16 one = {15360}>
        {
            "scores/float16" = Cast <to = 10> (scores)
            f = Cast <to = 10> (mask)
            i = Sub(one, f)
            m = Mul(i, low)
            u = Unsqueeze(m, axis)
            s = Add("scores/float16", u)
            "y/float16" = Softmax(s)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=FEEDS[:1],
    )
    assert change.details == ()


def test_a_fill_that_masks_are_compared_with_becomes_the_same_number():
    change = assert_halves(
        """
        g (bool[b, n, n] c, float[b, n, n] scores) => (float[b, n, n] y)
        <float lowest = {-3.4028234663852886e+38}, float zero = {0}>
        {
            s = Where(c, scores, lowest)
            e = Greater(s, lowest)
            p = Softmax(s)
            y = Where(e, p, zero)
        }
        """,
        """
        g (bool[b, n, n] c, float[b, n, n] scores) => (float[b, n, n] y)
        <float16 lowest = {64511}, float16 zero = {0}>
        {
            "scores/float16" = Cast <to = 10> (scores)
            s = Where(c, "scores/float16", lowest)
            e = Greater (s, lowest)
            p = Softmax(s)
            "y/float16" = Where(e, p, zero)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=SELECTED,
    )
    assert any("lowest: fills of -3.4e+38 become -65,504" in line for line in change.details)


def test_the_mask_of_an_attention_is_finite():
    change = assert_halves(
        """
        <ir_version: 10, opset_import: ["": 23]>
        g (bool[1, 1, 3, 3] c, float[1, 2, 3, 4] q, float[1, 2, 3, 4] k, float[1, 2, 3, 4] v) => (float[1, 2, 3, 4] y)
        <float lowest = {-3.4028234663852886e+38}, float zero = {0}>
        {
            m = Where(c, zero, lowest)
            y = Attention(q, k, v, m)
        }
        """,
        """
        g (bool[1, 1, 3, 3] c, float[1, 2, 3, 4] q, float[1, 2, 3, 4] k, float[1, 2, 3, 4] v) => (float[1, 2, 3, 4] y)
        <float16 lowest = {64511}, float16 zero = {0}>
        {
            "v/float16" = Cast <to = 10> (v)
            "k/float16" = Cast <to = 10> (k)
            "q/float16" = Cast <to = 10> (q)
            m = Where(c, zero, lowest)
            "y/float16" = Attention("q/float16", "k/float16", "v/float16", m)
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=ATTENTION,
    )
    assert any("lowest: fills of -3.4e+38 become -65,504" in line for line in change.details)


# What is no mask


def test_a_reader_that_hides_nothing_gets_the_numbers_of_a_mask_themselves():
    change = assert_halves(
        """
        g (int64[b, n] mask, float[b, n, n] scores) => (float[b, n, n] y, float[b, 1] z)
        <float one = {1}, float lowest = {-3.4028234663852886e+38}, int64[1] axis = {1}>
        {
            f = Cast <to = 1> (mask)
            i = Sub(one, f)
            m = Mul(i, lowest)
            u = Unsqueeze(m, axis)
            s = Add(scores, u)
            y = Softmax(s)
            r = ReduceMin(m, axis)
            z = Sigmoid(r)
        }
        """,
        """
        g (int64[b, n] mask, float[b, n, n] scores) => (float[b, n, n] y, float[b, 1] z)
        <
            int64[1] axis = {1},
            float lowest = {-3.4028235e+38},
            float "lowest/float" = {-65504},
            float one = {1}
        >
        {
            "scores/float16" = Cast <to = 10> (scores)
            f = Cast <to = 1> (mask)
            i = Sub(one, f)
            m = Mul(i, lowest)
            "m/raised" = Max(m, "lowest/float")
            "m/float16" = Cast <to = 10> ("m/raised")
            u = Unsqueeze("m/float16", axis)
            s = Add("scores/float16", u)
            "y/float16" = Softmax(s)
            y = Cast <to = 1> ("y/float16")
            r = ReduceMin(m, axis)
            z = Sigmoid(r)
        }
        """,
        feeds=FEEDS,
    )
    assert any("m: makes mask fills of -3.4e+38" in line for line in change.details)


def test_fills_that_are_told_apart_are_no_mask():
    change = assert_halves(
        """
        g (bool[b, n, n] c, float[b, n, n] scores) => (float[b, n, n] y, bool[b, n, n] z)
        <float lowest = {-3.4028234663852886e+38}, float low = {-1e9}>
        {
            s = Where(c, scores, low)
            z = Greater(s, lowest)
            p = Softmax(s)
            y = Neg(p)
        }
        """,
        """
        g (bool[b, n, n] c, float[b, n, n] scores) => (float[b, n, n] y, bool[b, n, n] z)
        <float low = {-1e+09}, float lowest = {-3.4028235e+38}>
        {
            s = Where(c, scores, low)
            z = Greater(s, lowest)
            p = Softmax(s)
            "p/float16" = Cast <to = 10> (p)
            "y/float16" = Neg("p/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
        feeds=SELECTED,
    )
    assert any("s: peaks at 1,000,000,000, above 0.5 x 65,504" in line for line in change.details)


def test_large_negative_scores_are_no_mask():
    change = assert_halves(
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float big = {-100000}>
        {
            a = Abs(x)
            b = Mul(a, big)
            c = Softmax(b)
            y = Neg(c)
        }
        """,
        """
        g (float[2, 2] x) => (float[2, 2] y)
        <float big = {-1e+05}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = Abs("x/float16")
            "a/float" = Cast <to = 1> (a)
            b = Mul("a/float", big)
            c = Softmax(b)
            "c/float16" = Cast <to = 10> (c)
            "y/float16" = Neg("c/float16")
            y = Cast <to = 1> ("y/float16")
        }
        """,
    )
    assert any("b: peaks at" in line for line in change.details)


def test_a_fill_that_is_averaged_is_no_mask():
    change = assert_halves(
        """
        g (bool[b, n, n] c, float[b, n, n] scores) => (float[b, 1, 1] z, float[b, n, n] y)
        <float low = {-1e9}>
        {
            s = Where(c, scores, low)
            p = Softmax(s)
            y = Neg(p)
            z = ReduceMean(s)
        }
        """,
        """
        g (bool[b, n, n] c, float[b, n, n] scores) => (float[b, 1, 1] z, float[b, n, n] y)
        <float low = {-1e+09}>
        {
            s = Where(c, scores, low)
            p = Softmax(s)
            "p/float16" = Cast <to = 10> (p)
            "y/float16" = Neg("p/float16")
            y = Cast <to = 1> ("y/float16")
            z = ReduceMean(s)
        }
        """,
        feeds=SELECTED,
    )
    assert any("s: peaks at 1,000,000,000, above 0.5 x 65,504" in line for line in change.details)


def test_what_makes_fills_finite_says_so_and_stays_float32():
    """Its own result is beyond the headroom again, and a later run must not make it finite once more."""
    model, change = halved(
        """
        g (float[2, 4] scores, float[2, 4] mask) => (float[2, 4] y) {
            a = Add(scores, mask)
            y = Softmax(a)
        }
        """,
        feeds=[{"scores": np.ones((2, 4), np.float32), "mask": np.array([[0, 0, -3e38, -3e38]] * 2, np.float32)}],
        pass_=casting(headroom=0.1, keep_io="none"),
    )
    (raising,) = (node for node in model.graph if node.op_type == "Max")
    assert raising.metadata_props[KEPT] == "mask: fills of masks are made finite for float16"
    assert any("become -65,504" in line for line in change.details)
