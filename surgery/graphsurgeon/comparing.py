"""Tells whether two models say the same, in whatever order."""

from __future__ import annotations

from typing import Any

import onnx
import onnx_ir as ir

from surgery.storage.hollow import Stub, hollow


def said(model: ir.Model) -> bytes:
    """Return all that a model says, whatever the order of its nodes: a mere toposort() changes nothing.

    Tensors count as the objects that they are, so it compares two models of one moment only.
    """
    proto = hollow(model, lambda weight: Stub(str(id(weight.tensor))), min_bytes=1)
    _sort(proto.graph)
    for function in proto.functions:
        _sort_nodes(function.node)
        _sort_messages(function.value_info)
    _sort_messages(proto.functions)
    return bytes(proto.SerializeToString(deterministic=True))


def _sort(graph: onnx.GraphProto) -> None:
    _sort_nodes(graph.node)
    _sort_messages(graph.value_info)
    _sort_messages(graph.quantization_annotation)


def _sort_nodes(nodes: Any) -> None:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                _sort(attribute.g)
    _sort_messages(nodes)


def _sort_messages(messages: Any) -> None:
    messages.sort(key=lambda message: message.SerializeToString(deterministic=True))
