"""A Hugging Face model, local or on the Hub, exported on the way; PyTorch stays the reference of the export."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from surgery.bundle import Bundle
from surgery.interfaces import CANONICAL, TRANSFORMERS, rename_values, translate
from surgery.sources import Opened


class Pretrained:
    """A model that `transformers` can load.

    Args:
        name: A local folder or a Hub id.
        opset: The opset to export at; None for the one that works best.
        names: `canonical` for Optimum's names of inputs and outputs, `keep` for those that `transformers.exporters`
            gives them. A single model, as of an encoder, has the same names in both.
    """

    def __init__(self, name: str, opset: int | None, names: Literal["canonical", "keep"] = "canonical") -> None:
        self.name = name
        self.opset = opset
        self.names = names

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
        from surgery.sources.torch_reference import RenamedReference

        exported = export(self.name, opset=self.opset, scratch=scratch, progress=progress)
        bundle = Bundle(exported.models, exported.config, exported.generation_config, exported.files)
        inputs = (Path(self.name),) if Path(self.name).exists() else ()
        if self.names == "canonical":
            return Opened(bundle, exported.reference, inputs)
        renamed = _keep_names(bundle)
        return Opened(bundle, RenamedReference(exported.reference, renamed), inputs)


def _keep_names(bundle: Bundle) -> dict[str, dict[str, str]]:
    """Rename inputs and outputs as transformers.exporters calls them; return the new names by role and old name."""
    renamed: dict[str, dict[str, str]] = {}
    for role, model in bundle.models.items():
        if role == "model":
            continue
        inputs = [value.name or "" for value in model.graph.inputs]
        outputs = [value.name or "" for value in model.graph.outputs]
        renamed[role] = translate(inputs, outputs, CANONICAL, TRANSFORMERS.name)
        rename_values(model, renamed[role])
    return renamed
