"""What generation refuses, before or instead of running anything."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from surgery.errors import Refused, SurgeryError

GROWING = (None, "dynamic")
"""The values of `cache_implementation` that mean a cache that grows."""

REFUSED: Mapping[str, str] = {
    "inputs_embeds": "the models take token ids, no embeddings",
    "decoder_inputs_embeds": "the models take token ids, no embeddings",
    "output_attentions": "the models give logits and a cache, no attentions",
    "output_hidden_states": "the models give logits and a cache, no hidden states",
    "assistant_early_exit": "the models cannot be left after some of their layers",
    "use_mtp": "the models give no hidden states to predict further tokens from",
    "speculation_type": "the models give no hidden states to predict further tokens from",
    "token_type_ids": "the models take no types of tokens",
}
"""Arguments of `generate` that cannot be had from models like these, and why."""

REFUSED_BESIDE_AN_ENCODER: Mapping[str, str] = {
    "guidance_scale": "transformers guides decoders on their own only",
    "prefill_chunk_size": "transformers cuts the prompts of decoders on their own only",
}
"""The same, of an encoder-decoder."""


def refuse_options(config: Any, kwargs: Mapping[str, Any], *, has_encoder: bool) -> None:
    """Raise for options of `generate` that cannot be had from ONNX models.

    Args:
        config: The `GenerationConfig` that is given, if any.
        kwargs: The options that are given by name.
        has_encoder: The models are an encoder-decoder.
    """
    for name, reason in {**REFUSED, **(REFUSED_BESIDE_AN_ENCODER if has_encoder else {})}.items():
        if is_given(asked(name, config, kwargs)):
            raise Refused(f"generate: {name}: {reason}", hint="generate with the PyTorch model, or leave it out")
    cache = asked("cache_implementation", config, kwargs)
    if cache not in GROWING:
        raise Refused(
            f"generate: cache_implementation={cache!r}: the cache is ONNX Runtime's, and grows at every step",
            hint="leave cache_implementation out",
        )


def is_given(option: Any) -> bool:
    """Tell what was asked for from what was left out."""
    return option is not None and option is not False


def asked(name: str, config: Any, kwargs: Mapping[str, Any]) -> Any:
    """Return an option of a call to `generate`."""
    found = kwargs.get(name)
    return found if found is not None else getattr(config, name, None)


def refuse_ids(ids: Any, config: Any) -> None:
    if ids is None:
        return
    if not isinstance(ids, torch.Tensor):
        raise SurgeryError(
            f"input_ids are a {type(ids).__name__}, not a tensor", hint="tokenizer(..., return_tensors='pt')"
        )
    if ids.ndim != 2 or ids.dtype not in (torch.int64, torch.int32):
        raise SurgeryError(
            f"input_ids are {ids.dtype} {list(ids.shape)}, not integers [batch, length]",
            hint="tokenizer(..., return_tensors='pt', padding=True)",
        )
    if ids.numel() == 0:
        raise SurgeryError("the prompt has no tokens", hint="give at least one, such as the beginning-of-text token")
    vocabulary = getattr(config.get_text_config(), "vocab_size", None)
    lowest, highest = int(ids.min()), int(ids.max())
    if lowest < 0 or (vocabulary and highest >= vocabulary):
        raise SurgeryError(
            f"input_ids go from {lowest} to {highest}, and the vocabulary has {vocabulary} tokens",
            hint="encode the text with the tokenizer of this model",
        )


def refuse_padding(mask: torch.Tensor, kind: str, role: str) -> None:
    """Raise if a mask that a model does not take has padding in it."""
    if not bool((mask != 0).all()):
        raise lost_in_padding(role, f"takes no {kind!r}")


def lost_in_padding(role: str, why: str) -> Refused:
    """Return what is said of a model that cannot tell padding from text."""
    return Refused(
        f"{role!r} {why}, so prompts of several lengths cannot be one batch",
        hint="generate one prompt at a time, or export the model with attention_mask and position_ids",
    )


def refused_cache(given: Any) -> Refused:
    return Refused(
        f"past_key_values are a {type(given).__name__}, not what a Generator gave",
        hint="generate(..., return_dict_in_generate=True).past_key_values is one",
    )
