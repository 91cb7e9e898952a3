"""`audit_ranges` and `cast_fp16` on random graphs: valid, final, the same numbers, and the same bytes every time."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import ROOT
from drawing import drawn, feeds_of
from halving import assert_valid, cast_bundle, casting
from onnx.reference import ReferenceEvaluator
from rewriting import ROLE, run_pass

from passes.audit_ranges import AuditRanges, Ranges
from passes.clean_casts import CleanCasts
from surgery.accuracy.runners import ModelProgram
from surgery.contract import Bundle, Change, Context
from surgery.errors import RecipeError
from surgery.graphs import graphs_of
from surgery.runtime.farm import run_all
from surgery.text import to_text

Arrays = Mapping[str, np.ndarray]


def audited(model: ir.Model, samples: Sequence[Arrays]) -> Ranges:
    """Return what an audit finds."""

    def context(role: str) -> Context:
        return Context(role=role, run_all=run_all, feeds=lambda _, asked=None: iter(() if asked.round else samples))

    found = AuditRanges(patience=100).analyze(Bundle({ROLE: model}), context)[ROLE]
    assert isinstance(found, Ranges)
    return found


def samples_of(model: ir.Model, seed: int, *, wild: bool) -> list[Arrays]:
    names = {value.name for value in model.graph.inputs if not value.is_initializer()}
    return [{name: array for name, array in feeds.items() if name in names} for feeds in feeds_of(seed, wild=wild)]


def options(seed: int, model: ir.Model) -> dict[str, Any]:
    """Draw options of the pass that fit a model."""
    random = np.random.default_rng([seed, 7])
    nodes = [node for graph in graphs_of(model.graph) for node in graph if node.domain != "calm"]
    names = [node.op_type for node in nodes] + [node.name for node in nodes if node.name]
    ports = [value.name or "" for value in (*model.graph.inputs, *model.graph.outputs)]
    keep_io = random.choice(3)
    return {
        "keep": tuple(str(name) for name in random.choice(names, random.choice([0, 0, 1, 2]))),
        "keep_io": ("all", "none", tuple(str(name) for name in random.choice(ports, 2)))[keep_io],
        "headroom": float(random.choice([0.5, 0.5, 1, 0.1])),
        "runs_on": str(random.choice(["cuda", "cpu", "any"])),
    }


def assert_interface(before: ir.Model, after: ir.Model, keep_io: str | tuple[str, ...]) -> None:
    """Prove that inputs and outputs have their names and places, and types as asked for."""
    ports = [(*model.graph.inputs, *model.graph.outputs) for model in (before, after)]
    for old, new in zip(*ports, strict=True):
        assert old.name == new.name
        assert new.dtype in (old.dtype, ir.DataType.FLOAT16)
        if old.dtype != ir.DataType.FLOAT or keep_io == "all" or old.name in keep_io:
            assert old.dtype == new.dtype, old.name


def assert_close(before: Arrays, after: Arrays) -> None:
    """Prove that numbers are nearly the same, and all that is no float is the same."""
    assert before.keys() == after.keys()
    for name, array in before.items():
        assert array.shape == after[name].shape
        if array.dtype.kind != "f":
            np.testing.assert_array_equal(array, after[name])
            continue
        scale = max(1.0, float(np.sqrt(np.square(array.astype(np.float64)).mean()))) if array.size else 1.0
        assert np.abs(array.astype(np.float64) - after[name]).max(initial=0) < 0.03 * scale, name


def prove(seed: int, *, wild: bool) -> int:
    """Cast a random graph, prove what must hold of any, and return how many tensors became float16.

    Left out are graphs that ONNX Runtime itself does not take at some optimization level.
    """
    model = drawn(seed, wild=wild)
    try:
        assert_valid(model)
    except Exception as error:  # ONNX Runtime's optimizers have faults of their own
        if not type(error).__module__.startswith("onnxruntime"):
            raise
        return 0
    samples = samples_of(model, seed, wild=wild)
    ranges = audited(model, samples)
    asked = options(seed, model)
    pass_, before = casting(**asked), Bundle({ROLE: model})
    was = before.identities()
    after, change = cast_bundle(pass_, before, {ROLE: ranges})
    assert before.identities() == was
    if not change.count:
        assert change == Change(0, "")
        assert after.identities() == was
        return 0
    halved = after[ROLE]
    assert_valid(halved)
    assert_interface(model, halved, asked["keep_io"])
    claim = pass_.claims(before, after)[0]
    wanted = [value.name or "" for value in halved.graph.inputs if not value.is_initializer()]
    given = [claim.feed(sample, wanted) for sample in samples]
    with closing(ModelProgram(model)) as reference, closing(ModelProgram(halved)) as candidate:
        for sample, narrow in zip(samples, given, strict=True):
            expected, found = claim.expect(reference.run(sample)), candidate.run(narrow)
            if not wild:
                assert_close(expected, found)
    again, nothing = cast_bundle(pass_, after, {ROLE: audited(halved, given)})
    assert nothing == Change(0, ""), nothing
    assert again.identities() == after.identities()
    cleaned, _ = run_pass(CleanCasts(), halved)
    assert_valid(cleaned[ROLE])
    return change.count


def proven(seeds: Sequence[int]) -> int:
    """Prove it of several graphs, and name the one of which it is not true."""
    changed = 0
    for seed in seeds:
        try:
            changed += prove(seed, wild=bool(seed % 2))
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}\n{to_text(drawn(seed, wild=bool(seed % 2)))}") from error
    return changed


@pytest.mark.parametrize("start", range(0, 24, 8))
def test_random_graphs_are_cast_and_stay_valid_and_close(start: int):
    assert proven(range(start, start + 8)) > 20


@pytest.mark.long
@pytest.mark.parametrize("start", range(24, 1024, 50))
def test_many_random_graphs_are_cast_and_stay_valid_and_close(start: int):
    assert proven(range(start, start + 50)) > 100


class Listening(ReferenceEvaluator):
    """onnx's reference implementation, which tells what it computes, in bodies too."""

    heard: list[tuple[str, np.ndarray]] = []  # noqa: RUF012

    def _log(self, level: int, pattern: str, *args: Any) -> None:
        if level == 2 and len(args) == 2 and isinstance(args[1], np.ndarray):
            self.heard.append((args[0], args[1]))


