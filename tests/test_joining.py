"""Exports of one network are joined by the bytes of their weights, never by names."""

from __future__ import annotations

import onnx_ir as ir
from models import decoder_pair

from surgery.graphs import graphs_of
from surgery.joining import join_nodes
from surgery.text import parse

WEIGHTS = ", ".join(str(number / 7) for number in range(16))
OTHER_WEIGHTS = ", ".join(str(number / 3) for number in range(16))


def names(model: ir.Model, other: ir.Model) -> dict[str, str]:
    """Return the joined nodes by what they give."""
    return {str(one.outputs[0].name): str(like.outputs[0].name) for one, like in join_nodes(model, other).items()}


def layered(**weights: str) -> ir.Model:
    """Return a model of two layers with a norm's square between them."""
    numbers = {"a": WEIGHTS, "b": OTHER_WEIGHTS} | weights
    return parse(
        f"""
        g (float[n, 4] x) => (float[n, 4] y)
        <float[4, 4] a = {{{numbers["a"]}}}, float[4, 4] b = {{{numbers["b"]}}}> {{
            first = MatMul(x, a)
            square = Mul(first, first)
            second = MatMul(square, b)
            y = Tanh(second)
        }}
        """
    )


def test_nodes_are_joined_whatever_they_are_called():
    renamed = layered()
    for graph in graphs_of(renamed.graph):
        for node in graph:
            node.outputs[0].name = f"other_{node.outputs[0].name}"
    assert names(layered(), renamed) == {name: f"other_{name}" for name in ("first", "square", "second", "y")}


def test_a_name_is_no_evidence():
    """The same names, but the weights of both layers have changed places."""
    swapped = layered(a=OTHER_WEIGHTS, b=WEIGHTS)
    joined = names(layered(), swapped)
    assert joined == {"first": "second", "second": "first"}


def test_models_of_other_weights_are_not_joined():
    half = ", ".join(["0.5"] * 16)
    third = ", ".join(["0.3"] * 16)
    assert names(layered(), layered(a=half, b=third)) == {}


def test_a_weight_that_is_used_twice_alike_is_no_anchor():
    twice = f"""
    g (float[n, 4] x) => (float[n, 4] y) <float[4, 4] a = {{{WEIGHTS}}}, float[4, 4] b = {{{OTHER_WEIGHTS}}}> {{
        first = MatMul(x, a)
        again = MatMul(first, a)
        root = Sqrt(x)
        y = Gemm(again, b)
    }}
    """
    joined = names(parse(twice), parse(twice))
    assert joined == {"y": "y", "again": "again", "first": "first"}  # from the one anchor upwards


def test_prefill_and_decode_are_joined_but_for_the_cache():
    bundle = decoder_pair()
    prefill, decode = bundle["prefill"], bundle["decode"]
    joined = join_nodes(prefill, decode)
    assert {one.op_type for one in joined} >= {"Gather", "LayerNormalization", "MatMul", "Split", "Softmax"}
    assert all(one.op_type == like.op_type for one, like in joined.items())
    assert not any(like.op_type == "Concat" and one.op_type != "Concat" for one, like in joined.items())
    appended = [node for node in decode.graph if str(node.outputs[0].name).startswith("present")]
    assert appended
    assert not set(appended) & set(joined.values())
