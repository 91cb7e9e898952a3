"""What a merged model takes and gives: the inputs and outputs of both sides, matched by name."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import onnx_ir as ir

from surgery.claims import Claim, Dimension, Entry, Fill, Program
from surgery.errors import Refused

Size = int | str | None
Sizes = tuple[Size, ...]


Givers = Mapping[str, ir.Value]
"""The values of one name, by the role of the side that has it."""


@dataclass(frozen=True)
class Interface:
    """The inputs and outputs of two models by name, in the order in which the merged model has them."""

    inputs: Mapping[str, Givers]
    outputs: Mapping[str, Givers]
    doubtful: frozenset[str] = frozenset()
    """Names of axes that both sides use and nothing says mean the same in both."""

    @classmethod
    def of(cls, models: Mapping[str, ir.Model]) -> Interface:
        """Match two models.

        Raises:
            Refused: Values of one name have different types or ranks, inputs of one name different defaults, or what
                only one side has cannot be left out.
        """
        inputs = _matched({role: model.graph.inputs for role, model in models.items()})
        outputs = _matched({role: model.graph.outputs for role, model in models.items()})
        made = cls(inputs, outputs, _doubtful_names(models, inputs))
        for name, givers in made.inputs.items():
            if len(givers) == 1:
                _refuse_no_tensor(name, givers)
            _refuse_two_types("input", name, givers)
            _refuse_two_ranks("input", name, givers)
            _refuse_two_defaults(name, givers)
        for name, givers in made.outputs.items():
            _refuse_two_types("output", name, givers)
            _refuse_two_ranks("output", name, givers)
            _refuse_mixed_up(name, givers, made.inputs)
        return made

    @property
    def computed(self) -> dict[str, ir.Value]:
        """The outputs that are no inputs, each as one side has it."""
        return {name: next(iter(givers.values())) for name, givers in self.outputs.items() if name not in self.inputs}

    def shape(self, givers: Givers) -> ir.Shape | None:
        """Return what is true of the shape of an input or output, whichever side runs.

        An axis keeps its size or name where both sides agree on it. A name is a promise, so the caller who feeds an
        input for the side that does not run would have to keep it too: there a doubtful name is left out.
        """
        shape = common_shape(tuple(givers.values()))
        if shape is None or len(givers) > 1:
            return shape
        return ir.Shape([None if size in self.doubtful else size for size in sizes_of_shape(shape)])


def _doubtful_names(models: Mapping[str, ir.Model], inputs: Mapping[str, Givers]) -> frozenset[str]:
    """Return the names of axes that both sides use, but for those of one axis of an input that both take."""
    first, second = (
        {size for value in (*model.graph.inputs, *model.graph.outputs) for size in sizes_of(value)}
        for model in models.values()
    )
    shared = (zip(*map(sizes_of, givers.values()), strict=False) for givers in inputs.values() if len(givers) > 1)
    tied = {sizes[0] for axes in shared for sizes in axes if len(set(sizes)) == 1}
    return frozenset(size for size in (first & second) - tied if isinstance(size, str))


def _matched(sides: Mapping[str, Sequence[ir.Value]]) -> dict[str, Givers]:
    """Return values by name, in the order of the side that has more, then what only the other has."""
    by_name = {role: {str(value.name): value for value in values} for role, values in sides.items()}
    names = [*max(by_name.values(), key=len), *(name for values in by_name.values() for name in values)]
    return {name: {role: values[name] for role, values in by_name.items() if name in values} for name in names}


def _refuse_no_tensor(name: str, givers: Givers) -> None:
    role, value = next(iter(givers.items()))
    if not isinstance(value.type, ir.TensorType) or value.shape is None:
        raise Refused(
            f"the input {name!r}, which only {role!r} takes, is no tensor of known rank, so it cannot be fed empty "
            "when the other runs"
        )


def _refuse_two_types(kind: str, name: str, givers: Givers) -> None:
    types = {role: value.type for role, value in givers.items()}
    if len(set(map(repr, types.values()))) > 1:
        said = " and ".join(f"{_type_text(type_)} in {role!r}" for role, type_ in types.items())
        raise Refused(
            f"the {kind} {name!r} is {said}",
            hint="cast one of them, or give it another name with rename_io, before the models are merged",
        )


def _type_text(type_: ir.TypeProtocol | None) -> str:
    return type_.dtype.name.lower() if isinstance(type_, ir.TensorType) else str(type_)


def _refuse_two_ranks(kind: str, name: str, givers: Givers) -> None:
    ranks = {role: len(value.shape) for role, value in givers.items() if value.shape is not None}
    if len(set(ranks.values())) > 1:
        said = " and ".join(f"{rank} axes in {role!r}" for role, rank in ranks.items())
        raise Refused(f"the {kind} {name!r} has {said}", hint="give one of them another name with rename_io")


def _refuse_mixed_up(name: str, givers: Givers, inputs: Mapping[str, Givers]) -> None:
    computed = [role for role, value in givers.items() if not value.is_graph_input()]
    if name in inputs and computed:
        raise Refused(
            f"{name!r} is an output that {computed[0]!r} computes and an input of {next(iter(inputs[name]))!r}",
            hint="give one of them another name with rename_io",
        )


def _refuse_two_defaults(name: str, givers: Givers) -> None:
    if len({_default(value) for value in givers.values()}) > 1:
        raise Refused(
            f"the input {name!r} has another default value in {' than in '.join(map(repr, givers))}, or none",
            hint="make the defaults the same, or give one of the inputs another name with rename_io",
        )


def _default(value: ir.Value) -> tuple[Hashable, ...] | None:
    """Return what decides whether two defaults of one type are the same: equal bytes may have two shapes."""
    tensor = value.const_value
    if tensor is None:
        return None
    is_text = tensor.dtype == ir.DataType.STRING
    return (*tensor.shape.numpy(), tuple(tensor.numpy().ravel().tolist()) if is_text else tensor.tobytes())


def common_shape(values: Sequence[ir.Value]) -> ir.Shape | None:
    """Return what is true of the shapes of several values; an axis on which they differ has no name."""
    shapes = [value.shape for value in values]
    if any(shape is None for shape in shapes) or len({len(shape) for shape in shapes if shape is not None}) != 1:
        return None
    return ir.Shape([_common_size(sizes) for sizes in zip(*map(sizes_of, values), strict=True)])


def _common_size(sizes: Sequence[Size]) -> Size:
    """Return the size on which all agree; of `sequence` and `past + sequence` the latter, which holds for no past."""
    if len(set(sizes)) == 1:
        return sizes[0]
    names = [size for size in sizes if isinstance(size, str)]
    if len(names) < len(sizes):
        return None
    longest = max(names, key=len)
    terms = longest.split(" + ")
    return longest if all(name in (longest, terms[-1]) for name in names) else None


def sizes_of(value: ir.Value) -> Sizes:
    """Return the sizes of a value's axes: a number, a name, or None for one that has neither."""
    return sizes_of_shape(value.shape or ())


