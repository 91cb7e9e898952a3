"""One copy of every weight."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from surgery.contract import Bundle, BundlePass, Change, Context, Effect, Field, RoleUse, every_model
from surgery.graphs import (
    constant_tensor,
    constant_to_initializer,
    fresh_name,
    graphs_of,
    lift_initializer,
    value_names,
)
from surgery.registry import register
from surgery.storage import MIN_DATA_BYTES, find_twins, key_of
from surgery.units import in_bytes


@register
class DedupWeights(BundlePass):
    """Keep one copy of every weight.

    Before::

        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            s = Add(x, a)
            y = Mul(s, b)
        }

    After::

        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            s = Add(x, a)
            y = Mul(s, a)
        }

    Weights are equal when type, shape and every byte are, whatever field or file holds them. Within a model the value
    is shared: initializers, large `Constant` nodes, and tensors local to branches and loop bodies, which are lifted to
    the main graph when they have a twin in another scope. Across the models of a bundle the bytes are shared, which
    saves them in the layout `shared`; `Constant` nodes become initializers for that.

    Keeps: initializers that are graph inputs (a caller may override them), weights that are graph outputs, weights in
    local functions.
    """

    effect = Effect.EXACT

    models: tuple[str, ...] | None = every_model(
        RoleUse.EDITS, "Work on the models of these roles only; left out, on every model of the bundle."
    )
    min_bytes: int = Field(128, ge=1, description="Leave weights that are smaller than this many bytes as they are.")

    def transform(self, bundle: Bundle, context: Callable[[str], Context]) -> Change:
        """Share equal weights of the models."""
        roles = self.roles(RoleUse.EDITS, tuple(bundle.models))
        weights = [weight for role in roles for weight in find_weights(bundle[role], role, self.min_bytes)]
        names = {role: value_names(bundle[role].graph) for role in roles}
        groups = find_twins([weight.tensor for weight in weights], self.min_bytes)
        savings = [share([weights[index] for index in group], names) for group in groups]
        values = sum(saving.values for saving in savings)
        regions = sum(saving.regions for saving in savings)
        said = []
        if values:
            size = sum(saving.values * saving.weight_bytes for saving in savings)
            said.append(f"shared {_weights(values)}, {in_bytes(size)} saved")
        if regions:
            size = sum(saving.regions * saving.weight_bytes for saving in savings)
            said.append(f"{_weights(regions)} stored once for several models, {in_bytes(size)} saved in layout shared")
        return Change(values + regions, "; ".join(said))


@dataclass(frozen=True)
class Weight:
    """A weight where it stands: an initializer, or a `Constant` node, of some graph of a model."""

    role: str
    main: ir.Graph
    graph: ir.Graph
    value: ir.Value
    tensor: ir.TensorProtocol

    @property
    def is_overridable(self) -> bool:
        """A caller may feed something else in its place."""
        return self.value.is_graph_input()

    @property
    def is_removable(self) -> bool:
        """Nobody outside the graph knows it."""
        return not self.value.is_graph_input() and not self.value.is_graph_output()

    @property
    def is_constant(self) -> bool:
        """A `Constant` node gives it."""
        return self.value.producer() is not None


@dataclass(frozen=True)
class Saving:
    """What sharing one group of twins saved."""

    values: int = 0
    regions: int = 0
    weight_bytes: int = 0


def find_weights(model: ir.Model, role: str, min_bytes: int) -> Iterator[Weight]:
    """Yield the weights of a model in the order of its graphs, the main graph first; local functions are left out."""
    main = model.graph
    for graph in graphs_of(main):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is not None and tensor.nbytes >= min_bytes:
                yield Weight(role, main, graph, value, tensor)
        for node in graph:
            tensor = constant_tensor(node)
            if tensor is not None and tensor.nbytes >= min_bytes:
                yield Weight(role, main, graph, node.outputs[0], tensor)


def share(twins: Sequence[Weight], names: Mapping[str, Counter[str]]) -> Saving:
    """Make one of equal weights serve for all: one value in each model, one tensor across models."""
    by_role: dict[str, list[Weight]] = {}
    for weight in twins:
        by_role.setdefault(weight.role, []).append(weight)
    left = {role: share_values(weights, names[role]) for role, weights in by_role.items()}
    replaced = len(twins) - sum(map(len, left.values()))
    return Saving(replaced, share_across(left, names), twins[0].tensor.nbytes)


def share_values(weights: Sequence[Weight], names: Counter[str]) -> list[ir.Value]:
    """Let one value of a model stand for its equal weights, and return the values that are left."""
    survivor = find_survivor(weights, names)
    replaced = [weight for weight in weights if weight.is_removable and weight is not survivor]
    if survivor is None or not replaced:
        return [weight.value for weight in weights]
    for weight in replaced:
        ir.convenience.replace_all_uses_with(weight.value, survivor.value)
        remove(weight, names)
    is_local = all(weight.graph is survivor.graph for weight in replaced)
    kept = seen_from_all(survivor, survivor.graph if is_local else survivor.main, names)
    untouched = [weight.value for weight in weights if not weight.is_removable and weight is not survivor]
    return [kept, *untouched]


def find_survivor(weights: Sequence[Weight], names: Counter[str]) -> Weight | None:
    """Choose the weight that stays: one that has to, else the first, so one of the main graph before local ones.

    A graph output cannot be renamed or moved, so it stands for others only where no inner scope hides its name.
    """
    named_alike = Counter(weight.value.name for weight in weights)

    def can_stay(weight: Weight) -> bool:
        if weight.is_removable:
            return True
        is_hidden = names[weight.value.name or ""] > named_alike[weight.value.name]
        return weight.graph is weight.main and not (weight.is_overridable or weight.is_constant or is_hidden)

    return min(filter(can_stay, weights), key=lambda weight: weight.is_removable, default=None)


def seen_from_all(survivor: Weight, home: ir.Graph, names: Counter[str]) -> ir.Value:
    """Return the survivor's value as an initializer of a graph, under a name that no inner scope hides."""
    value = survivor.value
    assert value.name is not None
    if survivor.is_constant:
        return constant_to_initializer(value, home, unhidden_name(value.name, names))
    if survivor.graph is not home:
        return lift_initializer(value, home, unhidden_name(value.name, names))
    value.name = unhidden_name(value.name, names)
    return value


