"""Every family against PyTorch: any length, batch and padding, any past, beyond sliding windows, and its tokens."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("torch")
pytest.importorskip("transformers.exporters")
pytest.importorskip("onnxruntime")

from pretrained_cases import (
    TINY,
    WINDOW,
    Case,
    as_past,
    assert_agrees,
    assert_close,
    assert_generates_the_same,
    decoder_feeds,
    encoder_feeds,
    interface,
    left_padded,
    make_case,
    right_padded,
)

from surgery import Bundle, Check
from surgery.accuracy.judge import Judge
from surgery.sources.architectures import ENCODER_ONLY, FAMILIES

GENERATORS = sorted(name for name, heads in FAMILIES.items() if heads is not ENCODER_ONLY)
READERS = sorted(name for name, heads in FAMILIES.items() if heads is ENCODER_ONLY)
LENGTHS = (1, 2, 33, 200)


def test_every_family_has_a_tiny_model_in_these_tests() -> None:
    assert set(TINY) == set(FAMILIES)


@pytest.mark.parametrize("name", ["gpt2", "t5", "bert"])
def test_an_export_answers_as_pytorch_at_any_length_batch_and_padding(
    name: str, request: pytest.FixtureRequest
) -> None:
    assert_agrees(request.getfixturevalue(name), LENGTHS)


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


def test_padding_of_an_encoder_changes_nothing_for_the_tokens_beside_it(bert: Case) -> None:
    whole = encoder_feeds(np.ones((1, 9), np.int64))
    padded = {name: np.pad(array, ((0, 0), (0, 4)), constant_values=0) for name, array in whole.items()}
    padded["input_ids"][:, 9:] = 5
    alone, beside = (bert.onnx.run("model", feeds)["last_hidden_state"] for feeds in (whole, padded))
    np.testing.assert_allclose(beside[:, :9], alone, atol=1e-5)
    without_mask = {**padded, "attention_mask": np.ones((1, 13), np.int64)}
    assert np.abs(bert.onnx.run("model", without_mask)["last_hidden_state"][:, :9] - alone).max() > 1e-3


def test_the_types_of_tokens_change_the_answer(bert: Case) -> None:
    feeds = encoder_feeds(right_padded(3, 9))
    other = {**feeds, "token_type_ids": 1 - feeds["token_type_ids"]}
    first, second = (bert.onnx.run("model", each)["last_hidden_state"] for each in (feeds, other))
    assert np.abs(first - second).max() > 1e-3


def test_the_judge_feeds_an_encoder_types_that_it_has(bert: Case) -> None:
    judge = Judge(Bundle(bert.exported.models, bert.exported.config), Check(), bert.exported.reference)
    verdict = judge.judge_source()
    types = [feeds["token_type_ids"] for feeds in judge.feeds(Bundle(bert.exported.models), "model")]
    judge.close()
    assert verdict.is_accurate, verdict
    assert {int(kind) for array in types for kind in array.flat} == {0, 1}


# Slow: every family


@pytest.mark.long
@pytest.mark.parametrize("opset", [18, None])
@pytest.mark.parametrize("model_type", GENERATORS)
def test_every_generator_answers_and_generates_as_pytorch(model_type: str, opset: int | None, tmp_path: Path) -> None:
    case = make_case(model_type, tmp_path, opset)
    assert_agrees(case, (1, 2, 33))
    if model_type != "whisper":  # the host loop reads text
        assert_generates_the_same(case)


@pytest.mark.long
@pytest.mark.parametrize("opset", [19, 20, 21, 22, 24])
@pytest.mark.parametrize("model_type", ["bart", "gemma2", "gpt2", "llama", "t5", "whisper"])
def test_every_opset_between_gives_the_same_answers(model_type: str, opset: int, tmp_path: Path) -> None:
    case = make_case(model_type, tmp_path, opset)
    assert {model.opset_imports[""] for model in case.exported.models.values()} == {opset}
    assert_agrees(case, (2, 33))


@pytest.mark.long
@pytest.mark.parametrize("head", sorted(ENCODER_ONLY))
@pytest.mark.parametrize("model_type", READERS)
def test_every_reader_answers_as_pytorch(model_type: str, head: str, tmp_path: Path) -> None:
    assert_agrees(make_case(model_type, tmp_path, head=head), (1, 2, 33, 200))


@pytest.mark.long
@pytest.mark.parametrize("opset", [18, 24])
@pytest.mark.parametrize("model_type", READERS)
def test_every_reader_answers_as_pytorch_at_other_opsets(model_type: str, opset: int, tmp_path: Path) -> None:
    assert_agrees(make_case(model_type, tmp_path, opset, "ForMaskedLM"), (1, 2, 33, 200))


@pytest.mark.long
@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text", "gpt_neo", "mistral", "phi3", "starcoder2"])
def test_a_sliding_window_holds_beyond_it_with_padding_and_past(model_type: str, tmp_path: Path) -> None:
    """A decode after a past longer than the window gives the last rows of one prefill over everything."""
    case = make_case(model_type, tmp_path)
    whole, new = 3 * WINDOW, 4
    mask = left_padded(3, whole)
    feeds = decoder_feeds(mask, whole, {})
    outputs = assert_close("prefill", case, feeds)
    past = as_past(outputs, whole - new)
    last = {name: feeds[name][:, -new:] for name in ("input_ids", "position_ids")}
    step = assert_close("decode", case, {**last, "attention_mask": mask, **past})
    np.testing.assert_allclose(step["logits"], outputs["logits"][:, -new:], atol=1e-4)


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama3", "yarn", "linear"])
def test_stretched_rotary_embeddings_are_exported(kind: str, tmp_path: Path) -> None:
    stretched = {
        "rope_type": kind,
        "factor": 8.0,
        "rope_theta": 10000.0,
        **({"original_max_position_embeddings": 16} if kind != "linear" else {}),
        **({"high_freq_factor": 4.0, "low_freq_factor": 1.0} if kind == "llama3" else {}),
    }
    assert_agrees(make_case("llama", tmp_path, rope_parameters=stretched), (2, 15, 17, 100))


@pytest.mark.long
def test_a_rotary_embedding_with_two_sets_of_factors_takes_the_right_one(tmp_path: Path) -> None:
    """Phi-3 with 128k: the long factors from one token beyond the original length on."""
    factors = {"short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [1.0, 2.0, 3.0, 4.0]}
    rope = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 16, **factors}
    case = make_case("phi3", tmp_path, original_max_position_embeddings=16, rope_parameters=rope)
    assert_agrees(case, (2, 15, 16, 17, 100))


@pytest.mark.long
def test_a_model_of_speech_is_judged_against_pytorch(tmp_path: Path) -> None:
    case = make_case("whisper", tmp_path)
    assert interface(case, "encoder") == (
        "in  input_features [batch_size, 16, 40] FLOAT\nout last_hidden_state [batch_size, 20, 32] FLOAT"
    )
    assert "encoder_attention_mask" not in interface(case, "prefill")
    judge = Judge(Bundle(case.exported.models, case.exported.config), Check(), case.exported.reference)
    verdict = judge.judge_source()
    judge.close()
    assert verdict.is_accurate, verdict
