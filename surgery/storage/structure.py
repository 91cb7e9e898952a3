"""Names and order: what must hold of a graph before anybody can say what it computes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TypeVar

import onnx
import onnx_ir as ir

from surgery.errors import ModelFileError
from surgery.graphs import bodies_of
from surgery.storage.protos import subgraphs_of

Name = tuple[str, Hashable]
"""A value as a file names it, and what tells two values of one name apart (the name itself in a proto)."""

Identifier = tuple[str, str, str]
"""A function or an operator: domain, name, overload."""

_Step = TypeVar("_Step", bound=Hashable)


@dataclass(frozen=True, slots=True)
class _Node:
    label: str
    inputs: Sequence[Name]
    outputs: Sequence[Name]
    subgraphs: Sequence[_Scope]


@dataclass(frozen=True, slots=True)
class _Scope:
    label: str
    inputs: Sequence[Name]
    initializers: Sequence[Name]
    nodes: Sequence[_Node]
    outputs: Sequence[Name]


def check_structure(model: ir.Model | onnx.ModelProto) -> None:
    """Raise unless every name is defined once in its scope and before its uses.

    Raises:
        ModelFileError: Naming the node and the value: a name used twice, an input that nothing defines, a cycle, a use
            before the definition, an output that the graph does not make, functions that call each other in a circle.
    """
    disorder = find_disorder(model)
    if disorder:
        raise ModelFileError(disorder, hint="sort the nodes: model.graph.sort()")


def find_disorder(model: ir.Model | onnx.ModelProto) -> str:
    """Check as `check_structure` does, except that a use before its definition is returned and not raised.

    Returns:
        A sentence about the first such use, empty if the nodes are in order.
    """
    _check_functions(model)
    sentences = [_check_scope(scope, {}) for scope in _scopes_of(model)]
    return next(filter(None, sentences), "")


def _check_scope(scope: _Scope, outer: Mapping[str, Hashable]) -> str:
    makers = _definitions(scope)
    given = dict(chain(scope.inputs, scope.initializers))
    local = {**given, **{name: key for node in scope.nodes for name, key in node.outputs}}
    everything = {**outer, **local}
    visible = {**outer, **given}
    for name in makers.keys() - given.keys():
        visible.pop(name, None)
    disorder = ""
    for node in scope.nodes:
        for name, key in node.inputs:
            _check_known(name, key, everything, node.label, scope.label)
            if name not in visible:
                disorder = disorder or _too_early(name, node.label, makers[name], scope.label)
        for subgraph in node.subgraphs:
            inner = _check_scope(subgraph, everything)
            early = next((name for name in _reads(subgraph) if name not in visible and name in makers), None)
            if early is not None:
                inner = inner or _too_early(early, node.label, makers[early], scope.label)
            disorder = disorder or inner
        visible.update(node.outputs)
    if disorder:
        _check_acyclic(scope, makers)
    for name, key in scope.outputs:
        if name not in local:
            raise ModelFileError(f"{scope.label}: output {name!r} is not defined in it")
        _check_same(name, key, local[name], f"{scope.label}: an output")
    return disorder


def _definitions(scope: _Scope) -> dict[str, str]:
    """Return who defines each name of the scope."""
    makers: dict[str, str] = {}
    inputs = dict(scope.inputs)
    for name, _ in scope.inputs:
        _define(name, "an input", makers, scope.label)
    seen: set[str] = set()
    for name, key in scope.initializers:
        if name in seen:
            raise ModelFileError(f"{scope.label}: two initializers are named {name!r}")
        seen.add(name)
        if name in inputs:
            _check_same(name, key, inputs[name], f"{scope.label}: an initializer")
        else:
            _define(name, "an initializer", makers, scope.label)
    for node in scope.nodes:
        for name, _ in node.outputs:
            _define(name, node.label, makers, scope.label)
    return makers


def _define(name: str, maker: str, makers: dict[str, str], scope: str) -> None:
    if name in makers:
        raise ModelFileError(f"{scope}: {name!r} is defined twice, by {makers[name]} and by {maker}")
    makers[name] = maker


def _check_known(name: str, key: Hashable, known: Mapping[str, Hashable], node: str, scope: str) -> None:
    if name not in known:
        raise ModelFileError(f"{scope}: {node} reads {name!r}, which nothing defines")
    _check_same(name, key, known[name], f"{scope}: {node}")


def _check_same(name: str, key: Hashable, expected: Hashable, reader: str) -> None:
    if key != expected:
        raise ModelFileError(
            f"{reader} reads a value named {name!r}, but another value of that name is the one in scope"
        )


def _too_early(name: str, node: str, maker: str, scope: str) -> str:
    return f"{scope}: not topologically sorted: {node} reads {name!r} before {maker} makes it"


def _check_acyclic(scope: _Scope, makers: Mapping[str, str]) -> None:
    maker_of = {name: index for index, node in enumerate(scope.nodes) for name, _ in node.outputs}

    def makers_before(index: int) -> Iterator[int]:
        node = scope.nodes[index]
        read = chain((name for name, _ in node.inputs), *(_reads(subgraph) for subgraph in node.subgraphs))
        return (maker_of[name] for name in read if name in maker_of)

    cycle = _find_cycle(range(len(scope.nodes)), makers_before)
    if cycle:
        labels = [scope.nodes[index].label for index in cycle]
        raise ModelFileError(f"{scope.label}: the nodes form a cycle: {' -> '.join([*reversed(labels), labels[-1]])}")


def _reads(scope: _Scope) -> Iterator[str]:
    """Yield the names that a subgraph takes from outside, deeper subgraphs included."""
    own = {name for name, _ in chain(scope.inputs, scope.initializers)}
    own.update(name for node in scope.nodes for name, _ in node.outputs)
    for node in scope.nodes:
        read = chain((name for name, _ in node.inputs), *(_reads(subgraph) for subgraph in node.subgraphs))
        yield from (name for name in read if name not in own)


def _find_cycle(starts: Iterable[_Step], following: Callable[[_Step], Iterable[_Step]]) -> list[_Step]:
    """Return the members of one cycle in the order in which they follow each other, empty if there is none."""
    finished: set[_Step] = set()
    for start in starts:
        path: list[_Step] = []
        on_path: set[_Step] = set()
        pending: list[Iterator[_Step]] = [iter((start,))]
        while pending:
            step = next(pending[-1], None)
            if step is None:
                pending.pop()
                if path:
                    on_path.discard(path[-1])
                    finished.add(path.pop())
            elif step in on_path:
                return path[path.index(step) :]
            elif step not in finished:
                path.append(step)
                on_path.add(step)
                pending.append(iter(following(step)))
    return []


def _check_functions(model: ir.Model | onnx.ModelProto) -> None:
    calls: dict[Identifier, list[Identifier]] = {}
    for identity, called in _functions_of(model):
        if identity in calls:
            raise ModelFileError(f"two functions are named {_function_name(identity)}")
        calls[identity] = called
    cycle = _find_cycle(calls, lambda name: [called for called in calls[name] if called in calls])
    if cycle:
        raise ModelFileError(
            f"functions call each other in a circle: {' -> '.join(map(_function_name, [*cycle, cycle[0]]))}"
        )


def _function_name(identity: Identifier) -> str:
    return repr("::".join(filter(None, identity)))


def _functions_of(model: ir.Model | onnx.ModelProto) -> Iterator[tuple[Identifier, list[Identifier]]]:
    if isinstance(model, onnx.ModelProto):
        for proto in model.functions:
            called = [(node.domain, node.op_type, node.overload) for node in _nodes_below(proto.node)]
            yield (proto.domain, proto.name, proto.overload), called
        return
    for identity, function in model.functions.items():
        yield identity, [node.op_identifier() for node in function.all_nodes()]


def _nodes_below(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.NodeProto]:
    for node in nodes:
        yield node
        for graph in subgraphs_of(node):
            yield from _nodes_below(graph.node)


def _scopes_of(model: ir.Model | onnx.ModelProto) -> Iterator[_Scope]:
    if isinstance(model, onnx.ModelProto):
        yield _proto_graph(model.graph, f"graph {model.graph.name!r}")
        for proto in model.functions:
            names = [_same(name) for name in proto.input], [_same(name) for name in proto.output]
            nodes = [_proto_node(node) for node in proto.node]
            yield _Scope(f"function {proto.name!r}", names[0], (), nodes, names[1])
        return
    yield _ir_graph(model.graph, f"graph {model.graph.name!r}")
    for function in model.functions.values():
        yield _ir_graph(function.graph, f"function {function.name!r}")


def _same(name: str) -> Name:
    return name, name


def _proto_graph(graph: onnx.GraphProto, label: str) -> _Scope:
    return _Scope(
        label,
        [_same(info.name) for info in graph.input],
        [_same(tensor.name) for tensor in graph.initializer if tensor.name],
        [_proto_node(node) for node in graph.node],
        [_same(info.name) for info in graph.output],
    )


def _proto_node(node: onnx.NodeProto) -> _Node:
    label = _label(node.name, node.op_type, node.output)
    subgraphs = [_proto_graph(graph, f"{label}: graph {graph.name!r}") for graph in subgraphs_of(node)]
    inputs = [_same(name) for name in node.input if name]
    return _Node(label, inputs, [_same(name) for name in node.output if name], subgraphs)


def _ir_graph(graph: ir.Graph, label: str) -> _Scope:
    return _Scope(
        label,
        [_named(value, label) for value in graph.inputs],
        [_named(value, label) for value in graph.initializers.values()],
        [_ir_node(node) for node in graph],
        [_named(value, label) for value in graph.outputs],
    )


def _ir_node(node: ir.Node) -> _Node:
    label = _label(node.name or "", node.op_type, [value.name or "" for value in node.outputs])
    subgraphs = [_ir_graph(graph, f"{label}: graph {graph.name!r}") for graph in bodies_of(node)]
    inputs = [_named(value, label) for value in node.inputs if value is not None]
    # An output that nobody wants is an unnamed value here and an empty name in the file.
    outputs = [_named(value, label) for value in node.outputs if value.name or _is_wanted(value)]
    return _Node(label, inputs, outputs, subgraphs)


def _is_wanted(value: ir.Value) -> bool:
    return bool(value.uses()) or value.is_graph_output()


def _named(value: ir.Value, where: str) -> Name:
    if not value.name:
        raise ModelFileError(f"{where}: a value that is used has no name")
    return value.name, id(value)


def _label(name: str, op_type: str, outputs: Sequence[str]) -> str:
    if name:
        return f"node {name!r} ({op_type})"
    return f"the {op_type} that makes {next(filter(None, outputs), 'nothing')!r}"
