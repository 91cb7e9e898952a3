"""What there is to look at: one model, the models of a folder, or the steps of a run."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from surgery.bundle import ROLES
from surgery.errors import ModelFileError, RecipeError
from surgery.sources.configs import read_json
from surgery.storage import role_of_file

# 1_dedup_weights.decode.onnx, as surgery.watchers.snapshots names them.
_STEP_FILE = re.compile(r"(?P<number>\d+)_(?P<word>.+)\.(?P<role>[^.]+)\.onnx")
# Where transformers.js wants the models of a repository to be.
_SUBFOLDERS = ("", "onnx")


@dataclass(frozen=True)
class Listed:
    """A model in the list.

    Args:
        address: Its path from the folder that was named, with slashes; tells it from all others in the list.
        path: The file.
        role: What it is called in a bundle, or the file's stem.
    """

    address: str
    path: Path
    role: str


@dataclass(frozen=True)
class Section:
    """Models under one heading: a folder's, or those that a step left.

    Args:
        heading: Which folder or step, empty if there is nothing to tell apart.
        note: What the step did, if the run's report says so.
        models: The models.
    """

    heading: str
    note: str
    models: tuple[Listed, ...]


def list_models(path: Path) -> tuple[Section, ...]:
    """List what can be looked at; no model is opened.

    Args:
        path: A model; or a folder with .onnx files, in it or in `onnx/`; or what a run wrote: OUT, OUT.steps,
            OUT.stopped. With OUT come the steps of the same run.

    Raises:
        RecipeError: There is no such file or folder, or no model in it.
    """
    if path.is_file():
        return (Section("", "", (Listed(path.name, path, _role_of(path)),)),)
    if not path.is_dir():
        raise RecipeError(f"{path}: no such file or folder", hint="give an .onnx file or a folder of them")
    folder = path.resolve()
    steps = folder.with_name(f"{folder.name}.steps")
    sections = tuple(_of_folder(folder))
    if not sections:
        raise RecipeError(f"{path}: no .onnx file is in this folder", hint=_models_below(folder))
    if steps.is_dir() and _notes(steps, folder):
        sections += tuple(_of_folder(steps, f"{steps.name}/"))
    return sections


def _of_folder(folder: Path, prefix: str = "") -> Iterator[Section]:
    """Yield a section a step, or one for a folder that is not of steps."""
    files = sorted(
        (file for name in _SUBFOLDERS for file in (folder / name).glob("*.onnx") if file.is_file()), key=_order
    )
    if not files:
        return
    models = [Listed(f"{prefix}{file.relative_to(folder).as_posix()}", file, _role_of(file)) for file in files]
    if not all(_STEP_FILE.fullmatch(file.name) for file in files):
        yield Section("", "", tuple(models))
        return
    notes = _notes(folder, folder.with_name(folder.name.removesuffix(".steps")))
    for step, group in groupby(models, key=lambda model: _step_of(model.path)):
        yield Section(f"step {step[0]} {step[1]}", notes.get(step, ""), tuple(group))


def _order(file: Path) -> tuple[Path, tuple[int, str], int, str]:
    """Sort by folder, step, role as in a bundle, name."""
    roles, role = tuple(ROLES), _role_of(file)
    return file.parent, _step_of(file), roles.index(role) if role in roles else len(roles), file.name


def _step_of(file: Path) -> tuple[int, str]:
    """Return the number and word of the step that a file is of; -1 if of none."""
    match = _STEP_FILE.fullmatch(file.name)
    return (int(match["number"]), match["word"]) if match else (-1, "")


def _role_of(file: Path) -> str:
    match = _STEP_FILE.fullmatch(file.name)
    return match["role"] if match else role_of_file(file.name)


def _notes(steps: Path, folder: Path) -> Mapping[tuple[int, str], str]:
    """Return what each step did by `report.json`; nothing if there is none, or the steps are another run's.

    A run that keeps no steps leaves those of an earlier one behind, and one that stops leaves an earlier report.
    """
    try:
        records = read_json(folder / "report.json", optional=True).get("steps", [])
        notes = {(record["number"], record["pass"].rpartition(":")[2]): str(record["summary"]) for record in records}
    except (ModelFileError, TypeError, KeyError, AttributeError):
        return {}
    return notes if set(notes) == {_step_of(file) for file in steps.glob("*.onnx")} else {}


def _models_below(folder: Path) -> str:
    below = sorted({file.parent.name for file in folder.glob("*/*.onnx")})
    if not below:
        return "give an .onnx file, or a folder of them"
    return f"one of its folders with models: {', '.join(below[:8])}"
