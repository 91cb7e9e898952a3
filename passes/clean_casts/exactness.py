"""Which casts keep every number, and which of them may be left out of a chain.

Others are more generous. onnxscript's `CastCast` drops the middle of any chain that goes through float32 to a half
type, from int64 and double too, which are then rounded once and not twice. ONNX Runtime's `CastChainElimination`, where
a session option turns it on, drops what rounds. What ONNX Runtime drops always takes float32 to int64 to int32 for
float32 to int32, which differ where a number does not fit.
"""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

D = ir.DataType

FLOATS = frozenset({D.FLOAT16, D.BFLOAT16, D.FLOAT, D.DOUBLE})
INTEGERS = frozenset({D.INT8, D.INT16, D.INT32, D.INT64, D.UINT8, D.UINT16, D.UINT32, D.UINT64})
# Types between any two of which ONNX Runtime has a cast; 4-bit and 8-bit floats and strings lack some.
COMMON = FLOATS | INTEGERS | {D.BOOL}

_SIGNED = {D.INT8, D.INT16, D.INT32, D.INT64}

WIDER: Mapping[D, frozenset[D]] = {
    D.BOOL: INTEGERS | FLOATS,
    D.INT4: frozenset(_SIGNED | FLOATS),
    D.UINT4: INTEGERS | FLOATS,
    D.INT8: frozenset({D.INT16, D.INT32, D.INT64} | FLOATS),
    D.UINT8: frozenset({D.INT16, D.INT32, D.INT64, D.UINT16, D.UINT32, D.UINT64} | FLOATS),
    D.INT16: frozenset({D.INT32, D.INT64, D.FLOAT, D.DOUBLE}),
    D.UINT16: frozenset({D.INT32, D.INT64, D.UINT32, D.UINT64, D.FLOAT, D.DOUBLE}),
    D.INT32: frozenset({D.INT64, D.DOUBLE}),
    D.UINT32: frozenset({D.INT64, D.UINT64, D.DOUBLE}),
    # 8-bit floats with infinities (E5M2) are not here: the cast back saturates, and makes finite numbers of them.
    D.FLOAT8E4M3FN: FLOATS,
    D.FLOAT8E4M3FNUZ: FLOATS,
    D.FLOAT8E5M2FNUZ: FLOATS,
    D.FLOAT16: frozenset({D.FLOAT, D.DOUBLE}),
    D.BFLOAT16: frozenset({D.FLOAT, D.DOUBLE}),
    D.FLOAT: frozenset({D.DOUBLE}),
}
"""The types that hold every number of a type, -0.0, infinities and NaN included; what a NaN carries is not a number."""


def keeps_all(source: D, target: D) -> bool:
    """Return whether a cast keeps every number."""
    return source == target or target in WIDER.get(source, ())


def can_skip(source: D, middle: D, target: D) -> bool:
    """Return whether the cast from `source` to `target` gives what two casts through `middle` give.

    The first of the two has to keep every number. Even then a negative integer that went through a float may become
    another unsigned integer than when it wraps directly, and an integer may be rounded to bfloat16 in one step or two.
    """
    if not keeps_all(source, middle):
        return False
    if target in (source, middle):
        return True
    if not {source, middle, target} <= COMMON:
        return False
    if target in INTEGERS and source not in FLOATS and middle in FLOATS:
        return keeps_all(source, target)
    return not (target == D.BFLOAT16 and source in (D.INT32, D.UINT32, D.INT16, D.UINT16))
