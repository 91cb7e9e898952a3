"""Commands that look and change nothing: passes, inspect, view, schema."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer

from surgery.cli.shell import DebugOption, console_of_terminal, errors_said


def passes(
    name: Annotated[Optional[str], typer.Argument(help="A pass to explain.", show_default=False)] = None,  # noqa: UP045
    debug: DebugOption = False,
) -> None:
    """List the passes, or explain one with its options."""
    from surgery import registry
    from surgery.report.manual import list_passes, pass_page

    console = console_of_terminal()
    with errors_said(console, debug):
        if name is None:
            console.print(list_passes())
        else:
            console.print(pass_page(name, registry.find(name, Path.cwd())), markup=False)


def inspect(
    paths: Annotated[
        list[Path],
        typer.Argument(metavar="MODEL|FOLDER...", help="Models, or folders of them: an export, what a run wrote."),
    ],
    as_json: Annotated[bool, typer.Option("--json", help="Print everything that was found as JSON.")] = False,
    weights: Annotated[
        bool, typer.Option("--weights", help="Compare all bytes of weights that may be equal, not only samples.")
    ] = False,
    debug: DebugOption = False,
) -> None:
    """Say what models are and hold, and what the installed ONNX Runtime would refuse."""
    from surgery.report.inspection import inspect_paths, print_inspection

    console = console_of_terminal()
    with errors_said(console, debug):
        with console.status("looking") as status:
            found = inspect_paths(paths, is_proved=weights, progress=status.update)
        if as_json:
            typer.echo(found.as_json(), nl=False)
        else:
            print_inspection(console, found)


def view(
    path: Annotated[
        Path,
        typer.Argument(metavar="MODEL|FOLDER|RUN", help="A model, a folder of them, or what a run wrote."),
    ],
    host: Annotated[str, typer.Option("--host", help="Listen here; localhost lets no other machine in.")] = "localhost",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Listen here; 0 takes any free one.")] = 8080,
    no_browser: Annotated[bool, typer.Option("--no-browser", help="Only print the address.")] = False,
    debug: DebugOption = False,
) -> None:
    """Show models, or every step of a run, in Netron; Ctrl-C ends it."""
    from surgery.viewer.viewing import view as view_models

    with errors_said(console_of_terminal(), debug):
        view_models(path, host=host, port=port, is_browser_wanted=not no_browser, say=typer.echo)


def schema(debug: DebugOption = False) -> None:
    """Print the JSON schema of recipes, with which editors complete and check them."""
    import json

    from surgery.report.manual import recipe_schema

    with errors_said(console_of_terminal(), debug):
        typer.echo(json.dumps(recipe_schema(), indent=1))
