"""Interfaces: real exports of several tools are recognised by names alone, and names can be translated both ways."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import Refused
from surgery.interfaces import PRESETS, recognise, recognise_names, rename_values, translate
from surgery.storage import open_model
from surgery.text import parse, to_text
from surgery.watchers.validity import find_problem

FOREIGN = Path(__file__).parent / "sources" / "foreign"
EXPORTS = {
    "gpt2_all/decoder_model.onnx": ("prefill", "optimum", 1),
    "gpt2_all/decoder_with_past_model.onnx": ("decode", "optimum", 1),
    "gpt2_all/decoder_model_merged.onnx": ("decoder", "optimum", 1),
    "t5_all/encoder_model.onnx": ("encoder", "optimum", 0),
    "t5_all/decoder_model.onnx": ("prefill", "optimum", 1),
    "t5_all/decoder_with_past_model.onnx": ("decode", "optimum", 1),
    "t5_all/decoder_model_merged.onnx": ("decoder", "optimum", 1),
    "gpt2_exporters/prefill.onnx": ("prefill", "transformers.exporters", 2),
    "gpt2_exporters/decode.onnx": ("decode", "transformers.exporters", 2),
    "t5_exporters/prefill.onnx": ("prefill", "transformers.exporters", 1),
    "t5_exporters/decode.onnx": ("decode", "transformers.exporters", 1),
    "llama_genai/model.onnx": ("decode", "optimum", 2),  # its names for decoders are Optimum's
}
WHISPER_ENCODER = (["audio_features"], ["hidden_states", "present_key_cross_0", "present_value_cross_0"])
WHISPER_DECODER = (
    [
        "input_ids",
        *("past_key_self_0", "past_value_self_0", "past_key_cross_0", "past_value_cross_0"),
    ],
    ["logits", "present_key_self_0", "present_value_self_0"],
)


def names_of(file: str) -> tuple[list[str], list[str]]:
    graph = open_model(FOREIGN / file).graph
    return [value.name or "" for value in graph.inputs], [value.name or "" for value in graph.outputs]


@pytest.mark.parametrize("file", EXPORTS)
def test_a_real_export_is_recognised(file: str) -> None:
    found = recognise(open_model(FOREIGN / file))
    assert found is not None
    assert (found.role, found.naming, found.layers) == EXPORTS[file]


@pytest.mark.parametrize("file", EXPORTS)
def test_every_name_of_a_real_export_is_understood(file: str) -> None:
    inputs, outputs = names_of(file)
    found = recognise_names(inputs, outputs)
    assert found is not None
    assert list(found.canonical) == [*inputs, *outputs]


@pytest.mark.parametrize("target", PRESETS)
@pytest.mark.parametrize("file", EXPORTS)
def test_names_of_a_real_export_go_to_another_naming_and_come_back(file: str, target: str) -> None:
    inputs, outputs = names_of(file)
    source = EXPORTS[file][1]
    there = translate(inputs, outputs, source, target)
    assert len(set(there.values())) == len(inputs) + len(outputs)
    back = translate([there[name] for name in inputs], [there[name] for name in outputs], target, source)
    assert {name: back[there[name]] for name in there} == {name: name for name in there}


def test_a_cache_is_known_by_layer_part_and_whose_attention_it_serves() -> None:
    found = recognise(open_model(FOREIGN / "t5_exporters/decode.onnx"))
    assert found is not None
    first = found.cache[0]
    assert (first.layer, first.part, first.of) == (0, "key", "decoder")
    assert first.input == "input.past_key_values.self_attention_cache.layers.0.keys"
    assert first.output == "output.past_key_values.self_attention_cache.layers.0.keys"
    assert {(slot.part, slot.of) for slot in found.cache} == {
        (part, of) for part in ("key", "value") for of in ("decoder", "encoder")
    }


def test_a_slot_without_an_output_or_an_input_says_so() -> None:
    decode = recognise(open_model(FOREIGN / "t5_all" / "decoder_with_past_model.onnx"))
    prefill = recognise(open_model(FOREIGN / "t5_all" / "decoder_model.onnx"))
    assert decode is not None
    assert prefill is not None
    assert [slot.output for slot in decode.cache if slot.of == "encoder"] == [None, None]
    assert all(slot.input is None and slot.output is not None for slot in prefill.cache)


def test_the_mask_of_a_decoder_that_attends_to_an_encoder_is_the_encoders_in_transformers_exporters() -> None:
    found = recognise(open_model(FOREIGN / "t5_exporters/prefill.onnx"))
    assert found is not None
    assert found.canonical["attention_mask"] == "encoder_attention_mask"
    assert found.canonical["decoder_input_ids"] == "input_ids"
    assert found.canonical["encoder_outputs.last_hidden_state"] == "encoder_hidden_states"
    plain = recognise(open_model(FOREIGN / "gpt2_exporters/prefill.onnx"))
    assert plain is not None
    assert plain.canonical["attention_mask"] == "attention_mask"


def test_the_whisper_of_onnxruntime_genai_is_recognised() -> None:
    encoder, decoder = recognise_names(*WHISPER_ENCODER), recognise_names(*WHISPER_DECODER)
    assert encoder is not None
    assert decoder is not None
    assert (encoder.role, encoder.naming) == ("encoder", "onnxruntime-genai")
    assert encoder.canonical["audio_features"] == "input_features"
    assert encoder.canonical["hidden_states"] == "last_hidden_state"
    assert encoder.canonical["present_key_cross_0"] == "present.0.encoder.key"
    assert (decoder.role, decoder.naming, decoder.layers) == ("decode", "onnxruntime-genai", 1)
    assert decoder.canonical["past_value_self_0"] == "past_key_values.0.decoder.value"


def test_layers_count_as_numbers_not_as_text() -> None:
    numbers = range(12)
    found = recognise_names(
        ["input_ids", *(f"past_key_values.{layer}.{part}" for layer in numbers for part in ("key", "value"))],
        ["logits", *(f"present.{layer}.{part}" for layer in numbers for part in ("key", "value"))],
    )
    assert found is not None
    assert found.layers == 12
    assert [slot.layer for slot in found.cache] == [layer for layer in numbers for _ in "kv"]


@pytest.mark.parametrize(
    ("inputs", "outputs"),
    [
        (["x"], ["y"]),
        (["input_ids", "attention_mask"], ["logits"]),  # a classifier, or a decoder without a cache
        (["input_ids", "past_key_values.0.key"], ["logits"]),  # takes a cache and gives none
        (["past_key_values"], ["present"]),
        (["input_ids", "past_key_values.0.keys"], ["logits", "present.0.keys"]),
        ([], ["last_hidden_state"]),
    ],
)
def test_what_is_neither_an_encoder_nor_a_decoder_with_a_cache_is_nothing(
    inputs: list[str], outputs: list[str]
) -> None:
    assert recognise_names(inputs, outputs) is None


def test_names_that_nobody_knows_stay() -> None:
    found = recognise_names(["input_ids", "lora_scale"], ["logits", "present.0.key", "present.0.value"])
    assert found is not None
    assert "lora_scale" not in found.canonical
    assert "lora_scale" not in found.names("transformers.exporters")


# Renaming


def test_a_value_inside_gives_way_to_a_new_name() -> None:
    model = parse(
        """
        g (float[2] x, bool c) => (float[2] y) {
            z = Neg(x)
            w = If(c) <then_branch = t () => (float[2] u) {
                z_1 = Neg(z)
                u = Abs(z_1)
            }, else_branch = e () => (float[2] z_2) {
                z_2 = Abs(z)
            }>
            y = Add(z, w)
        }
        """
    )
    assert rename_values(model, {"x": "z", "y": "z_2", "c": "c"}) == 2
    assert find_problem(model) == ""
    assert to_text(model) == to_text(
        parse(
            """
            g (float[2] z, bool c) => (float[2] z_2) {
                z_3 = Neg(z)
                w = If(c) <then_branch = t () => (float[2] u) {
                    z_1 = Neg(z_3)
                    u = Abs(z_1)
                }, else_branch = e () => (float[2] z_2_1) {
                    z_2_1 = Abs(z_3)
                }>
                z_2 = Add(z_3, w)
            }
            """
        )
    )


def test_names_can_be_exchanged_also_those_of_weights_that_a_caller_may_override() -> None:
    model = parse(
        """
        g (float[2] x, float[2] a, float[2] b) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {3, 4}> {
            s = Add(x, a)
            y = Mul(s, b)
        }
        """
    )
    first, second = model.graph.inputs[1], model.graph.inputs[2]
    assert rename_values(model, {"a": "b", "b": "a", "x": "y", "y": "x"}) == 4
    assert (first.name, second.name) == ("b", "a")
    assert model.graph.initializers["b"] is first
    assert first.const_value is not None
    assert first.const_value.numpy().tolist() == [1, 2]
    assert find_problem(model) == ""


@pytest.mark.parametrize(
    ("names", "said"),
    [
        ({"x": "a"}, "'x' cannot be called 'a': another input or output has that name"),
        ({"x": "y"}, "'x' cannot be called 'y': another input or output has that name"),
        ({"x": "w"}, "'x' cannot be called 'w': a weight has that name"),
        ({"x": "n", "y": "n"}, "'x' and 'y' would both be called 'n'"),
    ],
)
def test_a_clash_is_refused_by_name_and_nothing_is_changed(names: dict[str, str], said: str) -> None:
    model = parse("g (float[2] x, float[2] a) => (float[2] y) <float[2] w = {1, 2}> { h = Mul(x, w) y = Add(h, a) }")
    before = to_text(model)
    with pytest.raises(Refused, match=said):
        rename_values(model, names)
    assert to_text(model) == before
