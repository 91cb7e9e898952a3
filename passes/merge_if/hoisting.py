"""Moves what both branches of an `If` compute alike to the graph around it."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Hashable, Iterator, Mapping

import onnx_ir as ir

from passes.merge_if.interface import common_shape
from passes.merge_if.joining import QUANTIZED
from surgery.graphs import constant_tensor, fresh_name, value_names
from surgery.storage import key_of

RANDOM = frozenset(
    {"RandomNormal", "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Multinomial", "Bernoulli", "Dropout"}
)
GRAPHS = (ir.AttributeType.GRAPH, ir.AttributeType.GRAPHS)
SMALL_BYTES = 1024

Key = tuple[Hashable, ...]
"""What a value is: the same in both branches if they compute it alike."""


def hoist_common(main: ir.Graph) -> int:
    """Move nodes with equal operators, attributes and inputs in both branches before the `If`; return how many.

    What stays: nodes that hold graphs, operators of other domains, which may do anything, random ones, which draw anew
    at each call, those that ONNX Runtime fuses with a product, and what is an output of a branch. Constants follow the
    nodes that need them.
    """
    chooser = next(node for node in main if node.op_type == "If")
    branches = [chooser.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    table: dict[Key, int] = {}
    numbered = [_Branch(graph, table) for graph in branches]
    common = numbered[0].nodes.keys() & numbered[1].nodes.keys()
    given = {number for branch in numbered for number in branch.given}
    mover = _Mover(main, chooser)
    for number, [node, *_] in numbered[0].nodes.items():  # in the order of the nodes, so inputs are decided first
        if number in common and number not in given and mover.has_all(node, branches[0]):
            mover.move(node, [twin for branch in numbered for twin in branch.nodes[number]])
    for graph in branches:
        _drop_idle(graph)
    return mover.moved


class _Branch:
    """The nodes of a branch by numbers that are equal for what is computed alike, in any branch of one table."""

    def __init__(self, graph: ir.Graph, table: dict[Key, int]) -> None:
        self.nodes: defaultdict[int, list[ir.Node]] = defaultdict(list)
        self.given: set[int] = set()
        keys: dict[ir.Value, Key] = {}
        for value in graph.initializers.values():
            if value.const_value is not None:
                keys[value] = _content(value.const_value)
        for node in graph:
            tensor = constant_tensor(node)
            key = _key(node, graph, keys) if tensor is None else None
            if tensor is not None:
                keys[node.outputs[0]] = _content(tensor)
            if key is None:
                continue
            number = table.setdefault(key, len(table))
            self.nodes[number].append(node)
            keys |= {value: ("output", number, index) for index, value in enumerate(node.outputs)}
            if any(value.is_graph_output() for value in node.outputs):
                self.given.add(number)


def _key(node: ir.Node, graph: ir.Graph, keys: Mapping[ir.Value, Key]) -> Key | None:
    """Return what decides the outputs of a node, None if it may depend on anything else."""
    if node.domain != "" or node.op_type in RANDOM | QUANTIZED:
        return None
    inputs: list[Hashable] = []
    for value in node.inputs:
        if value is not None and value.graph is graph and value not in keys:
            return None
        inputs.append(None if value is None else keys.get(value, ("outer", id(value))))
    attributes: list[Hashable] = []
    for name, attribute in sorted(node.attributes.items()):
        if attribute.type in GRAPHS or attribute.is_ref():
            return None
        is_tensor = attribute.type == ir.AttributeType.TENSOR
        attributes.append((name, _content(attribute.as_tensor()) if is_tensor else repr(attribute.value)))
    return (node.op_type, len(node.outputs), tuple(inputs), tuple(attributes))


def _content(tensor: ir.TensorProtocol) -> Key:
    if tensor.nbytes > SMALL_BYTES:
        return ("tensor", tensor.dtype, tuple(tensor.shape.numpy()), key_of(tensor))
    if tensor.dtype == ir.DataType.STRING:
        return ("tensor", tensor.dtype, tuple(tensor.shape.numpy()), tuple(tensor.numpy().ravel().tolist()))
    return ("tensor", tensor.dtype, tuple(tensor.shape.numpy()), tensor.tobytes())


class _Mover:
    """Puts nodes of branches before the `If`."""

    def __init__(self, main: ir.Graph, chooser: ir.Node) -> None:
        self.main = main
        self.chooser = chooser
        self.moved = 0
        self._names: Counter[str] = value_names(main)
        self._constants: dict[ir.Value, ir.Value] = {}

    def has_all(self, node: ir.Node, branch: ir.Graph) -> bool:
        """Say whether nothing that a node takes is left in its branch but constants."""
        return all(value is None or value.graph is not branch or _tensor(value) is not None for value in node.inputs)

    def move(self, node: ir.Node, twins: list[ir.Node]) -> None:
        """Let one node before the `If` stand for all its twins, itself among them."""
        branch = node.graph
        assert branch is not None
        for index, value in enumerate(node.inputs):
            if value is not None and value.graph is branch:
                node.replace_input_with(index, self._outside(value))
        for values in zip(*(twin.outputs for twin in twins), strict=True):
            self._names.subtract(value.name for value in values if value.name)
            node.outputs[values[0].index() or 0].shape = common_shape(values)
        for twin in twins:
            if twin is not node:
                ir.convenience.replace_all_uses_with(twin.outputs, node.outputs)
                assert twin.graph is not None
                twin.graph.remove(twin, safe=True)
        branch.remove(node)
        self.main.insert_before(self.chooser, node)
        for value in node.outputs:
            if value.name:
                value.name = fresh_name(value.name, self._names)
        self.moved += 1

    def _outside(self, value: ir.Value) -> ir.Value:
        """Return a copy of a branch's constant before the `If`."""
        if value not in self._constants:
            tensor = _tensor(value)
            assert tensor is not None
            name = fresh_name(str(value.name), self._names)
            made = ir.Value(
                name=name, type=ir.TensorType(tensor.dtype), shape=ir.Shape(tensor.shape.numpy()), const_value=tensor
            )
            self.main.register_initializer(made)
            self._constants[value] = made
        return self._constants[value]


def _tensor(value: ir.Value) -> ir.TensorProtocol | None:
    return value.const_value if value.is_initializer() else constant_tensor(value.producer())


def _drop_idle(branch: ir.Graph) -> None:
    """Remove constants that nothing uses any more."""
    for value in list(_constants(branch)):
        node = value.producer()
        if value.uses() or value.is_graph_output():
            continue
        if node is not None:
            branch.remove(node, safe=True)
        else:
            del branch.initializers[str(value.name)]


def _constants(branch: ir.Graph) -> Iterator[ir.Value]:
    yield from branch.initializers.values()
    yield from (node.outputs[0] for node in branch if constant_tensor(node) is not None)
