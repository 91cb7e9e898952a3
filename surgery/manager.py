"""The manager: plans a list of steps without opening a model, and runs it in a straight line over a bundle."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from surgery.bundle import Bundle
from surgery.claims import Claim
from surgery.contract import Change, Context, Effect, Pass, RoleUse, Tolerance
from surgery.errors import RecipeError, StepFailed, SurgeryError
from surgery.facts import Fact, Facts
from surgery.options import did_you_mean
from surgery.provenance import mark, stamp
from surgery.recipe import Check, Step
from surgery.registry import givers

if TYPE_CHECKING:
    from surgery.accuracy.late import LateJudge
    from surgery.accuracy.verdict import Verdict


@dataclass(frozen=True)
class PlannedStep:
    """A step with the models that there are after it, and the facts that are known then."""

    step: Step
    roles: tuple[str, ...]
    facts: frozenset[tuple[type[Fact], str]]


def plan(steps: Sequence[Step], roles: Sequence[str], folder: Path = Path()) -> list[PlannedStep]:
    """Prove that every step finds the models and facts that it needs.

    Args:
        steps: The steps, in order.
        roles: The models that the source gives.
        folder: Where the recipe is; passes that could give a missing fact are looked for there.

    Raises:
        RecipeError: With one line for each step that cannot run.
    """
    mistakes: list[str] = []
    planned: list[PlannedStep] = []
    present = tuple(roles)
    facts: frozenset[tuple[type[Fact], str]] = frozenset()
    gone: dict[str, Step] = {}
    for step in steps:
        problem = _problem(step, present, facts, gone, folder)
        if problem:
            mistakes.append(f"{step.where}: {step}: {problem}" if step.where else f"{step}: {problem}")
        use = {use: step.pass_.roles(use, present) for use in RoleUse}
        taken = set(use[RoleUse.TAKES]) - set(use[RoleUse.MAKES])
        gone.update(dict.fromkeys(taken, step))
        changed = {*use[RoleUse.TAKES], *use[RoleUse.MAKES], *use[RoleUse.EDITS]}
        facts = frozenset(
            (kind, role) for kind, role in facts if role not in changed or kind in step.pass_.preserves
        ) | {(kind, role) for kind in step.pass_.gives for role in use[RoleUse.READS]}
        present = tuple(role for role in present if role not in taken)
        present += tuple(role for role in use[RoleUse.MAKES] if role not in present)
        planned.append(PlannedStep(step, present, facts))
    if mistakes:
        raise RecipeError("\n".join(mistakes))
    return planned


def _problem(
    step: Step,
    present: tuple[str, ...],
    facts: frozenset[tuple[type[Fact], str]],
    gone: Mapping[str, Step],
    folder: Path,
) -> str:
    """Say what keeps a step from running, or nothing."""
    pass_ = step.pass_
    wanted = [role for use in (RoleUse.TAKES, RoleUse.READS, RoleUse.EDITS) for role in pass_.roles(use, present)]
    for role in wanted:
        if wanted.count(role) > 1:
            return f"names the model {role!r} twice"
        if role in gone and role not in present:
            return f"the model {role!r} is gone: {gone[role]} took it"
        if role not in present:
            return f"there is no model {role!r} here{did_you_mean(role, present)}"
    for role in pass_.roles(RoleUse.MAKES, present):
        if role in present and role not in wanted:
            return f"would make {role!r}, which is there already; name it otherwise"
    for kind in pass_.needs:
        for role in wanted:
            if (kind, role) not in facts:
                return f"needs {kind.__name__} of {role!r}, which no earlier step gives{_who_gives(kind, folder)}"
    return ""


def _who_gives(kind: type[Fact], folder: Path) -> str:
    words = givers(kind, folder)
    return f"; put {words[0]} before it" if words else ""


@dataclass
class StepRecord:
    """What is known of a step; the watchers add to it.

    Args:
        number: Counted from 1; 0 is the source.
        word: The pass.
        before: The bundle that it was given.
        after: The bundle that it made.
        claims: What must hold between them.
    """

    number: int
    word: str
    before: Bundle
    after: Bundle
    claims: Sequence[Claim] = ()
    effect: Effect = Effect.EXACT
    tolerance: Tolerance = field(default_factory=Tolerance)
    change: Change = field(default_factory=lambda: Change(0, ""))
    seconds: float = 0.0
    check_seconds: float = 0.0
    peak_bytes: int | None = None
    judged: int = 0
    verdict: Verdict | None = None
    warnings: list[str] = field(default_factory=list)

    @property
    def is_source(self) -> bool:
        """This is line 0, the source itself."""
        return self.number == 0

    @property
    def name(self) -> str:
        """The step as errors call it."""
        return "the source" if self.is_source else f"step {self.number} ({self.word})"


class Watcher(Protocol):
    """Something that stands beside the line: it checks, times, records or saves."""

    def starting(self, number: int, word: str) -> None:
        """A step begins; 0 is the opening of the source."""

    def stepped(self, record: StepRecord) -> None:
        """A step is done; an error raised here stops the run and keeps the bundle from before the step."""


class Stopped(SurgeryError):
    """A run that a step stopped: the bundle before that step is intact.

    Args:
        cause: Why.
        step: The step at which it stopped, None for the source.
        bundle: The last good bundle.
    """

    def __init__(self, cause: SurgeryError, step: Step | None, bundle: Bundle) -> None:
        super().__init__(cause.message, hint=cause.hint)
        self.exit_code = cause.exit_code
        self.step = step
        self.bundle = bundle
        self.scratch: object = None


@dataclass
class Manager:
    """Runs steps over a bundle.

    Args:
        judge: Answers the questions of passes; given to watchers as well.
        watchers: Called in order after each step.
        check: The recipe's tolerances.
        scratch: A folder for files that live as long as the run.
        progress: Takes a sentence to show while a step works.
    """

    judge: LateJudge
    watchers: Sequence[Watcher]
    check: Check
    scratch: Path
    progress: Callable[[str], None] = lambda sentence: None

    def open(self, bundle: Bundle, seconds: float = 0.0, notes: Sequence[str] = ()) -> None:
        """Show the source to the watchers, as line 0.

        Args:
            bundle: The source.
            seconds: What it took to open or export it.
            notes: What was done to it on the way.

        Raises:
            Stopped: The source is not what it should be.
        """
        record = StepRecord(0, "source", bundle, bundle, change=Change(0, "; ".join(notes)), seconds=seconds)
        with _stopping(record, None):
            self._watch(record)

    def run(self, bundle: Bundle, steps: Sequence[Step]) -> Bundle:
        """Run the steps and return the bundle that comes out; the given one is not changed.

        Raises:
            Stopped: A step raised, left something invalid, or moved the answers too far.
        """
        facts = Facts()
        for step in steps:
            for watcher in self.watchers:
                watcher.starting(step.number, step.word)
            record = StepRecord(step.number, step.word, bundle, bundle.clone())
            self.progress(str(step))
            with _stopping(record, step):
                facts = self._apply(step.pass_, record, facts)
                self._watch(record)
            if record.change.count:
                self.judge.accept(record.claims, record.effect, record.tolerance)
            bundle = record.after
        return bundle

    def _watch(self, record: StepRecord) -> None:
        for watcher in self.watchers:
            self.progress(f"{record.name}: {type(watcher).__name__.lower()}")
            watcher.stepped(record)

    def _apply(self, pass_: Pass, record: StepRecord, facts: Facts) -> Facts:
        """Run one pass on `record.after`, and return the facts that hold afterwards."""
        record.effect = pass_.effect
        record.tolerance = tolerance_in_force(pass_, self.check)
        calls = self.judge.calls
        mark(record.after.models)
        start = time.perf_counter()
        outcome = pass_.apply(record.after, lambda role: self._context(pass_, record, facts, role))
        record.seconds = time.perf_counter() - start
        record.judged = self.judge.calls - calls
        record.change = outcome.change
        if record.change.count:
            stamp(record.before.models, record.after.models, f"{record.word} (step {record.number})")
        record.claims = all_claims(pass_, record.before, record.after)
        if not tuple(facts) and not outcome.facts:
            return facts
        identities = record.after.identities()
        return facts.surviving(identities, pass_.preserves).given(outcome.facts, identities)

    def _context(self, pass_: Pass, record: StepRecord, facts: Facts, role: str) -> Context:
        def judge(candidate: object) -> Verdict:
            models = candidate.models if isinstance(candidate, Bundle) else {**record.after.models, role: candidate}
            after = Bundle(models, record.before.config, record.before.generation_config)  # type: ignore[arg-type]
            claims = all_claims(pass_, record.before, after)
            return self.judge.judge(record.before, after, claims, record.effect, record.tolerance)

        return Context(
            config=record.before.config,
            generation_config=record.before.generation_config,
            facts=facts,
            tolerance=record.tolerance,
            scratch=self.scratch,
            role=role,
            feeds=lambda wanted, sampling=None: self.judge.feeds(record.before, wanted, sampling),
            run=self.judge.run,
            run_all=self.judge.run_all,
            judge=judge,
            progress=self.progress,
        )


def all_claims(pass_: Pass, before: Bundle, after: Bundle) -> tuple[Claim, ...]:
    """Return what a pass claims, and of the models that it neither takes nor makes that they answer as they did."""
    claims = tuple(pass_.claims(before, after))
    spoken_of = {role for claim in claims for role in claim.candidate.roles}
    for use in (RoleUse.TAKES, RoleUse.MAKES):
        spoken_of.update(pass_.roles(use, tuple(before.models)))
    others = [role for role in after.models if role in before.models and role not in spoken_of]
    return claims + tuple(Claim.same(role) for role in others)


def tolerance_in_force(pass_: Pass, check: Check) -> Tolerance:
    """Return the pass's own tolerance with what the recipe says over it."""
    limits = {name: getattr(check, name) for name in Tolerance.model_fields}
    return pass_.tolerance.model_copy(update={name: limit for name, limit in limits.items() if limit is not None})


@contextmanager
def _stopping(record: StepRecord, step: Step | None) -> Iterator[None]:
    """Turn whatever a step or its watchers raise into an error that names the step and keeps the bundle before it."""
    try:
        yield
    except SurgeryError as error:
        error.message = f"{record.name}: {error.message}"
        raise Stopped(error, step, record.before) from error
    except (Exception, SystemExit) as error:
        text = str(error).strip().splitlines()
        failure = StepFailed(f"{record.name}: raised {type(error).__name__}: {text[0] if text else '(no text)'}")
        raise Stopped(failure, step, record.before) from error
