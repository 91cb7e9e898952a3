"""Verdicts: how far a step moved the answers, how far all steps together did, and on what that is known."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Gap:
    """The distance between a reference and a candidate; errors are shares of the reference's root mean square.

    Args:
        max_error: The largest error.
        p999_error: The 99.9th percentile of the errors.
        top1: The share of positions whose arg max agrees; None where no output is logits.
        is_exact: Every output was the same bit for bit.
    """

    max_error: float = 0.0
    p999_error: float = 0.0
    top1: float | None = None
    is_exact: bool = True

    def __str__(self) -> str:
        return "exact" if self.is_exact else f"{self.max_error:.2g}"

    def worse(self, other: Gap) -> Gap:
        """Return the worse of both, measure by measure."""
        agreements = [top1 for top1 in (self.top1, other.top1) if top1 is not None]
        return Gap(
            max(self.max_error, other.max_error),
            max(self.p999_error, other.p999_error),
            min(agreements, default=None),
            self.is_exact and other.is_exact,
        )

    def as_json(self) -> dict[str, Any]:
        """Return plain values; an infinite error becomes the string "inf"."""
        return {
            "exact": self.is_exact,
            "max_error": _finite(self.max_error),
            "p999_error": _finite(self.p999_error),
            "top1": self.top1,
        }


def _finite(number: float) -> float | str:
    return number if abs(number) != float("inf") and number == number else str(number)


def worst(gaps: Iterable[Gap]) -> Gap | None:
    """Return the worst of all gaps, or None if there is none."""
    result: Gap | None = None
    for gap in gaps:
        result = gap if result is None else result.worse(gap)
    return result


@dataclass(frozen=True)
class Failure:
    """One output of one program that is not what it should be, on the sample where it is worst.

    Args:
        program: What was run, such as `decode`.
        output: The output's name.
        text: What is wrong with it.
        sample: The sample's name.
        since: `step` when the step itself did it, `source` when the drift of all steps together is too large.
        index: Where the output is worst, empty if that makes no sense.
        nearest: The nodes nearest to the cause.
        error: How bad it is, to find the worst; infinite for what is not a number's fault.
    """

    program: str
    output: str
    text: str
    sample: str
    since: str = "step"
    index: tuple[int, ...] = ()
    nearest: tuple[str, ...] = ()
    error: float = float("inf")

    def __str__(self) -> str:
        target = "" if self.since == "step" else ", against the source"
        lines = [f"{self.program}: output {self.output!r} {self.text}{target}"]
        place = f"worst at {list(self.index)}, sample {self.sample!r}" if self.index else f"sample {self.sample!r}"
        lines.append(f"  {place}")
        if self.nearest:
            lines.append(f"  first differs at {', '.join(self.nearest)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class Coverage:
    """What the samples of a verdict had in them, by kind of trait: batch sizes, lengths, past lengths, padding."""

    samples: int = 0
    traits: Mapping[str, frozenset[str]] = field(default_factory=dict)

    def __str__(self) -> str:
        said = [f"{name} {', '.join(sorted(values, key=_by_number))}" for name, values in sorted(self.traits.items())]
        return f"{self.samples} sample{'s' if self.samples != 1 else ''}: {'; '.join(said)}"

    def joined(self, other: Coverage) -> Coverage:
        """Return the coverage of both."""
        names = {**self.traits, **other.traits}
        traits = {name: self.traits.get(name, frozenset()) | other.traits.get(name, frozenset()) for name in names}
        return Coverage(self.samples + other.samples, traits)


def _by_number(text: str) -> tuple[int, str]:
    return (int(text), "") if text.isdecimal() else (1 << 30, text)


@dataclass(frozen=True)
class Verdict:
    """What was found after a step.

    Args:
        step: The gap to the bundle before the step; None where nothing could be compared.
        source: The gap to the source.
        outputs: For each program and output, its gap to the bundle before the step.
        failures: What is over its limit; the worst first.
        coverage: For each program, on what samples this is known.
        warnings: What the reader should know.
    """

    step: Gap | None = None
    source: Gap | None = None
    outputs: Mapping[str, Gap] = field(default_factory=dict)
    failures: tuple[Failure, ...] = ()
    coverage: Mapping[str, Coverage] = field(default_factory=dict)
    warnings: tuple[str, ...] = ()

    @property
    def is_accurate(self) -> bool:
        """Nothing is over its limit."""
        return not self.failures

    def __str__(self) -> str:
        gaps = f"gap to the step before {self.step or '-'}, to the source {self.source or '-'}"
        return "\n".join([gaps, *map(str, self.failures)])

    def as_json(self) -> dict[str, Any]:
        """Return plain values for `report.json`."""
        return {
            "accurate": self.is_accurate,
            "step": self.step.as_json() if self.step else None,
            "source": self.source.as_json() if self.source else None,
            "outputs": {name: gap.as_json() for name, gap in self.outputs.items()},
            "failures": [str(failure) for failure in self.failures],
            "coverage": {name: str(coverage) for name, coverage in self.coverage.items()},
            "warnings": list(self.warnings),
        }
