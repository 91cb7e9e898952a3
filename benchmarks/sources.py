"""Exports of every family at a real configuration: seconds, memory, nodes, and how far they are from PyTorch.

    python benchmarks/sources.py [--families gpt2,t5]

Each family is made, then exported and compared in a process of its own, and its files are deleted. The weights are
random. Both sides run in float32 on the CPU, ONNX Runtime in the session that the judge uses: without optimizations.
The gap is the largest error of any output over the reference's root mean square, over all the samples: prompts of 1 to
200 tokens, one row and three padded ones, after a past of 0, 1 and as many. Where it is over 1e-4, both sides are also
compared with PyTorch in float64 on that sample. Results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import shutil
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
from families import PUBLISHED, Published, make
from measure import anonymous_bytes, measure
from models import CACHE

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
LENGTHS = {1: (1, 2, 7, 50, 128, 200), 3: (2, 7, 50, 200)}  # by batch size; of three rows two are padded
LONGEST_FIRST = 7  # tokens that are given to a decode whose past is empty; a prefill's work, done again
SEVERAL = 3
LIMIT = 1e-4
LARGE_BYTES = 1 << 20

Arrays = dict[str, np.ndarray]
Row = dict[str, Any]


def main() -> None:
    """Measure and write the table, or be one of the processes that are measured."""
    options = parse()
    if options.make:
        make(options.make, Path("model"))
        return
    if options.judge:
        Path("row.json").write_text(json.dumps(row_of(Path("model"))))
        return
    RESULTS.mkdir(exist_ok=True)
    chosen = options.families.split(",") if options.families else list(PUBLISHED)
    path = RESULTS / "sources.json"
    rows: dict[str, Row] = json.loads(path.read_text())["rows"] if options.families and path.is_file() else {}
    for name in chosen:
        rows[name] = measured(name)
        in_order = {known: rows[known] for known in PUBLISHED if known in rows}
        path.write_text(json.dumps({"machine": machine(), "rows": in_order}, indent=2) + "\n")
        (RESULTS / "sources.md").write_text(table(in_order))
    print(table({name: rows[name] for name in chosen}))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--families", help=f"some of {','.join(PUBLISHED)}; the other rows stay as they were")
    parser.add_argument("--make", choices=PUBLISHED, help=argparse.SUPPRESS)
    parser.add_argument("--judge", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    unknown = set((options.families or "gpt2").split(",")) - set(PUBLISHED)
    if unknown:
        parser.error(f"no family is called {min(unknown)!r}")
    return options


def measured(name: str) -> Row:
    """Make, export and compare one family; what fails is its row."""
    folder = CACHE / f"sources-{name}"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    script = [sys.executable, str(HERE / "sources.py")]
    print(f"{name} ...", file=sys.stderr, flush=True)
    start = time.perf_counter()
    try:
        measure([*script, "--make", name], cwd=folder)
        whole = measure([*script, "--judge"], cwd=folder)
        row: Row = json.loads((folder / "row.json").read_text())
        row |= {"cpu_seconds": round(whole.cpu_seconds, 1), "peak_bytes": whole.peak_anonymous}
    except RuntimeError as error:
        lines = [line for line in str(error).strip().splitlines() if not line.startswith("  try: ")]
        row = {"failed": lines[-1]}
    finally:
        shutil.rmtree(folder)
    return row | {"total_seconds": round(time.perf_counter() - start, 1)}


# In the process that is measured


def row_of(source: Path) -> Row:
    """Export a model and compare it with PyTorch."""
    import torch

    from surgery.recipe import Source
    from surgery.sources import find_source

    torch.set_num_threads(os.cpu_count() or 1)
    with peak_memory() as peak:
        start = time.perf_counter()
        opened = find_source(Source(path=str(source)), Path()).open(Path("scratch"), lambda _: None)
        seconds = time.perf_counter() - start
        cpu_seconds = time.process_time()
    models = opened.bundle.models
    gaps = Gaps(models, opened.reference)
    start = time.perf_counter()
    KINDS[next(iter(models))](gaps, opened.bundle.config)
    return {
        "export_seconds": round(seconds, 1),
        "export_cpu_seconds": round(cpu_seconds, 1),
        "export_peak_bytes": max(peak),
        "compare_seconds": round(time.perf_counter() - start, 1),
        "nodes": {role: sum(1 for _ in model.graph.all_nodes()) for role, model in models.items()},
        "weight_bytes": {role: weight_bytes(model) for role, model in models.items()},
        "twins": {role: found for role, model in models.items() if (found := twins(model))},
        "unnamed_weights": {role: found for role, model in models.items() if (found := unnamed(model))},
        "samples": gaps.samples,
        "gap": gaps.worst,
        "worst_at": gaps.where,
        "worst_is": gaps.worst_is,
        "against_float64": gaps.against_float64() if gaps.worst > LIMIT else {},
        "gaps": gaps.by_output,
    }


@contextmanager
def peak_memory() -> Iterator[list[int]]:
    """Sample this process's anonymous memory meanwhile."""
    seen = [anonymous_bytes(os.getpid())]
    done = threading.Event()

    def sample() -> None:
        while not done.wait(0.1):
            seen.append(anonymous_bytes(os.getpid()))

    thread = threading.Thread(target=sample)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def weight_bytes(model: ir.Model) -> int:
    return sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.const_value is not None)


