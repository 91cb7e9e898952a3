"""The places of a model that compute or hold numbers in one precision, and the tensors that flow between them."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping
from dataclasses import dataclass, field

import onnx_ir as ir

from passes.cast_fp16.cutting import Flow, Place
from surgery.element_types import Definitions
from surgery.graphs import bodies_of, constant_tensor
from surgery.storage import key_of

FLOAT, HALF = ir.DataType.FLOAT, ir.DataType.FLOAT16
# By attributes or by nothing at all they give any type, whatever they are given.
BORN = frozenset({"Cast", "CastLike", "Constant", "ConstantOfShape"})
# They draw the numbers that they drew in float32, and few runtimes have them in float16; of an input they only look at
# the shape.
DRAWN = frozenset({"EyeLike", "RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike"})
# Which numbers they give is decided by others: they run in either precision at no cost but that of casts.
# fmt: off
NEUTRAL = frozenset({
    "Compress", "Concat", "DepthToSpace", "Expand", "Flatten", "Gather", "GatherElements", "GatherND", "Identity",
    "Pad", "Reshape", "ReverseSequence", "ScatterElements", "ScatterND", "Slice", "SpaceToDepth", "Split",
    "Squeeze", "TensorScatter", "Tile", "Transpose", "Trilu", "Unsqueeze", "Where",
})
# fmt: on
# Inputs of these numbers are counts or sizes, which float16 would round, whatever type the definition allows.
_COUNTS = {"OneHot": (0, 1), "Range": (0, 1, 2)}
# Before it, a Scan was given lengths first.
_SCAN_AS_TODAY = 9
# The first shows the bits; the other one's definition adds a constant of float32 to numbers of any type.
_BOUND = frozenset({"BitCast", "MeanVarianceNormalization"})
_PAST, _PRESENT = "past_key_values.", "present."
_HANDED_ON = {"encoder_hidden_states": "last_hidden_state"}


@dataclass(frozen=True)
class Joint:
    """What a node with bodies passes on: an output of its branches, the state of a loop, what it scans or collects."""

    node: ir.Node
    kind: str
    index: int


@dataclass(frozen=True)
class Port:
    """An input or output of the model, by role and name: with a name for both, what passes through is one.

    What one model of a bundle gives and another one takes is one as well, under no role: the cache, and the encoder's
    hidden states.
    """

    role: str
    name: str

    @property
    def is_cache(self) -> bool:
        """It is part of the cache."""
        return self.name.startswith(_PAST)


@dataclass(frozen=True)
class Weight:
    """A tensor of constants, whichever models and scopes hold it."""

    key: Hashable


@dataclass(frozen=True)
class Fixed:
    """A value that is float32 by its operator's definition."""

    value: ir.Value


@dataclass(frozen=True)
class Read:
    """Where a value is read.

    Args:
        place: What reads it.
        user: The node, or the graph that gives it as a result.
        index: Which input of the node, or which output of the graph.
    """

    place: Place
    user: ir.Node | ir.Graph
    index: int


@dataclass
class Map:
    """The places of a model.

    Args:
        makers: The place that makes each float32 value.
        reads: Where each is read.
        fixed: Places that can only be float32, with the reason.
    """

    makers: dict[ir.Value, Place] = field(default_factory=dict)
    reads: dict[ir.Value, list[Read]] = field(default_factory=dict)
    fixed: dict[Place, str] = field(default_factory=dict)

    def readers(self, value: ir.Value) -> list[Place]:
        """Return the places that read a value."""
        return [read.place for read in self.reads.get(value, ())]

    def around(self, value: ir.Value) -> frozenset[Place]:
        """Return the places that must be float32 for a tensor to be: its maker and its readers."""
        return frozenset((self.makers[value], *self.readers(value)))

    def all(self) -> dict[Place, None]:
        """Return all places, in the order of the graph."""
        found: dict[Place, None] = {}
        for value, maker in self.makers.items():
            found[maker] = None
            found.update(dict.fromkeys(self.readers(value)))
        return found

    def flows(self, elements: Callable[[ir.Value], int]) -> Iterator[Flow]:
        """Yield the tensors between places, with what a cast of each costs."""
        for value, maker in self.makers.items():
            yield Flow(maker, tuple(self.readers(value)), elements(value))


