"""A model without weights for ONNX Runtime, and the weights to hand to the session beside it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain, count

import onnx
import onnx_ir as ir

from surgery.storage.hollow import Stub, Weight, hollow
from surgery.storage.naming import MIN_DATA_BYTES
from surgery.storage.protos import subgraphs_of
from surgery.storage.versions import lower

ELSEWHERE = "given-to-the-session"
"""The file that a skeleton says its weights are in: nobody reads it, ONNX Runtime only wants it to exist."""

MOST_INLINE_BYTES = 1 << 30


def skeleton(model: ir.Model, *, inline_below: int = MIN_DATA_BYTES) -> tuple[bytes, dict[str, ir.TensorProtocol]]:
    """Serialise a model for a session that is given its weights as values; the model stays as it is.

    The session takes values only for initializers of the main graph (ONNX Runtime 1.31), so the big initializers of
    subgraphs move there under fresh names, and the big `Constant` nodes of all graphs become such initializers. Weights
    inside functions stay inline, and quantized ones in subgraphs.

    Args:
        model: Any model.
        inline_below: Smaller weights stay inline, where the runtime's shape inference sees them.

    Returns:
        The serialised model, and each weight by the name of its initializer.
    """
    tensors: list[ir.TensorProtocol] = []

    def place(weight: Weight) -> Stub | None:
        if weight.is_in_function or weight.role == "attribute":
            return None
        tensors.append(weight.tensor)
        return Stub(ELSEWHERE, len(tensors) - 1, weight.tensor.nbytes)

    proto = hollow(model, place, min_bytes=inline_below)
    lower(proto)
    weights = _Gatherer(proto, tensors).gather()
    return proto.SerializeToString(), weights


class _Gatherer:
    """Moves every stub of a model into the main graph."""

    def __init__(self, proto: onnx.ModelProto, tensors: list[ir.TensorProtocol]) -> None:
        self.main = proto.graph
        self.tensors = tensors
        self.names = set(_names(proto.graph))
        self.weights: dict[str, ir.TensorProtocol] = {}
        self.inline_bytes = MOST_INLINE_BYTES

    def gather(self) -> dict[str, ir.TensorProtocol]:
        self.take_constants(self.main)
        for tensor in self.main.initializer:
            if _is_stub(tensor):
                self.weights[tensor.name] = self.tensors[_index(tensor)]
        for node in self.main.node:
            for graph in subgraphs_of(node):
                self.gather_from(graph)
        return self.weights

    def gather_from(self, graph: onnx.GraphProto) -> None:
        """Move the stubs of a subgraph and of those below it."""
        self.take_constants(graph)
        inputs = {info.name for info in graph.input}
        renamed: dict[str, str] = {}
        kept: list[onnx.TensorProto] = []
        for tensor in graph.initializer:
            if not _is_stub(tensor):
                kept.append(tensor)
            elif tensor.name in inputs or self.must_stay(tensor, graph):
                kept.append(self.filled(tensor))
            else:
                renamed[tensor.name] = self.move(tensor)
        if renamed:
            _replace_all(graph.initializer, kept)
            _replace_all(graph.value_info, [info for info in graph.value_info if info.name not in renamed])
            _rename_uses(graph, renamed)
            for info in graph.output:
                if info.name in renamed:
                    graph.node.add(op_type="Identity", input=[renamed[info.name]], output=[info.name])
        for node in graph.node:
            for subgraph in subgraphs_of(node):
                self.gather_from(subgraph)

    def must_stay(self, tensor: onnx.TensorProto, graph: onnx.GraphProto) -> bool:
        """Say whether a subgraph's weight is quantized: ONNX Runtime 1.31 loads no product with one from outside.

        Past `MOST_INLINE_BYTES` in all they are moved nevertheless, which sessions without optimizations take.
        """
        size = self.tensors[_index(tensor)].nbytes
        readers = (node for node in graph.node if tensor.name in node.input)
        if size > self.inline_bytes or not any(node.op_type == "DequantizeLinear" for node in readers):
            return False
        self.inline_bytes -= size
        return True

    def take_constants(self, graph: onnx.GraphProto) -> None:
        """Make initializers of the `Constant` nodes that are stubs."""
        kept: list[onnx.NodeProto] = []
        for node in graph.node:
            tensor = _constant_stub(node)
            if tensor is None:
                kept.append(node)
                continue
            graph.initializer.add().CopyFrom(tensor)
            graph.initializer[-1].name = node.output[0]
        if len(kept) < len(graph.node):
            _replace_all(graph.node, kept)

    def move(self, tensor: onnx.TensorProto) -> str:
        """Put a subgraph's stub into the main graph and return its name there."""
        name = next(name for name in (f"{tensor.name}__of_body_{i}" for i in count()) if name not in self.names)
        self.names.add(name)
        self.main.initializer.add().CopyFrom(tensor)
        self.main.initializer[-1].name = name
        self.weights[name] = self.tensors[_index(tensor)]
        return name

    def filled(self, tensor: onnx.TensorProto) -> onnx.TensorProto:
        tensor.raw_data = self.tensors[_index(tensor)].tobytes()
        tensor.ClearField("external_data")
        tensor.ClearField("data_location")
        return tensor


def _rename_uses(graph: onnx.GraphProto, renamed: Mapping[str, str]) -> None:
    """Rename the values that nodes of a graph read, in its subgraphs too where nothing hides them."""
    for node in graph.node:
        for index, name in enumerate(node.input):
            if name in renamed:
                node.input[index] = renamed[name]
        for subgraph in subgraphs_of(node):
            own = set(_defined(subgraph))
            _rename_uses(subgraph, {old: new for old, new in renamed.items() if old not in own})


def _defined(graph: onnx.GraphProto) -> Iterator[str]:
    yield from (info.name for info in graph.input)
    yield from (tensor.name for tensor in graph.initializer)
    yield from chain.from_iterable(node.output for node in graph.node)


def _names(graph: onnx.GraphProto) -> Iterator[str]:
    yield from _defined(graph)
    for node in graph.node:
        for subgraph in subgraphs_of(node):
            yield from _names(subgraph)


def _constant_stub(node: onnx.NodeProto) -> onnx.TensorProto | None:
    if node.op_type != "Constant" or node.domain not in ("", "ai.onnx"):
        return None
    tensors = [attribute.t for attribute in node.attribute if attribute.name == "value" and _is_stub(attribute.t)]
    return tensors[0] if tensors else None


def _is_stub(tensor: onnx.TensorProto) -> bool:
    return bool(tensor.data_location == onnx.TensorProto.EXTERNAL)


def _index(tensor: onnx.TensorProto) -> int:
    return next(int(entry.value) for entry in tensor.external_data if entry.key == "offset")


def _replace_all(
    field: object, kept: list[onnx.NodeProto] | list[onnx.TensorProto] | list[onnx.ValueInfoProto]
) -> None:
    """Keep only these messages of a repeated field."""
    copies = []
    for message in kept:
        copy = type(message)()
        copy.CopyFrom(message)
        copies.append(copy)
    del field[:]  # type: ignore[attr-defined]
    field.extend(copies)  # type: ignore[attr-defined]
