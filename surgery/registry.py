"""Where passes come from: files of the package `passes`, the entry-point group `surgery.passes`, or `module:Class`."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from surgery.contract import Pass
from surgery.errors import RecipeError
from surgery.options import did_you_mean

GROUP = "surgery.passes"
PACKAGE = "passes"
HOME = Path(__file__).resolve().parent.parent / PACKAGE


def register(cls: type[Pass]) -> type[Pass]:
    """Check that a pass is where its recipe word says: class `DedupWeights` in the file `dedup_weights.py`."""
    word = cls.__module__.rpartition(".")[2]
    if snake_case(cls.__name__) != word:
        raise RecipeError(f"class {cls.__name__} must be in {snake_case(cls.__name__)}.py, it is in {word}.py")
    return cls


def snake_case(name: str) -> str:
    """Return `dedup_weights` for `DedupWeights`."""
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def word_of(pass_: Pass) -> str:
    """Return the word by which recipes, tables and folders call a pass."""
    return snake_case(type(pass_).__name__)


def words() -> list[str]:
    """Return the words of all passes that are installed, built in or from entry points; imports none of them."""
    built_in = [module.name for module in pkgutil.iter_modules([str(HOME)])]
    return sorted({*built_in, *(entry.name for entry in _entry_points())})


def find(word: str, folder: Path) -> type[Pass]:
    """Return the class of a pass.

    Args:
        word: A registered word, or `module:Class`.
        folder: Where `module` is looked for first: the recipe's folder.

    Raises:
        RecipeError: There is no such pass, or it cannot be imported.
    """
    if ":" in word:
        return as_pass_class(resolve(word, folder), word)
    entry = next((entry for entry in _entry_points() if entry.name == word), None)
    if entry is not None:
        with _import_errors_of(f"the plug-in pass {word!r}"):
            return as_pass_class(entry.load(), word)
    if word not in words():
        raise RecipeError(f"unknown pass {word!r}{did_you_mean(word, words())}")
    module = importlib.import_module(f"{_built_in_package().__name__}.{word}")
    classes = [cls for cls in vars(module).values() if _is_pass_of(cls, module)]
    named = [cls for cls in classes if snake_case(cls.__name__) == word]
    assert len(named) == 1, f"passes/{word}.py must hold the one class that its name says"
    return as_pass_class(named[0], word)


def _is_pass_of(candidate: Any, module: ModuleType) -> bool:
    return inspect.isclass(candidate) and issubclass(candidate, Pass) and candidate.__module__ == module.__name__


def _entry_points() -> tuple[EntryPoint, ...]:
    return tuple(entry_points(group=GROUP))


def _built_in_package() -> ModuleType:
    """Import `passes` from beside `surgery`, whatever folder of that name lies in the current directory."""
    known = sys.modules.get(PACKAGE)
    if known is not None and str(HOME) in list(getattr(known, "__path__", ())):
        return known
    if known is not None:
        raise RecipeError(
            f"another package named {PACKAGE!r} is imported, from {getattr(known, '__path__', '?')}",
            hint="import surgery.registry before it, or rename it",
        )
    spec = importlib.util.spec_from_file_location(PACKAGE, HOME / "__init__.py", submodule_search_locations=[str(HOME)])
    assert spec is not None
    assert spec.loader is not None
    package = importlib.util.module_from_spec(spec)
    sys.modules[PACKAGE] = package
    spec.loader.exec_module(package)
    return package


def as_pass_class(found: Any, word: str) -> type[Pass]:
    """Accept a `Pass`; wrap an `onnx_ir` pass; refuse anything else by saying what to write."""
    from onnx_ir.passes import PassBase

    from surgery.irpass import wrap_ir_pass

    if inspect.isclass(found) and issubclass(found, Pass):
        return found
    if inspect.isclass(found) and issubclass(found, PassBase):
        return wrap_ir_pass(found)
    if inspect.isfunction(found):
        raise RecipeError(f"{word!r} is a function, not a pass", hint=f"pass: graphsurgeon, function: {word}")
    raise RecipeError(f"{word!r} is {found!r}, neither a surgery Pass nor an onnx_ir pass")


def resolve(reference: str, folder: Path) -> Any:
    """Return the object that `module:name` or `path/to/file.py:name` names.

    Args:
        reference: The module is looked for in the folder first, and then among the installed ones.
        folder: Also what a relative path is relative to.

    Raises:
        RecipeError: There is no such module or name, or the module cannot be imported.
    """
    match = re.fullmatch(r"(?P<module>.+\.py|[A-Za-z_][\w.]*):(?P<name>[A-Za-z_]\w*)", reference)
    if match is None:
        raise RecipeError(f"{reference!r} is not of the form 'module:name'")
    module = _load_module(match["module"], folder)
    if not hasattr(module, match["name"]):
        public = [known for known in vars(module) if not known.startswith("_")]
        raise RecipeError(f"module {match['module']!r} has no {match['name']!r}{did_you_mean(match['name'], public)}")
    return getattr(module, match["name"])


def module_file(module: str, folder: Path) -> Path | None:
    """Return the file beside a recipe that a module's name or path means, None if there is none."""
    if module.endswith(".py"):
        return folder / module
    stem = folder.joinpath(*module.split("."))
    return next((file for file in (stem.with_suffix(".py"), stem / "__init__.py") if file.is_file()), None)


