"""The user's own data as samples: a Polygraphy `data_loader.py`, a `.npz`, or Polygraphy JSON."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from polygraphy.backend.common import InvokeFromScript
from polygraphy.exception import PolygraphyException
from polygraphy.json import load_json

from surgery.accuracy.feeds import Sample
from surgery.errors import RecipeError

FORMS = "a data_loader.py with load_data(), a .npz with one array for each input, or Polygraphy JSON"


def load_samples(path: Path, inputs: Iterable[str]) -> Iterator[Sample]:
    """Yield the samples of a file, one a feed.

    Args:
        path: The file; its ending says its form.
        inputs: The inputs that each feed must have, no more and no less.

    Raises:
        RecipeError: There is no such file, it is of no known form, it is empty, or a feed lacks an input.
    """
    names = list(inputs)
    if not path.is_file():
        raise RecipeError(f"check.data: there is no file {path}", hint=f"give {FORMS}")
    count = 0
    for number, feed in enumerate(_feeds(path)):
        _check_names(path, number, feed, names)
        arrays = {name: np.asarray(feed[name]) for name in names}
        batch = {str(array.shape[0]) for array in arrays.values() if array.ndim}
        yield Sample(f"{path.name}[{number}]", arrays, {"batch": ", ".join(sorted(batch)) or "1"})
        count += 1
    if count == 0:
        raise RecipeError(f"check.data: {path} gives no samples at all", hint=f"give {FORMS}")


def _feeds(path: Path) -> Iterable[Mapping[str, Any]]:
    try:
        if path.suffix == ".py":
            loaded: Iterable[Mapping[str, Any]] = InvokeFromScript(str(path), "load_data")()
            return list(loaded) if not isinstance(loaded, Iterator) else loaded
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as arrays:
                return [dict(arrays)] if arrays.files else []
        if path.suffix == ".json":
            return _json_feeds(load_json(str(path), description="input data"))
    except (PolygraphyException, OSError, ValueError) as error:
        raise RecipeError(f"check.data: cannot read {path}: {str(error).splitlines()[0]}", hint=f"give {FORMS}") from error
    except Exception as error:  # a user's script may raise anything
        raise RecipeError(f"check.data: {path} raised {type(error).__name__}: {error}") from error
    raise RecipeError(f"check.data: {path.name} is of no known form", hint=f"give {FORMS}")


def _json_feeds(content: Any) -> list[Mapping[str, Any]]:
    return list(content) if isinstance(content, list) else [content]


def _check_names(path: Path, number: int, feed: Any, names: list[str]) -> None:
    if not isinstance(feed, Mapping):
        raise RecipeError(f"check.data: sample {number} of {path} is a {type(feed).__name__}, not inputs by name")
    missing = [name for name in names if name not in feed]
    if missing:
        raise RecipeError(f"check.data: sample {number} of {path} lacks the input {missing[0]!r}; it has {sorted(feed)}")
    unknown = [name for name in feed if name not in names]
    if unknown:
        raise RecipeError(f"check.data: sample {number} of {path} has {unknown[0]!r}, which is no input; there is {names}")
