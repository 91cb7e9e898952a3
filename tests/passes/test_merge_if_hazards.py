"""`merge_if` where joins of graphs break: nested scopes, odd types, odd interfaces, functions, huge files."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from merging import branches, inner_names, merge, run
from models import decoder_pair
from onnx import TensorProto, helper
from rewriting import as_model
from storage.small_models import floats, outside

from passes.merge_if import MergeIf
from surgery import Pipeline
from surgery.contract import Bundle, Context
from surgery.errors import Refused
from surgery.provenance import CHANGED_BY, MADE_BY
from surgery.storage import open_model
from surgery.watchers.validity import find_problem

LONG = ", ".join(str(number / 8) for number in range(32))  # 128 bytes of float32
OTHER = ", ".join(str(number / 4) for number in range(32))


def apply(when_true: ir.Model, when_false: ir.Model, **options: object) -> ir.Model:
    bundle = Bundle({"decode": when_true, "prefill": when_false})
    MergeIf(**options).apply(bundle, lambda role: Context(role=role))
    return bundle["decoder"]


def refused(when_true: str | ir.Model, when_false: str | ir.Model, said: str, **options: object) -> None:
    with pytest.raises(Refused, match=said):
        apply(as_model(when_true), as_model(when_false), **options)


# Graphs inside nodes

LOOPS = """
{name} (int64 count, float[4] x) => (float[4] y, float[k, 4] all) <float[32] w = {{{weight}}}, int64[1] four = {{4}}> {{
    on = Constant <value = bool {{1}}> ()
    start = Constant <value = int64[1] {{{start}}}> ()
    y, all = Loop (count, on, x) <
        body = turn (int64 i, bool go, float[4] x_in) => (bool stays, float[4] x_out, float[4] row)
        <float[32] own = {{{own}}}> {{
            stays = Identity(go)
            stop = Add(start, four)
            part = Slice(w, start, stop)
            mine = Slice(own, start, stop)
            y = Add(part, x_in)
            x_out = Add(y, mine)
            row = If (go) <
                then_branch = yes () => (float[4] t) <float[4] four_f = {{1, 2, 3, 4}}> {{ t = Mul(x_out, four_f) }},
                else_branch = no () => (float[4] e) {{ e = Sub(x, x_out) }}
            >
        }}
    >
}}
"""


def test_loops_that_hold_ifs_keep_what_they_capture():
    same = LOOPS.format(name="decode", weight=LONG, own=OTHER, start=3)
    unlike = LOOPS.format(name="prefill", weight=OTHER, own=LONG, start=7)
    model, change = merge(same, unlike, feeds=[{"count": np.array(3), "x": np.arange(4, dtype=np.float32)}])
    assert len(model.graph.initializers) == 2
    assert change.summary.startswith("merged decode and prefill, 2 weights shared")
    outer = {value.name for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())}
    assert outer.isdisjoint(inner_names(model))


def test_scans_take_weights_from_outside():
    text = """
    {name} (float[n, 4] x) => (float[4] last, float[n, 4] sums) <float[32] w = {{{weight}}}> {{
        zero = Constant <value = int64[1] {{0}}> ()
        four = Constant <value = int64[1] {{4}}> ()
        start = Slice(w, zero, four)
        last, sums = Scan <num_scan_inputs = 1,
            body = step (float[4] state, float[4] row) => (float[4] next, float[4] shown) {{
                sum = Add(state, row)
                most = ReduceMax <keepdims = 0> (w)
                next = {op}(sum, most)
                shown = Identity(next)
            }}
        > (start, x)
    }}
    """
    model, _ = merge(
        text.format(name="decode", weight=LONG, op="Add"), text.format(name="prefill", weight=LONG, op="Sub")
    )
    assert list(model.graph.initializers) == ["w"]


def test_a_nested_graph_whose_value_hides_a_weight_of_the_other_model_gives_way():
    model, _ = merge(
        f"decode (float[n] x) => (float[m] y) <float[32] w = {{{LONG}}}> {{ y = Concat <axis = 0> (x, w) }}",
        """
        prefill (float[n] x, bool flag) => (float[m] y) {
            y = If (flag) <
                then_branch = yes () => (float[m] t) { w = Neg(x) t = Concat <axis = 0> (w, w) },
                else_branch = no () => (float[m] w) { w = Abs(x) }
            >
        }
        """,
    )
    assert "w" not in set(inner_names(model))


# Interfaces


def test_weights_that_callers_may_override_on_one_side_only_need_not_be_fed():
    model, _ = merge(
        "decode (float[n] x, float[1] scale = {2.0}) => (float[n] y) { y = Mul(x, scale) }",
        "prefill (float[n] x) => (float[n] y) { y = Neg(x) }",
    )
    flags = [np.array([value]) for value in (True, False)]
    x = np.array([3.0], np.float32)
    assert [run(model, x=x, use_cache_branch=flag)["y"].tolist() for flag in flags] == [[6.0], [-3.0]]
    assert run(model, x=x, scale=np.array([5.0], np.float32), use_cache_branch=flags[0])["y"].tolist() == [15.0]


def with_default(name: str, *sizes: int) -> ir.Model:
    shaped = [onnx.numpy_helper.from_array(np.arange(6, dtype=np.float32).reshape(sizes), "scale")]
    inputs, outputs = ([floats(value, ["a", "b"])] for value in ("scale", "y"))
    graph = helper.make_graph([helper.make_node("Transpose", ["scale"], ["y"])], name, inputs, outputs, shaped)
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))


def test_defaults_of_equal_bytes_and_two_shapes_are_two_defaults():
    refused(with_default("decode", 2, 3), with_default("prefill", 3, 2), "the input 'scale' has another default value")


def test_defaults_of_strings_are_compared_by_what_they_say():
    text = """
    {name} (float[n] x, string[1] word = {{"{word}"}}) => (float[n] y, string[1] said) {{
        y = {op}(x)
        said = Identity(word)
    }}
    """
    first = text.format(name="decode", word="w", op="Neg")
    model, _ = merge(first, text.format(name="prefill", word="w", op="Abs"))
    assert run(model, x=np.ones(1, np.float32), use_cache_branch=np.array([True]))["said"].tolist() == ["w"]
    refused(first, text.format(name="prefill", word="v", op="Abs"), "the input 'word' has another default value")


def test_an_output_that_is_a_small_weight_and_one_that_is_a_constant_are_given_by_the_branch():
    model, _ = merge(
        "decode (float[n] x) => (float[2] w, float[n] y, float[2] c) <float[2] w = {1, 2}> "
        "{ y = Neg(x) c = Constant <value = float[2] {3.0, 4.0}> () }",
        "prefill (float[n] x) => (float[n] y, float[2] c, float[2] w) <float[2] c = {5, 6}> "
        "{ y = Abs(x) w = Identity(c) }",
    )
    assert [value.name for value in model.graph.outputs] == ["w", "y", "c"]


def test_axes_that_only_share_a_name_promise_nothing_to_each_other():
    """`n` is the length of `x` in one model and of `z` in the other: when one runs, the other's is fed empty."""
    model, _ = merge(
        "decode (float[n] x, float[k] both) => (float[k] y) { s = ReduceSum <keepdims = 0> (x) y = Add(both, s) }",
        "prefill (float[n] z, float[k] both) => (float[k] y) { s = ReduceSum <keepdims = 0> (z) y = Sub(both, s) }",
    )
    assert {value.name: str(value.shape) for value in model.graph.inputs} == {
        "x": "[None]",
        "both": "[k]",
        "z": "[None]",
        "use_cache_branch": "[1]",
    }


