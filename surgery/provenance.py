"""Provenance: every node that a step makes or changes says so in its metadata, where Netron shows it."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Mapping
from typing import Final

import onnx_ir as ir

MADE_BY: Final = "surgery.made_by"
CHANGED_BY: Final = "surgery.changed_by"
STAMPS: Final = frozenset({MADE_BY, CHANGED_BY})
SMALL_BYTES: Final = 1024

ORIGIN: Final = "surgery.origin"
"""Where a node of a model in memory keeps the operator that it had before the step."""

Signature = tuple[Hashable, ...]


def mark(models: Mapping[str, ir.Model]) -> None:
    """Let `stamp` know again, after a step, the nodes that models have now, whatever the step calls them."""
    for model in models.values():
        for node in _nodes(model):
            node.meta[ORIGIN] = _operator(node)


def stamp(before: Mapping[str, ir.Model], after: Mapping[str, ir.Model], who: str) -> None:
    """Write into the metadata of nodes which step made or changed them; those that it left alone keep what they say.

    A node is left alone if some model of the bundle had it: its operator, name, inputs, outputs and attributes. It is
    changed if one had a node of that operator and name, or of that operator for the same output, or if `mark` was
    called and met it with that operator. Else it is made.

    Args:
        before: The models that the step was given, by role.
        after: The models that it made of them; their nodes are written to.
        who: The step, as it is to be read: `dedup_weights (step 1)`.
    """
    known: set[Signature] = set()
    traces: set[Signature] = set()
    for model in before.values():
        for node in _nodes(model):
            known.add(_signature(node))
            traces.update(_traces(node))
    for model in after.values():
        for node in _nodes(model):
            if _signature(node) in known:
                continue
            is_known = node.meta.get(ORIGIN) == _operator(node) or not traces.isdisjoint(_traces(node))
            _note(node, CHANGED_BY if is_known else MADE_BY, who)


def _note(node: ir.Node, key: str, who: str) -> None:
    earlier = node.metadata_props.get(key)
    node.metadata_props[key] = f"{earlier}, {who}" if earlier else who


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


def _signature(node: ir.Node) -> Signature:
    """Return what a node says for itself; what stands in its subgraphs is said by the nodes there."""
    return (
        *_operator(node),
        node.name,
        tuple(value.name if value is not None else None for value in node.inputs),
        tuple(value.name for value in node.outputs),
        tuple(sorted((name, _content(attribute)) for name, attribute in node.attributes.items())),
    )


def _traces(node: ir.Node) -> Iterator[Signature]:
    """Yield by what a changed node is known again."""
    if node.name:
        yield (*_operator(node), "name", node.name)
    for value in node.outputs:
        if value.name:
            yield (*_operator(node), "output", value.name)


def _operator(node: ir.Node) -> Signature:
    return node.domain, node.op_type, node.overload


def _content(attribute: ir.Attr) -> str:
    if attribute.is_ref():
        return f"ref {attribute.ref_attr_name}"
    if attribute.type is ir.AttributeType.GRAPH:
        return _interface(attribute.as_graph())
    if attribute.type is ir.AttributeType.GRAPHS:
        return " ".join(_interface(graph) for graph in attribute.as_graphs())
    if attribute.type is ir.AttributeType.TENSOR:
        return _which(attribute.as_tensor())
    return repr(attribute.value)


def _which(tensor: ir.TensorProtocol) -> str:
    """Tell small tensors apart by content and others by which object they are, since clones share them."""
    if tensor.nbytes > SMALL_BYTES:
        return f"tensor {id(tensor)}"
    return f"{tensor.dtype}{tensor.shape} {tensor.tobytes().hex()}"


def _interface(graph: ir.Graph) -> str:
    return f"({_names(graph.inputs)}) => ({_names(graph.outputs)})"


def _names(values: Iterable[ir.Value]) -> str:
    return ", ".join(str(value.name) for value in values)
