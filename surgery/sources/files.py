"""Models that are files already: one .onnx file, or a folder of them as saved here or by Optimum."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from surgery.bundle import ROLES, Bundle
from surgery.errors import RecipeError
from surgery.sources import Opened
from surgery.sources.configs import read_json
from surgery.storage import open_model, read_manifest, role_of_file
from surgery.storage.naming import MANIFEST, Manifest

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


@dataclass(frozen=True)
class OnnxFile:
    """A single model; its interface is its own."""

    path: Path

    @property
    def roles(self) -> tuple[str, ...]:
        """The one role `model`."""
        return ("model",)

    def open(self, scratch: Path, progress: Callable[[str], None]) -> Opened:
        """Open the file."""
        return Opened(Bundle({"model": open_model(self.path)}), inputs=(self.path,))


@dataclass(frozen=True)
class OnnxFolder:
    """A folder whose files have the names that Optimum gives, or a single file of any name."""

    folder: Path
    files: Mapping[str, Path]

    @classmethod
    def recognise(cls, folder: Path) -> OnnxFolder:
        """Find the role of each .onnx file: by the manifest that a run left there, else by its name.

        Raises:
            RecipeError: Several files, and the role of one cannot be told; two of one role; or a listed one is missing.
        """
        manifest = read_manifest(folder)
        if manifest is not None and manifest.models:
            return cls(folder, _listed(folder, manifest))
        found = sorted(folder.glob("*.onnx"))
        files = _by_role(folder, found)
        if len(found) == 1 and not set(files) <= set(ROLES):
            return cls(folder, {"model": found[0]})
        for role, file in files.items():
            if role not in ROLES:
                names = ", ".join(file.name for file in found)
                raise RecipeError(
                    f"{folder}: cannot tell the role of {file.name!r} among {names}",
                    hint="name one .onnx file as the source, or rename the files as Optimum does",
                )
        return cls(folder, files)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles by the files' names."""
        return tuple(self.files)

    def open(self, scratch: Path, progress: Callable[[str], None]) -> Opened:
        """Open the files, and take along the configs and the tokenizer beside them."""
        models = {role: open_model(file) for role, file in self.files.items()}
        companions = {file.name: file for pattern in COMPANIONS for file in self.folder.glob(pattern) if file.is_file()}
        bundle = Bundle(
            models,
            read_json(self.folder / "config.json", optional=True),
            read_json(self.folder / "generation_config.json", optional=True),
            companions,
        )
        return Opened(bundle, inputs=(self.folder,))


def _listed(folder: Path, manifest: Manifest) -> dict[str, Path]:
    """Return the files that a manifest lists, by role."""
    files = {role: folder / Path(name).name for role, name in manifest.models.items()}
    for role, file in files.items():
        if not file.is_file():
            raise RecipeError(
                f"{folder}: there is no {file.name!r}, which {MANIFEST} lists as {role!r}",
                hint=f"put the file back, or remove {MANIFEST} to go by the files' names",
            )
    return files


def _by_role(folder: Path, found: list[Path]) -> dict[str, Path]:
    """Return files by the roles that their names say."""
    files: dict[str, Path] = {}
    for file in found:
        first = files.setdefault(role_of_file(file.name), file)
        if first != file:
            raise RecipeError(
                f"{folder}: {first.name!r} and {file.name!r} are both the {role_of_file(file.name)!r} model",
                hint="keep one of them in the folder",
            )
    return files
