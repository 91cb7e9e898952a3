"""Feeds: samples that know what a model's inputs are.

Ids stay below the vocabulary, masks agree with past and present, a past comes out of a real prefill, positions follow
the mask. The roles are chained: the encoder's output feeds the decoders, the prefill's cache feeds the decode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx_ir as ir

from surgery.bundle import Bundle
from surgery.errors import SurgeryError
from surgery.recipe import Check
from surgery.runtime.loops import position_ids

Arrays = dict[str, np.ndarray]
Run = Callable[[str, Mapping[str, np.ndarray]], Arrays]

PAST = re.compile(r"^past")
UNBOUNDED_IDS = 100
UNLIMITED = 1 << 30
ENCODER_EXTRA = 3  # the encoder's prompt is that much longer than the decoder's, so that a mixed-up axis shows
SEVERAL_NEW_TOKENS = 3


@dataclass(frozen=True)
class Sample:
    """One set of inputs of one program, with what it is meant to cover."""

    name: str
    arrays: Mapping[str, np.ndarray]
    traits: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Request:
    """The shape of a sample: rows, new tokens, tokens in the cache, whether rows are padded."""

    batch: int = 1
    length: int = 1
    past: int = 0
    is_padded: bool = False

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
        return f"batch {self.batch}, length {self.length}{past}{padded}"


class FeedMaker:
    """Makes the samples of every model of a source.

    Args:
        bundle: The source.
        check: Which batch sizes, lengths and pasts to cover, and the seed.
        run: Runs the model of a role; used to chain the roles.
    """

    def __init__(self, bundle: Bundle, check: Check, run: Run) -> None:
        self._bundle = bundle
        self._check = check
        self._run = run

    def samples(self, role: str) -> Iterator[Sample]:
        """Yield the samples of a role's model, the smallest first.

        A sample that the check asks for and the model has no room for (a length beyond its positions) is left out.
        """
        interface = Interface(self._bundle[role])
        for request in self._requests(interface):
            random = np.random.default_rng([self._check.seed, request.batch, request.length, request.past])
            arrays = self._arrays(role, interface, request, random)
            yield Sample(request.name(interface), arrays, interface.traits(arrays))

    def _requests(self, interface: Interface) -> list[Request]:
        batches = interface.batches(self._check.batches)
        longest = room(self._bundle.config)
        if not interface.has_past:
            lengths = [length for length in interface.lengths(self._check.lengths) if length <= longest]
            return _prompt_requests(interface, batches, lengths)
        pasts = [past for past in interface.pasts(self._check.past) if past < longest]
        requests = _past_requests(interface, batches, pasts)
        return [request for request in requests if request.past + request.length <= longest]

    def _arrays(self, role: str, interface: Interface, request: Request, random: np.random.Generator) -> Arrays:
        chained = self._chained(role, interface, request)
        arrays: Arrays = {}
        for value in interface.inputs:
            name = value.name or ""
            arrays[name] = chained[name] if name in chained else self._array(value, interface, request, random)
        return arrays

    def _array(
        self, value: ir.Value, interface: Interface, request: Request, random: np.random.Generator
    ) -> np.ndarray:
        name = value.name or ""
        kind = numpy_type(value)
        if name in interface.masks:
            past = 0 if name.startswith("encoder") else request.past
            return _mask(request, past).astype(kind)
        if name.endswith("position_ids"):
            return position_ids(_mask(request, request.past))[:, request.past :].astype(kind)
        shape = interface.shape(value, request)
        if PAST.match(name):
            return np.zeros(shape, kind)
        return _random_array(value, shape, kind, self._id_bound(value), random)

    def _id_bound(self, value: ir.Value) -> int:
        vocabulary = self._bundle.config.get("vocab_size")
        bounds = [vocabulary if isinstance(vocabulary, int) else None, rows_gathered_by(value)]
        return min((bound for bound in bounds if bound), default=UNBOUNDED_IDS)

    def _chained(self, role: str, interface: Interface, request: Request) -> Arrays:
        """Return the inputs that other models, or this one, must make: encoder states and the past."""
        chained: Arrays = {}
        names = {value.name for value in interface.inputs}
        encoder = self._bundle.models.get("encoder")
        if encoder is not None and role != "encoder" and names & {"encoder_hidden_states", "encoder_attention_mask"}:
            chained |= self._encoded(request)
        if interface.has_past:
            chained |= self._past(role, interface, request, chained)
        return chained

    def _encoded(self, request: Request) -> Arrays:
        interface = Interface(self._bundle["encoder"])
        length = min(request.length + request.past + ENCODER_EXTRA, room(self._bundle.config))
        prompt = Request(request.batch, length, 0, request.is_padded)
        random = np.random.default_rng([self._check.seed, prompt.batch, prompt.length])
        inputs = self._arrays("encoder", interface, prompt, random)
        states = next(iter(self._run("encoder", inputs).values()))
        mask = inputs.get("attention_mask", _mask(prompt, 0))
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def _past(self, role: str, interface: Interface, request: Request, encoded: Arrays) -> Arrays:
        """Return a cache that holds `request.past` tokens; an empty one still needs real encoder keys and values."""
        giver = "prefill" if "prefill" in self._bundle.models and role != "prefill" else role
        cross = [value for value in interface.past if ".encoder." in (value.name or "")]
        if request.past == 0 and not cross:
            return {}
        if giver == role:
            return self._own_past(role, interface, request)
        prefill = Interface(self._bundle[giver])
        prompt = Request(request.batch, max(request.past, 1), 0, request.is_padded)
        random = np.random.default_rng([self._check.seed, prompt.batch, prompt.length, 1])
        inputs: Arrays = {}
        for value in prefill.inputs:
            name = value.name or ""
            inputs[name] = encoded[name] if name in encoded else self._array(value, prefill, prompt, random)
        past = _as_past(interface.past, self._run(giver, inputs))
        if request.past == 0:
            return {name: array for name, array in past.items() if ".encoder." in name}
        return past

    def _own_past(self, role: str, interface: Interface, request: Request) -> Arrays:
        """Grow a cache by running the model on its own outputs: at once if it takes several tokens, else one by one.

        One by one, nothing is padding while it grows: the first tokens of a row would have nothing to attend to.
        """
        random = np.random.default_rng([self._check.seed, request.batch, request.past, 2])
        at_once = interface.takes_several_tokens
        step = request.past if at_once else interface.lengths((1,))[0]
        past: Arrays = {}
        for done in range(0, request.past, step):
            part = Request(request.batch, step, done, request.is_padded and at_once)
            made = {value.name or "": self._array(value, interface, part, random) for value in interface.inputs}
            past = _as_past(interface.past, self._run(role, made | past))
        return past


def room(config: Mapping[str, Any]) -> int:
    """Return how many positions a network has, by its config."""
    sizes = [config.get(key) for key in ("n_positions", "max_position_embeddings")]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    relative = config.get("model_type") in ("t5", "mt5", "umt5")  # n_positions there is no limit
    return min(known) if known and not relative else UNLIMITED


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
    if interface.takes_several_tokens:
        requests += [Request(batches[0], SEVERAL_NEW_TOKENS, past) for past in (0, middle) if past in pasts]
    return list(dict.fromkeys(requests))


class Interface:
    """What can be read off a model's inputs: which are masks, which hold a past, what the axes mean."""

    def __init__(self, model: ir.Model) -> None:
        self.inputs = [value for value in model.graph.inputs if value.name not in model.graph.initializers]
        names = [value.name or "" for value in self.inputs]
        self.masks = [name for name in names if name.endswith("attention_mask")]
        self.past = [value for value in self.inputs if PAST.match(value.name or "")]
        self.has_past = bool(self.past)
        self._ids = next((value for value in self.inputs if (value.name or "").endswith("input_ids")), None)

    @property
    def takes_several_tokens(self) -> bool:
        """The axis of new tokens is not fixed."""
        return self._ids is not None and self._length_axis is not None

    def batches(self, wanted: Sequence[int]) -> list[int]:
        """Return the batch sizes to feed: the wanted ones, or the one that the model is fixed to."""
        first = _dimensions(self._ids if self._ids is not None else self.inputs[0]) if self.inputs else []
        return [first[0]] if first and isinstance(first[0], int) else sorted(set(wanted))

    def lengths(self, wanted: Sequence[int]) -> list[int]:
        """Return the lengths to feed: the wanted ones, the one that the model is fixed to, or 1 where it has none."""
        if self._length_axis is not None:
            return list(wanted)
        dimensions = _dimensions(self._ids) if self._ids is not None else []
        return [dimensions[1]] if len(dimensions) > 1 and isinstance(dimensions[1], int) else [1]

    def pasts(self, wanted: Sequence[int]) -> list[int]:
        """Return the pasts to feed: the wanted ones, or the one that the model is fixed to."""
        dimensions = _dimensions(self.past[0])
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
        return traits

    def shape(self, value: ir.Value, request: Request) -> tuple[int, ...]:
        """Return the shape of an input for a request: axis 0 is the batch, other free axes are lengths by name."""
        return tuple(
            size if isinstance(size, int) else self._size(value, axis, size, request)
            for axis, size in enumerate(_dimensions(value))
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
            for axis, size in enumerate(_dimensions(value)):
                if axis and isinstance(size, str) and "batch" not in size and value not in self.past:
                    return value.name or "", axis
        return None

    @property
    def _past_axis(self) -> int:
        """The axis of tokens in a cache: the free one beside the batch, else the third of [batch, heads, past, dim]."""
        free = (axis for axis, size in enumerate(_dimensions(self.past[0])) if axis and isinstance(size, str))
        return next(free, 2)


def _dimensions(value: ir.Value) -> list[int | str]:
    if value.shape is None:
        return []
    return [size if isinstance(size, int) else str(size.value or "") for size in value.shape]


def numpy_type(value: ir.Value) -> np.dtype:
    """Return the numpy type of a value's elements.

    Raises:
        SurgeryError: The value has no tensor type.
    """
    if value.dtype is None:
        raise SurgeryError(f"input {value.name!r} has no tensor type, so nothing can be fed", hint="give check.data")
    return np.dtype(value.dtype.numpy())


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


def _mask(request: Request, past: int) -> np.ndarray:
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


def _as_past(past: Sequence[ir.Value], outputs: Mapping[str, Any]) -> Arrays:
    """Return the outputs that hold the cache under the names of the inputs that take it: by name, else by order."""
    names = [value.name or "" for value in past]
    by_name = {name: PAST.sub("past", name).replace("past_key_values", "present", 1) for name in names}
    if all(given in outputs for given in by_name.values()):
        return {name: np.asarray(outputs[given]) for name, given in by_name.items()}
    caches = [array for name, array in outputs.items() if name.startswith(("present", "output.past"))]
    if len(caches) != len(names):
        raise SurgeryError(
            f"the cache inputs {names[0]!r}, ... do not match the cache outputs", hint="give check.data instead"
        )
    return dict(zip(names, caches, strict=True))


__all__ = ["FeedMaker", "Interface", "Request", "Run", "Sample", "numpy_type", "room", "rows_gathered_by"]
