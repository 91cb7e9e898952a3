"""Minimum cuts: as cheap as any, and the smallest of the cheapest."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from surgery.cuts import FOREVER, Cut


def test_the_cheapest_cut_is_the_one_found_by_trying_all():
    random = np.random.default_rng(0)
    for _ in range(60):
        count = int(random.integers(1, 6))
        nodes = ["s", *range(count), "t"]
        edges = [
            (start, end, int(random.choice([1, 1, 2, FOREVER])))
            for start, end in itertools.permutations(nodes, 2)
            if start != "t" and end != "s" and random.random() < 0.4 and (start, end) != ("s", "t")
        ]
        cut = Cut()
        cut.edge("s", "t", 0)
        for edge in edges:
            cut.edge(*edge)
        sides = [{"s", *chosen} for size in range(count + 1) for chosen in itertools.combinations(range(count), size)]
        costs = [sum(edge[2] for edge in edges if edge[0] in side and edge[1] not in side) for side in sides]
        cost, side = cut.minimum("s", "t")
        assert cost == min(costs)
        smallest = min((side for side, price in zip(sides, costs, strict=True) if price == cost), key=len)
        assert side == smallest


def test_cuts_of_larger_graphs_cost_what_networkx_finds():
    networkx = pytest.importorskip("networkx")
    random = np.random.default_rng(0)
    for count, density in itertools.product((20, 60, 120), (0.03, 0.1, 0.3)):
        cut, graph = Cut(), networkx.DiGraph()
        graph.add_nodes_from(range(count))
        cut.edge(0, 1, 0)
        for start, end in itertools.permutations(range(count), 2):
            if random.random() < density:
                capacity = int(random.integers(1, 1_000_000))
                cut.edge(start, end, capacity)
                graph.add_edge(end, start, capacity=capacity)
        # networkx gives the smallest side of the sink: with all edges the other way round that is the source's here.
        cost, (_, side) = networkx.minimum_cut(graph, 1, 0)
        assert cut.minimum(0, 1) == (cost, side)
