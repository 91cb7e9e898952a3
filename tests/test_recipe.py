"""Recipes: what they accept, and that every mistake says its file, its line and the way out."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from surgery.errors import RecipeError
from surgery.recipe import Recipe, load_recipe, located
from surgery.registry import find

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
            "r.yaml:6: step 2 (dedup_weights): models: input should be a list",
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
        (
            ("layout: shared", "layout: split"),
            "r.yaml:12: layout: input should be 'optimum', 'hub', 'shared' or 'single'",
        ),
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
        ("check.batches.0=5", "--set check.batches.0=5: replace the whole list: check.batches=[...]"),
        ("check.lengths.0=5", "--set check.lengths.0=5: replace the whole list: check.lengths=[...]"),
        ("check.max_error.x=5", "--set check.max_error.x=5: check.max_error has no options"),
        ("steps.1=foo", "--set steps.1=foo: a step is set by its options, such as steps.1.models=[decode]"),
        ("check.prompts=&a [*a]", "--set check.prompts=&a [*a]: '&a [*a]' is not a YAML value"),
        ("check.seed=2020-99-99", "--set check.seed=2020-99-99: '2020-99-99' is not a YAML value"),
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


def test_a_setting_fills_a_section_that_stands_empty(tmp_path: Path) -> None:
    text = "source: model.onnx\nsteps: [dedup_weights]\ncheck:\n"
    assert read(tmp_path, text, settings=["check.seed=3"]).check.seed == 3


def test_merged_keys_are_read_and_their_mistakes_are_of_the_place_they_are_merged_into(tmp_path: Path) -> None:
    text = """\
source: model.onnx
steps:
  - &shared
    pass: dedup_weights
    min_bytes: 64
  - <<: *shared
    models: [decode]
"""
    recipe = read(tmp_path, text)
    assert [step.pass_.model_dump()["min_bytes"] for step in recipe.steps] == [64, 64]
    said = mistakes(tmp_path, text.replace("64", "0"))
    assert [line.split(":")[1] for line in said] == ["5", "6"]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("source: a\x07b\nsteps: [dedup_weights]\n", "r.yaml:1: not YAML: unacceptable character #x0007"),
        ("source: 2020-99-99\nsteps: [dedup_weights]\n", "r.yaml:1: not YAML: month must be in 1..12"),
        ("source: m\nsteps: [!foo x]\n", "r.yaml:2: the tag '!foo' means nothing here"),
    ],
)
def test_what_yaml_cannot_say_is_a_mistake_of_the_recipe(tmp_path: Path, text: str, expected: str) -> None:
    with pytest.raises(RecipeError) as caught:
        read(tmp_path, text)
    assert caught.value.message.replace(f"{tmp_path}/", "").startswith(expected)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("check: {data: 3}", ["r.yaml:3: data: input should be an instance of Path or a valid dictionary, not 3"]),
        ("check: {data: {decode: 3}}", ["r.yaml:3: decode: input should be an instance of Path, not 3"]),
        ("check: {data: {4: x}}", ["r.yaml:3: keys are words, not 4"]),
        ("check: {2: x}", ["r.yaml:3: keys are words, not 2"]),
        ("check:\n  outputs:\n    2: {top1: 1}", ["r.yaml:5: keys are words, not 2"]),
        ("check: {max_error: x}", ["r.yaml:3: max_error: input should be a valid number, not 'x'"]),
        ("1: 2", ["r.yaml:3: keys are words, not 1"]),
        ("output: 3", ["r.yaml:3: output: input should be a valid dictionary or instance of Output, not 3"]),
    ],
)
def test_a_mistake_is_said_once_and_by_the_key_that_stands_there(
    tmp_path: Path, text: str, expected: list[str]
) -> None:
    assert mistakes(tmp_path, f"source: m\nsteps: [dedup_weights]\n{text}\n") == expected


@pytest.mark.parametrize(
    ("step", "expected"),
    [
        ("3", ["r.yaml:3: step 1: needs 'pass', the word of a pass; see `surgery passes`"]),
        ("[a]", ["r.yaml:3: step 1: needs 'pass', the word of a pass; see `surgery passes`"]),
        ("pass: dedup_weights\n    1: 2", ["r.yaml:4: step 1 (dedup_weights): keys are words, not 1"]),
    ],
)
def test_a_mistake_in_a_step_is_said_once(tmp_path: Path, step: str, expected: list[str]) -> None:
    assert mistakes(tmp_path, f"source: m\nsteps:\n  - {step}\n") == expected


IDLE = """
from surgery import Change, ModelPass


class {name}(ModelPass):
    \"\"\"Does nothing.\"\"\"

    def rewrite(self, model, context):
        return Change(0, '')
