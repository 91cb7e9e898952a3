"""Moves what both branches of an `If` compute alike to the graph around it."""

from __future__ import annotations

from collections.abc import Hashable

import onnx_ir as ir

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)

Key = tuple[Hashable, ...]


def hoist_common(main: ir.Graph) -> int:
    """Move nodes with equal inputs, operator and attributes in both branches before the `If`; return how many.

    Nodes that hold graphs stay, and so do random ones, which draw anew at each call.
    """
    chooser = next(node for node in main if node.op_type == "If")
    first, second = (chooser.attributes[name].as_graph() for name in ("then_branch", "else_branch"))
    known: dict[Key, ir.Node] = {}
    for node in first:
        key = _key(node, first)
        if key is not None:
            known.setdefault(key, node)
    hoisted = 0
    moved: set[ir.Node] = set()
    for node in list(second):
        key = _key(node, second)
        twin = known.get(key) if key is not None else None
        if twin is None or any(value.is_graph_output() for value in (*node.outputs, *twin.outputs)):
            continue
        if twin not in moved:
            first.remove(twin)
            main.insert_before(chooser, twin)
            moved.add(twin)
            # What read it has inputs from outside now, which may make it equal too.
            for user in list(first):
                fresh = _key(user, first)
                if fresh is not None:
                    known.setdefault(fresh, user)
        for mine, its in zip(node.outputs, twin.outputs, strict=True):
            ir.convenience.replace_all_uses_with(mine, its)
        second.remove(node, safe=True)
        hoisted += 1
    return hoisted


def _key(node: ir.Node, branch: ir.Graph) -> Key | None:
    """Return what decides the outputs of a node, None if it depends on anything in its branch."""
    if node.op_type in RANDOM or any(_is_local(value, branch) for value in node.inputs):
        return None
    attributes: list[Hashable] = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.type in (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS) or attribute.is_ref():
            return None
        value = attribute.value
        attributes.append((name, value.tobytes() if attribute.type == ir.AttributeType.TENSOR else repr(value)))
    return (*node.op_identifier(), len(node.outputs), tuple(map(id, node.inputs)), *attributes)


def _is_local(value: ir.Value | None, branch: ir.Graph) -> bool:
    return value is not None and value.graph is branch
