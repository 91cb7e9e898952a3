"""The weights of a model: how many, how large, in which layer, in which file."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx_ir as ir

from surgery.graphs import constant_tensor
from surgery.report.inspection.counting import Scope
from surgery.report.inspection.found import FileUse, Tally, Unused
from surgery.report.inspection.layers import layer_of
from surgery.storage import Region, key_of
from surgery.storage.opening import AbsentFile


@dataclass(frozen=True)
class Weight:
    """An initializer, or the value of a `Constant` node.

    Args:
        name: The name of the value.
        tensor: Its content.
        place: Where it stands: `initializers`, `initializers of subgraphs`, `constants`, `functions`.
        layer: The layer that it is of.
        is_used: Something reads it, or it is an output.
    """

    name: str
    tensor: ir.TensorProtocol
    place: str
    layer: str
    is_used: bool

    @property
    def is_absent(self) -> bool:
        """Its bytes are not to be had."""
        return isinstance(self.tensor, Region) and isinstance(self.tensor.file, AbsentFile)


def weights_of(scopes: Iterable[Scope]) -> list[Weight]:
    """Return the weights in the order of the graphs."""
    return [weight for scope in scopes for weight in _weights_in(scope)]


def _weights_in(scope: Scope) -> Iterator[Weight]:
    inner = "functions" if scope.is_function else "initializers of subgraphs" if scope.depth else ""
    for value in scope.graph.initializers.values():
        if value.const_value is not None:
            yield _weight(value, value.const_value, inner or "initializers")
    for node in scope.graph:
        tensor = constant_tensor(node)
        if tensor is not None:
            yield _weight(node.outputs[0], tensor, "functions" if scope.is_function else "constants")


def _weight(value: ir.Value, tensor: ir.TensorProtocol, place: str) -> Weight:
    is_used = bool(value.uses()) or value.is_graph_output()
    return Weight(value.name or "", tensor, place, layer_of(value, tensor), is_used)


def tally(name: str, weights: Iterable[Weight]) -> Tally:
    """Count weights together."""
    tensors = [weight.tensor for weight in weights]
    return Tally(name, len(tensors), sum(tensor.size for tensor in tensors), sum(tensor.nbytes for tensor in tensors))


def tallies(weights: Iterable[Weight], name_of: Callable[[Weight], str]) -> list[Tally]:
    """Count weights by what they have in common, in the order in which it is first met."""
    groups: dict[str, list[Weight]] = {}
    for weight in weights:
        groups.setdefault(name_of(weight), []).append(weight)
    return [tally(name, group) for name, group in groups.items()]


def by_dtype(weights: Iterable[Weight]) -> list[Tally]:
    """Count weights by element type, the largest first."""
    found = tallies(weights, lambda weight: weight.tensor.dtype.name.lower())
    return sorted(found, key=lambda one: -one.bytes)


def unused(weights: Iterable[Weight]) -> list[Unused]:
    """Return the initializers that nothing reads, the largest first."""
    found = [Unused(weight.name, weight.tensor.nbytes) for weight in weights if not weight.is_used]
    return sorted(found, key=lambda one: -one.bytes)


def files(held: Mapping[Path, Sequence[Weight]]) -> list[FileUse]:
    """Return the files that weights lie in, first the model files.

    Args:
        held: The weights by model file.
    """
    groups: dict[tuple[str, bool], list[Weight]] = {(str(model_file), False): [] for model_file in held}
    for model_file, weights in held.items():
        for weight in weights:
            groups.setdefault(_file_of(weight, str(model_file)), []).append(weight)
    models = {str(model_file) for model_file in held}
    return [
        FileUse(
            path,
            path in models,
            is_missing,
            None if is_missing else Path(path).stat().st_size,
            len(group),
            stored_bytes(group),
        )
        for (path, is_missing), group in groups.items()
        if group
    ]


def _file_of(weight: Weight, model_file: str) -> tuple[str, bool]:
    """Return the path of the file with a weight's bytes, and whether it is missing."""
    if not isinstance(weight.tensor, Region) or not weight.tensor.path:
        return model_file, False
    return weight.tensor.path, weight.is_absent


def stored_bytes(weights: Iterable[Weight]) -> int:
    """Return how many bytes weights take, those that share a place counted once."""
    once = {place_of(weight): weight.tensor.nbytes for weight in weights}
    return sum(once.values())


def place_of(weight: Weight) -> Hashable:
    """Return what two weights have in common that are the same bytes on disk, or the same object in memory."""
    return id(weight.tensor) if weight.is_absent else key_of(weight.tensor)
