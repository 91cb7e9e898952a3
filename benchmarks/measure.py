"""Whole-process measurements: seconds and peak memory of a command, in rounds against other commands."""

from __future__ import annotations

import os
import statistics
import subprocess
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

SAMPLE_SECONDS = 0.01


@dataclass(frozen=True)
class Measurement:
    """One run of a command: wall seconds, CPU seconds, peak anonymous memory of its main process in bytes."""

    seconds: float
    cpu_seconds: float
    peak_anonymous: int


def measure(command: Sequence[str], *, cwd: Path) -> Measurement:
    """Run a command and measure it; memory is read from /proc, so mapped files do not count.

    Raises:
        RuntimeError: The command failed; with what it said.
    """
    start = time.perf_counter()
    with (cwd / "benchmark.log").open("wb") as log:
        process = subprocess.Popen(command, cwd=cwd, stdout=log, stderr=log)
        peak = 0
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            peak = max(peak, anonymous_bytes(process.pid))
            time.sleep(SAMPLE_SECONDS)
    seconds = time.perf_counter() - start
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode != 0:
        raise RuntimeError(f"{' '.join(command)}: {(cwd / 'benchmark.log').read_text()[-2000:]}")
    return Measurement(seconds, usage.ru_utime + usage.ru_stime, peak)


def anonymous_bytes(pid: int) -> int:
    """Return the resident anonymous memory of a process, 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon:")), None)
    return int(line.split()[1]) * 1024 if line else 0


def rounds(
    commands: Mapping[str, Sequence[str]],
    *,
    cwd: Path,
    count: int,
    before: Callable[[str], None],
    once: Collection[str] = (),
) -> tuple[dict[str, list[Measurement]], dict[str, str]]:
    """Run all commands in turn, `count` times after one warm-up, so that drift of the machine hits all alike.

    Returns the measurements by name, and for commands that failed the last line of what they said.

    Args:
        commands: By name.
        cwd: Where they run.
        count: How many rounds count.
        before: Called with the name before each run, outside the measurement; clears what the last one wrote.
        once: Slow commands, which run in the first round that counts only.
    """
    results: dict[str, list[Measurement]] = {name: [] for name in commands}
    failed: dict[str, str] = {}
    for number in range(count + 1):
        for name, command in commands.items():
            if name in once and number != 1:
                continue
            if name in failed:
                continue
            before(name)
            os.sync()
            try:
                measured = measure(command, cwd=cwd)
            except RuntimeError as error:
                failed[name] = str(error).strip().splitlines()[-1]
                continue
            if number:
                results[name].append(measured)
    return results, failed


def median(measurements: Sequence[Measurement], field: str) -> float:
    """Return the median of one field."""
    return statistics.median(getattr(measured, field) for measured in measurements)


def ratio(ours: Sequence[Measurement], other: Sequence[Measurement], field: str) -> float:
    """Return the median of the ratios, round by round."""
    return statistics.median(getattr(a, field) / getattr(b, field) for a, b in zip(ours, other, strict=False))
