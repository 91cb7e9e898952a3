"""`tie_transposed` on GPT-2 124M: bytes on disk, in the runtime's own model and in memory, and time per token.

    python benchmarks/tie_transposed.py [--rounds 5] [--threads 1 2]

Two forms of the same decoder: the embedding a second time, transposed, in one file, as TorchScript exports write it;
and a `Transpose` of the one embedding, as transformers.exporters writes it. Memory is that of a process of its own for
each model. Time per token is measured in processes that hold three sessions, of the model before, the model after and
the model before once more, and let them take each step in turn: the third says how much two equal sessions differ,
since it matters where in memory a session's weights come to lie. Results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from measure import median, ratio, rounds
from models import CACHE, bytes_of, two_decoders

HERE = Path(__file__).resolve().parent
NAME = "gpt2"
PROMPT_TOKENS, NEW_TOKENS = 36, 36
BATCHES = (1, 8)
LOADINGS = 10
MOMENTS = ("before", "after")
LEVELS = ("ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
Facts = dict[str, Any]


def main() -> None:
    """Measure and write the table, or be one of the processes that are measured."""
    options = parse()
    if options.session:
        print(json.dumps(session_facts(options.session[0])))
        return
    if options.race:
        print(json.dumps(race_facts(options.race, options.threads[0])))
        return
    CACHE.mkdir(exist_ok=True)
    (HERE / "results").mkdir(exist_ok=True)
    results: dict[str, Facts] = {}
    forms: dict[str, Callable[[], Path]] = {
        "the embedding twice, single file": with_a_transposed_copy,
        "a Transpose of the embedding, external data": lambda: two_decoders(NAME) / "decoder_with_past_model.onnx",
    }
    for title, make in forms.items():
        results[title] = measure_form(make(), options)
    (HERE / "results" / "tie_transposed.json").write_text(json.dumps(results, indent=1) + "\n")
    text = "\n\n".join([header(options), *(table(title, facts) for title, facts in results.items())]) + "\n"
    (HERE / "results" / "tie_transposed.md").write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="rounds that count, after one warm-up")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--session", type=Path, nargs=1, help=argparse.SUPPRESS)
    parser.add_argument("--race", type=Path, nargs="+", help=argparse.SUPPRESS)
    return parser.parse_args()


def header(options: argparse.Namespace) -> str:
    import onnxruntime

    return (
        f"# tie_transposed\n\nMade by `benchmarks/tie_transposed.py`: {NAME} at its real configuration, random weights."
        f" {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, ONNX Runtime "
        f"{onnxruntime.__version__}. Medians over {options.rounds} processes. Memory is anonymous, mapped files are "
        "not counted, and of loading it is the least of the processes: the C library gives 200 MB back in some of them "
        f"and keeps them in others. Greedy generation through a host loop: {PROMPT_TOKENS} + {NEW_TOKENS} tokens. CPU "
        "time is of all threads, and other load on the machine disturbs it less than wall time. The last column is a "
        "second session of the model before, against the first: differences up to there mean nothing."
    )


def with_a_transposed_copy() -> Path:
    """Return a decoder with a cache that holds its embedding a second time, transposed, in a single file."""
    folder = CACHE / f"{NAME}-transposed"
    if not folder.exists():
        from surgery.storage import open_model, save_model

        model = open_model(two_decoders(NAME) / "decoder_with_past_model.onnx")
        node = next(node for node in model.graph if node.op_type == "Transpose" and node.inputs[0].is_initializer())
        weight, turned = node.inputs[0].const_value, node.outputs[0]
        array = np.ascontiguousarray(weight.numpy().T)
        copy = ir.Value(
            name="onnx::MatMul_1", type=turned.type, shape=ir.Shape(array.shape), const_value=ir.tensor(array)
        )
        model.graph.register_initializer(copy)
        ir.convenience.replace_all_uses_with(turned, copy)
        model.graph.remove(node, safe=True)
        draft = folder.with_suffix(".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        save_model(model, draft / "model.onnx", layout="single")
        draft.rename(folder)
    return folder / "model.onnx"


def measure_form(source: Path, options: argparse.Namespace) -> Facts:
    """Tie one form and measure it before and after."""
    work = CACHE / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    layout = "single" if source.stat().st_size > 1e8 else "optimum"
    facts: Facts = {"run": measure_run(source, layout, work)}
    paths = {"before": source, "after": next((work / "kept").glob("*.onnx"))}
    facts["files"] = {moment: model_bytes(path) for moment, path in paths.items()}
    facts["optimized"] = {
        moment: {level: optimized_bytes(path, level, work) for level in LEVELS} for moment, path in paths.items()
    }
    facts["sessions"] = measure_sessions(paths)
    facts["races"] = {str(threads): measure_races(paths, threads, options.rounds) for threads in options.threads}
    facts["tokens_are_equal"] = len(set(taken_tokens(facts["races"]))) == 1
    shutil.rmtree(work)
    return facts


def measure_run(source: Path, layout: str, work: Path) -> Facts:
    """Measure a whole run without checks against `cp` of its result, and keep the result."""
    recipe = work / "recipe.yaml"
    recipe.write_text(f"source: {source}\nsteps: [tie_transposed]\noutput: {{folder: out, layout: {layout}}}\n")
    run = [sys.executable, "-m", "surgery", "run", str(recipe), "--no-check", "--out"]
    subprocess.run([*run, str(work / "kept")], cwd=work, check=True, stdout=subprocess.DEVNULL)
    commands = {
        "surgery --no-check": [*run, str(work / "surgery --no-check")],
        "cp": ["cp", "-r", str(work / "kept"), str(work / "cp")],
    }

    def clear(command: str) -> None:
        shutil.rmtree(work / command, ignore_errors=True)

    measured, failed = rounds(commands, cwd=work, count=5, before=clear)
    assert not failed, failed
    ours, copies = measured.values()
    return {
        "seconds": median(ours, "seconds"),
        "cpu_seconds": median(ours, "cpu_seconds"),
        "cp_seconds": median(copies, "seconds"),
        "times_cp": ratio(ours, copies, "seconds"),
        "peak_anonymous": median(ours, "peak_anonymous"),
    }


def model_bytes(path: Path) -> int:
    """Return the size of a model's file and of its data file."""
    return sum(bytes_of(one) for one in (path, path.with_name(path.name + "_data")) if one.exists())


