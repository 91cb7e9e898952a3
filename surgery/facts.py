"""Facts: what analyses found, each bound to the fingerprint of the model that it describes."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import onnx_ir as ir
from pydantic import ValidationError

from surgery.errors import RecipeError, Refused
from surgery.options import Options


class Fact(Options):
    """What an analysis found about one model; a plural noun by custom (`Ranges`)."""

    def save(self, path: Path, model: ir.Model) -> None:
        """Write the fact with the fingerprint of the model that it describes (reads all its weights once).

        The file appears whole or not at all; one that is there is replaced.

        Raises:
            OutputError: It cannot be written.
        """
        from surgery.storage import fingerprint, write_file

        content = {"fact": type(self).__name__, "fingerprint": fingerprint(model), "data": self.model_dump(mode="json")}
        write_file(path, json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls: type[FactType], path: Path, model: ir.Model) -> FactType:
        """Read a saved fact back.

        Raises:
            RecipeError: The file is not a saved fact of this type.
            Refused: The fact describes another model.
        """
        from surgery.storage import fingerprint

        if not path.is_file():
            raise RecipeError(f"{path}: there is no such file")
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            name, stamp, data = content["fact"], content["fingerprint"], content["data"]
            fact = cls.model_validate(data)
        except (OSError, ValueError, KeyError, TypeError, ValidationError) as error:
            raise RecipeError(f"{path}: not a saved fact of type {cls.__name__}: {_first_line(error)}") from error
        if name != cls.__name__:
            raise RecipeError(f"{path}: holds {name}, not {cls.__name__}")
        if stamp != fingerprint(model):
            raise Refused(f"{path}: these {name} describe another model", hint="run the analysis again on this model")
        return fact


FactType = TypeVar("FactType", bound=Fact)


def _first_line(error: Exception) -> str:
    return str(error).splitlines()[0]


@dataclass(frozen=True)
class _Entry:
    fact: Fact
    identity: str


class Facts:
    """Facts by (type, role); one is given out only while its model is still the one that it describes."""

    def __init__(self, entries: Mapping[tuple[type[Fact], str], _Entry] | None = None) -> None:
        self._entries = dict(entries or {})

    def __iter__(self) -> Iterator[tuple[type[Fact], str]]:
        return iter(self._entries)

    def __contains__(self, key: tuple[type[Fact], str]) -> bool:
        return key in self._entries

    def get(self, kind: type[FactType], role: str) -> FactType:
        """Return the fact.

        Raises:
            Refused: There is none of that type for the role, or its model has changed since.
        """
        entry = self._entries.get((kind, role))
        if entry is None:
            raise Refused(f"no {kind.__name__} of {role!r} are known here", hint="declare them in `needs`")
        assert isinstance(entry.fact, kind)
        return entry.fact

    def given(self, facts: Mapping[str, Fact], identities: Mapping[str, str]) -> Facts:
        """Return these facts and the new ones, by role, stamped with their models' identities."""
        new = {(type(fact), role): _Entry(fact, identities[role]) for role, fact in facts.items()}
        return Facts(self._entries | new)

    def surviving(self, identities: Mapping[str, str], preserved: tuple[type[Fact], ...]) -> Facts:
        """Return the facts whose model is unchanged, and those of changed models that the pass says it preserves."""
        kept: dict[tuple[type[Fact], str], _Entry] = {}
        for (kind, role), entry in self._entries.items():
            now = identities.get(role)
            if now == entry.identity:
                kept[kind, role] = entry
            elif now is not None and kind in preserved:
                kept[kind, role] = _Entry(entry.fact, now)
        return Facts(kept)
