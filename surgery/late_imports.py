"""Modules that load when something in them is first used, so that commands which use nothing of them start sooner."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from importlib.util import LazyLoader
from types import ModuleType

SYMPY = ("sympy", "onnx_ir._symbolic_shapes")
"""What onnx_ir calculates with sizes that have names by; importing it takes as long as all else in onnx_ir."""


class LateImports(MetaPathFinder):
    """Finds some modules as usual, and leaves loading them to the first look at an attribute.

    Args:
        names: Their full names.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._names = frozenset(names)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return a spec of one of the modules, None for all others."""
        spec = PathFinder.find_spec(fullname, path, target) if fullname in self._names else None
        if spec is not None and spec.loader is not None:
            spec.loader = LazyLoader(spec.loader)
        return spec


def import_late(names: Sequence[str] = SYMPY) -> None:
    """Import modules late in this process, but for those that are imported already."""
    sys.meta_path.insert(0, LateImports([name for name in names if name not in sys.modules]))
