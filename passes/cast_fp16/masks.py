"""Numbers below those of float16 that only hide others: masks that are added to scores, or selected into them."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum

import numpy as np
import onnx_ir as ir

from passes.audit_ranges import Range
from passes.audit_ranges.ranges import LARGEST
from passes.cast_fp16.casting import Hidden
from passes.cast_fp16.cutting import Place
from passes.cast_fp16.places import Map, is_float, is_plain
from passes.cast_fp16.weights import Facts

ABSORBED = 16.0
"""What is added to -65,504 and is smaller than this leaves -65,504: numbers of float16 are 32 apart there."""
_LOWEST, _INFINITE = "lowest", "infinite"
_NO_NUMBER = -1e30
"""No model computes this: it is a fill, such as the lowest number of float32."""

# Where hidden numbers end: the inputs of operators that make a probability of them.
_ENDS: Mapping[tuple[str, str], tuple[int, ...]] = {
    ("", "Softmax"): (0,),
    ("", "Attention"): (3,),
    ("com.microsoft", "Attention"): (5,),
    ("com.microsoft", "MultiHeadAttention"): (5,),
    ("com.microsoft", "GroupQueryAttention"): (10,),
}
_COMPARISONS = frozenset({"Equal", "Greater", "GreaterOrEqual", "Less", "LessOrEqual"})
# Which inputs of an operator pass hidden numbers on.
_PASSING: Mapping[str, tuple[int, ...]] = {
    "Add": (0, 1),
    "Concat": tuple(range(64)),
    "Expand": (0,),
    "Flatten": (0,),
    "Gather": (0,),
    "Identity": (0,),
    "Max": (0, 1),
    "Min": (0, 1),
    "Reshape": (0,),
    "Slice": (0,),
    "Squeeze": (0,),
    "Tile": (0,),
    "Transpose": (0,),
    "Trilu": (0,),
    "Unsqueeze": (0,),
    "Where": (1, 2),
}


class _Origin(Enum):
    LITERAL = "literal"
    SOURCE = "source"
    PASSED = "passed"


@dataclass(frozen=True)
class Masks:
    """The masks of a model that work in float16.

    Args:
        inside: Values that hold hidden numbers and may be float16, and those that are made of nothing else.
        sources: Those of them that are computed, in float32.
        outsiders: Places that read those and do not hide with them: they want the numbers themselves.
        softened: Nodes that get hidden numbers, and what is infinite in them means nothing.
        hidden: How they are written.
        notes: What becomes of fills, in words.
    """

    inside: frozenset[ir.Value] = frozenset()
    sources: frozenset[ir.Value] = frozenset()
    outsiders: frozenset[Place] = frozenset()
    softened: frozenset[ir.Node] = frozenset()
    hidden: Hidden = field(default_factory=Hidden)
    notes: tuple[str, ...] = ()

    def and_(self, other: Masks) -> Masks:
        """Return the masks of both."""
        return Masks(
            self.inside | other.inside,
            self.sources | other.sources,
            self.outsiders | other.outsiders,
            self.softened | other.softened,
            Hidden(
                self.hidden.literals | other.hidden.literals,
                self.hidden.computed | other.hidden.computed,
                self.hidden.ends | other.hidden.ends,
            ),
            self.notes + other.notes,
        )


def find_masks(
    places: Map,
    range_of: Callable[[ir.Value], Range | None],
    facts_of: Callable[[ir.Value], Facts | None],
    headroom: float,
) -> Masks:
    """Find the masks of a model and say how float16 can hold them.

    A mask is a group of tensors that hold numbers below the headroom of float16, are passed on by adding, selecting and
    moving, end in a Softmax or an Attention, and come of constants, of positions alone, or of a fill that no model
    computes. Its fills become -65,504, the lowest number of float16, if all that is added to them is small enough to
    vanish there as it does in float32; so a row in which all is masked stays what it was, and nothing is infinite.
    If more is added, they become -inf, and the sums are raised to -65,504 again before the Softmax. Where neither gives
    what float32 gave, the group is no mask and stays in float32.

    Args:
        places: The places of the model.
        range_of: What an audit knows of a value.
        facts_of: What is known of a value that is constant.
        headroom: The share of 65,504 that a tensor may use.
    """
    limit = headroom * LARGEST
    exact = _Finder(places, range_of, facts_of, limit, multiplies=True).run()
    others = _Finder(places, range_of, facts_of, limit, multiplies=False).run(but=exact.inside)
    return exact.and_(others)


class _Finder:
    def __init__(
        self,
        places: Map,
        range_of: Callable[[ir.Value], Range | None],
        facts_of: Callable[[ir.Value], Facts | None],
        limit: float,
        *,
        multiplies: bool,
    ) -> None:
        self._places = places
        self._range_of = range_of
        self._facts_of = facts_of
        self._limit = limit
        self._multiplies = multiplies
        self._origin = {value: origin for value in places.makers if (origin := self._origin_of(value)) is not None}

    def run(self, but: Container[ir.Value] = ()) -> Masks:
        """Return the masks that have none of these values; where fills are multiplied, they must stay finite."""
        found = Masks()
        for group in self._groups():
            ends = self._ends(group)
            if not ends or any(value in but for value in group) or not self._are_sound(group):
                continue
            treatment = self._treatment(group)
            if treatment == _LOWEST:
                found = found.and_(self._finite(group))
            elif treatment == _INFINITE and not self._multiplies:
                found = found.and_(self._infinite(group, ends))
        return found

    def _finite(self, group: Sequence[ir.Value]) -> Masks:
        fills = [value for value in group if self._origin[value] is not _Origin.PASSED and self._low(value) < -LARGEST]
        hidden = Hidden(
            literals=frozenset(value for value in group if self._origin[value] is _Origin.LITERAL),
            computed=frozenset(value for value in group if self._origin[value] is not _Origin.LITERAL),
        )
        notes = tuple(f"{value.name}: fills of {self._low(value):.3g} become -65,504" for value in fills)
        return self._masks(group, hidden, notes)

    def _infinite(self, group: Sequence[ir.Value], ends: Iterable[tuple[ir.Node, int]]) -> Masks:
        note = f"{group[0].name}: fills become -inf, and sums with them are raised to -65,504 at the end"
        return self._masks(group, Hidden(ends=frozenset(ends)), (note,))

    def _masks(self, group: Sequence[ir.Value], hidden: Hidden, notes: tuple[str, ...]) -> Masks:
        sources = [value for value in group if self._origin[value] is _Origin.SOURCE]
        users = [user for value in group for user, _ in value.uses()]
        makers = [node for value in group if (node := value.producer()) is not None]
        reads = [read for value in sources for read in self._places.reads.get(value, ())]
        return Masks(
            inside=frozenset(group),
            sources=frozenset(sources),
            outsiders=frozenset(read.place for read in reads if not self._may_read(read.user, read.index)),
            softened=frozenset((*users, *makers)),
            hidden=hidden,
            notes=notes,
        )

    def _low(self, value: ir.Value) -> float:
        facts = self._facts_of(value)
        if facts is not None:
            return facts.low
        known = self._range_of(value)
        return known.low if known is not None else 0.0

    def _high(self, value: ir.Value) -> float:
        facts = self._facts_of(value)
        if facts is not None:
            return facts.high
        known = self._range_of(value)
        return known.high if known is not None else 0.0

    def _origin_of(self, value: ir.Value) -> _Origin | None:
        """Return where the hidden numbers of a value come from, None if it has none."""
        if self._low(value) >= -self._limit:
            return None
        node = value.producer()
        if self._facts_of(value) is not None or is_plain(node, "ConstantOfShape"):
            return _Origin.LITERAL
        if (
            node is not None
            and not node.domain
            and any(self._low(given) < -self._limit for given, _ in self._passed(node) if is_float(given))
        ):
            return _Origin.PASSED
        return _Origin.SOURCE

    def _passed(self, node: ir.Node) -> Iterator[tuple[ir.Value, int]]:
        """Yield the inputs of a node of which the numbers come out again, or zero."""
        if is_plain(node, "Mul") and self._multiplies:
            one, other = node.inputs
            yield from ((value, index) for index, (value, by) in enumerate(((one, other), (other, one)))
                        if value is not None and by is not None and self._is_flag(by))  # fmt: skip
        for index in _PASSING.get(node.op_type, ()) if not node.domain else ():
            value = node.inputs[index] if index < len(node.inputs) else None
            if value is not None:
                yield value, index

    def _is_flag(self, value: ir.Value) -> bool:
        known = self._range_of(value)
        return known is not None and known.is_whole and known.low >= 0 and known.high <= 1

    def _groups(self) -> list[list[ir.Value]]:
        """Return the values with hidden numbers that hang together, in the order in which they are made."""
        group_of = {value: [value] for value in self._origin}
        for value, origin in self._origin.items():
            if origin is not _Origin.PASSED:
                continue
            node = value.producer()
            assert node is not None
            for given, _ in self._passed(node):
                if given in group_of and group_of[given] is not group_of[value]:
                    _join(group_of, given, value)
            for user, _ in value.uses():
                for given, _ in self._compared(user):
                    if given in group_of and group_of[given] is not group_of[value]:
                        _join(group_of, given, value)
        order = {value: number for number, value in enumerate(self._origin)}
        groups = {id(group): group for group in group_of.values()}
        return [sorted(group, key=order.__getitem__) for group in groups.values()]

    def _compared(self, node: ir.Node) -> Iterator[tuple[ir.Value, int]]:
        if is_plain(node, *_COMPARISONS):
            yield from ((value, index) for index, value in enumerate(node.inputs) if value is not None)

    def _ends(self, group: list[ir.Value]) -> list[tuple[ir.Node, int]]:
        return [(user, index) for value in group for user, index in value.uses() if is_end(user, index)]

    def _are_sound(self, group: Sequence[ir.Value]) -> bool:
        """Return whether float16 can hold the values of a mask, and tells those apart that are told apart."""
        fills = {self._low(value) for value in group if self._origin[value] is not _Origin.PASSED}
        is_compared = any(is_plain(user, *_COMPARISONS) for value in group for user, _ in value.uses())
        return all(map(self._is_sound, group)) and not (is_compared and len(fills) > 1)

    def _is_sound(self, value: ir.Value) -> bool:
        """Return whether float16 can hold a value of a mask, given how it is made and read."""
        if self._high(value) > self._limit:
            return False
        if self._origin[value] is _Origin.SOURCE and not self._is_fill(value):
            return False
        is_free = self._origin[value] is not _Origin.PASSED
        return all(self._may_read(read.user, read.index) or is_free for read in self._places.reads.get(value, ()))

    def _is_fill(self, value: ir.Value) -> bool:
        known = self._range_of(value)
        return known is not None and (known.kind != "activation" or known.low <= _NO_NUMBER)

    def _may_read(self, user: ir.Node | ir.Graph, index: int) -> bool:
        if isinstance(user, ir.Graph):
            return False
        if is_end(user, index) or is_plain(user, *_COMPARISONS):
            return True
        return any(index == passed for _, passed in self._passed(user))

    def _treatment(self, group: list[ir.Value]) -> str | None:
        """Return what hidden numbers become: the lowest of float16, infinite, or None where neither will do."""
        if any(map(self._is_finite_sum, group)):
            return None
        added = [
            other
            for value in group
            if self._origin[value] is _Origin.PASSED and is_plain(value.producer(), "Add")
            for other in value.producer().inputs  # type: ignore[union-attr]
            if other is not None and other not in self._origin
        ]
        if all(max(-self._low(other), self._high(other)) <= ABSORBED / 2 for other in added):
            return _LOWEST
        has_infinities = any(known is not None and known.infinite for known in map(self._range_of, group))
        return None if has_infinities else _INFINITE

    def _is_finite_sum(self, value: ir.Value) -> bool:
        """Return whether two hidden numbers may be added that are finite in float32, and would not be in float16."""
        node = value.producer()
        if node is None or not is_plain(node, "Add"):
            return False
        lows = [np.float32(self._low(given)) for given in node.inputs if given is not None and given in self._origin]
        with np.errstate(over="ignore"):
            return len(lows) == 2 and bool(np.isfinite(lows[0] + lows[1]))


def is_end(user: ir.Node, index: int) -> bool:
    """Return whether an operator makes a probability of what it is given there."""
    return index in _ENDS.get((user.domain, user.op_type), ())


def _join(group_of: dict[ir.Value, list[ir.Value]], one: ir.Value, other: ir.Value) -> None:
    kept, gone = group_of[one], group_of[other]
    kept += gone
    for value in gone:
        group_of[value] = kept
