"""Host loops: generation that runs on the host, one call of a model for each token."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnx_ir as ir

from surgery.errors import SurgeryError
from surgery.interfaces import FLAG, PAST, PRESENT, Slot, recognise_names

Arrays = dict[str, np.ndarray]
Step = Callable[[Arrays, np.ndarray], Arrays]

PAIR = ("prefill", "decode")
ALONE = ("decoder", "decode")
"""The models that read prompts and go on: two, else the first of these that there is."""


class Port(NamedTuple):
    """An input: its element type, and the sizes of its axes, None for those that are free."""

    dtype: np.dtype[Any]
    sizes: tuple[int | None, ...]


@dataclass(frozen=True)
class Signature:
    """What a model takes and gives, by its own names."""

    inputs: Mapping[str, Port | None]
    outputs: tuple[str, ...]

    @classmethod
    def of(cls, model: ir.Model) -> Signature:
        """Read it off a model; an input that is no tensor has no port."""
        graph = model.graph
        inputs = [value for value in graph.inputs if value.name not in graph.initializers]
        return cls(
            {value.name or "": _port(value) for value in inputs}, tuple(value.name or "" for value in graph.outputs)
        )


def _port(value: ir.Value) -> Port | None:
    if not isinstance(value.type, ir.TensorType):
        return None
    sizes = [size if isinstance(size, int) else str(size.value or "") for size in value.shape or ()]
    # transformers.exporters 5.23 writes some sizes as names such as `8`.
    return Port(value.type.dtype.numpy(), tuple(int(size) if str(size).isdecimal() else None for size in sizes))


class Callee:
    """A model that a host loop calls by canonical names, whatever its own are.

    Args:
        signature: What it takes and gives.
        call: Runs it on arrays by input name and returns arrays by output name.
    """

    def __init__(self, signature: Signature, call: Callable[[Arrays], Arrays]) -> None:
        recognised = recognise_names(list(signature.inputs), signature.outputs)
        self._canonical = recognised.canonical if recognised is not None else {}
        self._own = {self._canonical.get(name, name): name for name in signature.inputs}
        self._ports = signature.inputs
        self._call = call
        self.cache: tuple[Slot, ...] = recognised.cache if recognised is not None else ()
        self.inputs = frozenset(self._own)

    @property
    def has_flag(self) -> bool:
        """It is two decoders in one, of which a flag chooses."""
        return FLAG in self.inputs

    @property
    def takes_past(self) -> bool:
        """It has a cache among its inputs."""
        return any(slot.input is not None for slot in self.cache)

    @property
    def takes_several_tokens(self) -> bool:
        """The axis of new tokens is free."""
        ids = self._ports.get(self._own.get("input_ids", ""))
        return ids is None or len(ids.sizes) < 2 or ids.sizes[1] is None

    @property
    def needs_crossed(self) -> bool:
        """It takes an encoder's keys and values and cannot compute them itself."""
        return not self.has_flag and any(slot.input is not None and slot.of == "encoder" for slot in self.cache)

    def __call__(self, feeds: Arrays) -> Arrays:
        own = {self._own[name]: array for name, array in feeds.items() if name in self._own}
        typed = {name: _as_declared(self._ports[name], array) for name, array in own.items()}
        return {self._canonical.get(name, name): array for name, array in self._call(typed).items()}

    def empty_cache(self, batch: int, config: Mapping[str, Any]) -> Arrays:
        """Return a cache of no tokens, [batch, heads, 0, size of a head] for each input that takes a piece of it.

        Raises:
            SurgeryError: Neither the model nor `head_dim` of its config says how long a head is.
        """
        empty: Arrays = {}
        for slot in self.cache:
            port = self._ports[slot.input] if slot.input is not None else None
            if port is None or slot.input is None:
                continue
            heads, size = (port.sizes[axis] if len(port.sizes) == 4 else None for axis in (1, 3))
            size = size if size is not None else config.get("head_dim")
            if heads is None or not isinstance(size, int):
                raise SurgeryError(
                    f"the sizes of the cache {slot.input!r} are not declared, so no empty one can be made"
                )
            empty[self._canonical[slot.input]] = np.zeros((batch, heads, 0, size), port.dtype)
        return empty


def _as_declared(port: Port | None, array: np.ndarray) -> np.ndarray:
    """Return integers in the width that a model takes."""
    return array.astype(port.dtype, copy=False) if port is not None and port.dtype.kind in "iu" else array


def decoders_in(roles: Collection[str]) -> tuple[str, str]:
    """Return the role that reads a prompt and the one that goes on after it, which may be the same.

    Raises:
        SurgeryError: There is no decoder.
    """
    if set(PAIR) <= set(roles):
        return PAIR
    alone = next((role for role in ALONE if role in roles), None)
    if alone is None:
        raise SurgeryError(f"nothing can be generated without a decoder; there is {', '.join(sorted(roles))}")
    return alone, alone


