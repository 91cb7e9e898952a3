"""Polygraphy without its voice: what it finds is said by verdicts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from polygraphy.logger import G_LOGGER


@contextmanager
def quiet_polygraphy() -> Iterator[None]:
    """Keep Polygraphy from printing."""
    with G_LOGGER.verbosity(G_LOGGER.CRITICAL + 1):
        yield
