"""Pipelines: a source, steps and checks put together and run, from Python or from a recipe."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from contextlib import closing, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from surgery.bundle import Bundle
from surgery.contract import Pass
from surgery.errors import Inaccurate, OutputError, RecipeError
from surgery.manager import Manager, PlannedStep, StepRecord, Stopped, Watcher, plan
from surgery.options import did_you_mean
from surgery.recipe import Check, Output, Recipe, Source, Step, located
from surgery.registry import find, word_of
from surgery.sources import Given, SourceKind, find_source
from surgery.units import in_bytes

if TYPE_CHECKING:
    from surgery.accuracy.judge import Judge
    from surgery.accuracy.late import LateJudge
    from surgery.accuracy.runners import Reference
    from surgery.runtime.prompts import Answer
    from surgery.storage import SavedFile

Show = Callable[[StepRecord], None]
Say = Callable[[str], None]


@dataclass
class Result:
    """What a run gave.

    Args:
        bundle: The models; tensors that passes made may live in files of the run until they are saved.
        records: The ledger: line 0 is the source, then one for each step.
        answers: What the finished bundle said to the recipe's prompts.
        source: What the run started from, as it was given.
        check: How it was checked; None if it was not.
        inputs: The files and folders that a save must not touch.
        scratch: The folder of those files; it goes when this does.
    """

    bundle: Bundle
    records: list[StepRecord]
    answers: list[Answer] = field(default_factory=list)
    source: str = ""
    check: Check | None = None
    inputs: tuple[Path, ...] = ()
    scratch: tempfile.TemporaryDirectory[str] | None = None

    def save(
        self,
        folder: str | Path,
        *,
        layout: str = "optimum",
        overwrite: bool = False,
        report: bool = True,
        progress: Callable[[int, int], None] | None = None,
    ) -> list[SavedFile]:
        """Write the models, what travels along, and `report.json` to a folder, all at once or not at all.

        Args:
            folder: The folder; new, unless `overwrite`.
            layout: `optimum`, `hub`, `shared` or `single`, as in a recipe.
            overwrite: Replace what an earlier run has written there; files that are not ours stay.
            report: Write `report.json` too.
            progress: Called with the bytes that are written and those that will be.

        Raises:
            OutputError: The folder is taken, is the source itself, or the disk is full.
        """
        from surgery.report.ledger import report_json
        from surgery.storage import save_models

        extras = dict(self.bundle.files)
        if report:
            extras["report.json"] = report_json(self).encode()
        options = Output(folder=Path(folder), layout=layout, overwrite=overwrite)  # type: ignore[arg-type]
        return save_models(
            self.bundle.models,
            options.folder,
            layout=options.layout,
            extras=extras,
            overwrite=options.overwrite,
            protected=self.inputs,
            progress=progress,
        )

    def table(self) -> str:
        """Return the ledger as text."""
        from surgery.report.ledger import ledger_text

        return ledger_text(self.records)

    def __enter__(self) -> Result:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.scratch is not None:
            self.scratch.cleanup()


@dataclass(frozen=True)
class Pipeline:
    """Passes in order, and how their results are checked.

    Args:
        passes: Passes, or the words of passes that need no options.
        check: Tolerances and feeds; `None` checks nothing.
    """

    passes: Sequence[Pass | str]
    check: Check | None = field(default_factory=Check)

    def run(self, source: str | Path | Source | Bundle, *, progress: Say = lambda text: None) -> Result:
        """Run the passes over a source.

        Args:
            source: What a recipe takes as `source.path`, relative to the current directory; a `Source` with more of its
                options; or a bundle.
            progress: Takes a sentence to show while something works.

        Raises:
            SurgeryError: What stopped the run.
        """
        steps = [_as_step(number, pass_) for number, pass_ in enumerate(self.passes, 1)]
        given = source if isinstance(source, Bundle) else None
        path = "(a bundle)" if given is not None else str(source)
        options = source if isinstance(source, Source) else Source(path=path)
        recipe = Recipe(options, tuple(steps), self.check or Check())
        return run_recipe(recipe, is_checked=self.check is not None, say=progress, bundle=given)


def _as_step(number: int, pass_: Pass | str) -> Step:
    if isinstance(pass_, type):
        raise RecipeError(f"step {number} is the class {pass_.__name__}, not a pass", hint=f"{pass_.__name__}(...)")
    made = find(pass_, Path())() if isinstance(pass_, str) else pass_
    return Step(number, pass_ if isinstance(pass_, str) else word_of(made), made)


def plan_recipe(recipe: Recipe) -> tuple[tuple[str, ...], list[PlannedStep]]:
    """Return the source's roles and the planned steps; no model is opened."""
    roles = _source_of(recipe).roles
    planned = plan(recipe.steps, roles, recipe.folder)
    _refuse_check(recipe, roles, planned)
    return roles, planned


