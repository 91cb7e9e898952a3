"""What onnx_ir leaves to its users: walking all graphs of a model, fresh names, casts, lifting weights outwards."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir


def graphs_of(main: ir.Graph) -> Iterator[ir.Graph]:
    """Yield a graph and all graphs nested in it, the outer ones first."""
    yield main
    yield from main.subgraphs()


def bodies_of(node: ir.Node) -> list[ir.Graph]:
    """Return the graphs in a node's attributes."""
    return [body for _, body in named_bodies_of(node)]


def named_bodies_of(node: ir.Node) -> Iterator[tuple[str, ir.Graph]]:
    """Yield the graphs in a node's attributes, each with the name of its attribute."""
    for attribute in node.attributes.values():
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.name, attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from ((attribute.name, body) for body in attribute.as_graphs())


def value_names(main: ir.Graph) -> Counter[str]:
    """Return how often each value name is given in a graph and the graphs nested in it."""
    names: Counter[str] = Counter()
    for graph in graphs_of(main):
        own = {*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)}
        names.update(value.name for value in own if value.name)
    return names


def fresh_name(wish: str, taken: Counter[str]) -> str:
    """Return a name that no scope of the model has, and note it as taken."""
    name, number = wish, 0
    while taken[name]:
        number += 1
        name = f"{wish}_{number}"
    taken[name] += 1
    return name


def cast_of(value: ir.Value, dtype: ir.DataType, names: Counter[str], wish: str = "") -> ir.Node:
    """Return a `Cast` that is in no graph yet; what it gives has a fresh name, a type, and the shape of what it is of.

    Args:
        value: What is cast.
        dtype: To what.
        names: The names that the model has; the new one is noted.
        wish: The name, if nothing has it; left out, that of the value and the type, as in `x/float16`.
    """
    cast = ir.node("Cast", [value], {"to": int(dtype)})
    (made,) = cast.outputs
    made.name = fresh_name(wish or f"{value.name}/{dtype.name.lower()}", names)
    made.type, made.shape = ir.TensorType(dtype), value.shape
    return cast


def constant_tensor(node: ir.Node | None) -> ir.TensorProtocol | None:
    """Return what a `Constant` node gives, None for other nodes and for strings and sparse tensors."""
    if node is None or node.op_type != "Constant" or node.domain != "" or len(node.attributes) != 1:
        return None
    (attribute,) = node.attributes.values()
    if attribute.is_ref():
        return None
    if attribute.name == "value":
        return attribute.as_tensor()
    if attribute.name in ("value_floats", "value_float"):
        return ir.tensor(np.array(attribute.value, dtype=np.float32))
    if attribute.name in ("value_ints", "value_int"):
        return ir.tensor(np.array(attribute.value, dtype=np.int64))
    return None


def constant_to_initializer(value: ir.Value, home: ir.Graph, name: str) -> ir.Value:
    """Put what a `Constant` node gives into a graph as an initializer, let it serve all uses, and remove the node."""
    node = value.producer()
    assert node is not None
    assert node.graph is not None
    tensor = constant_tensor(node)
    assert tensor is not None
    made = _initializer(name, tensor, value)
    ir.convenience.replace_all_uses_with(value, made)
    node.graph.remove(node, safe=True)
    home.register_initializer(made)
    return made


def lift_initializer(value: ir.Value, main: ir.Graph, name: str) -> ir.Value:
    """Move an initializer of a nested graph to the main graph, where all graphs can see it."""
    tensor = value.const_value
    assert tensor is not None
    assert value.name is not None
    assert value.graph is not None
    made = _initializer(name, tensor, value)
    ir.convenience.replace_all_uses_with(value, made)
    del value.graph.initializers[value.name]
    main.register_initializer(made)
    return made


def _initializer(name: str, tensor: ir.TensorProtocol, origin: ir.Value) -> ir.Value:
    made = ir.Value(
        name=name,
        type=ir.TensorType(tensor.dtype),
        shape=ir.Shape(tensor.shape.numpy()),
        doc_string=origin.doc_string,
        const_value=tensor,
    )
    made.metadata_props.update(origin.metadata_props)
    return made
