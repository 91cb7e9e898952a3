"""The judge: runs the claims of a step on samples and says how far it moved the answers, and how far all steps did."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from polygraphy.comparator import Comparator

from surgery.accuracy.compare import OutputComparison, OutputResult
from surgery.accuracy.feeds import Interface, Sample
from surgery.accuracy.findings import EMULATED, Findings
from surgery.accuracy.limits import Limits
from surgery.accuracy.locate import first_differences
from surgery.accuracy.quiet import quiet_polygraphy
from surgery.accuracy.runners import (
    DoesNotRun,
    ProgramRunner,
    Programs,
    Reference,
    ReferenceProgram,
    Runnable,
    metadata_of,
    runtime_errors,
)
from surgery.accuracy.samples import Samples
from surgery.accuracy.verdict import Verdict
from surgery.bundle import Bundle
from surgery.claims import AnyProgram, Claim, HostLoop, Measure, Program
from surgery.contract import Effect, Sampling, Tolerance
from surgery.errors import RecipeError, StepFailed, SurgeryError
from surgery.options import did_you_mean
from surgery.recipe import Check
from surgery.runtime.farm import run_all

SOURCE, BEFORE, AFTER = "source", "before", "after"

Feed = Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]
Pair = tuple[int, int]


@dataclass(frozen=True)
class Stage:
    """A bundle together with the identities of its models."""

    bundle: Bundle
    identities: Mapping[str, str]

    @classmethod
    def of(cls, bundle: Bundle) -> Stage:
        """Return the stage of a bundle."""
        return cls(bundle, bundle.identities())


@dataclass(frozen=True)
class _Entrant:
    """A program in a comparison: Polygraphy's name for it, ours, and how samples become its inputs."""

    name: str
    label: str
    program: Runnable
    feed: Feed


@dataclass(frozen=True)
class _Cut:
    """A step that is judged: the bundles around it and what it may do."""

    old: Stage
    new: Stage
    step: Limits
    drift: Limits
    tolerance: Tolerance


def _label(reference: AnyProgram, candidate: AnyProgram) -> str:
    """Return the name of a candidate; of one that came of another program of the source, with that program's."""
    return str(candidate) if candidate == reference else f"{candidate} as {reference}"


def _on(label: str, provider: str | None) -> str:
    """Return the name of what runs on a provider of its own."""
    return f"{label} on {provider}" if provider else label