def test_an_input_of_strings_on_one_side_and_an_output_of_strings_on_the_other_can_be_left_out():
    model, _ = merge(
        "decode (string[n] word, float[k] x) => (float[k] y) "
        "{ z = Cast <to = 1> (word) s = ReduceSum <keepdims = 0> (z) y = Add(x, s) }",
        "prefill (float[k] x) => (float[k] y, string[k] said, string one) "
        '{ y = Neg(x) said = Cast <to = 8> (x) one = Constant <value_string = "w"> () }',
        feeds=[{"word": np.array(["1", "2"], dtype=object), "x": np.ones(2, np.float32)}],
    )
    given = run(
        model,
        word=np.array(["1"], dtype=object),
        x=np.ones(2, np.float32),
        use_cache_branch=np.array([True]),
    )
    assert given["said"].shape == (0,)


def test_optional_inputs_that_are_left_out_stay_left_out():
    text = "{name} (float[n] x) => (float[n] y) <float low = {{0.25}}> {{ y = Clip(x, {bounds}) }}"
    model, _ = merge(
        text.format(name="decode", bounds="low"),
        text.format(name="prefill", bounds=", low"),
    )
    clip = next(node for node in branches(model)["else_branch"] if node.op_type == "Clip")
    assert [value is None for value in clip.inputs] == [False, True, False]


