"""Bad input: each gets a sentence that names the place, the fact and the way out, an exit code, and loses nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import pytest
from typer.testing import CliRunner

from surgery.cli import app
from surgery.errors import RecipeError
from surgery.recipe import Source
from surgery.sources import find_source

CHAIN = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[batch, 64] x) => (float[batch, 64] y) {
    h = MatMul(x, w)
    y = Relu(h)
}
"""


def chain() -> onnx.ModelProto:
    model = onnx.parser.parse_model(CHAIN)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model.graph.initializer.append(onnx.numpy_helper.from_array(weight, "w"))
    return model


def saved(folder: Path, model: onnx.ModelProto | None = None) -> Path:
    path = folder / "model.onnx"
    onnx.save(model or chain(), path)
    return path


def external(folder: Path, **entries: object) -> Path:
    """Save the chain with its weight in a data file, and then rewrite what it says of the place."""
    model = chain()
    onnx.save(model, folder / "model.onnx", save_as_external_data=True, location="model.onnx_data", size_threshold=0)
    model = onnx.load(folder / "model.onnx", load_external_data=False)
    tensor = model.graph.initializer[0]
    for entry in tensor.external_data:
        if entry.key in entries:
            entry.value = str(entries[entry.key])
    return saved(folder, model)


def truncated(folder: Path) -> None:
    path = saved(folder)
    path.write_bytes(path.read_bytes()[:-3000])


def garbage(folder: Path) -> None:
    (folder / "model.onnx").write_bytes(np.random.default_rng(0).bytes(5000))


def empty(folder: Path) -> None:
    (folder / "model.onnx").touch()


def text(folder: Path) -> None:
    (folder / "model.onnx").write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")


def data_missing(folder: Path) -> None:
    external(folder)
    (folder / "model.onnx_data").unlink()


def data_short(folder: Path) -> None:
    external(folder)
    (folder / "model.onnx_data").write_bytes(bytes(100))


def offset_beyond(folder: Path) -> None:
    external(folder, offset=10**9)


def path_up(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(bytes(64 * 64 * 4))
    external(folder, location="../secret")


def path_absolute(folder: Path) -> None:
    external(folder, location="/etc/passwd")


def path_through_a_link(folder: Path) -> None:
    (folder.parent / "secret").write_bytes(bytes(64 * 64 * 4))
    external(folder)
    (folder / "model.onnx_data").unlink()
    (folder / "model.onnx_data").symlink_to(folder.parent / "secret")


def cyclic(folder: Path) -> None:
    model = chain()
    model.graph.node[0].input[0] = "y"
    saved(folder, model)


def name_twice(folder: Path) -> None:
    model = chain()
    model.graph.node[1].output[0] = "h"
    saved(folder, model)


def undefined(folder: Path) -> None:
    model = chain()
    model.graph.node[0].input[0] = "nowhere"
    saved(folder, model)


def wrong_type(folder: Path) -> None:
    model = chain()
    model.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.INT64
    saved(folder, model)


def unknown_operator(folder: Path) -> None:
    model = chain()
    model.graph.node[1].op_type = "Rellu"
    saved(folder, model)


def of_another_domain(folder: Path) -> None:
    model = chain()
    model.graph.node[1].domain = "com.example"
    model.opset_import.append(onnx.helper.make_opsetid("com.example", 1))
    saved(folder, model)


@pytest.mark.parametrize(
    ("make", "code", "said"),
    [
        (truncated, 3, "model.onnx"),
        (garbage, 3, "model.onnx"),
        (empty, 3, "not an ONNX model"),
        (text, 3, "not an ONNX model"),
        (data_missing, 3, "model.onnx_data"),
        (data_short, 3, "model.onnx_data"),
        (offset_beyond, 3, "1,000,000,000"),
        (path_up, 3, "../secret"),
        (path_absolute, 3, "/etc/passwd"),
        (path_through_a_link, 3, "model.onnx_data"),
        (cyclic, 3, "cycl"),
        (name_twice, 3, "'h'"),
        (undefined, 3, "'nowhere'"),
        (wrong_type, 3, "not a valid ONNX model"),
        (unknown_operator, 3, "Rellu"),
        (of_another_domain, 3, "com.example"),
    ],
)
def test_a_damaged_model_is_refused_with_its_fact(
    tmp_path: Path, make: Callable[[Path], None], code: int, said: str
) -> None:
    folder = tmp_path / "models"
    folder.mkdir()
    make(folder)
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    recipe = tmp_path / "r.yaml"
    recipe.write_text("source: models/model.onnx\nsteps: [dedup_weights]\noutput: out\n")
    done = CliRunner().invoke(app, ["run", str(recipe)])
    assert done.exit_code == code, done.output
    assert said in done.stderr
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.output
    assert not (tmp_path / "out").exists()
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("nowhere.onnx", "no such file or folder"),
        ("./nowhere", "no such file or folder"),
        ("empty", "no model is in this folder"),
        ("several", "cannot tell the role of"),
        ("odd", "made_up"),
    ],
)
def test_a_source_that_is_none_is_refused_while_planning(tmp_path: Path, source: str, said: str) -> None:
    for name in ("empty", "several", "odd", "json"):
        (tmp_path / name).mkdir()
    for name in ("a.onnx", "b.onnx"):
        onnx.save(chain(), tmp_path / "several" / name)
    (tmp_path / "odd" / "config.json").write_text('{"model_type": "made_up", "architectures": ["MadeUp"]}')
    (tmp_path / "json" / "config.json").write_text("{")
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"source: {source}\nsteps: [dedup_weights]\n")
    for command in ("plan", "run"):
        done = CliRunner().invoke(app, [command, str(recipe)])
        assert done.exit_code == 2, done.output
        assert said in done.stderr
        assert "try: " in done.stderr or "no such" in done.stderr


