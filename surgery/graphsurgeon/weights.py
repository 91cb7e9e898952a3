"""A weight as graphsurgeon holds it until its values are asked for."""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
from onnx_graphsurgeon.ir.tensor import LazyValues


class Weight(LazyValues):  # type: ignore[misc]
    """What a constant holds until somebody asks for its values.

    graphsurgeon's own loader resolves external data against the current directory.
    """

    def __init__(self, original: ir.TensorProtocol, told: LazyValues) -> None:
        self.original = original
        self.shape = list(original.shape.numpy())
        self.dtype = told.dtype
        self.nbytes = told.nbytes

    @property
    def tensor(self) -> onnx.TensorProto:
        """The weight with its bytes: what graphsurgeon exports when it folds constants."""
        return ir.serde.serialize_tensor(self.original)

    def load(self) -> np.ndarray:
        """Return a copy of the values, which the function may write to."""
        if self.original.dtype == ir.DataType.STRING:
            return np.array(onnx.numpy_helper.to_array(self.tensor))
        return np.array(self.original.numpy())
