"""Recipes: what they accept, and that every mistake says its file, its line and the way out."""

from __future__ import annotations

from pathlib import Path

import pytest

from surgery.errors import RecipeError
from surgery.recipe import Recipe, load_recipe

GOOD = """\
# What comes out.
source: model.onnx
steps:
  - dedup_weights
  - pass: dedup_weights
    min_bytes: 64
check:
  max_error: 1e-5
  batches: [1, 2]
output:
  folder: out
  layout: shared
"""


def read(folder: Path, text: str, **overrides: object) -> Recipe:
    file = folder / "r.yaml"
    file.write_text(text)
    return load_recipe(file, **overrides)  # type: ignore[arg-type]


def mistakes(folder: Path, text: str, **overrides: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        read(folder, text, **overrides)
    return str(caught.value).replace(f"{folder}/", "").splitlines()


def test_a_recipe_is_source_steps_check_output(tmp_path: Path) -> None:
    recipe = read(tmp_path, GOOD)
    assert [step.word for step in recipe.steps] == ["dedup_weights", "dedup_weights"]
    assert recipe.steps[1].pass_.model_dump()["min_bytes"] == 64
    assert recipe.check.max_error == 1e-5
    assert recipe.check.batches == (1, 2)
    assert recipe.output is not None
    assert recipe.output.folder == Path("out")


def test_yaml_is_1_2_so_words_and_numbers_mean_what_they_say(tmp_path: Path) -> None:
    recipe = read(tmp_path, "source: no\nsteps: [dedup_weights]\noutput: on\ncheck: {max_error: 1e-5, seed: 010}\n")
    assert recipe.source.path == "no"
    assert recipe.output is not None
    assert recipe.output.folder == Path("on")
    assert (recipe.check.max_error, recipe.check.seed) == (1e-5, 10)


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (
            ("min_bytes: 64", "min_byte: 64"),
            "r.yaml:6: step 2 (dedup_weights): unknown option 'min_byte'; did you mean",
        ),
        (
            ("min_bytes: 64", "min_bytes: '64'"),
            "r.yaml:6: step 2 (dedup_weights): min_bytes: input should be a valid int",
        ),
        (
            ("min_bytes: 64", "min_bytes: 0"),
            "r.yaml:6: step 2 (dedup_weights): min_bytes: input should be greater than",
        ),
        (
            ("min_bytes: 64", "min_bytes: true"),
            "r.yaml:6: step 2 (dedup_weights): min_bytes: input should be a valid int",
        ),
        (
            ("min_bytes: 64", "models: decode"),
            "r.yaml:6: step 2 (dedup_weights): models: input should be a valid tuple",
        ),
        (("- dedup_weights", "- dedup_weight"), "r.yaml:4: step 1: unknown pass 'dedup_weight'; did you mean 'dedup_w"),
        (("pass: dedup_weights", "pass: 7"), "r.yaml:5: step 2: needs 'pass', the word of a pass"),
        (("pass: dedup_weights", "past: dedup_weights"), "r.yaml:5: step 2: needs 'pass', the word of a pass"),
        (("pass: dedup_weights", "pass: nowhere:Thing"), "r.yaml:5: step 2: cannot import module 'nowhere'"),
        (("pass: dedup_weights", "pass: os:Thing"), "r.yaml:5: step 2: module 'os' has no 'Thing'"),
        (("pass: dedup_weights", "pass: os:getcwd"), "r.yaml:5: step 2: 'os:getcwd' is"),
        (("pass: dedup_weights", "pass: 'a b:C'"), "r.yaml:5: step 2: 'a b:C' is not of the form 'module:name'"),
        (("max_error", "max_eror"), "r.yaml:8: unknown option 'max_eror'; did you mean 'max_error'?"),
        (("1e-5", "-1"), "r.yaml:8: max_error: input should be greater than or equal to 0, not -1"),
        (("1e-5", ".nan"), "r.yaml:8: max_error: input should be"),
        (("[1, 2]", "[1, two]"), "r.yaml:9: batches: input should be a valid integer"),
        (("[1, 2]", "[]"), "r.yaml:9: batches: tuple should have at least 1 item"),
        (("[1, 2]", "[0]"), "r.yaml:9: batches: input should be greater than or equal to 1, not 0"),
        (("layout: shared", "layout: split"), "r.yaml:12: layout: input should be 'optimum', 'shared' or 'single'"),
        (("folder: out", "layout: single"), 'r.yaml:12: found duplicate key "layout"'),
        (("  folder: out\n", ""), "r.yaml:10: needs the option 'folder'"),
        (("source:", "sauce:"), "r.yaml"),
        (("check:", "check"), "r.yaml:8:"),
        (("steps:", "steps: {"), "r.yaml:"),
    ],
)
def test_a_mistake_is_found_with_its_line(tmp_path: Path, change: tuple[str, str], expected: str) -> None:
    said = mistakes(tmp_path, GOOD.replace(*change, 1))
    assert said[0].startswith(expected), said


def test_all_mistakes_are_said_at_once(tmp_path: Path) -> None:
    text = GOOD.replace("min_bytes", "min_byte").replace("max_error", "max_eror").replace("layout", "lay")
    assert len(mistakes(tmp_path, text)) == 3


