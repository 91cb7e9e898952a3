"""The judge: runs the claims of a step on samples and says how far it moved the answers, and how far all steps did."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
from polygraphy.comparator import Comparator
from polygraphy.exception import PolygraphyException

from surgery.accuracy.compare import OutputComparison, OutputResult
from surgery.accuracy.data import load_samples
from surgery.accuracy.feeds import FeedMaker, Sample
from surgery.accuracy.locate import first_differences
from surgery.accuracy.runners import (
    Programs,
    ProgramRunner,
    Reference,
    ReferenceProgram,
    Runnable,
    metadata_of,
    quiet_polygraphy,
)
from surgery.accuracy.verdict import Coverage, Failure, Gap, Verdict, worst
from surgery.bundle import Bundle
from surgery.claims import AnyProgram, Claim, HostLoop, Program
from surgery.contract import Effect, Tolerance
from surgery.errors import RecipeError, StepFailed, SurgeryError
from surgery.options import did_you_mean
from surgery.recipe import Check

SOURCE, BEFORE, AFTER = "source", "before", "after"
NO_GAP = Tolerance(max_error=0, p999_error=0, top1=1)
LOOP_TOKENS = 8

_Finder = Callable[[Sample], tuple[str, ...]]


@dataclass(frozen=True)
class Stage:
    """A bundle together with the identities of its models."""

    bundle: Bundle
    identities: Mapping[str, str]

    @classmethod
    def of(cls, bundle: Bundle) -> Stage:
        """Return the stage of a bundle."""
        return cls(bundle, bundle.identities())


class Judge:
    """Compares bundles of one run with each other and with the source.

    Args:
        source: The bundle that the run started from.
        check: What to feed and what to allow.
        reference: What the source was exported from, if it is known.
        folder: What `check.data` is relative to.
    """

    def __init__(
        self, source: Bundle, check: Check, reference: Reference | None = None, folder: Path = Path()
    ) -> None:
        self._source = Stage.of(source)
        self._check = check
        self._reference = reference
        self._folder = folder
        self._programs = Programs()
        self._lineage = [Claim.same(role) for role in source.models]
        self._samples: dict[AnyProgram, list[Sample]] = {}
        self._drift = NO_GAP
        self._verdicts: dict[tuple[str, ...], Verdict] = {}
        self._warnings: list[str] = []
        self.calls = 0

    def samples(self, program: AnyProgram) -> list[Sample]:
        """Return the samples of a program of the source, made once."""
        if program not in self._samples:
            maker = self._loop_samples if isinstance(program, HostLoop) else self._model_samples
            self._samples[program] = list(maker(program))  # type: ignore[arg-type]
        return self._samples[program]

    def feeds(self, stage: Bundle, role: str) -> Iterator[Mapping[str, np.ndarray]]:
        """Yield samples of a model of a later bundle: those of the source, taken through the recipe's claims."""
        program = Program(role)
        wanted = tuple(value.name or "" for value in stage[role].graph.inputs)
        for claim in self._ancestors(program):
            for sample in self.samples(claim.reference):
                yield claim.feed(sample.arrays, wanted)

    def run(self, model: ir.Model, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Run a model once on given inputs."""
        from surgery.storage import identity

        with _runtime_errors("this run"):
            return self._programs.model(model, identity(model)).run(feeds)

    def judge_source(self) -> Verdict:
        """Compare the source with what it was exported from; without that, prove that it runs on every sample."""
        verdict = Verdict(step=Gap() if self._reference else None)
        stage = self._source
        self._refuse_unknown_outputs()
        for role in stage.bundle.models:
            claim = Claim.same(role)
            found = _Findings()
            program = self._open(Program(role), stage)
            candidates = [(AFTER, program, claim)]
            first = ReferenceProgram(self._reference, role, program.inputs) if self._reference else program
            samples = self._samples_that_run(role, program)
            compare = OutputComparison(dict, Effect.CLOSE if self._reference else Effect.EXACT, self._tolerance_of(Tolerance()))
            for sample, results in self._compare(first, candidates, samples, {(0, 1): compare}):
                found.add(str(claim.candidate), sample, results[0, 1], "step")
            verdict = found.onto(verdict, self._coverage_warnings(role, samples))
        if not self._reference:
            verdict = replace(verdict, step=None, outputs={})
        return replace(verdict, warnings=(*verdict.warnings, *self._warnings, *self._non_finite()))

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
        key = (*sorted(old.identities.values()), "->", *sorted(new.identities.values()), effect.value, repr(tolerance))
        self.calls += 1
        if key not in self._verdicts:
            self._programs.forget_all_but({*self._source.identities.values(), *old.identities.values()})
            self._verdicts[key] = self._judge(old, new, claims, effect, tolerance)
        return self._verdicts[key]

    def accept(self, claims: Sequence[Claim], effect: Effect, tolerance: Tolerance) -> None:
        """Take a step as done: later steps are compared with what it made."""
        self._lineage = [root.then(claim) for claim in claims for root in self._ancestors(claim.reference)]
        if effect is Effect.CLOSE:
            self._drift = self._drift.plus(tolerance)
        self._verdicts.clear()

    def _judge(
        self, old: Stage, new: Stage, claims: Sequence[Claim], effect: Effect, tolerance: Tolerance
    ) -> Verdict:
        verdict = Verdict()
        drift = self._drift.plus(tolerance) if effect is Effect.CLOSE else self._drift
        uncovered = [role for role in new.bundle.models if not any(role in claim.candidate.roles for claim in claims)]
        if uncovered:
            raise StepFailed(f"nothing is claimed about {uncovered[0]!r}, so nothing can be checked")
        for claim in claims:
            roots = self._ancestors(claim.reference)
            if not roots:
                raise StepFailed(f"nothing is known to feed {claim.reference} with, so its claim cannot be checked")
            for root in roots:
                verdict = self._judge_claim(verdict, root, claim, (old, new), (effect, tolerance, drift))
        return verdict

    def _judge_claim(
        self,
        verdict: Verdict,
        root: Claim,
        claim: Claim,
        stages: tuple[Stage, Stage],
        limits: tuple[Effect, Tolerance, Tolerance],
    ) -> Verdict:
        """Check one claim on the samples of one program of the source."""
        old, new = stages
        effect, tolerance, drift = limits
        whole = root.then(claim)
        source = self._open(root.reference, self._source)
        before = self._open(root.candidate, old)
        after = self._open(claim.candidate, new)
        step = OutputComparison(claim.expect, effect, self._tolerance_of(tolerance), claim.extra)
        far = Effect.EXACT if drift.max_error == 0 else Effect.CLOSE
        total = OutputComparison(whole.expect, far, self._tolerance_of(drift), whole.extra)
        samples = self.samples(root.reference)
        if before is source and root.is_same:
            candidates = [(AFTER, after, whole)]
            pairs = {(0, 1): step}
            step_pair, total_pair = (0, 1), None
        else:
            candidates = [(BEFORE, before, root), (AFTER, after, whole)]
            pairs = {(1, 2): step, (0, 2): total}
            step_pair, total_pair = (1, 2), (0, 2)
        found = _Findings()
        name = str(claim.candidate)
        for sample, results in self._compare(source, candidates, samples, pairs):
            found.add(name, sample, results[step_pair], "step")
            found.add_total(name, sample, results[total_pair] if total_pair else results[step_pair], is_new=bool(total_pair))
        found.locate(lambda sample: self._locate(root, claim, old, new, sample, tolerance if effect is Effect.CLOSE else NO_GAP))
        return found.onto(verdict, self._coverage_warnings(str(claim.candidate), samples))

    def _compare(
        self,
        first: Runnable,
        candidates: Sequence[tuple[str, Runnable, Claim]],
        samples: Sequence[Sample],
        comparisons: Mapping[tuple[int, int], OutputComparison],
    ) -> Iterator[tuple[Sample, dict[tuple[int, int], list[OutputResult]]]]:
        """Run all programs on all samples in Polygraphy's Comparator, one sample at a time, and compare pairs of them."""
        if not samples:
            raise StepFailed("there is not one sample to compare on", hint="loosen check.lengths, or give check.data")
        metadata = metadata_of(samples[0].arrays)
        runners = [ProgramRunner(first, SOURCE, metadata)]
        runners += [ProgramRunner(program, name, metadata, claim) for name, program, claim in candidates]
        with quiet_polygraphy():
            stream = Comparator.run(runners, data_loader=[dict(sample.arrays) for sample in samples], streaming=True)
            done = 0
            for sample in samples:
                with _runtime_errors(f"sample {sample.name!r}"):
                    outputs = next(stream)
                results: dict[tuple[int, int], list[OutputResult]] = {}
                for pair, comparison in comparisons.items():
                    Comparator.compare_accuracy(outputs, compare_func=comparison, comparisons=[pair])
                    results[pair] = comparison.results
                done += 1
                yield sample, results
            assert done == len(samples)

    def _open(self, program: AnyProgram, stage: Stage) -> Runnable:
        with _runtime_errors(str(program)):
            return self._programs.program(
                program, stage.bundle.models, stage.identities, stage.bundle.generation_config
            )

    def _ancestors(self, program: AnyProgram) -> list[Claim]:
        """Return the claims that lead from programs of the source to this one."""
        known = [claim for claim in self._lineage if claim.candidate == program]
        if known or isinstance(program, Program):
            return known
        kept = [claim for claim in self._lineage if claim.is_same]
        roles = {claim.reference.roles[0] for claim in kept if isinstance(claim.reference, Program)}
        return [Claim(program, program)] if set(program.roles) <= roles else []

    def _model_samples(self, program: Program) -> Iterator[Sample]:
        role = program.role
        data = self._check.data
        path = data.get(role) if isinstance(data, dict) else data
        opened = self._open(program, self._source)
        if path is not None:
            yield from load_samples(self._folder / path, opened.inputs)
        else:
            maker = FeedMaker(
                self._source.bundle, self._check, lambda other, feeds: self._open(Program(other), self._source).run(feeds)
            )
            with _runtime_errors(f"the making of feeds for {role!r}"):
                yield from maker.samples(role)

    def _loop_samples(self, loop: HostLoop) -> Iterator[Sample]:
        """Yield prompts: the ids and masks of the first model's samples."""
        for sample in self.samples(Program(loop.roles[0])):
            ids = sample.arrays["input_ids"]
            mask = sample.arrays.get("attention_mask", np.ones_like(ids))
            tokens = np.array(LOOP_TOKENS, dtype=np.int64)
            arrays = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": tokens}
            yield Sample(sample.name, arrays, sample.traits)

    def _samples_that_run(self, role: str, program: Runnable) -> list[Sample]:
        """Return the samples of a source model, without those that it cannot run itself, which is said."""
        kept: list[Sample] = []
        refused = ""
        for sample in self.samples(Program(role)):
            try:
                with _runtime_errors(f"sample {sample.name!r}"):
                    program.run(sample.arrays)
            except SurgeryError as error:
                refused = refused or error.message
                self._warnings.append(f"{role}: the source itself cannot run {sample.name}: it is left out")
                continue
            kept.append(sample)
        if not kept:
            raise StepFailed(
                f"{role}: the source runs on none of the samples; {refused}",
                hint="give check.data: a data_loader.py with load_data(), a .npz or Polygraphy JSON",
            )
        self._samples[Program(role)] = kept
        return kept

    def _coverage_warnings(self, name: str, samples: Sequence[Sample]) -> tuple[str, Coverage, tuple[str, ...]]:
        coverage = _coverage(samples)
        missing: list[str] = []
        traits = coverage.traits
        if len(traits.get("batch", ())) < 2 and self._check.data is None:
            missing.append("only one batch size was fed")
        if "past" in traits and "0" not in traits["past"]:
            missing.append("no empty cache was fed")
        if "past" in traits and not traits["past"] - {"0", "1"}:
            missing.append("no cache of more than one token was fed")
        if "padding" in traits and "yes" not in traits["padding"]:
            missing.append("no padded row was fed")
        return name, coverage, tuple(f"{name}: {text}" for text in missing)

    def _tolerance_of(self, default: Tolerance) -> _Tolerances:
        return _Tolerances(default, self._check)

    def _refuse_unknown_outputs(self) -> None:
        known = {value.name or "" for model in self._source.bundle.models.values() for value in model.graph.outputs}
        for name in self._check.outputs:
            if name not in known:
                raise RecipeError(f"check.outputs: no model has an output {name!r}{did_you_mean(name, known)}")

    def _non_finite(self) -> Iterator[str]:
        """Say which outputs of the source are NaN or infinite to begin with."""
        for role in self._source.bundle.models:
            program = self._open(Program(role), self._source)
            bad: dict[str, str] = {}
            for sample in self.samples(Program(role)):
                for name, array in program.run(sample.arrays).items():
                    if array.dtype.kind == "f" and not np.isfinite(array).all():
                        bad.setdefault(name, sample.name)
            for name, where in bad.items():
                yield f"{role}: output {name!r} of the source itself is not finite on sample {where!r}"

    def _locate(
        self, root: Claim, claim: Claim, old: Stage, new: Stage, sample: Sample, tolerance: Tolerance
    ) -> tuple[str, ...]:
        if not isinstance(root.candidate, Program) or not isinstance(claim.candidate, Program):
            return ()
        before, after = self._open(root.candidate, old), self._open(claim.candidate, new)
        try:
            feeds = root.feed(sample.arrays, before.inputs)
            return first_differences(
                old.bundle[root.candidate.role],
                new.bundle[claim.candidate.role],
                feeds,
                claim.feed(feeds, after.inputs),
                tolerance,
            )
        except Exception:  # a hint is not worth a second error
            return ()


class _Tolerances:
    """The tolerance of each output: the one in force, with what the recipe says of the output."""

    def __init__(self, default: Tolerance, check: Check) -> None:
        self._default = default
        self._check = check

    def __call__(self, output: str) -> Tolerance:
        own = self._check.outputs.get(output)
        if own is None or self._default == NO_GAP:
            return self._default
        return self._default.model_copy(update=own.model_dump(exclude_none=True))


class _Findings:
    """Gathers what is found about one claim over its samples."""

    def __init__(self) -> None:
        self.step: list[Gap] = []
        self.source: list[Gap] = []
        self.outputs: dict[str, Gap] = {}
        self.failures: dict[tuple[str, str], Failure] = {}
        self.where: dict[tuple[str, str], Sample] = {}

    def add(self, program: str, sample: Sample, results: Sequence[OutputResult], since: str) -> None:
        for result in results:
            key = f"{program}.{result.output}"
            self.step.append(result.gap)
            self.outputs[key] = self.outputs[key].worse(result.gap) if key in self.outputs else result.gap
            self._add_failure(program, sample, result, since)

    def add_total(self, program: str, sample: Sample, results: Sequence[OutputResult], is_new: bool) -> None:
        for result in results:
            self.source.append(result.gap)
            if is_new:
                self._add_failure(program, sample, result, "source")

    def _add_failure(self, program: str, sample: Sample, result: OutputResult, since: str) -> None:
        key = (since, result.output)
        known = self.failures.get(key)
        if result or (known is not None and known.error >= result.gap.max_error):
            return
        self.failures[key] = Failure(
            program, result.output, result.text, sample.name, since, result.index, error=result.gap.max_error
        )
        self.where[key] = sample

    def locate(self, find: _Finder) -> None:
        """Find the nodes nearest to the cause of the worst failure of the step itself."""
        keys = [key for key in self.failures if key[0] == "step"]
        if keys:
            key = max(keys, key=lambda key: self.failures[key].error)
            self.failures[key] = replace(self.failures[key], nearest=find(self.where[key]))

    def onto(self, verdict: Verdict, covered: tuple[str, Coverage, tuple[str, ...]]) -> Verdict:
        """Return a verdict that also holds these findings."""
        name, coverage, warnings = covered
        known = verdict.coverage.get(name)
        failures = sorted((*verdict.failures, *self.failures.values()), key=_severity)
        return Verdict(
            step=worst([*([verdict.step] if verdict.step else []), *self.step]),
            source=worst([*([verdict.source] if verdict.source else []), *self.source]),
            outputs={**verdict.outputs, **self.outputs},
            failures=tuple(failures),
            coverage={**verdict.coverage, name: known.joined(coverage) if known else coverage},
            warnings=tuple(dict.fromkeys((*verdict.warnings, *warnings))),
        )


def _severity(failure: Failure) -> tuple[bool, float]:
    """Sort the step's own faults before drift, and the worst first."""
    return failure.since != "step", -failure.error


def _coverage(samples: Sequence[Sample]) -> Coverage:
    traits: dict[str, frozenset[str]] = {}
    for sample in samples:
        for name, value in sample.traits.items():
            traits[name] = traits.get(name, frozenset()) | {value}
    return Coverage(len(samples), traits)


@contextmanager
def _runtime_errors(what: str) -> Iterator[None]:
    """Turn what ONNX Runtime and Polygraphy raise into an error that says what was being run."""
    try:
        yield
    except SurgeryError:
        raise
    except (PolygraphyException, RuntimeError, ValueError, KeyError, IndexError) as error:
        raise StepFailed(f"{what} does not run: {str(error).strip().splitlines()[0]}") from error
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            raise StepFailed(f"{what} does not run: {str(error).strip().splitlines()[0]}") from error
        raise
