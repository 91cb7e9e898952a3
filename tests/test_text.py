"""ONNX text: what is read, what is written, and what two equal graphs may differ in."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from surgery.text import parse, pictures_of, to_text

EVERYTHING = """
    g (bool c, float[N, 2] x, float[2] b) => (float[N, 2] y, int64 n)
    <float[2] b = {1.0000001, -0.0}, float16[2] "half/1" = {15360, 1}, string[2] s = {"a", "{"}, bool t = {1}> {
        h = Cast <to = 1> ("half/1")
        v = Loop (n, t, x) <body = l (int64 i, bool go, float[2] u) => (bool on, float[2] w) <float[2] k = {1, 2}> {
            on = Identity(go)
            w = com.example.Mystery <beta = [1.5, 2.0], alpha = "text"> (u, k)
        }>
        n = Constant <value = int64 {3}> ()
        y = If (c) <
            then_branch = t () => (float[N, 2] p) { p = local.f <alpha = 0.5> (v) },
            else_branch = e () => (float[N, 2] q) { k = Constant <value_floats = [1.0, 2.0]> () q = Add(v, k) }
        >
    }
    <domain: "local", opset_import: ["" : 21]>
    f <alpha> (a) => (z) {
        r = Elu <alpha: float = @alpha> (a)
        z = Add(r, r)
    }
    """


def test_what_is_written_reads_back_the_same():
    text = to_text(parse(EVERYTHING))
    assert to_text(parse(text)) == text
    for part in ('"half/1"', "1.0000001", "-0", "com.example.Mystery", "local.f", "body", "f <alpha>"):
        assert part in text


def test_a_bare_graph_gets_a_header_and_a_whole_model_keeps_its_own():
    bare, whole = parse(EVERYTHING), parse('<ir_version: 8, opset_import: ["" : 17]> g (float[2] x) => (float[2] x) {}')
    assert (bare.ir_version, bare.opset_imports) == (10, {"": 21, "com.example": 1, "local": 1})
    assert (whole.ir_version, whole.opset_imports) == (8, {"": 17})


def test_a_mistake_is_told_with_its_line():
    with pytest.raises(onnx.parser.ParseError, match="line: 2"):
        parse("g (float[2] x) => (float[2] y) {\n  y = = Neg(x)\n}")


def test_what_does_not_compute_is_not_written():
    model = parse(
        """
        <ir_version: 8, opset_import: ["" : 17], producer_name: "me", doc_string: "about">
        g (float[2] x) => (float[2] y) <float[2] b = {1, 2}, float[2] a = {1, 2}, float[2] inner> {
            [named] inner = Add(x, b)
            y = Add(inner, a)
        }
        """
    )
    model.graph.doc_string = model.graph[0].doc_string = model.graph.inputs[0].doc_string = "about"
    for holder in (model, model.graph, model.graph[0], model.graph.inputs[0], model.graph.initializers["a"]):
        holder.metadata_props["note"] = "about"
    plain = """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            inner = Add(x, b)
            y = Add(inner, a)
        }
        """
    assert to_text(model) == to_text(parse(plain))


def test_where_a_weight_is_stored_does_not_matter():
    graph = "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> { y = Add(x, a) }"
    typed, raw = parse(graph), parse(graph)
    raw.graph.initializers["a"].const_value = ir.tensor(np.array([1, 2], np.float32))
    assert to_text(typed) == to_text(raw)


def with_weight(array: np.ndarray) -> str:
    """Return the text of a graph with this weight."""
    model = parse("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    model.graph.register_initializer(ir.Value(name="a", const_value=ir.tensor(array)))
    return to_text(model)


def nan(bits: int) -> np.ndarray:
    return np.array([bits], np.uint32).view(np.float32)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (np.zeros(1, np.float32), -np.zeros(1, np.float32)),
        (np.array([1], np.float32), np.array([1], np.float64)),
        (np.array([1], np.float32), np.nextafter(np.array([1], np.float32), 2)),
        (np.array([1], np.float64), np.nextafter(np.array([1], np.float64), 2)),
        (nan(0x7FC00000), nan(0x7FC00001)),
        (np.array([1, 2], ml_dtypes.int4), np.array([1, 3], ml_dtypes.int4)),
        (np.array([1 + 2j], np.complex64), np.array([1 + 3j], np.complex64)),
        (np.arange(1000, dtype=np.float32), np.arange(1, 1001, dtype=np.float32)),
        (np.zeros((2, 500), np.float32), np.zeros((500, 2), np.float32)),
    ],
)
def test_weights_that_differ_in_a_bit_differ_in_text(one: np.ndarray, other: np.ndarray):
    assert with_weight(one) != with_weight(other)
    assert with_weight(one) == with_weight(one.copy())


def test_a_long_weight_is_a_short_text_that_reads_back():
    text = with_weight(np.arange(100_000, dtype=np.float32))
    assert len(text) < 300
    assert to_text(parse(text)) == text


def test_pictures_are_the_indented_blocks_below_their_headings():
    docstring = """Do something.

    Before::

        g (float[2] x) => (float[2] y) {
            y = Neg(x)

        }

    After::

        g (float[2] x) => (float[2] y) {
        }
    Keeps: nothing.
    """
    assert pictures_of(docstring) == (
        "g (float[2] x) => (float[2] y) {\n    y = Neg(x)\n\n}",
        "g (float[2] x) => (float[2] y) {\n}",
    )


def test_a_docstring_without_both_pictures_has_none():
    assert pictures_of("Do something.\n\n    Before::\n\n        g () => () {}\n") is None
    assert pictures_of("") is None
