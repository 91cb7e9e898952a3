"""Tiny real models, drawn as ONNX text: a decoder pair with a cache, and single models of every kind of output."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx.numpy_helper
import onnx.parser
import onnx_ir as ir

from surgery.bundle import Bundle
from surgery.text import parse

VOCABULARY, POSITIONS = 50, 128
HIDDEN, HEADS, HEAD = 8, 2, 4
CONFIG = {"vocab_size": VOCABULARY, "n_positions": POSITIONS}
GENERATION = {"eos_token_id": 1, "pad_token_id": 0}

# The text format has no dots in names: `__` stands for one.
PREFILL = """
<ir_version: 8, opset_import: ["" : 18]>
prefill (
    int64[batch_size, sequence_length] input_ids,
    int64[batch_size, sequence_length] attention_mask,
    int64[batch_size, sequence_length] position_ids
) => (
    float[batch_size, sequence_length, 50] logits,
    float[batch_size, 2, sequence_length, 4] present__0__key,
    float[batch_size, 2, sequence_length, 4] present__0__value
) {
    BEFORE
    present__0__key = Identity(key)
    present__0__value = Identity(value)
    AFTER
}
"""
DECODE = """
<ir_version: 8, opset_import: ["" : 18]>
decode (
    int64[batch_size, 1] input_ids,
    int64[batch_size, "past_sequence_length + 1"] attention_mask,
    int64[batch_size, 1] position_ids,
    float[batch_size, 2, past_sequence_length, 4] past_key_values__0__key,
    float[batch_size, 2, past_sequence_length, 4] past_key_values__0__value
) => (
    float[batch_size, 1, 50] logits,
    float[batch_size, 2, "past_sequence_length + 1", 4] present__0__key,
    float[batch_size, 2, "past_sequence_length + 1", 4] present__0__value
) {
    BEFORE
    present__0__key = Concat <axis = 2> (past_key_values__0__key, key)
    present__0__value = Concat <axis = 2> (past_key_values__0__value, value)
    AFTER
}
"""
BEFORE = """
    tokens = Gather(wte, input_ids)  # [batch, length, hidden]
    places = Gather(wpe, position_ids)
    x = Add(tokens, places)
    normal = LayerNormalization <axis = -1> (x, ln_weight, ln_bias)
    mixed = MatMul(normal, qkv_weight)
    qkv = Add(mixed, qkv_bias)
    q_flat, k_flat, v_flat = Split <axis = -1, num_outputs = 3> (qkv)
    by_head = Constant <value = int64[4] {0, 0, 2, 4}> ()
    q_split = Reshape(q_flat, by_head)
    k_split = Reshape(k_flat, by_head)
    v_split = Reshape(v_flat, by_head)
    query = Transpose <perm = [0, 2, 1, 3]> (q_split)  # [batch, heads, length, head]
    key = Transpose <perm = [0, 2, 1, 3]> (k_split)
    value = Transpose <perm = [0, 2, 1, 3]> (v_split)
"""
AFTER = """
    turned = Transpose <perm = [0, 1, 3, 2]> (present__0__key)
    products = MatMul(query, turned)
    half = Constant <value = float {0.5}> ()
    scores = Mul(products, half)  # [batch, heads, length, total]
    zero = Constant <value = int64 {0}> ()
    one = Constant <value = int64 {1}> ()
    first = Constant <value = int64[1] {0}> ()
    second = Constant <value = int64[1] {1}> ()
    both = Constant <value = int64[2] {1, 2}> ()
    new_1d = Shape <start = 1, end = 2> (input_ids)
    total_1d = Shape <start = 1, end = 2> (attention_mask)
    new = Squeeze(new_1d)
    total = Squeeze(total_1d)
    past = Sub(total, new)
    rows = Range(past, total, one)
    columns = Range(zero, total, one)
    row = Unsqueeze(rows, second)
    column = Unsqueeze(columns, first)
    is_seen = LessOrEqual(column, row)  # [length, total]
    mask = Unsqueeze(attention_mask, both)
    is_real = Cast <to = 9> (mask)  # [batch, 1, 1, total]
    is_open = And(is_seen, is_real)
    lowest = Constant <value = float {-3e38}> ()
    masked = Where(is_open, scores, lowest)
    shares = Softmax <axis = -1> (masked)
    heads = MatMul(shares, present__0__value)
    turned_back = Transpose <perm = [0, 2, 1, 3]> (heads)
    flat = Constant <value = int64[3] {0, 0, 8}> ()
    joined = Reshape(turned_back, flat)
    projected = MatMul(joined, out_weight)
    attended = Add(projected, out_bias)
    residual = Add(x, attended)
    up = MatMul(residual, up_weight)
    raised = Add(up, up_bias)
    bent = Tanh(raised)
    down = MatMul(bent, down_weight)
    final = Add(residual, down)
    raw = MatMul(final, head_weight)
    logits = Add(raw, head_bias)