def test_models_without_nodes_are_joined():
    model, _ = merge(
        f"decode (float[n] x) => (float[n] x, float[32] w) <float[32] w = {{{LONG}}}> {{ }}",
        f"prefill (float[n] x) => (float[n] x, float[32] w) <float[32] w = {{{OTHER}}}> {{ }}",
    )
    assert [[node.op_type for node in branch] for branch in branches(model).values()] == [["Identity"], ["Identity"]]


def test_models_that_only_pass_inputs_on_are_refused():
    text = "{name} (float[n] x) => (float[n] x) {{ }}"
    refused(text.format(name="decode"), text.format(name="prefill"), "nothing to choose between")


def test_one_model_given_twice_becomes_two_equal_branches_over_one_copy():
    text = (
        f"{{name}} (float[n] x) => (float[m] y) <float[32] w = {{{{{LONG}}}}}> {{{{ y = Concat <axis = 0> (x, w) }}}}"
    )
    model, change = merge(text.format(name="decode"), text.format(name="prefill"))
    assert len(model.graph.initializers) == 1
    assert change.summary.endswith("1 weight shared, 128 B saved")
    twice = as_model(text.format(name="decode", weight=LONG))
    refused(twice, twice, "'prefill' is the same model as 'decode'")


SEQUENCE = """
<ir_version: 8, opset_import: ["" : 18]>
{name} (float[n] x, int64 at) => (seq(float[n]) rows) {{ a = {op}(x) rows = SequenceConstruct(x, a) }}
"""


def test_sequences_as_outputs_are_given_by_both_branches():
    made = apply(
        as_model(SEQUENCE.format(name="decode", op="Neg")), as_model(SEQUENCE.format(name="prefill", op="Abs"))
    )
    assert find_problem(made) == ""
    for flag, expected in ((True, -1.0), (False, 1.0)):
        rows = run(made, x=np.ones(1, np.float32), at=np.array(0), use_cache_branch=np.array([flag]))["rows"]
        assert [row.tolist() for row in rows] == [[1.0], [expected]]


@pytest.mark.parametrize(
    ("opset", "type_", "op", "said"),
    [
        (
            12,
            "seq(float[n])",
            "SequenceConstruct",
            r"the output 'y' is seq\(tensor\(float\)\), which an If of opset 12",
        ),
        (
            15,
            "optional(float[n])",
            "Optional",
            r"the output 'y' is optional\(tensor\(float\)\), which an If of opset 15",
        ),
    ],
)
def test_an_output_that_an_if_of_its_operator_set_cannot_give_is_refused(opset: int, type_: str, op: str, said: str):
    text = f'<ir_version: 8, opset_import: ["" : {opset}]> decode (float[n] x) => ({type_} y) {{ y = {op}(x) }}'
    refused(text, text.replace("decode", "prefill"), said)


def test_a_sequence_that_only_one_side_gives_or_takes_is_refused_by_name():
    plain = '<ir_version: 8, opset_import: ["" : 18]> prefill (float[n] x, int64 at) => (float[n] y) { y = Neg(x) }'
    refused(
        SEQUENCE.format(name="decode", op="Neg"), plain, "the output 'rows' is not given by 'prefill', and being no"
    )
    taking = (
        '<ir_version: 8, opset_import: ["" : 18]> decode (seq(float[n]) all, float[n] x, int64 at) => (float[n] y) '
        "{ y = SequenceAt(all, at) }"
    )
    refused(taking, plain, "the input 'all', which only 'decode' takes, is no tensor of known rank")


# Types


TYPED = [
    TensorProto.BFLOAT16,
    TensorProto.FLOAT16,
    TensorProto.DOUBLE,
    TensorProto.INT8,
    TensorProto.UINT8,
    TensorProto.INT4,
    TensorProto.UINT4,
    TensorProto.FLOAT8E4M3FN,
    TensorProto.BOOL,
    TensorProto.INT32,
]


