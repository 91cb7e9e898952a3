"""Weights as stretches of files."""

from __future__ import annotations

import io
import os
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import pytest

from surgery.errors import ModelFileError
from surgery.storage import DataFile, Region, bytes_reader
from surgery.storage.region import memory_of

ODD = 7  # an offset that no type is aligned to


def region(tmp_path: Path, array: np.ndarray, dtype: ir.DataType, *, offset: int = ODD) -> Region:
    packed = ir.Tensor(array, dtype=dtype).tobytes()
    path = tmp_path / "weights.bin"
    path.write_bytes(b"?" * offset + packed + b"!")
    return Region(DataFile(path), offset, dtype, ir.Shape(array.shape), name="w")


@pytest.mark.parametrize(
    "dtype",
    [dtype for dtype in ir.DataType if dtype not in (ir.DataType.UNDEFINED, ir.DataType.STRING)],
)
def test_every_type_reads_back_at_an_unaligned_offset(tmp_path, dtype):
    values = (np.arange(15).reshape(3, 5) % 2).astype(dtype.numpy())
    weight = region(tmp_path, values, dtype)
    assert weight.numpy().dtype == dtype.numpy()
    assert np.array_equal(weight.numpy().astype(np.complex128), values.astype(np.complex128), equal_nan=True)
    assert weight.tobytes() == ir.Tensor(values, dtype=dtype).tobytes() == bytes(memory_of(weight))
    assert weight.nbytes == weight.length == len(weight.tobytes())


def test_values_are_a_read_only_view_of_the_file(tmp_path):
    weight = region(tmp_path, np.arange(6, dtype=np.float32), ir.DataType.FLOAT)
    assert not weight.numpy().flags.writeable
    assert np.shares_memory(weight.numpy(), weight.numpy())


def test_scalars_and_empty_tensors_read_back(tmp_path):
    assert region(tmp_path, np.array(3.5, np.float32), ir.DataType.FLOAT).numpy() == 3.5
    empty = region(tmp_path, np.empty((0, 4), np.float32), ir.DataType.FLOAT)
    assert empty.numpy().shape == (0, 4)
    assert empty.tobytes() == b""


def test_a_file_replaced_by_another_still_reads_as_it_was(tmp_path):
    weight = region(tmp_path, np.arange(6, dtype=np.float32), ir.DataType.FLOAT)
    (tmp_path / "new").write_bytes(b"x" * 100)
    (tmp_path / "new").replace(weight.path)
    assert weight.numpy().tolist() == [0, 1, 2, 3, 4, 5]


def test_a_file_that_became_shorter_is_an_error_and_not_a_crash(tmp_path):
    weight = region(tmp_path, np.zeros(5000, np.float32), ir.DataType.FLOAT)
    os.truncate(weight.path, 1000)
    for read in (weight.numpy, weight.tobytes, lambda: weight.read(900, 400), lambda: weight.tofile(io.BytesIO())):
        with pytest.raises(ModelFileError, match="has become shorter while it was in use: 1,000 bytes are left"):
            read()
    with (tmp_path / "out").open("wb") as file, pytest.raises(ModelFileError, match="has become shorter"):
        weight.tofile(file)


def test_two_regions_of_one_place_say_so_even_under_two_names(tmp_path):
    weight = region(tmp_path, np.arange(6, dtype=np.float32), ir.DataType.FLOAT)
    os.link(weight.path, tmp_path / "other")
    other = Region(DataFile(tmp_path / "other"), ODD, weight.dtype, ir.Shape([6]))
    assert other.place == weight.place
    assert Region(weight.file, ODD + 4, weight.dtype, ir.Shape([5])).place != weight.place


