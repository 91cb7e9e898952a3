"""Ranges and samples kept on disk: for a cast that is measured without the audit, and for peers that want samples."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

from passes.audit_ranges import Ranges
from surgery.contract import Analysis, Bundle, Context, Effect, Fact, Field, RoleUse
from surgery.storage import file_of_role


class KeepRanges(Analysis):
    """Write the ranges of each model, and the samples that they were measured on."""

    effect = Effect.EXACT
    needs = (Ranges,)

    folder: Path = Field(description="Where to.")

    def analyze(self, bundle: Bundle, context: Callable[[str], Context]) -> Mapping[str, Fact]:
        """Find nothing new."""
        for role in self.roles(RoleUse.READS, tuple(bundle.models)):
            samples = self.folder / Path(file_of_role(role)).stem
            samples.mkdir(parents=True)
            for number, arrays in enumerate(context(role).feeds(role)):
                np.savez(samples / f"{number:02}.npz", allow_pickle=False, **arrays)
            (self.folder / f"{role}.json").write_text(json.dumps(context(role).fact(Ranges).model_dump(mode="json")))
        return {}


class KnownRanges(Analysis):
    """Read back what `KeepRanges` wrote."""

    effect = Effect.EXACT
    gives = (Ranges,)

    folder: Path = Field(description="Where from.")

    def analyze(self, bundle: Bundle, context: Callable[[str], Context]) -> Mapping[str, Fact]:
        """Return the ranges of each model."""
        roles = self.roles(RoleUse.READS, tuple(bundle.models))
        return {role: Ranges.model_validate(json.loads((self.folder / f"{role}.json").read_text())) for role in roles}
