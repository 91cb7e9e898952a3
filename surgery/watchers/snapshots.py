"""Snapshots: every step's graphs in one folder, over one weights file that holds each weight once."""

from __future__ import annotations

from pathlib import Path

import onnx_ir as ir

from surgery.manager import StepRecord
from surgery.storage import save_models


class Snapshots:
    """Keeps the models after each step, to be saved as `0_source.decode.onnx`, `1_dedup_weights.decode.onnx`, ...

    Weights stay where they are until then, and those that no step changed are written once for all steps.
    """

    def __init__(self) -> None:
        self._models: dict[str, ir.Model] = {}

    def starting(self, number: int, word: str) -> None:
        """Nothing to do before a step."""

    def stepped(self, record: StepRecord) -> None:
        """Keep the models as they are now."""
        word = record.word.rpartition(":")[2]
        self._models |= {f"{record.number}_{word}.{role}": model for role, model in record.after.models.items()}

    def save(self, folder: Path) -> None:
        """Write what was kept; steps of an earlier run in that folder are replaced.

        Raises:
            OutputError: The disk is full.
        """
        if self._models:
            save_models(self._models, folder, layout="shared", overwrite=True)
