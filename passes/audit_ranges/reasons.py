"""What half precision would do to the numbers that a tensor held: a table of rules, each giving a reason in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import onnx_ir as ir

from passes.audit_ranges.ranges import LARGEST, WHOLE_UP_TO, Range

HEADROOM = 0.5
"""A tensor should peak below this share of 65,504."""
WORST_ERROR = 0.02
"""Half precision alone should not move a node's result by more than this share of its root mean square."""

_OF_SMALL_NUMBERS = frozenset({"Log", "Sqrt", "Reciprocal", "Pow"})


@dataclass(frozen=True)
class Reason:
    """Why a tensor needs float32.

    Args:
        rule: The name of the rule that says so.
        text: A few words with the measured number.
        amount: How bad it is, for a rule's cases among each other.
        is_for_readers: What reads it needs it in float32 as well.
    """

    rule: str
    text: str
    amount: float
    is_for_readers: bool = True


@dataclass(frozen=True)
class Case:
    """A measured tensor, as rules see it.

    Args:
        range: What it held.
        uses: The nodes that read it, each with the number of its input.
        headroom: As `HEADROOM`.
        worst_error: As `WORST_ERROR`.
    """

    range: Range
    uses: Sequence[tuple[ir.Node, int]] = ()
    headroom: float = HEADROOM
    worst_error: float = WORST_ERROR


def hides(range_: Range) -> bool:
    """Its large negative numbers are of a mask, which may be infinite; so are those that a mask is filled with."""
    fills = range_.kind == "constant" and range_.low < -LARGEST and range_.high <= LARGEST / 2
    return range_.is_mask or range_.is_masked or fills


def overflow(case: Case) -> Reason | None:
    """It peaks above a share of 65,504."""
    peak = case.range.high if hides(case.range) else case.range.peak
    if peak <= case.headroom * LARGEST:
        return None
    limit = f"{case.headroom:g} x 65,504" if case.headroom < 1 else "65,504"
    text = f"peaks at {number(peak)}, above {limit}"
    return Reason("overflow", text, math.log2(peak / LARGEST))


def broken(case: Case) -> Reason | None:
    """Half precision alone makes numbers infinite at its node."""
    if not case.range.broken or hides(case.range):
        return None
    count = case.range.broken
    text = f"half precision alone makes {count:,} {'number' if count == 1 else 'numbers'} infinite there"
    return Reason("broken", text, count, is_for_readers=False)


def inexact_count(case: Case) -> Reason | None:
    """It holds whole numbers above 2,048, which float16 rounds: positions, lengths, ids."""
    if case.range.kind != "position" or not case.range.is_whole or hides(case.range):
        return None
    if case.range.peak <= WHOLE_UP_TO:
        return None
    return Reason("inexact count", f"counts to {case.range.peak:,.0f}, above 2,048", case.range.peak)


def vanishing_divisor(case: Case) -> Reason | None:
    """Numbers that float16 makes zero are divided by, or their root, power or logarithm is taken."""
    if not case.range.underflow or case.range.smallest is None:
        return None
    reader = next((node for node, index in case.uses if _needs_small(node, index)), None)
    if reader is None:
        return None
    vanish = "number vanishes" if case.range.underflow == 1 else "numbers vanish"
    text = f"{case.range.underflow:,} {vanish}, down to {case.range.smallest:.1g}, before {reader.op_type}"
    return Reason("vanishing divisor", text, case.range.underflow)


def _needs_small(node: ir.Node, index: int) -> bool:
    if node.domain:
        return False
    return (node.op_type in _OF_SMALL_NUMBERS and index == 0) or (node.op_type == "Div" and index == 1)


def own_error(case: Case) -> Reason | None:
    """Half precision alone makes a large error at its node."""
    share = error_share(case.range)
    if share is None or share <= case.worst_error:
        return None
    text = f"half precision alone is off by {share:.1%} there"
    return Reason("own error", text, share, is_for_readers=False)


def error_share(range_: Range) -> float | None:
    """Return the error that half precision makes at a tensor's node alone, over the tensor's root mean square."""
    error = range_.error_rms
    return error / range_.rms if error is not None and range_.rms else None


RULES = (overflow, broken, inexact_count, vanishing_divisor, own_error)
"""In this order; the first that says something is the reason."""


def number(value: float) -> str:
    """Return a magnitude as people read it: 81,344, 3.25, 6.1e-05."""
    if value == 0:
        return "0"
    if 1000 <= value < 1e7:
        return f"{value:,.0f}"
    return f"{value:.3g}"


def reason_of(case: Case) -> Reason | None:
    """Return why a tensor needs float32, None if nothing says so."""
    return next((reason for rule in RULES if (reason := rule(case)) is not None), None)
