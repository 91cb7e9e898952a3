"""Models that are files already: a .onnx file, or several in a folder as this or another tool has laid them out."""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx_ir as ir

from surgery.bundle import ROLES, Bundle
from surgery.errors import ModelFileError, RecipeError, Refused, SurgeryError
from surgery.graphs import constant_tensor
from surgery.interfaces import CANONICAL, recognise, rename_values
from surgery.options import did_you_mean
from surgery.sources import Opened
from surgery.sources.configs import read_json
from surgery.storage import file_of_role, open_model, read_manifest, role_of_file
from surgery.storage.naming import HUB_FOLDER, MANIFEST

COMPANIONS = (
    "*config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "chat_template.jinja",
)
NAMED_ROLES = ("encoder", "prefill", "decode", "decoder")
"""The roles whose models get canonical names."""

EXPORT_LIST = "export.json"
GENAI_CONFIG = "genai_config.json"
GENAI_ROLES: Mapping[str, str] = {"decoder": "decode"}
GENAI_SIZES: Mapping[str, str] = {
    "head_dim": "head_size",
    "hidden_size": "hidden_size",
    "num_attention_heads": "num_attention_heads",
    "num_hidden_layers": "num_hidden_layers",
    "num_key_value_heads": "num_key_value_heads",
}
"""The words of a `config.json`, and those of a `genai_config.json` for the same."""

PRECISION = re.compile(r"_(fp16|bf16|u?int8(f16)?|quantized|q[1248](f16)?|bnb4)$")
"""How transformers.js (`src/utils/dtypes.js`, `DEFAULT_DTYPE_SUFFIX_MAPPING`) and the Hub mark other precisions."""

WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True)
class OnnxFiles:
    """Files whose roles are known.

    Args:
        files: The file of each role.
        folders: Where the configs and the tokenizer may be, the first one first.
        inputs: What must not be written to.
        is_canonical: Encoders and decoders that are recognised get canonical names.
        aside: Files of other precisions that are not taken.
    """

    files: Mapping[str, Path]
    folders: tuple[Path, ...]
    inputs: tuple[Path, ...]
    is_canonical: bool = True
    aside: tuple[Path, ...] = ()

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the files."""
        return tuple(self.files)

    def open(self, scratch: Path, progress: Callable[[str], None]) -> Opened:
        """Open the files, give them canonical names, and take along the configs and the tokenizer.

        Raises:
            RecipeError: A canonical name is taken.
            ModelFileError: A file is malformed or unsafe.
        """
        aside = _listed(file.name for file in self.aside)
        notes = [f"{aside} left aside, of other precisions"] if aside else []
        models: dict[str, ir.Model] = {}
        for role, file in self.files.items():
            models[role] = open_model(file)
            _correct_constants(models[role])
            notes += _doubts(models[role], role, file)
            if self.is_canonical and role in NAMED_ROLES:
                notes += _rename(models[role], role, file)
        found = {
            file.name: file
            for folder in reversed(self.folders)
            for pattern in COMPANIONS
            for file in folder.glob(pattern)
            if file.is_file()
        }
        config, generation_config, genai = (
            read_json(found[name]) if name in found else {}
            for name in ("config.json", "generation_config.json", GENAI_CONFIG)
        )
        companions: dict[str, bytes | Path] = {**found}
        if genai:
            companions[GENAI_CONFIG] = _with_saved_names(genai)
        config, generation_config = config or _network_of(genai), generation_config or _generation_of(genai)
        return Opened(Bundle(models, config, generation_config, companions), inputs=self.inputs, notes=tuple(notes))


def _doubts(model: ir.Model, role: str, file: Path) -> list[str]:
    """Say it if a model looks like another role's than the one that it was given."""
    recognised = recognise(model)
    if role not in NAMED_ROLES or recognised is None or recognised.role == role:
        return []
    return [f"{role}: {file.name} has the inputs and outputs of {recognised.role!r}"]


def _rename(model: ir.Model, role: str, file: Path) -> list[str]:
    """Give a recognised model canonical names, and say so."""
    recognised = recognise(model)
    if recognised is None or recognised.naming == CANONICAL:
        return []
    try:
        count = rename_values(model, recognised.canonical)
    except Refused as error:
        raise RecipeError(
            f"{file}: the names of {recognised.naming} cannot become {CANONICAL}'s: {error.message}",
            hint="names: keep, beside the source's path",
        ) from error
    return [f"{role}: {count} names of {recognised.naming} made {CANONICAL}'s"]


