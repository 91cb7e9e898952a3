"""Opening models: what is read, what is refused, and in which words."""

from __future__ import annotations

import os
import re
import resource
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import chain, everywhere, floats, matrix, outside, tensor_of, with_initializer, write

from surgery.errors import ModelFileError
from surgery.storage import DataFile, Region, open_model, save_models, skeleton
from surgery.storage.region import Window
from surgery.storage.wire import lift


def refused(path: Path, *words: str) -> ModelFileError:
    with pytest.raises(ModelFileError) as caught:
        open_model(path)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    return caught.value


def with_data(tmp_path: Path, content: bytes = bytes(4096), shape: tuple[int, ...] = (32, 32), **reference: object):
    (tmp_path / "w.bin").write_bytes(content)
    reference.setdefault("location", "w.bin")
    return write(with_initializer(outside("w", shape, **reference)), tmp_path / "m.onnx")


def regions_of(model: ir.Model) -> list[Region]:
    graphs = [*model.graphs(), *(function.graph for function in model.functions.values())]
    found = [value.const_value for graph in graphs for value in graph.initializers.values()]
    nodes = [*model.graph.all_nodes(), *(node for one in model.functions.values() for node in one.all_nodes())]
    found += [a.value for node in nodes for a in node.attributes.values() if a.type == ir.AttributeType.TENSOR]
    return [tensor for tensor in found if isinstance(tensor, Region)]


def test_weights_in_every_place_become_regions(tmp_path):
    model = everywhere()
    opened = open_model(write(model.proto, tmp_path / "m.onnx"))
    regions = regions_of(opened)
    assert sorted(r.tobytes() for r in regions) == sorted(m.tobytes() for m in model.matrices.values())
    assert not isinstance(tensor_of(opened, "zero"), Region)
    assert opened.metadata_props["made"] == "by hand"
    assert tensor_of(opened, "main").metadata_props == {"weight": "yes"}
    assert next(iter(opened.graph)).metadata_props == {"layer": "first"}


def test_external_weights_become_regions_even_small_ones(tmp_path):
    path = with_data(tmp_path, content=b"??" + np.arange(4, dtype=np.float32).tobytes(), shape=(4,), offset=2)
    weight = tensor_of(open_model(path), "w")
    assert isinstance(weight, Region)
    assert weight.numpy().tolist() == [0, 1, 2, 3]


def test_external_weights_in_subfolders_are_found(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "w").write_bytes(matrix(3).tobytes())
    path = with_data(tmp_path, location="data/w", length=4096)
    assert np.array_equal(tensor_of(open_model(path), "w").numpy(), matrix(3))


def test_external_weights_in_bodies_and_constants_become_regions(tmp_path):
    (tmp_path / "w.bin").write_bytes(matrix(1).tobytes() + matrix(2).tobytes())
    body = helper.make_graph(
        [
            helper.make_node("Constant", [], ["k"], value=outside("", [32, 32], location="w.bin", offset=4096)),
            helper.make_node("MatMul", ["k", "w"], ["z"]),
        ],
        "body",
        [],
        [floats("z", [32, 32])],
        [outside("w", [32, 32], location="w.bin")],
    )
    node = helper.make_node("If", ["c"], ["y"], then_branch=body, else_branch=body)
    condition = helper.make_tensor_value_info("c", TensorProto.BOOL, [])
    graph = helper.make_graph([node], "g", [condition], [floats("y", [32, 32])])
    proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    regions = regions_of(open_model(write(proto, tmp_path / "m.onnx")))
    assert {region.offset for region in regions} == {0, 4096}
    assert len(regions) == 4


def test_what_is_no_model_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    refused(path, "there is no such file")
    refused(tmp_path, "is a folder, not an ONNX model", "try: name an .onnx file in it")
    for content, words in (
        (b"", "is empty, not an ONNX model"),
        (b"hello, this is a text and no model at all\n" * 9, "is not an ONNX model"),
        (os.urandom(4000).replace(b"\x3a", b"\x00"), "is not an ONNX model"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "is a Git LFS pointer"),
        (b"PK\x03\x04" + bytes(200), "is not an ONNX model"),
        (onnx.ModelProto(ir_version=8).SerializeToString(), "it has no graph"),
    ):
        path.write_bytes(content)
        refused(path, str(path), words)


def test_a_model_that_was_downloaded_in_part_is_refused(tmp_path):
    content = everywhere().proto.SerializeToString()
    for size in range(100, len(content), 997):
        path = tmp_path / "m.onnx"
        path.write_bytes(content[:size])
        refused(path, "is not an ONNX model")


