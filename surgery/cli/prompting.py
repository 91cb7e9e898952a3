"""Prompts of the command line: read from options, files or standard input, and turned into tokens."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Prompt:
    """A text, or the ids of tokens."""

    text: str | None
    ids: tuple[int, ...] = ()

    def __str__(self) -> str:
        return self.text if self.text is not None else joined(self.ids)


def joined(ids: Sequence[int]) -> str:
    return " ".join(str(token) for token in ids)


def prompts_of(texts: Sequence[str] | None, file: str | None, ids: Sequence[str] | None) -> list[Prompt]:
    """Return the prompts that the options name.

    Raises:
        RecipeError: There is none, they are of two kinds, or a file cannot be read.
    """
    from surgery.errors import RecipeError

    found = [Prompt(_standard_input().rstrip("\n") if text == "-" else text) for text in texts or ()]
    found += [Prompt(line) for line in _lines(file)] if file is not None else []
    if found and ids:
        raise RecipeError("texts and tokens do not go together", hint="--prompt, or --ids")
    found += [Prompt(None, _tokens(text)) for text in ids or ()]
    if not found:
        raise RecipeError("there is nothing to continue", hint="--prompt TEXT, --prompts-file FILE, or --ids 1,2,3")
    empty = next((prompt for prompt in found if prompt.text == ""), None)
    if empty is not None:
        raise RecipeError("a prompt is empty", hint="give it a text")
    strange = next((prompt for prompt in found if not _is_unicode(str(prompt))), None)
    if strange is not None:
        raise RecipeError(f"the prompt {str(strange)!r} is not UTF-8", hint="iconv -t UTF-8")
    return found


def _lines(file: str) -> list[str]:
    from surgery.errors import RecipeError

    try:
        text = _standard_input() if file == "-" else Path(file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise RecipeError(f"--prompts-file {file}: cannot be read: {reason}") from error
    return [line for line in text.split("\n") if line.strip()]


def _standard_input() -> str:
    from surgery.errors import RecipeError

    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise RecipeError("standard input is not UTF-8", hint="iconv -t UTF-8") from error


def _is_unicode(text: str) -> bool:
    """Say whether a text is whole: Python keeps bytes that it cannot read as halves of characters."""
    return not any("\ud800" <= character <= "\udfff" for character in text)


def _tokens(text: str) -> tuple[int, ...]:
    from surgery.errors import RecipeError

    words = text.replace(",", " ").split()
    if not words or not all(word.isdecimal() for word in words):
        raise RecipeError(f"--ids {text!r}: these are no ids of tokens", hint="--ids 1,2,3")
    return tuple(int(word) for word in words)


def encoded(prompts: Sequence[Prompt], tokenizer: Any, *, system: str | None, is_chat: bool) -> list[list[int]]:
    """Return the tokens of each prompt.

    Raises:
        RecipeError: The tokenizer cannot read one, or knows no chat.
    """
    from surgery.errors import RecipeError

    if tokenizer is None and is_chat:
        raise RecipeError("a chat is of texts, not of tokens", hint="--prompt TEXT, or leave --chat and --system out")
    if is_chat and not tokenizer.chat_template:
        raise RecipeError("the tokenizer has no chat template", hint="leave --chat and --system out")
    return [list(prompt.ids) or _encoded_text(str(prompt), tokenizer, system, is_chat=is_chat) for prompt in prompts]


def _encoded_text(text: str, tokenizer: Any, system: str | None, *, is_chat: bool) -> list[int]:
    from surgery.errors import RecipeError

    try:
        if is_chat:
            messages = [{"role": "system", "content": system}] if system is not None else []
            messages.append({"role": "user", "content": text})
            text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids: list[int] = tokenizer(text, add_special_tokens=not is_chat)["input_ids"]
    except Exception as error:  # the library raises nothing more specific
        raise RecipeError(f"the tokenizer cannot read {text!r}: {error}") from error
    if not ids:
        raise RecipeError(f"{text!r} has no tokens")
    return ids
