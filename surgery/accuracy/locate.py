"""Finding the cause: the first values, in the order of execution, at which two graphs of one origin differ."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import islice

import numpy as np
import onnx_ir as ir

from surgery.accuracy.compare import compare_output
from surgery.accuracy.runners import ModelProgram
from surgery.contract import Effect, Tolerance

CHUNK = 64
SHOWN = 3


def first_differences(
    reference: ir.Model,
    candidate: ir.Model,
    reference_feeds: Mapping[str, np.ndarray],
    candidate_feeds: Mapping[str, np.ndarray],
    effect: Effect,
    tolerance: Tolerance,
) -> tuple[str, ...]:
    """Return the nodes of the candidate at which it first leaves the reference, at most three.

    Values of both main graphs that go by the same name are compared, a chunk of them at a time so that memory stays
    bounded; names say nothing across renaming passes, and then nothing may be found.
    """
    known = {value.name for node in reference.graph for value in node.outputs if value.name}
    shared = [value for node in candidate.graph for value in node.outputs if value.name in known]
    for chunk in _chunks(shared, CHUNK):
        names = [value.name for value in chunk if value.name]
        left = _intermediates(reference, names, reference_feeds)
        right = _intermediates(candidate, names, candidate_feeds)
        wrong = [
            name
            for name in names
            if name in left and name in right and _differ(left[name], right[name], effect, tolerance)
        ]
        if wrong:
            producers = {value.name: value.producer() for value in chunk}
            return tuple(_describe(producers[name]) for name in wrong[:SHOWN])
    return ()


def _chunks(values: Sequence[ir.Value], size: int) -> Iterator[list[ir.Value]]:
    iterator = iter(values)
    while chunk := list(islice(iterator, size)):
        yield chunk


def _intermediates(model: ir.Model, names: Sequence[str], feeds: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
    """Run a copy of the model that also gives these values."""
    copy = model.clone()
    given = {value.name for value in copy.graph.outputs}
    values = {value.name: value for node in copy.graph for value in node.outputs}
    copy.graph.outputs.extend(values[name] for name in names if name not in given)
    program = ModelProgram(copy)
    try:
        return program.run(feeds)
    finally:
        program.close()


def _differ(left: np.ndarray, right: np.ndarray, effect: Effect, tolerance: Tolerance) -> bool:
    if not isinstance(left, np.ndarray) or not isinstance(right, np.ndarray):
        return False
    return not compare_output("", left, right, effect, tolerance)


def _describe(node: ir.Node | None) -> str:
    assert node is not None
    return f"{node.name or node.outputs[0].name} ({node.op_type})"
