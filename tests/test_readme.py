"""What README and docs show is what happens: their Python runs, their recipes load, their commands exist."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from surgery.cli import app
from surgery.recipe import load_recipe
from surgery.registry import find

ROOT = Path(__file__).resolve().parent.parent

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


def test_the_python_of_the_readme_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (code,) = blocks(ROOT / "README.md", "python")
    assert len([line for line in code.splitlines() if line.strip()]) <= 10
    shutil.copytree(ROOT / "fixtures" / "adder", tmp_path / "fixtures" / "adder")
    monkeypatch.chdir(tmp_path)
    exec(compile(code, "README.md", "exec"), {})
    assert (tmp_path / "out" / "adder" / "report.json").is_file()


@pytest.mark.parametrize("recipe", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.stem)
def test_a_recipe_of_ours_says_what_comes_out_and_can_be_planned(recipe: Path) -> None:
    assert recipe.read_text().startswith("# ")
    done = CliRunner().invoke(app, ["plan", str(recipe)])
    assert done.exit_code == 0, done.output


def test_the_recipe_in_the_docs_loads(tmp_path: Path) -> None:
    (text,) = (block for block in blocks(ROOT / "docs" / "recipes.md", "yaml") if "source:" in block)
    (tmp_path / "r.yaml").write_text(text)
    assert [step.word for step in load_recipe(tmp_path / "r.yaml").steps] == ["dedup_weights", "dedup_weights"]


def test_the_first_pass_in_the_docs_can_be_used(tmp_path: Path) -> None:
    code = blocks(ROOT / "docs" / "write-your-own-pass.md", "python")[0]
    (tmp_path / "my_passes.py").write_text(code)
    assert find("my_passes:DropIdentities", tmp_path)(most=10)


def test_every_option_of_a_recipe_is_in_the_docs() -> None:
    from surgery.recipe import Check, Output, Source

    text = (ROOT / "docs" / "recipes.md").read_text()
    for section in (Source, Check, Output):
        for name in section.model_fields:
            assert f"`{name}`" in text, name


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target
