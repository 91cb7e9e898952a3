"""The tiny exports that several tests look at, made once."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from pretrained_cases import Case


def _made(model_type: str, folders: pytest.TempPathFactory, head: str | None = None) -> Case:
    from pretrained_cases import make_case

    return make_case(model_type, folders.mktemp(model_type), head=head)


@pytest.fixture(scope="session")
def gpt2(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return _made("gpt2", tmp_path_factory)


@pytest.fixture(scope="session")
def t5(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return _made("t5", tmp_path_factory)


@pytest.fixture(scope="session")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return _made("bert", tmp_path_factory, "Model")
