"""Half precision by this project and by others: time, memory, casts, what stays in float32, and whether it is right.

    python benchmarks/cast_fp16.py [--rounds 3] [--only CASE ...] [--rows ROW ...] [--peers PYTHON] [--quick] [--again]

Each row is a fresh process that opens the float32 models of a case, converts them and saves them; inputs and outputs
stay float32, the cache too. The large models have random weights at the published configurations; the small ones are
the trained fixtures and the variants of the sorter that exceed float16. Afterwards, unmeasured, each result is counted,
checked, and compared with float32 as a GPU would compute it (`half_judging.py`).

`--peers` names the Python of an environment with NVIDIA ModelOpt and onnxconverter-common; without it they are left
out. ModelOpt asks for onnxruntime-gpu and cupy, which a machine without a GPU does not need, so it goes in alone:

    python3 -m venv peers && peers/bin/pip install torch "onnx~=1.21.0" "onnxruntime~=1.24.2" onnxconverter-common \
        onnx-graphsurgeon onnxslim polygraphy onnxscript lief ml_dtypes omegaconf "pulp<4" pydantic regex rich \
        safetensors scipy tqdm PyYAML nvidia-ml-py cppimport ninja setuptools
    peers/bin/pip install --no-deps nvidia-modelopt

AutoCast and the auto mixed precision get the samples that the audit measures on. A row that is in benchmarks/results
already is left as it is, unless `--again` is given; `--quick` does one round of the sorter. A converter that takes more
than `--memory` GB or `--cpu-seconds` is stopped, and its row says so.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from measure import Measurement, median, ratio, rounds
from models import CACHE, exported, pretrained_gpt2, pretrained_t5_base, two_decoders

HERE = Path(__file__).resolve().parent
FIXTURES = HERE.parent / "fixtures"
PEERS = HERE / "peers"
RESULTS = HERE / "results"
CAST, RECIPE, FLOOR = "surgery: the cast alone", "surgery: audit, cast, clean, verdict", "map, convert, write"
ORT, AUTOCAST = "ONNX Runtime", "ModelOpt AutoCast"
OURS = (CAST, RECIPE)
OTHERS: Mapping[str, str] = {
    ORT: "ort_onnx_model.py",
    "ONNX Runtime, float16.py": "ort_float16.py",
    "onnxconverter-common": "onnxconverter_float16.py",
    "onnxconverter-common, auto mixed": "onnxconverter_mixed.py",
    AUTOCAST: "modelopt_autocast.py",
    FLOOR: "floor.py",
}
ROWS = (*OURS, *OTHERS)
OF_THE_PEERS = ("onnxconverter-common", "onnxconverter-common, auto mixed", AUTOCAST)
SLOW = ("onnxconverter-common, auto mixed", AUTOCAST)
STEPS = "[audit_ranges, {pass: cast_fp16, keep_cache: true}, clean_casts]"
MOST_SAID = 240
ANSWERS = ("as_before", "as_before_on_cpu")
PACKAGES = ("nvidia-modelopt", "onnxconverter-common", "onnx", "onnxruntime")
HEADER = (
    "Made by `benchmarks/cast_fp16.py`, which says how. Whole processes, medians over rounds in which all run in turn "
    "after a warm-up; {slow} run once. {machine}; {versions}. Memory is the peak of anonymous memory: mapped files are "
    "not counted. Casts are those between float32 and float16 in all models of the case; MB cast is what they read and "
    "write on the longest sample of one row (100 tokens, or one after 99). In float32: nodes that read or give it, but "
    "for casts and constants. Valid: onnx's full checker with strict types, and it runs in ONNX Runtime. The error is "
    "the largest of all outputs on all samples, half precision emulated, as a share of the root mean square in "
    "float32; of a model that does not run because of the shapes that it notes, without them. Answers: how many are "
    "those in float32, as a GPU would compute them; beside them what ONNX Runtime answers on the CPU, which computes "
    "float16 in float32."
)

Row = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Models to convert.

    Args:
        title: What they are.
        folder: Makes them once, and says where they are.
        fixture: The word of a trained fixture, or of a variant of one; it is asked questions too.
    """

    title: str
    folder: Callable[[], Path]
    fixture: str = ""


