"""Other names, and other integers, for the inputs and outputs of models."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal

import onnx_ir as ir
from pydantic import field_validator, model_validator

from surgery.claims import CastTo, Claim, Program, Take
from surgery.contract import Bundle, Change, Context, Effect, Field, ModelPass, Outcome, Refused, RoleUse
from surgery.graphs import fresh_name, value_names
from surgery.interfaces import recognise, rename_values
from surgery.options import did_you_mean
from surgery.registry import register

Name = Annotated[str, Field(min_length=1)]
Integer = Literal["int32", "int64"]

TYPES: Mapping[Integer, ir.DataType] = {"int32": ir.DataType.INT32, "int64": ir.DataType.INT64}
OTHER: Mapping[Integer, Integer] = {"int32": "int64", "int64": "int32"}


@register
class RenameIo(ModelPass):
    """Rename inputs and outputs, and choose the type of their integers.

    With `names: {ids: input_ids, "*_out": "present_*"}` and `integers: int32`.

    Before::

        g (int64[2] ids, float[2] kv_0) => (int64[2] token, float[2] kv_0_out) {
            token = Neg(ids)
            kv_0_out = Neg(kv_0)
        }

    After::

        g (int32[2] input_ids, float[2] kv_0) => (int32[2] token, float[2] present_kv_0) {
            input_ids_int64 = Cast <to = 7> (input_ids)
            token_int64 = Neg(input_ids_int64)
            present_kv_0 = Neg(kv_0)
            token = Cast <to = 6> (token_int64)
        }

    A name with `*` is a pattern: each `*` stands for any text, which takes the place of the `*` in the new name. `to`
    renames what is recognised of a transformer's cache, ids, masks and states; `names` go before it. A name must be
    found in one of the models, or its new name must be there already.

    Keeps: the names of weights, nodes and everything inside; a value inside that has a new name gives way. Integers of
    inputs that a caller may leave out.

    Refuses: a new name that another input, output or weight has, and one name for two.

    Ids, masks, positions and lengths are the same numbers in 32 bits. What an int32 cannot hold (2,147,483,648 and
    more) wraps around in the new model; the check stops at a sample that has such a number.
    """

    effect = Effect.EXACT

    names: dict[Name, Name] = Field(
        default_factory=dict, description="New names by the present ones; `*` stands for any text and is carried over."
    )
    to: Literal["optimum", "transformers.exporters", "onnxruntime-genai"] | None = Field(
        None, description="Give encoders and decoders that are recognised the names that this tool gives them."
    )
    integers: Integer | None = Field(
        None,
        description="Take and give integers of this type instead of the other one of int32 and int64, by casts inside.",
    )

    @field_validator("names")
    @classmethod
    def _carry_over(cls, names: dict[str, str]) -> dict[str, str]:
        for old, new in names.items():
            if old.count("*") != new.count("*"):
                raise ValueError(f"{new!r} needs as many * as {old!r}, each of which is carried over")
        return names

    @model_validator(mode="after")
    def _is_something_to_do(self) -> RenameIo:
        if not (self.names or self.to or self.integers):
            raise ValueError("needs one of the options names, to and integers")
        return self

    def apply(self, bundle: Bundle, context: Callable[[str], Context]) -> Outcome:
        """Rewrite each model in turn, after a look at all of them for names that are in none."""
        models = [bundle[role] for role in self.roles(RoleUse.EDITS, tuple(bundle.models))]
        known = {name for model in models for name in interface_names(model)}
        for old, new in self.names.items():
            if not any(matches(old, name) or matches(new, name) for name in known):
                raise Refused(f"no input or output is called {old!r}{did_you_mean(old, known)}")
        if self.to is not None and all(recognise(model) is None for model in models):
            raise Refused(
                f"no model is recognised as an encoder or decoder, so there is nothing to name as in {self.to}",
                hint="names: {old: new}",
            )
        return super().apply(bundle, context)

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        """Rename what is asked for, then change integers."""
        named = rename_values(model, self.new_names(model))
        changed = change_integers(model, self.integers) if self.integers is not None else 0
        every = len(interface_names(model))
        said = [f"renamed {named} of {every} inputs and outputs"] if named else []
        if changed:
            said.append(f"{changed} of {every} inputs and outputs made {self.integers}")
        return Change(named + changed, ", ".join(said))

    def claims(self, before: Bundle, after: Bundle) -> Sequence[Claim]:
        """Every model answers as it did, under the new names and in the new integers."""
        edited = self.roles(RoleUse.EDITS, tuple(before.models))
        return [
            self._claim(role, before[role], after[role]) if role in edited else Claim.same(role)
            for role in after.models
            if role in before.models
        ]

    def new_names(self, model: ir.Model) -> dict[str, str]:
        """Return the new names of a model's inputs and outputs by the present ones, where they differ."""
        recognised = recognise(model) if self.to is not None else None
        presets = recognised.names(self.to) if recognised is not None and self.to is not None else {}
        found = {name: renamed(name, self.names) or presets.get(name, name) for name in interface_names(model)}
        return {old: new for old, new in found.items() if old != new}

    def _claim(self, role: str, before: ir.Model, after: ir.Model) -> Claim:
        names = self.new_names(before)
        program = Program(role)
        inputs = entries(before.graph.inputs, after.graph.inputs, names)
        return Claim(program, program, inputs, entries(before.graph.outputs, after.graph.outputs, names))


