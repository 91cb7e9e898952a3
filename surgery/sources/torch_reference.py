"""A PyTorch model behind the interface of its export: the same roles, names and shapes.

The functions here are what is exported and what the export is compared with.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.sources import names
from surgery.sources.names import Axes, flatten, is_in, nest

Nested = dict[str, Any]
Forward = Callable[..., Nested]
"""Takes the model and its inputs by the first part of their names, with the past nested; returns outputs likewise."""


@dataclass(frozen=True)
class Architecture:
    """A kind of network: what it is loaded as, and for each of its roles what is run and how the axes are called."""

    auto_class: str
    forwards: Mapping[str, Forward]
    axes: Mapping[str, Mapping[str, Axes]]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles, each one fed by those before it."""
        return tuple(self.forwards)


class TorchReference:
    """Runs a PyTorch model on the feeds of its export.

    Args:
        model: The model, in evaluation mode.
        architecture: Its kind.
    """

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self._model = model
        self._architecture = architecture

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that can be run."""
        return self._architecture.roles

    def run(self, role: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs of a role by their names in the export.

        Raises:
            SurgeryError: There is no such role or input, or PyTorch cannot run it on these feeds.
        """
        import torch

        if role not in self._architecture.forwards:
            raise SurgeryError(f"PyTorch has no {role!r} here; it has {', '.join(self.roles)}")
        # The forwards of transformers swallow what they do not know.
        unknown = [name for name in feeds if not is_in(self._architecture.axes[role], name)]
        if unknown:
            raise SurgeryError(f"PyTorch cannot run {role!r}: it has no input {unknown[0]!r}")
        tensors = {name: _tensor(array, self._model.dtype) for name, array in feeds.items()}
        try:
            with torch.inference_mode():
                outputs = self._architecture.forwards[role](self._model, **nest(tensors))
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise SurgeryError(f"PyTorch cannot run {role!r} on {shapes}: {error}") from error
        return {name: tensor.numpy() for name, tensor in flatten(outputs).items()}


def _tensor(array: np.ndarray, float_type: Any) -> Any:
    import torch

    # torch takes no read-only memory, which is what mapped files and other runtimes give.
    tensor = torch.from_numpy(np.require(array, requirements=["C", "W"]))
    return tensor.to(float_type) if tensor.is_floating_point() else tensor.long()


def run_model(model: Any, **inputs: Any) -> Any:
    """Run the model's own forward, which is hidden on the instance while a role is being exported."""
    return type(model).forward(model, **inputs, use_cache=True, return_dict=True)


def decoder_only(model: Any, past_key_values: Nested | None = None, **inputs: Any) -> Nested:
    """Run a decoder on `input_ids`, `attention_mask` and perhaps `position_ids`, after an optional past."""
    outputs = run_model(model, **inputs, past_key_values=_cache(past_key_values or {}))
    layers = outputs.past_key_values.layers
    return {"logits": outputs.logits, "present": {str(index): _kept(layer) for index, layer in enumerate(layers)}}


def encoder(model: Any, **inputs: Any) -> Nested:
    """Run the encoder of an encoder-decoder on `input_ids` and `attention_mask`."""
    return {"last_hidden_state": model.get_encoder()(**inputs, return_dict=True).last_hidden_state}


def first_tokens(model: Any, **inputs: Any) -> Nested:
    """Run the decoder of an encoder-decoder without a past: it also computes the keys and values of the encoder."""
    return _encoder_decoder(model, _cross_cache({}), with_encoder=True, **inputs)


def next_tokens(model: Any, past_key_values: Nested, **inputs: Any) -> Nested:
    """Run the decoder of an encoder-decoder after a past; what does not change is not returned."""
    return _encoder_decoder(model, _cross_cache(past_key_values), with_encoder=False, **inputs)


def _encoder_decoder(
    model: Any,
    cache: Any,
    *,
    with_encoder: bool,
    input_ids: Any,
    encoder_attention_mask: Any,
    encoder_hidden_states: Any,
) -> Nested:
    from transformers.modeling_outputs import BaseModelOutput

    outputs = run_model(
        model,
        decoder_input_ids=input_ids,
        attention_mask=encoder_attention_mask,
        encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
        past_key_values=cache,
    )
    caches = {"decoder": outputs.past_key_values.self_attention_cache}
    if with_encoder:
        caches["encoder"] = outputs.past_key_values.cross_attention_cache
    layers = range(len(caches["decoder"].layers))
    present = {str(index): {part: _kept(kept.layers[index]) for part, kept in caches.items()} for index in layers}
    return {"logits": outputs.logits, "present": present}


