"""Watchers: what Validity refuses, what Snapshots keeps, what the Ledger measures."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest

from surgery import Bundle, Change, Context, ModelPass, Pipeline
from surgery.manager import StepRecord
from surgery.storage import open_model
from surgery.text import parse
from surgery.watchers import Ledger, Snapshots
from surgery.watchers.ledger import MemoryMeter, anonymous_bytes
from surgery.watchers.validity import find_problem

GRAPH = """
g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
    a = Add(x, w)
    b = Neg(a)
    y = If (c) <
        then_branch = t () => (float[2] s) { s = Mul(b, w) },
        else_branch = e () => (float[2] r) { r = Neg(b) }
    >
}
"""


def node(graph: ir.Graph, operator: str) -> ir.Node:
    return next(found for found in graph.all_nodes() if found.op_type == operator)


def name_twice(model: ir.Model) -> None:
    node(model.graph, "Neg").outputs[0].name = "a"


def name_twice_in_a_branch(model: ir.Model) -> None:
    branch = node(model.graph, "If").attributes["then_branch"].as_graph()
    extra = ir.node("Neg", [model.graph.inputs[1]])
    extra.outputs[0].name = "s"
    branch.insert_before(branch[0], extra)


def out_of_order(model: ir.Model) -> None:
    first = node(model.graph, "Add")
    model.graph.remove(first)
    model.graph.append(first)


def wrong_output_type(model: ir.Model) -> None:
    model.graph.outputs[0].dtype = ir.DataType.INT64


def wrong_input_type(model: ir.Model) -> None:
    model.graph.initializers["w"].const_value = ir.tensor(np.array([1, 2]), name="w")
    model.graph.initializers["w"].dtype = ir.DataType.INT64


def unknown_operator(model: ir.Model) -> None:
    node(model.graph, "Neg").op_type = "Negate"


def unknown_attribute(model: ir.Model) -> None:
    node(model.graph, "Add").attributes["axis"] = ir.AttrInt64("axis", 1)


def taken_away(model: ir.Model) -> None:
    model.graph.remove(node(model.graph, "Add"))


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (name_twice, "'a'"),
        (name_twice_in_a_branch, "'s'"),
        (out_of_order, "'a'"),
        (wrong_output_type, "y"),
        (wrong_input_type, "Add"),
        (unknown_operator, "Negate"),
        (unknown_attribute, "axis"),
        (taken_away, "'a'"),
    ],
)
def test_a_graph_that_is_not_valid_is_named(damage: Callable[[ir.Model], None], said: str) -> None:
    model = parse(GRAPH)
    assert find_problem(model) == ""
    damage(model)
    assert said in find_problem(model)


class Double(ModelPass):
    """Doubles a weight and halves it again, in a new tensor."""

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        value = model.graph.initializers["w"]
        assert value.const_value is not None
        value.const_value = ir.tensor(value.const_value.numpy() * 2 / 2, name="w")
        model.metadata_props["doubled"] = "yes"
        return Change(1, "doubled 1 weight")


def test_snapshots_share_the_weights_that_no_step_changed(tmp_path: Path) -> None:
    weight = np.random.default_rng(0).standard_normal((300,)).astype(np.float32)
    zeros = ", ".join(["0"] * 300)
    model = parse(f"g (float[300] x) => (float[300] y) <float[300] w = {{{zeros}}}> {{ y = Add(x, w) }}")
    model.graph.initializers["w"].const_value = ir.tensor(weight, name="w")
    bundle = Bundle({"model": model})
    snapshots = Snapshots()
    for number, word in enumerate(("source", "mine:Idle", "other")):
        snapshots.stepped(StepRecord(number, word, bundle, bundle))
    snapshots.save(tmp_path / "steps")
    assert sorted(file.name for file in (tmp_path / "steps").glob("*.onnx")) == [
        "0_source.model.onnx",
        "1_Idle.model.onnx",
        "2_other.model.onnx",
    ]
    assert (tmp_path / "steps" / "weights.onnx_data").stat().st_size == weight.nbytes
    again = open_model(tmp_path / "steps" / "2_other.model.onnx").graph.initializers["w"].const_value
    assert again is not None
    np.testing.assert_array_equal(again.numpy(), weight)


def test_the_ledger_has_a_line_for_the_source_and_each_step() -> None:
    records = Pipeline([Double(), Double()]).run(Bundle({"model": parse(GRAPH)})).records
    assert [(record.number, record.word) for record in records] == [(0, "source"), (1, "double"), (2, "double")]
    assert all(record.peak_bytes and record.peak_bytes > 1_000_000 for record in records)


def test_the_meter_sees_memory_that_was_let_go_again() -> None:
    if anonymous_bytes() is None:
        pytest.skip("this system does not tell anonymous memory")
    meter = MemoryMeter()
    meter.start()
    before = anonymous_bytes() or 0
    held = np.ones(200_000_000, dtype=np.uint8)
    time.sleep(0.1)
    del held
    assert (meter.stop() or 0) - before > 150_000_000


def test_a_ledger_shows_each_line_when_it_is_complete() -> None:
    shown: list[int] = []
    ledger = Ledger(lambda record: shown.append(record.number))
    bundle = Bundle({})
    for number in range(3):
        ledger.starting(number, "x")
        ledger.stepped(StepRecord(number, "x", bundle, bundle))
    assert shown == [0, 1, 2]
