"""Hugging Face models, exported on the way: the interface, the weights, and what is said when it fails."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers.exporters")
pytest.importorskip("onnxruntime")

from pretrained_cases import (
    VOCABULARY,
    Case,
    decoder_feeds,
    interface,
    left_padded,
    save_tiny,
)

from surgery import Bundle, Check
from surgery.accuracy.judge import Judge
from surgery.errors import ModelFileError, RecipeError, SurgeryError
from surgery.sources import architectures, huggingface, names, origin, weights
from surgery.sources.huggingface import export, read_config, roles_of
from surgery.sources.pretrained import Pretrained
from surgery.storage.region import Region

# What is known before anything is loaded


@pytest.mark.parametrize(
    ("model_type", "name", "roles"),
    [
        ("gpt2", "GPT2LMHeadModel", ("prefill", "decode")),
        ("llama", "LlamaForCausalLM", ("prefill", "decode")),
        ("t5", "T5ForConditionalGeneration", ("encoder", "prefill", "decode")),
        ("t5", "T5WithLMHeadModel", ("encoder", "prefill", "decode")),
        ("marian", "MarianMTModel", ("encoder", "prefill", "decode")),
        ("whisper", "WhisperForConditionalGeneration", ("encoder", "prefill", "decode")),
        ("bert", "BertForSequenceClassification", ("model",)),
        ("roberta", "RobertaForMaskedLM", ("model",)),
        ("distilbert", "DistilBertForQuestionAnswering", ("model",)),
        ("mpnet", "MPNetModel", ("model",)),
    ],
)
def test_the_roles_follow_from_the_config(model_type: str, name: str, roles: tuple[str, ...]) -> None:
    assert roles_of({"model_type": model_type, "architectures": [name]}) == roles


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        ("gpt2", "GPT2ForSequenceClassification"),
        ("gpt2", "GPT2DoubleHeadsModel"),
        ("gpt2", "GPT2Model"),
        ("llama", "LlamaForTokenClassification"),
        ("bert", "BertLMHeadModel"),
        ("bert", "BertForPreTraining"),
        ("bert", "BertForMultipleChoice"),
        ("bart", "BartForCausalLM"),
        ("bart", "BartForSequenceClassification"),
        ("t5", "T5EncoderModel"),
        ("whisper", "WhisperForAudioClassification"),
        ("bert", "Nonsense"),
    ],
)
def test_a_head_that_is_not_supported_is_not_exported_as_another(model_type: str, name: str) -> None:
    with pytest.raises(RecipeError, match=rf"cannot export '{name}'; of {model_type}, those are exported") as caught:
        roles_of({"model_type": model_type, "architectures": [name]})
    assert caught.value.hint


@pytest.mark.parametrize(
    ("model_type", "bare", "whole"),
    [
        ("bart", "BartModel", "BartForConditionalGeneration"),
        ("marian", "MarianModel", "MarianMTModel"),
        ("gpt2", "GPT2Model", "GPT2LMHeadModel"),
        ("qwen3", "Qwen3Model", "Qwen3ForCausalLM"),
    ],
)
def test_a_bare_network_is_refused_with_the_name_of_the_whole_one(model_type: str, bare: str, whole: str) -> None:
    with pytest.raises(RecipeError, match=f"cannot export '{bare}'") as caught:
        roles_of({"model_type": model_type, "architectures": [bare]})
    assert f'"architectures": ["{whole}"]' in caught.value.hint


@pytest.mark.parametrize("given", [None, [], ["GPT2LMHeadModel", "GPT2Model"], "GPT2LMHeadModel", [1]])
def test_a_config_that_does_not_name_one_head_is_refused_with_what_to_write(given: Any) -> None:
    config = {"model_type": "gpt2"} if given is None else {"model_type": "gpt2", "architectures": given}
    with pytest.raises(RecipeError, match="of this gpt2 does not say under 'architectures' which head") as caught:
        roles_of(config)
    assert '"architectures": ["...LMHeadModel"]' in caught.value.hint


@pytest.mark.parametrize(
    ("given", "near"), [("lama", "llama"), ("gemma3", "gemma"), ("distil-bert", "distilbert"), ("bart2", "bart")]
)
def test_an_unknown_architecture_near_a_known_one_is_asked_about(given: str, near: str) -> None:
    with pytest.raises(RecipeError, match=f"did you mean '{near}"):
        roles_of({"model_type": given})


def test_rotary_embeddings_that_grow_in_python_are_refused_before_loading(tmp_path: Path) -> None:
    config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "rope_scaling": {"type": "dynamic"}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="cannot export rotary embeddings of type 'dynamic'"):
        export(str(tmp_path), scratch=tmp_path / "scratch")


def test_roles_and_config_are_told_without_importing_torch_or_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]}')
    code = (
        "import sys; from surgery.sources.huggingface import read_config, roles_of; "
        f"print(roles_of(read_config({str(tmp_path)!r}))); print({{'torch', 'transformers'}} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["('encoder', 'prefill', 'decode')", "set()"]


@pytest.mark.parametrize("config", [{"model_type": "mamba"}, {}, {"model_type": ["gpt2"]}])
def test_an_unknown_architecture_is_named_with_those_that_are_supported(config: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"cannot export the architecture .*; supported are albert, bart, ") as caught:
        roles_of(config)
    assert repr(config.get("model_type")) in str(caught.value)
    assert "folder of .onnx files" in caught.value.hint


@pytest.mark.parametrize("opset", [7, 17, 30])
def test_an_opset_that_no_export_can_have_is_refused_at_once(tmp_path: Path, opset: int) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
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
    monkeypatch.setattr(origin, "_hub_answers", lambda: False)
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


def test_weights_of_a_class_that_the_model_type_does_not_have_are_refused(copy: Path, tmp_path: Path) -> None:
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps({**config, "architectures": ["OpenAIGPTLMHeadModel"]}))
    with pytest.raises(ModelFileError, match="names 'OpenAIGPTLMHeadModel', but its model_type 'gpt2'") as caught:
        export(str(copy), scratch=tmp_path / "scratch")
    assert "config.json" in caught.value.hint


@pytest.fixture
def falcon(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model that torch 2.13 does not export at opset 23: its only head of keys is not that of the queries."""
    families = {**architectures.FAMILIES, "falcon": architectures.DECODER_ONLY}
    monkeypatch.setattr(architectures, "FAMILIES", families)
    return save_tiny("falcon", tmp_path / "falcon", hidden_size=32, num_hidden_layers=1, num_attention_heads=4)


