"""Recipes: YAML to checked steps; every mistake is found before a model is opened and says file and line."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from typing import Annotated, Any, Literal, get_origin

from pydantic import Field, ValidationError

from surgery import registry
from surgery.contract import Pass
from surgery.errors import RecipeError
from surgery.options import Options, did_you_mean, explain
from surgery.sources import looks_like_a_path

KeyPath = tuple[str | int, ...]
Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[int, Field(ge=0)]
Word = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]


class Source(Options):
    """Where the models come from."""

    path: str = Field(
        description="A .onnx file, a folder or a pattern (models/*.onnx) of .onnx files, a Hugging Face folder, or a "
        "Hub id; relative to the recipe."
    )
    roles: dict[Word, str] | None = Field(
        None,
        min_length=1,
        description="Take these files, each as the model of a role: `prefill: a.onnx`; relative to the folder. Left "
        "out, a list in the folder or the files' names say what they are.",
    )
    names: Literal["canonical", "keep"] = Field(
        "canonical",
        description="canonical: the inputs and outputs of encoders and decoders that are recognised get the names that "
        "Optimum gives them; keep: they keep their own.",
    )
    opset: int | None = Field(
        None, ge=7, description="Export a Hugging Face model at this opset; left out, at the one that works best."
    )


class OutputTolerance(Options):
    """The tolerance of one output, where it differs from the one for all."""

    max_error: float | None = Field(None, ge=0, description="As check.max_error, for this output.")
    p999_error: float | None = Field(None, ge=0, description="As check.p999_error, for this output.")
    top1: float | None = Field(None, ge=0, le=1, description="As check.top1, for this output.")


HalfProvider = Literal[
    "CUDAExecutionProvider",
    "DmlExecutionProvider",
    "MIGraphXExecutionProvider",
    "TensorrtExecutionProvider",
    "WebGpuExecutionProvider",
]
"""Providers that compute float16 as such; the CPU's computes it in float32, so what it says is no verdict."""


class Check(Options):
    """How the answers are compared after every step."""

    max_error: float | None = Field(
        None, ge=0, description="Fail a close step when the largest error exceeds this share of the reference's RMS."
    )
    p999_error: float | None = Field(
        None, ge=0, description="Fail a close step when the 99.9th percentile of the errors exceeds this share."
    )
    top1: float | None = Field(
        None, ge=0, le=1, description="Fail a close step when the logits' arg max agrees in a smaller share."
    )
    outputs: dict[str, OutputTolerance] = Field(
        default_factory=dict, description="Tolerances of single outputs, by name."
    )
    batches: tuple[Positive, ...] = Field((1, 3), min_length=1, description="Feed these batch sizes.")
    lengths: tuple[Positive, ...] = Field((1, 2, 7, 100), min_length=1, description="Feed prompts of these lengths.")
    past: tuple[NotNegative, ...] = Field(
        (0, 1, 7, 99), min_length=1, description="Feed caches that hold so many tokens."
    )
    seed: int = Field(0, ge=0, description="Draw the feeds from this seed.")
    data: Path | dict[str, Path] | None = Field(
        None,
        description="Feed this instead: a data_loader.py with load_data(), a .npz or a folder of them, Polygraphy "
        "JSON, or a .txt with a prompt a line; by role if the source has several models.",
    )
    provider: HalfProvider | None = Field(
        None,
        description="Run what is in half precision on this provider of ONNX Runtime as well, which computes it; the "
        "emulation is judged beside it.",
    )
    prompts: tuple[str, ...] = Field(
        (),
        description="Texts that the finished bundle must continue as the source does, greedily; the answers are shown.",
    )
    max_new_tokens: int = Field(16, ge=1, description="Continue the prompts by at most so many tokens.")


class Output(Options):
    """Where the result goes."""

    folder: Path = Field(description="The folder to write, relative to the recipe.")
    layout: Literal["optimum", "hub", "shared", "single"] = Field(
        "optimum",
        description="optimum: X.onnx and X.onnx_data; hub: the same in a folder onnx, as transformers.js wants it; "
        "shared: one weights file for all models; single: no data files.",
    )
    overwrite: bool = Field(False, description="Replace what an earlier run has written to that folder.")


class Sections(Options):
    """A recipe: source, steps, check, output."""

    source: Source = Field(description="Where the models come from; a plain string is its path.")
    steps: tuple[dict[str, Any] | str, ...] = Field(
        min_length=1, description="The passes, in order; each a word, or `pass: word` and its options."
    )
    check: Check = Field(default_factory=Check, description="How the answers are compared after every step.")
    output: Output | None = Field(None, description="Where the result goes; a plain string is its folder.")


