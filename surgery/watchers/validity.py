"""Validity: after each step, whether the graphs are well formed."""

from __future__ import annotations

import time

import onnx
import onnx_ir as ir

from surgery.errors import ModelFileError, StepFailed
from surgery.manager import StepRecord
from surgery.storage import check_structure, skeleton


class Validity:
    """Checks each model with onnx's checker and strict type inference, without its weights.

    Names are unique in each scope, nodes stand in topological order, types agree with what the operators give.
    """

    def __init__(self) -> None:
        self._valid: set[str] = set()

    def starting(self, number: int, word: str) -> None:
        """Nothing to do before a step."""

    def stepped(self, record: StepRecord) -> None:
        """Check what the step has changed.

        Raises:
            StepFailed: A model is not valid any more.
            ModelFileError: The source is not valid to begin with.
        """
        start = time.perf_counter()
        identities = record.after.identities()
        for role, model in record.after.models.items():
            if identities[role] in self._valid:
                continue
            problem = find_problem(model)
            if problem and record.is_source:
                raise ModelFileError(
                    f"{role}: not a valid ONNX model: {problem}", hint="--no-check works on it as it is"
                )
            if problem:
                raise StepFailed(f"{role}: left an invalid model: {problem}")
            self._valid.add(identities[role])
        record.check_seconds += time.perf_counter() - start


def find_problem(model: ir.Model) -> str:
    """Return what is wrong with a model, or an empty string."""
    try:
        check_structure(model)
        onnx.checker.check_model(_without_weights(model), full_check=True)
    except ModelFileError as error:
        return error.message
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        return _first_sentence(str(error))
    return ""


def _without_weights(model: ir.Model) -> onnx.ModelProto:
    """Return the model with its weights as inputs: the checker refuses links and missing files of external data."""
    content, _ = skeleton(model)
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
    return proto


def _first_sentence(text: str) -> str:
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[0] if lines else "(no text)"