def typed(name: str, dtype: int, content: bytes, op: str) -> ir.Model:
    """A model that casts a weight of 2 rows to float and adds it to x."""
    bits = 4 if dtype in (TensorProto.INT4, TensorProto.UINT4) else helper.tensor_dtype_to_np_dtype(dtype).itemsize * 8
    columns = len(content) * 8 // bits // 2
    weight = helper.make_tensor("w", dtype, [2, columns], content, raw=True)
    nodes = [
        helper.make_node("Cast", ["w"], ["f"], to=TensorProto.FLOAT),
        helper.make_node("ReduceSum", ["f"], ["s"], keepdims=0),
        helper.make_node(op, ["x", "s"], ["y"]),
    ]
    graph = helper.make_graph(nodes, name, [floats("x", ["n"])], [floats("y", ["n"])], [weight])
    return ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10))


@pytest.mark.parametrize("dtype", TYPED, ids=TensorProto.DataType.Name)
@pytest.mark.parametrize("length", [16, 256], ids=["small", "large"])
def test_weights_of_every_type_are_shared_when_large_and_kept_when_small(dtype: int, length: int):
    content = bytes(number % 2 for number in range(length))  # valid in every type, bool among them
    models = [typed(name, dtype, content, op) for name, op in (("decode", "Add"), ("prefill", "Sub"))]
    model, _ = merge(*models)
    assert len(model.graph.initializers) == (1 if length > 128 else 0)


def test_weights_of_equal_bytes_and_unlike_types_or_shapes_are_not_one():
    content = bytes(range(0, 256, 2)) * 2
    models = [typed("decode", TensorProto.UINT8, content, "Add"), typed("prefill", TensorProto.INT8, content, "Sub")]
    assert len(merge(*models)[0].graph.initializers) == 2
    bent = typed("prefill", TensorProto.UINT8, content, "Sub")
    bent.graph.initializers["w"].const_value = ir.Tensor(
        bent.graph.initializers["w"].const_value.numpy().reshape(4, 64), name="w"
    )
    bent.graph.initializers["w"].shape = ir.Shape([4, 64])
    assert len(merge(typed("decode", TensorProto.UINT8, content, "Add"), bent)[0].graph.initializers) == 2


def test_weights_of_strings_stay_with_their_branches():
    text = """
    {name} (int64[n] x) => (string[n] y) {{
        words = Constant <value_strings = ["{word}", "a word that is longer than a hundred and twenty-eight bytes, so \
that it would be a large weight if it were one of numbers, which it is not"]> ()
        y = Gather(words, x)
    }}
    """
    model, _ = merge(
        text.format(name="decode", word="one"),
        text.format(name="prefill", word="two"),
        feeds=[{"x": np.array([0, 1, 0])}],
    )
    assert list(model.graph.initializers) == []


def test_decoders_of_two_precisions_are_refused_by_the_output_that_shows_it():
    pair = decoder_pair()
    half = pair["prefill"].clone()
    logits = half.graph.outputs[0]
    half.graph.append(ir.Node("", "Cast", [logits], [ir.AttrInt64("to", ir.DataType.FLOAT16)], name="down"))
    cast = half.graph[-1].outputs[0]
    cast.name, logits.name = "logits", "wide"
    cast.type, cast.shape = ir.TensorType(ir.DataType.FLOAT16), logits.shape
    half.graph.outputs[0] = cast
    refused(pair["decode"], half, "the output 'logits' is float in 'decode' and float16 in 'prefill'")


def test_a_weight_in_two_precisions_is_two_where_the_outputs_agree():
    content = np.linspace(0, 1, 64, dtype=np.float32).reshape(2, 32)
    models = [
        typed("decode", TensorProto.FLOAT, content.tobytes(), "Add"),
        typed("prefill", TensorProto.FLOAT16, content.astype(np.float16).tobytes(), "Sub"),
    ]
    assert len(merge(*models)[0].graph.initializers) == 2


# Functions

CALLS = """
<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
{name} (float[n] x) => (float[n] y) {{ y = local.outer(x) }}
<domain: "local", opset_import: ["" : 18, "local" : 1]>
outer (a) => (b) {{ b = local.inner(a) }}
<domain: "local", opset_import: ["" : 18]>
inner (a) => (b) {{ b = {op}(a) }}
"""


