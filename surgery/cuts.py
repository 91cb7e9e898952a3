"""The cheapest way to part a graph in two: a minimum cut."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Mapping
from itertools import pairwise

FOREVER = 1 << 62
"""The capacity of an edge that must not be cut."""


class Cut:
    """A directed graph with capacities, of which the nodes are any hashable things.

    Dinic's algorithm (1970): all that the shortest paths can carry, then the next longer ones. For the many small cuts
    of `clean_casts` and the large one of `cast_fp16` networkx takes two to twenty times as long, and 0.2 s to import.
    """

    def __init__(self) -> None:
        self._left: defaultdict[Hashable, dict[Hashable, int]] = defaultdict(dict)

    def edge(self, start: Hashable, end: Hashable, capacity: int) -> None:
        """Add an edge; two edges between the same nodes are as one of both capacities."""
        self._left[start][end] = self._left[start].get(end, 0) + capacity
        self._left[end].setdefault(start, 0)

    def minimum(self, source: Hashable, sink: Hashable) -> tuple[int, set[Hashable]]:
        """Return the cost of the cheapest cut, and the smallest set of nodes on the side of the source that has it.

        There is one such set, whatever the order in which paths are found: all others contain it (Picard and Queyranne,
        1980).
        """
        cost = 0
        while sink in (distances := self._distances(source, sink)):
            cost += self._fill(source, sink, distances)
        return cost, set(distances)

    def _distances(self, source: Hashable, sink: Hashable) -> dict[Hashable, int]:
        """Return how many edges with something left lead to each node that is no further than the sink."""
        found: dict[Hashable, int] = {source: 0}
        waiting = deque([source])
        while waiting and sink not in found:
            start = waiting.popleft()
            for end, capacity in self._left[start].items():
                if capacity and end not in found:
                    found[end] = found[start] + 1
                    waiting.append(end)
        return found

    def _fill(self, source: Hashable, sink: Hashable, distances: Mapping[Hashable, int]) -> int:
        """Send all along the shortest paths that they can carry, and return how much."""
        ways: dict[Hashable, list[Hashable]] = {}
        sent, path = 0, [source]
        while path:
            last = path[-1]
            if last == sink:
                sent += self._send(path)
                continue
            if last not in ways:
                ways[last] = [end for end in self._left[last] if distances.get(end) == distances[last] + 1]
            while ways[last] and not self._left[last][ways[last][-1]]:
                ways[last].pop()
            if ways[last]:
                path.append(ways[last][-1])
                continue
            path.pop()
            if path:
                ways[path[-1]].pop()
        return sent

    def _send(self, path: list[Hashable]) -> int:
        """Send what a path can carry, shorten it to where nothing is left, and return how much that was."""
        steps = list(pairwise(path))
        width = min(self._left[start][end] for start, end in steps)
        for start, end in steps:
            self._left[start][end] -= width
            self._left[end][start] += width
        full = next(index for index, (start, end) in enumerate(steps) if not self._left[start][end])
        del path[full + 1 :]
        return width
