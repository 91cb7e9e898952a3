"""The protobuf wire format of ONNX files: weights are cut out of a file and put back without parsing them."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import NamedTuple

import onnx
import onnx_ir as ir

from surgery.errors import ModelFileError
from surgery.storage.region import Window

MARKER = "\0surgery"
"""The location that stands for "the bytes were here": no real file name holds a NUL."""

Chunk = bytes | memoryview | ir.TensorProtocol

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5
# As protobuf's own limit: a file that nests deeper was made to break parsers.
_MAX_DEPTH = 100
_MARKER_BYTES = MARKER.encode()


def _numbers(message: type) -> Mapping[str, int]:
    return MappingProxyType({field.name: field.number for field in message.DESCRIPTOR.fields})  # type: ignore[attr-defined]


def _walked_fields() -> Mapping[str, Mapping[int, str]]:
    """Which fields of which messages lead to tensors, from onnx's own descriptors."""
    walked = (
        onnx.ModelProto,
        onnx.GraphProto,
        onnx.FunctionProto,
        onnx.NodeProto,
        onnx.AttributeProto,
        onnx.TensorProto,
    )
    names = {message.DESCRIPTOR.name for message in walked}
    return MappingProxyType(
        {
            message.DESCRIPTOR.name: {
                field.number: field.message_type.name
                for field in message.DESCRIPTOR.fields
                if field.message_type is not None and field.message_type.name in names
            }
            for message in walked
        }
    )


_CHILDREN = _walked_fields()
_TENSOR = _numbers(onnx.TensorProto)
# The packed form of these fields is, byte for byte, what raw_data would hold.
_PACKED_LIKE_RAW = {
    _TENSOR["float_data"]: {onnx.TensorProto.FLOAT, onnx.TensorProto.COMPLEX64},
    _TENSOR["double_data"]: {onnx.TensorProto.DOUBLE, onnx.TensorProto.COMPLEX128},
}
_VALUE_FIELDS = {
    _TENSOR[name]
    for name in ("raw_data", "float_data", "double_data", "int32_data", "int64_data", "uint64_data", "string_data")
}


@dataclass(frozen=True, slots=True)
class Payload:
    """The bytes of a tensor inside a file."""

    offset: int
    length: int


class _Field(NamedTuple):
    start: int
    number: int
    wire_type: int
    body: int
    stop: int


def lift(buffer: memoryview | Window, *, path: str, min_bytes: int = 1024) -> tuple[bytes, list[Payload]]:
    """Cut the big tensors out of a serialised ModelProto.

    Args:
        buffer: The file; only the bytes between the payloads are looked at.
        path: The file's name, for errors.
        min_bytes: What is smaller stays where it is.

    Returns:
        The model with each big payload replaced by an external reference (location `MARKER`, offset and length in the
        file), and the payloads.

    Raises:
        ModelFileError: If the bytes are not protobuf.
    """
    lifter = _Lifter(buffer, path, max(min_bytes, 1))
    chunks = lifter.message("ModelProto", 0, len(buffer), 0)
    slim = bytes(buffer[:]) if chunks is None else b"".join(chunks)
    return slim, lifter.payloads


def inline(slim: bytes, payload_of: Callable[[int], ir.TensorProtocol]) -> list[Chunk]:
    """Put tensors back into a serialised model, as chunks to be written one after the other.

    Args:
        slim: A serialised ModelProto in which some tensors are external at location `MARKER`.
        payload_of: From such a reference's offset to the tensor whose bytes belong there.

    Returns:
        Bytes, and in between the tensors themselves: the writer streams them, so nothing big is ever in memory.
    """
    inliner = _Inliner(slim, payload_of)
    chunks = inliner.message("ModelProto", 0, len(slim))
    return [slim] if chunks is None else chunks


def size_of(chunks: Sequence[Chunk]) -> int:
    """Return how many bytes the chunks come to."""
    return sum(len(chunk) if isinstance(chunk, (bytes, memoryview)) else chunk.nbytes for chunk in chunks)


