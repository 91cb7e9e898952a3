"""The models of a bundle under canonical names, by which inputs are known, and under their own."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from surgery.bundle import Bundle
from surgery.errors import Refused
from surgery.interfaces import recognise, rename_values

Arrays = dict[str, np.ndarray]


class Renamed:
    """A bundle whose recognised models have canonical names.

    Args:
        bundle: The bundle as it is; its models stay so.
    """

    def __init__(self, bundle: Bundle) -> None:
        self._own: dict[str, dict[str, str]] = {}
        models = {role: self._canonical(role, model) for role, model in bundle.models.items()}
        self.bundle = Bundle(models, bundle.config)

    def _canonical(self, role: str, model: ir.Model) -> ir.Model:
        """Return a model with canonical names, and remember its own."""
        recognised = recognise(model)
        if recognised is None or all(own == known for own, known in recognised.canonical.items()):
            return model
        renamed = model.clone()
        try:
            rename_values(renamed, recognised.canonical)
        except Refused:
            return model
        self._own[role] = {known: own for own, known in recognised.canonical.items()}
        return renamed

    def as_own(self, role: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Return arrays under a model's own names."""
        own = self._own.get(role, {})
        return {own.get(name, name): array for name, array in arrays.items()}

    def as_known(self, role: str, arrays: Mapping[str, np.ndarray]) -> Arrays:
        """Return arrays that go by a model's own names under canonical ones."""
        known = {own: name for name, own in self._own.get(role, {}).items()}
        return {known.get(name, name): array for name, array in arrays.items()}
