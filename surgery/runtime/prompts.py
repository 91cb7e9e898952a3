"""Prompts: text through a bundle's own tokenizer, continued greedily, and back to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from surgery.bundle import Bundle
from surgery.errors import RecipeError, Refused, SurgeryError
from surgery.interfaces import FLAG, recognise
from surgery.runtime.loops import Callee, Signature, decoders_in, greedy, refusal_of_prompts

Run = Callable[[ir.Model, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]

_TO_ENCODERS = frozenset(("input_ids", "attention_mask"))
_TO_DECODERS = frozenset(("input_ids", "attention_mask", "position_ids"))
_BESIDE_ENCODERS = frozenset(("input_ids", "encoder_hidden_states", "encoder_attention_mask"))
"""What `greedy` feeds to a model beside the cache, by Optimum's names."""

_NAMES = "leave the prompts out, or rename_io with the names of Optimum as the last step"


@dataclass(frozen=True)
class Answer:
    """A prompt and its continuation."""

    prompt: str
    text: str
    tokens: tuple[int, ...]


def answer(bundle: Bundle, prompts: Sequence[str], max_new_tokens: int, run: Run) -> list[Answer]:
    """Continue prompts greedily, in one left-padded batch.

    Args:
        bundle: With models that `greedy` runs over, and a `tokenizer.json` among its files.
        prompts: The texts.
        max_new_tokens: How many tokens to add at most.
        run: Runs a model on arrays by name.

    Raises:
        Refused: Its models have names of their own, or cannot begin a generation.
        RecipeError: It has no models that can generate, no tokenizer, or one that cannot read a prompt.
    """
    models = _callees(bundle, run)
    tokenizer = load_tokenizer(bundle)
    config = {**bundle.config, **bundle.generation_config}
    rows = [encode(tokenizer, prompt) for prompt in prompts]
    ids, mask = left_padded(rows, config.get("pad_token_id") or 0)
    feeds = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(max_new_tokens)}
    sequences = greedy(models, feeds, config)["sequences"]
    return [
        Answer(prompt, tokenizer.decode(row.tolist(), skip_special_tokens=True), tuple(row.tolist()))
        for prompt, row in zip(prompts, sequences, strict=True)
    ]


def roles_of_prompts(roles: Sequence[str]) -> tuple[str, ...]:
    """Return the models that continue a prompt, of those that there are.

    Raises:
        RecipeError: There is no decoder among them.
    """
    try:
        decoders = decoders_in(roles)
    except SurgeryError as error:
        hint = "leave the prompts out"
        raise RecipeError(
            f"check.prompts: they need the models 'prefill' and 'decode', or 'decoder'; there is {', '.join(roles)}",
            hint=f"{hint}, or source.roles: decoder: FILE if it is one" if "model" in roles else hint,
        ) from error
    return tuple(dict.fromkeys(("encoder", *decoders) if "encoder" in roles else decoders))


def refuse_unanswerable(bundle: Bundle) -> None:
    """Find out without running anything whether a bundle could continue prompts.

    Raises:
        Refused: Its models have names of their own, or cannot begin a generation.
        RecipeError: It has no models that can generate, or no tokenizer.
    """
    _callees(bundle, lambda model, feeds: {})
    load_tokenizer(bundle)


def _callees(bundle: Bundle, run: Run) -> dict[str, Callee]:
    """Return the models that `greedy` runs over."""
    roles = roles_of_prompts(tuple(bundle.models))
    for role in roles:
        fed = _TO_ENCODERS if role == "encoder" else _BESIDE_ENCODERS if "encoder" in roles else _TO_DECODERS
        _refuse_strange_names(role, bundle[role], fed)
    models = {role: _callee(bundle[role], run) for role in roles}
    first, _ = decoders_in(models)
    problem = refusal_of_prompts(first, models[first], has_encoder="encoder" in models)
    if problem:
        raise Refused(f"check.prompts: {problem}", hint="leave the prompts out")
    return models


def _refuse_strange_names(role: str, model: ir.Model, fed: frozenset[str]) -> None:
    """Raise unless `greedy` feeds every input of a model, and finds what it goes on with in the outputs."""
    recognised = recognise(model)
    if recognised is None:
        raise Refused(
            f"check.prompts: the inputs and outputs of {role!r} have names that no generation loop knows",
            hint="leave the prompts out, or rename_io with `to: optimum` as the last step",
        )
    known = recognised.canonical
    cache = {slot.input for slot in recognised.cache} if role != "prefill" else set()
    inputs = [value.name or "" for value in model.graph.inputs if value.name not in model.graph.initializers]
    strange = [name for name in inputs if name not in cache and known.get(name) not in fed | {FLAG}]
    if strange:
        is_lonely = known.get(strange[0], "").startswith("encoder_")
        raise Refused(
            f"check.prompts: no generation loop feeds the input {strange[0]!r} of {role!r}",
            hint="leave the prompts out: there is no model 'encoder' here" if is_lonely else _NAMES,
        )
    wanted = "last_hidden_state" if role == "encoder" else "logits"
    if wanted not in {known.get(value.name or "") for value in model.graph.outputs}:
        raise Refused(f"check.prompts: no output of {role!r} is its {wanted!r}", hint=_NAMES)


def encode(tokenizer: Any, prompt: str, option: str = "check.prompts") -> list[int]:
    """Return the ids of a prompt.

    Raises:
        RecipeError: The tokenizer cannot read it, or it has no tokens; `option` is where it stands.
    """
    try:
        ids: list[int] = tokenizer.encode(prompt).ids
    except Exception as error:  # the library raises nothing more specific
        raise RecipeError(f"{option}: the tokenizer cannot read {prompt!r}: {error}") from error
    if not ids:
        raise RecipeError(f"{option}: {prompt!r} has no tokens")
    return ids


def _callee(model: ir.Model, run: Run) -> Callee:
    return Callee(Signature.of(model), lambda feeds: dict(run(model, feeds)))


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask [batch, longest row]."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return ids, mask


def load_tokenizer(bundle: Bundle, option: str = "check.prompts") -> Any:
    """Return the tokenizer that travels with a bundle; `option` is what asks for it.

    Raises:
        RecipeError: There is none, or the library `tokenizers` is not installed.
    """
    content = bundle.files.get("tokenizer.json")
    if content is None:
        raise RecipeError(f"{option}: the source has no tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise RecipeError(
            f"{option}: the library 'tokenizers' is not installed", hint="pip install graph-surgery[transformers]"
        ) from error
    text = content.read_text(encoding="utf-8") if isinstance(content, Path) else content.decode()
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    return tokenizer
