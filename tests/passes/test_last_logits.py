"""`last_logits`: what is cut, what is claimed, and what is refused."""

from __future__ import annotations

import onnx_ir as ir
import pytest
from merging import branches
from models import decoder_pair
from rewriting import assert_leaves_alone, assert_rewrites, rewritten, run_pass

from passes.dedup_weights import DedupWeights
from passes.last_logits import LastLogits
from passes.merge_if import MergeIf
from passes.tie_transposed import TieTransposed
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


def cut(inputs: str, weights: str, nodes: str, *, output: str = "float[b, s, 3] logits", opset: int = 18) -> ir.Model:
    """Return a model with its projection cut, proven to answer with the last row of what it did."""
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> g ({inputs}) => ({output}) {weights} {{ {nodes} }}'
    return rewritten(LastLogits(), parse(text))


HEAD = "float[2, 3] head = {1, 2, 3, 4, 5, 6}"
TIED = "float[3, 2] head = {1, 2, 3, 4, 5, 6}"
FLAT = "int64[2] flat = {-1, 2}, int64[1] width = {3}"
LEADING = "Shape <end = -1> (x)"
ROWS = "r = Reshape(x, flat) g = Gemm <transB = 1> (r, head) l = {} t = Concat <axis = 0> (l, width) "


def slices(model: ir.Model) -> list[ir.Node]:
    return [node for node in model.graph.all_nodes() if node.op_type == "Slice"]


def test_a_bias_before_the_product_and_casts_around_it_are_seen_through():
    model = cut(
        "float[b, s, 2] x",
        "<float16[2, 3] head = {1, 2, 3, 4, 5, 6}, float[3] bias = {1, 2, 3}>",
        "h = Cast <to = 10> (x) m = MatMul(h, head) f = Cast <to = 1> (m) logits = Add(bias, f)",
    )
    assert slices(model)[0].inputs[0].name == "h"
    assert all(node.outputs[0].shape is None or node.outputs[0].shape[-2] == 1 for node in list(model.graph)[2:])


def test_a_bias_that_only_bart_has_and_the_scale_that_only_t5_has_are_cut_too():
    model = cut(
        "float[b, s, 2] x",
        f"<{HEAD}, float[1, 3] final_logits_bias = {{0, 1, 0}}, float scale = {{0.5}}>",
        "h = Mul(x, scale) m = MatMul(h, head) logits = Add(m, final_logits_bias)",
    )
    assert slices(model)[0].inputs[0].name == "h"


def test_a_matrix_that_is_transposed_on_the_way_is_a_matrix():
    model = cut("float[b, s, 2] x", f"<{TIED}>", "w = Transpose(head) logits = MatMul(x, w)")
    assert len(slices(model)) == 1


def test_a_matrix_that_is_dequantized_on_the_way_is_a_matrix():
    weights = "<int8[2, 3] head = {1, -2, 3, 4, -5, 6}, float scale = {0.5}, int8 zero = {1}>"
    model = cut("float[b, s, 2] x", weights, "w = DequantizeLinear(head, scale, zero) logits = MatMul(x, w)")
    assert len(slices(model)) == 1


def test_rows_that_become_several_positions_each_are_refused():
    model = parse(
        "g (float[s, 2] x) => (float[s, 2, 3] logits) <float[6, 2] head = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12}, "
        f"int64[2] flat = {{-1, 2}}, int64[2] width = {{2, 3}}> {{ {ROWS.format(LEADING)} logits = Reshape(g, t) }}"
    )
    with pytest.raises(Refused, match=r"comes from node '' \(Reshape\), not from a product"):
        run_pass(LastLogits(), model)


def test_what_tie_transposed_makes_of_the_product_is_cut():
    model = cut("float[b, s, 2] x", f"<{TIED}, {FLAT}>", f"{ROWS.format(LEADING)} logits = Reshape(g, t)")
    assert {reader.op_type for reader, _ in slices(model)[0].outputs[0].uses()} == {"Reshape", "Shape"}
    tied = run_pass(
        TieTransposed(min_bytes=1),
        parse(
            f"g (int64[b, s] ids) => (float[b, s, 3] logits) <{TIED}, float[2, 3] turned = {{1, 3, 5, 2, 4, 6}}> "
            "{ x = Gather(head, ids) logits = MatMul(x, turned) }"
        ),
    )[0]["model"]
    assert "Gemm" in {node.op_type for node in tied.graph}
    assert len(slices(rewritten(LastLogits(), tied))) == 1


