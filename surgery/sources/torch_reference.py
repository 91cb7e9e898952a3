"""A PyTorch model behind the interface of its export: the same roles, names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from surgery.errors import SurgeryError
from surgery.sources.architectures import Architecture
from surgery.sources.names import flatten, is_in, nest


class TorchReference:
    """Runs a PyTorch model on the feeds of its export.

    Args:
        model: The model, in evaluation mode.
        architecture: Its kind.
    """

    def __init__(self, model: Any, architecture: Architecture) -> None:
        self._model = model
        self._architecture = architecture

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles that can be run."""
        return self._architecture.roles

    def run(self, role: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs of a role by their names in the export.

        Raises:
            SurgeryError: There is no such role or input, or PyTorch cannot run it on these feeds.
        """
        import torch

        if role not in self._architecture.forwards:
            raise SurgeryError(f"PyTorch has no {role!r} here; it has {', '.join(self.roles)}")
        # The forwards of transformers swallow what they do not know.
        unknown = [name for name in feeds if not is_in(self._architecture.axes[role], name)]
        if unknown:
            raise SurgeryError(f"PyTorch cannot run {role!r}: it has no input {unknown[0]!r}")
        tensors = {name: _tensor(array, self._model.dtype) for name, array in feeds.items()}
        try:
            with torch.inference_mode():
                outputs = self._architecture.forwards[role](self._model, **nest(tensors))
        except (RuntimeError, TypeError, ValueError, IndexError, KeyError) as error:
            shapes = ", ".join(f"{name} {list(array.shape)}" for name, array in feeds.items())
            raise SurgeryError(f"PyTorch cannot run {role!r} on {shapes}: {error}") from error
        return {name: tensor.numpy() for name, tensor in flatten(outputs).items()}


def _tensor(array: np.ndarray, float_type: Any) -> Any:
    import torch

    # torch takes neither read-only memory, which mapped files and other runtimes give, nor negative strides.
    tensor = torch.from_numpy(np.array(array, order="C"))
    return tensor.to(float_type) if tensor.is_floating_point() else tensor.long()


class RenamedReference:
    """A PyTorch model behind the interface of its export under other names.

    Args:
        reference: The model behind the names that it was exported with.
        names: For each role, by the reference's name of an input or output, the name that is used here.
    """

    def __init__(self, reference: TorchReference, names: Mapping[str, Mapping[str, str]]) -> None:
        self._reference = reference
        self._names = names

    def run(self, role: str, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs of a role by the names that are used here.

        Raises:
            SurgeryError: There is no such role or input, or PyTorch cannot run it on these feeds.
        """
        new = self._names.get(role, {})
        old = {name: original for original, name in new.items()}
        outputs = self._reference.run(role, {old.get(name, name): array for name, array in feeds.items()})
        return {new.get(name, name): array for name, array in outputs.items()}
