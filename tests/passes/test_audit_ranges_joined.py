"""audit_ranges stops when samples bring nothing new, and joins what exports of one network hold in one place."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain, islice, repeat

import numpy as np
from models import decoder_pair

from passes.audit_ranges import AuditRanges, Ranges
from surgery import Pipeline
from surgery.contract import Bundle, Context
from surgery.runtime.farm import run_all
from surgery.text import parse

NEGATED = "g (float[n] x) => (float[n] y) { y = Neg(x) }"


def samples_looked_at(peaks: Iterator[float], patience: int) -> int:
    """Return after how many samples an audit stops, of one each round."""
    samples = ({"x": np.array([peak], np.float32)} for peak in peaks)

    def context(role: str) -> Context:
        return Context(role=role, run_all=run_all, feeds=lambda _, sampling=None: islice(samples, 1))

    found = AuditRanges(patience=patience, rounds=100).analyze(Bundle({"model": parse(NEGATED)}), context)["model"]
    assert isinstance(found, Ranges)
    return found.samples


def test_an_audit_stops_after_samples_without_news():
    assert samples_looked_at(repeat(1.0), patience=3) == 4
    assert samples_looked_at(chain([1000.0, 1050.0, 2000.0], repeat(1.0)), patience=3) == 6


def test_an_audit_goes_on_as_long_as_there_is_news():
    assert samples_looked_at(iter([1000 * 2.0**power for power in range(10)]), patience=2) == 10


def test_a_first_number_that_is_not_finite_is_news():
    assert samples_looked_at(chain([1.0, 1.0, float("inf")], repeat(1.0)), patience=3) == 6


def test_what_changes_no_decision_is_no_news():
    """Peaks far below the largest float16, and small numbers that vanish."""
    assert samples_looked_at(chain([1.0, 2.0, 100.0, 1e-9], repeat(1.0)), patience=3) == 4


def test_an_audit_never_stops_before_every_shape_was_run():
    peaks = (1.0, 1.0, 1.0, 1.0, 1.0, 8.0)

    def context(role: str) -> Context:
        feeds = ({"x": np.array([peak], np.float32)} for peak in peaks)
        return Context(role=role, run_all=run_all, feeds=lambda _, sampling=None: feeds)

    found = AuditRanges(patience=1).analyze(Bundle({"model": parse(NEGATED)}), context)["model"]
    assert isinstance(found, Ranges)
    assert found.values["y"].peak == 8


def audited_pair() -> tuple[Bundle, dict[str, Ranges]]:
    """Return a prefill and a decode that share weights, and what an audit in a pipeline finds of them."""
    bundle = decoder_pair()
    found: dict[str, Ranges] = {}

    class Noting(AuditRanges):
        def analyze(self, bundle, context):
            found.update(super().analyze(bundle, context))
            return found

    Pipeline([Noting()]).run(bundle)
    return bundle, found


def test_prefill_and_decode_have_one_range_where_they_are_one():
    _, found = audited_pair()
    prefill, decode = found["prefill"].values, found["decode"].values
    assert prefill["normal"] == decode["normal"]
    assert prefill["products"].elements == decode["products"].elements


def test_what_only_one_of_them_has_stays_its_own():
    _, found = audited_pair()
    assert "past_key_values.0.key" in found["decode"].values
    assert "past_key_values.0.key" not in found["prefill"].values
