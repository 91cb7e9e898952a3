"""Saving: what is written, where, and what is left alone."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import SIDE, chain, everywhere, floats, matrix, tensor_of, with_initializer, write

from surgery.errors import ModelFileError, OutputError
from surgery.storage import Region, fingerprint, open_model, read_manifest, save_model, save_models
from surgery.storage.atomic import _replace_in_two_steps

LAYOUTS = ("optimum", "shared", "single")


def opened(folder: Path, proto: onnx.ModelProto, name: str = "source.onnx") -> ir.Model:
    return open_model(write(proto, folder / name))


def names(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def leftovers(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if ".tmp-" in path.name]


def refused(*words: str, **arguments: object) -> None:
    models = arguments.pop("models", {"model": ir.from_proto(chain(matrix(0)))})
    with pytest.raises(OutputError) as caught:
        save_models(models, **arguments)
    for word in words:
        assert word in str(caught.value), str(caught.value)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_holds_everything_and_runs(tmp_path, layout):
    model = everywhere()
    source = opened(tmp_path, model.proto)
    save_models({"prefill": source, "decode": source}, tmp_path / "out", layout=layout)
    for name in ("decoder_model.onnx", "decoder_with_past_model.onnx"):
        path = tmp_path / "out" / name
        onnx.checker.check_model(str(path), full_check=True)
        assert fingerprint(open_model(path)) == fingerprint(source)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        for condition in (True, False):
            feeds = model.feeds(condition)
            expected = model.expected(feeds["x"], condition)
            np.testing.assert_allclose(session.run(None, feeds)[0], expected, rtol=1e-4, atol=1e-2)


def test_layouts_have_the_files_that_they_should(tmp_path):
    source = opened(tmp_path, everywhere().proto)
    models = {"prefill": source, "decode": source}
    files = {
        "optimum": ["decoder_model.onnx_data", "decoder_with_past_model.onnx_data"],
        "shared": ["weights.onnx_data"],
        "single": [],
    }
    for layout, data in files.items():
        saved = save_models(models, tmp_path / layout, layout=layout)
        graphs = ["decoder_model.onnx", "decoder_with_past_model.onnx"]
        assert [file.name for file in saved] == [*data, *graphs, "bundle.json"]
        assert names(tmp_path / layout) == sorted(file.name for file in saved)
        assert all((tmp_path / layout / file.name).stat().st_size == file.bytes for file in saved)


def test_a_saved_model_says_what_it_said(tmp_path):
    source = opened(tmp_path, everywhere().proto)
    save_models({"model": source}, tmp_path / "out", layout="single")
    proto = onnx.load(tmp_path / "out" / "model.onnx")
    original = everywhere().proto
    assert proto.graph.node[0].metadata_props == original.graph.node[0].metadata_props
    assert proto.graph.initializer[0].metadata_props == original.graph.initializer[0].metadata_props
    assert proto.metadata_props == original.metadata_props
    assert proto.graph.initializer[0].raw_data == original.graph.initializer[0].raw_data
    assert proto.functions[0].node[0].attribute[0].t.raw_data == matrix(2).tobytes()
    assert not proto.graph.initializer[0].external_data


def test_saving_twice_gives_the_same_files(tmp_path):
    save_models({"model": opened(tmp_path, everywhere().proto)}, tmp_path / "a")
    save_models({"model": open_model(tmp_path / "a" / "model.onnx")}, tmp_path / "b")
    for name in names(tmp_path / "a"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_the_model_stays_as_it_is(tmp_path):
    source = opened(tmp_path, everywhere().proto)
    weight = source.graph.initializers["main"].const_value
    source.graph.initializers["zero"].const_value = ir.tensor(np.array([0]), name="shared by many")
    before = fingerprint(source)
    versions = dict(source.opset_imports), source.ir_version
    for layout in LAYOUTS:
        save_models({"model": source}, tmp_path / layout, layout=layout)
    assert source.graph.initializers["main"].const_value is weight
    assert source.graph.initializers["zero"].const_value.name == "shared by many"
    assert (dict(source.opset_imports), source.ir_version) == versions
    assert fingerprint(source) == before


def test_initializers_that_share_a_tensor_share_its_bytes(tmp_path):
    source = opened(tmp_path, chain(matrix(0), matrix(1), matrix(2)))
    source.graph.initializers["w1"].const_value = source.graph.initializers["w0"].const_value
    save_models({"model": source}, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx_data").stat().st_size == 2 * 4096
    back = open_model(tmp_path / "out" / "model.onnx")
    assert tensor_of(back, "w0").place == tensor_of(back, "w1").place
    assert [np.array_equal(tensor_of(back, f"w{i}").numpy(), matrix(j)) for i, j in enumerate((0, 0, 2))] == [True] * 3


def test_models_that_share_a_file_share_its_bytes_in_the_shared_layout(tmp_path):
    path = write(chain(matrix(0), matrix(1)), tmp_path / "m.onnx")
    save_models({"prefill": open_model(path), "decode": open_model(path)}, tmp_path / "out", layout="shared")
    assert (tmp_path / "out" / "weights.onnx_data").stat().st_size == 2 * 4096


def test_big_weights_start_on_a_page_and_others_on_a_line(tmp_path):
    big = np.ones((512, 512), np.float32)
    source = ir.from_proto(chain(big))
    for name, array in (("tiny", np.ones(300, np.float32)), ("big", big + 1), ("odd", np.ones(3001, np.uint8))):
        value = ir.Value(name=name, const_value=ir.tensor(array, name=name))
        source.graph.initializers.add(value)
    save_models({"model": source}, tmp_path / "out")
    weights = [tensor_of(open_model(tmp_path / "out" / "model.onnx"), n) for n in ("w0", "tiny", "big", "odd")]
    assert [weight.offset % 4096 == 0 for weight in weights] == [True, True, True, True]
    assert [weight.offset for weight in weights] == [0, 1 << 20, (1 << 20) + 4096, (2 << 20) + 4096]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(
    "dtype", ["BFLOAT16", "INT4", "UINT4", "FLOAT8E4M3FN", "FLOAT16", "INT2", "FLOAT6E2M3", "BOOL"]
)
def test_weights_of_every_kind_of_type_survive_from_memory_and_from_disk(tmp_path, dtype, layout):
    kind = ir.DataType[dtype]
    values = (np.arange(4095).reshape(63, 65) % 2).astype(kind.numpy())
    proto = with_initializer(TensorProto(name="w", data_type=int(kind), dims=[0]))
    source = ir.from_proto(proto)
    source.graph.initializers["w"].const_value = ir.Tensor(values, dtype=kind, name="w")
    save_models({"model": source}, tmp_path / "one", layout=layout)
    save_models({"model": open_model(tmp_path / "one" / "model.onnx")}, tmp_path / "two", layout=layout)
    back = tensor_of(open_model(tmp_path / "two" / "model.onnx"), "w")
    assert isinstance(back, Region)
    assert back.dtype == kind
    assert np.array_equal(back.numpy(), values)


def test_lazy_strided_and_foreign_tensors_are_written_as_what_they_are(tmp_path):
    matrices = [matrix(seed) for seed in range(4)]
    source = ir.from_proto(chain(*matrices))
    (tmp_path / "foreign.bin").write_bytes(matrices[2].tobytes())
    tensors = [
        ir.LazyTensor(lambda: ir.tensor(matrices[0]), dtype=ir.DataType.FLOAT, shape=ir.Shape([SIDE, SIDE])),
        ir.tensor(np.ascontiguousarray(matrices[1].T).T),
        ir.ExternalTensor(
            "foreign.bin", 0, 4096, ir.DataType.FLOAT, shape=ir.Shape([SIDE, SIDE]), name="f", base_dir=tmp_path
        ),
        ir.tensor(matrices[3]),
    ]
    for index, tensor in enumerate(tensors):
        source.graph.initializers[f"w{index}"].const_value = tensor
    save_models({"model": source}, tmp_path / "out")
    back = open_model(tmp_path / "out" / "model.onnx")
    assert all(np.array_equal(tensor_of(back, f"w{i}").numpy(), matrices[i]) for i in range(4))


def test_strings_and_small_weights_stay_in_the_graph(tmp_path):
    words = helper.make_tensor("w", TensorProto.STRING, [500], [b"word"] * 500)
    save_models({"model": opened(tmp_path, with_initializer(words))}, tmp_path / "out")
    assert names(tmp_path / "out") == ["bundle.json", "model.onnx"]
    assert tensor_of(open_model(tmp_path / "out" / "model.onnx"), "w").string_data()[499] == b"word"


def test_weights_of_bodies_go_to_the_data_file_and_onnx_runtime_finds_them_there(tmp_path):
    source = opened(tmp_path, everywhere().proto)
    save_models({"model": source}, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx_data").read_bytes() == matrix(0).tobytes() + matrix(3).tobytes()


def test_versions_are_lowered_in_the_file_only(tmp_path):
    proto = chain(matrix(0))
    proto.opset_import[0].version, proto.ir_version = 26, 13
    source = opened(tmp_path, proto)
    save_models({"model": source}, tmp_path / "out")
    saved = onnx.load(tmp_path / "out" / "model.onnx", load_external_data=False)
    assert (saved.opset_import[0].version, saved.ir_version) == (13, 7)
    assert (source.opset_imports[""], source.ir_version) == (26, 13)


def test_nothing_that_protobuf_cannot_read_is_written(tmp_path):
    with (tmp_path / "w.bin").open("wb") as file:
        file.truncate(3 << 30)
    tensor = TensorProto(name="w", data_type=TensorProto.UINT8, dims=[3 << 30], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="w.bin")
    source = opened(tmp_path, with_initializer(tensor))
    refused(
        "model.onnx: would have 3,221,2", "optimum", models={"model": source}, folder=tmp_path / "x", layout="single"
    )
    assert not (tmp_path / "x").exists()
    assert save_models({"model": source}, tmp_path / "out")[0].bytes == 3 << 30


def test_progress_runs_from_nothing_to_everything(tmp_path):
    seen: list[tuple[int, int]] = []
    source = opened(tmp_path, chain(matrix(0), matrix(1)))
    saved = save_models({"model": source}, tmp_path / "out", progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (sum(file.bytes for file in saved),) * 2
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_extras_are_written_beside_the_models(tmp_path):
    (tmp_path / "tokenizer.json").write_bytes(b"{}" * 1000)
    extras = {"config.json": b"{...}", "sub/tokenizer.json": tmp_path / "tokenizer.json"}
    save_models({"model": ir.from_proto(chain(matrix(0)))}, tmp_path / "out", extras=extras)
    assert (tmp_path / "out" / "config.json").read_bytes() == b"{...}"
    assert (tmp_path / "out" / "sub" / "tokenizer.json").read_bytes() == b"{}" * 1000


def test_extras_outside_the_folder_or_in_the_way_are_refused(tmp_path):
    for name in ("../x", "/x", "a/../../x", ""):
        refused("would not be inside the output folder", folder=tmp_path / "out", extras={name: b""})
    for name in ("model.onnx", "bundle.json", "model.onnx_data"):
        refused(f"two files to be written have the name {name!r}", folder=tmp_path / "out", extras={name: b""})
    refused("cannot be a file name", models={"a/b": ir.from_proto(chain(matrix(0)))}, folder=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_the_manifest_says_what_was_written(tmp_path):
    save_models({"prefill": ir.from_proto(chain(matrix(0)))}, tmp_path / "out", layout="shared", extras={"a": b""})
    manifest = json.loads((tmp_path / "out" / "bundle.json").read_bytes())
    assert manifest["layout"] == "shared"
    assert manifest["models"] == {"prefill": "decoder_model.onnx"}
    assert manifest["files"] == ["a", "bundle.json", "decoder_model.onnx", "weights.onnx_data"]
    assert read_manifest(tmp_path / "out").models == {"prefill": "decoder_model.onnx"}
    assert read_manifest(tmp_path) is None


# --- places that are taken ------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_empty_needs_overwrite(tmp_path):
    (tmp_path / "out").mkdir()
    save_models({"model": ir.from_proto(chain(matrix(0)))}, tmp_path / "out")
    refused("exists and is not empty", "--overwrite", folder=tmp_path / "out")
    (tmp_path / "file").write_bytes(b"mine")
    refused("is a file, not a folder", folder=tmp_path / "file", overwrite=True)
    assert (tmp_path / "file").read_bytes() == b"mine"


def test_overwriting_replaces_our_files_and_keeps_all_others(tmp_path):
    out = tmp_path / "out"
    save_models({"prefill": ir.from_proto(chain(matrix(0)))}, out, extras={"old.json": b"", "deep/old.json": b""})
    (out / "notes.txt").write_text("mine")
    (out / "deep" / "notes.txt").write_text("mine too")
    (out / "empty").mkdir()
    (out / "link").symlink_to("notes.txt")
    (out / "folder link").symlink_to("deep")
    (out / "config.json").write_text("an unknown one")
    out.chmod(0o750)
    save_models({"decode": ir.from_proto(chain(matrix(1)))}, out, extras={"config.json": b"ours"}, overwrite=True)
    ours = ["bundle.json", "config.json", "decoder_with_past_model.onnx", "decoder_with_past_model.onnx_data"]
    assert names(out) == sorted([*ours, "deep/notes.txt", "link", "notes.txt"])
    assert (out / "notes.txt").read_text() == "mine"
    assert (out / "config.json").read_bytes() == b"ours"
    assert (out / "link").readlink() == Path("notes.txt")
    assert (out / "folder link").readlink() == Path("deep")
    assert (out / "empty").is_dir()
    assert (out / "notes.txt").stat().st_nlink == 1
    assert out.stat().st_mode & 0o777 == 0o750
    assert leftovers(tmp_path) == []


def test_a_folder_that_we_did_not_write_keeps_its_files(tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    write(chain(matrix(0)), out / "theirs.onnx")
    save_models({"model": ir.from_proto(chain(matrix(1)))}, out, overwrite=True)
    assert names(out) == ["bundle.json", "model.onnx", "model.onnx_data", "theirs.onnx"]


def test_a_link_to_a_folder_stays_a_link(tmp_path):
    (tmp_path / "real").mkdir()
    (tmp_path / "out").symlink_to("real")
    save_models({"model": ir.from_proto(chain(matrix(1)))}, tmp_path / "out")
    assert (tmp_path / "out").is_symlink()
    assert (tmp_path / "real" / "model.onnx").exists()


def test_a_folder_can_be_replaced_by_models_that_were_read_from_it(tmp_path):
    out = tmp_path / "out"
    save_models({"model": ir.from_proto(chain(matrix(0), matrix(1)))}, out)
    source = open_model(out / "model.onnx")
    source.metadata_props["new"] = "yes"
    save_models({"model": source}, out, overwrite=True)
    back = open_model(out / "model.onnx")
    assert back.metadata_props == {"new": "yes"}
    assert np.array_equal(tensor_of(back, "w1").numpy(), matrix(1))
    assert np.array_equal(tensor_of(source, "w1").numpy(), matrix(1))


def test_inputs_are_never_modified(tmp_path):
    source = tmp_path / "models" / "source"
    source.mkdir(parents=True)
    path = write(chain(matrix(0)), source / "m.onnx")
    (tmp_path / "alias").symlink_to(source)
    (source / "onnx").mkdir()
    (source / "onnx" / "other").write_bytes(b"")
    for folder, protected in (
        (source, source),
        (source, path),
        (tmp_path / "models", path),
        (tmp_path / "alias", source),
        (source, tmp_path / "alias"),
        (source, tmp_path / "alias" / "m.onnx"),
        (source / "onnx", source),
    ):
        refused("inputs are never modified", folder=folder, protected=[protected], overwrite=True)
    assert names(source) == ["m.onnx", "onnx/other"]
    save_models({"model": open_model(path)}, source / "out", protected=[source, path])


def test_writing_a_file_never_modifies_inputs(tmp_path):
    path = write(chain(matrix(0)), tmp_path / "m.onnx")
    (tmp_path / "link.onnx").symlink_to("m.onnx")
    before = path.read_bytes()
    for target, protected in (
        (path, path),
        (path, tmp_path),
        (path, tmp_path / "link.onnx"),
        (tmp_path / "link.onnx", path),
    ):
        with pytest.raises(OutputError, match="is an input of this run"):
            save_model(open_model(path), target, overwrite=True, protected=[protected])
    assert path.read_bytes() == before
    save_model(open_model(path), tmp_path / "new.onnx", protected=[tmp_path, path])


def test_a_role_that_stands_for_a_data_file_does_not_overwrite_it(tmp_path):
    models = {"x": ir.from_proto(chain(matrix(0))), "x.onnx_data": ir.from_proto(chain(matrix(0)))}
    assert len(save_models(models, tmp_path / "out")) == 5


# --- one file -------------------------------------------------------------------------------------------------------


def test_one_model_goes_into_one_file_with_its_data_beside_it(tmp_path):
    source = opened(tmp_path, everywhere().proto)
    saved = save_model(source, tmp_path / "deep" / "new.onnx")
    assert [file.name for file in saved] == ["new.onnx_data", "new.onnx"]
    assert names(tmp_path / "deep") == ["new.onnx", "new.onnx_data"]
    assert fingerprint(open_model(tmp_path / "deep" / "new.onnx")) == fingerprint(source)
    save_model(source, tmp_path / "single.onnx", layout="single")
    assert fingerprint(open_model(tmp_path / "single.onnx")) == fingerprint(source)
    assert not (tmp_path / "single.onnx_data").exists()


def test_one_file_is_overwritten_on_demand_only_even_from_itself(tmp_path):
    path = tmp_path / "m.onnx"
    save_model(ir.from_proto(chain(matrix(0))), path)
    with pytest.raises(OutputError, match=r"m\.onnx_data: exists"):
        save_model(ir.from_proto(chain(matrix(1))), path)
    source = open_model(path)
    source.metadata_props["new"] = "yes"
    save_model(source, path, overwrite=True)
    assert names(tmp_path) == ["m.onnx", "m.onnx_data"]
    assert (tmp_path / "m.onnx_data").stat().st_nlink == 1
    assert open_model(path).metadata_props == {"new": "yes"}
    assert np.array_equal(tensor_of(open_model(path), "w0").numpy(), matrix(0))
    assert leftovers(tmp_path) == []


def test_a_link_is_replaced_and_not_what_it_points_to(tmp_path):
    blob = tmp_path / "blob"
    blob.write_bytes(b"of somebody else")
    (tmp_path / "m.onnx").symlink_to("blob")
    save_model(ir.from_proto(chain(matrix(0))), tmp_path / "m.onnx", overwrite=True, layout="single")
    assert blob.read_bytes() == b"of somebody else"
    assert not (tmp_path / "m.onnx").is_symlink()


# --- things that go wrong -------------------------------------------------------------------------------------------


class Stop(BaseException):
    """As a key press is: no Exception."""


@pytest.mark.parametrize("error", [Stop, KeyboardInterrupt, RuntimeError, OutputError])
@pytest.mark.parametrize("old", [True, False])
def test_a_save_that_fails_leaves_everything_as_it_was(tmp_path, error, old):
    def fail(done: int, total: int) -> None:
        if done > total // 2:
            raise error("now")

    out = tmp_path / "out"
    if old:
        save_models({"model": ir.from_proto(chain(matrix(0)))}, out)
    before = {name: (out / name).read_bytes() for name in names(out)} if old else {}
    with pytest.raises(error):
        save_models({"model": ir.from_proto(chain(matrix(1), matrix(2)))}, out, overwrite=True, progress=fail)
    assert out.exists() == old
    assert {name: (out / name).read_bytes() for name in names(out)} == before
    assert leftovers(tmp_path) == []


def test_a_source_that_becomes_shorter_is_an_error_and_leaves_nothing(tmp_path):
    source = opened(tmp_path, chain(matrix(0), matrix(1)))
    os.truncate(tmp_path / "source.onnx", 5000)
    with pytest.raises(ModelFileError, match="has become shorter while it was in use"):
        save_models({"model": source}, tmp_path / "out")
    assert names(tmp_path) == ["source.onnx"]


def test_an_initializer_without_a_value_is_named(tmp_path):
    source = ir.from_proto(chain(matrix(0)))
    source.graph.initializers["w0"].const_value = None
    with pytest.raises(ModelFileError, match="initializer 'w0' has no value"):
        save_models({"model": source}, tmp_path / "out")


def test_a_tensor_that_lies_about_its_size_is_named(tmp_path):
    source = ir.from_proto(chain(matrix(0)))
    lie = ir.LazyTensor(
        lambda: ir.tensor(np.ones(7, np.float32)), dtype=ir.DataType.FLOAT, shape=ir.Shape([SIDE, SIDE]), name="liar"
    )
    source.graph.initializers["w0"].const_value = lie
    refused("weight 'liar' has 28 bytes", "say 4,096", models={"model": source}, folder=tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_too_little_space_is_noticed_before_anything_is_written(tmp_path):
    huge = 1 << 50
    lazy = ir.LazyTensor(lambda: pytest.fail("read"), dtype=ir.DataType.UINT8, shape=ir.Shape([huge]), name="w")
    source = ir.from_proto(with_initializer(TensorProto(name="w", data_type=TensorProto.UINT8, dims=[0])))
    source.graph.initializers["w"].const_value = lazy
    refused(
        "not enough space: 1,125,899,906,8",
        "bytes are needed, ",
        " are free",
        models={"model": source},
        folder=tmp_path / "out",
    )
    assert list(tmp_path.iterdir()) == []


def test_a_place_where_nothing_can_be_written_is_explained(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    refused("file: is a file, not a folder", folder=tmp_path / "file" / "out")
    refused("cannot be written", folder="/proc/nowhere/out")


FILL = """
    import resource, signal, sys
    import numpy as np, onnx_ir as ir
    from surgery.errors import OutputError
    from surgery.storage import open_model, save_model, save_models
    source = open_model(sys.argv[1])
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]), int(sys.argv[3])))
    try:
        if sys.argv[4] == "memory":
            array = source.graph.initializers["w0"].const_value.numpy().copy()
            source.graph.initializers["w0"].const_value = ir.tensor(array, name="w0")
        if sys.argv[4] == "file":
            save_model(source, sys.argv[2] + "/model.onnx", overwrite=True)
        else:
            save_models({"model": source}, sys.argv[2], overwrite=True)
    except OutputError as error:
        print(error)
