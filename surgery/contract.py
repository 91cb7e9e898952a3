"""What a pass is: its options, its effect on the numbers, what it needs and gives, what it claims, and its work."""

from __future__ import annotations

import abc
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import numpy as np
import onnx_ir as ir
from onnx_ir.passes import InPlacePass, PassResult
from pydantic import Field
from pydantic.fields import FieldInfo

from surgery.bundle import Bundle
from surgery.claims import Claim, Program
from surgery.errors import Refused, SurgeryError
from surgery.facts import Fact, Facts, FactType
from surgery.options import Options

if TYPE_CHECKING:
    from surgery.accuracy.verdict import Verdict


class Effect(Enum):
    """What a pass may do to the numbers."""

    EXACT = "exact"
    """Bit for bit the same outputs; no recipe can loosen it."""
    CLOSE = "close"
    """Within the tolerance in force."""


@dataclass(frozen=True)
class Change:
    """What a pass did: how many changes, and a sentence in the user's units; `Change(0, "")` is nothing to do.

    Args:
        count: How many changes.
        summary: The sentence.
        details: What stands behind it, a line each; the report has all of them, the command line the first few.
    """

    count: int
    summary: str
    details: tuple[str, ...] = ()


class Tolerance(Options):
    """How far a `CLOSE` step may move an output; errors are shares of the root mean square of the reference output."""

    max_error: float = Field(1e-3, ge=0, description="Fail when the largest error exceeds this share of the RMS.")
    p999_error: float = Field(
        2e-4, ge=0, description="Fail when the 99.9th percentile of the errors exceeds this share of the RMS."
    )
    top1: float = Field(
        0.999, ge=0, le=1, description="Fail when the arg max of the logits agrees in a smaller share of positions."
    )

    def plus(self, other: Tolerance) -> Tolerance:
        """Return what two steps may do one after the other."""
        return Tolerance(
            max_error=self.max_error + other.max_error,
            p999_error=self.p999_error + other.p999_error,
            top1=max(0.0, self.top1 + other.top1 - 1),
        )


class RoleUse(Enum):
    """What a pass does with the model whose role an option names."""

    TAKES = "takes"
    """The model goes in and is gone afterwards."""
    READS = "reads"
    """The model stays as it is."""
    EDITS = "edits"
    """The model is changed in place."""
    MAKES = "makes"
    """The model is new."""


def takes(role: str, description: str) -> Any:
    """Declare an option that names a model which the pass consumes."""
    return _role_field(RoleUse.TAKES, role, description)


def reads(role: str, description: str) -> Any:
    """Declare an option that names a model which the pass reads and leaves."""
    return _role_field(RoleUse.READS, role, description)


def edits(role: str, description: str) -> Any:
    """Declare an option that names a model which the pass changes in place."""
    return _role_field(RoleUse.EDITS, role, description)


def makes(role: str, description: str) -> Any:
    """Declare an option that names a model which the pass makes."""
    return _role_field(RoleUse.MAKES, role, description)


def _role_field(use: RoleUse, role: str, description: str) -> Any:
    return Field(role, description=description, json_schema_extra={"role": use.value})


def every_model(use: RoleUse, description: str) -> Any:
    """Declare an option that lists roles; left out, it means every model that the bundle has at that step."""
    return Field(None, description=description, json_schema_extra={"role": use.value, "every": True})


@dataclass(frozen=True)
class Sampling:
    """Which samples of a model a pass asks for; what is left out is as the recipe's check says.

    Args:
        data: The user's own: a file or a folder as `check.data` takes it, or one for each role of the source.
        batches: Generate these batch sizes.
        lengths: Generate prompts of these lengths.
        past: Generate caches that hold so many tokens.
        seed: Draw from this seed.
        round: Generated samples are drawn anew in every round, without end; the user's own are all of round 0.
    """

    data: Path | Mapping[str, Path] | None = None
    batches: tuple[int, ...] | None = None
    lengths: tuple[int, ...] | None = None
    past: tuple[int, ...] | None = None
    seed: int | None = None
    round: int = 0


class Feeds(Protocol):
    """Gives samples of a model's inputs, made while they are taken: arrays by input name."""

    def __call__(self, role: str, sampling: Sampling | None = None, /) -> Iterator[Mapping[str, np.ndarray]]:
        """Yield the samples of a role: without more, those that verdicts rest on."""


