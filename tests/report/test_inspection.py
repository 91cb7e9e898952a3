"""`surgery inspect`: what it says of models, against what onnx and ONNX Runtime say of the same files."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import fields
from io import StringIO
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnxruntime
import pytest
from models import decoder_pair
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from storage.small_models import chain, everywhere, floats, matrix, outside, with_initializer, write

from surgery.errors import ModelFileError, RecipeError
from surgery.report.inspection import found as found_module
from surgery.report.inspection import inspect_paths, print_inspection
from surgery.report.inspection.found import Casts, Finding, FoundModel, Inspection
from surgery.report.inspection.layers import layer_of_path
from surgery.storage import open_model, save_model, save_models
from surgery.storage.opening import AbsentFile
from surgery.text import parse

ROOT = Path(__file__).resolve().parent.parent.parent

Run = Callable[..., subprocess.CompletedProcess[str]]


def draw(path: Path, text: str, *initializers: onnx.TensorProto) -> Path:
    """Write a model that is drawn as text; its types are what the text says, whatever the checker thinks of them."""
    proto = onnx.parser.parse_model(text)
    proto.graph.initializer.extend(initializers)
    return write(proto, path)


def inspect_one(path: Path) -> FoundModel:
    (model,) = inspect_paths([path]).models
    return model


def page(found: Inspection) -> str:
    stream = StringIO()
    print_inspection(Console(file=stream, width=120, color_system=None, highlight=False), found)
    return stream.getvalue()


def wrong(model: FoundModel, by: str = "ONNX Runtime") -> list[Finding]:
    return [finding for finding in model.findings if finding.by == by]


def all_nodes(graph: onnx.GraphProto) -> Iterator[onnx.NodeProto]:
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                yield from all_nodes(attribute.g)


# What a model is


def test_a_pair_of_decoders_is_told_by_role_cache_and_what_a_token_takes(tmp_path):
    save_models(decoder_pair().models, tmp_path / "pair", layout="optimum")
    prefill, decode = inspect_paths([tmp_path / "pair"]).models
    assert (prefill.name, decode.name) == ("decoder_model.onnx", "decoder_with_past_model.onnx")
    assert (prefill.listed_role, decode.listed_role) == ("prefill", "decode")
    assert prefill.interface is not None
    assert decode.interface is not None
    assert (prefill.interface.role, decode.interface.role) == ("prefill", "decode")
    (cache,) = decode.interface.cache
    assert (cache.attention, cache.layers, cache.inputs, cache.outputs) == ("self", 1, 2, 2)
    assert cache.shape == ["batch_size", 2, "past_sequence_length", 4]
    assert cache.token_bytes == 2 * 2 * 4 * 4  # key and value, 2 heads of 4 floats
    assert prefill.interface.cache[0].inputs == 0


def test_a_model_that_is_no_known_decoder_has_no_role(tmp_path):
    model = inspect_one(draw(tmp_path / "m.onnx", PLAIN.format(8, 18)))
    assert model.interface is None
    assert "no known decoder" in page(inspect_paths([tmp_path / "m.onnx"]))


def test_inputs_and_outputs_are_what_the_file_says(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    g (float[batch, 4] x, seq(int64[2]) s, float16 scalar) => (float[batch, 4] y) { y = Mul(x, w) }
    """
    path = draw(tmp_path / "m.onnx", text, numpy_helper.from_array(np.ones(4, np.float32), "w"))
    proto = onnx.load(path)
    proto.graph.input.append(helper.make_tensor_value_info("w", TensorProto.FLOAT, [4]))
    proto.graph.input.append(helper.make_tensor_value_info("unknown", TensorProto.INT64, None))
    model = inspect_one(write(proto, path))
    assert [(port.name, port.type, port.shape, port.has_default) for port in model.inputs] == [
        ("x", "float", ["batch", 4], False),
        ("s", "sequence(int64)", [2], False),
        ("scalar", "float16", [], False),
        ("w", "float", [4], True),
        ("unknown", "int64", None, False),
    ]


