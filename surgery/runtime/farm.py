"""One model run on many samples: in this process, in processes of this machine, or on a dask cluster."""

from __future__ import annotations

import os
import secrets
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING

import numpy as np
import onnx_ir as ir

from surgery.errors import RecipeError, SurgeryError
from surgery.runtime.sessions import in_written_order, open_skeleton
from surgery.storage.region import DataFile, Region
from surgery.storage.skeleton import skeleton

if TYPE_CHECKING:
    import onnxruntime

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Work:
    """A model that another process can open. Pickled it holds where weights on disk are, not what they are.

    Args:
        key: Tells it from all others.
        outputs: The names of the outputs to bring back.
        threads: How many threads run it.
    """

    key: str
    outputs: tuple[str, ...] = field(compare=False)
    threads: int = field(compare=False)
    content: bytes = field(compare=False, repr=False)
    weights: Mapping[str, _Weight] = field(compare=False, repr=False)


@dataclass(frozen=True)
class _Weight:
    """A tensor: a place in a file, or its numbers."""

    dtype: ir.DataType
    shape: tuple[int, ...]
    path: str = ""
    offset: int = 0
    content: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, tensor: ir.TensorProtocol) -> _Weight:
        shape = tuple(tensor.shape.numpy())
        if isinstance(tensor, Region):
            return cls(tensor.dtype, shape, tensor.path, tensor.offset)
        return cls(tensor.dtype, shape, content=tensor.tobytes())

    def tensor(self, files: dict[str, DataFile]) -> ir.TensorProtocol:
        if not self.path:
            array = np.frombuffer(self.content, self.dtype.numpy()).reshape(self.shape)
            return ir.Tensor(array, dtype=self.dtype)
        if self.path not in files:
            files[self.path] = DataFile(self.path)
        return Region(files[self.path], self.offset, self.dtype, ir.Shape(self.shape))


def run_all(
    model: ir.Model,
    samples: Iterable[Mapping[str, np.ndarray]],
    outputs: Sequence[str],
    *,
    workers: int = 1,
    cluster: str = "",
) -> Generator[Arrays, None, None]:
    """Yield some outputs of a model for each sample, in the order of the samples.

    Samples are drawn as they are needed: no more are under way than there are workers. Memory is given back between
    operators, not kept for the next: graphs of tens of thousands of small nodes open in a second this way, where
    planning the reuse of buffers would take minutes.

    Args:
        model: Any model; it stays as it is.
        samples: Inputs by name.
        outputs: The names of the outputs to bring back.
        workers: How many processes of this machine to run, which share its cores. With one the model is run right here.
            More need the usual `if __name__ == "__main__":` in a script.
        cluster: The address of a `dask.distributed` scheduler to use in their place (`tcp://host:8786`). Its workers
            have this package, and see the models' files under the same paths.

    Raises:
        SurgeryError: The cluster cannot be reached, or a worker is gone.
        SurgeryError: The model does not run with a sample.
        ModelFileError: ONNX Runtime does not take the model.
    """
    content, weights = skeleton(model)
    if not cluster and workers == 1:
        session = _open(content, weights, threads=0)
        for sample in samples:
            yield _run(session, outputs, sample)
        return
    kept = {name: _Weight.of(tensor) for name, tensor in weights.items()}
    threads = 0 if cluster else max(1, _cores() // workers)
    with _executor(workers, cluster) as (executor, at_once):
        work = _Work(secrets.token_hex(8), tuple(outputs), threads, content, kept)
        yield from _in_order(executor, work, samples, at_once)


def _in_order(
    executor: Executor, work: _Work, samples: Iterable[Mapping[str, np.ndarray]], at_once: int
) -> Iterator[Arrays]:
    waiting: deque[Future[Arrays]] = deque()
    for sample in samples:
        waiting.append(executor.submit(_run_there, work, dict(sample)))
        if len(waiting) >= at_once:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


@contextmanager
def _executor(workers: int, cluster: str) -> Iterator[tuple[Executor, int]]:
    """Give an executor, and how many samples it takes at once; what has not begun when it is left never runs."""
    if cluster:
        with _dask(cluster) as pair:
            yield pair
        return
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from multiprocessing import get_context

    pool = ProcessPoolExecutor(workers, mp_context=get_context("spawn"))
    try:
        yield pool, workers
    except BrokenProcessPool as error:
        raise SurgeryError(
            "a process that ran samples died",
            hint='fewer workers, if memory was short; in a script, `if __name__ == "__main__":` around the run',
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


@contextmanager
def _dask(address: str) -> Iterator[tuple[Executor, int]]:
    try:
        from distributed import Client
    except ImportError as error:
        raise RecipeError("a cluster needs dask.distributed", hint="pip install distributed") from error
    try:
        client = Client(address, timeout=10)
    except (OSError, ValueError) as error:
        raise SurgeryError(
            f"there is no dask scheduler at {address!r}", hint="say where it is: tcp://host:8786"
        ) from error
    with client:
        yield client.get_executor(pure=False), max(1, sum(client.nthreads().values()))


def _cores() -> int:
    return os.cpu_count() or 1


def _run_there(work: _Work, sample: Mapping[str, np.ndarray]) -> Arrays:
    return _run(_opened(work), work.outputs, sample)


@lru_cache(maxsize=1)
def _opened(work: _Work) -> onnxruntime.InferenceSession:
    files: dict[str, DataFile] = {}
    return _open(work.content, {name: weight.tensor(files) for name, weight in work.weights.items()}, work.threads)


def _open(content: bytes, weights: Mapping[str, ir.TensorProtocol], threads: int) -> onnxruntime.InferenceSession:
    return open_skeleton(content, weights, threads=threads or _cores(), configure=in_written_order)


def _run(session: onnxruntime.InferenceSession, outputs: Sequence[str], sample: Mapping[str, np.ndarray]) -> Arrays:
    wanted = {value.name: sample[value.name] for value in session.get_inputs()}
    try:
        arrays = session.run(list(outputs), wanted)
    except Exception as error:  # ONNX Runtime's own have no class of their own above them
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        shapes = ", ".join(f"{name} {array.dtype}{list(array.shape)}" for name, array in wanted.items())
        raise SurgeryError(f"the model does not run with {shapes}: {error}") from None
    return dict(zip(outputs, arrays, strict=True))
