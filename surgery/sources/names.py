"""The names in an exported model: inputs, outputs and free axes as in Optimum, nodes and weights after their module."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from surgery.errors import SurgeryError

BATCH = "batch_size"
LENGTH = "sequence_length"
DECODER_LENGTH = "decoder_sequence_length"
ENCODER_LENGTH = "encoder_sequence_length"
PAST = "past_sequence_length"

Axes = tuple[str | None, ...]
"""The name of each axis that is free, None for those that the network fixes."""

DECODER_ONLY: Mapping[str, Mapping[str, Axes]] = {
    "prefill": {
        "input_ids": (BATCH, LENGTH),
        "attention_mask": (BATCH, LENGTH),
        "position_ids": (BATCH, LENGTH),
        "logits": (BATCH, LENGTH, None),
        "present": (BATCH, None, LENGTH, None),
    },
    "decode": {
        "input_ids": (BATCH, LENGTH),
        "attention_mask": (BATCH, f"{PAST} + {LENGTH}"),
        "position_ids": (BATCH, LENGTH),
        "past_key_values": (BATCH, None, PAST, None),
        "logits": (BATCH, LENGTH, None),
        "present": (BATCH, None, f"{PAST} + {LENGTH}", None),
    },
}

ENCODER_DECODER: Mapping[str, Mapping[str, Axes]] = {
    "encoder": {
        "input_ids": (BATCH, ENCODER_LENGTH),
        "attention_mask": (BATCH, ENCODER_LENGTH),
        "last_hidden_state": (BATCH, ENCODER_LENGTH, None),
    },
    "prefill": {
        "input_ids": (BATCH, DECODER_LENGTH),
        "encoder_hidden_states": (BATCH, ENCODER_LENGTH, None),
        "encoder_attention_mask": (BATCH, ENCODER_LENGTH),
        "logits": (BATCH, DECODER_LENGTH, None),
        "present.decoder": (BATCH, None, DECODER_LENGTH, None),
        "present.encoder": (BATCH, None, ENCODER_LENGTH, None),
    },
    "decode": {
        "input_ids": (BATCH, DECODER_LENGTH),
        "encoder_hidden_states": (BATCH, ENCODER_LENGTH, None),
        "encoder_attention_mask": (BATCH, ENCODER_LENGTH),
        "past_key_values.decoder": (BATCH, None, PAST, None),
        "past_key_values.encoder": (BATCH, None, ENCODER_LENGTH, None),
        "logits": (BATCH, DECODER_LENGTH, None),
        "present.decoder": (BATCH, None, f"{PAST} + {DECODER_LENGTH}", None),
    },
}

# Whisper's encoder takes 30 seconds of sound, no more and no less: of its free axes only the batch is left.
SPEECH: Mapping[str, Mapping[str, Axes]] = {
    "encoder": {"input_features": (BATCH, None, None), "last_hidden_state": (BATCH, None, None)},
    "prefill": {
        "input_ids": (BATCH, DECODER_LENGTH),
        "encoder_hidden_states": (BATCH, None, None),
        "logits": (BATCH, DECODER_LENGTH, None),
        "present.decoder": (BATCH, None, DECODER_LENGTH, None),
        "present.encoder": (BATCH, None, None, None),
    },
    "decode": {
        "input_ids": (BATCH, DECODER_LENGTH),
        "encoder_hidden_states": (BATCH, None, None),
        "past_key_values.decoder": (BATCH, None, PAST, None),
        "past_key_values.encoder": (BATCH, None, None, None),
        "logits": (BATCH, DECODER_LENGTH, None),
        "present.decoder": (BATCH, None, f"{PAST} + {DECODER_LENGTH}", None),
    },
}

ENCODER_ONLY: Mapping[str, Axes] = dict.fromkeys(("input_ids", "attention_mask", "token_type_ids"), (BATCH, LENGTH))
"""The inputs of an encoder; the outputs depend on its head."""

ONE_A_ROW: Mapping[str, Axes] = {"logits": (BATCH, None)}
ONE_A_TOKEN: Mapping[str, Axes] = {"logits": (BATCH, LENGTH, None)}
SPAN: Mapping[str, Axes] = dict.fromkeys(("start_logits", "end_logits"), (BATCH, LENGTH))
STATES: Mapping[str, Axes] = {"last_hidden_state": (BATCH, LENGTH, None), "pooler_output": (BATCH, None)}

CACHE_PART = re.compile(r"\.\d+(?=\.)|\.(key|value)$")


def axes_of(interface: Mapping[str, Axes], name: str) -> Axes:
    """Return the axes of an input or output; `past_key_values.3.decoder.key` is found as `past_key_values.decoder`."""
    return interface[CACHE_PART.sub("", name)]


def is_in(interface: Mapping[str, Axes], name: str) -> bool:
    """Tell whether an interface has an input or output of this name."""
    return CACHE_PART.sub("", name) in interface


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return `{"present.0.key": x}` as `{"present": {"0": {"key": x}}}`."""
    nested: dict[str, Any] = {}
    for name, leaf in flat.items():
        *path, last = name.split(".")
        branch = nested
        for part in path:
            branch = branch.setdefault(part, {})
        branch[last] = leaf
    return nested