def test_a_hub_id_that_cannot_be_reached_says_how_to_go_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("source: nobody/nothing\nsteps: [dedup_weights]\n")
    done = CliRunner().invoke(app, ["plan", str(recipe)])
    assert done.exit_code == 2, done.output
    assert "nobody/nothing" in done.stderr
    assert "local" in done.stderr


@pytest.mark.parametrize(
    ("names", "manifest", "said"),
    [
        (
            ("decoder_model.onnx", "prefill.onnx"),
            None,
            "'decoder_model.onnx' and 'prefill.onnx' are both the 'prefill'",
        ),
        (("decoder_model.onnx",), {"prefill": "gone.onnx"}, "there is no 'gone.onnx', which bundle.json lists"),
    ],
)
def test_a_folder_whose_files_do_not_add_up_is_refused(
    tmp_path: Path, names: tuple[str, ...], manifest: dict[str, str] | None, said: str
) -> None:
    for name in names:
        onnx.save(chain(), tmp_path / name)
    if manifest is not None:
        content = {"layout": "optimum", "models": manifest, "files": []}
        (tmp_path / "bundle.json").write_text(json.dumps(content))
    with pytest.raises(RecipeError, match=said) as caught:
        find_source(Source(path=str(tmp_path)), tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize("models", [{"prefill": 3}, {"prefill": ""}, {"prefill": None}, {}])
def test_a_manifest_that_makes_no_sense_is_no_manifest(tmp_path: Path, models: dict[str, object]) -> None:
    onnx.save(chain(), tmp_path / "decoder_model.onnx")
    (tmp_path / "bundle.json").write_text(json.dumps({"layout": "optimum", "models": models, "files": []}))
    assert find_source(Source(path=str(tmp_path)), tmp_path).roles == ("prefill",)


@pytest.mark.parametrize("path", ["model.onnx", "."])
def test_an_opset_for_what_is_onnx_already_is_refused(tmp_path: Path, path: str) -> None:
    saved(tmp_path)
    with pytest.raises(RecipeError, match="opset is for Hugging Face models"):
        find_source(Source(path=path, opset=18), tmp_path)
