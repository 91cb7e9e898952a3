"""Reading new tokens with the decoders that there are, in as few calls as they allow."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property

import torch

from surgery.errors import Refused, SurgeryError
from surgery.runtime.generation.cache import OnnxCache
from surgery.runtime.generation.decoder import Decoder, are_close
from surgery.runtime.generation.refusals import lost_in_padding, refuse_padding

Tensors = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class News:
    """What is to be read after a cache.

    Args:
        ids: New tokens [batch, new].
        mask: 1 for tokens, 0 for padding [batch, past + new]; None if all are tokens.
        positions: [batch or 1, new]; None to count from the first token that is not padding.
        encoded: By canonical name what an encoder gave, and its mask.
    """

    ids: torch.Tensor
    mask: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    encoded: Tensors = field(default_factory=dict)

    def __len__(self) -> int:
        return int(self.ids.shape[1])


class Reader:
    """The decoders of a bundle.

    Args:
        first: The one that reads where there is no cache.
        following: The one that reads after a cache; it may be the same.
        device: Where they run.
        has_encoder: They attend to an encoder.

    Raises:
        Refused: The one does not give the cache that the other takes.
    """

    def __init__(self, first: Decoder, following: Decoder, device: torch.device, *, has_encoder: bool) -> None:
        following.refuse_unlike(first)
        self.first, self.following = first, following
        self.has_cache = bool(following.past)
        self._has_encoder = has_encoder
        self._device = device
        self._fed = first.kinds | following.kinds
        self._ones = torch.ones(0, dtype=torch.long, device=device)

    @property
    def roles(self) -> tuple[str, ...]:
        """Their roles."""
        return tuple(dict.fromkeys((self.first.role, self.following.role)))

    def read(self, news: News, cache: OnnxCache, keep: int) -> torch.Tensor:
        """Read new tokens after those of a cache, which then holds them too.

        Args:
            news: What to read.
            cache: What was read before.
            keep: How many positions' logits are wanted, counted from the end; 0 for all.

        Returns:
            logits [batch, at least so many positions, vocabulary].

        Raises:
            SurgeryError: Shapes do not agree, or ONNX Runtime cannot run the model on these.
            Refused: There is padding that the models cannot tell from text, or they do not give that many logits.
        """
        self._refuse_shapes(news, cache)
        return self._read(news, cache, keep or len(news))

    def encoded(self, states: torch.Tensor, mask: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """Return what every step takes of the encoder.

        Args:
            states: What it gave [batch, encoded, hidden].
            mask: 1 for what was encoded, 0 for padding [batch, encoded]; None if there is no padding.

        Raises:
            SurgeryError: The mask is of another shape.
            Refused: There is padding, and the decoders take no such mask.
        """
        if mask is None:
            mask = self._ones_of(*states.shape[:2])
        elif mask.shape != states.shape[:2]:
            raise SurgeryError(
                f"attention_mask is {list(mask.shape)}, and {list(states.shape[:2])} tokens were encoded",
                hint="give the mask that the tokenizer returns, one row for each prompt",
            )
        elif "encoder_attention_mask" not in self._fed:
            refuse_padding(mask, "encoder_attention_mask", self.first.role)
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def _read(self, news: News, cache: OnnxCache, wanted: int) -> torch.Tensor:
        before, new = cache.length, len(news)
        if new == 1:
            return self._run(news, cache, before, 0, 1)
        starts = self._starts(news, cache, wanted)
        if len(starts) > 1:
            ends = [*starts[1:], new]
            logits = [self._run(news, cache, before, *places) for places in zip(starts, ends, strict=True)]
            return torch.cat(logits, dim=1)
        kept = cache.snapshot()
        decoder = self._decoder(cache)
        found = self._run(news, cache, before, 0, new)
        if found.shape[1] >= wanted:
            return found
        if decoder.gives_only_last:
            raise SurgeryError(f"{decoder.role!r} gives {found.shape[1]} of the logits of {wanted} positions")
        decoder.gives_only_last = True
        cache.restore(kept)
        return self._read(news, cache, wanted)

    def _decoder(self, cache: OnnxCache) -> Decoder:
        return self.first if cache.is_empty else self.following

    def _run(self, news: News, cache: OnnxCache, before: int, start: int, end: int) -> torch.Tensor:
        return self._decoder(cache).run(self._feeds(news, before, start, end), cache)

    def _starts(self, news: News, cache: OnnxCache, wanted: int) -> list[int]:
        """Return where calls begin, of several new tokens.

        A decoder that gives the last position's logits only, as `last_logits` makes it, is called anew for each
        position that is wanted; one that takes one token is called for each.
        """
        new = len(news)
        decoder = self._decoder(cache)
        can_read_on = cache.is_empty and decoder.reads_prompts
        if not can_read_on and not decoder.takes_several(self.first, news.encoded):
            return list(range(new))
        if not decoder.gives_only_last or wanted == 1:
            return [0]
        if not self.has_cache:
            raise Refused(
                f"{decoder.role!r} gives the logits of the last position only, and more are wanted",
                hint="leave last_logits out",
            )
        return [0, *range(new - wanted + 1, new)]

    def _feeds(self, news: News, before: int, start: int, end: int) -> dict[str, torch.Tensor]:
        """Return by canonical name what a decoder takes to read some of the new tokens."""
        batch, new = news.ids.shape
        total = before + end
        mask = news.mask[:, :total] if news.mask is not None else self._ones_of(batch, total)
        feeds = {**news.encoded, "attention_mask": mask, "decoder_attention_mask": mask}
        feeds["input_ids"] = news.ids if end - start == new else news.ids[:, start:end]
        if "position_ids" in self._fed:
            feeds["position_ids"] = self._positions(news, mask, before, start, end).expand(batch, -1)
        if "cache_position" in self._fed:
            feeds["cache_position"] = torch.arange(before + start, total, device=news.ids.device)
        return feeds

    def _positions(self, news: News, mask: torch.Tensor, before: int, start: int, end: int) -> torch.Tensor:
        if news.positions is not None:
            return news.positions[:, start:end]
        if news.mask is None:
            return torch.arange(before + start, before + end, device=news.ids.device)[None]
        # As transformers counts them: padding has position 0.
        return (mask.long().cumsum(-1) - 1).masked_fill(mask == 0, 0)[:, before + start :]

    def _ones_of(self, batch: int, length: int) -> torch.Tensor:
        """Return a mask of ones [batch, length], out of memory that is kept."""
        if self._ones.numel() < batch * length:
            self._ones = torch.ones(2 * batch * length, dtype=torch.long, device=self._device)
        return self._ones[: batch * length].view(batch, length)

    def _refuse_shapes(self, news: News, cache: OnnxCache) -> None:
        batch, new = news.ids.shape
        if new == 0:
            raise SurgeryError(
                "there is no token to read after the cache",
                hint="give the whole text so far with its mask, or the new tokens with the mask of the whole text",
            )
        if cache.batch_size not in (-1, batch):
            raise SurgeryError(
                f"the cache holds {cache.batch_size} rows, and {batch} are given",
                hint="cache.batch_repeat_interleave(...)",
            )
        if news.encoded and len(news.encoded["encoder_hidden_states"]) != batch:
            raise SurgeryError(f"{len(news.encoded['encoder_hidden_states'])} rows were encoded, and {batch} are given")
        if news.positions is not None and news.positions.shape[-1] != new:
            raise SurgeryError(f"there are {news.positions.shape[-1]} positions for {new} new tokens")
        if news.mask is None:
            return
        if tuple(news.mask.shape) != (batch, cache.length + new):
            raise SurgeryError(
                f"the mask is {list(news.mask.shape)}, and there are {batch} rows of {cache.length} tokens in the "
                f"cache and {new} new ones",
                hint="give a mask of the whole text so far",
            )
        if cache.is_empty and not bool((news.mask != 0).all()):
            self._refuse_padding()

    def _refuse_padding(self) -> None:
        """Raise unless padding on the left changes no answer.

        It does where the graph counts positions by itself, as Optimum 1.x exports GPT-2, or numbers the tokens of a row
        without gaps, as the GroupQueryAttention of onnxruntime-genai does. That is not to be read off a model, so it is
        tried once, on one row with and without padding.

        Raises:
            Refused: It does, or the models take no mask.
        """
        kind = "decoder_attention_mask" if self._has_encoder else "attention_mask"
        for decoder in (self.first, self.following):
            if kind not in decoder.kinds:
                raise lost_in_padding(decoder.role, f"takes no {kind!r}")
        if not self._has_encoder and not self._can_pad:
            raise lost_in_padding(self.first.role, "answers otherwise when a prompt is padded on the left")

    @cached_property
    def _can_pad(self) -> bool:
        plain, padded = OnnxCache(), OnnxCache()
        ids = torch.arange(5)[None]
        mask = (ids > 0).long()
        for start, end in ((0, 4), (4, 5)) if self.has_cache else ((0, 4),):
            wanted = self._read(News(ids[:, max(start, 1) : end]), plain, 1)[:, -1]
            found = self._read(News(ids[:, start:end], mask[:, :end]), padded, 1)[:, -1]
            if not are_close(found, wanted):
                return False
        return True
