"""Serialising a model without its weights, and without touching it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import onnx
import onnx_ir as ir

from surgery.errors import ModelFileError, SurgeryError

Role = Literal["initializer", "constant", "attribute"]
"""An initializer, the value of a `Constant` node, or an attribute of another node."""


@dataclass(frozen=True, slots=True)
class Weight:
    """A tensor of a model, and where in the model it is."""

    tensor: ir.TensorProtocol
    name: str
    role: Role
    is_in_function: bool


@dataclass(frozen=True, slots=True)
class Stub:
    """What a serialised tensor says instead of its bytes: an external reference."""

    location: str
    offset: int = 0
    length: int = 0


def hollow(model: ir.Model, place: Callable[[Weight], Stub | None], *, min_bytes: int) -> onnx.ModelProto:
    """Serialise a model with stubs for its weights.

    onnx_ir's serialiser is given stand-ins for the parts that hold weights, so the model itself stays as it is: the
    serialiser would otherwise rename a tensor after each of the values that share it.

    Args:
        model: Any model.
        place: Called for each tensor of `min_bytes` or more, strings excepted; `None` keeps its bytes inline.
        min_bytes: What is smaller is always inline.

    Raises:
        ModelFileError: If an initializer has no value, or something in the model cannot be written down.
    """
    stand_in = _Hollower(place, min_bytes).model(model)
    try:
        return ir.serde.serialize_model(stand_in)
    except ir.serde.SerdeError as error:
        cause = root_cause(error)
        if isinstance(cause, SurgeryError):
            raise cause from error
        raise ModelFileError(f"the model cannot be serialised: {cause}") from error


def root_cause(error: BaseException) -> BaseException:
    """Return what went wrong in the first place: onnx_ir wraps an error once for every level of nesting."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


class _StandIn:
    """Answers as the original does, but for what was replaced."""

    def __init__(self, original: Any, **replaced: Any) -> None:
        self.__dict__.update(replaced, _original=original)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._original, name)


class _GraphStandIn(_StandIn):
    nodes: list[Any]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.nodes)

    def __len__(self) -> int:
        return len(self.nodes)


class _Hollower:
    def __init__(self, place: Callable[[Weight], Stub | None], min_bytes: int) -> None:
        self.place = place
        self.min_bytes = max(min_bytes, 1)
        self.is_in_function = False

    def model(self, model: ir.Model) -> Any:
        graph = self.graph(model.graph)
        self.is_in_function = True
        functions = {name: self.body(function) for name, function in model.functions.items()}
        return _StandIn(model, graph=graph, functions=functions)

    def graph(self, graph: ir.Graph) -> Any:
        initializers = {name: self.initializer(value) for name, value in graph.initializers.items()}
        return self.body(graph, initializers=initializers)

    def body(self, body: ir.Graph | ir.Function, **replaced: Any) -> Any:
        return _GraphStandIn(body, nodes=[self.node(node) for node in body], **replaced)

    def initializer(self, value: ir.Value) -> Any:
        tensor = value.const_value
        if tensor is None:
            raise ModelFileError(f"initializer {value.name!r} has no value")
        assert value.name is not None
        return _StandIn(value, const_value=self.tensor(tensor, value.name, "initializer"))

    def node(self, node: ir.Node) -> Any:
        if not any(_may_hold_weights(attribute) for attribute in node.attributes.values()):
            return node
        return _StandIn(node, attributes={name: self.attribute(one, node) for name, one in node.attributes.items()})

    def attribute(self, attribute: ir.Attr, node: ir.Node) -> Any:
        if not _may_hold_weights(attribute):
            return attribute
        value = attribute.value
        if attribute.type == ir.AttributeType.GRAPH:
            return _StandIn(attribute, value=self.graph(value))
        if attribute.type == ir.AttributeType.GRAPHS:
            return _StandIn(attribute, value=[self.graph(graph) for graph in value])
        tensors = [value] if attribute.type == ir.AttributeType.TENSOR else value
        role: Role = "constant" if node.op_type == "Constant" and node.domain == "" else "attribute"
        stand_ins = [self.tensor(tensor, tensor.name or "", role) for tensor in tensors]
        return _StandIn(attribute, value=stand_ins[0] if attribute.type == ir.AttributeType.TENSOR else stand_ins)

    def tensor(self, tensor: ir.TensorProtocol, name: str, role: Role) -> Any:
        if tensor.dtype == ir.DataType.STRING:
            return _renamed_strings(tensor, name)
        stub = None
        if tensor.nbytes >= self.min_bytes:
            stub = self.place(Weight(tensor, name, role, self.is_in_function))
        if stub is not None:
            return _stub_tensor(tensor, name, stub)
        # A tensor parsed from a proto would be copied with its own name, and its metadata twice (onnx_ir 1.1).
        if tensor.name == name and not tensor.metadata_props and not isinstance(tensor, ir.ExternalTensor):
            return tensor
        return _StandIn(tensor, name=name)


def _may_hold_weights(attribute: ir.Attr) -> bool:
    return not attribute.is_ref() and attribute.type in (
        ir.AttributeType.TENSOR,
        ir.AttributeType.TENSORS,
        ir.AttributeType.GRAPH,
        ir.AttributeType.GRAPHS,
    )


def _renamed_strings(tensor: ir.TensorProtocol, name: str) -> ir.TensorProtocol:
    if tensor.name == name:
        return tensor
    assert isinstance(tensor, ir.StringTensor)
    shape = ir.Shape(tensor.shape.numpy())
    return ir.StringTensor(
        tensor.string_data(),
        shape=shape,
        name=name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )


def _stub_tensor(tensor: ir.TensorProtocol, name: str, stub: Stub) -> ir.ExternalTensor:
    return ir.ExternalTensor(
        stub.location,
        stub.offset,
        stub.length,
        tensor.dtype,
        shape=ir.Shape(tensor.shape.numpy()),
        name=name,
        doc_string=tensor.doc_string,
        metadata_props=dict(tensor.metadata_props),
    )
