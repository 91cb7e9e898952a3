"""Equal weights, and weights that are others transposed, found by their bytes."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import numpy as np
import onnx_ir as ir

from surgery.storage.region import ByteReader, Region, bytes_reader

FIRST_CHUNK_BYTES = 4 << 10
CHUNK_BYTES = 1 << 20
MOST_READERS = 4
SAMPLED_ELEMENTS = 32
TILE_ELEMENTS = 1 << 20
MOST_TILE_ROWS = 2048
CACHE_LINE_BYTES = 64


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
    with _readers() as readers:
        found = readers.map(partial(_split, tensors), candidates)
        return sorted(group for groups in found for group in groups if len(group) > 1)


def find_transposed(tensors: Sequence[ir.TensorProtocol], min_bytes: int = 1) -> list[tuple[list[int], list[int]]]:
    """Find the matrices that are others transposed, element for element and bit for bit.

    A matrix is looked at only if there is one of its type and the reversed shape; a few elements of each then tell
    nearly all of them apart. What is left is compared a tile at a time, up to the first difference, so that memory
    stays at a few megabytes for matrices of any size.

    Args:
        tensors: Tensors of any number of models. Only matrices of types of 8, 16, 32 or 64 bits are looked at.
        min_bytes: Smaller tensors are left out.

    Returns:
        Pairs of groups: the indices of equal matrices [n, m], and those of the matrices [m, n] that are these
        transposed. Each group is in ascending order, the one with the smallest index is first in its pair, and pairs
        are sorted by it. A matrix that is its own transpose is in none.
    """
    by_kind: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, tensor in enumerate(tensors):
        if _is_comparable(tensor) and tensor.nbytes >= max(min_bytes, 1):
            by_kind[tensor.dtype, frozenset(tensor.shape.numpy())].append(index)
    with _readers() as readers:
        found = readers.map(partial(_pair, tensors), by_kind.values())
        return sorted(pair for pairs in found for pair in pairs)


def _is_comparable(tensor: ir.TensorProtocol) -> bool:
    is_string = tensor.dtype == ir.DataType.STRING
    return not is_string and len(tensor.shape) == 2 and tensor.dtype.bitwidth in (8, 16, 32, 64)


def _readers() -> ThreadPoolExecutor:
    """Return threads for reading and comparing, which both let other threads run."""
    return ThreadPoolExecutor(min(os.cpu_count() or 1, MOST_READERS))


def _split(tensors: Sequence[ir.TensorProtocol], indices: Sequence[int]) -> list[list[int]]:
    """Return the groups of equal bytes among tensors of one type and shape, single ones too."""
    same: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index in indices:
        same[_sameness(tensors[index])].append(index)
    members = list(same.values())
    length = tensors[indices[0]].nbytes
    return [sorted(index for member in equal for index in member) for equal in _refine(tensors, members, length)]


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


class _Matrix:
    """The elements of a matrix as unsigned integers of their bits, read where they are wanted."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        rows, columns = tensor.shape.numpy()
        self.shape = (int(rows), int(columns))
        self.element_bytes = tensor.dtype.bitwidth // 8
        self._reader = bytes_reader(tensor)

    def element(self, row: int, column: int) -> bytes:
        """Return the bytes of one element."""
        return bytes(self._reader.read((row * self.shape[1] + column) * self.element_bytes, self.element_bytes))

    def tile(self, rows: range, columns: range) -> np.ndarray:
        """Return a rectangle of elements [rows, columns]."""
        width, size = self.shape[1], self.element_bytes
        if len(columns) == width:
            content = self._reader.read(rows.start * width * size, len(rows) * width * size)
        else:
            starts = ((row * width + columns.start) * size for row in rows)
            content = b"".join(self._reader.read(start, len(columns) * size) for start in starts)
        return np.frombuffer(content, f"<u{size}").reshape(len(rows), len(columns))

    def turned_tile(self, rows: range, columns: range) -> np.ndarray:
        """Return a rectangle of elements of the transpose.

        Its columns lie an odd number of cache lines apart: at a power of two they would share a few lines, and to
        compare them would take ten times as long.
        """
        tile = self.tile(columns, rows)
        line = CACHE_LINE_BYTES // self.element_bytes
        padded = np.empty((len(columns), (len(rows) // (2 * line) * 2 + 3) * line), tile.dtype)
        padded[:, : len(rows)] = tile
        return padded[:, : len(rows)].T


def _pair(tensors: Sequence[ir.TensorProtocol], indices: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Return the pairs of transposed groups among matrices of one type, [n, m] and [m, n]."""
    shapes = {tuple(tensors[index].shape.numpy()) for index in indices}
    if shapes != {shape[::-1] for shape in shapes} or len(indices) == 1:
        return []
    matrices = {index: _Matrix(tensors[index]) for index in indices}
    straight, turned = (_by_sample(matrices, is_turned=is_turned) for is_turned in (False, True))
    pairs: list[tuple[list[int], list[int]]] = []
    for sample in straight.keys() & turned.keys():
        others = _split(tensors, turned[sample])
        for group in _split(tensors, straight[sample]):
            matrix = matrices[group[0]]
            later = (other for other in others if other[0] > group[0])
            pairs += [(group, other) for other in later if _are_transposed(matrix, matrices[other[0]])]
    return pairs


def _by_sample(matrices: Mapping[int, _Matrix], *, is_turned: bool) -> dict[Hashable, list[int]]:
    """Group matrices by shape and a few elements: their own, or those of their transposes."""
    groups: defaultdict[Hashable, list[int]] = defaultdict(list)
    for index, matrix in matrices.items():
        rows, columns = matrix.shape[::-1] if is_turned else matrix.shape
        random = np.random.default_rng(0)  # the same places for all matrices of a shape
        places = random.integers((rows, columns), size=(SAMPLED_ELEMENTS, 2)).tolist()
        sample = b"".join(matrix.element(*(place[::-1] if is_turned else place)) for place in places)
        groups[rows, columns, sample].append(index)
    return groups


def _are_transposed(matrix: _Matrix, other: _Matrix) -> bool:
    """Compare all elements, a tile at a time."""
    return all(np.array_equal(matrix.tile(*tile), other.turned_tile(*tile)) for tile in _tiles(matrix.shape))


def _tiles(shape: tuple[int, int]) -> Iterator[tuple[range, range]]:
    """Yield rectangles, rows and columns, that cover a matrix; the shorter side is kept whole where it can be.

    Each row of a tile that is not as wide as its matrix is read by itself, and it is the number of reads that counts.
    """
    rows, columns = shape
    side = min(rows, columns, MOST_TILE_ROWS)
    longer = TILE_ELEMENTS // side
    height, width = (longer, side) if columns < rows else (side, longer)
    for top in range(0, rows, height):
        for left in range(0, columns, width):
            yield range(top, min(top + height, rows)), range(left, min(left + width, columns))
