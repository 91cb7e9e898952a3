"""Ties are told from errors, with scores made for it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from ties import ROUNDING, Recorder, beam_difference, greedy_difference  # noqa: E402

ROUNDED = 0.4 * ROUNDING


def recorded(*steps: tuple[list[list[int]], list[list[float]]]) -> Recorder:
    recorder = Recorder()
    for ids, scores in steps:
        recorder(torch.tensor(ids), torch.tensor(scores))
    return recorder


def greedy(scores: list[list[float]], others: list[list[float]], wanted: list[int], found: list[int]) -> Any:
    reads = [[wanted[: 1 + step]] for step in range(len(scores))]
    first, second = (
        recorded(*((ids, [row]) for ids, row in zip(reads, each, strict=True))) for each in (scores, others)
    )
    return greedy_difference(torch.tensor(wanted), first, torch.tensor(found), second, 0)


def test_two_tokens_within_rounding_are_a_tie():
    scores = [[0.0, 1.0, -1.0], [1.0, 1.0 - ROUNDED / 2, -1.0]]
    others = [[0.0, 1.0, -1.0], [1.0, 1.0 + ROUNDED / 2, -1.0]]
    difference = greedy(scores, others, [0, 1, 0], [0, 1, 1])
    assert difference.step == 1
    assert difference.is_tie


def test_a_wrong_score_is_no_tie_though_it_explains_the_choice():
    difference = greedy([[1.0, 0.99, -1.0]], [[1.0, 1.01, -1.0]], [0, 0], [0, 1])
    assert difference.margin <= 2 * difference.error
    assert not difference.is_tie


def test_a_wrong_score_before_the_choice_counts_too():
    scores = [[0.0, 1.0, -1.0], [1.0, 1.0, -1.0]]
    others = [[0.0, 1.0, -1.2], [1.0, 1.0, -1.0]]
    assert not greedy(scores, others, [0, 1, 0], [0, 1, 1]).is_tie


def test_another_choice_from_equal_scores_is_no_tie():
    assert not greedy([[1.0, 0.5, -1.0]], [[1.0, 0.5, -1.0]], [0, 0], [0, 1]).is_tie


def test_a_token_that_only_one_side_forbids_is_no_tie():
    assert greedy([[1.0, 1.0, -1.0]], [[float("-inf"), 1.0, -1.0]], [0, 0], [0, 1]).error == float("inf")


def beams(second: list[list[int]], third_row: float) -> Any:
    """Two beams of one prompt: the reference keeps tokens 0 and 1, whose scores differ by little."""
    first = [[-0.1, -2.0, -2.0 - ROUNDED, -5.0]] * 2
    others = [[-0.1, -2.0, third_row, -5.0]] * 2
    kept = [[9, 0], [9, 1]]
    expected = recorded(([[9], [9]], first), (kept, [[-1.0, -2.0, -3.0, -4.0]] * 2))
    got = recorded(([[9], [9]], others), (second, [[-1.0, -2.0, -3.0, -4.0]] * 2))
    ends = (
        SimpleNamespace(sequences_scores=torch.tensor([-1.0])),
        SimpleNamespace(sequences_scores=torch.tensor([-1.5])),
    )
    return beam_difference(ends[0], expected, ends[1], got, 2)


def test_beams_whose_scores_are_within_rounding_are_a_tie():
    difference = beams([[9, 0], [9, 2]], -2.0 + ROUNDED)
    assert difference.step == 0
    assert difference.margin == pytest.approx(ROUNDED, rel=0.01)
    assert difference.is_tie


def test_beams_that_a_wrong_score_keeps_are_no_tie():
    assert not beams([[9, 0], [9, 3]], -2.0 - ROUNDED).is_tie
    assert not beams([[9, 0], [9, 2]], -1.0).is_tie


def test_equal_beams_with_other_ends_are_told_by_the_scores_of_the_ends():
    difference = beams([[9, 0], [9, 1]], -2.0 - ROUNDED)
    assert difference.margin == 0.5
    assert not difference.is_tie
