"""Prompts: text through a bundle's own tokenizer, continued greedily, and back to text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from surgery.bundle import Bundle
from surgery.errors import RecipeError, Refused
from surgery.runtime.loops import Callee, greedy

Run = Callable[[ir.Model, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Answer:
    """A prompt and its continuation."""

    prompt: str
    text: str
    tokens: tuple[int, ...]


def answer(bundle: Bundle, prompts: Sequence[str], max_new_tokens: int, run: Run) -> list[Answer]:
    """Continue prompts greedily, in one left-padded batch.

    Args:
        bundle: With `prefill` and `decode` (and `encoder`), and a `tokenizer.json` among its files.
        prompts: The texts.
        max_new_tokens: How many tokens to add at most.
        run: Runs a model on arrays by name.

    Raises:
        Refused: The bundle has no models that can generate.
        RecipeError: It has no tokenizer, or one that cannot read a prompt.
    """
    roles = [role for role in ("encoder", "prefill", "decode") if role in bundle.models]
    if "prefill" not in roles or "decode" not in roles:
        raise Refused(f"prompts need the models 'prefill' and 'decode'; there is {sorted(bundle.models)}")
    tokenizer = load_tokenizer(bundle)
    config = {**bundle.config, **bundle.generation_config}
    rows = [_encode(tokenizer, prompt) for prompt in prompts]
    ids, mask = left_padded(rows, config.get("pad_token_id") or 0)
    models: dict[str, Callee] = {role: _callee(bundle[role], run) for role in roles}
    feeds = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.array(max_new_tokens)}
    sequences = greedy(models, feeds, config)["sequences"]
    return [
        Answer(prompt, tokenizer.decode(row.tolist(), skip_special_tokens=True), tuple(row.tolist()))
        for prompt, row in zip(prompts, sequences, strict=True)
    ]


def _encode(tokenizer: Any, prompt: str) -> list[int]:
    try:
        ids: list[int] = tokenizer.encode(prompt).ids
    except Exception as error:  # the library raises nothing more specific
        raise RecipeError(f"check.prompts: the tokenizer cannot read {prompt!r}: {error}") from error
    if not ids:
        raise RecipeError(f"check.prompts: {prompt!r} has no tokens")
    return ids


def _callee(model: ir.Model, run: Run) -> Callee:
    names = [value.name or "" for value in model.graph.inputs]
    return Callee(names, lambda feeds: dict(run(model, feeds)))


def left_padded(rows: Sequence[Sequence[int]], pad: int) -> tuple[np.ndarray, np.ndarray]:
    """Return ids and mask [batch, longest row]."""
    longest = max(len(row) for row in rows)
    ids = np.full((len(rows), longest), pad, dtype=np.int64)
    mask = np.zeros((len(rows), longest), dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, longest - len(row) :] = row
        mask[index, longest - len(row) :] = 1
    return ids, mask


def load_tokenizer(bundle: Bundle) -> Any:
    """Return the tokenizer that travels with a bundle.

    Raises:
        RecipeError: There is none, or the library `tokenizers` is not installed.
    """
    content = bundle.files.get("tokenizer.json")
    if content is None:
        raise RecipeError("check.prompts: the source has no tokenizer.json")
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise RecipeError(
            "check.prompts: the library 'tokenizers' is not installed", hint="pip install graph-surgery[transformers]"
        ) from error
    text = content.read_text(encoding="utf-8") if isinstance(content, Path) else content.decode()
    tokenizer = Tokenizer.from_str(text)
    tokenizer.no_padding()
    return tokenizer
