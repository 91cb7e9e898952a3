"""`fuse_cache`: what is fused, what is not, and that the numbers stay."""

from __future__ import annotations

import pytest
from rewriting import assert_leaves_alone, assert_rewrites

from passes.fuse_cache import FuseCache

INPUTS = """<ir_version: 11, opset_import: ["" : 23]>
g (float[b, 2, s, 4] q, float[b, 2, s, 4] k, float[b, 2, s, 4] v, float[b, 2, p, 4] keys, float[b, 2, p, 4] vals)"""
OUTPUTS = "(float[b, 2, s, 4] y, float[b, 2, t, 4] all_keys, float[b, 2, t, 4] all_vals)"


def test_a_negative_axis_is_the_same_axis():
    assert_rewrites(
        FuseCache(),
        f"""{INPUTS} => {OUTPUTS} {{
            all_keys = Concat <axis = -2> (keys, k)
            all_vals = Concat <axis = -2> (vals, v)
            y = Attention <scale = 0.5> (q, all_keys, all_vals)
        }}""",
        f"""{INPUTS} => {OUTPUTS} {{
            y, all_keys, all_vals = Attention <scale = 0.5> (q, k, v, , keys, vals)
        }}""",
    )


def test_what_is_used_after_the_attention_is_read_from_it():
    assert_rewrites(
        FuseCache(),
        f"""{INPUTS} => (float[b, 2, s, 4] y, float[b, 2, t, 4] seen) {{
            all_keys = Concat <axis = 2> (keys, k)
            all_vals = Concat <axis = 2> (vals, v)
            y = Attention (q, all_keys, all_vals)
            seen = Neg(all_keys)
        }}""",
        f"""{INPUTS} => (float[b, 2, s, 4] y, float[b, 2, t, 4] seen) {{
            y, all_keys, all_vals = Attention (q, k, v, , keys, vals)
            seen = Neg(all_keys)
        }}""",
    )


@pytest.mark.parametrize(
    "body",
    [
        pytest.param(
            """
            all_keys = Concat <axis = 2> (keys, k)
            all_vals = Concat <axis = 2> (vals, v)
            y = Attention <is_causal = 1> (q, all_keys, all_vals)
            """,
            id="a causal one",
        ),
        pytest.param(
            """
            all_keys = Concat <axis = 2> (keys, k)
            all_vals = Concat <axis = 2> (vals, v)
            sizes = Shape <start = 2, end = 3> (all_keys)
            ones = ConstantOfShape(sizes)
            y = Attention (q, all_keys, all_vals, ones)
            """,
            id="a mask as long as the keys",
        ),
        pytest.param(
            """
            all_keys = Concat <axis = 2> (keys, k)
            both = Add(v, v)
            all_vals = Concat <axis = 2> (both, vals)
            y = Attention (q, all_keys, all_vals)
            """,
            id="values appended the other way round",
        ),
        pytest.param(
            """
            all_keys = Concat <axis = 2> (keys, k)
            all_vals = Concat <axis = 2> (vals, v)
            y = Attention (q, all_keys, all_keys)
            """,
            id="keys that are the values",
        ),
        pytest.param(
            """
            all_keys = Concat <axis = 2> (keys, k, k)
            all_vals = Concat <axis = 2> (vals, v, v)
            y = Attention (q, all_keys, all_vals)
            """,
            id="three parts",
        ),
    ],
)
def test_it_is_left_alone(body):
    assert_leaves_alone(FuseCache(), f"{INPUTS} => {OUTPUTS} {{ {body} }}")


def test_heads_are_not_tokens():
    assert_leaves_alone(
        FuseCache(),
        """<ir_version: 11, opset_import: ["" : 23]>
        g (float[b, 4, s, 4] q, float[b, 2, s, 4] k, float[b, 2, s, 4] v, float[b, 2, s, 4] keys,
           float[b, 2, s, 4] vals) => (float[b, 4, s, 4] y, float[b, 4, s, 4] all_keys, float[b, 4, s, 4] all_vals) {
            all_keys = Concat <axis = 1> (keys, k)
            all_vals = Concat <axis = 1> (vals, v)
            y = Attention (q, all_keys, all_vals)
        }""",
    )
