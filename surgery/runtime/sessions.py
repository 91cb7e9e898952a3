"""ONNX Runtime sessions over models whose weights stay where they are."""

from __future__ import annotations

import importlib
import os
import re
import tempfile
import textwrap
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
import onnx_ir as ir

from surgery.errors import ModelFileError, SurgeryError
from surgery.interfaces import recognise_names
from surgery.storage.region import Region, key_of, memory_of
from surgery.storage.skeleton import ELSEWHERE, skeleton

if TYPE_CHECKING:
    import onnxruntime

CPU = "CPUExecutionProvider"
# Nothing on the terminal: warnings are about the runtime's own optimizers, and errors are raised as well.
_FATAL_ONLY = 4
_FOLDER = "session.model_external_initializers_file_folder_path"
_VERSION_ERROR = re.compile(r"opset|IR version|is under development", re.IGNORECASE)

Provider = str | tuple[str, Mapping[str, Any]]
"""The name of a provider, or its name and options."""
Configure = Callable[["onnxruntime.SessionOptions"], None]


def _as_it_is(options: onnxruntime.SessionOptions) -> None:
    """Set nothing more."""


def in_written_order(options: onnxruntime.SessionOptions) -> None:
    """Configure a session to hold little: nodes run as they are written, and what they give is let go at once.

    The reuse of buffers is not planned either, which takes time quadratic in the nodes. Witness: 12,000 nodes open in
    30 s with ONNX Runtime 1.31's defaults and in 1 s so.
    """
    options.enable_mem_reuse = False
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    options.execution_order = runtime().ExecutionOrder.PRIORITY_BASED


def open_fast_session(
    model: ir.Model,
    *,
    prepacking: bool = True,
    threads: int = 0,
    providers: Sequence[Provider] = (CPU,),
    configure: Configure = _as_it_is,
) -> onnxruntime.InferenceSession:
    """Open a session that is to be fast: ONNX Runtime rewrites the graph and maps the weights' files by itself.

    It is told where in which file each weight lies, so only weights that are in memory alone are copied. What it keeps
    of its own are rearranged weights (prepacking) and what it computes from constants. Measured by
    `benchmarks/memory.py`: with prepacking a session holds the weights of its products once in anonymous memory, of a
    merged decoder too, since both branches share what is rearranged; without it holds nearly none and reads the
    mapped files. But then every product rearranges its weight anew: with 16 rows GPT-2 124M takes twice the time, with
    one row up to a quarter more. So it is on, unless memory matters more.

    Args:
        model: Any model; it stays as it is.
        prepacking: Keep rearranged copies of constant weights.
        threads: Threads within an operator, 0 for as many as there are cores. They spin while they wait.
        providers: Where to run, by preference; none is left out without a word.
        configure: Called with the options of the session last, to set what else is wanted.

    Raises:
        ModelFileError: If ONNX Runtime does not take the model.
        SurgeryError: ONNX Runtime is not installed, or has not all the providers.
    """
    options = _options(optimize=True, prepacking=prepacking, threads=threads)
    content, weights = skeleton(model)
    content, folder = _located(content, weights)
    if folder:
        options.add_session_config_entry(_FOLDER, folder)
    copied = session_values({name: tensor for name, tensor in weights.items() if not _is_on_disk(tensor)})
    if copied:
        options.add_external_initializers(list(copied), list(copied.values()))
    configure(options)
    session = _create(content, options, providers, but=_slower_fusions(model) if list(providers) == [CPU] else ())
    session.surgery_weights = copied
    return session


def open_session(
    model: ir.Model,
    *,
    optimize: bool = False,
    prepacking: bool = False,
    threads: int = 1,
    providers: Sequence[Provider] = (CPU,),
    configure: Configure = _as_it_is,
) -> onnxruntime.InferenceSession:
    """Open a session over a model in memory; its weights are not serialised, nor copied unless it must be.

    Args:
        model: Any model; it stays as it is.
        optimize: Let ONNX Runtime rewrite the graph; it then copies the weights, as with a
            provider that has its own memory. Off, what runs is what is written.
        prepacking: Let kernels keep rearranged copies of constant weights. It costs memory, and changes the last bits:
            the same MatMul by a computed weight is not rearranged.
        threads: Threads within an operator; results are only comparable at the same number.
        providers: Where to run, by preference; none is left out without a word.
        configure: Called with the options of the session last, to set what else is wanted.

    Raises:
        ModelFileError: If ONNX Runtime does not take the model.
    """
    content, weights = skeleton(model)
    return open_skeleton(
        content,
        weights,
        optimize=optimize,
        prepacking=prepacking,
        threads=threads,
        providers=providers,
        configure=configure,
    )


