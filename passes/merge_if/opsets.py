"""Brings two models to one operator set for each domain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx.defs import SchemaError, get_schema

from surgery.errors import Refused
from surgery.irpass import move_into
from surgery.storage.hollow import Stub, Weight, hollow


def level_opsets(models: Mapping[str, ir.Model]) -> None:
    """Raise the lower operator set of each domain to the higher one.

    Where no operator in use has changed in between, the number is all that changes. Else onnx's own converter does it,
    for the operators that it knows.

    Raises:
        Refused: An operator has changed and cannot be converted.
    """
    domains = {domain for model in models.values() for domain in model.graph.opset_imports}
    for domain in sorted(domains):
        versions = {role: model.graph.opset_imports.get(domain) for role, model in models.items()}
        wanted = max(version for version in versions.values() if version is not None)
        for role, version in versions.items():
            if version is not None and version < wanted:
                _raise(models[role], role, domain, wanted)


def _raise(model: ir.Model, role: str, domain: str, wanted: int) -> None:
    old = model.graph.opset_imports[domain]
    changed = sorted({node.op_type for node in _nodes(model) if _has_changed(node, domain, old, wanted)})
    if not changed:
        for body in (model.graph, *model.functions.values()):
            if domain in body.opset_imports:
                body.opset_imports[domain] = wanted
        return
    if domain != "" or model.functions:
        raise Refused(
            f"{role!r} is of opset {old} of {domain or 'ai.onnx'!r}, the other of {wanted}, and {changed[0]!r} has "
            "changed in between",
            hint="export both at one opset",
        )
    _convert(model, role, wanted)


def _nodes(model: ir.Model) -> Iterator[ir.Node]:
    for body in (model.graph, *model.functions.values()):
        yield from body.all_nodes()


def _has_changed(node: ir.Node, domain: str, old: int, new: int) -> bool:
    if node.domain != domain:
        return False
    try:
        return bool(
            get_schema(node.op_type, old, domain).since_version != get_schema(node.op_type, new, domain).since_version
        )
    except SchemaError:  # of a domain that onnx does not know, or an operator that is gone
        return True


def _convert(model: ir.Model, role: str, wanted: int) -> None:
    """Let onnx convert the model without its weights, which are put back afterwards."""
    held: list[ir.TensorProtocol] = []

    def hold(weight: Weight) -> Stub:
        held.append(weight.tensor)
        return Stub(str(len(held) - 1))

    slim = hollow(model, hold, min_bytes=1024)
    try:
        converted = ir.from_proto(onnx.version_converter.convert_version(slim, wanted))
    except (RuntimeError, ValueError) as error:
        text = str(error).strip().splitlines()
        raise Refused(
            f"{role!r} cannot be brought from opset {model.graph.opset_imports['']} to {wanted}: {text[-1]}",
            hint="export both at one opset",
        ) from error
    for graph in (converted.graph, *converted.graph.subgraphs()):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = held[int(str(value.const_value.location))]
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, held[int(str(attribute.value.location))])
    converted.metadata_props.update(model.metadata_props)
    move_into(converted, model)
