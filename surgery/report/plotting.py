"""Pictures of measurements: one look for all of them, in colours that the colour-blind can tell apart."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from surgery.errors import OutputError, RecipeError, SurgeryError

BLUE, SKY, VERMILLION, ORANGE, GREEN, GREY = "#0072B2", "#56B4E9", "#D55E00", "#E69F00", "#009E73", "#595959"
"""Of the palette of Okabe and Ito, "Color Universal Design" (2008); grey for what is nobody's."""

FORMATS = ("svg", "png")

_LOOK = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.8,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "legend.frameon": False,
    "svg.hashsalt": "surgery",
}


def refuse_without_plots() -> None:
    """Find out before the work is done that no picture could be drawn.

    Raises:
        SurgeryError: matplotlib is not installed.
    """
    try:
        importlib.import_module("matplotlib.figure")
    except ImportError as error:
        raise SurgeryError(
            f"drawing needs matplotlib: {error}", hint="pip install 'graph-surgery[plots]', or leave the plot out"
        ) from error


def refuse_strange_format(path: Path) -> None:
    """Find out by its name that a picture could not be written.

    Raises:
        RecipeError: It is neither SVG nor PNG.
    """
    if path.suffix.removeprefix(".").lower() not in FORMATS:
        raise RecipeError(f"{path}: pictures are .svg or .png")


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Any]:
    """Give a figure of so many inches, and save it at the end.

    Raises:
        SurgeryError: matplotlib is not installed.
        OutputError: The file cannot be written.
    """
    refuse_without_plots()
    matplotlib = importlib.import_module("matplotlib")
    figures = importlib.import_module("matplotlib.figure")
    with matplotlib.rc_context(_LOOK):
        made = figures.Figure(figsize=(width, height), layout="constrained")
        yield made
        kind = path.suffix.removeprefix(".").lower()
        metadata = {"Date": None} if kind == "svg" else None  # the same numbers give the same file
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            made.savefig(path, format=kind, dpi=150, metadata=metadata)
        except OSError as error:
            raise OutputError(f"{path}: cannot be written: {error.strerror or error}") from error


def plain_numbers(axis: Any) -> None:
    """Write the numbers of a logarithmic axis out: 50, 100, 200, not powers of ten."""
    ticker = importlib.import_module("matplotlib.ticker")
    axis.set_major_locator(ticker.LogLocator(base=10, subs=(1, 2, 5)))
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, position: f"{value:g}"))
    axis.set_minor_formatter(ticker.NullFormatter())
    axis.set_minor_locator(ticker.NullLocator())