def test_operators_are_counted_in_subgraphs_and_functions_too(tmp_path):
    proto = everywhere().proto
    model = inspect_one(write(proto, tmp_path / "m.onnx"))
    in_function = [node for function in proto.functions for node in function.node]
    expected = Counter(node.op_type for node in [*all_nodes(proto.graph), *in_function])
    assert {one.name: one.count for one in model.operators} == expected
    by_name = {one.name: one for one in model.operators}
    matmul = by_name["MatMul"]
    assert (matmul.count, matmul.in_subgraphs, matmul.in_functions) == (4, 2, 1)
    assert by_name["Project"].is_function
    assert not by_name["If"].is_function
    assert [(body.path, body.depth, body.nodes) for body in model.bodies] == [
        ("", 0, 6),
        ("If.else_branch", 1, 2),
        ("If.then_branch", 1, 1),
        ("function local::Project", 0, 2),
    ]


def test_casts_are_counted_by_what_they_cast_in_branches_too(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    g (bool c, int64[2] x) => (float[2] y) {
        a = Cast <to = 1> (x)
        b = Cast <to = 10> (a)
        d = Cast <to = 1> (b)
        y = If (c) <
            then_branch = t () => (float[2] p) { q = Cast <to = 10> (d)  p = Cast <to = 1> (q) },
            else_branch = e () => (float[2] r) { r = Neg(d) }
        >
    }
    """
    model = inspect_one(draw(tmp_path / "m.onnx", text))  # no type inside is written down: they are inferred
    assert model.casts == [
        Casts("float", "float16", 2, 1, 0),
        Casts("float16", "float", 2, 1, 0),
        Casts("int64", "float", 1, 0, 0),
    ]


def test_casts_are_told_of_what_contrib_operators_and_local_functions_give(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1, "local" : 1]>
    g (float16[2] x) => (float[2] y, float[2] z) {
        a = com.microsoft.Gelu(x)
        y = Cast <to = 1> (a)
        b = local.Twice(x)
        z = Cast <to = 1> (b)
    }
    <domain: "local", opset_import: ["" : 18]>
    Twice (u) => (v) { v = Add(u, u) }
    """
    assert inspect_one(draw(tmp_path / "m.onnx", text)).casts == [Casts("float16", "float", 2, 0, 0)]


# Weights


def test_weights_are_counted_wherever_they_stand(tmp_path):
    model = inspect_one(write(everywhere().proto, tmp_path / "m.onnx"))
    assert {one.name: one.tensors for one in model.by_place} == {
        "initializers": 2,
        "constants": 2,
        "initializers of subgraphs": 1,
        "functions": 1,
    }
    assert {one.name: (one.tensors, one.parameters, one.bytes) for one in model.by_dtype} == {
        "float": (5, 5 * 1024, 5 * 4096),
        "int64": (1, 1, 8),
    }
    assert model.weights.parameters == 5 * 1024 + 1


@pytest.mark.parametrize(
    ("path", "layer"),
    [
        ("transformer.h.11.attn.c_attn.weight", "transformer.h.11"),
        ("model.layers.0.mlp.up_proj.weight", "model.layers.0"),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", "encoder.block.1"),
        ("/decoder/block.2/layer.1/EncDecAttention/q", "decoder.block.2"),
        ("bert/encoder/layer_3/attention/self/query/kernel", "bert.encoder.layer_3"),
        ("transformer.wte.weight", "transformer.wte"),
        ("lm_head.weight.transposed", "lm_head"),
        ("final_layer_norm.weight", "final_layer_norm"),
        ("shared", "shared"),
    ],
)
def test_a_layer_is_a_path_up_to_its_first_number(path, layer):
    assert layer_of_path(path) == layer


def test_a_weight_without_a_name_of_its_own_is_of_the_layer_that_reads_it(tmp_path):
    names = ["onnx::MatMul_412", "val_12", "model.layers.1.own.weight"]
    weights = [numpy_helper.from_array(matrix(seed), name) for seed, name in enumerate(names)]
    nodes = [
        helper.make_node("Cast", [names[0]], ["cast"], name="Cast_1", to=TensorProto.FLOAT),
        helper.make_node("MatMul", ["x", "cast"], ["a"], name="/model/layers.0/mlp/MatMul"),
        helper.make_node("MatMul", ["a", names[1]], ["b"], name="node_MatMul_3"),
        helper.make_node("MatMul", ["b", names[2]], ["y"], name="/model/layers.7/MatMul"),
    ]
    helper.set_metadata_props(nodes[2], {"pkg.torch.onnx.name_scopes": "['', 'model.layers.2', 'linear']"})
    graph = helper.make_graph(nodes, "g", [floats("x", [1, 32])], [floats("y", [1, 32])], weights)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    model = inspect_one(write(proto, tmp_path / "m.onnx"))
    assert [layer.name for layer in model.by_layer] == ["model.layers.0", "model.layers.1", "model.layers.2"]


def test_layers_that_are_alike_are_one_line_and_in_the_order_of_their_numbers(tmp_path):
    count = 12
    nodes = [
        helper.make_node("MatMul", [f"x{i}", f"h.{i}.weight"], [f"x{i + 1}"], name=f"/h.{i}/MatMul")
        for i in range(count)
    ]
    weights = [numpy_helper.from_array(matrix(seed), f"h.{seed}.weight") for seed in range(count)]
    graph = helper.make_graph(nodes, "g", [floats("x0", [1, 32])], [floats(f"x{count}", [1, 32])], weights)
    path = write(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), tmp_path / "m.onnx"
    )
    assert [layer.name for layer in inspect_one(path).by_layer] == [f"h.{number}" for number in range(count)]
    (line,) = [line for line in page(inspect_paths([path])).splitlines() if "h.0" in line]
    assert line.split() == ["h.0", "...", "11", "1", "each", "1,024", "each", "4.1", "kB", "each", "100.0%"]