@pytest.mark.parametrize(
    ("reference", "words"),
    [
        ({"location": "/etc/passwd"}, "'/etc/passwd' is an absolute path"),
        ({"location": "C:\\secrets"}, "is an absolute path"),
        ({"location": "../w.bin"}, "'../w.bin' leaves the model's folder"),
        ({"location": "a/../../w.bin"}, "leaves the model's folder"),
        ({"location": ""}, "does not say in which file"),
        ({"location": "missing.bin"}, "'missing.bin' is missing from"),
        ({"location": "."}, "is missing from"),
        ({"offset": "abc"}, "its offset is 'abc', not a whole number"),
        ({"offset": "-4"}, "its offset is '-4', not a whole number"),
        ({"length": "1e3"}, "its length is '1e3', not a whole number"),
        ({"length": 4095}, "has 4,095 bytes, but FLOAT [32, 32] takes 4,096"),
        ({"offset": 1}, "needs bytes 1 to 4,097 of"),
        ({"offset": 4096, "length": 4096}, "w.bin, which has 4,096"),
    ],
)
def test_external_data_that_cannot_be_is_refused_with_tensor_file_and_numbers(tmp_path, reference, words):
    path = with_data(tmp_path, **reference)
    refused(path, str(path), "tensor 'w'", words)


def test_shapes_and_types_that_cannot_be_are_refused(tmp_path):
    refused(with_data(tmp_path, shape=(-32, -32)), "tensor 'w' has the shape [-32, -32]")
    proto = with_initializer(TensorProto(name="w", dims=[0]))
    refused(write(proto, tmp_path / "m.onnx"), "tensor 'w' has no element type")
    for dtype in (TensorProto.STRING, 99):
        proto = with_initializer(outside("w", [32, 32], location="w.bin"))
        proto.graph.initializer[0].data_type = dtype
        refused(write(proto, tmp_path / "m.onnx"), f"element type {dtype}, whose size is not known")


def test_inline_data_of_another_length_than_the_shape_says_is_refused(tmp_path):
    for length, words in ((12, "has 12 bytes"), (4000, "has 4,000 bytes, but FLOAT [32, 32] takes 4,096")):
        tensor = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[32, 32], raw_data=bytes(length))
        refused(write(with_initializer(tensor), tmp_path / "m.onnx"), "tensor 'w'", words)


def test_data_said_to_be_in_two_places_is_refused(tmp_path):
    tensor = outside("w", [32, 32], location="w.bin")
    tensor.external_data.add(key="location", value="v.bin")
    refused(write(with_initializer(tensor), tmp_path / "m.onnx"), "tensor 'w' says twice where its data is")
    tensor = outside("w", [1], location="w.bin")
    tensor.raw_data = b"1234"
    refused(write(with_initializer(tensor), tmp_path / "m.onnx"), "both inside and outside the file")


def test_a_link_that_leaves_the_folder_is_refused_by_name(tmp_path):
    (tmp_path / "secret").write_bytes(bytes(4096))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "link").symlink_to("../secret")
    path = write(with_initializer(outside("w", [32, 32], location="link")), tmp_path / "model" / "m.onnx")
    refused(path, "'link' is a link that leaves the model's folder, to", str(tmp_path / "secret"))


def test_a_linked_folder_that_leaves_is_refused(tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "w").write_bytes(bytes(4096))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "sub").symlink_to("../other")
    path = write(with_initializer(outside("w", [32, 32], location="sub/w")), tmp_path / "model" / "m.onnx")
    refused(path, "leaves the model's folder")


def test_a_link_within_the_folder_is_followed(tmp_path):
    (tmp_path / "real").write_bytes(matrix(1).tobytes())
    (tmp_path / "link").symlink_to("real")
    assert np.array_equal(tensor_of(open_model(with_data(tmp_path, location="link")), "w").numpy(), matrix(1))


def hub(tmp_path: Path, repository: str) -> Path:
    """A Hugging Face cache: files are links into `blobs`."""
    snapshot = tmp_path / f"models--{repository}" / "snapshots" / "abc" / "onnx"
    snapshot.mkdir(parents=True)
    blobs = tmp_path / f"models--{repository}" / "blobs"
    blobs.mkdir()
    write(with_initializer(outside("w", [32, 32], location="m.onnx_data")), blobs / "111")
    (blobs / "222").write_bytes(matrix(4).tobytes())
    (snapshot / "m.onnx").symlink_to("../../../blobs/111")
    (snapshot / "m.onnx_data").symlink_to("../../../blobs/222")
    return snapshot / "m.onnx"


def test_links_into_the_same_hub_repository_are_followed(tmp_path):
    assert np.array_equal(tensor_of(open_model(hub(tmp_path, "owner--name")), "w").numpy(), matrix(4))


