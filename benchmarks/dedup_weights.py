"""`dedup_weights` on GPT-2 124M and gpt2-large against Optimum's, onnx_ir's and plain `cp`, as whole processes.

    python benchmarks/dedup_weights.py [--rounds 3] [--models gpt2 gpt2-large] [--optimum PYTHON]

Each row is a fresh process that opens, deduplicates and saves. `--optimum` names the Python of an environment with
Optimum (`pip install torch optimum-onnx`); without it that peer is left out. Results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from measure import Measurement, median, ratio, rounds
from models import CACHE, bytes_of, two_decoders, with_a_twin

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
Commands = dict[str, Sequence[str]]
SLOW = ("surgery, checked", "Optimum")


def main() -> None:
    """Measure and write the table."""
    options = parse()
    CACHE.mkdir(exist_ok=True)
    (HERE / "results").mkdir(exist_ok=True)
    tables = [header(), *(table for name in options.models for table in tables_of(name, options))]
    text = "\n\n".join(tables) + "\n"
    (HERE / "results" / "dedup_weights.md").write_text(text)
    print(text)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count, after one warm-up")
    parser.add_argument("--models", nargs="+", default=["gpt2", "gpt2-large"])
    parser.add_argument("--optimum", help="the Python of an environment with Optimum")
    return parser.parse_args()


def header() -> str:
    slow = " and ".join(f"`{name}`" for name in SLOW)
    return (
        "# dedup_weights\n\nMade by `benchmarks/dedup_weights.py`. Whole processes, medians over rounds in which all "
        f"commands run in turn after a warm-up; {slow} run once. {os.cpu_count()} cores, {platform.machine()}, Python "
        f"{platform.python_version()}. Memory is the peak of anonymous memory: mapped files are not counted."
    )


def tables_of(name: str, options: argparse.Namespace) -> list[str]:
    """Measure one model in each form."""
    forms: list[tuple[str, Callable[[], Path]]] = [
        ("external data, one model, its embedding twice", lambda: with_a_twin(name, "optimum")),
        ("prefill and decode, each with all weights", lambda: two_decoders(name)),
    ]
    if name == "gpt2":  # protobuf reads nothing above 2 GiB, so the large one cannot be a single file for the peers
        forms.insert(1, ("single file, one model, its embedding twice", lambda: with_a_twin(name, "single")))
    return [measure_form(name, title, make(), options) for title, make in forms]


def measure_form(name: str, title: str, source: Path, options: argparse.Namespace) -> str:
    work = CACHE / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    commands = ours(source, work)
    if source.is_file():
        commands |= peers(source, work, options.optimum)
    commands["cp of our output"] = ["cp", "-r", str(work / "kept"), str(work / "cp of our output")]
    prepare_output(commands["surgery --no-check"], work)

    def clear(command: str) -> None:
        shutil.rmtree(work / command, ignore_errors=True)

    once = [command for command in SLOW if command in commands]
    results, failed = rounds(commands, cwd=work, count=options.rounds, before=clear, once=once)
    results = {command: measured for command, measured in results.items() if command not in failed}
    sizes = {command: bytes_of(work / command) for command in results}
    given = bytes_of(source if source.is_dir() else source.parent)
    save_json(name, title, results, sizes)
    shutil.rmtree(work)
    return table(f"{name}: {title}", given, results, sizes, failed)


def ours(source: Path, work: Path) -> Commands:
    recipe = work / "recipe.yaml"
    recipe.write_text(f"source: {source}\nsteps: [dedup_weights]\noutput: {{folder: out, layout: shared}}\n")
    run = [sys.executable, "-m", "surgery", "run", str(recipe), "--out"]
    return {
        "surgery --no-check": [*run, str(work / "surgery --no-check"), "--no-check"],
        "surgery, checked": [*run, str(work / "surgery, checked")],
    }


def peers(source: Path, work: Path, optimum: str | None) -> Commands:
    commands: Commands = {
        "onnx_ir": [sys.executable, str(PEERS / "onnx_ir_dedup.py"), str(source), str(work / "onnx_ir")]
    }
    if optimum:
        commands["Optimum"] = [optimum, str(PEERS / "optimum_dedup.py"), str(source), str(work / "Optimum")]
    return commands


def prepare_output(command: Sequence[str], work: Path) -> None:
    """Make what `cp` is to copy."""
    import subprocess

    subprocess.run(command, cwd=work, check=True, stdout=subprocess.DEVNULL)
    (work / "surgery --no-check").rename(work / "kept")


def table(
    title: str,
    given: int,
    results: Mapping[str, Sequence[Measurement]],
    sizes: Mapping[str, int],
    failed: Mapping[str, str],
) -> str:
    baseline = results["cp of our output"]
    lines = [
        f"## {title}",
        "",
        f"Input {given / 1e6:.1f} MB.",
        "",
        "| | seconds | times cp | CPU seconds | peak memory MB | output MB |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for name, measured in results.items():
        lines.append(
            f"| {name} | {median(measured, 'seconds'):.2f} | {ratio(measured, baseline, 'seconds'):.2f} "
            f"| {median(measured, 'cpu_seconds'):.2f} | {median(measured, 'peak_anonymous') / 1e6:.0f} "
            f"| {sizes[name] / 1e6:.1f} |"
        )
    lines += [f"| {name} | fails: {text} | | | | |" for name, text in failed.items()]
    return "\n".join(lines)


def save_json(name: str, title: str, results: Mapping[str, Sequence[Measurement]], sizes: Mapping[str, int]) -> None:
    path = HERE / "results" / "dedup_weights.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known[f"{name}: {title}"] = {
        command: {"bytes": sizes[command], "runs": [asdict(run) for run in runs]} for command, runs in results.items()
    }
    path.write_text(json.dumps(known, indent=1) + "\n")


if __name__ == "__main__":
    main()
