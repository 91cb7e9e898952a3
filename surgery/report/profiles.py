"""A profile as tables with bars, as a picture, and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from surgery.report.plotting import BLUE, GREY, VERMILLION, figure
from surgery.runtime.profiling import NodeTime, Profile

if TYPE_CHECKING:
    from rich.table import Table

BETWEEN = "(between nodes)"
_BAR_WIDTH = 16
_MEASURES = ("calls a run", "ms a run", "µs a call", "share")
_NODE_MEASURES = ("calls a run", "ms a run", "µs: mean", "median", "share")
_EIGHTHS = " ▏▎▍▌▋▊▉█"
_MOST_ORIGINALS = 3


@dataclass(frozen=True)
class ProfiledModel:
    """A profile and what it is of.

    Args:
        name: The bundle or file.
        role: The model's.
        fed: What it was fed.
        level: How far ONNX Runtime might rewrite the graph.
        threads: Threads within an operator, 0 for as many as there are cores.
        providers: Where it ran.
        profile: Where the time went.
    """

    name: str
    role: str
    fed: str
    level: str
    threads: int
    providers: tuple[str, ...]
    profile: Profile

    @property
    def heading(self) -> str:
        """What it is of, in a line."""
        runs = len(self.profile.runs)
        mean = self.profile.seconds / runs
        return f"{self.name}, {self.role!r}: {self.fed}; {mean * 1e3:.3g} ms a run, mean of {runs} with the profiler on"


def profile_tables(profiled: ProfiledModel, top: int) -> Iterator[Table]:
    """Yield the operators and the nodes that took most, with their share of all runs."""
    from rich.table import Table

    profile = profiled.profile
    runs = len(profile.runs)
    operators = Table(title="by operator", title_justify="left", title_style="bold", box=None, pad_edge=False)
    operators.add_column("operator")
    for heading in ("nodes", *_MEASURES):
        operators.add_column(heading, justify="right")
    operators.add_column("")
    summed = [(one.operator, str(one.nodes), one.calls, one.seconds) for one in profile.operators[:top]]
    for word, nodes, calls, seconds in [*summed, *_rest_of_operators(profile, top)]:
        operators.add_row(word, nodes, *_cells(profile, runs, calls, seconds))
    yield operators
    nodes_table = Table(title="by node", title_justify="left", title_style="bold", box=None, pad_edge=False)
    nodes_table.add_column("node", overflow="fold")
    nodes_table.add_column("operator")
    has_places = any(node.place for node in profile.nodes[:top])
    if has_places:
        nodes_table.add_column("in", overflow="fold")
    for heading in _NODE_MEASURES:
        nodes_table.add_column(heading, justify="right")
    nodes_table.add_column("")
    for node in profile.nodes[:top]:
        place = [node.place] if has_places else []
        called, spent, mean, *share = _cells(profile, runs, node.calls, node.seconds)
        median = f"{node.median_seconds * 1e6:,.1f}"
        nodes_table.add_row(_said(node), node.operator, *place, called, spent, mean, median, *share)
    yield nodes_table


def _rest_of_operators(profile: Profile, top: int) -> Iterator[tuple[str, str, int, float]]:
    rest = profile.operators[top:]
    if rest:
        nodes = sum(one.nodes for one in rest)
        calls, seconds = sum(one.calls for one in rest), sum(one.seconds for one in rest)
        yield f"({len(rest)} more)", str(nodes), calls, seconds
    yield BETWEEN, "", 0, profile.between_seconds


def _cells(profile: Profile, runs: int, calls: int, seconds: float) -> Iterator[str]:
    share = seconds / profile.seconds
    yield f"{calls / runs:g}" if calls else ""
    yield f"{seconds / runs * 1e3:.3f}"
    yield f"{seconds / calls * 1e6:,.1f}" if calls else ""
    yield f"{share:.1%}"
    yield bar(share)


def bar(share: float) -> str:
    """Return a bar of text for a share of 1."""
    eighths = round(min(max(share, 0.0), 1.0) * _BAR_WIDTH * 8)
    return _EIGHTHS[8] * (eighths // 8) + _EIGHTHS[eighths % 8].strip()


def _said(node: NodeTime) -> str:
    """Return a node's name, and those of the nodes that it replaces."""
    if not node.originals:
        return node.name
    first, last = min(node.originals), max(node.originals)
    shared = first[: next((i for i, pair in enumerate(zip(first, last, strict=False)) if len(set(pair)) > 1), 0)]
    stem = shared[: max(shared.rfind("/"), shared.rfind(".")) + 1]
    more = len(node.originals) - _MOST_ORIGINALS
    listed = ", ".join(name.removeprefix(stem) for name in node.originals[:_MOST_ORIGINALS])
    listed += f" and {more} more" if more > 0 else ""
    return f"{node.name} for {stem}{{{listed}}}"


