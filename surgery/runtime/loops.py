"""Host loops: generation that runs on the host, one call of a model for each token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.interfaces import recognise_names

Arrays = dict[str, np.ndarray]


class Callee:
    """A model that a host loop calls by canonical names, whatever its own are.

    Args:
        inputs: The names of its inputs.
        call: Runs it on arrays by input name and returns arrays by output name.
        outputs: The names of its outputs, by which its naming is recognised; left out, its names are taken as they are.
        integers: The types of its integer inputs, where they may be others than int64.
    """

    def __init__(
        self,
        inputs: Sequence[str],
        call: Callable[[Arrays], Arrays],
        outputs: Sequence[str] = (),
        integers: Mapping[str, np.dtype[Any]] | None = None,
    ) -> None:
        recognised = recognise_names(inputs, outputs)
        self._canonical = recognised.canonical if recognised is not None else {}
        self._own = {self._canonical.get(name, name): name for name in inputs}
        self._integers = integers or {}
        self.inputs = frozenset(self._own)
        self.call = call

    def __call__(self, feeds: Arrays) -> Arrays:
        own = {self._own[name]: array for name, array in feeds.items() if name in self._own}
        typed = {name: array.astype(self._integers.get(name, array.dtype), copy=False) for name, array in own.items()}
        return {self._canonical.get(name, name): array for name, array in self.call(typed).items()}


def greedy(models: Mapping[str, Callee], feeds: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Arrays:
    """Continue prompts by the most likely token, as `transformers` does with `do_sample=False`.

    Args:
        models: `prefill` and `decode`, and `encoder` for an encoder-decoder.
        feeds: `input_ids` and `attention_mask` int64 [batch, prompt], `max_new_tokens` int64 [].
        config: The generation config: `eos_token_id`, `pad_token_id`, `decoder_start_token_id`.

    Returns:
        `sequences` int64 [batch, new tokens]: after its end a row holds the pad id.

    Raises:
        SurgeryError: The generation config lacks an id that the loop needs.
    """
    if "encoder" in models:
        state, step = _start_encoder_decoder(models, feeds, config)
    else:
        state, step = _start_decoder(models, feeds)
    ends = _end_ids(config)
    pad = config.get("pad_token_id")
    pad = pad if pad is not None else next(iter(ends), 0)
    batch = feeds["input_ids"].shape[0]
    running = np.ones(batch, dtype=bool)
    tokens: list[np.ndarray] = []
    for _ in range(int(feeds["max_new_tokens"])):
        chosen = state["logits"][:, -1].argmax(axis=-1)  # [batch]
        token = np.where(running, chosen, pad)
        tokens.append(token)
        running &= ~np.isin(token, list(ends))
        if not running.any():
            break
        state = step(state, token[:, None])
    sequences = np.stack(tokens, axis=1) if tokens else np.zeros((batch, 0))
    return {"sequences": sequences.astype(np.int64)}


LOOPS: Mapping[str, Callable[..., Arrays]] = {"greedy": greedy}

Step = Callable[[Arrays, np.ndarray], Arrays]


def _end_ids(config: Mapping[str, Any]) -> frozenset[int]:
    ends = config.get("eos_token_id")
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])


def position_ids(mask: np.ndarray) -> np.ndarray:
    """Return positions [batch, length] that count from the first token that is not padding."""
    return np.asarray(np.maximum(np.cumsum(mask, axis=-1) - 1, 0), dtype=np.int64)


def past_feeds(inputs: frozenset[str], outputs: Arrays) -> Arrays:
    """Return a step's outputs `present.*` as the next step's inputs `past_key_values.*`, where those are inputs."""
    renamed = {name: f"past_key_values{name.removeprefix('present')}" for name in outputs if name.startswith("present")}
    return {past: outputs[name] for name, past in renamed.items() if past in inputs}


def _start_decoder(models: Mapping[str, Callee], feeds: Mapping[str, np.ndarray]) -> tuple[Arrays, Step]:
    mask = feeds["attention_mask"].astype(np.int64)
    first = {"input_ids": feeds["input_ids"], "attention_mask": mask, "position_ids": position_ids(mask)}
    decode = models["decode"]

    def step(state: Arrays, token: np.ndarray) -> Arrays:
        longer = np.concatenate([state["attention_mask"], np.ones_like(token)], axis=1)
        inputs = {
            "input_ids": token,
            "attention_mask": longer,
            "position_ids": position_ids(longer)[:, -1:],
            **past_feeds(decode.inputs, state),
        }
        return {**decode(inputs), "attention_mask": longer}

    return {**models["prefill"](first), "attention_mask": mask}, step


def _start_encoder_decoder(
    models: Mapping[str, Callee], feeds: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[Arrays, Step]:
    start = config.get("decoder_start_token_id", config.get("bos_token_id"))
    if start is None:
        raise SurgeryError("the generation config has no decoder_start_token_id, so nothing can be generated")
    mask = feeds["attention_mask"].astype(np.int64)
    encoded = models["encoder"]({"input_ids": feeds["input_ids"], "attention_mask": mask})
    fixed = {"encoder_hidden_states": encoded["last_hidden_state"], "encoder_attention_mask": mask}
    first = np.full((mask.shape[0], 1), start, dtype=np.int64)
    decode = models["decode"]

    def step(state: Arrays, token: np.ndarray) -> Arrays:
        past = past_feeds(decode.inputs, state)
        outputs = decode({"input_ids": token, **fixed, **past})
        crossed = {name: array for name, array in state.items() if ".encoder." in name}
        return {**crossed, **outputs}

    return models["prefill"]({"input_ids": first, **fixed}), step
