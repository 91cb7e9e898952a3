"""A judge that is not there until somebody asks it."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import onnx_ir as ir

    from surgery.accuracy.judge import Judge
    from surgery.accuracy.verdict import Verdict
    from surgery.bundle import Bundle
    from surgery.claims import Claim
    from surgery.contract import Effect, Sampling, Tolerance


class LateJudge:
    """Answers as a judge does, and makes it when it is first asked: where nothing is checked, few passes ask one.

    Args:
        make: Makes the judge. What it raises comes out of the first question.
    """

    def __init__(self, make: Callable[[], Judge]) -> None:
        self._make = make
        self._judge: Judge | None = None
        self._accepted: list[tuple[Sequence[Claim], Effect, Tolerance]] = []

    @property
    def calls(self) -> int:
        """How often it has judged."""
        return self._judge.calls if self._judge is not None else 0

    def close(self) -> None:
        """Close every session, as the judge does."""
        if self._judge is not None:
            self._judge.close()

    def accept(self, claims: Sequence[Claim], effect: Effect, tolerance: Tolerance) -> None:
        """Take a step as done, as the judge does."""
        if self._judge is not None:
            self._judge.accept(claims, effect, tolerance)
        else:
            self._accepted.append((claims, effect, tolerance))

    def feeds(self, stage: Bundle, role: str, sampling: Sampling | None = None) -> Iterator[Mapping[str, np.ndarray]]:
        """Yield samples, as the judge does."""
        return self._made.feeds(stage, role, sampling)

    def run(self, model: ir.Model, feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Run a model once, as the judge does."""
        return self._made.run(model, feeds)

    def run_all(
        self, model: ir.Model, samples: Iterable[Mapping[str, np.ndarray]], outputs: Sequence[str], **where: Any
    ) -> Generator[Mapping[str, np.ndarray], None, None]:
        """Run a model on many samples, as the judge does."""
        return self._made.run_all(model, samples, outputs, **where)

    def judge_source(self) -> Verdict:
        """Compare the source, as the judge does."""
        return self._made.judge_source()

    def judge(
        self, before: Bundle, after: Bundle, claims: Sequence[Claim], effect: Effect, tolerance: Tolerance
    ) -> Verdict:
        """Check the claims of a step, as the judge does."""
        return self._made.judge(before, after, claims, effect, tolerance)

    @property
    def _made(self) -> Judge:
        if self._judge is None:
            self._judge = self._make()
            for step in self._accepted:
                self._judge.accept(*step)
            del self._make  # it holds what the source was exported from
        return self._judge
