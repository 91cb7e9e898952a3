"""What the values of a model come of: texts and weights, positions and masks alone, or nothing but constants."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import onnx_ir as ir

from passes.audit_ranges.keys import key_of_value, scope_name
from surgery.graphs import bodies_of, named_bodies_of

Kind = Literal["activation", "position", "constant"]

FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE})
_LOOKUPS = frozenset({"Gather", "GatherElements", "GatherND"})
_SIZES = frozenset({"Shape", "Size"})
_RANKS: Mapping[Kind, int] = {"constant": 0, "position": 1, "activation": 2}
# A mask that is put into scores stays in them through these; through others (Softmax) it does not.
_MASKING = frozenset({"Add", "Sub", "Where", "Min"})
# fmt: off
_PASSING = _MASKING | frozenset({
    "Cast", "Concat", "Div", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity", "If", "Max",
    "Mul", "Pad", "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
})
# fmt: on


@dataclass(frozen=True)
class Origin:
    """What a value comes of.

    Args:
        kind: What decides its numbers.
        is_masked: A mask was put into it, so its large negative numbers hide what is beside them.
    """

    kind: Kind
    is_masked: bool = False


NOTHING = Origin("constant")


def origins_of(model: ir.Model) -> dict[str, Origin]:
    """Return what each value of a model comes of, by its key.

    Float inputs are activations (hidden states, a cache), and so is what is looked up in a table of weights by ids.
    What follows from integer inputs by arithmetic alone is a position: indices, masks, angles. Sizes of activations are
    positions too. A loop's state is what its first value or any of its updates is.
    """
    finder = _Finder()
    finder.graph(model.graph, "")
    return finder.keys


class _Finder:
    def __init__(self) -> None:
        self.keys: dict[str, Origin] = {}
        self._of: dict[ir.Value, Origin] = {}

    def graph(self, graph: ir.Graph, path: str) -> None:
        for value in graph.inputs:
            kind: Kind = "activation" if value.dtype in FLOATS else "position"
            self._of.setdefault(value, NOTHING if value.is_initializer() else Origin(kind))
            self.keys[key_of_value(value, path)] = self._of[value]
        for node in graph:
            if bodies_of(node):
                self._bodies(node, path)
            else:
                origin = self._origin(node)
                self._of.update((value, origin) for value in node.outputs)
            for value in node.outputs:
                self.keys[key_of_value(value, path)] = self._of[value]

    def _origin(self, node: ir.Node) -> Origin:
        given = [self._given(value) for value in node.inputs if value is not None]
        kind = _most(origin.kind for origin in given)
        if node.domain:
            return Origin(kind)
        if node.op_type in _SIZES:
            return Origin("position")
        if node.op_type in _LOOKUPS and kind == "position" and self._is_table(node.inputs[0]):
            kind = "activation"
        was_masked = node.op_type in _PASSING and any(origin.is_masked for origin in given)
        return Origin(kind, was_masked or (kind == "activation" and _masks(node, given)))

    def _is_table(self, value: ir.Value | None) -> bool:
        return value is not None and value.dtype in FLOATS and self._given(value).kind == "constant"

    def _bodies(self, node: ir.Node, path: str) -> None:
        bodies = dict(named_bodies_of(node))
        while True:  # a loop's state may turn from one kind into the next
            before = dict(self._of)
            for name, body in bodies.items():
                self._feed(node, body)
                self.graph(body, f"{path}{scope_name(node, name)}/")
            if before == self._of:
                break
        for index, value in enumerate(node.outputs):
            self._of[value] = self._joined(body.outputs[index + (node.op_type == "Loop")] for body in bodies.values())

    def _feed(self, node: ir.Node, body: ir.Graph) -> None:
        """Tell the inputs of a loop's body what goes into them: from outside, and from the trip before."""
        if node.op_type not in ("Loop", "Scan"):
            return
        is_loop = node.op_type == "Loop"
        states = len(body.inputs) - (0 if is_loop else node.attributes["num_scan_inputs"].as_int())
        for index, value in enumerate(body.inputs):
            if is_loop and index == 0:
                self._of[value] = Origin("position")
                continue
            given = [node.inputs[index] if index < len(node.inputs) else None]
            if index < states and (not is_loop or index > 1):
                given.append(body.outputs[index - is_loop])
            before = [self._of[value]] if value in self._of else []
            self._of[value] = self._joined(given, before)

    def _joined(self, values: Iterable[ir.Value | None], known: Iterable[Origin] = ()) -> Origin:
        origins = [*known, *(self._given(value) for value in values if value is not None)]
        return Origin(_most(one.kind for one in origins), any(one.is_masked for one in origins))

    def _given(self, value: ir.Value) -> Origin:
        return self._of.get(value, NOTHING)


def _most(kinds: Iterable[Kind]) -> Kind:
    return max(kinds, key=_RANKS.__getitem__, default="constant")


def _masks(node: ir.Node, given: Iterable[Origin]) -> bool:
    """Return whether a node puts what positions say into numbers."""
    return node.op_type in _MASKING and any(origin.kind == "position" for origin in given)
