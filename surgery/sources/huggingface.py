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
from typing import Any, BinaryIO

import numpy as np
import onnx_ir as ir

from surgery.errors import ModelFileError, OutputError, RecipeError, SurgeryError
from surgery.sources.configs import read_json
from surgery.sources.names import Axes, axes_of, forget_origins, name_axes, name_nodes, name_weights, nest
from surgery.sources.torch_reference import DECODER_ONLY, ENCODER_DECODER, Architecture, TorchReference, samples
from surgery.storage.region import DataFile, Region

# Each was exported and compared with PyTorch. To add one: name it here, and give the tests a tiny config of it.
FAMILIES: Mapping[str, Architecture] = {
    **dict.fromkeys(("gpt2", "gpt_neox", "llama", "mistral", "opt", "qwen2", "qwen3"), DECODER_ONLY),
    **dict.fromkeys(("bart", "marian", "mt5", "t5"), ENCODER_DECODER),
}

OLDEST_OPSET, NEWEST_OPSET = 18, 24
# From 23 on attention is one node instead of a dozen, and 24 gives the same graph: GPT-2 124M's decode has 486 nodes
# instead of 654, T5-base's 507 instead of 1,017, and neither is measurably slower in ONNX Runtime 1.31.
DEFAULT_OPSET = 23
COMPANIONS = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "tokenizer.model",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "chat_template.jinja",
)
HUB_TIMEOUT_SECONDS = 5.0
INLINE_BYTES = 1024
WEIGHTS_ALIGNMENT = 4096

Progress = Callable[[str], None]


@dataclass(frozen=True)
class Exported:
    """What comes out of an export.

    Args:
        models: The models by role; their weights are in one file of the scratch folder.
        config: The content of `config.json`.
        generation_config: The content of `generation_config.json`, or what `transformers` makes of the config.
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
        RecipeError: The architecture is not supported.
    """
    return _architecture_of(config).roles


def read_config(path_or_id: str) -> dict[str, Any]:
    """Return the `config.json` of a local folder or a model on the Hub.

    Raises:
        RecipeError: There is no such folder or model, or the Hub cannot be reached.
        ModelFileError: `config.json` is missing or is not a JSON object.
    """
    return _Origin.of(path_or_id).config()


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
    origin = _Origin.of(path_or_id)
    config = origin.config()
    architecture = _architecture_of(config)
    opset = _checked_opset(opset)
    _check_packages()
    tell(f"loading {path_or_id}")
    with quiet():
        model = _load(origin, architecture)
    with quiet(), _blamed(path_or_id, model, "a sample", opset):
        sample_of = samples(model, architecture)
    scratch.mkdir(parents=True, exist_ok=True)
    weights = WeightsFile(scratch / "weights.bin")
    models: dict[str, ir.Model] = {}
    for role in architecture.roles:
        tell(f"exporting {role}")
        with quiet(), _blamed(path_or_id, model, repr(role), opset):
            models[role] = _export_role(model, architecture, role, sample_of[role], opset)
        weights.take(models[role])
    weights.hand_out()
    files = origin.companions()
    generation_config = _generation_config(model, files)
    return Exported(models, config, generation_config, files, TorchReference(model, architecture))


def _ignore(_: str) -> None:
    pass


def _architecture_of(config: Mapping[str, Any]) -> Architecture:
    name = config.get("model_type")
    if isinstance(name, str) and name in FAMILIES:
        return FAMILIES[name]
    raise RecipeError(
        f"cannot export the architecture {name!r}; supported are {', '.join(sorted(FAMILIES))}",
        hint="export it with another tool, for example optimum-cli, and give the folder of .onnx files as the source",
    )


def _checked_opset(opset: int | None) -> int:
    if opset is None:
        return DEFAULT_OPSET
    # The exporter writes any number: opset 30 comes out without a word, and no runtime takes it.
    if not OLDEST_OPSET <= opset <= NEWEST_OPSET:
        raise RecipeError(
            f"cannot export at opset {opset}", hint=f"use {OLDEST_OPSET} to {NEWEST_OPSET}, or leave the opset out"
        )
    return opset


