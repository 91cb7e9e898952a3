"""The ledger for people and for programs: a table, and `report.json`."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from io import StringIO
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from surgery.contract import Effect
from surgery.manager import StepRecord
from surgery.units import in_bytes

if TYPE_CHECKING:
    from surgery.pipeline import Result

LIBRARIES = (
    "graph-surgery",
    "onnx",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "polygraphy",
    "torch",
    "transformers",
)


def ledger_table(records: Sequence[StepRecord]) -> Table:
    """Return the ledger as a table of rich."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("#", justify="right")
    table.add_column("step")
    table.add_column("models")
    table.add_column("change", max_width=48)
    for heading in ("gap to step before", "gap to source", "time", "check", "peak memory"):
        table.add_column(heading, justify="right", max_width=11)
    for record in records:
        table.add_row(
            str(record.number),
            record.word,
            ", ".join(record.after.models),
            _change(record),
            *_gaps(record),
            f"{record.seconds:.2f} s",
            f"{record.check_seconds:.2f} s",
            "-" if record.peak_bytes is None else in_bytes(record.peak_bytes),
        )
    return table


def _change(record: StepRecord) -> str:
    if record.is_source:
        is_compared = record.verdict is not None and record.verdict.step is not None
        opened = "exported; its gap is to PyTorch" if is_compared else "as it was given"
        return f"{opened}; {record.change.summary}" if record.change.summary else opened
    asked = f" ({record.judged} verdicts asked)" if record.judged else ""
    return (record.change.summary or "nothing to do") + asked


def _gaps(record: StepRecord) -> tuple[str, str]:
    verdict = record.verdict
    if verdict is None:
        return "not checked", "not checked"
    if record.is_source:
        return str(verdict.step or "-"), "-"
    return str(verdict.step or "-"), str(verdict.source or "-")


def ledger_text(records: Sequence[StepRecord], width: int = 160) -> str:
    """Return the ledger as plain text."""
    stream = StringIO()
    Console(file=stream, width=width, color_system=None).print(ledger_table(records))
    return stream.getvalue()


def coverage_lines(records: Iterable[StepRecord]) -> list[str]:
    """Return for each program on what samples its verdicts rest, said once."""
    lines: dict[str, str] = {}
    for record in records:
        if record.verdict is not None:
            lines.update({name: f"{name}: {coverage}" for name, coverage in record.verdict.coverage.items()})
    return list(lines.values())


def report_json(result: Result) -> str:
    """Return the content of `report.json`."""
    content = {
        "source": result.source,
        "versions": dict(_versions()),
        "check": result.check.model_dump(mode="json") if result.check else None,
        "steps": [_record_json(record) for record in result.records],
        "answers": [{"prompt": answer.prompt, "text": answer.text} for answer in result.answers],
    }
    return json.dumps(content, indent=1) + "\n"


def _versions() -> Iterable[tuple[str, str]]:
    for library in LIBRARIES:
        try:
            yield library, version(library)
        except PackageNotFoundError:
            continue


def _record_json(record: StepRecord) -> dict[str, Any]:
    return {
        "number": record.number,
        "pass": record.word,
        "effect": record.effect.value,
        "tolerance": record.tolerance.model_dump() if record.effect is Effect.CLOSE else None,
        "models": list(record.after.models),
        "changes": record.change.count,
        "summary": record.change.summary,
        "details": list(record.change.details),
        "seconds": round(record.seconds, 4),
        "check_seconds": round(record.check_seconds, 4),
        "peak_bytes": record.peak_bytes,
        "verdicts_asked": record.judged,
        "verdict": record.verdict.as_json() if record.verdict else None,
        "warnings": record.warnings,
    }
