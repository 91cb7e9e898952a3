"""Processes measured from outside: whole commands, and workers that are asked to do one thing at a time.

Memory is read from `/proc` while a process works, so that mapped files can be told from memory of its own: peaks are
those of samples, every 10 ms. Where there is no `/proc` they are 0.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import IO, Any

from surgery.errors import SurgeryError

SAMPLE_SECONDS = 0.01
_GRACE_SECONDS = 5.0


@dataclass(frozen=True)
class Memory:
    """Resident memory of a process in bytes: anonymous (its own), and all of it with the mapped files."""

    anonymous: int = 0
    resident: int = 0

    def peak(self, other: Memory) -> Memory:
        """Return the larger of each."""
        return Memory(max(self.anonymous, other.anonymous), max(self.resident, other.resident))


def memory_of_process(pid: int) -> Memory:
    """Return the resident memory of a process, 0 when it is gone."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return Memory()
    found = {key: value for key, _, value in (line.partition(":") for line in status.splitlines())}
    anonymous, resident = (int(found.get(key, "0").split()[0]) * 1024 for key in ("RssAnon", "VmRSS"))
    return Memory(anonymous, resident)


def anonymous_bytes(pid: int) -> int:
    """Return the resident anonymous memory of a process, 0 when it is gone."""
    return memory_of_process(pid).anonymous


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
    values: list[float] = [getattr(measured, field) for measured in measurements]
    return statistics.median(values)


def ratio(ours: Sequence[Measurement], other: Sequence[Measurement], field: str) -> float:
    """Return the median of the ratios, round by round."""
    ratios: list[float] = [getattr(a, field) / getattr(b, field) for a, b in zip(ours, other, strict=False)]
    return statistics.median(ratios)


class Worker:
    """A process that answers one question at a time, and is measured while it does.

    A question is a line of JSON on its standard input, an answer one on its standard output (`surgery.bench.worker`).

    Args:
        module: The module whose `main` runs there.
        log: Where it writes all that it and its libraries say besides.
    """

    def __init__(self, module: str, log: Path) -> None:
        home = Path(__file__).resolve().parent.parent.parent
        # The current directory shadows nothing (-P), and this package is found even where it is not installed.
        paths = os.pathsep.join([str(home), *filter(None, [os.environ.get("PYTHONPATH", "")])])
        self._log = log
        with log.open("wb") as stream:
            self._process = subprocess.Popen(
                [sys.executable, "-P", "-c", f"from {module} import main; main()"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=stream,
                env={**os.environ, "PYTHONPATH": paths},
                text=True,
            )

    def ask(self, question: Mapping[str, Any]) -> tuple[dict[str, Any], Memory]:
        """Return the answer, and the peak of the process's memory while it worked.

        Raises:
            SurgeryError: It says what went wrong, or it is gone.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):  # then there is no answer either
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        lines: queue.Queue[str] = queue.Queue()
        threading.Thread(target=_read_line, args=(self._process.stdout, lines), daemon=True).start()
        peak = Memory()
        while True:
            peak = peak.peak(memory_of_process(self._process.pid))
            try:
                line = lines.get(timeout=SAMPLE_SECONDS)
                break
            except queue.Empty:
                continue
        if not line:
            raise SurgeryError(self._last_words())
        answer: dict[str, Any] = json.loads(line)
        if "error" in answer:
            raise SurgeryError(answer["error"], hint=answer.get("hint", ""))
        return answer, peak

    def _last_words(self) -> str:
        """Say why the process is gone."""
        code = self._process.wait()
        if code == -signal.SIGKILL:
            return "its process was killed, which is what a system does that has no memory left"
        said = self._log.read_text(errors="replace").strip().splitlines()
        last = said[-1] if said else "without a word"
        return f"its process ended with exit code {code}: {last}"

    def kill(self) -> None:
        """End the process at once."""
        self._process.kill()

    def close(self) -> None:
        """Let the process end, which it does when nothing more is asked."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        if self._process.stdout.closed:
            return
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        try:
            self._process.wait(_GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process.stdout.close()

    def __enter__(self) -> Worker:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None:
            self.kill()
        self.close()


def _read_line(stream: IO[str], lines: queue.Queue[str]) -> None:
    """Put the next line, an empty one at the end."""
    try:
        lines.put(stream.readline())
    except ValueError:  # closed meanwhile
        lines.put("")


__all__ = [
    "Measurement",
    "Memory",
    "Worker",
    "anonymous_bytes",
    "measure",
    "median",
    "memory_of_process",
    "ratio",
    "rounds",
]
