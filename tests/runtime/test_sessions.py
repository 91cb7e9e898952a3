"""Fast sessions: ONNX Runtime maps the weights' files by itself, and sees what the model says at that moment."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from surgery.errors import SurgeryError
from surgery.runtime.sessions import open_fast_session, open_session
from surgery.storage import fingerprint, open_model, save_model
from surgery.text import parse

SIDE = 48


def weight(seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((SIDE, SIDE), dtype=np.float32)


def chain(*seeds: int) -> onnx.ModelProto:
    """Return a model that multiplies x by one weight after the other."""
    names = ["x", *(f"h{index}" for index in range(1, len(seeds))), "y"]
    nodes = [helper.make_node("MatMul", [names[index], f"w{index}"], [names[index + 1]]) for index in range(len(seeds))]
    shape = ["n", SIDE]
    graph = helper.make_graph(
        nodes,
        "chain",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(weight(seed), f"w{index}") for index, seed in enumerate(seeds)],
    )
    return helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])


def saved(path: Path, *seeds: int, layout: str = "optimum") -> ir.Model:
    path.parent.mkdir(parents=True, exist_ok=True)
    save_model(ir.from_proto(chain(*seeds)), path, layout=layout)
    return open_model(path)


X = weight(99)[:3]


def answer(model: ir.Model, **options) -> np.ndarray:
    return open_fast_session(model, threads=1, **options).run(None, {"x": X})[0]


def expected(*seeds: int) -> np.ndarray:
    y = X
    for seed in seeds:
        y = y @ weight(seed)
    return y


@pytest.mark.parametrize("layout", ["optimum", "single"])
@pytest.mark.parametrize("prepacking", [True, False])
def test_weights_on_disk_are_not_handed_over(tmp_path, layout, prepacking):
    model = saved(tmp_path / "m.onnx", 1, 2, layout=layout)
    session = open_fast_session(model, threads=1, prepacking=prepacking)
    assert session.surgery_weights == {}
    np.testing.assert_allclose(session.run(None, {"x": X})[0], expected(1, 2), rtol=1e-4, atol=1e-4)


def test_weights_of_several_folders_and_of_memory_work_together(tmp_path):
    here = saved(tmp_path / "a" / "m.onnx", 1, 2, 3)
    there = saved(tmp_path / "b" / "deep" / "m.onnx", 4)
    weights = here.graph.initializers
    weights["w1"].const_value = there.graph.initializers["w0"].const_value
    weights["w2"].const_value = ir.tensor(weight(5))
    session = open_fast_session(here, threads=1)
    assert set(session.surgery_weights) == {"w2"}
    np.testing.assert_allclose(session.run(None, {"x": X})[0], expected(1, 4, 5), rtol=1e-4, atol=1e-3)


def test_a_file_that_was_replaced_after_it_was_opened_is_not_the_one_that_is_read(tmp_path):
    model = saved(tmp_path / "m.onnx", 1)
    other = saved(tmp_path / "other.onnx", 2)
    (tmp_path / "other.onnx_data").replace(tmp_path / "m.onnx_data")
    np.testing.assert_allclose(answer(model), expected(1), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(answer(other), expected(2), rtol=1e-4, atol=1e-4)


def test_a_link_of_the_hub_cache_is_followed(tmp_path):
    repository = tmp_path / "models--somebody--something"
    snapshot = repository / "snapshots" / "r0"
    saved(snapshot / "m.onnx", 1)
    (repository / "blobs").mkdir()
    (snapshot / "m.onnx_data").rename(repository / "blobs" / "abc")
    (snapshot / "m.onnx_data").symlink_to(Path("../../blobs/abc"))
    model = open_model(snapshot / "m.onnx")
    assert open_fast_session(model, threads=1).surgery_weights == {}
    np.testing.assert_allclose(answer(model), expected(1), rtol=1e-4, atol=1e-4)


def test_the_model_stays_as_it_is(tmp_path):
    model = saved(tmp_path / "m.onnx", 1, 2)
    before = fingerprint(model), ir.to_proto(model)
    open_fast_session(model, threads=1)
    assert (fingerprint(model), ir.to_proto(model)) == before


def test_other_options_can_be_set(tmp_path):
    model = saved(tmp_path / "m.onnx", 1)

    def profile(options: onnxruntime.SessionOptions) -> None:
        options.enable_profiling = True
        options.profile_file_prefix = str(tmp_path / "profile")

    session = open_fast_session(model, threads=1, configure=profile)
    session.run(None, {"x": X})
    assert "MatMul" in Path(session.end_profiling()).read_text()


def test_a_provider_may_come_with_options(tmp_path):
    session = open_fast_session(saved(tmp_path / "m.onnx", 1), providers=[("CPUExecutionProvider", {})])
    assert session.get_providers() == ["CPUExecutionProvider"]


@pytest.mark.parametrize("opened", [open_fast_session, open_session])
def test_a_provider_that_is_not_there_is_refused_and_not_replaced(tmp_path, opened):
    model = saved(tmp_path / "m.onnx", 1)
    with pytest.raises(SurgeryError, match=r"'NoProvider' is not available.*\n.*CPUExecutionProvider"):
        opened(model, providers=("NoProvider", "CPUExecutionProvider"))


def test_a_merged_decoder_keeps_one_rearranged_copy_for_both_branches(tmp_path):
    """In a process of its own: anonymous memory of a session over `If(flag, x @ w, (x + x) @ w)` of 64 MB."""
    script = """
