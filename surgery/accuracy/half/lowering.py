"""Lowering a model in half precision to float32: every number that a GPU would round is rounded, by explicit casts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from surgery.accuracy.half.assumptions import Assumption, assumption
from surgery.element_types import infer_types
from surgery.errors import StepFailed
from surgery.graphs import bodies_of, cast_of, graphs_of, value_names

FLOAT = ir.DataType.FLOAT
HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_TYPE_ATTRIBUTES = ("dtype", "output_dtype", "output_datatype", "precision", "softmax_precision", "stash_type")


def holds_half(model: ir.Model) -> bool:
    """Return whether any tensor of a model is of half precision; local functions are believed to be where one is."""
    if any(_is_half(value) for value in (*model.graph.inputs, *model.graph.outputs)):
        return True
    bodies = [graph for function in model.functions.values() for graph in graphs_of(function.graph)]
    for graph in (*graphs_of(model.graph), *bodies):
        if any(tensor is not None and tensor.dtype in HALVES for tensor in _tensors(graph)):
            return True
        if any(_names_half(node) for node in graph):
            return True
    return False


def _tensors(graph: ir.Graph) -> Iterator[ir.TensorProtocol | None]:
    yield from (value.const_value for value in graph.initializers.values())
    for node in graph:
        for attribute in node.attributes.values():
            if not attribute.is_ref() and attribute.type == ir.AttributeType.TENSOR:
                yield attribute.as_tensor()


def _names_half(node: ir.Node) -> bool:
    """Return whether a node's attributes ask for half precision."""
    for name in ("to", *_TYPE_ATTRIBUTES):
        attribute = node.attributes.get(name)
        if attribute is None or attribute.is_ref() or attribute.type != ir.AttributeType.INT:
            continue
        if attribute.as_int() in HALVES:
            return True
    return any(_is_half(value) for value in node.outputs)


def lower_half(model: ir.Model) -> ir.Model:
    """Return a model that computes in float32 what a GPU computes in half precision; the given one stays as it is.

    Inputs and outputs keep their names and types. Inside, each tensor of float16 (or bfloat16) becomes one of float32
    that holds only numbers of its old type: weights are widened, and what an operator computes goes through a pair of
    casts, to its old type and back, which ONNX Runtime carries out on any provider and at any optimization level. It
    computes float16 graphs on the CPU in float32 otherwise, and rounds only where they begin and end. What is assumed
    of each operator says `surgery.accuracy.half.assumptions`.

    Args:
        model: Any valid model, with subgraphs, local functions and operators of ONNX Runtime.

    Raises:
        StepFailed: A value is of a type that cannot be told, or an input or output is a sequence of half precision.
    """
    lowered = model.clone()
    if lowered.functions:
        InlinePass()(lowered)
    infer_types(lowered)
    _refuse(lowered.graph)
    _Lowering(lowered).run()
    return lowered


def _refuse(main: ir.Graph) -> None:
    """Raise where the lowering would not know what to do."""
    for value in (*main.inputs, *main.outputs):
        if _is_half(value) and not isinstance(value.type, ir.TensorType):
            raise StepFailed(
                f"{value.name!r} is no tensor but holds numbers of half precision, which cannot be emulated",
                hint="--no-check, or run it where half precision is computed",
            )
    for graph in graphs_of(main):
        for node in graph:
            unknown = next((value for value in node.outputs if value.type is None), None)
            if unknown is not None and any(_is_half(value) for value in node.inputs):
                raise StepFailed(
                    f"{node.name or unknown.name!r}: nobody knows what {node.op_type!r} gives for half precision",
                    hint="write the types of its outputs into the model, or --no-check",
                )