def _check_packages() -> None:
    for package in ("torch", "transformers", "onnxscript"):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise RecipeError(
                f"exporting a Hugging Face model needs {package}: {error}",
                hint="pip install 'graph-surgery[transformers]', or give .onnx files as the source",
            ) from error


# Where the files are


@dataclass(frozen=True)
class _Origin:
    """A local folder or a model on the Hub.

    Args:
        name: The folder or the Hub id.
        is_local: It is a folder.
        is_offline: The Hub cannot be reached, so that only what was downloaded before can be had.
    """

    name: str
    is_local: bool
    is_offline: bool

    @classmethod
    def of(cls, path_or_id: str) -> _Origin:
        if Path(path_or_id).is_dir():
            return cls(path_or_id, is_local=True, is_offline=True)
        if Path(path_or_id).exists() or path_or_id.count("/") > 1 or path_or_id.startswith((".", "/", "~")):
            raise RecipeError(
                f"{path_or_id}: there is no such folder", hint="give a folder with config.json and weights"
            )
        return cls(path_or_id, is_local=False, is_offline=not _hub_answers())

    def config(self) -> dict[str, Any]:
        path = self.find("config.json")
        if path is None:
            raise ModelFileError(
                f"{self.name}: there is no config.json", hint="give the folder that save_pretrained() wrote"
            )
        return read_json(path)

    def companions(self) -> dict[str, bytes | Path]:
        found = {name: self.find(name) for name in ("config.json", *COMPANIONS)}
        return {name: path for name, path in found.items() if path is not None}

    def find(self, name: str) -> Path | None:
        """Return where a file is, downloading it if need be, or None if the model has none of that name."""
        if self.is_local:
            path = Path(self.name, name)
            return path if path.is_file() else None
        return _find_on_hub(self.name, name, is_offline=self.is_offline)


def _hub_answers() -> bool:
    """Ask once. Left to itself, huggingface_hub 2.4 asks for every file six times, waiting 23 seconds in all."""
    try:
        from huggingface_hub import constants, get_session

        get_session().head(constants.ENDPOINT, timeout=HUB_TIMEOUT_SECONDS)
    except Exception:
        return False
    return True


def _find_on_hub(repo: str, name: str, *, is_offline: bool) -> Path | None:
    try:
        from huggingface_hub import errors, hf_hub_download
    except ImportError as error:
        raise RecipeError(
            f"{repo}: there is no such folder, and the Hub needs huggingface_hub",
            hint="pip install 'graph-surgery[transformers]'",
        ) from error
    try:
        return Path(hf_hub_download(repo, name, local_files_only=is_offline))
    except errors.LocalEntryNotFoundError as error:
        if is_offline and name != "config.json":
            return None
        raise _unreachable(repo) from error
    except errors.EntryNotFoundError:
        return None
    except (errors.RepositoryNotFoundError, errors.HFValidationError) as error:
        raise RecipeError(
            f"{repo}: neither a local folder nor a model on the Hub that may be read",
            hint="check the spelling; for a private or gated model run `hf auth login` first",
        ) from error
    except OSError as error:
        raise _unreachable(repo) from error


def _unreachable(repo: str) -> RecipeError:
    return RecipeError(
        f"{repo}: not a local folder, and the Hugging Face Hub cannot be reached",
        hint=f"on a machine with network run `hf download {repo} --local-dir FOLDER`, "
        "and give that folder as the source",
    )


def _generation_config(model: Any, files: dict[str, bytes | Path]) -> dict[str, Any]:
    """Return the generation config; a model without one gets what `transformers` would use, in `files` too."""
    path = files.get("generation_config.json")
    if isinstance(path, Path):
        return read_json(path)
    content: dict[str, Any] = json.loads(model.generation_config.to_json_string())
    files["generation_config.json"] = (json.dumps(content, indent=2) + "\n").encode()
    return content


# PyTorch


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


