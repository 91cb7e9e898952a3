"""Host loops: the same tokens over two decoders, over the two merged, and over one that takes several tokens."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from models import decoder_pair, single_decoder

from passes.merge_if import MergeIf
from surgery import Bundle, Check, Claim, HostLoop, Pipeline
from surgery.accuracy.judge import Judge
from surgery.contract import Effect, Tolerance
from surgery.errors import SurgeryError
from surgery.interfaces import PRESETS, recognise, rename_values
from surgery.recipe import Source
from surgery.runtime.host_loops import greedy_loop
from surgery.runtime.loops import Callee, Signature, greedy
from surgery.runtime.prompts import answer
from surgery.runtime.sessions import open_session
from surgery.sources import find_source

FOREIGN = Path(__file__).resolve().parent.parent / "sources" / "foreign"

PROMPTS = {
    "input_ids": np.array([[0, 0, 5, 9], [7, 3, 8, 4]]),
    "attention_mask": np.array([[0, 0, 1, 1], [1, 1, 1, 1]]),
    "max_new_tokens": np.array(12),
}
IDS = {"pad_token_id": 0, "decoder_start_token_id": 0}


class Noting:
    """Runs a model and keeps what it was fed and what it gave."""

    def __init__(self, model: ir.Model) -> None:
        self._session = open_session(model)
        self.names = [value.name for value in self._session.get_outputs()]
        self.calls: list[tuple[Mapping[str, np.ndarray], dict[str, np.ndarray]]] = []

    def __call__(self, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        outputs = dict(zip(self.names, self._session.run(None, dict(feeds)), strict=True))
        self.calls.append((feeds, outputs))
        return outputs


def callees(bundle: Bundle, *roles: str) -> tuple[dict[str, Callee], dict[str, Noting]]:
    runs = {role: Noting(bundle[role]) for role in roles}
    return {role: Callee(Signature.of(bundle[role]), runs[role]) for role in roles}, runs


def tokens(bundle: Bundle, *roles: str) -> np.ndarray:
    return greedy(callees(bundle, *roles)[0], PROMPTS, {**bundle.config, **IDS})["sequences"]


def merged(bundle: Bundle) -> Bundle:
    return Pipeline([MergeIf()], None).run(bundle).bundle


def foreign(name: str) -> Bundle:
    return find_source(Source(path=str(FOREIGN / name)), Path()).open(Path(), lambda sentence: None).bundle


@pytest.fixture(scope="module")
def gpt2() -> Bundle:
    return foreign("gpt2_all")


@pytest.fixture(scope="module")
def t5() -> Bundle:
    return foreign("t5_all")


def test_two_decoders_and_the_two_merged_give_the_same_tokens(gpt2: Bundle) -> None:
    """Of Optimum's merged file and of ours, in a batch whose rows are padded."""
    wanted = tokens(gpt2, "prefill", "decode")
    assert len(set(wanted.ravel().tolist())) > 1
    assert wanted.tolist() == tokens(gpt2, "decoder").tolist()
    ours = merged(Bundle({role: gpt2[role] for role in ("prefill", "decode")}, gpt2.config))
    assert list(ours.models) == ["decoder"]
    assert wanted.tolist() == tokens(ours, "decoder").tolist()


def test_an_encoder_s_keys_and_values_are_carried_from_the_prompt_on(t5: Bundle) -> None:
    """Optimum's merged file gives empty ones with a cache, and so does ours."""
    wanted = tokens(t5, "encoder", "prefill", "decode")
    ours = merged(Bundle({role: t5[role] for role in ("encoder", "prefill", "decode")}, t5.config))
    for bundle in (t5, ours):
        models, runs = callees(bundle, "encoder", "decoder")
        made = greedy(models, PROMPTS, {**bundle.config, **IDS})["sequences"]
        assert made.tolist() == wanted.tolist()
        (fed, first), *later = runs["decoder"].calls
        key = "encoder.key"
        assert not fed["use_cache_branch"].any()
        assert fed[f"past_key_values.0.{key}"].shape[2] == fed["past_key_values.0.decoder.key"].shape[2] == 0
        assert first[f"present.0.{key}"].shape[2] == 4
        for number, (fed, given) in enumerate(later, 1):
            assert fed["use_cache_branch"].all()
            assert given[f"present.0.{key}"].size == 0
            assert np.array_equal(fed[f"past_key_values.0.{key}"], first[f"present.0.{key}"])
            assert fed["past_key_values.0.decoder.key"].shape[2] == number


def test_an_answer_begins_with_the_text_s_first_token_where_the_config_leaves_it_open(t5: Bundle) -> None:
    roles = ("encoder", "prefill", "decode")
    config = {**t5.config, "decoder_start_token_id": None, "bos_token_id": 0, "pad_token_id": 0}
    assert np.array_equal(greedy(callees(t5, *roles)[0], PROMPTS, config)["sequences"], tokens(t5, *roles))
    bundle = Bundle({role: t5[role] for role in roles}, config)
    assert greedy_loop(bundle) == HostLoop("greedy", roles)