def unhidden_name(name: str, names: Counter[str]) -> str:
    """Return the name itself if only its owner has it in the model, else a fresh one like it."""
    if names[name] == 1:
        return name
    names[name] -= 1
    return fresh_name(name, names)


def remove(weight: Weight, names: Counter[str]) -> None:
    """Take a weight that nothing uses any more out of its graph."""
    assert weight.value.name is not None
    names[weight.value.name] -= 1
    node = weight.value.producer()
    if node is not None:
        weight.graph.remove(node, safe=True)
    else:
        del weight.graph.initializers[weight.value.name]


def share_across(left: Mapping[str, Sequence[ir.Value]], names: Mapping[str, Counter[str]]) -> int:
    """Point the equal weights of several models at the bytes of the first, and return how many values were changed."""
    storable = {role: [value for value in values if is_storable(value)] for role, values in left.items()}
    if sum(map(bool, storable.values())) < 2:
        return 0
    stored = {role: [as_initializer(value, names[role]) for value in values] for role, values in storable.items()}
    first, *others = filter(None, stored.values())
    return sum(share_bytes(values, first[0]) for values in others)


def is_storable(value: ir.Value) -> bool:
    """Say whether a data file can hold a weight: small ones, and constants that stay, stand in the graph file."""
    tensor = value.const_value if value.is_initializer() else constant_tensor(value.producer())
    is_large = tensor is not None and tensor.nbytes >= MIN_DATA_BYTES
    return is_large and (value.is_initializer() or not value.is_graph_output())


def as_initializer(value: ir.Value, names: Counter[str]) -> ir.Value:
    """Return a weight as an initializer of its own graph."""
    if value.is_initializer():
        return value
    assert value.name is not None
    assert value.graph is not None
    return constant_to_initializer(value, value.graph, unhidden_name(value.name, names))


def share_bytes(values: Sequence[ir.Value], other: ir.Value) -> int:
    """Point initializers at the bytes of another model's, and return how many did not have the same already."""
    tensor = other.const_value
    assert tensor is not None
    changed = [value for value in values if value.const_value is None or key_of(value.const_value) != key_of(tensor)]
    for value in changed:
        value.const_value = tensor
    return len(changed)


def _weights(count: int) -> str:
    return f"{count} weight{'s' if count != 1 else ''}"