def large_matrices(model: ir.Model) -> list[ir.TensorProtocol]:
    tensors = [value.const_value for value in model.graph.initializers.values()]
    return [
        tensor for tensor in tensors if tensor is not None and tensor.nbytes >= LARGE_BYTES and len(tensor.shape) == 2
    ]


def twins(model: ir.Model) -> list[str]:
    """Return the pairs of large weights of which one is the other, or the other transposed."""
    found = []
    tensors = large_matrices(model)
    for index, left in enumerate(tensors):
        for right in tensors[:index]:
            shapes = tuple(left.shape.numpy()), tuple(right.shape.numpy())
            a, b = left.numpy(), right.numpy()
            if shapes[0] == shapes[1] and same(a, b):
                found.append(f"{left.name} is {right.name}")
            elif shapes[0] == shapes[1][::-1] and same(a, b.T):
                found.append(f"{left.name} is {right.name} transposed, {left.nbytes / 1e6:.0f} MB")
    return found


def same(left: np.ndarray, right: np.ndarray) -> bool:
    return bool(np.array_equal(left[0], right[0]) and np.array_equal(left, right))


def unnamed(model: ir.Model) -> list[str]:
    """Return the weights of some size that have no name which a user knows."""
    values = [value for value in model.graph.initializers.values() if value.const_value is not None]
    return [value.name or "" for value in values if value.const_value.size > 64 and "." not in (value.name or "")]


class Gaps:
    """The models and their reference side by side, and how far apart they were at most."""

    def __init__(self, models: Mapping[str, ir.Model], reference: Any) -> None:
        from surgery.accuracy.runners import ModelProgram

        self._programs = {role: ModelProgram(model) for role, model in models.items()}
        self._reference = reference
        self.samples = 0
        self.worst = 0.0
        self.where = ""
        self.worst_is = ""
        self._worst: tuple[str, str, Arrays] = ("", "", {})
        self.by_output: dict[str, float] = {}

    def takes(self, role: str, name: str) -> bool:
        return name in self._programs[role].inputs

    def run(self, role: str, sample: str, feeds: Arrays) -> Arrays:
        """Return what PyTorch gives; an output that is missing or has another shape is infinitely far."""
        given = {name: feeds[name] for name in self._programs[role].inputs}
        wanted = self._reference.run(role, given)
        got = self._programs[role].run(given)
        assert list(got) == list(wanted), (role, list(got), list(wanted))
        self.samples += 1
        for name, array in wanted.items():
            gap, scale = gap_of(array, got[name])
            known = re_layers(f"{role}: {name}")
            self.by_output[known] = max(gap, self.by_output.get(known, 0.0))
            if not gap <= self.worst:
                self.worst, self.where = gap, f"{role}, {name}, {sample}"
                self.worst_is = f"{array.size:,} numbers, RMS {scale:.1e}"
                self._worst = role, name, given
        return wanted

    def against_float64(self) -> dict[str, float]:
        """Return how far both sides are from PyTorch in float64 where they are furthest apart; the last thing done."""
        role, name, feeds = self._worst
        both = {
            "PyTorch": self._reference.run(role, feeds)[name],
            "ONNX Runtime": self._programs[role].run(feeds)[name],
        }
        self._reference._model.double()
        exact = self._reference.run(role, feeds)[name]
        return {side: gap_of(exact, array)[0] for side, array in both.items()}


