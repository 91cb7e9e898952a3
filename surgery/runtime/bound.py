"""A session whose inputs and outputs are bound where they lie: nothing is copied between torch and ONNX Runtime."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING

import torch
from torch.utils.dlpack import from_dlpack, to_dlpack

from surgery.errors import SurgeryError
from surgery.runtime.sessions import runtime

runtime()  # where it is not installed, this says so

from onnxruntime.capi._pybind_state import OrtValue  # noqa: E402

if TYPE_CHECKING:
    import onnxruntime

BOOL = "tensor(bool)"
CPU = "cpu"
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}
"""The provider whose memory a device of torch is."""


class BoundSession:
    """Runs a model on values that stay on the session's device.

    Values are ONNX Runtime's own `OrtValue`, not the class of that name around it, which would be made and taken off
    for every piece of a cache at every step. What one run gives may be fed to the next as it is: so a cache goes
    from step to step without anybody touching it; `as_torch` and `as_value` look at one as the other over the same
    memory, by DLPack.

    Args:
        session: The session.
        device: Where its inputs and outputs lie, `cpu` or `cuda`.
        device_id: Which one of several.

    Attributes:
        inputs: What the session declares of its inputs, by name.
        outputs: The names of its outputs.

    Raises:
        SurgeryError: The session does not run on that device.
    """

    def __init__(self, session: onnxruntime.InferenceSession, device: str = "cpu", device_id: int = 0) -> None:
        provider = PROVIDERS.get(device)
        if provider not in session.get_providers():
            raise SurgeryError(
                f"the session does not run on {device!r}: its providers are {', '.join(session.get_providers())}",
                hint=f"open it with {provider}" if provider else f"devices are {' and '.join(PROVIDERS)}",
            )
        self._session = session
        self._device, self._device_id = device, device_id
        self.inputs = {value.name: value for value in session.get_inputs()}
        self.outputs = tuple(value.name for value in session.get_outputs())

    def run(self, feeds: Mapping[str, OrtValue]) -> dict[str, OrtValue]:
        """Run once.

        Args:
            feeds: A value for each input, by name; they have to live until this returns. Others are ignored.

        Returns:
            A value for each output, by name; each lives on its own, whatever becomes of the session's later runs.

        Raises:
            SurgeryError: An input is missing, or ONNX Runtime cannot run the model on these.
        """
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise SurgeryError(f"nothing is fed to the input {missing[0]!r}")
        try:
            return self._run_bound(feeds) if self._device == "cuda" else self._run_here(feeds)
        except Exception as error:
            raise SurgeryError(f"ONNX Runtime cannot run the model: {error}") from error

    def _run_here(self, feeds: Mapping[str, OrtValue]) -> dict[str, OrtValue]:
        """Run on the CPU, where a binding is of no use and takes most of what a call costs beside the model.

        `InferenceSession.run_with_ort_values` does this too, with checks that cost as much as the binding.
        """
        given = {name: feeds[name] for name in self.inputs}
        values = self._session._sess.run_with_ort_values(given, self.outputs, None)
        # By index each is a handle of its own; iterating gives references that keep all the others alive.
        return {name: values[index] for index, name in enumerate(self.outputs)}

    def _run_bound(self, feeds: Mapping[str, OrtValue]) -> dict[str, OrtValue]:
        """Run on a GPU, and leave what comes out there."""
        import onnxruntime

        self._wait_for_torch()
        binding = self._session.io_binding()
        for name in self.inputs:
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue(feeds[name]))
        for name in self.outputs:
            binding.bind_output(name, self._device, self._device_id)
        self._session.run_with_iobinding(binding)
        values = [value._get_c_value() for value in binding.get_outputs()]
        return dict(zip(self.outputs, values, strict=True))

    def _wait_for_torch(self) -> None:
        """Wait until torch has written what it was asked for: ONNX Runtime works on a stream of its own."""
        torch.cuda.current_stream(self._device_id).synchronize()


@contextmanager
def one_torch_thread() -> Iterator[None]:
    """Let torch work in one thread for a while, so that its others do not take the processors from ONNX Runtime's.

    Torch's threads go on spinning after an operation that used several. Between two steps of generation there are such
    operations over large vocabularies (from 32,768 scores on), and with as many threads as processors in both libraries
    a step of GPT-2 124M took twice the time.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def as_value(tensor: torch.Tensor) -> OrtValue:
    """Return a tensor as a value over the same memory, which lives as long as either does; copied if not contiguous."""
    tensor = tensor.detach().contiguous()
    # torch 2.13 writes DLPack's own type of booleans, which ONNX Runtime 1.31 does not read ("Unsupported code 6").
    is_bool = tensor.dtype == torch.bool
    return OrtValue.from_dlpack(to_dlpack(tensor.view(torch.uint8) if is_bool else tensor), is_bool)


def as_torch(value: OrtValue) -> torch.Tensor:
    """Return a value as a tensor over the same memory, which lives as long as either does."""
    # Asked by torch, a value is asked four times, by words of a newer DLPack first. A GPU's has to know torch's stream.
    tensor: torch.Tensor = from_dlpack(value.__dlpack__() if value.device_name().lower() == CPU else value)
    return tensor.view(torch.bool) if value.data_type() == BOOL else tensor
