"""Lines of a text as samples: through the bundle's tokenizer, and on through its models as a generation runs them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from surgery.accuracy.feeds.arrays import PlainInputs
from surgery.accuracy.feeds.chaining import Arrays, Run
from surgery.accuracy.feeds.interface import Interface, numpy_type
from surgery.accuracy.feeds.naming import Renamed
from surgery.accuracy.feeds.requests import Request, Sample, room
from surgery.bundle import Bundle
from surgery.errors import RecipeError, SurgeryError
from surgery.runtime.loops import Callee, Signature, decoders_in, greedy, position_ids
from surgery.runtime.prompts import encode, left_padded, load_tokenizer, roles_of_prompts

LINES_AT_ONCE = 4


class Texts:
    """Makes samples of texts: a prompt a line, `LINES_AT_ONCE` in a batch, the shorter ones padded.

    Where the models generate, each gets what it gets when the prompts are continued greedily: the encoder's states, the
    cache that the steps before have made. Of the steps after the prompt the 1st, 2nd, 4th, 8th, ... are samples. Any
    other model with `input_ids` reads the prompts alone.

    Args:
        source: The models, with a `tokenizer.json` among the files.
        run: Runs the model of a role.
        max_new_tokens: Continue the prompts by so many tokens at most.
        option: Which option of the recipe asks for it.
    """

    def __init__(self, source: Bundle, run: Run, max_new_tokens: int, option: str) -> None:
        self._source = source
        self._run = run
        self._tokens = max_new_tokens
        self._option = option
        self._config: Mapping[str, Any] = {**source.config, **source.generation_config}

    def samples(self, path: Path, role: str) -> Iterator[Sample]:
        """Yield the samples of a model, made while they are taken.

        Raises:
            RecipeError: The file cannot be read or has no line; there is no tokenizer; the model takes no ids.
        """
        lines = self._lines(path)
        tokenizer = load_tokenizer(self._source, self._option)
        generating = _generating(self._source)
        interface = Interface(self._source[role])
        at_once = LINES_AT_ONCE if self._can_pad(generating[0] if role in generating else role) else 1
        for start in range(0, len(lines), at_once):
            chosen = lines[start : start + at_once]
            rows = [encode(tokenizer, line, self._option)[: self._room()] for line in chosen]
            name = f"{path.name}[{start}]" if len(rows) == 1 else f"{path.name}[{start}-{start + len(rows) - 1}]"
            if role in generating:
                for step, arrays in self._generated(role, generating, rows):
                    yield Sample(f"{name}, token {step}" if step else name, arrays, interface.traits(arrays))
            else:
                arrays = self._read(role, rows)
                yield Sample(name, arrays, interface.traits(arrays))

    def _lines(self, path: Path) -> list[str]:
        try:
            lines = [line for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or str(error)
            raise RecipeError(f"{self._option}: cannot read {path}: {reason}") from error
        if not lines:
            raise RecipeError(f"{self._option}: there is no text in {path}", hint="write a prompt a line")
        return lines

    def _room(self) -> int:
        """How many tokens of a prompt there is room for, with those that follow."""
        return max(room(self._source.config) - self._tokens, 1)

    def _can_pad(self, role: str) -> bool:
        renamed = Renamed(self._source).bundle
        return "attention_mask" in Interface(renamed[role]).masks

    def _generated(self, role: str, roles: Sequence[str], rows: Sequence[Sequence[int]]) -> list[tuple[int, Arrays]]:
        """Return what a model is given while the prompts are continued, each with the number of the step."""
        kept: list[tuple[int, Arrays]] = []
        calls = dict.fromkeys(roles, 0)
        first, later = decoders_in(roles)

        def call(called: str, arrays: Arrays) -> Arrays:
            step = calls[called] + (called == later and first != later)
            calls[called] += 1
            if called == role and step & (step - 1) == 0:
                kept.append((step, arrays))
            return self._run(called, arrays)

        models = {
            one: Callee(Signature.of(self._source[one]), lambda arrays, one=one: call(one, arrays))  # type: ignore[misc]
            for one in roles
        }
        ids, mask = left_padded(rows, self._config.get("pad_token_id") or 0)
        tokens = np.array(self._tokens if role == later else 0)
        try:
            greedy(models, {"input_ids": ids, "attention_mask": mask, "max_new_tokens": tokens}, self._config)
        except SurgeryError as error:
            error.message = f"{self._option}: the prompts cannot be continued: {error.message}"
            raise
        return kept

    def _read(self, role: str, rows: Sequence[Sequence[int]]) -> Arrays:
        """Return the inputs of a model that reads prompts, padded behind, as encoders are trained."""
        renamed = Renamed(self._source)
        interface = Interface(renamed.bundle[role])
        names = {value.name: value for value in interface.inputs}
        if "input_ids" not in names:
            raise RecipeError(
                f"{self._option}: {role!r} takes no 'input_ids', so no text can be fed", hint="give it a .npz"
            )
        turned, mask = left_padded([row[::-1] for row in rows], self._config.get("pad_token_id") or 0)
        ids, mask = turned[:, ::-1], mask[:, ::-1]
        given = {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": position_ids(mask),
            "token_type_ids": np.zeros_like(ids),
        }
        typed = {name: array.astype(numpy_type(names[name])) for name, array in given.items() if name in names}
        request = Request(len(ids), ids.shape[1], is_cached=False)
        random = np.random.default_rng(0)
        return renamed.as_own(role, PlainInputs(self._source.config).fill(interface, request, random, typed))


def _generating(source: Bundle) -> tuple[str, ...]:
    """Return the models that continue a prompt, the first one first; none where no model does."""
    try:
        return roles_of_prompts(tuple(source.models))
    except RecipeError:
        return ()