@dataclass(frozen=True)
class Context:
    """All that a pass is told, and may ask for; a pass never loads, saves or opens a session itself.

    Args:
        config: The network's `config.json`.
        generation_config: Its `generation_config.json`.
        facts: What earlier analyses found.
        tolerance: The tolerance in force for this step.
        scratch: A folder for files that need not outlive the run; new tensors may be put there and mapped.
        role: The model that a `ModelPass` is at.
        feeds: Gives samples of a model's inputs, arrays by input name: those of the check, or as a `Sampling` says.
        run: Runs a model on such a sample and gives its outputs by name.
        run_all: Runs a model on many samples, as `surgery.runtime.farm.run_all` does: over processes and machines.
        judge: Compares a candidate with what the step was given; each call is cached and counted in the ledger.
        progress: Takes a sentence to show while long work is under way.
    """

    config: Mapping[str, Any] = field(default_factory=dict)
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    facts: Facts = field(default_factory=Facts)
    tolerance: Tolerance = field(default_factory=Tolerance)
    scratch: Path = Path()
    role: str = "model"
    feeds: Feeds = lambda role, sampling=None: _no_runs()
    run: Callable[[ir.Model, Mapping[str, np.ndarray]], Mapping[str, np.ndarray]] = lambda model, feeds: _no_runs()
    run_all: Callable[..., Generator[Mapping[str, np.ndarray], None, None]] = lambda *given, **where: _no_runs()
    judge: Callable[[ir.Model | Bundle], Verdict] = lambda candidate: _no_runs()
    progress: Callable[[str], None] = lambda sentence: None

    def fact(self, kind: type[FactType], role: str | None = None) -> FactType:
        """Return what an analysis found about a model, by default the one that the pass is at."""
        return self.facts.get(kind, role or self.role)


def _no_runs() -> Any:
    raise SurgeryError("this pass asks for runs, which it gets only inside a recipe or a Pipeline")


@dataclass(frozen=True)
class Outcome:
    """What came of applying a pass: the change, and the facts that it found by role."""

    change: Change
    facts: Mapping[str, Fact] = field(default_factory=dict)


class Pass(Options, abc.ABC):
    """One transformation or analysis; its fields are its options.

    Class attributes:
        effect: What it may do to the numbers (a property where an option decides).
        needs: The facts that it uses, about each model that it takes, reads or edits.
        gives: The facts that it finds, about each model that it reads.
        preserves: The facts that stay true of the models that it changes.
        tolerance: Its own default tolerance when it is `CLOSE`; the recipe's goes before it.
    """

    effect: ClassVar[Effect] = Effect.EXACT
    needs: ClassVar[tuple[type[Fact], ...]] = ()
    gives: ClassVar[tuple[type[Fact], ...]] = ()
    preserves: ClassVar[tuple[type[Fact], ...]] = ()
    tolerance: ClassVar[Tolerance] = Tolerance()

    @abc.abstractmethod
    def apply(self, bundle: Bundle, context: Callable[[str], Context]) -> Outcome:
        """Work on the bundle in place.

        Args:
            bundle: A clone that the pass may change freely.
            context: Gives the context as seen from a role.
        """

    def claims(self, before: Bundle, after: Bundle) -> Sequence[Claim]:
        """Return what must hold afterwards; by default every model that is there still answers as it did."""
        return [Claim.same(role) for role in after.models if role in before.models]

    def roles(self, use: RoleUse, present: Sequence[str]) -> tuple[str, ...]:
        """Return the roles that the options name for a use, where `present` are those that the bundle has."""
        found: list[str] = []
        for name, option in type(self).model_fields.items():
            if _use(option) is use:
                found += _named_roles(option, getattr(self, name), present)
        return tuple(found)

    @classmethod
    def role_options(cls) -> dict[str, RoleUse]:
        """Return the options that name roles."""
        uses = {name: _use(option) for name, option in cls.model_fields.items()}
        return {name: use for name, use in uses.items() if use is not None}


def _named_roles(option: FieldInfo, value: str | tuple[str, ...] | None, present: Sequence[str]) -> Sequence[str]:
    if value is None:
        extra = option.json_schema_extra
        return present if isinstance(extra, dict) and extra.get("every") else ()
    return (value,) if isinstance(value, str) else value


def _use(option: FieldInfo) -> RoleUse | None:
    extra = option.json_schema_extra
    if not isinstance(extra, dict) or "role" not in extra:
        return None
    return RoleUse(extra["role"])


