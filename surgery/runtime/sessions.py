"""ONNX Runtime sessions over models whose weights stay where they are."""

from __future__ import annotations

import importlib
import re
import tempfile
import textwrap
from collections.abc import Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx_ir as ir

from surgery.errors import ModelFileError, SurgeryError
from surgery.storage.region import key_of, memory_of
from surgery.storage.skeleton import ELSEWHERE, skeleton

if TYPE_CHECKING:
    import onnxruntime

# Nothing on the terminal: warnings are about the runtime's own optimizers, and errors are raised as well.
_FATAL_ONLY = 4
_VERSION_ERROR = re.compile(r"opset|IR version|is under development", re.IGNORECASE)


def open_session(
    model: ir.Model,
    *,
    optimize: bool = False,
    prepacking: bool = False,
    threads: int = 1,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """Open a session over a model in memory; its weights are not serialised, nor copied unless it must be.

    Args:
        model: Any model; it stays as it is.
        optimize: Let ONNX Runtime rewrite the graph; it then copies the weights, as with a
            provider that has its own memory. Off, what runs is what is written.
        prepacking: Let kernels keep rearranged copies of constant weights. It costs memory, and changes the last bits:
            the same MatMul by a computed weight is not rearranged.
        threads: Threads within an operator; results are only comparable at the same number.
        providers: Where to run, by preference.

    Raises:
        ModelFileError: If ONNX Runtime does not take the model.
    """
    content, weights = skeleton(model)
    return open_skeleton(
        content, weights, optimize=optimize, prepacking=prepacking, threads=threads, providers=providers
    )


def open_skeleton(
    content: bytes,
    weights: Mapping[str, ir.TensorProtocol],
    *,
    optimize: bool = False,
    prepacking: bool = False,
    threads: int = 1,
    providers: Sequence[str] = ("CPUExecutionProvider",),
) -> onnxruntime.InferenceSession:
    """Open a session as `open_session` does, over what `skeleton` returns.

    Raises:
        ModelFileError: If ONNX Runtime does not take the model; ONNX Runtime's own error is its cause.
    """
    onnxruntime = runtime()
    values = session_values(weights)
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.use_deterministic_compute = True
    options.log_severity_level = _FATAL_ONLY
    if not prepacking:
        options.add_session_config_entry("session.disable_prepacking", "1")
    is_shared = not optimize and set(providers) == {"CPUExecutionProvider"}
    with _weights_for(options, values, is_shared=is_shared):
        try:
            session = onnxruntime.InferenceSession(content, options, providers=list(providers), enable_fallback=0)
        except Exception as error:
            raise _refusal(error) from error
    # The session points into these values, which point into the mapped files; ONNX Runtime keeps neither alive.
    session.surgery_weights = values
    return session


def runtime() -> ModuleType:
    """Return ONNX Runtime.

    Raises:
        SurgeryError: It is not installed.
    """
    try:
        return importlib.import_module("onnxruntime")
    except ImportError as error:
        hint = "pip install graph-surgery[cpu] (or [gpu]), or --no-check"
        raise SurgeryError("ONNX Runtime is not installed, so no model can be run", hint=hint) from error


def session_values(weights: Mapping[str, ir.TensorProtocol]) -> dict[str, onnxruntime.OrtValue]:
    """Return the weights as ONNX Runtime's values, over the same memory; weights that are one become one value."""
    made: dict[Hashable, onnxruntime.OrtValue] = {}
    values: dict[str, onnxruntime.OrtValue] = {}
    for name, tensor in weights.items():
        key = key_of(tensor), tensor.dtype, tuple(tensor.shape.numpy())
        if key not in made:
            made[key] = _value(tensor)
        values[name] = made[key]
    return values


@contextmanager
def _weights_for(
    options: onnxruntime.SessionOptions, values: Mapping[str, onnxruntime.OrtValue], *, is_shared: bool
) -> Iterator[None]:
    """Give a session to be the weights.

    `add_initializer` shares memory, but optimizers do not see the values and would read the file that the skeleton
    names, and the memory must be the provider's own. `add_external_initializers` has neither limit, and the session
    keeps copies (ONNX Runtime 1.31: 490 MB for 490 MB of weights, against 2 MB).
    """
    if not is_shared:
        options.add_external_initializers(list(values), list(values.values()))
        yield
        return
    for name, value in values.items():
        options.add_initializer(name, value)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / ELSEWHERE).touch()
        options.add_session_config_entry("session.model_external_initializers_file_folder_path", folder)
        yield


def _value(tensor: ir.TensorProtocol) -> onnxruntime.OrtValue:
    import onnxruntime

    stored = np.frombuffer(memory_of(tensor), dtype=np.uint8)
    shape = tuple(tensor.shape.numpy())
    dtype = tensor.dtype
    if dtype.bitwidth < 8:
        # The runtime wants an array of the logical shape and then reads only the packed bytes at its start (tested
        # in tests/storage); nobody else ever reads this view, which reaches beyond them.
        view = np.lib.stride_tricks.as_strided(stored, shape, _dense_strides(shape), writeable=False)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(view, int(dtype))
    native = _native(dtype)
    if native is None:
        view = stored.view(f"u{dtype.bitwidth // 8}").reshape(shape)
        return onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(view, int(dtype))
    return onnxruntime.OrtValue.ortvalue_from_numpy(stored.view(native).reshape(shape))


def _native(dtype: ir.DataType) -> np.dtype[Any] | None:
    """Return numpy's own type, `None` for those it knows only through ml_dtypes."""
    numpy_type = dtype.numpy()
    return numpy_type if numpy_type.isbuiltin == 1 else None


def _dense_strides(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(np.prod(shape[axis + 1 :], dtype=np.int64)) for axis in range(len(shape)))


def _refusal(error: Exception) -> ModelFileError:
    text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (This is an invalid model\. )?", "", str(error))
    sentence = textwrap.shorten(text.partition("\n")[0], 300, placeholder=" ...")
    hint = ""
    if _VERSION_ERROR.search(sentence):
        hint = "export for an older operator set: this ONNX Runtime does not know the model's"
    return ModelFileError(f"ONNX Runtime refuses the model: {sentence}", hint=hint)
