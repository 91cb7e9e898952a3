"""Commands on recipes: run and plan."""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

from surgery.cli.shell import DebugOption, console_of_terminal, errors_said, short

if TYPE_CHECKING:
    from rich.console import Console

    from surgery.manager import StepRecord, Stopped
    from surgery.pipeline import Result
    from surgery.recipe import Recipe
    from surgery.storage import SavedFile

SHOWN_DETAILS = 8

RecipeFile = Annotated[Path, typer.Argument(metavar="RECIPE", help="The recipe, a YAML file.", show_default=False)]
Settings = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads annotations at run time
    typer.Option("--set", metavar="KEY=VALUE", help="Override an option: check.seed=3, steps.1.min_bytes=64."),
]
SourceOption = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--source", help="Take this source instead; relative to the current directory."),
]
OutOption = Annotated[
    Optional[Path],  # noqa: UP045
    typer.Option("--out", help="Write to this folder instead; relative to the current directory."),
]


def run(
    recipe_file: RecipeFile,
    settings: Settings = None,
    source: SourceOption = None,
    out: OutOption = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what stands in the output folder.")] = False,
    no_check: Annotated[bool, typer.Option("--no-check", help="Check nothing: neither validity nor answers.")] = False,
    keep_steps: Annotated[
        bool, typer.Option("--keep-steps", help="Save the models after every step beside the output, in OUT.steps.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Run a recipe: open the source, apply each step, check it, save the result."""
    from surgery.pipeline import refuse_taken_output, run_recipe, save_result
    from surgery.recipe import load_recipe

    console = console_of_terminal()
    with errors_said(console, debug):
        recipe = load_recipe(recipe_file, settings=settings or (), source=source, out=out)
        if overwrite and recipe.output is not None:
            recipe = _overwriting(recipe)
        refuse_taken_output(recipe)
        steps_folder = _steps_folder(recipe) if keep_steps else None
        with console.status("starting") as status:

            def say(text: str) -> None:
                status.update(text)

            with _rescuing(recipe, debug):
                result = run_recipe(
                    recipe,
                    is_checked=not no_check,
                    show=lambda record: _show(console, record),
                    say=say,
                    keep_steps=steps_folder,
                )
        with result:
            _summarise(console, result)
            if recipe.output is not None:
                start = time.perf_counter()
                with console.status("saving") as status:
                    folder, files = save_result(result, recipe.output, recipe.folder, status.update)
                _list_files(console, folder, files, time.perf_counter() - start)
            else:
                console.print("\nnothing is saved: the recipe has no output; --out FOLDER gives it one")
            if steps_folder is not None:
                console.print(f"every step: {short(steps_folder)}")


def plan(
    recipe_file: RecipeFile,
    settings: Settings = None,
    source: SourceOption = None,
    out: OutOption = None,
    debug: DebugOption = False,
) -> None:
    """Check a recipe and show what it would do; no model is opened."""
    from rich.table import Table

    from surgery.errors import OutputError
    from surgery.pipeline import plan_recipe, refuse_taken_output
    from surgery.recipe import load_recipe

    console = console_of_terminal()
    with errors_said(console, debug):
        recipe = load_recipe(recipe_file, settings=settings or (), source=source, out=out)
        roles, planned = plan_recipe(recipe)
        table = Table(box=None, pad_edge=False, header_style="bold")
        for heading in ("#", "step", "effect", "models after it", "options"):
            table.add_column(heading)
        table.add_row("0", "source", "", ", ".join(roles), recipe.source.path)
        for entry in planned:
            pass_ = entry.step.pass_
            options = pass_.model_dump(exclude_unset=True, by_alias=True)
            said = ", ".join(f"{name}: {value}" for name, value in options.items())
            table.add_row(str(entry.step.number), entry.step.word, pass_.effect.value, ", ".join(entry.roles), said)
        console.print(table)
        if recipe.output is not None:
            console.print(f"output: {short(recipe.folder / recipe.output.folder)}, layout {recipe.output.layout}")
            try:
                refuse_taken_output(recipe)
            except OutputError as error:
                console.print(f"note: {error}", markup=False)


@contextmanager
def _rescuing(recipe: Recipe, debug: bool) -> Iterator[None]:
    """When a step stops the run, say why, and save its input and the rest of the recipe."""
    from surgery.manager import Stopped

    try:
        yield
    except Stopped as error:
        if error.step is None:
            raise
        typer.echo(f"error: {error}", err=True)
        _rescue(recipe, error)
        if debug:
            raise
        raise typer.Exit(error.exit_code) from error


def _rescue(recipe: Recipe, stopped: Stopped) -> None:
    from surgery.errors import SurgeryError
    from surgery.pipeline import rescue

    assert stopped.step is not None
    folder = _stopped_folder(recipe)
    try:
        saved = rescue(recipe, stopped.step.number, stopped.bundle, folder)
    except (SurgeryError, OSError) as error:
        typer.echo(f"the input of {stopped.step} could not be saved: {error}", err=True)
        return
    typer.echo(
        f"the input of {stopped.step} is saved; to go on from there: python -m surgery run {short(saved)}", err=True
    )


def _stopped_folder(recipe: Recipe) -> Path:
    """Return where to save what a stopped run leaves: beside the output, never over the source or files of the user."""
    if recipe.output is not None:
        target = (recipe.folder / recipe.output.folder).resolve()
    else:
        assert recipe.path is not None
        target = Path.cwd() / recipe.path.stem
    source = (recipe.folder / recipe.source.path).resolve()
    names = (f"{target.name}.stopped{'.again' * count}" for count in itertools.count())
    folders = (target.with_name(name) for name in names)
    return next(folder for folder in folders if folder not in (source, *source.parents) and _may_replace(folder))


def _may_replace(folder: Path) -> bool:
    """Say whether a folder is not there, empty, or saved by an earlier run."""
    if not folder.exists():
        return True
    return folder.is_dir() and ((folder / "bundle.json").is_file() or not any(folder.iterdir()))


def _steps_folder(recipe: Recipe) -> Path:
    from surgery.errors import OutputError, RecipeError

    if recipe.output is None:
        raise RecipeError("--keep-steps needs an output folder", hint="--out FOLDER")
    target = (recipe.folder / recipe.output.folder).resolve()
    folder = target.with_name(f"{target.name}.steps")
    if not _may_replace(folder):
        raise OutputError(f"{folder} is not from an earlier run", hint="move it away, or another --out")
    return folder


def _overwriting(recipe: Recipe) -> Recipe:
    from dataclasses import replace

    assert recipe.output is not None
    return replace(recipe, output=recipe.output.model_copy(update={"overwrite": True}))


def _show(console: Console, record: StepRecord) -> None:
    """Print one line for a step that is done."""
    gap = ""
    if record.verdict is not None and record.verdict.step is not None:
        gap = f": gap to PyTorch {record.verdict.step}" if record.is_source else f": {record.verdict.step}"
    seconds = f"{record.seconds + record.check_seconds:.1f} s"
    change = record.change.summary or "nothing to do"
    if record.is_source:
        change = f"opened; {record.change.summary}" if record.change.summary else "opened"
    console.print(f"step {record.number} {record.word}{gap}; {change} ({seconds})", markup=False)
    for line in record.change.details[:SHOWN_DETAILS]:
        console.print(f"  {line}", markup=False)
    hidden = len(record.change.details) - SHOWN_DETAILS
    if hidden > 0:
        console.print(f"  and {hidden} more in report.json", markup=False)


def _summarise(console: Console, result: Result) -> None:
    from surgery.report.ledger import coverage_lines, ledger_table

    console.print()
    console.print(ledger_table(result.records))
    lines = coverage_lines(result.records)
    if lines:
        console.print("\nchecked on")
        for line in lines:
            console.print(f"  {line}", markup=False)
    for record in result.records:
        for warning in record.warnings:
            console.print(f"warning: {record.name}: {warning}", markup=False)
    for answer in result.answers:
        console.print(f"\n{answer.prompt} -> {answer.text}", markup=False)


def _list_files(console: Console, folder: Path, files: list[SavedFile], seconds: float) -> None:
    from surgery.units import in_bytes

    console.print(f"\nsaved to {short(folder)} ({seconds:.1f} s)", markup=False)
    for file in files:
        console.print(f"  {file.name}  {in_bytes(file.bytes)}", markup=False)