def _source_of(recipe: Recipe) -> SourceKind:
    with located(recipe.where_source):
        return find_source(recipe.source, recipe.folder)


def _refuse_check(recipe: Recipe, roles: Sequence[str], planned: Sequence[PlannedStep]) -> None:
    """Find out before a model is opened what the check could not do.

    Raises:
        RecipeError: Data for a model or from a file that is not there, prompts for models that cannot generate.
    """
    data = recipe.check.data
    for role, path in data.items() if isinstance(data, dict) else [(None, data)]:
        if role is not None and role not in roles:
            raise RecipeError(f"check.data: the source has no model {role!r}{did_you_mean(role, roles)}")
        if path is not None and not (recipe.folder / path).exists():
            raise RecipeError(f"check.data: there is no file or folder {recipe.folder / path}")
    if recipe.check.prompts:
        from surgery.runtime.prompts import roles_of_prompts

        for there in (roles, *(step.roles for step in planned[-1:])):
            roles_of_prompts(there)


def run_recipe(
    recipe: Recipe,
    *,
    is_checked: bool = True,
    show: Show = lambda record: None,
    say: Say = lambda text: None,
    keep_steps: Path | None = None,
    bundle: Bundle | None = None,
) -> Result:
    """Run a recipe, without saving its result.

    Args:
        recipe: The recipe.
        is_checked: Check validity and accuracy after every step.
        show: Called with each line of the ledger as it is done.
        say: Takes a sentence to show while something works.
        keep_steps: A new folder for the models after every step.
        bundle: An opened source; None opens the recipe's.

    Raises:
        Stopped: A step stopped the run; the bundle before it is in the error.
        SurgeryError: The source cannot be opened, or the recipe does not fit it.
    """
    from surgery.accuracy.late import LateJudge
    from surgery.runtime.prompts import refuse_unanswerable
    from surgery.watchers import Accuracy, Ledger, Snapshots, Validity

    source = _source_of(recipe) if bundle is None else Given(bundle)
    planned = plan(recipe.steps, source.roles, recipe.folder)
    _refuse_check(recipe, source.roles, planned)
    scratch = tempfile.TemporaryDirectory(prefix="surgery-", ignore_cleanup_errors=True)
    ledger = Ledger(show)
    ledger.starting(0, "source")
    say(f"opening {recipe.source.path}")
    start = time.perf_counter()
    opened = source.open(Path(scratch.name), say)
    seconds = time.perf_counter() - start
    reference = opened.reference if is_checked else None
    with closing(LateJudge(partial(_judge_of, opened.bundle, recipe, reference))) as judge:
        del reference
        opened = replace(opened, reference=None)  # the judge lets go of it after line 0, and so must we
        snapshots = Snapshots()
        checks: list[Watcher] = [Validity(), Accuracy(judge)] if is_checked else []
        manager = Manager(judge, [*checks, snapshots, ledger], recipe.check, Path(scratch.name), say)
        try:
            if recipe.check.prompts:
                refuse_unanswerable(opened.bundle)
            manager.open(opened.bundle, seconds, opened.notes)
            finished = manager.run(opened.bundle, recipe.steps)
        except Stopped as error:
            error.scratch = scratch  # the bundle in the error may have weights there
            if keep_steps is not None:
                with suppress(OutputError):  # why the run stopped is what matters
                    snapshots.save(keep_steps)
            raise
        finally:
            ledger.close()
        if keep_steps is not None:
            say("saving every step")
            snapshots.save(keep_steps)
        is_asked = is_checked and recipe.check.prompts
        answers = _ask(recipe.check, judge, opened.bundle, finished) if is_asked else []
    check = recipe.check if is_checked else None
    return Result(finished, ledger.records, answers, recipe.source.path, check, opened.inputs, scratch)


