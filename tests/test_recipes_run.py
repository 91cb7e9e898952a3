"""The main job, for real: the recipes that ship, on the trained fixtures, from PyTorch to a folder and back."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

Run = Callable[..., subprocess.CompletedProcess[str]]

ANSWERS = {
    "adder": ["27+58= -> 85", "9+94= -> 103"],
    "sorter": ["3142 -> 1234", "9071 -> 0179"],
    "reverser": ["stressed= -> desserts", "abca= -> acba"],
}
ROLES = {
    "adder": ["prefill", "decode"],
    "sorter": ["encoder", "prefill", "decode"],
    "reverser": ["prefill", "decode"],
}


@pytest.fixture(scope="module")
def finish(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, str]]:
    """Run a recipe, once; return the folder that it wrote, and what it printed."""

    @cache
    def run(name: str) -> tuple[Path, str]:
        out = tmp_path_factory.mktemp(name) / "out"
        command = [sys.executable, "-m", "surgery", "run", str(ROOT / "recipes" / f"{name}.yaml"), "--out", str(out)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=300)
        assert done.returncode == 0, done.stderr
        return out, done.stdout

    return run


@pytest.fixture(scope="module", params=list(ANSWERS))
def finished(request: pytest.FixtureRequest, finish: Callable[[str], tuple[Path, str]]) -> tuple[str, Path, str]:
    """A recipe that ran, the folder that it wrote, and what it printed."""
    return request.param, *finish(request.param)


def test_the_answers_are_right(finished: tuple[str, Path, str]) -> None:
    name, _, said = finished
    for answer in ANSWERS[name]:
        assert answer in said


def test_the_export_is_near_pytorch_and_the_cut_is_exact(finished: tuple[str, Path, str]) -> None:
    name, out, _ = finished
    source, dedup = json.loads((out / "report.json").read_text())["steps"]
    assert source["models"] == ROLES[name]
    assert 0 < source["verdict"]["step"]["max_error"] < 1e-4
    assert dedup["verdict"]["step"]["exact"]
    assert dedup["verdict"]["source"]["exact"]
    assert dedup["changes"] >= 18
    assert set(dedup["verdict"]["coverage"]) == set(ROLES[name])
    assert "past 0, 1, 7, 99" in dedup["verdict"]["coverage"]["decode"]
    assert "padding no, yes" in dedup["verdict"]["coverage"]["decode"]
    assert not source["warnings"]


def test_every_weight_is_stored_once(finished: tuple[str, Path, str]) -> None:
    name, out, _ = finished
    torch_bytes = (ROOT / "fixtures" / name / "model.safetensors").stat().st_size
    assert (out / "weights.onnx_data").stat().st_size < 1.02 * torch_bytes


def test_what_was_saved_is_a_source_again(finished: tuple[str, Path, str], tmp_path: Path, surgery: Run) -> None:
    name, out, _ = finished
    (prompt, answer), *_ = (line.split(" -> ") for line in ANSWERS[name])
    recipe = tmp_path / "again.yaml"
    recipe.write_text(f"source: {out}\nsteps: [dedup_weights]\ncheck: {{prompts: ['{prompt}']}}\noutput: again\n")
    done = surgery("run", recipe)
    assert done.returncode == 0, done.stderr
    assert f"{prompt} -> {answer}" in done.stdout
    assert "step 1 dedup_weights: exact; nothing to do" in done.stdout
    assert (tmp_path / "again" / "decoder_with_past_model.onnx_data").is_file()
    assert (tmp_path / "again" / "tokenizer.json").is_file()


MERGED = {
    "adder": (["onnx/model.onnx", "onnx/model.onnx_data"], "greedy over decoder as greedy over prefill + decode"),
    "sorter": (
        [
            "decoder_model_merged.onnx",
            "decoder_model_merged.onnx_data",
            "encoder_model.onnx",
            "encoder_model.onnx_data",
        ],
        "greedy over encoder + decoder as greedy over encoder + prefill + decode",
    ),
}


@pytest.mark.parametrize("name", MERGED)
def test_two_decoders_become_one_file_that_is_a_source_again(
    name: str, tmp_path: Path, finish: Callable[[str], tuple[Path, str]], surgery: Run
) -> None:
    files, loop = MERGED[name]
    out, (exported, _) = tmp_path / "out", finish(name)
    recipe = ROOT / "recipes" / f"{name}_merged.yaml"
    done = surgery("run", recipe, "--source", exported, "--out", out, timeout=300)
    assert done.returncode == 0, done.stderr
    assert all(answer in done.stdout for answer in ANSWERS[name])
    assert sorted(file.relative_to(out).as_posix() for file in out.rglob("*.onnx*")) == files
    source, *_, last, merge = json.loads((out / "report.json").read_text())["steps"]
    assert source["models"] == ROLES[name]
    assert merge["models"] == [role for role in ("encoder", "decoder") if role in merge["models"]]
    assert "decoder" in merge["models"]
    assert merge["verdict"]["step"]["exact"]
    assert 0 < last["verdict"]["step"]["max_error"] <= merge["verdict"]["source"]["max_error"] < 1e-5
    coverage = merge["verdict"]["coverage"]
    assert {"decoder as prefill", "decoder as decode", loop} <= set(coverage)
    assert "past 0, 1, 7, 99" in coverage["decoder as decode"]

    recipe = tmp_path / "again.yaml"
    (prompt, answer), *_ = (line.split(" -> ") for line in ANSWERS[name])
    recipe.write_text(f"source: {out}\nsteps: [dedup_weights]\ncheck: {{prompts: ['{prompt}']}}\noutput: again\n")
    done = surgery("run", recipe)
    assert done.returncode == 0, done.stderr
    assert f"{prompt} -> {answer}" in done.stdout
    again = json.loads((tmp_path / "again" / "report.json").read_text())["steps"][0]
    assert not again["warnings"]
    assert "use_cache_branch no, yes" in again["verdict"]["coverage"]["decoder"]


def test_the_classifier_labels_pairs_of_numbers(tmp_path: Path, surgery: Run) -> None:
    import numpy as np
    import onnxruntime
    from tokenizers import Tokenizer

    done = surgery("run", ROOT / "recipes" / "comparer.yaml", "--out", tmp_path / "out")
    assert done.returncode == 0, done.stderr
    (source, _) = json.loads((tmp_path / "out" / "report.json").read_text())["steps"]
    assert source["models"] == ["model"]
    assert 0 < source["verdict"]["step"]["max_error"] < 1e-4

    tokenizer = Tokenizer.from_file(str(tmp_path / "out" / "tokenizer.json"))
    tokenizer.enable_padding(pad_id=0, pad_token="[PAD]")
    rows = tokenizer.encode_batch([("27", "58"), ("4321", "4312"), ("7", "7"), ("999", "1000")])
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (logits,) = session.run(
        ["logits"],
        {
            "input_ids": np.array([row.ids for row in rows]),
            "attention_mask": np.array([row.attention_mask for row in rows]),
            "token_type_ids": np.array([row.type_ids for row in rows]),
        },
    )
    labels = json.loads((tmp_path / "out" / "config.json").read_text())["id2label"]
    assert [labels[str(index)] for index in logits.argmax(-1)] == ["less", "greater", "equal", "less"]