@dataclass(frozen=True)
class Step:
    """One step of a recipe: a pass with its options, and where it stands."""

    number: int
    word: str
    pass_: Pass
    where: str = ""

    def __str__(self) -> str:
        return f"step {self.number} ({self.word})"


@dataclass(frozen=True)
class Recipe:
    """A checked recipe.

    Args:
        path: Its file; None for one that was composed in Python.
        folder: What relative paths in it are relative to.
        plain: The plain content after all overrides, to be saved or run again.
        where_source: Where its source stands, for `located`; empty for one that was composed in Python.
    """

    source: Source
    steps: tuple[Step, ...]
    check: Check = field(default_factory=Check)
    output: Output | None = None
    path: Path | None = None
    folder: Path = field(default_factory=Path)
    plain: Mapping[str, Any] = field(default_factory=dict)
    where_source: str = ""


class _Places:
    """Where each key of a recipe stands, as `file:line` or as the override that set it."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._lines: dict[KeyPath, int] = {}
        self._overrides: dict[KeyPath, str] = {}

    def put(self, path: KeyPath, line: int) -> None:
        self._lines[path] = line

    def override(self, path: KeyPath, text: str) -> None:
        self._overrides[path] = text

    def of(self, path: KeyPath) -> str:
        """Return the place of the longest known beginning of a path, or the override of something in it."""
        inner = next((text for key, text in self._overrides.items() if path and key[: len(path)] == path), None)
        if inner is not None:
            return inner
        for length in range(len(path), -1, -1):
            if path[:length] in self._overrides:
                return self._overrides[path[:length]]
            if path[:length] in self._lines:
                return f"{self._file}:{self._lines[path[:length]]}"
        return str(self._file)


@contextlib.contextmanager
def located(where: str) -> Iterator[None]:
    """Put a place, such as a recipe's `where_source`, before what a `RecipeError` says; an empty place changes nothing.

    Raises:
        RecipeError: The same, with its place.
    """
    try:
        yield
    except RecipeError as error:
        if not where:
            raise
        raise RecipeError(f"{where}: {error.message}", hint=error.hint) from error


def load_recipe(
    file: Path, *, settings: Sequence[str] = (), source: str | None = None, out: Path | None = None
) -> Recipe:
    """Read and check a recipe.

    Args:
        file: The YAML file.
        settings: Overrides `key=value`; `check.seed=3`, `steps.1.min_bytes=64` or `dedup_weights.min_bytes=64`.
        source: Replaces `source.path`; relative to the current directory, unless it can only be a Hub id.
        out: Replaces `output.folder`, likewise.

    Raises:
        RecipeError: With one line for each mistake, each with its place.
    """
    tree, places = _read(file)
    for setting in settings:
        _apply_setting(tree, places, setting)
    if source is not None:
        _override_path(tree, places, "source", "path", _from_here(source, file.parent), "--source")
    if out is not None:
        _override_path(tree, places, "output", "folder", str(_user_path(str(out))), "--out")
    return _check(tree, places, file)


def _from_here(source: str, folder: Path) -> str:
    """Return a source of the command line as an absolute path, or as it is if it is a Hub id."""
    path = _user_path(source)
    if path.exists() or looks_like_a_path(source):
        return str(path)
    beside = (folder / source).resolve()
    if beside.exists():
        raise RecipeError(
            f"--source {source}: there is no {source!r} in the current folder, but there is one beside the recipe",
            hint=f"--source {beside}",
        )
    return source


def _user_path(text: str) -> Path:
    return Path(os.path.expanduser(text)).resolve()


def _read(file: Path) -> tuple[dict[str, Any], _Places]:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import MarkedYAMLError, YAMLError

    try:
        text = file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RecipeError(f"{file}: cannot read the recipe: {_reason(error)}") from error
    try:
        tree = YAML(typ="rt").load(text)
    except MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        problem = (error.problem or "not YAML").splitlines()[0]
        raise RecipeError(f"{file}:{line}: {problem}") from error
    except (YAMLError, ValueError) as error:  # a control character; a date that there is not
        raise RecipeError(f"{file}:1: not YAML: {str(error).splitlines()[0]}") from error
    places = _Places(file)
    if not isinstance(tree, dict):
        raise RecipeError(f"{file}:1: a recipe is a mapping with the keys 'source', 'steps', 'check', 'output'")
    return _plain(tree, (), places), places


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def _plain(node: Any, path: KeyPath, places: _Places) -> Any:
    """Turn what ruamel.yaml loads into plain Python values and note the line of each key.

    Raises:
        RecipeError: A value has a tag.
    """
    if isinstance(node, dict):
        lines = getattr(node, "lc", None)
        for key in node:
            if lines is not None and key in (lines.data or {}):  # a key that was merged in stands elsewhere
                places.put((*path, key), lines.key(key)[0] + 1)
        return {key: _plain(value, (*path, key), places) for key, value in node.items()}
    if isinstance(node, list):
        lines = getattr(node, "lc", None)
        for index in range(len(node)):
            if lines is not None:
                places.put((*path, index), lines.item(index)[0] + 1)
        return [_plain(value, (*path, index), places) for index, value in enumerate(node)]
    if isinstance(node, bool) or node is None:
        return node
    for kind in (str, int, float):
        if isinstance(node, kind):
            return kind(node)
    if type(node).__name__ == "TaggedScalar":
        raise RecipeError(f"{places.of(path)}: the tag '{node.tag}' means nothing here", hint="leave it out")
    return node


def _apply_setting(tree: dict[str, Any], places: _Places, setting: str) -> None:
    from ruamel.yaml import YAML
    from ruamel.yaml.error import YAMLError

    place = f"--set {setting}"
    key, equals, text = setting.partition("=")
    if not equals or not key:
        raise RecipeError(f"{place}: write key=value, such as check.seed=3 or steps.1.min_bytes=64")
    try:
        value = _plain(YAML(typ="safe").load(StringIO(text)), (), _Places(Path()))
    except (YAMLError, ValueError, RecursionError) as error:  # the last of an alias that contains itself
        raise RecipeError(f"{place}: {text!r} is not a YAML value") from error
    whole = key.rpartition(".")[0]
    *parents, last = _resolve_key(tree, key.split("."), place)
    node: Any = tree
    for index, part in enumerate(parents):
        node = _descend(node, part, place, tuple(parents[: index + 1]))
    if parents == ["steps"]:
        raise RecipeError(f"{place}: a step is set by its options, such as {key}.models=[decode]")
    if isinstance(node, list) or (str(last).isdecimal() and _is_list(parents)):
        raise RecipeError(f"{place}: replace the whole list: {whole}=[...]")
    if not isinstance(node, dict):
        raise RecipeError(f"{place}: {whole} has no options")
    node[last] = value
    places.override((*parents, last), place)


def _is_list(path: Sequence[str | int]) -> bool:
    """Is this an option of `check` that takes a list?"""
    option = Check.model_fields.get(str(path[1])) if len(path) == 2 and path[0] == "check" else None
    return option is not None and get_origin(option.annotation) is tuple


def _descend(node: Any, part: str | int, place: str, path: KeyPath) -> Any:
    if isinstance(node, dict):
        if isinstance(node.get(part), str) and part in ("source", "output"):
            node[part] = {"path" if part == "source" else "folder": node[part]}
        if node.get(part) is None:
            node[part] = {}
        return node[part]
    if isinstance(part, int) and isinstance(node, list):
        if isinstance(node[part], str):
            node[part] = {"pass": node[part]}
        return node[part]
    raise RecipeError(f"{place}: there is no {'.'.join(map(str, path))}")


def _resolve_key(tree: dict[str, Any], parts: list[str], place: str) -> KeyPath:
    """Turn `steps.1.x` (counted from 1, as tables count) or `dedup_weights.x` into the path in the tree."""
    steps = tree.get("steps")
    words = [_word(step) for step in steps] if isinstance(steps, list) else []
    if parts[0] == "steps" and len(parts) > 1:
        number = int(parts[1]) if parts[1].isdecimal() else 0
        if not 1 <= number <= len(words):
            raise RecipeError(f"{place}: there is no step {parts[1]!r}; steps count from 1 to {len(words)}")
        return ("steps", number - 1, *parts[2:])
    if parts[0] in Sections.model_fields:
        return tuple(parts)
    matches = [index for index, word in enumerate(words) if word == parts[0]]
    if len(matches) > 1:
        numbers = ", ".join(f"steps.{index + 1}" for index in matches)
        raise RecipeError(f"{place}: {parts[0]!r} is several steps; say which: {numbers}")
    if not matches:
        known = [*Sections.model_fields, *(word for word in words if word)]
        raise RecipeError(f"{place}: there is no {parts[0]!r} in the recipe{did_you_mean(parts[0], known)}")
    return ("steps", matches[0], *parts[1:])


def _word(step: Any) -> str:
    word = step.get("pass") if isinstance(step, dict) else step
    return word if isinstance(word, str) else ""


def _override_path(tree: dict[str, Any], places: _Places, section: str, key: str, value: str, place: str) -> None:
    options = tree.get(section)
    tree[section] = {**options, key: value} if isinstance(options, dict) else {key: value}
    places.override((section, key), f"{place} {value}")


def _check(tree: dict[str, Any], places: _Places, file: Path) -> Recipe:
    plain = copy.deepcopy(tree)
    for section, key in (("source", "path"), ("output", "folder")):
        if isinstance(tree.get(section), str):
            tree[section] = {key: tree[section]}
    folder = file.resolve().parent
    raw_steps = tree.get("steps")
    of_steps: list[str] = []
    steps = [
        _read_step(index, raw, folder, places, of_steps)
        for index, raw in enumerate(raw_steps if isinstance(raw_steps, list) else [])
    ]
    mistakes: list[str] = []
    sections: Sections | None = None
    try:
        sections = Sections.model_validate(tree)
    except ValidationError as error:
        said = explain(error, _known_keys(), tree)
        mistakes += [f"{places.of(path)}: {text}" for path, text in said if not _is_of_step(path) or not of_steps]
    mistakes += of_steps
    if mistakes or sections is None:
        raise RecipeError("\n".join(mistakes))
    return Recipe(
        source=sections.source,
        steps=tuple(step for step in steps if step is not None),
        check=sections.check,
        output=sections.output,
        path=file,
        folder=folder,
        plain=plain,
        where_source=places.of(("source", "roles" if sections.source.roles else "path")),
    )


def _is_of_step(path: KeyPath) -> bool:
    """Is this in a step, whose own pass says what is wrong with it?"""
    return len(path) > 1 and path[0] == "steps"


def _known_keys() -> dict[str, Iterable[str]]:
    return {
        "": Sections.model_fields,
        "source": Source.model_fields,
        "check": Check.model_fields,
        "check.outputs": OutputTolerance.model_fields,
        "output": Output.model_fields,
    }


def _read_step(index: int, raw: Any, folder: Path, places: _Places, mistakes: list[str]) -> Step | None:
    path: KeyPath = ("steps", index)
    number = index + 1
    options = dict(raw) if isinstance(raw, dict) else {"pass": raw}
    word = options.pop("pass", None)
    if not isinstance(word, str):
        mistakes.append(f"{places.of(path)}: step {number}: needs 'pass', the word of a pass; see `surgery passes`")
        return None
    try:
        cls = registry.find(word, folder)
        pass_ = make_pass(cls, options, folder)
    except ValidationError as error:
        known = {"": option_names(cls)}
        mistakes += [
            f"{places.of((*path, *location))}: step {number} ({word}): {text}"
            for location, text in explain(error, known, options)
        ]
        return None
    except RecipeError as error:
        place = places.of((*path, "pass") if ("pass" in (raw if isinstance(raw, dict) else ())) else path)
        mistakes.append(f"{place}: step {number}: {error}")
        return None
    return Step(number, word, pass_, places.of(path))


def make_pass(cls: type[Pass], options: Mapping[str, Any], folder: Path) -> Pass:
    """Make a pass of its options; `folder` is what names of modules and relative paths in them are relative to."""
    made = cls.model_validate(options, context={"folder": folder})
    given = {name: getattr(made, name) for name in cls.model_fields}
    moved = {name: with_paths(value, lambda path: folder / path) for name, value in given.items() if has_path(value)}
    return made.model_copy(update=moved) if moved else made


def has_path(value: Any) -> bool:
    """Is this a path, or a list or mapping with one in it?"""
    return isinstance(value, Path) or any(map(has_path, _inside(value)))


def _inside(value: Any) -> Iterable[Any]:
    if isinstance(value, Mapping):
        return value.values()
    return value if isinstance(value, tuple) else ()


def with_paths(value: Any, change: Callable[[Path], Any]) -> Any:
    """Return the value of an option with every path in it changed."""
    if isinstance(value, Path):
        return change(value)
    if isinstance(value, Mapping):
        return {key: with_paths(entry, change) for key, entry in value.items()}
    return tuple(with_paths(entry, change) for entry in value) if isinstance(value, tuple) else value


def option_names(cls: type[Pass]) -> list[str]:
    """Return the options of a pass as recipes spell them."""
    return [field.alias or name for name, field in cls.model_fields.items()]
