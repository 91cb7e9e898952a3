"""The JSON files that travel with a model: config.json, generation_config.json."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from surgery.errors import ModelFileError


def read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    """Return the content of a JSON file.

    Args:
        path: The file.
        optional: A file that is not there is empty, instead of an error.

    Raises:
        ModelFileError: The file cannot be read, or is not a JSON object.
    """
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelFileError(f"{path}: not JSON: {error}") from error
    if not isinstance(content, dict):
        raise ModelFileError(f"{path}: not a JSON object")
    return content
