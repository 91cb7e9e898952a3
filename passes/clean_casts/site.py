"""A model whose casts are being cleaned: what a cast is, who sees which value, and how one stands for another."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import TypeAlias

import onnx_ir as ir

from surgery.element_types import Definitions
from surgery.graphs import bodies_of, fresh_name, graphs_of, value_names

Key: TypeAlias = tuple[ir.Value, ir.DataType, int, str]
"""What a cast gives: of which value, in which type, and how it treats numbers that the type does not hold."""


def is_cast(node: ir.Node | None) -> bool:
    """Return whether a node is a cast to a known type from a known one."""
    return node is not None and cast_type(node) is not None and tensor_type(node.inputs[0]) is not None


def cast_type(node: ir.Node) -> ir.DataType | None:
    """Return the type that a `Cast` or `CastLike` casts to, None if this is neither or it cannot be told."""
    if node.domain:
        return None
    if node.op_type == "CastLike":
        return tensor_type(node.inputs[1])
    to = node.attributes.get("to") if node.op_type == "Cast" else None
    if to is None or to.is_ref() or to.type != ir.AttributeType.INT:  # a name, before opset 6
        return None
    return ir.DataType(to.as_int())


def tensor_type(value: ir.Value | None) -> ir.DataType | None:
    """Return the element type of a tensor; None for what is no tensor or of an unknown type."""
    if value is None or not isinstance(value.type, ir.TensorType) or value.type.dtype == ir.DataType.UNDEFINED:
        return None
    return value.type.dtype


def source_of(cast: ir.Node) -> ir.Value:
    """Return what a cast casts."""
    value = cast.inputs[0]
    assert value is not None
    return value


def source_type(cast: ir.Node) -> ir.DataType:
    """Return the type that a cast casts from."""
    dtype = tensor_type(cast.inputs[0])
    assert dtype is not None
    return dtype


def target_type(cast: ir.Node) -> ir.DataType:
    """Return the type that a cast casts to."""
    dtype = cast_type(cast)
    assert dtype is not None
    return dtype


def key_of_cast(cast: ir.Node) -> Key:
    """Return what two casts have in common if they give the same."""
    saturates = cast.attributes.get_int("saturate", 1)
    return source_of(cast), target_type(cast), saturates, cast.attributes.get_string("round_mode", "up")


def inner_cast(cast: ir.Node) -> ir.Node | None:
    """Return the cast that gives what a cast casts, if there is one."""
    inner = source_of(cast).producer()
    return inner if inner is not None and is_cast(inner) else None


class Site:
    """A model at work: its graphs, the names in them, and the definitions of its operators.

    Args:
        model: Types of values are known where they can be.
    """

    def __init__(self, model: ir.Model) -> None:
        self.main = model.graph
        self.graphs = tuple(graphs_of(model.graph))
        self.names: Counter[str] = value_names(model.graph)
        self.definitions = Definitions(model)
        self._holders = {body: node for graph in self.graphs for node in graph for body in bodies_of(node)}

    def casts(self, graph: ir.Graph) -> Iterator[ir.Node]:
        """Yield the casts of a graph; each may be removed meanwhile, and so may others."""
        for node in tuple(graph):
            if node.graph is graph and is_cast(node):
                yield node

    def count(self) -> int:
        """Return how many casts the model has."""
        nodes = [node for graph in self.graphs for node in graph]
        return sum(node.op_type in ("Cast", "CastLike") and not node.domain for node in nodes)

    def can_stand_for(self, other: ir.Value, value: ir.Value) -> bool:
        """Return whether a value can be used in place of another one.

        A result of a graph keeps its name: the other value takes it over, if a node of the same graph gives it and it
        is no result itself.
        """
        if value.is_graph_output():
            return self.can_take_over(other, value)
        return all(self.shows(other, user.graph) for user, _ in value.uses())

    def stand_for(self, other: ir.Value, value: ir.Value) -> bool:
        """Let a value be used in place of what a cast gives, remove the cast, and say whether that could be done."""
        cast = value.producer()
        assert cast is not None
        if not self.can_stand_for(other, value):
            return False
        is_result = value.is_graph_output()
        ir.convenience.replace_all_uses_with(value, other, replace_graph_outputs=True)
        assert isinstance(cast.graph, ir.Graph)
        cast.graph.remove(cast, safe=True)
        if is_result:
            self._take_over(other, value)
        else:
            self.forget(value)
        return True

    def _take_over(self, other: ir.Value, value: ir.Value) -> None:
        """Give a value all that the outside knows of a result."""
        self.forget(other)
        other.name, other.type, other.doc_string = value.name, value.type, value.doc_string
        other.shape = value.shape if value.shape is not None else other.shape
        other.metadata_props.update(value.metadata_props)

    def can_take_over(self, other: ir.Value, value: ir.Value) -> bool:
        """Return whether a value can be the result of a graph that another one is, under its name."""
        giver, graph = other.producer(), value.graph
        if giver is None or giver.graph is not graph or other.is_graph_output():
            return False
        return all(self.shows(other, user.graph, value.name) for user, _ in other.uses())

    def shows(self, value: ir.Value, graph: ir.Graph | ir.Function | None, name: str | None = None) -> bool:
        """Return whether a graph inside a value's own sees it: no graph between gives its name to something else.

        Args:
            value: A value of this graph or of one around it.
            graph: Where it is to be used.
            name: What it will be called, if not as it is.
        """
        inner, name = graph, name or value.name
        while inner is not value.graph:
            if not isinstance(inner, ir.Graph) or inner not in self._holders:
                return False
            if self.names[str(name)] > 1 and _gives(inner, name):
                return False
            inner = self._holders[inner].graph
        return True

    def make_seen(self, value: ir.Value) -> None:
        """Give a value that is no input and no result a name that nothing else has."""
        name = str(value.name)
        if self.names[name] > 1:
            self.names[name] -= 1
            value.name = fresh_name(name, self.names)

    def remove(self, node: ir.Node) -> None:
        """Take a node out of its graph that nothing uses any more."""
        assert isinstance(node.graph, ir.Graph)
        node.graph.remove(node, safe=True)
        for output in node.outputs:
            self.forget(output)

    def forget(self, value: ir.Value) -> None:
        """Let the name of a value that is gone be free again."""
        if value.name:
            self.names[value.name] -= 1

    def move_before(self, node: ir.Node, anchor: ir.Node) -> bool:
        """Make sure that a node stands before another one of its graph, and say whether that is so.

        What it is given has to be there at the other one already; of a `CastLike` that is not known.
        """
        graph = node.graph
        assert isinstance(graph, ir.Graph)
        if next(one for one in graph if one is node or one is anchor) is node:
            return True
        if node.op_type != "Cast":
            return False
        graph.insert_before(anchor, node)
        return True

    def holder_in(self, graph: ir.Graph, node: ir.Node) -> ir.Node:
        """Return the node of a graph that is a given one, or holds it in its bodies."""
        while node.graph is not graph:
            assert isinstance(node.graph, ir.Graph)
            node = self._holders[node.graph]
        return node

    def fresh_name(self, wish: str) -> str:
        """Return a name that no value has, and note it as taken."""
        return fresh_name(wish, self.names)


def _gives(graph: ir.Graph, name: str | None) -> bool:
    own = (*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs))
    return any(value.name == name for value in own)
