"""Element types that a file leaves out, inferred by onnx."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from surgery.errors import ModelFileError
from surgery.storage.hollow import Stub, hollow

_NOWHERE = Stub("nowhere")


def fill_in_types(model: ir.Model) -> None:
    """Give each value of the main graph and of those inside it the element type that onnx infers, where it has none.

    No weight is read. What cannot be inferred stays unknown, and so do values of local functions.
    """
    try:
        proto = hollow(model, lambda _: _NOWHERE, min_bytes=1024)
        inferred = onnx.shape_inference.infer_shapes(proto)
    except (ModelFileError, onnx.shape_inference.InferenceError, ValueError):
        return
    _fill_in(model.graph, inferred.graph)


def _fill_in(graph: ir.Graph, proto: onnx.GraphProto) -> None:
    known = {info.name: info.type.tensor_type.elem_type for info in (*proto.value_info, *proto.output)}
    for node, node_proto in zip(graph, proto.node, strict=True):
        for value in node.outputs:
            if value.dtype is None and known.get(value.name or ""):
                value.dtype = ir.DataType(known[value.name or ""])
        graphs = {attribute.name: attribute for attribute in node_proto.attribute}
        for name, attribute in node.attributes.items():
            if attribute.is_ref():
                continue
            if attribute.type == ir.AttributeType.GRAPH:
                _fill_in(attribute.as_graph(), graphs[name].g)
            elif attribute.type == ir.AttributeType.GRAPHS:
                for inner, inner_proto in zip(attribute.as_graphs(), graphs[name].graphs, strict=True):
                    _fill_in(inner, inner_proto)
