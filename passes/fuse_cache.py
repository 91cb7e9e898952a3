"""Attention that appends to its cache by itself."""

from __future__ import annotations

import onnx_ir as ir

from surgery.contract import Change, Context, Effect, ModelPass, RoleUse, every_model
from surgery.graphs import graphs_of
from surgery.registry import register

TOKENS = 2
"""The axis of tokens in keys and values [batch, heads, tokens, size of a head]."""
QUERY, KEY, VALUE, MASK, PAST_KEY, PAST_VALUE = range(6)


@register
class FuseCache(ModelPass):
    """Let `Attention` append to its cache by itself, in place of a `Concat` before it.

    Before::

        <opset_import: ["" : 23]>
        g (float[b, 2, s, 4] q, float[b, 2, s, 4] k, float[b, 2, s, 4] v, float[b, 2, p, 4] keys,
           float[b, 2, p, 4] vals)
        => (float[b, 2, s, 4] y, float[b, 2, t, 4] all_keys, float[b, 2, t, 4] all_vals) {
            all_keys = Concat <axis = 2> (keys, k)
            all_vals = Concat <axis = 2> (vals, v)
            y = Attention (q, all_keys, all_vals)
        }

    After::

        <opset_import: ["" : 23]>
        g (float[b, 2, s, 4] q, float[b, 2, s, 4] k, float[b, 2, s, 4] v, float[b, 2, p, 4] keys,
           float[b, 2, p, 4] vals)
        => (float[b, 2, s, 4] y, float[b, 2, t, 4] all_keys, float[b, 2, t, 4] all_vals) {
            y, all_keys, all_vals = Attention (q, k, v, , keys, vals)
        }

    ONNX Runtime's `Concat` copies the whole cache in one thread, and `Attention` then reads it again; `Attention` with
    a past (opset 23) copies each head where it is about to be read, in all threads. The longer the cache, the more.

    Keeps: `Attention` with `is_causal`, whose mask lies elsewhere once there is a past; keys and values that are not
    appended to alike; and a `Concat` whose result is needed before the `Attention` runs, for a mask for example.
    """

    effect = Effect.EXACT

    models: tuple[str, ...] | None = every_model(
        RoleUse.EDITS, "Work on the models of these roles only; left out, on every model of the bundle."
    )

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        """Fuse what is appended before each Attention."""
        count = sum(fuse(node) for graph in graphs_of(model.graph) for node in tuple(graph) if is_plain(node))
        plural = "s" if count != 1 else ""
        return Change(count, f"{count} Attention node{plural} append to the cache by themselves" if count else "")


def is_plain(node: ir.Node) -> bool:
    """Return whether this is an `Attention` without a past and without a mask that depends on where one would end."""
    if (node.domain, node.op_type) != ("", "Attention"):
        return False
    causal = node.attributes.get("is_causal")
    has_more = any(value is not None for value in node.inputs[PAST_KEY:])
    has_outputs = any(value.name and (value.uses() or value.is_graph_output()) for value in node.outputs[1:])
    return (causal is None or causal.as_int() == 0) and not has_more and not has_outputs


def fuse(node: ir.Node) -> bool:
    """Give an `Attention` the two pasts that are put before its keys and values, if there are any."""
    concats = [appending(node, place) for place in (KEY, VALUE)]
    keys, values = concats
    if keys is None or values is None or keys is values:
        return False
    (past_key, key), (past_value, value) = keys.inputs, values.inputs
    assert past_key is not None
    assert past_value is not None
    if length(past_key) is None or length(past_key) != length(past_value):
        return False
    present = [concat.outputs[0] for concat in (keys, values)]
    mask = node.inputs[MASK] if len(node.inputs) > MASK else None
    attention = ir.Node(
        "",
        "Attention",
        [node.inputs[QUERY], key, value, mask, past_key, past_value],
        [attribute for name, attribute in node.attributes.items() if name != "qk_matmul_output_mode"],
        num_outputs=3,
        name=node.name,
        doc_string=node.doc_string,
        metadata_props=dict(node.metadata_props),
    )
    assert node.graph is not None
    node.graph.insert_before(node, attention)
    old = (node.outputs[0], *present)
    for before, after in zip(old, attention.outputs, strict=True):
        after.name, after.type, after.shape, after.doc_string = (
            before.name,
            before.type,
            before.shape,
            before.doc_string,
        )
        after.metadata_props.update(before.metadata_props)
    for gone in (node, keys, values):
        for index in range(len(gone.inputs)):
            gone.replace_input_with(index, None)
    ir.convenience.replace_all_uses_with(old, attention.outputs, replace_graph_outputs=True)
    attention.graph.remove((node, keys, values), safe=True)  # type: ignore[union-attr]
    return True


def appending(attention: ir.Node, place: int) -> ir.Node | None:
    """Return the `Concat` that puts a past before the keys or the values, if nothing needs its result earlier."""
    value = attention.inputs[place]
    concat = value.producer() if value is not None else None
    if value is None or concat is None or (concat.domain, concat.op_type) != ("", "Concat") or len(concat.inputs) != 2:
        return None
    past = concat.inputs[0]
    if past is None or past.shape is None or len(past.shape) != 4:
        return None
    if concat.graph is not attention.graph or concat.attributes["axis"].as_int() not in (TOKENS, TOKENS - 4):
        return None
    others = [user for user, index in value.uses() if user is not attention or index != place]
    return concat if all(comes_after(user, attention) for user in others) else None


def comes_after(node: ir.Node, other: ir.Node) -> bool:
    """Return whether a node of the same graph runs after another one."""
    if node is other or node.graph is not other.graph:
        return False
    assert other.graph is not None
    return next(one for one in other.graph if one is node or one is other) is other


def length(past: ir.Value) -> object:
    """Return how many tokens a past holds, `None` where it has no name and no number."""
    assert past.shape is not None
    size = past.shape[TOKENS]
    return size.value if isinstance(size, ir.SymbolicDim) else size