class _Lowering:
    def __init__(self, model: ir.Model) -> None:
        self._main = model.graph
        self._names = value_names(model.graph)
        self._graphs = tuple(graphs_of(model.graph))
        # What each node is given that must stay as it is, found before anything is widened.
        self._kept: dict[ir.Node, dict[int, ir.DataType]] = {
            node: _half_inputs(node) for graph in self._graphs for node in graph if _shows_bits(node)
        }

    def run(self) -> None:
        """Lower all graphs, the outer ones first: what a body captures is widened outside."""
        for graph in self._graphs:
            nodes = tuple(graph)
            self._widen_inputs(graph, nodes)
            for node in nodes:
                self._lower(node)

    def _widen_inputs(self, graph: ir.Graph, nodes: Sequence[ir.Node]) -> None:
        """Widen the weights of a graph and the model's inputs; inputs of a body are what the node outside gives.

        Each is widened where it is first read, so a session that runs nodes in their order holds one wide at a time.
        """
        is_main = graph is self._main
        weights = [value for value in graph.initializers.values() if _is_half(value)]
        inputs = [value for value in graph.inputs if _is_half(value) and not value.is_initializer()]
        if not is_main:
            for value in inputs:
                _widen(value)
            inputs = []
        readers = _first_readers(nodes)
        for value in (*inputs, *weights):
            cast = cast_of(value, FLOAT, self._names)
            if value in readers:
                graph.insert_before(readers[value], cast)
            else:
                graph.append(cast)
            self._replace(value, cast, is_result_too=not is_main)

    def _lower(self, node: ir.Node) -> None:
        if node.op_type == "CastLike" and not node.domain:
            node = _as_cast(node, self._kept)
        if _is_constant(node) or _is_cast_to_half(node) or node in self._kept:
            self._keep(node)
        else:
            self._compute(node)

    def _keep(self, node: ir.Node) -> None:
        """Let a node give half precision, since that is what it is for, and widen it then."""
        assert node.graph is not None
        for index, dtype in self._kept.get(node, {}).items():
            value = node.inputs[index]
            assert value is not None
            cast = cast_of(value, dtype, self._names)
            node.graph.insert_before(node, cast)
            node.replace_input_with(index, cast.outputs[0])
        for output in node.outputs:
            if _is_half(output):
                cast = cast_of(output, FLOAT, self._names)
                node.graph.insert_after(node, cast)
                self._replace(output, cast, is_result_too=node.graph is not self._main)

    def _compute(self, node: ir.Node) -> None:
        """Let a node compute in float32, and round what it gives."""
        _set_attributes(node)
        moves = assumption(node) is Assumption.MOVES
        for output in node.outputs:
            if not _is_half(output):
                continue
            dtype = output.dtype
            is_result = output.is_graph_output() and node.graph is self._main
            _widen(output)
            if not output.name:
                continue  # an optional result that nobody asked for
            if dtype is not None and isinstance(output.type, ir.TensorType) and (is_result or not moves):
                self._round(output, dtype, is_result=is_result)

    def _round(self, output: ir.Value, dtype: ir.DataType, *, is_result: bool) -> None:
        """Send what a node gives through half precision; a result of the model is the number between both casts."""
        node = output.producer()
        assert node is not None
        assert node.graph is not None
        narrowing = cast_of(output, dtype, self._names)
        node.graph.insert_after(node, narrowing)
        narrow = narrowing.outputs[0]
        if is_result:
            self._main.outputs[:] = [narrow if value is output else value for value in self._main.outputs]
            narrow.name, output.name = output.name, narrow.name
            if all(user is narrowing for user, _ in output.uses()):
                return
        widening = cast_of(narrow, FLOAT, self._names)
        node.graph.insert_after(narrowing, widening)
        self._replace(output, widening, but=narrowing, is_result_too=not is_result)

    def _replace(self, value: ir.Value, cast: ir.Node, *, but: ir.Node | None = None, is_result_too: bool) -> None:
        """Let all use what a cast gives in place of a value, but for one node and the cast itself."""
        wide = cast.outputs[0]
        for user, index in tuple(value.uses()):
            if user not in (cast, but):
                user.replace_input_with(index, wide)
        if not is_result_too or not value.is_graph_output():
            return
        for graph in self._graphs:
            if graph is not self._main and any(output is value for output in graph.outputs):
                graph.outputs[:] = [wide if output is value else output for output in graph.outputs]


