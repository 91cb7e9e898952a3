"""Whether positions that are cut to whole numbers, as distances are to buckets, are cut alike in float16."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import onnx_ir as ir

from passes.audit_ranges import Range
from passes.cast_fp16.places import is_neutral, is_plain
from passes.cast_fp16.weights import constant_of

MOST_POSITIONS = 1 << 20
_INT32, _INT64 = ir.DataType.INT32, ir.DataType.INT64

_UNARY: Mapping[str, Callable[[np.ndarray], np.ndarray]] = {
    "Abs": np.abs,
    "Ceil": np.ceil,
    "Exp": np.exp,
    "Floor": np.floor,
    "Log": np.log,
    "Neg": np.negative,
    "Reciprocal": np.reciprocal,
    "Round": np.round,
    "Sqrt": np.sqrt,
}
_BINARY: Mapping[str, Callable[[np.ndarray, np.ndarray], np.ndarray]] = {
    "Add": np.add,
    "Div": np.divide,
    "Max": np.maximum,
    "Min": np.minimum,
    "Mul": np.multiply,
    "Sub": np.subtract,
}


def cut_otherwise(
    value: ir.Value, cut: ir.Node, range_of: Callable[[ir.Value], Range | None]
) -> tuple[int, int] | None:
    """Return of how many positions float16 makes another whole number, and how many there are; None if nobody knows.

    All whole numbers that an audit has seen are sent through the arithmetic that makes the value, in float32 and in
    float16, which is float32 rounded after each node. It is known if each node has one input that is no constant.

    Args:
        value: What is cut.
        cut: The node that makes whole numbers of it.
        range_of: What an audit knows of a value.
    """
    wide = _positions(value, range_of, np.float32)
    half = _positions(value, range_of, np.float16)
    if wide is None or half is None:
        return None
    rounding = _UNARY.get(cut.op_type, np.trunc)
    with np.errstate(all="ignore"):
        is_other = np.asarray(rounding(wide)) != np.asarray(rounding(half))
    return int(np.count_nonzero(is_other & ~np.isnan(wide))), wide.size


def _positions(
    value: ir.Value, range_of: Callable[[ir.Value], Range | None], dtype: type[np.floating]
) -> np.ndarray | None:
    """Return what a value is for every whole number that its positions may be, in an arithmetic."""
    node = value.producer()
    if node is None or node.domain:
        return None
    if is_plain(node, "Cast") and node.inputs[0] is not None and node.inputs[0].dtype in (_INT32, _INT64):
        known = range_of(value)
        if known is None or known.high - known.low > MOST_POSITIONS:
            return None
        return _rounded(np.arange(known.low, known.high + 1, dtype=np.float32), dtype)
    given = [one for one in node.inputs if one is not None]
    if is_neutral(node) and not is_plain(node, "Concat", "Where"):
        return _positions(given[0], range_of, dtype)
    if node.op_type in _UNARY:
        inner = _positions(given[0], range_of, dtype)
        return None if inner is None else _computed(_UNARY[node.op_type], dtype, inner)
    if node.op_type not in _BINARY or len(given) != 2:
        return None
    first, second = (_constant(one, dtype) for one in given)
    if (first is None) == (second is None):
        return None
    first = _positions(given[0], range_of, dtype) if first is None else first
    second = _positions(given[1], range_of, dtype) if second is None else second
    return None if first is None or second is None else _computed(_BINARY[node.op_type], dtype, first, second)


def _constant(value: ir.Value, dtype: type[np.floating]) -> np.ndarray | None:
    tensor = constant_of(value)
    if tensor is None or tensor.size != 1 or tensor.dtype != ir.DataType.FLOAT:
        return None
    return _rounded(tensor.numpy().reshape(-1), dtype)


def _computed(function: Callable[..., np.ndarray], dtype: type[np.floating], *operands: np.ndarray) -> np.ndarray:
    with np.errstate(all="ignore"):
        return _rounded(np.asarray(function(*operands)), dtype)


def _rounded(array: np.ndarray, dtype: type[np.floating]) -> np.ndarray:
    with np.errstate(all="ignore"):
        return array.astype(dtype).astype(np.float32)
