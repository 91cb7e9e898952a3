"""Polygraphy runners for programs: one model, a model fed through a claim's maps, a host loop, PyTorch."""

from __future__ import annotations

import os
import re
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import numpy as np
import onnx_ir as ir
from polygraphy.backend.base import BaseRunner
from polygraphy.backend.onnxrt import OnnxrtRunner
from polygraphy.common import TensorMetadata
from polygraphy.datatype import DataType
from polygraphy.exception import PolygraphyException

from surgery.accuracy.half import holds_half, lower_half
from surgery.claims import AnyProgram, HostLoop, Program
from surgery.errors import StepFailed, SurgeryError
from surgery.runtime.loops import LOOPS, Callee, Signature
from surgery.runtime.sessions import CPU, in_written_order, open_session

Arrays = dict[str, np.ndarray]

MOST_THREADS = 8
_CODE = re.compile(r"^\[ONNXRuntimeError\] : \d+ : \w+ : ")
_CPP_PLACE = re.compile(r"Status Message: (?:/\S+ )?(?:[^()]*\([^)]*\) )?")


class Runnable(Protocol):
    """Something that runs on named arrays."""

    is_emulated: bool
    """Half precision is emulated: a GPU would round as this does."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs that must be fed."""

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """Return the outputs by name."""


class ModelProgram:
    """A model in a session of ours, in Polygraphy's ONNX Runtime runner.

    All graph optimizations are off, nothing is prepacked, there is one provider and a fixed number of threads: with any
    of these otherwise, equal graphs may differ in the last bits. What is in half precision is emulated: on the CPU
    ONNX Runtime would compute it in float32.

    Args:
        model: The model.
        provider: Where to run it; on another than the CPU nothing is emulated.
    """

    def __init__(self, model: ir.Model, provider: str = CPU) -> None:
        self.is_emulated = provider == CPU and holds_half(model)
        providers = (CPU,) if provider == CPU else (provider, CPU)
        lowered = lower_half(model) if self.is_emulated else model
        # Emulated, each weight is widened where it is read: at most one should be there wide.
        configure = in_written_order if self.is_emulated else lambda options: None
        self.session = open_session(lowered, threads=threads(), providers=providers, configure=configure)
        self._inputs = tuple(value.name for value in self.session.get_inputs())
        self.outputs = tuple(value.name for value in self.session.get_outputs())
        self.signature = Signature.of(model)
        self._runner = OnnxrtRunner(self.session)
        self._runner.activate()

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs that must be fed."""
        return self._inputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """Return the outputs by name; ONNX Runtime itself refuses a feed of the wrong type or rank.

        Raises:
            SurgeryError: An output is a sequence, a map, or an optional value that is not there.
        """
        outputs = dict(self._runner.infer({name: feeds[name] for name in self._inputs}, check_inputs=False))
        other = next((name for name, array in outputs.items() if not isinstance(array, np.ndarray)), None)
        if other is not None:
            raise SurgeryError(f"the output {other!r} is no tensor, so nothing can be compared", hint="--no-check")
        return outputs

    def close(self) -> None:
        """Let go of the session."""
        self._runner.deactivate()


def threads() -> int:
    """Return how many threads every session has that is judged by: results are comparable only at one number."""
    return min(os.cpu_count() or 1, MOST_THREADS)


class LoopProgram:
    """A host loop over the models of a bundle."""

    def __init__(
        self, loop: HostLoop, models: Mapping[str, ModelProgram], generation_config: Mapping[str, Any]
    ) -> None:
        self._run = LOOPS[loop.name]
        self._models = {role: Callee(model.signature, model.run) for role, model in models.items()}
        self.is_emulated = any(model.is_emulated for model in models.values())
        self._config = generation_config

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return ("input_ids", "attention_mask", "max_new_tokens")

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """Return `sequences`."""
        return self._run(self._models, feeds, self._config)


class Reference(Protocol):
    """What the source was exported from, to judge the export itself."""

    def run(self, role: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs that the model of a role should give."""


