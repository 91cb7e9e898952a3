"""The report of an audit: what each tensor held, by layer, what needs float32 and why, as a table and as `keep:`."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from itertools import groupby
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass
from rich.console import Console, Group, RenderableType
from rich.table import Table
from rich.text import Text

from passes.audit_ranges.keys import key_of_value, scope_name
from passes.audit_ranges.ranges import LARGEST, Range, Ranges
from passes.audit_ranges.reasons import HEADROOM, WORST_ERROR, Case, Reason, error_share, hides, number, reason_of
from surgery.graphs import bodies_of, named_bodies_of
from surgery.report.inspection.layers import layer_of_path, module_of
from surgery.storage import write_file

INPUTS = "inputs"
NO_LAYER = "outside of layers"
MOST_IN_SUMMARY = 12

_PLAIN_YAML = re.compile(r"[A-Za-z_/][\w./-]*")
_YAML_WORDS = frozenset({"true", "false", "null"})


@dataclass(frozen=True)
class Measured:
    """A tensor of a model with what it held.

    Args:
        role: The model.
        key: The tensor, as in `Ranges`.
        layer: Where it is: the path of a layer, in a body after the names of what is around it.
        range: What it held.
        node: What makes it; None of an input.
        uses: The nodes that read it, each with the number of its input.
        reason: Why it needs float32.
    """

    role: str
    key: str
    layer: str
    range: Range
    node: ir.Node | None = None
    uses: Sequence[tuple[ir.Node, int]] = ()
    reason: Reason | None = None

    @property
    def operator(self) -> str:
        """The operator that makes it."""
        if self.node is None:
            return "input"
        return f"{self.node.domain}.{self.node.op_type}" if self.node.domain else self.node.op_type

    @property
    def name(self) -> str:
        """The node that makes it, or the tensor where that has no name."""
        return (self.node.name if self.node is not None else "") or self.key

    @property
    def not_finite(self) -> int:
        """How many numbers were infinite, or none at all, in float32 itself."""
        return self.range.infinite + self.range.nan

    @property
    def is_meant_infinite(self) -> bool:
        """Its infinite numbers come of a mask, or of nothing but positions and constants."""
        return self.range.kind != "activation" or hides(self.range)

    @property
    def is_hiding(self) -> bool:
        """Its large numbers are there to hide others."""
        return hides(self.range) and self.range.low < -LARGEST


@dataclass(frozen=True)
class Found:
    """What an audit found of one model.

    Args:
        role: The model.
        samples: How many samples were run.
        tensors: In the order in which they are computed; those of a body before what its node gives.
        unseen: Those that were never computed.
    """

    role: str
    samples: int
    tensors: tuple[Measured, ...]
    unseen: tuple[str, ...] = ()

    @property
    def troubled(self) -> tuple[Measured, ...]:
        """Those that need float32, the worst first."""
        return tuple(sorted((one for one in self.tensors if one.reason is not None), key=_severity))

    @property
    def not_finite(self) -> tuple[Measured, ...]:
        """Those that were not finite in float32 itself; what a mask makes infinite is meant."""
        return tuple(one for one in self.tensors if one.range.nan or (one.range.infinite and not one.is_meant_infinite))

    @property
    def layers(self) -> dict[str, list[Measured]]:
        """The tensors by layer, in the order in which layers begin."""
        layers: dict[str, list[Measured]] = {}
        for one in self.tensors:
            layers.setdefault(one.layer, []).append(one)
        return layers


_RULES_BY_WEIGHT = ("overflow", "broken", "vanishing divisor", "inexact count", "own error")


def _severity(one: Measured) -> tuple[int, float, str]:
    assert one.reason is not None
    return _RULES_BY_WEIGHT.index(one.reason.rule), -one.reason.amount, one.key


def findings(
    models: Mapping[str, ir.Model],
    ranges: Mapping[str, Ranges],
    *,
    headroom: float = HEADROOM,
    worst_error: float = WORST_ERROR,
) -> tuple[Found, ...]:
    """Return what audits found, model by model.

    Args:
        models: The models by role.
        ranges: What was measured of them; a role without is left out.
        headroom: The share of 65,504 that a tensor may peak at.
        worst_error: The share of a result's root mean square that half precision alone may move it by.
    """
    return tuple(
        Found(
            role,
            ranges[role].samples,
            tuple(_measured(role, models[role], ranges[role], headroom, worst_error)),
            ranges[role].unseen,
        )
        for role in models
        if role in ranges
    )


def _measured(role: str, model: ir.Model, ranges: Ranges, headroom: float, worst_error: float) -> Iterator[Measured]:
    left = dict(ranges.values)
    for key, value, layer in _places(model):
        range_ = left.pop(key, None)
        if range_ is None:
            continue
        uses = tuple((use.node, use.idx) for use in value.uses())
        reason = reason_of(Case(range_, uses, headroom, worst_error))
        yield Measured(role, key, layer, range_, value.producer(), uses, reason)
    for key, range_ in left.items():
        yield Measured(role, key, NO_LAYER, range_, reason=reason_of(Case(range_, (), headroom, worst_error)))


def _places(model: ir.Model) -> Iterator[tuple[str, ir.Value, str]]:
    """Yield the key, the value and the layer of all that can have been measured."""
    if model.functions:
        model = model.clone()
        InlinePass()(model)
    for value in model.graph.inputs:
        yield key_of_value(value, ""), value, INPUTS
    yield from _places_in(model.graph, "")


def _places_in(graph: ir.Graph, path: str) -> Iterator[tuple[str, ir.Value, str]]:
    for node in graph:
        for name, body in named_bodies_of(node):
            yield from _places_in(body, f"{path}{scope_name(node, name)}/")
        layer = _layer_of(node)
        for value in node.outputs:
            if value.name:
                yield key_of_value(value, path), value, f"{path}{layer}"


def _layer_of(node: ir.Node) -> str:
    module = module_of(node)
    return layer_of_path(module) if module else NO_LAYER


# As `keep:`


@dataclass(frozen=True)
class Kept:
    """A node to keep in float32.

    Args:
        entry: As `keep` takes it: the node's name, or that of a value that it gives, escaped where it is a pattern.
        layer: Where it is.
        reasons: Why, by role.
    """

    entry: str
    layer: str
    reasons: dict[str, Reason] = field(default_factory=dict)

    @property
    def comment(self) -> str:
        """The reasons in one line; of models with the same one, that of the model where it is worst."""
        by_rule: dict[str, list[str]] = {}
        for role, reason in self.reasons.items():
            by_rule.setdefault(reason.rule, []).append(role)
        return "; ".join(
            f"{', '.join(roles)}: {max((self.reasons[role] for role in roles), key=lambda one: one.amount).text}"
            for roles in by_rule.values()
        )


def kept(found: Iterable[Found]) -> list[Kept]:
    """Return the nodes to keep in float32, in order: what makes a tensor that needs it, and what must read it there."""
    entries: dict[str, Kept] = {}
    for model in found:
        layers = {one.node: one.layer for one in model.tensors if one.node is not None}
        reasons: dict[ir.Node, Reason] = {}
        for one in model.tensors:
            if one.reason is not None and one.node is not None:
                reasons[one.node] = one.reason  # before that of a reader
            if one.reason is not None and one.reason.is_for_readers:
                for node, _ in one.uses:
                    layers.setdefault(node, one.layer)
                    reasons.setdefault(node, Reason("reads", f"reads {one.name}", 0))
        for node in (node for node in layers if node in reasons and _reads_numbers(node)):
            entry = re.sub(r"([*?[])", r"[\1]", node.name or node.outputs[0].name or "")
            entries.setdefault(entry, Kept(entry, layers[node])).reasons[model.role] = reasons[node]
    return list(entries.values())


def _reads_numbers(node: ir.Node) -> bool:
    """It looks at the numbers of what it is given; of a node with bodies those in them do."""
    return not bodies_of(node) and (bool(node.domain) or node.op_type not in ("Shape", "Size"))


def keep_yaml(found: Sequence[Found]) -> str:
    """Return lines for a recipe's step `cast_fp16`: `keep:` with a node a line, its reason behind, layer by layer."""
    entries = kept(found)
    if not entries:
        return "keep: []\n"
    lines = ["keep:"]
    for layer, nodes in groupby(_by_layer(entries), key=lambda one: one.layer):
        lines.append(f"  # {layer}")
        lines += [f"  - {_scalar(one.entry)}  # {one.comment}" for one in nodes]
    return "\n".join(lines) + "\n"


