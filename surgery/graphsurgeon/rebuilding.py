"""Makes a model of a graphsurgeon graph; what the function left alone comes from the object that it was."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_graphsurgeon as gs
import onnx_ir as ir
from onnx_graphsurgeon.exporters.onnx_exporter import OnnxExporter
from onnx_graphsurgeon.ir.tensor import LazyValues

from surgery.errors import Refused
from surgery.graphsurgeon.origins import Body, GraphSaid, Origins, data_type, description, initializers_of, node_key
from surgery.graphsurgeon.weights import Weight

LISTS = (ir.AttributeType.INTS, ir.AttributeType.FLOATS, ir.AttributeType.STRINGS)


class _Scope:
    """The values that the nodes of a graph can see."""

    def __init__(self, outer: _Scope | None = None) -> None:
        self.outer = outer
        self.values: dict[str, ir.Value] = {}

    def find(self, name: str) -> ir.Value | None:
        if name in self.values or self.outer is None:
            return self.values.get(name)
        return self.outer.find(name)

    def declare(self, value: ir.Value) -> ir.Value:
        if not value.name:
            return value
        if value.name in self.values:
            raise Refused(
                f"the function left two values named {value.name!r} in one graph",
                hint="clear the inputs of the tensor that takes the place of another, then graph.cleanup()",
            )
        self.values[value.name] = value
        return value


class Rebuilder:
    """Makes a model of a graphsurgeon graph; what the function left alone is taken from where it came from."""

    def __init__(self, origins: Origins) -> None:
        self.origins = origins
        self.values: dict[int, ir.Value] = {}  # by the id of the value that they stand for
        self.tensors: dict[int, ir.TensorProtocol] = {}  # by the id of the constant

    def model(self, graph: gs.Graph) -> ir.Model:
        model = self.origins.model
        told: GraphSaid = self.origins.told(model.graph)
        # Graph.copy() (0.6.1) forgets it.
        is_same_producer = (graph.producer_name, graph.producer_version) in (told.producer, ("", ""))
        made = ir.Model(
            self.body(graph, _Scope()),
            ir_version=model.ir_version if graph.ir_version in (None, told.ir_version) else graph.ir_version,
            producer_name=model.producer_name if is_same_producer else graph.producer_name,
            producer_version=model.producer_version if is_same_producer else graph.producer_version,
            domain=model.domain,
            model_version=model.model_version,
            doc_string=model.doc_string,
            functions=[self.function(function) for function in graph.functions],
            metadata_props=dict(model.metadata_props),
            device_configurations=model.device_configurations,
        )
        made.graph.opset_imports.update(self.opsets(graph, made.graph))
        made.meta.update(model.meta)
        return made

    def function(self, function: gs.Function) -> ir.Function:
        part = self.origins.part(function, ir.Function)
        body = self.body(function, _Scope())
        body.opset_imports.update(self.opsets(function, body))
        defaults = {name: value for name, value in function.attrs.items() if value is not None}
        attributes = self.attributes(defaults, part, _Scope(), f"function {function.name!r}")
        required = [ir.Attr(name, ir.AttributeType.UNDEFINED, None) for name in function.attrs if name not in defaults]
        overload = part.overload if part is not None else ""
        return ir.Function(function.domain, function.name, overload, graph=body, attributes=[*attributes, *required])

    def opsets(self, graph: gs.Graph, made: ir.Graph) -> dict[str, int]:
        """Return the opsets as they were, or as the function asked for, one way or the other."""
        part = self.origins.body(graph)
        said, told = GraphSaid.of(graph), self.origins.told(part)
        if part is None:
            imports = dict(said.imports)
        else:
            imports = dict(part.opset_imports if said.imports == told.imports else said.imports)
            if said.opset != told.opset:
                imports[""] = said.opset
        new = _domains(made) - _domains(part) - set(imports)
        return {**imports, **dict.fromkeys(sorted(new), 1)}

    def body(self, graph: gs.Graph, scope: _Scope) -> ir.Graph:
        part = self.origins.body(graph)
        inputs = [scope.declare(self.value(tensor)) for tensor in graph.inputs]
        constants = [value for value in inputs if value.const_value is not None]
        constants += self.initializers(graph, part, scope)
        inputs = self.with_overridable(inputs, constants, part)
        for node in graph.nodes:
            for tensor in node.outputs:
                scope.declare(self.value(tensor))
        nodes = [self.node(node, scope) for node in graph.nodes]
        if isinstance(graph, gs.Function):
            nodes, constants = [*map(_constant_node, constants), *nodes], []
        outputs = [self.output(tensor, graph, scope) for tensor in graph.outputs]
        made = ir.Graph(inputs, outputs, nodes=nodes, initializers=constants)
        _describe_graph(made, graph, part, self.origins.told(part))
        return made

    def initializers(self, graph: gs.Graph, part: Body | None, scope: _Scope) -> list[ir.Value]:
        """Make the initializers of a graph, in the order in which it had them, new ones last.

        graphsurgeon has no list of them: a constant is where a node reads it. A weight of an outer graph that only a
        branch reads stays outside, and one that nothing ever read stays too.
        """
        constants = {id(constant): constant for constant in self.constants_of(graph, part)}
        by_origin = {id(self.origins.part(constant, ir.Value)): constant for constant in constants.values()}
        made: list[ir.Value] = []
        for value in initializers_of(part).values():
            constant = by_origin.get(id(value))
            if constant is not None:
                made += self.initializer(constants.pop(id(constant)), scope)
            elif not value.uses() and not value.is_graph_output() and value.name not in scope.values:
                made.append(scope.declare(self.untouched(value)))
        for constant in constants.values():
            made += self.initializer(constant, scope)
        return made

    def constants_of(self, graph: gs.Graph, part: Body | None) -> Iterator[gs.Constant]:
        """Yield the constants that a graph's own nodes read, and those of its subgraphs whose home is this graph."""
        home = part.graph if isinstance(part, ir.Function) else part
        yield from _constants_read(graph)
        for subgraph in graph.subgraphs(recursive=True):
            for constant in _constants_read(subgraph):
                value = self.origins.part(constant, ir.Value)
                if value is not None and home is not None and value.graph is home:
                    yield constant

    def initializer(self, constant: gs.Constant, scope: _Scope) -> list[ir.Value]:
        """Make the initializer of a constant, unless the graph sees one of that name and those values already."""
        known = scope.find(constant.name)
        if known is not None and known.const_value is not None:
            tensor = self.tensor(constant)
            if known.const_value is tensor or _are_equal(known.const_value, tensor.numpy()):
                return []
        return [scope.declare(self.value(constant))]

    def with_overridable(
        self, inputs: Sequence[ir.Value], constants: Sequence[ir.Value], part: Body | None
    ) -> list[ir.Value]:
        """Put back the inputs that have a default value, which graphsurgeon takes for mere constants."""
        restored = list(inputs)
        for index, value in enumerate(part.inputs if part is not None else ()):
            made = self.values.get(id(value))
            if value.is_initializer() and _is_among(made, constants) and not _is_among(made, inputs):
                assert made is not None
                restored.insert(index, made)
        return restored

    def node(self, node: gs.Node, scope: _Scope) -> ir.Node:
        part = self.origins.part(node, ir.Node)
        if part is not None and (part.domain, part.op_type) != node_key(node.domain, node.op, ())[:2]:
            part = None
        made = ir.Node(
            node.domain or "",
            node.op,
            [self.read(tensor, node, scope) for tensor in node.inputs],
            self.attributes(node.attrs, part, scope, _title(node)),
            overload=part.overload if part is not None else "",
            outputs=[scope.values[tensor.name] if tensor.name else ir.Value(name="") for tensor in node.outputs],
            version=part.version if part is not None else None,
            name=part.name if part is not None and node.name == (part.name or "") else node.name or None,
            device_configurations=part.device_configurations if part is not None else (),
        )
        _describe(made, part)
        return made

    def read(self, tensor: gs.Tensor, node: gs.Node, scope: _Scope) -> ir.Value | None:
        if not tensor.name:
            return None
        value = scope.find(tensor.name)
        if value is None:
            raise Refused(f"the function left {_title(node)} reading {tensor.name!r}, which nothing gives")
        return value

    def output(self, tensor: gs.Tensor, graph: gs.Graph, scope: _Scope) -> ir.Value:
        if tensor.name in scope.values:
            return scope.values[tensor.name]
        if scope.find(tensor.name) is None:
            raise Refused(f"the function left the output {tensor.name!r} of {graph.name!r}, which nothing gives")
        return self.value(tensor)

    def value(self, tensor: gs.Tensor) -> ir.Value:
        part = self.origins.part(tensor, ir.Value)
        made = ir.Value(name=tensor.name)
        if part is not None:
            self.values[id(part)] = made
            _describe(made, part)
        if isinstance(tensor, gs.Constant):
            made.const_value = self.tensor(tensor)
            is_untouched = part is not None and part.const_value is made.const_value
        else:
            is_untouched = part is not None and self.origins.told(part) == description(tensor)
        if is_untouched:
            assert part is not None
            made.type, made.shape = part.type, part.shape.copy() if part.shape is not None else None
        else:
            made.type, made.shape = _type_and_shape(tensor, made.const_value)
        return made

    def untouched(self, value: ir.Value) -> ir.Value:
        """Copy an initializer that graphsurgeon did not see."""
        made = ir.Value(name=value.name, type=value.type, shape=value.shape, const_value=value.const_value)
        self.values[id(value)] = made
        _describe(made, value)
        return made

    def tensor(self, constant: gs.Constant) -> ir.TensorProtocol:
        """Return the very tensor that a constant was, or a new one if its values are not the same any more."""
        if id(constant) not in self.tensors:
            self.tensors[id(constant)] = self.new_tensor(constant)
        return self.tensors[id(constant)]

    def new_tensor(self, constant: gs.Constant) -> ir.TensorProtocol:
        # The public getter loads.
        values = constant._values
        if isinstance(values, Weight):
            return values.original
        array = np.asarray(values.load() if isinstance(values, LazyValues) else values)
        wanted = data_type(constant.export_dtype)
        if wanted is not None and array.dtype == np.float32:
            array = array.astype(wanted.numpy(), copy=False)
        original = self.origins.tensor(constant)
        if original is not None and _are_equal(original, array):
            return original
        if array.dtype.kind in "OUS":
            return ir.StringTensor(_texts(array), shape=ir.Shape(array.shape), name=constant.name)
        return ir.tensor(array, name=constant.name)

    def attributes(
        self, values: Mapping[str, Any], part: ir.Node | ir.Function | None, scope: _Scope, where: str
    ) -> list[ir.Attr]:
        """Make the attributes of a node or function; those that graphsurgeon was not told about stay."""
        parts = part.attributes if part is not None else {}
        told = self.origins.told(parts) or {}
        made = [
            self.attribute(name, values[name], original, told.get(name), scope, where) if name in values else original
            for name, original in parts.items()
            if name in values or name not in told
        ]
        new = [name for name in values if name not in parts]
        return made + [self.attribute(name, values[name], None, None, scope, where) for name in new]

    def attribute(
        self, name: str, value: Any, original: ir.Attr | None, told: Any, scope: _Scope, where: str
    ) -> ir.Attr:
        doc_string = original.doc_string if original is not None else None
        if isinstance(value, gs.Graph):
            return ir.AttrGraph(name, self.body(value, _Scope(scope)), doc_string=doc_string)
        if isinstance(value, gs.Constant):
            tensor = self.tensor(value)
            is_same = original is not None and not original.is_ref() and original.value is tensor
            return original if is_same else ir.AttrTensor(name, tensor, doc_string=doc_string)  # type: ignore[return-value]
        if original is not None and type(value) is type(told) and value == told:
            return original
        if original is not None and original.type in LISTS and isinstance(value, list | tuple) and not value:
            return ir.Attr(name, original.type, ())
        return _exported(name, value, where)


