"""Hugging Face models, local or from the Hub: exported to ONNX by role with `transformers.exporters`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from surgery.errors import ModelFileError, RecipeError, SurgeryError
from surgery.sources.architectures import ANOTHER_TOOL, Architecture, architecture_of, class_of
from surgery.sources.configs import read_json
from surgery.sources.exporter import export_role, refuse_growing_rotary, samples
from surgery.sources.origin import Origin
from surgery.sources.torch_reference import TorchReference
from surgery.sources.weights import WeightsFile

OLDEST_OPSET, NEWEST_OPSET = 18, 24
# From 23 on attention is one node instead of a dozen, and 24 gives the same graph: GPT-2 124M's decode has 486 nodes
# instead of 654, T5-base's 507 instead of 1,017, and neither is measurably slower in ONNX Runtime 1.31.
DEFAULT_OPSET = 23
PACKAGES = ("torch", "transformers", "onnxscript")

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What comes out of an export.

    Args:
        models: The models by role; their weights are in one file of the scratch folder.
        config: The content of `config.json`.
        generation_config: The content of `generation_config.json`, or what `transformers` makes of the config; empty
            for a network that does not generate.
        files: The configs and the tokenizer: what travels with the models, by file name.
        reference: The PyTorch model that was exported.
    """

    models: dict[str, ir.Model]
    config: dict[str, Any]
    generation_config: dict[str, Any]
    files: dict[str, bytes | Path]
    reference: TorchReference


def roles_of(config: Mapping[str, Any]) -> tuple[str, ...]:
    """Return the roles that a model with this `config.json` is exported as; imports no PyTorch.

    Raises:
        RecipeError: The network or its head is not supported, or the config does not say which head it has.
    """
    return architecture_of(config).roles


def read_config(path_or_id: str) -> dict[str, Any]:
    """Return the `config.json` of a local folder or a model on the Hub.

    Raises:
        RecipeError: There is no such folder or model, or the Hub cannot be reached.
        ModelFileError: `config.json` is missing or is not a JSON object.
    """
    return Origin.of(path_or_id).config()


def export(path_or_id: str, *, opset: int | None = None, scratch: Path, progress: Progress | None = None) -> Exported:
    """Export a model, each of its roles as one ONNX model with Optimum's names for inputs, outputs and free axes.

    Args:
        path_or_id: A local folder or a Hub id.
        opset: The opset to export at; None for `DEFAULT_OPSET`.
        scratch: A folder for the weights; it must live as long as the models.
        progress: Is told what is being done.

    Raises:
        RecipeError: The architecture or the opset is not supported, or there is no such model.
        ModelFileError: The model's files are missing or broken.
        SurgeryError: PyTorch cannot export it.
    """
    tell = progress or _ignore
    origin = Origin.of(path_or_id)
    config = origin.config()
    architecture = architecture_of(config)
    refuse_growing_rotary(config)
    opset = _checked_opset(opset)
    _check_packages()
    tell(f"loading {path_or_id}")
    with quiet():
        model = _load(origin, architecture, class_of(config))
    with quiet(), _blamed(path_or_id, model, "a sample", opset):
        sample_of = samples(model, architecture)
    scratch.mkdir(parents=True, exist_ok=True)
    weights = WeightsFile(scratch / "weights.bin")
    models: dict[str, ir.Model] = {}
    for role in architecture.roles:
        tell(f"exporting {role}")
        with quiet(), _blamed(path_or_id, model, repr(role), opset):
            models[role] = export_role(model, architecture, role, sample_of[role], opset)
        weights.take(models[role])
    weights.hand_out()
    files = origin.companions()
    generation_config = _generation_config(model, files)
    return Exported(models, config, generation_config, files, TorchReference(model, architecture))


def _ignore(_: str) -> None:
    pass


def _checked_opset(opset: int | None) -> int:
    if opset is None:
        return DEFAULT_OPSET
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise RecipeError(
            f"cannot export at opset {opset}", hint=f"use {OLDEST_OPSET} to {NEWEST_OPSET}, or leave the opset out"
        )
    return opset