def re_layers(name: str) -> str:
    """Return one name for the caches of all layers."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def gap_of(wanted: np.ndarray, got: np.ndarray) -> tuple[float, float]:
    """Return the largest error over the root mean square, and that; in slices, since logits may be a gigabyte."""
    if wanted.shape != got.shape:
        return float("inf"), 1.0
    if not wanted.size:
        return 0.0, 1.0
    rows = wanted.reshape(len(wanted), -1), got.reshape(len(got), -1)
    error = max(float(np.abs(left - right).max()) for left, right in zip(*rows, strict=True))
    square = sum(float(np.dot(row, row)) for row in rows[0]) / wanted.size
    scale = square**0.5 or 1.0
    return error / scale, scale


def ids_of(config: Mapping[str, Any], batch: int, length: int) -> np.ndarray:
    return np.random.default_rng([batch, length]).integers(3, config["vocab_size"] - 200, (batch, length))


def left_padded(batch: int, length: int) -> np.ndarray:
    """Return a mask whose last row is full; the others are padded by a third and more, where there is room."""
    mask = np.ones((batch, length), np.int64)
    for row in range(batch - 1):
        mask[row, : min(row + 1 + length // 3, length - 1)] = 0
    return mask


def as_past(outputs: Arrays, length: int | None = None) -> Arrays:
    """Return the caches of a prefill, or its first `length` tokens of them."""
    past = {name.replace("present", "past_key_values"): x for name, x in outputs.items() if name.startswith("present")}
    return {name: x if ".encoder." in name else x[:, :, :length] for name, x in past.items()}


def compare_decoder(gaps: Gaps, config: Mapping[str, Any]) -> None:
    from surgery.runtime.loops import position_ids

    for batch, lengths in LENGTHS.items():
        for length in lengths:
            ids, mask = ids_of(config, batch, length), left_padded(batch, length)
            prompt = {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)}
            shape = f"batch {batch}, length {length}"
            outputs = gaps.run("prefill", shape, prompt)
            if length <= LONGEST_FIRST:
                gaps.run("decode", f"{shape}, past 0", prompt | as_past(outputs, 0))
            for new in (1, SEVERAL):
                longer = np.concatenate([mask, np.ones((batch, new), np.int64)], axis=1)
                positions = position_ids(longer)[:, -new:]
                step = {"input_ids": ids_of(config, batch, new), "attention_mask": longer, "position_ids": positions}
                gaps.run("decode", f"batch {batch}, length {new}, past {length}", step | as_past(outputs))


def compare_encoder_decoder(gaps: Gaps, config: Mapping[str, Any]) -> None:
    hears = gaps.takes("encoder", "input_features")
    for batch, lengths in LENGTHS.items():
        for length in lengths:
            mask = left_padded(batch, length)
            read: Arrays = {"input_ids": ids_of(config, batch, length), "attention_mask": mask}
            if hears:
                shape = (batch, config["num_mel_bins"], 2 * config["max_source_positions"])
                read = {"input_features": np.random.default_rng(length).standard_normal(shape).astype(np.float32)}
            states = gaps.run("encoder", f"batch {batch}, length {length}", read)["last_hidden_state"]
            encoded = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
            for prompt in sorted({1, length}):
                inputs = {"input_ids": ids_of(config, batch, prompt), **encoded}
                outputs = gaps.run("prefill", f"batch {batch}, length {prompt} after {length}", inputs)
                for past, new in ((0, 1), (prompt, 1), (prompt, SEVERAL)):
                    step = {"input_ids": ids_of(config, batch, new), **encoded, **as_past(outputs, past)}
                    gaps.run("decode", f"batch {batch}, length {new}, past {past} after {length}", step)


def compare_encoder(gaps: Gaps, config: Mapping[str, Any]) -> None:
    for batch, lengths in LENGTHS.items():
        for length in lengths:
            mask = np.ascontiguousarray(left_padded(batch, length)[:, ::-1])
            types = np.broadcast_to(np.arange(length) > length // 2, (batch, length)).astype(np.int64)
            feeds = {"input_ids": ids_of(config, batch, length), "attention_mask": mask, "token_type_ids": types}
            gaps.run("model", f"batch {batch}, length {length}", feeds)


KINDS = {"prefill": compare_decoder, "encoder": compare_encoder_decoder, "model": compare_encoder}


# The table


def machine() -> dict[str, Any]:
    packages = ("torch", "transformers", "onnxscript", "onnxruntime", "numpy")
    return {
        "cores": os.cpu_count(),
        "architecture": platform.machine(),
        "python": platform.python_version(),
        "packages": {package: importlib.metadata.version(package) for package in packages},
    }


def table(rows: Mapping[str, Row]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in machine()["packages"].items())
    lines = [
        "# sources",
        "",
        "Made by `benchmarks/sources.py`, which says how. Random weights at the published configuration; where the",
        "whole would be over 1.5 GB in float32, at real width with fewer layers. Export seconds and the peak of",
        "anonymous memory are those of loading the model and exporting all its roles; weights and nodes are what comes",
        f"out. Lengths {', '.join(map(str, LENGTHS[1]))}; batches 1 and 3 (padded); past 0, 1 and as many.",
        f"{os.cpu_count()} cores, {platform.machine()}; {versions}.",
        "",
        "| family | configuration | export | peak | weights | nodes | gap to PyTorch | worst at | stored twice |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(line_of(name, row) for name, row in rows.items())]) + "\n"


def line_of(name: str, row: Row) -> str:
    published = PUBLISHED[name]
    about = f"| `{name}` | {configuration(name, published)} |"
    if "failed" in row:
        return f"{about} failed: {row['failed'].replace('|', '/')} |"
    nodes = ", ".join(f"{role} {count:,}" for role, count in row["nodes"].items())
    sides = ", ".join(f"{side} {gap:.1e}" for side, gap in row.get("against_float64", {}).items())
    verdict = f"{row['gap']:.1e}" + (f" (over 1e-4; {row['worst_is']}; from float64: {sides})" if sides else "")
    twice = "; ".join(sorted({text for found in row["twins"].values() for text in found})) or "-"
    return (
        f"{about} {row['export_seconds']:.0f} s | {row['export_peak_bytes'] / 1e9:.1f} GB | "
        f"{sum(row['weight_bytes'].values()) / 1e9:.1f} GB | {nodes} | {verdict} | {row['worst_at']} | {twice} |"
    )


def configuration(name: str, published: Published) -> str:
    head = f", {published.head}" if published.head else ""
    cut = "".join(f", {count} layers" for count in published.cut.values())
    return f"{published.hub_id}{head}{cut}"


if __name__ == "__main__":
    main()