def _by_layer(entries: Sequence[Kept]) -> list[Kept]:
    order = {layer: index for index, layer in reversed(list(enumerate(one.layer for one in entries)))}
    return sorted(entries, key=lambda one: order[one.layer])


def _scalar(text: str) -> str:
    """Return a YAML string, in quotes where it needs them."""
    if _PLAIN_YAML.fullmatch(text) and text.lower() not in _YAML_WORDS:
        return text
    quoted = text.replace("\\", "\\\\").replace('"', '\\"')
    return f'"{quoted}"'


# As text


def summary(found: Sequence[Found]) -> RenderableType:
    """Return a few lines and a table for each model, to be read in 120 columns."""
    parts: list[RenderableType] = []
    for model in found:
        if parts:
            parts.append(Text(""))
        parts.append(Text(f"{model.role}: {headline(model)}", style="bold"))
        worst = model.troubled[:MOST_IN_SUMMARY]
        if worst:
            parts.append(_table(worst))
        if len(model.troubled) > len(worst):
            parts.append(Text(f"... and {len(model.troubled) - len(worst):,} more"))
    return Group(*parts)


def headline(model: Found) -> str:
    """Say in one sentence what there is of a model."""
    if not model.tensors and not model.unseen:
        return "nothing is float32"
    sentence = f"{_count(len(model.tensors), 'tensor')} on {_count(model.samples, 'sample')}"
    counts = dict.fromkeys(_RULES_BY_WEIGHT, 0)
    for one in model.troubled:
        assert one.reason is not None
        counts[one.reason.rule] += 1
    said = {
        "overflow": "too large",
        "broken": "made infinite",
        "vanishing divisor": "too small for what reads them",
        "inexact count": "counted beyond 2,048",
        "own error": "inaccurate",
    }
    troubles = [f"{count:,} {said[rule]}" for rule, count in counts.items() if count]
    if model.not_finite:
        troubles.append(f"{len(model.not_finite):,} not finite in float32")
    unseen = f"; {len(model.unseen):,} never computed" if model.unseen else ""
    return f"{sentence}; {', '.join(troubles) or 'all fit float16'}{unseen}"


