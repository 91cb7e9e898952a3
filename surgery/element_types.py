"""The element types of all values, by what the operators' definitions say."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import zip_longest
from typing import Any

import onnx_ir as ir
from onnx.defs import SchemaError, get_schema

from surgery.graphs import bodies_of
from surgery.runtime.schemas import Operator, newest, runtime_schemas

Type = ir.TypeProtocol


def infer_types(model: ir.Model) -> None:
    """Give each value its type where the file does not say it: in the main graph and in those nested in it.

    Each node's outputs follow from its inputs, its attributes and the type parameters of its operator's definition:
    onnx's, or for its contrib operators ONNX Runtime's. What neither tells, as of an operator that nobody knows or of a
    node that lacks what its operator needs, stays unknown. Local functions are left alone, and so are outputs of their
    calls: inline them first.

    Args:
        model: Changed in place; types that are there are believed.
    """
    _Inference(model).graph(model.graph)


@dataclass(frozen=True)
class Parameter:
    """A formal input or output: its name, its type or type parameter, and whether it stands for any number of values.

    Args:
        is_alike: Of one that stands for several values: that all have one type.
    """

    name: str
    type_name: str
    is_variadic: bool = False
    is_alike: bool = True


@dataclass(frozen=True)
class Definition:
    """What an operator's definition says of types.

    Args:
        inputs: Formal inputs.
        outputs: Formal outputs.
        allowed: The types that each type parameter may stand for.
    """

    inputs: tuple[Parameter, ...]
    outputs: tuple[Parameter, ...]
    allowed: Mapping[str, frozenset[str]]

    def input(self, index: int) -> Parameter | None:
        """Return the formal input of an actual one."""
        return _formal(self.inputs, index)

    def output(self, index: int) -> Parameter | None:
        """Return the formal output of an actual one."""
        return _formal(self.outputs, index)

    def takes(self, parameter: Parameter, dtype: ir.DataType) -> bool:
        """Return whether a tensor of an element type may stand there."""
        name = f"tensor({dtype.name.lower()})"
        return name == parameter.type_name or name in self.allowed.get(parameter.type_name, ())


def _formal(parameters: Sequence[Parameter], index: int) -> Parameter | None:
    if index < len(parameters):
        return parameters[index]
    return parameters[-1] if parameters and parameters[-1].is_variadic else None


class Definitions:
    """The definitions of the operators that a model uses."""

    def __init__(self, model: ir.Model) -> None:
        self._opsets = model.opset_imports
        self._known: dict[tuple[str, str, int], Definition | None] = {}

    def of(self, node: ir.Node) -> Definition | None:
        """Return the definition of a node's operator in the version that the model asks for, None if nobody has one."""
        version = node.version or self._opsets.get(node.domain, 1)
        key = node.domain, node.op_type, version
        if key not in self._known:
            self._known[key] = self._standard(*key) or self._contributed(*key)
        return self._known[key]

    def _standard(self, domain: str, name: str, version: int) -> Definition | None:
        try:
            schema = get_schema(name, version, domain)
        except SchemaError:
            return None
        return _definition(schema, "type_str", "is_homogeneous")

    def _contributed(self, domain: str, name: str, version: int) -> Definition | None:
        schema = newest(self._of_runtime.get((domain, name), ()), version)
        return _definition(schema, "typeStr", "isHomogeneous") if schema is not None else None

    @cached_property
    def _of_runtime(self) -> Mapping[Operator, Sequence[Any]]:
        return runtime_schemas()


def _definition(schema: Any, type_name: str, is_alike: str) -> Definition:
    def parameters(formals: Sequence[Any] | None) -> tuple[Parameter, ...]:
        return tuple(
            Parameter(
                formal.name,
                getattr(formal, type_name),
                is_variadic=formal.option.name == "Variadic",
                is_alike=getattr(formal, is_alike),
            )
            for formal in formals or ()
        )

    allowed = {one.type_param_str: frozenset(one.allowed_type_strs) for one in schema.type_constraints or ()}
    return Definition(parameters(schema.inputs), parameters(schema.outputs), allowed)


