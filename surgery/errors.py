"""Every error that a user can meet: what is wrong, where, the way out, and the exit code that goes with it."""

from __future__ import annotations


class SurgeryError(Exception):
    """An error with a sentence for the user; the command line prints it without a traceback.

    Args:
        message: Where and what, in one sentence.
        hint: The way out, if there is one.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return f"{self.message}\n  try: {self.hint}" if self.hint else self.message


class Refused(SurgeryError):
    """A pass may not do what it was asked for: nothing was changed."""


class Inaccurate(SurgeryError):
    """A step moved the answers further than its effect allows."""


class StepFailed(SurgeryError):
    """A pass raised, or left a model that is not valid."""


class OutputError(SurgeryError):
    """The result cannot be written: the place is taken, is the source itself, or the disk is full."""


class RecipeError(SurgeryError):
    """The recipe or the command is wrong."""

    exit_code = 2


class ModelFileError(SurgeryError):
    """A model file is malformed, incomplete or unsafe."""

    exit_code = 3
