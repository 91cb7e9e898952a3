"""Logits of the last position only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir

from surgery.claims import Claim, Program, Slice, Take
from surgery.contract import Bundle, Change, Context, Effect, Field, ModelPass, RoleUse, every_model
from surgery.errors import Refused
from surgery.graphs import constant_tensor, fresh_name, value_names
from surgery.registry import register

# Operators that work on each position by itself, from their first input.
BY_POSITION = frozenset({"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Sub", "Tanh"})
AXIS = -2
BOUNDS = [[-1], [np.iinfo(np.int64).max], [AXIS]]
"""The starts, ends and axes of a slice that is the last position."""


@register
class LastLogits(ModelPass):
    """Compute the vocabulary projection for the last position only.

    Before::

        g (float[b, s, 2] x) => (float[b, s, 3] logits) <float[2, 3] head = {1, 2, 3, 4, 5, 6}> {
            h = Tanh(x)
            logits = MatMul(h, head)
        }

    After::

        g (float[b, s, 2] x) => (float[b, 1, 3] logits)
        <float[2, 3] head = {1, 2, 3, 4, 5, 6}, int64[1] last_axis = {-2}, int64[1] last_end = {9223372036854775807},
         int64[1] last_start = {-1}> {
            h = Tanh(x)
            h_last = Slice(h, last_start, last_end, last_axis)
            logits = MatMul(h_last, head)
        }

    Generation looks at the last position of a prompt; each of the others costs a row as long as the vocabulary. With
    padding on the left the last position is a row's own last token.

    Refuses: logits that do not come out of one product with a constant.
    """

    effect = Effect.CLOSE  # a product of one row may be computed by another kernel than one of many

    models: tuple[str, ...] | None = every_model(
        RoleUse.EDITS, "Work on the models of these roles only; left out, on every model of the bundle that has logits."
    )
    output: str = Field("logits", description="The output [batch, positions, vocabulary] to cut.")

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        """Slice what goes into the projection."""
        logits = _output(model, self.output)
        if logits is None and self.models is not None:
            raise Refused(f"{context.role!r} has no output {self.output!r}")
        if logits is None:
            return Change(0, "")
        products = [product for product in find_products(logits) if not _is_of_one_position(product)]
        for product in products:
            slice_last(model, product)
        if products:
            _narrow(logits)
        return Change(len(products), f"{self.output} computed for the last position only" if products else "")

    def claims(self, before: Bundle, after: Bundle) -> Sequence[Claim]:
        """What was cut is the last row of what it was."""
        last = {self.output: Take(self.output, (Slice(AXIS, -1),))}
        cut = {role for role in after.models if _length(before[role], self.output) != _length(after[role], self.output)}
        return [Claim(Program(role), Program(role), outputs=last if role in cut else {}) for role in after.models]


def find_products(logits: ir.Value) -> Iterator[ir.Node]:
    """Yield the products with a constant [hidden, vocabulary] that logits come out of: one, or one of each branch.

    Raises:
        Refused: There is none, or something else than the logits depends on what it gives.
    """
    node = logits.producer()
    while node is not None and node.domain == "" and node.op_type in BY_POSITION:
        others = [value for value in node.inputs[1:] if value is not None and not _is_constant(value)]
        if others:
            raise Refused(f"{logits.name!r} depends on {others[0].name!r} after the projection, at node {node.name!r}")
        value = node.inputs[0]
        assert value is not None
        if len(value.uses()) > 1 or value.is_graph_output():
            raise Refused(f"{value.name!r}, on the way to {logits.name!r}, is used elsewhere too")
        node = value.producer()
    if node is not None and node.domain == "" and node.op_type == "If":
        index = _last_value(logits, node)
        for branch in ("then_branch", "else_branch"):
            yield from find_products(node.attributes[branch].as_graph().outputs[index])
        return
    if node is None or node.domain != "" or node.op_type != "MatMul" or not _is_matrix(node.inputs[1]):
        found = f"node {node.name!r} ({node.op_type})" if node is not None else "an input"
        raise Refused(
            f"{logits.name!r} comes from {found}, not from a MatMul with a constant",
            hint="run last_logits before passes that change the projection, such as tie_transposed",
        )
    yield node


def _last_value(logits: ir.Value, node: ir.Node) -> int:
    """Return which output of a node is on the way to the logits."""
    value = logits
    while value.producer() is not node:
        producer = value.producer()
        assert producer is not None
        assert producer.inputs[0] is not None
        value = producer.inputs[0]
    return list(node.outputs).index(value)


def slice_last(model: ir.Model, product: ir.Node) -> None:
    """Let a product see the last position of its input [..., positions, hidden] only."""
    taken = value_names(model.graph)
    graph, hidden = product.graph, product.inputs[0]
    assert isinstance(graph, ir.Graph)
    assert hidden is not None
    names = [fresh_name(f"last_{part}", taken) for part in ("start", "end", "axis")]
    bounds = []
    for name, numbers in zip(names, BOUNDS, strict=True):
        value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, dtype=np.int64), name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        model.graph.register_initializer(value)
        bounds.append(value)
    shape = ir.Shape([*hidden.shape[:AXIS], 1, *hidden.shape[AXIS + 1 :]]) if hidden.shape is not None else None
    last = ir.Value(name=fresh_name(f"{hidden.name}_last", taken), type=hidden.type, shape=shape)
    graph.insert_before(product, ir.Node("", "Slice", [hidden, *bounds], outputs=[last], name=f"{last.name}/Slice"))
    product.replace_input_with(0, last)


def _output(model: ir.Model, name: str) -> ir.Value | None:
    return next((value for value in model.graph.outputs if value.name == name), None)


def _is_constant(value: ir.Value) -> bool:
    is_node = value.producer() is not None and constant_tensor(value.producer()) is not None
    return is_node or (value.is_initializer() and not value.is_graph_input())


def _is_matrix(value: ir.Value | None) -> bool:
    return value is not None and _is_constant(value) and value.shape is not None and len(value.shape) == 2


def _is_of_one_position(product: ir.Node) -> bool:
    hidden = product.inputs[0]
    assert hidden is not None
    producer = hidden.producer()
    if producer is not None and producer.op_type == "Slice":
        bounds = [value.const_value for value in producer.inputs[1:] if value is not None]
        return len(bounds) == 3 and [None if one is None else one.numpy().tolist() for one in bounds] == BOUNDS
    return hidden.shape is not None and hidden.shape[AXIS] == 1


def _narrow(logits: ir.Value) -> None:
    """Say that everything from the projection on has one position."""
    value: ir.Value | None = logits
    while value is not None:
        if value.shape is not None:
            value.shape = ir.Shape([*value.shape[:AXIS], 1, *value.shape[AXIS + 1 :]])
        node = value.producer()
        if node is not None and node.op_type == "If":
            for branch in ("then_branch", "else_branch"):
                _narrow(node.attributes[branch].as_graph().outputs[list(node.outputs).index(value)])
        value = node.inputs[0] if node is not None and node.op_type in BY_POSITION else None


def _length(model: ir.Model, name: str) -> object:
    value = _output(model, name)
    return value.shape[AXIS] if value is not None and value.shape is not None else None
