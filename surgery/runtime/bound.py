"""A session whose inputs and outputs are bound where they lie: nothing is copied between torch and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from surgery.errors import SurgeryError

if TYPE_CHECKING:
    import onnxruntime
    import torch

BOOL = "tensor(bool)"


class BoundSession:
    """Runs a model on values that stay on the session's device.

    Values are ONNX Runtime's own (`OrtValue`). What one run gives may be fed to the next as it is,
    which is how a cache goes from step to step without anybody touching it; `as_torch` and `as_value` look at one as the
    other over the same memory, by DLPack.

    Args:
        session: The session.
        device: Where its inputs and outputs lie, `cpu` or `cuda`.
    """

    def __init__(self, session: onnxruntime.InferenceSession, device: str = "cpu") -> None:
        self._session = session
        self._binding = session.io_binding()
        self._device = device
        self.inputs = {value.name: value for value in session.get_inputs()}
        self.outputs = tuple(value.name for value in session.get_outputs())

    def run(self, feeds: Mapping[str, onnxruntime.OrtValue]) -> dict[str, onnxruntime.OrtValue]:
        """Run once.

        Args:
            feeds: A value for each input, by name; they have to live until this returns.

        Returns:
            A value for each output, by name.

        Raises:
            SurgeryError: An input is missing, or ONNX Runtime cannot run the model on these.
        """
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise SurgeryError(f"nothing is fed to the input {missing[0]!r}")
        for name in self.inputs:
            self._binding.bind_ortvalue_input(name, feeds[name])
        # Bound anew, outputs are allocated anew: those of the last run may be this run's inputs.
        for name in self.outputs:
            self._binding.bind_output(name, self._device)
        try:
            self._session.run_with_iobinding(self._binding)
        except Exception as error:
            raise SurgeryError(f"ONNX Runtime cannot run the model: {error}") from error
        outputs = dict(zip(self.outputs, self._binding.get_outputs(), strict=True))
        self._binding.clear_binding_inputs()
        self._binding.clear_binding_outputs()
        return outputs


def as_value(tensor: torch.Tensor) -> onnxruntime.OrtValue:
    """Return a tensor as a value over the same memory, which lives as long as either does; copied if not contiguous."""
    import onnxruntime
    import torch

    tensor = tensor.detach().contiguous()
    if tensor.dtype == torch.bool:
        # torch 2.13 writes DLPack's own type of booleans, which ONNX Runtime 1.31 does not read ("Unsupported code 6").
        from onnxruntime.capi._pybind_state import OrtValue

        return onnxruntime.OrtValue(OrtValue.from_dlpack(tensor.view(torch.uint8).__dlpack__(), True))
    return onnxruntime.OrtValue.from_dlpack(tensor)


def as_torch(value: onnxruntime.OrtValue) -> torch.Tensor:
    """Return a value as a tensor over the same memory, which lives as long as either does."""
    import torch

    tensor = torch.from_dlpack(value)
    return tensor.view(torch.bool) if value.data_type() == BOOL else tensor
