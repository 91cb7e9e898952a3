"""Makes the samples of a source's models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np

from surgery.accuracy.feeds.arrays import PlainInputs
from surgery.accuracy.feeds.chaining import Arrays, ChainedInputs, Run
from surgery.accuracy.feeds.interface import Interface
from surgery.accuracy.feeds.naming import Renamed
from surgery.accuracy.feeds.requests import Request, Sample, requests_of, room
from surgery.bundle import Bundle
from surgery.recipe import Check


class FeedMaker:
    """Makes the samples of every model of a source.

    Args:
        bundle: The source.
        check: Which batch sizes, lengths and pasts to cover, and the seed.
        run: Runs the model of a role; used to chain the roles.
    """

    def __init__(self, bundle: Bundle, check: Check, run: Run) -> None:
        self._renamed = Renamed(bundle)
        self._check = check
        self._run_own = run
        self._plain = PlainInputs(bundle.config)
        self._chained = ChainedInputs(self._renamed.bundle, check.seed, self._plain, self._run)

    def samples(self, role: str) -> Iterator[Sample]:
        """Yield the samples of a role's model, the smallest first.

        A sample that the check asks for and the model has no room for (a length beyond its positions) is left out.
        """
        bundle = self._renamed.bundle
        for request in requests_of(Interface(bundle[role]), self._check, room(bundle.config)):
            yield self.sample(role, request)

    def sample(self, role: str, request: Request) -> Sample:
        """Return a sample of a role's model of any shape that the model takes."""
        interface = Interface(self._renamed.bundle[role])
        random = np.random.default_rng([self._check.seed, request.batch, request.length, request.past])
        arrays = self._plain.fill(interface, request, random, self._chained.of(role, interface, request))
        return Sample(request.name(interface), self._renamed.as_own(role, arrays), interface.traits(arrays))

    def _run(self, role: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
        return self._renamed.as_known(role, self._run_own(role, self._renamed.as_own(role, arrays)))