def _judge_of(source: Bundle, recipe: Recipe, reference: Reference | None) -> Judge:
    from surgery.accuracy.judge import Judge

    return Judge(source, recipe.check, reference, recipe.folder)


def _ask(check: Check, judge: LateJudge, source: Bundle, finished: Bundle) -> list[Answer]:
    """Let the finished bundle continue the recipe's prompts.

    Raises:
        Inaccurate: It does not continue one as the source does.
    """
    from surgery.runtime.prompts import answer

    asked = answer(finished, check.prompts, check.max_new_tokens, judge.run)
    wanted = answer(source, check.prompts, check.max_new_tokens, judge.run)
    for got, want in zip(asked, wanted, strict=True):
        if got.tokens != want.tokens:
            raise Inaccurate(
                f"the prompt {got.prompt!r} is continued by {got.text!r}, by the source with {want.text!r}"
            )
    return asked


def rescue(recipe: Recipe, number: int, bundle: Bundle, folder: Path) -> Path:
    """Save the input of a step that failed and the rest of the recipe, so that one command runs it again.

    Args:
        recipe: The recipe that stopped.
        number: The step at which it stopped.
        bundle: What that step was given.
        folder: Where to save; an earlier rescue there is replaced.

    Returns:
        The saved recipe.
    """
    from surgery.report.rest import rest_of_recipe
    from surgery.storage import save_models

    source = recipe.folder / recipe.source.path
    text = rest_of_recipe(recipe, number, tuple(bundle.models))
    save_models(
        bundle.models,
        folder,
        layout="shared",
        extras={**bundle.files, "recipe.yaml": text.encode()},
        overwrite=True,
        protected=[source] if source.exists() else [],
    )
    return folder / "recipe.yaml"


def save_result(result: Result, output: Output, folder: Path, say: Say) -> tuple[Path, list[SavedFile]]:
    """Save a result where the recipe says, and say how far it is.

    Raises:
        OutputError: As `Result.save`.
    """
    target = folder / output.folder

    def progress(done: int, total: int) -> None:
        say(f"saving {in_bytes(done)} of {in_bytes(total)}")

    files = result.save(target, layout=output.layout, overwrite=output.overwrite, progress=progress)
    return target, files


def refuse_taken_output(recipe: Recipe) -> None:
    """Find out before the work is done that its result could not be saved.

    Raises:
        OutputError: The folder exists and may not be replaced.
    """
    if recipe.output is None:
        return
    target = (recipe.folder / recipe.output.folder).resolve()
    source = (recipe.folder / recipe.source.path).resolve()
    if target == source or target in source.parents:
        raise OutputError(f"{target} is, or holds, the source, which is never written to", hint="another --out")
    if source in target.parents:
        raise OutputError(f"{target} is inside the source, which is never written to", hint="another --out")
    if target.exists() and not target.is_dir():
        raise OutputError(f"{target} is a file", hint="another --out")
    if target.exists() and any(target.iterdir()) and not recipe.output.overwrite:
        raise OutputError(f"{target} exists already", hint="--overwrite, or another --out")
