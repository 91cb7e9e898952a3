"""The rest of a recipe that stopped, written so that it runs from another folder."""

from __future__ import annotations

from collections.abc import Sequence
from io import StringIO
from pathlib import Path
from typing import Any

from surgery.contract import RoleUse
from surgery.recipe import Recipe, Step, has_path, with_paths
from surgery.registry import module_file


def rest_of_recipe(recipe: Recipe, number: int, present: Sequence[str]) -> str:
    """Return the recipe from a step on, as YAML; its source is the folder that it is put into.

    Analyses from before that step run again, since later steps may need what they found. References to files are made
    absolute.

    Args:
        recipe: The whole recipe.
        number: The step.
        present: The models that there are before that step; an analysis of one that is gone is left out.
    """
    from ruamel.yaml import YAML

    raw_steps = list(recipe.plain.get("steps", ()))
    kept = [step for step in recipe.steps if step.number >= number or _can_run_again(step, present)]
    rest: dict[str, Any] = {
        "source": {"path": ".", "names": "keep"},  # a step may have renamed inputs and outputs
        "steps": [_with_absolute_files(raw_steps[step.number - 1], step, recipe.folder) for step in kept],
    }
    if "check" in recipe.plain:
        rest["check"] = _absolute_data(dict(recipe.plain["check"]), recipe.folder)
    if recipe.output is not None:
        output = recipe.output.model_dump(mode="json", exclude_unset=True)
        rest["output"] = {**output, "folder": str((recipe.folder / recipe.output.folder).resolve())}
    stream = StringIO()
    yaml = YAML(typ="safe")
    yaml.default_flow_style = False
    yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
    yaml.dump(rest, stream)
    return f"# The rest of {recipe.path}, from step {number} on.\n{stream.getvalue()}"


def _can_run_again(step: Step, present: Sequence[str]) -> bool:
    return bool(step.pass_.gives) and set(step.pass_.roles(RoleUse.READS, present)) <= set(present)


def _with_absolute_files(raw: Any, step: Step, folder: Path) -> Any:
    if isinstance(raw, str):
        return _absolute_reference(raw, folder)
    raw = {**raw, **{name: _plain_paths(value) for name, value in step.pass_ if name in raw and has_path(value)}}
    return {
        key: _absolute_reference(value, folder) if key in ("pass", "function") else value for key, value in raw.items()
    }


def _plain_paths(value: Any) -> Any:
    plain = with_paths(value, str)
    return list(plain) if isinstance(plain, tuple) else plain


def _absolute_reference(reference: Any, folder: Path) -> Any:
    """Turn `module:name` into `/folder/module.py:name` where that file is beside the recipe."""
    if not isinstance(reference, str) or ":" not in reference:
        return reference
    module, _, name = reference.rpartition(":")
    file = module_file(module, folder)
    return f"{file.resolve()}:{name}" if file is not None else reference


def _absolute_data(check: dict[str, Any], folder: Path) -> dict[str, Any]:
    data = check.get("data")
    if isinstance(data, str):
        check["data"] = str((folder / data).resolve())
    if isinstance(data, dict):
        check["data"] = {role: str((folder / path).resolve()) for role, path in data.items()}
    return check
