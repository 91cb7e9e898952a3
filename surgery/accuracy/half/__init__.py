"""Half precision without a GPU: what one would compute, computed in float32 and rounded where it would round."""

from surgery.accuracy.half.lowering import holds_half, lower_half

__all__ = ["holds_half", "lower_half"]