def is_float(value: ir.Value | None) -> bool:
    """Return whether a value is a float32 tensor."""
    return value is not None and isinstance(value.type, ir.TensorType) and value.dtype == FLOAT


def is_plain(node: ir.Node | None, *names: str) -> bool:
    """Return whether a node's operator is one of these of the standard domain."""
    return node is not None and node.op_type in names and not node.domain


def is_neutral(place: Place) -> bool:
    """Return whether a place is a node that only moves numbers."""
    return isinstance(place, ir.Node) and is_plain(place, *NEUTRAL) and not _adds(place)


def _adds(node: ir.Node) -> bool:
    """Return whether a scatter adds or multiplies what it puts."""
    reduction = node.attributes.get("reduction")
    return reduction is not None and reduction.as_string() in ("add", "mul")


def computes(place: Place) -> bool:
    """Return whether a place is a node that computes: that neither moves nor just gives numbers."""
    return isinstance(place, ir.Node) and not is_neutral(place) and not is_plain(place, *BORN)


def port_of(value: ir.Value, role: str) -> Port:
    """Return the place of an input or output of a model."""
    name = value.name or ""
    if name.startswith(_PRESENT):
        name = _PAST + name.removeprefix(_PRESENT)
    if name.startswith(_PAST):
        return Port("", name)
    if name in _HANDED_ON or (role == "encoder" and name in _HANDED_ON.values()):
        return Port("", _HANDED_ON.get(name, name))
    return Port(role, name)


def map_of(model: ir.Model, role: str, alike: Mapping[Hashable, Hashable] | None = None) -> Map:
    """Return the places of a model; its types are known, and it has no local functions.

    Args:
        model: The model.
        role: Its role.
        alike: For the key of a weight that is equal to another one, the key that stands for both.
    """
    return _Mapper(model, role, alike or {}).run()


