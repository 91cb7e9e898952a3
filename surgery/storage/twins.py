"""Equal weights, found by their bytes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor

import onnx_ir as ir

from surgery.storage.region import ByteReader, Region, bytes_reader

FIRST_CHUNK_BYTES = 4 << 10
CHUNK_BYTES = 1 << 20
MOST_READERS = 4


def find_twins(tensors: Sequence[ir.TensorProtocol], min_bytes: int = 1) -> list[list[int]]:
    """Group the tensors that have the same type, the same shape and the same bytes.

    Bytes decide, never a hash and never a name: -0.0 is not 0.0, and two NaNs are equal if their bits are. A tensor is
    read only as long as another one agrees with it so far, a chunk at a time; regions of one place are not read at all.

    Args:
        tensors: Tensors of any number of models. Strings have no twins.
        min_bytes: Smaller tensors are left out.

    Returns:
        Groups of two or more indices, each in ascending order, by their first index.
    """
    alike: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if tensor.dtype != ir.DataType.STRING and tensor.nbytes >= min_bytes:
            alike[tensor.dtype, tuple(tensor.shape.numpy())].append(index)
    candidates = [indices for indices in alike.values() if len(indices) > 1]
    with ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_READERS)) as readers:  # reading lets other threads run
        found = readers.map(lambda indices: list(_split(tensors, indices)), candidates)
        return sorted((group for groups in found for group in groups), key=lambda group: group[0])


def _split(tensors: Sequence[ir.TensorProtocol], indices: Sequence[int]) -> Iterator[list[int]]:
    """Yield the groups of equal bytes among tensors of one type and shape."""
    same: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index in indices:
        same[_sameness(tensors[index])].append(index)
    members = list(same.values())
    length = tensors[indices[0]].nbytes
    for equal in _refine(tensors, members, length):
        group = sorted(index for member in equal for index in member)
        if len(group) > 1:
            yield group


def _refine(tensors: Sequence[ir.TensorProtocol], members: list[list[int]], length: int) -> Iterable[list[list[int]]]:
    readers: dict[int, ByteReader] = {}
    parts, position, size = [members], 0, FIRST_CHUNK_BYTES
    while position < length and any(len(part) > 1 for part in parts):
        parts = [finer for part in parts for finer in _by_chunk(tensors, part, readers, position, size)]
        position, size = position + size, CHUNK_BYTES
    return parts


def _by_chunk(
    tensors: Sequence[ir.TensorProtocol],
    part: list[list[int]],
    readers: dict[int, ByteReader],
    position: int,
    size: int,
) -> Iterable[list[list[int]]]:
    if len(part) == 1:
        readers.pop(part[0][0], None)
        return [part]
    finer: list[tuple[bytes, list[list[int]]]] = []
    for member in part:
        index = member[0]
        if index not in readers:
            readers[index] = bytes_reader(tensors[index])
        chunk = bytes(readers[index].read(position, size))
        # Comparing is a memcmp and ends at the first difference; hashing a chunk would cost more than reading it.
        equal = next((members for known, members in finer if known == chunk), None)
        if equal is None:
            finer.append((chunk, [member]))
        else:
            equal.append(member)
    return [members for _, members in finer]


def _sameness(tensor: ir.TensorProtocol) -> Hashable:
    return tensor.place if isinstance(tensor, Region) else id(tensor)