def test_initializers_that_nothing_reads_are_named(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 18]>
    g (bool c, float[2] x) => (float[2] y) {
        y = If (c) <
            then_branch = t () => (float[2] p) { p = Add(x, inner) },
            else_branch = e () => (float[2] q) { q = Neg(x) }
        >
    }
    """
    weights = [numpy_helper.from_array(np.ones(size, np.float32), name) for size, name in [(2, "inner"), (9, "idle")]]
    model = inspect_one(draw(tmp_path / "m.onnx", text, *weights))
    assert [(one.name, one.bytes) for one in model.unused] == [("idle", 36)]


# Equal and transposed weights


def test_weights_of_a_shared_file_are_known_to_be_one_without_reading(tmp_path):
    models = decoder_pair().models
    save_models({"prefill": models["prefill"], "decode": models["prefill"].clone()}, tmp_path / "out", layout="shared")
    found = inspect_paths([tmp_path / "out"])
    shared = [one for one in found.copies if one.stored == 1]
    assert {member.name for one in shared for member in one.members} == {"wte", "wpe", "head_weight"}
    assert {one.proof for one in shared} == {"same bytes on disk"}
    assert {member.model for member in shared[0].members} == {"decoder_model.onnx", "decoder_with_past_model.onnx"}
    (data,) = [file for file in found.files if not file.is_model]
    assert data.tensors == 2 * len(shared)
    assert data.bytes == sum(one.bytes for one in shared)


def test_equal_weights_are_compared_to_the_last_byte_where_that_is_quick(tmp_path):
    almost = matrix(1).copy()
    almost[17, 17] += 1
    found = inspect_paths([write(chain(matrix(1), matrix(1), almost, matrix(2)), tmp_path / "m.onnx")])
    assert [([member.name for member in one.members], one.stored, one.proof) for one in found.copies] == [
        (["w0", "w1"], 2, "every byte compared")
    ]
    assert found.spare_bytes == 4096
    assert found.stored_bytes == 4 * 4096


def two_holes(folder: Path, last_byte: int) -> Path:
    """A model with two weights of 128 MiB that are all zeros, or differ in the last byte; they take no room on disk."""
    rows, size = 32 << 20, 128 << 20
    with (folder / "data").open("wb") as file:
        file.truncate(2 * size)
        file.seek(2 * size - 1)
        file.write(bytes([last_byte]))
    tensors = [outside(f"w{i}", [rows], location="data", offset=i * size) for i in range(2)]
    nodes = [helper.make_node("Gather", [f"w{i}", "ids"], [f"y{i}"]) for i in range(2)]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1])
    graph = helper.make_graph(nodes, "g", [ids], [floats("y0", [1]), floats("y1", [1])], tensors)
    return write(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), folder / "m.onnx")


def test_what_samples_suggest_is_never_called_proved(tmp_path):
    path = two_holes(tmp_path, last_byte=1)
    (guess,) = inspect_paths([path]).copies
    assert guess.proof == "sampled"
    said = page(inspect_paths([path]))
    assert "likely, by samples" in said
    assert "every byte compared)" not in said
    assert inspect_paths([path], is_proved=True).copies == []


def test_all_bytes_are_compared_on_demand(tmp_path):
    (copies,) = inspect_paths([two_holes(tmp_path, last_byte=0)], is_proved=True).copies
    assert (copies.proof, copies.stored, copies.bytes) == ("every byte compared", 2, 128 << 20)


@pytest.mark.parametrize("is_proved", [False, True])
def test_transposed_weights_are_found_square_or_not(tmp_path, is_proved):
    tall = np.random.default_rng(5).standard_normal((32, 48)).astype(np.float32)
    square, symmetric = matrix(6), matrix(7) + matrix(7).T
    almost = square.T.copy()
    almost[3, 4] += 1
    weights = (square, tall, tall.T.copy(), symmetric, square.T.copy(), almost)
    found = inspect_paths([write(chain(*weights), tmp_path / "m.onnx")], is_proved=is_proved)
    pairs = [
        (one.members[0].name, one.transposed[0].name, one.shape, one.proof)
        for one in sorted(found.transposed, key=lambda one: one.members[0].name)
    ]
    assert pairs == [
        ("w0", "w4", [32, 32], "every byte compared"),
        ("w1", "w2", [32, 48], "every byte compared"),
    ]
    assert found.copies == []


def test_equal_weights_are_one_side_of_a_transposed_pair(tmp_path):
    tall = np.random.default_rng(5).standard_normal((32, 48)).astype(np.float32)
    found = inspect_paths([write(chain(tall, tall.T.copy(), tall), tmp_path / "m.onnx")])
    (pair,) = found.transposed
    assert ([one.name for one in pair.members], [one.name for one in pair.transposed]) == (["w0", "w2"], ["w1"])


# What is wrong


PLAIN = '<ir_version: {}, opset_import: ["" : {}]> g (float[1] x) => (float[1] y) {{ y = Neg(x) }}'

REFUSED = {
    "a new IR version": PLAIN.format(99, 18),
    "a new operator set": PLAIN.format(8, 28),
    "a definition without a kernel": """
        <ir_version: 8, opset_import: ["" : 22]> g (float[2] x) => (float[2] y) { y = RandomUniformLike(x) }""",
    "a type without a kernel": """
        <ir_version: 8, opset_import: ["" : 18]> g (bfloat16[2] x) => (bfloat16[2] y) { a = Neg(x)  y = Abs(a) }""",
    "a type without a kernel in a branch": """
        <ir_version: 8, opset_import: ["" : 18]> g (bool c, bfloat16[2] x) => (bfloat16[2] y) {
            y = If(c) <
                then_branch = t () => (bfloat16[2] p) { p = Neg(x) },
                else_branch = e () => (bfloat16[2] q) { q = Identity(x) }
            >
        }""",
    "an unknown operator": """
        <ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]>
        g (float[2] x) => (float[2] y) { y = com.microsoft.Nothing(x) }""",
    "an unknown domain": """
        <ir_version: 8, opset_import: ["" : 18, "some.where" : 1]>
        g (float[2] x) => (float[2] y) { y = some.where.Foo(x) }""",
    "shapes that do not go together": """
        <ir_version: 8, opset_import: ["" : 18]> g (float[2, 3] x) => (float[2, 3] y) { y = MatMul(x, x) }""",
}
TAKEN = {
    "a plain model": PLAIN.format(8, 18),
    "float16": '<ir_version: 8, opset_import: ["" : 18]> g (float16[2,2] x) => (float16[2,2] y) { y = MatMul(x, x) }',
    "nodes out of order": """
        <ir_version: 8, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) { y = Neg(a)  a = Abs(x) }""",
    "an operator that is expanded into others": """
        <ir_version: 10, opset_import: ["" : 23]>
        g (float[1,2,2,4] q, float[1,2,2,4] k, float[1,2,2,4] v) => (float[1,2,2,4] y) { y = Attention(q, k, v) }""",
    "a contributed operator": """
        <ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]>
        g (float[2] x) => (float[2] y) { y = com.microsoft.QuickGelu(x) }""",
}


def opens(path: Path) -> bool:
    """Say whether ONNX Runtime opens the file itself."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 4
    try:
        onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except Exception:
        return False
    return True