class ReferenceProgram:
    """One role of a reference."""

    is_emulated = False

    def __init__(self, reference: Reference, role: str, inputs: tuple[str, ...]) -> None:
        self._reference = reference
        self._role = role
        self._inputs = inputs

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of the inputs."""
        return self._inputs

    def run(self, feeds: Mapping[str, np.ndarray]) -> Arrays:
        """Return the outputs by name."""
        return self._reference.run(self._role, dict(feeds))


class DoesNotRun(StepFailed):
    """A program raised on a sample.

    Args:
        program: What was run.
        reason: What the runtime says.
    """

    def __init__(self, program: str, reason: str, sample: str = "") -> None:
        on_sample = f" on sample {sample!r}" if sample else ""
        super().__init__(f"{program} does not run{on_sample}: {reason}")
        self.program = program
        self.reason = reason

    def on(self, sample: str) -> DoesNotRun:
        """Return the error with the sample's name in it."""
        return DoesNotRun(self.program, self.reason, sample)


@contextmanager
def runtime_errors(program: str) -> Iterator[None]:
    """Turn what ONNX Runtime and Polygraphy raise into an error that says what was being run.

    Raises:
        DoesNotRun: Something did.
    """
    try:
        yield
    except SurgeryError:
        raise
    except (PolygraphyException, RuntimeError, ValueError, KeyError, IndexError) as error:
        raise DoesNotRun(program, _reason(error)) from error
    except Exception as error:
        if type(error).__module__.startswith("onnxruntime"):
            raise DoesNotRun(program, _reason(error)) from error
        raise


def _reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return _CPP_PLACE.sub("", _CODE.sub("", text.splitlines()[0])).strip()


class ProgramRunner(BaseRunner):  # type: ignore[misc]
    """Runs a program in Polygraphy's Comparator.

    Polygraphy coerces every feed to what a runner says of its inputs: it pairs names loosely and casts types. So each
    runner here says what the samples are, and a candidate whose inputs have changed meets them as they are.

    Args:
        program: What to run.
        name: What Polygraphy calls it.
        label: What errors call it.
        metadata: The names and types of the samples.
        feed: Turns a sample into the program's inputs.
    """

    def __init__(
        self,
        program: Runnable,
        name: str,
        label: str,
        metadata: TensorMetadata,
        feed: Callable[[Mapping[str, np.ndarray]], Mapping[str, np.ndarray]],
    ) -> None:
        super().__init__(name=name, prefix="surgery")
        self._program = program
        self._label = label
        self._metadata = metadata
        self._feed = feed

    def get_input_metadata_impl(self) -> TensorMetadata:
        """Return the names and types of the samples."""
        return self._metadata

    def infer_impl(self, feed_dict: Mapping[str, np.ndarray]) -> OrderedDict[str, np.ndarray]:
        """Map the feeds and run."""
        feeds = self._feed(feed_dict)
        start = time.perf_counter()
        with runtime_errors(self._label):
            outputs = OrderedDict(self._program.run(feeds))
        self.inference_time = time.perf_counter() - start
        return outputs


def metadata_of(arrays: Mapping[str, np.ndarray]) -> TensorMetadata:
    """Return Polygraphy's description of a sample: names, types, ranks."""
    metadata = TensorMetadata()
    for name, array in arrays.items():
        metadata.add(name, dtype=DataType.from_dtype(array.dtype), shape=[None] * array.ndim)
    return metadata


class Programs:
    """Opens the programs of bundles and keeps those sessions that are still of use.

    Args:
        provider: Where all of them run.
    """

    def __init__(self, provider: str = CPU) -> None:
        self._provider = provider
        self._open: dict[str, ModelProgram] = {}

    def model(self, model: ir.Model, identity: str) -> ModelProgram:
        """Return a model's program; models that are identical share a session."""
        if identity not in self._open:
            self._open[identity] = ModelProgram(model, self._provider)
        return self._open[identity]

    def program(
        self,
        program: AnyProgram,
        models: Mapping[str, ir.Model],
        identities: Mapping[str, str],
        config: Mapping[str, Any],
    ) -> Runnable:
        """Return a program over some models.

        Raises:
            StepFailed: It runs a model that is not there.
        """
        missing = [role for role in program.roles if role not in models]
        if missing:
            raise StepFailed(f"the claim on {program} runs {missing[0]!r}, which the bundle does not have")
        opened = {role: self.model(models[role], identities[role]) for role in program.roles}
        if isinstance(program, Program):
            return opened[program.role]
        return LoopProgram(program, opened, config)

    def forget_all_but(self, identities: set[str]) -> None:
        """Close the sessions of models that are not among these."""
        for identity in set(self._open) - identities:
            self._open.pop(identity).close()

    def close(self) -> None:
        """Close every session."""
        self.forget_all_but(set())
