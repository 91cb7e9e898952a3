"""Whether a model is valid, without its weights."""

from __future__ import annotations

import onnx
import onnx_ir as ir

from surgery.errors import ModelFileError
from surgery.storage.protos import subgraphs_of
from surgery.storage.skeleton import skeleton
from surgery.storage.structure import check_structure

RUNTIME_DOMAIN = "com.microsoft"
RUNTIME_OPERATORS = frozenset(("SimplifiedLayerNormalization",))


def find_problem(model: ir.Model) -> str:
    """Return what is wrong with a model, or an empty string."""
    try:
        check_structure(model)
        content, _ = skeleton(model)
    except ModelFileError as error:
        return error.message
    return find_problem_in(content)


def find_problem_in(content: bytes) -> str:
    """Return what is wrong with a model that `skeleton` has serialised, or an empty string."""
    try:
        onnx.checker.check_model(_without_weights(content), full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return _first_sentence(str(error))
    return ""


def _without_weights(content: bytes) -> onnx.ModelProto:
    """Return a skeleton with its weights as inputs: the checker refuses links and missing files of external data."""
    proto = onnx.load_model_from_string(content)
    inline = []
    overridable = {value.name for value in proto.graph.input}
    for tensor in proto.graph.initializer:
        if tensor.data_location != onnx.TensorProto.EXTERNAL:
            inline.append(tensor)
        elif tensor.name not in overridable:
            proto.graph.input.append(
                onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, list(tensor.dims))
            )
    kept = [onnx.TensorProto.FromString(tensor.SerializeToString()) for tensor in inline]
    del proto.graph.initializer[:]
    proto.graph.initializer.extend(kept)
    _move_runtime_operators(proto)
    return proto


def _move_runtime_operators(proto: onnx.ModelProto) -> None:
    """Put operators that ONNX Runtime adds to the standard domain into its own, of which the checker knows nothing.

    onnxruntime-genai 0.18 writes them so; ONNX Runtime 1.31 registers them so (`contrib_ops/contrib_defs.cc`).
    """
    pending = [proto.graph.node, *(function.node for function in proto.functions)]
    while pending:
        for node in pending.pop():
            pending += [graph.node for graph in subgraphs_of(node)]
            if node.domain == "" and node.op_type in RUNTIME_OPERATORS:
                node.domain = RUNTIME_DOMAIN
    if RUNTIME_DOMAIN not in {entry.domain for entry in proto.opset_import}:
        proto.opset_import.append(onnx.helper.make_opsetid(RUNTIME_DOMAIN, 1))


def _first_sentence(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "(no text)"
