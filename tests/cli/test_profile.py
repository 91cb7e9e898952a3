"""`surgery profile` and its sums: nothing counted twice, nodes inside branches and loops found."""

from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx.parser
import onnx_ir as ir
import pytest
from click.testing import Result

from surgery.errors import SurgeryError
from surgery.runtime.profiling import Layout, profile_model, sum_events

Call = Callable[..., Result]

LOOP = """
<ir_version: 10, opset_import: ["" : 18]>
counted (float[n] x, int64 trips) => (float[n] y) {
    go = Constant <value = bool {1}> ()
    [counting] y = Loop (trips, go, x) <body = turn (int64 step, bool goes, float[n] held) => (bool on, float[n] next) {
        on = Identity(goes)
        [doubled] bent = Tanh(held)
        [added] next = Add(bent, held)
    }>
}
"""
GELU = """
<ir_version: 10, opset_import: ["" : 18]>
bent (float[n, 8] x) => (float[n, 8] y) {
    root = Constant <value = float {1.4142135}> ()
    one = Constant <value = float {1.0}> ()
    half = Constant <value = float {0.5}> ()
    [scaled] a = Div(x, root)
    [bell] b = Erf(a)
    [raised] c = Add(b, one)
    [times] d = Mul(x, c)
    [halved] y = Mul(d, half)
}
"""


def _model(text: str) -> ir.Model:
    return ir.serde.deserialize_model(onnx.parser.parse_model(text))


def test_own_times_of_all_nodes_and_what_is_between_are_the_whole(merged_adder: Path, call: Call) -> None:
    done = call("profile", merged_adder, "--runs", "4", "--threads", "1", "--json", "-")
    assert done.exit_code == 0, done.output
    content = json.loads(done.stdout)
    own = sum(node["seconds"] for node in content["nodes"])
    assert sum(content["runs"]) == pytest.approx(content["seconds"])
    assert own + content["between_seconds"] == pytest.approx(content["seconds"])
    assert 0 < own < content["seconds"]
    assert sum(one["seconds"] for one in content["operators"]) == pytest.approx(own)
    assert len(content["runs"]) == 4


@pytest.mark.parametrize(
    ("branch", "place", "tokens"),
    [("decode", "decoder/If.then_branch", "past 32"), ("prefill", "decoder/If.else_branch", "length 32, past 0")],
)
def test_the_nodes_of_the_branch_that_ran_are_there(
    merged_adder: Path, call: Call, branch: str, place: str, tokens: str
) -> None:
    done = call("profile", merged_adder, "--branch", branch, "--runs", "2", "--json", "-")
    content = json.loads(done.stdout)
    nodes = {(node["place"], node["operator"]): node for node in content["nodes"]}
    assert {found for found, _ in nodes} == {"", place}
    assert tokens in content["fed"]
    assert (place, "Attention") in nodes
    choice = next(node for node in content["nodes"] if node["operator"] == "If")
    inside = sum(node["seconds"] for node in content["nodes"] if node["place"] == place)
    assert choice["seconds"] + inside <= choice["inclusive_seconds"]
    assert choice["calls"] == 2


def test_a_loop_is_charged_without_its_body_whose_nodes_run_every_trip() -> None:
    feeds = {"x": np.ones(1000, np.float32), "trips": np.array(7)}
    found = profile_model(_model(LOOP), feeds, runs=3, warmup=2, level="none", threads=1)
    assert len(found.runs) == 3
    body = {node.name: node for node in found.nodes if node.place}
    assert {name: node.calls for name, node in body.items() if name in ("doubled", "added")} == {
        "doubled": 21,
        "added": 21,
    }
    (loop,) = (node for node in found.nodes if node.operator == "Loop")
    assert loop.calls == 3
    assert loop.seconds + sum(node.seconds for node in body.values()) <= loop.inclusive_seconds
    assert {node.place for node in body.values()} == {"counting.body"}


def test_a_fused_node_says_which_nodes_it_is_for_and_another_does_not() -> None:
    feeds = {"x": np.ones((2, 8), np.float32)}
    (fused,) = profile_model(_model(GELU), feeds, runs=1, threads=1).nodes
    assert fused.operator == "Gelu"
    assert fused.originals == ("scaled", "bell", "raised", "times", "halved")
    plain = profile_model(_model(GELU), feeds, runs=1, level="none", threads=1).nodes
    assert {node.name for node in plain} == {"scaled", "bell", "raised", "times", "halved"}
    assert not [node for node in plain if node.originals]


