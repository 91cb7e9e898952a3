"""The report of an audit as one HTML page that needs nothing else: charts of log2 magnitude against float16's range."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape
from string import Template

from passes.audit_ranges.ranges import LARGEST, Range, joined
from passes.audit_ranges.reasons import error_share, hides, number
from passes.audit_ranges.reporting import Found, Measured, headline, keep_yaml
from surgery.report.plotting import BLUE, ORANGE, SKY, VERMILLION

LOWEST, HIGHEST = -30, 22
"""The powers of two between which magnitudes are drawn; what is beyond is drawn to the edge."""
LIMITS = {"6.0e-8": math.log2(2.0**-24), "6.1e-5": -14.0, "65,504": math.log2(65504)}
"""float16's smallest number, its smallest with all its digits, and its largest."""

_OCTAVE = 5
_ROW_WIDTH, _ROW_HEIGHT = (HIGHEST - LOWEST) * _OCTAVE, 14
_PLOT_LEFT, _PLOT_TOP, _PLOT_WIDTH, _PLOT_HEIGHT = 56, 18, 1140, 208
_ROOM_FOR_LABEL, _NARROW = 74, 10
_MOST_OF_THE_WORST = 200

_STYLE = Template("""
:root { color-scheme: light dark; --ink: #1d1f21; --soft: #5b6167; --line: #d9dcdf; --band: #eef2f6; --page: #fff;
  --ok: $blue; --over: $vermillion; --under: #a86b00; --mark: #fbe9df }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e6e8; --soft: #a2a9b0; --line: #3b4046; --band: #24292f;
  --page: #15181b; --ok: $sky; --over: #ff8a4c; --under: $orange; --mark: #3d2618 } }
* { box-sizing: border-box }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--page); margin: 2rem auto;
  max-width: 86rem; padding: 0 1rem }
h1 { font-size: 1.4rem; margin: 0 0 0.2rem } h2 { font-size: 1.15rem; margin: 2.4rem 0 0.2rem }
h3 { font-size: 1rem; margin: 1.4rem 0 0.3rem }
p { margin: 0.3rem 0; max-width: 60rem } p.soft, .soft { color: var(--soft) }
.wide { overflow-x: auto }
table { border-collapse: collapse; font-size: 13px; width: 100% }
caption { text-align: left; color: var(--soft); padding: 0.3rem 0 }
th { text-align: left; font-weight: 600; vertical-align: bottom; padding: 0.2rem 0.7rem 0.2rem 0 }
td, tbody th { padding: 0.1rem 0.7rem 0.1rem 0; vertical-align: top; border-top: 1px solid var(--line) }
tbody th { font-weight: 400; overflow-wrap: anywhere; min-width: 15rem } td:last-child { min-width: 13rem }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap }
.layer-of tr.needs > * { background: var(--mark) } tr.aside { color: var(--soft) }
td.chart { padding-right: 1rem; width: ${row}px } svg { display: block } svg text { fill: var(--soft); font-size: 10px }
.ok { stroke: var(--ok) } .over { stroke: var(--over) } .under { stroke: var(--under) } .mask { stroke: var(--soft) }
.dot { fill: var(--ink); stroke: none } .band { fill: var(--band) } .limit { stroke: var(--soft); stroke-width: 1 }
.fewer { stroke-dasharray: 2 2 } .layer { stroke: var(--line); stroke-width: 1 }
summary { cursor: pointer; padding: 0.35rem 0; font-weight: 600 } summary .soft { font-weight: 400 }
.line { display: inline-grid; grid-template-columns: minmax(14rem, 24rem) max-content auto; gap: 0 1.5rem;
  vertical-align: middle; align-items: center; overflow-wrap: anywhere }
table.narrow { width: auto } table.narrow tbody th { min-width: 10rem }
details { border-top: 1px solid var(--line) }
pre { background: var(--band); padding: 0.8rem 1rem; overflow: auto; max-height: 24rem; font-size: 13px }
.tools { display: flex; flex-wrap: wrap; gap: 1.2rem; align-items: center; margin: 1rem 0 }
input[type=search], select, button { font: inherit; color: inherit; background: var(--page);
  border: 1px solid var(--soft); border-radius: 4px; padding: 0.2rem 0.5rem }
.key svg { display: inline-block; vertical-align: middle }
[hidden] { display: none }
""").substitute(blue=BLUE, sky=SKY, vermillion=VERMILLION, orange=ORANGE, row=_ROW_WIDTH)

