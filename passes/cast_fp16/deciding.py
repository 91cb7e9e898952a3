"""From models and what an audit found to models in half precision: the problem of precisions, solved and written."""

from __future__ import annotations

import fnmatch
import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
from onnx_ir.passes.common import InlinePass

from passes.audit_ranges import Ranges
from passes.cast_fp16.casting import KEPT, Halves, Written, cast
from passes.cast_fp16.cutting import Place, Precisions
from passes.cast_fp16.places import (
    Port,
    Weight,
    computes,
    is_float,
    map_of,
    port_of,
)
from passes.cast_fp16.rules import Limits, Reason, Site, named, reasons_of
from passes.cast_fp16.weights import Survey
from surgery.element_types import infer_types
from surgery.errors import RecipeError
from surgery.graphs import graphs_of
from surgery.options import did_you_mean
from surgery.storage import find_twins, key_of

Unit = tuple[str, str]
"""A tensor that may be kept in float32 to be more exact: its role and key."""


@dataclass(frozen=True)
class Interface:
    """Which inputs and outputs stay float32.

    Args:
        keep: All, none, or those of these names or patterns.
        keep_cache: Those of the cache, too.
    """

    keep: str | tuple[str, ...] = "all"
    keep_cache: bool = False

    def ports(self, models: Mapping[str, ir.Model]) -> frozenset[Port]:
        """Return the places of inputs and outputs that stay float32.

        Raises:
            RecipeError: A name is neither an input nor an output.
        """
        values = [
            (role, value) for role, model in models.items() for value in (*model.graph.inputs, *model.graph.outputs)
        ]
        known = [value.name or "" for _, value in values]
        names = () if isinstance(self.keep, str) else self.keep
        for name in names:
            if not fnmatch.filter(known, name):
                raise RecipeError(f"keep_io: no input or output is named {name!r}{did_you_mean(name, known)}")
        return frozenset(
            port_of(value, role) for role, value in values if self._keeps(port_of(value, role), value, names)
        )

    def _keeps(self, port: Port, value: ir.Value, names: Sequence[str]) -> bool:
        if any(fnmatch.fnmatchcase(value.name or "", name) for name in names):
            return True
        return self.keep_cache if port.is_cache else self.keep == "all"


