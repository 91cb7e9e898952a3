"""Whole-process measurements, in rounds against other commands; they live with `surgery bench`."""

from __future__ import annotations

from surgery.bench.processes import Measurement, anonymous_bytes, measure, median, ratio, rounds

__all__ = ["Measurement", "anonymous_bytes", "measure", "median", "ratio", "rounds"]
