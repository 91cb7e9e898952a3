"""Casts moved through operators that only move numbers, where that leaves fewer.

Such operators, as far as they hang together and are of one type, may all be of another type, or some of them. What is
between a part of the one type and one of the other is a cast; so the fewest casts are a minimum cut (the general form
is of Picard and Ratliff, 1975). It is applied only if it has fewer casts than there are, so there is an end to it, and
nothing to do in a second run.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir

from passes.clean_casts.constants import become, constant_of, convert, is_worth, put_beside, remove_constant
from passes.clean_casts.exactness import can_skip, keeps_all
from passes.clean_casts.neutral import GROWING, READING_SHAPE, SELECTING, can_move, moved_inputs, neutral_type
from passes.clean_casts.site import Site, is_cast, source_of, source_type, target_type
from surgery.cuts import FOREVER, Cut
from surgery.graphs import cast_of

D = ir.DataType
OLD, NEW = "old", "new"


def move_casts(site: Site, small_bytes: int) -> bool:
    """Move casts where that leaves fewer, and say whether it did anywhere."""
    changed = False
    for graph in site.graphs:
        for nodes in tuple(components(graph)):
            moves = (Move(site, graph, nodes, dtype, small_bytes) for dtype in offered_types(graph, nodes))
            changed |= any(move.apply() for move in moves)
    return changed


def components(graph: ir.Graph) -> Iterator[list[ir.Node]]:
    """Yield the neutral nodes of a graph in groups that hang together and are of one type, in the graph's order."""
    neutral = [node for node in graph if neutral_type(node) is not None]
    members = set(neutral)
    found: dict[ir.Node, int] = {}
    for number, first in enumerate(neutral):
        waiting = [first]
        values: set[ir.Value] = set()
        while waiting:
            node = waiting.pop()
            if node not in found:
                found[node] = number
                new = [value for value in touched(node) if value not in values]
                values.update(new)
                waiting += [other for value in new for other in around(value, members)]
    groups: dict[int, list[ir.Node]] = {}
    for node in neutral:
        groups.setdefault(found[node], []).append(node)
    yield from groups.values()


def around(value: ir.Value, members: set[ir.Node]) -> Iterator[ir.Node]:
    """Yield the neutral nodes that give a value or move it."""
    giver = value.producer()
    if giver is not None and giver in members:
        yield giver
    for user, index in value.uses():
        if user in members and index in moved_inputs(user):
            yield user


def touched(node: ir.Node) -> list[ir.Value]:
    """Return what a neutral node moves, and where to."""
    inputs = [node.inputs[index] for index in moved_inputs(node)]
    return [value for value in (*inputs, *node.outputs) if value is not None and value.name]


def offered_types(graph: ir.Graph, nodes: Sequence[ir.Node]) -> list[D]:
    """Return the types that casts around some neutral nodes are from or to."""
    found: dict[D, None] = {}
    for value in {value: None for node in nodes for value in touched(node)}:
        giver = value.producer()
        if giver is not None and is_cast(giver):
            found[source_type(giver)] = None
        for user, index in value.uses():
            if index == 0 and is_cast(user) and user.graph is graph:
                found[target_type(user)] = None
    old = neutral_type(nodes[0])
    return [dtype for dtype in found if dtype != old]


@dataclass
class Crossing:
    """A value that neutral nodes move: who gives it and who takes it, as far as its type matters.

    Args:
        value: It is of the old type.
        giver: A neutral node, or `OLD`, or `NEW` if it is a cast that keeps all of a value of the new type.
        is_pure: All its numbers are numbers of the new type, or that type holds all of the old one.
        uses: Who takes it and at which input: a neutral node, `OLD` where it has to be of the old type, `NEW` where it
            is cast to the new one.
    """

    value: ir.Value
    giver: ir.Node | str
    is_pure: bool
    uses: list[tuple[ir.Node, int, ir.Node | str]] = field(default_factory=list)

    @property
    def takers(self) -> list[ir.Node | str]:
        """Who takes the value, each once."""
        kinds = [taker for _, _, taker in self.uses] + [OLD] * self.value.is_graph_output()
        return list(dict.fromkeys(kinds))