def test_a_function_that_calls_one_that_differs_differs_too():
    model, _ = merge(CALLS.format(name="decode", op="Neg"), CALLS.format(name="prefill", op="Exp"))
    assert sorted(function.name for function in model.functions.values()) == [
        "inner",
        "inner_prefill",
        "outer",
        "outer_prefill",
    ]
    equal, _ = merge(CALLS.format(name="decode", op="Neg"), CALLS.format(name="prefill", op="Neg"))
    assert len(equal.functions) == 2


def test_a_function_named_like_an_operator_of_the_other_model_is_refused():
    """By the specification the function comes first; ONNX Runtime 1.31 takes its own operator."""
    opsets = '<ir_version: 8, opset_import: ["" : 18, "com.microsoft" : 1]>'
    text = f"{opsets} {{name}} (float[n] x) => (float[n] y) {{{{ y = com.microsoft.Gelu(x) }}}}"
    function = '<domain: "com.microsoft", opset_import: ["" : 18]> Gelu (a) => (b) { b = Neg(a) }'
    refused(
        text.format(name="decode") + function,
        text.format(name="prefill"),
        "'Gelu' of 'com.microsoft' is a function in 'decode' and an operator in the other model",
    )


def test_functions_hold_graphs_and_constants_of_their_own():
    text = """
    <ir_version: 8, opset_import: ["" : 18, "local" : 1]>
    {name} (float[n] x, bool c) => (float[n] y) {{ y = local.choose(x, c) }}
    <domain: "local", opset_import: ["" : 18]>
    choose (a, c) => (b) {{
        b = If (c) <
            then_branch = yes () => (float[n] t) {{ two = Constant <value = float {{{number}}}> () t = Mul(a, two) }},
            else_branch = no () => (float[n] e) {{ e = Neg(a) }}
        >
    }}
    """
    model, _ = merge(text.format(name="decode", number="2.0"), text.format(name="prefill", number="3.0"))
    assert len(model.functions) == 2


# Operator sets


def test_the_two_names_of_the_main_domain_are_one_domain():
    def named(domain: str, name: str, opset: int, op: str) -> ir.Model:
        opsets = f'<ir_version: 8, opset_import: ["{domain}" : {opset}]>'
        return as_model(f"{opsets} {name} (float[n] x) => (float[n] y) {{ y = {op}(x) }}")

    model, _ = merge(named("ai.onnx", "decode", 17, "Neg"), named("", "prefill", 18, "Abs"))
    assert dict(model.graph.opset_imports) == {"": 18}


OLD = """
<ir_version: 8, opset_import: ["" : 11]>
prefill (float[n, 512] x) => (float[n] y, float[512] shown) <float[512] w = {{{weight}}}> {{
    k = Constant <value = float[512] {{{weight}}}> ()
    s = Mul(x, w)
    shown = Identity(k)
    high = Constant <value = float {{1000.0}}> ()
    c = Clip(s, , high)
    y = ReduceSum <axes = [1], keepdims = 0> (c)
}}
"""
NEW = """
<ir_version: 8, opset_import: ["" : 18]>
decode (float[n, 512] x) => (float[n] y) {
    one = Constant <value = int64[1] {1}> ()
    y = ReduceSum <keepdims = 0> (x, one)
}
"""


def test_conversion_keeps_weights_names_and_metadata():
    old = as_model(OLD.format(weight=", ".join(str(number / 8) for number in range(512))))
    for node in old.graph:
        node.name = f"/{node.op_type}"
        node.metadata_props["namespace"] = "layer"
    old.graph.inputs[0].metadata_props["pkg"] = "torch"
    old.metadata_props["made"] = "here"
    model, _ = merge(as_model(NEW), old)
    assert list(model.graph.initializers) == ["w"]  # `w` and `k` are of one content
    kept = {node.name: dict(node.metadata_props) for node in branches(model)["else_branch"] if node.name}
    assert kept["/Mul"] == kept["/ReduceSum"] == {"namespace": "layer"}
    assert model.graph.inputs[0].metadata_props == {"pkg": "torch"}
    assert model.metadata_props == {"made": "here"}


