"""Which part of the model each object of a graphsurgeon graph stands for."""

from __future__ import annotations

from collections import ChainMap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir

from surgery.graphsurgeon.weights import Weight

Part = TypeVar("Part")
Body = ir.Graph | ir.Function
Scopes = ChainMap[str, ir.Value]


@dataclass(frozen=True)
class GraphSaid:
    """What a graphsurgeon graph says besides its nodes."""

    name: str
    doc_string: str
    opset: int
    imports: Mapping[str, int]
    ir_version: int | None
    producer: tuple[str, str]

    @classmethod
    def of(cls, graph: gs.Graph) -> GraphSaid:
        imports = {"": graph.opset}
        if graph.import_domains is not None:
            imports = {"" if one.domain == "ai.onnx" else one.domain: one.version for one in graph.import_domains}
        producer = ("", "") if isinstance(graph, gs.Function) else (graph.producer_name, graph.producer_version)
        return cls(graph.name, graph.doc_string, graph.opset, imports, graph.ir_version, producer)


class Origins:
    """Which part of the model each object of a graphsurgeon graph stands for, and what was told about it."""

    def __init__(self, model: ir.Model) -> None:
        self.model = model
        # The objects are held along with their parts, so that no id is given again.
        self._parts: dict[int, tuple[Any, Any]] = {}
        self._told: dict[int, Any] = {}

    def part(self, thing: Any, kind: type[Part]) -> Part | None:
        """Return the part that an object stands for, None for a new one."""
        _, part = self._parts.get(id(thing), (None, None))
        return part if isinstance(part, kind) else None

    def body(self, graph: gs.Graph) -> Body | None:
        """Return the graph or function that a graphsurgeon graph stands for."""
        # A graph without nodes is false.
        function = self.part(graph, ir.Function)
        return function if function is not None else self.part(graph, ir.Graph)

    def told(self, part: Any) -> Any:
        """Return what graphsurgeon was told about a part, before the function ran."""
        return self._told.get(id(part))

    def tensor(self, constant: gs.Constant) -> ir.TensorProtocol | None:
        """Return the tensor that a constant was."""
        _, part = self._parts.get(id(constant), (None, None))
        return part.const_value if isinstance(part, ir.Value) else part

    def hand_out_weights(self) -> None:
        """Give every constant its weight, in place of the placeholder that was imported."""
        for thing, _ in self._parts.values():
            if isinstance(thing, gs.Constant):
                original = self.tensor(thing)
                assert original is not None
                # Its getter would load the placeholder.
                thing.values = Weight(original, thing._values)
                thing.data_location = None

    def link_model(self, graph: gs.Graph) -> None:
        """Link a graph to the model by names, which are unique within a scope: as imported, or a copy of that."""
        self.link_graph(graph, self.model.graph, ChainMap())
        # Overloads share a name, and graphsurgeon does not know them: they are told apart by order.
        left = list(self.model.functions.values())
        for function in graph.functions:
            part = next((one for one in left if (one.domain, one.name) == function.unique_id), None)
            if part is not None:
                left.remove(part)
                self.link_graph(function, part, ChainMap())

    def link_graph(self, graph: gs.Graph, part: Body, outer: Scopes) -> None:
        self._link(graph, part, GraphSaid.of(graph))
        if isinstance(part, ir.Function):
            self._told.setdefault(id(part.attributes), _snapshot(graph.attrs))
            self.link_attributes(graph.attrs, part.attributes, ChainMap())
        visible = outer.new_child(values_of(part))
        self.link_tensors((*graph.inputs, *graph.outputs), visible)
        nodes = {node_key(node.domain, node.op_type, node.outputs): node for node in part}
        for node in graph.nodes:
            self.link_tensors((*node.inputs, *node.outputs), visible)
            origin = nodes.get(node_key(node.domain, node.op, node.outputs))
            if origin is not None:
                self._link(node, origin, None)
                self._told.setdefault(id(origin.attributes), _snapshot(node.attrs))
                self.link_attributes(node.attrs, origin.attributes, visible)

    def link_tensors(self, tensors: Sequence[gs.Tensor], visible: Scopes) -> None:
        for tensor in tensors:
            if tensor.name in visible:
                self._link(tensor, visible[tensor.name], description(tensor))

    def link_attributes(self, values: Mapping[str, Any], parts: Mapping[str, ir.Attr], visible: Scopes) -> None:
        for name, value in values.items():
            if isinstance(value, gs.Graph) and name in parts:
                self.link_graph(value, parts[name].as_graph(), visible)
            elif isinstance(value, gs.Constant) and name in parts:
                self._link(value, parts[name].as_tensor(), None)

    def _link(self, thing: Any, part: Any, said: Any) -> None:
        """Link once: what the function was given keeps its origin, whatever it is called now."""
        self._parts.setdefault(id(thing), (thing, part))
        self._told.setdefault(id(part), said)


def values_of(body: Body) -> dict[str, ir.Value]:
    """Return the values of a graph, without those around it or in its subgraphs, by name."""
    given = (*body.inputs, *(value for node in body for value in node.outputs), *body.outputs)
    return {**{value.name: value for value in given if value.name}, **initializers_of(body)}


def initializers_of(body: Body | None) -> Mapping[str, ir.Value]:
    return body.initializers if isinstance(body, ir.Graph) else {}


def node_key(domain: str | None, op_type: str, outputs: Sequence[Any]) -> tuple[str, ...]:
    names = [output.name or "" for output in outputs]
    while names and not names[-1]:
        names.pop()
    return ("" if domain in (None, "ai.onnx") else str(domain), op_type, *names)


def _snapshot(attributes: Mapping[str, Any]) -> dict[str, Any]:
    return {name: list(value) if isinstance(value, list) else value for name, value in attributes.items()}


def description(tensor: gs.Tensor) -> tuple[ir.DataType | None, list[Any] | None] | None:
    """Return the type and shape of a variable, in a form that does not change with it; nothing of a constant."""
    if isinstance(tensor, gs.Constant):
        return None
    return data_type(tensor.dtype), None if tensor.shape is None else list(tensor.shape)


def data_type(dtype: Any) -> ir.DataType | None:
    if dtype is None or isinstance(dtype, int):
        return ir.DataType(dtype) if dtype else None
    try:
        numpy_type = np.dtype(dtype)
    except TypeError:  # of optional values and maps, graphsurgeon keeps a TypeProto
        return None
    return ir.DataType.STRING if numpy_type.kind in "OUS" else ir.DataType.from_numpy(numpy_type)
