"""Sessions over models whose weights stay where they are."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import SIDE, chain, everywhere, floats, matrix, outside, with_initializer, write

from surgery.errors import ModelFileError
from surgery.runtime.sessions import open_session, session_values
from surgery.storage import Region, fingerprint, open_model, skeleton


def run(model: ir.Model, feeds: Mapping[str, np.ndarray], **options) -> list[np.ndarray]:
    return open_session(model, **options).run(None, dict(feeds))


@pytest.mark.parametrize("condition", [True, False])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"prepacking": True}])
def test_weights_in_every_place_give_the_right_numbers(tmp_path, condition, options):
    model = everywhere()
    opened = open_model(write(model.proto, tmp_path / "m.onnx"))
    feeds = model.feeds(condition)
    np.testing.assert_allclose(
        run(opened, feeds, **options)[0], model.expected(feeds["x"], condition), rtol=1e-4, atol=1e-2
    )


def test_a_skeleton_has_no_weights_and_names_them_all(tmp_path):
    model = everywhere()
    opened = open_model(write(model.proto, tmp_path / "m.onnx"))
    content, weights = skeleton(opened)
    inline = 4096  # the function's
    assert len(content) < inline + 4096
    assert sorted(weights) == ["body__of_body_0", "constant", "k__of_body_0", "main"]
    names = {tensor.name for tensor in onnx.ModelProto.FromString(content).graph.initializer}
    assert names == {*weights, "zero"}
    assert all(isinstance(weight, Region) for weight in weights.values())


def test_the_model_stays_as_it_is(tmp_path):
    opened = open_model(write(everywhere().proto, tmp_path / "m.onnx"))
    before = fingerprint(opened), ir.to_proto(opened)
    skeleton(opened)
    open_session(opened)
    assert (fingerprint(opened), ir.to_proto(opened)) == before


def test_weights_from_several_folders_and_from_memory_work_together(tmp_path):
    for seed, folder in enumerate("ab"):
        (tmp_path / folder).mkdir()
        write(chain(matrix(seed)), tmp_path / folder / "m.onnx")
    model = open_model(write(chain(matrix(7), matrix(8), matrix(9)), tmp_path / "m.onnx"))
    for index, folder in enumerate("ab"):
        other = open_model(tmp_path / folder / "m.onnx")
        model.graph.initializers[f"w{index}"].const_value = other.graph.initializers["w0"].const_value
    model.graph.initializers["w2"].const_value = ir.tensor(matrix(2), name="anything")
    expected = matrix(5) @ matrix(0) @ matrix(1) @ matrix(2)
    np.testing.assert_allclose(run(model, {"x0": matrix(5)})[0], expected, rtol=1e-3, atol=1e-2)


@pytest.mark.parametrize("offset", [0, 1, 2, 3, 13])
def test_unaligned_weights_give_the_very_bits_of_aligned_ones(tmp_path, offset):
    (tmp_path / "w.bin").write_bytes(b"?" * offset + matrix(0).tobytes())
    proto = chain(matrix(0))
    del proto.graph.initializer[:]
    proto.graph.initializer.append(outside("w0", [SIDE, SIDE], location="w.bin", offset=offset))
    moved = run(open_model(write(proto, tmp_path / "m.onnx")), {"x0": matrix(1)})[0]
    assert np.array_equal(moved, run(ir.from_proto(chain(matrix(0))), {"x0": matrix(1)})[0])


def cast_model(tmp_path: Path, values: np.ndarray, dtype: ir.DataType, offset: int) -> ir.Model:
    """y = Cast(w) to float32, of a weight of this type at this offset of its file."""
    (tmp_path / "w.bin").write_bytes(b"?" * offset + ir.Tensor(values, dtype=dtype).tobytes())
    weight = outside("w", values.shape, dtype=int(dtype), location="w.bin", offset=offset)
    node = helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)
    graph = helper.make_graph([node], "g", [], [floats("y", values.shape)], [weight])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 25)], ir_version=13)
    return open_model(write(proto, tmp_path / "m.onnx"))


@pytest.mark.parametrize("offset", [0, 5])
@pytest.mark.parametrize(
    "dtype",
    [
        *(
            "FLOAT16",
            "BFLOAT16",
            "DOUBLE",
            "FLOAT8E4M3FN",
            "FLOAT8E4M3FNUZ",
            "FLOAT8E5M2",
            "FLOAT8E5M2FNUZ",
            "FLOAT8E8M0",
        ),
        *("INT4", "UINT4", "INT2", "UINT2", "BOOL", "INT8", "UINT8", "INT16", "UINT16", "INT32", "UINT32", "INT64"),
    ],
)
def test_weights_of_every_type_that_onnx_runtime_casts_give_the_right_numbers(tmp_path, dtype, offset):
    kind = ir.DataType[dtype]
    ints = (
        np.random.default_rng(0).integers(0, 2, (65, 63))
        if kind.bitwidth < 16
        else np.arange(4095).reshape(65, 63) % 100
    )
    values = ints.astype(np.float32).astype(kind.numpy())
    model = cast_model(tmp_path, values, kind, offset)
    assert isinstance(model.graph.initializers["w"].const_value, Region)
    assert "w" in skeleton(model, inline_below=1)[1]
    got = run(model, {})[0]
    assert np.array_equal(got, values.astype(np.float32), equal_nan=True)


def test_negative_four_bit_weights_keep_their_sign(tmp_path):
    values = (np.arange(4096).reshape(64, 64) % 16 - 8).astype(ml_dtypes.int4)
    assert np.array_equal(run(cast_model(tmp_path, values, ir.DataType.INT4, 1), {})[0], values.astype(np.float32))


def test_a_bfloat16_weight_in_memory_works_too():
    values = matrix(0).astype(ml_dtypes.bfloat16)
    graph = helper.make_graph(
        [helper.make_node("Cast", ["w"], ["y"], to=TensorProto.FLOAT)], "g", [], [floats("y", [SIDE, SIDE])]
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    weight = next(iter(model.graph)).inputs[0]
    weight.const_value = ir.tensor(values, name="w")
    model.graph.initializers.add(weight)
    assert np.array_equal(run(model, {})[0], values.astype(np.float32))


def test_a_weight_that_is_an_input_can_still_be_overridden(tmp_path):
    proto = chain(matrix(0))
    proto.graph.input.append(floats("w0", [SIDE, SIDE]))
    session = open_session(open_model(write(proto, tmp_path / "m.onnx")))
    np.testing.assert_allclose(session.run(None, {"x0": matrix(1)})[0], matrix(1) @ matrix(0), rtol=1e-3, atol=1e-3)
    overridden = session.run(None, {"x0": matrix(1), "w0": matrix(2)})[0]
    np.testing.assert_allclose(overridden, matrix(1) @ matrix(2), rtol=1e-3, atol=1e-3)


def test_a_weight_that_is_an_output_comes_out(tmp_path):
    proto = chain(matrix(0))
    proto.graph.output.append(floats("w0", [SIDE, SIDE]))
    out = run(open_model(write(proto, tmp_path / "m.onnx")), {"x0": matrix(1)})
    assert np.array_equal(out[1], matrix(0))


def test_a_constant_that_is_an_output_comes_out():
    node = helper.make_node("Constant", [], ["y"], value=numpy_helper.from_array(matrix(0)))
    graph = helper.make_graph([node], "g", [], [floats("y", [SIDE, SIDE])])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert np.array_equal(run(model, {})[0], matrix(0))


def branches(then_branch: onnx.GraphProto, else_branch: onnx.GraphProto) -> ir.Model:
    node = helper.make_node("If", ["c"], ["y"], then_branch=then_branch, else_branch=else_branch)
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph([node], "g", [condition], [floats("y", [SIDE, SIDE])])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))


def test_branches_may_name_different_weights_alike_and_give_them_out():
    def branch(seed: int) -> onnx.GraphProto:
        return helper.make_graph(
            [], f"b{seed}", [], [floats("w", [SIDE, SIDE])], [numpy_helper.from_array(matrix(seed), "w")]
        )

    session = open_session(branches(branch(0), branch(1)))
    for condition, seed in ((True, 0), (False, 1)):
        assert np.array_equal(session.run(None, {"c": np.array(condition)})[0], matrix(seed))


def test_weights_of_bodies_in_bodies_are_found_where_names_hide_each_other():
    deep = helper.make_graph(
        [helper.make_node("Add", ["w", "v"], ["deep_y"])],
        "deep",
        [],
        [floats("deep_y", [SIDE, SIDE])],
        [numpy_helper.from_array(matrix(3), "v")],
    )
    hiding = helper.make_graph(
        [helper.make_node("Identity", ["w"], ["hiding_y"])],
        "hiding",
        [],
        [floats("hiding_y", [SIDE, SIDE])],
        [numpy_helper.from_array(matrix(4), "w")],
    )
    outer = helper.make_graph(
        [helper.make_node("If", ["c"], ["z"], then_branch=deep, else_branch=hiding)],
        "outer",
        [],
        [floats("z", [SIDE, SIDE])],
        [numpy_helper.from_array(matrix(2), "w")],
    )
    other = helper.make_graph(
        [helper.make_node("If", ["c"], ["z2"], then_branch=deep_copy(deep), else_branch=hiding)],
        "other",
        [],
        [floats("z2", [SIDE, SIDE])],
        [numpy_helper.from_array(matrix(5), "w")],
    )
    session = open_session(branches(outer, other))
    assert np.array_equal(session.run(None, {"c": np.array(True)})[0], matrix(2) + matrix(3))
    assert np.array_equal(session.run(None, {"c": np.array(False)})[0], matrix(4))


def deep_copy(graph: onnx.GraphProto) -> onnx.GraphProto:
    return onnx.GraphProto.FromString(graph.SerializeToString())


def test_a_loop_body_may_use_its_own_weights():
    body = helper.make_graph(
        [helper.make_node("MatMul", ["state", "w"], ["next"]), helper.make_node("Identity", ["go"], ["goes"])],
        "body",
        [
            helper.make_tensor_value_info("i", TensorProto.INT64, []),
            helper.make_tensor_value_info("go", TensorProto.BOOL, []),
            floats("state", [SIDE, SIDE]),
        ],
        [helper.make_tensor_value_info("goes", TensorProto.BOOL, []), floats("next", [SIDE, SIDE])],
        [numpy_helper.from_array(matrix(1), "w")],
    )
    graph = helper.make_graph(
        [helper.make_node("Loop", ["n", "", "x"], ["y"], body=body)],
        "g",
        [floats("x", [SIDE, SIDE])],
        [floats("y", [SIDE, SIDE])],
        [numpy_helper.from_array(np.array(2), "n")],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    np.testing.assert_allclose(run(model, {"x": matrix(0)})[0], matrix(0) @ matrix(1) @ matrix(1), rtol=1e-3, atol=1e-1)


def test_weights_shared_by_several_initializers_are_shared_by_the_session():
    model = ir.from_proto(chain(matrix(0), matrix(1)))
    model.graph.initializers["w1"].const_value = model.graph.initializers["w0"].const_value
    _, weights = skeleton(model)
    pointers = {value.data_ptr() for value in session_values(weights).values()}
    assert len(pointers) == 1
    assert model.graph.initializers["w0"].const_value.name == "w0"
    np.testing.assert_allclose(
        run(model, {"x0": matrix(5)})[0], matrix(5) @ matrix(0) @ matrix(0), rtol=1e-3, atol=1e-1
    )


def test_small_weights_stay_inline_where_shape_inference_sees_them():
    node = helper.make_node("Reshape", ["x", "shape"], ["y"])
    shape = numpy_helper.from_array(np.array([-1, 4]), "shape")
    graph = helper.make_graph([node], "g", [floats("x", [8])], [floats("y", ["n", 4])], [shape])
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    assert skeleton(model)[1] == {}
    assert run(model, {"x": np.zeros(8, np.float32)})[0].shape == (2, 4)


def test_the_weights_live_as_long_as_the_session(tmp_path):
    path = write(chain(matrix(0)), tmp_path / "m.onnx")
    session = open_session(open_model(path))
    path.unlink()
    np.testing.assert_allclose(session.run(None, {"x0": matrix(1)})[0], matrix(1) @ matrix(0), rtol=1e-3, atol=1e-3)


def anonymous_mb() -> int:
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"RssAnon:\s+(\d+)", status)[1]) // 1024


def test_a_session_copies_no_weights(tmp_path):
    side, count = 2048, 12  # 12 x 16 MiB
    weights = [np.full((side, side), 1 / side, np.float32)] * count
    model = open_model(write(chain(*weights), tmp_path / "m.onnx"))
    del weights
    before = anonymous_mb()
    sessions = [open_session(model) for _ in range(2)]
    outputs = [session.run(None, {"x0": np.ones((1, side), np.float32)})[0] for session in sessions]
    assert anonymous_mb() - before < 40
    assert np.array_equal(*outputs)
    np.testing.assert_allclose(outputs[0], 1, rtol=1e-4)


def test_a_model_that_onnx_runtime_does_not_take_is_refused_in_one_sentence():
    proto = with_initializer(numpy_helper.from_array(matrix(0), "w"))
    proto.graph.node[0].op_type, proto.graph.node[0].name = "NoSuchOperator", "odd"
    with pytest.raises(ModelFileError) as caught:
        open_session(ir.from_proto(proto))
    assert "ONNX Runtime refuses the model: " in str(caught.value)
    assert "NoSuchOperator" in str(caught.value)
    assert "ONNXRuntimeError" not in str(caught.value)
    assert "\n" not in caught.value.message


def test_a_model_that_is_too_new_for_onnx_runtime_is_explained():
    newest = onnx.defs.onnx_opset_version()
    proto = with_initializer(numpy_helper.from_array(matrix(0), "w"))
    proto.graph.node[0].op_type = "NotInAnySchema"  # keeps the opset as declared
    proto.opset_import[0].version = newest + 1
    with pytest.raises(ModelFileError) as caught:
        open_session(ir.from_proto(proto))
    assert caught.value.hint.startswith("export for an older operator set")


def test_a_model_that_declares_too_much_runs_all_the_same():
    proto = chain(matrix(0))
    proto.opset_import[0].version, proto.ir_version = onnx.defs.onnx_opset_version(), onnx.IR_VERSION
    with pytest.raises(Exception, match="Unsupported model IR version|under development|opset"):
        onnxruntime.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    assert run(ir.from_proto(proto), {"x0": matrix(1)})[0].shape == (SIDE, SIDE)
