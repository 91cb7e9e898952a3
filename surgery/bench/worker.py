"""The process of one row: opens it, then runs a case whenever it is asked to."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Mapping
from typing import Any

from surgery.bench.cases import Case, Settings
from surgery.errors import SurgeryError


def main() -> None:
    """Answer questions, a line of JSON each, until there are no more.

    What libraries print goes to standard error: standard output holds answers only.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    row: Any = None
    try:
        for line in sys.stdin:
            question = json.loads(line)
            try:
                if "open" in question:
                    row, answer = _open(question)
                else:
                    answer = _run(row, Case(**question["case"]))
            except SurgeryError as error:
                answer = {"error": error.message, "hint": error.hint}
            except Exception as error:
                answer = {"error": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}
            print(json.dumps(answer), file=answers, flush=True)
    except KeyboardInterrupt:
        os._exit(0)  # the same key ended the one who asks


def _open(question: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    from surgery.bench.rows import open_row

    settings = question["settings"]
    row = open_row(question["open"], Settings(**{**settings, "providers": tuple(settings["providers"])}))
    return row, {"facts": row.facts}


def _run(row: Any, case: Case) -> dict[str, Any]:
    start = time.process_time()
    stamps = row.run(case)
    cpu_seconds = time.process_time() - start
    wanted = case.new_tokens or 1
    if len(stamps) != wanted:
        raise SurgeryError(f"made {len(stamps)} tokens, not {wanted}")
    return {"stamps": stamps, "cpu_seconds": cpu_seconds}
