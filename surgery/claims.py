"""Claims as data: which program must answer like which other one, under which maps of inputs and outputs.

A claim is followed along a recipe by composing it with the next one; that is how the gap between the last step and the
source stays known after renaming, merging or wrapping.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from typing import TypeAlias

import numpy as np

from surgery.errors import SurgeryError
from surgery.options import did_you_mean

Arrays = Mapping[str, np.ndarray]


class Measure(Enum):
    """What is compared: the tensors that come out, or the tokens of a generation."""

    TENSORS = "tensors"
    TOKENS = "tokens"


@dataclass(frozen=True)
class Program:
    """Something that can be run on named arrays: one model of a bundle, by its role."""

    role: str

    @property
    def roles(self) -> tuple[str, ...]:
        """The models that it runs."""
        return (self.role,)

    def __str__(self) -> str:
        return self.role


@dataclass(frozen=True)
class HostLoop:
    """A named loop on the host over several models, such as greedy generation over `prefill` and `decode`.

    Inputs are `input_ids` and `attention_mask` [batch, prompt] and the scalar `max_new_tokens`; the output is
    `sequences` [batch, new tokens]. `surgery.runtime.loops` holds the loops by name.
    """

    name: str
    roles: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.name} over {' + '.join(self.roles)}"


AnyProgram = Program | HostLoop


@dataclass(frozen=True)
class Slice:
    """Keep `start:stop` of one axis."""

    axis: int
    start: int | None = None
    stop: int | None = None

    def __call__(self, array: np.ndarray) -> np.ndarray:
        index = [slice(None)] * array.ndim
        index[self.axis] = slice(self.start, self.stop)
        return array[tuple(index)]


@dataclass(frozen=True)
class CastTo:
    """Convert to another element type, by its numpy name (`int32`, `float16`); an integer must be the same in it."""

    dtype: str

    def __call__(self, array: np.ndarray) -> np.ndarray:
        made = array.astype(self.dtype)
        if array.dtype.kind in "iu" and made.dtype.kind in "iu" and not np.array_equal(made, array):
            raise OverflowError(f"it holds {array[made != array].flat[0]}, which is no {self.dtype}")
        return made


Edit = Slice | CastTo


@dataclass(frozen=True)
class Take:
    """The tensor of that name on the reference's side, edited in turn."""

    name: str
    edits: tuple[Edit, ...] = ()

    def __call__(self, arrays: Arrays) -> np.ndarray:
        array = arrays[self.name]
        for edit in self.edits:
            array = edit(array)
        return array

    def after(self, inner: Mapping[str, Entry]) -> Entry:
        """Return this entry in terms of what `inner` is made of."""
        entry = inner.get(self.name)
        if entry is None:
            return self
        return dataclasses.replace(entry, edits=entry.edits + self.edits)


@dataclass(frozen=True)
class Fill:
    """A tensor of one value; a dimension is a number or (input of the reference, axis).

    `Fill(True, "bool", (1,))` fixes a flag; `Fill(0, "float32", (("input_ids", 0), 12, 0, 64))` is an empty cache.
    Once claims are composed, an entry may stand where the input's name stood.
    """

    value: float | bool | str
    dtype: str
    shape: tuple[Dimension, ...] = ()
    edits: tuple[Edit, ...] = ()

    def __call__(self, arrays: Arrays) -> np.ndarray:
        array = np.full([_size(dimension, arrays) for dimension in self.shape], self.value, dtype=self.dtype)
        for edit in self.edits:
            array = edit(array)
        return array

    def after(self, inner: Mapping[str, Entry]) -> Entry:
        """Return this entry in terms of what `inner` is made of."""
        return dataclasses.replace(self, shape=tuple(_dimension_after(dimension, inner) for dimension in self.shape))


Entry = Take | Fill
Dimension: TypeAlias = "int | tuple[str | Entry, int]"


def _size(dimension: Dimension, arrays: Arrays) -> int:
    if isinstance(dimension, int):
        return dimension
    source, axis = dimension
    array = arrays[source] if isinstance(source, str) else source(arrays)
    return int(array.shape[axis])


def _dimension_after(dimension: Dimension, inner: Mapping[str, Entry]) -> Dimension:
    if isinstance(dimension, int):
        return dimension
    source, axis = dimension
    if isinstance(source, str):
        return (inner.get(source, source), axis)
    return (source.after(inner), axis)


