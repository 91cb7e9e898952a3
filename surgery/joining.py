"""Two exports of one network: which nodes are the same, told by the bytes of their weights and never by names."""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Hashable, Iterator, Mapping, Sequence

import onnx_ir as ir

from surgery.graphs import graphs_of
from surgery.storage import find_twins

# Shorter constants (an epsilon, a shape) say nothing of who uses them.
LEAST_BYTES = 64
# Of what consumes weights. Below, two models share a table or two but are no exports of one network.
LEAST_SHARE = 0.5


def join_nodes(one: ir.Model, other: ir.Model) -> dict[ir.Node, ir.Node]:
    """Return the nodes of one model that are in another too, with their likes there.

    Nodes that consume the same weights, byte for byte, are anchors where no other node of their models does the same.
    From an anchor on, what makes its inputs and what reads its outputs is joined as long as operators and weights
    agree and there is one candidate. What is not found so stays out.

    Args:
        one: A model; its weights are compared with those of the other, and each is read at most once.
        other: The other; none is changed.

    Returns:
        Nothing if fewer than half of what consumes weights has an anchor in the other model.
    """
    return _Joiner(one, other).run()


class _Joiner:
    def __init__(self, one: ir.Model, other: ir.Model) -> None:
        self._graphs = [tuple(graphs_of(model.graph)) for model in (one, other)]
        self._weights = _weights((*self._graphs[0], *self._graphs[1]))
        self._found: dict[ir.Node, ir.Node] = {}
        self._taken: set[ir.Node] = set()

    def run(self) -> dict[ir.Node, ir.Node]:
        ours, theirs = (self._anchors(graphs) for graphs in self._graphs)
        anchors = [
            (nodes[0], theirs[key][0])
            for key, nodes in ours.items()
            if len(nodes) == 1 and len(theirs.get(key, ())) == 1
        ]
        if len(anchors) < LEAST_SHARE * min(len(ours), len(theirs)):
            return {}
        waiting = deque(anchors)
        for pair in anchors:
            self._join(*pair)
        while waiting:
            for pair in self._beside(*waiting.popleft()):
                if self._join(*pair):
                    waiting.append(pair)
        return self._found

    def _anchors(self, graphs: Sequence[ir.Graph]) -> Mapping[Hashable, list[ir.Node]]:
        found: defaultdict[Hashable, list[ir.Node]] = defaultdict(list)
        for graph in graphs:
            for node in graph:
                weights = self._weights_of(node)
                if any(weight is not None for weight in weights):
                    found[node.domain, node.op_type, weights].append(node)
        return found

    def _weights_of(self, node: ir.Node) -> tuple[int | None, ...]:
        return tuple(self._weights.get(value) if value is not None else None for value in node.inputs)

    def _join(self, one: ir.Node, other: ir.Node) -> bool:
        if one in self._found or other in self._taken or not self._are_alike(one, other):
            return False
        self._found[one] = other
        self._taken.add(other)
        return True

    def _are_alike(self, one: ir.Node, other: ir.Node) -> bool:
        return one.op_identifier() == other.op_identifier() and self._weights_of(one) == self._weights_of(other)

    def _beside(self, one: ir.Node, other: ir.Node) -> Iterator[tuple[ir.Node, ir.Node]]:
        """Yield what may be the same where these two are: makers of inputs, and readers of outputs."""
        for ours, theirs in zip(one.inputs, other.inputs, strict=False):
            if ours is None or theirs is None or ours.index() != theirs.index():
                continue
            makers = ours.producer(), theirs.producer()
            if makers[0] is not None and makers[1] is not None:
                yield makers[0], makers[1]
        for ours, theirs in zip(one.outputs, other.outputs, strict=False):
            readers = self._free_readers(ours), self._free_readers(theirs)
            for key, candidates in readers[0].items():
                if len(candidates) == 1 and len(readers[1].get(key, ())) == 1:
                    yield candidates[0], readers[1][key][0]

    def _free_readers(self, value: ir.Value) -> Mapping[Hashable, list[ir.Node]]:
        found: defaultdict[Hashable, list[ir.Node]] = defaultdict(list)
        for node, index in value.uses():
            if node not in self._found and node not in self._taken:
                found[node.op_identifier(), index, self._weights_of(node)].append(node)
        return found


def _weights(graphs: Sequence[ir.Graph]) -> dict[ir.Value, int]:
    """Number the initializers, equal ones alike."""
    values = [
        value
        for graph in graphs
        for value in graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= LEAST_BYTES
    ]
    numbers = {value: number for number, value in enumerate(values)}
    tensors = [value.const_value for value in values if value.const_value is not None]
    for group in find_twins(tensors):
        numbers.update((values[index], group[0]) for index in group)
    return numbers