@pytest.mark.parametrize("name", [*REFUSED, *TAKEN])
def test_what_is_said_of_the_runtime_is_what_the_runtime_does_with_the_file(tmp_path, name):
    path = draw(tmp_path / "m.onnx", {**REFUSED, **TAKEN}[name])
    model = inspect_one(path)
    assert opens(path) == (name in TAKEN)
    assert model.runtime_takes_it == (name in TAKEN)
    assert bool(wrong(model)) == (name in REFUSED)


def test_the_limits_of_the_runtime_are_where_it_starts_to_refuse(tmp_path):
    runtime = inspect_paths([draw(tmp_path / "m.onnx", PLAIN.format(8, 18))]).runtime
    assert runtime is not None
    newest = runtime.max_ir_version, runtime.max_opset
    assert runtime.version == onnxruntime.__version__
    assert opens(draw(tmp_path / "a.onnx", PLAIN.format(*newest)))
    assert not opens(draw(tmp_path / "b.onnx", PLAIN.format(newest[0] + 1, newest[1])))
    assert not opens(draw(tmp_path / "c.onnx", PLAIN.format(newest[0], newest[1] + 1)))


def test_a_version_that_is_higher_than_needed_has_an_easy_way_out(tmp_path):
    model = inspect_one(draw(tmp_path / "m.onnx", PLAIN.format(99, 28)))
    assert (model.needs_ir_version, model.needs_opsets) == (7, {"ai.onnx": 13})
    ir_version, opset = wrong(model)
    assert "declares IR version 99" in ir_version.what
    assert "any run writes IR version 7" in ir_version.way_out
    assert "any run writes opset 13" in opset.way_out
    save_model(open_model(tmp_path / "m.onnx"), tmp_path / "out.onnx")  # which is what a run writes
    assert opens(tmp_path / "out.onnx")


