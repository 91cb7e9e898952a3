"""Weights as stretches of files: opened once, mapped when looked at, copied by the kernel."""

from __future__ import annotations

import errno
import math
import mmap
import os
import secrets
import stat
import sys
import weakref
from collections.abc import Callable, Hashable
from typing import Any, BinaryIO, Protocol, overload

import numpy as np
import onnx_ir as ir
from onnx_ir import _type_casting
from onnx_ir._core import TensorBase

from surgery.errors import ModelFileError

Place = tuple[int, int, int, int]
"""Device, inode, offset and length: two regions of one place are the same bytes on disk."""

_TOKEN = "surgery.storage.token"

COPY_CHUNK_BYTES = 64 << 20
BUFFER_BYTES = 8 << 20

# What the kernel answers when it cannot copy between these two files by itself; we then copy through a buffer.
_NO_KERNEL_COPY = {errno.EXDEV, errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP, errno.EPERM, errno.EBADF}


class ByteReader(Protocol):
    """Anything whose bytes can be read piece by piece."""

    @property
    def length(self) -> int: ...

    def read(self, start: int, size: int) -> bytes | memoryview: ...


class DataFile:
    """An open file that any number of regions share: one descriptor and at most one mapping.

    The descriptor is taken at once, so the bytes stay readable when somebody renames another file over this one.

    Raises:
        ModelFileError: If the file cannot be opened or is not a regular file.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = os.fspath(path)
        self.fd = _open_regular_file(self.path)
        weakref.finalize(self, os.close, self.fd)
        status = os.fstat(self.fd)
        self.device, self.inode, self.size = status.st_dev, status.st_ino, status.st_size
        self._mapping: mmap.mmap | None = None

    @property
    def mapping(self) -> mmap.mmap:
        """The whole file, read-only; an empty file has none."""
        if self._mapping is None:
            self._mapping = mmap.mmap(self.fd, 0, access=mmap.ACCESS_READ)
        return self._mapping

    def check_reaches(self, end: int) -> None:
        """Raise unless the file still holds `end` bytes; reading a mapping beyond its file would kill the process."""
        size = os.fstat(self.fd).st_size
        if size < end:
            raise _shortened(self.path, size, end)

    def read(self, offset: int, size: int) -> bytes:
        """Return exactly these bytes, without touching the mapping."""
        pieces: list[bytes] = []
        while size > 0:
            piece = os.pread(self.fd, size, offset)
            if not piece:
                raise _shortened(self.path, os.fstat(self.fd).st_size, offset + size)
            pieces.append(piece)
            offset, size = offset + len(piece), size - len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)


class Window:
    """A file as a sequence of bytes of which a little is in memory: no mapping, so no crash if the file shrinks."""

    def __init__(self, file: DataFile, window_bytes: int = 16 << 10) -> None:
        self._file = file
        self._window_bytes = window_bytes
        self._start = 0
        self._content = b""

    def __len__(self) -> int:
        return self._file.size

    @overload
    def __getitem__(self, index: int) -> int: ...

    @overload
    def __getitem__(self, index: slice) -> bytes: ...

    def __getitem__(self, index: int | slice) -> int | bytes:
        if isinstance(index, slice):
            start, stop, _ = index.indices(len(self))
            return self._file.read(start, stop - start)
        here = index - self._start
        if not 0 <= here < len(self._content):
            self._content = self._file.read(index, min(self._window_bytes, len(self) - index))
            self._start, here = index, 0
        return self._content[here]


class Region(TensorBase):
    """A tensor whose bytes are a stretch of a file: nothing is read until somebody asks for values.

    Args:
        file: The open file.
        offset: Where the bytes start; need not be aligned.
        dtype: The element type.
        shape: The dimensions; together with `dtype` they say how many bytes there are.
    """

    __slots__ = ("_dtype", "_shape", "file", "offset")

    def __init__(
        self,
        file: DataFile,
        offset: int,
        dtype: ir.DataType,
        shape: ir.Shape,
        *,
        name: str | None = None,
        doc_string: str | None = None,
        metadata_props: dict[str, str] | None = None,
    ) -> None:
        super().__init__(name=name, doc_string=doc_string, metadata_props=metadata_props)
        self.file = file
        self.offset = offset
        self._dtype = dtype
        self._shape = shape
        self._shape.freeze()

    @property
    def dtype(self) -> ir.DataType:  # type: ignore[override]
        return self._dtype

    @property
    def shape(self) -> ir.Shape:  # type: ignore[override]
        return self._shape

    @property
    def path(self) -> str:
        """The file that held the bytes when it was opened."""
        return self.file.path

    @property
    def length(self) -> int:
        """The number of bytes."""
        return int(self.nbytes)

    @property
    def place(self) -> Place:
        """Which bytes of the disk these are, whatever the path."""
        return self.file.device, self.file.inode, self.offset, self.length

    @property
    def raw(self) -> memoryview:
        """The bytes as they are in the file, mapped."""
        if self.length == 0:
            return memoryview(b"")
        self.file.check_reaches(self.offset + self.length)
        return memoryview(self.file.mapping)[self.offset : self.offset + self.length]

    def numpy(self) -> np.ndarray:
        """Return the values: a read-only view of the mapped file, or for types under 8 bits an unpacked copy."""
        shape = self._shape.numpy()
        if self.length == 0:
            return np.empty(shape, dtype=self._dtype.numpy())
        packed = np.frombuffer(self.raw, dtype=np.uint8)
        if self._dtype.bitwidth < 8:
            return unpack(packed, self._dtype, shape)
        return packed.view(self._dtype.numpy()).reshape(shape)

    def read(self, start: int, size: int) -> bytes:
        """Return `size` bytes from `start` on, by the descriptor, so that resident memory does not grow."""
        return self.file.read(self.offset + start, min(size, self.length - start))

    def tobytes(self) -> bytes:
        return self.file.read(self.offset, self.length)

    def tofile(self, file: BinaryIO) -> None:
        """Append the bytes to an open file, in the kernel where it can; holes stay holes at the file's end."""
        if not _is_regular(file):
            for start in range(0, self.length, BUFFER_BYTES):
                file.write(self.read(start, BUFFER_BYTES))
            return
        file.flush()
        position = file.tell()
        self.copy_to(file.fileno(), position)
        file.seek(position + self.length)

    def copy_to(self, target: int, position: int, on_bytes: Callable[[int], None] | None = None) -> None:
        """Copy the bytes to `position` of the open file `target` (a descriptor).

        Raises:
            ModelFileError: If the source file has become shorter in the meantime.
            OSError: If the target takes no more.
        """
        copy_range(self.file, self.offset, self.length, target, position, on_bytes or _ignore)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        array = self.numpy()
        return array if dtype is None else array.astype(dtype, copy=False)

    def __dlpack__(self, *, stream: Any = None) -> Any:
        return self.numpy().__dlpack__(stream=stream)

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.numpy().__dlpack_device__()

    def __repr__(self) -> str:
        return f"{self._repr_base()}(name={self.name!r}, path={self.path!r}, offset={self.offset})"