def _exported(name: str, value: Any, where: str) -> ir.Attr:
    """Turn an attribute into what graphsurgeon would write."""
    try:
        (proto,) = OnnxExporter.export_attributes({name: value})
    except (TypeError, ValueError, AttributeError) as error:
        raise Refused(f"the function left the attribute {name!r} of {where} at {value!r}: {error}") from error
    return ir.serde.deserialize_attribute(proto)


def _constants_read(graph: gs.Graph) -> Iterator[gs.Constant]:
    read = (*(tensor for node in graph.nodes for tensor in node.inputs), *graph.outputs)
    return (tensor for tensor in read if isinstance(tensor, gs.Constant))


def _constant_node(value: ir.Value) -> ir.Node:
    """Make the node that gives a constant in a function, which has no initializers."""
    tensor = value.const_value
    assert tensor is not None
    value.const_value = None
    return ir.Node("", "Constant", [], [ir.AttrTensor("value", tensor)], outputs=[value])


def _describe(made: Any, part: ir.Node | ir.Value | None) -> None:
    if part is None:
        return
    made.doc_string = part.doc_string
    made.metadata_props.update(part.metadata_props)
    made.meta.update(part.meta)


def _describe_graph(made: ir.Graph, graph: gs.Graph, part: Body | None, told: GraphSaid | None) -> None:
    made.name, made.doc_string = graph.name, graph.doc_string
    if part is None or told is None:
        return
    origin = part.graph if isinstance(part, ir.Function) else part
    made.name = origin.name if graph.name == told.name else graph.name
    made.doc_string = origin.doc_string if graph.doc_string == told.doc_string else graph.doc_string
    made.metadata_props.update(origin.metadata_props)
    made.meta.update(origin.meta)


