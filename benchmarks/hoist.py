"""Whether `hoist: true` of `merge_if` helps: nodes, size, and time of both branches, interleaved in one process.

    python benchmarks/hoist.py [--models t5-base gpt2] [--rounds 30] [--threads 1] [--quick]

The decoders are those of `merge_if.py`. Each round runs the prompt pass (batch 1, 16 tokens) and a step (past 64) on
both merged models in turn, in ONNX Runtime's default session; what counts is the median of the ratios, round by round.
Results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
from merge_if import decoders
from models import CACHE

from passes.merge_if import MergeIf
from surgery.contract import Bundle, Context
from surgery.storage import open_model, save_model

HERE = Path(__file__).resolve().parent
SIZES = {"decoder_sequence_length": 16, "sequence_length": 16, "encoder_sequence_length": 32}
PROMPT, STEP = "prompt pass", "step"

Feeds = Mapping[str, np.ndarray]


def main() -> None:
    """Measure and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["t5-base", "gpt2"], choices=["t5-base", "gpt2"])
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="5 rounds")
    options = parser.parse_args()
    rows: list[dict[str, Any]] = []
    for name in options.models:
        print(f"{name} ...", flush=True)
        rows.append(measured(name, 5 if options.quick else options.rounds, options.threads))
    results = HERE / "results"
    results.mkdir(exist_ok=True)
    (results / "hoist.json").write_text(json.dumps(rows, indent=1) + "\n")
    (results / "hoist.md").write_text(text_of(rows, options.threads))
    print(text_of(rows, options.threads))


def measured(name: str, rounds: int, threads: int) -> dict[str, Any]:
    """Return what hoisting does to one model."""
    work = CACHE / "hoist"
    shutil.rmtree(work, ignore_errors=True)
    source = decoders(name, "external")
    paths = {hoist: merged(source, work / str(hoist), hoist=hoist) for hoist in (False, True)}
    models = {hoist: open_model(path) for hoist, path in paths.items()}
    feeds = {kind: feeds_of(models[False], kind) for kind in (PROMPT, STEP)}
    sessions = {hoist: session_of(path, threads) for hoist, path in paths.items()}
    for kind in feeds:
        for one, other in zip(*(session.run(None, feeds[kind]) for session in sessions.values()), strict=True):
            np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-4)
    seconds: dict[str, dict[bool, list[float]]] = {kind: {False: [], True: []} for kind in feeds}
    for number in range(rounds + 1):
        for kind, given in feeds.items():
            for hoist in (False, True) if number % 2 else (True, False):
                taken = timed(lambda hoist=hoist, given=given: sessions[hoist].run(None, given))  # type: ignore[misc]
                if number:
                    seconds[kind][hoist].append(taken)
    nodes = {hoist: sum(1 for _ in model.graph.all_nodes()) for hoist, model in models.items()}
    before = len(models[True].graph) - 1
    sizes = {hoist: path.stat().st_size for hoist, path in paths.items()}
    shutil.rmtree(work)
    row: dict[str, Any] = {
        "model": name,
        "hoisted": before,
        "nodes": list(nodes.values()),
        "graph bytes": list(sizes.values()),
    }
    for kind, pair in seconds.items():
        row[kind] = [statistics.median(pair[hoist]) for hoist in (False, True)]
        row[f"{kind} ratio"] = statistics.median(b / a for a, b in zip(pair[False], pair[True], strict=True))
    return row


def merged(source: Path, folder: Path, *, hoist: bool) -> Path:
    """Save the merged model and return its path."""
    files = {"prefill": "decoder_model.onnx", "decode": "decoder_with_past_model.onnx"}
    bundle = Bundle({role: open_model(source / file) for role, file in files.items()})
    MergeIf(hoist=hoist).apply(bundle, lambda role: Context(role=role))
    folder.mkdir(parents=True)
    path = folder / "decoder_model_merged.onnx"
    save_model(bundle["decoder"], path)
    return path


def session_of(path: Path, threads: int) -> onnxruntime.InferenceSession:
    """Open a session as users do, but for its threads."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def feeds_of(model: Any, kind: str) -> Feeds:
    """Return inputs of one branch by the names of their axes."""
    random = np.random.default_rng(0)
    is_step = kind == STEP
    new, past = (1, 64) if is_step else (16, 0)
    fed: dict[str, np.ndarray] = {}
    for value in model.graph.inputs:
        name = str(value.name)
        shape = [size_of(name, axis, size, new, past) for axis, size in enumerate(value.shape)]
        if name == "use_cache_branch":
            fed[name] = np.array([is_step])
        elif value.dtype.is_integer():
            high = 2 if "mask" not in name else 1
            fed[name] = np.ones(shape, np.int64) if high == 1 else random.integers(0, 1000, shape)
        else:
            fed[name] = random.standard_normal(shape).astype(np.float32)
    if "position_ids" in fed:
        fed["position_ids"] = np.arange(past, past + new)[None]
    return fed


def size_of(name: str, axis: int, size: Any, new: int, past: int) -> int:
    """Return a size for an axis of an input."""
    if isinstance(size, int):
        return size
    if axis == 0:
        return 1
    if name.startswith("encoder") or ".encoder." in name:
        return SIZES["encoder_sequence_length"]
    if name.startswith("past"):
        return past
    return past + new if name == "attention_mask" else new


def timed(call: Callable[[], object]) -> float:
    """Return the seconds of a call."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def text_of(rows: list[dict[str, Any]], threads: int) -> str:
    """Return the table as a page."""
    lines = [
        "# hoist",
        "",
        f"Made by `benchmarks/hoist.py`. {os.cpu_count()} cores, {platform.machine()}, {threads} thread, ONNX Runtime "
        f"{onnxruntime.__version__}. Without and with `hoist: true`; below 1 is faster.",
        "",
        "| | nodes moved | nodes | graph kB | prompt pass ms | ratio | step ms | ratio |",
        "|---|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        (n0, n1), (b0, b1) = row["nodes"], row["graph bytes"]
        cells = [
            f"{row[kind][0] * 1e3:.1f}, {row[kind][1] * 1e3:.1f} | {row[f'{kind} ratio']:.3f}"
            for kind in (PROMPT, STEP)
        ]
        lines.append(
            f"| {row['model']} | {row['hoisted']} | {n0}, {n1} | {b0 / 1e3:.0f}, {b1 / 1e3:.0f} | {' | '.join(cells)} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
