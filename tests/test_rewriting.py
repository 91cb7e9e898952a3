"""The proofs themselves: what they let pass, and that each kind of broken pass fails them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
import pytest
from rewriting import as_model, assert_leaves_alone, assert_rewrites, assert_text, one_if_deeper, sample_feeds

from surgery.contract import Change, Context, Effect, ModelPass, Tolerance
from surgery.graphs import graphs_of

TWICE = """
    g (float[2] x) => (float[2] y) {
        a = Neg(x)
        b = Neg(a)
        y = Exp(b)
    }
    """
ONCE = """
    g (float[2] x) => (float[2] y) {
        y = Exp(x)
    }
    """


class DropDoubleNeg(ModelPass):
    """Neg(Neg(x)) -> x"""

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        return self.said(sum(self.drop_in(graph) for graph in self.graphs(model)))

    def graphs(self, model: ir.Model) -> Iterable[ir.Graph]:
        return graphs_of(model.graph)

    def said(self, count: int) -> Change:
        return Change(count, f"dropped {count} pairs") if count else Change(0, "")

    def drop_in(self, graph: ir.Graph) -> int:
        count = 0
        for node in graph:
            before = node.inputs[0].producer() if node.op_type == "Neg" and node.inputs[0] else None
            if before is not None and before.op_type == "Neg":
                node.outputs[0].replace_all_uses_with(self.replacement(before))
                graph.remove([node, before], safe=True)
                count += 1
        return count

    def replacement(self, inner: ir.Node) -> ir.Value:
        (value,) = inner.inputs
        assert value is not None
        return value


def test_a_right_pass_is_proven():
    assert_rewrites(DropDoubleNeg(), TWICE, ONCE)
    assert_leaves_alone(DropDoubleNeg(), ONCE)


def test_another_text_fails():
    with pytest.raises(AssertionError, match=r"(?s)-    y = Log \(x\).*\+    y = Exp \(x\)"):
        assert_rewrites(DropDoubleNeg(), TWICE, ONCE.replace("Exp", "Log"))


class DropDoubleNegOfMain(DropDoubleNeg):
    def graphs(self, model: ir.Model) -> Iterable[ir.Graph]:
        return [model.graph]


def test_a_pass_that_forgets_branches_fails():
    with pytest.raises(AssertionError, match="nothing was changed in"):
        assert_rewrites(DropDoubleNegOfMain(), TWICE, ONCE)


class DropDoubleNegSilently(DropDoubleNeg):
    def said(self, count: int) -> Change:
        return Change(0, "")


def test_a_pass_that_does_not_say_what_it_did_fails():
    with pytest.raises(AssertionError, match="nothing was changed"):
        assert_rewrites(DropDoubleNegSilently(), TWICE, ONCE)
    with pytest.raises(AssertionError, match="changed to"):
        assert_leaves_alone(DropDoubleNegSilently(), TWICE)


class DropDoubleNegLoudly(DropDoubleNeg):
    def said(self, count: int) -> Change:
        return Change(count, f"dropped {count} pairs")


def test_a_pass_that_talks_when_it_has_nothing_to_do_fails():
    with pytest.raises(AssertionError, match="the second run"):
        assert_rewrites(DropDoubleNegLoudly(), TWICE, ONCE)


class DropNegs(DropDoubleNeg):
    """Also wrong: keeps the first."""

    def replacement(self, inner: ir.Node) -> ir.Value:
        return inner.outputs[0]

    def drop_in(self, graph: ir.Graph) -> int:
        negs = [node for node in graph if node.op_type == "Neg"]
        for node in negs[1:]:
            node.outputs[0].replace_all_uses_with(self.replacement(negs[0]))
            graph.remove(node, safe=True)
        return len(negs[1:])


def test_other_numbers_fail():
    with pytest.raises(AssertionError, match="'y' is off by .* the step must be exact"):
        assert_rewrites(DropNegs(), TWICE, ONCE)


class Rename(ModelPass):
    def rewrite(self, model: ir.Model, context: Context) -> Change:
        model.graph.outputs[0].name = "renamed"
        return Change(1, "renamed the output")


def test_an_output_of_another_name_fails_unless_a_claim_says_so():
    with pytest.raises(AssertionError):
        assert_rewrites(Rename(), ONCE, ONCE.replace("y", "renamed"))


class AddNoise(ModelPass):
    """Move `Exp` by a share that the options of the test decide."""

    share: float
    effect = Effect.CLOSE
    tolerance = Tolerance(max_error=1e-3, p999_error=1e-3)

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        count = 0
        for graph in graphs_of(model.graph):
            for node in [node for node in graph if node.op_type == "Exp"]:
                weight = ir.Value(name=f"{node.outputs[0].name}_share", const_value=ir.tensor(np.float32(self.share)))
                graph.register_initializer(weight)
                sum_ = ir.Node("", "Sum", [node.inputs[0], weight], name="")
                node.op_type = "Elu"
                graph.insert_before(node, sum_)
                node.replace_input_with(0, sum_.outputs[0])
                count += 1
        return Change(count, "moved" if count else "")


def test_a_close_pass_may_move_the_numbers_within_its_tolerance():
    before = "g (float[2] x) => (float[2] y) { p = Abs(x) q = Add(p, p) y = Exp(q) }"
    with pytest.raises(AssertionError, match="limit 0.001"):
        assert_rewrites(AddNoise(share=0.5), before, before)


def test_a_graph_that_is_not_valid_is_the_test_s_fault():
    with pytest.raises(AssertionError, match="the test's own graph is not valid"):
        assert_rewrites(DropDoubleNeg(), "g (float[2] x) => (float[2] y) { y = Neg(z) }", ONCE)


def test_one_if_deeper_keeps_the_interface_and_captures_inputs():
    model = as_model(
        """
        g (bool c, float[2] x, float[2] b) => (float[2] y, float[2] x, float[2] a)
        <float[2] a = {1, 2}, float[2] b = {3, 4}> {
            p = Add(x, a)
            y = Mul(p, b)
        }
        """
    )
    branch = """
        g_%s () => (float[2] y_%s, float[2] a_%s) <float[2] a = {1, 2}> {
            p = Add(x, a)
            y_%s = Mul(p, b)
            a_%s = Identity(a)
        }
        """
    then, else_ = (branch.replace("%s", name) for name in ("then", "else"))
    assert_text(
        one_if_deeper(model),
        f"""
        g (bool c, float[2] x, float[2] b, bool one_if_deeper) => (float[2] y, float[2] x, float[2] a)
        <float[2] b = {{3, 4}}> {{
            y, a = If (one_if_deeper) <then_branch = {then}, else_branch = {else_}>
        }}
        """,
    )


def test_samples_set_every_flag_both_ways_and_are_the_same_each_time():
    model = as_model("g (bool c, bool d, float[N, 2] x, int64[N] ids, string[1] s) => (float[N, 2] y) { y = Neg(x) }")
    samples = list(sample_feeds(model))
    assert [(bool(sample["c"]), bool(sample["d"]), len(sample["x"])) for sample in samples] == [
        (c, d, size) for c in (True, False) for d in (True, False) for size in (2, 3)
    ]
    assert all(sample["ids"].dtype == np.int64 for sample in samples)
    np.testing.assert_equal(samples, list(sample_feeds(model)))
