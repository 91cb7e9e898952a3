"""What all commands share: the terminal, how errors are said, paths as one types them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from rich.console import Console

    from surgery.bundle import Bundle

INTERRUPTED = 130

DebugOption = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
BundleArgument = Annotated[
    str,
    typer.Argument(
        metavar="BUNDLE",
        help="What a recipe takes as its source: a folder or file of .onnx, a Hugging Face folder or a Hub id.",
        show_default=False,
    ),
]
ThreadsOption = Annotated[
    int, typer.Option("--threads", min=0, max=1024, help="Threads; 0 for as many as there are cores.")
]
ProvidersOption = Annotated[
    Optional[list[str]],  # noqa: UP045 - typer reads annotations at run time
    typer.Option("--provider", help="Where ONNX Runtime runs: cpu, cuda, or a provider's name; more for a fallback."),
]

MOST_SEED = 2**32 - 1
"""The largest seed that numpy takes, which transformers seeds as well."""

_PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


def console_of_terminal(*, is_error: bool = False) -> Console:
    """Return a console on standard output, or on standard error: as wide as the terminal, 120 columns into a file."""
    from rich.console import Console

    width = None if (sys.stderr if is_error else sys.stdout).isatty() else 120
    return Console(soft_wrap=False, width=width, highlight=False, stderr=is_error)


@contextmanager
def errors_said(console: Console, debug: bool) -> Iterator[None]:
    """Say errors in a sentence on standard error and leave with their exit code."""
    from surgery.errors import SurgeryError

    try:
        yield
    except typer.Exit:
        raise
    except SurgeryError as error:
        if debug:
            raise
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(error.exit_code) from error
    except KeyboardInterrupt:
        typer.echo("interrupted: nothing was written", err=True)
        raise typer.Exit(INTERRUPTED) from None
    except BrokenPipeError:
        raise  # whoever reads has enough: typer leaves with 1 and says nothing
    except Exception as error:
        if debug:
            raise
        typer.echo(f"error: {type(error).__name__}: {error}\n  try: --debug shows where", err=True)
        raise typer.Exit(1) from error


def short(path: Path) -> str:
    """Return a path as one would type it from the current directory."""
    resolved = path.resolve()
    return str(resolved.relative_to(Path.cwd())) if resolved.is_relative_to(Path.cwd()) else str(resolved)


def numbers_in(text: str, option: str) -> tuple[int, ...]:
    """Return the numbers of a list such as `1,16,64`, each 1 or more.

    Raises:
        RecipeError: It holds something else.
    """
    from surgery.errors import RecipeError

    words = [word.strip() for word in text.split(",")]
    if not all(word.isdecimal() and int(word) for word in words):
        raise RecipeError(f"{option}: {text!r} is no list of numbers from 1 on", hint=f"{option} 1,16,64")
    return tuple(dict.fromkeys(int(word) for word in words))


def providers_named(words: Sequence[str] | None) -> tuple[str, ...]:
    """Return ONNX Runtime's names of providers; the CPU if none is named."""
    return tuple(_PROVIDERS.get(word.lower(), word) for word in words or ("cpu",))


def opened_bundle(source: str, scratch: Path, say: Callable[[str], None]) -> Bundle:
    """Open a source; what has to be exported lives in the scratch folder.

    Raises:
        SurgeryError: There is none, or it cannot be opened.
    """
    from surgery.recipe import Source
    from surgery.sources import find_source

    return find_source(Source(path=source), Path()).open(scratch, say).bundle


def refuse_no_file(path: str) -> None:
    """Find out before the work is done that a file could not be written; `-` is standard output.

    Raises:
        OutputError: Its folder is not there, it is a folder itself, or may not be written to.
    """
    from surgery.errors import OutputError

    file = Path(path)
    if path == "-":
        return
    if not file.parent.is_dir():
        raise OutputError(f"{path}: cannot be written: there is no folder {str(file.parent)!r}")
    if file.is_dir():
        raise OutputError(f"{path}: cannot be written: it is a folder")
    if not os.access(file if file.exists() else file.parent, os.W_OK):
        raise OutputError(f"{path}: cannot be written: it is not allowed")


def refuse_no_folder(path: Path) -> None:
    """Find out before the work is done that a folder could not be written into; it may still be made.

    Raises:
        OutputError: It, or what it would be made in, is no folder, or may not be written to.
    """
    from surgery.errors import OutputError

    there = next(place for place in (path, *path.absolute().parents) if place.exists())
    if not there.is_dir():
        raise OutputError(f"{path}: cannot be written: {str(there)!r} is no folder")
    if not os.access(there, os.W_OK):
        raise OutputError(f"{path}: cannot be written: it is not allowed")


def write_file(path: str, text: str) -> None:
    """Write a text to a file, or print it if the file is `-`.

    Raises:
        OutputError: The file cannot be written.
    """
    from surgery.errors import OutputError

    if path == "-":
        typer.echo(text, nl=False)
        return
    try:
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise OutputError(f"{path}: cannot be written: {error.strerror}") from error
