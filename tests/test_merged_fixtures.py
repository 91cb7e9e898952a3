"""The trained fixtures, exported, cut and merged: every branch answers as before, and so does generation."""

from __future__ import annotations

from pathlib import Path

import pytest

from passes.dedup_weights import DedupWeights
from passes.last_logits import LastLogits
from passes.merge_if import MergeIf
from passes.merge_if.tensorrt import find_violations
from passes.tie_transposed import TieTransposed
from surgery import Check, Pipeline, Result

pytest.importorskip("transformers")

FIXTURES = Path(__file__).resolve().parent.parent / "fixtures"
ASKED = {"adder": ("27+58=", "9+94="), "sorter": ("3142", "9071"), "reverser": ("stressed=",)}

GREEDY = {
    False: "greedy over decoder as greedy over prefill + decode",
    True: "greedy over encoder + decoder as greedy over encoder + prefill + decode",
}


@pytest.mark.long
@pytest.mark.parametrize("name", ["adder", "sorter", "reverser"])
@pytest.mark.parametrize("options", [{}, {"hoist": True}, {"for_tensorrt": True}], ids=str)
def test_a_fixture_is_merged_exactly_after_its_prompt_pass_was_cut(name: str, options: dict[str, bool]):
    steps = [TieTransposed(min_bytes=64), LastLogits(models=("prefill",)), MergeIf(**options), DedupWeights()]
    with Pipeline(steps, Check(prompts=ASKED[name])).run(FIXTURES / name) as result:
        verdict = next(record.verdict for record in result.records if record.word == "merge_if")
        assert str(verdict.step) == "exact"
        assert {"decoder as prefill", "decoder as decode", GREEDY[name == "sorter"]} <= set(verdict.coverage)
        assert {"0", "1", "7", "99"} <= verdict.coverage["decoder as decode"].traits["past"]
        assert "yes" in verdict.coverage["decoder as prefill"].traits["padding"]
        if options.get("for_tensorrt"):
            assert find_violations(result.bundle["decoder"]) == []
        assert answers(result) == answers_before(name)


def answers(result: Result) -> list[str]:
    return [answer.text for answer in result.answers]


def answers_before(name: str) -> list[str]:
    with Pipeline([], Check(prompts=ASKED[name])).run(FIXTURES / name) as result:
        return answers(result)