def optimized_bytes(path: Path, level: str, work: Path) -> int:
    """Return the size of the model that ONNX Runtime saves after optimization."""
    import onnxruntime

    folder = work / "optimized"
    folder.mkdir()
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 3
    options.optimized_model_filepath = str(folder / "model.onnx")
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", "weights")
    onnxruntime.InferenceSession(str(path), options)
    size = bytes_of(folder)
    shutil.rmtree(folder)
    return size


def measure_sessions(paths: Mapping[str, Path]) -> dict[str, list[Facts]]:
    """Run a process for each model in turn, so that drift of the machine hits both alike."""
    runs: dict[str, list[Facts]] = {moment: [] for moment in paths}
    for _ in range(LOADINGS):
        for moment, path in paths.items():
            runs[moment].append(process_facts("--session", str(path)))
    return runs


def measure_races(paths: Mapping[str, Path], threads: int, count: int) -> list[Facts]:
    """Run processes with three sessions each, that load them in another order each time."""
    runners = {"before": paths["before"], "after": paths["after"], "again": paths["before"]}
    races: list[Facts] = []
    for number in range(count):
        order = list(runners)[number % 3 :] + list(runners)[: number % 3]
        facts = process_facts("--race", *(str(runners[name]) for name in order), "--threads", str(threads))
        races.append(dict(zip(order, facts["runners"], strict=True)))
    return races


def taken_tokens(races: Mapping[str, Sequence[Facts]]) -> Iterator[str]:
    """Take the tokens out of the facts, and yield all that a session has generated."""
    for runner in (runner for some in races.values() for race in some for runner in race.values()):
        yield json.dumps([runner[str(batch)].pop("tokens") for batch in BATCHES])


def process_facts(*arguments: str) -> Facts:
    """Run this script as a process that measures itself."""
    command = [sys.executable, __file__, *arguments]
    facts: Facts = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return facts


def open_session(path: Path, threads: int) -> Any:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    # A thread that spins while it waits uses CPU time for nothing, and disturbs the other sessions.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return onnxruntime.InferenceSession(str(path), options)


def session_facts(path: Path) -> Facts:
    """Load a model; memory is that of this process beyond what it had before."""
    import onnxruntime  # noqa: F401 - its own memory is not the model's

    before = resident()
    with PeakResident() as peak:
        start = time.perf_counter()
        session = open_session(path, 1)
        seconds = time.perf_counter() - start
    loaded = resident() - before
    generate([session], 1, 2)
    return {"load_seconds": seconds, "load_peak": peak[0] - before, "loaded": loaded, "used": resident() - before}


def race_facts(paths: Sequence[Path], threads: int) -> Facts:
    """Let sessions take each step of a generation in turn."""
    sessions = [open_session(path, threads) for path in paths]
    runners: list[Facts] = [{} for _ in sessions]
    for batch in BATCHES:
        generate(sessions, batch, 3)
        for runner, steps in zip(runners, generate(sessions, batch, NEW_TOKENS), strict=True):
            wall, cpu, tokens = zip(*steps, strict=True)
            runner[str(batch)] = {
                "prompt_ms": wall[0],
                "prompt_cpu_ms": cpu[0],
                "token_ms": statistics.median(wall[1:]),
                "token_cpu_ms": statistics.median(cpu[1:]),
                "all_ms": sum(wall),
                "all_cpu_ms": sum(cpu),
                "tokens": tokens,
            }
    return {"runners": runners}


