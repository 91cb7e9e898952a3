"""Interfaces of transformer exports: what inputs and outputs are called in each naming, and what a model is by them.

A model is recognised by names alone: no weight is read, and no node is looked at.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from types import MappingProxyType
from typing import Literal

import onnx_ir as ir

from surgery.errors import Refused
from surgery.graphs import fresh_name, graphs_of, value_names

Role = Literal["encoder", "prefill", "decode", "decoder"]
Part = Literal["key", "value"]
Of = Literal["", "decoder", "encoder"]
Family = Literal["encoder", "decoder", "cross decoder"]
"""An encoder; a decoder on its own; a decoder that attends to an encoder."""

PAST, PRESENT = "past", "present"
FLAG = "use_cache_branch"
CANONICAL = "optimum"

PARTS: tuple[Part, Part] = ("key", "value")


@dataclass(frozen=True)
class Term:
    """What the name of an input or output stands for.

    Args:
        kind: `past` or `present` for a piece of the cache; for anything else Optimum's name for it.
        layer: The layer of a piece of the cache.
        part: Whether it holds keys or values.
        of: Whose attention it serves in a decoder that has both: its own (`decoder`) or that to the encoder.
    """

    kind: str
    layer: int = -1
    part: Part = "key"
    of: Of = ""

    @property
    def is_cache(self) -> bool:
        """It is a piece of the cache."""
        return self.layer >= 0


@dataclass(frozen=True)
class Naming:
    """How a tool names inputs and outputs.

    Args:
        name: The word for it in recipes.
        past: For each kind of cache the templates of inputs, with `{layer}` and `{part}`; the first one is written.
        present: The templates of outputs of a model that takes a cache.
        first: The templates of outputs of a model that takes none, where they differ.
        parts: The words for keys and values.
        plain: For each family, by Optimum's name, the other names that differ.
    """

    name: str
    past: Mapping[Of, tuple[str, ...]]
    present: Mapping[Of, tuple[str, ...]]
    first: Mapping[Of, tuple[str, ...]] = field(default_factory=dict)
    parts: tuple[str, str] = PARTS
    plain: Mapping[Family, Mapping[str, str]] = field(default_factory=dict)

    def parse(self, name: str, family: Family, *, is_output: bool) -> Term | None:
        """Return what a name stands for, None for a name that is only like itself.

        Args:
            name: The name of an input or output.
            family: What the model is: `attention_mask` of a decoder may be the encoder's.
            is_output: It is an output: a cache that comes out is called `past_key_values` by some.
        """
        term = self.parse_cache(name, is_output=is_output)
        if term is not None:
            return term
        own = self.plain.get(family, {})
        return next(
            (Term(kind) for kind, given in own.items() if given == name), Term(name) if name in _KINDS else None
        )

    def parse_cache(self, name: str, *, is_output: bool) -> Term | None:
        """Return which piece of the cache a name stands for, None if it is none."""
        for pattern, of in self._patterns[is_output]:
            match = pattern.fullmatch(name)
            if match:
                part = PARTS[self.parts.index(match["part"])]
                return Term(PRESENT if is_output else PAST, int(match["layer"]), part, of)
        return None

    def render(self, term: Term, family: Family, *, has_past: bool) -> str:
        """Return the name of what a term stands for.

        Args:
            term: What it stands for.
            family: What the model is.
            has_past: The model takes a cache.
        """
        if not term.is_cache:
            return self.plain.get(family, {}).get(term.kind, term.kind)
        templates = self.past if term.kind == PAST else self.present if has_past or not self.first else self.first
        return templates[term.of][0].format(layer=term.layer, part=self.parts[PARTS.index(term.part)])

    @cached_property
    def _patterns(self) -> Mapping[bool, Sequence[tuple[re.Pattern[str], Of]]]:
        """For inputs and for outputs, the patterns of a cache's names."""
        sides = {False: [self.past], True: [self.present, self.first]}
        return {
            is_output: [
                (_pattern(template, self.parts), of)
                for templates in side
                for of, several in templates.items()
                for template in several
            ]
            for is_output, side in sides.items()
        }