def test_the_model_stays_as_it_is_and_nothing_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    model = _model(GELU)
    before = ir.serde.serialize_model(model).SerializeToString()
    profile_model(model, {"x": np.ones((2, 8), np.float32)}, runs=1)
    assert ir.serde.serialize_model(model).SerializeToString() == before
    assert list(tmp_path.iterdir()) == []


def _node(name: str, start: int, length: int) -> dict[str, object]:
    return {"cat": "Node", "name": f"{name}_kernel_time", "ts": start, "dur": length, "args": {"op_name": name}}


def _session(name: str, start: int, length: int) -> dict[str, object]:
    return {"cat": "Session", "name": name, "ts": start, "dur": length, "args": {}}


def test_nested_events_are_subtracted_once() -> None:
    """An If of 50 that runs a branch of 40, in which a node takes 30; beside it a node of 20, in a run of 100."""
    run = "SequentialExecutor::Execute"
    events = [
        _session("session_initialization", 0, 5),
        _node("Add", 10, 20),
        _node("Mul", 41, 30),
        _session(run, 40, 40),
        _node("If", 35, 50),
        _session(run, 8, 90),
        _session("model_run", 5, 100),
    ]
    found = sum_events(events)
    own = {node.operator: round(node.seconds * 1e6) for node in found.nodes}
    assert own == {"Add": 20, "Mul": 30, "If": 10}
    assert {node.operator: node.place for node in found.nodes} == {"Add": "", "Mul": "If", "If": ""}
    assert round(found.between_seconds * 1e6) == 40


def test_runs_to_warm_up_are_left_out() -> None:
    run = [_node("Add", 1, 2), _session("SequentialExecutor::Execute", 1, 3), _session("model_run", 0, 4)]
    assert sum_events([*run, *run, *run], warmup=2).nodes[0].calls == 1
    with pytest.raises(SurgeryError, match="no run that counts"):
        sum_events(run, warmup=1)


def test_a_profile_that_was_cut_off_is_refused() -> None:
    events = [_node("Add", 1, 2)] * 1_000_000
    with pytest.raises(SurgeryError, match="1,000,000 events"):
        sum_events(events)


def test_a_layout_names_every_subgraph_by_its_node() -> None:
    assert set(Layout.of(_model(LOOP).graph, None).places) == {"", "counting.body"}


def test_tables_bars_and_the_picture_show_the_top(foreign_t5: Path, call: Call, tmp_path: Path) -> None:
    picture = tmp_path / "new" / "p.svg"
    done = call("profile", foreign_t5, "--runs", "2", "--top", "3", "--plot", picture)
    assert done.exit_code == 0, done.output
    assert "by operator" in done.stdout
    assert "(between nodes)" in done.stdout
    assert "%  " in done.stdout
    assert "there is also prefill, decode, encoder: --role" in done.stdout
    assert ElementTree.parse(picture).getroot().tag.endswith("svg")


def test_a_file_is_profiled_as_well_as_a_bundle(comparer: Path, call: Call) -> None:
    done = call("profile", comparer / "model.onnx", "--runs", "1", "--batch", "2", "--length", "5", "--unoptimized")
    assert done.exit_code == 0, done.output
    assert "batch 2, length 5" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--role", "decode"), "did you mean 'decoder'?"),
        (("--level", "al"), "did you mean 'all'?"),
        (("--branch", "prefill", "--past", "3"), "there is no past"),
        (("--branch", "both"), "--branch prefill or decode"),
        (("--past", "256"), "positions are more than the 256"),
        (("--plot", "p.gif"), "pictures are .svg or .png"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_profiled_is_said(merged_adder: Path, call: Call, arguments: tuple[str, ...], said: str) -> None:
    done = call("profile", merged_adder, *arguments)
    assert done.exit_code == 2
    assert said in done.stderr


def test_a_model_without_branches_has_none_to_choose(comparer: Path, call: Call) -> None:
    done = call("profile", comparer, "--branch", "decode")
    assert done.exit_code == 2
    assert "'model' has no branches" in done.stderr
