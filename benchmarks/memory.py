"""Memory of sessions over a merged decoder, beside one decoder's and two sessions', and what each way to open costs.

    python benchmarks/memory.py [--rounds 3] [--threads 2] [--models gpt2 t5-base] [--quick] [--again]

Each number is of a process of its own that opens the sessions, then runs steps of one and of 16 rows after 36 tokens.
Memory is what the process has beyond what it had after its imports: anonymous, and mapped from files, which the kernel
may take back and which processes share. Medians over the rounds. Rows that are in benchmarks/results already are left
as they are, unless `--again` is given. `--quick` runs each row of GPT-2 once, and writes nothing.
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
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from generate import MODELS, make_models

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
PAST, ROWS, STEPS = 36, (1, 16), 8
ONE, TWO, MERGED, UNTIED = "one decoder", "two sessions", "merged", "merged, head not tied"
FILES: Mapping[str, Sequence[str]] = {
    ONE: ("two/decoder_with_past_model.onnx",),
    TWO: ("two/decoder_model.onnx", "two/decoder_with_past_model.onnx"),
    MERGED: ("merged/decoder_model_merged.onnx",),
    UNTIED: ("untied/decoder_model_merged.onnx",),
}
BY_PATH, FAST, HANDED, SHARED = "by path", "open_fast_session", "weights handed over", "weights shared, not optimized"
NO_ARENA, PREPARED = "by path, no arena", "what ONNX Runtime saved, packed"
WAYS: Mapping[str, Sequence[str]] = {
    ONE: (BY_PATH, FAST),
    TWO: (BY_PATH, FAST),
    MERGED: (BY_PATH, FAST, HANDED, SHARED, NO_ARENA, PREPARED),
    UNTIED: (BY_PATH,),
}
PACKED = "session.save_external_prepacked_constant_initializers"
Facts = dict[str, Any]


def main() -> None:
    """Measure and write the table, or be one of the processes that are measured."""
    options = parse()
    if options.one:
        print(json.dumps(facts_of(**json.loads(options.one))))
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "memory.json"
    known: dict[str, Facts] = json.loads(path.read_text()) if path.exists() and not options.quick else {}
    for model in options.models:
        make_models(model)
        make_untied(model)
        for what, ways in WAYS.items():
            for way, prepacking in ((way, on) for way in ways for on in (True, False)):
                name = f"{model} | {what} | {way} | {'on' if prepacking else 'off'}"
                if (name in known and not options.again) or (way == PREPARED and not prepacking):
                    continue
                files = [str(MODELS / model / file) for file in FILES[what]]
                known[name] = measured(files, way, prepacking, options)
                print(row(name, known[name]), flush=True)
                if not options.quick:
                    path.write_text(json.dumps(known, indent=1) + "\n")
                    (RESULTS / "memory.md").write_text(text_of(known, options))
    print(text_of(known, options))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--models", nargs="+", default=["gpt2", "t5-base"], choices=["gpt2", "t5-base"])
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure rows again that are in the results")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.models = 1, ["gpt2"]
    return options


def make_untied(name: str) -> None:
    """Merge the decoders as they are exported: each branch transposes the embedding for its head."""
    home = MODELS / name
    if (home / "untied").exists():
        return
    print(f"making {name}, untied ...", flush=True)
    recipe = home / "untied.yaml"
    recipe.write_text(f"source: {home / 'hf'}\nsteps: [merge_if]\noutput: {{folder: untied.tmp}}\n")
    shutil.rmtree(home / "untied.tmp", ignore_errors=True)
    command = [sys.executable, "-m", "surgery", "run", str(recipe), "--no-check"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    (home / "untied.tmp").rename(home / "untied")


def measured(files: Sequence[str], way: str, prepacking: bool, options: argparse.Namespace) -> Facts:
    """Return medians over processes."""
    with tempfile.TemporaryDirectory(dir=MODELS) as scratch:
        if way == PREPARED:
            files = [prepared(files[0], Path(scratch))]
        asked = json.dumps({"files": files, "way": way, "prepacking": prepacking, "threads": options.threads})
        command = [sys.executable, __file__, "--one", asked]
        runs = [
            json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(options.rounds)
        ]
    return {key: statistics.median(run[key] for run in runs) for key in runs[0]}


def prepared(file: str, folder: Path) -> str:
    """Let ONNX Runtime save a model as it optimizes it, with its rearranged weights, in a process of its own."""
    script = (
        "import sys, onnxruntime as o\n"
        "s = o.SessionOptions()\n"
        "s.optimized_model_filepath = sys.argv[2]\n"
        f"s.add_session_config_entry('{PACKED}', '1')\n"
        "s.add_session_config_entry('session.optimized_model_external_initializers_file_name', 'packed')\n"
        "o.InferenceSession(sys.argv[1], s)\n"
    )
    target = str(folder / "model.onnx")
    subprocess.run([sys.executable, "-c", script, file, target], check=True, capture_output=True)
    return target


def facts_of(files: Sequence[str], way: str, prepacking: bool, threads: int) -> Facts:
    """Open sessions in this process and run them."""
    import onnxruntime  # noqa: F401 - its own memory is not the model's

    import surgery.runtime.sessions
    import surgery.storage  # noqa: F401

    before = resident()
    with Peak() as peak:
        start = time.perf_counter()
        sessions = [opened(Path(file), way, prepacking, threads) for file in files]
        seconds = time.perf_counter() - start
    loaded = resident()
    step_ms = {rows: step(sessions[-1], rows) for rows in ROWS}
    used = resident()
    return {
        "seconds": seconds,
        "peak_anonymous": peak.anonymous - before["RssAnon"],
        "peak_resident": peak.resident - sum(before.values()),
        "loaded_anonymous": loaded["RssAnon"] - before["RssAnon"],
        "used_anonymous": used["RssAnon"] - before["RssAnon"],
        "used_mapped": used["RssFile"] - before["RssFile"],
        **{f"step_{rows}_cpu_ms": times for rows, times in step_ms.items()},
    }


def opened(path: Path, way: str, prepacking: bool, threads: int) -> Any:
    import onnxruntime

    from surgery.runtime.sessions import open_fast_session, open_session
    from surgery.storage import open_model

    if way == FAST:
        return open_fast_session(open_model(path), prepacking=prepacking, threads=threads)
    if way in (HANDED, SHARED):
        return open_session(open_model(path), optimize=way == HANDED, prepacking=prepacking, threads=threads)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    options.enable_cpu_mem_arena = way != NO_ARENA
    if way == PREPARED:
        options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    if not prepacking:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def step(session: Any, rows: int) -> float:
    """Return the CPU milliseconds of a step: the median of some."""
    shapes: Mapping[str, tuple[int, ...]] = {
        "input_ids": (rows, 1),
        "position_ids": (rows, 1),
        "attention_mask": (rows, PAST + 1),
        "encoder_attention_mask": (rows, PAST),
        "encoder_hidden_states": (rows, PAST, 768),
        "use_cache_branch": (1,),
    }
    types = {"tensor(float)": np.float32, "tensor(int64)": np.int64, "tensor(bool)": np.bool_}
    feeds = {
        one.name: np.ones(shapes.get(one.name, (rows, 12, PAST, 64)), types[one.type]) for one in session.get_inputs()
    }
    times = []
    for _ in range(STEPS):
        start = time.process_time()
        session.run(None, feeds)
        times.append((time.process_time() - start) * 1e3)
    return statistics.median(times)


def resident() -> dict[str, int]:
    """Return this process's resident bytes, anonymous and of files."""
    lines = (line.split() for line in Path("/proc/self/status").read_text().splitlines())
    return {words[0][:-1]: int(words[1]) * 1024 for words in lines if words[0] in ("RssAnon:", "RssFile:")}


