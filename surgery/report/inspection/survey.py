"""From paths to an inspection: which models there are, and what is in each."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from os.path import abspath, commonpath
from pathlib import Path

import onnx_ir as ir

from surgery.errors import ModelFileError, RecipeError
from surgery.report.inspection.copies import find_copies
from surgery.report.inspection.counting import (
    bodies,
    casts,
    has_casts_of_unknown_type,
    interface,
    operators,
    ports,
    scopes_of,
)
from surgery.report.inspection.found import Finding, FoundModel, Inspection, Runtime, Tally
from surgery.report.inspection.inference import fill_in_types
from surgery.report.inspection.refusals import RUNTIME, Weightless, installed, opsets_by_name, refusals, weightless
from surgery.report.inspection.weights import (
    Weight,
    by_dtype,
    files,
    stored_bytes,
    tallies,
    tally,
    unused,
    weights_of,
)
from surgery.sources import looks_like_a_path
from surgery.storage import MIN_DATA_BYTES, check_structure, open_model, read_manifest
from surgery.storage.validity import find_problem_in

_RECIPES = (".yaml", ".yml")
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".onnx_data")


def inspect_paths(
    paths: Sequence[Path], *, is_proved: bool = False, progress: Callable[[str], None] = lambda _: None
) -> Inspection:
    """Look into models; no weight is read but for samples, whatever their size.

    Args:
        paths: .onnx files, and folders with such in them or one level below.
        is_proved: Compare every byte of weights that may be equal or transposed, instead of samples.
        progress: Told what is being done.

    Raises:
        RecipeError: There is nothing at a path, or no model in it.
        ModelFileError: No file can be read at all. Missing weights are findings instead.
    """
    found = list({abspath(file): file for path in paths for file in find_models(path)}.values())
    roles = {file: role for path in paths if path.is_dir() for file, role in _listed_roles(path).items()}
    runtime = installed()
    models: list[FoundModel] = []
    weights: dict[Path, list[Weight]] = {}
    names: dict[Path, str] = {}
    unreadable: list[Finding] = []
    for file, name in zip(found, _names(found), strict=True):
        progress(f"looking into {name}")
        try:
            model, weights[file] = _survey(file, name, roles.get(file.resolve()), runtime)
        except ModelFileError as error:
            if len(unreadable) + 1 == len(found):
                raise
            unreadable.append(Finding("files", name, error.message.removeprefix(f"{file}: "), error.hint))
            continue
        models.append(model)
        names[file] = name
    progress("comparing weights")
    copies, transposed = find_copies({names[file]: held for file, held in weights.items()}, is_proved=is_proved)
    return Inspection(
        models,
        unreadable,
        copies,
        transposed,
        files(weights),
        stored_bytes(weight for held in weights.values() for weight in held),
        sum(one.bytes * (one.stored - 1) for one in copies),
        runtime,
        _version(),
    )


def find_models(path: Path) -> list[Path]:
    """Return the .onnx files that a path stands for: itself, or those in a folder and one level below.

    Raises:
        RecipeError: There is none, with what to do for a recipe or a Hugging Face folder.
    """
    if path.is_file():
        if path.suffix in _RECIPES:
            raise RecipeError(
                f"{path}: is a recipe, not a model",
                hint=f"make its models first: python -m surgery run {path} --out FOLDER, then inspect FOLDER",
            )
        if path.suffix in _WEIGHTS:
            raise RecipeError(
                f"{path}: holds weights and no graph",
                hint=f"export the model first: a recipe with `source: {path.parent}`, then surgery run",
            )
        return [path]
    if not path.exists():
        hint = f"export a model of the Hub first: a recipe with `source: {path}`, then surgery run"
        hint = "" if looks_like_a_path(str(path)) else hint
        raise RecipeError(f"{path}: no such file or folder", hint=hint)
    if not path.is_dir():
        raise RecipeError(f"{path}: is neither a file nor a folder", hint="give a .onnx file or a folder of them")
    found = [file for pattern in ("*.onnx", "*/*.onnx") for file in sorted(path.glob(pattern), key=_by_numbers)]
    found = [file for file in found if file.is_file() and not file.parent.name.startswith(".")]
    if found:
        return found
    if (path / "config.json").is_file():
        raise RecipeError(
            f"{path}: is a Hugging Face folder, there is no .onnx file in it",
            hint=f"export it first: a recipe with `source: {path}`, then surgery run",
        )
    raise RecipeError(f"{path}: no .onnx file is in this folder, nor one level below")


def _listed_roles(folder: Path) -> dict[Path, str]:
    manifest = read_manifest(folder)
    listed = manifest.models if manifest is not None else {}
    return {(folder / name).resolve(): role for role, name in listed.items()}


def _names(found: Sequence[Path]) -> list[str]:
    """Return names that tell files apart: their paths from the folder that they have in common."""
    if len(found) == 1:
        return [found[0].name]
    absolute = [Path(abspath(file)) for file in found]  # links keep their names: in a Hub cache they lead to hashes
    folder = commonpath([file.parent for file in absolute])
    return [str(file.relative_to(folder)) for file in absolute]


def _survey(file: Path, name: str, role: str | None, runtime: Runtime | None) -> tuple[FoundModel, list[Weight]]:
    faults: list[ModelFileError] = []
    model = open_model(file, on_fault=faults.append)
    scopes = list(scopes_of(model))
    if has_casts_of_unknown_type(scopes):
        fill_in_types(model)
    weights = weights_of(scopes)
    absent = [weight for weight in weights if weight.is_absent]
    # Small weights steer: without the shape that a Reshape asks for nothing can be said of what follows.
    is_blind = any(weight.tensor.nbytes < MIN_DATA_BYTES for weight in absent)
    findings = _of_files(faults, file)
    content = None
    try:
        check_structure(model)
        content = weightless(model)
    except ModelFileError as error:
        findings.append(Finding("onnx", "graph", error.message, error.hint))
    is_asked = content is not None and not is_blind
    if content is not None and is_asked:
        findings += _of_checker(content)
        findings += refusals(model, file, scopes, content, runtime) if runtime is not None else []
    is_taken = None
    if absent or (is_asked and runtime is not None):
        is_taken = not absent and not any(finding.by == RUNTIME for finding in findings)
    return _found(file, name, role, model, weights, findings, content, is_taken), weights


def _found(
    file: Path,
    name: str,
    role: str | None,
    model: ir.Model,
    weights: Sequence[Weight],
    findings: Sequence[Finding],
    content: Weightless | None,
    is_taken: bool | None,
) -> FoundModel:
    scopes = list(scopes_of(model))
    opsets = opsets_by_name(model.opset_imports)
    return FoundModel(
        path=str(file),
        name=name,
        listed_role=role,
        file_bytes=file.stat().st_size,
        producer=" ".join(filter(None, (model.producer_name, model.producer_version))),
        ir_version=model.ir_version,
        opsets=opsets,
        needs_ir_version=content.needs_ir_version if content else model.ir_version,
        needs_opsets=content.needs_opsets if content else opsets,
        interface=interface(model),
        inputs=ports(model.graph.inputs),
        outputs=ports(model.graph.outputs),
        bodies=bodies(scopes),
        operators=operators(model, scopes),
        casts=casts(scopes),
        weights=tally("all", weights),
        by_dtype=by_dtype(weights),
        by_layer=sorted(tallies(weights, lambda weight: weight.layer), key=_of_layer),
        by_place=tallies(weights, lambda weight: weight.place),
        files=files({file: weights}),
        unused=unused(weights),
        findings=list(findings),
        runtime_takes_it=is_taken,
    )


def _of_files(faults: Iterable[ModelFileError], file: Path) -> list[Finding]:
    """Return what is wrong with the files, faults that have one way out together."""
    groups: dict[str, list[ModelFileError]] = {}
    for fault in faults:
        groups.setdefault(fault.hint, []).append(fault)
    return [_of_fault(group, file) for group in groups.values()]


def _of_fault(group: Sequence[ModelFileError], file: Path) -> Finding:
    what = group[0].message.removeprefix(f"{file}: ")
    more = f"; and {len(group) - 1:,} more like it" if len(group) > 1 else ""
    return Finding("files", file.name, f"{what}{more}", group[0].hint)


def _of_checker(content: Weightless) -> list[Finding]:
    """Return what onnx's checker finds; it needs the small weights, for shapes."""
    problem = find_problem_in(content.lowered)
    return [Finding("onnx", "graph", problem)] if problem else []


def _of_layer(tally: Tally) -> tuple[bool, list[tuple[int, str]]]:
    return tally.name.startswith("("), _natural(tally.name)


def _by_numbers(file: Path) -> list[list[tuple[int, str]]]:
    return [_natural(part) for part in file.parts]


def _natural(text: str) -> list[tuple[int, str]]:
    """Return a key that sorts `h.2` before `h.10`."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", text)]


def _version() -> str:
    try:
        return version("graph-surgery")
    except PackageNotFoundError:
        return "unknown"
