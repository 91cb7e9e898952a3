"""Equal weights, and weights that are others transposed, found by their bytes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from surgery.errors import ModelFileError
from surgery.storage import DataFile, Region, find_transposed, find_twins


def on_disk(path: Path, content: bytes, count: int) -> list[Region]:
    """The same bytes `count` times, one after the other in a file."""
    path.write_bytes(content * count)
    file = DataFile(path)
    shape = ir.Shape([len(content)])
    return [Region(file, i * len(content), ir.DataType.UINT8, ir.Shape(shape)) for i in range(count)]


def test_equal_bytes_are_twins_and_others_are_not():
    a, b = np.arange(300), np.arange(300) + 1
    assert find_twins([ir.tensor(x) for x in (a, b, a.copy(), b.copy(), a[::-1])]) == [[0, 2], [1, 3]]


def test_minus_zero_is_not_zero():
    assert find_twins([ir.tensor(np.zeros(4)), ir.tensor(-np.zeros(4))]) == []


def test_nans_are_equal_if_their_bits_are():
    quiet = np.array([0x7FC00000, 0x7FC00001, 0x7FC00000], np.uint32).view(np.float32)
    assert find_twins([ir.tensor(quiet[i : i + 1].copy()) for i in range(3)]) == [[0, 2]]


@pytest.mark.parametrize("position", [0, 4095, 4096, 70_000, 3_000_000])
def test_a_difference_of_one_byte_anywhere_separates(position):
    a = np.zeros(3_000_001, np.uint8)
    b = a.copy()
    b[position] = 1
    assert find_twins([ir.tensor(a), ir.tensor(b), ir.tensor(a.copy())]) == [[0, 2]]


def test_the_same_bytes_in_another_shape_or_type_are_not_twins():
    a = np.arange(16, dtype=np.float32)
    assert find_twins([ir.tensor(a), ir.tensor(a.reshape(4, 4)), ir.tensor(a.view(np.int32))]) == []


def test_bfloat16_is_not_float16_and_int4_is_compared_packed():
    bits = np.arange(8, dtype=np.uint16)
    assert find_twins([ir.tensor(bits.view(np.float16)), ir.tensor(bits.view(ml_dtypes.bfloat16))]) == []
    fours = np.arange(7).astype(ml_dtypes.int4)
    packed = ir.PackedTensor(np.array([0x10, 0x32, 0x54, 0x06], np.uint8), ir.DataType.INT4, shape=[7])
    assert find_twins([ir.tensor(fours), packed]) == [[0, 1]]


def test_strings_have_no_twins():
    text = ir.StringTensor([b"a", b"b"], shape=ir.Shape([2]))
    assert find_twins([text, text]) == []


def test_small_tensors_can_be_left_out():
    a = np.arange(4, dtype=np.float32)
    assert find_twins([ir.tensor(a), ir.tensor(a.copy())], min_bytes=17) == []


def test_disk_and_memory_have_twins(tmp_path):
    content = bytes(range(256)) * 100
    regions = on_disk(tmp_path / "w", content, 2)
    assert find_twins([*regions, ir.tensor(np.frombuffer(content, np.uint8))]) == [[0, 1, 2]]


def test_regions_of_one_place_are_twins_without_being_read(tmp_path):
    region = on_disk(tmp_path / "w", b"x" * 5000, 1)[0]
    twin = Region(DataFile(region.path), 0, region.dtype, ir.Shape([5000]))
    (tmp_path / "w").write_bytes(b"")
    assert find_twins([region, twin]) == [[0, 1]]
    with pytest.raises(ModelFileError, match="has become shorter"):
        region.tobytes()


def test_only_what_may_still_have_a_twin_is_read_on(tmp_path):
    class Counted(Region):
        bytes_read = 0

        def read(self, start: int, size: int) -> bytes:
            Counted.bytes_read += size
            return super().read(start, size)

    size = 8 << 20
    with (tmp_path / "w").open("wb") as file:
        for first in (b"a", b"b", b"c"):
            file.write(first + bytes(size - 1))
    file = DataFile(tmp_path / "w")
    assert find_twins([Counted(file, i * size, ir.DataType.UINT8, ir.Shape([size])) for i in range(3)]) == []
    assert Counted.bytes_read == 3 * 4096


def test_empty_tensors_of_one_shape_are_twins_if_they_count():
    empty = [ir.tensor(np.empty((0, 2), np.float32)) for _ in range(2)]
    assert find_twins(empty) == []
    assert find_twins(empty, min_bytes=0) == [[0, 1]]


# Transposed


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def stored(*arrays: np.ndarray) -> list[ir.Tensor]:
    """The arrays as tensors, each in memory of its own."""
    return [ir.tensor(np.array(array, order="C")) for array in arrays]


def test_a_matrix_and_its_transpose_are_a_pair():
    a, b = random(30, 20), random(30, 20, seed=1)
    assert find_transposed(stored(a, b, a.T)) == [([0], [2])]


@pytest.mark.parametrize(
    "shape", [(1, 9), (9, 1), (3, 3), (2049, 700), (700, 2049), (2500, 2300), (40_000, 33), (33, 40_000)]
)
def test_matrices_of_any_shape_are_compared_to_the_last_element(shape: tuple[int, int]):
    a = random(*shape)
    other = a.copy()
    other[-1, -1] += 1
    assert find_transposed(stored(a, a.T)) == [([0], [1])]
    assert find_transposed(stored(other, a.T)) == []


@pytest.mark.parametrize("dtype", [np.int8, np.float16, ml_dtypes.bfloat16, ml_dtypes.float8_e4m3fn, np.int64])
def test_elements_of_8_to_64_bits_are_compared(dtype: type):
    a = (np.arange(6).reshape(2, 3) % 5).astype(dtype)
    assert find_transposed(stored(a, a.T)) == [([0], [1])]


def test_a_transpose_of_another_type_or_the_same_bytes_in_the_reversed_shape_is_none():
    a = random(4, 3)
    assert find_transposed(stored(a, a.T.astype(np.float64), a.T.view(), a.reshape(3, 4))) == [([0], [2])]
    assert find_transposed(stored(a, np.ascontiguousarray(a.T).view(np.int32))) == []


def test_equal_matrices_share_a_group_and_the_first_index_comes_first():
    a, b = random(5, 4), random(4, 5, seed=1)
    tensors = stored(b, a.T, a, b.T, a.T, a)
    assert find_transposed(tensors) == [([0], [3]), ([1, 4], [2, 5])]


def test_square_matrices_are_told_apart_from_those_that_are_their_own_transpose():
    a, b = random(6, 6), random(6, 6, seed=1)
    assert find_transposed(stored(a, a, b + b.T, b + b.T, b)) == []
    assert find_transposed(stored(a, b, a.T, a, b + b.T)) == [([0, 3], [2])]


def test_zero_and_minus_zero_are_told_apart_in_transposes_too():
    zeros = np.zeros((2, 3), np.float32)
    assert find_transposed(stored(zeros, -zeros.T)) == []
    assert find_transposed(stored(zeros, zeros.T)) == [([0], [1])]


def test_nans_of_the_same_bits_are_the_same_element():
    bits = np.array([[0x7FC00000, 0x7FC00001, 1]], np.uint32)
    assert find_transposed(stored(bits.view(np.float32), bits.T.copy().view(np.float32))) == [([0], [1])]
    assert find_transposed(stored(bits.view(np.float32), bits[:, ::-1].T.copy().view(np.float32))) == []


def test_what_is_no_matrix_has_no_transpose():
    vector, cube, empty = random(6), random(2, 3, 4), random(0, 3)
    fours = np.arange(6).reshape(2, 3).astype(ml_dtypes.int4)
    text = [ir.StringTensor([b"a", b"b"], shape=ir.Shape(shape)) for shape in ([1, 2], [2, 1])]
    assert find_transposed([*stored(vector, vector, cube, cube.T, empty, empty.T, fours, fours.T), *text]) == []


def test_small_matrices_can_be_left_out_of_the_search():
    a = random(3, 2)
    assert find_transposed(stored(a, a.T), min_bytes=25) == []
    assert find_transposed(stored(a, a.T), min_bytes=24) == [([0], [1])]


def test_matrices_on_disk_are_compared_at_any_offset_and_with_ones_in_memory(tmp_path):
    a = random(2000, 1100)
    (tmp_path / "w").write_bytes(b"xyz" + a.tobytes() + a.T.tobytes())
    file = DataFile(tmp_path / "w")
    regions = [
        Region(file, 3, ir.DataType.FLOAT, ir.Shape(a.shape)),
        Region(file, 3 + a.nbytes, ir.DataType.FLOAT, ir.Shape(a.T.shape)),
    ]
    assert find_transposed([*regions, *stored(a.T)]) == [([0], [1, 2])]


def test_a_view_that_is_transposed_in_memory_counts_by_what_onnx_stores():
    a = random(4, 3)
    assert find_transposed([ir.tensor(a), ir.tensor(a.T)]) == [([0], [1])]


def test_matrices_that_differ_are_told_apart_by_a_few_elements(tmp_path):
    class Counted(Region):
        bytes_read = 0

        def read(self, start: int, size: int) -> bytes:
            Counted.bytes_read += size
            return super().read(start, size)

    arrays = [random(1000, 1000, seed=seed) for seed in range(4)]
    (tmp_path / "w").write_bytes(b"".join(array.tobytes() for array in arrays))
    file = DataFile(tmp_path / "w")
    size = arrays[0].nbytes
    tensors = [Counted(file, i * size, ir.DataType.FLOAT, ir.Shape([1000, 1000])) for i in range(4)]
    assert find_transposed(tensors) == []
    assert Counted.bytes_read <= 4 * 2 * 32 * 4


def test_a_matrix_without_one_of_the_reversed_shape_is_not_read(tmp_path):
    a = random(4, 3)
    (tmp_path / "w").write_bytes(a.tobytes())
    regions = [Region(DataFile(tmp_path / "w"), 0, ir.DataType.FLOAT, ir.Shape([4, 3])) for _ in range(2)]
    (tmp_path / "w").write_bytes(b"")
    assert find_transposed(regions) == []
