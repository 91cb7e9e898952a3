"""Claims as data: which program must answer like which other one, under which maps of inputs and outputs.

A claim is followed along a recipe by composing it with the next one; that is how the gap between the last step and the
source stays known after renaming, merging or wrapping.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import Enum

import numpy as np

from surgery.errors import SurgeryError

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
    """Convert to another element type, by its numpy name (`int32`, `float16`)."""

    dtype: str

    def __call__(self, array: np.ndarray) -> np.ndarray:
        return array.astype(self.dtype)


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
    """

    value: float | bool
    dtype: str
    shape: tuple[int | tuple[str, int], ...] = ()
    edits: tuple[Edit, ...] = ()

    def __call__(self, arrays: Arrays) -> np.ndarray:
        shape = [size if isinstance(size, int) else arrays[size[0]].shape[size[1]] for size in self.shape]
        array = np.full(shape, self.value, dtype=self.dtype)
        for edit in self.edits:
            array = edit(array)
        return array

    def after(self, inner: Mapping[str, Entry]) -> Entry:
        """Return this entry in terms of what `inner` is made of."""
        return dataclasses.replace(self, shape=tuple(_dimension_after(size, inner) for size in self.shape))


Entry = Take | Fill


def _dimension_after(size: int | tuple[str, int], inner: Mapping[str, Entry]) -> int | tuple[str, int]:
    if isinstance(size, int) or size[0] not in inner:
        return size
    entry = inner[size[0]]
    if isinstance(entry, Fill):
        return entry.shape[size[1]]
    return (entry.name, size[1])


@dataclass(frozen=True)
class Claim:
    """`candidate`, fed with `inputs`, gives `outputs` of `reference`.

    Args:
        reference: The program of the bundle before the step.
        candidate: The program of the bundle after it.
        inputs: For inputs of the candidate whose name or value differs, where they come from; the others go by their own
            names. An entry for an input that the candidate does not have is an error, and so is a missing one.
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

    def feed(self, arrays: Arrays, wanted: tuple[str, ...]) -> dict[str, np.ndarray]:
        """Return the candidate's inputs for the reference's.

        Args:
            arrays: The reference's inputs by name.
            wanted: The names of the candidate's inputs.
        """
        unknown = sorted(set(self.inputs) - set(wanted))
        if unknown:
            raise SurgeryError(f"the claim on {self.candidate} maps {unknown[0]!r}, which is not an input of it")
        missing = [name for name in wanted if name not in self.inputs and name not in arrays]
        if missing:
            raise SurgeryError(f"the claim on {self.candidate} says nothing of its input {missing[0]!r}")
        return {name: self.inputs[name](arrays) if name in self.inputs else arrays[name] for name in wanted}

    def expect(self, arrays: Arrays) -> dict[str, np.ndarray]:
        """Return what the candidate must give, for what the reference gave."""
        taken = {entry.name for entry in self.outputs.values() if isinstance(entry, Take)}
        kept = {name: array for name, array in arrays.items() if name not in self.drops and name not in taken}
        return kept | {name: entry(arrays) for name, entry in self.outputs.items()}

    def then(self, later: Claim) -> Claim:
        """Return the claim of `later`'s candidate on this claim's reference."""
        assert self.candidate == later.reference
        dropped = self.drops | {name for name in later.drops if name not in self.outputs}
        return Claim(
            self.reference,
            later.candidate,
            inputs=self._inputs_then(later),
            outputs=self._outputs_then(later),
            drops=frozenset(dropped),
            extra=later.extra | (self.extra - later.drops),
            measure=Measure.TOKENS if Measure.TOKENS in (self.measure, later.measure) else Measure.TENSORS,
        )

    def _inputs_then(self, later: Claim) -> dict[str, Entry]:
        taken = {entry.name for entry in later.inputs.values() if isinstance(entry, Take)}
        passed_on = {name: entry for name, entry in self.inputs.items() if name not in taken and name not in later.inputs}
        return passed_on | {name: entry.after(self.inputs) for name, entry in later.inputs.items()}

    def _outputs_then(self, later: Claim) -> dict[str, Entry]:
        taken = {entry.name for entry in later.outputs.values() if isinstance(entry, Take)}
        passed_on = {
            name: entry
            for name, entry in self.outputs.items()
            if name not in taken and name not in later.outputs and name not in later.drops
        }
        return passed_on | {name: entry.after(self.outputs) for name, entry in later.outputs.items()}