def greedy(models: Mapping[str, Callee], feeds: Mapping[str, np.ndarray], config: Mapping[str, Any]) -> Arrays:
    """Continue prompts by the most likely token, as `transformers` does with `do_sample=False`.

    Args:
        models: `prefill` and `decode`; or one decoder, as `decoder` or `decode`, which takes an empty cache for the
            prompt, and `use_cache_branch` bool[1] if it is two in one. For an encoder-decoder `encoder` beside them.
        feeds: `input_ids` and `attention_mask` int64 [batch, prompt], `max_new_tokens` int64 [].
        config: The network's config with the generation config over it: `eos_token_id`, `pad_token_id`,
            `decoder_start_token_id`.

    Returns:
        `sequences` int64 [batch, new tokens]: after its end a row holds the pad id.

    Raises:
        SurgeryError: There is no decoder that can read a prompt, or the config lacks an id that the loop needs.
    """
    if "encoder" in models:
        state, step = _start_encoder_decoder(models, feeds, config)
    else:
        state, step = _start_decoder(models, feeds, config)
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


def start_id(config: Mapping[str, Any]) -> int | None:
    """Return the token that begins the answer of an encoder-decoder, as transformers chooses it."""
    start: int | None = config.get("decoder_start_token_id")
    return start if start is not None else config.get("bos_token_id")


def _end_ids(config: Mapping[str, Any]) -> frozenset[int]:
    ends = config.get("eos_token_id")
    if ends is None:
        return frozenset()
    return frozenset(ends if isinstance(ends, list) else [ends])


def position_ids(mask: np.ndarray) -> np.ndarray:
    """Return positions [batch, length] that count from the first token that is not padding."""
    return np.asarray(np.maximum(np.cumsum(mask, axis=-1) - 1, 0), dtype=np.int64)


class _Decoders:
    """The decoders of a bundle as one that is called for the prompt and then for each token.

    Raises:
        SurgeryError: They cannot read a prompt.
    """

    def __init__(self, models: Mapping[str, Callee], config: Mapping[str, Any]) -> None:
        first, later = decoders_in(models)
        self._first, self._later = models[first], models[later]
        self._config = config
        problem = refusal_of_prompts(first, self._first, has_encoder="encoder" in models)
        if problem:
            raise SurgeryError(problem)

    def read(self, inputs: Arrays) -> Arrays:
        """Run on a prompt; what comes out is the state of the generation."""
        empty = self._first.empty_cache(inputs["input_ids"].shape[0], self._config)
        return self._first({**inputs, **empty, FLAG: np.array([False])})

    def go_on(self, state: Arrays, inputs: Arrays) -> Arrays:
        """Run on a token; an encoder's keys and values stay what the prompt made them, also where none come out."""
        crossed = {name: array for name, array in state.items() if name.startswith(PRESENT) and ".encoder." in name}
        past = past_feeds(self._later.inputs, state)
        return {**self._later({**inputs, **past, FLAG: np.array([True])}), **crossed}


def refusal_of_prompts(role: str, decoder: Callee, *, has_encoder: bool) -> str:
    """Say why a decoder cannot begin a generation, or nothing."""
    if decoder.needs_crossed:
        return f"nothing computes the encoder's keys and values that {role!r} takes: there is no model 'prefill'"
    if decoder.takes_past and not decoder.takes_several_tokens and not has_encoder:
        return f"{role!r} takes one token at a time, so it cannot read a prompt: there is no model 'prefill'"
    return ""


def past_feeds(inputs: frozenset[str], outputs: Arrays) -> Arrays:
    """Return a step's outputs `present.*` as the next step's inputs `past_key_values.*`, where those are inputs."""
    renamed = {name: f"{PAST}_key_values{name.removeprefix(PRESENT)}" for name in outputs if name.startswith(PRESENT)}
    return {past: outputs[name] for name, past in renamed.items() if past in inputs}


def _start_decoder(
    models: Mapping[str, Callee], feeds: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[Arrays, Step]:
    decoders = _Decoders(models, config)
    mask = feeds["attention_mask"].astype(np.int64)

    def step(state: Arrays, token: np.ndarray) -> Arrays:
        longer = np.concatenate([state["attention_mask"], np.ones_like(token)], axis=1)
        inputs = {"input_ids": token, "attention_mask": longer, "position_ids": position_ids(longer)[:, -1:]}
        return {**decoders.go_on(state, inputs), "attention_mask": longer}

    first = {"input_ids": feeds["input_ids"], "attention_mask": mask, "position_ids": position_ids(mask)}
    return {**decoders.read(first), "attention_mask": mask}, step


def _start_encoder_decoder(
    models: Mapping[str, Callee], feeds: Mapping[str, np.ndarray], config: Mapping[str, Any]
) -> tuple[Arrays, Step]:
    start = start_id(config)
    if start is None:
        raise SurgeryError("the generation config has no decoder_start_token_id, so nothing can be generated")
    decoders = _Decoders(models, config)
    mask = feeds["attention_mask"].astype(np.int64)
    encoded = models["encoder"]({"input_ids": feeds["input_ids"], "attention_mask": mask})
    fixed = {"encoder_hidden_states": encoded["last_hidden_state"], "encoder_attention_mask": mask}

    def step(state: Arrays, token: np.ndarray) -> Arrays:
        return decoders.go_on(state, {"input_ids": token, **fixed})

    first = np.full((mask.shape[0], 1), start, dtype=np.int64)
    return decoders.read({"input_ids": first, **fixed}), step