def summary_text(found: Sequence[Found], width: int = 120) -> str:
    """Return the summary as plain text."""
    stream = StringIO()
    Console(file=stream, width=width, color_system=None).print(summary(found))
    return "\n".join(line.rstrip() for line in stream.getvalue().splitlines()) + "\n"


def _table(rows: Sequence[Measured]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("node", overflow="fold")
    table.add_column("operator")
    for heading in ("peak", "smallest", "error"):
        table.add_column(heading, justify="right")
    table.add_column("why float32", max_width=30)
    for one in rows:
        assert one.reason is not None
        share = error_share(one.range)
        table.add_row(
            Text(one.name),
            one.operator,
            number(one.range.peak),
            "-" if one.range.smallest is None else number(one.range.smallest),
            "-" if share is None else f"{share:.1%}",
            Text(one.reason.text),
        )
    return table


def _count(many: int, what: str) -> str:
    return f"{many:,} {what}{'' if many == 1 else 's'}"


# As files


def write_reports(
    files: Sequence[Path], models: Mapping[str, ir.Model], ranges: Mapping[str, Ranges], name: str
) -> None:
    """Write what was found of some models: a page (.html), a table (.txt), lines for `keep:` (.yaml).

    Args:
        files: Where; each is written whole or not at all, and what was there is replaced.
        models: The models by role.
        ranges: What was measured of them.
        name: What the models are called together.

    Raises:
        OutputError: A file cannot be written.
    """
    from passes.audit_ranges.page import page

    found = findings(models, ranges)
    writers: Mapping[str, Callable[[], str]] = {
        ".html": lambda: page(found, name),
        ".txt": lambda: summary_text(found),
        ".yaml": lambda: keep_yaml(found),
    }
    for file in files:
        write_file(file, writers[file.suffix]().encode())
