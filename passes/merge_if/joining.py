"""Puts two graphs into the branches of an `If`, and their weights where both branches see them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TypeVar

import numpy as np
import onnx_ir as ir

from passes.merge_if.functions import join_functions
from passes.merge_if.interface import Givers, Interface, common_shape, sizes_of
from surgery.errors import Refused
from surgery.graphs import constant_tensor, constant_to_initializer, fresh_name, graphs_of, lift_initializer
from surgery.storage import find_twins

# ONNX Runtime 1.31 fuses these with a MatMul, and then fails to load a model whose weight or scale is captured from
# outside (`qdq_actions.cc: TransposeDQWeightsForMatMulNBits Missing required weight`); see tests/passes/
# test_merge_if_in_runtime.py.
QUANTIZED = frozenset({"DequantizeLinear", "QuantizeLinear"})

Said = TypeVar("Said", str, int)


@dataclass(frozen=True)
class Joined:
    """A merged model, and what its branches share."""

    model: ir.Model
    shared: int
    shared_bytes: int


def join(
    models: Mapping[str, ir.Model],
    interface: Interface,
    flag: str,
    name: str,
    min_bytes: int,
    stand_ins: Mapping[str, str] = MappingProxyType({}),
) -> Joined:
    """Join two models, whose nodes move into the merged one; the first runs when the flag is true.

    Args:
        models: The two models by role; they are used up.
        interface: What they take and give.
        flag: The name of the boolean input.
        name: The name of the merged graph.
        min_bytes: Smaller weights stay where they are.
        stand_ins: For outputs that only one side gives, the inputs that stand for them when the other side runs; the
            other outputs are then empty.
    """
    functions = join_functions(models)
    taken = Counter([flag, *interface.inputs, *interface.outputs])
    inputs = {name: _merged_input(givers, interface.shape(givers)) for name, givers in interface.inputs.items()}
    passing = {name: inputs[name] for name in interface.outputs if name in inputs}
    for model in models.values():
        _drop_outputs(model.graph, passing)
        _lift_weights(model.graph, min_bytes)
        _take_inputs(model.graph, inputs)
    weights, shared, shared_bytes = _share_weights(models, taken, min_bytes)
    standing = {output: inputs[name] for output, name in stand_ins.items()}
    branches = {role: _branch(role, model.graph, interface, taken, standing) for role, model in models.items()}
    outputs = {
        name: passing.get(name) or _merged_output(name, givers, interface, standing.get(name))
        for name, givers in interface.outputs.items()
    }
    chooser = ir.Value(name=flag, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape([1]))
    names = ("then_branch", "else_branch")
    attributes = [ir.AttrGraph(key, branch) for key, branch in zip(names, branches.values(), strict=True)]
    computed = [value for key, value in outputs.items() if key not in passing]
    node = ir.Node("", "If", [chooser], attributes, outputs=computed, name=f"{name}/If")
    first, second = models.values()
    graph = ir.Graph(
        [*inputs.values(), chooser],
        tuple(outputs.values()),
        nodes=[node],
        initializers=[*(value for value in inputs.values() if value.const_value is not None), *weights],
        opset_imports={**second.graph.opset_imports, **first.graph.opset_imports},
        name=name,
        metadata_props=_common(first.graph.metadata_props, second.graph.metadata_props),
    )
    merged = ir.Model(
        graph,
        ir_version=max(first.ir_version, second.ir_version),
        producer_name=_same(first.producer_name, second.producer_name),
        producer_version=_same(first.producer_version, second.producer_version),
        domain=_same(first.domain, second.domain),
        model_version=_same(first.model_version, second.model_version),
        doc_string=_same(first.doc_string, second.doc_string),
        metadata_props=_common(first.metadata_props, second.metadata_props),
        functions=functions,
    )
    return Joined(merged, shared, shared_bytes)


def _same(first: Said | None, second: Said | None) -> Said | None:
    """Return what either says and the other does not contradict."""
    return first or second if not first or not second or first == second else None


def _common(first: Mapping[str, str], second: Mapping[str, str]) -> dict[str, str]:
    """Return what one side says and the other does not contradict."""
    return {key: value for key, value in {**second, **first}.items() if first.get(key, value) == second.get(key, value)}


def _merged_input(givers: Givers, shape: ir.Shape | None) -> ir.Value:
    first = next(iter(givers.values()))
    return _described(ir.Value(name=first.name, type=first.type, shape=shape, const_value=first.const_value), givers)


def _merged_output(name: str, givers: Givers, interface: Interface, stand_in: ir.Value | None) -> ir.Value:
    first = next(iter(givers.values()))
    if stand_in is not None:
        shape = common_shape((first, stand_in))
    else:
        shape = interface.shape(givers) if len(givers) > 1 else _shape_or_empty(first)
    return _described(ir.Value(name=name, type=first.type, shape=shape), givers)


def _described(made: ir.Value, givers: Givers) -> ir.Value:
    """Give a value the documentation and metadata that one side has and the other does not contradict."""
    first, *_, last = (*givers.values(), *givers.values())
    made.doc_string = _same(first.doc_string, last.doc_string)
    made.metadata_props.update(_common(first.metadata_props, last.metadata_props))
    return made


def _shape_or_empty(value: ir.Value) -> ir.Shape | None:
    """Return the shape of an output that only one side gives: of the other it is empty, along all free axes."""
    if value.shape is None:
        return None
    sizes = sizes_of(value)
    return ir.Shape([None if empty == 0 else size for size, empty in zip(sizes, _empty(value), strict=True)])


def _empty(value: ir.Value) -> list[int]:
    """Return a shape without elements that a value could have; the first axis gives way if all are fixed."""
    sizes = [size if isinstance(size, int) else 0 for size in sizes_of(value)]
    return sizes if 0 in sizes or not sizes else [0, *sizes[1:]]


def _drop_outputs(graph: ir.Graph, passing: Mapping[str, ir.Value]) -> None:
    """Drop the outputs that are inputs: they pass by the `If`."""
    kept = [value for value in graph.outputs if value.name not in passing]
    graph.outputs.clear()
    graph.outputs.extend(kept)


def _lift_weights(graph: ir.Graph, min_bytes: int) -> None:
    """Move what is large out of subgraphs and `Constant` nodes."""
    names = Counter(value.name for inner in graphs_of(graph) for value in _values(inner) if value.name)
    for inner in list(graphs_of(graph)):
        for value in list(inner.initializers.values()):
            if inner is not graph and _is_movable(value, value.const_value, min_bytes):
                lift_initializer(value, graph, _unhidden(str(value.name), names))
        for node in list(inner):
            made = node.outputs[0] if node.outputs else None
            if made is not None and _is_movable(made, constant_tensor(node), min_bytes):
                constant_to_initializer(made, graph, _unhidden(str(made.name), names))


def _unhidden(name: str, names: Counter[str]) -> str:
    if names[name] == 1:
        return name
    names[name] -= 1
    return fresh_name(name, names)


def _is_movable(value: ir.Value, tensor: ir.TensorProtocol | None, min_bytes: int) -> bool:
    return _is_large(tensor, min_bytes) and not value.is_graph_output() and not _is_quantized(value)


def _is_large(tensor: ir.TensorProtocol | None, min_bytes: int) -> bool:
    return tensor is not None and tensor.nbytes >= min_bytes


def _is_quantized(value: ir.Value) -> bool:
    return any(node.op_type in QUANTIZED for node, _ in value.uses())


def _values(graph: ir.Graph) -> Iterator[ir.Value]:
    """Yield the values that a graph itself gives."""
    yield from graph.inputs
    yield from (value for value in graph.initializers.values() if not value.is_graph_input())
    for node in graph:
        yield from node.outputs


def _take_inputs(graph: ir.Graph, inputs: Mapping[str, ir.Value]) -> None:
    """Let the merged inputs stand for the graph's own."""
    for value in list(graph.inputs):
        assert value.name is not None
        graph.initializers.pop(value.name, None)
        _replace(graph, value, inputs[value.name])
    graph.inputs.clear()


