"""Where casts cost least: a minimum cut between what must be float16 and what must be float32."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass, field

from surgery.cuts import FOREVER, Cut

Place = Hashable
"""Something that computes or holds numbers in one precision: a node, an input, a weight, the state of a loop."""

_HALF, _FLOAT = "float16", "float32"


@dataclass(frozen=True)
class Flow:
    """A tensor: where it is made, where it is read, and what one cast of it costs.

    Args:
        maker: The place that makes it.
        readers: The places that read it.
        cost: Elements that a cast moves. All readers of the other precision share one cast.
    """

    maker: Place
    readers: tuple[Place, ...]
    cost: int


@dataclass
class Precisions:
    """The problem of which place computes in which precision.

    Args:
        half: Places that must be float16.
        float32: Places that must be float32.
        flows: The tensors between places.
    """

    half: set[Place] = field(default_factory=set)
    float32: set[Place] = field(default_factory=set)
    flows: list[Flow] = field(default_factory=list)

    def solve(self) -> tuple[frozenset[Place], int]:
        """Return the places in float32, and what the casts cost together: the least that is possible.

        Of several solutions it is the one with the fewest places in float32: one of the source sides of all minimum
        cuts is part of all others (Picard and Queyranne, 1980), so there is no tie to break. A tensor needs one cast if
        any reader has another precision than its maker, which an extra vertex for each direction says: it takes the
        side of a reader that differs, at infinite cost otherwise, and the price of the cast lies between it and the
        maker.
        """
        cut = Cut()
        for place in self.half:
            cut.edge(("place", place), _HALF, FOREVER)
        for place in self.float32:
            cut.edge(_FLOAT, ("place", place), FOREVER)
        for number, flow in enumerate(self.flows):
            _add(cut, number, flow)
        cost, side = cut.minimum(_FLOAT, _HALF)
        return frozenset(vertex[1] for vertex in side if isinstance(vertex, tuple) and vertex[0] == "place"), cost


def _add(cut: Cut, number: int, flow: Flow) -> None:
    """An edge from u to v is cut, at its capacity, when u is in float32 and v in float16."""
    maker = ("place", flow.maker)
    readers = [("place", reader) for reader in dict.fromkeys(flow.readers) if reader != flow.maker]
    if not readers:
        return
    narrowing, widening = ("narrowing", number), ("widening", number)
    cut.edge(maker, narrowing, flow.cost)  # made in float32, wanted in float16
    cut.edge(widening, maker, flow.cost)  # made in float16, wanted in float32
    for reader in readers:
        cut.edge(narrowing, reader, FOREVER)
        cut.edge(reader, widening, FOREVER)
