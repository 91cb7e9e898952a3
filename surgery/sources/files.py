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
            RecipeError: Several files, and the role of one cannot be told.
        """
        manifest = read_manifest(folder)
        if manifest is not None:
            return cls(folder, {role: folder / Path(name).name for role, name in manifest.models.items()})
        found = sorted(folder.glob("*.onnx"))
        files = {role_of_file(file.name): file for file in found}
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
