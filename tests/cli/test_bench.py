"""`surgery bench`: every row is there, the numbers agree with each other, and a row that fails stops no other."""

from __future__ import annotations

import json
import shutil
import statistics
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import Result

from surgery.bench.cases import BenchResult, Case, RowResult, Settings, Timings
from surgery.bench.plots import draw_bench
from surgery.bench.processes import Memory, Worker
from surgery.errors import SurgeryError

Call = Callable[..., Result]

ALL = ("torch", "torch-no-cache", "onnx", "onnx-no-cache", "numpy")
FEW = ("--prompt-tokens", "6", "--new-tokens", "5", "--threads", "1")


def _cases(content: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    return {row["row"]: row["cases"] for row in content["rows"]}


def _agree(case: dict[str, Any], rounds: int) -> None:
    """Each token is later than the one before, and what is summed up is what the rounds say."""
    assert len(case["rounds"]) == rounds
    for one in case["rounds"]:
        assert len(one["reached_seconds"]) == (case["new_tokens"] or 1)
        assert one["reached_seconds"] == sorted(one["reached_seconds"])
        assert one["reached_seconds"][0] > 0
        assert one["cpu_seconds"] > 0
    stamps = [one["reached_seconds"] for one in case["rounds"]]
    assert case["total_seconds"] == statistics.median(times[-1] for times in stamps)
    assert case["first_token_seconds"] == statistics.median(times[0] for times in stamps)
    if rounds == 1:
        assert sum(case["token_seconds"]) == pytest.approx(case["total_seconds"])
    assert case["per_second"] == pytest.approx(case["batch"] * (case["new_tokens"] or 1) / case["total_seconds"])
    assert case["peak_resident"] > case["peak_anonymous"] > 10_000_000


def test_all_rows_of_a_merged_decoder_make_the_same_number_of_tokens(
    merged_adder: Path, call: Call, tmp_path: Path
) -> None:
    plots = tmp_path / "plots"
    done = call(
        "bench", merged_adder, *FEW, "--rows", ",".join(ALL), "--rounds", "1", "--batch", "1,3",
        "--json", tmp_path / "b.json", "--plots", plots,
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    content = json.loads((tmp_path / "b.json").read_text())
    assert [row["row"] for row in content["rows"]] == list(ALL)
    assert not [row["problem"] for row in content["rows"] if row["problem"]]
    for cases in _cases(content).values():
        assert [case["batch"] for case in cases] == [1, 3]
        for case in cases:
            _agree(case, rounds=1)
    for name in ("PyTorch, cache", "PyTorch, no cache", "ONNX, cache", "ONNX, no cache", "ONNX, numpy loop"):
        assert done.stdout.count(name) == 2
    assert "random weights" in done.stdout
    assert sorted(file.name for file in plots.iterdir()) == ["cumulated.svg", "latency.svg"]
    for file in plots.iterdir():
        assert ElementTree.parse(file).getroot().tag.endswith("svg")


def test_two_files_of_an_encoder_decoder_are_measured_in_rounds(foreign_t5: Path, call: Call, tmp_path: Path) -> None:
    two = tmp_path / "two"
    shutil.copytree(foreign_t5, two)
    (two / "decoder_model_merged.onnx").unlink()
    done = call("bench", two, *FEW, "--rows", "numpy", "--rounds", "3", "--warmup", "0", "--json", tmp_path / "b.json")
    assert done.exit_code == 0, done.output
    cases = _cases(json.loads((tmp_path / "b.json").read_text()))
    assert list(cases) == ["numpy"]
    for (case,) in cases.values():
        _agree(case, rounds=3)


def test_a_single_model_has_one_latency_a_size(comparer: Path, call: Call, tmp_path: Path) -> None:
    done = call(
        "bench", comparer, "--batch", "1,2", "--prompt-tokens", "4,9", "--rounds", "2", "--json", "-",
        "--plots", tmp_path, "--plot-format", "png",
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    cases = _cases(json.loads(done.stdout))
    assert list(cases) == ["torch", "onnx"]
    for sizes in cases.values():
        assert [(case["batch"], case["prompt_tokens"]) for case in sizes] == [(1, 4), (1, 9), (2, 4), (2, 9)]
        for case in sizes:
            _agree(case, rounds=2)
            assert case["per_token_seconds"] is None
    assert (tmp_path / "latency.png").read_bytes().startswith(b"\x89PNG")
    assert "batch 2, 9 tokens" in done.stderr


def test_without_pytorch_the_other_rows_go_on(
    merged_adder: Path, call: Call, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows' processes find a torch that cannot be imported; the numpy loop needs none."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    done = call("bench", merged_adder, *FEW, "--rows", "torch,numpy", "--rounds", "1", "--json", tmp_path / "b.json")
    assert done.exit_code == 0, done.output
    torch, numpy = json.loads((tmp_path / "b.json").read_text())["rows"]
    assert "no torch here" in torch["problem"]
    assert torch["cases"] == []
    assert numpy["problem"] is None
    assert "PyTorch, cache failed: torch and transformers are needed" in done.stdout


def test_when_every_row_fails_so_does_the_bench(merged_adder: Path, call: Call) -> None:
    done = call("bench", merged_adder, *FEW, "--rows", "numpy", "--beams", "2", "--rounds", "1")
    assert done.exit_code == 1
    assert "the numpy loop has no beams" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--rows", "onx"), "did you mean 'onnx'?"),
        (("--batch", "1,x"), "--batch: '1,x' is no list of numbers"),
        (("--batch", "0"), "--batch: '0' is no list of numbers"),
        (("--new-tokens", "1000"), "the network has 256"),
        (("--torch", "nowhere"), "nowhere: no config.json is there"),
        (("--plots", "p", "--plot-format", "gif"), "pictures are .svg or .png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_measured_is_said_before_anything_runs(
    merged_adder: Path, call: Call, arguments: tuple[str, ...], said: str
) -> None:
    done = call("bench", merged_adder, *arguments)
    assert done.exit_code == 2
    assert said in done.stderr


@pytest.mark.parametrize("option", ["--json", "--plots"])
@pytest.mark.parametrize("command", ["bench", "profile"])
def test_a_place_that_cannot_be_written_is_said_before_anything_runs(
    merged_adder: Path, call: Call, tmp_path: Path, command: str, option: str
) -> None:
    (tmp_path / "file").write_text("kept")
    place = tmp_path / "file" / "deeper"
    if command == "profile" and option == "--plots":
        option, place = "--plot", place / "p.svg"
    done = call(command, merged_adder, option, place)
    assert done.exit_code == 1
    assert f"{tmp_path / 'file'}" in done.stderr
    assert "cannot be written" in done.stderr
    assert done.stdout == ""
    assert (tmp_path / "file").read_text() == "kept"


@pytest.mark.long
def test_pytorch_runs_the_weights_that_it_is_given(merged_adder: Path, call: Call, tmp_path: Path) -> None:
    """A folder without weights makes the row fail: it does not fall back to random ones."""
    (tmp_path / "empty").mkdir()
    shutil.copy(merged_adder / "config.json", tmp_path / "empty")
    done = call("bench", merged_adder, *FEW, "--rows", "torch", "--torch", tmp_path / "empty", "--rounds", "1")
    assert done.exit_code == 1
    assert "PyTorch cannot open the model" in done.stdout


def test_a_row_that_is_killed_is_said_to_be(tmp_path: Path) -> None:
    with Worker("surgery.bench.worker", tmp_path / "log") as worker:
        worker.kill()
        with pytest.raises(SurgeryError, match="its process was killed"):
            worker.ask({"open": "numpy", "settings": {}})


def test_medians_are_those_of_the_rounds() -> None:
    timings = Timings([[1.0, 2.0, 4.0], [3.0, 4.0, 5.0], [2.0, 9.0, 9.5]], [1.0, 1.0, 1.0])
    assert timings.first == 2.0
    assert timings.latencies == [2.0, 1.0, 1.0]
    assert timings.reached == [2.0, 4.0, 5.0]
    assert timings.per_token == 1.0
    assert timings.total == 5.0


def test_the_same_numbers_draw_the_same_file(tmp_path: Path) -> None:
    case = Case(1, 2, 2)
    row = RowResult("onnx", "ONNX, cache", timings={case: Timings([[0.1, 0.2]], [0.1], Memory(1, 2))})
    bench = BenchResult(Settings("bundle"), "generation", (case,), [row], 1, 0)
    first = [file.read_bytes() for file in draw_bench(bench, tmp_path / "a", "svg")]
    second = [file.read_bytes() for file in draw_bench(bench, tmp_path / "b", "svg")]
    assert first == second
    assert len(first) == 2


def test_nothing_measured_draws_nothing(tmp_path: Path) -> None:
    bench = BenchResult(Settings("bundle"), "generation", (Case(1, 2, 2),), [RowResult("onnx", "ONNX, cache")], 1, 0)
    assert draw_bench(bench, tmp_path / "a", "svg") == []
    assert not (tmp_path / "a").exists()
