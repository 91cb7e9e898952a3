"""Accuracy: after each step, how far its claims hold."""

from __future__ import annotations

import time
from dataclasses import replace

from surgery.accuracy.late import LateJudge
from surgery.accuracy.verdict import Gap, Verdict
from surgery.contract import Effect
from surgery.errors import Inaccurate, StepFailed
from surgery.manager import StepRecord


class Accuracy:
    """Asks the judge after every step and stops the run at the first one that is inaccurate.

    Args:
        judge: The judge of the run.
    """

    def __init__(self, judge: LateJudge) -> None:
        self._judge = judge
        self._drift = Gap()

    def starting(self, number: int, word: str) -> None:
        """Nothing to do before a step."""

    def stepped(self, record: StepRecord) -> None:
        """Judge the step.

        Raises:
            Inaccurate: An output is over its limit.
            StepFailed: The pass says that it changed nothing, and did.
        """
        start = time.perf_counter()
        record.verdict = self._judge.judge_source() if record.is_source else self._judge_step(record)
        record.check_seconds += time.perf_counter() - start
        if not record.verdict.is_accurate:
            raise Inaccurate("\n".join(map(str, record.verdict.failures)), hint=_way_out(record))
        self._drift = record.verdict.source or self._drift

    def _judge_step(self, record: StepRecord) -> Verdict:
        is_same = record.before.identities() == record.after.identities()
        if is_same and record.change.count:
            record.warnings.append("says that it changed something, but the models are what they were")
        if is_same and all(claim.is_same for claim in record.claims):
            return Verdict(step=Gap(), source=self._drift)
        if record.change.count == 0:
            raise StepFailed("says that it changed nothing, but the models are not what they were")
        verdict = self._judge.judge(record.before, record.after, record.claims, record.effect, record.tolerance)
        return replace(verdict, source=verdict.source or self._drift)


def _way_out(record: StepRecord) -> str:
    assert record.verdict is not None
    first = record.verdict.failures[0]
    if record.is_source:
        return "another source.opset, or a higher check.max_error if the export may differ so much"
    if record.effect is Effect.EXACT:
        return (
            "leave this step out, or declare it close if it takes an option `effect`; an exact step cannot be loosened"
        )
    if first.error == float("inf"):
        return "mend the pass, or say in its claims what becomes of this output (outputs, drops, extra)"
    return "the options of this step, or a higher limit: check.max_error, or check.outputs for a single output"