def _pattern(template: str, parts: Sequence[str]) -> re.Pattern[str]:
    text = re.escape(template).replace(r"\{layer\}", r"(?P<layer>\d+)")
    return re.compile(text.replace(r"\{part\}", f"(?P<part>{'|'.join(parts)})"))


_KINDS = frozenset(
    (
        "input_ids",
        "attention_mask",
        "position_ids",
        "token_type_ids",
        "inputs_embeds",
        "input_features",
        "decoder_attention_mask",
        "encoder_attention_mask",
        "encoder_hidden_states",
        "cache_position",
        FLAG,
        "logits",
        "last_hidden_state",
        "encoder_last_hidden_state",
    )
)
"""The names that mean the same wherever they stand, unless a naming has another name for that."""

OPTIMUM = Naming(
    CANONICAL,
    past={
        "": ("past_key_values.{layer}.{part}",),
        "decoder": ("past_key_values.{layer}.decoder.{part}",),
        "encoder": ("past_key_values.{layer}.encoder.{part}",),
    },
    present={
        "": ("present.{layer}.{part}",),
        "decoder": ("present.{layer}.decoder.{part}",),
        "encoder": ("present.{layer}.encoder.{part}",),
    },
)
"""Optimum 1.x and 2.x (`optimum/exporters/onnx/base.py`: `add_past_key_values` of `OnnxConfigWithPast` and
`OnnxSeq2SeqConfigWithPast`), transformers.js, and the canonical naming here. A merged decoder (`optimum/onnx/
graph_transformations.py`: `merge_decoders`) also takes `use_cache_branch` bool[1]."""

TRANSFORMERS = Naming(
    "transformers.exporters",
    past={
        "": ("input.past_key_values.layers.{layer}.{part}", "past_key_values.layers.{layer}.{part}"),
        "decoder": (
            "input.past_key_values.self_attention_cache.layers.{layer}.{part}",
            "past_key_values.self_attention_cache.layers.{layer}.{part}",
        ),
        "encoder": (
            "input.past_key_values.cross_attention_cache.layers.{layer}.{part}",
            "past_key_values.cross_attention_cache.layers.{layer}.{part}",
        ),
    },
    present={
        "": ("output.past_key_values.layers.{layer}.{part}",),
        "decoder": ("output.past_key_values.self_attention_cache.layers.{layer}.{part}",),
        "encoder": ("output.past_key_values.cross_attention_cache.layers.{layer}.{part}",),
    },
    first={
        "": ("past_key_values.layers.{layer}.{part}",),
        "decoder": ("past_key_values.self_attention_cache.layers.{layer}.{part}",),
        "encoder": ("past_key_values.cross_attention_cache.layers.{layer}.{part}",),
    },
    parts=("keys", "values"),
    plain={
        "cross decoder": {
            "input_ids": "decoder_input_ids",
            "encoder_attention_mask": "attention_mask",
            "encoder_hidden_states": "encoder_outputs.last_hidden_state",
        }
    },
)
"""transformers 5.23: the paths of the tensors in what a forward takes and returns (`transformers/exporters/utils.py`:
`_iter_leaf_tensors`), where a path of both gets the prefix `input.` or `output.` (`disambiguate_io_names`). So the
cache that a prefill makes has no prefix. Of an encoder-decoder it saves no encoder, and the `attention_mask` of its
decoders is the encoder's."""

GENAI = Naming(
    "onnxruntime-genai",
    past={
        "": ("past_key_values.{layer}.{part}",),
        "decoder": ("past_{part}_self_{layer}",),
        "encoder": ("past_{part}_cross_{layer}",),
    },
    present={
        "": ("present.{layer}.{part}",),
        "decoder": ("present_{part}_self_{layer}",),
        "encoder": ("present_{part}_cross_{layer}",),
    },
    plain={"encoder": {"input_features": "audio_features", "last_hidden_state": "hidden_states"}},
)
"""onnxruntime-genai 0.18: its defaults in `src/config.h` (`Config::Defaults`), which are Optimum's names for decoders
on their own, and what its builder writes for Whisper (`models/builders/whisper.py`), where the encoder gives the
`present_key_cross_0`, ... that the decoder takes. A `genai_config.json` may name others."""