class MemoryReader:
    """The bytes of a tensor that lives in memory, in ONNX's packed little-endian form, without a copy if possible."""

    def __init__(self, tensor: ir.TensorProtocol) -> None:
        self._bytes = memory_of(tensor)

    @property
    def length(self) -> int:
        return self._bytes.nbytes

    def read(self, start: int, size: int) -> memoryview:
        return self._bytes[start : start + size]


def bytes_reader(tensor: ir.TensorProtocol) -> ByteReader:
    """Return the tensor's bytes as something that is read piece by piece."""
    return tensor if isinstance(tensor, Region) else MemoryReader(tensor)


def key_of(tensor: ir.TensorProtocol) -> Hashable:
    """Return what two tensors have in common if they are the same bytes on disk or the same object in memory."""
    if isinstance(tensor, Region):
        return tensor.place
    # An id may be given again once its object is gone; a token never is.
    return str(tensor.meta.setdefault(_TOKEN, secrets.token_hex(8)))


def memory_of(tensor: ir.TensorProtocol) -> memoryview:
    """Return the bytes of a tensor as ONNX stores them; copies only what is packed, lazy or not contiguous."""
    if isinstance(tensor, Region):
        return tensor.raw
    if isinstance(tensor, ir.PackedTensor):
        array = tensor.numpy_packed()
    elif tensor.dtype.bitwidth < 8:
        return memoryview(tensor.tobytes())
    else:
        array = tensor.numpy()
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8).data


