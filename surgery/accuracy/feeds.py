"""Feeds: samples that know what a model's inputs are.

Ids stay below the vocabulary, masks agree with past and present, a past comes out of a real prefill, positions follow
the mask. The roles are chained: the encoder's output feeds the decoders, the prefill's cache feeds the decode.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import onnx_ir as ir

from surgery.bundle import Bundle
from surgery.errors import Refused, SurgeryError
from surgery.interfaces import FLAG, recognise, rename_values
from surgery.recipe import Check
from surgery.runtime.loops import position_ids

Arrays = dict[str, np.ndarray]
Run = Callable[[str, Mapping[str, np.ndarray]], Arrays]

PAST = re.compile(r"^past")
UNBOUNDED_IDS = 100
UNLIMITED = 1 << 30
ENCODER_EXTRA = 3  # the encoder's prompt is that much longer than the decoder's, so that a mixed-up axis shows
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


class FeedMaker:
    """Makes the samples of every model of a source.

    Args:
        bundle: The source.
        check: Which batch sizes, lengths and pasts to cover, and the seed.
        run: Runs the model of a role; used to chain the roles.
    """

    def __init__(self, bundle: Bundle, check: Check, run: Run) -> None:
        self._own_names: dict[str, dict[str, str]] = {}
        self._bundle = Bundle({role: self._canonical(role, model) for role, model in bundle.models.items()})
        self._bundle.config = bundle.config
        self._check = check
        self._run_own = run

    def _canonical(self, role: str, model: ir.Model) -> ir.Model:
        """Return a model with canonical names, by which inputs are known here, and remember its own."""
        recognised = recognise(model)
        if recognised is None or all(own == known for own, known in recognised.canonical.items()):
            return model
        renamed = model.clone()
        try:
            rename_values(renamed, recognised.canonical)
        except Refused:
            return model
        self._own_names[role] = {known: own for own, known in recognised.canonical.items()}
        return renamed

    def _as_own(self, role: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
        own = self._own_names.get(role, {})
        return {own.get(name, name): array for name, array in arrays.items()}

    def _run(self, role: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
        known = {own: name for name, own in self._own_names.get(role, {}).items()}
        return {known.get(name, name): array for name, array in self._run_own(role, self._as_own(role, arrays)).items()}

    def samples(self, role: str) -> Iterator[Sample]:
        """Yield the samples of a role's model, the smallest first.

        A sample that the check asks for and the model has no room for (a length beyond its positions) is left out.
        """
        interface = Interface(self._bundle[role])
        for request in self._requests(interface):
            random = np.random.default_rng([self._check.seed, request.batch, request.length, request.past])
            arrays = self._arrays(role, interface, request, random)
            yield Sample(request.name(interface), self._as_own(role, arrays), interface.traits(arrays))

    def _requests(self, interface: Interface) -> list[Request]:
        batches = interface.batches(self._check.batches)
        longest = room(self._bundle.config)
        lengths = [length for length in interface.lengths(self._check.lengths) if length <= longest]
        prompts = _prompt_requests(interface, batches, lengths)
        if not interface.has_past:
            return prompts
        pasts = [past for past in interface.pasts(self._check.past) if past < longest]
        requests = _past_requests(interface, batches, pasts)
        if interface.has_flag:
            requests = [replace(prompt, is_cached=False) for prompt in prompts] + requests
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
        if name == FLAG:
            return np.full(interface.shape(value, request), request.is_cached, kind)
        if name in interface.masks:
            past = 0 if name.startswith("encoder") else request.past
            return _mask(request, past).astype(kind)
        if name.endswith("position_ids"):
            return position_ids(_mask(request, request.past))[:, request.past :].astype(kind)
        shape = interface.shape(value, request)
        if PAST.match(name):
            return np.zeros(self._cache_shape(value, shape), kind)
        return _random_array(value, shape, kind, self._id_bound(value), random)

    def _cache_shape(self, value: ir.Value, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of a cache; onnxruntime-genai 0.18 leaves the size of a head free."""
        size = self._bundle.config.get("head_dim")
        is_free = len(shape) == 4 and not isinstance(_dimensions(value)[3], int)
        return (*shape[:3], size) if is_free and isinstance(size, int) else shape

    def _id_bound(self, value: ir.Value) -> int:
        key = "type_vocab_size" if (value.name or "").endswith("token_type_ids") else "vocab_size"
        vocabulary = self._bundle.config.get(key)
        bounds = [vocabulary if isinstance(vocabulary, int) else None, rows_gathered_by(value)]
        return min((bound for bound in bounds if bound), default=UNBOUNDED_IDS)

    def _chained(self, role: str, interface: Interface, request: Request) -> Arrays:
        """Return the inputs that other models, or this one, must make: encoder states and the past."""
        chained: Arrays = {}
        names = {value.name for value in interface.inputs}
        encoder = self._bundle.models.get("encoder")
        if role != "encoder" and names & {"encoder_hidden_states", "encoder_attention_mask"}:
            chained |= self._encoded(request) if encoder is not None else self._made_up_states(request)
        if interface.has_past and request.is_cached:
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

    def _made_up_states(self, request: Request) -> Arrays:
        """Return what an encoder that is not in the bundle might give: random states, of one length with their mask."""
        inputs = [value for model in self._bundle.models.values() for value in Interface(model).inputs]
        states = [value for value in inputs if value.name == "encoder_hidden_states"]
        sizes = [_dimensions(value)[-1] for value in states if _dimensions(value)]
        size = next((size for size in sizes if isinstance(size, int)), self._bundle.config.get("d_model"))
        length = min(request.length + request.past + ENCODER_EXTRA, room(self._bundle.config))
        prompt = Request(request.batch, length, 0, request.is_padded)
        if not states:
            return {"encoder_attention_mask": _mask(prompt, 0)}
        if not isinstance(size, int):
            return {}
        random = np.random.default_rng([self._check.seed, prompt.batch, prompt.length])
        made = random.standard_normal((prompt.batch, length, size)).astype(numpy_type(states[0]))
        return {"encoder_hidden_states": made, "encoder_attention_mask": _mask(prompt, 0)}

    def _past(self, role: str, interface: Interface, request: Request, encoded: Arrays) -> Arrays:
        """Return a cache that holds `request.past` tokens; an empty one still needs real encoder keys and values."""
        giver = "prefill" if "prefill" in self._bundle.models and role != "prefill" else role
        cross = [value for value in interface.past if ".encoder." in (value.name or "")]
        if request.past == 0 and not cross:
            return {}
        if giver == role and not interface.has_flag:
            return self._own_past(role, interface, request, encoded)
        prefill = Interface(self._bundle[giver])
        prompt = Request(request.batch, max(request.past, 1), 0, request.is_padded, is_cached=False)
        random = np.random.default_rng([self._check.seed, prompt.batch, prompt.length, 1])
        inputs: Arrays = {}
        for value in prefill.inputs:
            name = value.name or ""
            inputs[name] = encoded[name] if name in encoded else self._array(value, prefill, prompt, random)
        past = _as_past(interface.past, self._run(giver, inputs))
        if request.past == 0:
            return {name: array for name, array in past.items() if ".encoder." in name}
        return past

    def _own_past(self, role: str, interface: Interface, request: Request, encoded: Arrays) -> Arrays:
        """Grow a cache by running the model on its own outputs: at once if it takes several tokens, else one by one.

        Keys and values of an encoder are random. One by one, nothing is padding while it grows: the first tokens of a
        row would have nothing to attend to.
        """
        random = np.random.default_rng([self._check.seed, request.batch, request.past, 2])
        crossed = self._made_up_cross(interface, request, encoded, random)
        own = [value for value in interface.past if value.name not in crossed]
        at_once = interface.takes_several_tokens
        step = max(request.past, 1) if at_once else interface.lengths((1,))[0]
        past: Arrays = {}
        for done in range(0, request.past, step):
            part = Request(request.batch, step, done, request.is_padded and at_once)
            made = {value.name or "": self._array(value, interface, part, random) for value in interface.inputs}
            past = _as_past(own, self._run(role, made | encoded | crossed | past))
        return crossed | past

    def _made_up_cross(
        self, interface: Interface, request: Request, encoded: Arrays, random: np.random.Generator
    ) -> Arrays:
        """Return random keys and values of an encoder, [batch, heads, tokens of its mask, size of a head]."""
        mask = encoded.get("encoder_attention_mask")
        tokens = mask.shape[1] if mask is not None else request.length + request.past + ENCODER_EXTRA
        made: Arrays = {}
        for value in interface.past:
            if ".encoder." in (value.name or ""):
                batch, heads, _, size = self._cache_shape(value, interface.shape(value, request))
                made[value.name or ""] = random.standard_normal((batch, heads, tokens, size)).astype(numpy_type(value))
        return made


def room(config: Mapping[str, Any]) -> int:
    """Return how many positions a network has, by its config."""
    sizes = [config.get(key) for key in ("n_positions", "max_position_embeddings", "max_target_positions")]
    known = [size for size in sizes if isinstance(size, int) and size > 0]
    relative = config.get("model_type") in ("t5", "mt5", "umt5")  # n_positions there is no limit
    if not known or relative:
        return UNLIMITED
    pad = config.get("pad_token_id")
    return min(known) - (pad + 1 if config.get("model_type") in FROM_PADDING and isinstance(pad, int) else 0)


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
        self.has_flag = self.has_past and FLAG in names
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
        if self.has_flag:
            traits[FLAG] = "yes" if arrays[FLAG].all() else "no"
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
