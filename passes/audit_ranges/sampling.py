"""The samples that an audit runs, round by round."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np

from surgery.contract import Feeds, Sampling


class Rounds:
    """The samples of a model in rounds: generated ones drawn anew in each, the user's own all in the first.

    A round has one sample of each shape that is asked for: each length, batch size and past.

    Args:
        feeds: Gives samples.
        role: The model.
        sampling: Which samples.
        most: How many rounds at most.
    """

    def __init__(self, feeds: Feeds, role: str, sampling: Sampling, most: int) -> None:
        self._feeds = feeds
        self._role = role
        self._sampling = sampling
        self._most = most
        self.size: int | None = None
        """How many samples a round has, known once the first one is over."""

    def __iter__(self) -> Iterator[Mapping[str, np.ndarray]]:
        for number in range(self._most):
            given = 0
            for sample in self._feeds(self._role, replace(self._sampling, round=number)):
                given += 1
                yield sample
            if not given:
                return
            self.size = self.size or given
