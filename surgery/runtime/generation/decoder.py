"""One decoder as generation calls it: by canonical names, in the types that its session declares."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from surgery.errors import Refused, SurgeryError
from surgery.interfaces import FLAG, recognise_names
from surgery.runtime.bound import BoundSession, as_torch, as_value
from surgery.runtime.generation.cache import Key, OnnxCache
from surgery.runtime.generation.types import TYPES

if TYPE_CHECKING:
    import onnxruntime
    from onnxruntime.capi._pybind_state import OrtValue

Tensors = Mapping[str, torch.Tensor]

ALONE: Mapping[str, int] = {"input_ids": 2, "attention_mask": 2, "position_ids": 2, "cache_position": 1, FLAG: 1}
"""What is fed to a decoder on its own beside the cache, and how many axes it has."""

CROSS: Mapping[str, int] = {
    "input_ids": 2,
    "decoder_attention_mask": 2,
    "position_ids": 2,
    "cache_position": 1,
    "encoder_attention_mask": 2,
    "encoder_hidden_states": 3,
    FLAG: 1,
}
"""What is fed to a decoder that attends to an encoder."""

PROBED = 2
"""How many tokens are tried at once, to learn whether a decoder with a cache can."""


class Decoder:
    """A session of a decoder, whatever its inputs and outputs are called.

    Args:
        session: The session.
        role: The role of its model, for what is said about it.
        config: The sizes of the network by the words of `config.json`, where the model leaves some open.
        device: Where its values lie.
        has_encoder: There is an encoder that it may attend to.

    Raises:
        Refused: Generation has nothing to feed to one of its inputs, or it gives no logits.
    """

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        role: str,
        config: Mapping[str, Any],
        device: torch.device,
        *,
        has_encoder: bool,
    ) -> None:
        self.role = role
        bound = BoundSession(session, device.type, device.index or 0)
        self._session = bound
        self._given = {value.name: str(value.type) for value in session.get_outputs()}
        self._config = config
        self._device = device
        recognised = recognise_names(list(bound.inputs), bound.outputs)
        canonical = recognised.canonical if recognised is not None else {}
        slots = recognised.cache if recognised is not None else ()
        keys: dict[str, Key] = {}
        for slot in slots:
            key: Key = (slot.layer, slot.of, slot.part)
            keys |= {name: key for name in (slot.input, slot.output) if name is not None}
        self.past = {keys[name]: name for name in bound.inputs if name in keys}
        self.present = {keys[name]: name for name in bound.outputs if name in keys}
        own = {canonical.get(name, name): name for name in bound.inputs if name not in keys}
        self._refuse_strange(own, CROSS if has_encoder else ALONE)
        self._own = {kind: (name, TYPES[bound.inputs[name].type]) for kind, name in own.items()}
        logits = [name for name in bound.outputs if canonical.get(name, name) == "logits"]
        if not logits:
            raise Refused(f"{role!r} has no output 'logits'", hint="give it that name with rename_io")
        self._logits = logits[0]
        self._flags = {is_set: as_value(torch.tensor([is_set], device=device)) for is_set in (False, True)}
        self.gives_only_last = False
        self._takes_several: bool | None = None if self._has_free_length() else False

    @property
    def has_flag(self) -> bool:
        """It is two decoders, of which a flag chooses one."""
        return FLAG in self._own

    @property
    def reads_prompts(self) -> bool:
        """It is made to read several tokens at once where there is no cache."""
        return self.has_flag or not self.past

    @property
    def kinds(self) -> frozenset[str]:
        """What its inputs stand for, beside the cache."""
        return frozenset(self._own)

    @property
    def dtype(self) -> torch.dtype:
        """The type of its logits."""
        return TYPES[self._given[self._logits]]

    def refuse_unlike(self, first: Decoder) -> None:
        """Raise unless another decoder, that reads prompts, gives the cache that this one takes.

        Raises:
            Refused: A piece is missing, or of another type.
        """
        for key, name in self.past.items():
            given = self._given_by(first, key)
            taken = str(self._session.inputs[name].type)
            if given is None:
                raise Refused(
                    f"{self.role!r} takes {name!r}, and {first.role!r} gives nothing like it",
                    hint="export both from one network, with the same tool",
                )
            if given != taken:
                raise Refused(
                    f"{self.role!r} takes {name!r} as {taken}, and {first.role!r} gives it as {given}",
                    hint="cast both models alike",
                )

    @staticmethod
    def _given_by(first: Decoder, key: Key) -> str | None:
        name = first.present.get(key)
        return first._given[name] if name is not None else None

    def run(self, feeds: Tensors, cache: OnnxCache) -> torch.Tensor:
        """Read new tokens after those of a cache, which then holds them too.

        Args:
            feeds: By canonical name `input_ids` [batch, new] and what else the network takes; what it does not take
                is left out.
            cache: What was read before; it grows only if all goes well.

        Returns:
            logits [batch, new, vocabulary], or [batch, 1, vocabulary] of a decoder that gives no others.

        Raises:
            SurgeryError: ONNX Runtime cannot run the model on these.
        """
        is_first = cache.is_empty
        values: dict[str, OrtValue] = {}
        for kind, (name, dtype) in self._own.items():
            if kind != FLAG:
                values[name] = as_value(feeds[kind].to(device=self._device, dtype=dtype))
            else:
                values[name] = self._flags[not is_first]
        if self.past:
            pieces = cache.pieces if not is_first else self._empty(feeds["input_ids"].shape[0])
            for key, name in self.past.items():
                values[name] = pieces[key]
        outputs = self._session.run(values)
        # After the first step the encoder's keys and values stay: a merged decoder gives empty ones, others the same.
        given = {key: outputs[name] for key, name in self.present.items() if is_first or key[1] != "encoder"}
        cache.take(given, feeds["input_ids"].shape[1])
        return as_torch(outputs[self._logits])

    def takes_several(self, first: Decoder, encoded: Tensors) -> bool:
        """Tell whether it may be given several tokens at once, after a cache or after an empty one.

        Whether it can is not to be read off a model: one exported for a single new token may have a free axis
        and no mask between new tokens. So once it is tried on two tokens of one row, against one after the other.

        Args:
            first: The decoder that reads prompts.
            encoded: What an encoder gave, and its mask, by canonical name; the first row is used.
        """
        if self._takes_several is None:
            self._takes_several = self._can_take_several(first, encoded)
        return self._takes_several

    def _can_take_several(self, first: Decoder, encoded: Tensors) -> bool:
        before = PROBED if first.reads_prompts else 0
        fixed = {kind: tensor[:1] for kind, tensor in encoded.items()}

        def read(decoder: Decoder, start: int, count: int, cache: OnnxCache) -> torch.Tensor:
            places = torch.arange(start, start + count)[None]
            new = {
                "input_ids": places + 1,
                "position_ids": places,
                "cache_position": places[0],
                "attention_mask": torch.ones(1, start + count, dtype=torch.long),
                "decoder_attention_mask": torch.ones(1, start + count, dtype=torch.long),
            }
            return decoder.run({**fixed, **new}, cache)

        at_once, one_by_one = OnnxCache(), OnnxCache()
        for cache in (at_once, one_by_one):
            if before:
                read(first, 0, before, cache)
        wanted = [read(self, before + index, 1, one_by_one) for index in range(PROBED)]
        try:
            found = read(self, before, PROBED, at_once)
        except SurgeryError:
            return False
        return are_close(found, torch.cat(wanted, dim=1)[:, -found.shape[1] :]) and all(
            are_close(as_torch(value), as_torch(one_by_one.pieces[key])) for key, value in at_once.pieces.items()
        )

    def _has_free_length(self) -> bool:
        name, _ = self._own["input_ids"]
        return _size(self._session.inputs[name].shape[1]) is None

    def _refuse_strange(self, own: Mapping[str, str], fed: Mapping[str, int]) -> None:
        if "input_ids" not in own:
            raise Refused(
                f"{self.role!r} takes no 'input_ids', but {', '.join(own.values()) or 'nothing'}",
                hint="give its inputs the names of Optimum with rename_io",
            )
        for kind, name in own.items():
            declared = self._session.inputs[name]
            if kind not in fed:
                raise Refused(
                    f"generation has nothing to feed to the input {name!r} of {self.role!r}",
                    hint="put its 'encoder' into the bundle"
                    if kind in CROSS
                    else "export the model without it, or rename_io if it is a known input of another name",
                )
            if len(declared.shape) != fed[kind] or declared.type not in TYPES:
                raise Refused(
                    f"the input {name!r} of {self.role!r} is {declared.type} with {len(declared.shape)} axes; "
                    f"generation feeds one with {fed[kind]}",
                    hint="export the model with masks and positions [batch, length]",
                )
        for name in self.past.values():
            declared = self._session.inputs[name]
            if len(declared.shape) != 4 or declared.type not in TYPES:
                raise Refused(
                    f"the cache {name!r} of {self.role!r} is {declared.type} with {len(declared.shape)} axes, "
                    "not [batch, heads, tokens, size of a head]"
                )

    def _empty(self, batch: int) -> dict[Key, OrtValue]:
        """Return a cache of no tokens."""
        return {
            key: as_value(
                torch.zeros(self._empty_shape(name, batch), dtype=self._cache_type(name), device=self._device)
            )
            for key, name in self.past.items()
        }

    def _cache_type(self, name: str) -> torch.dtype:
        return TYPES[self._session.inputs[name].type]

    def _empty_shape(self, name: str, batch: int) -> list[int]:
        sizes = [_size(size) for size in self._session.inputs[name].shape]
        heads = self._config.get("num_key_value_heads") or self._config.get("num_attention_heads")
        size = self._config.get("head_dim")
        if size is None and self._config.get("hidden_size") and self._config.get("num_attention_heads"):
            size = self._config["hidden_size"] // self._config["num_attention_heads"]
        shape = [batch, sizes[1] or heads, 0, sizes[3] or size]
        unknown = [what for what, found in (("heads", shape[1]), ("the size of a head", shape[3])) if not found]
        if unknown:
            raise SurgeryError(
                f"{self.role!r} declares no number for {' and '.join(unknown)} of {name!r}, "
                "so no empty cache can be made",
                hint="config.json has to say num_attention_heads, and head_dim or hidden_size",
            )
        return [int(each) for each in shape if each is not None]


def are_close(found: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Tell rounding, float16's and quantization's included, from another result: no error above 5 % of the spread.

    Optimum's GPT-2 with two tokens at once is 25 % off, and with padding 49 %; where all is well, float32 is 4e-7 off.
    """
    if found.shape != wanted.shape:
        return False
    error = (found.float() - wanted.float()).abs().max()
    return bool(error <= 0.05 * wanted.float().std())


def _size(declared: Any) -> int | None:
    """Return a declared size, None if it is free."""
    if isinstance(declared, int):
        return declared
    # transformers.exporters 5.23 writes some sizes as names such as `8`.
    return int(declared) if isinstance(declared, str) and declared.isdecimal() else None
