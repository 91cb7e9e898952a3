"""`cast_fp16` on random graphs, with casts, branches and loops: valid, of nearly the same numbers, and final."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from halving import assert_valid, cast_bundle, casting
from rewriting import ROLE, assert_same_numbers, sample_feeds
from test_clean_casts_random import Drawing

from passes.audit_ranges import Ranges
from surgery.accuracy.runners import ModelProgram
from surgery.bundle import Bundle
from surgery.contract import Change

NOTHING = {ROLE: Ranges(values={}, samples=1)}


def runs(model: ir.Model) -> bool:
    """Return whether ONNX Runtime runs a model: 1.31 removes pairs of casts of which a body uses the result."""
    with closing(ModelProgram(model)) as program:
        try:
            program.run(next(sample_feeds(model)))
        except onnxruntime.capi.onnxruntime_pybind11_state.Fail as error:
            if "Missing Input" not in str(error):
                raise
            return False
    return True


def cast_drawing(seed: int) -> None:
    """Cast a random graph of which random nodes must stay, and prove what can be proven of it."""
    before = Bundle({ROLE: Drawing(seed).model()})
    random = np.random.default_rng(seed)
    names = [node.name or node.outputs[0].name or "" for node in before[ROLE].graph.all_nodes()]
    keep = [str(name) for name in random.choice(names, size=min(len(names), int(random.integers(0, 5))), replace=False)]
    keep_io = "all" if random.integers(2) else "none"
    pass_ = casting(keep=keep, keep_io=keep_io)
    after, change = cast_bundle(pass_, before, NOTHING)
    if not change.count:
        return
    assert_valid(after[ROLE])
    if seed % 2 == 0 and runs(before[ROLE]):  # the others hold numbers of any size, which nothing was told about
        assert_same_numbers(pass_, before, after)
    again, nothing = cast_bundle(casting(keep_io=keep_io), after, NOTHING)
    assert nothing == Change(0, "")
    assert again.identities() == after.identities()


@pytest.mark.parametrize("start", range(0, 40, 10))
def test_random_graphs(start: int):
    for seed in range(start, start + 10):
        cast_drawing(seed)


@pytest.mark.long
@pytest.mark.parametrize("start", range(40, 1040, 100))
def test_many_random_graphs(start: int):
    for seed in range(start, start + 100):
        cast_drawing(seed)
