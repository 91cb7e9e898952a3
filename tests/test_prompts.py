"""Prompts: texts become left-padded rows, and what the tokenizer cannot read is a mistake of the recipe."""

from __future__ import annotations

import numpy as np
import pytest
from conftest import ROOT
from models import decoder_pair

from surgery import Bundle
from surgery.errors import RecipeError, Refused
from surgery.runtime.prompts import answer, left_padded, load_tokenizer


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


def test_without_a_tokenizer_or_decoders_nothing_can_be_asked() -> None:
    with pytest.raises(RecipeError, match=r"no tokenizer\.json"):
        answer(decoder_pair(), ["1"], 4, never)
    with pytest.raises(Refused, match="'prefill' and 'decode'"):
        answer(Bundle({"prefill": decoder_pair()["prefill"]}), ["1"], 4, never)