def test_every_operator_without_a_kernel_is_named_and_not_only_the_first(tmp_path):
    text = """
    <ir_version: 99, opset_import: ["" : 22, "some.where" : 1]>
    g (bfloat16[2,2] x) => (bfloat16[2,2] y) {
        a = Neg(x)
        b = Neg(a)
        c = MatMul(b, b)
        d = some.where.Foo(c)
        e = RandomUniformLike <dtype = 16> (c)
        y = Identity(e)
    }
    """
    said = {finding.where: finding for finding in wrong(inspect_one(draw(tmp_path / "m.onnx", text)))}
    assert set(said) == {
        "versions",
        "Neg, opset 22",
        "MatMul, opset 22",
        "some.where.Foo, version 1",
        "RandomUniformLike, opset 22",
    }
    assert said["Neg, opset 22"].nodes == 2
    assert said["Neg, opset 22"].what == "no kernel on the CPU for bfloat16"
    assert "export for opset 21 or older" in said["RandomUniformLike, opset 22"].way_out


def test_missing_data_is_a_finding_and_the_rest_is_told(tmp_path):
    save_models(decoder_pair().models, tmp_path / "pair", layout="optimum")
    (tmp_path / "pair" / "decoder_model.onnx_data").unlink()
    found = inspect_paths([tmp_path / "pair"])
    prefill, decode = found.models
    (finding,) = prefill.findings
    assert finding.by == "files"
    assert "its data file 'decoder_model.onnx_data' is missing" in finding.what
    assert "and 2 more like it" in finding.what
    assert prefill.runtime_takes_it is False
    assert decode.runtime_takes_it is True
    assert prefill.weights.parameters == decode.weights.parameters
    assert [file.file for file in prefill.files if file.is_missing] == ["decoder_model.onnx_data"]
    assert not any(
        one.proof != "same bytes on disk" and {"decoder_model.onnx"} == {member.model for member in one.members}
        for one in found.copies
    )
    assert "missing or cannot be used" in page(found)


