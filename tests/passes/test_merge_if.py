"""`merge_if`: what the merged model looks like, that both branches answer as before, and what is refused."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import onnx_ir as ir
import pytest
from merging import branches, merge, run
from models import decoder_pair
from rewriting import as_model, assert_text

from passes.dedup_weights import DedupWeights
from passes.merge_if import MergeIf
from surgery import Pipeline
from surgery.claims import Claim, Program, Slice, Take
from surgery.contract import Bundle, BundlePass, Change, Context, ModelPass, makes, takes
from surgery.errors import Refused
from surgery.graphs import graphs_of
from surgery.watchers.validity import find_problem

LONG = ", ".join(str(number / 8) for number in range(32))  # 128 bytes of float32
OTHER = ", ".join(str(number / 4) for number in range(32))


# What it looks like


def test_two_models_become_the_branches_of_an_if_over_weights_that_both_see():
    model, change = merge(
        f"""
        decode (float[n] x, float[p] past) => (float[m] y) <float[32] w = {{{LONG}}}> {{
            joined = Concat <axis = 0> (past, x)
            y = Concat <axis = 0> (joined, w)
        }}
        """,
        f"""
        prefill (float[n] x) => (float[k] y) <float[32] w = {{{LONG}}}> {{
            y = Concat <axis = 0> (x, w)
        }}
        """,
    )
    assert_text(
        model,
        f"""
        decoder (float[n] x, float[p] past, bool[1] use_cache_branch) => (float[] y)
        <float[32] w = {{{LONG}}}> {{
            y = If (use_cache_branch) <
                then_branch = decode () => (float[m] y_1) {{
                    joined = Concat <axis = 0> (past, x)
                    y_1 = Concat <axis = 0> (joined, w)
                }},
                else_branch = prefill () => (float[k] y_2) {{
                    y_2 = Concat <axis = 0> (x, w)
                }}
            >
        }}
        """.replace("float[] y", "float[?] y")
        .replace("y_1", '"decode/y"')
        .replace("y_2", '"prefill/y"'),
    )
    assert change == Change(1, "merged decode and prefill, 1 weight shared, 128 B saved")


def test_inputs_and_outputs_keep_their_names_order_and_common_axes():
    model, _ = merge(
        """
        decode (float[n, 2, past] p, int64[n, k] x, int64[n, "past + k"] mask) => (float[n, k] y, float[n] z) {
            y = Cast <to = 1> (x)
            some = ReduceSum <keepdims = 0> (y)
            all = ReduceSum <keepdims = 0> (p)
            bits = Cast <to = 1> (mask)
            bit = ReduceSum <keepdims = 0> (bits)
            both = Add(some, all)
            three = Add(both, bit)
            end = Constant <value = int64[1] {-1}> ()
            z_flat = Reshape(three, end)
            rows = Shape <start = 0, end = 1> (x)
            z = Expand(z_flat, rows)
        }
        """,
        """
        prefill (int64[n, k] x, int64[n, k] mask) => (float[2, n] more, float[n, k] y) {
            sum = Add(x, mask)
            y = Cast <to = 1> (sum)
            row = ReduceSum <keepdims = 0> (y)
            rows = Shape <start = 0, end = 1> (x)
            two = Constant <value = int64[1] {2}> ()
            shape = Concat <axis = 0> (two, rows)
            more = Expand(row, shape)
        }
        """,
        flag="has_past",
    )
    assert [(value.name, str(value.shape)) for value in model.graph.inputs] == [
        ("p", "[n,2,past]"),
        ("x", "[n,k]"),
        ("mask", "[n,past + k]"),
        ("has_past", "[1]"),
    ]
    assert [(value.name, str(value.shape)) for value in model.graph.outputs] == [
        ("y", "[n,k]"),
        ("z", "[None]"),
        ("more", "[2,None]"),
    ]


def test_an_output_that_only_one_side_gives_is_empty_when_the_other_runs():
    model, _ = merge(
        "decode (float[n] x) => (float[n] y) { y = Neg(x) }",
        """
        prefill (float[n] x) => (float[n] y, float[n, 3] wide, float[2] fixed, int64 count) {
            y = Abs(x)
            last = Constant <value = int64[1] {-1}> ()
            column = Unsqueeze(x, last)
            wide = Concat <axis = 1> (column, column, column)
            fixed = Constant <value = float[2] {1.0, 2.0}> ()
            count = Size(x)
        }
        """,
    )
    given = run(model, x=np.ones(4, np.float32), use_cache_branch=np.array([True]))
    assert {name: array.shape for name, array in given.items()} == {
        "y": (4,),
        "wide": (0, 3),
        "fixed": (0,),
        "count": (),
    }


def test_static_shapes_that_differ_are_left_open():
    model, _ = merge(
        "decode (float[2] x) => (float[2] y) { y = Neg(x) }", "prefill (float[3] x) => (float[3] y) { y = Abs(x) }"
    )
    assert [value.shape for value in (*model.graph.inputs, *model.graph.outputs)] == [[None], [1], [None]]


# Names


def test_weights_of_one_name_that_differ_are_two():
    model, change = merge(
        f"decode (float[n] x) => (float[m] y) <float[32] w = {{{LONG}}}> {{ y = Concat <axis = 0> (x, w) }}",
        f"prefill (float[n] x) => (float[m] y) <float[32] w = {{{OTHER}}}> {{ y = Concat <axis = 0> (x, w) }}",
    )
    assert list(model.graph.initializers) == ["w", "prefill/w"]
    assert change.summary == "merged decode and prefill"


def test_values_named_like_inputs_weights_outputs_and_the_flag_of_the_merged_model_give_way():
    model, _ = merge(
        f"""
        decode (float[n] x) => (float[m] y) <float[32] w = {{{LONG}}}> {{
            past = Neg(x)
            use_cache_branch = Abs(past)
            other = Exp(use_cache_branch)
            y = Concat <axis = 0> (other, w)
        }}
        """,
        """
        prefill (float[n] x, float[p] past) => (float[n] y, float[n] other) {
            w = Neg(x)
            other = Abs(w)
            y = Exp(x)
        }
        """,
    )
    outer = {value.name for value in (*model.graph.inputs, *model.graph.outputs, *model.graph.initializers.values())}
    inner = [value.name for graph in branches(model).values() for node in graph for value in node.outputs]
    assert outer.isdisjoint(inner)


def test_one_weight_under_two_names_is_one():
    model, change = merge(
        f"decode (float[n] x) => (float[m] y) <float[32] a = {{{LONG}}}> {{ y = Concat <axis = 0> (x, a) }}",
        f"prefill (float[n] x) => (float[m] y) <float[32] b = {{{LONG}}}> {{ y = Concat <axis = 0> (b, x) }}",
    )
    assert list(model.graph.initializers) == ["a"]
    assert change.count == 1


NESTED = """
{name} (float[n] x, bool flag) => (float[m] y) <float[32] w = {{{weight}}}> {{
    inner = Neg(x)
    y = If (flag) <
        then_branch = yes () => (float[m] t) <float[32] own = {{{own}}}> {{
            sum = Add(own, w)
            t = Concat <axis = 0> (inner, sum)
        }},
        else_branch = no () => (float[m] e) {{ e = Concat <axis = 0> (x, w) }}
    >
}}
"""


@pytest.mark.parametrize(("other", "count"), [(LONG, 1), (OTHER, 2)])
def test_subgraphs_that_capture_weights_and_values_of_equal_names_keep_what_they_mean(other: str, count: int):
    model, _ = merge(
        NESTED.format(name="decode", weight=LONG, own=LONG), NESTED.format(name="prefill", weight=other, own=other)
    )
    assert len(model.graph.initializers) == count
    assert all(not graph.initializers for graph in graphs_of(model.graph) if graph is not model.graph)


def test_weights_in_constant_nodes_are_shared_and_small_ones_stay_in_their_branch():
    model, _ = merge(
        f"""
        decode (float[n] x) => (float[m] y) {{
            w = Constant <value = float[32] {{{LONG}}}> ()
            shape = Constant <value = int64[1] {{-1}}> ()
            z = Reshape(x, shape)
            y = Concat <axis = 0> (z, w)
        }}
        """,
        f"prefill (float[n] x) => (float[m] y) <float[32] v = {{{LONG}}}, int64[1] shape = {{-1}}> "
        "{ z = Reshape(x, shape) y = Concat <axis = 0> (v, z) }",
    )
    assert list(model.graph.initializers) == ["w"]
    assert list(branches(model)["else_branch"].initializers) == ["shape"]
    assert [node.op_type for node in branches(model)["then_branch"]] == ["Constant", "Reshape", "Concat"]


def test_an_output_that_is_an_input_passes_by_and_one_that_is_a_weight_is_given_by_the_branch():
    model, _ = merge(
        f"decode (float[n] x) => (float[n] x, float[32] w, float[n] a) <float[32] w = {{{LONG}}}> {{ a = Neg(x) }}",
        f"prefill (float[n] x) => (float[n] x, float[32] w, float[n] a) <float[32] w = {{{OTHER}}}> {{ a = Abs(x) }}",
    )
    assert model.graph.outputs[0] is model.graph.inputs[0]
    assert list(model.graph.initializers) == ["decode/w", "prefill/w"]


# Defaults, functions, operator sets


def test_a_weight_that_callers_may_override_stays_an_input():
    model, _ = merge(
        "decode (float[n] x, float[1] scale = {2.0}) => (float[n] y) { y = Mul(x, scale) }",
        "prefill (float[n] x, float[1] scale = {2.0}) => (float[n] y) { y = Add(x, scale) }",
    )
    assert "scale" in model.graph.initializers
    given = run(model, x=np.ones(2, np.float32), use_cache_branch=np.array([True]))
    assert given["y"].tolist() == [2.0, 2.0]


FUNCTION = """
<ir_version: 8, opset_import: ["" : 18, "local" : 1]>
{name} (float[n] x) => (float[n] y) {{ y = local.twice(x) }}
<domain: "local", opset_import: ["" : 18]>
twice (a) => (b) {{ {body} }}
"""


@pytest.mark.parametrize(("body", "names"), [("b = Add(a, a)", ["twice"]), ("b = Neg(a)", ["twice", "twice_prefill"])])
def test_local_functions_of_one_name_are_one_if_they_are_equal_and_else_two(body: str, names: list[str]):
    model, _ = merge(FUNCTION.format(name="decode", body="b = Add(a, a)"), FUNCTION.format(name="prefill", body=body))
    assert [function.name for function in model.functions.values()] == names


def with_opset(opset: int, text: str) -> str:
    return f'<ir_version: 8, opset_import: ["" : {opset}]> {text}'


def test_the_lower_opset_is_raised_where_no_operator_in_use_has_changed():
    model, _ = merge(
        with_opset(18, "decode (float[n] x) => (float[n] y) { y = Neg(x) }"),
        with_opset(14, "prefill (float[n] x) => (float[n] y) { y = Exp(x) }"),
    )
    assert model.graph.opset_imports[""] == 18


def test_the_lower_opset_is_converted_where_an_operator_has_changed():
    model, _ = merge(
        with_opset(
            18,
            "decode (float[n, 32] x) => (float[n] y) "
            "{ a = Constant <value = int64[1] {1}> () y = ReduceSum <keepdims = 0> (x, a) }",
        ),
        with_opset(
            11,
            f"prefill (float[n, 32] x) => (float[n] y) <float[32] w = {{{LONG}}}> "
            "{ s = Mul(x, w) y = ReduceSum <axes = [1], keepdims = 0> (s) }",
        ),
    )
    assert model.graph.opset_imports[""] == 18
    assert list(model.graph.initializers) == ["w"]


def test_operators_of_another_domain_at_two_versions_are_refused():
    def drawn(name: str, version: int) -> ir.Model:
        return as_model(
            f'<ir_version: 8, opset_import: ["" : 18, "mine" : {version}]> '
            f"{name} (float[n] x) => (float[n] y) {{ y = mine.Trick(x) }}"
        )

    bundle = Bundle({"decode": drawn("decode", 2), "prefill": drawn("prefill", 1)})
    with pytest.raises(Refused, match="'prefill' is of opset 1 of 'mine', the other of 2, and 'Trick' has changed"):
        MergeIf().apply(bundle, lambda role: Context(role=role))


# What is refused


@pytest.mark.parametrize(
    ("when_true", "when_false", "said"),
    [
        (
            "decode (float[n] x) => (float[n] y) { y = Neg(x) }",
            "prefill (float16[n] x) => (float[n] y) { y = Cast <to = 1> (x) }",
            "the input 'x' is float in 'decode' and float16 in 'prefill'",
        ),
        (
            "decode (float[n] x) => (float16[n] y) { y = Cast <to = 10> (x) }",
            "prefill (float[n] x) => (float[n] y) { y = Neg(x) }",
            "the output 'y' is float16 in 'decode' and float in 'prefill'",
        ),
        (
            "decode (float[n] x) => (float[n] y) { y = Neg(x) }",
            "prefill (float[n, 1] x) => (float[n, 1] y) { y = Neg(x) }",
            "the input 'x' has 1 axes in 'decode' and 2 axes in 'prefill'",
        ),
        (
            "decode (float[n] x) => (float y) { y = ReduceSum <keepdims = 0> (x) }",
            "prefill (float[n] x) => (float[1] y) { y = ReduceSum(x) }",
            "the output 'y' has 0 axes in 'decode' and 1 axes in 'prefill'",
        ),
        (
            "decode (float[n] x, float[n] past) => (float[n] y) { y = Add(x, past) }",
            "prefill (float[n] x) => (float[n] y, float[n] past) { y = Neg(x) past = Neg(x) }",
            "'past' is an output that 'prefill' computes and an input of 'decode'",
        ),
        (
            "decode (float[n] x, float[1] s = {1.0}) => (float[n] y) { y = Mul(x, s) }",
            "prefill (float[n] x, float[1] s = {2.0}) => (float[n] y) { y = Mul(x, s) }",
            "the input 's' has another default value in 'decode' than in 'prefill', or none",
        ),
        (
            "decode (float[n] x, bool[1] use_cache_branch) => (float[n] y) { y = Neg(x) }",
            "prefill (float[n] x) => (float[n] y) { y = Neg(x) }",
            "an input or output is called 'use_cache_branch' already",
        ),
        (
            "decode (float[n] x) => (float[n] use_cache_branch) { use_cache_branch = Neg(x) }",
            "prefill (float[n] x) => (float[n] use_cache_branch) { use_cache_branch = Abs(x) }",
            "an input or output is called 'use_cache_branch' already",
        ),
    ],
)
def test_what_cannot_be_joined_is_refused_by_name(when_true: str, when_false: str, said: str):
    bundle = Bundle({"decode": as_model(when_true), "prefill": as_model(when_false)})
    with pytest.raises(Refused, match=said.replace("[", r"\[")):
        MergeIf().apply(bundle, lambda role: Context(role=role))


# Hoisting


def test_what_both_branches_compute_alike_is_moved_before_the_if_and_random_draws_are_not():
    text = """
    {name} (int64[n] x, float[n] f) => (float[m] y, float[2] r) <float[40, 1] table = {{{weight}}}> {{
        rows = Gather(table, x)
        flat = Constant <value = int64[1] {{-1}}> ()
        line = Reshape(rows, flat)
        y = {end}(line)
        r = RandomUniform <shape = [2], seed = 1.0> ()
    }}
    """
    weight = ", ".join(map(str, range(40)))
    models = [text.format(name=name, end=end, weight=weight) for name, end in (("decode", "Neg"), ("prefill", "Exp"))]
    pair = {name: as_model(drawn) for name, drawn in zip(("decode", "prefill"), models, strict=True)}
    bundle = Bundle(pair)
    outcome = MergeIf(hoist=True).apply(bundle, lambda role: Context(role=role))
    assert [node.op_type for node in bundle["decoder"].graph] == ["Gather", "Reshape", "If"]
    assert find_problem(bundle["decoder"]) == ""
    assert outcome.change.summary.endswith("2 nodes moved before the If")


@pytest.mark.parametrize("hoist", [False, True])
def test_a_decoder_pair_is_exact_in_both_branches_with_every_past_and_padding(hoist: bool):
    result = Pipeline([MergeIf(hoist=hoist), DedupWeights()]).run(decoder_pair())
    assert all(str(record.verdict.source) == "exact" for record in result.records[1:])
    coverage = result.records[1].verdict.coverage
    assert {"0", "1", "7", "99"} <= coverage["decoder as decode"].traits["past"]
    assert "yes" in coverage["decoder as prefill"].traits["padding"]
    assert result.records[2].change == Change(0, "")


def test_metadata_on_which_both_agree_and_that_only_one_has_is_kept():
    pair = {name: as_model(f"{name} (float[n] x) => (float[n] y) {{ y = Neg(x) }}") for name in ("decode", "prefill")}
    pair["decode"].metadata_props.update({"both": "1", "one": "2", "unlike": "3"})
    pair["prefill"].metadata_props.update({"both": "1", "unlike": "4"})
    model, _ = merge(pair["decode"], pair["prefill"])
    assert model.metadata_props == {"both": "1", "one": "2"}


# Generation


class KeepTen(ModelPass):
    """Keep ten logits, and say so."""

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        logits = model.graph.outputs[0]
        model.graph.outputs[0] = ir.Value(name="logits", type=logits.type, shape=logits.shape)
        logits.name = "all_logits"
        axes = {"starts": [0], "ends": [10], "axes": [2]}
        bounds = [_initializer(model, name, numbers) for name, numbers in axes.items()]
        node = ir.Node("", "Slice", [logits, *bounds], outputs=[model.graph.outputs[0]], name="first_ten")
        model.graph.append(node)
        model.graph.outputs[0].shape = ir.Shape([*logits.shape[:2], 10])
        return Change(1, "kept ten logits")

    def claims(self, before: Bundle, after: Bundle) -> Sequence[Claim]:
        first = Take("logits", (Slice(2, 0, 10),))
        return [Claim(Program("prefill"), Program("prefill"), outputs={"logits": first}), Claim.same("decode")]


def _initializer(model: ir.Model, name: str, numbers: list[int]) -> ir.Value:
    value = ir.Value(name=f"first_ten_{name}", const_value=ir.tensor(np.array(numbers, dtype=np.int64)))
    model.graph.register_initializer(value)
    return value


def test_generation_over_the_pair_is_claimed_over_the_merged_model():
    result = Pipeline([MergeIf()]).run(decoder_pair())
    assert "greedy over decoder as greedy over prefill + decode" in result.records[1].verdict.coverage
    named_otherwise = Pipeline([MergeIf(flag="has_past")]).run(decoder_pair())
    assert set(named_otherwise.records[1].verdict.coverage) == {"decoder as prefill", "decoder as decode"}


def test_a_flag_that_means_the_opposite_claims_no_generation():
    result = Pipeline([MergeIf(when_true="prefill", when_false="decode")]).run(decoder_pair())
    assert set(result.records[1].verdict.coverage) == {"decoder as prefill", "decoder as decode"}


def test_tokens_that_an_earlier_step_changed_are_not_held_against_the_merge():
    result = Pipeline([KeepTen(models=("prefill",)), MergeIf()]).run(decoder_pair())
    verdict = result.records[2].verdict
    assert str(verdict.step) == "exact"
    assert "greedy over decoder as greedy over prefill + decode" in verdict.coverage


def test_models_that_are_no_decoders_claim_no_generation():
    pair = {name: as_model(f"{name} (float[n] x) => (float[n] y) {{ y = Neg(x) }}") for name in ("decode", "prefill")}
    bundle = Bundle(pair)
    after = bundle.clone()
    MergeIf().apply(after, lambda role: Context(role=role))
    assert [str(claim.candidate) for claim in MergeIf().claims(bundle, after)] == ["decoder", "decoder"]


class NamePrefill(BundlePass):
    """Give a model another role."""

    given: str = takes("model", "The model.")
    made: str = makes("prefill", "Its new role.")

    def transform(self, bundle: Bundle, context: Callable[[str], Context]) -> Change:
        bundle.models[self.made] = bundle[self.given]
        return Change(1, "named")

    def claims(self, before: Bundle, after: Bundle) -> Sequence[Claim]:
        return [Claim(Program(self.given), Program(self.made))]


def test_generation_that_the_source_knows_nothing_of_is_not_claimed_in_vain():
    pair = decoder_pair()
    bundle = Bundle({"model": pair["prefill"], "decode": pair["decode"]}, pair.config, pair.generation_config)
    result = Pipeline([NamePrefill(), MergeIf()]).run(bundle)
    assert set(result.records[2].verdict.coverage) == {"decoder as model", "decoder as decode"}