def test_a_changed_operator_inside_a_graph_is_refused_since_the_converter_does_not_look_there():
    old = """
    <ir_version: 8, opset_import: ["" : 11]>
    prefill (float[n, 4] x, bool c) => (float[n] y) {
        y = If (c) <
            then_branch = yes () => (float[n] t) { t = ReduceSum <axes = [1], keepdims = 0> (x) },
            else_branch = no () => (float[n] e) { e = ReduceMax <axes = [1], keepdims = 0> (x) }
        >
    }
    """
    new = NEW.replace("512", "4").replace("decode (float[n, 4] x)", "decode (float[n, 4] x, bool c)")
    refused(
        new, old, "'prefill' is of opset 11 of 'ai.onnx', the other of 18, and 'ReduceMax' has changed.* in a graph"
    )


def test_models_that_use_no_operator_of_onnx_itself_get_an_operator_set_with_an_if():
    text = """
    <ir_version: 8, opset_import: ["com.microsoft" : 1]>
    {name} (float[n] x) => (float[n] y) {{ y = com.microsoft.{op}(x) }}
    """
    model, _ = merge(text.format(name="decode", op="Gelu"), text.format(name="prefill", op="QuickGelu"))
    assert model.graph.opset_imports == {"": 16, "com.microsoft": 1}


def test_an_operator_that_only_takes_more_types_has_not_changed_in_graphs_either():
    old = """
    <ir_version: 8, opset_import: ["" : 11]>
    prefill (float[n, 4] x, bool c) => (float[n] y) {
        s = ReduceSum <axes = [1], keepdims = 0> (x)
        y = If (c) <
            then_branch = yes () => (float[n] t) { t = Add(s, s) },
            else_branch = no () => (float[n] e) { e = Neg(s) }
        >
    }
    """
    merge(NEW.replace("512", "4").replace("float[n, 4] x)", "float[n, 4] x, bool c)"), old)


# Metadata, provenance


def test_documentation_survives_where_it_belongs():
    models = [as_model(f"{name} (float[n] x) => (float[n] y) {{ y = Neg(x) }}") for name in ("decode", "prefill")]
    for model in models:
        model.doc_string = "a decoder"
        model.ir_version = 10 if model is models[0] else 8
        model.graph[0].metadata_props["pkg"] = model.graph.name or ""
        model.graph[0].doc_string = "minus"
        model.graph.metadata_props["graph"] = model.graph.name or ""
    made = apply(*models)
    assert (made.doc_string, made.ir_version) == ("a decoder", 10)
    assert [branch.metadata_props for branch in branches(made).values()] == [{"graph": "decode"}, {"graph": "prefill"}]
    nodes = [branch[0] for branch in branches(made).values()]
    assert [(node.doc_string, node.metadata_props["pkg"]) for node in nodes] == [
        ("minus", "decode"),
        ("minus", "prefill"),
    ]


def test_what_only_the_second_model_says_of_itself_and_of_its_values_is_kept():
    first, second = (
        as_model(f"{name} (float[n] x) => (float[n] y) {{ y = Neg(x) }}") for name in ("decode", "prefill")
    )
    second.producer_name, second.domain, second.model_version = "maker", "here", 3
    second.graph.inputs[0].doc_string, second.graph.outputs[0].doc_string = "numbers", "their opposites"
    for value, said in ((first.graph.inputs[0], "1"), (second.graph.inputs[0], "2")):
        value.metadata_props.update({"unlike": said, "both": "3"})
    made = apply(first, second)
    assert (made.producer_name, made.domain, made.model_version) == ("maker", "here", 3)
    assert (made.graph.inputs[0].doc_string, made.graph.outputs[0].doc_string) == ("numbers", "their opposites")
    assert made.graph.inputs[0].metadata_props == {"both": "3"}


def test_only_the_if_counts_as_made_and_what_gives_a_renamed_value_as_changed():
    result = Pipeline([MergeIf()]).run(decoder_pair())
    nodes = list(result.bundle["decoder"].graph.all_nodes())
    made = [node.op_type for node in nodes if MADE_BY in node.metadata_props]
    changed = [node for node in nodes if CHANGED_BY in node.metadata_props]
    assert made == ["If"]
    renamed = ("present", "logits", "past_key", "input_ids")
    assert all(
        any(str(value.name).split("/")[-1].startswith(renamed) for value in (*node.inputs, *node.outputs) if value)
        for node in changed
    )
    assert len(changed) < len(nodes) / 3


# Huge files


ROWS, COLUMNS, SHARED = 16384, 1024, 33
WEIGHT_BYTES = ROWS * COLUMNS * 4


