"""Writing the precisions into a model: types, casts, weights."""

from __future__ import annotations

from collections.abc import Collection, Hashable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial

import numpy as np
import onnx_ir as ir

from passes.cast_fp16.cutting import Place
from passes.cast_fp16.places import DRAWN, FLOAT, HALF, Map, Read, Weight, is_plain
from passes.cast_fp16.weights import WORKERS
from surgery.graphs import cast_of, constant_tensor, fresh_name, graphs_of, value_names
from surgery.storage import key_of

KEPT = "cast_fp16.kept"
"""Where a node that stays in float32 says why, in its metadata."""
LOWEST = -65504.0
"""The most negative finite number of float16."""

_EAGER_BYTES = 4096
_PART = 1 << 22
# For models of other domains alone; the oldest that knows casts as they are.
_OPSET_OF_CASTS = 9
_RAISES = "cast_fp16.raises"

# The attributes that name the type of what an operator gives.
_TYPE_ATTRIBUTES: Mapping[str, str] = {
    "Bernoulli": "dtype",
    "BlackmanWindow": "output_datatype",
    "Cast": "to",
    "DequantizeLinear": "output_dtype",
    "HammingWindow": "output_datatype",
    "HannWindow": "output_datatype",
    "MelWeightMatrix": "output_datatype",
}
# Without the attribute, which is newer than they are, they give the type of an input.
_FOLLOWING = frozenset({"DequantizeLinear"})


@dataclass(frozen=True)
class Hidden:
    """What becomes of numbers below those of float16 that hide others, such as the fills of masks.

    Args:
        literals: Constants of which the float16 copy says the lowest number where the float32 one is below it.
        computed: Tensors that are raised to the lowest number before they are cast.
        ends: What is raised to it where a node reads it, by node and index.
    """

    literals: frozenset[ir.Value] = frozenset()
    computed: frozenset[ir.Value] = frozenset()
    ends: frozenset[tuple[ir.Node, int]] = frozenset()


@dataclass
class Halves:
    """The float16 copies of weights, one for all models that use a weight.

    A large one is made when it is asked for and not kept: models of any size are cast in the memory of one weight.

    Args:
        alike: For the key of a weight that is equal to another one, the key that stands for both.
    """

    alike: Mapping[Hashable, Hashable] = field(default_factory=dict)
    made: dict[Hashable, ir.TensorProtocol] = field(default_factory=dict)

    def of(self, tensor: ir.TensorProtocol, *, lowest: float | None = None) -> ir.TensorProtocol:
        """Return a weight in float16; smaller numbers become `lowest` if that is given."""
        if tensor.nbytes <= _EAGER_BYTES:
            return _halved(tensor, lowest)
        key = self.alike.get(key_of(tensor), key_of(tensor)), lowest
        if key not in self.made:
            self.made[key] = ir.LazyTensor(
                partial(_halved, tensor, lowest),
                dtype=HALF,
                shape=ir.Shape(tensor.shape.numpy()),
                name=tensor.name,
            )
        return self.made[key]


def _halved(tensor: ir.TensorProtocol, lowest: float | None) -> ir.TensorProtocol:
    return ir.tensor(as_half(tensor.numpy(), lowest), name=tensor.name)


def as_half(array: np.ndarray, lowest: float | None = None) -> np.ndarray:
    """Return an array in float16; numbers below `lowest` become that. A large one is cast by several threads."""
    flat = array.reshape(-1)
    made = np.empty(flat.shape, np.float16)

    def cast_part(start: int) -> None:
        part = flat[start : start + _PART]
        with np.errstate(over="ignore", under="ignore"):
            made[start : start + _PART] = part if lowest is None else np.maximum(part, np.float32(lowest))

    with ThreadPoolExecutor(WORKERS) as workers:
        list(workers.map(cast_part, range(0, flat.size, _PART)))
    return made.reshape(array.shape)


@dataclass(frozen=True)
class Written:
    """What casting did to a model.

    Args:
        casts: The casts that were added.
        changed: How many tensors are float16 now that were float32.
        halved: The weights that are float16 now.
        doubled: The weights that are there in both precisions.
    """

    casts: int
    changed: int
    halved: tuple[ir.TensorProtocol, ...]
    doubled: tuple[ir.TensorProtocol, ...]


