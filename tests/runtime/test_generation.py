"""`generate` over the trained fixtures, in each way that their decoders can be had: what PyTorch's `generate` gives."""

from __future__ import annotations

import copy
import functools
import itertools
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from passes.last_logits import LastLogits
from passes.merge_if import MergeIf
from surgery.bundle import Bundle
from surgery.contract import Context
from surgery.errors import Refused, SurgeryError
from surgery.recipe import Source
from surgery.sources import find_source

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
tokenizers = pytest.importorskip("tokenizers")

from surgery.runtime.generation import Generator, OnnxCache, open_generator  # noqa: E402

FIXTURES = Path(__file__).parent.parent.parent / "fixtures"
QUESTIONS = {
    "adder": ("7+8=", "27+58=", "999+1=", "5+995="),
    "reverser": ("a=", "stressed=", "aab=", "abcdefghijklmnop="),
    "sorter": ("4", "312", "9090", "998877665544"),
}
CASES = [
    *(f"adder-{variant}" for variant in ("pair", "merged", "cut", "alone")),
    *(f"sorter-{variant}" for variant in ("pair", "merged", "cut")),
    *(pytest.param(f"reverser-{variant}", marks=pytest.mark.long) for variant in ("pair", "merged", "alone")),
]
BEAMS: tuple[dict[str, Any], ...] = (
    {"num_beams": 4},
    {"num_beams": 4, "num_return_sequences": 3, "early_stopping": True},
    {"num_beams": 3, "early_stopping": "never", "length_penalty": 2.0},
    {"num_beams": 2, "num_return_sequences": 2, "repetition_penalty": 1.5, "length_penalty": -1.0},
)


@dataclass(frozen=True)
class Case:
    """A fixture as PyTorch has it and as ONNX models."""

    name: str
    model: Any
    generator: Generator

    def ask(self, *questions: str) -> dict[str, Any]:
        asked = questions or QUESTIONS[self.name.partition("-")[0]]
        encoded = self.generator.tokenizer(list(asked), return_tensors="pt", padding=True)
        return {name: encoded[name] for name in ("input_ids", "attention_mask")}

    def both(self, inputs: dict[str, Any], **options: Any) -> tuple[Any, Any]:
        """What PyTorch generates, and what ONNX does, from one seed."""
        answers = []
        for model in (self.model, self.generator):
            torch.manual_seed(7)
            answers.append(model.generate(**inputs, **{"max_new_tokens": 20, **options}))
        return answers[0], answers[1]

    def is_as_pytorch(self, inputs: dict[str, Any] | None = None, **options: Any) -> bool:
        wanted, found = self.both(self.ask() if inputs is None else inputs, **options)
        return torch.equal(wanted, found)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def bundle_of(exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Bundle]:
    """A fixture as `encoder`, `prefill`, `decode`."""

    @functools.cache
    def opened(name: str) -> Bundle:
        source = find_source(Source(path=str(exported(name))), Path())
        return source.open(tmp_path_factory.mktemp(name), lambda _: None).bundle

    return opened


def variant_of(bundle: Bundle, variant: str) -> Bundle:
    """The decoders as two models, as one behind a flag (with all logits or the last), or the second one alone."""
    made = bundle.clone()
    if variant == "cut":
        LastLogits(models=("prefill",)).apply(made, lambda role: Context(role=role))
    if variant in ("merged", "cut"):
        MergeIf().apply(made, lambda role: Context(role=role))
    if variant == "alone":
        del made.models["prefill"]
    return made


@pytest.fixture(scope="module")
def made(bundle_of: Callable[[str], Bundle]) -> Iterator[Callable[[str], Case]]:
    opened: list[Generator] = []

    @functools.cache
    def make(name: str) -> Case:
        fixture, _, variant = name.partition("-")
        bundle = bundle_of(fixture)
        kind = transformers.AutoModelForSeq2SeqLM if fixture == "sorter" else transformers.AutoModelForCausalLM
        generator = open_generator(variant_of(bundle, variant), threads=1)
        opened.append(generator)
        return Case(name, kind.from_pretrained(FIXTURES / fixture).eval(), generator)

    yield make
    for generator in opened:
        generator.close()


@pytest.fixture
def case(made: Callable[[str], Case], request: pytest.FixtureRequest) -> Case:
    return made(request.param)