def flatten(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return `{"present": {"0": {"key": x}}}` as `{"present.0.key": x}`."""
    flat: dict[str, Any] = {}
    for part, leaf in nested.items():
        flat |= flatten(leaf, f"{prefix}{part}.") if isinstance(leaf, Mapping) else {f"{prefix}{part}": leaf}
    return flat


SYMBOL = re.compile(r"\b[su]\d+\b")


def name_axes(graph: ir.Graph, axes: Mapping[str, Axes]) -> None:
    """Rename the exporter's symbols (`s43`, `s36 + s70`) to what the axes are; forget what stays unknown.

    Two symbols may become one name, as the interface promises that they are one size; one symbol never becomes two.
    """
    names: dict[str, str] = {}
    for value in graph.inputs:
        for name, size in _axes_and_sizes(value, axes):
            if SYMBOL.fullmatch(size) and names.setdefault(size, name) != name:
                raise SurgeryError(f"the export takes {names[size]!r} and {name!r} for one size, at {value.name!r}")
    for node in graph.all_nodes():
        for value in node.outputs:
            if value.shape is not None:
                value.shape = ir.Shape([_renamed(size, names) for size in value.shape])
    for value in (*graph.inputs, *graph.outputs):
        assert value.shape is not None
        wanted = axes_of(axes, value.name or "")
        value.shape = ir.Shape([name or _renamed(size, names) for name, size in zip(wanted, value.shape, strict=True)])


def _axes_and_sizes(value: ir.Value, axes: Mapping[str, Axes]) -> Iterator[tuple[str, str]]:
    for name, size in zip(axes_of(axes, value.name or ""), value.shape or (), strict=True):
        if name is not None and not isinstance(size, int):
            yield name, str(size.value)


def _renamed(size: int | ir.SymbolicDim, names: Mapping[str, str]) -> int | str | None:
    if isinstance(size, int):
        return size
    text = size.value
    if text is None or any(symbol not in names for symbol in SYMBOL.findall(text)):
        return None
    if text in names:
        return names[text]
    return SYMBOL.sub(lambda symbol: f"({name})" if "+" in (name := names[symbol[0]]) else name, text)


def name_nodes(graph: ir.Graph) -> None:
    """Name each node by the module that it comes from and its operator: `transformer.h.0.attn.c_proj/Gemm`."""
    counts: dict[str, int] = {}
    for node in graph.all_nodes():
        scope = module_of(node)
        name = f"{scope}/{node.op_type}" if scope else node.op_type
        counts[name] = counts.get(name, 0) + 1
        node.name = name if counts[name] == 1 else f"{name}_{counts[name] - 1}"


def module_of(node: ir.Node) -> str:
    """Return the path of the PyTorch module that a node comes from, as torch's exporter notes it, empty if not."""
    try:
        scopes = ast.literal_eval(node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]"))
    except (ValueError, SyntaxError):
        return ""
    modules = [scope for scope in scopes[:-1] if scope and not scope.startswith("_empty_nn_module")]
    return modules[-1] if modules else ""


def name_weights(graph: ir.Graph, model: Any) -> None:
    """Name a weight that the exporter computed, and called `val_196`, after the parameter that it was made of.

    It transposes the weights of linear layers, and adds the one of Gemma's norms: `....weight.transposed`,
    `....weight.plus_one`.
    """
    parameters = dict(model.named_parameters(remove_duplicate=False))
    for value in list(graph.initializers.values()):
        modules = {(node.name or "").partition("/")[0] for node, _ in value.uses()}
        name = f"{min(modules)}.weight" if len(modules) == 1 else ""
        if value.name in parameters or value.const_value is None or name not in parameters:
            continue
        made = _made_by(value.const_value, parameters[name])
        new_name = f"{name}.{made}"
        if made and new_name not in graph.initializers:
            value.name = value.const_value.name = new_name


def _made_by(tensor: ir.TensorProtocol, parameter: Any) -> str:
    """Return what was done to a parameter, empty for none of what is known."""
    shape, given = tuple(tensor.shape.numpy()), tuple(parameter.shape)
    array = parameter.detach().numpy()
    if len(shape) == 2 and shape == given[::-1] and np.array_equal(tensor.numpy(), array.T):
        return "transposed"
    if len(shape) == 1 and shape == given and np.array_equal(tensor.numpy(), array + 1):
        return "plus_one"
    return ""


def forget_origins(model: ir.Model) -> None:
    """Drop the exporter's notes: Python stack traces with paths of this machine, longer than the graph."""
    model.graph.metadata_props.clear()
    for node in model.graph.all_nodes():
        node.metadata_props.clear()
        for value in node.outputs:
            value.metadata_props.clear()
    for value in (*model.graph.inputs, *model.graph.initializers.values()):
        value.metadata_props.clear()
