"""`clean_casts`: which casts keep every number, tried on all numbers of small types and on samples of large ones."""

from __future__ import annotations

import itertools

import numpy as np
import onnx_ir as ir
import pytest

from passes.clean_casts.constants import cast_array
from passes.clean_casts.exactness import COMMON, FLOATS, INTEGERS, WIDER, can_skip, keeps_all
from surgery.runtime.sessions import open_session

D = ir.DataType
TYPES = sorted(COMMON, key=lambda dtype: dtype.value)
EIGHT_BITS = [D.FLOAT8E4M3FN, D.FLOAT8E4M3FNUZ, D.FLOAT8E5M2, D.FLOAT8E5M2FNUZ]


def numbers(dtype: D) -> np.ndarray:
    """All numbers of a type of up to 16 bits; else the special ones, the edges of all other types, and random bits."""
    kind = dtype.numpy()
    if dtype == D.BOOL:
        return np.array([False, True])
    if dtype in (D.INT4, D.UINT4):
        return np.arange(-8 if dtype == D.INT4 else 0, 8 if dtype == D.INT4 else 16).astype(kind)
    bits = dtype.bitwidth
    if bits <= 16:
        return np.arange(1 << bits, dtype=f"uint{bits}").view(kind)
    random = np.random.default_rng(0).integers(0, 1 << 32, (2000, bits // 32), dtype=np.uint32).view(kind).reshape(-1)
    powers = [sign * 2**power + step for power in range(64) for sign in (1, -1) for step in (-1, 0, 1)]
    if dtype in INTEGERS:
        limits = np.iinfo(kind)
        return np.concatenate([random, np.array([p for p in powers if limits.min <= p <= limits.max], dtype=kind)])
    special = [0.0, -0.0, np.inf, -np.inf, np.nan, 1e-45, 6e-8, 65504, 65520, 0.1, -2.7, 1e-320]
    return np.concatenate([random, np.array([*special, *powers], dtype=np.float64).astype(kind)])


def cast(array: np.ndarray, dtype: D) -> np.ndarray:
    with np.errstate(all="ignore"):
        return array.astype(dtype.numpy())


def is_same(left: np.ndarray, right: np.ndarray) -> bool:
    """Bits are equal, and where there is a NaN, there is one."""
    assert left.dtype == right.dtype
    with np.errstate(invalid="ignore"):
        is_nan, is_nan_too = left != left, right != right
    bits = f"uint{8 * left.dtype.itemsize}"
    left, right = left[~is_nan].view(bits), right[~is_nan].view(bits)
    return np.array_equal(is_nan, is_nan_too) and np.array_equal(left, right)


@pytest.mark.parametrize("source", [*TYPES, D.INT4, D.UINT4, *EIGHT_BITS], ids=lambda dtype: dtype.name)
def test_the_table_has_exactly_the_types_that_hold_every_number(source: D):
    given = numbers(source)
    for target in TYPES:
        if target == source or target == D.BOOL:
            continue
        there = cast(given, target)
        survives = is_same(cast(there, source), given)
        if target in INTEGERS and source in FLOATS | {*EIGHT_BITS}:
            survives = False  # -0.0 has no sign there, and what happens to NaN is nowhere written
        if source in INTEGERS | {D.INT4, D.UINT4} and target in INTEGERS:
            survives &= bool((there.astype(object) == given.astype(object)).all())  # numbers wrap there and back
        if source == D.FLOAT8E5M2:
            survives = False  # ONNX casts an infinity back to the largest number
        assert keeps_all(source, target) == survives, target


def test_the_table_knows_no_other_types():
    assert {target for targets in WIDER.values() for target in targets} <= COMMON


def chain(*dtypes: D) -> ir.Model:
    """A model that casts from each type to the next."""
    values = [ir.Value(name="x", type=ir.TensorType(dtypes[0]), shape=ir.Shape(["n"]))]
    nodes = []
    for index, dtype in enumerate(dtypes[1:]):
        node = ir.node("Cast", [values[-1]], {"to": int(dtype)})
        node.outputs[0].name, node.outputs[0].type = f"y{index}", ir.TensorType(dtype)
        nodes.append(node)
        values.append(node.outputs[0])
    return ir.Model(ir.Graph(values[:1], values[-1:], nodes=nodes, opset_imports={"": 21}, name="g"), ir_version=10)


def fed_as(source: D) -> list[D]:
    """ONNX Runtime takes no bfloat16 from numpy, so it is cast from float32, and to it."""
    return [D.FLOAT, source] if source == D.BFLOAT16 else [source]


def shown_as(target: D) -> list[D]:
    return [target, D.FLOAT] if target == D.BFLOAT16 else [target]


@pytest.mark.parametrize("source", TYPES, ids=lambda dtype: dtype.name)
def test_a_step_that_may_be_skipped_makes_no_difference_in_the_runtime(source: D):
    """All chains of three types: ONNX Runtime also shows what it does where ONNX leaves it open."""
    given = numbers(source)
    fed = given.astype(np.float32) if source == D.BFLOAT16 else given
    direct: dict[D, np.ndarray] = {}
    tried = 0
    for middle, target in itertools.product(TYPES, TYPES):
        if middle in (source, target) or not can_skip(source, middle, target):
            continue
        if target not in direct:
            session = open_session(chain(*fed_as(source), *shown_as(target)), threads=1)
            (direct[target],) = session.run(None, {"x": fed})
        session = open_session(chain(*fed_as(source), middle, *shown_as(target)), threads=1)
        (found,) = session.run(None, {"x": fed})
        assert is_same(found, direct[target]), (middle, target)
        tried += 1
    assert tried > 0 or source in (D.DOUBLE, D.INT64, D.UINT64)


@pytest.mark.parametrize(
    ("source", "middle", "target"),
    [
        (D.INT64, D.FLOAT, D.FLOAT16),  # rounded twice
        (D.FLOAT, D.FLOAT16, D.FLOAT),
        (D.FLOAT, D.INT64, D.FLOAT),
        (D.INT64, D.DOUBLE, D.INT64),
        (D.FLOAT, D.BOOL, D.FLOAT),
        (D.INT8, D.FLOAT, D.UINT8),  # -1 wraps only directly
        (D.INT32, D.DOUBLE, D.BFLOAT16),
        (D.FLOAT16, D.FLOAT, D.STRING),
        (D.FLOAT16, D.FLOAT, D.FLOAT8E4M3FN),
        (D.FLOAT8E5M2, D.FLOAT, D.FLOAT8E5M2),  # an infinity comes back as the largest number
        (D.STRING, D.STRING, D.FLOAT),
    ],
)
def test_a_step_that_makes_a_difference_may_not_be_skipped(source: D, middle: D, target: D):
    assert middle == source or not can_skip(source, middle, target)


@pytest.mark.parametrize("source", TYPES, ids=lambda dtype: dtype.name)
def test_a_constant_is_cast_as_the_runtime_casts_it(source: D):
    given = numbers(source)[:3000]
    fed = given.astype(np.float32) if source == D.BFLOAT16 else given
    for target in TYPES:
        if target == source:
            continue
        (expected,) = open_session(chain(*fed_as(source), *shown_as(target)), threads=1).run(None, {"x": fed})
        kept = [index for index in range(len(given)) if cast_array(given[index : index + 1], target) is not None]
        assert len(kept) > 1
        ours = cast_array(given[kept], target)
        assert ours is not None
        shown = ours.astype(np.float32) if target == D.BFLOAT16 else ours
        assert is_same(shown, expected[kept]), target