def profile_notes(profiled: ProfiledModel) -> Iterator[str]:
    """Yield what has to be known to read the numbers."""
    profile = profiled.profile
    yield (
        "a node's time is its own, without that of its subgraphs; what passes between the nodes is the runtime's work "
        "and the profiler's"
    )
    elsewhere = sorted({node.provider for node in profile.nodes} - {"CPUExecutionProvider", ""})
    if elsewhere:
        yield f"of nodes on {', '.join(elsewhere)} this is the time to launch them, not that of the device"


def profile_json(profiled: ProfiledModel) -> str:
    """Return everything that was measured; times are seconds of all runs together."""
    profile = profiled.profile
    content: dict[str, Any] = {
        "name": profiled.name,
        "role": profiled.role,
        "fed": profiled.fed,
        "level": profiled.level,
        "threads": profiled.threads,
        "providers": list(profiled.providers),
        "runs": list(profile.runs),
        "seconds": profile.seconds,
        "between_seconds": profile.between_seconds,
        "operators": [{**asdict(one), "share": one.seconds / profile.seconds} for one in profile.operators],
        "nodes": [{**asdict(node), "share": node.seconds / profile.seconds} for node in profile.nodes],
    }
    return json.dumps(content, indent=1) + "\n"


def draw_profile(profiled: ProfiledModel, path: Path, top: int) -> None:
    """Draw the operators and the nodes that took most as bars.

    Args:
        profiled: What was measured.
        path: A .svg or .png file.
        top: How many bars of each.

    Raises:
        SurgeryError: matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    profile = profiled.profile
    runs = len(profile.runs)
    operators = [(one.operator, one.seconds) for one in profile.operators[:top]]
    rest = sum(one.seconds for one in profile.operators[top:])
    others = [(f"{len(profile.operators) - top} more", rest)] if rest else []
    others.append((BETWEEN, profile.between_seconds))
    nodes = [(_label(node), node.seconds) for node in profile.nodes[:top]]
    with figure(path, 13, 1.6 + 0.3 * max(len(operators) + len(others), len(nodes))) as made:
        made.suptitle(profiled.heading, x=0.01, ha="left", fontsize=11)
        left, right = made.subplots(1, 2, width_ratios=(1, 1.15))
        colours = [BLUE] * len(operators) + [GREY] * len(others)
        _bars(left, [*operators, *others], colours, profile.seconds, runs, "by operator")
        _bars(right, nodes, [VERMILLION] * len(nodes), profile.seconds, runs, "by node")


_NAME_LETTERS = 44


def _label(node: NodeTime) -> str:
    """Return a node's name, its operator too where the name does not say it."""
    name = node.name if len(node.name) <= _NAME_LETTERS else f"…{node.name[-_NAME_LETTERS + 1 :]}"
    return name if node.operator in node.name else f"{name}: {node.operator}"


def _bars(
    axes: Any, rows: Sequence[tuple[str, float]], colours: Sequence[str], total: float, runs: int, title: str
) -> None:
    places = range(len(rows))
    drawn = axes.barh(places, [seconds / runs * 1e3 for _, seconds in rows], color=colours, height=0.75)
    axes.bar_label(drawn, labels=[f"{seconds / total:.1%}" for _, seconds in rows], padding=3, fontsize=9)
    axes.set_yticks(places, [name for name, _ in rows], fontsize=9)
    axes.invert_yaxis()
    axes.grid(visible=False, axis="y")
    axes.margins(x=0.15, y=0.02)
    axes.set_xlim(left=0)
    axes.set_title(title)
    axes.set_xlabel("ms a run; share of the whole run beside the bar")
