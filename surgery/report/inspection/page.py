"""An inspection as text: one page for each model, and what its weights share."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from surgery.bundle import ROLES
from surgery.report.inspection.found import (
    Body,
    CacheKind,
    Copies,
    Dimension,
    FileUse,
    Finding,
    FoundModel,
    Inspection,
    Member,
    Port,
    Runtime,
    Tally,
    Transposed,
)
from surgery.units import in_bytes

MOST_PAGES = 4
"""Of more models than this only the overview is printed."""

_MOST_ROWS = 8
_ALIKE = 3
_ROOM_FOR_ALIGNMENT = 1 << 20
_OPERATOR_COLUMNS = 4
_PROOFS = {
    "same bytes on disk": "the same bytes on disk",
    "every byte compared": "every byte compared",
    "sampled": "likely, by samples; --weights compares every byte",
}


def print_inspection(console: Console, found: Inspection) -> None:
    """Print an inspection, to be read in 120 columns."""
    if len(found.models) > 1:
        console.print(_overview(found))
        console.print(_line(f"\n{_limits(found.runtime)}"))
    if len(found.models) <= MOST_PAGES:
        for model in found.models:
            if len(found.models) > 1:
                console.print()
            for part in _page(model, found.runtime, is_alone=len(found.models) == 1):
                console.print(part)
    else:
        for model in found.models:
            if model.findings:
                console.print(_line(f"\n{model.name}"))
                console.print(_findings(model.findings))
        console.print(_line("\ninspect a single file for its page"))
    if found.unreadable:
        console.print()
        console.print(_findings(found.unreadable, "what cannot be read"))
    for part in _sharing(found):
        console.print(part)


def _overview(found: Inspection) -> Table:
    table = _table(
        "model", "role", "nodes >", "parameters >", "weights >", "casts >", "wrong >", _name_of(found.runtime)
    )
    for model in found.models:
        table.add_row(
            model.name,
            _role(model),
            f"{sum(body.nodes for body in model.bodies):,}",
            f"{model.weights.parameters:,}",
            in_bytes(model.weights.bytes),
            f"{sum(cast.count for cast in model.casts):,}",
            str(len(model.findings) or "-"),
            _taken(model),
        )
    return table


def _page(model: FoundModel, runtime: Runtime | None, *, is_alone: bool) -> Iterator[RenderableType]:
    yield Text(model.name, style="bold")
    rows = Table.grid(padding=(0, 2))
    rows.add_column(width=9)
    rows.add_column()
    for label, text in _summary(model, runtime, is_alone=is_alone):
        rows.add_row(label, Text(text))
    yield Padding(rows, (0, 0, 0, 2))
    if model.findings:
        yield _findings(model.findings)
    yield _under("inputs and outputs", _ports(model))
    yield _under("operators", _operators(model))
    if sum(body.depth > 0 or body.is_function for body in model.bodies):
        yield _under("graphs inside", _bodies(model.bodies))
    if model.casts:
        yield _under("casts", _casts(model))
    if model.by_layer:
        yield _under("weights by layer", _layers(model.by_layer))


def _summary(model: FoundModel, runtime: Runtime | None, *, is_alone: bool) -> Iterator[tuple[str, str]]:
    yield "is", _what_it_is(model)
    if model.interface is not None:
        for kind in model.interface.cache:
            yield "cache", _cache(kind)
    yield "made by", model.producer or "(not said)"
    yield "versions", _versions(model)
    yield "nodes", _nodes(model.bodies)
    yield "weights", _weights(model)
    for one in model.files:
        yield "", _file(one)
    if model.unused:
        names = _first_few([one.name for one in model.unused])
        yield (
            "unused",
            f"{_count(len(model.unused), 'weight')}, {in_bytes(sum(o.bytes for o in model.unused))}: {names}",
        )
    if is_alone:
        yield "runtime", _limits(runtime)
    if runtime is not None:
        yield "" if is_alone else "runtime", f"{_name_of(runtime)} {_taken(model)}"


def _what_it_is(model: FoundModel) -> str:
    if model.interface is None:
        return f"{_role(model)}; its inputs and outputs are no known decoder's or encoder's"
    role = model.interface.role
    listed = "" if model.listed_role in (None, role) else f"; {model.listed_role} in bundle.json"
    return f"{role}: {ROLES[role]}; named as in {model.interface.naming}{listed}"


def _role(model: FoundModel) -> str:
    if model.listed_role is not None and model.listed_role in ROLES:
        return model.listed_role
    return model.interface.role if model.interface else "model"


def _cache(kind: CacheKind) -> str:
    ways = [f"{count} {way}" for count, way in ((kind.inputs, "in"), (kind.outputs, "out")) if count]
    size = f"; {in_bytes(kind.token_bytes)} for each token of a row" if kind.token_bytes is not None else ""
    layers = _count(kind.layers, "layer")
    return f"{kind.attention} attention, {layers}: {', '.join(ways)}, {kind.type} {_shape(kind.shape)}{size}"


def _versions(model: FoundModel) -> str:
    said = f"IR {model.ir_version}, opset {_opsets(model.opsets)}"
    if (model.needs_ir_version, model.needs_opsets) != (model.ir_version, model.opsets):
        said += f"; needs no more than IR {model.needs_ir_version}, opset {_opsets(model.needs_opsets)}"
    return said


def _opsets(opsets: dict[str, int]) -> str:
    own = [str(version) for domain, version in opsets.items() if domain == "ai.onnx"]
    return ", ".join(own + [f"{domain} {version}" for domain, version in opsets.items() if domain != "ai.onnx"])


def _nodes(bodies: Sequence[Body]) -> str:
    said = f"{bodies[0].nodes:,}"
    inside = [body for body in bodies if body.depth and not body.is_function]
    if inside:
        deepest = max(body.depth for body in inside)
        levels = "" if deepest == 1 else f", to {deepest} levels deep"
        said += f", and {sum(b.nodes for b in inside):,} in {_count(len(inside), 'branch or loop body')}{levels}"
    functions = [body for body in bodies if body.is_function]
    if functions:
        said += f", and {sum(b.nodes for b in functions):,} in {_count(len(functions), 'graph')} of local functions"
    return said


def _weights(model: FoundModel) -> str:
    if not model.by_dtype:
        return "none"
    kinds = ", ".join(f"{one.name} {in_bytes(one.bytes)} ({one.tensors:,})" for one in model.by_dtype)
    others = [one for one in model.by_place if one.name != "initializers"]
    places = "".join(f"; {one.tensors:,} of them {_place(one.name)}, {in_bytes(one.bytes)}" for one in others)
    return f"{model.weights.parameters:,} parameters, {in_bytes(model.weights.bytes)}: {kinds}{places}"


def _place(name: str) -> str:
    return {"constants": "Constant nodes", "functions": "in functions"}.get(name, name)


def _file(file: FileUse) -> str:
    held = f"{_count(file.tensors, 'tensor')}, {in_bytes(file.bytes)}"
    if file.file_bytes is None:
        return f"{held} should be in {Path(file.file).name}, where they are missing or cannot be used"
    where = "the model file itself" if file.is_model else Path(file.file).name
    return f"{held} in {where}, of {in_bytes(file.file_bytes)}"


def _limits(runtime: Runtime | None) -> str:
    if runtime is None:
        return "ONNX Runtime is not installed, so nothing can be said of it: pip install graph-surgery[cpu] (or [gpu])"
    providers = ", ".join(name.removesuffix("ExecutionProvider") for name in runtime.providers)
    return f"{_name_of(runtime)} takes up to IR {runtime.max_ir_version} and opset {runtime.max_opset}, on {providers}"


def _name_of(runtime: Runtime | None) -> str:
    return f"ONNX Runtime {runtime.version}" if runtime is not None else "ONNX Runtime"


def _taken(model: FoundModel) -> str:
    return {True: "takes it", False: "refuses it", None: "not asked"}[model.runtime_takes_it]


def _findings(findings: Sequence[Finding], heading: str = "what is wrong") -> RenderableType:
    rows = Table.grid(padding=(0, 2))
    rows.add_column(width=12)
    rows.add_column()
    for finding in findings:
        nodes = f" ({_count(finding.nodes, 'node')})" if finding.nodes else ""
        rows.add_row(finding.by, Text(f"{finding.where}{nodes}: {finding.what}"))
        if finding.way_out:
            rows.add_row("", Text(f"  try: {finding.way_out}"))
    return _under(heading, rows)


def _ports(model: FoundModel) -> Table:
    rows = Table.grid(padding=(0, 2))
    for way, several in (("in", model.inputs), ("out", model.outputs)):
        for alike in _alike(several):
            name = alike[0].name if len(alike) == 1 else f"{alike[0].name} ... {alike[-1].name}"
            notes = [f"{len(alike)} alike"] if len(alike) > 1 else []
            notes += ["may be left out"] if alike[0].has_default else []
            rows.add_row(way, Text(name), alike[0].type or "?", Text(_shape(alike[0].shape)), ", ".join(notes))
    return rows


def _alike(several: Iterable[Port]) -> Iterator[list[Port]]:
    """Yield the ports one by one, but many of a type and shape together."""
    kinds: dict[tuple[str, bool], list[Port]] = {}
    for port in several:
        kinds.setdefault((f"{port.type} {port.shape}", port.has_default), []).append(port)
    for kind in kinds.values():
        yield from [kind] if len(kind) > _ALIKE else ([port] for port in kind)


def _operators(model: FoundModel) -> Table:
    rows = Table.grid(padding=(0, 1))
    for _ in range(_OPERATOR_COLUMNS):
        rows.add_column(justify="right")
        rows.add_column(min_width=18)
    cells: list[str] = []
    for one in model.operators:
        name = f"{one.domain}.{one.name}" if one.domain else one.name
        notes = [_inside(one.in_subgraphs, one.count)] if one.in_subgraphs else []
        notes += ["local function"] if one.is_function else []
        cells += [f"{one.count:,}", f"{name} ({', '.join(notes)})" if notes else name]
    width = 2 * _OPERATOR_COLUMNS
    for start in range(0, len(cells), width):
        row = cells[start : start + width]
        rows.add_row(*map(Text, row + [""] * (width - len(row))))
    return rows


def _bodies(bodies: Sequence[Body]) -> Table:
    rows = Table.grid(padding=(0, 2))
    inside = [body for body in bodies if body.depth or body.is_function]
    for body in inside[:_MOST_ROWS]:
        rows.add_row(Text(body.path), _count(body.nodes, "node"))
    if len(inside) > _MOST_ROWS:
        rows.add_row(f"... and {len(inside) - _MOST_ROWS:,} more", "")
    return rows


def _casts(model: FoundModel) -> Text:
    said = []
    for one in model.casts:
        inside = f" ({_inside(one.in_subgraphs, one.count)})" if one.in_subgraphs else ""
        said.append(f"{one.source or '?'} to {one.target} {one.count:,}{inside}")
    return Text(", ".join(said))


def _inside(count: int, of: int) -> str:
    return "inside" if count == of else f"{count:,} inside"


def _layers(layers: Sequence[Tally]) -> Table:
    table = _table("layer", "tensors >", "parameters >", "bytes >", "share >")
    total = sum(one.bytes for one in layers) or 1
    for alike in _runs(layers):
        first, size = alike[0], sum(one.bytes for one in alike)
        name, each = first.name, ""
        if len(alike) > 1:
            name, each = f"{first.name} ... {_last_number(alike[-1].name)}", " each"
        share = f"{size / total:.1%}"
        table.add_row(
            Text(name),
            f"{first.tensors:,}{each}",
            f"{first.parameters:,}{each}",
            f"{in_bytes(first.bytes)}{each}",
            share,
        )
    return table


def _runs(layers: Iterable[Tally]) -> Iterator[list[Tally]]:
    """Yield layers, those together that follow each other and differ in nothing but their number."""
    for _, run in groupby(
        layers, key=lambda one: (re.sub(r"\d+$", "", one.name), one.tensors, one.parameters, one.bytes)
    ):
        yield list(run)


def _last_number(name: str) -> str:
    return re.sub(r".*?(\d+)$", r"\1", name)


def _sharing(found: Inspection) -> Iterator[RenderableType]:
    for file in found.files:
        if file.file_bytes is not None and not file.is_model and file.file_bytes - file.bytes > _ROOM_FOR_ALIGNMENT:
            rest = in_bytes(file.file_bytes - file.bytes)
            yield _line(f"\n{Path(file.file).name}: {rest} of {in_bytes(file.file_bytes)} serve no model here")
    shared = [one for one in found.copies if one.stored == 1]
    if shared:
        size = in_bytes(sum(one.bytes for one in shared))
        yield _line(f"\n{_count(len(shared), 'weight')} with several names, {size}, stored once")
    for proof in ("every byte compared", "sampled"):
        copies = [one for one in found.copies if one.stored > 1 and one.proof == proof]
        if copies:
            spare = in_bytes(sum(one.bytes * (one.stored - 1) for one in copies))
            yield _line(f"\nequal weights ({_PROOFS[proof]}): {spare} would go if each were stored once")
            yield _copies_table(copies, len(found.models))
        turned = [one for one in found.transposed if one.proof == proof]
        if turned:
            spare = in_bytes(sum(one.bytes for one in turned))
            yield _line(f"\ntransposed weights ({_PROOFS[proof]}): {spare} would go if each were stored once")
            yield _turned_table(turned, len(found.models))


def _copies_table(copies: Sequence[Copies], models: int) -> RenderableType:
    rows = Table.grid(padding=(0, 2))
    for one in copies[:_MOST_ROWS]:
        rows.add_row(
            f"{one.stored} x {in_bytes(one.bytes)}", f"{one.type} {one.shape}", Text(_members(one.members, models))
        )
    return _cut_short(rows, len(copies))


def _turned_table(turned: Sequence[Transposed], models: int) -> RenderableType:
    rows = Table.grid(padding=(0, 2))
    for one in turned[:_MOST_ROWS]:
        pair = f"{_members(one.members, models)}; turned: {_members(one.transposed, models)}"
        rows.add_row(in_bytes(one.bytes), f"{one.type} {one.shape}", Text(pair))
    return _cut_short(rows, len(turned))


def _cut_short(rows: Table, count: int) -> RenderableType:
    if count > _MOST_ROWS:
        rows.add_row(f"... and {count - _MOST_ROWS:,} more", "", "--json lists all")
    return Padding(rows, (0, 0, 0, 2))


def _members(members: Sequence[Member], models: int) -> str:
    """Return the names of weights; a name that several models have is said once, and where only if not in all."""
    names: dict[str, dict[str, None]] = {}
    for member in members:
        names.setdefault(member.name, {})[member.model] = None
    return _first_few(
        [name if len(places) == models else f"{name} (in {', '.join(places)})" for name, places in names.items()]
    )


def _first_few(names: Sequence[str], most: int = 4) -> str:
    rest = f", ... and {len(names) - most:,} more" if len(names) > most else ""
    return ", ".join(names[:most]) + rest


def _shape(shape: Sequence[Dimension] | None) -> str:
    if shape is None:
        return "of unknown rank"
    return f"[{', '.join('?' if size is None else str(size) for size in shape)}]"


def _count(number: int, what: str) -> str:
    plural = {"branch or loop body": "branches and loop bodies"}.get(what, f"{what}s")
    return f"{number:,} {what if number == 1 else plural}"


def _table(*headings: str) -> Table:
    """Return a table; a heading that ends in `>` has its numbers at the right."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in headings:
        table.add_column(heading.removesuffix(" >"), justify="right" if heading.endswith(" >") else "left")
    return table


def _under(heading: str, content: RenderableType) -> RenderableType:
    return Group(Text(f"\n  {heading}", style="bold"), Padding(content, (0, 0, 0, 4)))


def _line(text: str) -> Text:
    return Text(text)
