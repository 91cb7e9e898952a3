"""Small models with weights in every place where a model can have them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx import TensorProto, helper, numpy_helper

SIDE = 32  # 32 x 32 floats are 4 KiB: above every threshold


def matrix(seed: int, side: int = SIDE) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((side, side)).astype(np.float32)


def floats(name: str, shape: Sequence[int | str]) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)


@dataclass(frozen=True)
class Everywhere:
    """A model with weights in the main graph, in a body, in `Constant` nodes of both, and in a function."""

    proto: onnx.ModelProto
    matrices: Mapping[str, np.ndarray]

    def expected(self, x: np.ndarray, condition: bool) -> np.ndarray:
        m = self.matrices
        inner = (x @ m["main"] + m["constant"][:1]) @ m["function"]
        return np.asarray(inner @ (m["body"] if condition else m["body_constant"]))

    def feeds(self, condition: bool) -> dict[str, np.ndarray]:
        return {"x": matrix(99)[:1], "condition": np.array(condition)}


def everywhere() -> Everywhere:
    names = ("main", "constant", "function", "body", "body_constant")
    matrices = {name: matrix(seed) for seed, name in enumerate(names)}
    opset = helper.make_opsetid("", 17)
    then_branch = helper.make_graph(
        [helper.make_node("MatMul", ["inner", "body"], ["then_y"])],
        "then",
        [],
        [floats("then_y", [1, SIDE])],
        [numpy_helper.from_array(matrices["body"], "body")],
    )
    else_branch = helper.make_graph(
        [
            helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(matrices["body_constant"])),
            helper.make_node("MatMul", ["inner", "k"], ["else_y"]),
        ],
        "else",
        [],
        [floats("else_y", [1, SIDE])],
    )
    function = helper.make_function(
        "local",
        "Project",
        ["p"],
        ["q"],
        [
            helper.make_node("Constant", [], ["k"], value=numpy_helper.from_array(matrices["function"])),
            helper.make_node("MatMul", ["p", "k"], ["q"]),
        ],
        [opset],
    )
    nodes = [
        helper.make_node("MatMul", ["x", "main"], ["a"], name="/first"),
        helper.make_node("Constant", [], ["constant"], value=numpy_helper.from_array(matrices["constant"], "inside")),
        helper.make_node("Gather", ["constant", "zero"], ["row"], axis=0),
        helper.make_node("Add", ["a", "row"], ["b"]),
        helper.make_node("Project", ["b"], ["inner"], domain="local"),
        helper.make_node("If", ["condition"], ["y"], then_branch=then_branch, else_branch=else_branch),
    ]
    helper.set_metadata_props(nodes[0], {"layer": "first"})
    graph = helper.make_graph(
        nodes,
        "everywhere",
        [floats("x", [1, SIDE]), helper.make_tensor_value_info("condition", TensorProto.BOOL, [])],
        [floats("y", [1, SIDE])],
        [numpy_helper.from_array(matrices["main"], "main"), numpy_helper.from_array(np.array([0]), "zero")],
    )
    imports = [opset, helper.make_opsetid("local", 1)]
    proto = helper.make_model(graph, opset_imports=imports, functions=[function], ir_version=10)
    helper.set_model_props(proto, {"made": "by hand"})
    helper.set_metadata_props(proto.graph.initializer[0], {"weight": "yes"})
    return Everywhere(proto, matrices)


def chain(*weights: np.ndarray, name: str = "chain") -> onnx.ModelProto:
    """A model that multiplies x by each weight in turn."""
    nodes = [helper.make_node("MatMul", [f"x{i}", f"w{i}"], [f"x{i + 1}"]) for i in range(len(weights))]
    graph = helper.make_graph(
        nodes,
        name,
        [floats("x0", ["n", weights[0].shape[0]])],
        [floats(f"x{len(weights)}", ["n", weights[-1].shape[1]])],
        [numpy_helper.from_array(weight, f"w{i}") for i, weight in enumerate(weights)],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def outside(
    name: str, shape: Sequence[int], *, dtype: int = TensorProto.FLOAT, **reference: object
) -> onnx.TensorProto:
    """A tensor whose data is in another file."""
    tensor = TensorProto(name=name, data_type=dtype, dims=shape, data_location=TensorProto.EXTERNAL)
    for key, value in reference.items():
        tensor.external_data.add(key=key, value=str(value))
    return tensor


def with_initializer(tensor: onnx.TensorProto) -> onnx.ModelProto:
    """A model whose only weight is this tensor, and whose output it is."""
    shape = list(tensor.dims)
    output = helper.make_tensor_value_info("y", tensor.data_type, shape)
    graph = helper.make_graph([helper.make_node("Identity", [tensor.name], ["y"])], "one", [], [output], [tensor])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=13)


def write(proto: onnx.ModelProto, path: Path) -> Path:
    path.write_bytes(proto.SerializeToString())
    return path


def tensor_of(model: ir.Model, name: str) -> ir.TensorProtocol:
    tensor = model.graph.initializers[name].const_value
    assert tensor is not None
    return tensor