"""


@pytest.mark.parametrize("kind", ["disk", "memory", "file"])
@pytest.mark.parametrize("limit", [100, 5000, 300_000])
def test_a_full_disk_leaves_the_old_state_and_nothing_else(tmp_path, kind, limit):
    out = tmp_path / "out"
    big = np.random.default_rng(0).standard_normal((512, 512)).astype(np.float32)
    path = write(chain(big, big), tmp_path / "source.onnx")
    save_models({"model": ir.from_proto(chain(matrix(0)))}, out)
    before = {name: (out / name).read_bytes() for name in names(out)}
    command = [sys.executable, "-c", textwrap.dedent(FILL), path, out, str(limit), kind]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "cannot be written: File too large: 2,09" in done.stdout, done.stdout + done.stderr
    assert "bytes are needed" in done.stdout
    assert {name: (out / name).read_bytes() for name in names(out)} == before
    assert leftovers(tmp_path) == leftovers(out) == []


def test_what_a_killed_process_left_is_removed_and_what_a_living_one_writes_is_not(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    stale = tmp_path / f".out.tmp-{dead.pid}-abc123"
    other = tmp_path / f".outer.tmp-{dead.pid}-abc123"
    alive = tmp_path / f".out.tmp-{os.getpid()}-abc123"
    for folder in (stale, other, alive):
        folder.mkdir()
        (folder / "model.onnx_data").write_bytes(b"x")
    save_models({"model": ir.from_proto(chain(matrix(0)))}, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([other.name, alive.name, "out"])


def test_without_an_exchange_the_old_folder_is_kept_until_the_new_one_stands(tmp_path):
    out, staged = tmp_path / "out", tmp_path / ".out.tmp-1-abc"
    out.mkdir()
    (out / "old").write_bytes(b"")
    with pytest.raises(FileNotFoundError):
        _replace_in_two_steps(staged, out)
    assert names(tmp_path) == ["out/old"]
    staged.mkdir()
    (staged / "new").write_bytes(b"")
    _replace_in_two_steps(staged, out)
    assert names(tmp_path) == ["out/new"]


def test_a_save_without_exchange_that_died_halfway_is_undone(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    halfway = tmp_path / f".out.tmp-{dead.pid}-abc123.old"
    halfway.mkdir()
    (halfway / "notes").write_text("mine")
    save_models({"model": ir.from_proto(chain(matrix(0)))}, tmp_path / "out", overwrite=True)
    assert (tmp_path / "out" / "notes").read_text() == "mine"


KILLED = """
    import sys
    import numpy as np, onnx_ir as ir
    from surgery.storage import open_model, save_model, save_models
    sources = [open_model(path) for path in sys.argv[3:]]
    print("ready", flush=True)
    index = 0
    while True:
        index += 1
        source = sources[index % len(sources)]
        if sys.argv[2] == "file":
            save_model(source, sys.argv[1] + "/model.onnx", overwrite=True)
        else:
            save_models({"model": source}, sys.argv[1], overwrite=True)
