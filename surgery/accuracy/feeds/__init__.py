"""Feeds: samples that know what a model's inputs are.

Ids stay below the vocabulary, masks agree with past and present, a past comes out of a real prefill, positions follow
the mask. The roles are chained: the encoder's output feeds the decoders, the prefill's cache feeds the decode.
"""

from __future__ import annotations

from surgery.accuracy.feeds.arrays import rows_gathered_by
from surgery.accuracy.feeds.chaining import Run
from surgery.accuracy.feeds.interface import Interface, numpy_type
from surgery.accuracy.feeds.maker import FeedMaker
from surgery.accuracy.feeds.requests import Request, Sample, room

__all__ = ["FeedMaker", "Interface", "Request", "Run", "Sample", "numpy_type", "room", "rows_gathered_by"]
