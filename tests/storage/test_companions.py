"""Companions: what other versions and tools refuse is spelt as they read it, and nothing else is touched."""

from __future__ import annotations

import json
from pathlib import Path

import onnx_ir as ir
import onnxruntime
import pytest
from models import decoder_pair
from small_models import chain, matrix

from surgery.errors import RecipeError
from surgery.recipe import Source
from surgery.sources import find_source
from surgery.storage import Layout, save_models
from surgery.storage.companions import for_other_tools
from surgery.storage.naming import hub_files, read_manifest

ROOT = Path(__file__).resolve().parent.parent.parent


def as_json(content: bytes | Path) -> dict[str, object]:
    made: dict[str, object] = json.loads(content.read_bytes() if isinstance(content, Path) else content)
    return made


def test_a_tokenizer_of_transformers_5_is_spelt_as_version_4_reads_it() -> None:
    path = ROOT / "fixtures" / "adder" / "tokenizer_config.json"
    before = as_json(path)
    after = as_json(for_other_tools({"tokenizer_config.json": path}, [])["tokenizer_config.json"])
    assert before["tokenizer_class"] == "TokenizersBackend"
    assert after == {
        **{key: before[key] for key in before if key != "backend"},
        "tokenizer_class": "PreTrainedTokenizerFast",
    }


def test_special_tokens_in_a_list_get_the_older_name_and_a_mapping_stays() -> None:
    listed = json.dumps({"tokenizer_class": "T5Tokenizer", "extra_special_tokens": ["<a>", "<b>"]}).encode()
    made = as_json(for_other_tools({"tokenizer_config.json": listed}, [])["tokenizer_config.json"])
    assert made == {"tokenizer_class": "T5Tokenizer", "additional_special_tokens": ["<a>", "<b>"]}
    mapped = json.dumps({"extra_special_tokens": {"image_token": "<i>"}}).encode()
    assert for_other_tools({"tokenizer_config.json": mapped}, [])["tokenizer_config.json"] is mapped


def test_what_needs_no_change_or_is_no_object_is_the_file_that_it_was(tmp_path: Path) -> None:
    config = tmp_path / "config.json"
    config.write_text('{"model_type":   "gpt2"}')
    files = {"config.json": config, "tokenizer_config.json": b"[1, 2", "notes.txt": b"TokenizersBackend"}
    assert for_other_tools(files, []) == files
    assert for_other_tools({"config.json": b"[]"}, ["a.onnx_data"]) == {"config.json": b"[]"}


def test_data_files_are_told_and_what_was_told_of_others_is_forgotten() -> None:
    stale = {"model_type": "t5", "transformers.js_config": {"dtype": "q8", "use_external_data_format": {"x.onnx": 1}}}
    content = {"config.json": json.dumps(stale).encode()}
    told = as_json(for_other_tools(content, ["onnx/encoder_model.onnx_data", "y.onnx_data"])["config.json"])
    assert told["transformers.js_config"] == {
        "dtype": "q8",
        "use_external_data_format": {"encoder_model.onnx": 1, "y.onnx": 1},
    }
    assert as_json(for_other_tools(content, [])["config.json"])["transformers.js_config"] == {"dtype": "q8"}


@pytest.mark.parametrize(
    ("roles", "files"),
    [
        (["decoder"], ["model"]),
        (["decode"], ["model"]),
        (["encoder", "decoder"], ["encoder_model", "decoder_model_merged"]),
        (["prefill", "decode"], ["decoder_model", "decoder_with_past_model"]),
        (["encoder"], ["encoder_model"]),
        (["model"], ["model"]),
    ],
)
def test_the_hub_s_files_are_those_that_transformers_js_looks_for(roles: list[str], files: list[str]) -> None:
    assert list(hub_files(roles).values()) == [f"onnx/{file}.onnx" for file in files]


def test_a_folder_laid_out_as_on_the_hub_runs_and_is_a_source_again(tmp_path: Path) -> None:
    decode = decoder_pair()["decode"]
    save_models(
        {"decoder": decode},
        tmp_path / "out",
        layout="hub",
        extras={"config.json": b'{"model_type": "gpt2"}'},
        min_bytes=64,
    )
    assert sorted(path.name for path in (tmp_path / "out" / "onnx").iterdir()) == ["model.onnx", "model.onnx_data"]
    told = as_json(tmp_path / "out" / "config.json")["transformers.js_config"]
    assert told == {"use_external_data_format": {"model.onnx": 1}}
    onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "model.onnx", providers=["CPUExecutionProvider"])
    manifest = read_manifest(tmp_path / "out")
    assert manifest is not None
    assert manifest.models == {"decoder": "onnx/model.onnx"}
    again = find_source(Source(path=str(tmp_path / "out")), Path()).open(Path(), lambda sentence: None)
    assert list(again.bundle.models) == ["decoder"]
    save_models({"decoder": decode}, tmp_path / "out", layout="optimum", extras=again.bundle.files, overwrite=True)
    assert not list((tmp_path / "out").rglob("onnx/*.onnx*"))


@pytest.mark.parametrize("name", ["onnx/../../secret.onnx", "../onnx/secret.onnx", "onnx/deeper/secret.onnx"])
def test_a_list_that_leads_out_of_the_folder_leads_nowhere(tmp_path: Path, name: str) -> None:
    save_models({"model": ir.from_proto(chain(matrix(0)))}, tmp_path / "out", layout="hub")
    (tmp_path / "secret.onnx").write_bytes((tmp_path / "out" / "onnx" / "model.onnx").read_bytes())
    (tmp_path / "out" / "bundle.json").write_text(json.dumps({"layout": "hub", "models": {"model": name}, "files": []}))
    with pytest.raises(RecipeError, match=r"there is no 'secret\.onnx', which bundle\.json lists"):
        find_source(Source(path=str(tmp_path / "out")), Path())


@pytest.mark.parametrize(
    ("layout", "is_told"), [("optimum", True), ("hub", True), ("shared", False), ("single", False)]
)
def test_only_a_data_file_of_each_graph_s_own_is_told(tmp_path: Path, layout: Layout, is_told: bool) -> None:
    model = ir.from_proto(chain(matrix(0)))
    save_models({"model": model}, tmp_path / "out", layout=layout, extras={"config.json": b"{}"}, min_bytes=1)
    assert ("transformers.js_config" in as_json(tmp_path / "out" / "config.json")) == is_told
