"""One role of a PyTorch model as an ONNX model, by `transformers.exporters`, whose faults are avoided here.

Seen in transformers 5.23 with torch 2.13 and onnxscript 0.7. The tests in tests/sources/test_exporter_faults.py make
each of them happen, so that they say when a workaround may go.

- **Its own decomposition loses masks and axes.** `export_for_generation` captures what `generate` passes on: a mask
  without padding is none, the decode step of an encoder-decoder has one token even with `multi_token_decode` and cannot
  be exported from opset 23 on, and there is no encoder. It is not used: the roles are forwards of our own.
- **An axis of length 1 is fixed.** torch.export specialises 0 and 1, although the axis is said to be free. Every free
  axis of the samples is 2 or longer, and no two are alike, so that none is taken for another; the masks have padding.
- **What was lost or fixed is not said.** The interface is checked after the export (`_check_interface`).
- **An opset that it cannot write becomes 18**, from 26 on. Opsets are checked before anything is loaded, and the one
  that came out after the export.
- **Rotary embeddings of type `dynamic` cannot be traced.** They decide in Python whether the prompt has outgrown them.
  Such a config is refused before the weights are loaded (`refuse_growing_rotary`).
- **Falcon cannot be exported from opset 23 on**: the translation of attention refuses a single head of keys. At 18 it
  can, so the error says so; it is not among the families.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Mapping
from typing import Any

import onnx_ir as ir

from surgery.errors import RecipeError, SurgeryError
from surgery.sources.architectures import Architecture
from surgery.sources.names import Axes, axes_of, flatten, forget_origins, name_axes, name_nodes, name_weights, nest

Tensors = dict[str, Any]

BATCH, ENCODED, PROMPT, SEVERAL, PADDING = 2, 7, 5, 3, 2
"""How large the free axes of the samples are."""


def export_role(model: Any, architecture: Architecture, role: str, sample: Mapping[str, Any], opset: int) -> ir.Model:
    """Return the model of a role, with Optimum's names for inputs, outputs and free axes.

    Args:
        model: The PyTorch model, in evaluation mode.
        architecture: Its kind.
        role: One of its roles.
        sample: The inputs to trace it with, as `samples` makes them.
        opset: The opset to export at.

    Raises:
        SurgeryError: The export lost an input, fixed an axis or has another opset.
        Exception: Whatever torch, onnxscript and transformers raise.
    """
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    axes = architecture.axes[role]
    free = {name: _free_axes(axes_of(axes, name)) for name in sample}
    config = OnnxConfig(dynamic=True, dynamic_shapes=nest(free), opset_version=opset)
    with _as_forward(model, architecture, role):
        exported: ir.Model = OnnxExporter().export(model, nest(sample), config).program
    if exported.opset_imports[""] != opset:
        raise SurgeryError(f"the export of {role!r} has opset {exported.opset_imports['']}, not {opset}")
    _check_interface(exported.graph, tuple(sample), axes, role)
    name_axes(exported.graph, axes)
    name_nodes(exported.graph)
    name_weights(exported.graph, model)
    forget_origins(exported)
    exported.graph.name = role
    return exported


@contextlib.contextmanager
def _as_forward(model: Any, architecture: Architecture, role: str) -> Iterator[None]:
    """Make the role the model's forward: the exporter names inputs and outputs by what a forward takes and returns."""

    def forward(**inputs: Any) -> Any:
        return architecture.forwards[role](model, **inputs)

    model.forward = forward
    try:
        yield
    finally:
        del model.forward


def _free_axes(axes: Axes) -> Any:
    from torch.export import Dim

    return {index: Dim.AUTO for index, name in enumerate(axes) if name is not None}


def _check_interface(graph: ir.Graph, inputs: tuple[str, ...], axes: Mapping[str, Axes], role: str) -> None:
    """Refuse an export that lost an input or fixed an axis, which the exporter does without a word."""
    given = [value.name for value in graph.inputs]
    lost = [name for name in inputs if name not in given]
    if lost:
        raise SurgeryError(f"the export of {role!r} has lost the input {lost[0]!r}")
    for value in (*graph.inputs, *graph.outputs):
        name = value.name or ""
        for index, (wanted, size) in enumerate(zip(axes_of(axes, name), value.shape or (), strict=True)):
            if wanted is not None and isinstance(size, int):
                raise SurgeryError(f"the export of {role!r} has fixed axis {index} of {name!r} to {size}")


