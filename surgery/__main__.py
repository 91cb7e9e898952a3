"""The entry of `python -m surgery` and of the console script `surgery`."""

from __future__ import annotations

import gc
import sys
from pathlib import Path

from surgery.late_imports import import_late

OBJECTS_BETWEEN_COLLECTIONS = 100_000
"""Graphs are many small objects that all stay: Python's 700 means to look through them again and again, for nothing."""


def main() -> None:
    """Run the command line; the current directory is taken off the import path so that it can shadow nothing.

    `python -m` puts the current directory there and a console script does not; a user's own passes are found by the
    recipe's folder, the same way in both.
    """
    home = Path(__file__).resolve().parent.parent
    here = Path.cwd()
    if here != home:
        sys.path[:] = [entry for entry in sys.path if entry not in ("", str(here))]
    gc.set_threshold(OBJECTS_BETWEEN_COLLECTIONS, 50, 50)
    import_late()
    from surgery.cli import app

    app()


if __name__ == "__main__":
    main()
