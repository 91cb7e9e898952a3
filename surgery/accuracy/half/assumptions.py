"""What is assumed of each operator in half precision, and what follows for its emulation.

Three kinds cover every operator:

- It **moves** or selects numbers. No result is new, so nothing is rounded.
- It is **elementwise**: each element is the exact result for its operands, rounded once. Float32 holds more than twice
  as many bits as float16 plus two, so an addition, product, quotient or square root that is rounded to float32 and then
  to float16 is the one that is rounded at once (Figueroa, "When is double rounding innocuous?", 1995).
- All others compute **inside in float32**, and their outputs are rounded: products and reductions accumulate in
  float32, as tensor cores and cuDNN's reductions do, and what a fused operator passes on inside itself is not rounded.
"""

from __future__ import annotations

from enum import Enum

import onnx_ir as ir


class Assumption(Enum):
    """What an operator does in half precision."""

    MOVES = "moves or selects numbers: nothing is rounded"
    ELEMENTWISE = "elementwise: computed in float32, rounded once"
    INSIDE = "float32 inside, outputs rounded"


# fmt: off
_MOVING = frozenset({
    "Abs", "Ceil", "Clip", "Compress", "Concat", "ConcatFromSequence", "ConstantOfShape", "DepthToSpace",
    "Expand", "EyeLike", "Flatten", "Floor", "Gather", "GatherElements", "GatherND", "GlobalMaxPool", "Identity",
    "If", "Loop", "Max", "MaxPool", "Min", "Neg", "OneHot", "Optional", "OptionalGetElement", "Pad", "ReduceMax",
    "ReduceMin", "Relu", "Reshape", "ReverseSequence", "Round", "Scan", "ScatterElements", "ScatterND",
    "SequenceAt", "SequenceConstruct", "SequenceEmpty", "SequenceErase", "SequenceInsert", "SequenceMap", "Sign",
    "Size", "Slice", "SpaceToDepth", "Split", "SplitToSequence", "Squeeze", "TensorScatter", "Tile", "TopK",
    "Transpose", "Trilu", "Unique", "Unsqueeze", "Where",
})
# fmt: on

# fmt: off
_ELEMENTWISE = frozenset({
    "Acos", "Acosh", "Add", "Asin", "Asinh", "Atan", "Atanh", "BiasGelu", "Celu", "Cos", "Cosh", "Div", "Elu",
    "Erf", "Exp", "FastGelu", "Gelu", "HardSigmoid", "HardSwish", "LeakyRelu", "Log", "Mish", "Mod", "Mul",
    "PRelu", "Pow", "QuickGelu", "Reciprocal", "Selu", "Shrink", "Sigmoid", "Sin", "Sinh", "Softplus", "Softsign",
    "Sqrt", "Sub", "Swish", "Tan", "Tanh", "ThresholdedRelu",
})
# fmt: on

_ADDING = frozenset({"add", "mul"})


def assumption(node: ir.Node) -> Assumption:
    """Return what is assumed of a node's operator."""
    if node.domain not in ("", "com.microsoft"):
        return Assumption.INSIDE
    if node.op_type in _MOVING and not node.domain and not _adds(node):
        return Assumption.MOVES
    return Assumption.ELEMENTWISE if node.op_type in _ELEMENTWISE else Assumption.INSIDE


def _adds(node: ir.Node) -> bool:
    """Return whether a scatter adds or multiplies what it puts."""
    reduction = node.attributes.get("reduction")
    return reduction is not None and reduction.as_string() in _ADDING