def sparse_pair(folder: Path, form: str) -> Path:
    """Two models that share 33 weights of 64 MiB, 2.2 GB, and have one each of their own; nearly all of it is holes."""
    folder.mkdir()
    for role, file, op in (("prefill", "decoder_model", "Neg"), ("decode", "decoder_with_past_model", "Exp")):
        names = [*(f"w{index}" for index in range(SHARED)), f"own_{role}"]
        nodes = [helper.make_node("Gather", [name, "ids"], [f"y_{name}"]) for name in names]
        nodes.append(helper.make_node("Sum", [f"y_{name}" for name in names], ["sum"]))
        nodes.append(helper.make_node(op, ["sum"], ["y"]))
        ids = helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])
        graph = helper.make_graph(nodes, role, [ids], [floats("y", ["n", COLUMNS])])
        proto = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
        path = folder / f"{file}.onnx"
        (write_external if form == "external" else write_single)(proto, names, path, np.float32(len(role)))
    return folder


def write_external(proto: onnx.ModelProto, names: list[str], path: Path, last: np.float32) -> None:
    data = path.with_name(f"{path.name}_data")
    for index, name in enumerate(names):
        place = {"location": data.name, "offset": index * WEIGHT_BYTES, "length": WEIGHT_BYTES}
        proto.graph.initializer.append(outside(name, [ROWS, COLUMNS], **place))
    path.write_bytes(proto.SerializeToString())
    with data.open("wb") as stream:
        stream.truncate(len(names) * WEIGHT_BYTES)
        stream.seek(SHARED * WEIGHT_BYTES)
        stream.write(last.tobytes())


def write_single(proto: onnx.ModelProto, names: list[str], path: Path, last: np.float32) -> None:
    """Write one file above the limit of protobuf's own library; repeated fields may follow the rest of a message."""
    heads = []
    for name in names:
        tensor = TensorProto(name=name, data_type=TensorProto.FLOAT, dims=[ROWS, COLUMNS]).SerializeToString()
        body = tensor + field(9, WEIGHT_BYTES)  # raw_data
        heads.append(field(5, len(body) + WEIGHT_BYTES) + body)  # initializer
    graph = proto.graph.SerializeToString()
    size = len(graph) + sum(map(len, heads)) + len(names) * WEIGHT_BYTES
    proto.ClearField("graph")
    with path.open("wb") as stream:
        stream.write(proto.SerializeToString() + field(7, size) + graph)  # graph
        for head in heads:
            stream.write(head)
            if head is heads[-1]:
                stream.write(last.tobytes())
                stream.seek(-last.nbytes, 1)
            stream.seek(WEIGHT_BYTES, 1)
        stream.truncate()


def field(number: int, length: int) -> bytes:
    """The key and the length of a length-delimited field."""
    found = [number << 3 | 2]
    while length > 127:
        found.append(length & 127 | 128)
        length >>= 7
    return bytes([*found, length])


@pytest.mark.parametrize("form", ["external", pytest.param("single", marks=pytest.mark.long)])
def test_parts_over_two_gigabytes_are_merged_in_little_memory(tmp_path: Path, form: str):
    folder = sparse_pair(tmp_path / "pair", form)
    (tmp_path / "r.yaml").write_text("source: pair\nsteps: [merge_if]\noutput: out\n")
    script = """
        import re, runpy, sys
        from pathlib import Path
        sys.argv = ["surgery", "run", "r.yaml", "--no-check"]
        try:
            runpy.run_module("surgery", run_name="__main__")
        finally:
            status = Path("/proc/self/status").read_text()
            print("MB", int(re.search(r"RssAnon:\\s+(\\d+)", status)[1]) // 1024)
    """
    command = [sys.executable, "-c", textwrap.dedent(script)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert int(done.stdout.split("MB")[-1]) < 200
    merged = open_model(tmp_path / "out" / "decoder_model_merged.onnx")
    assert len(merged.graph.initializers) == 3  # the holes are one weight, and each model has one of its own
    given = run(merged, ids=np.array([0, 5]), use_cache_branch=np.array([False]))["y"]
    np.testing.assert_array_equal(given, run(open_model(folder / "decoder_model.onnx"), ids=np.array([0, 5]))["y"])
    assert given[0, 0] == -len("prefill")
