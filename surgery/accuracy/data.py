"""The user's own arrays as samples: a Polygraphy `data_loader.py`, a `.npz` or a folder of them, Polygraphy JSON."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from polygraphy.backend.common import InvokeFromScript
from polygraphy.exception import PolygraphyException
from polygraphy.json import load_json

from surgery.accuracy.feeds import Interface, Sample
from surgery.accuracy.quiet import quiet_polygraphy
from surgery.errors import RecipeError
from surgery.options import did_you_mean

FORMS = (
    "give a data_loader.py with load_data(), a .npz with one array for each input or a folder of them, Polygraphy "
    "JSON, or a .txt with a prompt a line"
)
BY_ROLE = "give every model its own data: {option} as a mapping of role and path"


def load_samples(
    path: Path, role: str, interface: Interface, *, option: str = "check.data", is_alone: bool = True
) -> Iterator[Sample]:
    """Yield the samples of a file, one a feed, or of a folder of `.npz`, in the order of their names.

    Args:
        path: The file, whose ending says its form; or the folder, or the one that has a folder for each role.
        role: The model that they are for.
        interface: Its inputs: each feed must have them, no more and no less, of their types and ranks.
        option: Which option of the recipe the path is of.
        is_alone: It is the only model, so that a folder needs none within it for the role.

    Raises:
        RecipeError: There is no such file, it is of no known form, it is empty, or a feed does not fit.
    """
    is_empty = True
    for file in _files(path, role, option, is_alone):
        for number, feed in enumerate(_feeds(file, option)):
            is_empty = False
            where = f"{option}: sample {number} of {file}"
            _check_names(where, feed, role, [value.name or "" for value in interface.inputs], option)
            arrays = {value.name or "": _checked(where, feed[value.name or ""], value) for value in interface.inputs}
            yield Sample(f"{file.name}[{number}]", arrays, interface.traits(arrays))
    if is_empty:
        raise RecipeError(f"{option}: {path} gives no samples at all", hint=FORMS)


def _files(path: Path, role: str, option: str, is_alone: bool) -> list[Path]:
    """Return the file itself, or what is in the folder for a role."""
    if not path.is_dir():
        if not path.is_file():
            raise RecipeError(f"{option}: there is no file {path}", hint=FORMS)
        return [path]
    folder = path / role
    if not folder.is_dir():
        if not is_alone:
            raise RecipeError(f"{option}: {path} has no folder {role!r} for that model", hint=f"put .npz into {folder}")
        folder = path
    files = sorted(folder.glob("*.npz"))
    if not files:
        raise RecipeError(f"{option}: no .npz is in {folder}", hint=FORMS)
    return files


def _feeds(path: Path, option: str) -> list[Mapping[str, Any]]:
    """Read a file.

    Raises:
        RecipeError: It cannot be read, or is a script that raises.
    """
    readers = {".py": _script_feeds, ".npz": _npz_feeds, ".json": _json_feeds}
    if path.suffix not in readers:
        raise RecipeError(f"{option}: {path} is of no known form", hint=FORMS)
    try:
        with quiet_polygraphy():
            return readers[path.suffix](path)
    except Exception as error:  # a user's script may raise anything, and so may what reads a broken file
        cause = _cause(error, path)
        raise RecipeError(
            f"{option}: {path} raised {type(cause).__name__}: {_first_line(cause)}", hint=FORMS
        ) from error


def _cause(error: Exception, path: Path) -> BaseException:
    """Return what a script raised when it was imported: Polygraphy (0.53.6) hides it below two errors of its own."""
    is_polygraphys = isinstance(error, PolygraphyException) or error.args == (path.stem,)
    cause: BaseException = error
    while is_polygraphys and cause.__context__ is not None:
        cause = cause.__context__
    return cause


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), "(no text)")


def _script_feeds(path: Path) -> list[Mapping[str, Any]]:
    return list(InvokeFromScript(str(path), "load_data")())


def _npz_feeds(path: Path) -> list[Mapping[str, Any]]:
    with np.load(path, allow_pickle=False) as arrays:
        return [dict(arrays)] if arrays.files else []


def _json_feeds(path: Path) -> list[Mapping[str, Any]]:
    content = load_json(str(path), description="input data")
    return content if isinstance(content, list) else [content]


def _check_names(where: str, feed: Any, role: str, names: list[str], option: str) -> None:
    if not isinstance(feed, Mapping):
        raise RecipeError(f"{where} is a {type(feed).__name__}, not arrays by input name")
    missing = [name for name in names if name not in feed]
    if missing:
        has = ", ".join(map(repr, feed)) or "nothing"
        raise RecipeError(
            f"{where} lacks the input {missing[0]!r} of {role!r}; it has {has}", hint=BY_ROLE.format(option=option)
        )
    unknown = [name for name in feed if name not in names]
    if unknown:
        near = did_you_mean(unknown[0], names)
        raise RecipeError(
            f"{where} has {unknown[0]!r}, which is no input of {role!r}{near}", hint=BY_ROLE.format(option=option)
        )


def _checked(where: str, given: Any, value: ir.Value) -> np.ndarray:
    """Return an input as an array; nothing is cast, for what the user feeds is what is compared."""
    array = np.asarray(given)
    if value.dtype is not None and not _is_of(array, value.dtype):
        wanted = str(value.dtype).lower()
        raise RecipeError(f"{where}: the input {value.name!r} is {array.dtype}, and the model takes {wanted}")
    if value.shape is not None and not _fits(array.shape, value.shape):
        wanted = "[" + ", ".join(map(str, value.shape)) + "]"
        given_shape = list(array.shape)
        raise RecipeError(f"{where}: the input {value.name!r} has shape {given_shape}, and the model takes {wanted}")
    if array.size == 0 and not (value.name or "").startswith(("past", "input.past")):
        raise RecipeError(
            f"{where}: the input {value.name!r} is empty, of shape {list(array.shape)}",
            hint="only a cache may be empty; give at least one sample of one token",
        )
    return array


def _is_of(array: np.ndarray, dtype: ir.DataType) -> bool:
    if dtype == ir.DataType.STRING:
        return array.dtype.kind in "OUS"
    return bool(array.dtype == dtype.numpy())


def _fits(given: tuple[int, ...], shape: ir.Shape) -> bool:
    fixed = [size if isinstance(size, int) else None for size in shape]
    return len(given) == len(fixed) and all(want in (None, size) for size, want in zip(given, fixed, strict=True))