def test_links_into_another_hub_repository_are_refused(tmp_path):
    hub(tmp_path, "owner--other")
    path = hub(tmp_path, "owner--name")
    path.with_name("m.onnx_data").unlink()
    path.with_name("m.onnx_data").symlink_to(tmp_path / "models--owner--other" / "blobs" / "222")
    refused(path, "is a link that leaves the model's folder")


def test_a_link_to_a_model_finds_the_data_beside_the_real_model(tmp_path):
    (tmp_path / "model").mkdir()
    path = with_data(tmp_path / "model")
    (tmp_path / "link.onnx").symlink_to(path)
    assert tensor_of(open_model(tmp_path / "link.onnx"), "w").nbytes == 4096


def test_a_folder_of_links_to_a_model_and_its_data_is_opened(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "links").mkdir()
    for name in (with_data(tmp_path / "model").name, "w.bin"):
        (tmp_path / "links" / name).symlink_to(tmp_path / "model" / name)
    assert tensor_of(open_model(tmp_path / "links" / "m.onnx"), "w").nbytes == 4096
    (tmp_path / "links" / "w.bin").unlink()
    (tmp_path / "secret").write_bytes(bytes(4096))
    (tmp_path / "links" / "w.bin").symlink_to(tmp_path / "secret")
    refused(tmp_path / "links" / "m.onnx", "is a link that leaves the model's folder")


def test_a_pipe_as_a_data_file_does_not_block(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    refused(with_data(tmp_path, location="pipe"), "'pipe' is missing")


def test_what_onnx_ir_would_drop_in_silence_is_refused(tmp_path):
    proto = chain(matrix(0))
    proto.training_info.add()
    refused(write(proto, tmp_path / "m.onnx"), "holds training information")
    proto = chain(matrix(0))
    values, indices = helper.make_tensor("s", TensorProto.FLOAT, [1], [1.0]), helper.make_tensor("i", 7, [1], [0])
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, [9]))
    refused(write(proto, tmp_path / "m.onnx"), "sparse initializer 's' cannot be kept")
    proto = chain(matrix(0))
    proto.opset_import.append(helper.make_opsetid("", 18))
    refused(write(proto, tmp_path / "m.onnx"), "imports an operator set twice")


def test_what_onnx_ir_cannot_read_is_refused_in_one_sentence(tmp_path):
    proto = chain(matrix(0))
    proto.graph.value_info.add(name="x0").type.map_type.key_type = TensorProto.INT64
    proto.graph.input[0].type.map_type.key_type = TensorProto.INT64
    error = refused(write(proto, tmp_path / "m.onnx"), "cannot be read: Map types are not supported")
    assert "\n" not in error.message


def test_names_used_twice_are_refused_before_onnx_ir_sees_them(tmp_path):
    proto = chain(matrix(0), matrix(1))
    proto.graph.initializer[1].name = "w0"
    refused(write(proto, tmp_path / "m.onnx"), "graph 'chain': two initializers are named 'w0'")
    proto = chain(matrix(0), matrix(1))
    proto.graph.node[1].output[0] = "x1"
    refused(write(proto, tmp_path / "m.onnx"), "'x1' is defined twice, by the MatMul that makes 'x1' and by")


def test_nodes_out_of_order_are_sorted(tmp_path):
    proto = chain(matrix(0), matrix(1), matrix(2))
    nodes = [onnx.NodeProto.FromString(node.SerializeToString()) for node in reversed(proto.graph.node)]
    del proto.graph.node[:]
    proto.graph.node.extend(nodes)
    opened = open_model(write(proto, tmp_path / "m.onnx"))
    assert [node.outputs[0].name for node in opened.graph] == ["x1", "x2", "x3"]


def test_a_cycle_is_refused_with_its_nodes(tmp_path):
    proto = chain(matrix(0), matrix(1), matrix(2))
    proto.graph.node[0].input[0] = "x2"
    error = refused(write(proto, tmp_path / "m.onnx"), "the nodes form a cycle: ")
    assert re.search(
        r"makes 'x1' -> the MatMul that makes 'x2' -> the MatMul that makes 'x1'|'x2' -> .*'x1' -> .*'x2'", str(error)
    )


def test_min_bytes_says_what_becomes_a_region(tmp_path):
    path = write(chain(matrix(0)), tmp_path / "m.onnx")
    assert isinstance(tensor_of(open_model(path, min_bytes=4096), "w0"), Region)
    assert not isinstance(tensor_of(open_model(path, min_bytes=4097), "w0"), Region)


def test_a_source_that_is_replaced_afterwards_still_reads_as_it_was(tmp_path):
    path = write(chain(matrix(0)), tmp_path / "m.onnx")
    opened = open_model(path)
    write(chain(matrix(1)), tmp_path / "new").replace(path)
    assert np.array_equal(tensor_of(opened, "w0").numpy(), matrix(0))


