"""Validity: after each step, whether the graphs are well formed."""

from __future__ import annotations

import time

from surgery.errors import ModelFileError, StepFailed
from surgery.manager import StepRecord
from surgery.storage.validity import find_problem


class Validity:
    """Checks each model with onnx's checker and strict type inference, without its weights.

    Names are unique in each scope, nodes stand in topological order, types agree with what the operators give.
    """

    def __init__(self) -> None:
        self._valid: set[str] = set()

    def starting(self, number: int, word: str) -> None:
        """Nothing to do before a step."""

    def stepped(self, record: StepRecord) -> None:
        """Check what the step has changed.

        Raises:
            StepFailed: A model is not valid any more.
            ModelFileError: The source is not valid to begin with.
        """
        start = time.perf_counter()
        identities = record.after.identities()
        for role, model in record.after.models.items():
            if identities[role] in self._valid:
                continue
            problem = find_problem(model)
            if problem and record.is_source:
                raise ModelFileError(
                    f"{role}: not a valid ONNX model: {problem}", hint="--no-check works on it as it is"
                )
            if problem:
                raise StepFailed(f"{role}: left an invalid model: {problem}")
            self._valid.add(identities[role])
        record.check_seconds += time.perf_counter() - start