def generate(sessions: Sequence[Any], batch: int, count: int) -> list[list[tuple[float, float, list[int]]]]:
    """Continue a seeded prompt greedily in each session, and return its steps: wall and CPU milliseconds, and tokens.

    The first step reads the prompt with an empty cache, each other one adds a token. Sessions take turns, and turns
    are taken in another order at each step.
    """
    prompt = np.random.default_rng(0).integers(0, 50257, (batch, PROMPT_TOKENS))
    inputs = [one.name for one in sessions[0].get_inputs() if "past" in one.name]
    empty = {name: np.zeros((batch, 12, 0, 64), np.float32) for name in inputs}
    states = [(prompt, empty) for _ in sessions]
    steps: list[list[tuple[float, float, list[int]]]] = [[] for _ in sessions]
    length = 0
    for number in range(count):
        new = states[0][0].shape[1]
        shared = {
            "attention_mask": np.ones((batch, length + new), np.int64),
            "position_ids": np.arange(length, length + new)[None].repeat(batch, 0),
        }
        length += new
        for turn in range(len(sessions)):
            index = (turn + number) % len(sessions)
            ids, past = states[index]
            wall, cpu = time.perf_counter(), time.process_time()
            outputs = run(sessions[index], {**shared, **past, "input_ids": ids})
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            ids = outputs["logits"][:, -1].argmax(-1)[:, None]
            states[index] = ids, {name: outputs[name.replace("past_key_values", "present")] for name in past}
            steps[index].append((wall * 1e3, cpu * 1e3, ids[:, 0].tolist()))
    return steps


def run(session: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Run a session on arrays by name."""
    names = [one.name for one in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))


def resident() -> int:
    """Return the anonymous memory of this process in bytes: mapped files are not counted."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


class PeakResident:
    """Watches the memory of this process while a block runs."""

    def __enter__(self) -> list[int]:
        self.peak, self.is_done = [resident()], threading.Event()
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self.peak

    def watch(self) -> None:
        while not self.is_done.wait(0.002):
            self.peak[0] = max(self.peak[0], resident())

    def __exit__(self, *_: object) -> None:
        self.is_done.set()
        self.thread.join()


def table(title: str, facts: Facts) -> str:
    """Write one form."""
    run = facts["run"]
    lines = [
        f"## {title}",
        "",
        f"`surgery run --no-check` with this one step: {run['seconds']:.2f} s, {run['cpu_seconds']:.2f} s of CPU time, "
        f"{run['times_cp']:.1f} times `cp` of the result ({run['cp_seconds']:.2f} s), "
        f"{run['peak_anonymous'] / 1e6:.0f} MB of anonymous memory.",
        "",
        "| | before | after | after / before | before / before |",
        "|---|---:|---:|---:|---:|",
        row("file, MB", *(facts["files"][moment] / 1e6 for moment in MOMENTS)),
    ]
    for level in LEVELS:
        sizes = (facts["optimized"][moment][level] / 1e6 for moment in MOMENTS)
        lines.append(row(f"the model that the runtime saves at {level}, MB", *sizes))
    for key, label, unit in (
        ("load_seconds", "loading, s", 1.0),
        ("load_peak", "memory while loading, peak, MB", 1e6),
        ("loaded", "memory after loading, MB", 1e6),
        ("used", "memory after two steps, MB", 1e6),
    ):
        lines.append(row(label, *(min(run[key] for run in facts["sessions"][moment]) / unit for moment in MOMENTS)))
    for threads, races in facts["races"].items():
        lines += race_rows(threads, races)
    lines += ["", f"All generated tokens are {'' if facts['tokens_are_equal'] else 'NOT '}the same before and after."]
    return "\n".join(lines)


def race_rows(threads: str, races: Sequence[Facts]) -> Iterator[str]:
    """Yield the rows of the races with so many threads; ratios are medians of the processes' own."""
    for batch in BATCHES:
        for key, label in (
            ("prompt_ms", "prompt, ms"),
            ("prompt_cpu_ms", "prompt, CPU ms"),
            ("token_ms", "token, ms"),
            ("token_cpu_ms", "token, CPU ms"),
            ("all_ms", "whole generation, ms"),
            ("all_cpu_ms", "whole generation, CPU ms"),
        ):
            times = {name: [race[name][str(batch)][key] for race in races] for name in races[0]}
            before, after = (statistics.median(times[moment]) for moment in MOMENTS)
            shares = (
                statistics.median(a / b for a, b in zip(times[name], times["before"], strict=True))
                for name in ("after", "again")
            )
            plural = "thread" if threads == "1" else "threads"
            yield row(f"{threads} {plural}, batch {batch}: {label}", before, after, *shares)


def row(label: str, before: float, after: float, share: float | None = None, control: float | None = None) -> str:
    digits = 1 if before >= 10 else 2
    same = f"{control:.3f}" if control else ""
    return f"| {label} | {before:.{digits}f} | {after:.{digits}f} | {share or after / before:.3f} | {same} |"


if __name__ == "__main__":
    main()
