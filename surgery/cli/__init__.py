"""The command line: each group of commands is a file here."""

from __future__ import annotations

import typer

from surgery.cli.generating import generate
from surgery.cli.looking import inspect, passes, schema, view
from surgery.cli.measuring import bench, profile
from surgery.cli.recipes import plan, run

app = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Graph surgery for ONNX transformer models: passes in a line, each checked for what it did to the answers.",
    epilog="Exit codes: 0 done; 1 inaccurate or refused; 2 the recipe or the command is wrong; 3 a model file is "
    "malformed or unsafe.",
)

for command in (run, plan, passes, inspect, view, generate, bench, profile, schema):
    app.command()(command)
