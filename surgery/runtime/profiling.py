"""Where the time of a model goes: ONNX Runtime's own profile, summed by node and by operator.

The runtime writes an event for each node that ran, in the order in which they ended, those of subgraphs too. An event
of a node with subgraphs contains theirs, each run of a subgraph enclosed in one called `SequentialExecutor::Execute`
(seen in ONNX Runtime 1.31, `core/framework/sequential_executor.cc`). Here each node is given its own time, without that
of its subgraphs, so that the sum over all nodes counts nothing twice.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import onnx_ir as ir

from surgery.errors import RecipeError, SurgeryError
from surgery.graphs import named_bodies_of
from surgery.options import did_you_mean
from surgery.runtime.sessions import open_fast_session, runtime

if TYPE_CHECKING:
    import onnxruntime

Level = Literal["none", "basic", "extended", "layout", "all"]

LEVELS: Mapping[Level, str] = {
    "none": "ORT_DISABLE_ALL",
    "basic": "ORT_ENABLE_BASIC",
    "extended": "ORT_ENABLE_EXTENDED",
    "layout": "ORT_ENABLE_LAYOUT",
    "all": "ORT_ENABLE_ALL",
}
MOST_EVENTS = 1_000_000
"""ONNX Runtime's profiler stops recording here (`core/common/profiler.h`: `max_num_events_`)."""

_MOST_ORIGINALS = 32
_REWRITTEN, _WEIGHTS = "rewritten.onnx", "weights"
_KERNEL = "_kernel_time"
_EXECUTOR = "SequentialExecutor::Execute"
_RUN = "model_run"


@dataclass(frozen=True)
class NodeTime:
    """What one node took in all runs together.

    Args:
        name: As the runtime calls it; of a node without a name its operator and index.
        operator: As the runtime calls it.
        place: The subgraph that holds it, `decoder/If.then_branch`, or only the node that has it, if that is not
            known; empty for the main graph.
        provider: Where it ran.
        calls: How many times it ran.
        seconds: Its own time: that of its subgraphs is theirs.
        inclusive_seconds: With its subgraphs.
        median_seconds: The median of its own time in a call: what one disturbed call does not move.
        originals: The nodes of the model whose work it does, if it is none of them.
    """

    name: str
    operator: str
    place: str
    provider: str
    calls: int
    seconds: float
    inclusive_seconds: float
    median_seconds: float
    originals: tuple[str, ...] = ()


@dataclass(frozen=True)
class OperatorTime:
    """What all nodes of one operator took in all runs together; of these nodes only their own time."""

    operator: str
    nodes: int
    calls: int
    seconds: float


@dataclass(frozen=True)
class Profile:
    """Where the time went.

    Args:
        runs: The seconds that each run took, by the clock of the profile.
        nodes: Every node that ran, the longest first.
    """

    runs: tuple[float, ...]
    nodes: tuple[NodeTime, ...]

    @property
    def seconds(self) -> float:
        """All runs together."""
        return sum(self.runs)

    @property
    def between_seconds(self) -> float:
        """What passed between the nodes: choosing the next one, making outputs, and writing the profile itself."""
        return self.seconds - sum(node.seconds for node in self.nodes)

    @property
    def operators(self) -> tuple[OperatorTime, ...]:
        """The time by operator, the longest first."""
        groups: dict[str, list[NodeTime]] = defaultdict(list)
        for node in self.nodes:
            groups[node.operator].append(node)
        summed = [
            OperatorTime(word, len(nodes), sum(node.calls for node in nodes), sum(node.seconds for node in nodes))
            for word, nodes in groups.items()
        ]
        return tuple(sorted(summed, key=lambda one: (-one.seconds, one.operator)))


