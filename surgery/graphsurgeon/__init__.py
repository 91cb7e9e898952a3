"""Runs a plain onnx_graphsurgeon function on a model: weights stay on disk until looked at, and nothing is lost."""

from __future__ import annotations

from collections.abc import Callable

import onnx_graphsurgeon as gs
import onnx_ir as ir

from surgery.errors import Refused
from surgery.graphsurgeon.comparing import said
from surgery.graphsurgeon.importing import import_graph
from surgery.graphsurgeon.origins import Origins
from surgery.graphsurgeon.rebuilding import Rebuilder
from surgery.irpass import move_into

Function = Callable[[gs.Graph], gs.Graph | None]


def apply(function: Function, model: ir.Model) -> bool:
    """Let a function edit a model in place.

    graphsurgeon's own importer makes the graph that the function sees. Its exporter is not used: 0.6.1 copies captured
    weights into every branch, drops unused and overridable initializers, metadata, overloads and types of values, and
    cannot write 4-bit constants, empty lists or optional values. The model is rebuilt from the graph instead, and what
    the function left alone comes from the object that it was.

    Args:
        function: Takes a graphsurgeon graph; edits it in place, or returns another.
        model: Left as it is when the function changes nothing, raises or is refused.

    Returns:
        Whether anything changed; another order of the same nodes is no change.

    Raises:
        Refused: The function returned something else than a graph, or left one that cannot be a model.
    """
    origins = Origins(model)
    graph = import_graph(model)
    origins.link_model(graph)
    origins.hand_out_weights()
    returned = function(graph)
    returned = graph if returned is None else returned
    if not isinstance(returned, gs.Graph) or isinstance(returned, gs.Function):
        raise Refused(f"the function returned {type(returned).__name__}, not a graphsurgeon Graph or None")
    if returned is not graph:
        origins.link_model(returned)
    rebuilt = Rebuilder(origins).model(returned)
    if said(rebuilt) == said(model):
        return False
    move_into(rebuilt, model)
    return True


__all__ = ["Function", "apply"]