def _load(origin: _Origin, architecture: Architecture) -> Any:
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
    # transformers fills weights that the file lacks with random numbers, and only warns.
    missing = sorted(report["missing_keys"])
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
        versions = " and ".join(f"{each} {importlib.metadata.version(each)}" for each in ("torch", "transformers"))
        raise SurgeryError(
            f"{name}: {versions} cannot export {what} of {type(model).__name__} at opset {opset}: "
            f"{_first_line(causes[-1])}",
            hint=f"leave the opset at {DEFAULT_OPSET}, or export it with another tool, for example optimum-cli, "
            "and give the folder of .onnx files as the source",
        ) from error


def _export_role(model: Any, architecture: Architecture, role: str, sample: Mapping[str, Any], opset: int) -> ir.Model:
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    axes = architecture.axes[role]
    free = {name: _free_axes(axes_of(axes, name)) for name in sample}
    config = OnnxConfig(dynamic=True, dynamic_shapes=nest(free), opset_version=opset)
    with _as_forward(model, architecture, role):
        exported: ir.Model = OnnxExporter().export(model, nest(sample), config).program
    _check_interface(exported.graph, tuple(sample), axes, role)
    name_axes(exported.graph, axes)
    name_nodes(exported.graph)
    name_weights(exported.graph, model)
    forget_origins(exported)
    exported.graph.name = role
    return exported


@contextlib.contextmanager
def _as_forward(model: Any, architecture: Architecture, role: str) -> Iterator[None]:
    """Make the role the model's forward: the exporter names inputs and outputs by what a forward takes and returns."""

    def forward(**inputs: Any) -> Any:
        return architecture.forwards[role](model, **inputs)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def _free_axes(axes: Axes) -> Any:
    from torch.export import Dim

    return {index: Dim.AUTO for index, name in enumerate(axes) if name is not None}


# The graph


def _check_interface(graph: ir.Graph, inputs: tuple[str, ...], axes: Mapping[str, Axes], role: str) -> None:
    """Refuse an export that lost an input or fixed an axis, which the exporter does without a word."""
    given = [value.name for value in graph.inputs]
    lost = [name for name in inputs if name not in given]
    if lost:
        raise SurgeryError(f"the export of {role!r} has lost the input {lost[0]!r}")
    for value in (*graph.inputs, *graph.outputs):
        name = value.name or ""
        for index, (wanted, size) in enumerate(zip(axes_of(axes, name), value.shape or (), strict=True)):
            if wanted is not None and isinstance(size, int):
                raise SurgeryError(f"the export of {role!r} has fixed axis {index} of {name!r} to {size}")


# Weights


class WeightsFile:
    """One file that holds the weights of several models, each as its export gave it: sharing them is a pass's work.

    Args:
        path: The file to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[ir.Value, int] = {}
        path.unlink(missing_ok=True)  # the regions of an earlier export into this folder keep the old file
        path.touch()

    def take(self, model: ir.Model) -> None:
        """Write what the model's initializers hold; small ones become tensors of their own.

        Raises:
            OutputError: The file cannot be written.
        """
        try:
            with self._path.open("r+b") as file:
                file.seek(0, io.SEEK_END)
                for value in model.graph.initializers.values():
                    self._take(value, file)
        except OSError as error:
            raise OutputError(
                f"{self._path}: cannot write the weights: {error.strerror}", hint="free space, or choose another folder"
            ) from error

    def _take(self, value: ir.Value, file: BinaryIO) -> None:
        tensor = value.const_value
        assert tensor is not None
        array = np.ascontiguousarray(tensor.numpy())
        if array.nbytes < INLINE_BYTES:
            value.const_value = ir.Tensor(array.reshape(tensor.shape.numpy()).copy(), tensor.dtype, name=value.name)
            return
        self._places[value] = file.seek(-(-file.tell() // WEIGHTS_ALIGNMENT) * WEIGHTS_ALIGNMENT)
        file.write(array.reshape(-1).view(np.uint8).data)

    def hand_out(self) -> None:
        """Let the initializers read from the file, so that PyTorch's memory is not kept alive by them."""
        file = DataFile(self._path)
        for value, offset in self._places.items():
            tensor = value.const_value
            assert tensor is not None
            value.const_value = Region(file, offset, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=value.name)