def test_absent_weights_are_not_equal_to_each_other(tmp_path):
    proto = chain(matrix(1), matrix(2), matrix(3))
    for index, tensor in enumerate(proto.graph.initializer):
        tensor.CopyFrom(outside(f"w{index}", [32, 32], location="gone", offset=index * 4096))
    found = inspect_paths([write(proto, tmp_path / "m.onnx")])
    assert found.copies == []
    assert found.transposed == []
    assert found.stored_bytes == 3 * 4096


@pytest.mark.parametrize(
    ("location", "said"),
    [
        ("../data", "leaves the model's folder"),
        ("/data", "is an absolute path"),
        ("short", "needs bytes"),
    ],
)
def test_data_that_cannot_be_used_is_a_finding(tmp_path, location, said):
    (tmp_path / "short").write_bytes(bytes(100))
    proto = with_initializer(outside("w", [32, 32], location=location))
    model = inspect_one(write(proto, tmp_path / "m.onnx"))
    assert said in wrong(model, "files")[0].what
    assert model.runtime_takes_it is False


def test_a_missing_small_weight_leaves_the_runtime_unasked(tmp_path):
    text = """
    <ir_version: 8, opset_import: ["" : 18]> g (float[4] x) => (float[2, 2] y) { y = Reshape(x, shape) }
    """
    model = inspect_one(
        draw(tmp_path / "m.onnx", text, outside("shape", [2], dtype=TensorProto.INT64, location="gone"))
    )
    assert [finding.by for finding in model.findings] == ["files"]
    assert model.runtime_takes_it is False


def test_only_those_who_look_get_a_model_without_its_data(tmp_path):
    path = write(with_initializer(outside("w", [32, 32], location="gone")), tmp_path / "m.onnx")
    with pytest.raises(ModelFileError, match="is missing"):
        open_model(path)
    faults: list[ModelFileError] = []
    tensor = open_model(path, on_fault=faults.append).graph.initializers["w"].const_value
    assert len(faults) == 1
    assert isinstance(tensor.file, AbsentFile)
    assert tensor.file.path == "gone"
    assert not np.any(tensor.numpy())


def test_nodes_out_of_order_are_a_finding(tmp_path):
    model = inspect_one(draw(tmp_path / "m.onnx", TAKEN["nodes out of order"]))
    (finding,) = model.findings
    assert (finding.by, finding.way_out) == ("files", "any run sorts them")
    assert "not topologically sorted" in finding.what


