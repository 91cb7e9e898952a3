"""What a single model of a bundle is fed: made inputs of a size, those of other models chained."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from surgery.accuracy.feeds import FeedMaker, Interface, Request, Sample, room
from surgery.accuracy.feeds.naming import Renamed
from surgery.bundle import Bundle
from surgery.errors import RecipeError
from surgery.interfaces import FLAG
from surgery.options import did_you_mean
from surgery.recipe import Check
from surgery.runtime.sessions import open_session

FAVOURITES = ("decoder", "decode", "generator", "model", "prefill", "encoder")
"""Which model of several is looked at if nobody says: the one that takes most of the time."""

PROMPT_TOKENS, PAST_TOKENS = 32, 32


def role_in(bundle: Bundle, wanted: str | None) -> str:
    """Return the role to look at.

    Raises:
        RecipeError: The bundle has no such model.
    """
    if wanted is None:
        return next((role for role in FAVOURITES if role in bundle.models), next(iter(bundle.models)))
    if wanted not in bundle.models:
        raise RecipeError(
            f"there is no model {wanted!r}{did_you_mean(wanted, list(bundle.models))}",
            hint=f"--role {' or '.join(bundle.models)}",
        )
    return wanted


def sample_of(
    bundle: Bundle,
    role: str,
    *,
    batch: int = 1,
    length: int | None = None,
    past: int | None = None,
    branch: str | None = None,
    seed: int = 0,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> Sample:
    """Return made inputs of one model; a past and encoder states come out of the bundle's other models.

    Args:
        bundle: The models.
        role: Which one.
        batch: Rows.
        length: New tokens; None for 32 of a prompt and 1 of a step with a past.
        past: Tokens in the cache; None for 32 where there is one.
        branch: `prefill` or `decode`: which of a merged decoder's two; None for decode.
        seed: The inputs are drawn from it.
        providers: Where the other models run.

    Raises:
        RecipeError: The model has no such size, or no branches.
        SurgeryError: Another model cannot be run.
    """
    if branch not in (None, "prefill", "decode"):
        raise RecipeError(f"there is no branch {branch!r}", hint="--branch prefill or decode")
    interface = Interface(Renamed(bundle).bundle[role])
    if branch is not None and not interface.has_flag:
        raise RecipeError(f"{role!r} has no branches: it takes no {FLAG!r}", hint="leave --branch out")
    is_cached = interface.has_past and branch != "prefill"
    if past and not is_cached:
        raise RecipeError("there is no past in what is fed", hint="leave --past out")
    past = (PAST_TOKENS if past is None else past) if is_cached else 0
    length = (1 if is_cached else PROMPT_TOKENS) if length is None else length
    if is_cached and length > 1 and not interface.takes_several_tokens:
        raise RecipeError(f"{role!r} takes one new token at a time", hint="leave --length out")
    most = room(bundle.config)
    if past + length > most:
        raise RecipeError(f"{past + length:,} positions are more than the {most:,} that the network has")
    runs = _Runs(bundle, providers)
    request = Request(batch, length, past, is_cached=is_cached)
    return FeedMaker(bundle, Check(seed=seed), runs.run).sample(role, request)


class _Runs:
    """Runs the models that make inputs of another one, each opened once."""

    def __init__(self, bundle: Bundle, providers: Sequence[str]) -> None:
        self._bundle = bundle
        self._providers = providers
        self._sessions: dict[str, Any] = {}

    def run(self, role: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if role not in self._sessions:
            self._sessions[role] = open_session(self._bundle[role], threads=0, providers=self._providers)
        session = self._sessions[role]
        names = [value.name for value in session.get_outputs()]
        return dict(zip(names, session.run(None, dict(arrays)), strict=True))