def _kept(layer: Any) -> Nested:
    return {"key": layer.keys, "value": layer.values}


def _cache(past: Nested) -> Any:
    """Return a cache that holds `{"0": {"key": ..., "value": ...}}`, in the order of the layers.

    No config is given to the cache, so a layer with a sliding window keeps everything too and its mask does the rest.
    """
    from transformers import DynamicCache

    return DynamicCache([(past[str(index)]["key"], past[str(index)]["value"]) for index in range(len(past))])


def _cross_cache(past: Nested) -> Any:
    from transformers import EncoderDecoderCache

    own = {index: layer["decoder"] for index, layer in past.items()}
    cross = {index: layer["encoder"] for index, layer in past.items()}
    return EncoderDecoderCache(_cache(own), _cache(cross))


DECODER_ONLY = Architecture(
    "AutoModelForCausalLM", {"prefill": decoder_only, "decode": decoder_only}, names.DECODER_ONLY
)
ENCODER_DECODER = Architecture(
    "AutoModelForSeq2SeqLM",
    {"encoder": encoder, "prefill": first_tokens, "decode": next_tokens},
    names.ENCODER_DECODER,
)


def samples(model: Any, architecture: Architecture) -> dict[str, dict[str, Any]]:
    """Return for each role inputs to trace it with; each role is fed by those before it.

    Three faults of transformers.exporters 5.23 are avoided here. An attention mask without padding is taken for no mask
    at all. An axis of length 1 becomes fixed to 1. The decode step that `decompose_for_generation` captures of T5 has
    one token, even with `multi_token_decode`. So every free axis is 2 or longer, no two alike, and row 0 is padded.
    """
    import torch

    if architecture.roles[0] == "encoder":
        return _encoder_decoder_samples(model, architecture)
    prompt = {"input_ids": _ids(2, 5), "attention_mask": _padded(2, 5)}
    several = {"input_ids": _ids(2, 3), "attention_mask": torch.cat([_padded(2, 5), torch.ones(2, 3).long()], dim=1)}
    if _takes_positions(model):
        prompt["position_ids"] = _positions(prompt["attention_mask"])
        several["position_ids"] = _positions(several["attention_mask"])[:, 5:]
    past = _run(model, architecture, "prefill", prompt)
    return {"prefill": prompt, "decode": several | _as_past(past)}


def _encoder_decoder_samples(model: Any, architecture: Architecture) -> dict[str, dict[str, Any]]:
    read = {"input_ids": _ids(2, 7), "attention_mask": _padded(2, 7)}
    hidden = _run(model, architecture, "encoder", read)["last_hidden_state"]
    encoded = {"encoder_hidden_states": hidden, "encoder_attention_mask": read["attention_mask"]}
    prompt = {"input_ids": _ids(2, 5), **encoded}
    past = _run(model, architecture, "prefill", prompt)
    return {"encoder": read, "prefill": prompt, "decode": {"input_ids": _ids(2, 3), **encoded, **_as_past(past)}}


def _takes_positions(model: Any) -> bool:
    """Left to itself, GPT-2 counts positions from the padding; who pads on the left has to say them."""
    return "position_ids" in inspect.signature(type(model).forward).parameters


def _ids(batch: int, length: int) -> Any:
    import torch

    return torch.ones(batch, length).long()


def _padded(batch: int, length: int) -> Any:
    import torch

    mask = torch.ones(batch, length).long()
    mask[0, :2] = 0
    return mask


def _positions(mask: Any) -> Any:
    return (mask.cumsum(-1) - 1).clamp(min=0)


def _run(model: Any, architecture: Architecture, role: str, inputs: Mapping[str, Any]) -> dict[str, Any]:
    import torch

    with torch.inference_mode(False), torch.no_grad():
        return flatten(architecture.forwards[role](model, **nest(inputs)))


def _as_past(outputs: Mapping[str, Any]) -> dict[str, Any]:
    return {
        name.replace("present", "past_key_values", 1): tensor
        for name, tensor in outputs.items()
        if name.startswith("present")
    }