def test_a_file_beyond_two_gibibytes_is_refused_for_its_size(tmp_path):
    size = 9 << 28
    model = with_initializer(TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[size // 4]))
    tensor = model.graph.initializer.pop().SerializeToString() + field(TensorProto.RAW_DATA_FIELD_NUMBER, size)
    graph = model.graph.SerializeToString() + field(onnx.GraphProto.INITIALIZER_FIELD_NUMBER, len(tensor) + size)
    graph += tensor
    model.ClearField("graph")
    with (tmp_path / "m.onnx").open("wb") as file:
        file.write(model.SerializeToString() + field(onnx.ModelProto.GRAPH_FIELD_NUMBER, len(graph) + size) + graph)
        file.truncate(file.tell() + size)
    found = inspect_one(tmp_path / "m.onnx")
    (finding,) = found.findings
    assert found.weights.bytes == size
    assert "protobuf reads no more than 2 GiB at once" in finding.what
    assert not opens(tmp_path / "m.onnx")


def field(number: int, length: int) -> bytes:
    """Return how a field of so many bytes begins in a serialised message."""
    out = bytearray([number << 3 | 2])
    while length > 0x7F:
        out.append(length & 0x7F | 0x80)
        length >>= 7
    return bytes([*out, length])


def test_what_the_checker_finds_is_said(tmp_path):
    model = inspect_one(draw(tmp_path / "m.onnx", REFUSED["shapes that do not go together"]))
    assert "Incompatible dimensions" in wrong(model, "onnx")[0].what


# Paths


def test_a_folder_is_all_its_models_and_those_one_level_below_in_the_order_of_numbers(tmp_path):
    below = ["10/a.onnx", "2/b.onnx", "onnx/model.onnx"]
    for name in ("10_b.onnx", "2_a.onnx", *below, "onnx/deeper/x.onnx", ".hidden/x.onnx"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        draw(tmp_path / name, PLAIN.format(8, 18))
    found = inspect_paths([tmp_path])
    assert [model.name for model in found.models] == [
        "2_a.onnx",
        "10_b.onnx",
        "2/b.onnx",
        "10/a.onnx",
        "onnx/model.onnx",
    ]


def test_what_is_neither_a_file_nor_a_folder_is_said_to_be(tmp_path):
    os.mkfifo(tmp_path / "m.onnx")
    with pytest.raises(RecipeError, match="is neither a file nor a folder"):
        inspect_paths([tmp_path / "m.onnx"])


def test_a_file_that_is_named_twice_is_one_model(tmp_path):
    path = draw(tmp_path / "m.onnx", PLAIN.format(8, 18))
    assert len(inspect_paths([path, tmp_path]).models) == 1


def test_models_of_a_hub_cache_go_by_the_names_of_the_links(tmp_path):
    snapshot, blobs = tmp_path / "models--a--b" / "snapshots" / "1", tmp_path / "models--a--b" / "blobs"
    save_models(decoder_pair().models, snapshot, layout="shared")
    blobs.mkdir()
    for number, path in enumerate(sorted(snapshot.iterdir())):
        path.rename(blobs / f"hash{number}")
        path.symlink_to(Path("../../blobs") / f"hash{number}")
    found = inspect_paths([snapshot])
    assert [model.name for model in found.models] == ["decoder_model.onnx", "decoder_with_past_model.onnx"]
    assert [model.listed_role for model in found.models] == ["prefill", "decode"]
    assert [model.findings for model in found.models] == [[], []]


def test_of_many_models_only_the_overview_and_what_is_wrong_is_printed(tmp_path):
    for number in range(5):
        draw(tmp_path / f"{number}.onnx", PLAIN.format(99 if number == 3 else 8, 18))
    said = page(inspect_paths([tmp_path]))
    assert "inputs and outputs" not in said
    assert said.count("declares IR version 99") == 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("recipe.yaml", "source: x", "is a recipe"),
        ("model.safetensors", "x", "holds weights and no graph"),
    ],
)
def test_a_file_that_is_no_model_has_a_way_out(tmp_path, name, content, said):
    (tmp_path / name).write_text(content)
    with pytest.raises(RecipeError, match=said) as caught:
        inspect_paths([tmp_path / name])
    assert "surgery run" in caught.value.hint


def test_a_hugging_face_folder_and_an_empty_one_are_told_apart(tmp_path):
    with pytest.raises(RecipeError, match=r"no \.onnx file"):
        inspect_paths([tmp_path])
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(RecipeError, match="is a Hugging Face folder"):
        inspect_paths([tmp_path])


def test_looking_changes_no_file(tmp_path):
    save_models(decoder_pair().models, tmp_path / "pair", layout="shared")
    before = {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "pair").iterdir()}
    inspect_paths([tmp_path / "pair"], is_proved=True)
    assert {path: (path.stat().st_mtime_ns, path.read_bytes()) for path in (tmp_path / "pair").iterdir()} == before


# Cost