class _Lifter:
    def __init__(self, buffer: memoryview | Window, path: str, min_bytes: int) -> None:
        self.buffer = buffer
        self.path = path
        self.min_bytes = min_bytes
        self.payloads: list[Payload] = []

    def message(self, kind: str, start: int, end: int, depth: int) -> list[bytes] | None:
        """Return the message without its payloads, `None` if it has none."""
        if kind == "TensorProto":
            return self.tensor(start, end)
        if depth > _MAX_DEPTH:
            raise self.error(start, f"is nested deeper than {_MAX_DEPTH} levels")
        children, buffer, min_bytes = _CHILDREN[kind], self.buffer, self.min_bytes
        chunks: list[bytes] = []
        position = copied = start
        while position < end:
            field = self.field(position, end)
            position = field.stop
            child = children.get(field.number)
            if child is None or field.wire_type != _BYTES or field.stop - field.body < min_bytes:
                continue
            lifted = self.message(child, field.body, field.stop, depth + 1)
            if lifted is None:
                continue
            chunks.append(bytes(buffer[copied : field.start]))
            chunks.append(_header(field.number, sum(map(len, lifted))))
            chunks.extend(lifted)
            copied = field.stop
        if copied == start:
            return None
        chunks.append(bytes(buffer[copied:end]))
        return chunks

    def tensor(self, start: int, end: int) -> list[bytes] | None:
        """Return the tensor with a reference instead of its bytes, `None` if it stays as it is."""
        values: list[_Field] = []
        element_type = 0
        position = start
        while position < end:
            field = self.field(position, end)
            position = field.stop
            if field.number in _VALUE_FIELDS:
                values.append(field)
            elif field.number == _TENSOR["data_type"] and field.wire_type == _VARINT:
                element_type = self.varint(field.body, end)[0]
            elif field.number == _TENSOR["data_location"] and field.wire_type == _VARINT and self.buffer[field.body]:
                return None
        if len(values) != 1 or not self.is_raw(values[0], element_type):
            return None
        payload = Payload(values[0].body, values[0].stop - values[0].body)
        self.payloads.append(payload)
        before, after = self.buffer[start : values[0].start], self.buffer[values[0].stop : end]
        return [bytes(before), bytes(after), _reference(payload.offset, payload.length)]

    def is_raw(self, field: _Field, element_type: int) -> bool:
        if field.wire_type != _BYTES or field.stop - field.body < self.min_bytes:
            return False
        if field.number == _TENSOR["raw_data"]:
            return element_type not in (onnx.TensorProto.UNDEFINED, onnx.TensorProto.STRING)
        return element_type in _PACKED_LIKE_RAW.get(field.number, ())

    def field(self, start: int, end: int) -> _Field:
        tag, body = self.varint(start, end)
        number, wire_type = tag >> 3, tag & 7
        if number == 0:
            raise self.error(start, "has field number 0")
        if wire_type == _VARINT:
            return _Field(start, number, wire_type, body, self.varint(body, end)[1])
        if wire_type == _BYTES:
            length, body = self.varint(body, end)
            stop = body + length
        elif wire_type == _FIXED32:
            stop = body + 4
        elif wire_type == _FIXED64:
            stop = body + 8
        else:
            raise self.error(start, f"has wire type {wire_type}, which ONNX does not use")
        if stop > end:
            raise self.error(start, f"has a field that ends at byte {stop:,}, beyond its message's end at byte {end:,}")
        return _Field(start, number, wire_type, body, stop)

    def varint(self, position: int, end: int) -> tuple[int, int]:
        """Return the number and where it stops."""
        value = shift = 0
        start = position
        while position < end:
            byte = self.buffer[position]
            position += 1
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value, position
            shift += 7
            if shift > 63:
                raise self.error(start, "has a number of more than 64 bits")
        raise self.error(start, "stops in the middle of a number")

    def error(self, position: int, what: str) -> ModelFileError:
        return ModelFileError(
            f"{self.path}: is not an ONNX model, or only a part of one: byte {position:,} {what}",
            hint="download or export the file again",
        )


class _Inliner(_Lifter):
    def __init__(self, slim: bytes, payload_of: Callable[[int], ir.TensorProtocol]) -> None:
        super().__init__(memoryview(slim), "skeleton", 1)
        self.payload_of = payload_of
        self.marks = _find_all(slim, _MARKER_BYTES)

    def message(self, kind: str, start: int, end: int, depth: int = 0) -> list[Chunk] | None:  # type: ignore[override]
        """Return the message with its payloads, `None` if it has none."""
        if not self.has_mark(start, end):
            return None
        if kind == "TensorProto":
            return self.filled_tensor(start, end)
        chunks: list[Chunk] = []
        position = copied = start
        while position < end:
            field = self.field(position, end)
            position = field.stop
            child = _CHILDREN[kind].get(field.number)
            filled = self.message(child, field.body, field.stop) if child and field.wire_type == _BYTES else None
            if filled is None:
                continue
            chunks += [self.buffer[copied : field.start], _header(field.number, size_of(filled)), *filled]
            copied = field.stop
        chunks.append(self.buffer[copied:end])
        return chunks

    def filled_tensor(self, start: int, end: int) -> list[Chunk] | None:
        proto = onnx.TensorProto.FromString(bytes(self.buffer[start:end]))
        reference = {entry.key: entry.value for entry in proto.external_data}
        if reference.get("location") != MARKER:
            return None
        tensor = self.payload_of(int(reference["offset"]))
        proto.ClearField("external_data")
        proto.ClearField("data_location")
        return [proto.SerializeToString(), _header(_TENSOR["raw_data"], tensor.nbytes), tensor]

    def has_mark(self, start: int, end: int) -> bool:
        index = bisect_left(self.marks, start)
        return index < len(self.marks) and self.marks[index] < end


def _find_all(content: bytes, part: bytes) -> list[int]:
    found: list[int] = []
    position = content.find(part)
    while position >= 0:
        found.append(position)
        position = content.find(part, position + len(part))
    return found


def _header(number: int, length: int) -> bytes:
    return _varint_bytes(number << 3 | _BYTES) + _varint_bytes(length)


def _varint_bytes(value: int) -> bytes:
    out = bytearray()
    while value > 0x7F:
        out.append(value & 0x7F | 0x80)
        value >>= 7
    out.append(value)
    return bytes(out)


def _reference(offset: int, length: int) -> bytes:
    """Return the fields of a TensorProto that say "the bytes are outside": appended, they win over earlier ones."""
    stub = onnx.TensorProto(data_location=onnx.TensorProto.EXTERNAL)
    for key, value in (("location", MARKER), ("offset", str(offset)), ("length", str(length))):
        stub.external_data.add(key=key, value=value)
    return stub.SerializeToString()  # type: ignore[no-any-return]
