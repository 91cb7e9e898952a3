"""Which file holds which role, and the manifest that says which files of a folder are ours."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import MappingProxyType

MIN_DATA_BYTES = 1024
"""Smaller weights stand in the graph file, where shape inference sees them; the others in a data file."""

HUB_FOLDER = "onnx"
"""Where repositories on the Hub keep their .onnx files, below the configs."""

MANIFEST = "bundle.json"
SHARED_DATA = "weights.onnx_data"

_STEMS: Mapping[str, str] = MappingProxyType(
    {
        "encoder": "encoder_model",
        "prefill": "decoder_model",
        "decode": "decoder_with_past_model",
        "decoder": "decoder_model_merged",
    }
)
_ROLES = MappingProxyType({stem: role for role, stem in _STEMS.items()})


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a save wrote into a folder."""

    layout: str
    models: Mapping[str, str]
    files: tuple[str, ...]


def file_of_role(role: str) -> str:
    """Return the file name that Optimum and transformers.js expect for a role."""
    return f"{_STEMS.get(role, role)}.onnx"


def hub_files(roles: Collection[str]) -> dict[str, str]:
    """Return for roles the files under which transformers.js looks for them, relative to a repository's folder.

    A decoder on its own that takes an empty cache for the prompt is `model.onnx` there (transformers.js 4:
    `src/models/modeling_utils.js`), and so it is in Optimum 2.
    """
    alone = next(iter(roles)) if len(roles) == 1 and set(roles) <= {"decode", "decoder"} else None
    names = {role: file_of_role("model" if role == alone else role) for role in roles}
    return {role: f"{HUB_FOLDER}/{name}" for role, name in names.items()}


def role_of_file(name: str) -> str:
    """Return the role of an .onnx file by its name: the inverse of `file_of_role`."""
    stem = Path(name).name.removesuffix(".onnx")
    return _ROLES.get(stem, stem)


def data_file_of(name: str) -> str:
    """Return the name of the data file beside an .onnx file: X.onnx_data beside X.onnx."""
    return f"{name}_data"


def manifest_bytes(layout: str, models: Mapping[str, str], files: Sequence[str]) -> bytes:
    """Return the manifest as it is written, itself listed in it."""
    content = {
        "surgery": _version(),
        "layout": layout,
        "models": dict(models),
        "files": sorted({*files, MANIFEST}),
    }
    return (json.dumps(content, indent=2) + "\n").encode()


def read_manifest(folder: Path) -> Manifest | None:
    """Return what the last save wrote into a folder, `None` if nothing (readable) says so."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        manifest = Manifest(str(content["layout"]), dict(content["models"]), tuple(map(str, content["files"])))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return manifest if all(isinstance(name, str) and name for name in manifest.models.values()) else None


def _version() -> str:
    try:
        return version("graph-surgery")
    except PackageNotFoundError:
        return "unknown"
