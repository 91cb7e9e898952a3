"""A bench as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from surgery.bench.cases import BenchResult, Case, RowResult, Timings
from surgery.units import in_bytes

if TYPE_CHECKING:
    from rich.table import Table


def bench_tables(bench: BenchResult) -> Iterator[Table]:
    """Yield a table for each case; the first row that ran is what the others are compared with."""
    from rich.table import Table

    is_generation = bench.kind == "generation"
    headings = ("first token", "per token", "tokens/s") if is_generation else ("rows/s",)
    for case in bench.cases:
        measured = [(row, row.timings[case]) for row in bench.rows if case in row.timings and row.timings[case].stamps]
        if not measured:
            continue
        table = Table(title=str(case), title_justify="left", title_style="bold", box=None, pad_edge=False)
        table.add_column("row")
        for heading in (*headings, "whole", "against the first", "CPU time", "own memory", "with mapped files"):
            table.add_column(heading, justify="right", header_style="")
        reference = measured[0][1].total
        for row, timings in measured:
            table.add_row(row.name, *_cells(case, timings, reference, is_generation=is_generation))
        yield table


def _cells(case: Case, timings: Timings, reference: float, *, is_generation: bool) -> Iterator[str]:
    if is_generation:
        yield in_time(timings.first)
        yield in_time(timings.per_token) if timings.per_token is not None else "-"
    yield f"{_rate(case, timings):,.0f}" if _rate(case, timings) >= 100 else f"{_rate(case, timings):.1f}"
    yield in_time(timings.total)
    yield f"{reference / timings.total:.2f} x"
    yield in_time(sorted(timings.cpu_seconds)[len(timings.cpu_seconds) // 2])
    yield in_bytes(timings.memory.anonymous) if timings.memory.anonymous else "-"
    yield in_bytes(timings.memory.resident) if timings.memory.resident else "-"


def _rate(case: Case, timings: Timings) -> float:
    """Return tokens, or rows of a single model, a second."""
    return case.batch * (case.new_tokens or 1) / timings.total


def in_time(seconds: float) -> str:
    """Return a duration with three digits: `4.13 ms`."""
    value, unit = (seconds, "s") if seconds >= 1 else (seconds * 1e3, "ms")
    return f"{value:.0f} {unit}" if value >= 100 else f"{value:.3g} {unit}"


def bench_notes(bench: BenchResult) -> Iterator[str]:
    """Yield what has to be known to read the numbers, then what failed and why."""
    machine = bench.machine
    count = bench.settings.threads
    threads = ("1 thread" if count == 1 else f"{count} threads") if count else "as many threads as each takes"
    most = "up to " if bench.is_interrupted else ""
    rounds = "medians of 1 round" if bench.rounds == 1 else f"medians of {most}{bench.rounds} rounds in turn"
    yield f"{rounds}, after {bench.warmup} to warm up; {threads}; {machine['cores']} cores, {machine['processor']}"
    weights = next((row.facts["weights"] for row in bench.rows if "weights" in row.facts), None)
    if weights == "random":
        yield "PyTorch ran the same configuration with random weights, on which its time does not depend"
    elif weights is not None:
        yield f"PyTorch ran the weights {weights}"
    for row in bench.rows:
        if row.problem:
            yield f"{row.name} failed: {row.problem}"
    if bench.is_interrupted:
        yield "interrupted: some rounds are missing"


def bench_json(bench: BenchResult) -> str:
    """Return everything that was measured, times in seconds and memory in bytes."""
    content = {
        "source": bench.settings.source,
        "kind": bench.kind,
        "threads": bench.settings.threads,
        "providers": list(bench.settings.providers),
        "seed": bench.settings.seed,
        "rounds": bench.rounds,
        "warmup": bench.warmup,
        "is_interrupted": bench.is_interrupted,
        "machine": bench.machine,
        "rows": [_row(row) for row in bench.rows],
    }
    return json.dumps(content, indent=1) + "\n"


def _row(row: RowResult) -> dict[str, Any]:
    return {
        "row": row.word,
        "name": row.name,
        "problem": row.problem or None,
        "facts": row.facts,
        "open_seconds": row.open_seconds,
        "open_peak_anonymous": row.open_memory.anonymous,
        "open_peak_resident": row.open_memory.resident,
        "cases": [_case(case, timings) for case, timings in row.timings.items() if timings.stamps],
    }


def _case(case: Case, timings: Timings) -> dict[str, Any]:
    return {
        **asdict(case),
        "first_token_seconds": timings.first,
        "per_token_seconds": timings.per_token,
        "total_seconds": timings.total,
        "per_second": _rate(case, timings),
        "peak_anonymous": timings.memory.anonymous,
        "peak_resident": timings.memory.resident,
        "token_seconds": timings.latencies,
        "reached_seconds": timings.reached,
        "rounds": [
            {"reached_seconds": stamps, "cpu_seconds": cpu_seconds}
            for stamps, cpu_seconds in zip(timings.stamps, timings.cpu_seconds, strict=True)
        ],
    }