class ModelPass(Pass, InPlacePass):
    """A pass that sees one model at a time; also an `onnx_ir` pass, for use inside `onnx_ir.passes.Sequential`."""

    models: tuple[str, ...] | None = every_model(
        RoleUse.EDITS, "Work on the models of these roles only; left out, on every model of the bundle."
    )

    @abc.abstractmethod
    def rewrite(self, model: ir.Model, context: Context) -> Change:
        """Change the model in place and say what changed.

        Raises:
            Refused: The pass may not do what it was asked for.
        """

    def apply(self, bundle: Bundle, context: Callable[[str], Context]) -> Outcome:
        """Rewrite each model in turn."""
        changes: dict[str, Change] = {}
        for role in self.roles(RoleUse.EDITS, tuple(bundle.models)):
            changes[role] = _as_change(self, self.rewrite(bundle[role], context(role)))
        return Outcome(join_changes(changes))

    def call(self, model: ir.Model) -> PassResult:
        """Run as an `onnx_ir` pass, outside any recipe: nothing is checked and nothing can be asked."""
        return PassResult(model, self.rewrite(model, Context()).count > 0)


def _as_change(pass_: Pass, returned: object) -> Change:
    """Refuse what is no `Change`, such as the None of a forgotten return."""
    if not isinstance(returned, Change):
        raise Refused(
            f"{type(pass_).__name__} returned {returned!r}, not a Change", hint="return Change(count, sentence)"
        )
    return returned


def join_changes(changes: Mapping[str, Change]) -> Change:
    """Say the changes of several models as one; a role is named only where there are several."""
    done = {role: change for role, change in changes.items() if change.count}
    if len(changes) == 1:
        return next(iter(changes.values()))
    sentences = [f"{role}: {change.summary}" for role, change in done.items()]
    details = tuple(f"{role}: {line}" for role, change in done.items() for line in change.details)
    return Change(sum(change.count for change in done.values()), "; ".join(sentences), details)


class Analysis(Pass):
    """A pass that changes nothing and finds facts."""

    models: tuple[str, ...] | None = every_model(
        RoleUse.READS, "Look at the models of these roles only; left out, at every model of the bundle."
    )

    @abc.abstractmethod
    def analyze(self, bundle: Bundle, context: Callable[[str], Context]) -> Mapping[str, Fact]:
        """Return a fact for each role of `self.roles(RoleUse.READS, ...)`."""

    def apply(self, bundle: Bundle, context: Callable[[str], Context]) -> Outcome:
        """Analyze, and prove that what was declared was found."""
        facts = self.analyze(bundle, context)
        for role, fact in facts.items():
            if type(fact) not in self.gives:
                raise Refused(
                    f"{type(self).__name__} found {type(fact).__name__} of {role!r}, which it does not declare"
                )
        missing = [role for role in self.roles(RoleUse.READS, tuple(bundle.models)) if role not in facts]
        if missing and self.gives:
            raise Refused(f"{type(self).__name__} found nothing about {missing[0]!r}")
        return Outcome(Change(0, ""), facts)


class BundlePass(Pass):
    """A pass that turns some models into others, named through options made with `takes`, `reads`, `edits`, `makes`."""

    @abc.abstractmethod
    def transform(self, bundle: Bundle, context: Callable[[str], Context]) -> Change:
        """Put what it makes into `bundle.models`; what it takes is removed afterwards."""

    def apply(self, bundle: Bundle, context: Callable[[str], Context]) -> Outcome:
        """Transform, drop what was taken, and prove that what was promised is there."""
        present = tuple(bundle.models)
        change = _as_change(self, self.transform(bundle, context))
        made = self.roles(RoleUse.MAKES, present)
        for role in self.roles(RoleUse.TAKES, present):
            if role not in made:
                bundle.models.pop(role, None)
        absent = [role for role in made if role not in bundle.models]
        if absent:
            raise Refused(f"{type(self).__name__} did not make {absent[0]!r}")
        return Outcome(change)


__all__ = [
    "Analysis",
    "Bundle",
    "BundlePass",
    "Change",
    "Claim",
    "Context",
    "Effect",
    "Field",
    "ModelPass",
    "Outcome",
    "Pass",
    "Program",
    "Refused",
    "RoleUse",
    "Sampling",
    "Tolerance",
    "edits",
    "every_model",
    "join_changes",
    "makes",
    "reads",
    "takes",
]
