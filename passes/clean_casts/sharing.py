"""Equal casts of one value are one: in a graph, with those of the graphs around it, in all branches of an `If`.

A cast is never made to run where none ran: one that only a branch or only a loop's body has stays there.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from passes.clean_casts.site import Key, Site, key_of_cast, source_of
from surgery.graphs import bodies_of


def share(site: Site) -> bool:
    """Share equal casts, and say whether there were any."""
    hoisted = [hoist(site, node) for graph in reversed(site.graphs) for node in tuple(graph) if node.op_type == "If"]
    return share_in(site, site.main, {}) or any(hoisted)


def share_in(site: Site, graph: ir.Graph, outside: Mapping[Key, ir.Node]) -> bool:
    """Share the casts of a graph and of those nested in it with each other and with those outside."""
    changed = False
    known = dict(outside)
    for cast in site.casts(graph):
        twin = known.setdefault(key_of_cast(cast), cast)
        if twin is not cast:
            changed |= merge(site, cast, twin)
    for node in graph:
        for body in bodies_of(node):
            changed |= share_in(site, body, known)
    return changed


def merge(site: Site, cast: ir.Node, twin: ir.Node) -> bool:
    """Let a cast of the same graph or of one around it stand for an equal one, and say whether that could be done."""
    (value,), (other,) = cast.outputs, twin.outputs
    assert isinstance(twin.graph, ir.Graph)
    if not site.can_stand_for(other, value) or not site.move_before(twin, site.holder_in(twin.graph, cast)):
        return False
    return site.stand_for(other, value)


def hoist(site: Site, chooser: ir.Node) -> bool:
    """Move a cast that all branches of an `If` make of a value from outside in front of it."""
    branches = bodies_of(chooser)
    if chooser.domain or len(branches) != 2:
        return False
    casts = [{key_of_cast(cast): cast for cast in site.casts(branch) if is_of_outside(cast)} for branch in branches]
    common = [key for key in casts[0] if key in casts[1]]
    moved = [move_out(site, chooser, [found[key] for found in casts]) for key in common]
    return any(moved)


def is_of_outside(cast: ir.Node) -> bool:
    """Return whether a cast, which is no result of its graph, is of a value from outside."""
    return source_of(cast).graph is not cast.graph and not cast.outputs[0].is_graph_output()


def move_out(site: Site, chooser: ir.Node, casts: list[ir.Node]) -> bool:
    """Let one of equal casts in both branches of an `If` stand in front of it, for both."""
    cast = next((cast for cast in casts if cast.op_type == "Cast"), None)
    if cast is None or not isinstance(cast.graph, ir.Graph):
        return False
    assert isinstance(chooser.graph, ir.Graph)
    (value,) = cast.outputs
    for twin in casts:
        if twin is not cast:
            twin.outputs[0].replace_all_uses_with(value)
            site.remove(twin)
    cast.graph.remove(cast)
    if any(node.name == cast.name for node in chooser.graph):
        cast.name = None  # ONNX Runtime takes no two nodes of one name, so it gets another one
    chooser.graph.insert_before(chooser, cast)
    site.make_seen(value)
    return True