def published(model_type: str) -> Path:
    """Return the export of a family at its published configuration."""
    folder = CACHE / f"cast-{model_type}"
    if not folder.exists():
        from families import make

        make(model_type, CACHE / model_type)
    return exported(CACHE / model_type, folder)


def trained(name: str) -> Path:
    """Return the export of a trained fixture, or of a variant of the sorter that exceeds float16."""
    folder, source = CACHE / f"cast-{name}", FIXTURES / name
    if not source.exists() and not folder.exists():
        from half_judging import loaded

        source = loaded("make_overflows").make(name, CACHE / "overflows" / name)
    return exported(source, folder)


CASES: Mapping[str, Case] = {
    "gpt2": Case("GPT-2 124M, prefill and decode", lambda: two_decoders("gpt2")),
    "t5-base": Case(
        "T5-base, encoder, prefill and decode", lambda: exported(pretrained_t5_base(), CACHE / "t5-base-two")
    ),
    "llama": Case("Llama architecture, 135M (SmolLM2), prefill and decode", lambda: published("llama")),
    "bert": Case("BERT-base for masked words", lambda: published("bert")),
    "gpt2-large": Case(
        "gpt2-large, prefill, over 2 GB",
        lambda: exported(pretrained_gpt2("gpt2-large"), CACHE / "cast-gpt2-large", "prefill"),
    ),
    "adder": Case("GPT-2 that adds", lambda: trained("adder"), "adder"),
    "sorter": Case("T5 that sorts", lambda: trained("sorter"), "sorter"),
    "reverser": Case("Llama that reverses", lambda: trained("reverser"), "reverser"),
    "comparer": Case("BERT that compares", lambda: trained("comparer"), "comparer"),
    "one_layer": Case("T5 that overflows in one layer", lambda: trained("one_layer"), "one_layer"),
    "several_layers": Case("T5 that overflows in every layer", lambda: trained("several_layers"), "several_layers"),
    "residual": Case("T5 that overflows in its residual stream", lambda: trained("residual"), "residual"),
    "long_only": Case("T5 that overflows from 100 tokens on", lambda: trained("long_only"), "long_only"),
    "cached_step_only": Case(
        "T5 that overflows in cached steps", lambda: trained("cached_step_only"), "cached_step_only"
    ),
}


def main() -> None:
    """Measure and write the tables, or be the process that prepares a case."""
    options = parse()
    if options.prepare:
        prepare(*options.prepare)
        return
    CACHE.mkdir(exist_ok=True)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "cast_fp16.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    for name in options.only:
        entry = known.setdefault(name, {"rows": {}})
        done = () if options.again else tuple(entry["rows"])
        pending = [row for row in options.rows if row not in done]
        if not pending:
            print(f"{name}: measured before; --again measures it again", flush=True)
            continue
        print(f"{name}: {', '.join(pending)} ...", flush=True)
        for row in measure_case(CASES[name], pending, entry, options):
            print(f"  {row}: done", flush=True)
            in_order = without_places({case: known[case] for case in CASES if case in known})
            path.write_text(json.dumps(in_order, indent=1) + "\n")
            (RESULTS / "cast_fp16.md").write_text(page(in_order))
        print(table(name, entry), flush=True)


def without_places(found: Any) -> Any:
    """Return what was found with file names in place of paths in all texts, and these no longer than a paragraph."""
    if isinstance(found, dict):
        return {key: without_places(value) for key, value in found.items()}
    if isinstance(found, list):
        return [without_places(value) for value in found]
    return re.sub(r"(?:/[^\s'\":,]+)+/", "", found)[:MOST_SAID] if isinstance(found, str) else found


