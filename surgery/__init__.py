"""Graph surgery for ONNX transformer models: passes in a line, each checked for what it did to the answers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from surgery.bundle import Bundle
    from surgery.claims import Claim, HostLoop, Program
    from surgery.contract import Analysis, BundlePass, Change, Context, Effect, ModelPass, Sampling, Tolerance
    from surgery.errors import Refused, SurgeryError
    from surgery.facts import Fact
    from surgery.pipeline import Pipeline, Result
    from surgery.recipe import Check, Source
    from surgery.registry import register

_HOMES = {
    "Analysis": "contract",
    "Bundle": "bundle",
    "BundlePass": "contract",
    "Change": "contract",
    "Check": "recipe",
    "Claim": "claims",
    "Context": "contract",
    "Effect": "contract",
    "Fact": "facts",
    "HostLoop": "claims",
    "ModelPass": "contract",
    "Pipeline": "pipeline",
    "Program": "claims",
    "Refused": "errors",
    "Result": "pipeline",
    "Sampling": "contract",
    "Source": "recipe",
    "SurgeryError": "errors",
    "Tolerance": "contract",
    "register": "registry",
}

__all__ = [
    "Analysis",
    "Bundle",
    "BundlePass",
    "Change",
    "Check",
    "Claim",
    "Context",
    "Effect",
    "Fact",
    "HostLoop",
    "ModelPass",
    "Pipeline",
    "Program",
    "Refused",
    "Result",
    "Sampling",
    "Source",
    "SurgeryError",
    "Tolerance",
    "register",
]


def __getattr__(name: str) -> Any:
    """Import what is asked for only then, so that `surgery --help` answers at once."""
    if name not in _HOMES:
        raise AttributeError(f"module 'surgery' has no attribute {name!r}")
    return getattr(importlib.import_module(f"surgery.{_HOMES[name]}"), name)
