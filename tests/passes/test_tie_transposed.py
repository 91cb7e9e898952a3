"""`tie_transposed`: what is stored once, what is left alone, and that ONNX Runtime keeps no second copy of it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import closing
from pathlib import Path

import ml_dtypes
import models
import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from rewriting import assert_leaves_alone, assert_rewrites, assert_text, rewritten, run_pass

from passes.dedup_weights import DedupWeights
from passes.tie_transposed import TieTransposed
from surgery import Check, Pipeline
from surgery.accuracy.runners import ModelProgram
from surgery.contract import Bundle, Change, Context
from surgery.storage import save_models
from surgery.text import parse
from surgery.watchers.validity import find_problem

TIE = TieTransposed(min_bytes=1)

W = "float[3, 2] w = {1, 2, 3, 4, 5, 6}"
T = "float[2, 3] t = {1, 3, 5, 2, 4, 6}"


# One product


def test_a_product_of_a_matrix_becomes_one_gemm():
    assert_rewrites(
        TIE,
        f"""
        g (float[n, 2] x, int64[n] ids) => (float[n, 3] y, float[n, 2] e) <{W}, {T}> {{
            e = Gather(w, ids)
            y = MatMul(x, t)
        }}
        """,
        f"""
        g (float[n, 2] x, int64[n] ids) => (float[n, 3] y, float[n, 2] e) <{W}> {{
            e = Gather(w, ids)
            y = Gemm <transB = 1> (x, w)
        }}
        """,
    )


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("Gemm <alpha = 0.5, beta = 2.0> (x, t, c)", "Gemm <alpha = 0.5, beta = 2.0, transB = 1> (x, w, c)"),
        ("Gemm <transA = 1, transB = 0> (x, t)", "Gemm <transA = 1, transB = 1> (x, w)"),
    ],
)
def test_a_gemm_has_its_second_factor_turned_round(before: str, after: str):
    graph = """
        g (float[2, 2] x, int64[n] ids) => (float[2, 3] y, float[n, 2] e) <WEIGHTS, float[3] c = {{7, 8, 9}}> {{
            e = Gather(w, ids)
            y = {product}
            z = Neg(c)
        }}
        """
    assert_rewrites(
        TIE,
        graph.format(product=before).replace("WEIGHTS", f"{W}, {T}"),
        graph.format(product=after).replace("WEIGHTS", W),
    )


def test_a_gemm_that_has_the_weight_transposed_already_no_longer_does():
    assert_rewrites(
        TIE,
        f"""
        g (float[n, 3] x, int64[n] ids) => (float[n, 2] y, float[n, 2] e) <{W}, {T}> {{
            e = Gather(w, ids)
            y = Gemm <transB = 1> (x, t)
        }}
        """,
        f"""
        g (float[n, 3] x, int64[n] ids) => (float[n, 2] y, float[n, 2] e) <{W}> {{
            e = Gather(w, ids)
            y = Gemm <transB = 0> (x, w)
        }}
        """,
    )


def test_a_weight_that_is_the_first_factor_is_turned_too():
    assert_rewrites(
        TIE,
        f"""
        g (float[3, n] x, int64[n] ids) => (float[2, n] y, float[2, n] z, float[n, 2] e) <{W}, {T}> {{
            e = Gather(w, ids)
            y = MatMul(t, x)
            z = Gemm <transA = 0> (t, x)
        }}
        """,
        f"""
        g (float[3, n] x, int64[n] ids) => (float[2, n] y, float[2, n] z, float[n, 2] e) <{W}> {{
            e = Gather(w, ids)
            y = Gemm <transA = 1> (w, x)
            z = Gemm <transA = 1> (w, x)
        }}
        """,
    )


def test_a_first_factor_of_a_stack_of_matrices_is_left_alone():
    assert_leaves_alone(
        TIE,
        f"""
        g (float[k, 3, n] x, int64[n] ids) => (float[k, 2, n] y, float[n, 2] e) <{W}, {T}> {{
            e = Gather(w, ids)
            y = MatMul(t, x)
        }}
        """,
    )


def test_a_square_weight_times_itself_is_turned_twice():
    weights = "float[3, 3] w = {1, 2, 3, 4, 5, 6, 7, 8, 9}"
    assert_rewrites(
        TIE,
        f"""
        g (int64[n] ids) => (float[3, 3] y, float[n, 3] e)
        <{weights}, float[3, 3] t = {{1, 4, 7, 2, 5, 8, 3, 6, 9}}> {{
            e = Gather(w, ids)
            y = MatMul(t, t)
        }}
        """,
        f"""
        g (int64[n] ids) => (float[3, 3] y, float[n, 3] e) <{weights}> {{
            e = Gather(w, ids)
            y = Gemm <transA = 1, transB = 1> (w, w)
        }}
        """,
    )


@pytest.mark.parametrize("shape", ["2", "n, 2", "2, n, 2", "a, b, c, 2"])
def test_rows_of_any_rank_keep_their_shape(shape: str):
    result = shape.removesuffix("2") + "3"
    rewritten(
        TIE,
        parse(f"""
        g (float[{shape}] x, int64[n] ids) => (float[{result}] y, float[n, 2] e) <{W}, {T}> {{
            e = Gather(w, ids)
            y = MatMul(x, t)
        }}
        """),
    )


PROJECTION = f"""
    g (int64[b, s] ids) => (float[b, s, 3] logits) <{W}, {T}> {{
        x = Gather(w, ids)
        logits = MatMul(x, t)
    }}
    """


@pytest.mark.parametrize("batch", [0, 1, 2])
@pytest.mark.parametrize("length", [0, 1, 3])
def test_empty_batches_and_empty_prompts_keep_their_shape(batch: int, length: int):
    ids = np.zeros((batch, length), np.int64)
    model = rewritten(TIE, parse(PROJECTION), [{"ids": ids}])
    with closing(ModelProgram(model)) as program:
        assert program.run({"ids": ids})["logits"].shape == (batch, length, 3)


@pytest.mark.parametrize("opset", [11, 13, 14])
def test_opsets_whose_shape_has_no_end_slice_it(opset: int):
    model = rewritten(TIE, parse(f'<ir_version: 7, opset_import: ["" : {opset}]> {PROJECTION}'))
    assert "Slice" in [node.op_type for node in model.graph]


def test_an_opset_whose_gemm_needs_a_third_input_is_left_alone():
    assert_leaves_alone(TIE, parse(f'<ir_version: 5, opset_import: ["" : 10]> {PROJECTION}'))


def test_the_gemm_has_the_name_and_the_metadata_of_the_product():
    model = parse(PROJECTION)
    product = model.graph.outputs[0].producer()
    product.name = "/lm_head/MatMul"
    product.metadata_props["scope"] = "lm_head"
    after, _ = run_pass(TIE, model)
    gemm = next(node for node in after["model"].graph if node.op_type == "Gemm")
    assert (gemm.name, gemm.metadata_props["scope"]) == ("/lm_head/MatMul", "lm_head")
    assert list(after["model"].graph.initializers) == ["w"]
    names = [node.name for node in after["model"].graph if node.name]
    assert len(names) == len(set(names))


# Which of the two


def test_of_two_weights_of_products_the_one_with_fewer_uses_goes():
    assert_rewrites(
        TIE,
        f"""
        g (float[n, 3] x) => (float[n, 2] y) <{W}, {T}> {{
            a = MatMul(x, w)
            b = MatMul(a, t)
            y = MatMul(b, w)
        }}
        """,
        f"""
        g (float[n, 3] x) => (float[n, 2] y) <{W}> {{
            a = MatMul(x, w)
            b_flat_shape = Constant <value = int64[2] {{-1, 2}}> ()
            b_flat = Reshape(a, b_flat_shape)
            b_rows = Gemm <transB = 1> (b_flat, w)
            b_leading = Shape <end = -1> (a)
            b_last = Constant <value = int64[1] {{3}}> ()
            b_shape = Concat <axis = 0> (b_leading, b_last)
            b = Reshape <allowzero = 1> (b_rows, b_shape)
            y = MatMul(b, w)
        }}
        """,
    )


def test_the_first_weight_stays_where_nothing_else_tells_them_apart():
    after = rewritten(
        TIE,
        parse(f"""
        g (float[n, 3] x) => (float[n, 3] y) <{W}, {T}> {{
            a = MatMul(x, w)
            y = MatMul(a, t)
        }}
        """),
    )
    assert list(after.graph.initializers) == ["w"]


def test_a_weight_with_a_use_of_another_kind_stays():
    assert_rewrites(
        TIE,
        f"""
        g (float[n, 3] x) => (float[n, 2] y, float[2, 3] z) <{W}, {T}> {{
            y = MatMul(x, w)
            z = Neg(t)
        }}
        """,
        f"""
        g (float[n, 3] x) => (float[n, 2] y, float[2, 3] z) <{T}> {{
            y = Gemm <transB = 1> (x, t)
            z = Neg(t)
        }}
        """,
    )


def test_two_weights_with_uses_of_another_kind_are_left_alone():
    assert_leaves_alone(
        TIE,
        f"""
        g (float[n, 2] x, int64[n] ids) => (float[n, 3] y, float[n, 2] e, float[2, 3] z) <{W}, {T}> {{
            e = Gather(w, ids)
            y = MatMul(x, t)
            z = Neg(t)
        }}
        """,
    )


def test_a_weight_that_nothing_uses_goes():
    assert_rewrites(
        TIE,
        f"""
        g (float[n, 2] x) => (float[n, 3] y) <{W}, {T}> {{
            y = MatMul(x, t)
        }}
        """,
        f"""
        g (float[n, 2] x) => (float[n, 3] y) <{T}> {{
            y = MatMul(x, t)
        }}
        """,
    )


def test_a_weight_that_is_a_graph_output_stays_and_can_serve():
    assert_rewrites(
        TIE,
        f"""
        g (float[n, 3] x) => (float[n, 2] y, float[2, 3] t) <{W}, {T}> {{
            y = MatMul(x, w)
        }}
        """,
        f"""
        g (float[n, 3] x) => (float[n, 2] y, float[2, 3] t) <{T}> {{
            y = Gemm <transB = 1> (x, t)
        }}
        """,
    )


@pytest.mark.parametrize("overridable", ["w", "t"])
def test_a_weight_that_a_caller_may_override_is_left_alone(overridable: str):
    model = parse(PROJECTION)
    model.graph.inputs.append(model.graph.initializers[overridable])
    assert_leaves_alone(TIE, model)


# What is no transpose


@pytest.mark.parametrize(
    "other",
    [
        "float[2, 3] t = {1, 3, 5, 2, 4, 7}",  # one element
        "float[2, 3] t = {1, 2, 3, 4, 5, 6}",  # the same bytes in the other shape
        "float[2, 3] t = {1, 3, 5, 2, 4, 6.0000005}",  # the last bit
    ],
)
def test_weights_that_differ_anywhere_are_left_alone(other: str):
    assert_leaves_alone(TIE, PROJECTION.replace(T, other))


def test_minus_zero_is_not_zero():
    zeros = ("float[3, 2] w = {0, 2, 3, 4, 5, 6}", "float[2, 3] t = {-0.0, 3, 5, 2, 4, 6}")
    assert_leaves_alone(TIE, PROJECTION.replace(W, zeros[0]).replace(T, zeros[1]))


def test_a_symmetric_weight_is_left_alone():
    assert_leaves_alone(
        TIE,
        """
        g (float[n, 2] x, int64[n] ids) => (float[n, 2] y, float[n, 2] e)
        <float[2, 2] w = {1, 2, 2, 1}, float[2, 2] t = {1, 2, 2, 1}> {
            e = Gather(w, ids)
            y = MatMul(x, t)
        }
        """,
    )


def test_integers_are_left_alone():
    assert_leaves_alone(TIE, PROJECTION.replace("float", "int32"))


def test_weights_below_min_bytes_are_left_alone():
    assert_leaves_alone(TieTransposed(min_bytes=25), PROJECTION)
    rewritten(TieTransposed(min_bytes=24), parse(PROJECTION))


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
def test_floats_of_every_width_are_tied(dtype: type):
    kind = {2: "float16", 4: "float", 8: "double"}[np.dtype(dtype).itemsize]
    rewritten(
        TIE, with_weights(parse(PROJECTION.replace("float", kind)), {"w": np.eye(3, 2, dtype=dtype) + dtype(0.5)})
    )


def test_bfloat16_is_tied_although_no_cpu_kernel_multiplies_it():
    model = with_weights(
        parse(PROJECTION.replace("float", "bfloat16")), {"w": np.arange(6).reshape(3, 2).astype(ml_dtypes.bfloat16)}
    )
    after, change = run_pass(TIE, model)
    assert change.count == 1
    assert list(after["model"].graph.initializers) == ["w"]
    assert find_problem(after["model"]) == ""


def with_weights(model: ir.Model, weights: Mapping[str, np.ndarray]) -> ir.Model:
    """Return the model with these values, and their transposes in `t`."""
    for name, array in weights.items():
        model.graph.initializers[name].const_value = ir.tensor(array)
        model.graph.initializers["t"].const_value = ir.tensor(np.ascontiguousarray(array.T))
    return model


# Transpose nodes


def test_a_transpose_of_a_weight_that_is_looked_up_too_goes():
    assert_rewrites(
        TIE,
        f"""
        g (float[n, 2] x, int64[n] ids) => (float[n, 3] y, float[n, 2] e) <{W}> {{
            e = Gather(w, ids)
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul(x, t)
        }}
        """,
        f"""
        g (float[n, 2] x, int64[n] ids) => (float[n, 3] y, float[n, 2] e) <{W}> {{
            e = Gather(w, ids)
            y = Gemm <transB = 1> (x, w)
        }}
        """,
    )


def test_a_transpose_of_the_weight_that_goes_is_the_one_that_stays():
    assert_rewrites(
        TIE,
        f"""
        g (float[n, 2] x) => (float[n, 3] y, float[3, 2] z) <{W}, {T}> {{
            v = Transpose(t)
            z = Neg(v)
            s = Add(z, w)
            y = MatMul(x, t)
        }}
        """,
        f"""
        g (float[n, 2] x) => (float[n, 3] y, float[3, 2] z) <{W}> {{
            z = Neg(w)
            s = Add(z, w)
            y = Gemm <transB = 1> (x, w)
        }}
        """,
    )


def test_a_weight_that_is_only_used_transposed_is_left_alone():
    assert_leaves_alone(
        TIE,
        f"""
        g (float[n, 2] x) => (float[n, 3] y) <{W}> {{
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul(x, t)
        }}
        """,
    )


@pytest.mark.parametrize("use", ["z = Neg(t)", "y2 = MatMul(x, t)"])
def test_a_transpose_whose_copy_would_remain_is_left_alone(use: str):
    result = "float[2, 3] z" if "z" in use else "float[2, 3] t"
    assert_leaves_alone(
        TIE,
        f"""
        g (float[n, 2] x, int64[n] ids) => (float[n, 3] y, float[n, 2] e, {result}) <{W}> {{
            e = Gather(w, ids)
            t = Transpose <perm = [1, 0]> (w)
            y = MatMul(x, t)
            {use}
        }}
        """,
    )


# Branches, bodies, functions


def test_a_weight_that_a_branch_captures_is_turned_there():
    assert_rewrites(
        TIE,
        f"""
        g (bool flag, float[n, 2] x, int64[n] ids) => (float[n, 3] y) <{W}, {T}> {{
            e = Gather(w, ids)
            y = If (flag) <
                then_branch = one () => (float[n, 3] a) {{ a = MatMul(x, t) }},
                else_branch = two () => (float[n, 3] b) {{ b = MatMul(e, t) }}
            >
        }}
        """.replace("MatMul(e", "Gemm(e"),
        f"""
        g (bool flag, float[n, 2] x, int64[n] ids) => (float[n, 3] y) <{W}> {{
            e = Gather(w, ids)
            y = If (flag) <
                then_branch = one () => (float[n, 3] a) {{ a = Gemm <transB = 1> (x, w) }},
                else_branch = two () => (float[n, 3] b) {{ b = Gemm <transB = 1> (e, w) }}
            >
        }}
        """,
    )


def test_a_weight_that_a_loop_body_captures_is_turned_there():
    assert_rewrites(
        TIE,
        f"""
        g (int64 trips, bool start, float[n, 2] x, int64[n] ids) => (float[n, 2] y, float[n, 2] e) <{W}, {T}> {{
            e = Gather(w, ids)
            y = Loop (trips, start, x) <
                body = step (int64 i, bool going, float[n, 2] state) => (bool on, float[n, 2] next) {{
                    on = Identity(going)
                    wide = Gemm(state, t)
                    next = MatMul(wide, w)
                }}
            >
        }}
        """,
        f"""
        g (int64 trips, bool start, float[n, 2] x, int64[n] ids) => (float[n, 2] y, float[n, 2] e) <{W}> {{
            e = Gather(w, ids)
            y = Loop (trips, start, x) <
                body = step (int64 i, bool going, float[n, 2] state) => (bool on, float[n, 2] next) {{
                    on = Identity(going)
                    wide = Gemm <transB = 1> (state, w)
                    next = MatMul(wide, w)
                }}
            >
        }}
        """,
    )


BRANCHES = """
    g (bool flag, float[n, 2] x, int64[n] ids) => (float[n, 3] y) {{
        y = If (flag) <
            then_branch = one () => (float[n, 3] a) <{first}> {{ a = MatMul(x, t) }},
            else_branch = two () => (float[n, 3] b) <{second}> {{
                e = Gather(w, ids)
                b = Gemm(e, {factor})
            }}
        >
    }}
    """


def test_a_weight_whose_transpose_stands_in_another_branch_is_given_it():
    model = parse(BRANCHES.format(first=T, second=f"{W}, float[2, 3] c = {{9, 9, 9, 9, 9, 9}}", factor="c"))
    after = rewritten(TIE, model)
    assert list(after.graph.initializers) == ["w"]


def test_each_branch_uses_the_weight_of_its_own():
    model = parse(BRANCHES.format(first=f"{W}, {T}", second=f"{W}, {T}", factor="t"))
    after = rewritten(TIE, model)
    assert list(after.graph.initializers) == []
    branches = [attribute.as_graph() for attribute in after.graph.outputs[0].producer().attributes.values()]
    assert [list(branch.initializers) for branch in branches] == [["w"], ["w"]]


HIDING = """
    g (bool flag, float[n, 2] x, int64[n] ids) => (float[n, 3] y, {output}) <{name} = {{1, 2, 3, 4, 5, 6}}{more}> {{
        {other}
        y = If (flag) <
            then_branch = one () => (float[n, 3] a) <float[2] w = {{7, 8}}> {{
                s = Add(x, w)
                a = {product}
            }},
            else_branch = two () => (float[n, 3] b) {{ b = {product_of_x} }}
        >
    }}
    """


def test_a_weight_whose_name_a_branch_gives_to_something_else_is_renamed():
    before = {"name": "float[3, 2] w", "other": "e = Gather(w, ids)", "more": f", {T}"}
    after = {"name": "float[3, 2] w_1", "other": "e = Gather(w_1, ids)", "more": ""}
    products = {"product": "Gemm(s, t)", "product_of_x": "Gemm(x, t)"}
    turned = {"product": "Gemm <transB = 1> (s, w_1)", "product_of_x": "Gemm <transB = 1> (x, w_1)"}
    output = "float[n, 2] e"
    assert_rewrites(
        TIE, HIDING.format(**before, **products, output=output), HIDING.format(**after, **turned, output=output)
    )


def test_a_hidden_weight_that_cannot_be_renamed_serves_nobody():
    graph = {"name": "float[3, 2] w", "other": "", "more": f", {T}", "output": "float[3, 2] w"}
    assert_leaves_alone(TIE, HIDING.format(**graph, product="Gemm(s, t)", product_of_x="Gemm(x, t)"))


def test_a_weight_that_a_function_is_called_with_is_left_alone():
    assert_leaves_alone(
        TIE,
        f"""
        <ir_version: 10, opset_import: ["" : 21, "mine" : 1]>
        g (float[n, 2] x, int64[n] ids) => (float[n, 3] y, float[n, 2] e) <{W}, {T}> {{
            e = Gather(w, ids)
            y = mine.Product(x, t)
        }}
        <domain: "mine", opset_import: ["" : 21]>
        Product (a, b) => (c) {{ c = MatMul(a, b) }}
        """,
    )


def test_a_product_of_another_domain_is_left_alone():
    model = parse(
        f"""
        <ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>
        g (float[n, 2] x, int64[n] ids) => (float[n, 3] y, float[n, 2] e) <{W}, {T}> {{
            e = Gather(w, ids)
            y = com.microsoft.FusedMatMul(x, t)
        }}
        """
    )
    assert run_pass(TIE, model)[1] == Change(0, "")


# Several models

EMBED = f"embed (int64[n] ids) => (float[n, 2] e) <{W}> {{ e = Gather(w, ids) }}"
HEAD = f"head (float[n, 2] x) => (float[n, 3] y) <{T}> {{ y = MatMul(x, t) }}"


def tied(**roles: str | ir.Model) -> tuple[Bundle, Change]:
    bundle = Bundle({role: parse(model) if isinstance(model, str) else model for role, model in roles.items()})
    return bundle, TIE.apply(bundle, lambda role: Context(role=role)).change


def test_a_model_that_has_only_the_transpose_is_given_the_weight_of_another():
    after, change = tied(encoder=EMBED, decode=HEAD)
    assert change == Change(1, "1 weight stored once with the transpose in another model, 24 B saved in layout shared")
    assert_text(after["encoder"], EMBED)
    assert_text(after["decode"], f"head (float[n, 2] x) => (float[n, 3] y) <{W}> {{ y = Gemm <transB = 1> (x, w) }}")
    tensors = [next(iter(after[role].graph.initializers.values())).const_value for role in ("encoder", "decode")]
    assert tensors[0] is tensors[1]


def test_all_models_keep_the_same_one_of_the_two():
    both = f"both (float[n, 3] x) => (float[n, 3] y) <{T}, {W}> {{ a = MatMul(x, w) y = MatMul(a, t) }}"
    after, change = tied(encoder=EMBED, prefill=both, decode=HEAD)
    assert change.count == 2
    assert [list(after[role].graph.initializers) for role in after.models] == [["w"], ["w"], ["w"]]


def test_the_weight_of_another_model_takes_no_name_that_is_given():
    taken = HEAD.replace("head (float[n, 2] x)", "head (float[n, 2] w)").replace("(x, t)", "(w, t)")
    after, _ = tied(encoder=EMBED, decode=taken)
    assert list(after["decode"].graph.initializers) == ["w_1"]
    assert find_problem(after["decode"]) == ""


def test_models_that_are_not_named_are_left_alone():
    bundle = Bundle({"encoder": parse(EMBED), "decode": parse(HEAD)})
    tie = TieTransposed(models=("decode",), min_bytes=1)
    assert tie.apply(bundle, lambda role: Context(role=role)).change == Change(0, "")


def test_with_dedup_weights_a_whole_bundle_stores_the_embedding_once(tmp_path: Path):
    random = np.random.default_rng(0)
    table = random.standard_normal((700, 8), dtype=np.float32)
    encoder = "g (int64[b, s] ids) => (float[b, s, 8] x) <float[700, 8] w = {0}> { x = Gather(w, ids) }"
    decoder = """
        g (int64[b, s] ids) => (float[b, s, 700] y) <float[700, 8] w = {0}, float[8, 700] t = {0}> {
            x = Gather(w, ids)
            y = MatMul(x, t)
        }
        """
    models_of = {"prefill": with_weights(parse(decoder), {"w": table})}
    models_of["decode"] = with_weights(parse(decoder), {"w": table.copy()})
    models_of["encoder"] = parse(encoder)
    models_of["encoder"].graph.initializers["w"].const_value = ir.tensor(table.copy())
    bundle = Bundle(models_of)
    for step in (TieTransposed(), DedupWeights()):
        step.apply(bundle, lambda role: Context(role=role))
    save_models(bundle.models, tmp_path / "out", layout="shared")
    assert (tmp_path / "out" / "weights.onnx_data").stat().st_size == table.nbytes


# What ONNX Runtime makes of it

LOOKUP_AND = """
    g (int64[b, s] ids) => (float[b, s, 700] y) <float[700, 8] w = {{0}}{more}> {{
        x = Gather(w, ids)
        {turn}
        y = MatMul(x, t)
    }}
    """
FORMS = {
    "twice": LOOKUP_AND.format(more=", float[8, 700] t = {0}", turn=""),
    "transpose": LOOKUP_AND.format(more="", turn="t = Transpose <perm = [1, 0]> (w)"),
}
LEVELS = ["ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("form", FORMS)
def test_the_runtime_saves_the_weight_once_after_optimization(form: str, level: str, tmp_path: Path):
    table = np.random.default_rng(0).standard_normal((700, 8), dtype=np.float32)
    model = parse(FORMS[form])
    for name in model.graph.initializers:
        model.graph.initializers[name].const_value = ir.tensor(table if name == "w" else np.ascontiguousarray(table.T))
    after = rewritten(TIE, model)
    assert weight_bytes_after_optimization(model, level, tmp_path) == 2 * table.nbytes
    assert weight_bytes_after_optimization(after, level, tmp_path) == table.nbytes


def weight_bytes_after_optimization(model: ir.Model, level: str, folder: Path) -> int:
    """Return the bytes of all floats in the model that ONNX Runtime saves."""
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    onnxruntime.InferenceSession(ir.to_proto(model).SerializeToString(), options)
    saved = onnx.load(folder / "optimized.onnx")
    return sum(len(tensor.raw_data) for tensor in saved.graph.initializer if tensor.data_type == onnx.TensorProto.FLOAT)


# Whole runs


def tied_decoder_pair() -> Bundle:
    """Return the small decoder pair with its output projection tied to the embedding."""
    bundle = models.decoder_pair()
    for role in bundle.models:
        initializers = bundle[role].graph.initializers
        table = initializers["wte"].const_value.numpy()
        initializers["head_weight"].const_value = ir.tensor(np.ascontiguousarray(table.T), name="head_weight")
    return bundle


def test_a_run_checks_it_as_a_close_step_and_its_answers_hold():
    check = Check(batches=[1, 2], lengths=[1, 5], past=[0, 3])
    with Pipeline(["tie_transposed", "dedup_weights"], check).run(tied_decoder_pair()) as result:
        assert result.records[1].change.summary == ("2 weights stored once with the transpose, 3.2 kB saved")
        assert "head_weight" not in result.bundle["decode"].graph.initializers
        assert "head_weight" not in result.bundle["prefill"].graph.initializers


@pytest.mark.long
@pytest.mark.parametrize("fixture", ["adder", "sorter"])
def test_exports_of_tied_models_answer_as_they_did(fixture: str):
    root = Path(__file__).resolve().parents[2]
    with Pipeline(["tie_transposed"], Check(lengths=[1, 7], past=[0, 7])).run(root / "fixtures" / fixture) as result:
        assert result.records[1].change.count >= 2