def test_too_many_data_files_for_the_system_are_explained(tmp_path):
    tensors = [outside(f"w{i}", [4], location=f"{i}.bin") for i in range(64)]
    for i in range(64):
        (tmp_path / f"{i}.bin").write_bytes(bytes(16))
    graph = helper.make_graph([], "g", [], [], tensors)
    path = write(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(os.listdir("/proc/self/fd")) + 20, hard))
    try:
        refused(path, "cannot be opened", "try: raise the limit of open files")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert len(open_model(path).graph.initializers) == 64


def sparse_t5_3b(folder: Path) -> Path:
    """A model of T5-3B's size whose data file is one hole."""
    rows, columns, count = 16384, 1024, 170  # 170 x 64 MiB: 11.4 GB
    tensors = [
        outside(f"w{i}", [rows, columns], location="m.onnx_data", offset=i * rows * columns * 4) for i in range(count)
    ]
    with (folder / "m.onnx_data").open("wb") as file:
        file.truncate(count * rows * columns * 4)
    nodes = [helper.make_node("Gather", [f"w{i}", "ids"], [f"y{i}"]) for i in range(count)]
    ids = helper.make_tensor_value_info("ids", TensorProto.INT64, [1])
    outputs = [floats(f"y{i}", [1, columns]) for i in range(count)]
    graph = helper.make_graph(nodes, "t5", [ids], outputs, tensors)
    return write(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), folder / "m.onnx")


def test_eleven_gigabytes_open_and_save_in_a_moment_and_in_little_memory(tmp_path):
    path = sparse_t5_3b(tmp_path)
    script = f"""
        import json, re, time
        from pathlib import Path
        from surgery.storage import open_model, save_models
        start = time.perf_counter()
        model = open_model({str(path)!r})
        opened = time.perf_counter()
        last = list(model.graph)[-1]
        model.graph.outputs.pop()
        model.graph.remove(last)
        model.graph.initializers.pop("w169")
        next(iter(model.graph)).outputs[0].name = "renamed"
        saved = save_models({{"model": model}}, {str(tmp_path / "out")!r})
        end = time.perf_counter()
        status = Path("/proc/self/status").read_text()
        anonymous = int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) // 1024
        print(json.dumps([opened - start, end - opened, anonymous, saved[0].bytes]))
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, check=True)
    opening_seconds, saving_seconds, anonymous_mb, size = __import__("json").loads(done.stdout)
    assert opening_seconds < 1
    assert saving_seconds < 10
    assert anonymous_mb < 150
    assert size == 169 * (64 << 20)
    assert (tmp_path / "out" / "model.onnx_data").stat().st_blocks * 512 < 1 << 20
    assert open_model(tmp_path / "out" / "model.onnx").graph.outputs[0].name == "renamed"


def test_ten_thousand_nodes_open_quickly(tmp_path):
    count = 10_000
    nodes = [helper.make_node("Add", [f"x{i}", "w"], [f"x{i + 1}"], name=f"/layers.{i}/Add") for i in range(count)]
    weights = [numpy_helper.from_array(np.ones(4, np.float32), "w")]
    graph = helper.make_graph(nodes, "long", [floats("x0", [4])], [floats(f"x{count}", [4])], weights)
    path = write(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)]), tmp_path / "m.onnx")
    start = time.perf_counter()
    assert len(open_model(path).graph) == count
    assert time.perf_counter() - start < 5


def test_storage_imports_neither_a_runtime_nor_torch():
    script = (
        "import sys, surgery.storage; print([m for m in ('onnxruntime', 'torch', 'polygraphy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_file_that_shrinks_while_it_is_opened_is_an_error_and_not_a_crash(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"\x08\x01" * 50_000)
    window = Window(DataFile(path))
    assert (window[0], window[50_001], window[99_996:]) == (8, 1, b"\x08\x01\x08\x01")
    os.truncate(path, 60_000)
    with pytest.raises(ModelFileError, match="has become shorter"):
        lift(window, path=str(path))


def test_text_that_is_not_unicode_is_refused_when_it_would_be_written(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(everywhere().proto.SerializeToString().replace(b"by hand", b"\xffy hand"))
    with pytest.raises(ModelFileError, match="the model cannot be serialised: 'utf-8' codec"):
        save_models({"model": open_model(path)}, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_weight_inside_a_function_that_is_gone_is_named_as_what_it_is(tmp_path):
    path = write(everywhere().proto, tmp_path / "m.onnx")
    model = open_model(path)
    path.write_bytes(b"")
    with pytest.raises(ModelFileError, match="has become shorter while it was in use"):
        skeleton(model)
