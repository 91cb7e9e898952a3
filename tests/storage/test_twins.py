"""Equal weights, found by their bytes."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from surgery.errors import ModelFileError
from surgery.storage import DataFile, Region, find_twins


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
