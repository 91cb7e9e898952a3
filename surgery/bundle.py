"""A bundle: the models of one network by role, and the configuration and tokenizer files that travel with them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnx_ir as ir

ROLES: Mapping[str, str] = {
    "encoder": "the encoder of an encoder-decoder",
    "prefill": "a decoder that reads a prompt, no cache in",
    "decode": "a decoder with a cache",
    "decoder": "prefill and decode in one model",
    "generator": "a whole generation in one graph",
    "model": "any single model",
}


@dataclass
class Bundle:
    """Models by role, with what travels along.

    Args:
        models: The models; their weights stay on disk until something reads them.
        config: The network's `config.json`, empty when there is none.
        generation_config: Its `generation_config.json`, likewise.
        files: What is saved beside the models, by relative name: contents, or where to copy them from.
    """

    models: dict[str, ir.Model]
    config: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    files: Mapping[str, bytes | Path] = field(default_factory=dict)

    def __getitem__(self, role: str) -> ir.Model:
        return self.models[role]

    def clone(self) -> Bundle:
        """Return a bundle whose graphs can be changed without touching these; tensors are shared, not copied."""
        models = {role: model.clone() for role, model in self.models.items()}
        return Bundle(models, self.config, self.generation_config, self.files)

    def identities(self) -> dict[str, str]:
        """Return for each role a string that changes when the model does; reads no weights from disk."""
        from surgery.storage import identity

        return {role: identity(model) for role, model in self.models.items()}