class _Mapper:
    def __init__(self, model: ir.Model, role: str, alike: Mapping[Hashable, Hashable]) -> None:
        self._main = model.graph
        self._role = role
        self._alike = alike
        self._definitions = Definitions(model)
        self._opset = model.opset_imports.get("", 1)
        self._map = Map()

    def run(self) -> Map:
        for value in self._main.inputs:
            self._make(value, port_of(value, self._role))
        self._graph(self._main)
        for index, value in enumerate(self._main.outputs):
            self._read(value, port_of(value, self._role), self._main, index)
        return self._map

    def _graph(self, graph: ir.Graph) -> None:
        for value in graph.initializers.values():
            if value not in self._map.makers and value.const_value is not None:
                key = key_of(value.const_value)
                self._make(value, Weight(self._alike.get(key, key)))
        for node in graph:
            if bodies_of(node):
                self._join(node)
            else:
                self._node(node)

    def _node(self, node: ir.Node) -> None:
        holds_sequences = any(_is_other_float(value) for value in (*node.inputs, *node.outputs))
        self._read_inputs(node, is_fixed=holds_sequences)
        for index, value in enumerate(node.outputs):
            if is_float(value):
                can = not holds_sequences and self._switches(node, index, is_output=True)
                self._make(value, node if can else self._fix(Fixed(value), node))

    def _read_inputs(self, node: ir.Node, *, is_fixed: bool) -> None:
        if is_plain(node, "Cast") and node.outputs[0].dtype not in (FLOAT, ir.DataType.STRING):
            return  # whatever it is given, it reads
        if is_plain(node, *DRAWN):
            return
        for index, value in enumerate(node.inputs):
            if value is None or not is_float(value):
                continue
            can = not is_fixed and self._switches(node, index, is_output=False)
            self._read(value, node if can else self._fix((node, index), node), node, index)

    def _switches(self, node: ir.Node, index: int, *, is_output: bool) -> bool:
        """Return whether an operator takes or gives float16 in a place where it takes or gives float32."""
        if is_plain(node, "Cast"):
            return node.outputs[0].dtype == FLOAT
        if is_plain(node, "Constant"):
            return constant_tensor(node) is not None
        if is_plain(node, *BORN):
            return True
        if is_plain(node, *_BOUND, *DRAWN) or _has_float_attributes(node):
            return False
        if not is_output and index in _COUNTS.get(node.op_type, ()):
            return False
        definition = self._definitions.of(node)
        if definition is None:
            return False
        formal = definition.output(index) if is_output else definition.input(index)
        return formal is not None and definition.takes(formal, HALF)

    def _fix(self, place: Place, node: ir.Node) -> Place:
        self._map.fixed[place] = f"{node.op_type} knows no float16 there"
        return place

    def _join(self, node: ir.Node) -> None:
        """Tie what goes in and out of a node's bodies."""
        if is_plain(node, "If"):
            self._branches(node)
        elif is_plain(node, "Loop") or (is_plain(node, "Scan") and self._opset >= _SCAN_AS_TODAY):
            self._loop(node)
        else:
            self._unknown(node)

    def _unknown(self, node: ir.Node) -> None:
        for index, value in enumerate(node.inputs):
            if value is not None:
                self._read(value, self._fix((node, index), node), node, index)
        for body in bodies_of(node):
            for value in body.inputs:
                self._make(value, self._fix(Fixed(value), node))
            self._graph(body)
            for index, value in enumerate(body.outputs):
                self._read(value, self._fix((body, index), node), body, index)
        for value in node.outputs:
            self._make(value, self._fix(Fixed(value), node))

    def _branches(self, node: ir.Node) -> None:
        for branch in bodies_of(node):
            self._graph(branch)
            for index, value in enumerate(branch.outputs):
                self._read(value, Joint(node, "branches", index), branch, index)
        for index, value in enumerate(node.outputs):
            self._make(value, Joint(node, "branches", index))

    def _loop(self, node: ir.Node) -> None:
        """Tie the state of a loop: what goes in, what each trip is given and gives, and what comes out.

        A Loop is given a count and a condition before its state, and its body gives a condition before it.
        """
        (body,) = bodies_of(node)
        is_loop = node.op_type == "Loop"
        states = len(body.inputs) - (0 if is_loop else node.attributes["num_scan_inputs"].as_int())
        for index, inner in enumerate(body.inputs):
            place = Joint(node, "state" if index < states else "scanned", index)
            outer = node.inputs[index] if index < len(node.inputs) else None
            if outer is not None:
                self._read(outer, place, node, index)
            self._make(inner, place)
        self._graph(body)
        shift = 1 if is_loop else 0
        for index, value in enumerate(node.outputs):
            is_state = index + 2 * shift < states
            place = Joint(node, "state", index + 2 * shift) if is_state else Joint(node, "collected", index)
            self._read(body.outputs[index + shift], place, body, index + shift)
            self._make(value, place)

    def _make(self, value: ir.Value, place: Place) -> None:
        if is_float(value):
            self._map.makers[value] = place

    def _read(self, value: ir.Value, place: Place, user: ir.Node | ir.Graph, index: int) -> None:
        if is_float(value):
            self._map.reads.setdefault(value, []).append(Read(place, user, index))


def _has_float_attributes(node: ir.Node) -> bool:
    """Return whether a node holds tensors of float32 in its attributes, which have the type of its inputs."""
    return any(
        not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR and attribute.as_tensor().dtype == FLOAT
        for attribute in node.attributes.values()
    )


def _is_other_float(value: ir.Value | None) -> bool:
    """Return whether a value is a sequence or an optional that holds float32 tensors."""
    return value is not None and value.type is not None and not is_float(value) and value.type.dtype == FLOAT