@pytest.mark.parametrize("role", ["decoder", "decode"])
def test_one_decoder_of_several_tokens_begins_with_an_empty_cache(role: str) -> None:
    wanted = tokens(decoder_pair(), "prefill", "decode")
    bundle = Bundle({role: single_decoder()["model"]})
    models, runs = callees(bundle, role)
    assert greedy(models, PROMPTS, IDS)["sequences"].tolist() == wanted.tolist()
    assert [fed["past_key_values.0.key"].shape for fed, _ in runs[role].calls[:2]] == [(2, 2, 0, 4), (2, 2, 4, 4)]


@pytest.mark.parametrize("naming", ["transformers.exporters", "onnxruntime-genai"])
@pytest.mark.parametrize("layout", ["gpt2_all", "t5_all"])
def test_a_merged_decoder_of_other_names_gives_the_same_tokens(naming: str, layout: str) -> None:
    bundle = foreign(layout)
    roles = [role for role in ("encoder", "decoder") if role in bundle.models]
    wanted = tokens(bundle, *roles)
    for role in roles:
        recognised = recognise(bundle[role])
        assert recognised is not None
        rename_values(bundle[role], recognised.names(PRESETS[naming].name))
    assert tokens(bundle, *roles).tolist() == wanted.tolist()


def test_a_head_whose_size_is_not_declared_is_as_long_as_the_config_says() -> None:
    bundle = foreign("llama_genai")
    made = tokens(bundle, "decode")
    assert made.shape == (2, 12)
    models, _ = callees(bundle, "decode")
    with pytest.raises(SurgeryError, match=r"sizes of the cache 'past_key_values\.0\.key' are not declared"):
        greedy(models, PROMPTS, IDS)


def test_what_cannot_read_a_prompt_is_refused_before_anything_runs(t5: Bundle) -> None:
    pair = decoder_pair()
    for bundle, roles, said in (
        (pair, ("decode",), "'decode' takes one token at a time"),
        (t5, ("encoder", "decode"), "nothing computes the encoder's keys and values that 'decode' takes"),
        (pair, ("prefill",), "without a decoder; there is prefill"),
    ):
        models, runs = callees(bundle, *roles)
        with pytest.raises(SurgeryError, match=said):
            greedy(models, PROMPTS, IDS)
        assert not any(run.calls for role, run in runs.items() if role != "encoder")


def test_a_claim_leads_from_two_decoders_to_the_merged_one(t5: Bundle) -> None:
    """The drift of the tokens from the source stays known after the merge, and a wrong merge is found by them."""
    source = Bundle({role: t5[role] for role in ("encoder", "prefill", "decode")}, t5.config, t5.generation_config)
    after = merged(source)
    before, now = HostLoop("greedy", tuple(source.models)), HostLoop("greedy", ("encoder", "decoder"))
    claims = [*MergeIf().claims(source, after), Claim.same("encoder"), Claim(before, now)]
    with closing(Judge(source, Check(batches=(2,), lengths=(1, 5), past=(0, 3)))) as judge:
        verdict = judge.judge(source, after, claims, Effect.EXACT, Tolerance())
        assert verdict.is_accurate
        assert set(verdict.coverage) == {
            "encoder",
            "decoder as prefill",
            "decoder as decode",
            "greedy over encoder + decoder as greedy over encoder + prefill + decode",
        }
        judge.accept(claims, Effect.EXACT, Tolerance())
        same = [Claim.same(role) for role in after.models]
        later = judge.judge(after, after, [*same, Claim(now, now)], Effect.EXACT, Tolerance())
        assert str(later.source) == "exact"
        assert set(later.coverage) == set(verdict.coverage)

    swapped = Pipeline([MergeIf(when_true="prefill", when_false="decode")], None).run(source).bundle
    with closing(Judge(source, Check(batches=(2,), lengths=(5,), past=(3,)))) as judge:
        tokens_only = [*(Claim.same(role) for role in ("encoder",)), Claim(before, now)]
        said = judge.judge(source, swapped, tokens_only, Effect.EXACT, Tolerance()).failures
        assert said
        assert all("sequences" in str(failure) for failure in said)


def test_prompts_are_continued_alike_before_and_after_the_merge(t5: Bundle, gpt2: Bundle) -> None:
    for bundle, prompt, variety in ((t5, ["12+3", "7"], 1), (gpt2, ["1+2=", "44"], 2)):
        pair = Bundle({role: bundle[role] for role in bundle.models if role != "decoder"}, bundle.config)
        pair.generation_config, pair.files = bundle.generation_config, bundle.files
        answers = [answer(each, prompt, 8, run) for each in (pair, merged(pair))]
        assert answers[0] == answers[1]
        assert len(set(answers[0][0].tokens)) >= variety


def run(model: ir.Model, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    session: onnxruntime.InferenceSession = open_session(model)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feeds)), strict=True))
