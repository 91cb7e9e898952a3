"""The cache between two steps: keys and values as ONNX Runtime gave them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from transformers import Cache

from surgery.errors import Refused
from surgery.interfaces import Of, Part
from surgery.runtime.bound import as_torch, as_value

if TYPE_CHECKING:
    from onnxruntime.capi._pybind_state import OrtValue

Key = tuple[int, Of, Part]
"""A piece of the cache: its layer, whose attention it serves, keys or values."""

TOKENS = 2
"""The axis of tokens in a piece [batch, heads, tokens, size of a head]."""


class OnnxCache(Cache):  # type: ignore[misc]
    """Keys and values that go from the outputs of one step to the inputs of the next untouched.

    They are looked at as tensors only when rows are chosen or tokens dropped, and never written to, so that a copy of
    the cache shares them.

    Attributes:
        pieces: The values, each [batch, heads, tokens, size of a head].
        length: How many tokens they hold.
        beams: How many rows in turn attend to one row of the encoder's.
    """

    def __init__(self) -> None:
        # Not Cache's own: that makes a layer object for each layer, and here there is nothing for one to do.
        self.pieces: dict[Key, OrtValue] = {}
        self.length = 0
        self.beams = 1
        self.layers: list[Any] = []

    def __len__(self) -> int:
        return len({layer for layer, _, _ in self.pieces})

    def __repr__(self) -> str:
        return f"OnnxCache({len(self)} layers, {self.length} tokens)"

    def __deepcopy__(self, memo: dict[int, Any]) -> OnnxCache:
        copied = OnnxCache()
        copied.pieces, copied.length, copied.beams = dict(self.pieces), self.length, self.beams
        return copied

    def __copy__(self) -> OnnxCache:
        return self.__deepcopy__({})

    @property
    def is_empty(self) -> bool:
        """It holds no token."""
        return not self.pieces

    @property
    def batch_size(self) -> int:
        """How many rows it holds, -1 while it is empty."""
        return next((int(value.shape()[0]) for value in self.pieces.values()), -1)

    @property
    def is_initialized(self) -> bool:
        """It holds tokens."""
        return not self.is_empty

    @property
    def is_compileable(self) -> bool:
        """It grows at every step."""
        return False

    @property
    def is_sliding(self) -> list[bool]:
        """It keeps every token; the masks inside the models know of windows."""
        return [False]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens it holds."""
        return self.length

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """It has no limit."""
        return -1

    def take(self, pieces: Mapping[Key, OrtValue], new_tokens: int) -> None:
        """Replace pieces by those that hold some tokens more."""
        self.pieces.update(pieces)
        self.length += new_tokens

    def snapshot(self) -> tuple[dict[Key, OrtValue], int]:
        """Return what `restore` takes."""
        return dict(self.pieces), self.length

    def restore(self, kept: tuple[dict[Key, OrtValue], int]) -> None:
        """Forget what was read since a snapshot."""
        self.pieces, self.length = kept

    def reset(self) -> None:
        """Forget everything."""
        self.pieces, self.length = {}, 0

    def reorder_cache(self, beam_idx: torch.LongTensor) -> None:
        """Keep the chosen rows, in their order; rows of the encoder's that change places with their like stay."""
        stay = False
        if beam_idx.device.type == "cpu":
            places = torch.arange(len(beam_idx))
            if torch.equal(beam_idx, places):
                return
            stay = torch.equal(beam_idx // self.beams, places // self.beams)
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)), but_encoder=stay)

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the chosen rows."""
        self._change(lambda tensor: tensor[indices, ...])

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat each row."""
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the last tokens.

        Args:
            tokens_to_remove: Their number, negative as transformers gives it.

        Raises:
            Refused: It is positive, or the models keep fewer tokens than they were given.
        """
        if tokens_to_remove > 0:
            raise Refused(f"crop({tokens_to_remove}): say how many tokens to drop as a negative number")
        if tokens_to_remove == 0 or self.is_empty:
            return
        for (layer, of, part), value in self.pieces.items():
            if of != "encoder" and value.shape()[TOKENS] != self.length:
                raise Refused(
                    f"the {part} of layer {layer} holds {value.shape()[TOKENS]} of {self.length} tokens, so what "
                    "it was before the last ones cannot be had again",
                    hint="generate without an assistant and without prompt lookup",
                )
        length = self.length + tokens_to_remove
        if length <= 0:
            self.reset()
            return
        self._change(lambda tensor: tensor[:, :, :length], but_encoder=True)
        self.length = length

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor], *, but_encoder: bool = False) -> None:
        self.pieces = {
            key: value if but_encoder and key[1] == "encoder" else as_value(change(as_torch(value)))
            for key, value in self.pieces.items()
        }
