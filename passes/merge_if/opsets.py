"""Brings two models to one operator set for each domain."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import onnx
import onnx.version_converter
import onnx_ir as ir
from onnx.defs import SchemaError, get_schema

from surgery.errors import Refused
from surgery.graphs import graphs_of
from surgery.irpass import move_into
from surgery.storage.hollow import Stub, Weight, hollow

LONG_NAME = "ai.onnx"
FOR_ALL_TYPES = 16
"""The first operator set whose `If` gives sequences and optionals too."""


def level_opsets(models: Mapping[str, ir.Model]) -> None:
    """Raise the lower operator set of each domain to the higher one.

    Where no operator in use has changed in between, the number is all that changes. Else onnx's own converter does it,
    for the operators that it knows.

    Raises:
        Refused: An operator has changed and cannot be converted.
    """
    for model in models.values():
        for body in _bodies(model):
            _use_short_name(body)
    own = _highest(models, "") or FOR_ALL_TYPES
    for model in models.values():
        model.graph.opset_imports.setdefault("", own)  # of a model that uses none of ONNX's own operators
    for domain in sorted({domain for model in models.values() for domain in model.graph.opset_imports}):
        wanted = _highest(models, domain)
        for role, model in models.items():
            _raise(model, role, domain, wanted)


def _highest(models: Mapping[str, ir.Model], domain: str) -> int:
    return max(body.opset_imports.get(domain, 0) for model in models.values() for body in _bodies(model))


def refuse_ungiven(outputs: Mapping[str, ir.Value], version: int) -> None:
    """Refuse outputs that an `If` of an operator set cannot give: sequences come with 13, optionals with 16.

    Args:
        outputs: What it is to give, by name.
        version: The version of ONNX's own operators.

    Raises:
        Refused: One of them is of another type.
    """
    schema = get_schema("If", version, "")
    (given,) = (set(types.allowed_type_strs) for types in schema.type_constraints if types.type_param_str == "V")
    for name, value in outputs.items():
        if value.type is not None and _type_string(value.type) not in given:
            raise Refused(
                f"the output {name!r} is {_type_string(value.type)}, which an If of opset {version} does not give",
                hint="export both at a higher opset",
            )


def _type_string(type_: ir.TypeProtocol) -> str:
    """Return a type as onnx's schemas write it, such as `seq(tensor(float))`."""
    if isinstance(type_, ir.SequenceType):
        return f"seq({_type_string(type_.elem_type)})"
    if isinstance(type_, ir.OptionalType):
        return f"optional({_type_string(type_.elem_type)})"
    return f"tensor({type_.dtype.name.lower()})"


def _bodies(model: ir.Model) -> list[ir.Graph | ir.Function]:
    return [model.graph, *model.functions.values()]


def _use_short_name(body: ir.Graph | ir.Function) -> None:
    """Let the domain of ONNX's own operators, which has two names, go by the empty one."""
    version = body.opset_imports.pop(LONG_NAME, None)
    if version is not None:
        body.opset_imports.setdefault("", version)


def _raise(model: ir.Model, role: str, domain: str, wanted: int) -> None:
    lower = [body for body in _bodies(model) if body.opset_imports.get(domain, wanted) < wanted]
    changed = {
        node.op_type: body.opset_imports[domain]
        for body in lower
        for node in body.all_nodes()
        if _has_changed(node, domain, body.opset_imports[domain], wanted)
    }
    if not changed:
        for body in lower:
            body.opset_imports[domain] = wanted
        return
    name, old = min(changed.items())
    nested = sorted({node.op_type for graph in model.graph.subgraphs() for node in graph} & changed.keys())
    if domain != "" or model.functions or nested:
        where = ", in a graph inside a node" if nested else ""
        raise Refused(
            f"{role!r} is of opset {old} of {domain or LONG_NAME!r}, the other of {wanted}, and "
            f"{(nested or [name])[0]!r} has changed in between{where}",
            hint="export both at one opset",
        )
    _convert(model, role, wanted)


def _has_changed(node: ir.Node, domain: str, old: int, new: int) -> bool:
    """Say whether an operator takes, gives or assumes anything else in another version; more types do not count."""
    if node.domain != domain:
        return False
    try:
        return _signature(node.op_type, old, domain) != _signature(node.op_type, new, domain)
    except SchemaError:  # of a domain that onnx does not know, or an operator that is gone
        return True


def _signature(op_type: str, version: int, domain: str) -> tuple[object, ...]:
    schema = get_schema(op_type, version, domain)
    attributes = {
        name: (attribute.type, attribute.required, attribute.default_value.SerializeToString())
        for name, attribute in schema.attributes.items()
    }
    ports = [[(port.name, port.option) for port in side] for side in (schema.inputs, schema.outputs)]
    return attributes, ports, schema.deprecated


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
    for graph in graphs_of(converted.graph):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = held[int(str(value.const_value.location))]
        for node in graph:
            for name, attribute in list(node.attributes.items()):
                if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
                    node.attributes[name] = ir.AttrTensor(name, held[int(str(attribute.value.location))])
    _keep_metadata(model, converted)
    move_into(converted, model)


def _keep_metadata(model: ir.Model, converted: ir.Model) -> None:
    """Give the metadata back that the converter drops: that of the model, its graph, nodes and values."""
    nodes = {_key(node): node.metadata_props for node in model.graph.all_nodes()}
    for node in converted.graph.all_nodes():
        node.metadata_props.update(nodes.get(_key(node), {}))
    values = {name: value.metadata_props for name, value in _named_values(model)}
    for name, value in _named_values(converted):
        value.metadata_props.update(values.get(name, {}))
    converted.graph.metadata_props.update(model.graph.metadata_props)
    converted.metadata_props.update(model.metadata_props)
    converted.doc_string = model.doc_string


def _key(node: ir.Node) -> tuple[str, ...]:
    return (node.op_type, *(str(value.name) for value in node.outputs))


def _named_values(model: ir.Model) -> Iterator[tuple[str, ir.Value]]:
    for graph in graphs_of(model.graph):
        for value in (*graph.inputs, *graph.initializers.values(), *(one for node in graph for one in node.outputs)):
            yield str(value.name), value
