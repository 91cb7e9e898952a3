"""What `audit_ranges` runs: generated samples, drawn anew in rounds, or the user's own arrays and texts."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from models import decoder_pair, generic, single, single_decoder

from passes.audit_ranges import AuditRanges, Ranges
from passes.merge_if import MergeIf
from surgery import Bundle, Check, Pipeline
from surgery.accuracy.feeds import Sample
from surgery.accuracy.judge import Judge
from surgery.accuracy.samples import Samples
from surgery.claims import Program
from surgery.contract import Sampling
from surgery.errors import RecipeError
from surgery.manager import Stopped
from surgery.runtime.sessions import open_session

Arrays = Mapping[str, np.ndarray]

WORDS = [f"w{index}" for index in range(50)]
TEXT = "w5 w6 w7\n\n   \nw8\nw9 w10\nw11 w12 w13 w14\nw15 w16\n"


def with_tokenizer(bundle: Bundle) -> Bundle:
    """Return a bundle that splits texts at spaces into `w0`, ..., `w49`, whose ids are their numbers."""
    tokenizers = pytest.importorskip("tokenizers")
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel({word: id for id, word in enumerate(WORDS)}))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    files = {"tokenizer.json": tokenizer.to_str().encode()}
    return Bundle(bundle.models, bundle.config, bundle.generation_config, files)


def text_file(folder: Path, text: str = TEXT) -> Path:
    (folder / "prompts.txt").write_text(text)
    return folder / "prompts.txt"


def fed(bundle: Bundle, role: str, sampling: Sampling | None = None, check: Check | None = None) -> list[Arrays]:
    """Return what a pass is given that asks for samples."""
    with closing(Judge(bundle, check or Check())) as judge:
        return list(judge.feeds(bundle, role, sampling))


class Source:
    """The samples of a bundle, and how often each model was run for them."""

    def __init__(self, bundle: Bundle) -> None:
        self.runs = dict.fromkeys(bundle.models, 0)
        self._sessions = {role: open_session(model) for role, model in bundle.models.items()}
        self._samples = Samples(bundle, Check(), Path(), self.run)

    def run(self, role: str, feeds: Arrays) -> dict[str, np.ndarray]:
        self.runs[role] += 1
        session = self._sessions[role]
        return dict(zip((one.name for one in session.get_outputs()), session.run(None, dict(feeds)), strict=True))

    def drawn(self, role: str, sampling: Sampling) -> Iterator[Sample]:
        return self._samples.drawn(Program(role), sampling)


def same(one: list[Arrays], other: list[Arrays]) -> bool:
    return len(one) == len(other) and all(
        ours.keys() == theirs.keys() and all(np.array_equal(ours[name], theirs[name]) for name in ours)
        for ours, theirs in zip(one, other, strict=True)
    )


# Generated


def test_without_more_a_pass_is_given_what_verdicts_rest_on():
    bundle = decoder_pair()
    samples = fed(bundle, "prefill")
    assert [sample["input_ids"].shape for sample in samples] == [(1, 1), (1, 2), (1, 7), (1, 100), (3, 7)]
    assert any((sample["attention_mask"] == 0).any() for sample in samples)
    assert same(samples, fed(bundle, "prefill", Sampling()))


def test_every_round_has_the_same_shapes_and_other_numbers():
    bundle = decoder_pair()
    first, second = (fed(bundle, "decode", Sampling(round=number)) for number in (0, 1))
    assert [sample["past_key_values.0.key"].shape for sample in first] == [
        sample["past_key_values.0.key"].shape for sample in second
    ]
    assert not same(first, second)
    assert same(second, fed(bundle, "decode", Sampling(round=1)))
    assert all(sample["input_ids"].max() < 50 for sample in second)


def test_shapes_and_seed_are_chosen():
    bundle = decoder_pair()
    chosen = Sampling(batches=(2,), lengths=(5,), past=(4,), seed=7)
    assert {sample["input_ids"].shape for sample in fed(bundle, "prefill", chosen)} == {(2, 5)}
    assert {sample["past_key_values.0.key"].shape for sample in fed(bundle, "decode", chosen)} == {(2, 2, 4, 4)}
    assert same(fed(bundle, "prefill", chosen), fed(bundle, "prefill", chosen))
    assert not same(fed(bundle, "prefill", Sampling(seed=1)), fed(bundle, "prefill", Sampling(seed=2)))


def test_the_past_of_a_generated_sample_is_what_a_prefill_made():
    bundle = decoder_pair()
    (sample,) = fed(bundle, "decode", Sampling(batches=(1,), past=(4,), seed=7))
    source = Source(bundle)
    (prompt,) = _recorded(source, "prefill", Sampling(batches=(1,), past=(4,), seed=7))
    assert np.array_equal(source.run("prefill", prompt)["present.0.key"], sample["past_key_values.0.key"])


def _recorded(source: Source, role: str, sampling: Sampling) -> list[Arrays]:
    """Return what the prefill is given while samples of the decode are made."""
    kept: list[Arrays] = []
    run = source.run

    def recording(called: str, feeds: Arrays) -> dict[str, np.ndarray]:
        if called == role:
            kept.append(feeds)
        return run(called, feeds)

    source._samples = Samples(decoder_pair(), Check(), Path(), recording)
    list(source.drawn("decode", sampling))
    return kept


def test_samples_are_made_while_they_are_taken():
    source = Source(decoder_pair())
    next(source.drawn("decode", Sampling(past=(3, 5, 7), batches=(1,))))
    assert source.runs == {"prefill": 1, "decode": 0}


def test_a_model_that_a_step_made_is_fed_with_samples_of_both_that_it_came_of():
    seen: dict[str, list[Arrays]] = {}

    class Look(AuditRanges):
        def analyze(self, bundle, context):
            feeds = context("decoder").feeds
            seen["samples"] = [dict(sample) for sample in feeds("decoder", Sampling(lengths=(4,), past=(6,)))]
            return {"decoder": Ranges(values={}, samples=1)}

    with Pipeline([MergeIf(), Look()]).run(decoder_pair()):
        pass
    flags = [bool(sample["use_cache_branch"]) for sample in seen["samples"]]
    assert set(flags) == {False, True}
    assert {sample["input_ids"].shape[1] for sample in seen["samples"]} == {1, 4}


# The user's own arrays


def test_a_folder_of_npz_is_a_sample_a_file_by_name(tmp_path: Path):
    for name, value in (("b", 2), ("a", 1), ("c", 3)):
        np.savez(tmp_path / f"{name}.npz", x=np.full((1, 4), value, np.float32))
    (tmp_path / "notes.md").write_text("not a sample")
    assert [sample["x"][0, 0] for sample in fed(generic(), "model", Sampling(data=tmp_path))] == [1, 2, 3]


def test_own_samples_are_of_the_first_round_alone(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=np.ones((1, 4), np.float32))
    assert fed(generic(), "model", Sampling(data=tmp_path, round=1)) == []
    by_check = Check(data=tmp_path / "a.npz")
    assert len(fed(generic(), "model", Sampling(), by_check)) == 1
    assert fed(generic(), "model", Sampling(round=1), by_check) == []


def test_shapes_that_are_asked_for_are_generated_whatever_the_check_feeds(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=np.ones((1, 4), np.float32))
    (sample,) = fed(generic(), "model", Sampling(batches=(5,)), Check(data=tmp_path / "a.npz"))
    assert sample["x"].shape == (5, 4)


def test_each_model_has_its_folder(tmp_path: Path):
    prompt = fed(decoder_pair(), "prefill")[2]
    (tmp_path / "prefill").mkdir()
    np.savez(tmp_path / "prefill" / "a.npz", **prompt)
    assert same(fed(decoder_pair(), "prefill", Sampling(data=tmp_path)), [prompt])
    with pytest.raises(RecipeError) as caught:
        fed(decoder_pair(), "decode", Sampling(data=tmp_path))
    assert caught.value.message == f"data: {tmp_path} has no folder 'decode' for that model"
    assert same(fed(decoder_pair(), "prefill", Sampling(data={"prefill": tmp_path / "prefill" / "a.npz"})), [prompt])
    others = fed(decoder_pair(), "decode", Sampling(data={"prefill": tmp_path}))
    assert same(others, fed(decoder_pair(), "decode"))


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("empty", "no .npz is in"),
        ("nowhere.npz", "there is no file"),
        ("data.csv", "is of no known form"),
        ("wrong.npz", "lacks the input 'x' of 'model'; it has 'y'"),
    ],
)
def test_own_data_that_do_not_do_are_said_by_the_option(tmp_path: Path, name: str, message: str):
    (tmp_path / "empty").mkdir()
    (tmp_path / "data.csv").write_text("1,2")
    np.savez(tmp_path / "wrong.npz", y=np.ones(3))
    with pytest.raises(RecipeError, match=message) as caught:
        fed(generic(), "model", Sampling(data=tmp_path / name))
    assert caught.value.message.startswith("data: ")


def test_data_for_a_model_that_there_is_not_are_refused(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=np.ones(3))
    with pytest.raises(RecipeError, match="data: the source has no model 'prefil'; did you mean 'prefill'?"):
        fed(decoder_pair(), "decode", Sampling(data={"prefil": tmp_path / "a.npz"}))


def test_data_that_are_not_there_are_a_mistake_of_the_recipe(tmp_path: Path):
    with pytest.raises(RecipeError, match="data: there is no file or folder"):
        AuditRanges(data=tmp_path / "nowhere.txt")
    with pytest.raises(RecipeError, match="data: there is no file or folder"):
        AuditRanges(data={"prefill": tmp_path / "nowhere.txt"})


# Texts


def test_a_decoder_reads_the_lines_padded_at_the_left_four_at_once(tmp_path: Path):
    first, second = fed(with_tokenizer(decoder_pair()), "prefill", Sampling(data=text_file(tmp_path)))
    assert first["input_ids"].tolist() == [[0, 5, 6, 7], [0, 0, 0, 8], [0, 0, 9, 10], [11, 12, 13, 14]]
    assert first["attention_mask"].tolist() == [[0, 1, 1, 1], [0, 0, 0, 1], [0, 0, 1, 1], [1, 1, 1, 1]]
    assert first["position_ids"].tolist() == [[0, 0, 1, 2], [0, 0, 0, 0], [0, 0, 0, 1], [0, 1, 2, 3]]
    assert second["input_ids"].tolist() == [[15, 16]]


def test_its_later_steps_get_the_cache_and_the_token_that_the_models_made(tmp_path: Path):
    bundle = with_tokenizer(decoder_pair())
    source = Source(bundle)
    sampling = Sampling(data=text_file(tmp_path, "w5 w6 w7\nw20 w21\n"))
    (prompt,) = source.drawn("prefill", sampling)
    steps = list(source.drawn("decode", sampling))
    assert [sample.name for sample in steps[:3]] == [f"prompts.txt[0-1], token {step}" for step in (1, 2, 4)]
    state, mask, wanted = source.run("prefill", prompt.arrays), prompt.arrays["attention_mask"], iter(steps)
    for step in range(1, 9):
        token = state["logits"][:, -1].argmax(-1)[:, None]
        mask = np.concatenate([mask, np.ones_like(token)], 1)
        feeds = _next(state, token, mask)
        if step in (1, 2, 4, 8):
            assert same([next(wanted).arrays], [feeds])
        state = source.run("decode", feeds)


def _next(state: Arrays, token: np.ndarray, mask: np.ndarray) -> dict[str, np.ndarray]:
    return {
        "input_ids": token,
        "attention_mask": mask,
        "position_ids": np.maximum(np.cumsum(mask, 1) - 1, 0)[:, -1:],
        "past_key_values.0.key": state["present.0.key"],
        "past_key_values.0.value": state["present.0.value"],
    }


def test_a_text_is_read_no_further_than_its_samples_are_taken(tmp_path: Path):
    source = Source(with_tokenizer(decoder_pair()))
    list(islice(source.drawn("prefill", Sampling(data=text_file(tmp_path, "w5\n" * 400))), 2))
    assert source.runs == {"prefill": 2, "decode": 0}


ENCODER = """
<ir_version: 8, opset_import: ["" : 18]>
encoder (int64[b, n] input_ids, int64[b, n] attention_mask, int64[b, n] token_type_ids) => (float[b, n] y) {
    words = Cast <to = 1> (input_ids)
    kinds = Cast <to = 1> (token_type_ids)
    mask = Cast <to = 1> (attention_mask)
    told = Add(words, kinds)
    y = Mul(told, mask)
}
"""


def test_an_encoder_reads_the_lines_padded_at_the_right(tmp_path: Path):
    bundle = with_tokenizer(single(ENCODER, vocab_size=50))
    first, _ = fed(bundle, "model", Sampling(data=text_file(tmp_path)))
    assert first["input_ids"].tolist() == [[5, 6, 7, 0], [8, 0, 0, 0], [9, 10, 0, 0], [11, 12, 13, 14]]
    assert first["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]]
    assert not first["token_type_ids"].any()


def test_what_cannot_be_padded_reads_one_line_at_a_time(tmp_path: Path):
    text = """
        <ir_version: 8, opset_import: ["" : 18]>
        g (int64[b, n] input_ids) => (float[b, n] y) { y = Cast <to = 1> (input_ids) }
    """
    samples = fed(with_tokenizer(single(text)), "model", Sampling(data=text_file(tmp_path)))
    assert [sample["input_ids"].tolist() for sample in samples][:2] == [[[5, 6, 7]], [[8]]]
    assert len(samples) == 5


def test_a_line_that_is_too_long_for_the_network_is_cut(tmp_path: Path):
    bundle = with_tokenizer(decoder_pair())
    sampling = Sampling(data=text_file(tmp_path, "w5 " * 300))
    (sample,) = fed(bundle, "prefill", sampling)
    assert sample["input_ids"].shape == (1, 128 - 16)
    assert max(sample["attention_mask"].shape[1] for sample in fed(bundle, "decode", sampling)) <= 128


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "there is no text in"),
        (b" \n\n", "there is no text in"),
        (b"\xff\xfe\xfd", "cannot read"),
        (b"w5 unheard", "the tokenizer cannot read 'w5 unheard'"),
    ],
)
def test_texts_that_do_not_do_are_said(tmp_path: Path, text: bytes, message: str):
    (tmp_path / "t.txt").write_bytes(text)
    with pytest.raises(RecipeError, match=message) as caught:
        fed(with_tokenizer(decoder_pair()), "prefill", Sampling(data=tmp_path / "t.txt"))
    assert caught.value.message.startswith("data: ")


def test_a_text_needs_a_tokenizer_and_a_model_that_takes_ids(tmp_path: Path):
    with pytest.raises(RecipeError, match="data: the source has no tokenizer.json"):
        fed(decoder_pair(), "prefill", Sampling(data=text_file(tmp_path)))
    with pytest.raises(RecipeError, match="data: 'model' takes no 'input_ids', so no text can be fed"):
        fed(with_tokenizer(generic()), "model", Sampling(data=text_file(tmp_path)))


def test_a_decoder_that_goes_by_no_role_reads_the_prompts_alone(tmp_path: Path):
    bundle = with_tokenizer(single_decoder())
    first, *_ = fed(bundle, "model", Sampling(data=text_file(tmp_path)))
    assert first["input_ids"].shape == (4, 4)
    assert first["past_key_values.0.key"].shape[2] == 0


def test_verdicts_may_rest_on_a_text_and_on_a_folder_too(tmp_path: Path):
    with closing(Judge(with_tokenizer(decoder_pair()), Check(data=text_file(tmp_path)))) as judge:
        verdict = judge.judge_source()
    assert "padding no, yes" in str(verdict.coverage["decode"])
    (tmp_path / "arrays").mkdir()
    np.savez(tmp_path / "arrays" / "a.npz", x=np.ones((1, 4), np.float32))
    with closing(Judge(generic(), Check(data=tmp_path / "arrays"))) as judge:
        assert judge.judge_source().is_accurate


# The pass


def test_an_audit_sees_what_only_the_own_data_hold(tmp_path: Path):
    np.savez(tmp_path / "a.npz", x=np.array([[1, 2, 3, 300]], np.float32))
    with Pipeline([AuditRanges(data=tmp_path / "a.npz", report=tmp_path / "r.txt")]).run(generic()):
        pass
    text = (tmp_path / "r.txt").read_text()
    assert "on 1 sample; 1 too large" in text
    with Pipeline([AuditRanges(report=tmp_path / "r.txt")]).run(generic()):
        pass
    assert "all fit float16" in (tmp_path / "r.txt").read_text()


def test_an_audit_of_prompts_runs_both_models(tmp_path: Path):
    audit = AuditRanges(data=text_file(tmp_path), save_to=tmp_path / "ranges")
    with Pipeline([audit]).run(with_tokenizer(decoder_pair())):
        pass
    samples = {
        role: Ranges.load(tmp_path / "ranges" / f"{role}.ranges.json", decoder_pair()[role]).samples
        for role in ("prefill", "decode")
    }
    assert samples["prefill"] == 2
    assert samples["decode"] >= 4


def test_an_audit_says_what_is_wrong_with_a_text(tmp_path: Path):
    with pytest.raises(Stopped, match=r"step 1 \(audit_ranges\): data: the source has no tokenizer.json"):
        Pipeline([AuditRanges(data=text_file(tmp_path))]).run(decoder_pair())