class Judge:
    """Compares bundles of one run with each other and with the source.

    Args:
        source: The bundle that the run started from.
        check: What to feed and what to allow.
        reference: What the source was exported from, if it is known.
        folder: What `check.data` is relative to.

    Raises:
        RecipeError: The check names a model or an output that the source does not have.
    """

    def __init__(self, source: Bundle, check: Check, reference: Reference | None = None, folder: Path = Path()) -> None:
        _refuse_unknown_names(source, check)
        self._source = Stage.of(source)
        self._check = check
        self._reference = reference
        self._programs = Programs()
        self._real = Programs(check.provider) if check.provider else None
        self._samples = Samples(source, check, folder, self._run_source)
        self._lineage = [Claim.same(role) for role in source.models]
        self._drift = Limits((), check)
        self._verdicts: dict[tuple[object, ...], Verdict] = {}
        self.calls = 0

    def close(self) -> None:
        """Close every session; the judge is of no use afterwards."""
        self._programs.close()
        if self._real is not None:
            self._real.close()

    def feeds(self, stage: Bundle, role: str, sampling: Sampling | None = None) -> Iterator[Mapping[str, np.ndarray]]:
        """Yield samples of a model of a later bundle: those of the source, taken through the recipe's claims.

        Args:
            stage: The bundle.
            role: The model.
            sampling: Which; None is those that verdicts rest on.

        Raises:
            RecipeError: The user's data do not fit.
        """
        program = Program(role)
        wanted = tuple(value.name or "" for value in Interface(stage[role]).inputs)
        for claim in self._ancestors(program):
            for sample in self._samples.drawn(claim.reference, sampling or Sampling()):
                yield claim.feed(sample.arrays, wanted)

    def run(self, model: ir.Model, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Run a model once on given inputs."""
        from surgery.storage import identity

        with runtime_errors("the model"):
            return self._programs.model(model, identity(model)).run(feeds)

    def run_all(
        self, model: ir.Model, samples: Iterable[Mapping[str, np.ndarray]], outputs: Sequence[str], **where: Any
    ) -> Generator[Mapping[str, np.ndarray], None, None]:
        """Run a model on many samples, as `surgery.runtime.farm.run_all` does."""
        with runtime_errors("the model"):
            yield from run_all(model, samples, outputs, **where)

    def judge_source(self) -> Verdict:
        """Compare the source with what it was exported from, or with itself: it must answer the same twice.

        What it was exported from is let go afterwards: a PyTorch model weighs as much as the bundle.

        Raises:
            StepFailed: A model runs on none of its samples.
        """
        verdict = Verdict()
        warnings: list[str] = []
        for role in self._source.bundle.models:
            program = self._open(Program(role), self._source)
            samples = self._samples_that_run(role, program, warnings)
            first = ReferenceProgram(self._reference, role, program.inputs) if self._reference else program
            label = f"what {role!r} was exported from" if self._reference else role
            entrants = [_Entrant(SOURCE, label, first, dict), _Entrant(AFTER, role, program, dict)]
            found = Findings(role, half=EMULATED if program.is_emulated else "")
            comparison = OutputComparison(Claim.same(role), self._source_limits())
            for sample, results in self._compare(entrants, samples, {(0, 1): comparison}):
                found.add_step(sample, results[0, 1])
            verdict = found.onto(verdict, samples, is_own_data=self._samples.are_own(role))
        if not self._reference:
            verdict = replace(verdict, step=None, outputs={})
        self._reference = None
        return replace(verdict, warnings=(*verdict.warnings, *warnings))

    def judge(
        self, before: Bundle, after: Bundle, claims: Sequence[Claim], effect: Effect, tolerance: Tolerance
    ) -> Verdict:
        """Check the claims of a step.

        Args:
            before: The bundle that the step was given.
            after: What it made of it.
            claims: What must hold.
            effect: What the pass may do to the numbers.
            tolerance: The limits of `CLOSE`.

        Raises:
            StepFailed: A model does not run, or a claim says nothing that could be checked.
        """
        old, new = Stage.of(before), Stage.of(after)
        models = (tuple(sorted(stage.identities.items())) for stage in (old, new))
        key = (*models, repr(tuple(claims)), effect, repr(tolerance))
        self.calls += 1
        if key not in self._verdicts:
            self._programs.forget_all_but({*self._source.identities.values(), *old.identities.values()})
            if self._real is not None:
                self._real.forget_all_but(set())
            is_close = effect is Effect.CLOSE
            step = Limits((tolerance,) if is_close else (), self._check)
            drift = self._drift.plus(tolerance) if is_close else self._drift
            self._verdicts[key] = self._judge(_Cut(old, new, step, drift, tolerance), claims)
        return self._verdicts[key]

    def accept(self, claims: Sequence[Claim], effect: Effect, tolerance: Tolerance) -> None:
        """Take a step as done: later steps are compared with what it made.

        What is known of a host loop, which goes by canonical names, outlives a step after which its models still go by
        their own roles.
        """
        composed = [root.then(claim) for claim in claims for root in self._ancestors(claim.reference)]
        same = {role for claim in claims if claim.reference == claim.candidate for role in claim.candidate.roles}
        claimed = {claim.candidate for claim in claims}
        loops = [
            root
            for root in self._lineage
            if isinstance(root.candidate, HostLoop)
            and root.candidate not in claimed
            and set(root.candidate.roles) <= same
        ]
        self._lineage = composed + loops
        if effect is Effect.CLOSE:
            self._drift = self._drift.plus(tolerance)
        self._verdicts.clear()

    def _judge(self, cut: _Cut, claims: Sequence[Claim]) -> Verdict:
        verdict = Verdict()
        claimed = {role for claim in claims for role in claim.candidate.roles}
        unclaimed = [role for role in cut.new.bundle.models if role not in claimed]
        if unclaimed:
            raise StepFailed(f"nothing is claimed about the model {unclaimed[0]!r}, so nothing can be checked")
        checked = {role for claim in claims if isinstance(claim.candidate, Program) for role in claim.candidate.roles}
        for claim in claims:
            roots = self._ancestors(claim.reference)
            if not roots and isinstance(claim.candidate, HostLoop) and set(claim.candidate.roles) <= checked:
                continue  # an earlier step changed what its models answer, and each of them is checked by itself
            if not roots:
                raise StepFailed(f"nothing is known to feed '{claim.reference}' with, so its claim cannot be checked")
            for root in roots:
                verdict = self._judge_claim(verdict, root, claim, cut)
        return verdict

    def _judge_claim(self, verdict: Verdict, root: Claim, claim: Claim, cut: _Cut) -> Verdict:
        """Check one claim on the samples of one program of the source."""
        after = self._open(claim.candidate, cut.new)
        verdict = self._judge_program(verdict, root, claim, cut, after)
        if self._real is None or not after.is_emulated:
            return verdict
        real = self._open(claim.candidate, cut.new, self._real)
        return self._judge_program(verdict, root, claim, cut, real, self._check.provider)

    def _judge_program(
        self, verdict: Verdict, root: Claim, claim: Claim, cut: _Cut, after: Runnable, provider: str | None = None
    ) -> Verdict:
        """Check what a program answers: that of a claim's candidate, here or on a provider."""
        source = self._open(root.reference, self._source)
        before = self._open(root.candidate, cut.old)
        claim.refuse_unknown_inputs(after.inputs)
        whole = root.then(claim)

        def feed_before(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            return root.feed(arrays, before.inputs)

        def feed_after(arrays: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
            return claim.feed(feed_before(arrays), after.inputs)

        first = _Entrant(SOURCE, f"{root.reference} of the source", source, dict)
        last = _Entrant(AFTER, _on(str(claim.candidate), provider), after, feed_after)
        step = OutputComparison(claim, cut.step, whole)
        is_first = before is source and root.is_same
        if is_first:
            entrants, pairs, last_step = [first, last], {(0, 1): step}, (0, 1)
        else:
            middle = _Entrant(BEFORE, f"{root.candidate} before the step", before, feed_before)
            drift = OutputComparison(whole, cut.drift)
            entrants, pairs, last_step = [first, middle, last], {(1, 2): step, (0, 2): drift}, (1, 2)
        samples = self._samples.of(root.reference)
        # One token that differs changes all that follow, so a close step before this one may have changed most of them.
        is_bound = not is_first and whole.measure is not Measure.TOKENS
        is_emulated = any(program.is_emulated for program in (source, before, after))
        half = provider or (EMULATED if is_emulated else "")
        found = Findings(_on(_label(root.reference, claim.candidate), provider), half=half)
        for sample, results in self._compare(entrants, samples, pairs):
            found.add_step(sample, results[last_step])
            found.add_drift(sample, results[0, len(entrants) - 1], is_judged=is_bound)

        def nearest(sample: Sample) -> tuple[str, ...]:
            return self._locate(root, claim, cut, feed_before(sample.arrays), feed_after(sample.arrays))

        found.locate(nearest)
        return found.onto(verdict, samples, is_own_data=self._samples.are_own(root.reference.roles[0]))

    def _compare(
        self, entrants: Sequence[_Entrant], samples: Sequence[Sample], comparisons: Mapping[Pair, OutputComparison]
    ) -> list[tuple[Sample, dict[Pair, list[OutputResult]]]]:
        """Run programs on all samples in Polygraphy's Comparator, one sample at a time, and compare pairs of them."""
        if not samples:
            raise StepFailed("there is not one sample to compare on", hint="loosen check.lengths, or give check.data")
        metadata = metadata_of(samples[0].arrays)
        runners = [ProgramRunner(each.program, each.name, each.label, metadata, each.feed) for each in entrants]
        feeds = [dict(sample.arrays) for sample in samples]
        found: list[tuple[Sample, dict[Pair, list[OutputResult]]]] = []
        with quiet_polygraphy(), closing(Comparator.run(runners, data_loader=feeds, streaming=True)) as stream:
            for sample in samples:
                try:
                    outputs = next(stream)
                except DoesNotRun as error:
                    raise error.on(sample.name) from error
                for pair, comparison in comparisons.items():
                    Comparator.compare_accuracy(outputs, compare_func=comparison, comparisons=[pair])
                found.append((sample, {pair: comparison.results for pair, comparison in comparisons.items()}))
        return found

    def _open(self, program: AnyProgram, stage: Stage, programs: Programs | None = None) -> Runnable:
        config = {**stage.bundle.config, **stage.bundle.generation_config}
        with runtime_errors(str(program)):
            return (programs or self._programs).program(program, stage.bundle.models, stage.identities, config)

    def _run_source(self, role: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        with runtime_errors(f"{role} of the source"):
            return self._open(Program(role), self._source).run(feeds)

    def _ancestors(self, program: AnyProgram) -> list[Claim]:
        """Return the claims that lead from programs of the source to this one."""
        known = [claim for claim in self._lineage if claim.candidate == program]
        if known or isinstance(program, Program):
            return known
        kept = {claim.reference.roles[0] for claim in self._lineage if claim.reference == claim.candidate}
        return [Claim(program, program)] if set(program.roles) <= kept else []

    def _source_limits(self) -> Limits:
        """Return how far the source may be from what it was exported from; from itself, not at all."""
        if self._reference is None:
            return Limits((), self._check)
        given = {name: getattr(self._check, name) for name in Tolerance.model_fields}
        return Limits((Tolerance(**{name: limit for name, limit in given.items() if limit is not None}),), self._check)

    def _samples_that_run(self, role: str, program: Runnable, warnings: list[str]) -> list[Sample]:
        """Return the samples of a source model; which of them it cannot run itself, and what is NaN there, is said."""
        kept: list[Sample] = []
        refused: list[SurgeryError] = []
        broken: dict[str, str] = {}
        for sample in self._samples.of(Program(role)):
            try:
                with runtime_errors(role):
                    outputs = program.run(sample.arrays)
            except SurgeryError as error:
                refused.append(error)
                warnings.append(f"{role}: the source itself cannot run {sample.name!r}, so it is left out")
                continue
            kept.append(sample)
            broken |= {name: sample.name for name in _non_finite(outputs) if name not in broken}
        if not kept:
            reason = f": {refused[0].message}" if refused else ", because there is none"
            hint = refused[0].hint if refused else ""
            raise StepFailed(
                f"{role}: the source runs on no sample{reason}",
                hint=hint or "give check.data: a data_loader.py with load_data(), a .npz or Polygraphy JSON",
            )
        for name, sample_name in broken.items():
            warnings.append(f"{role}: output {name!r} of the source itself is not finite on sample {sample_name!r}")
        self._samples.keep(Program(role), kept)
        return kept

    def _locate(
        self,
        root: Claim,
        claim: Claim,
        cut: _Cut,
        before: Mapping[str, np.ndarray],
        after: Mapping[str, np.ndarray],
    ) -> tuple[str, ...]:
        if not isinstance(root.candidate, Program) or not isinstance(claim.candidate, Program):
            return ()
        models = cut.old.bundle[root.candidate.role], cut.new.bundle[claim.candidate.role]
        try:
            return first_differences(*models, before, after, cut.step.effect, cut.tolerance)
        except Exception:  # a hint is not worth a second error
            return ()


def _refuse_unknown_names(source: Bundle, check: Check) -> None:
    outputs = {value.name or "" for model in source.models.values() for value in model.graph.outputs}
    for name in check.outputs:
        if name not in outputs:
            near = did_you_mean(name, outputs)
            raise RecipeError(f"check.outputs: no model of the source has an output {name!r}{near}")
    for role in check.data if isinstance(check.data, dict) else ():
        if role not in source.models:
            raise RecipeError(f"check.data: the source has no model {role!r}{did_you_mean(role, source.models)}")


def _non_finite(outputs: Mapping[str, np.ndarray]) -> list[str]:
    return [name for name, array in outputs.items() if array.dtype.kind == "f" and not np.isfinite(array).all()]
