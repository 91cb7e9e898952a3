"""The lowest operator sets and IR version that say the same."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnx.defs import get_schema
from onnx.reference import ReferenceEvaluator
from small_models import chain, everywhere, floats, matrix

from surgery.storage import lower


def model(*nodes: onnx.NodeProto, opset: int, ir_version: int = 10, **options) -> onnx.ModelProto:
    graph = helper.make_graph(nodes, "g", [floats("x", [2, 4])], [floats("y", None)], **options)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


def versions(proto: onnx.ModelProto) -> tuple[int, int]:
    lower(proto)
    return proto.opset_import[0].version, proto.ir_version


def test_the_newest_definition_that_is_used_decides():
    assert versions(model(helper.make_node("Gelu", ["x"], ["y"]), opset=28, ir_version=14)) == (20, 9)
    assert versions(model(helper.make_node("LayerNormalization", ["x", "x"], ["y"]), opset=28)) == (17, 8)


def test_lowering_never_reaches_another_definition():
    for op_type in ("Relu", "Softmax", "Squeeze", "Reshape", "Cast", "Pad", "Split", "TopK", "ReduceSum"):
        for opset in (11, 13, 18, 21, 26):
            proto = model(helper.make_node(op_type, ["x"], ["y"]), opset=opset)
            lower(proto)
            lowered = get_schema(op_type, proto.opset_import[0].version, "")
            assert lowered.since_version == get_schema(op_type, opset, "").since_version


def test_a_model_never_goes_below_what_onnx_runtime_guarantees():
    assert versions(model(helper.make_node("Relu", ["x"], ["y"]), opset=12))[0] == 7


@pytest.mark.parametrize(
    ("in_body", "in_function", "expected"), [("Relu", "Relu", 21), ("Mish", "Relu", 22), ("Relu", "Mish", 22)]
)
def test_operators_in_bodies_and_functions_count(in_body, in_function, expected):
    proto = onnx.parser.parse_model(
        f"""
        <ir_version: 10, opset_import: ["" : 22, "local" : 1]>
        g (float[2] x, bool c) => (float[2] y) {{
            y = If (c) <
                then_branch = t () => (float[2] a) {{ a = {in_body} (x) }},
                else_branch = e () => (float[2] b) {{ b = local.F (x) }}
            >
        }}
        <domain: "local", opset_import: ["" : 22]>
        F (p) => (q) {{ q = {in_function} (p) }}
        """
    )
    lower(proto)
    assert proto.opset_import[0].version == proto.functions[0].opset_import[0].version == expected


def test_functions_of_another_version_keep_everything_as_it_is():
    proto = everywhere().proto
    proto.functions[0].opset_import[0].version = 15
    lower(proto)
    assert (proto.opset_import[0].version, proto.functions[0].opset_import[0].version) == (17, 15)


def test_an_unknown_operator_keeps_its_domain_as_it_is():
    assert versions(model(helper.make_node("SimplifiedLayerNormalization", ["x"], ["y"]), opset=20))[0] == 20


def test_custom_domains_stay_and_do_not_hold_the_others_back():
    proto = model(helper.make_node("Gelu", ["x"], ["y"], domain="com.microsoft"), opset=21)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    lower(proto)
    assert [(entry.domain, entry.version) for entry in proto.opset_import] == [("", 7), ("com.microsoft", 1)]


def test_a_deprecated_operator_keeps_everything_as_it_is():
    assert versions(model(helper.make_node("Upsample", ["x", "x"], ["y"]), opset=11))[0] == 11


def test_the_ir_version_is_never_raised_without_need():
    assert versions(model(helper.make_node("LayerNormalization", ["x", "x"], ["y"]), opset=17, ir_version=7)) == (17, 7)
    assert versions(model(helper.make_node("Relu", ["x"], ["y"]), opset=17, ir_version=0))[1] == 7


def tensor_model(tensor: onnx.TensorProto) -> onnx.ModelProto:
    return model(helper.make_node("Relu", ["x"], ["y"]), opset=14, ir_version=3, initializer=[tensor])


@pytest.mark.parametrize(
    ("dtype", "expected"),
    [
        (TensorProto.FLOAT, 4),
        (TensorProto.FLOAT8E4M3FN, 9),
        (TensorProto.INT4, 10),
        (TensorProto.FLOAT4E2M1, 11),
        (TensorProto.FLOAT8E8M0, 12),
        (TensorProto.INT2, 13),
    ],
)
def test_types_and_free_initializers_raise_a_version_that_is_too_low(dtype, expected):
    assert versions(tensor_model(TensorProto(name="w", data_type=dtype, dims=[0])))[1] == expected


def test_metadata_functions_and_values_of_other_kinds_raise_a_version_that_is_too_low():
    proto = model(helper.make_node("Relu", ["x"], ["y"]), opset=14, ir_version=7)
    helper.set_metadata_props(proto.graph.node[0], {"a": "b"})
    assert versions(proto)[1] == 10
    assert [(p.key, p.value) for p in proto.graph.node[0].metadata_props] == [("a", "b")]
    proto = everywhere().proto
    proto.ir_version = 3
    assert versions(proto)[1] == 10
    proto = model(helper.make_node("Relu", ["x"], ["y"]), opset=14, ir_version=7)
    proto.graph.value_info.add(name="o").type.optional_type.elem_type.tensor_type.elem_type = 1
    assert versions(proto)[1] == 8


def test_a_lowered_model_is_valid_and_computes_the_same():
    proto = chain(matrix(0), matrix(1))
    proto.opset_import[0].version, proto.ir_version = 26, 13
    before = ReferenceEvaluator(proto).run(None, {"x0": matrix(2)})[0]
    assert versions(proto) == (13, 7)
    onnx.checker.check_model(proto, full_check=True)
    assert np.array_equal(ReferenceEvaluator(proto).run(None, {"x0": matrix(2)})[0], before)


def test_the_ml_domain_is_lowered_too():
    node = helper.make_node("Scaler", ["x"], ["y"], domain="ai.onnx.ml", offset=[0.0], scale=[2.0])
    proto = model(node, opset=17)
    proto.opset_import.append(helper.make_opsetid("ai.onnx.ml", 5))
    proto.graph.initializer.append(numpy_helper.from_array(matrix(0), "w"))
    lower(proto)
    assert proto.opset_import[1].version == 1
