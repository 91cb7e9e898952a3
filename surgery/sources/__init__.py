"""Sources: where the models of a run come from; their roles are known before any model is opened."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from surgery.bundle import Bundle
from surgery.errors import RecipeError

if TYPE_CHECKING:
    from surgery.accuracy.runners import Reference
    from surgery.recipe import Source


@dataclass(frozen=True)
class Opened:
    """An opened source.

    Args:
        bundle: Its models.
        reference: What they were exported from, to judge the export; None for models that were files already.
        inputs: The files and folders that must not be written to.
        notes: What was done on the way that is not to be overlooked, for line 0 of the ledger.
    """

    bundle: Bundle
    reference: Reference | None = None
    inputs: tuple[Path, ...] = ()
    notes: tuple[str, ...] = ()


class SourceKind(Protocol):
    """A source that was recognised but not opened."""

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the models that it will give."""

    def open(self, scratch: Path, progress: Callable[[str], None]) -> Opened:
        """Open the models; what has to be made on the way is put into the scratch folder."""


@dataclass(frozen=True)
class Given:
    """A bundle that is open already."""

    bundle: Bundle

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that it has."""
        return tuple(self.bundle.models)

    def open(self, scratch: Path, progress: Callable[[str], None]) -> Opened:
        """Hand it over."""
        return Opened(self.bundle)


def find_source(source: Source, folder: Path) -> SourceKind:
    """Recognise a source; nothing but names and configs is read.

    Args:
        source: The recipe's source.
        folder: What a relative path is relative to.

    Raises:
        RecipeError: There is no such file or folder, it holds no model, the roles of its files cannot be told, or an
            opset is asked of what is ONNX already.
    """
    from surgery.sources import files
    from surgery.sources.pretrained import Pretrained

    path = folder / source.path
    is_canonical = source.names == "canonical"
    if source.roles is not None:
        _refuse_opset(source)
        return files.by_roles(source.path, folder, source.roles, is_canonical=is_canonical)
    if path.is_file():
        _refuse_opset(source)
        return files.single_file(path)
    if not path.exists() and files.is_pattern(source.path):
        _refuse_opset(source)
        return files.by_pattern(source.path, folder, is_canonical=is_canonical)
    found = files.in_folder(source.path, path, is_canonical=is_canonical) if path.is_dir() else None
    if found is not None:
        _refuse_opset(source)
        return found
    if path.is_dir() and not (path / "config.json").is_file():
        raise RecipeError(
            f"{path}: no model is in this folder",
            hint="give a .onnx file, a folder of .onnx files, or a Hugging Face folder with config.json and weights",
        )
    if not path.is_dir() and looks_like_a_path(source.path):
        raise RecipeError(f"{path}: no such file or folder")
    return Pretrained(str(path) if path.is_dir() else source.path, source.opset, source.names)


def _refuse_opset(source: Source) -> None:
    if source.opset is not None:
        raise RecipeError(
            f"{source.path}: source.opset is for Hugging Face models, which are exported; this is ONNX already",
            hint="leave source.opset out, or --set source.opset=null",
        )


def looks_like_a_path(text: str) -> bool:
    """Tell a path from a Hub id, which is `name` or `owner/name` without a suffix of a file."""
    is_file = text.endswith((".onnx", ".yaml", ".json"))
    return is_file or text.count("/") > 1 or text.startswith((".", "/", "~")) or any(mark in text for mark in "*?[")