PRESETS: Mapping[str, Naming] = MappingProxyType({naming.name: naming for naming in (OPTIMUM, TRANSFORMERS, GENAI)})


@dataclass(frozen=True)
class Slot:
    """One tensor of the cache: the input that takes it and the output that gives it, where there are such.

    Keys and values of a layer are [batch, heads, tokens, size of a head].
    """

    input: str | None
    output: str | None
    layer: int
    part: Part
    of: Of = ""


@dataclass(frozen=True)
class Recognised:
    """What a model is by the names of its inputs and outputs.

    Args:
        role: `encoder`, `prefill`, `decode`, or `decoder` for one that takes the flag `use_cache_branch`.
        naming: The preset that its names are from; where several fit, the first of `PRESETS`.
        layers: How many layers have a cache.
        cache: The cache, in the order of layers.
        canonical: For the present names that are understood, Optimum's.
        family: Whether it is an encoder, a decoder on its own, or one that attends to an encoder.
    """

    role: Role
    naming: str
    layers: int
    cache: tuple[Slot, ...]
    canonical: Mapping[str, str]
    family: Family

    def names(self, naming: str) -> dict[str, str]:
        """Return for the present names that are understood those of a preset.

        Raises:
            KeyError: There is no such preset.
        """
        target = PRESETS[naming]
        has_past = any(slot.input is not None for slot in self.cache)
        found: dict[str, str] = {}
        for slot in self.cache:
            if slot.input is not None:
                term = Term(PAST, slot.layer, slot.part, slot.of)
                found[slot.input] = target.render(term, self.family, has_past=has_past)
            if slot.output is not None and slot.output != slot.input:
                term = Term(PRESENT, slot.layer, slot.part, slot.of)
                found[slot.output] = target.render(term, self.family, has_past=has_past)
        for name, kind in self.canonical.items():
            found.setdefault(name, target.render(Term(kind), self.family, has_past=has_past))
        return {name: found[name] for name in self.canonical}


def recognise(model: ir.Model) -> Recognised | None:
    """Return what a model is by its inputs and outputs, None if it is neither an encoder nor a decoder with a cache.

    A decoder that neither takes nor gives a cache is not told from a classifier of tokens, so it is None.
    """
    graph = model.graph
    inputs = [value.name or "" for value in graph.inputs if value.name not in graph.initializers]
    return recognise_names(inputs, [value.name or "" for value in graph.outputs])


def recognise_names(inputs: Sequence[str], outputs: Sequence[str]) -> Recognised | None:
    """Return what a model with inputs and outputs of these names is, as `recognise` does."""
    naming, counted = max(
        ((naming, _cache_names(naming, inputs, outputs)) for naming in PRESETS.values()), key=lambda pair: pair[1]
    )
    if not counted:
        return _encoder(inputs, outputs)
    return _read(naming, inputs, outputs)


def translate(inputs: Sequence[str], outputs: Sequence[str], source: str, target: str) -> dict[str, str]:
    """Return the names of a model in another naming, for those that are understood.

    Args:
        inputs: The names of its inputs.
        outputs: The names of its outputs.
        source: The preset that they are from.
        target: The preset whose names are wanted.

    Raises:
        KeyError: There is no such preset.
    """
    found = _read(PRESETS[source], inputs, outputs)
    return found.names(target) if found is not None else {}


def rename_values(model: ir.Model, names: Mapping[str, str]) -> int:
    """Give inputs and outputs of a model other names; a value inside that has one of these names gives way.

    Args:
        model: The model; it is changed in place, all at once or not at all.
        names: The new names by the present ones; names that stay, or are none of an input or output, do nothing.

    Returns:
        How many were renamed.

    Raises:
        Refused: Two would have one name, or a new name is that of another input, output or weight.
    """
    interface = {value.name or "": value for value in (*model.graph.inputs, *model.graph.outputs)}
    changes = {old: new for old, new in names.items() if old != new and old in interface}
    _refuse_clashes(model, interface, changes)
    taken = value_names(model.graph)
    taken.update(changes.values())
    known = set(interface.values())
    for value in _inner_values(model.graph):
        if value.name and value.name in changes.values() and value not in known:
            value.name = fresh_name(value.name, taken)
    for old in changes:  # two weights may change names with each other, and at no time may both have one
        if interface[old].is_initializer():
            interface[old].name = fresh_name(old, taken)
    for old, new in changes.items():
        interface[old].name = new
    return len(changes)