def test_two_hundred_gigabytes_are_looked_into_without_being_read(tmp_path):
    rows, columns, count = 1 << 20, 1024, 48  # 4 GiB each
    tensors = [outside(f"w{i}", [rows, columns], location="data", offset=i * rows * columns * 4) for i in range(count)]
    with (tmp_path / "data").open("wb") as file:
        file.truncate(count * rows * columns * 4)
    nodes = [helper.make_node("Gather", [f"w{i}", "ids"], [f"y{i}"]) for i in range(count)]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1])
    graph = helper.make_graph(nodes, "g", [ids], [floats(f"y{i}", [1, columns]) for i in range(count)], tensors)
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    path = write(proto, tmp_path / "m.onnx")
    script = f"""
        import re
        from pathlib import Path
        from surgery.report.inspection import inspect_paths
        import onnxruntime
        def number(file, key):
            return int(re.search(key + r":\\s+(\\d+)", Path("/proc/self/" + file).read_text())[1])
        before = number("io", "rchar"), number("smaps_rollup", "Rss")
        (model,) = inspect_paths([Path({str(path)!r})]).models
        assert model.runtime_takes_it
        assert model.weights.bytes == {count * rows * columns * 4}
        print(number("io", "rchar") - before[0], number("smaps_rollup", "Rss") - before[1])
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    read_bytes, more_kilobytes = map(int, done.stdout.split())
    assert read_bytes < 8 << 20
    assert more_kilobytes < 64 << 10


# The command


def test_the_command_prints_a_page_that_fits(tmp_path, surgery: Run):
    save_models({"decode": decoder_pair()["decode"]}, tmp_path / "one")
    done = surgery("inspect", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 120
    assert len(lines) < 60
    assert "decode: a decoder with a cache; named as in optimum" in done.stdout
    assert re.search(r"past_key_values\.0\.key +float +\[batch_size, 2, past_sequence_length, 4\]", done.stdout)


def test_the_command_prints_json_with_the_keys_of_the_fields(tmp_path, surgery: Run):
    save_models(decoder_pair().models, tmp_path / "pair", layout="shared")
    done = surgery("inspect", "--json", tmp_path / "pair")
    assert done.returncode == 0, done.stderr
    content = json.loads(done.stdout)
    assert list(content) == [field.name for field in fields(Inspection)]
    assert content["format"] == 1
    assert [list(model) for model in content["models"]] == 2 * [[field.name for field in fields(FoundModel)]]
    assert content == json.loads(inspect_paths([tmp_path / "pair"]).as_json())


def test_every_key_is_in_the_manual():
    manual = (ROOT / "docs" / "inspect.md").read_text(encoding="utf-8")
    classes = [cls for cls in vars(found_module).values() if hasattr(cls, "__dataclass_fields__")]
    assert len(classes) > 10
    assert [field.name for cls in classes for field in fields(cls) if f"`{field.name}`" not in manual] == []


@pytest.mark.parametrize(
    ("arguments", "code", "said"),
    [
        (("broken.onnx",), 3, "is not an ONNX model"),
        (("nothing.onnx",), 2, "no such file or folder"),
        (("empty",), 2, "no .onnx file is in this folder"),
        (("recipe.yaml",), 2, "is a recipe"),
    ],
)
def test_the_command_says_what_cannot_be_looked_into(tmp_path, surgery: Run, arguments, code, said):
    (tmp_path / "broken.onnx").write_bytes(b"\xff" * 5000)
    (tmp_path / "empty").mkdir()
    (tmp_path / "recipe.yaml").write_text("source: x\n")
    done = surgery("inspect", *arguments)
    assert done.returncode == code
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_without_onnx_runtime_everything_else_is_told(tmp_path):
    path = draw(tmp_path / "m.onnx", REFUSED["a type without a kernel"])
    blocked = tmp_path / "blocked" / "onnxruntime"
    blocked.mkdir(parents=True)
    (blocked / "__init__.py").write_text("raise ImportError('not here')")
    command = [sys.executable, "-c", "from surgery.cli import app; app()", "inspect", str(path)]
    environment = {**os.environ, "PYTHONPATH": f"{blocked.parent}{os.pathsep}{ROOT}"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "ONNX Runtime is not installed" in done.stdout
    assert "what is wrong" not in done.stdout


def test_a_file_that_is_no_model_is_told_beside_the_others(tmp_path: Path) -> None:
    save_model(parse("g (float[2] x) => (float[2] y) { y = Neg(x) }"), tmp_path / "good.onnx")
    (tmp_path / "bad.onnx").write_bytes(b"no model at all")
    found = inspect_paths([tmp_path])
    assert [model.name for model in found.models] == ["good.onnx"]
    (finding,) = found.unreadable
    assert finding.where == "bad.onnx"
    (tmp_path / "good.onnx").unlink()
    with pytest.raises(ModelFileError, match=r"bad\.onnx"):
        inspect_paths([tmp_path])
