"""What goes into which file, and writing it: the weights are streamed, never collected."""

from __future__ import annotations

import os
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import onnx_ir as ir

from surgery.errors import OutputError
from surgery.storage.hollow import Stub, Weight, hollow
from surgery.storage.region import DataFile, Region, copy_range, key_of, memory_of, write_all
from surgery.storage.versions import lower
from surgery.storage.wire import MARKER, Chunk, inline, size_of

Progress = Callable[[int, int], None]

# A page, so that the runtime can map a big weight; and a cache line, which is all that arithmetic on a small one wants
# and wastes at most 6 % of the smallest.
PAGE_BYTES = 4096
LINE_BYTES = 64
BIG_BYTES = 1 << 20
# protobuf reads no message of 2 GiB or more.
MAX_GRAPH_BYTES = (1 << 31) - 1


@dataclass
class DataPlan:
    """A data file to be: which weight goes where. Weights that are one object or one place on disk go in once.

    Args:
        name: The file, relative to the output folder.
        location: The same relative to the graphs that use it.
    """

    name: str
    location: str
    size: int = 0
    entries: list[tuple[int, ir.TensorProtocol]] = field(default_factory=list)
    offsets: dict[Hashable, int] = field(default_factory=dict)

    def place(self, tensor: ir.TensorProtocol) -> int:
        """Return the tensor's offset."""
        key = key_of(tensor)
        if key in self.offsets:
            return self.offsets[key]
        unit = PAGE_BYTES if tensor.nbytes >= BIG_BYTES else LINE_BYTES
        offset = -(-self.size // unit) * unit
        self.entries.append((offset, tensor))
        self.offsets[key] = offset
        self.size = offset + tensor.nbytes
        return offset


@dataclass(frozen=True, slots=True)
class FilePlan:
    """Another file to be: the chunks that it consists of."""

    name: str
    chunks: Sequence[Chunk | DataFile]

    @property
    def size(self) -> int:
        return sum(chunk.size if isinstance(chunk, DataFile) else size_of([chunk]) for chunk in self.chunks)


Plan = DataPlan | FilePlan


def graph_chunks(model: ir.Model, data: DataPlan | None, min_bytes: int) -> list[Chunk]:
    """Return a model's file as chunks, with its big initializers placed in `data`; without one they stay inside."""
    inside: list[ir.TensorProtocol] = []

    def place(weight: Weight) -> Stub:
        if data is not None and weight.role == "initializer":
            return Stub(data.location, data.place(weight.tensor), weight.tensor.nbytes)
        inside.append(weight.tensor)
        return Stub(MARKER, len(inside) - 1, weight.tensor.nbytes)

    proto = hollow(model, place, min_bytes=min_bytes)
    lower(proto)
    return inline(proto.SerializeToString(), inside.__getitem__)


def write_files(folder: Path, files: Sequence[Plan], progress: Progress | None, *, is_synced: bool) -> None:
    """Write new files into a folder.

    Args:
        folder: Where to.
        files: What to write.
        progress: Called with bytes done and bytes in all.
        is_synced: Wait until they are on disk. What replaces a model must be, or a power cut could take both; a new
            model can only be lost together with the run that made it, and waiting takes longer than writing.
    """
    total = sum(file.size for file in files)
    done = 0

    def on_bytes(count: int) -> None:
        nonlocal done
        done += count
        if progress is not None:
            progress(done, total)

    for file in files:
        path = folder / file.name
        path.parent.mkdir(parents=True, exist_ok=True)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        try:
            if isinstance(file, DataPlan):
                write_data(fd, file, on_bytes)
            else:
                _write_chunks(fd, file.chunks, on_bytes)
            if is_synced:
                os.fsync(fd)
        finally:
            os.close(fd)


def write_data(fd: int, file: DataPlan, on_bytes: Callable[[int], None]) -> None:
    """Write the weights of a data file."""
    end = 0
    for offset, tensor in file.entries:
        on_bytes(offset - end)
        _write_tensor(fd, offset, tensor, on_bytes)
        end = offset + tensor.nbytes


def _write_chunks(fd: int, chunks: Sequence[Chunk | DataFile], on_bytes: Callable[[int], None]) -> None:
    position = 0
    for chunk in chunks:
        if isinstance(chunk, DataFile):
            copy_range(chunk, 0, chunk.size, fd, position, on_bytes)
            position += chunk.size
        elif isinstance(chunk, (bytes, memoryview)):
            write_all(fd, chunk, position, on_bytes)
            position += len(chunk)
        else:
            _write_tensor(fd, position, chunk, on_bytes)
            position += chunk.nbytes


def _write_tensor(fd: int, position: int, tensor: ir.TensorProtocol, on_bytes: Callable[[int], None]) -> None:
    if isinstance(tensor, Region):
        tensor.copy_to(fd, position, on_bytes)
        return
    content = memory_of(tensor)
    if content.nbytes != tensor.nbytes:
        raise OutputError(
            f"weight {tensor.name!r} has {content.nbytes:,} bytes, its type and shape say {tensor.nbytes:,}"
        )
    write_all(fd, content, position, on_bytes)


def check_graph_size(graph: FilePlan, *, has_data_file: bool) -> None:
    """Raise if nobody could read the graph."""
    if graph.size <= MAX_GRAPH_BYTES:
        return
    hint = "choose the layout 'optimum' or 'shared', which keep the weights in a data file"
    if has_data_file:
        hint = "make initializers of the big tensors in Constant nodes and functions: dedup_weights does"
    raise OutputError(
        f"{graph.name}: would have {graph.size:,} bytes, protobuf reads up to {MAX_GRAPH_BYTES:,}", hint=hint
    )
