"""Equal and transposed weights: free where they share their bytes, sampled where reading all would take long."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
import onnx_ir as ir

from surgery.report.inspection.found import Copies, Member, Proof, Transposed
from surgery.report.inspection.weights import Weight, place_of
from surgery.storage import bytes_reader, find_transposed, find_twins

MIN_BYTES = 128
"""Smaller weights are not looked at."""

BUDGET_BYTES = 64 << 20
"""So much is read to prove what samples suggest, the smallest weights first; it takes a tenth of a second."""

SAMPLES = 4
SAMPLE_BYTES = 64
SAMPLED_ELEMENTS = 32
_MATRIX_BITS = (8, 16, 32, 64)

Groups = list[list[int]]


@dataclass(frozen=True)
class Stored:
    """Bytes of a weight, and the weights that are these very bytes."""

    tensor: ir.TensorProtocol
    members: tuple[Member, ...]


def find_copies(weights: Mapping[str, Sequence[Weight]], *, is_proved: bool) -> tuple[list[Copies], list[Transposed]]:
    """Find equal weights, and matrices that are others transposed.

    Args:
        weights: The weights by model.
        is_proved: Compare every byte of what may be equal, however much that is. Otherwise a few hundred bytes of each
            decide, and what they suggest is proved up to `BUDGET_BYTES`.
    """
    stored = _stored(weights)
    tensors = [one.tensor for one in stored]
    budget = _Budget(None if is_proved else BUDGET_BYTES)
    found = list(_proved(_twins_by_sample(tensors), tensors, budget))
    in_group = {index for group, _ in found for index in group}
    alone: Groups = [[index] for index in range(len(stored)) if index not in in_group]
    proofs: dict[int, Proof] = {group[0]: proof for group, proof in found}
    groups = {group[0]: group for group in sorted([*alone, *(group for group, _ in found)])}
    copies = [_copies(stored, group, proofs.get(first)) for first, group in groups.items()]
    wasteful = sorted(
        (one for one in copies if len(one.members) > 1),
        key=lambda one: (-one.bytes * (one.stored - 1), -one.bytes * len(one.members), str(one.members[0])),
    )
    return wasteful, _transposed(stored, groups, budget)


class _Budget:
    """How many bytes may still be read; None for all."""

    def __init__(self, left: int | None) -> None:
        self.left = left

    def covers(self, size: int) -> bool:
        if self.left is None:
            return True
        if size > self.left:
            return False
        self.left -= size
        return True


def _stored(weights: Mapping[str, Sequence[Weight]]) -> list[Stored]:
    members: dict[Hashable, list[Member]] = {}
    tensors: dict[Hashable, ir.TensorProtocol] = {}
    for model, several in weights.items():
        for weight in several:
            tensor = weight.tensor
            if tensor.dtype == ir.DataType.STRING or tensor.nbytes < MIN_BYTES or weight.is_absent:
                continue
            # Bytes that serve under two shapes or types are two weights.
            key = place_of(weight), tensor.dtype, tuple(tensor.shape.numpy())
            tensors.setdefault(key, tensor)
            members.setdefault(key, []).append(Member(model, weight.name))
    return [Stored(tensor, tuple(members[key])) for key, tensor in tensors.items()]


def _twins_by_sample(tensors: Sequence[ir.TensorProtocol]) -> Groups:
    """Return groups of tensors of one type and shape that agree in a few places."""
    groups = _split([list(range(len(tensors)))], lambda index: (tensors[index].dtype, _shape(tensors[index])))
    for number in range(SAMPLES):
        groups = _split(groups, lambda index, number=number: _sample(tensors[index], number))  # type: ignore[misc]
    return groups


def _split(groups: Iterable[list[int]], key: Callable[[int], Hashable]) -> Groups:
    """Return the finer groups of those that agree in a key too, where there is more than one."""
    finer: Groups = []
    for group in groups:
        parts: dict[Hashable, list[int]] = {}
        for index in group:
            parts.setdefault(key(index), []).append(index)
        finer += [part for part in parts.values() if len(part) > 1]
    return finer


def _sample(tensor: ir.TensorProtocol, number: int) -> bytes:
    """Return a few bytes of a tensor: of all tensors of one size from the same place."""
    last = max(tensor.nbytes - SAMPLE_BYTES, 0)
    start = int(np.random.default_rng(number).integers(last + 1))
    return bytes(bytes_reader(tensor).read(start, SAMPLE_BYTES))


def _proved(groups: Groups, tensors: Sequence[ir.TensorProtocol], budget: _Budget) -> Iterator[tuple[list[int], Proof]]:
    """Compare groups byte for byte, the smallest first, as far as the budget goes."""
    for group in sorted(groups, key=lambda group: tensors[group[0]].nbytes):
        if not budget.covers(tensors[group[0]].nbytes * len(group)):
            yield group, "sampled"
            continue
        for twins in find_twins([tensors[index] for index in group]):
            yield [group[index] for index in twins], "every byte compared"


def _copies(stored: Sequence[Stored], group: Sequence[int], proof: Proof | None) -> Copies:
    tensor = stored[group[0]].tensor
    return Copies(
        [member for index in group for member in stored[index].members],
        tensor.dtype.name.lower(),
        list(_shape(tensor)),
        tensor.nbytes,
        len(group),
        proof or "same bytes on disk",
    )


def _transposed(stored: Sequence[Stored], groups: Mapping[int, Sequence[int]], budget: _Budget) -> list[Transposed]:
    """Return the matrices that are others transposed; of equal ones only the first is looked at."""
    firsts = [first for first in groups if _is_matrix(stored[first].tensor)]
    tensors = [stored[first].tensor for first in firsts]
    found = []
    for straight, turned in sorted(_turned_by_sample(tensors), key=lambda pair: tensors[pair[0]].nbytes):
        tensor = tensors[straight]
        is_proved = budget.covers(2 * tensor.nbytes)
        if is_proved and not find_transposed([tensor, tensors[turned]]):
            continue
        proof: Proof = "every byte compared" if is_proved else "sampled"
        found.append(
            Transposed(
                _members(stored, groups[firsts[straight]]),
                _members(stored, groups[firsts[turned]]),
                tensor.dtype.name.lower(),
                list(_shape(tensor)),
                tensor.nbytes,
                proof,
            )
        )
    return sorted(found, key=lambda one: (-one.bytes, str(one.members[0])))


def _members(stored: Sequence[Stored], group: Iterable[int]) -> list[Member]:
    return [member for index in group for member in stored[index].members]


def _is_matrix(tensor: ir.TensorProtocol) -> bool:
    return len(tensor.shape) == 2 and tensor.dtype.bitwidth in _MATRIX_BITS


def _turned_by_sample(tensors: Sequence[ir.TensorProtocol]) -> list[tuple[int, int]]:
    """Return pairs of matrices of which one agrees with the other's transpose in a few elements.

    Every matrix takes part as it is and turned; what is wanted is one as it is that agrees with another one turned.
    """
    count = len(tensors)  # index + count stands for the turned matrix
    buckets: dict[Hashable, list[int]] = {}
    for index, tensor in enumerate(tensors):
        rows, columns = _shape(tensor)
        if rows <= columns:
            buckets.setdefault((tensor.dtype, rows, columns), []).append(index)
        if columns <= rows:
            buckets.setdefault((tensor.dtype, columns, rows), []).append(index + count)
    groups = [group for group in buckets.values() if _has_both(group, count)]
    for number in range(SAMPLED_ELEMENTS):
        finer = _split(groups, lambda entry, number=number: _element(tensors, entry, number))  # type: ignore[misc]
        groups = [group for group in finer if _has_both(group, count)]
    return sorted({pair for group in groups for pair in _pairs(group, count)})


def _has_both(group: Iterable[int], count: int) -> bool:
    straight, turned = _sides(group, count)
    return bool(straight and turned) and len(straight | turned) > 1


def _pairs(group: Iterable[int], count: int) -> Iterator[tuple[int, int]]:
    straight, turned = _sides(group, count)
    for first, second in product(straight, turned):
        # Square matrices meet twice: this one as it is and that one turned, and the other way round.
        if first != second:
            yield min(first, second), max(first, second)


def _sides(group: Iterable[int], count: int) -> tuple[set[int], set[int]]:
    entries = list(group)
    return {entry for entry in entries if entry < count}, {entry - count for entry in entries if entry >= count}


def _element(tensors: Sequence[ir.TensorProtocol], entry: int, number: int) -> bytes:
    """Return one element of a matrix as it is, or turned: of all matrices of one shape from the same place."""
    tensor = tensors[entry % len(tensors)]
    rows, columns = _shape(tensor)
    is_turned = entry >= len(tensors)
    row, column = np.random.default_rng(number).integers((columns, rows) if is_turned else (rows, columns)).tolist()
    if is_turned:
        row, column = column, row
    size = tensor.dtype.bitwidth // 8
    return bytes(bytes_reader(tensor).read((row * columns + column) * size, size))


def _shape(tensor: ir.TensorProtocol) -> tuple[int, ...]:
    return tuple(int(size) for size in tensor.shape.numpy())
