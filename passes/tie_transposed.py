"""A weight that is another one transposed is stored once."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnx_ir.tape import Tape

from surgery.contract import Bundle, BundlePass, Change, Context, Effect, Field, RoleUse, every_model
from surgery.graphs import fresh_name, graphs_of, lift_initializer, value_names
from surgery.registry import register
from surgery.storage import find_transposed
from surgery.units import in_bytes

# A Gemm of an earlier opset needs a third input.
FIRST_OPSET = 11
# MatMul takes integers too, but ONNX Runtime's Gemm does not.
TYPES = frozenset({ir.DataType.FLOAT, ir.DataType.DOUBLE, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@register
class TieTransposed(BundlePass):
    """Store a weight that is another one transposed once: products with it become products with the other.

    Before::

        g (int64[b, s] ids) => (float[b, s, 3] logits)
        <float[3, 2] wte = {1, 2, 3, 4, 5, 6}, float[2, 3] head = {1, 3, 5, 2, 4, 6}> {
            x = Gather(wte, ids)
            logits = MatMul(x, head)
        }

    After::

        g (int64[b, s] ids) => (float[b, s, 3] logits) <float[3, 2] wte = {1, 2, 3, 4, 5, 6}> {
            x = Gather(wte, ids)
            logits_flat_shape = Constant <value = int64[2] {-1, 2}> ()
            logits_flat = Reshape(x, logits_flat_shape)
            logits_rows = Gemm <transB = 1> (logits_flat, wte)
            logits_leading = Shape <end = -1> (x)
            logits_last = Constant <value = int64[1] {3}> ()
            logits_shape = Concat <axis = 0> (logits_leading, logits_last)
            logits = Reshape <allowzero = 1> (logits_rows, logits_shape)
        }

    Exporters write a tied embedding twice: as it is for the lookup, transposed for the output projection. ONNX Runtime
    turns a `Transpose` of a weight into a second copy when it loads the model, and leaves a `Gemm` with `transB` alone.
    So a `MatMul` becomes a `Gemm` over rows, a `Gemm` has its `transA` or `transB` turned round, and a `Transpose` of
    the weight that goes is the weight that stays. A `Transpose` of a weight that has other uses too goes the same way.

    Of the two weights the one goes whose uses can all be turned; of two such, the one with fewer uses. That is decided
    alike for all models of the bundle: one that has only the weight that goes is given the other, and their bytes are
    then shared in the layout `shared`.

    Keeps: weights that are graph inputs (a caller may override them) or graph outputs, weights that are used in other
    ways too, types other than floats of 16 to 64 bits, `Constant` nodes, weights in local functions, models below opset
    11. Below opset 14 a product whose result is empty in a dimension other than the first no longer runs.
    """

    effect = Effect.CLOSE

    models: tuple[str, ...] | None = every_model(
        RoleUse.EDITS, "Work on the models of these roles only; left out, on every model of the bundle."
    )
    min_bytes: int = Field(128, ge=1, description="Leave weights that are smaller than this many bytes as they are.")

    def transform(self, bundle: Bundle, context: Callable[[str], Context]) -> Change:
        """Tie the transposed weights of the models, within each and across them."""
        sites = [Site(bundle[role].graph) for role in self.roles(RoleUse.EDITS, tuple(bundle.models))]
        sites = [site for site in sites if site.opset >= FIRST_OPSET]
        weights = [weight for site in sites for weight in find_weights(site, self.min_bytes)]
        pairs = find_transposed([weight.tensor for weight in weights])
        ties = [tie for pair in pairs for tie in tie_pair(*([weights[index] for index in group] for group in pair))]
        within = [tie.weight_bytes for tie in ties if not tie.is_across]
        across = [tie.weight_bytes for tie in ties if tie.is_across]
        unfolded = [size for site in sites for size in unfold(site, self.min_bytes)]
        said = []
        if within:
            said.append(f"{_weights(within)} stored once with the transpose, {in_bytes(sum(within))} saved")
        if across:
            said.append(
                f"{_weights(across)} stored once with the transpose in another model, "
                f"{in_bytes(sum(across))} saved in layout shared"
            )
        if unfolded:
            said.append(
                f"{_weights(unfolded)} used without a transposed copy, {in_bytes(sum(unfolded))} saved in the runtime"
            )
        return Change(len(ties) + len(unfolded), "; ".join(said))


class Site:
    """A model at work: its main graph, the names that it gives, and the version of its operators."""

    def __init__(self, main: ir.Graph) -> None:
        self.main = main
        self.names: Counter[str] = value_names(main)
        self.opset = main.opset_imports.get("", 0)


@dataclass(frozen=True)
class Weight:
    """A matrix where it stands: an initializer of some graph of a model."""

    site: Site
    value: ir.Value
    tensor: ir.TensorProtocol

    @property
    def can_go(self) -> bool:
        """Nobody outside the graph knows it, and every use of it can be turned into one of its transpose."""
        return not self.value.is_graph_output() and can_turn_all(self.value)


@dataclass(frozen=True)
class Tie:
    """A weight that went: how large it was, and whether its transpose was another model's."""

    weight_bytes: int
    is_across: bool