# Without a script everything is to be read; with it, it can also be searched and ordered.
_SCRIPT = """
const tools = document.querySelector(".tools"), every = [...document.querySelectorAll("details.layer-of")];
tools.hidden = false;
const [word, only, order] = ["word", "only", "order"].map(id => document.getElementById(id));
const was = new Map(every.map(one => [one, one.open]));
function show() {
  const wanted = word.value.toLowerCase(), asked = wanted !== "" || only.checked;
  for (const layer of every) {
    let left = 0;
    const body = layer.querySelector("tbody"), rows = [...body.rows], by = order.value;
    for (const row of rows) {
      row.hidden = (only.checked && !row.classList.contains("needs")) || !row.dataset.text.includes(wanted);
      left += !row.hidden;
    }
    rows.sort((a, b) => by === "place" ? a.dataset.place - b.dataset.place : b.dataset[by] - a.dataset[by]);
    body.append(...rows);
    layer.hidden = left === 0;
    layer.open = asked ? left > 0 : was.get(layer);
  }
}
for (const one of [word, only, order]) one.addEventListener("input", show);
const copy = document.getElementById("copy");
if (copy && navigator.clipboard) {
  copy.hidden = false;
  copy.addEventListener("click", () => navigator.clipboard.writeText(document.getElementById("keep").textContent)
    .then(() => { copy.textContent = "copied"; }));
}
"""


def page(found: Sequence[Found], title: str) -> str:
    """Return the page.

    Args:
        found: What there is of each model.
        title: What was audited.
    """
    name = escape(f"Ranges of {title}")
    head = (
        '<meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{name}</title><style>{_STYLE}</style>"
    )
    body = "".join((f"<h1>{name}</h1>", _introduction(found), _KEY, _keep(found), _TOOLS, *map(_model, found)))
    script = f"<script>{_SCRIPT}</script>"
    grid = f'<svg width="0" height="0" aria-hidden="true"><defs><g id="grid">{_row_grid()}</g></defs></svg>'
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head>{head}</head><body>{grid}<main>{body}</main>{script}</body></html>\n'
    )


def _introduction(found: Sequence[Found]) -> str:
    lines = "".join(f'<li><a href="#{_id(one)}">{escape(one.role)}</a>: {escape(headline(one))}</li>' for one in found)
    return f"<ul>{lines}</ul>"


def _id(found: Found) -> str:
    return escape(f"model-{found.role}")


def _line(kind: str, start: float, end: float, y: float, width: float) -> str:
    return f'<path class="{kind}" d="M{start:.1f} {y:g}H{end:.1f}" stroke-width="{width:g}"/>'


_KEY = (
    '<p class="key soft">'
    f'<svg width="34" height="10" aria-hidden="true">{_line("ok", 0, 34, 5, 6)}</svg> from the smallest magnitude but '
    "zero to the largest, on a scale of powers of two; "
    '<svg width="10" height="10" aria-hidden="true"><circle class="dot" cx="5" cy="5" r="3"/></svg> root mean square; '
    f'<svg width="20" height="10" aria-hidden="true">{_line("over", 0, 20, 5, 6)}</svg> above 65,504, infinite in '
    f'float16 (<svg width="20" height="10" aria-hidden="true">{_line("mask", 0, 20, 5, 6)}</svg> of a mask, which may '
    "be that); "
    f'<svg width="20" height="10" aria-hidden="true">{_line("under", 0, 20, 5, 6)}</svg> below 6.0e-8, zero in '
    "float16. Between 6.0e-8 and 6.1e-5 float16 has fewer digits. <em>Error</em> is what half precision does at that "
    "node alone, given the numbers of float32: the root mean square of the difference, over that of the result.</p>"
)

_TOOLS = (
    '<div class="tools" hidden>'
    '<label>search <input type="search" id="word" placeholder="node, operator, layer"></label>'
    '<label><input type="checkbox" id="only"> only what needs float32</label>'
    '<label>order <select id="order"><option value="place">as computed</option><option value="peak">by peak</option>'
    '<option value="error">by error</option></select></label></div>'
)


