"""Feeds: what they are of each kind of input, and that chained models really made what they are fed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from models import CONFIG, POSITIONS, VOCABULARY, decoder_pair, generic, single, single_decoder

from passes.merge_if import MergeIf
from surgery import Bundle, Check, Claim, Effect, HostLoop, Pipeline, Program, Tolerance
from surgery.accuracy.feeds import FeedMaker, Interface, Sample
from surgery.accuracy.judge import Judge
from surgery.accuracy.runners import ModelProgram
from surgery.accuracy.samples import Samples
from surgery.claims import Take
from surgery.errors import SurgeryError
from surgery.recipe import Source
from surgery.sources import find_source
from surgery.text import parse

FOREIGN = Path(__file__).resolve().parent.parent / "sources" / "foreign"


class Runs:
    """Runs the models of a bundle, each in one session."""

    def __init__(self, bundle: Bundle) -> None:
        self._programs = {role: ModelProgram(model) for role, model in bundle.models.items()}

    def __call__(self, role: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._programs[role].run(feeds)

    def close(self) -> None:
        for program in self._programs.values():
            program.close()


def samples_of(bundle: Bundle, role: str, **check: object) -> list[Sample]:
    with closing(Runs(bundle)) as run:
        return list(FeedMaker(bundle, Check(**check), run).samples(role))  # type: ignore[arg-type]


def names(samples: list[Sample]) -> list[str]:
    return [sample.name for sample in samples]


@pytest.fixture(scope="module")
def pair() -> Bundle:
    return decoder_pair()


@pytest.fixture(scope="module")
def run(pair: Bundle) -> Iterator[Runs]:
    with closing(Runs(pair)) as runs:
        yield runs


@pytest.fixture(scope="module")
def prompts(pair: Bundle, run: Runs) -> list[Sample]:
    return list(FeedMaker(pair, Check(), run).samples("prefill"))


@pytest.fixture(scope="module")
def steps(pair: Bundle, run: Runs) -> list[Sample]:
    return list(FeedMaker(pair, Check(), run).samples("decode"))


def test_prompts_cover_lengths_batches_and_padding(prompts: list[Sample]) -> None:
    lengths = [f"batch 1, length {length}" for length in (1, 2, 7, 100)]
    assert names(prompts) == [*lengths, "batch 3, length 7, padded"]


def test_steps_cover_pasts_batches_and_padding(steps: list[Sample]) -> None:
    pasts = [f"batch 1, length 1, past {past}" for past in (0, 1, 7, 99)]
    assert names(steps) == [*pasts, "batch 3, length 1, past 7, padded"]


def test_traits_are_read_off_the_arrays(prompts: list[Sample], steps: list[Sample]) -> None:
    assert dict(prompts[-1].traits) == {"batch": "3", "length": "7", "padding": "yes"}
    assert dict(steps[3].traits) == {"batch": "1", "past": "99", "padding": "no"}


def test_ids_stay_below_the_vocabulary_and_are_not_all_the_same(prompts: list[Sample]) -> None:
    ids = np.concatenate([sample.arrays["input_ids"].ravel() for sample in prompts])
    assert ids.dtype == np.int64
    assert ids.min() >= 0
    assert ids.max() < VOCABULARY
    assert len(set(ids.tolist())) > 20


def test_ids_stay_below_the_vocabulary_that_only_a_table_tells() -> None:
    bundle = single("""
        <ir_version: 8, opset_import: ["" : 18]>
        lookup (int32[n, length] input_ids) => (float[n, length, 2] y) <float[3, 2] table = {1, 2, 3, 4, 5, 6}> {
            wide = Cast <to = 7> (input_ids)
            flat = Identity(wide)
            y = Gather(table, flat)
        }
    """)
    ids = samples_of(bundle, "model", lengths=(100,))[0].arrays["input_ids"]
    assert ids.dtype == np.int32
    assert set(ids.ravel().tolist()) == {0, 1, 2}


def test_masks_positions_and_padding_agree(prompts: list[Sample], steps: list[Sample]) -> None:
    for sample in (*prompts, *steps):
        arrays = sample.arrays
        past = arrays["past_key_values.0.key"].shape[2] if "past_key_values.0.key" in arrays else 0
        batch, length = arrays["input_ids"].shape
        assert arrays["attention_mask"].shape == (batch, past + length)
        wanted = np.maximum(np.cumsum(arrays["attention_mask"], axis=1) - 1, 0)[:, past:]
        assert arrays["position_ids"].tolist() == wanted.tolist()
    assert prompts[-1].arrays["attention_mask"].tolist() == [
        [0, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1],
    ]
    assert steps[-1].arrays["attention_mask"].tolist() == [
        [0, 1, 1, 1, 1, 1, 1, 1],
        [0, 0, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 1, 1],
    ]


@pytest.mark.parametrize(("past", "zeros"), [(1, [0, 0, 0]), (2, [1, 1, 0]), (3, [1, 2, 0])])
def test_no_row_is_padding_alone(pair: Bundle, run: Runs, past: int, zeros: list[int]) -> None:
    several = list(FeedMaker(pair, Check(batches=(3,), past=(past,)), run).samples("decode"))[-1]
    assert (several.arrays["attention_mask"] == 0).sum(axis=1).tolist() == zeros
    assert several.traits["padding"] == ("yes" if any(zeros) else "no")
    assert ("padded" in several.name) == any(zeros)


def test_the_past_is_what_the_prefill_gave(pair: Bundle, run: Runs, steps: list[Sample]) -> None:
    """Fed with the prompt's own last token, the decode continues as the prefill of the longer prompt ends."""
    for sample, length in zip(steps[1:4], (1, 7, 99), strict=True):
        key = sample.arrays["past_key_values.0.key"]
        assert key.shape == (1, 2, length, 4)
        assert np.abs(key).min() > 0
    prompt = {
        "input_ids": np.array([[3, 14, 15, 9], [2, 6, 5, 35]]),
        "attention_mask": np.array([[0, 1, 1, 1], [1, 1, 1, 1]]),
        "position_ids": np.array([[0, 0, 1, 2], [0, 1, 2, 3]]),
    }
    first = run("prefill", {name: array[:, :3] for name, array in prompt.items()})
    past = {name.replace("present", "past_key_values"): array for name, array in first.items() if name != "logits"}
    last = {name: array[:, 3:] for name, array in prompt.items()}
    step = run("decode", {**last, "attention_mask": prompt["attention_mask"], **past})
    whole = run("prefill", prompt)
    np.testing.assert_allclose(step["logits"][:, 0], whole["logits"][:, 3], rtol=1e-4, atol=1e-5)


