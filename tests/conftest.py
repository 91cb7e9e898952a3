"""Shared by all tests: the command line as a user runs it, and the trained fixtures, exported once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def surgery(tmp_path: Path) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python -m surgery ...` in a folder, by default a new one."""

    def run(*arguments: str | Path, cwd: Path = tmp_path, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        command: Sequence[str] = [sys.executable, "-m", "surgery", *map(str, arguments)]
        return subprocess.run(command, cwd=cwd, capture_output=True, text=True, timeout=timeout, check=False)

    return run


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the folder of a trained fixture's models, as our source exports them."""
    from surgery.pipeline import Pipeline

    @cache
    def export(name: str) -> Path:
        folder = tmp_path_factory.mktemp("exported") / name
        with Pipeline([], check=None).run(ROOT / "fixtures" / name) as result:
            result.save(folder)
        return folder

    return export