def profile_model(
    model: ir.Model,
    feeds: Mapping[str, np.ndarray],
    *,
    runs: int = 10,
    warmup: int = 3,
    level: Level = "all",
    threads: int = 0,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Profile:
    """Run a model and say where its time goes.

    Args:
        model: Any model; it stays as it is.
        feeds: An array for each input, by name.
        runs: How many runs count.
        warmup: How many runs before them do not.
        level: How far ONNX Runtime may rewrite the graph.
        threads: Threads within an operator; 0 for as many as there are cores.
        providers: Where to run, by preference.

    Raises:
        ModelFileError: ONNX Runtime does not take the model.
        SurgeryError: It cannot run it on these feeds, or there were more events than it records.
    """
    with tempfile.TemporaryDirectory(prefix="surgery-profile-") as scratch:
        folder = Path(scratch)
        session = open_fast_session(
            model,
            threads=threads,
            providers=providers,
            configure=lambda options: _record(options, folder, level),
        )
        try:
            for _ in range(warmup + runs):
                session.run(None, dict(feeds))
        except Exception as error:
            raise SurgeryError(f"ONNX Runtime cannot run the model: {error}") from error
        finally:
            written = Path(session.end_profiling())
        events = json.loads(written.read_text(encoding="utf-8"))
        rewritten = folder / _REWRITTEN
        after = ir.load(rewritten).graph if rewritten.is_file() else None
        return sum_events(events, warmup=warmup, layout=Layout.of(model.graph, after))


def checked_level(word: str) -> Level:
    """Return a level by its word.

    Raises:
        RecipeError: There is none of that name.
    """
    for level in LEVELS:
        if level == word:
            return level
    raise RecipeError(f"there is no level {word!r}{did_you_mean(word, LEVELS)}", hint=f"--level {', '.join(LEVELS)}")


def _record(options: onnxruntime.SessionOptions, folder: Path, level: Level) -> None:
    """Set what makes a session write its profile and the graph that it runs."""
    options.graph_optimization_level = getattr(runtime().GraphOptimizationLevel, LEVELS[level])
    options.enable_profiling = True
    options.profile_file_prefix = str(folder / "profile")
    if os.name != "posix":
        return
    # The graph is wanted, its weights are not: they go where nothing is kept.
    (folder / _WEIGHTS).symlink_to(os.devnull)
    options.optimized_model_filepath = str(folder / _REWRITTEN)
    options.add_session_config_entry("session.optimized_model_external_initializers_file_name", _WEIGHTS)
    options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")


@dataclass
class _Span:
    """An event with the runs of subgraphs, or the nodes, that it contains; times in microseconds."""

    name: str
    start: int
    length: int
    arguments: Mapping[str, Any]
    inner: list[_Span] = field(default_factory=list)


def sum_events(events: Sequence[Mapping[str, Any]], *, warmup: int = 0, layout: Layout | None = None) -> Profile:
    """Sum the events of a profile.

    Args:
        events: What ONNX Runtime wrote.
        warmup: Leave out so many runs at the start.
        layout: Which nodes stand in which subgraph, and which of the model's they replace.

    Raises:
        SurgeryError: There are so many events that ONNX Runtime did not record them all, or no run is left.
    """
    if len(events) >= MOST_EVENTS:
        raise SurgeryError(f"the profile has more than the {MOST_EVENTS:,} events that are recorded", hint="fewer runs")
    runs = _runs_in(events)[warmup:]
    if not runs:
        raise SurgeryError("the profile holds no run that counts")
    layout = layout if layout is not None else Layout()
    calls: dict[tuple[str, str, str, str], list[_Span]] = defaultdict(list)
    for span, place in (found for run in runs for found in _nodes_in(run, "", layout)):
        key = place, span.name, str(span.arguments.get("op_name", "")), str(span.arguments.get("node_index", ""))
        calls[key].append(span)
    nodes = [
        _summed(spans, place, layout.originals.get((place, spans[0].name), ())) for (place, *_), spans in calls.items()
    ]
    nodes.sort(key=lambda node: (-node.seconds, node.place, node.name))
    return Profile(tuple(run.length / 1e6 for run in runs), tuple(nodes))


def _summed(spans: Sequence[_Span], place: str, originals: tuple[str, ...]) -> NodeTime:
    """Return what the calls of a node took."""
    own = [span.length - sum(inner.length for inner in span.inner) for span in spans]
    arguments = spans[0].arguments
    return NodeTime(
        name=spans[0].name,
        operator=str(arguments.get("op_name", "")),
        place=place,
        provider=str(arguments.get("provider", "")),
        calls=len(spans),
        seconds=sum(own) / 1e6,
        inclusive_seconds=sum(span.length for span in spans) / 1e6,
        median_seconds=statistics.median(own) / 1e6,
        originals=originals,
    )


def _runs_in(events: Sequence[Mapping[str, Any]]) -> list[_Span]:
    """Return the runs, each with what it contains; an event comes after those that it contains."""
    open_spans: list[_Span] = []
    runs: list[_Span] = []
    for event in events:
        span = _Span(str(event.get("name", "")), int(event["ts"]), int(event["dur"]), event.get("args", {}))
        is_node = event.get("cat") == "Node" and span.name.endswith(_KERNEL)
        if is_node:
            span.name = span.name.removesuffix(_KERNEL)
            span.inner = _taken(open_spans, span.start, is_executor=True)
            open_spans.append(span)
        elif span.name == _EXECUTOR:
            span.inner = _taken(open_spans, span.start, is_executor=False)
            open_spans.append(span)
        elif span.name == _RUN:
            span.inner = _taken(open_spans, span.start, is_executor=True)
            runs.append(span)
            open_spans.clear()
    return runs


def _taken(spans: list[_Span], start: int, *, is_executor: bool) -> list[_Span]:
    """Take the last spans that began at a time or later, in their order: runs of subgraphs, or nodes."""
    first = len(spans)
    while first and spans[first - 1].start >= start and (spans[first - 1].name == _EXECUTOR) == is_executor:
        first -= 1
    found = spans[first:]
    del spans[first:]
    return found


def _nodes_in(span: _Span, place: str, layout: Layout) -> Iterator[tuple[_Span, str]]:
    """Yield the nodes that a run or a node contains, with the subgraph that holds each."""
    for executor in span.inner:
        inside = layout.place_of(executor, span.name, place) if span.name != _RUN else ""
        for node in executor.inner:
            yield node, inside
            yield from _nodes_in(node, inside, layout)


@dataclass(frozen=True)
class Layout:
    """Which nodes stand in which subgraph of the graph that runs, and which nodes of the model they replace.

    Args:
        places: For each subgraph by its place the names of its nodes.
        originals: By place and name of a node that the model does not have, the nodes of the model that it replaces.
    """

    places: Mapping[str, frozenset[str]] = field(default_factory=dict)
    originals: Mapping[tuple[str, str], tuple[str, ...]] = field(default_factory=dict)

    @classmethod
    def of(cls, before: ir.Graph, after: ir.Graph | None) -> Layout:
        """Compare the model's graph with the one that runs; None if that one is not known."""
        places: dict[str, frozenset[str]] = {}
        originals: dict[tuple[str, str], tuple[str, ...]] = {}
        model = dict(_graphs_by_place(before))
        for place, graph in _graphs_by_place(after if after is not None else before):
            places[place] = frozenset(node.name or "" for node in graph)
            known = model.get(place)
            if after is not None and known is not None:
                originals |= {(place, name): nodes for name, nodes in _replaced(known, graph)}
        return cls(places, originals)

    def place_of(self, executor: _Span, owner: str, outer: str) -> str:
        """Return the subgraph of a node that was run: of its subgraphs the one that holds most of what ran."""
        prefix = _place(outer, owner, "")
        inside = [place for place in self.places if place.startswith(prefix) and _SEPARATOR not in place[len(prefix) :]]
        ran = Counter(node.name for node in executor.inner)
        return max(
            inside, key=lambda place: sum(ran[name] for name in self.places[place]), default=prefix.removesuffix(".")
        )


_SEPARATOR = " > "


def _place(outer: str, owner: str, attribute: str) -> str:
    return f"{outer}{_SEPARATOR}{owner}.{attribute}" if outer else f"{owner}.{attribute}"


def _graphs_by_place(graph: ir.Graph, place: str = "") -> Iterator[tuple[str, ir.Graph]]:
    yield place, graph
    for node in graph:
        for name, body in named_bodies_of(node):
            yield from _graphs_by_place(body, _place(place, node.name or "", name))


def _replaced(before: ir.Graph, after: ir.Graph) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield each node that is new, with the old ones between its inputs and its outputs, by the names of values."""
    kinds = {node.name: node.op_type for node in before}
    producers: dict[str | None, ir.Node] = {value.name: node for node in before for value in node.outputs if value.name}
    order = {node: index for index, node in enumerate(before)}
    for node in after:
        if kinds.get(node.name) == node.op_type:
            continue
        stops = {value.name for value in node.inputs if value is not None}
        found = _between([value.name for value in node.outputs], stops, producers)
        working = [old for old in sorted(found, key=order.__getitem__) if old.op_type != "Constant"]
        names = tuple(old.name or old.op_type for old in working)
        if names and names != (node.name,):
            yield node.name or "", names


def _between(
    outputs: Iterable[str | None], stops: set[str | None], producers: Mapping[str | None, ir.Node]
) -> set[ir.Node]:
    """Return the nodes from which outputs come, back to the values to stop at; nothing if that leads too far."""
    found: set[ir.Node] = set()
    frontier = list(outputs)
    while frontier:
        name = frontier.pop()
        node = producers.get(name)
        if name in stops or node is None or node in found:
            continue
        found.add(node)
        if len(found) > _MOST_ORIGINALS:
            return set()
        frontier.extend(value.name for value in node.inputs if value is not None)
    return found


__all__ = [
    "LEVELS",
    "Layout",
    "Level",
    "NodeTime",
    "OperatorTime",
    "Profile",
    "checked_level",
    "profile_model",
    "sum_events",
]
