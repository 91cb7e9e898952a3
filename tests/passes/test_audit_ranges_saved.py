"""`audit_ranges`: what one audit saves another recipe reads, for the same model only, and several audits join."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from models import single
from pydantic import Field
from ruamel.yaml import YAML

from passes.audit_ranges import AuditRanges, Ranges
from surgery import Bundle, Check, Pipeline
from surgery.contract import Analysis, Context, Effect, Fact
from surgery.errors import OutputError, RecipeError
from surgery.manager import Stopped
from surgery.storage import write_file
from surgery.text import parse

SQUARES = """
<ir_version: 8, opset_import: ["" : 18]>
g (float[n, 2] x) => (float[n, 2] y) {
    square = Mul(x, x)
    y = Neg(square)
}
"""
SCALES = """
<ir_version: 8, opset_import: ["" : 18]>
g (float[n, 2] x) => (float[n, 2] y) <float[2] weight = {3, 4}> { y = Mul(x, weight) }
"""


def pair(scales: str = SCALES) -> Bundle:
    return Bundle({"encoder": parse(SQUARES), "model": parse(scales)})


class Hear(Analysis):
    """Keep what is known of each model."""

    effect = Effect.EXACT
    needs = (Ranges,)
    heard: dict[str, Fact] = Field(default_factory=dict)

    def analyze(self, bundle: Bundle, context: Callable[[str], Context]) -> Mapping[str, Fact]:
        self.heard.update({role: context(role).fact(Ranges) for role in bundle.models})
        return {}


def audited(bundle: Bundle, check: Check | None = None, **options: object) -> dict[str, Ranges]:
    """Return what a pass after the audit is told."""
    hear = Hear()
    with Pipeline([AuditRanges(**options), hear], check or Check()).run(bundle):
        return dict(hear.heard)  # type: ignore[arg-type]


def own_data(folder: Path, **arrays: np.ndarray) -> Path:
    np.savez(folder / "x.npz", **arrays)
    return folder / "x.npz"


def values(folder: Path, *numbers: float) -> Path:
    folder.mkdir()
    return own_data(folder, x=np.array([numbers], np.float32))


def test_what_was_saved_comes_back_without_a_run(tmp_path: Path) -> None:
    found = audited(pair(), save_to=tmp_path / "ranges", rounds=1)
    assert sorted(file.name for file in (tmp_path / "ranges").iterdir()) == ["encoder.ranges.json", "model.ranges.json"]
    assert found["encoder"].values["square"].peak > 0
    assert audited(pair(), read_from=tmp_path / "ranges") == found
    # This context can run nothing and feed nothing.
    assert AuditRanges(read_from=tmp_path / "ranges").analyze(pair(), lambda role: Context()) == found


def test_two_audits_of_a_model_join_in_any_order_to_what_one_sees(tmp_path: Path) -> None:
    parts = [values(tmp_path / "a", 1, -300), values(tmp_path / "b", 1e-3, 2)]
    for name, data in zip(("one", "two"), parts, strict=True):
        audited(single(SQUARES), data=data, save_to=tmp_path / name)
    np.savez(tmp_path / "a" / "y.npz", x=np.array([[1e-3, 2]], np.float32))
    whole = audited(single(SQUARES), data=tmp_path / "a")
    for order in (("one", "two"), ("two", "one")):
        joined = audited(single(SQUARES), read_from=tuple(tmp_path / name for name in order))
        assert joined == whole
    square = whole["model"].values["square"]
    assert (whole["model"].samples, square.elements, square.high) == (2, 4, 90000)
    assert square.smallest == pytest.approx(1e-6)


def test_a_folder_that_is_named_twice_counts_once(tmp_path: Path) -> None:
    found = audited(single(SQUARES), data=values(tmp_path / "a", 1, 2), save_to=tmp_path / "r")
    assert audited(single(SQUARES), read_from=(tmp_path / "r", tmp_path / "a" / ".." / "r")) == found


def test_another_model_is_refused_by_name(tmp_path: Path) -> None:
    audited(single(SQUARES), data=values(tmp_path / "a", 1, 2), save_to=tmp_path / "r")
    other = single(SQUARES.replace("Neg", "Abs"))
    with pytest.raises(Stopped) as caught:
        audited(other, read_from=tmp_path / "r")
    assert "model.ranges.json describes another model than 'model' is here" in caught.value.message
    assert "without read_from" in caught.value.hint


def test_another_weight_is_another_model(tmp_path: Path) -> None:
    audited(pair(), save_to=tmp_path / "r", rounds=1)
    with pytest.raises(Stopped, match="model.ranges.json describes another model"):
        audited(pair(SCALES.replace("{3, 4}", "{3, 5}")), read_from=tmp_path / "r")


def test_a_model_of_which_nothing_was_saved_is_said(tmp_path: Path) -> None:
    with Pipeline([AuditRanges(models=("encoder",), save_to=tmp_path / "r", rounds=1)]).run(pair()):
        pass
    with pytest.raises(Stopped) as caught:
        audited(pair(), read_from=tmp_path / "r")
    assert "r has no model.ranges.json; it has encoder.ranges.json" in caught.value.message
    assert AuditRanges(models=("encoder",), read_from=tmp_path / "r").analyze(pair(), lambda role: Context())


def test_machines_may_have_audited_different_models(tmp_path: Path) -> None:
    for role in pair().models:
        with Pipeline([AuditRanges(models=(role,), save_to=tmp_path / role, rounds=1)]).run(pair()):
            pass
    found = audited(pair(), read_from=(tmp_path / "encoder", tmp_path / "model"))
    assert list(found) == ["encoder", "model"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"fact": "Ranges"}', "\0"])
def test_a_broken_file_is_said(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.ranges.json").write_text(content)
    with pytest.raises(Stopped, match="model.ranges.json: not a saved fact of type Ranges") as caught:
        audited(single(SQUARES), read_from=tmp_path)
    assert caught.value.exit_code == RecipeError.exit_code


def test_a_folder_that_is_not_there_is_a_mistake_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="read_from: there is no folder"):
        AuditRanges(read_from=tmp_path / "nowhere")


def test_paths_are_relative_to_the_recipe(tmp_path: Path, surgery: Callable[..., object]) -> None:
    folder = tmp_path / "recipes"
    values(folder, 1, 2)
    ir.save(single(SQUARES)["model"], folder / "m.onnx")
    step = "steps:\n  - pass: audit_ranges\n"
    first, second = (
        "    data: x.npz\n    save_to: ranges\n",
        "    read_from: [ranges]\n    report: [a.html, keep.yaml]\n",
    )
    for name, options in (("first", first), ("second", second)):
        (folder / f"{name}.yaml").write_text(f"source: m.onnx\n{step}{options}")
        done = surgery("run", f"recipes/{name}.yaml", "--no-check", cwd=tmp_path)
        assert done.returncode == 0, done.stderr  # type: ignore[attr-defined]
    assert json.loads((folder / "ranges" / "model.ranges.json").read_text())["data"]["samples"] == 1
    assert (folder / "a.html").is_file()
    assert (folder / "keep.yaml").read_text() == "keep: []\n"


def test_a_file_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    write_file(tmp_path / "deep" / "a.json", b"old")
    write_file(tmp_path / "deep" / "a.json", b"new")
    assert (tmp_path / "deep" / "a.json").read_bytes() == b"new"
    assert [file.name for file in (tmp_path / "deep").iterdir()] == ["a.json"]
    with pytest.raises(OutputError, match="is a folder, not a file"):
        write_file(tmp_path / "deep", b"")
    with pytest.raises(OutputError, match="is a file, not a folder"):
        write_file(tmp_path / "deep" / "a.json" / "b.json", b"")


def test_what_cannot_be_saved_stops_the_run(tmp_path: Path) -> None:
    (tmp_path / "ranges").write_text("a file")
    with pytest.raises(Stopped, match="is a file, not a folder"):
        audited(single(SQUARES), data=values(tmp_path / "a", 1, 2), save_to=tmp_path / "ranges")
    assert (tmp_path / "ranges").read_text() == "a file"


def test_the_rest_of_a_stopped_recipe_finds_the_same_folders(tmp_path: Path, surgery: Callable[..., object]) -> None:
    ir.save(single(SQUARES)["model"], tmp_path / "m.onnx")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    text = "source: m.onnx\nsteps:\n  - pass: audit_ranges\n    read_from: [one, two]\n    report: r.txt\noutput: out\n"
    (tmp_path / "r.yaml").write_text(text)
    stopped = surgery("run", "r.yaml", "--no-check", cwd=tmp_path)
    assert "none of 2 folders has model.ranges.json; the first is" in stopped.stderr  # type: ignore[attr-defined]
    (step,) = YAML(typ="safe").load(tmp_path / "out.stopped" / "recipe.yaml")["steps"]
    assert step == {
        "pass": "audit_ranges",
        "read_from": [str(tmp_path / "one"), str(tmp_path / "two")],
        "report": str(tmp_path / "r.txt"),
    }
