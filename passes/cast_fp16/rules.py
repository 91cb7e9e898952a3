"""Which nodes and tensors stay in float32, and why."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir

from passes.audit_ranges import Range, Ranges
from passes.audit_ranges.keys import key_of_value, keyed_values, scope_name
from passes.audit_ranges.ranges import LARGEST, WHOLE_UP_TO, joined
from passes.cast_fp16.casting import KEPT
from passes.cast_fp16.cutting import Place
from passes.cast_fp16.kernels import lacks_half
from passes.cast_fp16.masks import Masks, find_masks, is_end
from passes.cast_fp16.places import BORN, Joint, Map, computes, is_float, is_neutral, is_plain
from passes.cast_fp16.positions import cut_otherwise
from passes.cast_fp16.weights import Facts, Survey, constant_of
from surgery.errors import RecipeError
from surgery.graphs import bodies_of, graphs_of, named_bodies_of
from surgery.options import did_you_mean

_INTEGERS = frozenset(getattr(ir.DataType, f"{sign}INT{bits}") for sign in ("", "U") for bits in (4, 8, 16, 32, 64))

HALF_STEP = 2.0**-11
"""Rounding to float16 moves a number by at most this share of it."""


@dataclass(frozen=True)
class Reason:
    """Why places stay in float32.

    Args:
        key: The tensor, node or weight, as reports call it.
        text: A few words with the measured number.
        places: What stays in float32 for it.
    """

    key: str
    text: str
    places: frozenset[Place]

    def __str__(self) -> str:
        return f"{self.key}: {self.text}"


@dataclass(frozen=True)
class Limits:
    """From where on a number is a reason.

    Args:
        headroom: A tensor may use this share of 65,504.
        worst_error: Half precision alone may move the result of a node by this share of it.
        runs_on: The runtime whose kernels count.
    """

    headroom: float = 0.5
    worst_error: float = 0.02
    runs_on: str = "any"


@dataclass
class Site:
    """A model as rules see it.

    Args:
        role: Its role.
        model: The model; its types are known.
        places: Its places.
        ranges: What an audit found.
        limits: From where on a number is a reason.
        survey: What float16 does to its constants.
    """

    role: str
    model: ir.Model
    places: Map
    ranges: Ranges
    limits: Limits
    survey: Survey
    keys: dict[ir.Value, str] = field(init=False)
    masks: Masks = field(init=False)
    _joined: dict[Joint, list[ir.Value]] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        self.keys = {value: key for key, value in keyed_values(self.model.graph) if value.name}
        for value, reads in self.places.reads.items():
            for read in reads:
                if isinstance(read.place, Joint):
                    self._joined.setdefault(read.place, []).append(value)
        self.masks = find_masks(self.places, self.range_of, self.facts_of, self.limits.headroom)

    def range_of(self, value: ir.Value) -> Range | None:
        """Return what an audit knows of a value; what a body is given is what is put into it."""
        known = self.ranges.values.get(self.keys.get(value, ""))
        if known is not None:
            return known
        maker = self.places.makers.get(value)
        given = self._joined.get(maker, ()) if isinstance(maker, Joint) else ()
        put = [self.ranges.values[key] for one in given if (key := self.keys.get(one, "")) in self.ranges.values]
        return joined(put) if put else None

    def facts_of(self, value: ir.Value) -> Facts | None:
        """Return what float16 does to a constant, None for what is computed."""
        if not is_float(value):
            return None
        tensor = constant_of(value)
        return self.survey.of(tensor) if tensor is not None else None

    def key_of(self, value: ir.Value) -> str:
        """Return what reports call a value."""
        return self.keys.get(value) or value.name or ""

    def makers_behind(self, value: ir.Value) -> Iterator[Place]:
        """Yield the nodes that compute what a value holds, through those that only move it."""
        pending, seen = [value], {value}
        while pending:
            maker = self.places.makers.get(pending.pop())
            if not isinstance(maker, ir.Node):
                continue
            if not is_neutral(maker):
                yield maker
                continue
            given = [one for one in maker.inputs if one is not None and one not in seen]
            pending += given
            seen.update(given)

    def feeding(self, node: ir.Node) -> frozenset[Place]:
        """Return the nodes that compute what a node is given: with it they have its inputs in float32."""
        given = [value for value in node.inputs if value is not None]
        return frozenset(maker for value in given for maker in self.makers_behind(value))

    def users_ahead(self, value: ir.Value) -> Iterator[tuple[ir.Node, int]]:
        """Yield the nodes that compute with what a value holds, through those that only move it."""
        pending, seen = [value], {value}
        while pending:
            for user, index in pending.pop().uses():
                if not is_neutral(user):
                    yield user, index
                    continue
                made = [one for one in user.outputs if one not in seen]
                pending += made
                seen.update(made)

    def positions_behind(self, value: ir.Value) -> Iterator[Place]:
        """Yield the nodes that make a number of positions, from where these become float32."""
        pending, seen = [value], {value}
        while pending:
            maker = self.places.makers.get(pending.pop())
            if not isinstance(maker, ir.Node):
                continue
            yield maker
            for one in maker.inputs:
                known = self.range_of(one) if one is not None and one not in seen else None
                if one is not None and known is not None and known.kind == "position":
                    pending.append(one)
                    seen.add(one)


def overflow(site: Site, value: ir.Value, known: Range) -> Reason | None:
    """It peaks above a share of 65,504: what makes and reads it is float32."""
    headroom = site.limits.headroom
    peak = max(-known.low, known.high)
    if value in site.masks.inside or peak <= headroom * LARGEST:
        return None
    share = f"{headroom:g} x 65,504" if headroom < 1 else "65,504"
    return Reason(site.key_of(value), f"peaks at {_number(peak)}, above {share}", site.places.around(value))


def mask_source(site: Site, value: ir.Value, known: Range) -> Reason | None:
    """It is where the fills of a mask are computed, as in `(1 - mask) * lowest`, where 0 * -inf would be no number."""
    if value not in site.masks.sources:
        return None
    outsiders = site.masks.outsiders.intersection(site.places.readers(value))
    places = outsiders | {site.places.makers[value]}
    return Reason(site.key_of(value), f"makes mask fills of {known.low:.3g}", places)


def inexact_count(site: Site, value: ir.Value, known: Range) -> Reason | None:
    """It holds whole numbers above 2,048, which float16 rounds: positions, lengths, ids."""
    if not known.is_whole or known.peak <= WHOLE_UP_TO or value in site.masks.inside:
        return None
    if known.kind != "position" and not any(_cuts(user) for user, _ in site.users_ahead(value)):
        return None
    return Reason(site.key_of(value), f"counts to {_number(known.peak)}, above 2,048", site.places.around(value))


def cut_position(site: Site, value: ir.Value, known: Range) -> Reason | None:
    """It is made of positions and cut to whole numbers, as distances are to buckets, and rounded it is the next one."""
    if known.kind != "position" or known.is_whole or value in site.masks.inside:
        return None
    user = next((node for node, _ in site.users_ahead(value) if _cuts(node)), None)
    if user is None:
        return None
    found = cut_otherwise(value, user, site.range_of)
    if found is not None and not found[0]:
        return None
    text = f"{user.op_type} makes whole numbers of it"
    if found is not None:
        text = f"{user.op_type} makes other whole numbers of {found[0]:,} of {found[1]:,} positions"
    return Reason(site.key_of(value), text, frozenset(site.positions_behind(value)))


def vanishing_divisor(site: Site, value: ir.Value, known: Range) -> Reason | None:
    """Numbers that float16 makes zero are divided by, or their root, power or logarithm is taken."""
    if not known.underflow:
        return None
    user = next((node for node, index in site.users_ahead(value) if _needs_small(node, index)), None)
    if user is None:
        return None
    text = f"{known.underflow:,} numbers down to {known.smallest:.1g} vanish before {user.op_type}"
    return Reason(site.key_of(value), text, site.places.around(value) | {user, *site.makers_behind(value)})


def blurred_angle(site: Site, value: ir.Value, known: Range) -> Reason | None:
    """Its sine or cosine is taken, and is off by more than the worst error: angles near 64 are 1/16 apart."""
    off = known.peak * HALF_STEP
    user = next((node for node, _ in site.users_ahead(value) if is_plain(node, "Cos", "Sin", "Tan")), None)
    if user is None or off <= site.limits.worst_error:
        return None
    text = f"angles up to {_number(known.peak)} are off by up to {off:.2g} before {user.op_type}"
    return Reason(site.key_of(value), text, site.places.around(value) | {user, *site.makers_behind(value)})


def own_error(site: Site, value: ir.Value, known: Range) -> Reason | None:
    """Half precision alone makes a large error at its node: what it is given is float32 as well."""
    node = value.producer()
    if node is None or value in site.masks.inside or not computes(node):
        return None
    error = known.error_rms
    if known.broken and node not in site.masks.softened:
        return Reason(
            site.key_of(value),
            f"{known.broken:,} finite numbers become infinite",
            frozenset((node,)) | site.feeding(node),
        )
    if error is None or not known.rms or error <= site.limits.worst_error * known.rms:
        return None
    places = frozenset((node,)) | site.feeding(node)
    if known.underflow + known.subnormal > known.elements // 2:
        places |= site.places.around(value)
    return Reason(site.key_of(value), f"half precision alone is off by {error / known.rms:.1%} there", places)


TENSOR_RULES = (overflow, mask_source, inexact_count, cut_position, vanishing_divisor, blurred_angle)


def _cuts(node: ir.Node) -> bool:
    """Return whether a node makes whole numbers of others."""
    return is_plain(node, "Ceil", "Floor", "Round") or (
        is_plain(node, "Cast", "CastLike") and node.outputs[0].dtype in _INTEGERS
    )


def _needs_small(node: ir.Node, index: int) -> bool:
    """Return whether it matters there that a small number is not zero."""
    if is_plain(node, "Pow"):
        return index == 0 and not _is_power_of_one_or_more(node)
    if is_plain(node, "Cast"):
        return node.outputs[0].dtype == ir.DataType.BOOL
    if is_plain(node, "Div", "DequantizeLinear", "QuantizeLinear"):
        return index == 1
    return is_plain(node, "Log", "Sqrt", "Reciprocal") and index == 0


def _is_power_of_one_or_more(node: ir.Node) -> bool:
    exponent = node.inputs[1]
    tensor = constant_of(exponent) if exponent is not None else None
    return tensor is not None and bool(np.all(tensor.numpy() >= 1))


# Constants


def overflowing_constant(site: Site, value: ir.Value, facts: Facts) -> Reason | None:
    """A finite number of it would be infinite: it stays float32, with those of its readers that it would harm."""
    if not facts.overflows:
        return None
    is_mask = value in site.masks.inside
    harmed = [
        read.place
        for read in site.places.reads.get(value, ())
        if not (isinstance(read.user, ir.Node) and _may_be_infinite(site, read.user, read.index, is_mask=is_mask))
    ]
    if not harmed:
        return None
    return Reason(site.key_of(value), f"holds {_number(facts.peak)}, beyond 65,504", frozenset(harmed))


def vanishing_constant(site: Site, value: ir.Value, facts: Facts) -> Reason | None:
    """It would be zero, and is divided by, or keeps what is, or what a root is taken of, away from zero."""
    if not facts.vanishing:
        return None
    for read in site.places.reads.get(value, ()):
        if not isinstance(read.user, ir.Node):
            continue
        if _needs_small(read.user, read.index):
            text = f"holds {_number(facts.peak)}, which is 0 in float16, for {read.user.op_type}"
            return Reason(site.key_of(value), text, frozenset((read.place,)))
        if facts.vanishing < facts.elements or not is_plain(read.user, "Add", "Max", "Clip", "Where"):
            continue
        (made,) = read.user.outputs
        guarded = next((node for node, index in site.users_ahead(made) if _needs_small(node, index)), None)
        if guarded is not None:
            text = f"{_number(facts.peak)} is 0 in float16, and keeps {guarded.op_type} from it"
            return Reason(site.key_of(value), text, site.places.around(made) | {guarded})
    return None


def _may_be_infinite(site: Site, user: ir.Node, index: int, *, is_mask: bool) -> bool:
    """Return whether a node does with an infinite number what it does with one beyond all others."""
    if is_plain(user, "Clip"):
        return index > 0
    if is_plain(user, "Max", "Min", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"):
        return True
    if is_mask and (is_plain(user, "Equal") or is_end(user, index)):
        return True
    return is_mask and all(made in site.masks.inside for made in user.outputs if is_float(made))


CONSTANT_RULES = (overflowing_constant, vanishing_constant)


# Nodes


def no_kernel(site: Site, node: ir.Node) -> Reason | None:
    """The runtime has no float16 kernel for it."""
    if is_plain(node, *BORN) or not lacks_half(site.limits.runs_on, node, site.model):
        return None
    text = f"{site.limits.runs_on} has no float16 kernel of {node.op_type}"
    return Reason(name_of(node), text, frozenset((node,)))


def written_before(site: Site, node: ir.Node) -> Reason | None:
    """An earlier run kept it, and said why in its metadata."""
    said = node.metadata_props.get(KEPT)
    if not said:
        return None
    key, _, text = said.partition(": ")
    return Reason(key, text, frozenset((node,)))


NODE_RULES = (written_before, no_kernel)


def name_of(node: ir.Node) -> str:
    """Return what reports call a node: its name, or that of what it gives."""
    return node.name or node.outputs[0].name or node.op_type


def islands(site: Site) -> list[Reason]:
    """Return what the author computes in float32 on purpose: what follows from a cast of computed half precision.

    It ends where the numbers are cast down again. What leaves a branch or goes through a loop follows too.
    """
    joined: dict[Place, list[ir.Value]] = {}
    for value, maker in site.places.makers.items():
        if isinstance(maker, Joint):
            joined.setdefault(maker, []).append(value)
    graphs = tuple(graphs_of(site.model.graph))
    starts = [node for graph in graphs for node in graph if _widens_computed(node, site)]
    found: set[Place] = set()
    pending: list[Place] = list(starts)
    while pending:
        place = pending.pop()
        if place in found:
            continue
        found.add(place)
        made = place.outputs if isinstance(place, ir.Node) else joined.get(place, ())
        for value in made:
            reads = site.places.reads.get(value, ())
            pending += [
                read.place if isinstance(read.place, Joint) else read.user
                for read in reads
                if isinstance(read.place, Joint) or isinstance(read.user, ir.Node)
            ]
    return [
        Reason(
            _name_of_place(place),
            "the model computes it in float32 on purpose, from half precision",
            frozenset((place,)),
        )
        for place in site.places.all()
        if place in found
    ]


def _name_of_place(place: Place) -> str:
    assert isinstance(place, (ir.Node, Joint))
    return name_of(place if isinstance(place, ir.Node) else place.node)


def _widens_computed(node: ir.Node, site: Site) -> bool:
    return is_plain(node, "Cast") and is_float(node.outputs[0]) and _is_computed_half(node.inputs[0], site)


def _is_computed_half(value: ir.Value | None, site: Site) -> bool:
    """Return whether a value holds numbers of half precision that are neither given to the model nor constant."""
    if value is None or value.dtype not in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16):
        return False
    maker = value.producer()
    if maker is None:
        is_given = value in site.model.graph.inputs or value.is_initializer()
        return not is_given
    if is_plain(maker, "Constant"):
        return False
    return not is_neutral(maker) or any(_is_computed_half(given, site) for given in maker.inputs)


def reasons_of(site: Site) -> list[Reason]:
    """Return why places of a model stay in float32, one reason for each tensor, constant or node."""
    found: list[Reason] = []
    others: list[tuple[ir.Value, Range]] = []
    for value in site.places.makers:
        facts = site.facts_of(value)
        known = site.range_of(value)
        if facts is not None:
            found += _first(rule(site, value, facts) for rule in CONSTANT_RULES)
        elif known is not None:
            reasons = _first(rule(site, value, known) for rule in TENSOR_RULES)
            found += reasons
            if not reasons:
                others.append((value, known))
    for place in site.places.all():
        if isinstance(place, ir.Node):
            found += _first(rule(site, place) for rule in NODE_RULES)
    found += islands(site)
    covered = {place for reason in found for place in reason.places}
    for value, known in others:
        reason = own_error(site, value, known)
        if reason is not None and not reason.places <= covered:
            found.append(reason)
    return found


def _first(found: Iterable[Reason | None]) -> list[Reason]:
    reason = next((reason for reason in found if reason is not None), None)
    return [reason] if reason is not None else []


def named(site_of: Mapping[str, Site], keep: Sequence[str]) -> list[tuple[str, Reason]]:
    """Return the nodes that the user names, with their roles: by name or a value, by a pattern, or by operator.

    Raises:
        RecipeError: A name matches nothing.
    """
    nodes = [
        (role, node, frozenset(filter(None, (node.name, node.op_type, *keys))))
        for role, site in site_of.items()
        for node, keys in _nodes_with_keys(site.model.graph, "")
    ]
    found: list[tuple[str, Reason]] = []
    for entry in keep:
        matched = [
            (role, node)
            for role, node, names in nodes
            if entry in names or any(fnmatch.fnmatchcase(name, entry) for name in names)
        ]
        if not matched:
            known: Iterable[str] = {name for _, _, names in nodes for name in names}
            raise RecipeError(f"keep: no node is named {entry!r}{did_you_mean(entry, known)}")
        found += [(role, Reason(name_of(node), f"keep: {entry}", _with_bodies(node))) for role, node in matched]
    return found


def _with_bodies(node: ir.Node) -> frozenset[Place]:
    """Return a node and all that its branches or its body compute."""
    return frozenset((node, *(inner for body in bodies_of(node) for graph in graphs_of(body) for inner in graph)))


def _nodes_with_keys(graph: ir.Graph, path: str) -> Iterator[tuple[ir.Node, list[str]]]:
    for node in graph:
        yield node, [key_of_value(value, path) for value in node.outputs] + [value.name or "" for value in node.outputs]
        for name, body in named_bodies_of(node):
            yield from _nodes_with_keys(body, f"{path}{scope_name(node, name)}/")


def _number(number: float) -> str:
    return f"{number:,.0f}" if 1 <= abs(number) < 1e12 else f"{number:.3g}"
