"""A bench: rows in turn, round by round, so that drift of the machine hits all alike."""

from __future__ import annotations

import contextlib
import os
import platform
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from surgery.accuracy.feeds import room
from surgery.bench.cases import ROWS, SINGLE_ROWS, BenchResult, Case, RowResult, Settings, Timings
from surgery.bench.processes import Worker
from surgery.errors import RecipeError, SurgeryError
from surgery.recipe import Source
from surgery.sources import SourceKind, find_source
from surgery.sources.pretrained import Pretrained

Say = Callable[[str], None]

WORKER = "surgery.bench.worker"


def run_bench(
    settings: Settings,
    rows: Sequence[str],
    cases: Sequence[Case],
    *,
    rounds: int = 3,
    warmup: int = 1,
    say: Say = lambda text: None,
) -> BenchResult:
    """Measure rows at some sizes, each row in a process of its own.

    The rows take turns in every round. All of their processes are there at the same time, unless there is one round
    without warm-up and one case: then each ends before the next begins.

    Args:
        settings: What the rows are opened with; a Hugging Face model is exported first.
        rows: Words of `ROWS`, or of `SINGLE_ROWS` for a bundle of one model; empty for the usual ones.
        cases: The sizes.
        rounds: How many rounds count.
        warmup: How many before them do not, in each case.
        say: Takes a sentence to show while something works.

    Returns:
        A result for each row; of one that failed, why.

    Raises:
        RecipeError: There is no such source, row or size.
        SurgeryError: The source cannot be opened or exported.
    """
    with _onnx_files(settings, say) as (found, bundle_config, is_single):
        cases = tuple(replace(case, new_tokens=0, beams=1) for case in cases) if is_single else tuple(cases)
        cases = tuple(dict.fromkeys(cases))
        _refuse_sizes(cases, bundle_config, settings.source)
        names = SINGLE_ROWS if is_single else ROWS
        words = _checked(rows, names) or [word for word in names if word != "numpy"]
        results = [RowResult(word, names[word]) for word in words]
        bench = BenchResult(
            replace(found, source=settings.source),
            "single model" if is_single else "generation",
            cases,
            results,
            rounds,
            warmup,
            machine(),
        )
        with tempfile.TemporaryDirectory(prefix="surgery-bench-") as logs, contextlib.ExitStack() as stack:
            turns = _Turns(found, Path(logs), stack, say, is_last_of_row=rounds + warmup == 1 and len(cases) == 1)
            try:
                for case in cases:
                    for number in range(warmup + rounds):
                        for result in results:
                            turns.take(result, case, number - warmup)
            except KeyboardInterrupt:
                bench.is_interrupted = True
                turns.kill()
        return bench


class _Turns:
    """Lets one row after the other run a case.

    Args:
        settings: What the rows are opened with.
        logs: A folder for what their processes say.
        stack: Closes them.
        say: Takes a sentence to show.
        is_last_of_row: Each turn is the only one of its row.
    """

    def __init__(
        self, settings: Settings, logs: Path, stack: contextlib.ExitStack, say: Say, *, is_last_of_row: bool
    ) -> None:
        self._settings = settings
        self._logs = logs
        self._stack = stack
        self._say = say
        self._is_last_of_row = is_last_of_row
        self._workers: dict[str, Worker] = {}

    def take(self, result: RowResult, case: Case, number: int) -> None:
        """Let a row run a case once; what goes wrong is the row's problem. A negative number is a warm-up."""
        if result.problem:
            return
        try:
            worker = self._workers[result.word] if result.word in self._workers else self._open(result)
            what = "warm-up" if number < 0 else f"round {number + 1}"
            self._say(f"{result.name}: {case}, {what}")
            answer, memory = worker.ask({"case": asdict(case)})
        except SurgeryError as error:
            result.problem = str(error)
            self._close(result)
            return
        timings = result.timings.setdefault(case, Timings())
        timings.memory = timings.memory.peak(memory)
        if number >= 0:
            timings.stamps.append(answer["stamps"])
            timings.cpu_seconds.append(answer["cpu_seconds"])
        if self._is_last_of_row:
            self._close(result)

    def _open(self, result: RowResult) -> Worker:
        self._say(f"{result.name}: opening")
        start = time.perf_counter()
        worker = self._stack.enter_context(Worker(WORKER, self._logs / f"{result.word}.log"))
        self._workers[result.word] = worker
        answer, memory = worker.ask({"open": result.word, "settings": asdict(self._settings)})
        result.open_seconds = time.perf_counter() - start
        result.open_memory = memory
        result.facts = answer["facts"]
        return worker

    def _close(self, result: RowResult) -> None:
        if result.word in self._workers:
            self._workers.pop(result.word).close()

    def kill(self) -> None:
        """End every process at once."""
        for worker in self._workers.values():
            worker.kill()


@contextmanager
def _onnx_files(settings: Settings, say: Say) -> Iterator[tuple[Settings, Mapping[str, Any], bool]]:
    """Give settings whose source holds ONNX models, its config, and whether it is a single model.

    A Hugging Face model is exported into a folder that goes afterwards, and is what PyTorch runs.
    """
    kind = find_source(Source(path=settings.source), Path())
    is_single = tuple(kind.roles) == ("model",)
    if not isinstance(kind, Pretrained):
        yield replace(settings, source=str(Path(settings.source).resolve())), _config_of(kind), is_single
        return
    from surgery.storage import save_models

    with tempfile.TemporaryDirectory(prefix="surgery-bench-") as scratch:
        opened = kind.open(Path(scratch), say)
        say("saving the export")
        folder = Path(scratch, "export")
        save_models(opened.bundle.models, folder, layout="optimum", extras=opened.bundle.files)
        torch = settings.torch if settings.torch is not None else settings.source
        yield replace(settings, source=str(folder), torch=torch), opened.bundle.config, is_single


def _config_of(kind: SourceKind) -> Mapping[str, Any]:
    return kind.open(Path(), lambda text: None).bundle.config


def _checked(rows: Sequence[str], names: Mapping[str, str]) -> list[str]:
    from surgery.options import did_you_mean

    for row in rows:
        if row not in names:
            hint = f"--rows {','.join(names)}"
            raise RecipeError(f"there is no row {row!r}{did_you_mean(row, names)}", hint=hint)
    return list(dict.fromkeys(rows))


def _refuse_sizes(cases: Sequence[Case], config: Mapping[str, Any], source: str) -> None:
    """Refuse what does not fit into the positions of the network.

    Raises:
        RecipeError: A prompt with its continuation is too long.
    """
    most = room(config)
    is_cross = bool(config.get("is_encoder_decoder"))
    for case in cases:
        needed = max(case.prompt_tokens, case.new_tokens) if is_cross else case.prompt_tokens + case.new_tokens
        if needed > most:
            raise RecipeError(f"{source}: {case} need {needed:,} positions; the network has {most:,}")


def machine() -> dict[str, str]:
    """Return what the numbers depend on: processor, cores, system."""
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), name)
    return {
        "processor": name,
        "cores": str(os.cpu_count()),
        "system": f"{platform.system()} {platform.release()}",
        "python": platform.python_version(),
    }


__all__ = ["machine", "run_bench"]