def cast(
    model: ir.Model, places: Map, float32: Collection[Place], halves: Halves, hidden: Hidden | None = None
) -> Written:
    """Give every value its precision, and put casts where readers want another.

    Args:
        model: Changed in place.
        places: What `map_of` says of it.
        float32: The places in float32; all others are in float16.
        halves: Where float16 weights come from.
        hidden: What becomes of masks.
    """
    model.opset_imports.setdefault("", _OPSET_OF_CASTS)
    return _Caster(model, places, float32, halves, hidden or Hidden()).run()


class _Caster:
    def __init__(
        self, model: ir.Model, places: Map, float32: Collection[Place], halves: Halves, hidden: Hidden
    ) -> None:
        self._main = model.graph
        self._names = value_names(model.graph)
        self._places = places
        self._float32 = float32
        self._halves = halves
        self._hidden = hidden
        self._casts = 0
        self._changed = 0
        self._halved: list[ir.TensorProtocol] = []
        self._doubled: list[ir.TensorProtocol] = []
        self._lowest: dict[ir.DataType, ir.Value] = {}
        self._home = {
            value: graph for graph in graphs_of(model.graph) for value in (*graph.inputs, *graph.initializers.values())
        }

    def run(self) -> Written:
        """Cast values in the order in which they are made."""
        for value, maker in self._places.makers.items():
            is_half = maker not in self._float32
            reads = self._places.reads.get(value, ())
            others = [read for read in reads if (read.place in self._float32) == is_half]
            is_weight, is_constant = isinstance(maker, Weight), constant_tensor(value.producer()) is not None
            if (is_weight or is_constant) and len(others) == len(reads):
                is_half, others = bool(reads) and not is_half, []  # it is what it is read as
            if is_constant:
                self._constant(value, others, is_half=is_half)
            elif is_weight:
                self._weight(value, others, is_half=is_half)
            else:
                self._computed(value, others, is_half=is_half)
        for node, index in sorted(self._hidden.ends, key=lambda end: (end[0].outputs[0].name or "", end[1])):
            self._raise_end(node, index)
        return Written(self._casts, self._changed, tuple(self._halved), tuple(self._doubled))

    def _computed(self, value: ir.Value, others: Sequence[Read], *, is_half: bool) -> None:
        if is_half:
            self._halve(value)
        else:
            self._stay(value.producer())
        if all(
            isinstance(read.user, ir.Node) and is_plain(read.user, "Cast") and read.place is read.user
            for read in others
        ):
            return  # they cast themselves
        self._cast(value, FLOAT if is_half else HALF, others)

    def _halve(self, value: ir.Value) -> None:
        """Let a value be born in float16."""
        value.type = ir.TensorType(HALF)
        self._changed += 1
        node = value.producer()
        if node is None:
            if value.is_initializer() and value.const_value is not None:
                value.const_value = self._halves.of(value.const_value)
            return
        if node.domain:
            return
        if node.op_type == "ConstantOfShape":
            given = node.attributes.get("value")
            array = given.as_tensor().numpy() if given is not None else np.zeros(1, np.float32)
            half = as_half(array, self._lowest_of(value))
            node.attributes["value"] = ir.AttrTensor("value", ir.tensor(half))
        name = _TYPE_ATTRIBUTES.get(node.op_type)
        if name is not None and (name in node.attributes or node.op_type not in _FOLLOWING):
            node.attributes[name] = ir.AttrInt64(name, int(HALF))

    @staticmethod
    def _stay(node: ir.Node | None) -> None:
        """Let a node that gives the type of its input say that it gives float32."""
        if is_plain(node, *DRAWN) and node is not None and node.inputs and "dtype" not in node.attributes:
            given = node.inputs[0]
            if given is not None and given.dtype == HALF:
                node.attributes["dtype"] = ir.AttrInt64("dtype", int(FLOAT))

    def _lowest_of(self, value: ir.Value) -> float | None:
        return LOWEST if value in self._hidden.literals else None

    def _weight(self, value: ir.Value, others: Sequence[Read], *, is_half: bool) -> None:
        """Hold a weight in the precisions that it is read in: two copies where both are."""
        tensor, graph = value.const_value, value.graph
        assert tensor is not None
        assert graph is not None
        half = self._halves.of(tensor, lowest=self._lowest_of(value))
        if others:
            dtype = FLOAT if is_half else HALF
            other = ir.Value(
                name=fresh_name(self._wish(value, dtype, others), self._names),
                type=ir.TensorType(dtype),
                shape=value.shape,
                const_value=tensor if is_half else half,
            )
            self._give(other, others)
            self._register(graph, value, other)
            self._changed += not is_half
        if is_half:
            value.type = ir.TensorType(HALF)
            value.const_value = half
            self._changed += 1
        if is_half or others:
            (self._doubled if others else self._halved).append(tensor)

    @staticmethod
    def _register(graph: ir.Graph, value: ir.Value, other: ir.Value) -> None:
        """Put a new initializer beside another one, which may have another name by now."""
        for name in [name for name, one in graph.initializers.items() if one is value and name != value.name]:
            del graph.initializers[name]
            graph.register_initializer(value)
        graph.register_initializer(other)

    def _constant(self, value: ir.Value, others: Sequence[Read], *, is_half: bool) -> None:
        """Let a `Constant` be of the type that it is read in, with a second one where both are."""
        node = value.producer()
        tensor = constant_tensor(node)
        assert node is not None
        assert tensor is not None
        half = ir.tensor(as_half(tensor.numpy(), self._lowest_of(value)), name=tensor.name)
        if others:
            twin = ir.node("Constant", [], {"value": tensor if is_half else half})
            (made,) = twin.outputs
            dtype = FLOAT if is_half else HALF
            made.name = fresh_name(self._wish(value, dtype, others), self._names)
            made.type, made.shape = ir.TensorType(dtype), value.shape
            assert node.graph is not None
            node.graph.insert_after(node, twin)
            self._give(made, others)
            self._changed += not is_half
        if is_half:
            node.attributes.clear()
            node.attributes["value"] = ir.AttrTensor("value", half)
            value.type = ir.TensorType(HALF)
            self._changed += 1

    def _cast(self, value: ir.Value, dtype: ir.DataType, others: Sequence[Read]) -> None:
        is_raised = dtype == HALF and value in self._hidden.computed
        given = self._raised(value) if is_raised else value
        node = cast_of(given, dtype, self._names, self._wish(value, dtype, others))
        self._insert_after(given, node)
        self._casts += 1
        self._give(node.outputs[0], others)

    def _insert_after(self, value: ir.Value, node: ir.Node) -> None:
        """Put a node where a value is there: behind the one that gives it, or first in the graph."""
        producer = value.producer()
        if producer is not None:
            assert producer.graph is not None
            producer.graph.insert_after(producer, node)
            return
        graph = self._home[value]
        first = next(iter(graph), None)
        if first is None:
            graph.append(node)
        else:
            graph.insert_before(first, node)

    def _raised(self, value: ir.Value) -> ir.Value:
        """Raise what is below the numbers of float16 to the lowest of them."""
        assert value.dtype is not None
        node = ir.node("Max", [value, self._lowest_constant(value.dtype)])
        (made,) = node.outputs
        made.name = fresh_name(f"{value.name}/raised", self._names)
        made.type, made.shape = ir.TensorType(value.dtype), value.shape
        if value.dtype == FLOAT:
            node.metadata_props[KEPT] = f"{value.name}: fills of masks are made finite for float16"
        self._insert_after(value, node)
        return made

    def _lowest_constant(self, dtype: ir.DataType) -> ir.Value:
        if dtype not in self._lowest:
            value = ir.Value(
                name=fresh_name(f"lowest/{dtype.name.lower()}", self._names),
                type=ir.TensorType(dtype),
                shape=ir.Shape(()),
                const_value=ir.tensor(np.array(LOWEST, dtype.numpy())),
            )
            self._main.register_initializer(value)
            self._lowest[dtype] = value
        return self._lowest[dtype]

    def _raise_end(self, node: ir.Node, index: int) -> None:
        value = node.inputs[index]
        assert value is not None
        known = next((user for user, _ in value.uses() if user.meta.get(_RAISES) is value), None)
        if known is None:
            made = self._raised(value)
            known = made.producer()
            assert known is not None
            known.meta[_RAISES] = value
        node.replace_input_with(index, known.outputs[0])

    def _wish(self, value: ir.Value, dtype: ir.DataType, others: Sequence[Read]) -> str:
        """Return the name of what stands for a value in another type; a result of the model keeps its own."""
        name = value.name or ""
        if not any(read.user is self._main for read in others):
            return f"{name}/{dtype.name.lower()}"
        own = HALF if dtype == FLOAT else FLOAT
        value.name = fresh_name(f"{name}/{own.name.lower()}", self._names)
        self._names[name] -= 1
        return name

    @staticmethod
    def _give(made: ir.Value, others: Sequence[Read]) -> None:
        """Let readers read another value."""
        for read in others:
            if isinstance(read.user, ir.Node):
                read.user.replace_input_with(read.index, made)
            else:
                read.user.outputs[read.index] = made
