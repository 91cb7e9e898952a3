"""Local functions of two models in one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx_ir as ir

from surgery.errors import Refused

Identifier = tuple[str, str, str]


def join_functions(models: Mapping[str, ir.Model]) -> list[ir.Function]:
    """Return the functions of all models, each called by what called it before.

    Of two that differ under one name the later one is renamed, with its calls.

    Raises:
        Refused: What is a function to one model is an operator to another: runtimes differ in which of them they take.
    """
    joined: dict[Identifier, ir.Function] = {}
    owned = {role: set(model.functions) for role, model in models.items()}
    plain = {role: set(_called(model)) - owned[role] for role, model in models.items()}
    known = set().union(*owned.values(), *plain.values())
    for role, model in models.items():
        _refuse_operators(role, owned[role] & set().union(*plain.values()))
        renamed = _differing(model, joined)
        _rename(model, {identifier: _fresh(identifier, role, known) for identifier in sorted(renamed)})
        for function in model.functions.values():
            joined.setdefault(function.identifier(), function)
    return list(joined.values())


def _refuse_operators(role: str, names: set[Identifier]) -> None:
    if names:
        domain, name, _ = min(names)
        raise Refused(
            f"{name!r} of {domain or 'ai.onnx'!r} is a function in {role!r} and an operator in the other model",
            hint="inline the function, or give it another name",
        )


def _called(model: ir.Model) -> Iterator[Identifier]:
    bodies: tuple[ir.Graph | ir.Function, ...] = (model.graph, *model.functions.values())
    for body in bodies:
        yield from (node.op_identifier() for node in body.all_nodes())


def _differing(model: ir.Model, joined: Mapping[Identifier, ir.Function]) -> set[Identifier]:
    """Return the functions that differ from those of their names, in their own bodies or in what these call."""
    twins = {one: function for one, function in model.functions.items() if one in joined}
    differing = {one for one, function in twins.items() if _text(joined[one]) != _text(function)}
    while True:
        callers = {
            one
            for one, function in twins.items()
            if one not in differing and any(node.op_identifier() in differing for node in function.all_nodes())
        }
        if not callers:
            return differing
        differing |= callers


def _rename(model: ir.Model, names: Mapping[Identifier, str]) -> None:
    functions = list(model.functions.items())
    bodies: tuple[ir.Graph | ir.Function, ...] = (model.graph, *model.functions.values())
    for body in bodies:
        for node in body.all_nodes():
            node.op_type = names.get(node.op_identifier(), node.op_type)
    model.functions.clear()
    for identifier, function in functions:
        function.name = names.get(identifier, function.name)
        model.functions[function.identifier()] = function


def _fresh(identifier: Identifier, role: str, known: set[Identifier]) -> str:
    domain, name, overload = identifier
    name = f"{name}_{role}"
    while (domain, name, overload) in known:
        name += "_"
    known.add((domain, name, overload))
    return name


def _text(function: ir.Function) -> bytes:
    return bytes(ir.serde.serialize_function(function).SerializeToString(deterministic=True))