"""


def test_a_folder_named_passes_beside_the_recipe_does_not_hide_ours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find("dedup_weights", tmp_path)  # so that what is forgotten below comes back after the test
    (tmp_path / "passes").mkdir()
    (tmp_path / "passes" / "__init__.py").touch()
    (tmp_path / "mine.py").write_text("from passes.dedup_weights import DedupWeights\n" + IDLE.format(name="Idle"))
    for name in [name for name in sys.modules if name.partition(".")[0] == "passes"]:
        monkeypatch.delitem(sys.modules, name)
    mine, ours = read(tmp_path, "source: m\nsteps: ['mine:Idle', dedup_weights]\n").steps
    assert sys.modules[type(mine.pass_).__module__].DedupWeights is type(ours.pass_)


@pytest.mark.parametrize("steps", ["['facts:Look', 'use:Use']", "['use:Use', 'facts:Look']"])
def test_a_module_is_the_same_for_a_recipe_and_for_a_sibling_that_imports_it(tmp_path: Path, steps: str) -> None:
    (tmp_path / "facts.py").write_text("class Peaks:\n    pass\n" + IDLE.format(name="Look"))
    (tmp_path / "use.py").write_text("from facts import Peaks\nimport facts\n" + IDLE.format(name="Use"))
    recipe = read(tmp_path, f"source: m\nsteps: {steps}\n")
    modules = {step.word: sys.modules[type(step.pass_).__module__] for step in recipe.steps}
    assert modules["use:Use"].Peaks is modules["facts:Look"].Peaks
    assert modules["use:Use"].facts is modules["facts:Look"]
    assert "facts" not in sys.modules
    assert modules["facts:Look"].__spec__ is not None
    assert modules["facts:Look"].__spec__.loader is modules["facts:Look"].__loader__


def test_siblings_that_import_each_other_are_one_module_each(tmp_path: Path) -> None:
    (tmp_path / "first.py").write_text("import second\n" + IDLE.format(name="First"))
    (tmp_path / "second.py").write_text("import first\n" + IDLE.format(name="Second"))
    recipe = read(tmp_path, "source: m\nsteps: ['first:First', 'second:Second']\n")
    first, second = (sys.modules[type(step.pass_).__module__] for step in recipe.steps)
    assert first.second is second
    assert second.first is first


def test_files_of_one_name_in_two_folders_are_two_modules(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "shared_name.py").write_text(f"FOLDER = {name!r}\n")
        (tmp_path / name / "mine.py").write_text("import shared_name\n" + IDLE.format(name="Idle"))
    steps = [read(tmp_path / name, "source: m\nsteps: ['mine:Idle']\n").steps[0] for name in ("a", "b")]
    assert [sys.modules[type(step.pass_).__module__].shared_name.FOLDER for step in steps] == ["a", "b"]


def test_a_users_module_that_ends_the_process_is_a_mistake_of_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text("raise SystemExit(3)\n")
    said = mistakes(tmp_path, "source: m\nsteps: ['script:Idle']\n")
    assert "cannot import module 'script'" in said[0]
    assert "SystemExit: 3" in said[0]


def test_a_source_of_the_command_line_is_never_looked_for_beside_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here, recipes = tmp_path / "here", tmp_path / "recipes"
    here.mkdir()
    (recipes / "t5").mkdir(parents=True)
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert read(recipes, GOOD, source="gone.onnx").source.path == str(here / "gone.onnx")
    assert read(recipes, GOOD, source="~/m.onnx").source.path == str(tmp_path / "home" / "m.onnx")
    assert read(recipes, GOOD, source="owner/name").source.path == "owner/name"
    (said, way_out) = mistakes(recipes, GOOD, source="t5")
    assert said == "--source t5: there is no 't5' in the current folder, but there is one beside the recipe"
    assert way_out.endswith("try: --source t5")
    (here / "t5").mkdir()
    assert read(recipes, GOOD, source="t5").source.path == str(here / "t5")
    output = read(recipes, GOOD, out=Path("~/out")).output
    assert output is not None
    assert output.folder == tmp_path / "home" / "out"


def test_an_error_is_located_where_its_cause_stands() -> None:
    with pytest.raises(RecipeError) as caught, located("r.yaml:1"):
        raise RecipeError("no such file", hint="look")
    assert (caught.value.message, caught.value.hint) == ("r.yaml:1: no such file", "look")
    with pytest.raises(RecipeError) as caught, located(""):
        raise RecipeError("no such file")
    assert caught.value.message == "no such file"


def test_a_path_among_the_options_of_a_pass_is_relative_to_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = "    table: Path\n    other: Path | None = None\n    text: str = 'x'\n"
    body = IDLE.format(name="Look").replace("    def", f"{options}\n    def")
    (tmp_path / "paths.py").write_text("from pathlib import Path\n" + body)
    monkeypatch.chdir("/")
    text = "source: m\nsteps:\n  - pass: paths:Look\n    table: t.csv\n"
    made = read(tmp_path, text).steps[0].pass_.model_dump()
    assert made == {**made, "table": tmp_path / "t.csv", "other": None, "text": "x"}
    made = read(tmp_path, text + "    other: /o.csv\n").steps[0].pass_.model_dump()
    assert made["other"] == Path("/o.csv")
