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
from surgery.storage import find_twins


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

    Weights are equal when type, shape and every byte are, whatever field or file holds them. Within a model the value is
    shared: initializers, large `Constant` nodes, and tensors local to branches and loop bodies, which are lifted to the
    main graph when they have a twin in another scope. Across the models of a bundle the bytes are shared, which saves
    them in the layout `shared`.

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
            said.append(f"shared {_weights(values)}, {_in_mb(size)} saved")
        if regions:
            size = sum(saving.regions * saving.weight_bytes for saving in savings)
            said.append(f"{_weights(regions)} stored once for several models, {_in_mb(size)} saved in layout shared")
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
    left = [share_values(weights, names[role]) for role, weights in by_role.items()]
    stored = [[value for value in values if value.is_initializer()] for values in left]
    first, *others = [values for values in stored if values] or [[]]
    replaced = len(twins) - sum(map(len, left))
    regions = sum(share_bytes(values, first[0].const_value) for values in others)
    return Saving(replaced, regions, twins[0].tensor.nbytes)


def share_values(weights: Sequence[Weight], names: Counter[str]) -> list[ir.Value]:
    """Let one value of a model stand for its equal weights, and return the values that are left."""
    survivor = find_survivor(weights, names)
    replaced = [weight for weight in weights if weight.is_removable and weight is not survivor]
    if survivor is None or not replaced:
        return [weight.value for weight in weights]
    kept = seen_by_all(survivor, replaced, names)
    for weight in replaced:
        ir.convenience.replace_all_uses_with(weight.value, kept)
        remove(weight)
    untouched = [weight.value for weight in weights if weight not in replaced and weight is not survivor]
    return [kept, *untouched]


def find_survivor(weights: Sequence[Weight], names: Counter[str]) -> Weight | None:
    """Choose the weight that stays: an initializer of the main graph if there is one, since all graphs can see that.

    A graph output cannot be renamed or moved, so it stays for others only where no inner scope hides its name.
    """

    def can_stay(weight: Weight) -> bool:
        if weight.is_overridable:
            return False
        return weight.is_removable or (weight.graph is weight.main and names[weight.value.name or ""] == 1)

    candidates = [weight for weight in weights if can_stay(weight) and not (weight.is_constant and not weight.is_removable)]
    return min(candidates, key=lambda weight: (weight.graph is not weight.main, weight.is_constant), default=None)


def seen_by_all(survivor: Weight, replaced: Sequence[Weight], names: Counter[str]) -> ir.Value:
    """Return the survivor's value where all uses can see it: as it is, or as an initializer of the main graph."""
    value, main = survivor.value, survivor.main
    assert value.name is not None
    is_local = all(weight.graph is survivor.graph for weight in replaced)
    if survivor.is_constant:
        home = survivor.graph if is_local else main
        return constant_to_initializer(value, home, unhidden_name(value.name, names))
    if not is_local and survivor.graph is not main:
        return lift_initializer(value, main, unhidden_name(value.name, names))
    if names[value.name] > 1:
        value.name = fresh_name(value.name, names)
    return value


def unhidden_name(name: str, names: Counter[str]) -> str:
    """Return the name itself if it is the only one of its kind in the model, else a fresh one like it."""
    return name if names[name] == 1 else fresh_name(name, names)


def remove(weight: Weight) -> None:
    """Take a weight that nothing uses any more out of its graph."""
    node = weight.value.producer()
    if node is not None:
        weight.graph.remove(node, safe=True)
        return
    assert weight.value.name is not None
    del weight.graph.initializers[weight.value.name]


def share_bytes(values: Sequence[ir.Value], tensor: ir.TensorProtocol | None) -> int:
    """Point a model's initializers at the bytes of another model's, and return how many were changed."""
    changed = [value for value in values if not _same_bytes(value.const_value, tensor)]
    for value in changed:
        value.const_value = tensor
    return len(changed)


def _same_bytes(tensor: ir.TensorProtocol | None, other: ir.TensorProtocol | None) -> bool:
    """Say whether two tensors are the same stretch of the same file already, so that a second run changes nothing."""
    place = getattr(tensor, "place", None)
    return tensor is other or (place is not None and place == getattr(other, "place", None))


def _weights(count: int) -> str:
    return f"{count} weight{'s' if count != 1 else ''}"


def _in_mb(count: int) -> str:
    return f"{count / 1e6:.1f} MB"
