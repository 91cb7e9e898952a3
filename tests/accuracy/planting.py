"""What faults are planted with: edits of one model, and the pass that makes a step of an edit."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import numpy as np
import onnx_ir as ir

from surgery import Change, Claim, Context, Effect, ModelPass, Tolerance

Edit = Callable[[ir.Model], None]
Given = Mapping[str, ir.Value]


class Planted(ModelPass):
    """Base of the passes that `plant` makes."""

    edit: ClassVar[Edit]
    maps: ClassVar[Mapping[str, object]] = {}

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        """Make the edit."""
        type(self).edit(model)
        return Change(1, "edited")

    def claims(self, before: object, after: object) -> list[Claim]:
        """Say what the maps say of every model that is edited."""
        default = super().claims(before, after)  # type: ignore[arg-type]
        edited = self.models or [claim.candidate.role for claim in default]  # type: ignore[union-attr]
        return [
            Claim(claim.reference, claim.candidate, **self.maps) if claim.candidate.role in edited else claim  # type: ignore
            for claim in default
        ]


def plant(
    name: str,
    edit: Edit,
    effect: Effect = Effect.EXACT,
    *,
    role: str | None = None,
    tolerance: Tolerance | None = None,
    **maps: object,
) -> ModelPass:
    """Return a pass that makes an edit, called by a name such as `swap_outputs`."""
    body = {
        "__module__": __name__,
        "edit": staticmethod(edit),
        "effect": effect,
        "maps": maps,
        "tolerance": tolerance or Tolerance(),
    }
    made = type("".join(word.title() for word in name.split("_")), (Planted,), body)
    return made(models=(role,) if role else None)


class Emit:
    """Appends nodes to a graph, one a call."""

    def __init__(self, graph: ir.Graph) -> None:
        self.graph = graph

    def __call__(self, op_type: str, *inputs: ir.Value | np.ndarray | None, **attributes: object) -> ir.Value:
        values = [self.constant(value) if isinstance(value, np.ndarray) else value for value in inputs]
        node = ir.node(op_type, values, attributes)
        self.graph.append(node)
        return node.outputs[0]

    def constant(self, array: np.ndarray) -> ir.Value:
        """Return a value that holds an array."""
        node = ir.node("Constant", [], {"value": ir.tensor(array)})
        self.graph.append(node)
        return node.outputs[0]


def given(model: ir.Model) -> dict[str, ir.Value]:
    """Return the inputs by name."""
    return {value.name or "": value for value in model.graph.inputs}


def output(model: ir.Model, name: str) -> ir.Value:
    """Return the output of that name."""
    return next(value for value in model.graph.outputs if value.name == name)


def rework(name: str, make: Callable[[Emit, ir.Value, Given], ir.Value]) -> Edit:
    """Return the edit that computes an output anew from what it was and the inputs; its declared type stays."""

    def edit(model: ir.Model) -> None:
        old = output(model, name)
        new = make(Emit(model.graph), old, given(model))
        new.shape, new.dtype = old.shape, old.dtype if new.dtype is None else new.dtype
        replace_output(model, old, new)

    return edit


def replace_output(model: ir.Model, old: ir.Value, new: ir.Value) -> None:
    """Let another value go by an output's name."""
    name = old.name
    old.name = f"{name}_was{len(list(model.graph))}"
    new.name = name
    model.graph.outputs[[value is old for value in model.graph.outputs].index(True)] = new


def pass_through(model: ir.Model) -> None:
    """Change a model harmlessly: its first output goes through an Identity."""
    rework(model.graph.outputs[0].name or "", lambda emit, value, _: emit("Identity", value))(model)


def where(condition: Callable[[Emit, Given], ir.Value], amount: float = 0.1, name: str = "logits") -> Edit:
    """Return the edit that adds an amount to an output where a condition [that broadcasts to it] holds."""

    def make(emit: Emit, value: ir.Value, inputs: Given) -> ir.Value:
        return emit("Where", condition(emit, inputs), emit("Add", value, np.array(amount, dtype=np.float32)), value)

    return rework(name, make)


def put(condition: Callable[[Emit, Given], ir.Value], number: float, name: str = "logits") -> Edit:
    """Return the edit that writes a number into an output where a condition holds."""

    def make(emit: Emit, value: ir.Value, inputs: Given) -> ir.Value:
        return emit("Where", condition(emit, inputs), np.array(number, dtype=np.float32), value)

    return rework(name, make)


def size_is(name: str, axis: int, comparison: str, number: int) -> Callable[[Emit, Given], ir.Value]:
    """Return the condition that compares one axis of an input with a number: `Equal`, `Greater`, `Less`."""

    def condition(emit: Emit, inputs: Given) -> ir.Value:
        size = emit("Shape", inputs[name], start=axis, end=axis + 1)
        return emit(comparison, size, np.array([number], dtype=np.int64))

    return condition


def weight(name: str, change: Callable[[np.ndarray], np.ndarray]) -> Edit:
    """Return the edit that changes a weight."""

    def edit(model: ir.Model) -> None:
        value = model.graph.initializers[name]
        assert value.const_value is not None
        value.const_value = ir.tensor(change(value.const_value.numpy().copy()))

    return edit