"""


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_a_save_that_is_killed_leaves_the_old_or_the_new_model_whole(tmp_path, kind):
    out = tmp_path / "out"
    sources = []
    for seed in range(2):
        weights = [matrix(seed * 10 + index, 200) for index in range(6 + seed)]
        sources.append(write(chain(*weights), tmp_path / f"{seed}.onnx"))
    good = {fingerprint(open_model(path)) for path in sources}
    if kind == "file":
        out.mkdir()
        save_model(open_model(sources[0]), out / "model.onnx")
    else:
        save_models({"model": open_model(sources[0])}, out)
    (out / "notes.txt").write_text("mine")
    random = np.random.default_rng(0)
    found = set()
    for _ in range(8):
        command = [sys.executable, "-c", textwrap.dedent(KILLED), out, kind, *sources]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(random.uniform(0.0, 0.12))
        process.kill()
        process.wait()
        process.stdout.close()
        found.add(fingerprint(open_model(out / "model.onnx")))
        assert (out / "notes.txt").read_text() == "mine"
        session = onnxruntime.InferenceSession(out / "model.onnx", providers=["CPUExecutionProvider"])
        assert session.run(None, {"x0": np.zeros((1, 200), np.float32)})[0].shape == (1, 200)
    assert found <= good
    save = save_model if kind == "file" else save_models
    last = open_model(sources[0])
    save(*((last, out / "model.onnx") if kind == "file" else ({"model": last}, out)), overwrite=True)
    assert leftovers(tmp_path) == leftovers(out) == []


def test_two_processes_that_save_to_one_place_leave_one_whole_model(tmp_path):
    out = tmp_path / "out"
    sources = [write(chain(matrix(seed)), tmp_path / f"{seed}.onnx") for seed in range(2)]
    good = {fingerprint(open_model(path)) for path in sources}
    save_models({"model": open_model(sources[0])}, out)
    command = [sys.executable, "-c", textwrap.dedent(KILLED), out, "folder"]
    processes = [subprocess.Popen([*command, path], stdout=subprocess.PIPE) for path in sources]
    for process in processes:
        process.stdout.readline()
    for _ in range(30):
        assert fingerprint(open_model(out / "model.onnx")) in good
    for process in processes:
        process.kill()
        process.wait()
        process.stdout.close()
    assert fingerprint(open_model(out / "model.onnx")) in good


def test_bfloat16_in_memory_is_written_as_it_is(tmp_path):
    values = matrix(0).astype(ml_dtypes.bfloat16)
    graph = helper.make_graph([], "g", [], [floats("y", [1])], [numpy_helper.from_array(np.ones(1, np.float32), "y")])
    source = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    source.graph.initializers.add(ir.Value(name="w", const_value=ir.tensor(values, name="w")))
    save_models({"model": source}, tmp_path / "out")
    assert (tmp_path / "out" / "model.onnx_data").read_bytes() == values.tobytes()