def _replace(graph: ir.Graph, value: ir.Value, other: ir.Value) -> None:
    """Put another value in place of one; as an output of its graph it goes through an `Identity`."""
    if value.is_graph_output():
        _copy_outputs(graph, value)
    ir.convenience.replace_all_uses_with(value, other)


def _copy_outputs(graph: ir.Graph, value: ir.Value) -> None:
    """Give a copy of a value wherever the graph gives the value itself, under the same name for now."""
    for index, output in enumerate(graph.outputs):
        if output is value:
            node = _copied(value, str(value.name))
            graph.append(node)
            graph.outputs[index] = node.outputs[0]


def _share_weights(
    models: Mapping[str, ir.Model], taken: Counter[str], min_bytes: int
) -> tuple[list[ir.Value], int, int]:
    """Return the weights for the main graph, each once and under a name of its own, and how much was shared."""
    owned = [
        (role, model.graph, value)
        for role, model in models.items()
        for value in list(model.graph.initializers.values())
        if _is_large(value.const_value, min_bytes)
    ]
    groups = find_twins([value.const_value for _, _, value in owned if value.const_value is not None])
    leader = {index: group[0] for group in groups for index in group}
    made: dict[int, ir.Value] = {}
    shared, shared_bytes = 0, 0
    for index, (role, graph, value) in enumerate(owned):
        first = leader.get(index, index)
        tensor = value.const_value
        assert tensor is not None
        assert value.name is not None
        if _is_quantized(value):
            value.const_value = owned[first][2].const_value  # the same bytes, which a data file then has once
            continue
        if first in made:
            shared, shared_bytes = shared + 1, shared_bytes + tensor.nbytes
        else:
            name = fresh_name(f"{role}/{value.name}" if taken[value.name] else value.name, taken)
            made[first] = ir.Value(
                name=name,
                type=ir.TensorType(tensor.dtype),
                shape=ir.Shape(tensor.shape.numpy()),
                doc_string=value.doc_string,
                const_value=tensor,
            )
        made[first].metadata_props.update(value.metadata_props)
        del graph.initializers[value.name]
        _replace(graph, value, made[first])
    return list(made.values()), shared, shared_bytes


