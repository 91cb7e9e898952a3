"""Half precision, but for what an audit says needs more."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import onnx_ir as ir

from passes.audit_ranges import Ranges
from passes.cast_fp16.deciding import Attempt, Decider, Interface, details_of
from passes.cast_fp16.refining import Refiner
from passes.cast_fp16.rules import Limits
from surgery.claims import CastTo, Claim, Program, Take
from surgery.contract import Bundle, BundlePass, Change, Context, Effect, Field, RoleUse, Tolerance, every_model
from surgery.registry import register
from surgery.units import in_bytes

__all__ = ["CastFp16"]


@register
class CastFp16(BundlePass):
    """Compute in float16, but for the nodes that an audit of real activations says need float32.

    Before::

        g (float[2, 4] x) => (float[2, 2] y)
        <float[4, 2] w = {1, 2, 3, 4, 5, 6, 7, 8}>
        {
            a = MatMul(x, w)
            y = Relu(a)
        }

    After::

        g (float[2, 4] x) => (float[2, 2] y)
        <float16[4, 2] w = {15360, 16384, 16896, 17408, 17664, 17920, 18176, 18432}>
        {
            "x/float16" = Cast <to = 10> (x)
            a = MatMul("x/float16", w)
            "y/float16" = Relu(a)
            y = Cast <to = 1> ("y/float16")
        }

    Keeps in float32: what would overflow, what must not vanish, counts above 2,048, what half precision alone gets
    wrong, what the author computes in float32 on purpose, and what the runtime has no float16 kernel for; each with a
    reason. Casts stand where they move the fewest numbers.
    """

    effect = Effect.CLOSE
    needs = (Ranges,)
    tolerance = Tolerance(max_error=0.05, p999_error=0.02, top1=0.98)

    models: tuple[str, ...] | None = every_model(
        RoleUse.EDITS, "Work on the models of these roles only; left out, on every model of the bundle."
    )
    keep: tuple[str, ...] = Field((), description="Keep these nodes in float32: names, patterns, or operator types.")
    headroom: float = Field(
        0.5, gt=0, le=1, description="Keep a tensor in float32 when it peaks above this share of 65,504."
    )
    worst_error: float = Field(
        0.02, gt=0, description="Keep a node in float32 when half precision alone moves its result by this share of it."
    )
    keep_io: Literal["all", "none"] | tuple[str, ...] = Field(
        "all", description="Inputs and outputs that stay float32: all, none, or these names or patterns; not the cache."
    )
    keep_cache: bool = Field(False, description="Keep the cache's inputs and outputs in float32 too.")
    runs_on: Literal["cuda", "cpu", "any"] = Field(
        "cuda", description="Keep in float32 what ONNX Runtime has no float16 kernel for there."
    )
    refine: bool = Field(
        True, description="Keep more nodes in float32 while the verdict is over its limits, the least exact ones first."
    )
    most_verdicts: int = Field(24, ge=1, description="Ask for at most so many verdicts to refine.")

    def transform(self, bundle: Bundle, context: Callable[[str], Context]) -> Change:
        """Cast the models together, since they share weights."""
        roles = self.roles(RoleUse.EDITS, tuple(bundle.models))
        decider = Decider(
            models={role: bundle[role] for role in roles},
            others={role: model for role, model in bundle.models.items() if role not in roles},
            ranges={role: context(role).fact(Ranges) for role in roles},
            keep=self.keep,
            interface=Interface(self.keep_io, self.keep_cache),
            limits=Limits(self.headroom, self.worst_error, self.runs_on),
        )
        attempt, said = decider.attempt(), ""
        if not attempt.changed:
            return Change(0, "")
        if self.refine and roles:
            judge, progress = context(roles[0]).judge, context(roles[0]).progress

            def is_accurate(candidate: Attempt) -> bool:
                progress(f"cast_fp16: a verdict on {candidate.kept} of {candidate.nodes} nodes in float32")
                models = {**bundle.models, **candidate.models}
                return judge(Bundle(models, bundle.config, bundle.generation_config)).is_accurate

            attempt, said = Refiner(decider, attempt, is_accurate, self.most_verdicts).run()
        bundle.models.update(attempt.models)
        return Change(attempt.changed, _summary(attempt, said), details_of(attempt))

    def claims(self, before: Bundle, after: Bundle) -> Sequence[Claim]:
        """What is float16 now is compared as float16."""
        return [_claim(role, before[role], after[role]) for role in after.models]


def _summary(attempt: Attempt, said: str) -> str:
    parts = [f"{attempt.kept} of {attempt.nodes} nodes compute in float32", f"{attempt.casts} casts"]
    if attempt.saved_bytes > 0:
        parts.append(f"{in_bytes(attempt.saved_bytes)} of weights saved")
    return ", ".join(parts) + (f"; {said}" if said else "")


def _claim(role: str, before: ir.Model, after: ir.Model) -> Claim:
    program = Program(role)
    return Claim(
        program,
        program,
        inputs=_halved(before.graph.inputs, after.graph.inputs),
        outputs=_halved(before.graph.outputs, after.graph.outputs),
    )


def _halved(before: Sequence[ir.Value], after: Sequence[ir.Value]) -> dict[str, Take]:
    return {
        new.name or "": Take(old.name or "", (CastTo("float16"),))
        for old, new in zip(before, after, strict=True)
        if old.dtype != new.dtype and not new.is_initializer()
    }