every_case = pytest.mark.parametrize("case", CASES, indirect=True)
one_of_each = pytest.mark.parametrize("case", ["adder-pair", "sorter-merged"], indirect=True)
adders = pytest.mark.parametrize("case", ["adder-pair", "adder-cut", "adder-alone"], indirect=True)


# The tokens


@every_case
def test_a_padded_batch_is_continued_as_by_pytorch(case: Case):
    assert case.is_as_pytorch()
    wanted = {"adder": "85", "sorter": "123", "reverser": "desserts"}[case.name.partition("-")[0]]
    second = case.generator.generate(**case.ask(), max_new_tokens=20)[1]
    assert case.generator.tokenizer.decode(second, skip_special_tokens=True).endswith(wanted)


@every_case
@pytest.mark.parametrize("options", BEAMS, ids=range(len(BEAMS)))
def test_beams_end_as_those_of_pytorch_with_their_scores(case: Case, options: dict[str, Any]):
    wanted, found = case.both(case.ask(), **options, return_dict_in_generate=True, output_scores=True)
    assert torch.equal(wanted.sequences, found.sequences)
    assert torch.equal(wanted.beam_indices, found.beam_indices)
    torch.testing.assert_close(found.sequences_scores, wanted.sequences_scores, atol=1e-4, rtol=1e-4)


@every_case
def test_sampling_draws_the_same_tokens_from_one_seed(case: Case):
    hot = {"do_sample": True, "temperature": 4.0, "top_k": 0}
    first, again = case.both(case.ask(), **hot)
    assert torch.equal(first, again)
    assert not torch.equal(first, case.model.generate(**case.ask(), max_new_tokens=20))
    assert case.is_as_pytorch(do_sample=True, temperature=2.0, top_k=5, top_p=0.9, num_return_sequences=3)
    assert case.is_as_pytorch(do_sample=True, temperature=2.0, num_beams=3)


@every_case
def test_without_a_cache_all_is_read_again_and_the_tokens_are_the_same(case: Case):
    assert case.is_as_pytorch(use_cache=False)
    assert case.is_as_pytorch(use_cache=False, num_beams=3)
    output = case.generator.generate(**case.ask(), max_new_tokens=5, use_cache=False, return_dict_in_generate=True)
    assert output.past_key_values is None


@one_of_each
@pytest.mark.parametrize(
    "options",
    [
        {"repetition_penalty": 2.0},
        {"no_repeat_ngram_size": 1},
        {"encoder_repetition_penalty": 1.5},
        {"min_new_tokens": 9},
        {"bad_words_ids": [[5], [6]]},
        {"suppress_tokens": [3, 4, 5]},
        {"begin_suppress_tokens": [5, 6, 7]},
        {"forced_eos_token_id": 1, "max_new_tokens": 3},
        {"sequence_bias": [[[5], 20.0]]},
        {"exponential_decay_length_penalty": (2, 3.0)},
        {"renormalize_logits": True, "do_sample": True, "typical_p": 0.8, "temperature": 3.0},
        {"do_sample": True, "min_p": 0.05, "temperature": 5.0},
        {"do_sample": True, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "temperature": 5.0},
        {"eos_token_id": [5, 6]},
        {"max_length": 9, "max_new_tokens": None},
    ],
    ids=lambda options: next(iter(options)),
)
def test_every_option_does_what_it_does_in_pytorch(case: Case, options: dict[str, Any]):
    assert case.is_as_pytorch(**options)


