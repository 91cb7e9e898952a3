"""Which host loop runs over the models of a bundle."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from surgery.bundle import Bundle
from surgery.claims import HostLoop
from surgery.interfaces import FLAG, Recognised, recognise
from surgery.runtime.loops import PAIR, start_id

FED = frozenset(
    {"input_ids", "attention_mask", "position_ids", "encoder_hidden_states", "encoder_attention_mask", FLAG}
)
"""What a loop feeds beside the cache, by Optimum's names."""


def greedy_loop(bundle: Bundle) -> HostLoop | None:
    """Return greedy generation over the decoders of a bundle, None if it could not be run.

    A pass that makes other decoders of those that there are claims the tokens of this loop anew.
    """
    models = bundle.models
    decoders = PAIR if set(PAIR) <= set(models) else ("decoder",)
    roles = ("encoder", *decoders) if "encoder" in models else decoders
    found = {role: recognise(models[role]) for role in roles if role in models}
    config = {**bundle.config, **bundle.generation_config}
    known = {role: one for role, one in found.items() if one is not None and _is_fed(models[role], one)}
    if set(known) != set(roles):
        return None
    is_crossed = any(one.family == "cross decoder" for one in known.values())
    can_start = not is_crossed or start_id(config) is not None
    return HostLoop("greedy", roles) if is_crossed == ("encoder" in roles) and can_start else None


def _is_fed(model: ir.Model, recognised: Recognised) -> bool:
    """Say whether a loop feeds every input of a model and finds what it goes on with."""
    cache = {slot.input for slot in recognised.cache}
    names: Mapping[str, str] = recognised.canonical
    inputs = [value.name or "" for value in model.graph.inputs if value.name not in model.graph.initializers]
    given = {names.get(value.name or "") for value in model.graph.outputs}
    wanted = "last_hidden_state" if recognised.role == "encoder" else "logits"
    return wanted in given and all(name in cache or names.get(name) in FED for name in inputs)
