"""Element types by inference: those that onnx's own examples declare."""

from __future__ import annotations

import warnings

import onnx_ir as ir
import pytest
from onnx.backend.test.case.node import collect_testcases

from surgery.element_types import infer_types
from surgery.graphs import graphs_of
from surgery.text import parse

# Their definitions leave the type of an output open, or they are no operators of the standard.
OPEN = {"LinearAttention", "Adam", "Momentum", "Adagrad", "LabelEncoder", "Gradient"}


def forget(model: ir.Model) -> dict[ir.Value, ir.TypeProtocol]:
    """Take the types of all results out of a model, and return them."""
    known: dict[ir.Value, ir.TypeProtocol] = {}
    for graph in graphs_of(model.graph):
        for node in graph:
            for value in node.outputs:
                if value.type is not None and value.name:
                    known[value] = value.type
                value.type = None
    return known


def unknown_types(model: ir.Model) -> list[ir.Value]:
    """Return the values of which the type is not known after `infer_types`."""
    return [value for graph in graphs_of(model.graph) for node in graph for value in node.outputs if value.type is None]


def test_every_example_of_onnx_gets_the_types_that_it_declares():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        models = [ir.serde.deserialize_model(case.model) for case in collect_testcases(None) if case.model is not None]
    assert len(models) > 1500
    for model in models:
        known = forget(model)
        infer_types(model)
        for value, type_ in known.items():
            node = value.producer()
            assert node is not None
            if value.type is None:
                assert node.op_type in OPEN, node
            else:
                assert value.type == type_, node


@pytest.mark.parametrize(
    ("graph", "dtype"),
    [
        ("g (float16[n, 4] x, float16[4] w) => (z) { z, m, v = LayerNormalization(x, w) y = Neg(m) }", "FLOAT16"),
        ("g (float16[n, 4] x, float16[4] w) => (z) { z = com.microsoft.SkipLayerNormalization(x, x, w) }", "FLOAT16"),
        ("g (int64[n] x) => (z) { a = Cast <to = 10> (x) z = Sqrt(a) }", "FLOAT16"),
        (
            "g (float16 x, int64[1] s) => (z) { a = ConstantOfShape <value = bfloat16[1] {1}> (s) z = Neg(a) }",
            "BFLOAT16",
        ),
        ('<ir_version: 3, opset_import: ["" : 5]> g (int64[n] x) => (z) { z = Cast <to = "FLOAT"> (x) }', "FLOAT"),
    ],
)
def test_types_are_carried_on(graph: str, dtype: str):
    model = parse(graph)
    infer_types(model)
    assert model.graph.outputs[0].dtype == ir.DataType[dtype]
    assert unknown_types(model) == []


def test_states_of_loops_and_outputs_of_branches_get_types():
    model = parse(
        """
        g (int64 trips, bool c, float16[n] x) => (y, all, z) {
            y, all = Loop (trips, c, x) <body = body (i, go, s) => (on, t, u) {
                on = Identity(go)
                t = Add(s, s)
                u = Cast <to = 1> (t)
            }>
            z = If (c) <then_branch = a () => (p) { p = Neg(y) }, else_branch = b () => (q) { q = Identity(x) }>
        }
        """
    )
    infer_types(model)
    assert [value.dtype for value in model.graph.outputs] == [
        ir.DataType.FLOAT16,
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
    ]
    assert unknown_types(model) == []


MALFORMED = [
    "y = Loop (trips, c, x)",
    "y = Scan <num_scan_inputs = 1> (x)",
    "y = SequenceMap (x)",
    "y = Loop <body = 3> (trips, c, x)",
    "y = Loop (trips, c, x) <body = b (i, go, s) => (on) { on = Identity(go) }>",
    "y = Loop (trips, c, x) <body = b () => (on, t) { on = Identity(c) t = their.Magic(on) }>",
    "y = If (c)",
    "y = If (c) <then_branch = a () => () {}, else_branch = b () => () {}>",
    "y = Cast (x)",
    "y = Cast <to = 99> (x)",
    "y = Cast <to = [1]> (x)",
    'y = Cast <to = "HALF"> (x)',
    "y = Constant ()",
    "y = Constant <value = 3> ()",
    "y = SequenceEmpty <dtype = 99> ()",
    "y = EyeLike ()",
    "y = Sqrt ()",
]


@pytest.mark.parametrize("node", MALFORMED)
def test_what_a_malformed_node_gives_is_what_nobody_knows(node: str):
    model = parse(f"g (int64 trips, bool c, float[n] x) => (y, z) {{ {node} z = Neg(x) }}")
    infer_types(model)
    y, z = model.graph.outputs
    assert y.type is None
    assert z.dtype == ir.DataType.FLOAT


def test_outputs_that_are_too_many_for_branches_or_too_few_for_a_body():
    model = parse(
        """
        g (int64 trips, bool c, float[n] x) => (y, z, u) {
            y, z = If (c) <then_branch = a () => (p) { p = Neg(x) }, else_branch = b () => (q, r) { q, r = Split(x) }>
            u = Loop (trips, c, x) <body = b (i, go, s) => (on, t, all) { on = Identity(go) t = Neg(s) all = Neg(s) }>
        }
        """
    )
    infer_types(model)
    assert [value.dtype for value in model.graph.outputs] == [ir.DataType.FLOAT] * 3


def test_no_two_values_share_a_type():
    model = parse("g (float[n] x) => (y) { a = Neg(x)  b = Neg(a)  y = Neg(b) }")
    infer_types(model)
    a, b, y = (node.outputs[0] for node in model.graph)
    b.dtype = ir.DataType.FLOAT16
    assert [value.dtype for value in (model.graph.inputs[0], a, y)] == [ir.DataType.FLOAT] * 3


def test_types_that_are_written_down_are_believed():
    model = parse("g (float[n] x) => (y) { a = Neg(x)  y = Neg(a) }")
    model.graph[0].outputs[0].type = ir.TensorType(ir.DataType.DOUBLE)
    infer_types(model)
    assert model.graph.outputs[0].dtype == ir.DataType.DOUBLE


def test_an_operator_that_nobody_knows_gives_what_nobody_knows():
    model = parse("g (float[n] x) => (y) { y = their.Magic(x) }")
    infer_types(model)
    assert [value.name for value in unknown_types(model)] == ["y"]
