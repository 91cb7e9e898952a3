"""Hugging Face models, exported on the way: the interface, the numbers, the weights, and what is said when it fails."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

from surgery.errors import ModelFileError, RecipeError, SurgeryError
from surgery.runtime.loops import Callee, greedy, position_ids
from surgery.sources import huggingface, names
from surgery.sources.huggingface import FAMILIES, Exported, export, read_config, roles_of
from surgery.storage.region import Region

pytest.importorskip("torch")
pytest.importorskip("transformers.exporters")
onnxruntime = pytest.importorskip("onnxruntime")

Arrays = dict[str, np.ndarray]

LIMIT = 1e-4  # of the largest error, in units of the reference's root mean square
VOCABULARY = 67
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "max_position_embeddings": 256, **HEADS}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    "d_model": 32,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    "max_position_embeddings": 256,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
TINY: Mapping[str, Mapping[str, Any]] = {
    "gpt2": {"n_positions": 256, "n_embd": 32, "n_layer": 1, "n_head": 4},
    "gpt_neox": LLAMA,
    "llama": LLAMA,
    "mistral": {**LLAMA, "sliding_window": 16},
    "opt": {**LLAMA, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "bart": BART,
    "marian": BART,
    "mt5": T5,
    "t5": T5,
}


def save_tiny(model_type: str, folder: Path) -> Path:
    """Save a tiny model whose biases and norms are random too; left at 0 and 1, exporters drop and share them."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    config = AutoConfig.for_model(model_type, **TINY[model_type], **IDS)
    loader = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    torch.manual_seed(0)
    model = loader.from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    model.eval().save_pretrained(folder)
    return folder


class Session:
    """The exported models in ONNX Runtime."""

    def __init__(self, exported: Exported, folder: Path) -> None:
        self.sessions = {role: _session(model, folder / f"{role}.onnx") for role, model in exported.models.items()}

    def inputs(self, role: str) -> list[str]:
        return [value.name for value in self.sessions[role].get_inputs()]

    def run(self, role: str, feeds: Mapping[str, np.ndarray]) -> Arrays:
        outputs = [value.name for value in self.sessions[role].get_outputs()]
        given = {name: feeds[name] for name in self.inputs(role)}
        return dict(zip(outputs, self.sessions[role].run(None, given), strict=True))


def _session(model: ir.Model, path: Path) -> Any:
    # Saving moves a model's weights, and the tests look at where those of the export are.
    ir.save(model.clone(), path, external_data=f"{path.name}_data")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Case:
    """A tiny model: its folder, its export, that export in a runtime, and what the terminal showed meanwhile."""

    folder: Path
    exported: Exported
    onnx: Session
    said: tuple[str, ...]
    shown: str


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Catch what is written to the process's standard output and error, whoever writes it."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

        def shown() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield shown
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def make_case(model_type: str, folder: Path, opset: int | None = None) -> Case:
    save_tiny(model_type, folder / "source")
    said: list[str] = []
    with terminal() as shown:
        exported = export(str(folder / "source"), opset=opset, scratch=folder / "scratch", progress=said.append)
        text = shown()
    return Case(folder / "source", exported, Session(exported, folder), tuple(said), text)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("gpt2", tmp_path_factory.mktemp("gpt2"))


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case("t5", tmp_path_factory.mktemp("t5"))


# Feeds


