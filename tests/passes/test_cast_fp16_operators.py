"""`cast_fp16` on onnx's own examples of its operators: whatever there is to cast, what comes out is valid and runs."""

from __future__ import annotations

import warnings
from collections.abc import Iterator

import onnx_ir as ir
import onnxruntime
import pytest
from halving import assert_valid, cast_bundle, casting
from onnx.backend.test.case.node import collect_testcases
from rewriting import ROLE

from passes.audit_ranges import Ranges
from surgery.bundle import Bundle
from surgery.contract import Change
from surgery.watchers.validity import find_problem

NEWEST_OPSET, NEWEST_IR = 26, 13
NOTHING = {ROLE: Ranges(values={}, samples=1)}


def examples() -> Iterator[tuple[str, ir.Model]]:
    """Yield the examples with float32 inputs or outputs that are valid and run as they are, by name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cases = [case for case in collect_testcases(None) if case.model is not None]
    for case in cases:
        model = ir.serde.deserialize_model(case.model)
        model.opset_imports.update({name: min(NEWEST_OPSET, opset) for name, opset in model.opset_imports.items()})
        model.ir_version = min(NEWEST_IR, model.ir_version)
        values = (*model.graph.inputs, *model.graph.outputs)
        if any(value.dtype == ir.DataType.FLOAT for value in values) and not find_problem(model) and runs(model):
            yield case.name, model


def runs(model: ir.Model) -> bool:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    content = ir.to_proto(model).SerializeToString()
    try:
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    except Exception:  # whatever it dislikes about an example
        return False
    return True


@pytest.mark.long
@pytest.mark.parametrize("keep_io", ["all", "none"])
def test_examples_of_all_operators_are_cast_to_valid_models_that_open_and_are_not_cast_again(keep_io: str):
    pass_ = casting(keep_io=keep_io)
    count = 0
    for name, model in examples():
        after, change = cast_bundle(pass_, Bundle({ROLE: model}), NOTHING)
        if not change.count:
            continue
        count += 1
        try:
            assert_valid(after[ROLE])
        except Exception as error:
            raise AssertionError(name) from error
        _, nothing = cast_bundle(pass_, after, NOTHING)
        assert nothing == Change(0, ""), name
    assert count > 800
