"""A bundle of ONNX models as transformers' `generate` wants a model."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import onnx_ir as ir
import torch
from transformers import AutoTokenizer, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast, Seq2SeqLMOutput

from surgery.accuracy.half import holds_half
from surgery.bundle import Bundle
from surgery.errors import Refused, SurgeryError
from surgery.runtime.bound import one_torch_thread
from surgery.runtime.generation.bundles import config_of, generation_config_of, models_of
from surgery.runtime.generation.cache import OnnxCache
from surgery.runtime.generation.choosing import MANY, QuickArgmax
from surgery.runtime.generation.decoder import Decoder
from surgery.runtime.generation.encoder import Encoder
from surgery.runtime.generation.reading import News, Reader
from surgery.runtime.generation.refusals import (
    REFUSED,
    is_given,
    refuse_ids,
    refuse_options,
    refused_cache,
)
from surgery.runtime.sessions import CPU, Provider, open_fast_session

if TYPE_CHECKING:
    import onnxruntime

CUDA = "CUDAExecutionProvider"

PASSED_ON = frozenset(("return_dict", "tokenizer", "assistant_tokenizer"))
"""Arguments that transformers hands to every model with the others, which change nothing in one."""


class Generator(GenerationMixin):  # type: ignore[misc]
    """A bundle of ONNX models as transformers' `generate` wants a model.

    Decoders are taken as there are: `decoder` (two behind a flag, or one that takes an empty cache), else `prefill` and
    `decode`, else `decode` or `prefill` alone; a `prefill` alone generates without a cache. For an encoder-decoder
    there is an `encoder` beside them. Inputs and outputs may have the names of any preset of `surgery.interfaces`.

    On the CPU no tensor is copied on the way into the models and out of them, but for a type that they want otherwise
    (int32 ids). The cache of one step is fed to the next as it came.

    Args:
        bundle: The models, their `config.json` and generation config.
        threads: Threads within an operator; 0 for as many as there are cores.
        providers: Where to run, by preference; None for the CPU.
        prepacking: Let ONNX Runtime keep rearranged copies of weights; None for what the runtime finds best.

    Raises:
        Refused: The bundle has no models that can generate, lacks its config, or a model has an input that generation
            has nothing to feed to.
        ModelFileError: ONNX Runtime does not take a model.
    """

    main_input_name = "input_ids"
    base_model_prefix = ""
    hf_quantizer = None
    _is_stateful = False
    _supports_cache_class = True

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int = 0,
        providers: Sequence[Provider] | None = None,
        prepacking: bool | None = None,
    ) -> None:
        self._kept = contextlib.ExitStack()
        self._files = bundle.files
        models = models_of(bundle)
        self.config = config_of(bundle, has_encoder="encoder" in models)
        self.generation_config = generation_config_of(bundle)
        sessions = {role: _open(model, threads, providers, prepacking) for role, model in models.items()}
        self.device = _device(next(reversed(sessions.values())))
        self.is_widened = self.device.type == "cpu" and any(map(holds_half, models.values()))
        """Half precision is computed in float32, as ONNX Runtime does on the CPU; a GPU may answer otherwise."""
        encoder = sessions.pop("encoder", None)
        self._encoder = Encoder(encoder, self.device) if encoder is not None else None
        if self._encoder is not None:
            self.main_input_name = self._encoder.main_input_name
        sizes = self.config.get_text_config(decoder=True).to_dict()
        decoders = [
            Decoder(session, role, sizes, self.device, has_encoder=encoder is not None)
            for role, session in sessions.items()
        ]
        self._reader = Reader(decoders[0], decoders[-1], self.device, has_encoder=encoder is not None)
        if not self._reader.has_cache:
            self.generation_config.use_cache = False
        self.dtype = decoders[0].dtype

    def __enter__(self) -> Generator:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def keep(self, scratch: contextlib.AbstractContextManager[Any]) -> None:
        """Leave something when this is closed."""
        self._kept.enter_context(scratch)

    def close(self) -> None:
        """Let go of the sessions and remove what was made for them on disk."""
        self._reader = self._encoder = None  # type: ignore[assignment]
        self._kept.close()

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles of the models that are in use."""
        return (*(("encoder",) if self._encoder is not None else ()), *self._reader.roles)

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that travels with the bundle; it pads on the left for a decoder on its own.

        Raises:
            SurgeryError: There is none, or transformers cannot load it.
        """
        if not any(name.startswith("tokenizer") or name.endswith(".model") for name in self._files):
            raise SurgeryError(
                "the bundle has no tokenizer", hint="put tokenizer.json and tokenizer_config.json beside the models"
            )
        with tempfile.TemporaryDirectory() as folder:
            for name, content in self._files.items():
                path = Path(folder, name)
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(content.read_bytes() if isinstance(content, Path) else content)
            try:
                tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
            except Exception as error:  # each kind of tokenizer fails in its own way
                raise SurgeryError(
                    f"transformers cannot load the tokenizer: {str(error).partition(chr(10))[0]}",
                    hint="save it again with save_pretrained()",
                ) from error
        if not self.config.is_encoder_decoder:
            tokenizer.padding_side = "left"
        if tokenizer.pad_token is None:
            tokenizer.pad_token = tokenizer.eos_token
        return tokenizer

    # What transformers asks of a model

    @classmethod
    def can_generate(cls) -> bool:
        """It can."""
        return True

    @classmethod
    def is_remote_code(cls) -> bool:
        """It is none."""
        return False

    def get_experts_implementation(self) -> dict[str, str]:
        """It has no experts to choose for."""
        return {}

    def get_encoder(self, modality: str | None = None) -> Any:
        """Return the encoder as `generate` calls it."""
        return self._encoder

    @torch.no_grad()  # type: ignore[untyped-decorator]
    def generate(self, inputs: torch.Tensor | None = None, generation_config: Any = None, **kwargs: Any) -> Any:
        """Generate as transformers' `GenerationMixin.generate` does, with all its arguments but a few.

        Args:
            inputs: Token ids [batch, length]; audio features [batch, bins, frames] for an encoder that takes them.
            generation_config: Options; what is given here by name goes before.
            kwargs: Options of `GenerationConfig`, masks, processors, criteria, a streamer, an assistant.

        Returns:
            Token ids [batch, length], or a `ModelOutput` if `return_dict_in_generate`.

        Raises:
            Refused: An argument asks for something that the models do not give.
            SurgeryError: Ids are no integers, outside the vocabulary, or none; this is closed; or ONNX Runtime fails.
            ValueError: transformers does not take the arguments.
        """
        self._refuse_if_closed("generate")
        refuse_options(generation_config, kwargs, has_encoder=self._encoder is not None)
        given = inputs if inputs is not None else kwargs.get("input_ids")
        if self._encoder is None or self.main_input_name == "input_ids":
            refuse_ids(given, self.config)
        with contextlib.ExitStack() as stack:
            if self.device.type == "cpu":
                stack.enter_context(one_torch_thread())
                if self._scores_of(given) >= MANY:
                    stack.enter_context(QuickArgmax())
            return super().generate(inputs, generation_config, **kwargs)

    def _scores_of(self, inputs: torch.Tensor | None) -> int:
        """Return how many scores there are at a step."""
        rows = len(inputs) if inputs is not None else 1
        return rows * int(getattr(self.config.get_text_config(decoder=True), "vocab_size", 0) or 0)

    def __call__(self, *inputs: Any, **kwargs: Any) -> Any:
        """Run one step, as `forward` does."""
        return self.forward(*inputs, **kwargs)

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: OnnxCache | None = None,
        decoder_input_ids: torch.Tensor | None = None,
        decoder_attention_mask: torch.Tensor | None = None,
        encoder_outputs: Any = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        input_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> Any:
        """Read new tokens after those of a cache, which grows in place.

        Args:
            input_ids: New tokens [batch, new]; of an encoder-decoder, those of the encoder.
            attention_mask: 1 for tokens, 0 for padding: [batch, past + new], of an encoder-decoder [batch, encoded].
            position_ids: [batch, new]; left out, they count from the first token that is not padding.
            past_key_values: What was read before.
            decoder_input_ids: New tokens of an encoder-decoder [batch, new].
            decoder_attention_mask: As `attention_mask`, for them.
            encoder_outputs: What the encoder gave; left out, it is run on `input_ids` or `input_features`.
            use_cache: Return the cache; False for none.
            logits_to_keep: How many positions at the end are wanted, 0 for all.
            input_features: Of speech [batch, bins, frames], for an encoder that takes them.
            kwargs: What transformers hands to any model.

        Returns:
            `logits` [batch, new or so many positions, vocabulary] and `past_key_values`; `return_dict=False` makes it a
            tuple.

        Raises:
            SurgeryError: Shapes do not agree, or ONNX Runtime cannot run the model on these.
        """
        self._refuse_if_closed("forward")
        unknown = [name for name, value in kwargs.items() if name not in PASSED_ON and is_given(value)]
        if unknown:
            raise Refused(f"forward: {unknown[0]}: {REFUSED.get(unknown[0], 'nothing in the models takes it')}")
        if past_key_values is not None and not isinstance(past_key_values, OnnxCache):
            raise refused_cache(past_key_values)
        cache = past_key_values if past_key_values is not None else OnnxCache()
        if self._encoder is None:
            news = News(_there(input_ids), attention_mask, position_ids)
        else:
            if encoder_outputs is None:
                encoder_outputs = self._encoder(input_ids, attention_mask, input_features)
            # Encoders of speech mask nothing.
            mask = attention_mask if self.main_input_name == "input_ids" else None
            encoded = self._reader.encoded(encoder_outputs[0], mask)
            news = News(_there(decoder_input_ids), decoder_attention_mask, position_ids, encoded)
        try:
            logits = self._reader.read(news, cache, logits_to_keep)
        except SurgeryError as error:
            raise self._explained(error, cache.length + len(news)) from error
        if 0 < logits_to_keep < logits.shape[1]:
            logits = logits[:, -logits_to_keep:]
        kept = cache if use_cache is not False and self._reader.has_cache else None
        if self._encoder is None:
            output = CausalLMOutputWithPast(logits=logits, past_key_values=kept)
        else:
            states = news.encoded["encoder_hidden_states"]
            output = Seq2SeqLMOutput(logits=logits, past_key_values=kept, encoder_last_hidden_state=states)
        return output if kwargs.get("return_dict") is not False else output.to_tuple()

    def _refuse_if_closed(self, call: str) -> None:
        if self._reader is None:
            raise SurgeryError(f"{call}: this generator is closed", hint="open it anew")

    def _explained(self, error: SurgeryError, length: int) -> SurgeryError:
        """Return what an error of the runtime means, where that is known."""
        most = getattr(self.config.get_text_config(decoder=True), "max_position_embeddings", None)
        if error.__cause__ is None or not isinstance(most, int) or length <= most:
            return error
        return SurgeryError(
            f"{length} tokens do not fit into the {most} positions of the network",
            hint="a shorter prompt, or fewer new tokens",
        )

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.Tensor,
        next_sequence_length: int | None = None,
        past_key_values: OnnxCache | None = None,
        attention_mask: torch.Tensor | None = None,
        is_first_iteration: bool | None = False,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return what `forward` takes: of ids and positions the new ones, everything else as it is."""
        ids = input_ids if next_sequence_length is None else input_ids[:, -next_sequence_length:]
        positions = kwargs.pop("position_ids", None)
        if positions is not None:
            kwargs["position_ids"] = positions[:, -ids.shape[1] :]
        key = "decoder_input_ids" if self._encoder is not None else "input_ids"
        return {**kwargs, key: ids, "past_key_values": past_key_values, "attention_mask": attention_mask}

    def _update_model_kwargs_for_generation(
        self,
        outputs: Any,
        model_kwargs: dict[str, Any],
        is_encoder_decoder: bool = False,
        num_new_tokens: int = 1,
    ) -> dict[str, Any]:
        """Where there is a cache, keep the last position and no mask of ones; transformers copies all each time."""
        positions = model_kwargs.get("position_ids")
        has_cache = model_kwargs.get("use_cache")
        if positions is not None and has_cache:
            model_kwargs["position_ids"] = None
        if has_cache and self._encoder is None:
            mask = model_kwargs.get("attention_mask")
            if mask is not None and bool(mask.all()):
                del model_kwargs["attention_mask"]
        updated: dict[str, Any] = super()._update_model_kwargs_for_generation(
            outputs, model_kwargs, is_encoder_decoder, num_new_tokens
        )
        if positions is not None and updated["position_ids"] is None:
            updated["position_ids"] = positions[:, -1:] + num_new_tokens
        return updated

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> None:
        given = model_kwargs.get("past_key_values")
        if given is not None and not isinstance(given, OnnxCache):
            raise refused_cache(given)
        if generation_config.use_cache is False:
            if given is not None:
                raise Refused("generate: a cache is given, and use_cache=False", hint="leave one of them out")
            return
        if not self._reader.has_cache:
            raise Refused(
                f"generate: {self._reader.first.role!r} alone takes no cache",
                hint="use_cache=False reads everything again for each token; or put 'decode' into the bundle",
            )
        cache = given if given is not None else OnnxCache()
        cache._is_user_defined = given is not None
        cache.beams = generation_config.num_beams or 1
        model_kwargs["past_key_values"] = cache


def _open(
    model: ir.Model, threads: int, providers: Sequence[Provider] | None, prepacking: bool | None
) -> onnxruntime.InferenceSession:
    open_session = open_fast_session if prepacking is None else partial(open_fast_session, prepacking=prepacking)
    return open_session(model, threads=threads, providers=providers if providers is not None else (CPU,))


def _there(ids: torch.Tensor | None) -> torch.Tensor:
    if ids is None:
        raise SurgeryError("forward: there are no tokens to read", hint="give input_ids or decoder_input_ids")
    return ids


def _device(session: onnxruntime.InferenceSession) -> torch.device:
    """Return where a session runs, and its values lie."""
    if session.get_providers()[0] != CUDA:
        return torch.device("cpu")
    return torch.device("cuda", int(session.get_provider_options()[CUDA].get("device_id", 0)))