def bytes_of_shape(dtype: ir.DataType, shape: tuple[int, ...]) -> int:
    """Return how many bytes ONNX stores for a tensor of this type and shape."""
    return (dtype.bitwidth * math.prod(shape) + 7) // 8


def unpack(packed: np.ndarray, dtype: ir.DataType, shape: tuple[int, ...]) -> np.ndarray:
    """Return one element a byte, as ml_dtypes sees types under 8 bits."""
    unpackers = {2: _type_casting.unpack_2bitx4, 4: _type_casting.unpack_4bitx2, 6: _type_casting.unpack_6bit}
    array: np.ndarray = unpackers[dtype.bitwidth](packed, shape).view(dtype.numpy())
    return array


def copy_range(
    source: DataFile, offset: int, length: int, target: int, position: int, on_bytes: Callable[[int], None]
) -> None:
    """Copy a stretch of a file into `target`, which must have nothing at `position` or after if holes are to stay.

    Raises:
        ModelFileError: If the source file has become shorter than the stretch.
    """
    source.check_reaches(offset + length)
    keeps_holes = os.fstat(target).st_size <= position
    shift, end = position - offset, offset + length
    while offset < end:
        start = _next(os.SEEK_DATA, source.fd, offset, end) if keeps_holes else offset
        stop = _next(os.SEEK_HOLE, source.fd, start, end) if keeps_holes and start < end else end
        on_bytes(start - offset)
        _copy_data(source, start, stop, target, start + shift, on_bytes)
        offset = stop
    if os.fstat(target).st_size < end + shift:
        os.ftruncate(target, end + shift)


def write_all(target: int, content: bytes | memoryview, position: int, on_bytes: Callable[[int], None]) -> None:
    """Write everything at `position` of a descriptor, however often the system wants to be asked."""
    view = memoryview(content)
    while view.nbytes:
        written = os.pwrite(target, view[:BUFFER_BYTES], position)
        on_bytes(written)
        view, position = view[written:], position + written


def _copy_data(
    source: DataFile, start: int, stop: int, target: int, position: int, on_bytes: Callable[[int], None]
) -> None:
    while start < stop:
        size = min(COPY_CHUNK_BYTES, stop - start)
        copied = _copy_in_kernel(source.fd, start, size, target, position)
        if copied is None:
            content = source.read(start, min(size, BUFFER_BYTES))
            write_all(target, content, position, _ignore)
            copied = len(content)
        if copied == 0:
            raise _shortened(source.path, start, stop)
        on_bytes(copied)
        start, position = start + copied, position + copied


def _copy_in_kernel(source: int, start: int, size: int, target: int, position: int) -> int | None:
    """Return how many bytes the kernel copied, `None` if it cannot copy between these files."""
    if not hasattr(os, "copy_file_range"):
        return None
    try:
        return os.copy_file_range(source, target, size, offset_src=start, offset_dst=position)
    except OSError as error:
        if error.errno in _NO_KERNEL_COPY:
            return None
        raise


def _next(whence: int, fd: int, start: int, end: int) -> int:
    """Return where the next data or hole begins, `end` if not before."""
    try:
        return min(os.lseek(fd, start, whence), end)
    except OSError as error:
        if error.errno == errno.ENXIO:
            return end
        # A file system that knows no holes: all is data.
        return start if whence == os.SEEK_DATA else end


def _open_regular_file(path: str) -> int:
    if sys.byteorder != "little":
        raise ModelFileError(f"{path}: ONNX files are little-endian and this machine is not")
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError as error:
        raise ModelFileError(f"{path}: there is no such file") from error
    except OSError as error:
        hint = "raise the limit of open files: ulimit -n 65536" if error.errno == errno.EMFILE else ""
        raise ModelFileError(f"{path}: cannot be opened: {error.strerror}", hint=hint) from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise ModelFileError(f"{path}: is not a file")
    return fd


def _is_regular(file: BinaryIO) -> bool:
    try:
        return stat.S_ISREG(os.fstat(file.fileno()).st_mode)
    except (OSError, AttributeError):
        return False


def _shortened(path: str, size: int, end: int) -> ModelFileError:
    return ModelFileError(
        f"{path}: has become shorter while it was in use: {size:,} bytes are left, {end:,} are needed",
        hint="do not write to a model that is being worked on",
    )


def _ignore(_: int) -> None:
    pass