def _first_readers(nodes: Sequence[ir.Node]) -> dict[ir.Value, ir.Node]:
    """Return the first of these nodes that reads a value, itself or in its bodies."""
    found: dict[ir.Value, ir.Node] = {}
    for node in nodes:
        inner = (one for body in bodies_of(node) for graph in graphs_of(body) for one in graph)
        for reader in (node, *inner):
            for value in reader.inputs:
                if value is not None:
                    found.setdefault(value, node)
        for body in bodies_of(node):
            for graph in graphs_of(body):
                for value in graph.outputs:
                    found.setdefault(value, node)
    return found


def _is_half(value: ir.Value | None) -> bool:
    """Return whether a value is a tensor of half precision, or a sequence or optional of such."""
    return value is not None and value.type is not None and value.type.dtype in HALVES


def _widen(value: ir.Value) -> None:
    value.type = _wide(value.type)


def _wide(type_: ir.TypeProtocol | None) -> ir.TypeProtocol:
    if isinstance(type_, ir.SequenceType):
        return ir.SequenceType(_wide(type_.elem_type))
    if isinstance(type_, ir.OptionalType):
        return ir.OptionalType(_wide(type_.elem_type))
    return ir.TensorType(FLOAT)


def _half_inputs(node: ir.Node) -> dict[int, ir.DataType]:
    return {
        index: value.dtype
        for index, value in enumerate(node.inputs)
        if value is not None and value.dtype is not None and _is_half(value)
    }


def _shows_bits(node: ir.Node) -> bool:
    """Return whether a node tells float16 from the same number in float32: it reads the bits, or prints the number."""
    if node.domain or not any(_is_half(value) for value in node.inputs):
        return False
    if node.op_type in ("Cast", "CastLike"):
        return node.outputs[0].dtype == ir.DataType.STRING
    return node.op_type == "BitCast"


def _is_constant(node: ir.Node) -> bool:
    return node.op_type == "Constant" and not node.domain


def _is_cast_to_half(node: ir.Node) -> bool:
    return node.op_type in ("Cast", "BitCast") and not node.domain and _is_half(node.outputs[0])


def _as_cast(node: ir.Node, kept: dict[ir.Node, dict[int, ir.DataType]]) -> ir.Node:
    """Turn a `CastLike` into a `Cast`: the value that it looks at will be of another type."""
    (output,) = node.outputs
    assert output.dtype is not None
    assert node.graph is not None
    cast = ir.node("Cast", [node.inputs[0]], {"to": int(output.dtype)}, name=node.name)
    (made,) = cast.outputs
    made.name, made.type, made.shape = output.name, ir.TensorType(output.dtype), output.shape
    node.graph.insert_before(node, cast)
    ir.convenience.replace_all_uses_with(output, made, replace_graph_outputs=True)
    if node in kept:
        kept[cast] = {index: dtype for index, dtype in kept.pop(node).items() if index == 0}
    node.graph.remove(node, safe=True)
    return cast


def _set_attributes(node: ir.Node) -> None:
    """Let attributes that name a half type name float32."""
    for name in _TYPE_ATTRIBUTES:
        attribute = node.attributes.get(name)
        if attribute is not None and attribute.type == ir.AttributeType.INT and attribute.as_int() in HALVES:
            node.attributes[name] = ir.AttrInt64(name, int(FLOAT))
    value = node.attributes.get("value")
    if node.op_type == "ConstantOfShape" and value is not None and value.as_tensor().dtype in HALVES:
        node.attributes["value"] = ir.AttrTensor("value", ir.tensor(value.as_tensor().numpy().astype(np.float32)))
