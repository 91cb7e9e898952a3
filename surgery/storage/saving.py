"""Saving models: weights first, graph last, everything or nothing."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Literal

import onnx_ir as ir

from surgery.errors import OutputError
from surgery.storage.atomic import publish_folder, publish_model, staging
from surgery.storage.companions import for_other_tools
from surgery.storage.naming import (
    MANIFEST,
    MIN_DATA_BYTES,
    SHARED_DATA,
    data_file_of,
    file_of_role,
    hub_files,
    manifest_bytes,
    read_manifest,
)
from surgery.storage.packing import (
    DataPlan,
    FilePlan,
    Plan,
    Progress,
    check_graph_size,
    graph_chunks,
    write_files,
)
from surgery.storage.region import DataFile, Region

Layout = Literal["optimum", "hub", "shared", "single"]

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}


@dataclass(frozen=True, slots=True)
class SavedFile:
    """A file that a save wrote: its name relative to the folder, and its size."""

    name: str
    bytes: int


def save_models(
    models: Mapping[str, ir.Model],
    folder: str | os.PathLike[str],
    *,
    layout: Layout = "optimum",
    extras: Mapping[str, bytes | Path] | None = None,
    overwrite: bool = False,
    protected: Sequence[str | os.PathLike[str]] = (),
    min_bytes: int = MIN_DATA_BYTES,
    progress: Progress | None = None,
) -> list[SavedFile]:
    """Write models by role into a folder that appears whole or not at all; the models stay as they are.

    Args:
        models: The models by role; `file_of_role` names their files.
        folder: Where to. A folder that exists and is not empty needs `overwrite`; its files that no save of
            ours wrote are kept.
        layout: `optimum`: X.onnx with X.onnx_data beside it. `hub`: the same in a folder `onnx`, below everything else.
            `shared`: one data file for all. `single`: no data file.
        extras: More files by relative name, as bytes or as a file to copy.
        overwrite: Replace the models that are there.
        protected: Files and folders that must not be touched: the inputs.
        min_bytes: Smaller weights stay in the graph.
        progress: Called with bytes done and bytes in all.

    Returns:
        The files, data first.

    Raises:
        OutputError: If the place is taken or protected, the disk is full, or a graph would exceed 2 GiB.
        ModelFileError: If a source file has become shorter, or an initializer has no value.
    """
    target = Path(folder).resolve()
    _check_folder(target, overwrite, protected)
    names = _file_names(models, layout)
    data, graphs = _plan(models, names, layout, min_bytes)
    companions = for_other_tools(extras or {}, [] if layout == "shared" else [file.name for file in data])
    others = [_extra_file(name, content) for name, content in companions.items()]
    files: list[Plan] = [*data, *others, *graphs]
    _check_names([*(file.name for file in files), MANIFEST])
    files.append(FilePlan(MANIFEST, [manifest_bytes(layout, names, [file.name for file in files])]))
    old = read_manifest(target)
    with _write_errors(target, files), staging(target) as staged:
        _check_space(target.parent, files)
        write_files(staged, files, progress, is_synced=target.exists())
        publish_folder(staged, target, old.files if old else ())
    return [SavedFile(file.name, file.size) for file in files]


def save_model(
    model: ir.Model,
    path: str | os.PathLike[str],
    *,
    layout: Literal["optimum", "single"] = "optimum",
    overwrite: bool = False,
    protected: Sequence[str | os.PathLike[str]] = (),
    min_bytes: int = MIN_DATA_BYTES,
    progress: Progress | None = None,
) -> list[SavedFile]:
    """Write one model to `path`, with its weights beside it in `path` + "_data"; the model stays as it is.

    A process killed at any moment leaves either the old or the new model, each with its own weights.

    Raises:
        OutputError: If the place is taken or protected, the disk is full, or a graph would exceed 2 GiB.
        ModelFileError: If a source file has become shorter, or an initializer has no value.
    """
    # A link is replaced, not what it points to: that may be a file of a cache that others share.
    target = Path(path).parent.resolve() / Path(path).name
    data, (graph,) = _plan({"model": model}, {"model": target.name}, layout, min_bytes)
    files: list[Plan] = [*data, graph]
    for file in files:
        _check_file(target.parent / file.name, overwrite, protected)
    with _write_errors(target, files), staging(target, keep_stale=True) as staged:
        _check_space(target.parent, files)
        replaces = any((target.parent / file.name).exists() for file in files)
        write_files(staged, files, progress, is_synced=replaces)
        if data and replaces:
            location = f"{staged.name}/{data[0].name}"
            _, (interim,) = _plan({"model": model}, {"model": "interim.onnx"}, layout, min_bytes, location)
            write_files(staged, [interim], None, is_synced=True)
            finals = target, target.parent / data[0].name
            publish_model(staged / graph.name, finals[0], staged / data[0].name, finals[1], staged / interim.name)
        else:
            for file in files:
                (staged / file.name).replace(target.parent / file.name)
    return [SavedFile(file.name, file.size) for file in files]


def _plan(
    models: Mapping[str, ir.Model], names: Mapping[str, str], layout: Layout, min_bytes: int, location: str = ""
) -> tuple[list[DataPlan], list[FilePlan]]:
    """Return the data files and the graph files; nothing has been written yet."""
    data: dict[str, DataPlan] = {}
    graphs: list[FilePlan] = []
    for role, model in models.items():
        name = SHARED_DATA if layout == "shared" else data_file_of(names[role])
        outside = None
        if layout != "single":
            outside = data.setdefault(name, DataPlan(name, location or PurePosixPath(name).name))
        graphs.append(FilePlan(names[role], graph_chunks(model, outside, min_bytes)))
        check_graph_size(graphs[-1], has_data_file=outside is not None)
    return [file for file in data.values() if file.entries], graphs


def _file_names(roles: Collection[str], layout: Layout) -> dict[str, str]:
    for role in roles:
        if not role or role != PurePosixPath(role).name:
            raise OutputError(f"the role {role!r} cannot be a file name")
    return hub_files(roles) if layout == "hub" else {role: file_of_role(role) for role in roles}


def _extra_file(name: str, content: bytes | Path) -> FilePlan:
    parts = PurePosixPath(name).parts
    if not parts or PurePosixPath(name).is_absolute() or ".." in parts:
        raise OutputError(f"the extra file {name!r} would not be inside the output folder")
    return FilePlan(PurePosixPath(name).as_posix(), [DataFile(content) if isinstance(content, Path) else content])


def _check_names(names: Collection[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise OutputError(f"two files to be written have the name {name!r}")
        seen.add(name)


def _check_folder(target: Path, overwrite: bool, protected: Sequence[str | os.PathLike[str]]) -> None:
    for path in _spellings(protected):
        if path == target or target in path.parents:
            raise OutputError(
                f"{target}: holds an input of this run ({path}), and inputs are never modified",
                hint="choose another output folder",
            )
    if not target.exists():
        return
    if not target.is_dir():
        raise OutputError(f"{target}: is a file, not a folder", hint="choose another output folder")
    if not any(target.iterdir()):
        return
    if not overwrite:
        raise OutputError(f"{target}: exists and is not empty", hint="choose another folder, or --overwrite")
    for path in _spellings(protected):
        if path in target.parents:
            raise OutputError(
                f"{target}: is a part of the input {path}, and inputs are never modified",
                hint="choose another output folder",
            )


def _check_file(target: Path, overwrite: bool, protected: Sequence[str | os.PathLike[str]]) -> None:
    if not os.path.lexists(target):
        return
    for path in _spellings(protected):
        if path in (target, target.resolve()) or path in target.parents:
            raise OutputError(
                f"{target}: is an input of this run, and inputs are never modified", hint="choose another output file"
            )
    if target.is_dir():
        raise OutputError(f"{target}: is a folder, not a file", hint="choose another output file")
    if not overwrite:
        raise OutputError(f"{target}: exists", hint="choose another file, or --overwrite")


def _spellings(paths: Sequence[str | os.PathLike[str]]) -> Iterator[Path]:
    """Yield each path as it was named, made absolute, and as it really is."""
    for path in paths:
        yield Path(os.path.abspath(path))
        yield Path(path).resolve()


def _check_space(folder: Path, files: Sequence[Plan]) -> None:
    needed, free = _bytes_needed(files), shutil.disk_usage(folder).free
    if needed > free:
        raise _full(folder, needed, free, "not enough space")


def _bytes_needed(files: Sequence[Plan]) -> int:
    """Return what the files take on disk: holes of a source stay holes."""
    needed = 0
    stored: dict[tuple[int, int], int] = {}
    allocated: dict[tuple[int, int], int] = {}
    for tensor in _tensors(files):
        if isinstance(tensor, Region):
            key = tensor.place[:2]
            stored[key] = stored.get(key, 0) + tensor.length
            allocated[key] = os.fstat(tensor.file.fd).st_blocks * 512
        else:
            needed += tensor.nbytes
    in_memory = sum(file.size for file in files) - needed - sum(stored.values())
    holes = sum(max(0, size - allocated[key]) for key, size in stored.items())
    return needed + in_memory + sum(stored.values()) - holes


def _tensors(files: Sequence[Plan]) -> Iterator[ir.TensorProtocol]:
    for file in files:
        if isinstance(file, DataPlan):
            yield from (tensor for _, tensor in file.entries)
        else:
            yield from (chunk for chunk in file.chunks if not isinstance(chunk, (bytes, memoryview, DataFile)))


@contextmanager
def _write_errors(target: Path, files: Sequence[Plan]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        if error.errno in _FULL_DISK:
            raise _full(target, _bytes_needed(files), _free_bytes(target.parent), reason) from error
        raise OutputError(f"{target}: cannot be written: {reason}") from error


def _free_bytes(folder: Path) -> int:
    try:
        return shutil.disk_usage(folder).free
    except OSError:
        return 0


def _full(target: Path, needed: int, free: int, reason: str) -> OutputError:
    return OutputError(
        f"{target}: cannot be written: {reason}: {needed:,} bytes are needed, {free:,} are free",
        hint="free some space, or choose a folder on another disk",
    )