def _refuse_clashes(model: ir.Model, interface: Mapping[str, ir.Value], changes: Mapping[str, str]) -> None:
    weights = {name for graph in graphs_of(model.graph) for name in graph.initializers if name not in interface}
    owners: dict[str, str] = {}
    for old, new in changes.items():
        if new in owners:
            raise Refused(f"{owners[new]!r} and {old!r} would both be called {new!r}")
        if new in interface and new not in changes:
            raise Refused(f"{old!r} cannot be called {new!r}: another input or output has that name")
        if new in weights:
            raise Refused(f"{old!r} cannot be called {new!r}: a weight has that name")
        owners[new] = old


def _inner_values(main: ir.Graph) -> Iterator[ir.Value]:
    """Yield all values that nodes and subgraphs define."""
    for graph in graphs_of(main):
        if graph is not main:
            yield from graph.inputs
        for node in graph:
            yield from node.outputs


def _cache_names(naming: Naming, inputs: Iterable[str], outputs: Iterable[str]) -> int:
    count = sum(naming.parse_cache(name, is_output=False) is not None for name in inputs)
    return count + sum(naming.parse_cache(name, is_output=True) is not None for name in outputs)


def _encoder(inputs: Sequence[str], outputs: Sequence[str]) -> Recognised | None:
    """Return an encoder that gives no cache, by the first naming that takes it for one."""
    found = (_read(naming, inputs, outputs) for naming in PRESETS.values())
    return next((one for one in found if one is not None), None)


def _read(naming: Naming, inputs: Sequence[str], outputs: Sequence[str]) -> Recognised | None:
    past = {name: naming.parse_cache(name, is_output=False) for name in inputs}
    present = {name: naming.parse_cache(name, is_output=True) for name in outputs}
    slots = _slots(past, present)
    family = _family(naming, slots, inputs, outputs)
    role = _role(family, slots, inputs) if family is not None else None
    if family is None or role is None:
        return None
    canonical: dict[str, str] = {}
    for names, is_output in ((inputs, False), (outputs, True)):
        for name in names:
            term = naming.parse(name, family, is_output=is_output)
            if term is not None:
                canonical.setdefault(name, OPTIMUM.render(term, family, has_past=True))
    return Recognised(role, naming.name, len({slot.layer for slot in slots}), slots, canonical, family)


def _slots(past: Mapping[str, Term | None], present: Mapping[str, Term | None]) -> tuple[Slot, ...]:
    """Pair the inputs and outputs of a cache by what they stand for."""
    taken = {(term.layer, term.of, term.part): name for name, term in past.items() if term is not None}
    given = {(term.layer, term.of, term.part): name for name, term in present.items() if term is not None}
    keys = sorted({*taken, *given})
    return tuple(Slot(taken.get(key), given.get(key), key[0], key[2], key[1]) for key in keys)


def _family(naming: Naming, slots: Sequence[Slot], inputs: Sequence[str], outputs: Sequence[str]) -> Family | None:
    if any(slot.of == "" for slot in slots):
        return "decoder"
    if any(slot.of == "decoder" or slot.input is not None for slot in slots):
        return "cross decoder"
    states = naming.plain.get("encoder", {}).get("last_hidden_state", "last_hidden_state")
    return "encoder" if states in outputs and inputs and "logits" not in outputs else None


def _role(family: Family, slots: Sequence[Slot], inputs: Sequence[str]) -> Role | None:
    if family == "encoder":
        return "encoder"
    own = [slot for slot in slots if slot.of != "encoder"]
    if not any(slot.output is not None for slot in own):
        return None
    if not any(slot.input is not None for slot in own):
        return "prefill"
    return "decoder" if FLAG in inputs else "decode"


__all__ = [
    "CANONICAL",
    "PRESETS",
    "Naming",
    "Recognised",
    "Slot",
    "Term",
    "recognise",
    "recognise_names",
    "rename_values",
    "translate",
]
