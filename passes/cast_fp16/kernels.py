"""Which operators the kernels of a runtime compute in float32 and not in float16.

The table for CUDA was read from `docs/OperatorKernels.md` of ONNX Runtime (commit 001d12d), which its build writes from
the registered kernels. To renew it, list the rows of CUDAExecutionProvider that name `tensor(float)` and not
`tensor(float16)`. What CUDA has no kernel for at all runs on the CPU; of that provider the installed runtime tells.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import onnx_ir as ir

_NEWEST = 1 << 31
# (domain, operator): the versions of the operator set, first and last, in which there is no float16.
_FLOAT_ONLY_ON_CUDA = {
    ("", "Clip"): (1, 11),
    ("", "CumSum"): (11, 13),
    ("", "Equal"): (1, 10),
    ("", "EyeLike"): (9, _NEWEST),
    ("", "GridSample"): (16, _NEWEST),
    ("", "IsInf"): (10, 19),
    ("", "QuantizeLinear"): (10, 18),
    ("", "Range"): (11, _NEWEST),
    ("", "RoiAlign"): (10, _NEWEST),
    ("com.microsoft", "ConvTransposeWithDynamicPads"): (1, _NEWEST),
    ("com.microsoft", "DynamicTimeWarping"): (1, _NEWEST),
    ("com.microsoft", "FusedConv"): (1, _NEWEST),
    ("com.microsoft", "GridSample"): (1, _NEWEST),
    ("com.microsoft", "NGramRepeatBlock"): (1, _NEWEST),
}
# fmt: off
_ON_CUDA = frozenset({
    "Abs", "Add", "Affine", "ArgMax", "ArgMin", "Attention", "AveragePool", "BatchNormalization", "Cast", "Ceil",
    "Clip", "Compress", "Concat", "ConstantOfShape", "Conv", "ConvTranspose", "Cos", "CumSum", "DepthToSpace",
    "DequantizeLinear", "Div", "Dropout", "Einsum", "Elu", "Equal", "Erf", "Exp", "Expand", "EyeLike", "Flatten",
    "Floor", "GRU", "Gather", "GatherElements", "GatherND", "Gelu", "Gemm", "GlobalAveragePool", "GlobalMaxPool",
    "Greater", "GreaterOrEqual", "GridSample", "HardSigmoid", "HardSwish", "Identity", "If",
    "InstanceNormalization", "IsInf", "IsNaN", "LRN", "LSTM", "LayerNormalization", "LeakyRelu", "Less",
    "LessOrEqual", "Log", "LogSoftmax", "Loop", "MatMul", "Max", "MaxPool", "Min", "Mod", "Mul", "Neg", "NonZero",
    "OneHot", "PRelu", "Pad", "Pow", "QuantizeLinear", "RMSNormalization", "RNN", "RandomNormal",
    "RandomNormalLike", "RandomUniform", "RandomUniformLike", "Range", "Reciprocal", "ReduceL1", "ReduceL2",
    "ReduceLogSum", "ReduceLogSumExp", "ReduceMax", "ReduceMean", "ReduceMin", "ReduceProd", "ReduceSum",
    "ReduceSumSquare", "Relu", "Reshape", "Resize", "ReverseSequence", "RoiAlign", "RotaryEmbedding", "Round",
    "Scan", "ScatterElements", "ScatterND", "Selu", "Shape", "Shrink", "Sigmoid", "Sign",
    "SimplifiedLayerNormalization", "Sin", "Slice", "Softmax", "Softplus", "Softsign", "SpaceToDepth", "Split",
    "Sqrt", "Squeeze", "Sub", "Sum", "Tanh", "TensorScatter", "ThresholdedRelu", "Tile", "TopK", "Transpose",
    "Trilu", "Unsqueeze", "Upsample", "Where",
})
# fmt: on


def lacks_half(runs_on: str, node: ir.Node, model: ir.Model) -> bool:
    """Return whether a runtime computes an operator in float32 and not in float16.

    Args:
        runs_on: `cuda`, `cpu`, or `any`, which has all kernels.
        node: The node.
        model: Its model, whose operator sets say which definition is meant.
    """
    if runs_on == "any":
        return False
    opset = node.version or model.opset_imports.get(node.domain, 1)
    if runs_on == "cpu":
        return _lacks_half_on_cpu(node.domain, node.op_type, opset)
    first, last = _FLOAT_ONLY_ON_CUDA.get((node.domain, node.op_type), (_NEWEST, 0))
    if first <= opset <= last:
        return True
    if node.domain or node.op_type in _ON_CUDA:
        return False
    return _lacks_half_on_cpu(node.domain, node.op_type, opset)


@cache
def _lacks_half_on_cpu(domain: str, name: str, opset: int) -> bool:
    kernels = [
        kernel
        for kernel in _installed_kernels()
        if (kernel.domain, kernel.op_name) == (domain, name)
        and kernel.provider == "CPUExecutionProvider"
        and kernel.version_range[0] <= opset <= kernel.version_range[1]
    ]
    types = {one for kernel in kernels for allowed in kernel.type_constraints.values() for one in allowed}
    return "tensor(float)" in types and "tensor(float16)" not in types


@cache
def _installed_kernels() -> tuple[Any, ...]:
    try:
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def
    except ImportError:
        return ()
    return tuple(get_all_opkernel_def())