@dataclass(frozen=True)
class Attempt:
    """Models in half precision.

    Args:
        models: By role.
        reasons: What stays in float32, by role.
        notes: What else is to be said.
        written: What was written, by role.
        kept: How many nodes that compute do so in float32.
        nodes: How many nodes there are.
        weak: The tensors that could be kept to be more exact, those with the largest measured error first.
    """

    models: Mapping[str, ir.Model]
    reasons: Mapping[str, Sequence[Reason]]
    notes: Sequence[str]
    written: Mapping[str, Written]
    kept: int
    nodes: int
    weak: Sequence[Unit]

    @property
    def casts(self) -> int:
        """How many casts were added."""
        return sum(written.casts for written in self.written.values())

    @property
    def changed(self) -> int:
        """How many tensors are float16 that were float32."""
        return sum(written.changed for written in self.written.values())

    @property
    def saved_bytes(self) -> int:
        """How many bytes the weights take less, those that are shared counted once."""
        halved = {key_of(tensor): tensor.nbytes // 2 for one in self.written.values() for tensor in one.halved}
        doubled = {key_of(tensor): tensor.nbytes // 2 for one in self.written.values() for tensor in one.doubled}
        return sum(halved.values()) - sum(bytes_ for key, bytes_ in doubled.items())


@dataclass
class Decider:
    """Casts models together, since they share weights.

    Args:
        models: By role; they stay as they are.
        others: Models of the bundle that are not cast, by role.
        ranges: What an audit found, by role.
        keep: What the user names.
        interface: Which inputs and outputs stay float32.
        limits: From where on a number is a reason.
    """

    models: Mapping[str, ir.Model]
    others: Mapping[str, ir.Model]
    ranges: Mapping[str, Ranges]
    keep: Sequence[str] = ()
    interface: Interface = field(default_factory=Interface)
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        self._alike = _alike({**self.models, **self.others})
        self._halves = Halves(self._alike)
        self._survey = Survey(self._alike)
        self._survey.read(tensor for model in self.models.values() for tensor in _weights(model))

    def attempt(self, more: Iterable[Unit] = ()) -> Attempt:
        """Cast clones of the models, with more tensors kept in float32 than rules say."""
        models = {role: _prepared(model) for role, model in self.models.items()}
        sites = {
            role: Site(role, model, map_of(model, role, self._alike), self.ranges[role], self.limits, self._survey)
            for role, model in models.items()
        }
        reasons: dict[str, list[Reason]] = {role: reasons_of(site) for role, site in sites.items()}
        for role, reason in named(sites, self.keep):
            reasons[role].append(reason)
        for role, key in more:
            reasons[role].append(_refined(sites[role], key))
        problem = self._problem(sites, reasons)
        float32, _ = problem.solve()
        float32 |= problem.float32
        notes = [*self._notes(sites, float32), *self._shared(sites, float32)]
        kept = sum(computes(place) and place in float32 for site in sites.values() for place in site.places.all())
        nodes = sum(1 for model in models.values() for graph in graphs_of(model.graph) for _ in graph)
        weak = _weak(sites, float32)
        for site in sites.values():
            _write_reasons(site, reasons[site.role])
        written = {
            role: cast(models[role], site.places, float32, self._halves, site.masks.hidden)
            for role, site in sites.items()
        }
        return Attempt(models, reasons, notes, written, kept, nodes, weak)

    def _problem(self, sites: Mapping[str, Site], reasons: Mapping[str, Sequence[Reason]]) -> Precisions:
        problem = Precisions()
        ports = self.interface.ports({role: site.model for role, site in sites.items()})
        for role, site in sites.items():
            problem.float32.update(site.places.fixed)
            problem.float32.update(place for reason in reasons[role] for place in reason.places)
        for site in sites.values():
            for place in site.places.all():
                if isinstance(place, Port) and place in ports:
                    problem.float32.add(place)
                elif place not in problem.float32 and not _is_free(place, site):
                    problem.half.add(place)
            problem.flows += site.places.flows(lambda value, site=site: _elements(value, site))  # type: ignore[misc]
        problem.half -= problem.float32
        return problem

    def _notes(self, sites: Mapping[str, Site], float32: frozenset[Place]) -> list[str]:
        """Say what becomes of masks and of small numbers."""
        found = list(dict.fromkeys(note for site in sites.values() for note in site.masks.notes))
        for role, site in sites.items():
            unseen = [key for value, key in site.keys.items() if is_float(value) and key in site.ranges.unseen]
            if unseen:
                found.append(f"{role}: no sample reached {len(unseen)} tensors, such as {unseen[0]!r}: cast unseen")
        vanishing: dict[Place, tuple[int, str]] = {}
        for site in sites.values():
            for value, maker in site.places.makers.items():
                facts = site.facts_of(value)
                if facts is None or {maker, *site.places.readers(value)} <= float32:
                    continue
                if facts.vanishing:
                    said = f"{facts.vanishing:,} of the {facts.elements:,} in {site.key_of(value)}"
                    vanishing.setdefault(maker, (facts.vanishing, said))
        if vanishing:
            count = sum(number for number, _ in vanishing.values())
            _, worst = max(vanishing.values())
            numbers = "1 number is" if count == 1 else f"{count:,} numbers are"
            found.append(f"{numbers} too small and become 0, at most {worst}")
        return found

    def _shared(self, sites: Mapping[str, Site], float32: frozenset[Place]) -> list[str]:
        """Say which weights several models share and one of them wants in the other precision."""
        wanted: defaultdict[Place, set[tuple[str, bool]]] = defaultdict(set)
        names: dict[Place, str] = {}
        for role, site in sites.items():
            for value, maker in site.places.makers.items():
                if isinstance(maker, Weight):
                    names.setdefault(maker, value.name or "")
                    wanted[maker].update((role, place in float32) for place in site.places.readers(value))
        for role, model in self.others.items():
            for key in _keys_of_weights(model):
                weight = Weight(self._alike.get(key, key))
                if weight in wanted:
                    wanted[weight].add((role, True))
        found: list[str] = []
        for place, uses in wanted.items():
            wide = {role for role, is_float32 in uses if is_float32}
            narrow = {role for role, is_float32 in uses if not is_float32}
            if wide and narrow and len(wide | narrow) > 1:
                found.append(
                    f"{names[place]}: two copies, float16 for {', '.join(sorted(narrow))}"
                    f" and float32 for {', '.join(sorted(wide))}"
                )
        return found


def _prepared(model: ir.Model) -> ir.Model:
    """Return a clone without local functions, of which all types are known."""
    clone = model.clone()
    if clone.functions:
        InlinePass()(clone)
    infer_types(clone)
    return clone


def _alike(models: Mapping[str, ir.Model]) -> dict[Hashable, Hashable]:
    """Return for each weight that is equal to an earlier one the key of that."""
    tensors = {key_of(tensor): tensor for model in models.values() for tensor in _weights(model)}
    keys = list(tensors)
    return {keys[index]: keys[group[0]] for group in find_twins(list(tensors.values())) for index in group}


def _weights(model: ir.Model) -> Iterable[ir.TensorProtocol]:
    for graph in graphs_of(model.graph):
        for value in graph.initializers.values():
            if value.const_value is not None and value.const_value.dtype == ir.DataType.FLOAT:
                yield value.const_value


def _keys_of_weights(model: ir.Model) -> Iterable[Hashable]:
    return (key_of(tensor) for tensor in _weights(model))


def _is_free(place: Place, site: Site) -> bool:
    """Return whether it is nobody's business in which precision a place is: only casts cost."""
    if not isinstance(place, (ir.Node, Port)):
        return True
    if isinstance(place, Port):
        return False
    if not computes(place):
        return True
    known = [site.range_of(value) for value in place.outputs if is_float(value)]
    return bool(known) and all(one is not None and one.kind != "activation" for one in known)


def _elements(value: ir.Value, site: Site) -> int:
    """Return how many elements a cast of a value moves, on average over the samples, and in all trips of a loop."""
    known = site.range_of(value)
    if known is not None:
        return max(1, round(known.elements / max(1, site.ranges.samples)))
    shape = value.const_value.shape if value.const_value is not None else value.shape
    sizes = [size if isinstance(size, int) else 1 for size in shape] if shape is not None else []
    return max(1, math.prod(sizes))


def _refined(site: Site, key: str) -> Reason:
    value = next(value for value, known in site.keys.items() if known == key)
    return Reason(key, "kept until the verdict was within its limits", _unit(site, value))


def _unit(site: Site, value: ir.Value) -> frozenset[Place]:
    """Return what must be float32 for a node to see and to give float32."""
    node = value.producer()
    return site.places.around(value) | (site.feeding(node) if node is not None else frozenset())


def _weak(sites: Mapping[str, Site], float32: frozenset[Place]) -> list[Unit]:
    found: list[tuple[float, str, str]] = []
    for role, site in sites.items():
        for value in site.places.makers:
            known = site.range_of(value)
            if known is None or not known.error_rms or not known.rms or value in site.masks.inside:
                continue
            if not _unit(site, value) <= float32:
                found.append((-known.error_rms / known.rms, role, site.key_of(value)))
    return [(role, key) for _, role, key in sorted(found)]


def _write_reasons(site: Site, reasons: Sequence[Reason]) -> None:
    """Write into the metadata of nodes that stay in float32 why they do, for Netron and for a later run."""
    for reason in reasons:
        for place in reason.places:
            if isinstance(place, ir.Node) and KEPT not in place.metadata_props:
                place.metadata_props[KEPT] = str(reason)


def details_of(attempt: Attempt) -> tuple[str, ...]:
    """Return a line for each reason and note; roles are named where there are several."""
    lines = [
        f"{role}: {reason}" if len(attempt.models) > 1 else str(reason)
        for role, reasons in attempt.reasons.items()
        for reason in reasons
    ]
    return tuple(dict.fromkeys([*lines, *attempt.notes]))
