"""Models as ONNX text: drawn in tests and templates, written in one canonical form to compare and to show."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from itertools import chain
from textwrap import dedent
from typing import TypeAlias

import numpy as np
import onnx
import onnx.parser
import onnx.printer
import onnx_ir as ir

from surgery.storage import bytes_reader
from surgery.storage.hollow import Stub, Weight, hollow

# What a graph gets that is drawn without a header: operators of today's exporters, and what they need.
DEFAULT_IR_VERSION = 10
DEFAULT_OPSET = 21

# Longer weights are written as a hash of their bytes.
SHOWN_BYTES = 256
_CHUNK_BYTES = 1 << 20
# Types of which onnx's printer writes every bit (halves and 8-bit floats as the integers that hold them); of others it
# writes three dots.
_PRINTED_IN_FULL = frozenset(
    ir.DataType[name]
    for name in (
        *("FLOAT", "DOUBLE", "FLOAT16", "BFLOAT16", "FLOAT8E4M3FN", "FLOAT8E4M3FNUZ", "FLOAT8E5M2", "FLOAT8E5M2FNUZ"),
        *("INT8", "INT16", "INT32", "INT64", "UINT8", "UINT16", "UINT32", "UINT64", "BOOL"),
    )
)

_Body: TypeAlias = onnx.GraphProto | onnx.FunctionProto


def parse(text: str) -> ir.Model:
    """Read a model from ONNX text.

    Args:
        text: A whole model, `<ir_version: ..., opset_import: [...]> g (float[2] x) => (float[2] y) {...}`, or without
            its header; functions may follow in both cases. Without a header, operators are those of opset 21, and other
            domains have version 1. Values of float16, bfloat16 and 8-bit floats are written as the integers that hold
            their bits.

    Raises:
        onnx.parser.ParseError: With line and column.
    """
    is_bare = not text.lstrip().startswith("<")
    # On the line of the text itself, so that the line numbers of errors are right.
    header = f'<ir_version: {DEFAULT_IR_VERSION}, opset_import: ["" : {DEFAULT_OPSET}]> ' if is_bare else ""
    proto = onnx.parser.parse_model(header + text)
    if is_bare:
        _import_other_domains(proto)
    return ir.serde.deserialize_model(proto)


def to_text(model: ir.Model) -> str:
    """Write a model in its canonical form: two models that differ in nothing that computes have the same text.

    Left out are the header (versions, producer, metadata), names and metadata of nodes, documentation, types of inner
    values; initializers and attributes stand in the order of their names. Long weights are written as a hash of
    their bytes, so nothing big is printed, however the weights are stored.
    """
    proto = hollow(model, _hash_of_long, min_bytes=1)
    for body in _bodies(proto):
        _make_canonical(body)
    parts = [onnx.printer.to_text(proto.graph), *sorted(onnx.printer.to_text(body) for body in proto.functions)]
    return "\n".join(_tidy(part) for part in parts)


def pictures_of(docstring: str) -> tuple[str, str] | None:
    """Return the graphs drawn under `Before::` and `After::` in a docstring, `None` if they are not both there."""
    before, after = (_indented_below(f"{heading}::", docstring) for heading in ("Before", "After"))
    return (before, after) if before and after else None


def _indented_below(heading: str, docstring: str) -> str:
    """Return the block that is indented more than the heading above it."""
    match = re.search(rf"^( *){heading} *\n((?: *\n|\1 +.*(?:\n|$))+)", docstring, re.MULTILINE)
    return dedent(match[2]).strip() if match else ""


def _import_other_domains(proto: onnx.ModelProto) -> None:
    known = {entry.domain for entry in proto.opset_import}
    used = {node.domain for body in _bodies(proto) for node in body.node}
    for domain in sorted(used - known):
        proto.opset_import.add(domain=domain, version=1)


def _hash_of_long(weight: Weight) -> Stub | None:
    if isinstance(weight.tensor, ir.ExternalTensor):  # as in a text read back: there is nothing but the reference
        return Stub(str(weight.tensor.location), weight.tensor.offset or 0, weight.tensor.length or 0)
    if weight.tensor.nbytes <= SHOWN_BYTES and _is_printed_in_full(weight.tensor):
        return None
    reader = bytes_reader(weight.tensor)
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, reader.length, _CHUNK_BYTES):
        digest.update(reader.read(start, _CHUNK_BYTES))
    return Stub(f"blake2b:{digest.hexdigest()}", 0, reader.length)


def _is_printed_in_full(tensor: ir.TensorProtocol) -> bool:
    """Say whether the printer writes all bits; of a NaN it writes that it is one, not which."""
    if tensor.dtype in (ir.DataType.FLOAT, ir.DataType.DOUBLE):
        return not np.isnan(tensor.numpy()).any()
    return tensor.dtype in _PRINTED_IN_FULL


def _bodies(proto: onnx.ModelProto) -> Iterator[_Body]:
    for body in (proto.graph, *proto.functions):
        yield body
        yield from _subgraphs(body)


def _subgraphs(body: _Body) -> Iterator[onnx.GraphProto]:
    for attribute in chain.from_iterable(node.attribute for node in body.node):
        for graph in (attribute.g, *attribute.graphs) if attribute.HasField("g") else attribute.graphs:
            yield graph
            yield from _subgraphs(graph)


def _make_canonical(body: _Body) -> None:
    """Clear what does not compute, and sort what has no order."""
    for field in ("doc_string", "metadata_props", "value_info"):
        body.ClearField(field)
    if isinstance(body, onnx.GraphProto):
        body.initializer.sort(key=lambda tensor: tensor.name)
        for info in chain(body.input, body.output):
            info.ClearField("doc_string")
            info.ClearField("metadata_props")
    for node in body.node:
        for field in ("name", "doc_string", "metadata_props"):
            node.ClearField(field)
        node.attribute.sort(key=lambda attribute: attribute.name)
        for attribute in node.attribute:
            attribute.ClearField("doc_string")
            for tensor in (attribute.t, *attribute.tensors) if attribute.HasField("t") else attribute.tensors:
                tensor.ClearField("name")


def _tidy(text: str) -> str:
    """Indent by braces; the printer loses count after the initializers of subgraphs."""
    lines, depth = [], 0
    for line in filter(None, map(str.strip, text.splitlines())):
        depth -= line.startswith("}")
        lines.append("    " * depth + line)
        depth += line.endswith("{")
    return "\n".join(lines) + "\n"