def _network_of(genai: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a `genai_config.json` says of the network, as a `config.json` spells it."""
    network = genai.get("model")
    decoder = network.get("decoder") if isinstance(network, dict) else None
    if not isinstance(network, dict) or not isinstance(decoder, dict):
        return {}
    found = {name: decoder.get(genai_name) for name, genai_name in GENAI_SIZES.items()}
    found |= {"vocab_size": network.get("vocab_size"), "max_position_embeddings": network.get("context_length")}
    return {name: size for name, size in found.items() if isinstance(size, int)}


def _with_saved_names(genai: Mapping[str, Any]) -> bytes:
    """Return a `genai_config.json` for the files as they are saved here."""
    content = copy.deepcopy(dict(genai))
    for role, part in content["model"].items() if isinstance(content.get("model"), dict) else ():
        if isinstance(part, dict) and "filename" in part:
            part["filename"] = file_of_role(GENAI_ROLES.get(role, role))
    return (json.dumps(content, indent=4) + "\n").encode()


def _generation_of(genai: Mapping[str, Any]) -> dict[str, Any]:
    network = genai.get("model")
    ids = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")
    return {name: network[name] for name in ids if name in network} if isinstance(network, dict) else {}


def _correct_constants(model: ir.Model) -> None:
    """Note the shapes that constants have: onnxruntime-genai 0.18 notes [] for its `/model/constants/INT64/[1]`."""
    for node in model.graph.all_nodes():
        tensor = constant_tensor(node)
        value = node.outputs[0] if tensor is not None else None
        if tensor is not None and value is not None and value.shape is not None and value.shape != tensor.shape:
            value.shape = ir.Shape(tensor.shape.numpy())


def single_file(path: Path) -> OnnxFiles:
    """Return a file as the model `model`, whose interface is its own."""
    return OnnxFiles({"model": path}, (), (path,))


def by_roles(text: str, folder: Path, roles: Mapping[str, str], *, is_canonical: bool) -> OnnxFiles:
    """Return the files that the recipe names.

    Args:
        text: The source's path: a folder, a file in it, or a pattern.
        folder: What it is relative to.
        roles: For each role its file, relative to that folder.
        is_canonical: Give recognised models canonical names.

    Raises:
        RecipeError: There is no such folder or file.
    """
    base = _base(text, folder)
    if not base.is_dir():
        raise RecipeError(f"{base}: no such folder", hint="source.roles names files in the folder source.path")
    files = {role: base / name for role, name in roles.items()}
    for role, file in files.items():
        if not file.is_file():
            known = [found.relative_to(base).as_posix() for found in _models_below(base)]
            raise RecipeError(
                f"source.roles: {role}: there is no file {roles[role]!r} in {base}{did_you_mean(roles[role], known)}"
            )
    outside = tuple(file for file in files.values() if base.resolve() not in file.resolve().parents)
    return OnnxFiles(files, _companion_folders(base), (base, *outside), is_canonical)


def by_pattern(text: str, folder: Path, *, is_canonical: bool) -> OnnxFiles:
    """Return the files that a pattern finds, by the roles that their names say.

    Raises:
        RecipeError: It finds none, or their roles cannot be told.
    """
    base = _base(text, folder)
    pattern = Path(text).parts[_first_wildcard(text) :]
    found = [file for file in base.glob("/".join(pattern)) if file.suffix == ".onnx"] if base.is_dir() else []
    if not found:
        raise RecipeError(f"{text}: no .onnx file in {base} is of that name")
    files, aside = _by_name(base, sorted(found), text)
    return OnnxFiles(files, _companion_folders(base), tuple(found), is_canonical, aside)


def in_folder(text: str, path: Path, *, is_canonical: bool) -> OnnxFiles | None:
    """Return the models in a folder: those that a list of this or another tool names, else by the files' names.

    Lists are `bundle.json`, `export.json` of transformers.exporters and `genai_config.json`. Without one, the files at
    the top are taken, and where there are neither these nor PyTorch's, those in `onnx/`.

    Args:
        text: The folder as the recipe names it.
        path: The folder.
        is_canonical: Give recognised models canonical names.

    Returns:
        None for a folder without models in ONNX.

    Raises:
        RecipeError: The roles cannot be told, or a listed file is missing.
        ModelFileError: A list cannot be read.
    """
    files = _of_manifest(path) or _of_export(path) or _of_genai(path, text)
    if files:
        return OnnxFiles(files, _companion_folders(path), (path,), is_canonical)
    found = sorted(path.glob("*.onnx"))
    if not found and not _has_pytorch(path):
        found = sorted((path / HUB_FOLDER).glob("*.onnx"))
    if not found:
        return None
    files, aside = _by_name(path, found, text)
    return OnnxFiles(files, _companion_folders(path), (path,), is_canonical, aside)


def is_pattern(text: str) -> bool:
    """Tell a pattern from a path."""
    return bool(WILDCARD.search(text))


def _first_wildcard(text: str) -> int:
    return next((index for index, part in enumerate(Path(text).parts) if is_pattern(part)), len(Path(text).parts))


def _base(text: str, folder: Path) -> Path:
    """Return the folder of a path: the path itself, that of a file, or that in which a pattern begins."""
    path = folder / text
    if path.is_file():
        return path.parent
    return path if path.exists() else folder.joinpath(*Path(text).parts[: _first_wildcard(text)])


def _companion_folders(base: Path) -> tuple[Path, ...]:
    """Return where configs may be: in the folder, and above it if it is the `onnx/` of a repository."""
    return (base, base.resolve().parent) if base.resolve().name == HUB_FOLDER else (base,)


def _models_below(base: Path) -> Iterator[Path]:
    yield from sorted(base.glob("*.onnx"))
    yield from sorted(base.glob("*/*.onnx"))


def _has_pytorch(folder: Path) -> bool:
    return any(any(folder.glob(pattern)) for pattern in ("*.safetensors", "pytorch_model*.bin"))


# Lists of files by role


def _of_manifest(folder: Path) -> dict[str, Path]:
    manifest = read_manifest(folder)
    return _there(folder, MANIFEST, manifest.models) if manifest is not None else {}


def _of_export(folder: Path) -> dict[str, Path]:
    """Return what transformers.exporters has saved (`transformers/exporters/base.py`: `ExportedModel`)."""
    content = read_json(folder / EXPORT_LIST, optional=True)
    components = content.get("components")
    if not isinstance(components, dict):
        return {}
    if content.get("export_format") != "onnx":
        raise RecipeError(
            f"{folder}: {EXPORT_LIST} says that this is an export to {content.get('export_format')!r}, not to ONNX",
            hint="export it with transformers.exporters' OnnxExporter",
        )
    files = {str(role): entry.get("file") for role, entry in components.items() if isinstance(entry, dict)}
    return _there(folder, EXPORT_LIST, _names(folder / EXPORT_LIST, files))


def _of_genai(folder: Path, text: str) -> dict[str, Path]:
    """Return the files of a `genai_config.json`; its decoder takes a cache from the first token on."""
    network = read_json(folder / GENAI_CONFIG, optional=True).get("model")
    if not isinstance(network, dict):
        return {}
    parts = {role: part for role, part in network.items() if isinstance(part, dict)}
    if any("pipeline" in part for part in parts.values()):
        found = list(_models_below(folder))
        raise _which_is_which(folder, found, text, f"{GENAI_CONFIG} describes a pipeline of several decoders")
    files = {GENAI_ROLES.get(role, role): part["filename"] for role, part in parts.items() if "filename" in part}
    return _there(folder, GENAI_CONFIG, _names(folder / GENAI_CONFIG, files))


def _names(file: Path, names: Mapping[str, Any]) -> dict[str, str]:
    for role, name in names.items():
        if not isinstance(name, str) or not name:
            raise ModelFileError(f"{file}: names no file for {role!r}", hint="say it under source.roles")
    return dict(names)


def _there(folder: Path, listing: str, names: Mapping[str, str]) -> dict[str, Path]:
    """Return listed files, which are in the folder itself, or in its `onnx/`, whatever the list says."""
    files = {
        role: folder / (HUB_FOLDER if Path(name).parts[:-1] == (HUB_FOLDER,) else "") / Path(name).name
        for role, name in names.items()
    }
    for role, file in files.items():
        if not file.is_file():
            raise RecipeError(
                f"{folder}: there is no {file.name!r}, which {listing} lists as {role!r}",
                hint=f"put the file back, or remove {listing} to go by the files' names",
            )
    return files


# Roles by the files' names


def _by_name(folder: Path, found: Sequence[Path], text: str) -> tuple[dict[str, Path], tuple[Path, ...]]:
    """Return files by the roles that their names say, and those of other precisions, which are left aside."""
    chosen = _one_precision(folder, found, text)
    files: dict[str, Path] = {}
    for stem, file in chosen.items():
        role = role_of_file(stem)
        first = files.setdefault(role, file)
        if first != file:
            raise _which_is_which(folder, found, text, f"{first.name!r} and {file.name!r} are both the {role!r} model")
    if len(chosen) == 1 and not set(files) <= set(ROLES):
        files = dict(zip(["model"], chosen.values(), strict=True))
    strange = next((file for role, file in files.items() if role not in ROLES), None)
    if strange is not None:
        raise _which_is_which(folder, found, text, f"cannot tell the role of {strange.name!r}")
    return files, tuple(file for file in found if file not in chosen.values())


def _one_precision(folder: Path, found: Sequence[Path], text: str) -> dict[str, Path]:
    """Return for each model one of its files: the plain one; else the only precision that there is."""
    stems: dict[str, dict[str, Path]] = {}
    for file in found:
        mark = PRECISION.search(file.stem)
        stem = file.stem[: mark.start()] if mark else file.stem
        first = stems.setdefault(stem, {}).setdefault(mark[1] if mark else "", file)
        if first != file:
            raise _which_is_which(folder, found, text, f"{first} and {file} have one name")
    precisions = {precision for files in stems.values() for precision in files}
    if len(precisions) == 1:
        return {stem: file for stem, files in stems.items() for file in files.values()}
    lacking = next((stem for stem, files in stems.items() if "" not in files), None)
    if lacking is not None:
        raise _which_is_which(folder, found, text, f"of {lacking!r} there are only other precisions")
    return {stem: files[""] for stem, files in stems.items()}


def _which_is_which(folder: Path, found: Sequence[Path], text: str, problem: str) -> RecipeError:
    """Return an error that says what each file looks like, and what to write into the recipe."""
    lines = [f"{folder}: {problem}"]
    roles: dict[str, str] = {}
    doubtful: list[str] = []
    base = _base(text, folder) if is_pattern(text) else folder
    for file in found:
        name = file.relative_to(base).as_posix() if base in file.parents else str(file)
        role, looks = _looks(file)
        lines.append(f"  {name}: {looks}")
        if role in roles:
            doubtful.append(f"    # {role}: {name}")
        elif role:
            roles[role] = name
    path = json.dumps(text) if is_pattern(text) else text
    pasted = ["source:", f"  path: {path}", "  roles:", *(f"    {role}: {name}" for role, name in roles.items())]
    hint = "say which file is which, for example as below; those that are not named are left aside"
    return RecipeError("\n".join(lines), hint="\n".join([hint, *pasted, *doubtful]) if roles else "")


def _looks(file: Path) -> tuple[str, str]:
    """Return the role that a file may have, else a word for it, and what it looks like; its weights are not read."""
    try:
        model = open_model(file)
    except SurgeryError as error:
        return "", f"cannot be opened: {error.message}"
    recognised = recognise(model)
    if recognised is None:
        graph = model.graph
        inputs = _listed(value.name or "" for value in graph.inputs if value.name not in graph.initializers)
        outputs = _listed(value.name or "" for value in graph.outputs)
        word = re.sub(r"\W|^(?=\d)", "_", file.stem)
        return word, f"neither an encoder nor a decoder with a cache: {inputs} -> {outputs}"
    layers = f" of {recognised.layers} layers" if recognised.layers else ""
    return recognised.role, f"looks like {recognised.role!r}{layers}, with the names of {recognised.naming}"


def _listed(names: Iterable[str]) -> str:
    """Return the first few names, and how many more there are."""
    every = list(names)
    more = f" and {len(every) - 4} more" if len(every) > 4 else ""
    return ", ".join(every[:4]) + more
