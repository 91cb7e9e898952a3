"""Inputs and outputs, graphs, operators and casts of a model, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain

import onnx_ir as ir

from surgery.graphs import named_bodies_of
from surgery.interfaces import Recognised, Slot, recognise
from surgery.report.inspection.found import Body, CacheKind, Casts, Dimension, Interface, Operator, Port


@dataclass(frozen=True)
class Scope:
    """A graph of a model, and where it is."""

    graph: ir.Graph
    path: str
    depth: int
    is_function: bool


def scopes_of(model: ir.Model) -> Iterator[Scope]:
    """Yield all graphs of a model: the main one, those inside it, the functions and those inside them."""
    yield from _below(Scope(model.graph, "", 0, False))
    for function in model.functions.values():
        name = "::".join(filter(None, (function.domain, function.name, function.overload)))
        yield from _below(Scope(function.graph, f"function {name}", 0, True))


def _below(scope: Scope) -> Iterator[Scope]:
    yield scope
    for node in scope.graph:
        for name, graph in named_bodies_of(node):
            label = f"{node.name or node.op_type}.{name}"
            path = f"{scope.path} > {label}" if scope.path else label
            yield from _below(Scope(graph, path, scope.depth + 1, scope.is_function))


def ports(values: Iterable[ir.Value]) -> list[Port]:
    """Return the inputs or outputs of a graph."""
    return [Port(value.name or "", type_name(value), shape_of(value), value.is_initializer()) for value in values]


def type_name(value: ir.Value) -> str | None:
    """Return the type of a value as ONNX's text form spells it, None if it is not known."""
    type_ = value.type
    if isinstance(type_, ir.TensorType):
        return type_.dtype.name.lower()
    if isinstance(type_, ir.SparseTensorType):
        return f"sparse({type_.dtype.name.lower()})"
    if isinstance(type_, (ir.SequenceType, ir.OptionalType)):
        kind = "sequence" if isinstance(type_, ir.SequenceType) else "optional"
        return f"{kind}({type_.dtype.name.lower()})"
    return None


def shape_of(value: ir.Value) -> list[Dimension] | None:
    """Return the sizes of a value, names for free ones; None if the rank is not known."""
    if value.shape is None:
        return None
    return [size if isinstance(size, int) else size.value for size in value.shape]


def bodies(scopes: Iterable[Scope]) -> list[Body]:
    """Return the graphs with their numbers of nodes."""
    return [Body(scope.path, scope.depth, len(scope.graph), scope.is_function) for scope in scopes]


def operators(model: ir.Model, scopes: Iterable[Scope]) -> list[Operator]:
    """Return the operators, the most frequent first."""
    everywhere, inside, in_functions = (
        Counter[tuple[str, str]](),
        Counter[tuple[str, str]](),
        Counter[tuple[str, str]](),
    )
    for scope in scopes:
        names = Counter((node.domain, node.op_type) for node in scope.graph)
        everywhere.update(names)
        if scope.depth:
            inside.update(names)
        if scope.is_function:
            in_functions.update(names)
    own = {(function.domain, function.name) for function in model.functions.values()}
    return [
        Operator(*key, count, inside[key], in_functions[key], key in own)
        for key, count in sorted(everywhere.items(), key=lambda pair: (-pair[1], pair[0]))
    ]


def casts(scopes: Iterable[Scope]) -> list[Casts]:
    """Return the casts by their types, the most frequent first; a `CastLike` goes to its second input's type."""
    everywhere, inside, in_functions = (Counter[tuple[str | None, str]]() for _ in range(3))
    for scope in scopes:
        for node in scope.graph:
            key = _cast_types(node)
            if key is None:
                continue
            everywhere[key] += 1
            inside[key] += bool(scope.depth)
            in_functions[key] += scope.is_function
    return [
        Casts(*key, count, inside[key], in_functions[key])
        for key, count in sorted(everywhere.items(), key=lambda pair: (-pair[1], pair[0][0] or "", pair[0][1]))
    ]


def has_casts_of_unknown_type(scopes: Iterable[Scope]) -> bool:
    """Tell whether types have to be inferred to say what the casts do."""
    return any(
        None in key or "?" in key
        for scope in scopes
        if not scope.is_function
        for node in scope.graph
        if (key := _cast_types(node)) is not None
    )


def _cast_types(node: ir.Node) -> tuple[str | None, str] | None:
    if node.domain != "" or node.op_type not in ("Cast", "CastLike") or not node.inputs:
        return None
    source = _dtype_name(node.inputs[0])
    if node.op_type == "CastLike":
        return source, (_dtype_name(node.inputs[1]) if len(node.inputs) > 1 else None) or "?"
    attribute = node.attributes.get("to")
    if attribute is None or attribute.is_ref():
        return source, "?"
    try:
        return source, ir.DataType(attribute.as_int()).name.lower()
    except ValueError:
        return source, f"type {attribute.as_int()}"


def _dtype_name(value: ir.Value | None) -> str | None:
    return value.dtype.name.lower() if value is not None and value.dtype is not None else None


def interface(model: ir.Model) -> Interface | None:
    """Return what a model is by the names of its inputs and outputs."""
    found = recognise(model)
    if found is None:
        return None
    return Interface(found.role, found.naming, found.family, found.layers, _cache(model, found))


def _cache(model: ir.Model, found: Recognised) -> list[CacheKind]:
    """Return the tensors of the cache, those alike together."""
    values = {value.name: value for value in chain(model.graph.outputs, model.graph.inputs)}
    kinds: dict[tuple[str, str | None, str], list[tuple[Slot, ir.Value]]] = {}
    for slot in found.cache:
        value = values[slot.input if slot.input is not None else slot.output]
        attention = "cross" if slot.of == "encoder" else "self"
        kinds.setdefault((attention, type_name(value), str(shape_of(value))), []).append((slot, value))
    return [_cache_kind(attention, slots) for (attention, _, _), slots in kinds.items()]


def _cache_kind(attention: str, slots: Sequence[tuple[Slot, ir.Value]]) -> CacheKind:
    _, value = slots[0]
    shape = shape_of(value)
    return CacheKind(
        attention,
        len({slot.layer for slot, _ in slots}),
        sum(slot.input is not None for slot, _ in slots),
        sum(slot.output is not None for slot, _ in slots),
        type_name(value),
        shape,
        _token_bytes(value.dtype, shape, len(slots)),
    )


def _token_bytes(dtype: ir.DataType | None, shape: Sequence[Dimension] | None, count: int) -> int | None:
    """Return the bytes of one token of one row; a cache tensor is [batch, heads, tokens, size of a head]."""
    if dtype is None or shape is None or len(shape) != 4:
        return None
    heads, size = shape[1], shape[3]
    if not isinstance(heads, int) or not isinstance(size, int):
        return None
    return dtype.bitwidth * heads * size * count // 8
