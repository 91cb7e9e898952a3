"""Prompts: texts become left-padded rows, and what the tokenizer cannot read is a mistake of the recipe."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from models import decoder_pair, single_decoder

from surgery import Bundle, Check, Pipeline
from surgery.errors import RecipeError, Refused, SurgeryError
from surgery.interfaces import rename_values
from surgery.runtime.prompts import answer, left_padded, load_tokenizer, refuse_unanswerable, roles_of_prompts

ROOT = Path(__file__).resolve().parent.parent


def with_tokenizer() -> Bundle:
    bundle = decoder_pair()
    return Bundle(bundle.models, files={"tokenizer.json": ROOT / "fixtures" / "adder" / "tokenizer.json"})


def never(*_: object) -> dict[str, np.ndarray]:
    raise AssertionError("nothing is to be run")


def test_rows_are_padded_at_the_left() -> None:
    ids, mask = left_padded([[5, 6, 7], [8]], pad=9)
    assert ids.tolist() == [[5, 6, 7], [9, 9, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_a_tokenizer_travels_as_a_file_or_as_bytes() -> None:
    bundle = with_tokenizer()
    content = (ROOT / "fixtures" / "adder" / "tokenizer.json").read_bytes()
    same = load_tokenizer(Bundle(bundle.models, files={"tokenizer.json": content}))
    assert load_tokenizer(bundle).encode("1+2=").ids == same.encode("1+2=").ids


@pytest.mark.parametrize(("prompt", "said"), [("", "has no tokens"), ("words", "cannot read 'words'")])
def test_a_prompt_without_tokens_is_a_mistake(prompt: str, said: str) -> None:
    with pytest.raises(RecipeError, match=said):
        answer(with_tokenizer(), ["1+2=", prompt], 4, never)


@pytest.mark.parametrize(
    ("old", "new", "said", "way_out"),
    [
        ("attention_mask", "mask", "feeds the input 'mask' of 'prefill'", "rename_io"),
        ("logits", "scores", "no output of 'prefill' is its 'logits'", "rename_io"),
        ("attention_mask", "encoder_hidden_states", "'encoder_hidden_states' of 'prefill'", "no model 'encoder'"),
    ],
)
def test_one_name_that_no_loop_knows_is_refused_by_name(old: str, new: str, said: str, way_out: str) -> None:
    bundle = with_tokenizer()
    for model in bundle.models.values():
        rename_values(model, {old: new})
    with pytest.raises(Refused, match=said) as caught:
        answer(bundle, ["1+2="], 4, never)
    assert way_out in caught.value.hint


def test_a_decoder_with_a_cache_is_no_prefill() -> None:
    bundle = with_tokenizer()
    swapped = Bundle({"prefill": bundle["decode"], "decode": bundle["prefill"]}, files=bundle.files)
    with pytest.raises(Refused, match=r"feeds the input 'past_key_values\S+' of 'prefill'"):
        answer(swapped, ["1+2="], 4, never)


def test_without_a_tokenizer_or_decoders_nothing_can_be_asked() -> None:
    with pytest.raises(RecipeError, match=r"no tokenizer\.json"):
        answer(decoder_pair(), ["1"], 4, never)
    with pytest.raises(RecipeError, match="'prefill' and 'decode'"):
        answer(Bundle({"prefill": decoder_pair()["prefill"]}), ["1"], 4, never)


def alone(role: str) -> Bundle:
    """Return a decoder that takes several tokens at once, as the only model."""
    return Bundle({role: single_decoder()["model"]}, files=with_tokenizer().files)


def test_a_pair_goes_before_a_merged_decoder_and_that_before_a_single_one() -> None:
    assert roles_of_prompts(("prefill", "decoder", "decode", "encoder")) == ("encoder", "prefill", "decode")
    assert roles_of_prompts(("decode", "decoder")) == ("decoder",)
    assert roles_of_prompts(("decode", "encoder")) == ("encoder", "decode")
    assert roles_of_prompts(["prefill", "decoder"]) == ("decoder",)


@pytest.mark.parametrize("roles", [(), ("prefill",), ("encoder",), ("encoder", "prefill")])
def test_without_a_decoder_that_goes_on_nothing_can_be_asked(roles: tuple[str, ...]) -> None:
    with pytest.raises(RecipeError, match="'prefill' and 'decode', or 'decoder'"):
        roles_of_prompts(roles)


def test_a_single_model_is_told_how_it_could_be_a_decoder() -> None:
    with pytest.raises(RecipeError) as caught:
        roles_of_prompts(("model",))
    assert "source.roles: decoder: FILE" in caught.value.hint


@pytest.mark.parametrize("role", ["decoder", "decode"])
def test_what_could_be_asked_is_known_without_running_anything(role: str) -> None:
    refuse_unanswerable(alone(role))
    for broken, said in (
        (Bundle({"decode": with_tokenizer()["decode"]}, files=alone(role).files), "'decode' takes one token at a time"),
        (Bundle(alone(role).models), r"no tokenizer\.json"),
    ):
        with pytest.raises(SurgeryError, match=said):
            refuse_unanswerable(broken)


def test_what_the_source_could_not_answer_stops_a_run_before_its_first_step() -> None:
    said: list[str] = []
    pipeline = Pipeline(["dedup_weights"], Check(prompts=("1+2=",)))
    with pytest.raises(RecipeError, match=r"no tokenizer\.json"):
        pipeline.run(decoder_pair(), progress=said.append)
    assert not any("dedup_weights" in sentence for sentence in said)