def sizes_of_shape(shape: Iterable[int | ir.SymbolicDim]) -> Sizes:
    """Return sizes as numbers, names, or None."""
    return tuple(size if isinstance(size, int) else size.value for size in shape)


def branch_claim(before: ir.Model, interface: Interface, role: str, merged: str, flag: Mapping[str, Entry]) -> Claim:
    """Return the claim that a merged model answers as one of its sides.

    What only the other side takes is fed with zeros: as many as its fixed axes and the axes that it has in common with
    the inputs of this side ask for, and none along the others. What only the other side gives is not looked at.
    """
    known = {
        size: (str(value.name), axis)
        for value in reversed(before.graph.inputs)
        for axis, size in enumerate(sizes_of(value))
        if isinstance(size, str)
    }
    foreign = {
        name: givers
        for name, givers in interface.inputs.items()
        if role not in givers and all(value.const_value is None for value in givers.values())
    }
    zeros = {name: _zeros(interface, givers, known) for name, givers in foreign.items()}
    extra = frozenset(name for name, givers in interface.outputs.items() if role not in givers)
    return Claim(Program(role), Program(merged), inputs={**zeros, **flag}, extra=extra)


def _zeros(interface: Interface, givers: Givers, known: Mapping[str, tuple[str, int]]) -> Fill:
    dtype, shape = next(iter(givers.values())).dtype, interface.shape(givers)
    assert dtype is not None
    assert shape is not None
    sizes = sizes_of_shape(shape)
    dimensions: list[Dimension] = [size if isinstance(size, int) else known.get(size or "", 0) for size in sizes]
    zero = False if dtype == ir.DataType.BOOL else "" if dtype == ir.DataType.STRING else 0
    return Fill(zero, str(dtype.numpy()), tuple(dimensions))