def _keep(found: Sequence[Found]) -> str:
    if not any(one.troubled for one in found):
        return "<h2>keep</h2><p>Nothing that was measured needs float32.</p>"
    return (
        '<h2>keep</h2><p class="soft">What the rules of this report would keep in float32, with what reads it; for the '
        'step <code>cast_fp16</code> of a recipe. <button id="copy" type="button" hidden>copy</button></p>'
        f'<pre id="keep" tabindex="0">{escape(keep_yaml(found))}</pre>'
    )


def _model(found: Found) -> str:
    parts = [
        f'<h2 id="{_id(found)}">{escape(found.role)}</h2><p class="soft">{escape(headline(found))}</p>',
        _plot(found),
    ]
    if found.troubled:
        worst = found.troubled[:_MOST_OF_THE_WORST]
        others = len(found.troubled) - len(worst)
        rest = f"; {others:,} more are below" if others else ""
        parts.append(_rows(f"needs float32, the worst first{rest}", worst, ""))
    if found.not_finite:
        parts.append(_rows("not finite in float32 itself", found.not_finite, ""))
    if found.unseen:
        names = "".join(f"<li>{escape(key)}</li>" for key in found.unseen)
        parts.append(
            f"<details><summary>never computed, in a branch that no sample took</summary><ul>{names}</ul></details>"
        )
    parts += [_operators(found), "<h3>by layer, as computed</h3>"]
    for layer, tensors in found.layers.items():
        parts.append(_layer(layer, tensors))
    return f"<section>{''.join(parts)}</section>"


def _operators(found: Found) -> str:
    """Return a row for each operator: what all its results held together."""
    kinds: dict[str, list[Measured]] = {}
    for one in found.tensors:
        kinds.setdefault(one.operator, []).append(one)
    rows = sorted(kinds.items(), key=lambda kind: (-_needing(kind[1]), kind[0]))
    body = "".join(
        f'<tr><th scope="row">{escape(operator)}</th><td class="n">{len(tensors):,}</td>'
        f'<td class="chart">{_chart_of(tensors)}</td><td class="n">{_worst_error(tensors)}</td>'
        f'<td class="n">{_needing(tensors) or "-"}</td></tr>'
        for operator, tensors in rows
    )
    head = "".join(
        f'<th scope="col"{kind}>{heading}</th>'
        for heading, kind in (
            ("operator", ""),
            ("tensors", ' class="n"'),
            (_axis(), ""),
            ("largest error", ' class="n"'),
            ("need float32", ' class="n"'),
        )
    )
    table = f'<table class="narrow"><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>'
    return f'<details><summary>by operator</summary><div class="wide">{table}</div></details>'


def _needing(tensors: Sequence[Measured]) -> int:
    return sum(one.reason is not None for one in tensors)


def _worst_error(tensors: Sequence[Measured]) -> str:
    shares = [share for one in tensors if (share := error_share(one.range)) is not None]
    return f"{max(shares):.2%}" if shares else "-"


def _together(tensors: Sequence[Measured]) -> Range | None:
    """Return what tensors held together, but for masks."""
    ranges = [one.range for one in tensors if not one.is_hiding]
    return joined(ranges) if ranges else None


def _chart_of(tensors: Sequence[Measured]) -> str:
    together = _together(tensors)
    return _chart(together) if together is not None else ""


def _layer(layer: str, tensors: Sequence[Measured]) -> str:
    needs = _needing(tensors)
    together = _together(tensors)
    note = f"{len(tensors):,} tensor{'' if len(tensors) == 1 else 's'}"
    if together is not None:
        note += f", peak {number(together.peak)}"
    if needs:
        note += f"; {needs:,} {'needs' if needs == 1 else 'need'} float32"
    return (
        f'<details class="layer-of"{" open" if needs else ""}><summary><span class="line"><span>{escape(layer)}</span>'
        f'{_chart_of(tensors)}<span class="soft">{note}</span></span></summary>{_rows("", tensors, layer)}</details>'
    )


