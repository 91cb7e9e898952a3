"""Two ways to tell models apart: by content, everywhere and for ever, and quickly, within one process."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Iterable, Iterator
from itertools import chain

import onnx
import onnx_ir as ir

from surgery.provenance import STAMPS
from surgery.storage.hollow import Stub, Weight, hollow
from surgery.storage.region import Region, bytes_reader, key_of
from surgery.storage.versions import lower

_CHUNK_BYTES = 1 << 20
# Below this, reading a tensor is cheaper than thinking about it.
_SMALL_BYTES = 1 << 20


def fingerprint(model: ir.Model) -> str:
    """Return a hash of everything a model says: graph, metadata and the bytes of its weights.

    It does not depend on files, layouts, processes, on how a tensor is stored, or on which step made a node.
    """
    digests: dict[Hashable, str] = {}

    def place(weight: Weight) -> Stub:
        key = key_of(weight.tensor)
        if key not in digests:
            digests[key] = _digest(weight.tensor)
        return Stub(digests[key])

    proto = hollow(model, place, min_bytes=1)
    lower(proto)
    _drop_stamps(proto)
    for graph in _graphs(proto.graph):
        _drop_what_initializers_repeat(graph)
    return _hash(proto)


def identity(model: ir.Model) -> str:
    """Return a hash that changes when the model does, without reading weights on disk.

    Only for comparing two moments of one process: regions count by their place, big tensors in memory by which object
    they are. A tensor whose array is written to in place is not noticed; tensors are immutable in onnx_ir. Which step
    made a node is no part of it: a step that asks for a verdict has not signed its work yet.
    """
    proto = hollow(model, lambda weight: Stub(_who(weight.tensor)), min_bytes=1)
    _drop_stamps(proto)
    return _hash(proto)


def _drop_stamps(proto: onnx.ModelProto) -> None:
    """Drop what `surgery.provenance` has written."""
    bodies = [_nested(function.node) for function in proto.functions]
    graphs = (*_graphs(proto.graph), *chain.from_iterable(bodies))
    for node in chain.from_iterable(body.node for body in (*graphs, *proto.functions)):
        kept = [entry for entry in node.metadata_props if entry.key not in STAMPS]
        if len(kept) < len(node.metadata_props):
            del node.metadata_props[:]
            node.metadata_props.extend(kept)


def _who(tensor: ir.TensorProtocol) -> str:
    if tensor.nbytes < _SMALL_BYTES and not isinstance(tensor, (Region, ir.LazyTensor)):
        return _digest(tensor)
    return str(key_of(tensor))


def _digest(tensor: ir.TensorProtocol) -> str:
    reader = bytes_reader(tensor)
    digest = hashlib.blake2b(digest_size=16)
    for start in range(0, reader.length, _CHUNK_BYTES):
        digest.update(reader.read(start, _CHUNK_BYTES))
    return digest.hexdigest()


def _hash(proto: onnx.ModelProto) -> str:
    return hashlib.blake2b(proto.SerializeToString(deterministic=True), digest_size=16).hexdigest()


def _drop_what_initializers_repeat(graph: onnx.GraphProto) -> None:
    """Drop the types of initializers: a model has them once it was saved and opened, and perhaps not before."""
    names = {tensor.name for tensor in graph.initializer}
    for index in reversed(range(len(graph.value_info))):
        info = graph.value_info[index]
        if info.name in names and not info.metadata_props and not info.doc_string:
            del graph.value_info[index]


def _graphs(graph: onnx.GraphProto) -> Iterator[onnx.GraphProto]:
    yield graph
    yield from _nested(graph.node)


def _nested(nodes: Iterable[onnx.NodeProto]) -> Iterator[onnx.GraphProto]:
    for node in nodes:
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from _graphs(attribute.g)
            elif attribute.type == onnx.AttributeProto.GRAPHS:
                for one in attribute.graphs:
                    yield from _graphs(one)
