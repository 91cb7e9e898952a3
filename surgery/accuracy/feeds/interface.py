"""What can be read off the inputs of a model that is to be fed."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from surgery.errors import SurgeryError
from surgery.interfaces import FLAG

if TYPE_CHECKING:
    from surgery.accuracy.feeds.requests import Request

PAST = re.compile(r"^past")


class Interface:
    """What can be read off a model's inputs: which are masks, which hold a past, what the axes mean."""

    def __init__(self, model: ir.Model) -> None:
        self.inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
        names = [value.name or "" for value in self.inputs]
        self.masks = [name for name in names if name.endswith("attention_mask")]
        self.past = [value for value in self.inputs if PAST.match(value.name or "")]
        self.has_past = bool(self.past)
        self.has_flag = self.has_past and FLAG in names
        self._ids = next((value for value in self.inputs if (value.name or "").endswith("input_ids")), None)

    @property
    def takes_several_tokens(self) -> bool:
        """The axis of new tokens is not fixed."""
        return self._ids is not None and self._length_axis is not None

    @property
    def continues_by_several_tokens(self) -> bool:
        """The axis of new tokens is not fixed after a cache either.

        Of a merged decoder that axis has a name only where both branches call it so; without, one of them has it fixed.
        """
        if self._ids is None or self._length_axis is None:
            return False
        return not self.has_flag or bool(dimensions_of(self._ids)[self._length_axis[1]])

    def batches(self, wanted: Sequence[int]) -> list[int]:
        """Return the batch sizes to feed: the wanted ones, or the one that the model is fixed to."""
        first = dimensions_of(self._ids if self._ids is not None else self.inputs[0]) if self.inputs else []
        return [first[0]] if first and isinstance(first[0], int) else sorted(set(wanted))

    def lengths(self, wanted: Sequence[int]) -> list[int]:
        """Return the lengths to feed: the wanted ones, the one that the model is fixed to, or 1 where it has none."""
        if self._length_axis is not None:
            return list(wanted)
        dimensions = dimensions_of(self._ids) if self._ids is not None else []
        return [dimensions[1]] if len(dimensions) > 1 and isinstance(dimensions[1], int) else [1]

    def pasts(self, wanted: Sequence[int]) -> list[int]:
        """Return the pasts to feed: the wanted ones, or the one that the model is fixed to."""
        dimensions = dimensions_of(self.past[0])
        fixed = dimensions[self._past_axis] if len(dimensions) > self._past_axis else None
        return [fixed] if isinstance(fixed, int) else list(wanted)

    def traits(self, arrays: Mapping[str, np.ndarray]) -> dict[str, str]:
        """Return what a sample covers, read off the arrays themselves."""
        traits: dict[str, str] = {}
        leading = self._ids if self._ids is not None else next(iter(self.inputs), None)
        if leading is not None and arrays[leading.name or ""].ndim:
            traits["batch"] = str(arrays[leading.name or ""].shape[0])
        if self._length_axis is not None:
            name, axis = self._length_axis
            traits["length"] = str(arrays[name].shape[axis])
        if self.past and arrays[self.past[0].name or ""].ndim > self._past_axis:
            traits["past"] = str(arrays[self.past[0].name or ""].shape[self._past_axis])
        if self.masks:
            traits["padding"] = "yes" if any((arrays[name] == 0).any() for name in self.masks) else "no"
        if self.has_flag:
            traits[FLAG] = "yes" if arrays[FLAG].all() else "no"
        return traits

    def shape(self, value: ir.Value, request: Request) -> tuple[int, ...]:
        """Return the shape of an input for a request: axis 0 is the batch, other free axes are lengths by name."""
        return tuple(
            size if isinstance(size, int) else self._size(value, axis, size, request)
            for axis, size in enumerate(dimensions_of(value))
        )

    def _size(self, value: ir.Value, axis: int, name: str, request: Request) -> int:
        if axis == 0 or "batch" in name:
            return request.batch
        if PAST.match(value.name or ""):
            return request.past
        if "past" in name and ("+" in name or "total" in name):
            return request.past + request.length
        return request.past if "past" in name else request.length

    @property
    def _length_axis(self) -> tuple[str, int] | None:
        """The free axis that lengths are about: of the ids where there are any, else the first that is no batch."""
        for value in [self._ids] if self._ids is not None else self.inputs:
            for axis, size in enumerate(dimensions_of(value)):
                if axis and isinstance(size, str) and "batch" not in size and value not in self.past:
                    return value.name or "", axis
        return None

    @property
    def _past_axis(self) -> int:
        """The axis of tokens in a cache: the free one beside the batch, else the third of [batch, heads, past, dim]."""
        free = (axis for axis, size in enumerate(dimensions_of(self.past[0])) if axis and isinstance(size, str))
        return next(free, 2)


def dimensions_of(value: ir.Value) -> list[int | str]:
    """Return the size or the name of each axis; transformers.exporters 5.23 writes some sizes as names such as `8`."""
    sizes = [size if isinstance(size, int) else str(size.value or "") for size in value.shape or ()]
    return [int(size) if isinstance(size, str) and size.isdecimal() else size for size in sizes]


def numpy_type(value: ir.Value) -> np.dtype:
    """Return the numpy type of a value's elements.

    Raises:
        SurgeryError: The value has no tensor type.
    """
    if isinstance(value.type, (ir.SequenceType, ir.OptionalType)):
        raise SurgeryError(f"the input {value.name!r} is no tensor, so nothing can be fed", hint="--no-check")
    if value.dtype is None:
        raise SurgeryError(f"input {value.name!r} has no tensor type, so nothing can be fed", hint="give check.data")
    return np.dtype(value.dtype.numpy())
