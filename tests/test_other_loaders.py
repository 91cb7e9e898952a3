"""Merged bundles load as they are saved in Optimum and in transformers.js, and continue prompts as PyTorch does."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from other_loaders.loaders import NODE, OPTIMUM, Job, by_optimum, by_torch, by_transformers_js, until_end

from passes.merge_if import MergeIf
from surgery import Pipeline
from surgery.pipeline import Result

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = {
    "adder": ("27+58=", "9+94=", "111+3="),
    "reverser": ("stressed=", "abca=", "no="),
    "sorter": ("3142", "90716", "55"),
}
BY_HAND = {"transformers_js": {"subfolder": "", "model_file_name": "decoder_model_merged"}}
"""What transformers.js has to be told where models lie beside the configs, as in Optimum's folders."""

pytestmark = pytest.mark.long


@pytest.fixture(scope="module", params=list(PROMPTS))
def merged(request: pytest.FixtureRequest) -> Iterator[tuple[str, Result]]:
    source = ROOT / "fixtures" / request.param
    with Pipeline([MergeIf()], None).run(source) as result:
        yield request.param, result


@pytest.fixture(params=["hub", "optimum"])
def job(merged: tuple[str, Result], request: pytest.FixtureRequest, tmp_path: Path) -> Job:
    name, result = merged
    result.save(tmp_path / "out", layout=request.param)
    side = "right" if name == "sorter" else "left"
    options = BY_HAND if request.param == "optimum" else {}
    return Job(tmp_path / "out", PROMPTS[name], padding_side=side, options=options)


def named(variable: str) -> str:
    if variable not in os.environ:
        pytest.skip(f"{variable} is not set; tests/other_loaders/loaders.py says to what")
    return os.environ[variable]


def test_optimum_says_what_pytorch_says(job: Job, merged: tuple[str, Result]) -> None:
    told = by_optimum(job, named(OPTIMUM))
    wanted = by_torch(job, ROOT / "fixtures" / merged[0])
    assert told["input_ids"] == wanted["input_ids"]
    assert told["sequences"] == wanted["sequences"]
    assert len({tuple(row) for row in wanted["sequences"]}) == len(job.prompts)


def test_transformers_js_says_what_pytorch_says(job: Job, merged: tuple[str, Result]) -> None:
    """Up to the end of each row: it goes on with rows that have ended."""
    told = by_transformers_js(job, Path(named(NODE)))
    wanted = by_torch(job, ROOT / "fixtures" / merged[0])
    assert told["input_ids"] == wanted["input_ids"]
    end = merged[1].bundle.config["eos_token_id"]
    assert until_end(told, end) == until_end(wanted, end)
    assert all(row[-1] == end for row in until_end(told, end))