def test_the_past_is_one_that_the_prefill_gives_bit_for_bit(pair: Bundle) -> None:
    """Everything that the prefill was run on is kept, and every past is among what it gave."""
    given: list[dict[str, np.ndarray]] = []
    with closing(Runs(pair)) as run:

        def noted(role: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            assert role == "prefill"
            given.append(run(role, feeds))
            return given[-1]

        made = list(FeedMaker(pair, Check(), noted).samples("decode"))
    assert made[0].arrays["past_key_values.0.key"].shape == (1, 2, 0, 4)
    for sample, outputs in zip(made[1:], given, strict=True):
        for kind in ("key", "value"):
            assert np.array_equal(sample.arrays[f"past_key_values.0.{kind}"], outputs[f"present.0.{kind}"])


def test_lengths_and_pasts_beyond_the_positions_are_left_out(pair: Bundle) -> None:
    check = {"lengths": (1, POSITIONS, POSITIONS + 1), "past": (0, POSITIONS - 1, POSITIONS)}
    assert [sample.traits["length"] for sample in samples_of(pair, "prefill", **check)] == ["1", "128", "128"]
    assert [sample.traits["past"] for sample in samples_of(pair, "decode", **check)] == ["0", "127", "127"]


def test_several_rows_are_fed_at_a_length_that_fits(pair: Bundle) -> None:
    assert names(samples_of(pair, "prefill", lengths=(4, 200, 300)))[-1] == "batch 3, length 4, padded"


def test_nothing_fits() -> None:
    assert samples_of(decoder_pair(config={**CONFIG, "n_positions": 4}), "prefill", lengths=(5, 6)) == []


def test_a_fixed_batch_is_kept(pair: Bundle) -> None:
    bundle = pair.clone()
    for value in (*bundle["prefill"].graph.inputs, *bundle["prefill"].graph.outputs):
        value.shape = ir.Shape([2, *value.shape[1:]])  # type: ignore[index]
    made = samples_of(bundle, "prefill")
    assert {sample.arrays["input_ids"].shape[0] for sample in made} == {2}
    assert {sample.traits["batch"] for sample in made} == {"2"}


def test_a_fixed_length_is_kept_and_not_said_to_vary(pair: Bundle) -> None:
    bundle = pair.clone()
    for value in bundle["prefill"].graph.inputs:
        value.shape = ir.Shape(["batch_size", 5])
    made = samples_of(bundle, "prefill")
    assert {sample.arrays["attention_mask"].shape[1] for sample in made} == {5}
    assert "length" not in made[0].traits
    assert len(made) == 2


def test_the_seed_decides_everything(pair: Bundle) -> None:
    first, again, other = (samples_of(pair, "decode", seed=seed, past=(0, 7)) for seed in (1, 1, 2))
    for sample, twin, stranger in zip(first, again, other, strict=True):
        assert all(np.array_equal(sample.arrays[name], twin.arrays[name]) for name in sample.arrays)
        names = ["past_key_values.0.key"] if "past 7" in sample.name else ["input_ids"]
        assert sample.name == stranger.name
        assert not all(np.array_equal(sample.arrays[name], stranger.arrays[name]) for name in names)


def test_a_decoder_without_prefill_grows_its_own_past() -> None:
    bundle = single_decoder()
    with closing(Runs(bundle)) as run:
        made = list(FeedMaker(bundle, Check(), run).samples("model"))
        assert names(made)[-2:] == ["batch 1, length 3, past 0", "batch 1, length 3, past 7"]
        for sample in made:
            assert all(np.isfinite(array).all() for array in run("model", sample.arrays).values())
    padded = next(sample for sample in made if "padded" in sample.name)
    assert padded.arrays["past_key_values.0.key"].shape == (3, 2, 7, 4)
    assert np.abs(padded.arrays["past_key_values.0.key"]).min() > 0


def test_a_decoder_of_one_token_grows_its_own_past_one_by_one(pair: Bundle) -> None:
    bundle = Bundle({"decode": pair["decode"]}, pair.config)
    made = samples_of(bundle, "decode", past=(0, 3))
    assert [sample.arrays["past_key_values.0.key"].shape[2] for sample in made] == [0, 3, 3]
    assert np.abs(made[1].arrays["past_key_values.0.key"]).min() > 0
    assert made[-1].traits["padding"] == "yes"


def foreign(name: str, *roles: str) -> Bundle:
    """Return models of Optimum's own making."""
    bundle = find_source(Source(path=str(FOREIGN / name)), Path()).open(Path(), lambda sentence: None).bundle
    return Bundle({role: bundle[role] for role in roles}, bundle.config)


def merged(bundle: Bundle) -> Bundle:
    """Return the same with its decoders merged by us."""
    return Pipeline([MergeIf()], None).run(bundle).bundle


def pairs(name: str, *roles: str) -> list[Bundle]:
    """Return Optimum's merged decoder, and ours of Optimum's pair."""
    return [foreign(name, *roles, "decoder"), merged(foreign(name, *roles, "prefill", "decode"))]


CHECK = {"batches": (1, 3), "lengths": (1, 5), "past": (0, 1, 7)}


@pytest.mark.parametrize("which", [0, 1], ids=["Optimum's", "ours"])
def test_both_branches_of_a_merged_decoder_are_fed(which: int) -> None:
    bundle = pairs("gpt2_all")[which]
    made = samples_of(bundle, "decoder", **CHECK)
    prompts = [sample for sample in made if not sample.arrays["use_cache_branch"].any()]
    steps = [sample for sample in made if sample.arrays["use_cache_branch"].all()]
    assert len(prompts) + len(steps) == len(made)
    without = ", branch without cache"
    assert names(prompts) == [
        f"batch 1, length 1, past 0{without}",
        f"batch 1, length 5, past 0{without}",
        f"batch 3, length 5, past 0, padded{without}",
    ]
    assert names(steps)[:4] == [
        *(f"batch 1, length 1, past {past}" for past in CHECK["past"]),
        "batch 3, length 1, past 7, padded",
    ]
    for sample in made:
        past = int(sample.traits["past"])
        assert sample.arrays["past_key_values.0.key"].shape[2] == past
        assert past == 0 or sample.arrays["past_key_values.0.key"].all()
        assert sample.arrays["attention_mask"].shape[1] == past + sample.arrays["input_ids"].shape[1]


@pytest.mark.parametrize("which", [0, 1], ids=["Optimum's", "ours"])
def test_an_encoder_s_keys_and_values_come_out_of_the_branch_without_a_cache(which: int) -> None:
    bundle = pairs("t5_all", "encoder")[which]
    given: list[Mapping[str, np.ndarray]] = []
    with closing(Runs(bundle)) as run:

        def noted(role: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
            outputs = run(role, feeds)
            if role == "decoder":
                assert not feeds["use_cache_branch"].any()
                given.append(outputs)
            return outputs

        made = list(FeedMaker(bundle, Check(**CHECK), noted).samples("decoder"))
        for sample in made:
            assert all(np.isfinite(array).all() for array in run("decoder", sample.arrays).values())
    steps = [sample for sample in made if sample.arrays["use_cache_branch"].all()]
    assert [int(sample.traits["past"]) for sample in steps][:4] == [0, 1, 7, 7]
    for sample, outputs in zip(steps, given, strict=True):
        fed, key = sample.arrays, "encoder.key"
        assert np.array_equal(fed[f"past_key_values.0.{key}"], outputs[f"present.0.{key}"])
        assert fed[f"past_key_values.0.{key}"].shape[2] == fed["encoder_attention_mask"].shape[1]
        assert fed[f"past_key_values.0.{key}"].all()
        if sample.traits["past"] != "0":
            assert np.array_equal(fed["past_key_values.0.decoder.value"], outputs["present.0.decoder.value"])
    for sample in made:
        if not sample.arrays["use_cache_branch"].any():
            assert sample.arrays["past_key_values.0.encoder.key"].shape[2] == 0


def test_a_merged_decoder_whose_step_takes_one_token_is_fed_one_after_a_cache(pair: Bundle) -> None:
    """Its axis of new tokens has no name, since the branches do not agree on it."""
    bundle = merged(pair)
    made = samples_of(bundle, "decoder", **CHECK)
    lengths = {bool(sample.arrays["use_cache_branch"]): set() for sample in made}
    for sample in made:
        lengths[bool(sample.arrays["use_cache_branch"])].add(sample.arrays["input_ids"].shape[1])
    assert lengths == {False: {1, 5}, True: {1}}
    with closing(Judge(bundle, Check(**CHECK))) as judge:
        assert not judge.judge_source().warnings


def test_an_unknown_model_gets_random_inputs_of_its_types() -> None:
    bundle = single("""
        <ir_version: 8, opset_import: ["" : 18]>
        any (float[n, 4] x, float16[n, steps] h, bool[n] b, int32[n, 2] i, string[n] s, double d)
            => (float[n, 4] y, float16[n, steps] g, bool[n] c, int32[n, 2] j, string[n] t, double e) {
            y = Neg(x)
            g = Neg(h)
            c = Not(b)
            j = Neg(i)
            t = Identity(s)
            e = Neg(d)
        }
    """)
    made = samples_of(bundle, "model", lengths=(2, 5))
    assert [dict(sample.traits) for sample in made] == [
        {"batch": "1", "length": "2"},
        {"batch": "1", "length": "5"},
        {"batch": "3", "length": "5"},
    ]
    arrays = made[-1].arrays
    assert {name: (array.dtype.name, array.shape) for name, array in arrays.items()} == {
        "x": ("float32", (3, 4)),
        "h": ("float16", (3, 5)),
        "b": ("bool", (3,)),
        "i": ("int32", (3, 2)),
        "s": ("object", (3,)),
        "d": ("float64", ()),
    }
    with closing(Judge(bundle, Check())) as judge:
        assert judge.judge_source().is_accurate


def test_a_model_without_lengths_is_fed_once_for_each_batch() -> None:
    made = samples_of(generic(), "model")
    assert names(made) == ["batch 1, length 1", "batch 3, length 1"]
    assert [dict(sample.traits) for sample in made] == [{"batch": "1"}, {"batch": "3"}]


def test_a_model_without_inputs_is_fed_nothing() -> None:
    bundle = single("""
        <ir_version: 8, opset_import: ["" : 18]>
        constant () => (float[2] y) { y = Constant <value = float[2] {1, 2}> () }
    """)
    with closing(Judge(bundle, Check())) as judge:
        verdict = judge.judge_source()
    assert verdict.is_accurate
    assert Interface(bundle["model"]).inputs == []


def test_the_prompts_of_a_loop_leave_room_for_what_it_adds() -> None:
    bundle = decoder_pair(config={**CONFIG, "n_positions": 12})
    loop = HostLoop("greedy", ("prefill", "decode"))
    with closing(Runs(bundle)) as run:
        made = Samples(bundle, Check(lengths=(2, 7, 12, 13)), Path(), run).of(loop)
    rooms = {sample.name: int(sample.arrays["max_new_tokens"]) for sample in made}
    assert rooms == {
        "batch 1, length 2": 8,
        "batch 1, length 7": 6,
        "batch 1, length 12": 1,
        "batch 3, length 7, padded": 6,
    }


def test_a_later_model_is_fed_through_the_claims(pair: Bundle) -> None:
    """What a pass gets as feeds of a model whose input was renamed."""
    later = pair.clone()
    later["prefill"].graph.inputs[0].name = "words"
    claim = Claim(Program("prefill"), Program("prefill"), inputs={"words": Take("input_ids")})
    with closing(Judge(pair, Check())) as judge:
        judge.accept([claim, Claim.same("decode")], Effect.EXACT, Tolerance())
        feeds = list(judge.feeds(later, "prefill"))
        assert [sorted(feed) for feed in feeds] == [["attention_mask", "position_ids", "words"]] * 5
        assert judge.run(later["prefill"], feeds[0])["logits"].shape == (1, 1, VOCABULARY)


SEQUENCE_IN = """
g (seq(int64[2]) xs) => (int64[2] y) {
    zero = Constant <value_int = 0> ()
    y = SequenceAt(xs, zero)
}
"""
SEQUENCE_OUT = "g (int64[2] x) => (int64[2] y, seq(int64[2]) zs) { y = Neg(x) zs = SequenceConstruct(x, y) }"


@pytest.mark.parametrize(
    ("text", "said"), [(SEQUENCE_IN, "the input 'xs' is no tensor"), (SEQUENCE_OUT, "the output 'zs' is no tensor")]
)
def test_a_sequence_is_said_to_be_beyond_the_check(text: str, said: str) -> None:
    with closing(Judge(Bundle({"model": parse(text)}), Check())) as judge, pytest.raises(SurgeryError) as caught:
        judge.judge_source()
    assert said in caught.value.message
    assert caught.value.hint == "--no-check"
