"""Samples of the programs of a source: the user's own data, or made ones."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np

from surgery.accuracy.data import load_samples
from surgery.accuracy.feeds import FeedMaker, Interface, Run, Sample, room
from surgery.bundle import Bundle
from surgery.claims import AnyProgram, HostLoop, Program
from surgery.errors import RecipeError
from surgery.recipe import Check

LOOP_TOKENS = 8


class Samples:
    """The samples of each program of a source, made once.

    Args:
        source: The bundle that the run started from.
        check: What to feed.
        folder: What `check.data` is relative to.
        run: Runs the model of a role; used to chain the roles.
    """

    def __init__(self, source: Bundle, check: Check, folder: Path, run: Run) -> None:
        self._source = source
        self._check = check
        self._folder = folder
        self._maker = FeedMaker(source, check, run)
        self._made: dict[AnyProgram, list[Sample]] = {}

    def of(self, program: AnyProgram) -> list[Sample]:
        """Return the samples of a program.

        Raises:
            RecipeError: The user's data do not fit.
        """
        if program not in self._made:
            made = self._of_loop(program) if isinstance(program, HostLoop) else self._of_model(program)
            self._made[program] = list(made)
        return self._made[program]

    def keep(self, program: AnyProgram, samples: list[Sample]) -> None:
        """Go on with these samples only."""
        self._made[program] = samples

    def are_own(self, role: str) -> bool:
        """Say whether the user chose the samples of a role."""
        return self._path(role) is not None

    def _path(self, role: str) -> Path | None:
        data = self._check.data
        return data.get(role) if isinstance(data, dict) else data

    def _of_model(self, program: Program) -> Iterator[Sample]:
        path = self._path(program.role)
        if path is None:
            return self._maker.samples(program.role)
        return load_samples(self._folder / path, program.role, Interface(self._source[program.role]))

    def _of_loop(self, loop: HostLoop) -> Iterator[Sample]:
        """Yield prompts: the ids and masks of the first model's samples, as far as there is room to go on."""
        for sample in self.of(Program(loop.roles[0])):
            if "input_ids" not in sample.arrays:
                raise RecipeError(f"sample {sample.name!r} has no 'input_ids' for {loop} to continue")
            ids = sample.arrays["input_ids"]
            tokens = min(LOOP_TOKENS, room(self._source.config) + 1 - ids.shape[1])  # the last one is not fed back
            if tokens < 1:
                continue
            mask = sample.arrays.get("attention_mask", np.ones_like(ids))
            arrays = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(tokens, dtype=np.int64)}
            yield Sample(sample.name, arrays, sample.traits)