class _Inference:
    def __init__(self, model: ir.Model) -> None:
        self._definitions = Definitions(model)
        self._functions = set(model.functions)

    def graph(self, graph: ir.Graph) -> None:
        """Infer the types of a graph's values; those of its inputs are known."""
        for value in graph.initializers.values():
            if value.type is None and value.const_value is not None:
                value.type = ir.TensorType(value.const_value.dtype)
        for node in graph:
            self._node(node)

    def _node(self, node: ir.Node) -> None:
        _tell_body(node)
        for body in bodies_of(node):
            self.graph(body)
        if all(value.type is not None for value in node.outputs):
            return
        if node.op_identifier() in self._functions:
            return
        for value, type_ in zip(node.outputs, self._types(node), strict=True):
            if value.type is None and type_ is not None:
                value.type = copy.copy(type_)  # a type can be changed: no two values may share one

    def _types(self, node: ir.Node) -> Sequence[Type | None]:
        special = _SPECIAL.get((node.domain, node.op_type))
        if special is not None:
            types = list(special(node))[: len(node.outputs)]
            return types + [None] * (len(node.outputs) - len(types))
        definition = self._definitions.of(node)
        return _by_definition(node, definition) if definition is not None else [None] * len(node.outputs)


def _tell_body(node: ir.Node) -> None:
    """Give the inputs of a loop's body the types of what is put into them."""
    if node.domain or node.op_type not in ("Loop", "Scan", "SequenceMap"):
        return
    given = [value.type if value is not None else None for value in node.inputs]
    if node.op_type == "Loop":
        given[:2] = [ir.TensorType(ir.DataType.INT64), ir.TensorType(ir.DataType.BOOL)]
    if node.op_type == "SequenceMap":
        given = [type_.elem_type if isinstance(type_, ir.SequenceType) else type_ for type_ in given]
    for body in bodies_of(node):
        for inner, type_ in zip(body.inputs, given, strict=False):
            if inner.type is None and type_ is not None:
                inner.type = copy.copy(type_)


def _by_definition(node: ir.Node, definition: Definition) -> Sequence[Type | None]:
    bound: dict[str, Type] = {}
    for index, value in enumerate(node.inputs):
        formal = definition.input(index)
        if value is not None and value.type is not None and formal is not None and formal.is_alike:
            bound.setdefault(formal.type_name, value.type)
    types: list[Type | None] = []
    for index in range(len(node.outputs)):
        formal = definition.output(index)
        if formal is None or not formal.is_alike:
            types.append(None)
        elif formal.type_name in bound:
            types.append(bound[formal.type_name])
        else:
            allowed = definition.allowed.get(formal.type_name, frozenset({formal.type_name}))
            types.append(_parsed(next(iter(allowed))) if len(allowed) == 1 else None)
    return types


def _parsed(text: str) -> Type | None:
    """Read a type as definitions write it: `tensor(int64)`, `seq(tensor(float))`, `optional(tensor(float))`."""
    kind, _, inner = text.removesuffix(")").partition("(")
    if kind == "seq":
        return _sequence(_parsed(inner))
    if kind == "optional":
        element = _parsed(inner)
        return ir.OptionalType(element) if element is not None else None
    return _tensor(inner.upper()) if kind == "tensor" else None


def _tensor(dtype: int | str) -> Type | None:
    """Return the type of tensors of an element type that is given by its number or name, None if there is no such."""
    try:
        return ir.TensorType(ir.DataType[dtype] if isinstance(dtype, str) else ir.DataType(dtype))
    except (KeyError, ValueError):
        return None


def _sequence(element: Type | None) -> Type | None:
    return ir.SequenceType(element) if element is not None else None


# Operators whose outputs do not follow from their definitions alone.


def _attribute_type(
    name: str, default: ir.DataType | None = None, *, like: int | None = None
) -> Callable[[ir.Node], Sequence[Type | None]]:
    """The type that an attribute names; without it a fixed one, or that of one of the inputs."""

    def rule(node: ir.Node) -> Sequence[Type | None]:
        for kind in (ir.AttributeType.INT, ir.AttributeType.STRING):  # a name, before opset 6
            asked = _given(node, name, kind)
            if asked:
                return [_tensor(asked)]
        if default is not None:
            return [ir.TensorType(default)]
        return [_input_type(node, like) if like is not None else None]

    return rule


def _given(node: ir.Node, name: str, kind: ir.AttributeType) -> Any:
    """Return what an attribute says, None if it is not there, of another kind, or what the call of a function says."""
    attribute = node.attributes.get(name)
    return attribute.value if attribute is not None and attribute.type == kind else None


def _input_type(node: ir.Node, index: int) -> Type | None:
    value = node.inputs[index] if index < len(node.inputs) else None
    return value.type if value is not None else None


def _constant(node: ir.Node) -> Sequence[Type | None]:
    kinds = {
        "value_float": ir.DataType.FLOAT,
        "value_floats": ir.DataType.FLOAT,
        "value_int": ir.DataType.INT64,
        "value_ints": ir.DataType.INT64,
        "value_string": ir.DataType.STRING,
        "value_strings": ir.DataType.STRING,
    }
    tensor = _given(node, "value", ir.AttributeType.TENSOR)
    if tensor is not None:
        return [ir.TensorType(tensor.dtype)]
    return [ir.TensorType(kinds[name]) for name in node.attributes if name in kinds]