def _branch(
    role: str, graph: ir.Graph, interface: Interface, taken: Counter[str], stand_ins: Mapping[str, ir.Value]
) -> ir.Graph:
    """Make a branch of a graph that has neither inputs nor large weights any more."""
    given = {str(value.name): value for value in graph.outputs}
    outputs: list[ir.Value] = []
    for name, givers in interface.outputs.items():
        if name in interface.inputs:
            continue
        value = given.get(name)
        if value is None or value in outputs or value.producer() is None:
            copied = stand_ins.get(name) if value is None else value
            node = _nothing(role, name, *givers.values()) if copied is None else _copied(copied, name)
            graph.append(node)
            value = node.outputs[0]
        outputs.append(value)
    graph.outputs.clear()
    _unhide(role, graph, taken)
    nodes = list(graph)
    initializers = list(graph.initializers.values())
    for node in nodes:
        graph.remove(node)
    graph.initializers.clear()
    return ir.Graph(
        [],
        outputs,
        nodes=nodes,
        initializers=initializers,
        name=role,
        doc_string=graph.doc_string,
        metadata_props=dict(graph.metadata_props),
    )


def _copied(value: ir.Value, name: str) -> ir.Node:
    made = ir.Value(name=name, type=value.type, shape=value.shape)
    return ir.Node("", "Identity", [value], outputs=[made], name=f"{name}/Identity")


def _nothing(role: str, name: str, value: ir.Value) -> ir.Node:
    """Make the node that gives an empty tensor in place of an output that only the other side has."""
    if not isinstance(value.type, ir.TensorType) or value.shape is None:
        raise Refused(
            f"the output {name!r} is not given by {role!r}, and being no tensor of known rank it cannot be left empty"
        )
    dtype, shape = value.type.dtype, ir.Shape(_empty(value))
    if dtype == ir.DataType.STRING:
        tensor: ir.TensorProtocol = ir.StringTensor([] if 0 in shape else [b""], shape=shape, name=name)
    else:
        tensor = ir.Tensor(np.zeros(_empty(value), dtype=dtype.numpy()), dtype, shape=shape, name=name)
    made = ir.Value(name=name, type=value.type, shape=shape)
    return ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[made], name=f"{name}/absent")


def _unhide(role: str, graph: ir.Graph, taken: Counter[str]) -> None:
    """Rename the values of a branch that bear the name of one outside it."""
    own = Counter(taken)
    inner = [value for one in graphs_of(graph) for value in _values(one) if value.name]
    own.update(str(value.name) for value in inner)
    for value in inner:
        assert value.name is not None
        if taken[value.name]:
            value.name = fresh_name(f"{role}/{value.name}", own)
