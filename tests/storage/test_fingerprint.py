"""Telling models apart by what they say."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import onnx_ir as ir
import pytest
from onnx import TensorProto
from small_models import chain, everywhere, matrix, tensor_of, with_initializer, write

from surgery.provenance import CHANGED_BY, MADE_BY
from surgery.storage import fingerprint, identity, open_model, role_of_file, save_models


@pytest.mark.parametrize("layout", ["optimum", "shared", "single"])
def test_a_fingerprint_does_not_depend_on_the_layout_or_the_process(tmp_path, layout):
    path = write(everywhere().proto, tmp_path / "m.onnx")
    expected = fingerprint(open_model(path))
    save_models({"model": open_model(path)}, tmp_path / "out", layout=layout)
    script = "import sys; from surgery.storage import *; print(fingerprint(open_model(sys.argv[1])))"
    saved = tmp_path / "out" / "model.onnx"
    done = subprocess.run([sys.executable, "-c", script, saved], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == expected == fingerprint(ir.from_proto(everywhere().proto))


def test_a_fingerprint_does_not_depend_on_the_field_that_holds_the_values():
    values = np.arange(500, dtype=np.float32)
    one = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[500], raw_data=values.tobytes())
    other = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[500], float_data=values.tolist())
    assert fingerprint(ir.from_proto(with_initializer(one))) == fingerprint(ir.from_proto(with_initializer(other)))


def changed_weight(model: ir.Model) -> None:
    values = tensor_of(model, "w0").numpy().copy()
    values[-1, -1] = np.nextafter(values[-1, -1], np.float32(9))
    model.graph.initializers["w0"].const_value = ir.tensor(values, name="w0")


def renamed_output(model: ir.Model) -> None:
    model.graph.outputs[0].name = "other"


def added_metadata(model: ir.Model) -> None:
    model.metadata_props["note"] = "new"


def swapped_weights(model: ir.Model) -> None:
    one, two = (model.graph.initializers[name] for name in ("w0", "w1"))
    one.const_value, two.const_value = two.const_value, one.const_value


@pytest.mark.parametrize("change", [changed_weight, renamed_output, added_metadata, swapped_weights])
@pytest.mark.parametrize("measure", [fingerprint, identity])
def test_every_change_changes_both(tmp_path, measure, change):
    model = open_model(write(chain(matrix(0), matrix(1)), tmp_path / "m.onnx"))
    before = measure(model)
    assert measure(model) == before
    assert measure(model.clone()) == before
    change(model)
    assert measure(model) != before


def test_an_identity_reads_no_weights_from_disk(tmp_path):
    path = write(chain(matrix(0)), tmp_path / "m.onnx")
    model = open_model(path)
    before = identity(model)
    path.write_bytes(b"")
    assert identity(model) == before


def test_an_identity_tells_two_big_tensors_in_memory_apart_even_if_one_replaces_the_other():
    big = np.zeros((512, 1024), np.float32)
    model = ir.from_proto(chain(matrix(0)))
    seen = set()
    for value in range(5):
        model.graph.initializers["w0"].const_value = ir.tensor(big + value, name="w0")
        seen.add(identity(model))
    assert len(seen) == 5


@pytest.mark.parametrize("measure", [fingerprint, identity])
def test_which_step_made_a_node_tells_no_models_apart(measure):
    model = ir.from_proto(everywhere().proto)
    before = measure(model)
    for node in model.graph.all_nodes():
        node.metadata_props[MADE_BY] = "dedup_weights (step 1)"
    for function in model.functions.values():
        for node in function.all_nodes():
            node.metadata_props[CHANGED_BY] = "dedup_weights (step 1)"
    assert measure(model) == before
    next(iter(model.graph)).metadata_props["somebody"] = "else"
    assert measure(model) != before


def test_roles_and_file_names_belong_together():
    from surgery.storage import file_of_role

    names = {
        "encoder": "encoder_model.onnx",
        "prefill": "decoder_model.onnx",
        "decode": "decoder_with_past_model.onnx",
        "decoder": "decoder_model_merged.onnx",
        "generator": "generator.onnx",
        "model": "model.onnx",
        "vision": "vision.onnx",
    }
    assert {role: file_of_role(role) for role in names} == names
    assert {role_of_file(f"some/folder/{name}"): name for name in names.values()} == names