def _type_and_shape(
    tensor: gs.Tensor, const_value: ir.TensorProtocol | None
) -> tuple[ir.TypeProtocol | None, ir.Shape | None]:
    if const_value is not None:
        return ir.TensorType(const_value.dtype), ir.Shape(const_value.shape.numpy())
    dtype = data_type(tensor.dtype)
    if dtype is None:
        return None, None
    made: ir.TypeProtocol = ir.SparseTensorType(dtype) if tensor.type == "sparse_tensor_type" else ir.TensorType(dtype)
    shape = None if tensor.shape is None else ir.Shape([_dimension(dimension) for dimension in tensor.shape])
    return (ir.SequenceType(made) if tensor.type == "sequence_type" else made), shape


def _dimension(dimension: Any) -> int | str | None:
    """Return a dimension; graphsurgeon writes -1 for one that is not known."""
    if dimension is None or isinstance(dimension, str):
        return dimension or None
    return int(dimension) if dimension >= 0 else None


def _are_equal(tensor: ir.TensorProtocol, array: np.ndarray) -> bool:
    """Say whether a tensor has exactly this type, shape and bytes."""
    if tensor.dtype != data_type(array.dtype) or tuple(tensor.shape.numpy()) != array.shape:
        return False
    if tensor.dtype == ir.DataType.STRING:
        return _texts(array) == _texts(tensor.numpy())
    return np.array_equal(_bytes(tensor.numpy()), _bytes(array))


def _texts(array: np.ndarray) -> list[bytes]:
    return [one if isinstance(one, bytes) else str(one).encode() for one in array.reshape(-1)]


def _bytes(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array).reshape(-1).view(np.uint8)


def _domains(body: Body | None) -> set[str]:
    return {node.domain for node in body.all_nodes() if node.domain} if body is not None else set()


def _is_among(value: ir.Value | None, values: Sequence[ir.Value]) -> bool:
    return any(value is one for one in values)


def _title(node: gs.Node) -> str:
    return f"node {node.name!r}" if node.name else f"a {node.op} node"
