"""Casts that change nothing are removed."""

from __future__ import annotations

import onnx_ir as ir

from passes.clean_casts.constants import fold_constants
from passes.clean_casts.moving import move_casts
from passes.clean_casts.rules import LOSSY, RULES, apply_rules
from passes.clean_casts.sharing import share
from passes.clean_casts.site import Site
from surgery.contract import Change, Context, Effect, Field, ModelPass, RoleUse, every_model
from surgery.element_types import infer_types
from surgery.graphs import graphs_of
from surgery.registry import register


@register
class CleanCasts(ModelPass):
    """Remove casts that change nothing.

    Before::

        g (float16[2, 3] x) => (float16[2, 3] y, float[3, 2] z) {
            a = Cast <to = 1> (x)
            b = Cast <to = 10> (a)
            y = Neg(b)
            c = Transpose(a)
            d = Cast <to = 10> (c)
            e = Neg(d)
            z = Cast <to = 1> (e)
        }

    After::

        g (float16[2, 3] x) => (float16[2, 3] y, float[3, 2] z) {
            y = Neg(x)
            c = Transpose(x)
            e = Neg(c)
            z = Cast <to = 1> (e)
        }

    What goes: casts to the same type, there and back through a wider type, steps in a chain that lose nothing, equal
    casts of one tensor, casts of constants, unused casts, and those that meet once they are moved through operators
    which only move numbers (Reshape, Transpose, Concat, ...): as many of those as can, by a minimum cut. Branches and
    bodies are cleaned like the main graph. A cast that only a branch or a loop's body has stays there; one that all
    branches of an `If` make of a value from outside is made in front of it.

    Keeps: every cast that rounds or truncates on the way, casts that are needed by others too or as results, casts of
    initializers that a caller may override, of large constants where the model would grow, of values whose type is not
    known, and all casts in local functions. Results of the model, of branches and of bodies keep their names and types.
    """

    models: tuple[str, ...] | None = every_model(
        RoleUse.EDITS, "Work on the models of these roles only; left out, on every model of the bundle."
    )
    small_bytes: int = Field(
        1024,
        ge=0,
        description="Store a constant in another type, or in both types, if that takes at most this many bytes more; "
        "larger ones only if they become smaller.",
    )
    drop_rounding: bool = Field(
        False,
        description="Also drop casts of float32 to float16 and back, which round: answers move, and the step is close.",
    )

    @property
    def effect(self) -> Effect:  # type: ignore[override]
        """Exact, unless rounding is dropped."""
        return Effect.CLOSE if self.drop_rounding else Effect.EXACT

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        """Clean the casts of all graphs."""
        untyped = [value for graph in graphs_of(model.graph) for value in values_of(graph) if value.type is None]
        infer_types(model)
        site = Site(model)
        before = site.count()
        rules = RULES + LOSSY if self.drop_rounding else RULES
        while any(
            [
                share(site),
                apply_rules(site, rules),
                fold_constants(site, self.small_bytes),
                move_casts(site, self.small_bytes),
            ]
        ):
            """Each round leaves fewer casts."""
        removed = before - site.count()
        for value in untyped:
            if not value.is_graph_output():
                value.type = None
        return Change(removed, f"removed {removed} of {before} casts" if removed else "")


def values_of(graph: ir.Graph) -> list[ir.Value]:
    """Return the values that a graph gives."""
    return [*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)]