@one_of_each
def test_processors_and_constraints_of_the_user_are_obeyed(case: Case):
    class OnlyEven(transformers.LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            return scores.masked_fill(torch.arange(scores.shape[1]) % 2 == 1, float("-inf"))

    processors = transformers.LogitsProcessorList([OnlyEven()])
    assert case.is_as_pytorch(logits_processor=processors)
    tokens = case.generator.generate(**case.ask(), logits_processor=processors, max_new_tokens=6)
    tokens = tokens[:, 1 if case.name.startswith("sorter") else case.ask()["input_ids"].shape[1] :]
    padding = case.generator.generation_config.pad_token_id
    assert bool(((tokens % 2 == 0) | (tokens == padding)).all())

    def allowed(row: int, ids: Any) -> list[int]:
        return [4 + row, 8]

    assert case.is_as_pytorch(prefix_allowed_tokens_fn=allowed)
    assert case.is_as_pytorch(prefix_allowed_tokens_fn=allowed, num_beams=2)


@pytest.mark.parametrize("case", ["adder-pair", "adder-merged", "adder-cut", "adder-alone"], indirect=True)
def test_guidance_runs_the_model_a_second_time(case: Case):
    assert case.is_as_pytorch(guidance_scale=3.0)


@one_of_each
def test_scores_and_logits_are_those_of_pytorch(case: Case):
    wanted, found = case.both(case.ask(), return_dict_in_generate=True, output_scores=True, output_logits=True)
    for name in ("scores", "logits"):
        assert len(found[name]) == len(wanted[name]) > 1
        torch.testing.assert_close(torch.stack(found[name]), torch.stack(wanted[name]), atol=1e-3, rtol=1e-4)
    assert type(found) is type(wanted)
    transitions = case.generator.compute_transition_scores(found.sequences, found.scores, normalize_logits=True)
    expected = case.model.compute_transition_scores(wanted.sequences, wanted.scores, normalize_logits=True)
    torch.testing.assert_close(transitions, expected, atol=1e-3, rtol=1e-3)


def test_a_generation_config_of_the_call_goes_before_that_of_the_bundle(made: Callable[[str], Case]):
    case = made("adder-pair")
    config = transformers.GenerationConfig(max_new_tokens=2, eos_token_id=None, pad_token_id=0)
    assert case.generator.generate(**case.ask(), generation_config=config).shape[1] == 6 + 2
    assert case.generator.generation_config.eos_token_id == case.model.generation_config.eos_token_id


def test_a_prompt_is_begun_where_none_is_given(made: Callable[[str], Case]):
    case = made("adder-pair")
    options = {"bos_token_id": 5, "max_new_tokens": 4}
    assert torch.equal(case.generator.generate(**options), case.model.generate(**options))


@pytest.mark.parametrize("case", ["sorter-pair", "sorter-merged", "sorter-cut"], indirect=True)
def test_a_given_beginning_of_the_answer_and_given_states_of_the_encoder_are_used(case: Case):
    inputs = case.ask("312", "9090")
    begun = inputs | {"decoder_input_ids": torch.tensor([[0, 5, 6], [0, 7, 4]])}
    assert case.is_as_pytorch(begun)
    states = case.model.encoder(**inputs)
    given = {"encoder_outputs": states, "attention_mask": inputs["attention_mask"]}
    assert case.is_as_pytorch(dict(given))


# Several tokens at once


@every_case
def test_tokens_that_are_looked_up_in_the_prompt_are_checked_at_once(case: Case):
    for question in QUESTIONS[case.name.partition("-")[0]]:
        assert case.is_as_pytorch(case.ask(question), prompt_lookup_num_tokens=3)


@every_case
def test_an_assistant_may_be_pytorch_or_onnx(case: Case):
    question = case.ask(QUESTIONS[case.name.partition("-")[0]][-1])
    wanted = case.model.generate(**question, max_new_tokens=20)
    for main, assistant in ((case.generator, case.model), (case.model, case.generator), (case.generator,) * 2):
        assert torch.equal(main.generate(**question, assistant_model=assistant, max_new_tokens=20), wanted)


@pytest.mark.parametrize("case", ["adder-pair", "adder-merged", "adder-cut", "adder-alone"], indirect=True)
def test_a_long_prompt_is_read_in_pieces(case: Case):
    assert case.is_as_pytorch(prefill_chunk_size=2)


@pytest.mark.parametrize("case", ["adder-pair", "adder-merged", "adder-cut", "adder-alone"], indirect=True)
def test_a_text_goes_on_from_the_cache_of_the_one_before(case: Case):
    tokenizer = case.generator.tokenizer
    first = case.ask("27+58=", "1+1=")
    before = case.generator.generate(**first, max_new_tokens=1, return_dict_in_generate=True)
    reference = case.model.generate(**first, max_new_tokens=1, return_dict_in_generate=True)
    more = torch.tensor(tokenizer(["+3=", "+9="]).input_ids)
    whole = {
        "input_ids": torch.cat([before.sequences, more], dim=1),
        "attention_mask": torch.cat([first["attention_mask"], torch.ones(2, 1 + more.shape[1], dtype=torch.long)], 1),
    }
    caches = (reference.past_key_values, before.past_key_values)
    found = []
    for model, cache in zip((case.model, case.generator), caches, strict=True):
        copied = copy.deepcopy(cache)
        found.append(model.generate(**whole, past_key_values=copied, max_new_tokens=6))
        # transformers takes the new tokens alone too, beside the mask of the whole text.
        new = whole | {"input_ids": whole["input_ids"][:, cache.get_seq_length() :]}
        found.append(model.generate(**new, past_key_values=copy.deepcopy(cache), max_new_tokens=6)[:, -6:])
    assert torch.equal(found[0], found[2])
    assert torch.equal(found[1], found[3])
    assert torch.equal(found[2], case.generator.generate(**whole, max_new_tokens=6))
    assert caches[1].get_seq_length() == first["input_ids"].shape[1]


@pytest.mark.parametrize("case", ["adder-pair", "adder-cut", "adder-alone", "sorter-cut"], indirect=True)
def test_a_step_by_itself_gives_as_many_logits_as_are_asked_for(case: Case):
    ids = case.ask("27+58=")["input_ids"] if case.name.startswith("adder") else torch.tensor([[0, 5, 6, 7]])
    inputs: dict[str, Any] = {"input_ids": ids}
    if case.name.startswith("sorter"):
        inputs = case.ask("312") | {"decoder_input_ids": ids}
    with torch.no_grad():
        wanted = case.model(**inputs).logits
    for keep in (0, 1, 2):
        found = case.generator(**inputs, logits_to_keep=keep)
        last = keep or ids.shape[1]
        torch.testing.assert_close(found.logits, wanted[:, -last:], atol=1e-3, rtol=1e-4)
        assert found.past_key_values.get_seq_length() == ids.shape[1]


# Ends and streams


@one_of_each
def test_generation_stops_where_it_is_told_to(case: Case):
    class AfterThree(transformers.StoppingCriteria):  # type: ignore[misc]
        def __init__(self, start: int) -> None:
            self.start = start

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            return torch.full((len(input_ids),), input_ids.shape[1] >= self.start + 3)

    start = 1 if case.name.startswith("sorter") else case.ask()["input_ids"].shape[1]
    criteria = transformers.StoppingCriteriaList([AfterThree(start)])
    tokens = case.generator.generate(**case.ask(), stopping_criteria=criteria, min_new_tokens=10, max_new_tokens=10)
    assert tokens.shape[1] == start + 3
    tokens = case.generator.generate(**case.ask(), max_time=0.0, min_new_tokens=10, max_new_tokens=10)
    assert tokens.shape[1] == start + 1
    tokenizer = with_more_letters(case.generator.tokenizer)
    text = "8" if case.name.startswith("adder") else "3"
    tokens = case.generator.generate(**case.ask(), stop_strings=[text], tokenizer=tokenizer, max_new_tokens=20)
    assert torch.equal(
        tokens, case.model.generate(**case.ask(), stop_strings=[text], tokenizer=tokenizer, max_new_tokens=20)
    )
    assert not torch.equal(tokens, case.generator.generate(**case.ask(), max_new_tokens=20))


def with_more_letters(tokenizer: Any) -> Any:
    """The tokenizer of a fixture with the letters that the criterion of stop strings tries out."""
    words = dict(tokenizer.get_vocab())
    for letter in "abcdef":
        words.setdefault(letter, len(words))
    made = tokenizers.Tokenizer(tokenizers.models.BPE(vocab=words, merges=[]))
    made.decoder = tokenizers.decoders.Fuse()
    return transformers.PreTrainedTokenizerFast(tokenizer_object=made)


@one_of_each
def test_a_streamer_gets_the_prompt_then_each_token_once_in_order(case: Case):
    class Heard:
        def __init__(self) -> None:
            self.parts: list[Any] = []
            self.has_ended = False

        def put(self, tokens: Any) -> None:
            assert not self.has_ended
            self.parts.append(tokens.reshape(-1))

        def end(self) -> None:
            self.has_ended = True

    heard = Heard()
    question = case.ask(QUESTIONS[case.name.partition("-")[0]][1])
    tokens = case.generator.generate(**question, streamer=heard, max_new_tokens=20)
    assert heard.has_ended
    assert torch.equal(torch.cat(heard.parts), tokens[0])
    assert [len(part) for part in heard.parts[1:]] == [1] * (len(heard.parts) - 1)


# The cache


@every_case
def test_nothing_is_copied_on_the_way_into_the_models_and_from_step_to_step(
    case: Case, monkeypatch: pytest.MonkeyPatch
):
    calls = listened(case.generator, monkeypatch)
    case.generator.generate(**case.ask(), max_new_tokens=4, min_new_tokens=4)
    steps = [(fed, given) for role, fed, given in calls if role != "encoder"]
    assert len(steps) == 4
    for (_, given), (fed, _) in itertools.pairwise(steps):
        handed = {f"past_key_values{name.removeprefix('present')}": value for name, value in given.items()}
        own = [name for name in fed if name.startswith("past") and ".encoder." not in name]
        assert own
        assert all(fed[name] is handed[name] for name in own)
    crossed = [name for name in steps[1][0] if ".encoder." in name]
    assert bool(crossed) == case.name.startswith("sorter")
    for fed, _ in steps[1:]:
        assert all(fed[name] is steps[1][0][name] for name in crossed)
    for role, _, given in calls:
        if role == "encoder":
            states = given["last_hidden_state"].data_ptr()
            assert all(fed["encoder_hidden_states"].data_ptr() == states for fed, _ in steps)


def listened(generator: Generator, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, dict[str, Any], dict[str, Any]]]:
    """The calls of a generator's sessions from here on: the role, what was fed, what came out."""
    calls: list[tuple[str, dict[str, Any], dict[str, Any]]] = []
    parts = {"encoder": generator._encoder, "first": generator._reader.first, "next": generator._reader.following}
    sessions = {id(part._session): (role, part._session) for role, part in parts.items() if part is not None}
    for role, session in sessions.values():
        monkeypatch.setattr(session, "run", functools.partial(_listening, calls, role, session.run))
    return calls


