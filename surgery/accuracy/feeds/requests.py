"""Requests: the shapes that the samples of a model are to have."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from surgery.recipe import Check

if TYPE_CHECKING:
    from surgery.accuracy.feeds.interface import Interface

UNLIMITED = 1 << 30
SEVERAL_NEW_TOKENS = 3
FROM_PADDING = ("roberta", "xlm-roberta", "camembert", "mpnet")  # these count positions from the id of padding on


@dataclass(frozen=True)
class Sample:
    """One set of inputs of one program, with what it is meant to cover."""

    name: str
    arrays: Mapping[str, np.ndarray]
    traits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """The shape of a sample: rows, new tokens, tokens in the cache, whether rows are padded, and the branch of a
    merged decoder that is taken."""

    batch: int = 1
    length: int = 1
    past: int = 0
    is_padded: bool = False
    is_cached: bool = True

    @property
    def zeros(self) -> list[int]:
        """How many tokens at the left of each row are padding: never the whole prompt, and none in the last row."""
        prompt = self.past or self.length
        most = prompt - 1 if self.is_padded else 0
        return [min(row + 1, most) for row in range(self.batch - 1)] + [0]

    def name(self, interface: Interface) -> str:
        """Return what verdicts call a sample of this shape."""
        past = f", past {self.past}" if interface.has_past else ""
        padded = ", padded" if interface.masks and any(self.zeros) else ""
        branch = ", branch without cache" if interface.has_flag and not self.is_cached else ""
        return f"batch {self.batch}, length {self.length}{past}{padded}{branch}"


def requests_of(interface: Interface, check: Check, longest: int) -> list[Request]:
    """Return what to feed to a model, the smallest first.

    Args:
        interface: The model's.
        check: Which batch sizes, lengths and pasts to cover.
        longest: How many positions there are.
    """
    batches = interface.batches(check.batches)
    lengths = [length for length in interface.lengths(check.lengths) if length <= longest]
    prompts = _prompt_requests(interface, batches, lengths)
    if not interface.has_past:
        return prompts
    pasts = [past for past in interface.pasts(check.past) if past < longest]
    requests = _past_requests(interface, batches, pasts)
    if interface.has_flag:
        requests = [replace(prompt, is_cached=False) for prompt in prompts] + requests
    return [request for request in requests if request.past + request.length <= longest]


def _prompt_requests(interface: Interface, batches: Sequence[int], lengths: Sequence[int]) -> list[Request]:
    """One row at each length; several rows, padded, at the middle one."""
    if not lengths:
        return []
    middle = sorted(lengths)[len(lengths) // 2]
    several = [batch for batch in batches if batch > 1]
    requests = [Request(batches[0], length) for length in lengths]
    requests += [Request(batch, middle, is_padded=bool(interface.masks)) for batch in several]
    return list(dict.fromkeys(requests))


def _past_requests(interface: Interface, batches: Sequence[int], pasts: Sequence[int]) -> list[Request]:
    """One row at each past; several rows where it leaves room for padding; several new tokens if they are taken."""
    if not pasts:
        return []
    length = interface.lengths((1,))[0]
    paddable = sorted(past for past in pasts if past > 1) or sorted(pasts)
    middle = paddable[(len(paddable) - 1) // 2]
    requests = [Request(batches[0], length, past) for past in pasts]
    several = [batch for batch in batches if batch > 1]
    requests += [Request(batch, length, middle, is_padded=bool(interface.masks)) for batch in several]
    if interface.continues_by_several_tokens:
        requests += [Request(batches[0], SEVERAL_NEW_TOKENS, past) for past in (0, middle) if past in pasts]
    return list(dict.fromkeys(requests))


def room(config: Mapping[str, Any]) -> int:
    """Return how many positions a network has, by its config."""
    sizes = [config.get(key) for key in ("n_positions", "max_position_embeddings", "max_target_positions")]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    relative = config.get("model_type") in ("t5", "mt5", "umt5")  # n_positions there is no limit
    if not known or relative:
        return UNLIMITED
    pad = config.get("pad_token_id")
    return min(known) - (pad + 1 if config.get("model_type") in FROM_PADDING and isinstance(pad, int) else 0)
