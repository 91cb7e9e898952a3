"""What values are called in reports: by name, in a body after the names of what is around it."""

from __future__ import annotations

from collections.abc import Iterator

import onnx_ir as ir

from surgery.graphs import named_bodies_of


def key_of_value(value: ir.Value, path: str) -> str:
    """Return the key of a value in a graph at a path, `""` for the main graph."""
    return f"{path}{value.name}"


def scope_name(node: ir.Node, attribute: str) -> str:
    """Return what a body of a node is called in keys."""
    return f"{node.name or node.outputs[0].name}.{attribute}"


def keyed_values(graph: ir.Graph, path: str = "") -> Iterator[tuple[str, ir.Value]]:
    """Yield the inputs of a main graph, and what nodes of it and its bodies give, with their keys."""
    if not path:
        yield from ((key_of_value(value, path), value) for value in graph.inputs)
    for node in graph:
        for attribute, body in named_bodies_of(node):
            yield from keyed_values(body, f"{path}{scope_name(node, attribute)}/")
        yield from ((key_of_value(value, path), value) for value in node.outputs)