@dataclass(frozen=True)
class Claim:
    """`candidate`, fed with `inputs`, gives `outputs` of `reference`.

    Args:
        reference: The program of the bundle before the step.
        candidate: The program of the bundle after it.
        inputs: For inputs of the candidate whose name or value differs, where they come from; the others go by their
            own names. An entry for an input that the candidate does not have is an error, and so is a missing one.
        outputs: For outputs of the candidate, what they are in terms of the reference's outputs; the others go by their
            own names.
        drops: Outputs of the reference that the candidate does not give any more.
        extra: Outputs of the candidate that the reference does not give.
        measure: What is compared.
    """

    reference: AnyProgram
    candidate: AnyProgram
    inputs: Mapping[str, Entry] = field(default_factory=dict)
    outputs: Mapping[str, Entry] = field(default_factory=dict)
    drops: frozenset[str] = frozenset()
    extra: frozenset[str] = frozenset()
    measure: Measure = Measure.TENSORS

    @classmethod
    def same(cls, role: str) -> Claim:
        """The default claim: the model still answers as it did."""
        return cls(Program(role), Program(role))

    @property
    def is_same(self) -> bool:
        """The program goes by its own name and its interface is what it was."""
        return self.reference == self.candidate and not (self.inputs or self.outputs or self.drops or self.extra)

    def origin(self, output: str) -> str:
        """Return the output of the reference that an output of the candidate is made of, or its own name."""
        entry = self.outputs.get(output)
        return entry.name if isinstance(entry, Take) else output

    def refuse_unknown_inputs(self, wanted: Sequence[str]) -> None:
        """Prove that every entry is for an input that the candidate has.

        Args:
            wanted: The names of the candidate's inputs.

        Raises:
            SurgeryError: An entry is for something else.
        """
        unknown = sorted(set(self.inputs) - set(wanted))
        if unknown:
            raise SurgeryError(
                f"the claim on {self.candidate} maps {unknown[0]!r}, which is not an input of it"
                f"{did_you_mean(unknown[0], wanted)}"
            )

    def feed(self, arrays: Arrays, wanted: Sequence[str]) -> dict[str, np.ndarray]:
        """Return the candidate's inputs for the reference's.

        A composed claim may hold entries for inputs that a later step has done away with; they are not used.

        Args:
            arrays: The reference's inputs by name.
            wanted: The names of the candidate's inputs.

        Raises:
            SurgeryError: Nothing is said of an input, or it is made of one that the reference does not have.
        """
        missing = [name for name in wanted if name not in self.inputs and name not in arrays]
        if missing:
            raise SurgeryError(
                f"the claim on {self.candidate} says nothing of its input {missing[0]!r}",
                hint="an entry in the inputs of the Claim that the pass makes",
            )
        return {
            name: self._made("input", name, self.inputs[name], arrays) if name in self.inputs else arrays[name]
            for name in wanted
        }

    def expect(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Return what the candidate must give, for what the reference gave.

        Raises:
            SurgeryError: An output is made of one that the reference does not give.
        """
        gone = self.drops | _taken(self.outputs)
        kept = {name: array for name, array in arrays.items() if name not in gone}
        return kept | {name: self._made("output", name, entry, arrays) for name, entry in self.outputs.items()}

    def _made(self, kind: str, name: str, entry: Entry, arrays: Arrays) -> np.ndarray:
        try:
            return entry(arrays)
        except KeyError as error:
            reason = f"{self.reference} has no {kind} {error.args[0]!r}"
        except IndexError:
            reason = "what it is made of has fewer axes"
        except OverflowError as error:
            reason = str(error)
        raise SurgeryError(f"the claim on {self.candidate} cannot make the {kind} {name!r}: {reason}")

    def then(self, later: Claim) -> Claim:
        """Return the claim of `later`'s candidate on this claim's reference."""
        assert self.candidate == later.reference
        is_tokens = Measure.TOKENS in (self.measure, later.measure)
        new = {name for name, entry in later.outputs.items() if isinstance(entry, Take) and entry.name in self.extra}
        gone = later.drops | _taken(later.outputs) | set(later.outputs)
        kept = {name: entry for name, entry in self.outputs.items() if name not in gone}
        edited = {name: entry.after(self.outputs) for name, entry in later.outputs.items() if name not in new}
        return Claim(
            self.reference,
            later.candidate,
            inputs={**self.inputs, **{name: entry.after(self.inputs) for name, entry in later.inputs.items()}},
            outputs=kept | edited,
            # What this claim renames is not given by its own name, also once the new name is dropped.
            drops=self.drops | _taken(self.outputs) | (later.drops - set(self.outputs) - self.extra),
            extra=later.extra | (self.extra - gone) | new,
            measure=Measure.TOKENS if is_tokens else Measure.TENSORS,
        )


def _taken(entries: Mapping[str, Entry]) -> frozenset[str]:
    return frozenset(entry.name for entry in entries.values() if isinstance(entry, Take))
