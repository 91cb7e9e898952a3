"""Half precision as a GPU computes it beside its emulation on the CPU, and how fast it is; for a machine with a GPU.

    python benchmarks/gpu/cast_fp16.py [--only CASE ...] [--calls 50]

It needs onnxruntime-gpu. Each case of `benchmarks/cast_fp16.py` is cast twice: all of it, by ONNX Runtime's converter,
and but for what an audit keeps. Both are compared with float32 on the CPU, once emulated there and once in the CUDA
provider, on the audit's samples: the largest error of all outputs as a share of the root mean square. A call takes what
it takes with inputs and outputs on the GPU, on the longest sample of one row. Results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnxruntime
from cast_fp16 import CASES, ORT, OTHERS, PEERS, RESULTS
from half_judging import longest, nodes_of, works_in_float32
from known_ranges import KeepRanges
from models import CACHE

from passes.audit_ranges import AuditRanges
from passes.cast_fp16 import CastFp16
from passes.clean_casts import CleanCasts
from surgery import Pipeline
from surgery.accuracy.compare import compare_output
from surgery.accuracy.half import holds_half, lower_half
from surgery.contract import Effect
from surgery.element_types import infer_types
from surgery.runtime.sessions import open_fast_session, open_session
from surgery.storage import open_model

CUDA, DEVICE = "CUDAExecutionProvider", "cuda"
FLOAT32, ALL_HALF, AUDITED = "float32", "all half", "audited"
WARM_UP = 5

Arrays = Mapping[str, np.ndarray]


def main() -> None:
    """Measure and write the table."""
    options = parse()
    if CUDA not in onnxruntime.get_available_providers():
        sys.exit(
            f"this needs ONNX Runtime's {CUDA}, and there is only {', '.join(onnxruntime.get_available_providers())}\n"
            "  try: pip install onnxruntime-gpu, on a machine with a CUDA device"
        )
    rows = [row for name in options.only for row in rows_of(name, options.calls)]
    (RESULTS / "cast_fp16_gpu.json").write_text(json.dumps(rows, indent=1) + "\n")
    (RESULTS / "cast_fp16_gpu.md").write_text(table(rows))
    print(table(rows))


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--calls", type=int, default=50, help="calls that are timed")
    return parser.parse_args()


def rows_of(name: str, calls: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each model of a case and each way of keeping nodes."""
    source = CASES[name].folder()
    work = CACHE / "work-gpu"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    files = sorted(source.glob("*.onnx"))
    passes = [AuditRanges(), KeepRanges(folder=work / "samples"), CastFp16(keep_cache=True), CleanCasts()]
    with Pipeline(passes, check=None).run(source) as result:
        result.save(work / AUDITED)
    converter = [sys.executable, str(PEERS / OTHERS[ORT]), str(work / "samples"), str(work / ALL_HALF)]
    subprocess.run([*converter, *map(str, files)], check=True)
    for file in files:
        samples = [dict(np.load(path)) for path in sorted((work / "samples" / file.stem).glob("*.npz"))]
        wanted = answers(open_session(open_model(file)), samples)
        for precision, folder in ((FLOAT32, source), (ALL_HALF, work / ALL_HALF), (AUDITED, work / AUDITED)):
            model = open_model(folder / file.name)
            infer_types(model)
            session = open_fast_session(model, providers=(CUDA, "CPUExecutionProvider"))
            emulated = open_session(lower_half(model) if holds_half(model) else model)
            yield {
                "case": name,
                "model": file.stem,
                "precision": precision,
                "float32_nodes": sum(works_in_float32(node) for node in nodes_of(model)),
                "emulated": error(wanted, answers(emulated, samples)),
                "measured": error(wanted, answers(session, samples)),
                "milliseconds": milliseconds(session, longest(work / "samples" / file.stem), calls),
            }
    shutil.rmtree(work)


def answers(session: onnxruntime.InferenceSession, samples: list[dict[str, np.ndarray]]) -> list[Arrays]:
    """Return the outputs on each sample, by name."""
    names = [value.name for value in session.get_outputs()]
    inputs = [value.name for value in session.get_inputs()]
    given = (session.run(None, {name: sample[name] for name in inputs}) for sample in samples)
    return [dict(zip(names, outputs, strict=True)) for outputs in given]


def error(wanted: list[Arrays], given: list[Arrays]) -> float:
    """Return the largest error, as a verdict says it; infinite where something is not a number."""
    return max(
        compare_output(name, array, other[name], Effect.CLOSE, CastFp16.tolerance).gap.max_error
        for one, other in zip(wanted, given, strict=True)
        for name, array in one.items()
    )


def milliseconds(session: onnxruntime.InferenceSession, sample: Arrays, calls: int) -> float:
    """Return the median time of a call with everything on the GPU."""
    binding = session.io_binding()
    for value in session.get_inputs():
        binding.bind_ortvalue_input(value.name, onnxruntime.OrtValue.ortvalue_from_numpy(sample[value.name], DEVICE))
    for value in session.get_outputs():
        binding.bind_output(value.name, DEVICE)
    seconds = []
    for number in range(WARM_UP + calls):
        start = time.perf_counter()
        session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        if number >= WARM_UP:
            seconds.append(time.perf_counter() - start)
    return statistics.median(seconds) * 1e3


def table(rows: list[dict[str, Any]]) -> str:
    """Return all rows as a page."""
    lines = [
        "# cast_fp16 on a GPU",
        "",
        "Made by `benchmarks/gpu/cast_fp16.py`, which says how.",
        "",
        "| case | model | precision | nodes in float32 | error, emulated on the CPU | error, on the GPU | ms a call |",
        "|---|---|---|---:|---:|---:|---:|",
    ]
    for row in rows:
        lines.append(
            f"| {row['case']} | {row['model']} | {row['precision']} | {row['float32_nodes']} "
            f"| {row['emulated']:.2g} | {row['measured']:.2g} | {row['milliseconds']:.2f} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