def _listening(calls: list[Any], role: str, run: Callable[[Any], Any], fed: dict[str, Any]) -> Any:
    given = run(fed)
    calls.append((role, dict(fed), dict(given)))
    return given


@pytest.mark.parametrize("case", ["adder-merged", "sorter-merged"], indirect=True)
def test_tensors_are_fed_where_they_lie_and_the_first_cache_has_no_bytes(case: Case, monkeypatch: pytest.MonkeyPatch):
    inputs = case.ask()
    mask = inputs["attention_mask"]
    if case.name.startswith("adder"):
        positions = (mask.cumsum(-1) - 1).clamp(min=0)
        inputs |= {"position_ids": positions}
    else:
        positions = None
        inputs |= {"decoder_input_ids": torch.zeros(len(mask), 1, dtype=torch.long)}
    calls = listened(case.generator, monkeypatch)
    case.generator(**inputs)
    fed = calls[-1][1]
    lying = {"attention_mask": mask, "encoder_attention_mask": mask, "position_ids": positions}
    lying["input_ids"] = inputs.get("decoder_input_ids", inputs["input_ids"])
    seen = [name for name in fed if name in lying]
    assert {"input_ids"} < set(seen)
    assert all(fed[name].data_ptr() == lying[name].data_ptr() for name in seen)
    empty = [value for name, value in fed.items() if name.startswith("past")]
    assert empty
    assert all(value.shape()[2] == 0 and value.shape()[0] == len(mask) for value in empty)
    assert fed["use_cache_branch"].data_type() == "tensor(bool)"
    assert fed["use_cache_branch"].numpy().tolist() == [False]
    assert fed["use_cache_branch"] is case.generator._reader.first._flags[False]


