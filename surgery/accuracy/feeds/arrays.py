"""Arrays for inputs that no other model has to make: ids, masks, positions, flags, empty caches, random numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from surgery.accuracy.feeds.interface import PAST, Interface, dimensions_of, numpy_type
from surgery.accuracy.feeds.requests import Request
from surgery.interfaces import FLAG
from surgery.runtime.loops import position_ids

UNBOUNDED_IDS = 100


class PlainInputs:
    """Makes inputs that no other model has to make.

    Args:
        config: The network's `config.json`.
    """

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._config = config

    def array(self, value: ir.Value, interface: Interface, request: Request, random: np.random.Generator) -> np.ndarray:
        """Return an array for an input."""
        name = value.name or ""
        kind = numpy_type(value)
        if name == FLAG:
            return np.full(interface.shape(value, request), request.is_cached, kind)
        if name in interface.masks:
            past = 0 if name.startswith("encoder") else request.past
            return mask_of(request, past).astype(kind)
        if name.endswith("position_ids"):
            return position_ids(mask_of(request, request.past))[:, request.past :].astype(kind)
        shape = interface.shape(value, request)
        if PAST.match(name):
            return np.zeros(self.cache_shape(value, shape), kind)
        return _random_array(value, shape, kind, self._id_bound(value), random)

    def fill(
        self, interface: Interface, request: Request, random: np.random.Generator, given: Mapping[str, np.ndarray]
    ) -> dict[str, np.ndarray]:
        """Return an array for each input of a model; what is given is taken as it is."""
        filled: dict[str, np.ndarray] = {}
        for value in interface.inputs:
            name = value.name or ""
            filled[name] = given[name] if name in given else self.array(value, interface, request, random)
        return filled

    def cache_shape(self, value: ir.Value, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a cache; onnxruntime-genai 0.18 leaves the size of a head free."""
        size = self._config.get("head_dim")
        is_free = len(shape) == 4 and not isinstance(dimensions_of(value)[3], int)
        return (*shape[:3], size) if is_free and isinstance(size, int) else shape

    def _id_bound(self, value: ir.Value) -> int:
        key = "type_vocab_size" if (value.name or "").endswith("token_type_ids") else "vocab_size"
        vocabulary = self._config.get(key)
        bounds = [vocabulary if isinstance(vocabulary, int) else None, rows_gathered_by(value)]
        return min((bound for bound in bounds if bound), default=UNBOUNDED_IDS)


def rows_gathered_by(value: ir.Value) -> int | None:
    """Return how many rows the smallest table has that an input of ids is looked up in, if any."""
    bounds: list[int] = []
    frontier, seen = [value], {value}
    while frontier:
        for node, index in frontier.pop().uses():
            if node.op_type == "Gather" and index == 1 and node.attributes.get_int("axis", 0) == 0:
                table = node.inputs[0]
                if table is not None and table.shape is not None and isinstance(table.shape[0], int):
                    bounds.append(table.shape[0])
            if node.op_type in ("Cast", "Identity", "Reshape", "Unsqueeze", "Squeeze") and index == 0:
                following = node.outputs[0]
                if following not in seen:
                    seen.add(following)
                    frontier.append(following)
    return min(bounds, default=None)


def mask_of(request: Request, past: int) -> np.ndarray:
    """Return a mask [batch, past + length]."""
    mask = np.ones((request.batch, past + request.length), dtype=np.int64)
    for row, zeros in enumerate(request.zeros):
        mask[row, :zeros] = 0
    return mask


def _random_array(
    value: ir.Value, shape: tuple[int, ...], kind: np.dtype, bound: int, random: np.random.Generator
) -> np.ndarray:
    if kind.kind == "O" or value.dtype == ir.DataType.STRING:
        words = np.array(["alpha", "beta", "gamma", ""], dtype=object)
        return words[random.integers(0, len(words), size=shape)]
    if kind == np.bool_:
        return random.integers(0, 2, size=shape).astype(kind)
    if kind.kind in "iu":
        return random.integers(0, bound, size=shape).astype(kind)
    return random.standard_normal(shape).astype(kind)