def refuse_growing_rotary(config: Mapping[str, Any]) -> None:
    """Refuse rotary embeddings that compute their frequencies anew, in Python, when a prompt outgrows them.

    Raises:
        RecipeError: The config asks for them.
    """
    given = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = given.get("rope_type", given.get("type")) if isinstance(given, dict) else None
    if kind == "dynamic":
        raise RecipeError(
            "cannot export rotary embeddings of type 'dynamic': torch cannot trace how they grow with the prompt",
            hint='write "default" for the type into config.json of a local folder, which gives the same answers up to '
            "max_position_embeddings",
        )


# Samples


def samples(model: Any, architecture: Architecture) -> dict[str, Tensors]:
    """Return for each role inputs to trace it with; each role is fed by those before it."""
    if "model" in architecture.roles:
        return {"model": _encoder_sample(model)}
    if "encoder" in architecture.roles:
        return _cross_samples(model, architecture)
    return _decoder_samples(model, architecture)


def _encoder_sample(model: Any) -> Tensors:
    ids = _ids(PROMPT)
    sample = {"input_ids": ids, "attention_mask": _padded(PROMPT)}
    # RoBERTa has one type only, and DeBERTa none: nobody gives it, and Optimum has no such input.
    if _takes(model, "token_type_ids") and getattr(model.config, "type_vocab_size", 0) > 1:
        sample["token_type_ids"] = ids * 0
    return sample


def _decoder_samples(model: Any, architecture: Architecture) -> dict[str, Tensors]:
    import torch

    mask = _padded(PROMPT)
    longer = torch.cat([mask, torch.ones(BATCH, SEVERAL).long()], dim=1)
    prompt = {"input_ids": _ids(PROMPT), "attention_mask": mask}
    several = {"input_ids": _ids(SEVERAL), "attention_mask": longer}
    # Left to itself, GPT-2 counts positions from the padding; who pads on the left has to say them.
    if _takes(model, "position_ids"):
        prompt["position_ids"] = _positions(mask)
        several["position_ids"] = _positions(longer)[:, PROMPT:]
    past = _run(model, architecture, "prefill", prompt)
    return {"prefill": prompt, "decode": several | _as_past(past)}


def _cross_samples(model: Any, architecture: Architecture) -> dict[str, Tensors]:
    read = _encoder_inputs(model, architecture)
    encoded = {"encoder_hidden_states": _run(model, architecture, "encoder", read)["last_hidden_state"]}
    if "attention_mask" in read:
        encoded["encoder_attention_mask"] = read["attention_mask"]
    prompt = {"input_ids": _ids(PROMPT), **encoded}
    past = _run(model, architecture, "prefill", prompt)
    return {"encoder": read, "prefill": prompt, "decode": {"input_ids": _ids(SEVERAL), **encoded, **_as_past(past)}}


def _encoder_inputs(model: Any, architecture: Architecture) -> Tensors:
    import torch

    if "input_features" not in architecture.axes["encoder"]:
        return {"input_ids": _ids(ENCODED), "attention_mask": _padded(ENCODED)}
    config = model.config
    frames = 2 * config.max_source_positions  # the second convolution has stride 2
    return {"input_features": torch.zeros(BATCH, config.num_mel_bins, frames)}


def _takes(model: Any, name: str) -> bool:
    return name in inspect.signature(type(model).forward).parameters


def _ids(length: int) -> Any:
    import torch

    return torch.ones(BATCH, length).long()


def _padded(length: int) -> Any:
    import torch

    mask = torch.ones(BATCH, length).long()
    mask[0, :PADDING] = 0
    return mask


def _positions(mask: Any) -> Any:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _run(model: Any, architecture: Architecture, role: str, inputs: Mapping[str, Any]) -> Tensors:
    import torch

    with torch.inference_mode(False), torch.no_grad():
        return flatten(architecture.forwards[role](model, **nest(inputs)))


def _as_past(outputs: Mapping[str, Any]) -> Tensors:
    return {
        name.replace("present", "past_key_values", 1): tensor
        for name, tensor in outputs.items()
        if name.startswith("present")
    }