def _load_module(name: str, folder: Path) -> ModuleType:
    file = module_file(name, folder)
    with _import_errors_of(f"module {name!r} (looked for in {folder} and among installed modules)"):
        return importlib.import_module(name) if file is None else _load_file(file, file.parent)


def _load_file(file: Path, folder: Path) -> ModuleType:
    """Import a user's file under a name of its own, so that it can shadow nothing; its siblings are importable.

    A sibling file is the same module however it is reached, so that the facts it declares are the same classes. An
    `import` of a sibling must stand at the top: one in a function runs when the siblings are out of reach again.
    """
    name = _user_name(file)
    known = sys.modules.get(name)
    if known is not None:
        return known
    if PACKAGE not in sys.modules:
        _built_in_package()  # else `from passes.x import Y` in the file would find a folder beside the recipe
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    siblings = _Siblings(folder)
    sys.meta_path.insert(0, siblings)
    sys.path.insert(0, str(folder))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    finally:
        sys.path.remove(str(folder))
        sys.meta_path.remove(siblings)
    return module


def _user_name(file: Path) -> str:
    """Return the name under which a user's file is imported."""
    return "surgery_user_" + re.sub(r"\W", "_", str(file.resolve()))


class _Siblings(MetaPathFinder):
    """Finds `import helper` as the file helper.py of a folder, and imports it under the name of a user's file.

    `import` takes whatever module the spec that it is given loads, and stores it under the spec's own name: the plain
    name is never taken. Packages are left to `sys.path`, since their parts are looked up by the plain name.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Return the spec of a sibling file, None for anything else."""
        file = self._folder / f"{fullname}.py"
        if path is not None or "." in fullname or not file.is_file():
            return None
        name = _user_name(file)
        known = sys.modules.get(name)
        if known is not None:
            return ModuleSpec(name, _Known(known), origin=str(file))
        return importlib.util.spec_from_file_location(name, file)


class _Known(Loader):
    """Gives a module that was imported before, or is being imported."""

    def __init__(self, module: ModuleType) -> None:
        self._module = module
        self._spec = module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        """Return the module."""
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        """Run nothing; only take back the spec, which the import has replaced."""
        module.__spec__ = self._spec


@contextlib.contextmanager
def _import_errors_of(what: str) -> Iterator[None]:
    try:
        yield
    except RecipeError:
        raise
    except (Exception, SystemExit) as error:  # a script that is no module ends the process when imported
        raise RecipeError(f"cannot import {what}: {type(error).__name__}: {error}") from error


def givers(kind: type, folder: Path) -> list[str]:
    """Return the words of the installed passes that give a fact of this type."""
    return [word for word in words() if kind in find(word, folder).gives]
