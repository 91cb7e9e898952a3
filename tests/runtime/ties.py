"""Ties told from errors: where two runtimes choose other tokens, was it a toss-up?

Two runtimes that add in another order differ in the last bits. Where two tokens are nearly as likely, that decides, and
from there on the texts go apart though nothing is wrong. So what is compared is the numbers, up to there.

Both generations are recorded by a logits processor: at each step what was read, and the scores of what may follow. Up
to the first other choice both have read the same, so their scores are comparable, and `error` is the largest difference
of any of them. The choice was a tie if

- `error` is rounding: at most `ROUNDING` of the scores' spread. This is what finds a fault. That a choice came out
  otherwise by itself says nothing, since a wrong score explains any choice;
- the reference prefers its own choice by no more than errors of that size can turn: twice `error` for one token, and
  for beams, whose scores are sums over the steps, twice that for each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from transformers import LogitsProcessor, LogitsProcessorList

ROUNDING = 1e-4
"""What float32 may lose over the layers of a network, as a share of the scores' spread: 3e-6 to 3e-5 was seen."""

UNUSED = -1e9
"""The score that transformers gives all beams but one before the first step."""


class Recorder(LogitsProcessor):  # type: ignore[misc]
    """Keeps what each step has read, int64 [rows, length], and the scores of what follows, float32 [rows, words]."""

    def __init__(self) -> None:
        self.ids: list[torch.Tensor] = []
        self.scores: list[torch.Tensor] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        self.ids.append(input_ids.clone())
        self.scores.append(scores.clone())
        return scores


@dataclass(frozen=True)
class Difference:
    """The first choice that came out otherwise.

    Args:
        step: At which step, from 0.
        margin: By how much the reference prefers what it chose.
        error: The largest difference of scores up to there.
        spread: The standard deviation of the reference's scores at that step.
    """

    step: int
    margin: float
    error: float
    spread: float

    @property
    def is_tie(self) -> bool:
        """Rounding explains it."""
        return self.error <= ROUNDING * self.spread and self.margin <= 2 * self.error * (self.step + 1)


@dataclass(frozen=True)
class Compared:
    """What came of two generations.

    Args:
        equal: The share of rows that have the same tokens.
        differences: The first other choice of each row that has others; of beams, the first of all.
    """

    equal: float
    differences: tuple[Difference, ...]

    @property
    def faults(self) -> tuple[Difference, ...]:
        """The differences that are no ties."""
        return tuple(each for each in self.differences if not each.is_tie)


def compare(reference: Any, candidate: Any, inputs: dict[str, Any], **options: Any) -> Compared:
    """Generate with two models and compare.

    Args:
        reference: The model to go by.
        candidate: The model to judge.
        inputs: Prompts and masks.
        options: Options of `generate`, without sampling.
    """
    (wanted, expected), (found, got) = (_recorded(model, inputs, options) for model in (reference, candidate))
    same = [_unpadded_equal(a, b) for a, b in zip(wanted.sequences, found.sequences, strict=True)]
    if options.get("num_beams", 1) > 1:
        first = None if all(same) else beam_difference(wanted, expected, found, got, options["num_beams"])
        differences = [first] if first is not None else []
    else:
        differences = [
            greedy_difference(wanted.sequences[row], expected, found.sequences[row], got, row)
            for row, is_same in enumerate(same)
            if not is_same
        ]
    return Compared(sum(same) / len(same), tuple(differences))


def _recorded(model: Any, inputs: dict[str, Any], options: dict[str, Any]) -> tuple[Any, Recorder]:
    recorder = Recorder()
    extra = {"output_scores": True} if options.get("num_beams", 1) > 1 else {}
    output = model.generate(
        **inputs,
        **options,
        **extra,
        return_dict_in_generate=True,
        logits_processor=LogitsProcessorList([recorder]),
    )
    return output, recorder


def _unpadded_equal(first: torch.Tensor, second: torch.Tensor) -> bool:
    length = min(len(first), len(second))
    rest = torch.cat([first[length:], second[length:]])
    return torch.equal(first[:length], second[:length]) and bool((rest == rest[:1]).all())


def greedy_difference(
    wanted: torch.Tensor, expected: Recorder, found: torch.Tensor, got: Recorder, row: int
) -> Difference:
    """Return the first other choice in a row whose tokens [length] are not the same."""
    length = min(len(wanted), len(found))
    place = int((wanted[:length] != found[:length]).nonzero()[0])
    step = place - expected.ids[0].shape[1]
    scores = expected.scores[step][row]
    error = max(_error(expected.scores[each][row], got.scores[each][row]) for each in range(step + 1))
    margin = float(scores[wanted[place]] - scores[found[place]])
    return Difference(step, margin, error, _spread(scores))


def beam_difference(wanted: Any, expected: Recorder, found: Any, got: Recorder, beams: int) -> Difference:
    """Return the first step that keeps other beams, or, if none does, how far the best ones' scores are apart."""
    rows = len(expected.ids[0])
    totals = torch.full((rows,), UNUSED)
    totals[::beams] = 0
    error = 0.0
    for step in range(min(len(expected.ids), len(got.ids)) - 1):
        error = max(error, _error(expected.scores[step], got.scores[step]))
        scores = totals[:, None] + expected.scores[step]
        kept = _totals(expected.ids[step], scores, expected.ids[step + 1], beams)
        if not torch.equal(expected.ids[step + 1], got.ids[step + 1]):
            others = _totals(expected.ids[step], scores, got.ids[step + 1], beams)
            return Difference(step, float((kept - others).abs().max()), error, _spread(expected.scores[step]))
        totals = kept
    step = min(len(expected.ids), len(got.ids)) - 1
    error = max(error, _error(expected.scores[step], got.scores[step]))
    margin = float((wanted.sequences_scores - found.sequences_scores).abs().max())
    return Difference(step, margin, error, _spread(expected.scores[step]))


def _totals(before: torch.Tensor, scores: torch.Tensor, after: torch.Tensor, beams: int) -> torch.Tensor:
    """Return the score of each beam [rows], by the beam of the same prompt that it goes on from."""
    found = []
    for row, ids in enumerate(after):
        start = row - row % beams
        parents = [each for each in range(start, start + beams) if torch.equal(before[each], ids[:-1])]
        assert parents, "a beam goes on from none of those before it"
        found.append(max(scores[each, ids[-1]] for each in parents))
    return torch.stack(found)


def _error(first: torch.Tensor, second: torch.Tensor) -> float:
    known = first.isfinite() & second.isfinite()
    if not torch.equal(first.isfinite(), second.isfinite()):
        return float("inf")
    return float((first[known] - second[known]).abs().max())


def _spread(scores: torch.Tensor) -> float:
    return float(scores[scores.isfinite()].std())
