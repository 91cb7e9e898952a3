"""Imports a model into onnx_graphsurgeon without its weights, which are loaded when the function asks for them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.logger import G_LOGGER

from surgery.errors import Refused
from surgery.graphsurgeon.origins import Body, initializers_of, values_of
from surgery.storage.hollow import Stub, hollow

TELLABLE = {
    onnx.AttributeProto.FLOAT,
    onnx.AttributeProto.INT,
    onnx.AttributeProto.STRING,
    onnx.AttributeProto.TENSOR,
    onnx.AttributeProto.GRAPH,
    onnx.AttributeProto.FLOATS,
    onnx.AttributeProto.INTS,
    onnx.AttributeProto.STRINGS,
}
"""The types of attributes that graphsurgeon can represent."""


def import_graph(model: ir.Model) -> gs.Graph:
    bodies: tuple[Body, ...] = (model.graph, *model.functions.values())
    for body in bodies:
        _refuse_hidden_names(body, frozenset())
    proto = hollow(model, lambda weight: Stub("held by surgery"), min_bytes=1)
    _strip_nodes(proto.graph.node)
    for function in proto.functions:
        _strip(function.attribute_proto)
        _strip_nodes(function.node)
    # Its warnings say what it cannot represent, all of which is restored.
    with G_LOGGER.suppress(G_LOGGER.CRITICAL):
        graph = gs.import_onnx(proto)
    for one in (graph, *graph.functions):
        _narrow_floats(one)
    return graph


def _narrow_floats(graph: gs.Graph) -> None:
    """Keep the floats of `Constant` nodes in single precision: fold_constants (0.6.1) makes double weights of them."""
    for body in (graph, *graph.subgraphs(recursive=True)):
        for node in body.nodes:
            for name in {"value_float", "value_floats"}.intersection(node.attrs):
                value = node.attrs[name]
                if isinstance(value, float):
                    node.attrs[name] = np.float32(value)
                elif isinstance(value, list):
                    node.attrs[name] = [np.float32(one) for one in value]


def _refuse_hidden_names(body: Body, visible: frozenset[str]) -> None:
    """Refuse an initializer that bears the name of an outer value: graphsurgeon would take the outer one for it."""
    for name in initializers_of(body):
        if name in visible:
            raise Refused(
                f"initializer {name!r} of {body.name!r} hides another value of that name outside it, and graphsurgeon "
                "would mix them up",
                hint="pass: onnx_ir.passes.common:NameFixPass before this step",
            )
    known = visible.union(values_of(body))
    for node in body:
        for attribute in node.attributes.values():
            if attribute.type == ir.AttributeType.GRAPH and not attribute.is_ref():
                _refuse_hidden_names(attribute.as_graph(), known)


def _strip_nodes(nodes: Sequence[onnx.NodeProto]) -> None:
    for node in nodes:
        _strip(node.attribute)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _strip_nodes(attribute.g.node)


def _strip(attributes: Any) -> None:
    """Drop what graphsurgeon warns about and skips, or fails to decode; it is restored from the model."""
    for index in reversed(range(len(attributes))):
        if not _is_tellable(attributes[index]):
            del attributes[index]


def _is_tellable(attribute: onnx.AttributeProto) -> bool:
    try:
        attribute.s.decode()
    except UnicodeDecodeError:
        return False
    return attribute.type in TELLABLE