def _rows(caption: str, tensors: Sequence[Measured], layer: str) -> str:
    headings = "".join(
        f'<th scope="col"{kind}>{heading}</th>'
        for heading, kind in (
            ("node", ""),
            ("operator", ""),
            (_axis(), ""),
            *((name, ' class="n"') for name in ("peak", "smallest", "error", "not finite")),
            ("kind", ""),
            ("why float32", ""),
        )
    )
    body = "".join(_row(one, place, layer) for place, one in enumerate(tensors))
    title = f"<caption>{caption}</caption>" if caption else ""
    return f'<div class="wide"><table>{title}<thead><tr>{headings}</tr></thead><tbody>{body}</tbody></table></div>'


def _row(one: Measured, place: int, layer: str) -> str:
    share = error_share(one.range)
    reason = one.reason.text if one.reason is not None else ("a mask: hides others" if one.is_hiding else "")
    kinds = "needs" if one.reason is not None else "aside" if one.range.kind != "activation" else ""
    text = escape(f"{one.name} {one.operator} {one.layer}".lower())
    numbers = (
        number(one.range.peak),
        "-" if one.range.smallest is None else number(one.range.smallest),
        "-" if share is None else f"{share:.2%}",
        f"{one.not_finite:,}" if one.not_finite else "-",
    )
    cells = "".join(f'<td class="n">{cell}</td>' for cell in numbers)
    return (
        f'<tr class="{kinds}" data-place="{place}" data-peak="{one.range.peak:g}" data-error="{share or 0:g}" '
        f'data-text="{text}"><th scope="row" title="{escape(one.key)}">{escape(_short(one.name, layer))}</th>'
        f'<td>{escape(one.operator)}</td><td class="chart">{_chart(one.range)}</td>{cells}'
        f"<td>{one.range.kind}</td><td>{escape(reason)}</td></tr>"
    )


def _short(name: str, layer: str) -> str:
    """Return a name without the path of its layer, which stands above."""
    path = layer.rpartition("/")[2]
    bare = name.strip("/").replace("/", ".")
    if path and bare.startswith(f"{path}."):
        return name.strip("/")[len(path) + 1 :]
    return name


# The charts


def _power(magnitude: float) -> float:
    """Return a power of two within what is drawn."""
    return min(max(math.log2(magnitude), LOWEST), HIGHEST) if magnitude > 0 else LOWEST


def _parts(range_: Range) -> Iterator[tuple[str, float, float]]:
    """Yield the pieces of a bar: too small for float16, within its range, too large; as powers of two."""
    if range_.smallest is None:
        return
    least, _, most = LIMITS.values()
    start = _power(range_.smallest)
    end = max(start, _power(max(-range_.low, range_.high)))
    for kind, low, high in (("under", LOWEST, least), ("ok", least, most), ("over", most, HIGHEST)):
        first, last = max(start, low), min(end, high)
        if first < last or (start == end and low <= start <= high and first <= last):
            yield ("mask" if kind == "over" and hides(range_) and range_.peak <= LARGEST else kind), first, last


def _x(power: float) -> float:
    return (power - LOWEST) * _OCTAVE


def _row_grid() -> str:
    least, normal, most = (_x(power) for power in LIMITS.values())
    band = f'<rect class="band" x="{least:.1f}" y="0" width="{most - least:.1f}" height="{_ROW_HEIGHT}"/>'
    lines = "".join(f'<path class="limit" d="M{x:.1f} 0V{_ROW_HEIGHT}"/>' for x in (least, most))
    dashed = f'<path class="limit fewer" d="M{normal:.1f} 0V{_ROW_HEIGHT}"/>'
    return band + lines + dashed


def _chart(range_: Range) -> str:
    middle = _ROW_HEIGHT / 2
    bars = "".join(_line(kind, _x(a), max(_x(b), _x(a) + 1.5), middle, 6) for kind, a, b in _parts(range_))
    dot = f'<circle class="dot" cx="{_x(_power(range_.rms)):.1f}" cy="{middle:g}" r="2.5"/>' if range_.rms else ""
    return (
        f'<svg width="{_ROW_WIDTH}" height="{_ROW_HEIGHT}" role="img" aria-label="{_said(range_)}">'
        f'<use href="#grid"/>{bars}{dot}</svg>'
    )


