"""`last_logits`: what is cut, what is claimed, and what is refused."""

from __future__ import annotations

import pytest
from models import decoder_pair
from rewriting import assert_leaves_alone, assert_rewrites, run_pass

from passes.dedup_weights import DedupWeights
from passes.last_logits import LastLogits
from passes.merge_if import MergeIf
from surgery import Pipeline
from surgery.errors import Refused
from surgery.text import parse

BOUNDS = "int64[1] last_axis = {-2}, int64[1] last_end = {9223372036854775807}, int64[1] last_start = {-1}"


def test_a_bias_and_a_soft_cap_behind_the_projection_are_cut_too():
    assert_rewrites(
        LastLogits(),
        """
        g (float[b, s, 2] x) => (float[b, s, 3] logits, float[b, s, 2] h)
        <float[2, 3] head = {1, 2, 3, 4, 5, 6}, float[3] bias = {1, 2, 3}> {
            h = Tanh(x)
            product = MatMul(h, head)
            raw = Add(product, bias)
            cap = Constant <value = float {30.0}> ()
            small = Div(raw, cap)
            bent = Tanh(small)
            logits = Mul(bent, cap)
        }
        """,
        f"""
        g (float[b, s, 2] x) => (float[b, 1, 3] logits, float[b, s, 2] h)
        <float[2, 3] head = {{1, 2, 3, 4, 5, 6}}, float[3] bias = {{1, 2, 3}}, {BOUNDS}> {{
            h = Tanh(x)
            h_last = Slice(h, last_start, last_end, last_axis)
            product = MatMul(h_last, head)
            raw = Add(product, bias)
            cap = Constant <value = float {{30.0}}> ()
            small = Div(raw, cap)
            bent = Tanh(small)
            logits = Mul(bent, cap)
        }}
        """,
    )


def test_a_model_without_logits_is_left_alone():
    assert_leaves_alone(LastLogits(), "g (float[b, s, 2] x) => (float[b, s, 2] y) { y = Tanh(x) }")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("logits = Tanh(x)", "'logits' comes from an input, not from a MatMul with a constant"),
        ("t = Transpose <perm = [0, 2, 1]> (x) logits = MatMul(x, t)", "not from a MatMul with a constant"),
        (
            "m = MatMul(x, head) logits = Add(m, x)",
            "'logits' depends on 'x' after the projection",
        ),
        ("m = MatMul(x, head) n = Neg(m) logits = Add(m, one)", "'m', on the way to 'logits', is used elsewhere too"),
    ],
)
def test_logits_that_are_no_product_are_refused(text: str, said: str):
    model = parse(
        "g (float[b, s, 2] x) => (float[b, s, 2] logits) "
        f"<float[2, 2] head = {{1, 2, 3, 4}}, float[2] one = {{1, 1}}> {{ {text} }}"
    )
    with pytest.raises(Refused, match=said):
        run_pass(LastLogits(), model)


def test_an_output_that_is_asked_for_and_not_there_is_refused():
    model = parse("g (float[b, s, 2] x) => (float[b, s, 2] y) { y = Tanh(x) }")
    with pytest.raises(Refused, match="'model' has no output 'logits'"):
        run_pass(LastLogits(models=("model",)), model)


def test_a_prefill_is_claimed_to_give_the_last_row_and_merges_with_its_decode():
    pair = decoder_pair()
    result = Pipeline([LastLogits(models=("prefill",)), MergeIf(), DedupWeights()]).run(pair)
    first, second = (record.verdict for record in result.records[1:3])
    assert set(first.coverage["prefill"].traits["length"]) >= {"1", "7", "100"}
    assert str(second.step) == "exact"
    assert str(result.bundle["decoder"].graph.outputs[0].shape) == "[batch_size,1,50]"
