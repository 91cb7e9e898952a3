"""The minimum cut of casts: as cheap as the best of all assignments, with the fewest places in float32."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from passes.cast_fp16.cutting import Flow, Place, Precisions


def cost_of(problem: Precisions, float32: frozenset[Place]) -> int:
    """Count casts one by one."""
    total = 0
    for flow in problem.flows:
        total += flow.cost * any((reader in float32) != (flow.maker in float32) for reader in flow.readers)
    return total


def places_of(problem: Precisions) -> list[Place]:
    named = {place for flow in problem.flows for place in (flow.maker, *flow.readers)}
    return sorted(named | problem.half | problem.float32, key=str)


def all_solutions(problem: Precisions) -> dict[frozenset[Place], int]:
    free = [place for place in places_of(problem) if place not in problem.half | problem.float32]
    found = {}
    for choice in itertools.product((False, True), repeat=len(free)):
        chosen = frozenset(place for place, is_float in zip(free, choice, strict=True) if is_float)
        found[chosen | problem.float32] = cost_of(problem, chosen | problem.float32)
    return found


@pytest.mark.parametrize("seed", range(60))
def test_no_assignment_is_cheaper_and_none_as_cheap_has_fewer_in_float32(seed: int):
    random = np.random.default_rng(seed)
    places = [f"p{index}" for index in range(int(random.integers(3, 10)))]
    flows = [
        Flow(
            str(random.choice(places)),
            tuple(str(place) for place in random.choice(places, size=int(random.integers(1, 4)))),
            int(random.integers(1, 8)),
        )
        for _ in range(int(random.integers(2, 14)))
    ]
    kinds = random.integers(0, 4, len(places))
    problem = Precisions(
        {place for place, kind in zip(places, kinds, strict=True) if kind == 0},
        {place for place, kind in zip(places, kinds, strict=True) if kind == 1},
        flows,
    )
    known = all_solutions(problem)
    float32, cost = problem.solve()
    best = min(known.values())
    assert cost == best == known[float32 | problem.float32]
    least = [chosen for chosen, price in known.items() if price == best]
    assert all(float32 <= chosen for chosen in least)


def test_one_cast_serves_all_readers_of_the_other_precision():
    flows = [Flow("norm", ("query", "key", "value"), 10)]
    problem = Precisions({"query", "key", "value"}, {"norm"}, flows)
    assert problem.solve() == (frozenset({"norm"}), 10)


def test_what_moves_numbers_goes_where_fewer_elements_are_cast():
    flows = [Flow("norm", ("slice",), 100), Flow("slice", ("product",), 10)]
    problem = Precisions({"product"}, {"norm"}, flows)
    assert problem.solve() == (frozenset({"norm", "slice"}), 10)


def test_of_two_ways_that_cost_the_same_the_one_with_more_in_float16_is_taken():
    flows = [Flow("norm", ("reshape",), 10), Flow("reshape", ("product",), 10)]
    problem = Precisions({"product"}, {"norm"}, flows)
    assert problem.solve() == (frozenset({"norm"}), 10)


def test_nothing_in_float32_needs_no_cast():
    problem = Precisions({"product"}, set(), [Flow("reshape", ("product",), 10)])
    assert problem.solve() == (frozenset(), 0)


def test_the_order_in_which_things_are_told_changes_nothing():
    random = np.random.default_rng(0)
    flows = [
        Flow(int(a), tuple(int(b) for b in random.choice(40, 3)), int(random.integers(1, 5)))
        for a in random.choice(40, 80)
    ]
    solutions = set()
    for _ in range(5):
        shuffled = [flows[index] for index in random.permutation(len(flows))]
        solutions.add(Precisions({0, 1, 2}, {37, 38, 39}, shuffled).solve())
    assert len(solutions) == 1
