"""Provenance: which nodes say what a step did to them, and which say nothing."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import onnx
import onnx_ir as ir
import pytest

from surgery import Bundle, Change, Check, Context, ModelPass, Pipeline, storage
from surgery.claims import Claim, Program, Take
from surgery.provenance import CHANGED_BY, MADE_BY, stamp
from surgery.text import parse

BEFORE = """
<ir_version: 10, opset_import: ["": 18]>
g (float[n] x, bool flag) => (float[n] y) {
    [first] a = Neg(x)
    [second] b = Abs(a)
    [choice] y = If (flag) <
        then_branch = yes () => (t) { [inner] t = Neg(b) },
        else_branch = no () => (e) { [other] e = Identity(b) }
    >
}
"""


def stamps(model: ir.Model) -> dict[str, Mapping[str, str]]:
    return {str(node.name): dict(node.metadata_props) for node in model.graph.all_nodes() if node.metadata_props}


def edited(edit: str, into: str) -> ir.Model:
    """Return the model of `BEFORE` after a step, `drop_it (step 1)`, that turned one piece of its text into another."""
    before, after = parse(BEFORE), parse(BEFORE.replace(edit, into))
    stamp({"model": before}, {"model": after}, "drop_it (step 1)")
    return after


def test_a_model_that_a_step_left_alone_says_nothing():
    assert stamps(edited("nothing", "something")) == {}


def test_a_node_that_was_not_there_is_made():
    model = edited("[second] b = Abs(a)", "[new] c = Exp(a) [second] b = Abs(a)")
    assert stamps(model) == {"new": {MADE_BY: "drop_it (step 1)"}}


def test_a_node_with_another_input_is_changed_and_keeps_its_name():
    assert stamps(edited("[second] b = Abs(a)", "[second] b = Abs(x)")) == {"second": {CHANGED_BY: "drop_it (step 1)"}}


def test_a_renamed_node_is_known_again_by_its_output():
    assert stamps(edited("[second]", "[third]")) == {"third": {CHANGED_BY: "drop_it (step 1)"}}


def test_another_operator_for_the_same_output_is_made():
    assert stamps(edited("[second] b = Abs(a)", "[second] b = Exp(a)")) == {"second": {MADE_BY: "drop_it (step 1)"}}


def test_a_node_in_a_branch_is_changed_and_the_node_around_it_is_not():
    assert stamps(edited("t = Neg(b)", "t = Neg(x)")) == {"inner": {CHANGED_BY: "drop_it (step 1)"}}


def test_nodes_that_move_to_another_model_are_left_alone():
    before, after = parse(BEFORE), parse(BEFORE)
    stamp({"prefill": before}, {"decoder": after}, "merge (step 2)")
    assert stamps(after) == {}


@pytest.mark.parametrize("weight", ["{1.0, 2.0}", "{1.0, 3.0}"])
def test_a_small_constant_is_told_by_what_it_holds(weight: str):
    text = "g (float[2] x) => (float[2] y) { [c] c = Constant <value = float[2] {1.0, 2.0}> () [s] y = Add(x, c) }"
    after = parse(text.replace("{1.0, 2.0}", weight))
    stamp({"model": parse(text)}, {"model": after}, "edit (step 1)")
    assert ("c" in stamps(after)) == (weight != "{1.0, 2.0}")


UNNAMED = "g (float[n] x) => (float[n] y) { a = Neg(x) y = Abs(a) }"


class Rename(ModelPass):
    """Rename the input and all that nodes make; a new node at the end makes the output."""

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        graph = model.graph
        for value in (*graph.inputs, *(value for node in graph for value in node.outputs)):
            value.name = f"new_{value.name}"
        last = graph.outputs[0]
        made = ir.node("Identity", [last]).outputs[0]
        made.name, made.type, made.shape = "y", last.type, last.shape
        graph.append(made.producer())
        graph.outputs[0] = made
        return Change(1, "renamed all")

    def claims(self, before: Bundle, after: Bundle) -> list[Claim]:
        return [Claim(Program("model"), Program("model"), inputs={"new_x": Take("x")})]


def test_a_node_without_a_name_whose_values_are_renamed_is_changed_and_not_made():
    bundle = Bundle({"model": parse(UNNAMED)})
    with Pipeline([Rename()], Check(lengths=[3])).run(bundle) as result:
        said = {node.op_type: set(node.metadata_props) for node in result.bundle["model"].graph}
    assert said == {"Neg": {CHANGED_BY}, "Abs": {CHANGED_BY}, "Identity": {MADE_BY}}


class Rewire(ModelPass):
    """Let the second node read what the first one reads, once more at each step."""

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        second = next(node for node in model.graph if node.name == "second")
        double = ir.node("Neg", [second.inputs[0]], name=f"{second.inputs[0].name}/Neg")
        again = ir.node("Neg", double.outputs, name=f"{second.inputs[0].name}/Neg_1")
        model.graph.insert_before(second, [double, again])
        second.replace_input_with(0, again.outputs[0])
        return Change(1, "rewired one node")


def test_each_step_of_a_run_adds_to_what_a_node_says_and_files_keep_it(tmp_path: Path):
    bundle = Bundle({"model": parse(BEFORE)})
    with Pipeline([Rewire(), Rewire()], Check(lengths=[3])).run(bundle) as result:
        result.save(tmp_path / "out")
    said = stamps(storage.open_model(tmp_path / "out" / "model.onnx"))
    assert said["second"][CHANGED_BY].split(", ") == ["rewire (step 1)", "rewire (step 2)"]
    assert said["a/Neg"] == {MADE_BY: "rewire (step 1)"}
    assert "first" not in said
    assert stamps(bundle["model"]) == {}


def test_stamps_do_not_raise_the_ir_version_that_a_model_needs(tmp_path: Path):
    bundle = Bundle({"model": parse(BEFORE.replace("ir_version: 10", "ir_version: 8"))})
    with Pipeline([Rewire()], Check(lengths=[3])).run(bundle) as result:
        result.save(tmp_path / "out")
    proto = onnx.load(tmp_path / "out" / "model.onnx")
    onnx.checker.check_model(proto, full_check=True)
    assert proto.ir_version == 8