def some_ids(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng([batch, length]).integers(2, VOCABULARY, (batch, length))


def left_padded(batch: int, length: int) -> np.ndarray:
    """Return a mask [batch, length] whose last row is full and the others are not, where there is room."""
    mask = np.ones((batch, length), np.int64)
    for row in range(batch - 1):
        mask[row, : min(row + 1 + length // 3, length - 1)] = 0
    return mask


def as_past(outputs: Arrays, length: int) -> Arrays:
    """Return the caches of a prefill, its own tokens cut to a length."""
    past = {name.replace("present", "past_key_values"): x for name, x in outputs.items() if name.startswith("present")}
    return {name: x if ".encoder." in name else x[:, :, :length] for name, x in past.items()}


def decoder_feeds(mask: np.ndarray, length: int, past: Arrays) -> Arrays:
    """Return the feeds of the last `length` tokens under a mask; a model without `position_ids` does not take them."""
    ids = some_ids(len(mask), length)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)[:, -length:], **past}


def assert_close(role: str, case: Case, feeds: Arrays) -> Arrays:
    """Assert that ONNX Runtime gives what PyTorch gives, at padding too; return it."""
    given = {name: feeds[name] for name in case.onnx.inputs(role)}
    wanted, got = case.exported.reference.run(role, given), case.onnx.run(role, given)
    assert list(got) == list(wanted)
    for name, array in wanted.items():
        assert got[name].shape == array.shape, name
        error = np.abs(got[name] - array).max() / np.sqrt(np.square(array).mean())
        assert error < LIMIT, f"{role}: {name} is off by {error}"
    return wanted


def assert_decoder_only_agrees(case: Case, lengths: tuple[int, ...]) -> None:
    for batch in (1, 3):
        for length in lengths:
            mask = left_padded(batch, length)
            outputs = assert_close("prefill", case, decoder_feeds(mask, length, {}))
            for new in (1, 4):
                longer = np.concatenate([mask, np.ones((batch, new), np.int64)], axis=1)
                assert_close("decode", case, decoder_feeds(longer, new, as_past(outputs, length)))


def assert_encoder_decoder_agrees(case: Case, lengths: tuple[int, ...]) -> None:
    for batch in (1, 3):
        for length in lengths:
            mask = left_padded(batch, length)
            read = {"input_ids": some_ids(batch, length), "attention_mask": mask}
            states = assert_close("encoder", case, read)["last_hidden_state"]
            encoded = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
            for prompt in (1, 3):
                outputs = assert_close("prefill", case, {"input_ids": some_ids(batch, prompt), **encoded})
                for past, new in ((0, 1), (0, 4), (1, 1), (prompt, 1), (prompt, 4)):
                    feeds = {"input_ids": some_ids(batch, new), **encoded, **as_past(outputs, past)}
                    assert_close("decode", case, feeds)


def assert_generates_the_same(case: Case) -> None:
    """Assert equal tokens for a padded batch: a host loop over the exports, and `generate` of transformers."""
    import torch

    mask = left_padded(3, 9)
    ids = np.where(mask == 1, some_ids(3, 9), 0)
    callees = {
        role: Callee(case.onnx.inputs(role), lambda feeds, role=role: case.onnx.run(role, feeds))
        for role in case.exported.models
    }
    feeds = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.int64(24)}
    got = greedy(callees, feeds, case.exported.generation_config)["sequences"]
    model = case.exported.reference._model
    tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    whole = model.generate(**tensors, max_new_tokens=24, do_sample=False, num_beams=1).numpy()
    start = 1 if "encoder" in case.exported.models else ids.shape[1]
    assert np.array_equal(got, whole[:, start:])


# What is known before anything is loaded


def test_the_roles_follow_from_the_config() -> None:
    assert roles_of({"model_type": "gpt2"}) == ("prefill", "decode")
    assert roles_of({"model_type": "t5"}) == ("encoder", "prefill", "decode")


def test_roles_and_config_are_told_without_importing_torch_or_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5"}')
    code = (
        "import sys; from surgery.sources.huggingface import read_config, roles_of; "
        f"print(roles_of(read_config({str(tmp_path)!r}))); print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["('encoder', 'prefill', 'decode')", "set()"]


@pytest.mark.parametrize("config", [{"model_type": "mamba"}, {}, {"model_type": ["gpt2"]}])
def test_an_unknown_architecture_is_named_with_those_that_are_supported(config: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"cannot export the architecture .*; supported are bart, gpt2, ") as caught:
        roles_of(config)
    assert repr(config.get("model_type")) in str(caught.value)
    assert "folder of .onnx files" in caught.value.hint


def test_every_family_has_a_tiny_model_in_these_tests() -> None:
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("opset", [7, 17, 30])
def test_an_opset_that_no_export_can_have_is_refused_at_once(tmp_path: Path, opset: int) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(RecipeError, match=f"cannot export at opset {opset}"):
        export(str(tmp_path), opset=opset, scratch=tmp_path / "scratch")


# Models that are not there or are broken


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="nowhere: there is no such folder"):
        read_config(str(tmp_path / "nowhere"))


def test_a_folder_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ModelFileError, match=r"there is no config\.json"):
        read_config(str(tmp_path))