@one_of_each
def test_beams_that_keep_their_places_leave_the_cache_where_it_is(case: Case, monkeypatch: pytest.MonkeyPatch):
    calls = listened(case.generator, monkeypatch)
    case.generator.generate(**case.ask(), num_beams=3, max_new_tokens=8, min_new_tokens=8)
    steps = [(fed, given) for role, fed, given in calls if role != "encoder"]
    own = [name for name in steps[1][0] if name.startswith("past") and ".encoder." not in name]
    pairs = [
        fed[name] is given[f"present{name.removeprefix('past_key_values')}"]
        for (_, given), (fed, _) in itertools.pairwise(steps)
        for name in own[:1]
    ]
    assert not all(pairs), "no beam was ever reordered, so this shows nothing"
    crossed = [name for name in steps[1][0] if ".encoder." in name]
    assert all(fed[name] is steps[1][0][name] for fed, _ in steps[1:] for name in crossed)


def test_rows_of_a_cache_are_chosen_and_repeated_and_its_end_dropped(made: Callable[[str], Case]):
    case = made("sorter-pair")
    inputs = case.ask() | {"decoder_input_ids": torch.tensor([[0, 4, 5]] * 4)}
    cache = case.generator(**inputs).past_key_values
    key, cross = (0, "decoder", "key"), (0, "encoder", "value")
    before = {name: value.numpy().copy() for name, value in cache.pieces.items()}
    shared = copy.copy(cache)
    cache.reorder_cache(torch.tensor([1, 1, 3, 0]))
    assert (cache.pieces[key].numpy() == before[key][[1, 1, 3, 0]]).all()
    assert (cache.pieces[cross].numpy() == before[cross][[1, 1, 3, 0]]).all()
    cache.batch_select_indices(torch.tensor([2, 0]))
    cache.batch_repeat_interleave(2)
    assert (cache.pieces[key].numpy() == before[key][[3, 3, 1, 1]]).all()
    assert cache.batch_size == 4
    cache.crop(0)
    cache.crop(-1)
    assert cache.get_seq_length() == 2
    assert (cache.pieces[key].numpy() == before[key][[3, 3, 1, 1], :, :2]).all()
    assert cache.pieces[cross].shape()[2] == before[cross].shape[2]
    cache.crop(-2)
    assert (cache.is_empty, cache.get_seq_length(), cache.batch_size) == (True, 0, -1)
    assert shared.get_seq_length() == 3
    assert (shared.pieces[key].numpy() == before[key]).all()