def parse() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count, after one warm-up")
    parser.add_argument("--only", nargs="+", default=list(CASES), choices=list(CASES), metavar="CASE")
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=list(ROWS), metavar="ROW")
    parser.add_argument("--peers", help="the Python of an environment with ModelOpt and onnxconverter-common")
    parser.add_argument("--memory", type=float, default=round(total * 0.85, 1), help="GB that a peer may take")
    parser.add_argument("--cpu-seconds", type=int, default=1800, help="that a peer may take")
    parser.add_argument("--quick", action="store_true", help="one round of the sorter")
    parser.add_argument("--again", action="store_true", help="measure again what is in the results already")
    parser.add_argument("--prepare", nargs=2, type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.only, options.again = 1, ["sorter"], True
    if not options.peers:
        options.rows = [row for row in options.rows if row not in OF_THE_PEERS]
    return options


def prepare(source: Path, folder: Path) -> None:
    """Audit a bundle, and write its ranges and samples."""
    from known_ranges import KeepRanges

    from passes.audit_ranges import AuditRanges
    from surgery import Pipeline

    with Pipeline([AuditRanges(), KeepRanges(folder=folder)], check=None).run(source):
        pass


def measure_case(case: Case, pending: Sequence[str], entry: Row, options: argparse.Namespace) -> Iterator[str]:
    """Measure rows of a case in turn, then judge and yield one after the other; what fails is left with its reason."""
    source = case.folder().resolve()
    work = CACHE / "work-cast"
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    samples = work / "samples"
    run([str(HERE / "cast_fp16.py"), "--prepare", str(source), str(samples)], work)
    commands = {row: command(row, source, work, options) for row in pending}
    count, once = (1, ()) if case.fixture else (options.rounds, [row for row in SLOW if row in pending])

    def clear(row: str) -> None:
        print(f"  {row} ...", flush=True)
        shutil.rmtree(work / row, ignore_errors=True)

    results, failed = rounds(commands, cwd=work, count=count, before=clear, once=once)
    entry["bytes"] = sum(path.stat().st_size for path in source.glob("*.onnx*"))
    entry["versions"] = versions(options.peers) or entry.get("versions", "")
    for row in pending:
        if row in failed:
            found: Row = {"failed": failed[row]}
        else:
            found = {"runs": [asdict(each) for each in results[row]]}
            found |= judged(source, work / row, samples, case, work) if row != FLOOR else {}
        rows = {**entry["rows"], row: found}
        entry["rows"] = {known: rows[known] for known in ROWS if known in rows}
        yield row
    shutil.rmtree(work)


def command(row: str, source: Path, work: Path, options: argparse.Namespace) -> Sequence[str]:
    """Return the command of a row, which writes to a folder of its name."""
    target, samples = str(work / row), str(work / "samples")
    if row == CAST:
        return [sys.executable, str(PEERS / "surgery_cast.py"), samples, target, str(source)]
    if row == RECIPE:
        recipe = work / "recipe.yaml"
        recipe.write_text(f"source: {source}\nsteps: {STEPS}\noutput: out\n")
        return [sys.executable, "-m", "surgery", "run", str(recipe), "--out", target]
    python = options.peers if row in OF_THE_PEERS else sys.executable
    limits = [str(PEERS / "limited.py"), str(int(options.memory * 1e9)), str(options.cpu_seconds)]
    files = [str(path) for path in sorted(source.glob("*.onnx"))]
    return [python, *limits, str(PEERS / OTHERS[row]), samples, target, *files]


def judged(source: Path, folder: Path, samples: Path, case: Case, work: Path) -> Row:
    """Return what `half_judging` finds in a result."""
    out = work / "judged.json"
    out.unlink(missing_ok=True)
    fixture = [case.fixture] if case.fixture else []
    try:
        run([str(HERE / "half_judging.py"), str(source), str(folder), str(samples), str(out), *fixture], work)
    except RuntimeError as error:
        return {"unjudged": str(error)}
    found: Row = json.loads(out.read_text())
    return found


def run(script: Sequence[str], work: Path) -> None:
    """Run one of our scripts.

    Raises:
        RuntimeError: It failed; with the last line of what it said.
    """
    done = subprocess.run([sys.executable, *script], cwd=work, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError((done.stderr.strip().splitlines() or [f"it ended with {done.returncode}"])[-1])


def versions(peers: str | None) -> str:
    """Return the versions of what was measured against."""
    code = f"import importlib.metadata as m; print(*(f'{{n}} {{m.version(n)}}' for n in {PACKAGES[-2:]}), sep=', ')"
    here = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    if not peers:
        return f"ONNX Runtime's converter: {here}"
    code = code.replace(str(PACKAGES[-2:]), str(PACKAGES))
    there = subprocess.run([peers, "-c", code], check=True, capture_output=True, text=True).stdout.strip()
    return f"ONNX Runtime's converter: {here}; the others: {there}"


# The tables


def page(known: Mapping[str, Any]) -> str:
    """Return all tables as a page."""
    said = "; ".join(dict.fromkeys(entry["versions"] for entry in known.values() if entry.get("versions")))
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    slow = " and ".join(SLOW)
    header = "# cast_fp16\n\n" + HEADER.format(slow=slow, machine=machine, versions=said)
    return "\n\n".join([header, *(table(name, entry) for name, entry in known.items())]) + "\n"


def table(name: str, entry: Row) -> str:
    """Return one table in Markdown."""
    rows = entry["rows"]
    lines = [
        f"## {name}: {CASES[name].title}",
        "",
        f"{entry['bytes'] / 1e6:.1f} MB in float32.",
        "",
        "| | seconds | CPU s | peak memory MB | casts | MB cast | in float32 | valid | error | answers | on the CPU |",
        "|---|---:|---:|---:|---:|---:|---:|---|---:|---:|---:|",
        *(line(row, rows[row]) for row in rows),
    ]
    notes = [f"- {row}: {text}" for row, facts in rows.items() for text in faults(facts)]
    return "\n".join([*lines, *(["", *notes] if notes else []), *bars(rows)])


def line(row: str, facts: Row) -> str:
    """Return the line of a row."""
    if "failed" in facts:
        return f"| {row} | fails | | | | | | | | | |"
    runs = [Measurement(**each) for each in facts["runs"]]
    seconds, cpu_seconds = median(runs, "seconds"), median(runs, "cpu_seconds")
    spent = f"| {row} | {seconds:.2f} | {cpu_seconds:.2f} | {median(runs, 'peak_anonymous') / 1e6:.0f} |"
    models = facts.get("models")
    if not models:
        return f"{spent} | | | | | | |"
    readable = [model for model in models.values() if "unreadable" not in model]
    sizes = [model.get("bytes_cast", model.get("bytes_cast_without_shapes")) for model in models.values()]
    moved = "-" if None in sizes else f"{sum(sizes) / 1e6:.2f}"
    kept, of = (sum(model[key] for model in readable) for key in ("float32_nodes", "of_nodes"))
    is_valid = all("bytes_cast" in model and not model["invalid"] for model in models.values())
    answers = facts.get("answers")
    same, on_cpu = (
        f"{answers[key] / answers['questions']:.1%}" if answers and key in answers else "" for key in ANSWERS
    )
    return (
        f"{spent} {sum(model['casts'] for model in readable)} | {moved} | {kept} of {of} "
        f"| {'yes' if is_valid else 'no'} | {error(facts)} | {same} | {on_cpu} |"
    )


def error(facts: Row) -> str:
    """Return the largest error of a row, or what is there instead of one."""
    if "gap" not in facts:
        return "-"
    largest = facts["gap"]["max_error"]
    if isinstance(largest, float):
        return f"{largest:.2g}"
    return "NaN" if " is nan" in facts["failure"] else "inf" if " is inf" in facts["failure"] else "wrong"


def faults(facts: Row) -> list[str]:
    """Return what has to be said of a row below the table."""
    found = [f"fails: {facts['failed']}"] if "failed" in facts else []
    for role, model in facts.get("models", {}).items():
        found += [f"{role}: {model[key]}" for key in ("unreadable", "invalid", "does_not_run") if model.get(key)]
    found += [facts[key] for key in ("unjudged", "no_verdict", "unanswered") if key in facts]
    found += facts["failure"].splitlines()[:1] if facts.get("failure") else []
    return list(dict.fromkeys(found))


def bars(rows: Mapping[str, Row]) -> list[str]:
    """Return how our rows compare with what they are measured against."""
    said = []
    for ours, other in ((CAST, ORT), (RECIPE, AUTOCAST)):
        if all("runs" in rows.get(row, {}) for row in (ours, other)):
            first, second = ([Measurement(**each) for each in rows[row]["runs"]] for row in (other, ours))
            said.append(
                f"{other} takes {ratio(first, second, 'seconds'):.1f} times the seconds and "
                f"{ratio(first, second, 'peak_anonymous'):.1f} times the memory of {ours.removeprefix('surgery: ')}."
            )
    return ["", " ".join(said)] if said else []


if __name__ == "__main__":
    main()
