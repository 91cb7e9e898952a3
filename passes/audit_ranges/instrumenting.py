"""A model that also measures itself: a few numbers of every float32 tensor leave the runtime, no tensor does."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from passes.audit_ranges.keys import key_of_value, keyed_values, scope_name
from surgery.accuracy.half import holds_half, lower_half
from surgery.accuracy.half.assumptions import Assumption, assumption
from surgery.element_types import Definitions, infer_types
from surgery.errors import Refused
from surgery.graphs import bodies_of, graphs_of, named_bodies_of, value_names
from surgery.templates import Template, numbered

FLOAT = ir.DataType.FLOAT
OLDEST_OPSET = 11

# What is measured of a tensor. Of several runs, trips and branches maxima join by the larger, the others by adding. A
# tensor gets one zero more before it is measured, so that none is empty; `runs` says how many that were.
MAXIMA = ("high", "minus_low", "minus_smallest", "fraction")
COUNTS = ("finite", "infinite", "nan", "zero", "gone", "small", "runs")
SQUARES = ("squares",)
# What is measured of a node that also computes in half precision.
ERROR_MAXIMA = ("error",)
ERROR_COUNTS = ("compared",)
ERROR_SQUARES = ("squared_errors",)

TABLES = ("maxima", "counts", "squares")
_TYPES = {"maxima": ir.DataType.FLOAT, "counts": ir.DataType.INT64, "squares": ir.DataType.DOUBLE}

# What all templates share, as initializers of the main graph.
_CONSTANTS: Mapping[str, np.ndarray] = {
    "row": np.array([1, -1], np.int64),
    "nothing": np.zeros((1, 1), np.float32),
    "zero": np.array(0, np.float32),
    "infinity": np.array(np.inf, np.float32),
    "nowhere": np.array(-np.inf, np.float32),
    # Below the first a number becomes one with fewer digits in float16, below the second zero: 2**-14 and 2**-24 are
    # the smallest of either sort, and what lies half way between two numbers goes to the even one.
    "normal": np.array(2.0**-14 - 2.0**-25, np.float32),
    "gone": np.nextafter(np.float32(2.0**-25), np.float32(1)),
    "most": np.array(1e18, np.float32),  # its square fits into float32
    "first": np.array([0], np.int64),
    "second": np.array([1], np.int64),
    "once": np.array([1], np.int32),
    "one_row": np.array([1], np.int64),
    "behind": np.array([1], np.int64),
    "end": np.array([np.iinfo(np.int64).max], np.int64),
}

_STATISTICS = """
g (float x, int64 row, float nothing, float zero, float infinity, float normal, float gone, float most, int64 second,
   int32 once) => (float maxima, int64 counts, double squares) {
    flat = Reshape(x, row)
    padded = Concat <axis = 1> (flat, nothing)
    size = Abs(padded)
    is_finite = Less(size, infinity)
    is_infinite = Equal(size, infinity)
    is_nan = IsNaN(padded)
    finite = Where(is_finite, padded, zero)
    magnitude = Abs(finite)
    is_zero = Equal(finite, zero)
    is_gone = Less(magnitude, gone)
    is_small = Less(magnitude, normal)

    high = ReduceMax <keepdims = 0> (finite, second)
    low = ReduceMin <keepdims = 0> (finite, second)
    minus_low = Neg(low)
    others = Where(is_zero, infinity, magnitude)
    smallest = ReduceMin <keepdims = 0> (others, second)
    minus_smallest = Neg(smallest)
    whole = Floor(finite)
    fraction = Sub(finite, whole)
    largest_fraction = ReduceMax <keepdims = 0> (fraction, second)
    maxima = Concat <axis = 0> (high, minus_low, minus_smallest, largest_fraction)

    conditions = Concat <axis = 0> (is_finite, is_infinite, is_nan, is_zero, is_gone, is_small)
    ones = Cast <to = 6> (conditions)
    sums = ReduceSum <keepdims = 0> (ones, second)
    narrow_counts = Concat <axis = 0> (sums, once)
    counts = Cast <to = 7> (narrow_counts)

    bounded = Min(magnitude, most)
    sum_of_squares = ReduceSumSquare <keepdims = 0> (bounded, second)
    squares = Cast <to = 11> (sum_of_squares)
}
"""

_DIFFERENCE = """
g (float exact, float half, int64 row, float nothing, float zero, float most, int64 second)
   => (float maxima, int64 counts, double squares) {
    narrow = Cast <to = 10> (half)
    rounded = Cast <to = 1> (narrow)
    difference = Sub(exact, rounded)
    distance = Abs(difference)
    flat = Reshape(distance, row)
    padded = Concat <axis = 1> (flat, nothing)
    is_compared = Less(padded, most)
    usable = Where(is_compared, padded, zero)
    maxima = ReduceMax <keepdims = 0> (usable, second)
    ones = Cast <to = 6> (is_compared)
    narrow_counts = ReduceSum <keepdims = 0> (ones, second)
    counts = Cast <to = 7> (narrow_counts)
    sum_of_squares = ReduceSumSquare <keepdims = 0> (usable, second)
    squares = Cast <to = 11> (sum_of_squares)
}
"""

_ROUND = """
g (float x) => (float rounded) {
    narrow = Cast <to = 10> (x)
    rounded = Cast <to = 1> (narrow)
}
"""

# Joins what the trips of a loop measured: [trips, n] to [n]. One row more, since there may be no trip.
_COLLECT = """
g (float maxima, int64 counts, double squares, float nowhere, int64 first, int64 one_row, int64 behind, int64 end)
   => (float joined_maxima, int64 joined_counts, double joined_squares) {
    shape = Shape(maxima)
    columns = Slice(shape, behind, end)
    row_shape = Concat <axis = 0> (one_row, columns)
    lowest = Expand(nowhere, row_shape)
    more = Concat <axis = 0> (lowest, maxima)
    joined_maxima = ReduceMax <keepdims = 0> (more, first)
    joined_counts = ReduceSum <keepdims = 0> (counts, first)
    joined_squares = ReduceSum <keepdims = 0> (squares, first)
}
"""


@dataclass(frozen=True)
class Row:
    """What one measurement tells of.

    Args:
        key: The value, as `key_of_value` names it.
        is_error: It is the error that half precision makes at the node that gives the value.
    """

    key: str
    is_error: bool = False

    @property
    def columns(self) -> Mapping[str, tuple[str, ...]]:
        """The names of the numbers that it has in each table."""
        if self.is_error:
            return {"maxima": ERROR_MAXIMA, "counts": ERROR_COUNTS, "squares": ERROR_SQUARES}
        return {"maxima": MAXIMA, "counts": COUNTS, "squares": SQUARES}


@dataclass(frozen=True)
class Instrumented:
    """A model with an output more for each of TABLES, and what these hold.

    Args:
        model: The model.
        tables: The name of each new output: one axis, the columns of all rows one after the other.
        rows: What the rows tell of.
        same: Keys of values that hold the numbers of another, in another shape, by that other's key.
    """

    model: ir.Model
    tables: Mapping[str, str]
    rows: tuple[Row, ...]
    same: Mapping[str, str] = field(default_factory=dict)


def instrument(model: ir.Model) -> Instrumented | None:
    """Return a copy of a model that measures its float32 tensors, in every scope, and what half precision does to them.

    Of a model without any there is none.

    Beside each node that computes stands its like: it is given the same numbers rounded to float16, and what it gives
    is rounded too. The difference is what half precision alone does at that node. What is float16 already is emulated,
    since ONNX Runtime's CPU provider would compute it in float32, and is not measured.

    Raises:
        Refused: There are bodies that cannot be seen into, or the operator set is too old.
    """
    measured = model.clone()
    if measured.functions:
        InlinePass()(measured)
    infer_types(measured)
    opset = measured.opset_imports.get("", 1)
    if opset < OLDEST_OPSET:
        raise Refused(f"opset {opset} is too old to be measured", hint=f"export for opset {OLDEST_OPSET} or newer")
    keys = frozenset(key for key, value in keyed_values(measured.graph) if _is_float(value))
    for graph in graphs_of(measured.graph):
        for node in graph:
            if bodies_of(node):  # which are called by its result otherwise, and that may get another name
                node.name = node.name or node.outputs[0].name
    return _Instrumenter(lower_half(measured) if holds_half(measured) else measured, opset, keys).run()


@dataclass(frozen=True)
class _Probe:
    """Values of a graph that hold measurements, one for each of TABLES, and what these tell of."""

    values: tuple[ir.Value, ...]
    rows: tuple[Row, ...]


# Their results are drawn anew each time, so two runs of one differ.
_RANDOM = frozenset(
    {
        *("Bernoulli", "Dropout", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform"),
        "RandomUniformLike",
    }
)
_NO_ARITHMETIC = frozenset({"Cast", "CastLike", "Constant", "DequantizeLinear", "QuantizeLinear"})
# They give the numbers of their first input in another shape or order.
_RESHAPING = frozenset({"Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})


class _Instrumenter:
    def __init__(self, model: ir.Model, opset: int, wanted: frozenset[str]) -> None:
        self._model = model
        self._wanted = wanted
        self._definitions = Definitions(model)
        self._main = model.graph
        self._names = numbered(_free_prefix("audit/", value_names(model.graph)))
        self._shared = {name: self._initializer(array) for name, array in _CONSTANTS.items()}
        self._templates = {
            name: Template(_for_opset(text, opset), opset=opset)
            for name, text in {
                "statistics": _STATISTICS,
                "difference": _DIFFERENCE,
                "round": _ROUND,
                "collect": _COLLECT,
            }.items()
        }
        self._weights: set[ir.Value] = set()
        self._keys: dict[ir.Value, str] = {}
        self._same: dict[str, str] = {}

    def run(self) -> Instrumented | None:
        """Instrument all graphs."""
        probe = self._graph(self._main, "")
        if probe is None:
            return None
        self._main.outputs.extend(probe.values)
        names = {table: value.name or "" for table, value in zip(TABLES, probe.values, strict=True)}
        return Instrumented(self._model, names, probe.rows, self._same)

    def _initializer(self, array: np.ndarray) -> ir.Value:
        tensor = ir.tensor(array)
        value = ir.Value(
            name=next(self._names), type=ir.TensorType(tensor.dtype), shape=ir.Shape(array.shape), const_value=tensor
        )
        self._main.register_initializer(value)
        return value

    def _graph(self, graph: ir.Graph, path: str) -> _Probe | None:
        nodes = tuple(graph)
        probes: list[_Probe] = []
        rounded: dict[ir.Value, ir.Value] = {}
        if graph is self._main and nodes:
            for value in graph.inputs:
                if self._is_measured(value, path):
                    made: list[ir.Node] = []
                    probes.append(self._measure(value, path, made))
                    graph.insert_before(nodes[0], made)
        for node in nodes:
            probes += self._node(node, graph, path, rounded)
        return self._joined(graph, probes)

    def _node(self, node: ir.Node, graph: ir.Graph, path: str, rounded: dict[ir.Value, ir.Value]) -> Iterable[_Probe]:
        measured = [value for value in node.outputs if self._is_measured(value, path)]
        if bodies_of(node):
            yield from self._bodies(node, graph, path)  # which gives the node more outputs
        made: list[ir.Node] = []
        for value in measured:
            if not self._takes_over(value, node, path):
                yield self._measure(value, path, made)
        if measured and self._computes(node):
            twin = self._in_half(node, rounded, made)
            for value, half in zip(node.outputs, twin.outputs, strict=True):
                if value in measured:
                    yield self._draw(
                        "difference", made, (Row(self._keys[value], is_error=True),), exact=value, half=half
                    )
        graph.insert_after(node, made)

    def _takes_over(self, value: ir.Value, node: ir.Node, path: str) -> bool:
        """Note that a value holds the numbers of another of the same graph that is known, where that is so."""
        source = node.inputs[0] if node.inputs else None
        if node.domain or node.op_type not in _RESHAPING or source is None:
            return False
        if source.is_initializer() or source in self._weights:
            self._weights.add(value)
            return True
        if self._keys.get(source) != key_of_value(source, path):
            return False  # it is captured: a body may run more often, or not at all
        self._keys[value] = key_of_value(value, path)
        self._same[self._keys[value]] = self._keys[source]
        return True

    def _is_measured(self, value: ir.Value, path: str) -> bool:
        return _is_float(value) and key_of_value(value, path) in self._wanted

    def _computes(self, node: ir.Node) -> bool:
        """Return whether a node does arithmetic that half precision would change."""
        if node.op_type in _RANDOM or node.op_type in _NO_ARITHMETIC or bodies_of(node):
            return False
        return assumption(node) is not Assumption.MOVES and any(
            self._takes_half(node, index) for index in range(len(node.inputs))
        )

    def _takes_half(self, node: ir.Node, index: int) -> bool:
        """Return whether a node is given float32 where it could be given float16: scales of a Resize are not."""
        definition, value = self._definitions.of(node), node.inputs[index]
        formal = definition.input(index) if definition is not None else None
        if definition is None or formal is None or value is None or not _is_float(value):
            return False
        return definition.takes(formal, ir.DataType.FLOAT16)

    def _measure(self, value: ir.Value, path: str, made: list[ir.Node]) -> _Probe:
        self._keys[value] = key_of_value(value, path)
        return self._draw("statistics", made, (Row(self._keys[value]),), x=value)

    def _draw(self, name: str, made: list[ir.Node], rows: tuple[Row, ...], **given: ir.Value) -> _Probe:
        """Draw a template once more."""
        return _Probe(self._drawn(name, made, **given), rows)

    def _drawn(self, name: str, made: list[ir.Node], **given: ir.Value) -> tuple[ir.Value, ...]:
        template = self._templates[name]
        inputs = [given.get(wanted) or self._shared[wanted] for wanted in template.inputs]
        nodes, outputs = template.nodes(inputs, self._names)
        made += nodes
        return tuple(outputs)

    def _in_half(self, node: ir.Node, rounded: dict[ir.Value, ir.Value], made: list[ir.Node]) -> ir.Node:
        """Run a node once more, on rounded numbers."""
        inputs: list[ir.Value | None] = []
        for index, value in enumerate(node.inputs):
            if value is None or not self._takes_half(node, index):
                inputs.append(value)
                continue
            if value not in rounded:
                (rounded[value],) = self._drawn("round", made, x=value)
            inputs.append(rounded[value])
        attributes = tuple(node.attributes.values())
        twin = ir.Node(node.domain, node.op_type, inputs, attributes, num_outputs=len(node.outputs))
        for value, half in zip(node.outputs, twin.outputs, strict=True):
            half.name = next(self._names) if value.name else ""
            half.type = copy.copy(value.type)
        made.append(twin)
        return twin

    def _bodies(self, node: ir.Node, graph: ir.Graph, path: str) -> Iterable[_Probe]:
        if node.domain or node.op_type not in ("If", "Loop", "Scan"):
            raise Refused(
                f"nobody can see into {node.op_type!r} {node.name or node.outputs[0].name!r}",
                hint="audit before the step that makes it, or leave this model out: models: [...]",
            )
        inner = {name: self._graph(body, f"{path}{scope_name(node, name)}/") for name, body in named_bodies_of(node)}
        if node.op_type == "If":
            yield from self._branches(node, inner)
        elif inner["body"] is not None:
            yield self._trips(node, inner["body"], graph)

    def _branches(self, node: ir.Node, inner: Mapping[str, _Probe | None]) -> Iterable[_Probe]:
        """Let each branch give what it measures, and nothing in the place of what the other one measures."""
        for name, probe in inner.items():
            if probe is None:
                continue
            for other in inner:
                body = node.attributes[other].as_graph()
                body.outputs.extend(probe.values if other == name else self._nothing(body, probe.rows))
            yield _Probe(self._received(node), probe.rows)

    def _nothing(self, graph: ir.Graph, rows: Sequence[Row]) -> Sequence[ir.Value]:
        made: list[ir.Value] = []
        for table in TABLES:
            empty = np.full(_width(rows, table), -np.inf if table == "maxima" else 0)
            constant = ir.node("Constant", [], {"value": ir.tensor(empty.astype(_TYPES[table].numpy()))})
            (value,) = constant.outputs
            value.name = next(self._names)
            _describe(value, table, rows)
            graph.append(constant)
            made.append(value)
        return made

    def _trips(self, node: ir.Node, probe: _Probe, graph: ir.Graph) -> _Probe:
        """Let a loop give what each trip measures, and join that after it."""
        node.attributes["body"].as_graph().outputs.extend(probe.values)
        for name in ("scan_output_axes", "scan_output_directions"):
            attribute = node.attributes.get(name)
            if attribute is not None:
                node.attributes[name] = ir.AttrInt64s(name, (*attribute.as_ints(), *(0 for _ in TABLES)))
        given = dict(zip(TABLES, self._received(node), strict=True))
        made: list[ir.Node] = []
        joined = self._draw("collect", made, probe.rows, **given)
        graph.insert_after(node, made)
        return joined

    def _received(self, node: ir.Node) -> tuple[ir.Value, ...]:
        """Give a node an output more for each table."""
        count = len(node.outputs)
        node.resize_outputs(count + len(TABLES))
        values = node.outputs[count:]
        for value, table in zip(values, TABLES, strict=True):
            value.name = next(self._names)
            value.type = ir.TensorType(_TYPES[table])
        return tuple(values)

    def _joined(self, graph: ir.Graph, probes: Sequence[_Probe]) -> _Probe | None:
        if not probes:
            return None
        rows = tuple(row for probe in probes for row in probe.rows)
        values: list[ir.Value] = []
        for number, table in enumerate(TABLES):
            concat = ir.node("Concat", [probe.values[number] for probe in probes], {"axis": 0})
            (value,) = concat.outputs
            value.name = next(self._names)
            _describe(value, table, rows)
            graph.append(concat)
            values.append(value)
        return _Probe(tuple(values), rows)


def _describe(value: ir.Value, table: str, rows: Sequence[Row]) -> None:
    value.type, value.shape = ir.TensorType(_TYPES[table]), ir.Shape((_width(rows, table),))


def _width(rows: Sequence[Row], table: str) -> int:
    return sum(len(row.columns[table]) for row in rows)


def _is_float(value: ir.Value) -> bool:
    return isinstance(value.type, ir.TensorType) and value.dtype == FLOAT and bool(value.name)


def _for_opset(text: str, opset: int) -> str:
    """Write the axes of reductions as the operator set does: before 18 (of sums 13) they are attributes."""
    for axis, name in enumerate(("first", "second")):
        for reduction in ("ReduceMax", "ReduceMin", "ReduceSumSquare", "ReduceSum"):
            if opset < (13 if reduction == "ReduceSum" else 18):
                text = re.sub(
                    rf"{reduction} <keepdims = 0> \((\w+), {name}\)",
                    rf"{reduction} <keepdims = 0, axes = [{axis}]> (\1)",
                    text,
                )
    return text


def _free_prefix(wish: str, taken: Iterable[str]) -> str:
    """Return a prefix that no name has."""
    prefix = wish
    while any(name.startswith(prefix) for name in taken):
        prefix = f"{prefix[:-1]}_/"
    return prefix
