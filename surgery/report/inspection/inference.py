"""Element types that a file leaves out, inferred."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from surgery.element_types import infer_types
from surgery.errors import ModelFileError
from surgery.graphs import bodies_of, graphs_of
from surgery.storage.hollow import Stub, hollow
from surgery.storage.protos import subgraphs_of

_NOWHERE = Stub("nowhere")


def fill_in_types(model: ir.Model) -> None:
    """Give each value of the main graph and of those inside it its element type, where the file does not say it.

    No weight is read. What cannot be inferred stays unknown, and so do values of local functions. `infer_types` says
    nothing of what calls of these give, and of a few operators; there onnx is asked, which looks into functions.
    """
    infer_types(model)
    if all(value.type is not None for graph in graphs_of(model.graph) for node in graph for value in node.outputs):
        return
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
        for body, body_proto in zip(bodies_of(node), subgraphs_of(node_proto), strict=True):
            _fill_in(body, body_proto)
