"""The lowest operator sets and IR version that say the same: runtimes lag behind exporters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import chain
from typing import TypeAlias

import onnx
from onnx.defs import SchemaError, get_schema
from onnx.helper import OP_SET_ID_VERSION_MAP

from surgery.provenance import STAMPS
from surgery.storage.protos import subgraphs_of

# ONNX Runtime guarantees opset 7 and later; going lower gains nothing.
LOWEST_OPSET = 7
_DOMAINS = ("", "ai.onnx.ml", "ai.onnx.preview.training")

_T = onnx.TensorProto
# From the changelog in onnx.proto, `enum Version`.
_IR_OF_TYPE = {
    _T.BFLOAT16: 4,
    _T.FLOAT8E4M3FN: 9,
    _T.FLOAT8E4M3FNUZ: 9,
    _T.FLOAT8E5M2: 9,
    _T.FLOAT8E5M2FNUZ: 9,
    _T.UINT4: 10,
    _T.INT4: 10,
    _T.FLOAT4E2M1: 11,
    _T.FLOAT8E8M0: 12,
    _T.UINT2: 13,
    _T.INT2: 13,
    **({_T.FLOAT6E2M3: 14, _T.FLOAT6E3M2: 14} if hasattr(_T, "FLOAT6E2M3") else {}),
}

_Body: TypeAlias = onnx.GraphProto | onnx.FunctionProto


def lower(proto: onnx.ModelProto) -> None:
    """Write the lowest operator set of each known domain, and the lowest IR version, that say the same.

    An operator set is lowered to the newest definition that a node uses: between that and the declared version no used
    operator has changed. A domain with an operator that onnx does not know stays as it is. The IR version rises
    only where the model uses something that its own does not have.
    """
    bodies: list[_Body] = [proto.graph, *proto.functions]
    nodes = [node for body in bodies for node in _nodes(body)]
    for domain in _DOMAINS:
        _lower_opset(domain, proto, nodes)
    by_opsets = _ir_of_opsets(proto)
    declared = proto.ir_version or by_opsets
    proto.ir_version = max(_ir_of_features(proto, nodes), min(declared, by_opsets))


def _lower_opset(domain: str, proto: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> None:
    imports = [
        entry
        for entry in chain(proto.opset_import, *(function.opset_import for function in proto.functions))
        if _canonical(entry.domain) == domain
    ]
    declared = {entry.version for entry in imports}
    if len(declared) != 1:
        return
    local = {(function.domain, function.name) for function in proto.functions}
    used = {node.op_type for node in nodes if _canonical(node.domain) == domain}
    used -= {name for owner, name in local if _canonical(owner) == domain}
    needed = _needed_version(domain, used, declared.pop())
    if needed is None:
        return
    for entry in imports:
        entry.version = min(entry.version, needed)


def _needed_version(domain: str, op_types: Iterable[str], declared: int) -> int | None:
    """Return the newest definition among these operators, `None` if one is unknown or gone."""
    needed = LOWEST_OPSET if domain == "" else 1
    for op_type in op_types:
        try:
            schema = get_schema(op_type, declared, domain)
        except SchemaError:
            return None
        if schema.deprecated:
            return None
        needed = max(needed, schema.since_version)
    return needed


def _canonical(domain: str) -> str:
    return "" if domain == "ai.onnx" else domain


def _ir_of_opsets(proto: onnx.ModelProto) -> int:
    pairs = [(entry.domain or "ai.onnx", entry.version) for entry in proto.opset_import]
    newest = proto.ir_version or onnx.IR_VERSION
    return max((_ir_of_opset(domain, version, newest) for domain, version in pairs), default=3)


def _ir_of_opset(domain: str, version: int, newest: int) -> int:
    if domain != "ai.onnx" and domain not in _DOMAINS:
        return 3
    return int(OP_SET_ID_VERSION_MAP.get((domain, version), newest))


def _ir_of_features(proto: onnx.ModelProto, nodes: Iterable[onnx.NodeProto]) -> int:
    needed = [3]
    needed += [8 for _ in proto.functions]
    needed += [11 for _ in proto.configuration]
    needed += [7 for _ in proto.training_info]
    for function in proto.functions:
        needed.append(9 if function.attribute_proto else 3)
        needed.append(10 if function.overload or function.value_info or function.metadata_props else 3)
    needed += [_ir_of_graph(graph) for graph in _graphs(proto)]
    needed += [_ir_of_node(node) for node in nodes]
    return max(needed)


def _ir_of_graph(graph: onnx.GraphProto) -> int:
    inputs = {info.name for info in graph.input}
    needed = [3, 10 if graph.metadata_props else 3, 5 if graph.quantization_annotation else 3]
    needed.append(6 if graph.sparse_initializer else 3)
    for tensor in graph.initializer:
        needed.append(3 if tensor.name in inputs else 4)
        needed.append(_ir_of_tensor(tensor))
    for info in chain(graph.input, graph.output, graph.value_info):
        needed.append(10 if info.metadata_props else 3)
        needed.append(_ir_of_value_type(info.type))
    return max(needed)


def _ir_of_node(node: onnx.NodeProto) -> int:
    needed = [3, 10 if node.overload or _has_metadata(node) else 3, 11 if node.device_configurations else 3]
    for attribute in node.attribute:
        if attribute.type == onnx.AttributeProto.TENSOR:
            needed.append(_ir_of_tensor(attribute.t))
        elif attribute.type == onnx.AttributeProto.TENSORS:
            needed += [_ir_of_tensor(tensor) for tensor in attribute.tensors]
        elif attribute.type in (onnx.AttributeProto.SPARSE_TENSOR, onnx.AttributeProto.SPARSE_TENSORS):
            needed.append(6)
        elif attribute.type in (onnx.AttributeProto.TYPE_PROTO, onnx.AttributeProto.TYPE_PROTOS):
            needed.append(8)
    return max(needed)


def _has_metadata(node: onnx.NodeProto) -> bool:
    """Is there metadata but our own stamps? Readers of an older IR version skip those, as protobuf has it."""
    return any(entry.key not in STAMPS for entry in node.metadata_props)


def _ir_of_tensor(tensor: onnx.TensorProto) -> int:
    return max(_IR_OF_TYPE.get(tensor.data_type, 3), 10 if tensor.metadata_props else 3)


def _ir_of_value_type(type_: onnx.TypeProto) -> int:
    kind = type_.WhichOneof("value")
    if kind == "tensor_type":
        return _IR_OF_TYPE.get(type_.tensor_type.elem_type, 3)
    if kind in ("optional_type", "sparse_tensor_type"):
        return 8
    if kind == "sequence_type":
        return _ir_of_value_type(type_.sequence_type.elem_type)
    return 3


def _nodes(body: _Body) -> Iterator[onnx.NodeProto]:
    for node in body.node:
        yield node
        for graph in subgraphs_of(node):
            yield from _nodes(graph)


def _graphs(proto: onnx.ModelProto) -> Iterator[onnx.GraphProto]:
    yield proto.graph
    for body in (proto.graph, *proto.functions):
        for node in _nodes(body):
            yield from subgraphs_of(node)
