"""The names of inputs, outputs and free axes that exported models have: Optimum's."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

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

CACHE_PART = re.compile(r"\.\d+(?=\.)|\.(key|value)$")


def axes_of(interface: Mapping[str, Axes], name: str) -> Axes:
    """Return the axes of an input or output; `past_key_values.3.decoder.key` is found as `past_key_values.decoder`."""
    return interface[CACHE_PART.sub("", name)]


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
