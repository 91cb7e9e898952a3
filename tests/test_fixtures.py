"""The committed fixtures are what their makers make, and answer what they were trained to answer."""

from __future__ import annotations

import importlib
import json
import random
import shutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

FIXTURES = Path(__file__).parent.parent / "fixtures"
MAKERS = ("make_adder", "make_sorter", "make_reverser", "make_comparer")
LOWEST_SCORES = {"comparer": 0.99}


def load(script: str) -> ModuleType:
    """A script of fixtures/, imported as it is when run: beside `training`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(FIXTURES)
        return importlib.import_module(script)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """Tensors this small only wait for a second thread, for seconds where the cores are busy."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=MAKERS)
def maker(request: pytest.FixtureRequest) -> Any:
    return load(request.param).MAKER


@pytest.fixture
def copied(maker: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the fixture, which the maker takes for the committed one."""
    shutil.copytree(maker.folder, tmp_path / maker.name)
    monkeypatch.setattr(load("training"), "HERE", tmp_path)
    return maker.folder


def ask(maker: Any, *questions: str, **padding: str) -> list[str]:
    from transformers import AutoTokenizer

    if maker.name == "comparer":
        return load("make_comparer").labels_of(maker.folder, questions)
    model = maker.model_class.from_pretrained(maker.folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(maker.folder, **padding)
    return load("training").answer(model, tokenizer, questions)


def test_the_committed_folder_is_what_its_maker_makes(maker: Any):
    assert maker.check() == []


def test_the_recorded_score_is_high_and_the_folder_is_small(maker: Any):
    assert json.loads((maker.folder / "score.json").read_text())["exact_match"] >= LOWEST_SCORES.get(maker.name, 0.999)
    assert sum(path.stat().st_size for path in maker.folder.iterdir()) < 800_000


def test_a_padded_batch_gives_the_answers_of_single_questions(maker: Any):
    questions = {
        "adder": ("7+8=", "27+58=", "999+1=", "5+995=", "640+77="),
        "sorter": ("4", "312", "9090", "998877665544", "1111111"),
        "reverser": ("a=", "stressed=", "aab=", "zzzzzzzzzzzzzzzz=", "abcdefghijklmnop="),
        "comparer": ("7 7", "27 58", "999 1", "4321 4312", "10 9"),
    }[maker.name]
    assert ask(maker, *questions) == [ask(maker, question)[0] for question in questions]


def test_the_adder_adds():
    adder = load("make_adder").MAKER
    assert ask(adder, "27+58=", "999 + 999 =", "0+0=") == ["85", "1998", "0"]


@pytest.mark.parametrize("side", ["left", "right"])
def test_the_sorter_sorts_wherever_the_padding_is(side: str):
    sorter = load("make_sorter").MAKER
    assert ask(sorter, "3 1 2", "312", "5", "210987654321", padding_side=side) == ["123", "123", "5", "011223456789"]


def test_the_adder_ends_with_its_end_token_and_pads_with_another():
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    adder = load("make_adder").MAKER
    settings = GenerationConfig.from_pretrained(adder.folder)
    tokenizer = AutoTokenizer.from_pretrained(adder.folder)
    assert (settings.eos_token_id, settings.pad_token_id) == (tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert settings.eos_token_id != settings.pad_token_id

    inputs = tokenizer(["1+2=", "999+1="], padding=True, return_tensors="pt")
    tokens = AutoModelForCausalLM.from_pretrained(adder.folder).generate(**inputs, max_new_tokens=8)
    assert tokenizer.batch_decode(tokens) == [
        "<pad><pad>1+2=3<eos><pad><pad><pad>",
        "999+1=1000<eos>",
    ]


def test_the_reverser_reverses():
    reverser = load("make_reverser").MAKER
    assert ask(reverser, "stressed=", "a b c a=", "aaab=", "q=") == ["desserts", "acba", "baaa", "q"]


def test_the_reverser_begins_ends_and_pads_with_three_tokens_none_of_them_0():
    from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

    reverser = load("make_reverser").MAKER
    settings = GenerationConfig.from_pretrained(reverser.folder)
    tokenizer = AutoTokenizer.from_pretrained(reverser.folder)
    special = (settings.bos_token_id, settings.eos_token_id, settings.pad_token_id)
    assert special == (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    assert len({0, *special}) == 4

    inputs = tokenizer(["a=", "abc="], padding=True, return_tensors="pt")
    tokens = AutoModelForCausalLM.from_pretrained(reverser.folder).generate(**inputs, max_new_tokens=8)
    assert tokenizer.batch_decode(tokens) == ["<pad><pad><s>a=a</s><pad><pad>", "<s>abc=cba</s>"]


def test_the_reverser_groups_queries_and_ties_no_embedding():
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(load("make_reverser").MAKER.folder)
    assert model.config.num_key_value_heads < model.config.num_attention_heads
    assert model.get_input_embeddings().weight.data_ptr() != model.get_output_embeddings().weight.data_ptr()
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_the_reverser_needs_its_positions():
    from transformers import AutoModelForCausalLM, AutoTokenizer

    reverser = load("make_reverser").MAKER
    model = AutoModelForCausalLM.from_pretrained(reverser.folder)
    inputs = AutoTokenizer.from_pretrained(reverser.folder)("abcdefgh=", return_tensors="pt")
    positions = torch.arange(inputs["input_ids"].shape[1])[None]
    with torch.inference_mode():
        right, shifted, lost = (
            model(**inputs, position_ids=at).logits[0, -1] for at in (positions, positions + 5, positions * 0)
        )
    assert torch.allclose(right, shifted, atol=1e-3)  # only distances count
    assert right.argmax() == shifted.argmax() == 7  # h
    assert (right - lost).abs().max() > 1


def test_the_comparer_compares():
    comparer = load("make_comparer").MAKER
    assert ask(comparer, "27 58", "58 27", "314 314", "999 1000") == ["less", "greater", "equal", "less"]


def test_the_comparer_names_its_labels_and_types_its_tokens():
    from transformers import AutoConfig, AutoTokenizer

    folder = load("make_comparer").MAKER.folder
    config = AutoConfig.from_pretrained(folder)
    assert config.id2label == {0: "less", 1: "equal", 2: "greater"}
    assert config.label2id == {"less": 0, "equal": 1, "greater": 2}
    inputs = AutoTokenizer.from_pretrained(folder)(["4", "10"], ["31", "9"], padding=True)
    assert inputs["input_ids"] == [[1, 7, 2, 6, 4, 2], [1, 4, 3, 2, 12, 2]]
    assert inputs["token_type_ids"] == [[0, 0, 0, 1, 1, 1], [0, 0, 0, 0, 1, 1]]


def test_the_comparer_needs_its_mask_its_token_types_and_its_positions():
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    script = load("make_comparer")
    comparer = script.MAKER
    model = AutoModelForSequenceClassification.from_pretrained(comparer.folder)
    rng = random.Random(7)
    questions, answers = zip(*(comparer.exercise(rng) for _ in range(500)), strict=True)
    inputs = script.encode(AutoTokenizer.from_pretrained(comparer.folder), questions)
    wanted = torch.tensor([script.LABELS.index(label) for label in answers])

    def right(**changed: Any) -> float:
        with torch.inference_mode():
            return (model(**{**inputs, **changed}).logits.argmax(-1) == wanted).float().mean().item()

    assert right() > 0.99
    assert right(attention_mask=torch.ones_like(wanted)[:, None].expand_as(inputs["input_ids"])) < 0.8
    assert right(token_type_ids=torch.zeros_like(inputs["input_ids"])) < 0.8
    assert right(position_ids=torch.zeros_like(inputs["input_ids"])) < 0.8


def test_a_character_outside_the_vocabulary_is_refused(maker: Any):
    with pytest.raises(Exception, match="WordLevel"):
        maker.tokenizer()("?")


def test_a_changed_maker_makes_the_folder_stale(maker: Any, copied: Path):
    score = json.loads((copied / "score.json").read_text())
    score["scripts"]["training.py"] = "0" * 64
    (copied / "score.json").write_text(json.dumps(score))
    (fault,) = maker.check()
    assert "the maker has changed" in fault


def test_a_changed_config_and_tokenizer_are_named(maker: Any, copied: Path):
    config = json.loads((copied / "config.json").read_text())
    (copied / "config.json").write_text(json.dumps(config | {"pad_token_id": 7}))
    (copied / "tokenizer.json").write_text((copied / "tokenizer.json").read_text() + "\n")
    faults = [fault for fault in maker.changed_files() if "is not what the maker writes" in fault]
    assert [fault.split()[1] for fault in faults] == ["config.json", "tokenizer.json"]


def test_an_untrained_model_is_no_fixture(maker: Any, copied: Path):
    maker.initial_model().save_pretrained(copied)
    faults = maker.check()
    assert any("is as initialised" in fault for fault in faults)
    assert any("score.json says" in fault for fault in faults)


def test_an_absent_folder_is_one_fault(maker: Any, copied: Path):
    shutil.rmtree(copied)
    assert len(maker.check()) == 1
