"""`hoist`: what both branches compute alike is computed before the `If`, once, and nothing else is."""

from __future__ import annotations

import pytest
from merging import branches, inner_names, merge
from models import decoder_pair

from passes.merge_if import MergeIf
from surgery import Pipeline


def moved(when_true: str, when_false: str) -> list[str]:
    """Return the operators before the `If`, of a merged model that is proven to answer as both models did."""
    model, change = merge(when_true, when_false, hoist=True)
    before = [node.op_type for node in model.graph if node.op_type != "If"]
    said = f", {len(before)} node{'s' if len(before) != 1 else ''} moved before the If"
    assert change.summary.endswith(said) == bool(before)
    outer = {value.name for node in model.graph for value in node.outputs}
    outer |= {value.name for value in (*model.graph.inputs, *model.graph.initializers.values())}
    assert outer.isdisjoint(inner_names(model))
    return before


def test_a_chain_is_moved_with_the_constants_that_it_needs():
    text = """
    {name} (int64[n, k] x) => (float[m] y) <int64[1] flat = {{-1}}> {{
        f = Cast <to = 1> (x)
        two = Constant <value = float {{2.0}}> ()
        d = Mul(f, two)
        line = Reshape(d, flat)
        again = Mul(line, two)
        y = {end}(again)
    }}
    """
    both = [text.format(name=name, end=end) for name, end in (("decode", "Neg"), ("prefill", "Exp"))]
    assert moved(*both) == ["Cast", "Mul", "Reshape", "Mul"]
    model, _ = merge(*both, hoist=True)
    assert [[node.op_type for node in branch] for branch in branches(model).values()] == [["Neg"], ["Exp"]]
    assert all(not branch.initializers for branch in branches(model).values())


def test_a_constant_that_is_needed_in_a_branch_too_stays_there_as_well():
    text = """
    {name} (float[n] x) => (float[n] y) {{
        two = Constant <value = float {{2.0}}> ()
        d = Mul(x, two)
        e = {op}(d)
        y = Add(e, two)
    }}
    """
    both = [text.format(name=name, op=op) for name, op in (("decode", "Neg"), ("prefill", "Exp"))]
    assert moved(*both) == ["Mul"]
    model, _ = merge(*both, hoist=True)
    assert [branch[0].op_type for branch in branches(model).values()] == ["Constant", "Constant"]


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("c = Constant <value = float {2.0}> () a = Mul(x, c)", "c = Constant <value = float {3.0}> () a = Mul(x, c)"),
        ("a = Clip(x, low)", "a = Clip(x, , low)"),
        ("a = ReduceSum <keepdims = 1> (x)", "a = ReduceSum <keepdims = 0> (x)"),
        ("a = RandomUniformLike <seed = 1.0> (x)", "a = RandomUniformLike <seed = 1.0> (x)"),
        ("a, mask = Dropout(x)", "a = Neg(x)"),
    ],
)
def test_what_differs_in_any_way_or_draws_anew_stays(first: str, second: str):
    opsets = '<ir_version: 8, opset_import: ["" : 18]>'
    rest = "b = Shape(a) f = Cast <to = 1> (b) s = ReduceMax <keepdims = 0> (f)"
    texts = [
        f"{opsets} {name} (float[n] x) => (float[n] y) <float low = {{0.0}}> {{ {nodes} {rest} y = {end}(x, s) }}"
        for name, nodes, end in (("decode", first, "Add"), ("prefill", second, "Sub"))
    ]
    assert moved(*texts) == []


def test_bits_of_a_constant_are_of_one_type():
    """1.0 as a float has the bits of 1065353216 as an integer."""
    nodes = "c = Constant <value = {value}> () f = Cast <to = 1> (c) y = {op}(x, f)"
    text = f"{{name}} (float[n] x) => (float[n] y) {{{{ {nodes} }}}}"
    both = [
        text.format(name="decode", value="float {1.0}", op="Add"),
        text.format(name="prefill", value="int32 {1065353216}", op="Sub"),
    ]
    assert moved(*both) == []


def test_outputs_of_a_branch_and_nodes_with_graphs_stay():
    text = """
    {name} (float[n] x, bool flag) => (float[n] y, float[n] z) {{
        z = Neg(x)
        chosen = If (flag) <
            then_branch = yes () => (float[n] t) {{ t = Abs(x) }},
            else_branch = no () => (float[n] e) {{ e = Exp(x) }}
        >
        y = {op}(chosen, z)
    }}
    """
    assert moved(text.format(name="decode", op="Add"), text.format(name="prefill", op="Sub")) == []


def test_a_graph_inside_a_branch_reads_what_was_moved():
    text = """
    {name} (float[n] x, bool flag) => (float[n] y) {{
        a = Neg(x)
        b = Abs(a)
        y = If (flag) <
            then_branch = yes () => (float[n] t) {{ u = {op}(b, a) t = Exp(u) }},
            else_branch = no () => (float[n] e) {{ e = {op}(a, b) }}
        >
    }}
    """
    assert moved(text.format(name="decode", op="Add"), text.format(name="prefill", op="Sub")) == ["Neg", "Abs"]


def test_a_moved_value_gives_way_to_one_of_its_name_in_the_other_branch():
    assert moved(
        "decode (float[n] x) => (float[n] y) { a = Neg(x) b = Exp(x) y = Add(a, b) }",
        "prefill (float[n] x) => (float[n] y) { b = Neg(x) a = Abs(x) y = Sub(a, b) }",
    ) == ["Neg"]


def test_a_moved_value_promises_only_the_axes_that_both_branches_do():
    model, _ = merge(
        "decode (float[n, 1] x) => (float[n, 1] y) { a = Neg(x) y = Exp(a) }",
        "prefill (float[n, s] x) => (float[n, s] y) { a = Neg(x) y = Abs(a) }",
        hoist=True,
    )
    neg = model.graph[0]
    assert neg.op_type == "Neg"
    assert neg.outputs[0].shape is None or neg.outputs[0].shape == ["n", None]


def test_equal_nodes_of_one_branch_become_one():
    assert moved(
        "decode (float[n] x) => (float[n] y) { a = Neg(x) b = Neg(x) y = Add(a, b) }",
        "prefill (float[n] x) => (float[n] y) { a = Neg(x) y = Exp(a) }",
    ) == ["Neg"]


def test_what_the_runtime_fuses_with_a_product_stays_beside_it():
    content = ", ".join(str(number % 100) for number in range(64))
    text = """
    {name} (float[n, 8] x) => (float[n, 8] y) <int8[8, 8] w = {{{content}}}, float s = {{0.1}}, int8 z = {{0}}> {{
        f = DequantizeLinear(w, s, z)
        p = MatMul(x, f)
        y = {op}(p)
    }}
    """
    both = [text.format(name=name, content=content, op=op) for name, op in (("decode", "Neg"), ("prefill", "Abs"))]
    assert moved(*both) == []


def test_a_decoder_pair_is_exact_in_both_branches_when_hoisted():
    result = Pipeline([MergeIf(hoist=True)]).run(decoder_pair())
    assert str(result.records[1].verdict.source) == "exact"
    assert "moved before the If" in result.records[1].change.summary