def _constant_of_shape(node: ir.Node) -> Sequence[Type | None]:
    tensor = _given(node, "value", ir.AttributeType.TENSOR)
    return [ir.TensorType(tensor.dtype if tensor is not None else ir.DataType.FLOAT)]


def _quantized(node: ir.Node) -> Sequence[Type | None]:
    point = _input_type(node, 2)
    return [point] if point is not None else _attribute_type("output_dtype", ir.DataType.UINT8)(node)


def _of_sequence(node: ir.Node) -> Sequence[Type | None]:
    type_ = _input_type(node, 0)
    return [type_.elem_type if isinstance(type_, (ir.SequenceType, ir.OptionalType)) else None]


def _of_optional(node: ir.Node) -> Sequence[Type | None]:
    type_ = _input_type(node, 0)
    return [type_.elem_type if isinstance(type_, ir.OptionalType) else type_]


def _to_sequence(node: ir.Node) -> Sequence[Type | None]:
    return [_sequence(_input_type(node, 0))]


def _empty_sequence(node: ir.Node) -> Sequence[Type | None]:
    (element,) = _attribute_type("dtype", ir.DataType.FLOAT)(node)
    return [_sequence(element)]


def _optional(node: ir.Node) -> Sequence[Type | None]:
    asked = _given(node, "type", ir.AttributeType.TYPE_PROTO)
    type_ = asked.type if asked is not None else _input_type(node, 0)
    return [ir.OptionalType(type_) if type_ is not None else None]


def _bodies(node: ir.Node) -> Sequence[Type | None]:
    """The types of what branches or a body give, as far as one of them knows."""
    results = zip_longest(*([value.type for value in body.outputs] for body in bodies_of(node)))
    return [next((type_ for type_ in types if type_ is not None), None) for types in results]


def _loop(node: ir.Node) -> Sequence[Type | None]:
    """The first output of the body says whether the loop goes on."""
    return _bodies(node)[1:]


def _mapped(node: ir.Node) -> Sequence[Type | None]:
    return [_sequence(type_) for type_ in _bodies(node)]


def _normalized(node: ir.Node) -> Sequence[Type | None]:
    """The statistics are of the type that they are computed in."""
    (statistic,) = _attribute_type("stash_type", ir.DataType.FLOAT)(node)
    return [_input_type(node, 0), statistic, statistic]


_SPECIAL: Mapping[tuple[str, str], Callable[[ir.Node], Sequence[Type | None]]] = {
    ("", "Cast"): _attribute_type("to"),
    ("", "BitCast"): _attribute_type("to"),
    ("", "Constant"): _constant,
    ("", "ConstantOfShape"): _constant_of_shape,
    ("", "EyeLike"): _attribute_type("dtype", like=0),
    ("", "Bernoulli"): _attribute_type("dtype", like=0),
    ("", "RandomNormal"): _attribute_type("dtype", ir.DataType.FLOAT),
    ("", "RandomUniform"): _attribute_type("dtype", ir.DataType.FLOAT),
    ("", "RandomNormalLike"): _attribute_type("dtype", like=0),
    ("", "RandomUniformLike"): _attribute_type("dtype", like=0),
    ("", "Multinomial"): _attribute_type("dtype", ir.DataType.INT32),
    ("", "BlackmanWindow"): _attribute_type("output_datatype", ir.DataType.FLOAT),
    ("", "HammingWindow"): _attribute_type("output_datatype", ir.DataType.FLOAT),
    ("", "HannWindow"): _attribute_type("output_datatype", ir.DataType.FLOAT),
    ("", "MelWeightMatrix"): _attribute_type("output_datatype", ir.DataType.FLOAT),
    ("", "QuantizeLinear"): _quantized,
    ("", "DequantizeLinear"): _attribute_type("output_dtype", like=1),
    ("com.microsoft", "QuantizeLinear"): _quantized,
    ("com.microsoft", "DequantizeLinear"): _attribute_type("output_dtype", like=1),
    ("", "SequenceAt"): _of_sequence,
    ("", "ConcatFromSequence"): _of_sequence,
    ("", "SequenceConstruct"): _to_sequence,
    ("", "SplitToSequence"): _to_sequence,
    ("", "SequenceEmpty"): _empty_sequence,
    ("", "Optional"): _optional,
    ("", "OptionalGetElement"): _of_optional,
    ("", "If"): _bodies,
    ("", "Loop"): _loop,
    ("", "LayerNormalization"): _normalized,
    ("", "SequenceMap"): _mapped,
    ("", "Scan"): _bodies,
}