@pytest.mark.parametrize("text", ["{", "[1]", '"gpt2"'])
def test_a_config_that_is_no_json_object_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelFileError, match=r"config\.json: not (a )?JSON"):
        read_config(str(tmp_path))


def test_a_hub_that_cannot_be_reached_is_said_within_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    class Unplugged:
        def head(self, *_: object, **__: object) -> None:
            raise OSError("Name or service not known")

    monkeypatch.setattr(huggingface_hub, "get_session", Unplugged)
    started = time.monotonic()
    with pytest.raises(RecipeError, match="Hugging Face Hub cannot be reached") as caught:
        read_config("nobody/has-this-model")
    assert time.monotonic() - started < 10
    assert "hf download nobody/has-this-model --local-dir" in caught.value.hint


def test_a_name_that_no_hub_model_can_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huggingface, "_hub_answers", lambda: False)
    with pytest.raises(RecipeError, match="neither a local folder nor a model on the Hub"):
        read_config("no such model!")


@pytest.fixture
def copy(gpt2: Case, tmp_path: Path) -> Path:
    """A copy of the tiny GPT-2 to break."""
    return Path(shutil.copytree(gpt2.folder, tmp_path / "copy"))


def test_a_folder_without_weights_is_refused(copy: Path, tmp_path: Path) -> None:
    (copy / "model.safetensors").unlink()
    with pytest.raises(ModelFileError, match="cannot load the weights"):
        export(str(copy), scratch=tmp_path / "scratch")


@pytest.mark.parametrize("content", [b"", b"no tensors here", b"\xff" * 64])
def test_broken_weights_are_refused(copy: Path, tmp_path: Path, content: bytes) -> None:
    (copy / "model.safetensors").write_bytes(content)
    with pytest.raises(ModelFileError, match="cannot load the weights"):
        export(str(copy), scratch=tmp_path / "scratch")


def test_weights_cut_short_are_refused(copy: Path, tmp_path: Path) -> None:
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ModelFileError, match="cannot load the weights"):
        export(str(copy), scratch=tmp_path / "scratch")


def test_weights_that_are_missing_are_not_made_up(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "n_layer": 2}))
    with pytest.raises(ModelFileError, match=r"12 weights are missing, among them 'transformer\.h\.1\."):
        export(str(copy), scratch=tmp_path / "scratch")


def test_weights_of_another_size_are_refused(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "n_embd": 64}))
    with pytest.raises(ModelFileError, match="cannot load the weights"):
        export(str(copy), scratch=tmp_path / "scratch")