def _said(range_: Range) -> str:
    if range_.smallest is None:
        return "all zero"
    return f"from {number(range_.smallest)} to {number(range_.peak)}, root mean square {number(range_.rms)}"


def _axis() -> str:
    labels = "".join(
        f'<text x="{_x(power):.1f}" y="10" text-anchor="middle">{label}</text>'
        for label, power in (*LIMITS.items(), ("1", 0.0))
    )
    return (
        f'<svg width="{_ROW_WIDTH}" height="13" role="img" '
        f'aria-label="magnitude, from 2 to the power of {LOWEST} to 2 to the power of {HIGHEST}">{labels}</svg>'
    )


def _y(power: float) -> float:
    return _PLOT_TOP + (HIGHEST - power) * _PLOT_HEIGHT / (HIGHEST - LOWEST)


def _plot(found: Found) -> str:
    """Return all tensors of a model side by side, in the order in which they are computed."""
    tensors = [one for layer in found.layers.values() for one in layer]
    column = min(_PLOT_WIDTH / max(len(tensors), 1), 12.0)
    width = _PLOT_LEFT + column * len(tensors)
    strokes: dict[str, list[str]] = {"under": [], "ok": [], "mask": [], "over": []}
    for index, one in enumerate(tensors):
        x = _PLOT_LEFT + (index + 0.5) * column
        for kind, low, high in _parts(one.range):
            strokes[kind].append(f"M{x:.1f} {_y(low) + 0.6:.1f}V{_y(high) - 0.6:.1f}")
    bars = "".join(
        f'<path class="{kind}" fill="none" stroke-width="{max(column * 0.7, 0.5):.2f}" d="{"".join(lines)}"/>'
        for kind, lines in strokes.items()
        if lines
    )
    label = escape(f"{found.role}: from the smallest to the largest magnitude of {len(tensors)} tensors")
    view = f"0 0 {max(width, 400):.0f} {_PLOT_TOP + _PLOT_HEIGHT + 4}"
    return (
        f'<div class="wide"><svg role="img" aria-label="{label}" viewBox="{view}" width="{max(width, 400):.0f}">'
        f"{_plot_grid(width)}{_plot_layers(found, column, width)}{bars}</svg></div>"
    )


def _plot_grid(width: float) -> str:
    least, normal, most = LIMITS.values()
    band = (
        f'<rect class="band" x="{_PLOT_LEFT}" y="{_y(most):.1f}" width="{width - _PLOT_LEFT:.1f}" '
        f'height="{_y(least) - _y(most):.1f}"/>'
    )
    lines = "".join(
        f'<path class="{"limit fewer" if power == normal else "limit"}" d="M{_PLOT_LEFT} {_y(power):.1f}H{width:.1f}"/>'
        for power in LIMITS.values()
    )
    labels = "".join(
        f'<text x="{_PLOT_LEFT - 6}" y="{_y(power) + 3:.1f}" text-anchor="end">{label}</text>'
        for label, power in (*LIMITS.items(), ("1", 0.0))
    )
    return band + lines + labels


def _plot_layers(found: Found, column: float, width: float) -> str:
    """Return where layers begin, the widest named first where there is room."""
    starts: dict[str, float] = {}
    place = 0
    for layer, tensors in found.layers.items():
        starts[layer] = _PLOT_LEFT + place * column
        place += len(tensors)
    named: list[float] = []
    parts: list[str] = []
    for layer, tensors in sorted(found.layers.items(), key=lambda one: -len(one[1])):
        x = starts[layer]
        parts.append(f'<path class="layer" d="M{x:.1f} {_PLOT_TOP - 4}V{_PLOT_TOP + _PLOT_HEIGHT}"/>')
        is_free = all(abs(x - other) >= _ROOM_FOR_LABEL for other in named) and x + _ROOM_FOR_LABEL <= width
        if is_free and len(tensors) * column > _NARROW:
            parts.append(f'<text x="{x + 2:.1f}" y="{_PLOT_TOP - 6}">{escape(_tail(layer))}</text>')
            named.append(x)
    return "".join(parts)


def _tail(layer: str) -> str:
    """Return the end of a layer's path that fits above a plot."""
    parts = layer.split(".")
    tail = ".".join(parts[-2:])
    return tail if len(tail) <= 14 else f"{tail[:13]}…"