class Peak:
    """Watches the memory of this process while a block runs."""

    def __enter__(self) -> Peak:
        self.anonymous = self.resident = 0
        self._is_done = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._is_done.wait(0.002):
            now = resident()
            self.anonymous, self.resident = max(self.anonymous, now["RssAnon"]), max(self.resident, sum(now.values()))

    def __exit__(self, *_: object) -> None:
        self._is_done.set()
        self._thread.join()


COLUMNS = (
    ("seconds", 1, 2),
    ("peak_anonymous", 1e6, 0),
    ("peak_resident", 1e6, 0),
    ("loaded_anonymous", 1e6, 0),
    ("used_anonymous", 1e6, 0),
    ("used_mapped", 1e6, 0),
    *((f"step_{rows}_cpu_ms", 1, 1) for rows in ROWS),
)


def text_of(known: Mapping[str, Facts], options: argparse.Namespace) -> str:
    """Write the table."""
    import onnxruntime

    heads = (
        "opening, s",
        "peak anonymous, MB",
        "peak resident, MB",
        "anonymous after, MB",
        "anonymous in use, MB",
        "mapped in use, MB",
        *(f"step of {rows}, CPU ms" for rows in ROWS),
    )
    lines = [
        "# Memory of sessions",
        "",
        f"Made by `benchmarks/memory.py`: random weights at real configurations, float32. {os.cpu_count()} cores, "
        f"{platform.machine()}, {options.threads} threads, Python {platform.python_version()}, ONNX Runtime "
        f"{onnxruntime.__version__}. Medians of {options.rounds} processes; memory beyond what a process had before.",
        "",
        f"| model | sessions | opened | prepacking | {' | '.join(heads)} |",
        f"|---|---|---|---|{'---:|' * len(heads)}",
        *(row(name, facts) for name, facts in known.items()),
    ]
    return "\n".join(lines) + "\n"


def row(name: str, facts: Facts) -> str:
    cells = (f"{facts[key] / unit:.{digits}f}" for key, unit, digits in COLUMNS)
    return f"| {name} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
