"""One file for the weights of the models that an export makes, so that PyTorch's memory can go."""

from __future__ import annotations

import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
import onnx_ir as ir

from surgery.errors import OutputError
from surgery.storage.region import DataFile, Region

INLINE_BYTES = 1024
WEIGHTS_ALIGNMENT = 4096


class WeightsFile:
    """One file that holds the weights of several models, each as its export gave it: sharing them is a pass's work.

    Args:
        path: The file to write.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._places: dict[ir.Value, int] = {}
        path.unlink(missing_ok=True)  # the regions of an earlier export into this folder keep the old file
        path.touch()

    def take(self, model: ir.Model) -> None:
        """Write what the model's initializers hold; small ones become tensors of their own.

        Raises:
            OutputError: The file cannot be written.
        """
        try:
            with self._path.open("r+b") as file:
                file.seek(0, io.SEEK_END)
                for value in model.graph.initializers.values():
                    self._take(value, file)
        except OSError as error:
            raise OutputError(
                f"{self._path}: cannot write the weights: {error.strerror}", hint="free space, or choose another folder"
            ) from error

    def _take(self, value: ir.Value, file: BinaryIO) -> None:
        tensor = value.const_value
        assert tensor is not None
        array = np.ascontiguousarray(tensor.numpy())
        if array.nbytes < INLINE_BYTES:
            value.const_value = ir.Tensor(array.reshape(tensor.shape.numpy()).copy(), tensor.dtype, name=value.name)
            return
        self._places[value] = file.seek(-(-file.tell() // WEIGHTS_ALIGNMENT) * WEIGHTS_ALIGNMENT)
        file.write(array.reshape(-1).view(np.uint8).data)

    def hand_out(self) -> None:
        """Let the initializers read from the file, so that PyTorch's memory is not kept alive by them."""
        file = DataFile(self._path)
        for value, offset in self._places.items():
            tensor = value.const_value
            assert tensor is not None
            value.const_value = Region(file, offset, tensor.dtype, ir.Shape(tensor.shape.numpy()), name=value.name)