def test_a_failure_inside_torch_names_the_model_the_role_the_versions_and_the_way_out(
    falcon: Path, tmp_path: Path
) -> None:
    with pytest.raises(SurgeryError) as caught:
        export(str(falcon), scratch=tmp_path / "scratch")
    assert re.fullmatch(
        r"\S+/falcon: cannot export 'prefill' of FalconForCausalLM at opset 23 "
        r"\(torch \S+, transformers \S+, onnxscript \S+\): SDPA \(MHA\) requires q_num_heads = kv_num_heads",
        caught.value.message,
    )
    assert "source.opset: 18" in caught.value.hint
    assert "optimum-cli" in caught.value.hint


@pytest.mark.long
def test_the_way_out_of_a_failure_inside_torch_leads_out(falcon: Path, tmp_path: Path) -> None:
    exported = export(str(falcon), opset=18, scratch=tmp_path / "scratch")
    assert list(exported.models) == ["prefill", "decode"]


# The interface


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


def test_an_encoder_has_the_names_of_optimum(bert: Case) -> None:
    assert list(bert.exported.models) == ["model"]
    assert interface(bert, "model") == (
        "in  input_ids [batch_size, sequence_length] INT64\n"
        "in  attention_mask [batch_size, sequence_length] INT64\n"
        "in  token_type_ids [batch_size, sequence_length] INT64\n"
        "out last_hidden_state [batch_size, sequence_length, 32] FLOAT\n"
        "out pooler_output [batch_size, 32] FLOAT"
    )