"""
TYPED = """
<ir_version: 8, opset_import: ["" : 18]>
typed (int64[n, 3] x) => (int64[n, 3] extreme, int64[n, 3] next, bool[n, 3] even, string[n, 3] word) {
    one = Constant <value = int64 {1}> ()
    two = Constant <value = int64 {2}> ()
    rest = Mod(x, two)
    odd = Cast <to = 9> (rest)
    even = Not(odd)
    extreme = Where(even, largest, smallest)
    next = Add(x, one)
    word = Where(even, say_even, say_odd)
}
"""
WEIGHTS: Mapping[str, tuple[int, ...]] = {
    "wte": (VOCABULARY, HIDDEN),
    "wpe": (POSITIONS, HIDDEN),
    "ln_weight": (HIDDEN,),
    "ln_bias": (HIDDEN,),
    "qkv_weight": (HIDDEN, 3 * HIDDEN),
    "qkv_bias": (3 * HIDDEN,),
    "out_weight": (HIDDEN, HIDDEN),
    "out_bias": (HIDDEN,),
    "up_weight": (HIDDEN, 2 * HIDDEN),
    "up_bias": (2 * HIDDEN,),
    "down_weight": (2 * HIDDEN, HIDDEN),
    "head_weight": (HIDDEN, VOCABULARY),
    "head_bias": (VOCABULARY,),
}


def decoder_pair(*, config: Mapping[str, object] = CONFIG) -> Bundle:
    """Return `prefill` and `decode` of one network: one attention layer, absolute positions, a left-padding mask."""
    models = {"prefill": _drawn(PREFILL), "decode": _drawn(DECODE)}
    return Bundle(models, dict(config), dict(GENERATION))


def single_decoder() -> Bundle:
    """Return the decode alone, as `model`, taking several new tokens at once: it has to grow its own cache."""
    model = decoder_pair()["decode"]
    for value in model.graph.inputs[:3]:
        length = "past_sequence_length + sequence_length" if value.name == "attention_mask" else "sequence_length"
        value.shape = ir.Shape(["batch_size", length])
    for value in model.graph.outputs:
        axis = 1 if value.name == "logits" else 2
        length = "sequence_length" if value.name == "logits" else "past_sequence_length + sequence_length"
        value.shape = ir.Shape([*value.shape[:axis], length, *value.shape[axis + 1 :]])
    return Bundle({"model": model}, dict(CONFIG))


def weights(seed: int = 0) -> dict[str, np.ndarray]:
    """Return the weights of both decoders, every one of them random, biases and norms too."""
    random = np.random.default_rng(seed)
    return {name: (0.5 * random.standard_normal(shape)).astype(np.float32) for name, shape in WEIGHTS.items()}


def single(text: str, **config: object) -> Bundle:
    """Return a bundle of one model, drawn as text."""
    return Bundle({"model": parse(text)}, config)


def generic() -> Bundle:
    """Return a model that is no decoder: floats in, floats out."""
    return single("""
        <ir_version: 8, opset_import: ["" : 18]>
        generic (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) {
            y = Sigmoid(x)
            z = Mul(x, x)
        }
    """)


def typed() -> Bundle:
    """Return a model that gives integers at both ends of int64, booleans and strings."""
    extremes = np.iinfo(np.int64)
    return Bundle(
        {
            "model": _with_weights(
                TYPED,
                {
                    "largest": np.array(extremes.max),
                    "smallest": np.array(extremes.min),
                    "say_even": np.array("even", dtype=object),
                    "say_odd": np.array("odd", dtype=object),
                },
            )
        }
    )


def _drawn(text: str) -> ir.Model:
    """Parse a decoder; `__` in names becomes a dot."""
    lines = text.replace("BEFORE", BEFORE).replace("AFTER", AFTER).splitlines()
    model = _with_weights("\n".join(line.partition("#")[0] for line in lines), weights())
    for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
        assert value.name
        value.name = value.name.replace("__", ".")
    return model


def _with_weights(text: str, arrays: Mapping[str, np.ndarray]) -> ir.Model:
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(onnx.numpy_helper.from_array(array, name) for name, array in arrays.items())
    return ir.serde.deserialize_model(proto)