def find_weights(site: Site, min_bytes: int) -> Iterator[Weight]:
    """Yield the matrices of a model that no caller can override, in the order of its graphs, the main graph first."""
    for graph in graphs_of(site.main):
        for value in graph.initializers.values():
            tensor = value.const_value
            if tensor is None or value.is_graph_input() or tensor.dtype not in TYPES or len(tensor.shape) != 2:
                continue
            if tensor.nbytes >= min_bytes:
                yield Weight(site, value, tensor)


def tie_pair(left: Sequence[Weight], right: Sequence[Weight]) -> Iterator[Tie]:
    """Let equal weights stand for those that are their transposes, or the other way round, and yield what went."""
    choices = [(left, removable(right)), (right, removable(left))]
    kept, going = max(choices, key=lambda choice: (len(choice[1]), -count_uses(choice[1])))
    for weight in going:
        own = [one for one in kept if one.site is weight.site]
        survivor = find_survivor(weight, own)
        if own and survivor is None:
            continue
        if survivor is None:
            survivor = copy_into(weight.site, kept[0])
        kept = [*kept, survivor]
        turn_all(weight.value, survivor.value, weight.site)
        remove(weight)
        yield Tie(weight.tensor.nbytes, is_across=not own)


def removable(weights: Sequence[Weight]) -> list[Weight]:
    """Return the weights that can go."""
    return [weight for weight in weights if weight.can_go]


def count_uses(weights: Sequence[Weight]) -> int:
    """Return how often weights are used."""
    return sum(len(weight.value.uses()) for weight in weights)


def find_survivor(weight: Weight, own: Sequence[Weight]) -> Weight | None:
    """Return what can stand for a weight wherever it is used: one that is seen there, else one that can be lifted."""
    home = weight.value.graph
    present = [one for one in own if one.value.is_initializer()]  # lifted ones have left a value that is none any more
    for one in present:
        if any(graph is home for graph in graphs_of(graph_of(one.value))) and show(one.value, one.site):
            return one
    for one in present:
        if not one.value.is_graph_output():
            name = new_name(str(one.value.name), one.site)
            return Weight(one.site, lift_initializer(one.value, one.site.main, name), one.tensor)
    return None


def show(value: ir.Value, site: Site) -> bool:
    """Make sure that no graph inside a value's own hides it by its name, and say whether that is so."""
    if value_names(graph_of(value))[str(value.name)] == 1:
        return True
    if value.is_graph_output():
        return False
    value.name = new_name(str(value.name), site)
    return True


def new_name(name: str, site: Site) -> str:
    """Return a name like the given one that nothing else in the model has."""
    site.names[name] -= 1
    return fresh_name(name, site.names)


def copy_into(site: Site, other: Weight) -> Weight:
    """Give a model a weight of another one: a new initializer over the same bytes."""
    value = ir.Value(
        name=fresh_name(str(other.value.name), site.names),
        type=ir.TensorType(other.tensor.dtype),
        shape=ir.Shape(other.tensor.shape.numpy()),
        const_value=other.tensor,
    )
    site.main.register_initializer(value)
    return Weight(site, value, other.tensor)


def remove(weight: Weight) -> None:
    """Take a weight that nothing uses any more out of its graph."""
    name = str(weight.value.name)
    weight.site.names[name] -= 1
    del graph_of(weight.value).initializers[name]


def unfold(site: Site, min_bytes: int) -> Iterator[int]:
    """Yield the sizes of weights of which the runtime keeps no transposed copy any more, beside the weight itself."""
    for weight in list(find_weights(site, min_bytes)):
        transposes = [node for node, _ in weight.value.uses() if node.op_type == "Transpose" and node.domain == ""]
        is_otherwise_used = weight.value.is_graph_output() or len(transposes) < len(weight.value.uses())
        if not transposes or not is_otherwise_used or not all(map(can_be_undone, transposes)):
            continue
        if show(weight.value, site):
            for node in transposes:
                turn_all(node.outputs[0], weight.value, site)
                graph_of(node).remove(node, safe=True)
            yield weight.tensor.nbytes


