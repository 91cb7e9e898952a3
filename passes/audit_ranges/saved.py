"""Ranges in files: one for each model, bound to what the model says and weighs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from pathlib import Path

import onnx_ir as ir

from passes.audit_ranges.ranges import Ranges
from surgery.errors import RecipeError, Refused

SUFFIX = ".ranges.json"


def save(folder: Path, models: Mapping[str, ir.Model], ranges: Mapping[str, Ranges]) -> None:
    """Write the ranges of each model to `ROLE.ranges.json`, each file whole or not at all; earlier ones are replaced.

    Raises:
        OutputError: A file cannot be written.
    """
    for role, found in ranges.items():
        found.save(folder / f"{role}{SUFFIX}", models[role])


def read(folders: Sequence[Path], role: str, model: ir.Model) -> Ranges:
    """Return what earlier audits of a model saw together, of those folders that have something of its role.

    Raises:
        RecipeError: None of them has, or one is no folder, or a file is no saved ranges.
        Refused: A file describes another model.
    """
    files = [folder.resolve() / f"{role}{SUFFIX}" for folder in folders]
    there = [file for file in dict.fromkeys(files) if file.is_file()]
    if not there:
        raise RecipeError(f"read_from: {_nothing(folders, role)}", hint=f"save_to in an audit of {role!r}, or models")
    return reduce(Ranges.joined, (_read(file, role, model) for file in there))


def _read(file: Path, role: str, model: ir.Model) -> Ranges:
    try:
        return Ranges.load(file, model)
    except Refused as error:
        raise Refused(
            f"read_from: {file} describes another model than {role!r} is here",
            hint="audit where the model is as it was when these were saved, or measure again, without read_from",
        ) from error


def _nothing(folders: Sequence[Path], role: str) -> str:
    if len(folders) > 1:
        return f"none of {len(folders)} folders has {role}{SUFFIX}; the first is {folders[0]}"
    has = sorted(file.name for file in folders[0].glob(f"*{SUFFIX}")) if folders else []
    return f"{folders[0]} has no {role}{SUFFIX}; it has {', '.join(has) or 'no ranges at all'}"
