"""What TensorRT asks of an `If`, kept and checked; TensorRT itself is not needed."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx_ir as ir

from passes.merge_if.interface import Interface
from surgery.errors import Refused
from surgery.graphs import bodies_of, graphs_of
from surgery.interfaces import recognise_names

TYPES = frozenset(
    {
        ir.DataType.FLOAT,
        ir.DataType.FLOAT16,
        ir.DataType.BFLOAT16,
        ir.DataType.INT32,
        ir.DataType.INT64,
        ir.DataType.BOOL,
    }
)
MOST_LEVELS = 24


def find_stand_ins(interface: Interface) -> dict[str, str]:
    """Return for the outputs that only one side gives the inputs that are handed on when the other side runs.

    An empty tensor there would have another shape. Of a cache there is an input for each output: of the encoder's keys
    and values, which do not change, it is what the output would be.

    Raises:
        Refused: Nothing stands for an output.
    """
    recognised = recognise_names(list(interface.inputs), list(interface.outputs))
    cache = {slot.output: slot.input for slot in recognised.cache} if recognised is not None else {}
    found: dict[str, str] = {}
    for name, givers in interface.outputs.items():
        if len(givers) > 1 or name in interface.inputs:
            continue
        (role, value), stand_in = next(iter(givers.items())), cache.get(name)
        if stand_in is None or not _are_alike(value, next(iter(interface.inputs[stand_in].values()))):
            raise Refused(
                f"the output {name!r} is given by {role!r} only, and TensorRT wants one of the same rank from both",
                hint="make both sides give it, or for_tensorrt: false",
            )
        found[name] = stand_in
    return found


def _are_alike(value: ir.Value, other: ir.Value) -> bool:
    ranks = [None if one.shape is None else len(one.shape) for one in (value, other)]
    return value.type == other.type and ranks[0] is not None and ranks[0] == ranks[1]


def find_violations(model: ir.Model) -> list[str]:
    """Return what TensorRT's parser would refuse about the `If` nodes of a model, those in other nodes' graphs too.

    The rules are those that onnx-tensorrt 10.1 writes down (`docs/operators.md`: outputs of the two branches have one
    rank and different names, and the types it lists; `onnxOpImporters.cpp`: as many outputs on both sides, a condition
    of one element; `ModelImporter.cpp`: no more than 24 levels of graphs) and TensorRT's reference of its `If`, which
    up to 10.10 wants equal shapes (`IIfConditionalOutputLayer inputs must have the same shape`) and later equal ranks;
    so two sizes that are known may not differ. What shapes become while an engine is built is not known here.

    Args:
        model: Any model; local functions are not looked at.

    Returns:
        A sentence for each violation, with the names of the node and of the output.
    """
    found = [sentence for graph in graphs_of(model.graph) for node in graph for sentence in _of_node(node)]
    if _levels(model.graph) > MOST_LEVELS:
        found.append(f"graphs are nested more than {MOST_LEVELS} deep")
    return found


def _of_node(node: ir.Node) -> Iterator[str]:
    if node.op_type != "If" or node.domain != "":
        return
    place = f"If {node.name!r}" if node.name else f"the If that gives {node.outputs[0].name!r}"
    branches = [node.attributes[name].as_graph() for name in ("then_branch", "else_branch")]
    counts = [len(branch.outputs) for branch in branches]
    condition = node.inputs[0]
    if condition is None or condition.shape is None or any(size != 1 for size in condition.shape):
        yield f"{place}: its condition is not known to have one element"
    if counts[0] != counts[1]:
        yield f"{place}: the branches have {counts[0]} and {counts[1]} outputs"
    for outer, *pair in zip(node.outputs, *(branch.outputs for branch in branches), strict=False):
        yield from (f"{place}, output {outer.name!r}: {problem}" for problem in _of_pair(pair))


def _of_pair(pair: Sequence[ir.Value]) -> Iterator[str]:
    first, second = pair
    if first.name == second.name:
        yield f"both branches call it {first.name!r}"
    if not all(isinstance(value.type, ir.TensorType) for value in pair):
        yield "it is no tensor in both branches, or of no known type"
        return
    if first.dtype != second.dtype:
        yield f"it is {_name(first.dtype)} in one branch and {_name(second.dtype)} in the other"
    for dtype in {value.dtype for value in pair} - TYPES:
        yield f"an If gives no {_name(dtype)}"
    if first.shape is None or second.shape is None:
        yield "its rank is not known in both branches"
    elif len(first.shape) != len(second.shape):
        yield f"it has {len(first.shape)} axes in one branch and {len(second.shape)} in the other"
    else:
        sizes = zip(first.shape, second.shape, strict=True)
        known = [(axis, *two) for axis, two in enumerate(sizes) if all(isinstance(size, int) for size in two)]
        yield from (
            f"axis {axis} is {one} in one branch and {two} in the other" for axis, one, two in known if one != two
        )


def _name(dtype: ir.DataType | None) -> str:
    return dtype.name.lower() if dtype is not None else "of no known type"


def _levels(graph: ir.Graph) -> int:
    return max((1 + _levels(body) for node in graph for body in bodies_of(node)), default=0)
