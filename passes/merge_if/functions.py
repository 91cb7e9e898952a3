"""Local functions of two models in one."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

Identifier = tuple[str, str, str]


def join_functions(models: Mapping[str, ir.Model]) -> list[ir.Function]:
    """Return the functions of all models; of two that differ under one name, the later one and its calls are renamed."""
    joined: dict[Identifier, ir.Function] = {}
    for role, model in models.items():
        renamed: dict[Identifier, str] = {}
        for identifier, function in model.functions.items():
            if identifier in joined and _text(joined[identifier]) != _text(function):
                renamed[identifier] = _fresh(function, role, joined)
        for body in (model.graph, *model.functions.values()):
            for node in body.all_nodes():
                name = renamed.get(node.op_identifier())
                if name is not None:
                    node.op_type = name
        for identifier, function in model.functions.items():
            if identifier in renamed:
                function.name = renamed[identifier]
            joined.setdefault(function.identifier(), function)
    return list(joined.values())


def _fresh(function: ir.Function, role: str, known: Mapping[Identifier, ir.Function]) -> str:
    name = f"{function.name}_{role}"
    while (function.domain, name, function.overload) in known:
        name += "_"
    return name


def _text(function: ir.Function) -> bytes:
    return bytes(ir.serde.serialize_function(function).SerializeToString(deterministic=True))