def test_a_failure_of_the_exporter_names_the_model_the_versions_and_the_way_out(
    copy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from transformers.exporters.exporter_onnx import OnnxExporter

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("conversion failed") from AssertionError("q_num_heads\nand a long story")

    monkeypatch.setattr(OnnxExporter, "export", fail)
    with pytest.raises(SurgeryError) as caught:
        export(str(copy), scratch=tmp_path / "scratch")
    assert re.search(
        r"copy: torch \S+ and transformers \S+ cannot export 'prefill' of GPT2LMHeadModel at opset \d+: q_num_heads$",
        caught.value.message,
    )
    assert "optimum-cli" in caught.value.hint


# The interface


def interface(case: Case, role: str) -> str:
    graph = case.exported.models[role].graph
    lines = []
    for arrow, values in (("in ", graph.inputs), ("out", graph.outputs)):
        for value in values:
            assert value.shape is not None
            sizes = ", ".join(str(size if isinstance(size, int) else size.value) for size in value.shape)
            lines.append(f"{arrow} {value.name} [{sizes}] {value.dtype}")
    return "\n".join(lines)


def test_a_decoder_has_the_names_of_optimum(gpt2: Case) -> None:
    assert list(gpt2.exported.models) == ["prefill", "decode"]
    assert interface(gpt2, "prefill") == (
        "in  input_ids [batch_size, sequence_length] INT64\n"
        "in  attention_mask [batch_size, sequence_length] INT64\n"
        "in  position_ids [batch_size, sequence_length] INT64\n"
        "out logits [batch_size, sequence_length, 67] FLOAT\n"
        "out present.0.key [batch_size, 4, sequence_length, 8] FLOAT\n"
        "out present.0.value [batch_size, 4, sequence_length, 8] FLOAT"
    )
    assert interface(gpt2, "decode") == (
        "in  input_ids [batch_size, sequence_length] INT64\n"
        "in  attention_mask [batch_size, past_sequence_length + sequence_length] INT64\n"
        "in  position_ids [batch_size, sequence_length] INT64\n"
        "in  past_key_values.0.key [batch_size, 4, past_sequence_length, 8] FLOAT\n"
        "in  past_key_values.0.value [batch_size, 4, past_sequence_length, 8] FLOAT\n"
        "out logits [batch_size, sequence_length, 67] FLOAT\n"
        "out present.0.key [batch_size, 4, past_sequence_length + sequence_length, 8] FLOAT\n"
        "out present.0.value [batch_size, 4, past_sequence_length + sequence_length, 8] FLOAT"
    )


def test_an_encoder_decoder_has_the_names_of_optimum(t5: Case) -> None:
    assert list(t5.exported.models) == ["encoder", "prefill", "decode"]
    assert interface(t5, "encoder") == (
        "in  input_ids [batch_size, encoder_sequence_length] INT64\n"
        "in  attention_mask [batch_size, encoder_sequence_length] INT64\n"
        "out last_hidden_state [batch_size, encoder_sequence_length, 32] FLOAT"
    )
    assert interface(t5, "prefill") == (
        "in  input_ids [batch_size, decoder_sequence_length] INT64\n"
        "in  encoder_hidden_states [batch_size, encoder_sequence_length, 32] FLOAT\n"
        "in  encoder_attention_mask [batch_size, encoder_sequence_length] INT64\n"
        "out logits [batch_size, decoder_sequence_length, 67] FLOAT\n"
        "out present.0.decoder.key [batch_size, 4, decoder_sequence_length, 8] FLOAT\n"
        "out present.0.decoder.value [batch_size, 4, decoder_sequence_length, 8] FLOAT\n"
        "out present.0.encoder.key [batch_size, 4, encoder_sequence_length, 8] FLOAT\n"
        "out present.0.encoder.value [batch_size, 4, encoder_sequence_length, 8] FLOAT"
    )
    assert interface(t5, "decode") == (
        "in  input_ids [batch_size, decoder_sequence_length] INT64\n"
        "in  encoder_hidden_states [batch_size, encoder_sequence_length, 32] FLOAT\n"
        "in  encoder_attention_mask [batch_size, encoder_sequence_length] INT64\n"
        "in  past_key_values.0.decoder.key [batch_size, 4, past_sequence_length, 8] FLOAT\n"
        "in  past_key_values.0.decoder.value [batch_size, 4, past_sequence_length, 8] FLOAT\n"
        "in  past_key_values.0.encoder.key [batch_size, 4, encoder_sequence_length, 8] FLOAT\n"
        "in  past_key_values.0.encoder.value [batch_size, 4, encoder_sequence_length, 8] FLOAT\n"
        "out logits [batch_size, decoder_sequence_length, 67] FLOAT\n"
        "out present.0.decoder.key [batch_size, 4, past_sequence_length + decoder_sequence_length, 8] FLOAT\n"
        "out present.0.decoder.value [batch_size, 4, past_sequence_length + decoder_sequence_length, 8] FLOAT"
    )


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_no_symbol_of_the_exporter_is_left_in_any_shape(name: str, request: pytest.FixtureRequest) -> None:
    for model in request.getfixturevalue(name).exported.models.values():
        values = [value for node in model.graph.all_nodes() for value in node.outputs if value.shape is not None]
        sizes = {str(size.value) for value in values for size in value.shape or () if isinstance(size, ir.SymbolicDim)}
        assert not [size for size in sizes if names.SYMBOL.search(size)]
        assert "batch_size" in sizes


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_no_path_of_this_machine_is_left_in_the_models(name: str, request: pytest.FixtureRequest) -> None:
    for model in request.getfixturevalue(name).exported.models.values():
        assert b"site-packages" not in ir.to_proto(model).SerializeToString()


def test_nodes_and_weights_bear_the_name_of_their_module(t5: Case) -> None:
    graph = t5.exported.models["decode"].graph
    nodes = {node.name: node for node in graph}
    assert len(nodes) == len(graph)
    query = nodes["decoder.block.0.layer.0.SelfAttention.q/MatMul"]
    weight = query.inputs[1]
    assert weight is not None
    assert weight.name == "decoder.block.0.layer.0.SelfAttention.q.weight.transposed"
    assert not [
        name for name, value in graph.initializers.items() if name.startswith("val_") and len(value.shape or ()) > 1
    ]


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_an_export_keeps_the_terminal_clean_and_tells_its_steps(name: str, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(name)
    assert case.shown == ""
    assert case.said == (f"loading {case.folder}", *(f"exporting {role}" for role in case.exported.models))


# The numbers


def test_a_decoder_answers_as_pytorch_at_any_length_batch_and_padding(gpt2: Case) -> None:
    assert_decoder_only_agrees(gpt2, (1, 2, 7, 8, 33, 200))


def test_an_encoder_decoder_answers_as_pytorch_at_any_length_batch_and_padding(t5: Case) -> None:
    assert_encoder_decoder_agrees(t5, (1, 2, 7, 8, 33, 200))


@pytest.mark.parametrize(("batch", "length"), [(1, 1), (1, 5), (3, 5)])
def test_decode_after_an_empty_past_is_a_prefill(gpt2: Case, batch: int, length: int) -> None:
    feeds = decoder_feeds(left_padded(batch, length), length, {})
    outputs = assert_close("prefill", gpt2, feeds)
    again = assert_close("decode", gpt2, feeds | as_past(outputs, 0))
    for name, array in outputs.items():
        np.testing.assert_allclose(again[name], array, atol=1e-4)


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_generation_over_the_exports_gives_the_tokens_of_transformers(
    name: str, request: pytest.FixtureRequest
) -> None:
    assert_generates_the_same(request.getfixturevalue(name))


@pytest.mark.long
@pytest.mark.parametrize("opset", [18, None])
@pytest.mark.parametrize("model_type", sorted(FAMILIES))
def test_every_family_answers_and_generates_as_pytorch(model_type: str, opset: int | None, tmp_path: Path) -> None:
    case = make_case(model_type, tmp_path, opset)
    if "encoder" in case.exported.models:
        assert_encoder_decoder_agrees(case, (1, 2, 33))
    else:
        assert_decoder_only_agrees(case, (1, 2, 33))
    assert_generates_the_same(case)


# The reference


def test_the_reference_takes_memory_that_is_read_only(gpt2: Case) -> None:
    feeds = decoder_feeds(left_padded(1, 3), 3, {})
    for array in feeds.values():
        array.flags.writeable = False
    assert gpt2.exported.reference.run("prefill", feeds)["logits"].shape == (1, 3, VOCABULARY)


def test_the_reference_says_which_roles_it_has(gpt2: Case) -> None:
    with pytest.raises(SurgeryError, match="PyTorch has no 'generator' here; it has prefill, decode"):
        gpt2.exported.reference.run("generator", {})


def test_feeds_that_pytorch_cannot_run_are_shown_with_their_shapes(gpt2: Case) -> None:
    feeds = decoder_feeds(left_padded(1, 3), 3, {}) | {"attention_mask": np.ones((1, 9), np.int64)}
    with pytest.raises(SurgeryError, match=r"PyTorch cannot run 'prefill' on .*attention_mask \[1, 9\]"):
        gpt2.exported.reference.run("prefill", feeds | {"position_ids": np.full((1, 3), 10_000)})


def test_an_input_that_the_network_does_not_have_is_not_swallowed(gpt2: Case) -> None:
    with pytest.raises(SurgeryError, match="PyTorch cannot run 'prefill': it has no input 'nothing'"):
        gpt2.exported.reference.run("prefill", decoder_feeds(left_padded(1, 3), 3, {}) | {"nothing": np.ones(1)})


# Weights and files


def test_large_weights_are_in_one_file_and_each_model_has_its_own(gpt2: Case) -> None:
    regions = [
        value.const_value
        for model in gpt2.exported.models.values()
        for value in model.graph.initializers.values()
        if value.const_value is not None and value.const_value.nbytes >= huggingface.INLINE_BYTES
    ]
    assert all(isinstance(region, Region) for region in regions)
    places = {region.place for region in regions}  # type: ignore[union-attr]
    assert len(places) == len(regions)
    assert len({(device, inode) for device, inode, *_ in places}) == 1


def test_a_second_export_into_a_folder_leaves_the_weights_of_the_first(tmp_path: Path) -> None:
    array = np.arange(1000, dtype=np.float32)

    def model_of(content: np.ndarray) -> ir.Model:
        value = ir.Value(name="w", const_value=ir.Tensor(content, name="w"))
        return ir.Model(ir.Graph([], [], nodes=[], initializers=[value]), ir_version=10)

    for content in (array, -array):
        model = model_of(content)
        weights = huggingface.WeightsFile(tmp_path / "weights.bin")
        weights.take(model)
        weights.hand_out()
        if content is array:
            first = model
    kept = first.graph.initializers["w"].const_value
    assert kept is not None
    np.testing.assert_array_equal(kept.numpy(), array)


def test_configs_and_tokenizer_travel_and_nothing_else(gpt2: Case, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tokenizer.json", "merges.txt", "training_args.bin", "README.md"):
        (copy / name).write_text("{}")
    found = huggingface._Origin.of(str(copy)).companions()
    assert set(found) == {"config.json", "generation_config.json", "tokenizer.json", "merges.txt"}
    assert gpt2.exported.config["model_type"] == "gpt2"
    assert gpt2.exported.generation_config["eos_token_id"] == 1


def test_a_model_without_a_generation_config_gets_that_of_transformers(gpt2: Case) -> None:
    files: dict[str, bytes | Path] = {}
    made = huggingface._generation_config(gpt2.exported.reference._model, files)
    assert made["eos_token_id"] == 1
    content = files["generation_config.json"]
    assert isinstance(content, bytes)
    assert json.loads(content) == made


# Names


def draw(text: str) -> ir.Graph:
    import onnx.parser

    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]>\n{text}')).graph


AXES = {"input_ids": ("batch_size", "length"), "mask": ("batch_size", "past + length"), "y": ("batch_size", "length")}


def test_symbols_become_the_names_of_the_axes_wherever_they_stand() -> None:
    graph = draw(
        "g (float[s1, s2] input_ids, float[s3, s4] mask) => (float[s1, s2] y) { a = Neg(mask)  y = Neg(input_ids) }"
    )
    neg = graph[0].outputs[0]
    for text, wanted in (
        ("s1", "batch_size"),
        ("s3", "batch_size"),
        ("s4", "past + length"),
        ("2*s2", "2*length"),
        ("s1*s4", "batch_size*(past + length)"),
        ("s4 + s9", None),
        ("u0", None),
    ):
        neg.shape = ir.Shape([text])
        names.name_axes(graph, AXES)
        assert neg.shape[0].value == wanted
        for value, symbols in ((graph.inputs[0], ("s1", "s2")), (graph.inputs[1], ("s3", "s4"))):
            value.shape = ir.Shape(symbols)


def test_one_symbol_for_two_sizes_is_refused() -> None:
    graph = draw("g (float[s1, s1] input_ids, float[s3, s4] mask) => (float[s1, s1] y) { y = Neg(input_ids) }")
    with pytest.raises(SurgeryError, match="takes 'batch_size' and 'length' for one size, at 'input_ids'"):
        names.name_axes(graph, AXES)


def test_an_axis_that_the_exporter_fixed_is_refused() -> None:
    graph = draw("g (float[s1, 1] input_ids, float[s3, s4] mask) => (float[s1, 1] y) { y = Neg(input_ids) }")
    with pytest.raises(SurgeryError, match="'decode' has fixed axis 1 of 'input_ids' to 1"):
        huggingface._check_interface(graph, ("input_ids", "mask"), AXES, "decode")


def test_an_input_that_the_exporter_lost_is_refused() -> None:
    graph = draw("g (float[s1, s2] input_ids) => (float[s1, s2] y) { y = Neg(input_ids) }")
    with pytest.raises(SurgeryError, match="'decode' has lost the input 'mask'"):
        huggingface._check_interface(graph, ("input_ids", "mask"), AXES, "decode")


def test_names_with_dots_nest_and_flatten_back() -> None:
    flat = {"input_ids": 1, "past_key_values.0.decoder.key": 2, "past_key_values.10.encoder.value": 3}
    nested = names.nest(flat)
    assert nested["past_key_values"] == {"0": {"decoder": {"key": 2}}, "10": {"encoder": {"value": 3}}}
    assert names.flatten(nested) == flat
    assert names.CACHE_PART.sub("", "past_key_values.10.encoder.value") == "past_key_values.encoder"
