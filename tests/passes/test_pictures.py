"""The pictures in the passes' docstrings are true."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rewriting import assert_rewrites

from surgery.registry import find, words
from surgery.text import pictures_of

# The options that a picture needs, where the defaults do not do.
OPTIONS: dict[str, dict[str, Any]] = {
    "dedup_weights": {"min_bytes": 1},
    "tie_transposed": {"min_bytes": 1},
    "rename_io": {"names": {"ids": "input_ids", "*_out": "present_*"}, "integers": "int32"},
}
# What needs an analysis first is shown in the pass's own tests.
PICTURES = {word: pictures_of(find(word, Path()).__doc__ or "") for word in words() if not find(word, Path()).needs}


@pytest.mark.parametrize("word", [word for word, pictures in PICTURES.items() if pictures])
def test_a_pass_makes_the_graph_after_of_the_graph_before(word: str):
    pictures = PICTURES[word]
    assert pictures is not None
    assert_rewrites(find(word, Path())(**OPTIONS.get(word, {})), *pictures)


def test_the_pictures_are_found():
    assert PICTURES["dedup_weights"] is not None
