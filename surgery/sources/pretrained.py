"""A Hugging Face model, local or on the Hub, exported on the way; PyTorch stays the reference of the export."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

from surgery.bundle import Bundle
from surgery.sources import Opened


class Pretrained:
    """A model that `transformers` can load.

    Args:
        name: A local folder or a Hub id.
        opset: The opset to export at; None for the one that works best.
    """

    def __init__(self, name: str, opset: int | None) -> None:
        self.name = name
        self.opset = opset

    @cached_property
    def config(self) -> dict[str, Any]:
        """The content of `config.json`."""
        from surgery.sources.huggingface import read_config

        return read_config(self.name)

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that the architecture is exported as."""
        from surgery.sources.huggingface import roles_of

        return roles_of(self.config)

    def open(self, scratch: Path, progress: Callable[[str], None]) -> Opened:
        """Export the model."""
        from surgery.sources.huggingface import export

        exported = export(self.name, opset=self.opset, scratch=scratch, progress=progress)
        bundle = Bundle(exported.models, exported.config, exported.generation_config, exported.files)
        inputs = (Path(self.name),) if Path(self.name).exists() else ()
        return Opened(bundle, exported.reference, inputs)