def can_be_undone(transpose: ir.Node) -> bool:
    """Say whether all that uses a transposed weight can use the weight itself."""
    return can_turn(transpose, 0) and can_turn_all(transpose.outputs[0])


def can_turn_all(value: ir.Value) -> bool:
    """Say whether all uses of a matrix can be turned into uses of its transpose."""
    return all(can_turn(node, index) for node, index in value.uses())


def can_turn(node: ir.Node, index: int) -> bool:
    """Say whether an input of a node can be given as its transpose."""
    if node.domain != "":
        return False
    if node.op_type == "MatMul":
        return index == 1 or rank_of(node.inputs[1]) == 2
    if node.op_type == "Transpose":
        return node.attributes.get_ints("perm", (1, 0)) == (1, 0) and not node.outputs[0].is_graph_output()
    return node.op_type == "Gemm" and index < 2


def turn_all(value: ir.Value, turned: ir.Value, site: Site) -> None:
    """Let all uses of a matrix be uses of another one that is its transpose."""
    while value.uses():
        node, index = next(iter(value.uses()))
        turn(node, index, turned, site)


def turn(node: ir.Node, index: int, turned: ir.Value, site: Site) -> None:
    """Give an input of a node as its transpose, and change the node so that it computes what it did."""
    if node.op_type == "Transpose":
        ir.convenience.replace_all_uses_with(node.outputs[0], turned)
        graph_of(node).remove(node, safe=True)
    elif node.op_type == "MatMul" and rank_of(node.inputs[0]) != 2:
        multiply_rows(node, turned, site)
    else:
        flip = "transA" if index == 0 else "transB"
        node.op_type = "Gemm"
        node.attributes[flip] = ir.AttrInt64(flip, 1 - node.attributes.get_int(flip, 0))
        node.replace_input_with(index, turned)


def multiply_rows(node: ir.Node, turned: ir.Value, site: Site) -> None:
    """MatMul(x [..., n], W [n, m]) -> the Gemm of all rows of x [k, n] with the transpose [m, n], as [..., m]"""
    x, product = node.inputs[0], node.outputs[0]
    assert x is not None
    assert turned.const_value is not None
    outer, inner = turned.const_value.shape.numpy()
    floats, integers = ir.TensorType(turned.const_value.dtype), ir.TensorType(ir.DataType.INT64)
    tape = Tape()

    def op(kind: str, suffix: str, inputs: Sequence[ir.Value], **attributes: int | ir.TensorProtocol) -> ir.Value:
        is_float = kind in ("Gemm", "Reshape")
        name = fresh_name(f"{product.name}_{suffix}", site.names)
        value = ir.Value(name=name, type=floats if is_float else integers)
        return tape.op(kind, inputs, attributes, output=value, name=node.name and f"{node.name}_{suffix}")

    def sizes(suffix: str, *values: int) -> ir.Value:
        return op("Constant", suffix, (), value=ir.tensor(np.array(values, dtype=np.int64)))

    rows = op("Reshape", "flat", (x, sizes("flat_shape", -1, int(inner))))
    products = op("Gemm", "rows", (rows, turned), transB=1)  # [k, m]
    if site.opset >= 15:
        leading = op("Shape", "leading", (x,), end=-1)
    else:
        leading = op("Slice", "leading", (op("Shape", "sizes", (x,)), sizes("first", 0), sizes("end", -1)))
    shape = op("Concat", "shape", (leading, sizes("last", int(outer))), axis=0)
    # Otherwise a 0 would not be a size: it would mean the one that stands at its place in the input.
    exactly = {"allowzero": 1} if site.opset >= 14 else {}
    result = op("Reshape", "", (products, shape), **exactly)
    gemm = products.producer()
    assert gemm is not None
    gemm.name = node.name
    gemm.metadata_props.update(node.metadata_props)
    graph = graph_of(node)
    result.metadata_props.update(product.metadata_props)
    ir.convenience.replace_nodes_and_values(graph, node, [node], tape.nodes, [product], [result])


def rank_of(value: ir.Value | None) -> int | None:
    """Return the number of dimensions, if it is known."""
    if value is None:
        return None
    known = value.shape if value.const_value is None else value.const_value.shape
    return None if known is None else len(known)


def graph_of(thing: ir.Node | ir.Value) -> ir.Graph:
    """Return the graph that a node or an initializer stands in."""
    assert isinstance(thing.graph, ir.Graph)
    return thing.graph


def _weights(sizes: Sequence[int]) -> str:
    return f"{len(sizes)} weight{'s' if len(sizes) != 1 else ''}"
