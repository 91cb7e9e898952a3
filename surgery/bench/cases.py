"""What is measured: rows, cases, and what comes out for each pair of them."""

from __future__ import annotations

import statistics
from collections.abc import Mapping
from dataclasses import dataclass, field

from surgery.bench.processes import Memory

ROWS: Mapping[str, str] = {
    "torch": "PyTorch, cache",
    "torch-no-cache": "PyTorch, no cache",
    "onnx": "ONNX, cache",
    "onnx-no-cache": "ONNX, no cache",
    "numpy": "ONNX, numpy loop",
}
"""What generates, by the word for it: with `generate` of transformers, but the last, which is `loops.greedy`."""

DEFAULT_ROWS = ("torch", "torch-no-cache", "onnx", "onnx-no-cache")

SINGLE_ROWS: Mapping[str, str] = {"torch": "PyTorch", "onnx": "ONNX"}
"""What runs a model that does not generate."""


@dataclass(frozen=True)
class Case:
    """A size to measure at.

    Args:
        batch: Rows.
        prompt_tokens: Tokens of each prompt; of a single model the length of its inputs.
        new_tokens: Tokens to generate after each prompt, no more and no fewer; 0 for a single model.
        beams: Beams of each prompt.
    """

    batch: int
    prompt_tokens: int
    new_tokens: int = 0
    beams: int = 1

    def __str__(self) -> str:
        tokens = f"{self.prompt_tokens} + {self.new_tokens}" if self.new_tokens else str(self.prompt_tokens)
        beams = f", {self.beams} beams" if self.beams > 1 else ""
        return f"batch {self.batch}, {tokens} tokens{beams}"


@dataclass(frozen=True)
class Settings:
    """What every row is opened with.

    Args:
        source: The bundle, as a path or a Hub id.
        torch: The folder of PyTorch's weights; None for random ones from the bundle's config.
        threads: Threads for each row; 0 for what each library takes by itself.
        providers: Where ONNX Runtime runs, by preference.
        seed: The prompts are drawn from it.
    """

    source: str
    torch: str | None = None
    threads: int = 0
    providers: tuple[str, ...] = ("CPUExecutionProvider",)
    seed: int = 0


@dataclass
class Timings:
    """What one row took in one case.

    Args:
        stamps: For each round the seconds from the call to each token; of a single model to its answer.
        cpu_seconds: For each round the processor time of the row's process.
        memory: The peak of the row's process in the rounds of this case, warm-up included.
    """

    stamps: list[list[float]] = field(default_factory=list)
    cpu_seconds: list[float] = field(default_factory=list)
    memory: Memory = field(default_factory=Memory)

    @property
    def reached(self) -> list[float]:
        """The seconds from the call to each token: the median of the rounds."""
        return [statistics.median(times) for times in zip(*self.stamps, strict=True)]

    @property
    def latencies(self) -> list[float]:
        """The seconds that each token took, the first from the call on: the median of the rounds."""
        steps = [[end - start for start, end in zip([0.0, *times], times, strict=False)] for times in self.stamps]
        return [statistics.median(times) for times in zip(*steps, strict=True)]

    @property
    def first(self) -> float:
        """The seconds to the first token."""
        return statistics.median(times[0] for times in self.stamps)

    @property
    def per_token(self) -> float | None:
        """The median of the seconds of all tokens after the first; None if there is only one."""
        later = self.latencies[1:]
        return statistics.median(later) if later else None

    @property
    def total(self) -> float:
        """The seconds of the whole call."""
        return statistics.median(times[-1] for times in self.stamps)


@dataclass
class RowResult:
    """What one row gave.

    Args:
        word: The row.
        name: Its name for people.
        facts: What it ran: weights, versions.
        open_seconds: How long it took to open, imports included.
        open_memory: The peak of its process while it opened.
        timings: By case; a case that failed is missing.
        problem: Why it failed, if it did.
    """

    word: str
    name: str
    facts: dict[str, str] = field(default_factory=dict)
    open_seconds: float = 0.0
    open_memory: Memory = field(default_factory=Memory)
    timings: dict[Case, Timings] = field(default_factory=dict)
    problem: str = ""


@dataclass
class BenchResult:
    """What a bench gave.

    Args:
        settings: What it ran with.
        kind: Whether the bundle generates or is a single model.
        cases: The sizes.
        rows: A result for each row, in the order of the table.
        rounds: How many rounds counted.
        warmup: How many before them did not.
        machine: Processor, system and versions.
        is_interrupted: Somebody stopped it; what had been measured is there.
    """

    settings: Settings
    kind: str
    cases: tuple[Case, ...]
    rows: list[RowResult]
    rounds: int
    warmup: int
    machine: dict[str, str] = field(default_factory=dict)
    is_interrupted: bool = False