def open_skeleton(
    content: bytes,
    weights: Mapping[str, ir.TensorProtocol],
    *,
    optimize: bool = False,
    prepacking: bool = False,
    threads: int = 1,
    providers: Sequence[Provider] = (CPU,),
    configure: Configure = _as_it_is,
) -> onnxruntime.InferenceSession:
    """Open a session as `open_session` does, over what `skeleton` returns.

    Raises:
        ModelFileError: If ONNX Runtime does not take the model; ONNX Runtime's own error is its cause.
    """
    options = _options(optimize=optimize, prepacking=prepacking, threads=threads)
    options.use_deterministic_compute = True
    values = session_values(weights)
    configure(options)
    is_shared = not optimize and list(providers) == [CPU]
    with _weights_for(options, values, is_shared=is_shared):
        session = _create(content, options, providers)
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


def _options(*, optimize: bool, prepacking: bool, threads: int) -> onnxruntime.SessionOptions:
    onnxruntime = runtime()
    options = onnxruntime.SessionOptions()
    levels = onnxruntime.GraphOptimizationLevel
    options.graph_optimization_level = levels.ORT_ENABLE_ALL if optimize else levels.ORT_DISABLE_ALL
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = _FATAL_ONLY
    if not prepacking:
        options.add_session_config_entry("session.disable_prepacking", "1")
    return options


def _slower_fusions(model: ir.Model) -> tuple[str, ...]:
    """Return the optimizers of ONNX Runtime that make a model slower on the CPU.

    With 1.31, `SkipLayerNormalization` takes 4.2 ms for 16 texts of 128 tokens of width 768, `Add` and
    `LayerNormalization` 1.4 ms: 5 % of a DistilBERT. A decoder's step has one token, and is faster with fewer nodes.
    """
    graph = model.graph
    names = recognise_names([value.name or "" for value in graph.inputs], [value.name or "" for value in graph.outputs])
    return () if names is not None and names.cache else ("SkipLayerNormFusion",)


def _create(
    content: bytes, options: onnxruntime.SessionOptions, providers: Sequence[Provider], *, but: Sequence[str] = ()
) -> onnxruntime.InferenceSession:
    """Open a session on exactly these providers: ONNX Runtime itself goes on with the CPU when one is missing."""
    onnxruntime = runtime()
    _refuse_missing(providers, onnxruntime.get_available_providers(), "this ONNX Runtime was built without it")
    try:
        session = onnxruntime.InferenceSession(
            content, options, providers=list(providers), enable_fallback=0, disabled_optimizers=list(but)
        )
    except Exception as error:
        raise _refusal(error) from error
    _refuse_missing(providers, session.get_providers(), "it could not be started; its libraries may be missing")
    return session


def _refuse_missing(wanted: Sequence[Provider], there: Sequence[str], why: str) -> None:
    names = [provider if isinstance(provider, str) else provider[0] for provider in wanted]
    missing = [name for name in names if name not in there]
    if missing:
        raise SurgeryError(
            f"{missing[0]!r} is not available: {why}",
            hint=f"what there is: {', '.join(there)}; or install another build",
        )


def _located(content: bytes, weights: Mapping[str, ir.TensorProtocol]) -> tuple[bytes, str]:
    """Say in a skeleton where on disk its weights are, relative to a folder that is returned: empty if there are none.

    A weight inside a single-file model is a stretch of that file, which ONNX Runtime maps like any other.
    """
    regions = {name: tensor for name, tensor in weights.items() if isinstance(tensor, Region) and _is_on_disk(tensor)}
    if not regions:
        return content, ""
    paths = {region.path: os.path.realpath(region.path) for region in regions.values()}
    folder = os.path.commonpath([os.path.dirname(path) for path in paths.values()])
    proto = onnx.ModelProto.FromString(content)
    for tensor in proto.graph.initializer:
        region = regions.get(tensor.name)
        if region is None:
            continue
        del tensor.external_data[:]
        place = {
            "location": Path(os.path.relpath(paths[region.path], folder)).as_posix(),
            "offset": region.offset,
            "length": region.length,
        }
        for key, value in place.items():
            tensor.external_data.add(key=key, value=str(value))
    return proto.SerializeToString(), folder


def _is_on_disk(tensor: ir.TensorProtocol) -> bool:
    """Return whether a weight is still in the file of its path: the file may have been replaced since it was opened."""
    if not isinstance(tensor, Region):
        return False
    try:
        status = os.stat(tensor.path)
    except OSError:
        return False
    return (status.st_dev, status.st_ino) == (tensor.file.device, tensor.file.inode)


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
        options.add_session_config_entry(_FOLDER, folder)
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
