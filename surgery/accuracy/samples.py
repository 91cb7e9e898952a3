"""Samples of the programs of a source: the user's own data, or made ones."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import numpy as np

from surgery.accuracy.data import load_samples
from surgery.accuracy.feeds import FeedMaker, Interface, Run, Sample, room
from surgery.accuracy.texts import Texts
from surgery.bundle import Bundle
from surgery.claims import AnyProgram, HostLoop, Program
from surgery.contract import Sampling
from surgery.errors import RecipeError
from surgery.options import did_you_mean
from surgery.recipe import Check

LOOP_TOKENS = 8


def _of_role(data: Path | Mapping[str, Path] | None, role: str) -> Path | None:
    return data.get(role) if isinstance(data, Mapping) else data


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
        self._run = run
        self._maker = FeedMaker(source, check, run)
        self._made: dict[AnyProgram, list[Sample]] = {}

    def of(self, program: AnyProgram) -> list[Sample]:
        """Return the samples of a program.

        Raises:
            RecipeError: The user's data do not fit.
        """
        if program not in self._made:
            if isinstance(program, HostLoop):
                made = self._of_loop(program, self.of(Program(program.roles[0])))
            else:
                made = self._of_model(program)
            self._made[program] = list(made)
        return self._made[program]

    def drawn(self, program: AnyProgram, sampling: Sampling) -> Iterator[Sample]:
        """Yield the samples that somebody asks for, made while they are taken.

        Raises:
            RecipeError: The user's data do not fit, or are for a model that there is not.
        """
        for role in sampling.data if isinstance(sampling.data, Mapping) else ():
            if role not in self._source.models:
                raise RecipeError(f"data: the source has no model {role!r}{did_you_mean(role, self._source.models)}")
        if isinstance(program, HostLoop):
            return self._of_loop(program, self.drawn(Program(program.roles[0]), sampling))
        asked = {"batches": sampling.batches, "lengths": sampling.lengths, "past": sampling.past}
        shapes = {name: wanted for name, wanted in asked.items() if wanted is not None}
        is_as_checked = not shapes and sampling.seed is None
        path = _of_role(sampling.data, program.role) or (self._path(program.role) if is_as_checked else None)
        if path is not None:
            return self._own(path, program.role, "data") if sampling.round == 0 else iter(())
        if is_as_checked and sampling.round == 0:
            return iter(self.of(program))
        seed = (sampling.seed if sampling.seed is not None else self._check.seed) + sampling.round
        maker = FeedMaker(self._source, self._check.model_copy(update={**shapes, "seed": seed}), self._run)
        samples = maker.samples(program.role)
        if shapes:
            return samples
        kept = {sample.name for sample in self.of(program)}  # the source itself may refuse some shapes
        return (sample for sample in samples if sample.name in kept)

    def keep(self, program: AnyProgram, samples: list[Sample]) -> None:
        """Go on with these samples only."""
        self._made[program] = samples

    def are_own(self, role: str) -> bool:
        """Say whether the user chose the samples of a role."""
        return self._path(role) is not None

    def _path(self, role: str) -> Path | None:
        path = _of_role(self._check.data, role)
        return self._folder / path if path is not None else None

    def _of_model(self, program: Program) -> Iterator[Sample]:
        path = self._path(program.role)
        if path is None:
            return self._maker.samples(program.role)
        return self._own(path, program.role, "check.data")

    def _own(self, path: Path, role: str, option: str) -> Iterator[Sample]:
        if path.suffix == ".txt":
            texts = Texts(self._source, self._run, self._check.max_new_tokens, option)
            return texts.samples(path, role)
        is_alone = len(self._source.models) == 1
        return load_samples(path, role, Interface(self._source[role]), option=option, is_alone=is_alone)

    def _of_loop(self, loop: HostLoop, samples: Iterable[Sample]) -> Iterator[Sample]:
        """Yield prompts: the ids and masks of the first model's samples, as far as there is room to go on."""
        for sample in samples:
            if "input_ids" not in sample.arrays:
                raise RecipeError(f"sample {sample.name!r} has no 'input_ids' for {loop} to continue")
            ids = sample.arrays["input_ids"]
            tokens = min(LOOP_TOKENS, room(self._source.config) + 1 - ids.shape[1])  # the last one is not fed back
            if tokens < 1:
                continue
            mask = sample.arrays.get("attention_mask", np.ones_like(ids))
            arrays = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(tokens, dtype=np.int64)}
            yield Sample(sample.name, arrays, sample.traits)
