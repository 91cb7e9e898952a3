"""What float16 does to the constants of a model."""

from __future__ import annotations

import math
import os
from collections.abc import Hashable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from passes.audit_ranges.ranges import LARGEST
from surgery.graphs import constant_tensor
from surgery.storage import key_of

_CHUNK = 1 << 18
WORKERS = min(4, os.cpu_count() or 1)
"""How many threads read weights; numpy lets others run meanwhile."""
# Half of the smallest number of float16: what is not larger becomes zero.
VANISHING = 2.0**-25


@dataclass(frozen=True)
class Facts:
    """What float16 does to the numbers of a tensor.

    Args:
        low: The most negative finite number.
        high: The most positive finite number.
        infinite: How many are infinite.
        vanishing: How many are not zero and become zero.
        elements: How many there are.
    """

    low: float = 0.0
    high: float = 0.0
    infinite: int = 0
    vanishing: int = 0
    elements: int = 0

    @property
    def overflows(self) -> bool:
        """A finite number becomes infinite."""
        return max(-self.low, self.high) >= LARGEST + 16

    @property
    def peak(self) -> float:
        """The finite number of the largest magnitude."""
        return self.low if -self.low > self.high else self.high


@dataclass
class Survey:
    """The facts of tensors, each read once.

    Args:
        alike: For the key of a tensor that is equal to another one, the key that stands for both.
    """

    alike: Mapping[Hashable, Hashable] = field(default_factory=dict)
    known: dict[Hashable, Facts] = field(default_factory=dict)

    def of(self, tensor: ir.TensorProtocol) -> Facts:
        """Return the facts of a float32 tensor; memory is that of a chunk where the tensor is mapped."""
        key = self.alike.get(key_of(tensor), key_of(tensor))
        if key not in self.known:
            self.known[key] = facts_of(tensor.numpy())
        return self.known[key]

    def read(self, tensors: Iterable[ir.TensorProtocol]) -> None:
        """Find the facts of tensors at once, some at a time."""
        wanted = {self.alike.get(key_of(tensor), key_of(tensor)): tensor for tensor in tensors}
        with ThreadPoolExecutor(WORKERS) as workers:
            found = workers.map(lambda tensor: facts_of(tensor.numpy()), wanted.values())
            self.known.update(zip(wanted, found, strict=True))


def facts_of(array: np.ndarray) -> Facts:
    """Return what float16 does to a float32 array."""
    low = high = 0.0
    infinite = vanishing = 0
    for chunk in _chunks(array.reshape(-1)):
        least, most = float(chunk.min()), float(chunk.max())
        if not math.isfinite(least) or not math.isfinite(most):
            is_finite = np.isfinite(chunk)
            infinite += int(np.isinf(chunk).sum())
            chunk = chunk[is_finite]
            least, most = float(chunk.min(initial=0)), float(chunk.max(initial=0))
        low, high = min(low, least), max(high, most)
        # As unsigned integers the bits of magnitudes are in the order of the numbers, and zero is less one the largest.
        magnitudes = (chunk.view(np.uint32) << np.uint32(1)) - np.uint32(1)
        vanishing += int(np.count_nonzero(magnitudes < _VANISHING_BITS))
    return Facts(low, high, infinite, vanishing, array.size)


_VANISHING_BITS = np.uint32(int(np.float32(VANISHING).view(np.uint32)) << 1)


def _chunks(flat: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, flat.size, _CHUNK):
        yield np.ascontiguousarray(flat[start : start + _CHUNK])


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """Return the tensor that a value always is: of an initializer that no caller overrides, or of a `Constant`."""
    if value.producer() is not None:
        return constant_tensor(value.producer())
    return value.const_value if value.is_initializer() and not value.is_graph_input() else None
