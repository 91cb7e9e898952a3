"""The operators through which a cast may be moved: they only move numbers, so it does not matter when each is cast."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from passes.clean_casts.exactness import COMMON
from passes.clean_casts.site import Site, tensor_type

D = ir.DataType

ALL = None
MOVED: Mapping[str, tuple[int, ...] | None] = {
    "Concat": ALL,
    "Expand": (0,),
    "Flatten": (0,),
    "Gather": (0,),
    "GatherElements": (0,),
    "GatherND": (0,),
    "Identity": (0,),
    "Pad": (0, 2),
    "Reshape": (0,),
    "Slice": (0,),
    "Split": (0,),
    "Squeeze": (0,),
    "Tile": (0,),
    "Transpose": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}
"""Which of an operator's inputs are moved into its outputs."""

SELECTING = frozenset({"Gather", "GatherElements", "GatherND", "Slice"})
"""What is before them may be larger, so that a cast there costs more than one behind."""

GROWING = frozenset({"Expand", "Gather", "GatherElements", "GatherND", "Pad", "Tile", "Where"})
"""What is behind them may be larger, so that a cast there costs more than one before."""

OF_ANY_TYPE = frozenset({"Concat", "Flatten", "Identity", "Reshape", "Squeeze", "Transpose", "Unsqueeze"})
"""ONNX Runtime has these for all types between which it has casts."""

TYPES = frozenset({D.FLOAT16, D.FLOAT, D.DOUBLE, D.INT32, D.INT64})
"""The types for which it has the others, or, on the CPU for float16, puts casts of its own around them."""

# They read a shape, and no number.
READING_SHAPE = frozenset({"Shape", "Size"})


def moved_inputs(node: ir.Node) -> list[int]:
    """Return which inputs a node moves into its outputs."""
    places = MOVED[node.op_type]
    indices = range(len(node.inputs)) if places is ALL else places
    return [index for index in indices if index < len(node.inputs) and node.inputs[index] is not None]


def neutral_type(node: ir.Node) -> D | None:
    """Return the type that a node moves, None if it does not just move tensors of a known type."""
    if node.domain or node.op_type not in MOVED or "value" in node.attributes:  # Pad once had its value there
        return None
    values = [*(node.inputs[index] for index in moved_inputs(node)), *(value for value in node.outputs if value.name)]
    types = {tensor_type(value) for value in values}
    return types.pop() if len(types) == 1 else None


def can_move(site: Site, node: ir.Node, dtype: D) -> bool:
    """Return whether a neutral node can be of another type: by its definition, and in ONNX Runtime."""
    if dtype not in (COMMON if node.op_type in OF_ANY_TYPE else TYPES):
        return False
    definition = site.definitions.of(node)
    if definition is None:
        return False
    formals = [definition.input(index) for index in moved_inputs(node)]
    return all(formal is not None and definition.takes(formal, dtype) for formal in formals)
