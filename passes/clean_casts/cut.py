"""The cheapest way to part a graph in two: a minimum cut."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable
from itertools import pairwise

FOREVER = 1 << 30
"""The capacity of an edge that must not be cut."""


class Cut:
    """A directed graph with capacities, of which the nodes are any hashable things.

    Edmonds and Karp's algorithm: the capacities here are ones, and so few that nothing faster is needed.
    """

    def __init__(self) -> None:
        self._left: defaultdict[Hashable, dict[Hashable, int]] = defaultdict(dict)

    def edge(self, start: Hashable, end: Hashable, capacity: int) -> None:
        """Add an edge; two edges between the same nodes are as one of both capacities."""
        self._left[start][end] = self._left[start].get(end, 0) + capacity
        self._left[end].setdefault(start, 0)

    def minimum(self, source: Hashable, sink: Hashable) -> tuple[int, set[Hashable]]:
        """Return the cost of the cheapest cut, and the smallest set of nodes on the side of the source that has it.

        There is one such set, whatever the order in which paths are found.
        """
        cost = 0
        while True:
            came_from = self._reach(source)
            if sink not in came_from:
                return cost, set(came_from)
            path = [sink]
            while path[-1] != source:
                path.append(came_from[path[-1]])
            steps = [(start, end) for end, start in pairwise(path)]
            width = min(self._left[start][end] for start, end in steps)
            cost += width
            for start, end in steps:
                self._left[start][end] -= width
                self._left[end][start] += width

    def _reach(self, source: Hashable) -> dict[Hashable, Hashable]:
        """Return all that can still be reached, each with where it was reached from."""
        came_from: dict[Hashable, Hashable] = {source: source}
        waiting = deque([source])
        while waiting:
            start = waiting.popleft()
            for end, capacity in self._left[start].items():
                if capacity and end not in came_from:
                    came_from[end] = start
                    waiting.append(end)
        return came_from
