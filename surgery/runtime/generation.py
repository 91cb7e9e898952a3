"""Generation over ONNX models with transformers' own `generate`: all that `GenerationConfig` offers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers import AutoConfig, Cache, GenerationConfig, GenerationMixin
from transformers.modeling_outputs import BaseModelOutput, CausalLMOutputWithPast, Seq2SeqLMOutput

from surgery.bundle import Bundle
from surgery.errors import Refused
from surgery.runtime.bound import BoundSession, as_torch, as_value
from surgery.runtime.loops import position_ids
from surgery.runtime.sessions import open_session

PAST, PRESENT, FLAG = "past_key_values", "present", "use_cache_branch"
CROSS = ".encoder."


class OnnxCache(Cache):
    """Keys and values by the names of the inputs that take them, as ONNX Runtime gave them.

    They are looked at as tensors only when rows are chosen or tokens dropped.
    """

    def __init__(self) -> None:
        self.values: dict[str, Any] = {}
        self.length = 0
        self.layers: list[Any] = []

    @property
    def is_compileable(self) -> bool:
        """It grows at every step."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """It keeps every token."""
        return [False]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens it holds."""
        return self.length

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """It has no limit."""
        return -1

    def __len__(self) -> int:
        return len(self.values)

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the chosen rows, in their order."""
        self._each(lambda name, tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the chosen rows."""
        self._each(lambda name, tensor: tensor[indices, ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._each(lambda name, tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, max_length: int) -> None:
        """Keep the first tokens; of a negative number, all but so many."""
        length = self.length + max_length if max_length < 0 else min(max_length, self.length)
        self._each(lambda name, tensor: tensor if CROSS in name else tensor[:, :, :length])
        self.length = length

    def _each(self, change: Any) -> None:
        self.values = {name: as_value(change(name, as_torch(value))) for name, value in self.values.items()}


class Generator(GenerationMixin):
    """A bundle of ONNX models as transformers' `generate` wants a model.

    It takes `prefill` and `decode`, or `decoder` (the two merged, or one that takes several tokens after an empty cache),
    and for an encoder-decoder `encoder` beside them, with Optimum's names.

    Args:
        bundle: The models, their `config.json` and generation config.
        threads: Threads within an operator; 0 for as many as there are cores.
        providers: Where to run, by preference.
        prepacking: Let ONNX Runtime keep rearranged copies of weights.

    Raises:
        Refused: The bundle has no models that can generate.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    _is_stateful = False
    _supports_cache_class = True
    hf_quantizer = None

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        providers: Sequence[str] = ("CPUExecutionProvider",),
        prepacking: bool = True,
    ) -> None:
        roles = set(bundle.models)
        if not ({"prefill", "decode"} <= roles or "decoder" in roles):
            raise Refused(
                f"cannot generate with {', '.join(sorted(roles))}; 'prefill' and 'decode', or 'decoder' are needed"
            )
        self.config = AutoConfig.for_model(**bundle.config)
        self.generation_config = GenerationConfig.from_dict(dict(bundle.generation_config))
        self.device = torch.device("cuda" if "CUDAExecutionProvider" in providers else "cpu")
        self.dtype = torch.float32
        wanted = ("encoder", "decoder") if "decoder" in roles else ("encoder", "prefill", "decode")
        self.sessions = {
            role: BoundSession(
                open_session(bundle[role], optimize=True, prepacking=prepacking, threads=threads, providers=providers),
                self.device.type,
            )
            for role in wanted
            if role in roles
        }

    @classmethod
    def can_generate(cls) -> bool:
        """It can."""
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        """It is none."""
        return False

    def get_experts_implementation(self) -> Any:
        """It has no experts to choose for."""
        return None

    def get_encoder(self, modality: str | None = None) -> Any:
        """Return the encoder as `generate` calls it."""
        return self._encode

    def __call__(self, **inputs: Any) -> Any:
        """Run one step."""
        return self.forward(**inputs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: OnnxCache | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        use_cache: bool | None = None,
        return_dict: bool | None = None,
        **ignored: Any,
    ) -> Any:
        """Run the decoder on new tokens after a cache, which grows in place."""
        cache = past_key_values if past_key_values is not None else OnnxCache()
        ids = decoder_input_ids if decoder_input_ids is not None else input_ids
        assert ids is not None
        batch, length = ids.shape
        feeds = {"input_ids": ids}
        if encoder_outputs is not None:
            feeds["encoder_hidden_states"] = encoder_outputs[0]
            mask = attention_mask
            feeds["encoder_attention_mask"] = (
                mask if mask is not None else torch.ones(encoder_outputs[0].shape[:2], dtype=torch.long)
            )
        else:
            total = cache.length + length
            mask = attention_mask if attention_mask is not None else torch.ones(batch, total, dtype=torch.long)
            feeds["attention_mask"] = mask
            if position_ids is None:
                position_ids = (mask.long().cumsum(-1) - 1).clamp(min=0)[:, -length:]
            feeds["position_ids"] = position_ids.expand(batch, -1)
        outputs = self._run_decoder(feeds, cache)
        logits = as_torch(outputs["logits"])
        if encoder_outputs is not None:
            return Seq2SeqLMOutput(logits=logits, past_key_values=cache, encoder_last_hidden_state=encoder_outputs[0])
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _run_decoder(self, feeds: Mapping[str, torch.Tensor], cache: OnnxCache) -> dict[str, Any]:
        is_first = not cache.values
        role = "decoder" if "decoder" in self.sessions else "prefill" if is_first else "decode"
        session = self.sessions[role]
        values = {name: as_value(tensor) for name, tensor in feeds.items() if name in session.inputs}
        if FLAG in session.inputs:
            values[FLAG] = as_value(torch.tensor([not is_first]))
        for name, value in session.inputs.items():
            if name.startswith(PAST):
                values[name] = cache.values[name] if not is_first else self._empty(value, feeds)
        outputs = session.run(values)
        for name, given in outputs.items():
            if name.startswith(PRESENT) and (is_first or CROSS not in name):
                cache.values[PAST + name.removeprefix(PRESENT)] = given
        cache.length += feeds["input_ids"].shape[1]
        return outputs

    def _empty(self, declared: Any, feeds: Mapping[str, torch.Tensor]) -> Any:
        """Return a cache of no tokens."""
        batch = feeds["input_ids"].shape[0]
        shape = [size if isinstance(size, int) else 0 for size in declared.shape]
        shape[0] = batch
        return as_value(torch.zeros(shape, dtype=DTYPES[declared.type], device=self.device))

    @property
    def _encode(self) -> Any:
        return _Encoder(self.sessions["encoder"])

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> None:
        if model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = OnnxCache()

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return True


DTYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
}


class _Encoder:
    """The encoder as `generate` calls it."""

    main_input_name = "input_ids"

    def __init__(self, session: BoundSession) -> None:
        self._session = session

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None, **ignored: Any) -> Any:
        mask = attention_mask if attention_mask is not None else torch.ones_like(input_ids)
        feeds = {"input_ids": input_ids, "attention_mask": mask}
        outputs = self._session.run({name: as_value(feeds[name]) for name in self._session.inputs})
        return BaseModelOutput(last_hidden_state=as_torch(next(iter(outputs.values()))))

    __call__ = forward


__all__ = ["Generator", "OnnxCache", "inspect", "position_ids"]
