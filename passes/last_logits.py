"""Logits of the last position only."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from surgery.claims import Claim, Program, Slice, Take
from surgery.contract import Bundle, Change, Context, Effect, Field, ModelPass, RoleUse, every_model
from surgery.errors import Refused
from surgery.graphs import constant_tensor, fresh_name, value_names
from surgery.registry import register

# Operators that work on each position by itself.
BY_POSITION = frozenset({"Add", "Cast", "Clip", "Div", "Identity", "Mul", "Sub", "Tanh"})
SAME_RANK = frozenset({"Cast", "DequantizeLinear", "Identity", "Transpose"})
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

    The projection is a `MatMul` with a matrix, or what `tie_transposed` makes of one. Behind it there may be what works
    on each position by itself: a bias, a scale, a soft cap, casts. In a merged model it is done in both branches.

    Refuses: logits without an axis of positions; logits that come out of anything else; a projection whose other
    positions something else depends on.
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
        if logits.shape is None or len(logits.shape) != 3:
            axes = "no known axes" if logits.shape is None else f"{len(logits.shape)} axes"
            raise Refused(f"{context.role!r}: {self.output!r} has {axes}, not [batch, positions, vocabulary]")
        found = list(find_projections(logits))
        wide = [projection for projection in found if not _is_of_one_position(projection)]
        for projection in wide:
            slice_last(model, projection)
        if wide:
            for value in (value for projection in found for value in projection.values):
                _narrow(value)
        return Change(len(wide), f"{self.output} computed for the last position only" if wide else "")

    def claims(self, before: Bundle, after: Bundle) -> Sequence[Claim]:
        """What was cut is the last row of what it was."""
        last = {self.output: Take(self.output, (Slice(AXIS, -1),))}
        cut = {role for role in after.models if _length(before[role], self.output) != _length(after[role], self.output)}
        return [Claim(Program(role), Program(role), outputs=last if role in cut else {}) for role in after.models]


@dataclass(frozen=True)
class Projection:
    """A product of rows with a matrix, and what there is of it up to the logits.

    Args:
        hidden: The rows [batch, positions, hidden].
        readers: The nodes that read them, and as which input.
        values: What is computed from them, each [batch, positions, vocabulary].
    """

    hidden: ir.Value
    readers: tuple[tuple[ir.Node, int], ...]
    values: tuple[ir.Value, ...]


def find_projections(logits: ir.Value, above: tuple[ir.Value, ...] = ()) -> Iterator[Projection]:
    """Yield the projections that logits come out of: one, or one of each branch of an `If`.

    Args:
        logits: An output of a graph.
        above: What is computed from it, in the graphs around.

    Raises:
        Refused: There is none, or something else than the logits depends on what it gives.
    """
    values = [logits]
    while True:
        value = values[-1]
        if len(value.uses()) > (value is not logits) or (value.is_graph_output() and value is not logits):
            raise Refused(f"{value.name!r}, on the way to {logits.name!r}, is used elsewhere too")
        node = value.producer()
        if node is None or node.domain != "" or node.op_type not in BY_POSITION:
            break
        values.append(_followed(node, logits))
    way = (*values, *above)
    if node is not None and node.op_type == "If" and node.domain == "":
        index = list(node.outputs).index(values[-1])
        for branch in ("then_branch", "else_branch"):
            yield from find_projections(node.attributes[branch].as_graph().outputs[index], way)
        return
    projection = _product(node, way) or _product_of_rows(node, way)
    if projection is None:
        found = f"node {node.name!r} ({node.op_type})" if node is not None else "an input"
        raise Refused(f"{logits.name!r} comes from {found}, not from a product with a matrix")
    yield projection


def _followed(node: ir.Node, logits: ir.Value) -> ir.Value:
    """Return the one input of a node that depends on the position; the others have to be alike for all positions."""
    given = [value for value in node.inputs if value is not None]
    varying = [value for value in given if not _is_constant(value)]
    if len(varying) != 1:
        other = (varying or given)[-1]
        raise Refused(f"{logits.name!r} depends on {other.name!r} after the projection, at node {node.name!r}")
    for value in given:
        shape = None if value is varying[0] else _constant_shape(value)
        if shape is not None and len(shape) > 1 and shape[AXIS] != 1:
            raise Refused(f"{value.name!r}, at node {node.name!r}, is not alike for all positions of {logits.name!r}")
    return varying[0]


def _product(node: ir.Node | None, way: tuple[ir.Value, ...]) -> Projection | None:
    """MatMul(hidden, [hidden, vocabulary])"""
    if node is None or node.domain != "" or node.op_type != "MatMul" or _rank(node.inputs[1]) != 2:
        return None
    assert node.inputs[0] is not None
    return Projection(node.inputs[0], ((node, 0),), way)


def _product_of_rows(node: ir.Node | None, way: tuple[ir.Value, ...]) -> Projection | None:
    """Reshape(Gemm(Reshape(hidden, [-1, n]), ...), Concat(Shape(hidden)[:-1], [vocabulary]))"""
    gemm, shape = _input(node, "Reshape", 0, "Gemm"), _input(node, "Reshape", 1, "Concat")
    flat = _input(gemm, "Gemm", 0, "Reshape")
    leading = _input(shape, "Concat", 0, "Shape")
    if leading is None:  # below opset 15
        leading = _input(_input(shape, "Concat", 0, "Slice"), "Slice", 0, "Shape")
    elif leading.attributes.get_int("end", 0) != -1:
        return None
    if gemm is None or flat is None or leading is None or gemm.attributes.get_int("transA", 0) == 1:
        return None
    hidden = flat.inputs[0]
    rows = [value for one in (gemm, flat, shape, leading) if one is not None for value in one.outputs]
    bias = gemm.inputs[2] if len(gemm.inputs) > 2 else None
    is_alone = all(len(value.uses()) == 1 and not value.is_graph_output() for value in rows)
    is_alike = bias is None or _rank(bias) in (0, 1)
    if hidden is None or hidden is not leading.inputs[0] or not is_alone or not is_alike or not _is_flat(flat):
        return None
    if _rank(hidden) not in (None, 3) or not _adds_one_size(shape):  # else the last axis but one is another in logits
        return None
    for value in (*flat.outputs, *gemm.outputs):
        value.shape = None
    return Projection(hidden, ((flat, 0), (leading, 0)), way)


def _is_flat(reshape: ir.Node) -> bool:
    """Say whether a Reshape makes rows; that they are of the last axis follows from what becomes of them."""
    sizes = reshape.inputs[1]
    tensor = None if sizes is None else sizes.const_value if _is_weight(sizes) else constant_tensor(sizes.producer())
    return tensor is not None and len(tensor.shape) == 1 and tensor.numpy().tolist()[:-1] == [-1]


def _adds_one_size(shape: ir.Node | None) -> bool:
    """Say whether a Concat puts a single size behind those that it is given."""
    if shape is None or len(shape.inputs) != 2 or shape.inputs[1] is None:
        return False
    return _constant_shape(shape.inputs[1]) == (1,)


def _input(node: ir.Node | None, op_type: str, index: int, producer_type: str) -> ir.Node | None:
    """Return what gives an input of a node, if both are of these operators."""
    if node is None or node.domain != "" or node.op_type != op_type or len(node.inputs) <= index:
        return None
    value = node.inputs[index]
    producer = value.producer() if value is not None else None
    is_right = producer is not None and producer.domain == "" and producer.op_type == producer_type
    return producer if is_right else None


def slice_last(model: ir.Model, projection: Projection) -> None:
    """Let a projection see the last position of its input only."""
    taken, hidden = value_names(model.graph), projection.hidden
    first = projection.readers[0][0]
    graph = first.graph
    assert isinstance(graph, ir.Graph)
    names = [fresh_name(f"last_{part}", taken) for part in ("start", "end", "axis")]
    bounds = []
    for name, numbers in zip(names, BOUNDS, strict=True):
        value = ir.Value(name=name, const_value=ir.tensor(np.array(numbers, dtype=np.int64), name=name))
        value.type, value.shape = ir.TensorType(ir.DataType.INT64), ir.Shape([1])
        graph.register_initializer(value)
        bounds.append(value)
    last = ir.Value(name=fresh_name(f"{hidden.name}_last", taken), type=hidden.type, shape=hidden.shape)
    _narrow(last)
    node = ir.Node("", "Slice", [hidden, *bounds], outputs=[last], name=f"{last.name}/Slice")
    graph.insert_before(min((one for one, _ in projection.readers), key=list(graph).index), node)
    for reader, index in projection.readers:
        reader.replace_input_with(index, last)


def _output(model: ir.Model, name: str) -> ir.Value | None:
    return next((value for value in model.graph.outputs if value.name == name), None)


def _is_constant(value: ir.Value) -> bool:
    return _is_weight(value) or constant_tensor(value.producer()) is not None


def _is_weight(value: ir.Value) -> bool:
    return value.is_initializer() and not value.is_graph_input()


def _constant_shape(value: ir.Value) -> tuple[int, ...] | None:
    tensor = value.const_value if value.is_initializer() else constant_tensor(value.producer())
    return None if tensor is None else tuple(int(size) for size in tensor.shape.numpy())


def _rank(value: ir.Value | None) -> int | None:
    """Return how many axes a value has, if it or the constant that it is made of says so."""
    if value is None:
        return None
    if value.shape is not None:
        return len(value.shape)
    shape = _constant_shape(value)
    if shape is not None:
        return len(shape)
    node = value.producer()
    is_seen_through = node is not None and node.domain == "" and node.op_type in SAME_RANK
    return _rank(node.inputs[0]) if node is not None and is_seen_through else None


def _is_of_one_position(projection: Projection) -> bool:
    if any(value.shape is not None and value.shape[AXIS] == 1 for value in (projection.hidden, *projection.values)):
        return True
    producer = projection.hidden.producer()
    if producer is None or producer.op_type != "Slice":
        return False
    bounds = [value.const_value for value in producer.inputs[1:] if value is not None]
    return [None if one is None else one.numpy().tolist() for one in bounds] == BOUNDS


def _narrow(value: ir.Value) -> None:
    """Say that a value [..., positions, size] has one position."""
    if value.shape is not None:
        value.shape = ir.Shape([*value.shape[:AXIS], 1, *value.shape[AXIS + 1 :]])


def _length(model: ir.Model, name: str) -> object:
    value = _output(model, name)
    return value.shape[AXIS] if value is not None and value.shape is not None else None