@pytest.mark.parametrize("dtype", [ir.DataType.FLOAT, ir.DataType.INT4])
def test_tofile_writes_the_bytes_to_files_and_to_streams(tmp_path, dtype):
    weight = region(tmp_path, (np.arange(15) % 3).astype(dtype.numpy()), dtype)
    stream = io.BytesIO()
    stream.write(b"ab")
    weight.tofile(stream)
    assert stream.getvalue() == b"ab" + weight.tobytes()
    with (tmp_path / "out").open("wb") as file:
        file.write(b"ab")
        weight.tofile(file)
        file.write(b"cd")
    assert (tmp_path / "out").read_bytes() == b"ab" + weight.tobytes() + b"cd"


def test_tofile_overwrites_what_was_there(tmp_path):
    weight = region(tmp_path, np.zeros(5000, np.float32), ir.DataType.FLOAT)
    out = tmp_path / "out"
    out.write_bytes(b"x" * 30_000)
    with out.open("r+b") as file:
        weight.tofile(file)
    assert out.read_bytes() == bytes(20_000) + b"x" * 10_000


def test_holes_stay_holes_and_data_stays_where_it_was(tmp_path):
    path, size = tmp_path / "sparse", 1 << 30
    with path.open("wb") as file:
        file.truncate(size)
        os.pwrite(file.fileno(), b"middle", size // 2)
    weight = Region(DataFile(path), 3, ir.DataType.UINT8, ir.Shape([size - 5]))
    with (tmp_path / "copy").open("wb") as file:
        weight.tofile(file)
    status = (tmp_path / "copy").stat()
    assert status.st_size == size - 5
    assert status.st_blocks * 512 < 1 << 20
    with (tmp_path / "copy").open("rb") as file:
        assert os.pread(file.fileno(), 8, size // 2 - 4) == b"\0middle\0"


def test_readers_give_the_same_pieces_from_disk_and_from_memory(tmp_path):
    values = np.arange(999, dtype=np.int16)
    on_disk = bytes_reader(region(tmp_path, values, ir.DataType.INT16))
    in_memory = bytes_reader(ir.tensor(values))
    assert on_disk.length == in_memory.length == 1998
    for start, size in ((0, 10), (1990, 100), (7, 13)):
        assert bytes(on_disk.read(start, size)) == bytes(in_memory.read(start, size))


def test_tensors_in_memory_are_seen_without_a_copy():
    values = np.arange(12, dtype=np.float32)
    assert np.shares_memory(np.frombuffer(memory_of(ir.tensor(values)), np.uint8), values)


@pytest.mark.parametrize(
    "tensor",
    [
        ir.tensor(np.arange(12, dtype=np.float32).reshape(3, 4).T),
        ir.tensor(np.arange(12).astype(ml_dtypes.bfloat16)),
        ir.tensor(np.arange(7).astype(ml_dtypes.int4)),
        ir.PackedTensor(np.array([0x21, 0x43], np.uint8), ir.DataType.UINT4, shape=[4]),
        ir.LazyTensor(lambda: ir.tensor(np.arange(5)), dtype=ir.DataType.INT64, shape=ir.Shape([5])),
        ir.tensor(np.array(1.5)),
        ir.tensor(np.empty((0, 3), np.float32)),
        ir.tensor(np.array([True, False])),
    ],
)
def test_memory_of_a_tensor_is_what_onnx_would_store(tensor):
    assert bytes(memory_of(tensor)) == tensor.tobytes()


def test_what_is_not_a_file_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="is not a file"):
        DataFile(tmp_path / "pipe")
    with pytest.raises(ModelFileError, match="is not a file"):
        DataFile(tmp_path)
    with pytest.raises(ModelFileError, match="there is no such file"):
        DataFile(tmp_path / "nothing")


def test_many_regions_share_one_descriptor(tmp_path):
    first = region(tmp_path, np.arange(64, dtype=np.uint8), ir.DataType.UINT8)
    before = len(os.listdir("/proc/self/fd"))
    regions = [Region(first.file, offset, ir.DataType.UINT8, ir.Shape([1])) for offset in range(64)]
    assert [int(one.numpy()[0]) for one in regions[ODD:10]] == [0, 1, 2]
    assert len(os.listdir("/proc/self/fd")) <= before + 1
