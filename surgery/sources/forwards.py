"""The forwards that are exported, and that the exports are compared with: one for each role of each kind of network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

Nested = dict[str, Any]
Forward = Callable[..., Nested]
"""Takes the model and its inputs by the first part of their names, with the past nested; returns outputs likewise."""

ENCODER_OUTPUTS = ("logits", "start_logits", "end_logits", "last_hidden_state", "pooler_output")


def run_model(model: Any, **inputs: Any) -> Any:
    """Run the model's own forward, which is hidden on the instance while a role is being exported."""
    return type(model).forward(model, **inputs, return_dict=True)


def encoder_only(model: Any, **inputs: Any) -> Nested:
    """Run an encoder with its head on `input_ids`, `attention_mask` and perhaps `token_type_ids`."""
    outputs = run_model(model, **inputs)
    return {name: outputs[name] for name in ENCODER_OUTPUTS if outputs.get(name) is not None}


def decoder_only(model: Any, past_key_values: Nested | None = None, **inputs: Any) -> Nested:
    """Run a decoder on `input_ids`, `attention_mask` and perhaps `position_ids`, after an optional past."""
    outputs = run_model(model, **inputs, past_key_values=_cache(past_key_values or {}), use_cache=True)
    layers = outputs.past_key_values.layers
    return {"logits": outputs.logits, "present": {str(index): _kept(layer) for index, layer in enumerate(layers)}}


def encoder(model: Any, **inputs: Any) -> Nested:
    """Run the encoder of an encoder-decoder on `input_ids` and `attention_mask`, or on `input_features`."""
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
    encoder_hidden_states: Any,
    encoder_attention_mask: Any = None,
) -> Nested:
    from transformers.modeling_outputs import BaseModelOutput

    outputs = run_model(
        model,
        decoder_input_ids=input_ids,
        attention_mask=encoder_attention_mask,
        encoder_outputs=BaseModelOutput(last_hidden_state=encoder_hidden_states),
        past_key_values=cache,
        use_cache=True,
    )
    caches = {"decoder": outputs.past_key_values.self_attention_cache}
    if with_encoder:
        caches["encoder"] = outputs.past_key_values.cross_attention_cache
    layers = range(len(caches["decoder"].layers))
    present = {str(index): {part: _kept(kept.layers[index]) for part, kept in caches.items()} for index in layers}
    return {"logits": outputs.logits, "present": present}


def _kept(layer: Any) -> Nested:
    return {"key": layer.keys, "value": layer.values}


def _cache(past: Mapping[str, Any]) -> Any:
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
