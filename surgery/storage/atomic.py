"""Folders and files that appear whole or not at all."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
import re
import secrets
import shutil
import stat
from collections.abc import Collection, Iterator
from pathlib import Path

from surgery.errors import OutputError

_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


@contextlib.contextmanager
def staging(target: Path, *, keep_stale: bool = False) -> Iterator[Path]:
    """Give a folder beside `target` to write into, which is gone afterwards whatever happens.

    What a killed process left beside the same target is removed first, or with `keep_stale` when all went well.
    The folder is locked, so that another process, in another container even, can tell that it is in use.
    """
    if target.parent.is_file():
        raise OutputError(f"{target.parent}: is a file, not a folder", hint="choose another output folder")
    target.parent.mkdir(parents=True, exist_ok=True)
    if not keep_stale:
        remove_stale(target)
    folder = target.parent / f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(3)}"
    folder.mkdir()
    lock = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield folder
    finally:
        os.close(lock)
        shutil.rmtree(folder, ignore_errors=True)
    if keep_stale:
        remove_stale(target)


def remove_stale(target: Path) -> None:
    """Remove the staging folders of processes that died while they wrote `target`."""
    pattern = re.compile(rf"\.{re.escape(target.name)}\.tmp-(\d+)-[0-9a-f]+(\.old)?")
    for entry in target.parent.iterdir():
        match = pattern.fullmatch(entry.name)
        if match is None or _is_alive(int(match[1])) or _is_locked(entry):
            continue
        if match[2] and not target.exists():
            # A save without an atomic exchange died between its two renames: this is the only good state.
            entry.rename(target)
        else:
            shutil.rmtree(entry, ignore_errors=True)


def publish_folder(staged: Path, target: Path, ours: Collection[str]) -> None:
    """Make the staged folder the target; of an old target, everything but `ours` is carried over.

    There is no moment without a whole target: a new one appears by one rename, an old one is exchanged.

    Args:
        staged: The finished folder.
        target: Where it goes.
        ours: Relative names in the old target that the new one replaces, even by nothing.
    """
    if not target.exists():
        sync_folder(staged)
        staged.rename(target)
    else:
        _carry_over(target, staged, set(ours))
        shutil.copymode(target, staged)
        sync_folder(staged)
        if not _exchange(staged, target):
            _replace_in_two_steps(staged, target)
    sync_folder(target.parent)


def publish_model(graph: Path, final_graph: Path, data: Path, final_data: Path, interim_graph: Path) -> None:
    """Replace a graph and its data file so that each moment's graph finds the weights it was written for.

    Args:
        graph: The new graph, which refers to `final_data`.
        final_graph: Where it goes.
        data: The new weights, in the staging folder.
        final_data: Where they go.
        interim_graph: The new graph once more, referring to `data`.
    """
    second_name = data.with_name(data.name + ".link")
    try:
        os.link(data, second_name)
    except OSError:
        # A file system without hard links: rather no graph for a moment than a graph with another one's weights.
        final_graph.unlink(missing_ok=True)
        data.replace(final_data)
        graph.replace(final_graph)
        return
    interim_graph.replace(final_graph)
    sync_folder(final_graph.parent)
    second_name.replace(final_data)
    graph.replace(final_graph)
    sync_folder(final_graph.parent)


def write_file(target: Path, content: bytes) -> None:
    """Write a small file whole or not at all; what was there is replaced.

    Raises:
        OutputError: It cannot be written.
    """
    if target.is_dir():
        raise OutputError(f"{target}: is a folder, not a file", hint="choose another file")
    try:
        with staging(target) as folder:
            staged = folder / target.name
            with staged.open("wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            staged.replace(target)
    except OSError as error:
        raise OutputError(f"{target}: cannot be written: {error.strerror or error}") from error
    sync_folder(target.parent)


def sync_folder(folder: Path) -> None:
    """Make the names in a folder survive a power cut."""
    with contextlib.suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def _carry_over(old: Path, new: Path, ours: set[str]) -> None:
    """Link what is not ours from the old folder into the new one, where nothing of that name is."""
    for folder, folders, files in os.walk(old):
        relative = Path(folder).relative_to(old)
        for name in list(folders):
            if (Path(folder) / name).is_symlink():
                folders.remove(name)
                files.append(name)
        for name in files:
            here, there = relative / name, new / relative / name
            if here.as_posix() not in ours and not os.path.lexists(there):
                there.parent.mkdir(parents=True, exist_ok=True)
                _link(old / here, there)
        if not folders and not files and not (new / relative).exists():
            (new / relative).mkdir(parents=True)


def _link(source: Path, target: Path) -> None:
    if source.is_symlink():
        target.symlink_to(source.readlink())
        return
    try:
        os.link(source, target)
    except OSError as error:
        if not stat.S_ISREG(source.lstat().st_mode):
            raise OutputError(f"{source}: is in the way and cannot be carried over: {error.strerror}") from error
        shutil.copy2(source, target)


def _exchange(one: Path, other: Path) -> bool:
    """Swap two folders in one step; `False` where the system cannot."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not hasattr(libc, "renameat2"):
        return False
    if libc.renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _replace_in_two_steps(staged: Path, target: Path) -> None:
    old = staged.with_name(staged.name + ".old")
    target.rename(old)
    try:
        staged.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def _is_locked(folder: Path) -> bool:
    try:
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC | os.O_NOFOLLOW)
    except OSError:
        return True
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return True
    else:
        return False
    finally:
        os.close(fd)