class Move:
    """What becomes of some neutral nodes if another type is offered.

    Args:
        site: The model.
        graph: Where the nodes are.
        nodes: Neutral nodes of one type that hang together.
        dtype: The other type.
        small_bytes: A constant of at most so many may be there in both types.
    """

    def __init__(self, site: Site, graph: ir.Graph, nodes: Sequence[ir.Node], dtype: D, small_bytes: int) -> None:
        old = neutral_type(nodes[0])
        assert old is not None
        self.site, self.graph, self.old, self.new, self.small_bytes = site, graph, old, dtype, small_bytes
        self.nodes = {node: None for node in nodes if can_move(site, node, dtype)}
        self.constants: dict[ir.Value, ir.TensorProtocol] = {}
        self._pure: dict[ir.Value, bool] = {}
        values = {value: None for node in self.nodes for value in touched(node)}
        self.crossings = [self._crossing(value) for value in values if not self._is_foldable(value)]

    def apply(self) -> bool:
        """Move casts if that leaves fewer, and say whether it did."""
        cost, moved = self._cheapest()
        if cost >= self._cost_now():
            return False
        _Change(self, [node for node in self.nodes if node in moved]).apply()
        return True

    def _is_foldable(self, value: ir.Value) -> bool:
        """Return whether a value is a constant that can be there in the new type, and note it."""
        tensor = constant_of(value)
        if tensor is None:
            return False
        goes = len(value.uses()) == 1 and not value.is_graph_output()
        converted = convert(tensor, self.new) if is_worth(tensor, self.new, self.small_bytes, goes=goes) else None
        if converted is not None:
            self.constants[value] = converted
        return converted is not None

    def _crossing(self, value: ir.Value) -> Crossing:
        crossing = Crossing(value, self._giver(value), self._is_pure(value))
        for user, index in value.uses():
            taker = self._taker(crossing, user, index)
            if taker is not None:
                crossing.uses.append((user, index, taker))
        return crossing

    def _giver(self, value: ir.Value) -> ir.Node | str:
        giver = value.producer()
        if giver is None or giver in self.nodes:
            return giver or OLD
        return NEW if self.is_widening(giver) else OLD

    def is_widening(self, giver: ir.Node) -> bool:
        """Return whether a node is a cast that can be left out: it keeps all of something of the new type."""
        if not is_cast(giver) or source_type(giver) != self.new or not keeps_all(self.new, self.old):
            return False
        return self.site.shows(source_of(giver), self.graph)

    def _is_pure(self, value: ir.Value) -> bool:
        """Return whether the numbers of a value can go to the new type and back."""
        if keeps_all(self.old, self.new):
            return True
        if value not in self._pure:
            giver = value.producer()
            if giver is not None and giver in self.nodes:
                moved = [giver.inputs[index] for index in moved_inputs(giver)]
                self._pure[value] = all(self._is_pure(one) for one in moved if one is not None)
            elif value in self.constants or constant_of(value) is not None:
                self._pure[value] = self._survives(value)
            else:
                self._pure[value] = giver is not None and self.is_widening(giver)
        return self._pure[value]

    def _survives(self, constant: ir.Value) -> bool:
        """Return whether a small constant is the same after a cast to the new type and back."""
        tensor = constant_of(constant)
        if tensor is None or tensor.nbytes > self.small_bytes:
            return False
        there = convert(tensor, self.new)
        back = convert(there, self.old) if there is not None else None
        return back is not None and back.tobytes() == tensor.tobytes()

    def _taker(self, crossing: Crossing, user: ir.Node, index: int) -> ir.Node | str | None:
        """Return what a use of a value asks of its type, None for nothing."""
        if user in self.nodes and index in moved_inputs(user):
            return user
        if user.op_type in READING_SHAPE and not user.domain:
            return None
        if index or not is_cast(user):
            return OLD
        target = target_type(user)
        if target == self.new:
            return NEW if self._can_go(crossing, user) else None
        is_free = can_skip(self.old, self.new, target) or (crossing.is_pure and can_skip(self.new, self.old, target))
        return None if is_free else OLD

    def _can_go(self, crossing: Crossing, cast: ir.Node) -> bool:
        """Return whether a cast to the new type can be left out once its value is of that type."""
        return cast.graph is self.graph and self.site.can_stand_for(crossing.value, cast.outputs[0])

    def _cost_now(self) -> int:
        """Return how many casts there are, all nodes being of the old type."""
        return sum(crossing.giver is NEW or NEW in crossing.takers for crossing in self.crossings)

    def _cheapest(self) -> tuple[int, set[object]]:
        """Return the fewest casts, and the nodes that are of the new type then, as few as possible."""
        cut = Cut()
        cut.edge(NEW, OLD, 0)
        for crossing in self.crossings:
            self._add(cut, crossing)
        cost, side = cut.minimum(NEW, OLD)
        return cost, set(side)

    def _add(self, cut: Cut, crossing: Crossing) -> None:
        """Add what a value costs: one cast if somebody takes it in another type than it is given in."""
        giver, value = crossing.giver, crossing.value
        grows = isinstance(giver, ir.Node) and giver.op_type in GROWING
        is_open = crossing.is_pure and not grows
        cut.edge(giver, (OLD, value), 1 if is_open else FOREVER)
        cut.edge((NEW, value), giver, 1)
        for taker in crossing.takers:
            if taker is not NEW:
                cut.edge((OLD, value), taker, FOREVER)
            if taker is not OLD:
                cut.edge(taker, (NEW, value), FOREVER)
            if isinstance(taker, ir.Node) and (taker.op_type in SELECTING or is_weight(value)):
                cut.edge(taker, giver, FOREVER)