def test_a_key_that_stands_twice_is_a_mistake(tmp_path: Path) -> None:
    (said,) = mistakes(tmp_path, GOOD.replace("  min", "  min") + "source: other.onnx\n")
    assert said.startswith('r.yaml:13: found duplicate key "source"')


def test_an_option_of_an_output_is_checked(tmp_path: Path) -> None:
    said = mistakes(tmp_path, GOOD.replace("  batches: [1, 2]", "  outputs:\n    logits: {max_eror: 1}"))
    assert said == ["r.yaml:10: unknown option 'max_eror'; did you mean 'max_error'?"]


@pytest.mark.parametrize("text", ["", "- a\n", "just words\n", "3\n"])
def test_what_is_no_mapping_is_no_recipe(tmp_path: Path, text: str) -> None:
    assert "a recipe is a mapping" in mistakes(tmp_path, text)[0]


def test_a_recipe_that_is_not_there_or_not_text_is_said(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot read the recipe: No such file"):
        load_recipe(tmp_path / "none.yaml")
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(RecipeError, match="cannot read the recipe"):
        load_recipe(tmp_path / "b.yaml")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("check.seed=7", lambda recipe: recipe.check.seed == 7),
        ("check.batches=[2]", lambda recipe: recipe.check.batches == (2,)),
        ("steps.1.min_bytes=32", lambda recipe: recipe.steps[0].pass_.min_bytes == 32),
        ("steps.2.models=[decode]", lambda recipe: recipe.steps[1].pass_.models == ("decode",)),
        ("output.layout=single", lambda recipe: recipe.output.layout == "single"),
        ("source.opset=18", lambda recipe: (recipe.source.path, recipe.source.opset) == ("model.onnx", 18)),
        ("source.path=a=b.onnx", lambda recipe: recipe.source.path == "a=b.onnx"),
    ],
)
def test_a_setting_overrides_the_file(tmp_path: Path, setting: str, expected: object) -> None:
    assert expected(read(tmp_path, GOOD, settings=[setting]))  # type: ignore[operator]


def test_a_step_can_be_set_by_its_word_if_it_is_the_only_one(tmp_path: Path) -> None:
    single = GOOD.replace("  - dedup_weights\n", "", 1)
    assert read(tmp_path, single, settings=["dedup_weights.min_bytes=8"]).steps[0].pass_.min_bytes == 8  # type: ignore[attr-defined]
    (said,) = mistakes(tmp_path, GOOD, settings=["dedup_weights.min_bytes=8"])
    assert said.endswith("'dedup_weights' is several steps; say which: steps.1, steps.2")


@pytest.mark.parametrize(
    ("setting", "expected"),
    [
        ("seed", "--set seed: write key=value"),
        ("chek.seed=1", "--set chek.seed=1: there is no 'chek' in the recipe; did you mean 'check'?"),
        ("check.sed=1", "--set check.sed=1: unknown option 'sed'; did you mean 'seed'?"),
        ("check.seed=x", "--set check.seed=x: seed: input should be a valid integer, not 'x'"),
        ("steps.9.x=1", "--set steps.9.x=1: there is no step '9'; steps count from 1 to 2"),
        ("steps.0.x=1", "--set steps.0.x=1: there is no step '0'"),
        ("check.seed=[", "--set check.seed=[: '[' is not a YAML value"),
        ("check.seed.x=1", "--set check.seed.x=1: "),
    ],
)
def test_a_wrong_setting_names_itself(tmp_path: Path, setting: str, expected: str) -> None:
    assert mistakes(tmp_path, GOOD, settings=[setting])[0].startswith(expected)


def test_source_and_out_are_relative_to_the_current_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here = tmp_path / "here"
    here.mkdir()
    (here / "other.onnx").touch()
    monkeypatch.chdir(here)
    recipe = read(tmp_path, GOOD, source="other.onnx", out=Path("there"))
    assert recipe.source.path == str(here / "other.onnx")
    assert recipe.output is not None
    assert recipe.output.folder == here / "there"
    assert recipe.output.layout == "shared"


def test_a_class_beside_the_recipe_is_found_wherever_one_stands(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "helper.py").write_text("SENTENCE = 'Does nothing.'\n")
    (tmp_path / "mine.py").write_text(
        "import helper\nfrom surgery import Change, ModelPass\n\n\nclass Idle(ModelPass):\n"
        "    __doc__ = helper.SENTENCE\n\n    def rewrite(self, model, context):\n        return Change(0, '')\n"
    )
    monkeypatch.chdir("/")
    for word in ("mine:Idle", "./mine.py:Idle", f"{tmp_path}/mine.py:Idle"):
        recipe = read(tmp_path, GOOD.replace("- dedup_weights", f"- {word}", 1))
        assert type(recipe.steps[0].pass_).__doc__ == "Does nothing."


def test_a_users_module_that_raises_is_a_mistake_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("1 / 0\n")
    said = mistakes(tmp_path, GOOD.replace("- dedup_weights", "- broken:Idle", 1))
    assert "r.yaml:4: step 1: cannot import module 'broken'" in said[0]
    assert "ZeroDivisionError" in said[0]
