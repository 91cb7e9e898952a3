"""Bundles to run commands on: the fixtures as they are exported, and merged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from typer.testing import CliRunner

from surgery.cli import app
from surgery.pipeline import Pipeline

Call = Callable[..., Result]
ROOT = Path(__file__).resolve().parents[2]


def _merged(source: Path, folder: Path) -> Path:
    with Pipeline(["merge_if"], check=None).run(source) as result:
        result.save(folder)
    return folder


@pytest.fixture(scope="session")
def folder_of_bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


@pytest.fixture(scope="session")
def adder(exported: Callable[[str], Path]) -> Path:
    """`prefill` and `decode` of the adder."""
    return exported("adder")


@pytest.fixture(scope="session")
def merged_adder(adder: Path, folder_of_bundles: Path) -> Path:
    """The adder as one `decoder`."""
    return _merged(adder, folder_of_bundles / "merged_adder")


@pytest.fixture(scope="session")
def merged_sorter(exported: Callable[[str], Path], folder_of_bundles: Path) -> Path:
    """`encoder` and `decoder` of the sorter."""
    return _merged(exported("sorter"), folder_of_bundles / "merged_sorter")


@pytest.fixture(scope="session")
def comparer(exported: Callable[[str], Path]) -> Path:
    """The comparer, a single `model`."""
    return exported("comparer")


@pytest.fixture
def call() -> Call:
    """Run a command in this process, which has imported torch already."""

    def run(*arguments: str | Path, stdin: str | bytes | None = None) -> Result:
        return CliRunner().invoke(app, [str(argument) for argument in arguments], input=stdin)

    return run


@pytest.fixture(scope="session")
def foreign_t5() -> Path:
    """A tiny T5 with random weights as Optimum exports it: an encoder, two decoders, and the two merged."""
    return ROOT / "tests" / "sources" / "foreign" / "t5_all"
