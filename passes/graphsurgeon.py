"""A plain onnx_graphsurgeon function as a pass."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

import onnx_ir as ir
from pydantic import PrivateAttr, ValidationInfo, model_validator
from pydantic.json_schema import SkipJsonSchema

from surgery.contract import Change, Context, Field
from surgery.errors import RecipeError
from surgery.irpass import ForeignPass
from surgery.registry import register, resolve


@register
class Graphsurgeon(ForeignPass):
    """Let a function edit the graph with onnx_graphsurgeon.

    The function takes a `gs.Graph` and edits it in place, or returns another::

        def drop_dropout(graph):
            for node in graph.nodes:
                if node.op == "Dropout":
                    after = node.o()
                    after.inputs[after.inputs.index(node.outputs[0])] = node.inputs[0]
            graph.cleanup().toposort()

    Weights that it does not look at stay on disk, and where it changes nothing, nothing changes: neither metadata nor
    local functions nor types of values, which graphsurgeon itself drops.

    Keeps: weights that no node read before; inputs that have a default value.

    Refuses: a graph in which an initializer hides an outer value of the same name; a result in which a node reads what
    nothing gives.
    """

    function: str | SkipJsonSchema[Callable[..., Any]] = Field(
        description="Run this function: module:name, the module being looked for beside the recipe first."
    )
    _resolved: Callable[..., Any] = PrivateAttr()

    @model_validator(mode="after")
    def _resolve(self, info: ValidationInfo) -> Self:
        """Find the function now, so that a wrong name is a mistake of the recipe and not of the run."""
        folder = (info.context or {}).get("folder", Path())
        found = resolve(self.function, folder) if isinstance(self.function, str) else self.function
        if not callable(found):
            raise RecipeError(f"{self.function!r} is {found!r}, not a function")
        self._resolved = found
        return self

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        """Run the function on the model."""
        from surgery.graphsurgeon import apply

        before = _count_nodes(model)
        if not apply(self._resolved, model):
            return Change(0, "")
        name = getattr(self._resolved, "__name__", str(self.function))
        after = _count_nodes(model)
        return Change(1, f"{name}: {before} nodes became {after}" if before != after else f"{name} edited the graph")


def _count_nodes(model: ir.Model) -> int:
    bodies: tuple[ir.Graph | ir.Function, ...] = (model.graph, *model.functions.values())
    return sum(1 for body in bodies for _ in body.all_nodes())
