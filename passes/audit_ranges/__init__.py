"""How large and how small every tensor gets, and what half precision alone does at every node."""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from contextlib import closing
from itertools import combinations
from pathlib import Path
from typing import Annotated, Self

import onnx_ir as ir
from pydantic import ValidationInfo, model_validator

from passes.audit_ranges.instrumenting import Instrumented, instrument
from passes.audit_ranges.keys import keyed_values
from passes.audit_ranges.kinds import origins_of
from passes.audit_ranges.ranges import Range, Ranges, as_ranges, shared
from passes.audit_ranges.sampling import Rounds
from passes.audit_ranges.saved import read, save
from surgery.contract import (
    Analysis,
    Bundle,
    Change,
    Context,
    Effect,
    Field,
    Outcome,
    Refused,
    RoleUse,
    Sampling,
    every_model,
)
from surgery.errors import RecipeError
from surgery.facts import Fact
from surgery.joining import join_nodes
from surgery.registry import register

__all__ = ["AuditRanges", "Range", "Ranges"]

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
REPORTS = (".html", ".txt", ".yaml")


@register
class AuditRanges(Analysis):
    """Measure the float32 tensors of a model on samples, and what half precision alone does at each node.

    Reductions are added to a copy of the model, in branches and loop bodies too, so that a few numbers of each tensor
    leave the runtime and no tensor does. Beside each node that computes stands its like, which gets the same numbers
    rounded to float16 and whose results are rounded: the difference is that node's own. Where two models are exports of
    one network (`prefill` and `decode`), which the bytes of their weights tell, what they hold in one place is joined.
    """

    effect = Effect.EXACT
    gives = (Ranges,)

    models: tuple[str, ...] | None = every_model(
        RoleUse.READS, "Look at the models of these roles only; left out, at every model of the bundle."
    )
    patience: int = Field(
        1, ge=1, description="Stop after so many rounds in a row that bring nothing new; a round has each shape once."
    )
    rounds: int = Field(8, ge=1, description="Run at most so many rounds of generated samples.")
    workers: int = Field(
        1, ge=1, description="Run samples in so many processes of this machine, which share its cores."
    )
    cluster: str = Field(
        "", description="Run samples on the cluster of the dask.distributed scheduler at this address."
    )

    data: Path | dict[str, Path] | None = Field(
        None,
        description="Run all of this instead: a file as check.data takes it, a folder of .npz (with a folder for each "
        "role, if there are several), or a .txt with a prompt a line for the bundle's tokenizer; by role if need be.",
    )
    batches: tuple[Positive, ...] | None = Field(None, min_length=1, description="Generate these batch sizes.")
    lengths: tuple[Positive, ...] | None = Field(None, min_length=1, description="Generate prompts of these lengths.")
    past: tuple[NotNegative, ...] | None = Field(
        None, min_length=1, description="Generate caches that hold so many tokens."
    )
    seed: int | None = Field(None, ge=0, description="Draw the generated samples from this seed.")
    save_to: Path | None = Field(
        None,
        description="Write what was found to this folder, a file for each model, for a later recipe's `read_from`.",
    )
    read_from: Path | tuple[Path, ...] | None = Field(
        None, description="Run nothing: join what audits of the same models, on any machine, saved to these folders."
    )
    report: Path | tuple[Path, ...] | None = Field(
        None, description="Write reports: a page with charts (.html), a table (.txt), lines for `keep:` (.yaml)."
    )

    @model_validator(mode="after")
    def _refuse_strange_paths(self, info: ValidationInfo) -> Self:
        """Find out before a model is opened that a path is of no use."""
        folder = (info.context or {}).get("folder", Path())
        for path in _paths(self.data):
            if not (folder / path).exists():
                raise RecipeError(f"data: there is no file or folder {folder / path}")
        for path in _paths(self.read_from):
            if not (folder / path).is_dir():
                raise RecipeError(f"read_from: there is no folder {folder / path}")
        for path in _paths(self.report):
            if path.suffix not in REPORTS:
                raise RecipeError(
                    f"report: {path} is of no known form", hint=f"a name that ends in {', '.join(REPORTS)}"
                )
        return self

    def analyze(self, bundle: Bundle, context: Callable[[str], Context]) -> Mapping[str, Fact]:
        """Return the ranges of each model."""
        roles = self.roles(RoleUse.READS, tuple(bundle.models))
        own = {role: self._ranges(role, bundle[role], context(role)) for role in roles}
        if self.save_to is not None:
            save(self.save_to, bundle.models, own)
        found = joined_by_weights(bundle, own)
        if self.report is not None:
            from passes.audit_ranges.reporting import write_reports

            name = str(bundle.config.get("model_type") or ", ".join(found))
            write_reports(_paths(self.report), bundle.models, found, name)
        return found

    def apply(self, bundle: Bundle, context: Callable[[str], Context]) -> Outcome:
        """Analyze, and say in the ledger what was found."""
        from passes.audit_ranges.reporting import findings, headline

        facts = super().apply(bundle, context).facts
        ranges = {role: fact for role, fact in facts.items() if isinstance(fact, Ranges)}
        said = (f"{model.role}: {headline(model)}" for model in findings(bundle.models, ranges))
        return Outcome(Change(0, "\n".join(said)), facts)

    def _ranges(self, role: str, model: ir.Model, context: Context) -> Ranges:
        if self.read_from is not None:
            return read(_paths(self.read_from), role, model)
        return self._audit(model, context)

    def _audit(self, model: ir.Model, context: Context) -> Ranges:
        """Run a model on samples, until these bring nothing new, and return what its tensors held.

        Raises:
            Refused: There is no sample, or the model cannot be seen into.
        """
        try:
            measured = instrument(model)
        except Refused as refusal:
            refusal.message = f"{context.role}: {refusal.message}"
            raise
        ranges = Ranges(values={}, samples=0)
        if measured is None:
            return ranges
        idle = 0
        sampling = Sampling(self.data, self.batches, self.lengths, self.past, self.seed)
        rounds = Rounds(context.feeds, context.role, sampling, self.rounds)
        with closing(self._found(measured, context, rounds)) as found:
            for seen in found:
                idle = 0 if seen.adds_to(ranges) else idle + 1
                ranges = ranges.joined(seen) if ranges.samples else seen
                context.progress(
                    f"audit_ranges: {context.role}, {ranges.samples} samples, the last {idle} with nothing new"
                )
                if rounds.size is not None and idle >= self.patience * rounds.size:
                    break
        if not ranges.samples:
            raise Refused(f"there is no sample of {context.role!r}", hint="data, or other lengths")
        return ranges

    def _found(self, measured: Instrumented, context: Context, samples: Rounds) -> Generator[Ranges, None, None]:
        """Yield what a model finds on each sample."""
        origins = origins_of(measured.model)
        outputs = tuple(measured.tables.values())
        with closing(
            context.run_all(measured.model, samples, outputs, workers=self.workers, cluster=self.cluster)
        ) as runs:
            for run in runs:
                tables = {table: run[name] for table, name in measured.tables.items()}
                yield as_ranges(measured.rows, measured.same, tables, origins)


def _paths(given: Path | tuple[Path, ...] | Mapping[str, Path] | None) -> tuple[Path, ...]:
    """Return the paths of an option that takes one or several."""
    if given is None:
        return ()
    if isinstance(given, Path):
        return (given,)
    return tuple(given.values()) if isinstance(given, Mapping) else given


def joined_by_weights(bundle: Bundle, ranges: Mapping[str, Ranges]) -> dict[str, Ranges]:
    """Return the ranges with those joined that are of one place in exports of one network."""
    found = dict(ranges)
    keys = {role: {value: key for key, value in keyed_values(bundle[role].graph)} for role in ranges}
    for one, other in combinations(ranges, 2):
        nodes = join_nodes(bundle[one], bundle[other])
        pairs = [
            (keys[one][ours], keys[other][theirs])
            for node, like in nodes.items()
            for ours, theirs in zip(node.outputs, like.outputs, strict=False)
            if ours in keys[one] and theirs in keys[other]
        ]
        found[one], found[other] = shared(found[one], found[other], pairs)
    return found
