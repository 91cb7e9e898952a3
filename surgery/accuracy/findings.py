"""Findings: what is found about one claim over its samples, gathered into a verdict."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

from surgery.accuracy.compare import OutputResult
from surgery.accuracy.feeds import Sample
from surgery.accuracy.verdict import Coverage, Failure, Gap, Verdict, worst

STEP, DRIFT = "step", "source"
HALF, EMULATED = "float16", "emulated"

Finder = Callable[[Sample], tuple[str, ...]]


class Findings:
    """Gathers the comparisons of one program, sample by sample.

    Args:
        program: What verdicts call it.
        half: How half precision was computed, where either side has any: EMULATED, or the name of a provider.
    """

    def __init__(self, program: str, *, half: str = "") -> None:
        self._program = program
        self._half = half
        self._step: list[Gap] = []
        self._drift: list[Gap] = []
        self._outputs: dict[str, Gap] = {}
        self._failures: dict[tuple[str, str], Failure] = {}
        self._where: dict[tuple[str, str], Sample] = {}

    def add_step(self, sample: Sample, results: Iterable[OutputResult]) -> None:
        """Add what the step itself did."""
        for result in results:
            key = f"{self._program}.{result.output}"
            self._step.append(result.gap)
            self._outputs[key] = self._outputs[key].worse(result.gap) if key in self._outputs else result.gap
            self._add_failure(sample, result, STEP)

    def add_drift(self, sample: Sample, results: Iterable[OutputResult], *, is_judged: bool = True) -> None:
        """Add what all steps together did.

        Args:
            sample: What was fed.
            results: The comparisons with the source.
            is_judged: Nobody else looks at these results for failures.
        """
        for result in results:
            self._drift.append(result.gap)
            if is_judged:
                self._add_failure(sample, result, DRIFT)

    def _add_failure(self, sample: Sample, result: OutputResult, since: str) -> None:
        key = (since, result.output)
        known = self._failures.get(key)
        if result or (known is not None and known.error >= result.gap.max_error):
            return
        self._failures[key] = Failure(
            self._program, result.output, result.text, sample.name, since, result.index, error=result.gap.max_error
        )
        self._where[key] = sample

    def locate(self, find: Finder) -> None:
        """Find the nodes nearest to the cause of the worst failure of the step itself."""
        keys = [key for key in self._failures if key[0] == STEP]
        if keys:
            key = max(keys, key=lambda key: self._failures[key].error)
            self._failures[key] = replace(self._failures[key], nearest=find(self._where[key]))

    def onto(self, verdict: Verdict, samples: Sequence[Sample], *, is_own_data: bool) -> Verdict:
        """Return a verdict that also holds these findings.

        Args:
            verdict: What was found about other claims.
            samples: What was fed.
            is_own_data: The user chose the samples.
        """
        coverage = coverage_of(samples)
        if self._half:
            coverage = coverage.joined(Coverage(0, {HALF: frozenset({self._half})}))
        # Drift that the step itself explains is not said twice.
        found = [
            failure
            for (since, name), failure in self._failures.items()
            if since == STEP or (STEP, name) not in self._failures
        ]
        known = verdict.coverage.get(self._program)
        warnings = [f"{self._program}: {gap}" for gap in missing_coverage(coverage, is_own_data=is_own_data)]
        return Verdict(
            step=worst([*([verdict.step] if verdict.step else []), *self._step]),
            source=worst([*([verdict.source] if verdict.source else []), *self._drift]),
            outputs={**verdict.outputs, **self._outputs},
            failures=tuple(sorted((*verdict.failures, *found), key=_severity)),
            coverage={**verdict.coverage, self._program: known.joined(coverage) if known else coverage},
            warnings=tuple(dict.fromkeys((*verdict.warnings, *warnings))),
        )


def _severity(failure: Failure) -> tuple[bool, float]:
    """Sort the step's own faults before drift, and the worst first."""
    return failure.since != STEP, -failure.error


def coverage_of(samples: Sequence[Sample]) -> Coverage:
    """Return what samples have in them."""
    traits: dict[str, frozenset[str]] = {}
    for sample in samples:
        for name, value in sample.traits.items():
            traits[name] = traits.get(name, frozenset()) | {value}
    return Coverage(len(samples), traits)


def missing_coverage(coverage: Coverage, *, is_own_data: bool) -> list[str]:
    """Say what was not fed and should have been.

    Args:
        coverage: What was fed.
        is_own_data: The user chose the samples, so one batch size may be all that there is.
    """
    traits = coverage.traits
    missing: list[str] = []
    if len(traits.get("batch", ())) < 2 and not is_own_data:
        missing.append("only one batch size was fed")
    if "past" in traits and "0" not in traits["past"]:
        missing.append("no empty cache was fed")
    if "past" in traits and not traits["past"] - {"0", "1"}:
        missing.append("no cache of more than one token was fed")
    if "length" in traits and "past" not in traits and not traits["length"] - {"0", "1"}:
        missing.append("no prompt of more than one token was fed")
    if "padding" in traits and "yes" not in traits["padding"]:
        missing.append("no padded row was fed")
    return missing