import sys
from pathlib import Path
from surgery.runtime.sessions import open_fast_session
from surgery.storage import open_model

def anonymous():
    line = next(l for l in Path("/proc/self/status").read_text().splitlines() if l.startswith("RssAnon"))
    return int(line.split()[1]) / 1024

import onnxruntime
model, before = open_model(Path(sys.argv[1])), anonymous()
session = open_fast_session(model, threads=1)
print(anonymous() - before)
"""
    side = 4096

    def branch(name: str, *nodes: onnx.NodeProto) -> onnx.GraphProto:
        output = helper.make_tensor_value_info(f"{name}_y", TensorProto.FLOAT, ["n", side])
        return helper.make_graph(nodes, name, [], [output])

    then = branch("a", helper.make_node("MatMul", ["x", "w"], ["a_y"]))
    other = branch("b", helper.make_node("Add", ["x", "x"], ["two"]), helper.make_node("MatMul", ["two", "w"], ["b_y"]))
    graph = helper.make_graph(
        [helper.make_node("If", ["flag"], ["y"], then_branch=then, else_branch=other)],
        "g",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", side]),
            helper.make_tensor_value_info("flag", TensorProto.BOOL, [1]),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", side])],
        [numpy_helper.from_array(np.random.default_rng(0).standard_normal((side, side), dtype=np.float32), "w")],
    )
    proto = helper.make_model(graph, ir_version=8, opset_imports=[helper.make_opsetid("", 18)])
    save_model(ir.from_proto(proto), tmp_path / "m.onnx", layout="optimum")
    command = [sys.executable, "-c", script, str(tmp_path / "m.onnx")]
    megabytes = float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    assert 60 < megabytes < 100


@pytest.mark.parametrize(("cache", "wanted"), [(False, "LayerNormalization"), (True, "SkipLayerNormalization")])
def test_sums_and_norms_are_one_node_where_there_is_a_cache_only(tmp_path, cache, wanted):
    model = parse("""
<ir_version: 8, opset_import: ["" : 17]>
g (float[b, s, 8] x, float[b, 2, past, 4] c) => (float[b, s, 8] y, float[b, 2, past, 4] d)
    <float[8] scale = {1, 2, 3, 4, 5, 6, 7, 8}, float[8] bias = {1, 0, 1, 0, 1, 0, 1, 0}> {
    twice = Mul(x, x)
    sum = Add(x, twice)
    y = LayerNormalization <axis = -1> (sum, scale, bias)
    d = Neg(c)
}
""")
    if cache:
        names = {"past_key_values.0.key": model.graph.inputs[1], "present.0.key": model.graph.outputs[1]}
        for name, value in names.items():
            value.name = name
    seen = tmp_path / "optimized.onnx"

    def configure(options: onnxruntime.SessionOptions) -> None:
        options.optimized_model_filepath = str(seen)

    open_fast_session(model, threads=1, configure=configure)
    assert wanted in {node.op_type for node in onnx.load(seen).graph.node}