def test_a_cache_that_kept_less_than_it_read_is_not_cropped(made: Callable[[str], Case]):
    cache = made("adder-pair").generator(torch.tensor([[4, 5, 6]])).past_key_values
    cache.length = 9
    with pytest.raises(Refused, match="the key of layer 0 holds 3 of 9 tokens"):
        cache.crop(-1)
    with pytest.raises(Refused, match="as a negative number"):
        cache.crop(2)


# What is refused


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"inputs_embeds": torch.zeros(1, 2, 8)}, "inputs_embeds: the models take token ids"),
        ({"output_attentions": True}, "output_attentions: the models give logits"),
        ({"output_hidden_states": True}, "output_hidden_states"),
        ({"assistant_early_exit": 1}, "assistant_early_exit"),
        ({"cache_implementation": "static"}, "cache_implementation='static': the cache is ONNX Runtime's"),
        ({"cache_implementation": "quantized"}, "cache_implementation='quantized'"),
        ({"cache_implementation": "paged"}, "cache_implementation='paged'"),
        ({"token_type_ids": torch.zeros(1, 2)}, "token_type_ids"),
        ({"past_key_values": transformers.DynamicCache()}, "past_key_values are a DynamicCache"),
        ({"past_key_values": OnnxCache(), "use_cache": False}, "a cache is given, and use_cache=False"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_what_the_models_cannot_give_is_refused_by_name(
    made: Callable[[str], Case], options: dict[str, Any], said: str
):
    case = made("adder-pair")
    with pytest.raises(Refused, match=said):
        case.generator.generate(**case.ask("1+1="), max_new_tokens=2, **options)


@pytest.mark.parametrize(
    "options", [{"guidance_scale": 3.0}, {"prefill_chunk_size": 2}], ids=lambda value: next(iter(value))
)
def test_what_transformers_does_for_decoders_on_their_own_is_refused_beside_an_encoder(
    made: Callable[[str], Case], options: dict[str, Any]
):
    case = made("sorter-pair")
    with pytest.raises(Refused, match=f"{next(iter(options))}: transformers .* decoders on their own"):
        case.generator.generate(**case.ask(), max_new_tokens=2, **options)


def test_a_growing_cache_may_be_asked_for_by_name(made: Callable[[str], Case]):
    assert made("adder-pair").is_as_pytorch(cache_implementation="dynamic")


def test_a_misspelt_option_is_refused(made: Callable[[str], Case]):
    case = made("adder-pair")
    with pytest.raises(ValueError, match="max_new_tokenz"):
        case.generator.generate(**case.ask(), max_new_tokenz=3)


@pytest.mark.parametrize(
    ("ids", "said"),
    [
        ([[1, 2]], "input_ids are a list, not a tensor"),
        (torch.tensor([[1.0, 2.0]]), "input_ids are torch.float32 [1, 2], not integers"),
        (torch.tensor([1, 2]), "not integers [batch, length]"),
        (torch.zeros(1, 0, dtype=torch.long), "the prompt has no tokens"),
        (torch.tensor([[1, 999]]), "input_ids go from 1 to 999, and the vocabulary has 14 tokens"),
        (torch.tensor([[-1, 2]]), "input_ids go from -1 to 2"),
    ],
    ids=range(6),
)
def test_prompts_that_are_no_tokens_of_the_model_are_refused(made: Callable[[str], Case], ids: Any, said: str):
    with pytest.raises(SurgeryError) as raised:
        made("adder-pair").generator.generate(ids, max_new_tokens=2)
    assert said in str(raised.value)
    assert raised.value.hint


def test_shapes_that_do_not_agree_are_named(made: Callable[[str], Case]):
    generator = made("adder-pair").generator
    cache = generator(torch.tensor([[4, 5], [5, 6]])).past_key_values
    one = torch.tensor([[4]])
    with pytest.raises(SurgeryError, match="the cache holds 2 rows, and 1 are given"):
        generator(one, past_key_values=cache)
    with pytest.raises(SurgeryError, match=r"the mask is \[2, 2\], and there are 2 rows of 2 tokens in the cache"):
        generator(one.repeat(2, 1), attention_mask=torch.ones(2, 2), past_key_values=cache)
    with pytest.raises(SurgeryError, match="there are 2 positions for 1 new tokens"):
        generator(one, position_ids=torch.tensor([[0, 1]]))
    with pytest.raises(SurgeryError, match="no tokens to read"):
        generator()
    with pytest.raises(Refused, match="forward: pixel_values: nothing in the models takes it"):
        generator(one, pixel_values=one)
    with pytest.raises(Refused, match="forward: output_hidden_states: the models give logits"):
        generator(one, output_hidden_states=True)
    with pytest.raises(SurgeryError, match="257 tokens do not fit into the 256 positions of the network"):
        generator.generate(one, max_new_tokens=300, eos_token_id=None)
    with pytest.raises(SurgeryError, match="there is no token to read after the cache"):
        generator.generate(torch.tensor([[4]]), past_key_values=cache, max_new_tokens=2)
    sorter = made("sorter-pair").generator
    asked = made("sorter-pair").ask("312")
    with pytest.raises(SurgeryError, match=r"attention_mask is \[1, 9\], and input_ids are"):
        sorter.generate(asked["input_ids"], attention_mask=torch.ones(1, 9), max_new_tokens=2)
    assert cache.get_seq_length() == 2


def test_a_closed_generator_generates_nothing(bundle_of: Callable[[str], Bundle]):
    with open_generator(variant_of(bundle_of("adder"), "pair"), threads=1) as generator:
        assert generator.roles == ("prefill", "decode")
    with pytest.raises(SurgeryError, match="this generator is closed"):
        generator.generate(torch.tensor([[4]]), max_new_tokens=1)


def test_a_generator_that_is_closed_between_two_tokens_says_so(bundle_of: Callable[[str], Bundle]):
    generator = open_generator(variant_of(bundle_of("adder"), "pair"), threads=1)

    class Closing(transformers.LogitsProcessor):
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            generator.close()
            return scores

    with pytest.raises(SurgeryError, match="this generator is closed"):
        generator.generate(torch.tensor([[4]]), max_new_tokens=3, logits_processor=[Closing()], eos_token_id=13)


@pytest.mark.parametrize("case", ["adder-pair", "sorter-pair"], indirect=True)
def test_a_step_gives_a_tuple_if_asked(case: Case):
    inputs = case.ask() | ({"decoder_input_ids": torch.zeros(4, 1, dtype=torch.long)} if "sorter" in case.name else {})
    plain = case.generator(**inputs, return_dict=False)
    assert isinstance(plain, tuple)
    assert torch.equal(plain[0], case.generator(**inputs).logits)


@pytest.mark.parametrize("case", ["adder-merged"], indirect=True)
def test_threads_may_share_a_generator(case: Case):
    inputs = case.ask()
    wanted = case.generator.generate(**inputs, max_new_tokens=8)
    with ThreadPoolExecutor(3) as pool:
        calls = [pool.submit(case.generator.generate, **inputs, max_new_tokens=8) for _ in range(60)]
        assert all(torch.equal(call.result(), wanted) for call in calls)