def is_weight(value: ir.Value) -> bool:
    """Return whether a value is an initializer or a constant, which nobody wants to be cast at each run."""
    return value.is_initializer() or constant_of(value) is not None


class _Change:
    """The work of a move: some nodes become of the new type, with casts in between; idle casts are removed later.

    Args:
        move: What was decided.
        nodes: The nodes that change their type, in the order of the graph.
    """

    def __init__(self, move: Move, nodes: Sequence[ir.Node]) -> None:
        self._move = move
        self._site = move.site
        self._nodes = nodes
        self._moved = set(nodes)
        self._inputs: dict[ir.Value, ir.Value] = {}

    def apply(self) -> None:
        """Change the graph."""
        for node in self._nodes:
            for index in moved_inputs(node):
                value = node.inputs[index]
                assert value is not None
                if value.producer() not in self._moved:
                    node.replace_input_with(index, self._in_new_type(value, node))
        for constant in self._move.constants:
            if not constant.uses() and not constant.is_graph_output():
                remove_constant(self._site, constant)
        for crossing in self._move.crossings:
            if crossing.giver in self._moved:
                self._retype(crossing)

    def _in_new_type(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """Return a value of the old type in the new one, for the first node that takes it."""
        if value not in self._inputs:
            self._inputs[value] = self._found_or_made(value, node)
        return self._inputs[value]

    def _found_or_made(self, value: ir.Value, node: ir.Node) -> ir.Value:
        """Return a constant in the new type, what a value was cast from, or a cast of it."""
        giver = value.producer()
        if value in self._move.constants:
            return self._constant(value)
        if giver is not None and self._move.is_widening(giver):
            return source_of(giver)
        casts = [user for user, index in value.uses() if index == 0 and is_cast(user) and user.graph is node.graph]
        for cast in casts:
            if target_type(cast) == self._move.new and self._site.move_before(cast, node):
                return cast.outputs[0]
        cast = cast_of(value, self._move.new, self._site.names, self._name(value))
        assert isinstance(node.graph, ir.Graph)
        node.graph.insert_before(node, cast)
        return cast.outputs[0]

    def _constant(self, constant: ir.Value) -> ir.Value:
        tensor = self._move.constants[constant]
        if len(constant.uses()) == 1 and not constant.is_graph_output():
            become(constant, tensor)
            return constant
        return put_beside(self._site, constant, tensor, self._name(constant))

    def _name(self, value: ir.Value) -> str:
        return f"{value.name}_{self._move.new.name.lower()}"

    def _retype(self, crossing: Crossing) -> None:
        """Let a value be of the new type; a cast back gets its name, if anything takes it in the old one."""
        value, giver = crossing.value, crossing.giver
        uses = [(user, index) for user, index, taker in crossing.uses if taker is not NEW and taker not in self._moved]
        if uses or value.is_graph_output():
            assert isinstance(giver, ir.Node)
            cast = cast_of(value, self._move.old, self._site.names, self._name(value))
            (back,) = cast.outputs
            self._move.graph.insert_after(giver, cast)
            back.type, back.doc_string = value.type, value.doc_string
            back.metadata_props.update(value.metadata_props)
            for user, index in uses:
                user.replace_input_with(index, back)
            outputs = self._move.graph.outputs
            outputs[:] = [back if output is value else output for output in outputs]
            value.name, back.name = back.name, value.name
        value.type = ir.TensorType(self._move.new)
