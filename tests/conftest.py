"""Shared by all tests: the repository's root, and the command line as a user runs it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Sequence
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
