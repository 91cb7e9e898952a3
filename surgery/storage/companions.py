"""What travels with the models, written so that readers of other tools and versions take it as it is."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

CONFIG = "config.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
JS_CONFIG, HAS_DATA = "transformers.js_config", "use_external_data_format"

Files = Mapping[str, bytes | Path]


def for_other_tools(files: Files, data_files: Sequence[str]) -> dict[str, bytes | Path]:
    """Return companions of a bundle with what transformers 4 (Optimum) and transformers.js need to load them.

    transformers 5 writes two things into a `tokenizer_config.json` that transformers 4.57 refuses: the class
    `TokenizersBackend`, and further special tokens as a list under `extra_special_tokens`. All read the older spelling.
    transformers.js fetches the weights beside a graph only if `transformers.js_config` in `config.json` says that there
    are such (`src/models/session.js`: `use_external_data_format`, the number of files of each graph).

    Args:
        files: The companions by name; what is no JSON object stays as it is.
        data_files: The names of the data files `X.onnx_data`, each of one graph `X.onnx`.
    """
    changes: Mapping[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
        TOKENIZER_CONFIG: _as_of_version_4,
        CONFIG: lambda config: _with_data_files(config, data_files),
    }
    made = dict(files)
    for name, change in changes.items():
        content = _read(files.get(name))
        if content is not None and change(content) != content:
            made[name] = (json.dumps(change(content), indent=2, ensure_ascii=False) + "\n").encode()
    return made


def _with_data_files(config: Mapping[str, Any], data_files: Sequence[str]) -> dict[str, Any]:
    given = config.get(JS_CONFIG)
    own = {**given} if isinstance(given, dict) else {}
    own.pop(HAS_DATA, None)
    if data_files:
        own[HAS_DATA] = {PurePosixPath(name).name.removesuffix("_data"): 1 for name in data_files}
    rest = {key: value for key, value in config.items() if key != JS_CONFIG}
    return {**rest, JS_CONFIG: own} if own else rest


def _as_of_version_4(config: Mapping[str, Any]) -> dict[str, Any]:
    older = dict(config)
    if older.get("tokenizer_class") == "TokenizersBackend":
        older["tokenizer_class"] = "PreTrainedTokenizerFast"
        older.pop("backend", None)
    if isinstance(older.get("extra_special_tokens"), list):
        extra = older.pop("extra_special_tokens")
        older.setdefault("additional_special_tokens", extra)
    return older


def _read(content: bytes | Path | None) -> dict[str, Any] | None:
    if content is None:
        return None
    try:
        found = json.loads(content.read_bytes() if isinstance(content, Path) else content)
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) else None