def _check_packages() -> None:
    for package in PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise RecipeError(
                f"exporting a Hugging Face model needs {package}: {error}",
                hint="pip install 'graph-surgery[transformers]', or give .onnx files as the source",
            ) from error


def _generation_config(model: Any, files: dict[str, bytes | Path]) -> dict[str, Any]:
    """Return the generation config; a model without one gets what `transformers` would use, in `files` too."""
    if not model.can_generate():
        return {}
    path = files.get("generation_config.json")
    if isinstance(path, Path):
        return read_json(path)
    content: dict[str, Any] = json.loads(model.generation_config.to_json_string())
    files["generation_config.json"] = (json.dumps(content, indent=2) + "\n").encode()
    return content


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep torch and transformers from writing on the terminal; what they raise still comes through."""
    from transformers.utils import logging as transformers_logging

    had_bars = transformers_logging.is_progress_bar_enabled()
    disabled_before = logging.root.manager.disable
    transformers_logging.disable_progress_bar()
    logging.disable(logging.CRITICAL)
    try:
        # torch.onnx prints its steps to the standard output, whatever the level of its loggers.
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled_before)
        if had_bars:
            transformers_logging.enable_progress_bar()


def _load(origin: Origin, architecture: Architecture, class_name: str) -> Any:
    """Load the network in float32, for evaluation.

    Raises:
        ModelFileError: Weights are missing, cannot be read, or do not fit the config.
    """
    import torch
    import transformers

    loader = getattr(transformers, architecture.auto_class)
    try:
        # Without trust_remote_code=False transformers asks on the terminal whether to run a repository's code.
        model, report = loader.from_pretrained(
            origin.name,
            dtype=torch.float32,
            trust_remote_code=False,
            local_files_only=origin.is_offline,
            output_loading_info=True,
        )
    except Exception as error:  # safetensors, pickle, zip, json: each fails in its own way on a broken file
        raise ModelFileError(
            f"{origin.name}: cannot load the weights: {_first_line(error)}",
            hint="save the model again with save_pretrained(), or download it again",
        ) from error
    if type(model).__name__ != class_name:
        raise ModelFileError(
            f"{origin.name}: config.json names {class_name!r}, but its model_type {model.config.model_type!r} has "
            f"{type(model).__name__!r}",
            hint="correct the one that is wrong in config.json",
        )
    # transformers fills weights that the file lacks with random numbers, and only warns.
    missing = sorted(report["missing_keys"])
    if missing and all(name.startswith("pooler.") for name in missing):
        model.pooler = None  # saved without one, by `add_pooling_layer=False`
        missing = []
    if missing:
        raise ModelFileError(
            f"{origin.name}: {len(missing)} weights are missing, among them {missing[0]!r}",
            hint="check that config.json belongs to these weights",
        )
    return model.eval()


def _first_line(error: BaseException) -> str:
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)


@contextlib.contextmanager
def _blamed(name: str, model: Any, what: str, opset: int) -> Iterator[None]:
    """Turn whatever the exporter raises into an error that says which model, which versions, and the way out."""
    try:
        yield
    except SurgeryError:
        raise
    except Exception as error:
        causes = [error]
        while causes[-1].__cause__ is not None and isinstance(causes[-1].__cause__, Exception):
            causes.append(causes[-1].__cause__)
        versions = ", ".join(f"{each} {importlib.metadata.version(each)}" for each in PACKAGES)
        raise SurgeryError(
            f"{name}: cannot export {what} of {type(model).__name__} at opset {opset} ({versions}): "
            f"{_first_line(causes[-1])}",
            hint=f"{_another_opset(opset)}, or {ANOTHER_TOOL}",
        ) from error


def _another_opset(opset: int) -> str:
    """Attention is one operator from opset 23 on, which takes less than the dozen operators before it."""
    if opset > OLDEST_OPSET:
        return f"source.opset: {OLDEST_OPSET}, where attention is written out in plain operators"
    return f"leave source.opset out, which means {DEFAULT_OPSET}"
