"""`merge_if` on T5-base's and GPT-2 124M's decoders against Optimum's `merge_decoders` and `cp`, as whole processes.

    python benchmarks/merge_if.py [--rounds 3] [--models t5-base gpt2] [--forms single external] [--optimum PYTHON]
                                  [--quick] [--again]

Each row is a fresh process that opens the two decoders, merges them and saves one file. The weights are random, at the
published configurations. `--optimum` names the Python of an environment with Optimum (`pip install torch
optimum-onnx`); without it that peer is left out. `--quick` does one round of the single files of T5-base. A table that
is in benchmarks/results already is left as it is, unless `--again` is given.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from measure import Measurement, measure, median, ratio, rounds
from models import CACHE, bytes_of, exported, pretrained_t5_base, two_decoders

HERE = Path(__file__).resolve().parent
PEERS = HERE / "peers"
RESULTS = HERE / "results"
FORMS = {"single": "single files", "external": "external data"}
OURS, OPTIMUM, COPY = "surgery --no-check", "Optimum", "cp of our output"
FILES = ("decoder_model.onnx", "decoder_with_past_model.onnx")

Commands = dict[str, Sequence[str]]


def main() -> None:
    """Measure and write the tables."""
    options = parse()
    CACHE.mkdir(exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "merge_if.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in options.models:
        for form in options.forms:
            title = f"{name}, {FORMS[form]}"
            if title in known and not options.again:
                print(f"{title}: measured before; --again measures it again", flush=True)
                continue
            print(f"{title} ...", flush=True)
            known[title] = measured(decoders(name, form), options)
            path.write_text(json.dumps(known, indent=1) + "\n")
            (RESULTS / "merge_if.md").write_text(text_of(known))
            print(table(title, known[title]), flush=True)


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count, after one warm-up")
    parser.add_argument("--models", nargs="+", default=["t5-base", "gpt2"], choices=["t5-base", "gpt2"])
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=list(FORMS))
    parser.add_argument("--optimum", help="the Python of an environment with Optimum")
    parser.add_argument("--quick", action="store_true", help="one round of T5-base as single files")
    parser.add_argument("--again", action="store_true", help="measure again what is in the results already")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.models, options.forms, options.again = 1, ["t5-base"], ["single"], True
    return options


def decoders(name: str, form: str) -> Path:
    """Return a folder with the two decoders of a model and nothing else."""
    folder = CACHE / f"{name}-decoders-{form}"
    if not folder.exists():
        from surgery.storage import open_model, save_models

        source = two_decoders(name) if name == "gpt2" else t5_base()
        models = {role: open_model(source / file) for role, file in zip(("prefill", "decode"), FILES, strict=True)}
        save_models(models, folder, layout="single" if form == "single" else "optimum")
    return folder


def t5_base() -> Path:
    """Return a folder with T5-base exported, each decoder with a copy of all its weights."""
    return exported(pretrained_t5_base(), CACHE / "t5-base-two")


def measured(source: Path, options: argparse.Namespace) -> dict[str, Any]:
    """Measure all commands on one pair of decoders; what fails is left with its reason."""
    work = CACHE / "work"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    commands: Commands = {OURS: ours(source, work)}
    if options.optimum:
        files = [str(source / file) for file in FILES]
        commands[OPTIMUM] = [options.optimum, str(PEERS / "optimum_merge.py"), *files, str(work / OPTIMUM)]
    commands[COPY] = ["cp", "-r", str(work / "kept"), str(work / COPY)]
    measure(commands[OURS], cwd=work)
    (work / OURS).rename(work / "kept")

    def clear(command: str) -> None:
        shutil.rmtree(work / command, ignore_errors=True)

    results, failed = rounds(commands, cwd=work, count=options.rounds, before=clear)
    rows = {
        command: {"bytes": merged_bytes(work / command), "runs": [asdict(run) for run in runs]}
        for command, runs in results.items()
        if command not in failed
    }
    given = [bytes_of_model(source / file) for file in FILES]
    shutil.rmtree(work)
    return {"given": given, "rows": rows, "failed": failed, "versions": versions(options.optimum)}


def ours(source: Path, work: Path) -> Sequence[str]:
    """Return the command that merges with this project, from and to files of one kind."""
    layout = "single" if not (source / f"{FILES[0]}_data").exists() else "optimum"
    recipe = work / "recipe.yaml"
    recipe.write_text(f"source: {source}\nsteps: [merge_if]\noutput: {{folder: out, layout: {layout}}}\n")
    return [sys.executable, "-m", "surgery", "run", str(recipe), "--out", str(work / OURS), "--no-check"]


def bytes_of_model(path: Path) -> int:
    """Return the size of a model with its data file."""
    return sum(file.stat().st_size for file in path.parent.glob(f"{path.name}*"))


def merged_bytes(folder: Path) -> int:
    """Return the size of the merged model in a folder, leaving aside what else lies there."""
    merged = next(folder.rglob("decoder_model_merged.onnx"), None)
    return bytes_of_model(merged) if merged is not None else bytes_of(folder)


def versions(optimum: str | None) -> str:
    """Return the versions of what was measured against."""
    if optimum is None:
        return ""
    code = "import importlib.metadata as m; print(*(f'{n} {m.version(n)}' for n in ('optimum-onnx', 'onnx')), sep=', ')"
    return subprocess.run([optimum, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def runs_of(rows: Mapping[str, Any], command: str) -> list[Measurement]:
    """Return the measurements of a command."""
    return [Measurement(**run) for run in rows[command]["runs"]]


def text_of(known: Mapping[str, Any]) -> str:
    """Return all tables as a page."""
    peers = " and ".join(sorted({entry["versions"] for entry in known.values() if entry["versions"]}))
    header = (
        "# merge_if\n\nMade by `benchmarks/merge_if.py`. Whole processes, medians over rounds in which all commands "
        f"run in turn after a warm-up. {os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
        f"{f'; {peers}' if peers else ''}. Memory is the peak of anonymous memory: mapped files are not counted."
    )
    return "\n\n".join([header, *(table(title, entry) for title, entry in known.items())]) + "\n"


def table(title: str, entry: Mapping[str, Any]) -> str:
    """Return one table in Markdown."""
    rows, (prefill, decode) = entry["rows"], entry["given"]
    lines = [
        f"## {title}",
        "",
        f"Two decoders of {prefill / 1e6:.1f} and {decode / 1e6:.1f} MB.",
        "",
        "| | seconds | CPU seconds | peak memory MB | output MB | of the larger decoder |",
        "|---|---:|---:|---:|---:|---:|",
    ]
    for command, row in rows.items():
        runs = runs_of(rows, command)
        lines.append(
            f"| {command} | {median(runs, 'seconds'):.2f} | {median(runs, 'cpu_seconds'):.2f} "
            f"| {median(runs, 'peak_anonymous') / 1e6:.0f} | {row['bytes'] / 1e6:.1f} "
            f"| {row['bytes'] / max(prefill, decode):.3f} |"
        )
    lines += [f"| {command} | fails: {text} | | | | |" for command, text in entry["failed"].items()]
    if OPTIMUM in rows:
        ours, other = runs_of(rows, OURS), runs_of(rows, OPTIMUM)
        less = {field: ratio(other, ours, field) for field in ("seconds", "cpu_seconds", "peak_anonymous")}
        lines += [
            "",
            f"Optimum takes {less['seconds']:.1f} times the seconds, {less['cpu_seconds']:.1f} times the CPU seconds "
            f"and {less['peak_anonymous']:.1f} times the memory (medians of the ratios, round by round).",
        ]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
