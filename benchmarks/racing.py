"""Workers that hold a model each and take turns: one JSON line in, one JSON line out; the standard library only."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

Facts = dict[str, Any]


def serve(answer: Callable[[Facts], Facts]) -> None:
    """Answer questions from standard input until it ends; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        print(json.dumps(answer(json.loads(line))), file=answers, flush=True)


def timed(work: Callable[[Callable[[], None]], Any]) -> Facts:
    """Run something once; it calls what it is given whenever it has the scores of a step.

    Returns what it returned as `tokens`, `seconds` and `cpu_seconds` of it all, and `steps`, the second of each call.
    """
    steps: list[float] = []
    start, cpu = time.perf_counter(), time.process_time()
    tokens = work(lambda: steps.append(time.perf_counter() - start))
    seconds, cpu_seconds = time.perf_counter() - start, time.process_time() - cpu
    return {"seconds": seconds, "cpu_seconds": cpu_seconds, "steps": steps, "tokens": tokens}


class Worker:
    """A process that answers questions.

    Args:
        command: What to run; it calls `serve`.
        log: Where its standard error goes.

    Raises:
        RuntimeError: On the first question that it does not answer, with the last line of what it said.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        self._log = log
        with log.open("wb") as errors:
            pipe = subprocess.PIPE
            self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=errors, text=True)

    def ask(self, **question: Any) -> Facts:
        """Return the answer to one question."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            self._process.stdin.write(json.dumps(question) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: what it said is read below
        line = self._process.stdout.readline()
        if not line:
            said = self._log.read_text(errors="replace").strip().splitlines()
            raise RuntimeError(said[-1] if said else "it ended without a word")
        facts: Facts = json.loads(line)
        return facts

    def close(self) -> None:
        """Let it end."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