def test_below_opset_15_the_shape_of_rows_is_cut_as_well():
    bounds = "int64[1] first = {0}, int64[1] end = {-1}"
    nodes = f"a = Shape(x) {ROWS.format('Slice(a, first, end)')} logits = Reshape(g, t)"
    assert len(slices(cut("float[b, s, 2] x", f"<{TIED}, {FLAT}, {bounds}>", nodes, opset=13))) == 2


def test_both_branches_of_a_merged_model_are_cut():
    pair = decoder_pair()
    result = Pipeline([MergeIf(), LastLogits()]).run(pair)
    merged = result.bundle["decoder"]
    assert ["Slice" in {node.op_type for node in branch} for branch in branches(merged).values()] == [False, True]
    assert str(merged.graph.outputs[0].shape) == "[batch_size,1,50]"
    assert set(result.records[2].verdict.coverage) == {"decoder as prefill", "decoder as decode"}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("logits = Tanh(x)", "'logits' comes from an input, not from a product with a matrix"),
        ("t = Transpose <perm = [0, 2, 1]> (x) logits = MatMul(x, t)", "not from a product with a matrix"),
        ("m = MatMul(x, head) logits = Add(m, x)", "'logits' depends on 'x' after the projection"),
        ("m = MatMul(x, head) n = Neg(m) logits = Add(m, one)", "'m', on the way to 'logits', is used elsewhere too"),
        ("m = MatMul(x, head) logits = Add(m, rows)", "'rows', at node '', is not alike for all positions of 'logits'"),
        ("logits = MatMul(x, head) n = Neg(logits)", "'logits', on the way to 'logits', is used elsewhere too"),
        ("m = MatMul(x, head) logits = Softmax <axis = 1> (m)", r"comes from node '' \(Softmax\)"),
        (
            f"{ROWS.format(LEADING)} u = Cast <to = 1> (l) logits = Reshape(g, t)",
            r"comes from node '' \(Reshape\), not from a product",
        ),
        (f"{ROWS.format('Shape <end = -1> (z)')} logits = Reshape(g, t)", r"comes from node '' \(Reshape\)"),
        (f"{ROWS.format('Shape <start = 0, end = 2> (x)')} logits = Reshape(g, t)", r"comes from node '' \(Reshape\)"),
    ],
)
def test_logits_that_are_no_product_are_refused(text: str, said: str):
    model = parse(
        "g (float[b, s, 2] x, float[b, s, 2] z) => (float[b, s, 2] logits) "
        "<float[2, 2] head = {1, 2, 3, 4}, float[2] one = {1, 1}, float[2, 2] rows = {1, 2, 3, 4}, "
        f"int64[2] flat = {{-1, 2}}, int64[1] width = {{2}}> {{ {text} }}"
    )
    with pytest.raises(Refused, match=said):
        run_pass(LastLogits(), model)


@pytest.mark.parametrize(
    ("output", "said"),
    [
        ("float[b, 3] logits", "'model': 'logits' has 2 axes, not .batch, positions, vocabulary."),
        ("float[s, b, 2, 3] logits", "'model': 'logits' has 4 axes"),
    ],
)
def test_logits_without_an_axis_of_positions_are_refused(output: str, said: str):
    """The labels of a classifier are called logits too; its last axis but one is the batch."""
    inputs = output.replace("3] logits", "2] x")
    model = parse(f"g ({inputs}) => ({output}) <{HEAD}> {{ logits = MatMul(x, head) }}")
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


def test_generation_over_what_was_cut_is_followed_on():
    result = Pipeline([LastLogits(), MergeIf()]).run(decoder_pair())
    assert "greedy over decoder as greedy over prefill + decode" in result.records[2].verdict.coverage