def interface_names(model: ir.Model) -> list[str]:
    """Return the names of inputs and outputs, each once."""
    return list(dict.fromkeys(value.name or "" for value in (*model.graph.inputs, *model.graph.outputs)))


def matches(pattern: str, name: str) -> re.Match[str] | None:
    """Match a name by a pattern in which each `*` stands for any text."""
    return re.fullmatch("(.*)".join(map(re.escape, pattern.split("*"))), name)


def renamed(name: str, names: Mapping[str, str]) -> str | None:
    """Return the new name by the first rule that fits; an exact name goes before patterns."""
    if name in names:
        return names[name]
    for old, new in names.items():
        match = matches(old, name)
        if match:
            texts = iter(match.groups())
            return re.sub(r"\*", lambda _: next(texts), new)  # noqa: B023
    return None


def entries(before: Sequence[ir.Value], after: Sequence[ir.Value], names: Mapping[str, str]) -> dict[str, Take]:
    """Return for each input or output that has changed what it is made of."""
    made: dict[str, Take] = {}
    for old, new in zip(before, after, strict=True):
        old_name, new_name = old.name or "", new.name or ""
        assert new_name == names.get(old_name, old_name)
        is_cast = old.dtype != new.dtype and new.dtype is not None
        edits = (CastTo(new.dtype.numpy().name),) if is_cast and new.dtype is not None else ()
        if (edits or old_name != new_name) and not is_optional(old):
            made[new_name] = Take(old_name, edits)
    return made


def is_optional(value: ir.Value) -> bool:
    """Tell an input that a caller may leave out, since the model has a value for it."""
    return value.is_graph_input() and value.is_initializer()


def change_integers(model: ir.Model, wanted: Integer) -> int:
    """Let a model take and give integers of another width, and return how many inputs and outputs that were."""
    graph = model.graph
    taken = value_names(graph)
    old = TYPES[OTHER[wanted]]
    inputs = [value for value in graph.inputs if value.dtype == old and is_plain(value)]
    outputs = [value for value in graph.outputs if value.dtype == old and is_plain(value)]
    for value in inputs:
        change_input(graph, value, wanted, taken)
    for value in outputs:
        if value not in inputs:
            change_output(graph, value, wanted, taken)
    return len(inputs) + len(outputs)


def is_plain(value: ir.Value) -> bool:
    """Tell a tensor that is fed or computed from an initializer and from what is no tensor."""
    return isinstance(value.type, ir.TensorType) and not value.is_initializer()


def change_input(graph: ir.Graph, value: ir.Value, wanted: Integer, taken: Counter[str]) -> None:
    """Put an input of another type before what used it; one that is an output as well comes out as it went in."""
    name = value.name or ""
    made = like(value, wanted)
    index = list(graph.inputs).index(value)
    for position, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[position] = made
    graph.inputs[index] = made
    if value.uses():
        inner = fresh_name(f"{name}_{OTHER[wanted]}", taken)
        cast = ir.node("Cast", [made], {"to": TYPES[OTHER[wanted]]}, name=f"{inner}/Cast")
        cast.outputs[0].name = inner
        cast.outputs[0].type, cast.outputs[0].shape = value.type, value.shape
        value.replace_all_uses_with(cast.outputs[0])
        put_first(graph, cast)


def change_output(graph: ir.Graph, value: ir.Value, wanted: Integer, taken: Counter[str]) -> None:
    """Put a cast after an output."""
    made = like(value, wanted)
    value.name = fresh_name(f"{value.name}_{OTHER[wanted]}", taken)
    cast = ir.node("Cast", [value], {"to": TYPES[wanted]}, outputs=[made], name=f"{value.name}/Cast")
    for position, output in enumerate(graph.outputs):
        if output is value:
            graph.outputs[position] = made
    graph.append(cast)


def like(value: ir.Value, wanted: Integer) -> ir.Value:
    """Return a value of the same name, shape and notes, of another type."""
    made = ir.Value(name=value.name, type=ir.TensorType(TYPES[wanted]), shape=value.shape, doc_string=value.doc_string)
    made.metadata_props.update(value.metadata_props)
    return made


def put_first(graph: ir.Graph, node: ir.Node) -> None:
    """Put a node before all others."""
    first = next(iter(graph), None)
    if first is None:
        graph.append(node)
    else:
        graph.insert_before(first, node)
