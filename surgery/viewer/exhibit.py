"""A model as Netron gets it: the graph at once, each weight when somebody looks at it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from surgery.errors import ModelFileError
from surgery.storage import MIN_DATA_BYTES, ByteReader, Region, open_model
from surgery.storage.hollow import Stub, Weight, hollow

# A graph that cannot be opened is shown as its file is; beyond this it is its weights that make it big.
_SHOWN_AS_IT_IS_BYTES = 64 << 20


@dataclass(frozen=True)
class Exhibit:
    """A model to look at.

    Args:
        graph: The serialised model; each weight of 1 kB or more is external, at a location of its own.
        weights: Their bytes by location.
        note: Why external weights cannot be shown, if so.
    """

    graph: bytes
    weights: Mapping[str, ByteReader] = field(default_factory=dict)
    note: str = ""


def exhibit(path: Path) -> Exhibit:
    """Prepare a model for Netron, which would read a single file whole and, for one weight, a whole data file.

    A model that cannot be opened, because its data file is missing for example, is shown as it is.

    Raises:
        ModelFileError: This is not an ONNX model, or one of more than 64 MB that cannot be opened.
    """
    try:
        model = open_model(path)
        shelf = _Shelf()
        proto = hollow(model, shelf.place, min_bytes=1)
    except ModelFileError as error:
        return _as_it_is(path, error)
    return Exhibit(proto.SerializeToString(), shelf.weights)


class _Shelf:
    """The weights of a model by location; the location is what Netron's side bar says of where a weight is."""

    def __init__(self) -> None:
        self.weights: dict[str, ByteReader] = {}
        self._names: dict[str, str] = {}

    def place(self, weight: Weight) -> Stub | None:
        tensor = weight.tensor
        # Netron 9 does not look for external data in functions.
        if not isinstance(tensor, Region) or tensor.length < MIN_DATA_BYTES or weight.is_in_function:
            return None
        location = f"{self._name(tensor.path)}, bytes {tensor.offset} to {tensor.offset + tensor.length}"
        self.weights[location] = tensor
        return Stub(location, 0, tensor.length)

    def _name(self, path: str) -> str:
        """Return a data file's name, without what means something in a URL; two files of one name are told apart."""
        if path not in self._names:
            name = re.sub(r"[^\w.+-]", "_", Path(path).name)
            count = sum(other.partition(" ")[0] == name for other in self._names.values())
            self._names[path] = f"{name} ({count + 1})" if count else name
        return self._names[path]


def _as_it_is(path: Path, error: ModelFileError) -> Exhibit:
    try:
        if path.stat().st_size > _SHOWN_AS_IT_IS_BYTES:
            raise error
        content = path.read_bytes()
        proto = onnx.ModelProto.FromString(content)
    except (OSError, DecodeError):
        raise error from None
    if not proto.HasField("graph"):
        raise error
    return Exhibit(content, note=f"shown as it is, without external weights: {error.message}")