def test_an_encoder_that_was_saved_without_a_pooler_gets_none(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = save_tiny("bert", tmp_path / "bert", "Model")
    kept = {name: x for name, x in load_file(folder / "model.safetensors").items() if not name.startswith("pooler.")}
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    exported = export(str(folder), scratch=tmp_path / "scratch")
    assert [value.name for value in exported.models["model"].graph.outputs] == ["last_hidden_state"]


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_no_symbol_of_the_exporter_is_left_in_any_shape(name: str, request: pytest.FixtureRequest) -> None:
    for model in request.getfixturevalue(name).exported.models.values():
        values = [value for node in model.graph.all_nodes() for value in node.outputs if value.shape is not None]
        sizes = {str(size.value) for value in values for size in value.shape or () if isinstance(size, ir.SymbolicDim)}
        assert not [size for size in sizes if names.SYMBOL.search(size)]
        assert "batch_size" in sizes


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
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


@pytest.mark.long
def test_norms_that_add_one_to_their_weight_keep_its_name(tmp_path: Path) -> None:
    exported = export(str(save_tiny("gemma", tmp_path / "gemma")), scratch=tmp_path / "scratch")
    for model in exported.models.values():
        assert "model.norm.weight.plus_one" in model.graph.initializers
        wide = [name for name, value in model.graph.initializers.items() if value.shape == (32,)]
        assert not [name for name in wide if not name.endswith(".plus_one")]


@pytest.mark.parametrize("name", ["gpt2", "t5"])
def test_an_export_keeps_the_terminal_clean_and_tells_its_steps(name: str, request: pytest.FixtureRequest) -> None:
    case = request.getfixturevalue(name)
    assert case.shown == ""
    assert case.said == (f"loading {case.folder}", *(f"exporting {role}" for role in case.exported.models))


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
        if value.const_value is not None and value.const_value.nbytes >= weights.INLINE_BYTES
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
        file = weights.WeightsFile(tmp_path / "weights.bin")
        file.take(model)
        file.hand_out()
        if content is array:
            first = model
    kept = first.graph.initializers["w"].const_value
    assert kept is not None
    np.testing.assert_array_equal(kept.numpy(), array)


def test_configs_and_tokenizer_travel_and_nothing_else(gpt2: Case, copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("tokenizer.json", "merges.txt", "training_args.bin", "README.md"):
        (copy / name).write_text("{}")
    found = origin.Origin.of(str(copy)).companions()
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


def test_an_encoder_travels_without_a_generation_config(bert: Case) -> None:
    assert bert.exported.generation_config == {}
    assert set(bert.exported.files) == {"config.json"}


# Names of transformers.exporters


@pytest.fixture(scope="session")
def kept(gpt2: Case, tmp_path_factory: pytest.TempPathFactory) -> tuple[Bundle, Any]:
    opened = Pretrained(str(gpt2.folder), None, "keep").open(tmp_path_factory.mktemp("kept"), lambda _: None)
    return opened.bundle, opened.reference


def names_of(bundle: Bundle, role: str) -> list[str]:
    graph = bundle[role].graph
    return [value.name or "" for value in (*graph.inputs, *graph.outputs)]


def test_kept_names_are_those_of_the_exporter(kept: tuple[Bundle, Any]) -> None:
    bundle, _ = kept
    plain = ["input_ids", "attention_mask", "position_ids"]
    first = [f"past_key_values.layers.0.{part}" for part in ("keys", "values")]
    assert names_of(bundle, "prefill") == [*plain, "logits", *first]
    past, present = ([f"{side}.{name}" for name in first] for side in ("input", "output"))
    assert names_of(bundle, "decode") == [*plain, *past, "logits", *present]


def test_an_export_with_kept_names_is_judged_against_pytorch(kept: tuple[Bundle, Any]) -> None:
    bundle, reference = kept
    judge = Judge(bundle, Check(lengths=(2, 5), past=(0, 1, 5), batches=(1, 2)), reference)
    verdict = judge.judge_source()
    judge.close()
    assert verdict.is_accurate, verdict
    assert verdict.coverage["decode"].traits["past"] == {"0", "1", "5"}
    assert verdict.coverage["decode"].traits["padding"] == {"yes", "no"}


@pytest.mark.long
def test_kept_names_are_those_of_the_exporters_own_decomposition(gpt2: Case, t5: Case, tmp_path: Path) -> None:
    """What transformers.exporters 5.23 calls the same tensors, exported by itself."""
    import torch
    import transformers
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    for case, loader in ((gpt2, "AutoModelForCausalLM"), (t5, "AutoModelForSeq2SeqLM")):
        model = getattr(transformers, loader).from_pretrained(case.folder).eval()
        inputs = {"input_ids": torch.full((2, 5), 3), "attention_mask": torch.tensor(left_padded(2, 5))}
        config = OnnxConfig(dynamic=True, opset_version=18)
        with huggingface.quiet():
            theirs = OnnxExporter().export_for_generation(model, inputs, config).components
            ours = Pretrained(str(case.folder), None, "keep").open(tmp_path, lambda _: None).bundle
        for role, component in theirs.items():
            graph = component.program.graph
            given = {value.name for value in (*graph.inputs, *graph.outputs)}
            assert set(names_of(ours, role)) <= given


@pytest.mark.long
def test_an_encoder_decoder_with_kept_names_is_judged_against_pytorch(t5: Case, tmp_path: Path) -> None:
    opened = Pretrained(str(t5.folder), None, "keep").open(tmp_path, lambda _: None)
    assert names_of(opened.bundle, "decode")[:3] == [
        "decoder_input_ids",
        "encoder_outputs.last_hidden_state",
        "attention_mask",
    ]
    judge = Judge(opened.bundle, Check(lengths=(2, 5), past=(0, 1, 5)), opened.reference)
    verdict = judge.judge_source()
    judge.close()
    assert verdict.is_accurate, verdict
