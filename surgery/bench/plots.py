"""Pictures of a bench: of a generation the latency of each token and the time until each, of a single model one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from surgery.bench.cases import BenchResult, Case, RowResult, Timings
from surgery.report.plotting import BLUE, GREEN, ORANGE, SKY, VERMILLION, figure, plain_numbers

COLOURS: Mapping[str, str] = {
    "torch": BLUE,
    "torch-no-cache": SKY,
    "onnx": VERMILLION,
    "onnx-no-cache": ORANGE,
    "numpy": GREEN,
}
_LOG_FROM = 10.0
"""An axis is logarithmic when its values differ by more than this factor."""

_PANEL_WIDTH, _PANEL_HEIGHT, _MOST_COLUMNS = 5.6, 3.8, 3


def draw_bench(bench: BenchResult, folder: Path, kind: str) -> list[Path]:
    """Draw a bench into a folder.

    Args:
        bench: What was measured.
        folder: Where to; made if it is not there.
        kind: `svg` or `png`.

    Returns:
        The files: `latency` and, of a generation, `cumulated`; none if nothing was measured.

    Raises:
        SurgeryError: matplotlib is not installed.
        OutputError: A file cannot be written.
    """
    cases = [case for case in bench.cases if _rows_of(bench, case)]
    if not cases:
        return []
    latency, cumulated = folder / f"latency.{kind}", folder / f"cumulated.{kind}"
    if bench.kind != "generation":
        _draw_bars(bench, cases, latency)
        return [latency]
    _draw_lines(bench, cases, latency, "latency of each token [ms]", lambda timings: _scaled(timings.latencies, 1e3))
    _draw_lines(bench, cases, cumulated, "time until the token is there [s]", lambda timings: timings.reached, _last)
    return [latency, cumulated]


def _rows_of(bench: BenchResult, case: Case) -> list[tuple[RowResult, Timings]]:
    return [(row, row.timings[case]) for row in bench.rows if case in row.timings and row.timings[case].stamps]


def _scaled(values: Sequence[float], factor: float) -> list[float]:
    return [value * factor for value in values]


def _all(heights: Sequence[float]) -> Sequence[float]:
    return heights


def _last(heights: Sequence[float]) -> Sequence[float]:
    return heights[-1:]


def _draw_lines(
    bench: BenchResult,
    cases: Sequence[Case],
    path: Path,
    label: str,
    values: Callable[[Timings], Sequence[float]],
    spread: Callable[[Sequence[float]], Sequence[float]] = _all,
) -> None:
    """Draw a panel for each case, in it a line for each row over the tokens; some values of each choose the axis."""
    columns = min(len(cases), _MOST_COLUMNS)
    lines = -(-len(cases) // columns)
    with figure(path, _PANEL_WIDTH * columns + 0.4, _PANEL_HEIGHT * lines + 0.9) as made:
        made.suptitle(f"{Path(bench.settings.source).name}: {label.partition(' [')[0]}", x=0.01, ha="left")
        for index, case in enumerate(cases):
            axes = made.add_subplot(lines, columns, index + 1)
            drawn = [(row, values(timings)) for row, timings in _rows_of(bench, case)]
            for row, heights in drawn:
                is_plain = row.word.endswith("-no-cache")
                axes.plot(
                    range(1, len(heights) + 1),
                    heights,
                    color=COLOURS[row.word],
                    linestyle=(0, (4, 1.5)) if is_plain else "-",
                    linewidth=1.8,
                    marker="o" if len(heights) <= _FEW else None,
                    markersize=3.5,
                    label=row.name,
                )
            _scale(axes, [height for _, heights in drawn for height in spread(heights)])
            axes.set_title(str(case))
            axes.set_xlabel("token")
            axes.set_ylabel(label)
            axes.set_xlim(left=0)
        _legend_below(made)


_FEW = 24


def _scale(axes: Any, heights: Sequence[float]) -> None:
    """Choose a logarithmic axis where a linear one would flatten the small values, else one from 0 on."""
    if max(heights) > _LOG_FROM * min(heights):
        axes.set_yscale("log")
        plain_numbers(axes.yaxis)
    else:
        axes.set_ylim(bottom=0)


def _legend_below(made: Any) -> None:
    handles: dict[str, Any] = {}
    for axes in made.axes:
        handles |= {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    made.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles))


def _draw_bars(bench: BenchResult, cases: Sequence[Case], path: Path) -> None:
    """Draw a bar for each row in each case, the time written beside it."""
    rows = [row for row in bench.rows if row.timings]
    thickness = 0.8 / len(rows)
    with figure(path, 7.5, 1.6 + 0.35 * len(rows) * len(cases)) as made:
        axes = made.add_subplot()
        for index, row in enumerate(rows):
            found = [(place, row.timings[case]) for place, case in enumerate(cases) if case in row.timings]
            bars = axes.barh(
                [place + (index - (len(rows) - 1) / 2) * thickness for place, _ in found],
                [timings.total * 1e3 for _, timings in found],
                height=thickness * 0.92,
                color=COLOURS[row.word],
                label=row.name,
            )
            axes.bar_label(bars, fmt="%.3g", padding=3, fontsize=9)
        totals = [timings.total for row in rows for timings in row.timings.values()]
        if max(totals) > _LOG_FROM * min(totals):
            axes.set_xscale("log")
            plain_numbers(axes.xaxis)
        axes.set_yticks(range(len(cases)), [str(case) for case in cases])
        axes.invert_yaxis()
        axes.grid(visible=False, axis="y")
        axes.margins(x=0.12)
        axes.set_xlabel("latency of one call [ms]")
        axes.set_title(f"{Path(bench.settings.source).name}: latency")
        _legend_below(made)