def collects(graph: ir.Graph) -> bool:
    """Return whether a graph has a Loop that collects something, which the reference joins along the first axis."""
    return any(node.op_type == "Loop" and len(node.outputs) > len(node.inputs) - 2 for node in graph)


def test_what_an_audit_finds_in_bodies_is_what_the_reference_implementation_computes():
    checked = inside = 0
    for seed in range(0, 80, 2):
        model = drawn(seed)
        if any(map(collects, graphs_of(model.graph))):
            continue
        samples = samples_of(model, seed, wild=False)
        Listening.heard = []
        try:
            reference = Listening(ir.to_proto(model), verbose=2)
            for sample in samples:
                reference.run(None, dict(sample))
        except Exception:  # it lacks operators of ONNX Runtime, and has faults of its own
            continue
        ranges = audited(model, samples)
        seen: dict[str, list[np.ndarray]] = {}
        for name, array in Listening.heard:
            seen.setdefault(name, []).append(array.reshape(-1))
        for key, one in ranges.values.items():
            name = key.rpartition("/")[2]
            if name not in seen or name in "abcds":  # what functions compute has one name in all calls
                continue
            numbers = np.concatenate(seen[name])
            assert one.low == pytest.approx(min(numbers.min(initial=0), 0), rel=1e-4, abs=1e-5), f"{seed}: {key}"
            assert one.high == pytest.approx(max(numbers.max(initial=0), 0), rel=1e-4, abs=1e-5), f"{seed}: {key}"
            checked, inside = checked + 1, inside + ("/" in key)
    assert checked > 100
    assert inside > 20


def digest(seeds: Sequence[int]) -> str:
    """Return what tells apart what becomes of some graphs."""
    found = hashlib.sha256()
    for seed in seeds:
        model = drawn(seed, wild=bool(seed % 2))
        ranges = audited(model, samples_of(model, seed, wild=bool(seed % 2)))
        after, change = cast_bundle(casting(**options(seed, model)), Bundle({ROLE: model}), {ROLE: ranges})
        found.update(ir.to_proto(after[ROLE]).SerializeToString(deterministic=True))
        found.update("\n".join(change.details).encode())
    return found.hexdigest()


def test_the_same_bytes_and_reasons_come_out_whatever_the_hash_seed():
    script = "import test_cast_fp16_any_graph as it; print(it.digest(range(6)))"
    path = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(Path(__file__).parent)])
    runs = [
        subprocess.run(
            [sys.executable, "-c", script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": path},
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert runs[0] == runs[1]


def test_a_name_that_no_node_has_is_refused_in_words():
    model = drawn(0)
    with pytest.raises(RecipeError, match="no node is named 'nothing_like_it'"):
        cast_bundle(casting(keep=("nothing_like_it",)), Bundle({ROLE: model}), {ROLE: Ranges(values={}, samples=1)})
