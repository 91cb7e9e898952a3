"""`clean_casts`: each rule as a picture, and what must stay."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from rewriting import ROLE, assert_leaves_alone, assert_rewrites, assert_text, rewritten, run_pass

from passes.clean_casts import CleanCasts
from surgery.accuracy.runners import ModelProgram
from surgery.contract import Change, Effect
from surgery.graphs import graphs_of
from surgery.storage import open_model, save_model
from surgery.text import parse

CLEAN = CleanCasts()


# One cast


def test_a_cast_to_the_same_type_goes():
    assert_rewrites(
        CLEAN,
        """
        g (float[2] x) => (float[2] y) {
            a = Cast <to = 1> (x)
            y = Neg(a)
        }
        """,
        """
        g (float[2] x) => (float[2] y) {
            y = Neg(x)
        }
        """,
    )


def test_a_cast_to_the_same_type_that_is_a_result_gives_its_name_away():
    assert_rewrites(
        CLEAN,
        """
        g (float[2] x) => (float[2] y) {
            a = Neg(x)
            y = Cast <to = 1> (a)
        }
        """,
        """
        g (float[2] x) => (float[2] y) {
            y = Neg(x)
        }
        """,
    )


def test_a_cast_of_an_input_that_is_a_result_stays():
    assert_leaves_alone(
        CLEAN,
        """
        g (float[2] x) => (float[2] y) {
            y = Cast <to = 1> (x)
        }
        """,
    )


def test_a_cast_of_a_result_that_is_a_result_stays():
    assert_leaves_alone(
        CLEAN,
        """
        g (float[2] x) => (float[2] a, float[2] y) {
            a = Neg(x)
            y = Cast <to = 1> (a)
        }
        """,
    )


def test_an_unused_cast_goes_and_with_it_the_one_before():
    assert_rewrites(
        CLEAN,
        """
        g (float[2] x) => (float[2] y) {
            a = Cast <to = 10> (x)
            b = Cast <to = 7> (a)
            y = Neg(x)
        }
        """,
        """
        g (float[2] x) => (float[2] y) {
            y = Neg(x)
        }
        """,
    )


def test_a_cast_like_is_a_cast():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2] x, float[1] like) => (float16[2] y) {
            a = CastLike(x, like)
            b = CastLike(a, x)
            y = Neg(b)
        }
        """,
        """
        g (float16[2] x, float[1] like) => (float16[2] y) {
            y = Neg(x)
        }
        """,
    )


def test_what_a_cast_like_goes_by_stays():
    assert_leaves_alone(
        CLEAN,
        """
        g (int32[2] x, float[2] w) => (float16[2] y) {
            a = Cast <to = 10> (x)
            b = CastLike(w, a)
            y = Exp(b)
        }
        """,
    )


# There and back


@pytest.mark.parametrize(
    ("narrow", "wide"),
    [("float16", 1), ("float16", 11), ("float", 11), ("int32", 7), ("int32", 11), ("uint8", 6)],
)
def test_there_and_back_through_a_wider_type_goes(narrow: str, wide: int):
    number = ir.DataType[{"float": "FLOAT"}.get(narrow, narrow.upper())]
    assert_rewrites(
        CLEAN,
        f"""
        g ({narrow}[2] x) => ({narrow}[2, 1] y) {{
            a = Cast <to = {wide}> (x)
            b = Cast <to = {int(number)}> (a)
            one = Constant <value = int64[1] {{1}}> ()
            y = Unsqueeze(b, one)
        }}
        """,
        f"""
        g ({narrow}[2] x) => ({narrow}[2, 1] y) {{
            one = Constant <value = int64[1] {{1}}> ()
            y = Unsqueeze(x, one)
        }}
        """,
    )


def test_there_and_back_goes_where_it_is_a_result():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2] x) => (float16[2] y) {
            s = Neg(x)
            a = Cast <to = 1> (s)
            y = Cast <to = 10> (a)
        }
        """,
        """
        g (float16[2] x) => (float16[2] y) {
            y = Neg(x)
        }
        """,
    )


def test_a_pair_that_a_branch_takes_runs_once_it_is_gone():
    """ONNX Runtime 1.31 leaves such pairs out itself, and then misses what the branch takes: it does not run them."""
    text = """
        g (float[2] x, bool c) => (float[2] y) {
            a = Cast <to = 11> (x)
            b = Cast <to = 1> (a)
            y = If (c) <
                then_branch = t () => (float[2] t_y) { t_y = Neg(b) },
                else_branch = e () => (float[2] e_y) { e_y = Abs(b) }
            >
        }
        """
    bundle, _ = run_pass(CLEAN, parse(text))
    with closing(ModelProgram(bundle[ROLE])) as program:
        found = program.run({"x": np.array([1, -2], dtype=np.float32), "c": np.array(True)})
    assert found["y"].tolist() == [-1, 2]


def test_the_way_there_stays_if_others_need_it():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2] x) => (float16[2] y, float[2] z) {
            a = Cast <to = 1> (x)
            b = Cast <to = 10> (a)
            y = Neg(b)
            z = Exp(a)
        }
        """,
        """
        g (float16[2] x) => (float16[2] y, float[2] z) {
            a = Cast <to = 1> (x)
            y = Neg(x)
            z = Exp(a)
        }
        """,
    )


@pytest.mark.parametrize(
    ("source", "middle"),
    [
        ("float", 10),  # rounds
        ("float", 16),
        ("float", 7),  # truncates
        ("float", 9),
        ("double", 1),
        ("int64", 1),
        ("int64", 11),
        ("int64", 6),
        ("int64", 9),
        ("int32", 1),
        ("float16", 16),
        ("float16", 7),
        ("uint8", 3),
    ],
)
def test_a_narrowing_cast_is_kept(source: str, middle: int):
    number = ir.DataType[{"float": "FLOAT"}.get(source, source.upper())]
    assert_leaves_alone(
        CLEAN,
        f"""
        g ({source}[2] x) => ({source}[2, 1] y) {{
            a = Cast <to = {middle}> (x)
            b = Cast <to = {int(number)}> (a)
            one = Constant <value = int64[1] {{1}}> ()
            y = Unsqueeze(b, one)
        }}
        """,
    )


def test_a_number_of_eight_bits_that_may_saturate_is_kept():
    assert_leaves_alone(
        CLEAN,
        """
        g (float[2] f) => (float[2] y) {
            x = Cast <to = 19> (f)
            a = Cast <to = 1> (x)
            b = Cast <to = 19> (a)
            y = Cast <to = 1> (b)
        }
        """,
    )


# Chains


def test_a_chain_leaves_one_pair():
    assert_rewrites(
        CLEAN,
        """
        g (float[2] x) => (float[2] y) {
            a = Cast <to = 10> (x)
            b = Cast <to = 1> (a)
            c = Cast <to = 10> (b)
            d = Cast <to = 1> (c)
            y = Neg(d)
        }
        """,
        """
        g (float[2] x) => (float[2] y) {
            a = Cast <to = 10> (x)
            d = Cast <to = 1> (a)
            y = Neg(d)
        }
        """,
    )


def test_there_and_back_between_an_input_and_a_result_is_one_cast():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2] x) => (float16[2] y) {
            a = Cast <to = 1> (x)
            y = Cast <to = 10> (a)
        }
        """,
        """
        g (float16[2] x) => (float16[2] y) {
            y = Cast <to = 10> (x)
        }
        """,
    )


def test_bfloat16_there_and_back_goes():
    assert_rewrites(
        CLEAN,
        """
        g (float[2] x) => (float[2] y) {
            a = Cast <to = 16> (x)
            b = Cast <to = 1> (a)
            c = Cast <to = 16> (b)
            one = Constant <value = int64[1] {-1}> ()
            d = Reshape(c, one)
            y = Cast <to = 1> (d)
        }
        """,
        """
        g (float[2] x) => (float[2] y) {
            a = Cast <to = 16> (x)
            one = Constant <value = int64[1] {-1}> ()
            d = Reshape(a, one)
            y = Cast <to = 1> (d)
        }
        """,
    )


@pytest.mark.parametrize(
    ("source", "middle", "target"),
    [("float16", 1, 11), ("bool", 6, 1), ("int8", 6, 10), ("float16", 1, 7), ("float16", 1, 9), ("int32", 7, 2)],
)
def test_a_step_that_loses_nothing_is_skipped(source: str, middle: int, target: int):
    result = {11: "double", 1: "float", 10: "float16", 7: "int64", 9: "bool", 2: "uint8"}[target]
    assert_rewrites(
        CLEAN,
        f"""
        g ({source}[2] x) => ({result}[2] y) {{
            a = Cast <to = {middle}> (x)
            y = Cast <to = {target}> (a)
        }}
        """,
        f"""
        g ({source}[2] x) => ({result}[2] y) {{
            y = Cast <to = {target}> (x)
        }}
        """,
    )


@pytest.mark.parametrize(
    ("source", "middle", "target", "result"),
    [
        ("int64", 1, 10, "float16"),  # rounded twice, not once
        ("int8", 1, 2, "uint8"),  # a negative number would wrap instead
        ("float16", 1, 8, "string"),  # printed as another type
        ("float8e4m3fn", 1, 17, "float8e4m3fn"),  # which the runtime may not cast to itself
    ],
)
def test_a_step_that_changes_something_is_kept(source: str, middle: int, target: int, result: str):
    assert_leaves_alone(
        CLEAN,
        f"""
        g ({source}[2] x) => ({result}[2] y) {{
            a = Cast <to = {middle}> (x)
            y = Cast <to = {target}> (a)
        }}
        """,
    )


def test_a_step_that_others_need_is_not_skipped():
    assert_leaves_alone(
        CLEAN,
        """
        g (float16[2] x) => (double[2] y, float[2] z) {
            a = Cast <to = 1> (x)
            y = Cast <to = 11> (a)
            z = Neg(a)
        }
        """,
    )


def test_a_step_that_others_need_is_skipped_for_a_cast_that_is_there():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2] x) => (double[2] y, float[2] z, double[2] u) {
            d = Cast <to = 11> (x)
            a = Cast <to = 1> (x)
            b = Cast <to = 11> (a)
            y = Exp(b)
            z = Neg(a)
            u = Neg(d)
        }
        """,
        """
        g (float16[2] x) => (double[2] y, float[2] z, double[2] u) {
            d = Cast <to = 11> (x)
            a = Cast <to = 1> (x)
            y = Exp(d)
            z = Neg(a)
            u = Neg(d)
        }
        """,
    )


# Equal casts


def test_equal_casts_are_shared():
    assert_rewrites(
        CLEAN,
        """
        g (float[2] x) => (float16[2] y, float16[2] z) {
            a = Cast <to = 10> (x)
            y = Neg(a)
            b = Cast <to = 10> (x)
            z = Neg(b)
        }
        """,
        """
        g (float[2] x) => (float16[2] y, float16[2] z) {
            a = Cast <to = 10> (x)
            y = Neg(a)
            z = Neg(a)
        }
        """,
    )


def test_the_one_of_equal_casts_that_is_a_result_has_its_name():
    assert_rewrites(
        CLEAN,
        """
        g (float[2] x) => (float16[2] y, float16[2] z) {
            a = Cast <to = 10> (x)
            y = Neg(a)
            z = Cast <to = 10> (x)
        }
        """,
        """
        g (float[2] x) => (float16[2] y, float16[2] z) {
            z = Cast <to = 10> (x)
            y = Neg(z)
        }
        """,
    )


def test_equal_casts_that_are_both_results_stay():
    assert_leaves_alone(
        CLEAN,
        """
        g (float[2] x) => (float16[2] y, float16[2] z) {
            y = Cast <to = 10> (x)
            z = Cast <to = 10> (x)
        }
        """,
    )


def test_casts_that_treat_large_numbers_otherwise_are_not_equal():
    assert_leaves_alone(
        CLEAN,
        """
        g (float[2] x) => (float[2] y, float[2] z) {
            a = Cast <to = 17, saturate = 1> (x)
            b = Cast <to = 17, saturate = 0> (x)
            y = Cast <to = 1> (a)
            z = Cast <to = 1> (b)
        }
        """,
    )


def test_a_branch_uses_a_cast_outside_even_one_that_comes_later():
    assert_rewrites(
        CLEAN,
        """
        g (bool c, float[2] x) => (float16[2] y, float16[2] z) {
            y = If (c) <
                then_branch = t () => (float16[2] t_y) {
                    t_a = Cast <to = 10> (x)
                    t_y = Neg(t_a)
                },
                else_branch = e () => (float16[2] e_y) {
                    e_y = Constant <value = float16[2] {1, 2}> ()
                }
            >
            a = Cast <to = 10> (x)
            z = Exp(a)
        }
        """,
        """
        g (bool c, float[2] x) => (float16[2] y, float16[2] z) {
            a = Cast <to = 10> (x)
            y = If (c) <
                then_branch = t () => (float16[2] t_y) {
                    t_y = Neg(a)
                },
                else_branch = e () => (float16[2] e_y) {
                    e_y = Constant <value = float16[2] {1, 2}> ()
                }
            >
            z = Exp(a)
        }
        """,
    )


def test_casts_of_both_branches_are_one_in_front_of_them():
    assert_rewrites(
        CLEAN,
        """
        g (bool c, float[2] x) => (float16[2] y) {
            y = If (c) <
                then_branch = t () => (float16[2] t_y) {
                    a = Cast <to = 10> (x)
                    t_y = Neg(a)
                },
                else_branch = e () => (float16[2] e_y) {
                    a = Cast <to = 10> (x)
                    e_y = Exp(a)
                }
            >
        }
        """,
        """
        g (bool c, float[2] x) => (float16[2] y) {
            a = Cast <to = 10> (x)
            y = If (c) <
                then_branch = t () => (float16[2] t_y) {
                    t_y = Neg(a)
                },
                else_branch = e () => (float16[2] e_y) {
                    e_y = Exp(a)
                }
            >
        }
        """,
    )


def test_a_cast_in_front_of_branches_has_a_name_that_nothing_in_them_has():
    cleaned = rewritten(
        CLEAN,
        parse(
            """
            g (bool c, float[2] x) => (float16[2] y) {
                y = If (c) <
                    then_branch = t () => (float16[2] t_y) {
                        a = Cast <to = 10> (x)
                        t_y = Neg(a)
                    },
                    else_branch = e () => (float16[2] e_y) {
                        b = Cast <to = 10> (x)
                        e_y = If (c) <
                            then_branch = u () => (float16[2] u_y) { u_y = Neg(b) },
                            else_branch = f () => (float16[2] f_y) { a = Exp(b) f_y = Add(a, b) }
                        >
                    }
                >
            }
            """
        ),
    )
    assert [node.op_type for node in cleaned.graph] == ["Cast", "If"]


def test_a_cast_of_one_branch_stays_in_it():
    assert_leaves_alone(
        CLEAN,
        """
        g (bool c, float[2] x) => (float16[2] y, float16[2] z) {
            y = If (c) <
                then_branch = t () => (float16[2] t_y) {
                    a = Cast <to = 10> (x)
                    t_y = Neg(a)
                },
                else_branch = e () => (float16[2] e_y) {
                    e_y = Constant <value = float16[2] {1, 2}> ()
                }
            >
            z = If (c) <
                then_branch = u () => (float16[2] u_y) {
                    b = Cast <to = 10> (x)
                    u_y = Exp(b)
                },
                else_branch = f () => (float16[2] f_y) {
                    f_y = Constant <value = float16[2] {1, 2}> ()
                }
            >
        }
        """,
    )


def test_results_of_branches_that_have_one_name_keep_it():
    branch = "() => (float16[2] r) { s = OPERATOR(x) a = Cast <to = 1> (s) r = Cast <to = 10> (a) }"
    clean = "() => (float16[2] r) { r = OPERATOR(x) }"
    graph = """
        g (bool c, float16[2] x) => (float16[2] y) {
            y = If (c) < then_branch = t THEN, else_branch = e ELSE >
        }
        """
    assert_rewrites(
        CLEAN,
        graph.replace("THEN", branch.replace("OPERATOR", "Neg")).replace("ELSE", branch.replace("OPERATOR", "Abs")),
        graph.replace("THEN", clean.replace("OPERATOR", "Neg")).replace("ELSE", clean.replace("OPERATOR", "Abs")),
    )


def test_a_result_does_not_take_a_name_that_a_branch_hides():
    """What the branch takes of the outer graph would be called `y`, as something in the branch is."""
    model = parse(
        """
        g (bool c, float16[2] x) => (float16[2] y, float16[2] z) {
            s = Neg(x)
            a = Cast <to = 1> (s)
            y = Cast <to = 10> (a)
            z = If (c) <
                then_branch = t () => (float16[2] t_z) { u = Neg(s) t_z = Add(u, s) },
                else_branch = e () => (float16[2] e_z) { e_z = Neg(s) }
            >
        }
        """
    )
    inner = next(node for node in model.graph if node.op_type == "If").attributes["then_branch"].as_graph()
    inner[0].outputs[0].name = "y"
    bundle, change = run_pass(CLEAN, model)
    assert change == Change(1, "removed 1 of 2 casts")
    assert [node.op_type for node in bundle[ROLE].graph] == ["Neg", "Cast", "If"]


def test_casts_that_are_results_of_both_branches_stay():
    assert_leaves_alone(
        CLEAN,
        """
        g (bool c, float[2] x) => (float16[2] y) {
            y = If (c) <
                then_branch = t () => (float16[2] t_y) {
                    t_y = Cast <to = 10> (x)
                },
                else_branch = e () => (float16[2] e_y) {
                    e_y = Cast <to = 10> (x)
                }
            >
        }
        """,
    )


def test_a_cast_in_a_loop_stays_in_it():
    assert_leaves_alone(CLEAN, loop("a = Cast <to = 10> (x)"))


def loop(before: str, *, outside: str = "", inside: str = "a") -> str:
    return f"""
        g (int64 n, float[2] x, float16[2] start) => (float16[2] y) {{
            {outside}
            y = Loop (n, , start) <
                body = b (int64 i, bool go, float16[2] s) => (bool go_on, float16[2] s_out) {{
                    go_on = Identity(go)
                    {before}
                    s_out = Add(s, {inside})
                }}
            >
        }}
        """


def test_a_loop_uses_a_cast_outside():
    graph = loop("a = Cast <to = 10> (x)", outside="o = Cast <to = 10> (x)").replace(
        "float16[2] y)", "float16[2] y, float16[2] z)"
    )
    before = graph.rstrip()[:-1] + "z = Neg(o) }"
    after = before.replace("a = Cast <to = 10> (x)", "").replace("Add(s, a)", "Add(s, o)")
    assert_rewrites(CLEAN, before, after)


def test_a_name_that_a_branch_gives_again_is_not_taken_for_the_outer_one():
    """`x` is hidden in the branch, so that the cast in front of it cannot be left out there."""
    model = parse(
        """
        g (bool c, float[2] x) => (float[2] y) {
            a = Cast <to = 1> (x)
            y = If (c) <
                then_branch = t () => (float[2] t_y) {
                    x_t = Exp(a)
                    t_y = Add(x_t, a)
                },
                else_branch = e () => (float[2] e_y) {
                    e_y = Neg(a)
                }
            >
        }
        """
    )
    inner = next(node for node in model.graph if node.op_type == "If").attributes["then_branch"].as_graph()
    inner[0].outputs[0].name = "x"
    _, change = run_pass(CLEAN, model)
    assert change == Change(0, "")


# State of loops


def test_pairs_of_casts_of_a_loops_state_stay():
    assert_leaves_alone(
        CLEAN,
        """
        g (int64 n, float16[2] start) => (float16[2] y) {
            y = Loop (n, , start) <
                body = b (int64 i, bool go, float16[2] s) => (bool go_on, float16[2] s_out) {
                    go_on = Identity(go)
                    a = Cast <to = 1> (s)
                    c = Exp(a)
                    s_out = Cast <to = 10> (c)
                }
            >
        }
        """,
    )


def test_the_state_of_a_loop_is_cleaned_inside_and_keeps_its_name():
    assert_rewrites(
        CLEAN,
        """
        g (int64 n, float16[2] start) => (float16[2] y) {
            y = Loop (n, , start) <
                body = b (int64 i, bool go, float16[2] s) => (bool go_on, float16[2] s_out) {
                    go_on = Identity(go)
                    a = Neg(s)
                    c = Cast <to = 1> (a)
                    s_out = Cast <to = 10> (c)
                }
            >
        }
        """,
        """
        g (int64 n, float16[2] start) => (float16[2] y) {
            y = Loop (n, , start) <
                body = b (int64 i, bool go, float16[2] s) => (bool go_on, float16[2] s_out) {
                    go_on = Identity(go)
                    s_out = Neg(s)
                }
            >
        }
        """,
    )


def test_a_scan_is_cleaned_inside():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2] start, float16[3, 2] xs) => (float16[2] last, float16[3, 2] ys) {
            last, ys = Scan (start, xs) <
                num_scan_inputs = 1,
                body = b (float16[2] s, float16[2] x) => (float16[2] s_out, float16[2] y) {
                    a = Cast <to = 1> (x)
                    c = Cast <to = 10> (a)
                    s_out = Add(s, c)
                    y = Neg(s_out)
                }
            >
        }
        """,
        """
        g (float16[2] start, float16[3, 2] xs) => (float16[2] last, float16[3, 2] ys) {
            last, ys = Scan (start, xs) <
                num_scan_inputs = 1,
                body = b (float16[2] s, float16[2] x) => (float16[2] s_out, float16[2] y) {
                    s_out = Add(s, x)
                    y = Neg(s_out)
                }
            >
        }
        """,
    )


# Constants


def test_the_cast_of_a_weight_to_a_smaller_type_is_the_weight():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2] x) => (float16[2] y) <float[2] w = {1.0, 2.5}> {
            a = Cast <to = 10> (w)
            y = Add(x, a)
        }
        """,
        """
        g (float16[2] x) => (float16[2] y) <float16[2] w = {15360, 16640}> {
            y = Add(x, w)
        }
        """,
    )


def test_the_cast_of_a_constant_is_a_constant():
    assert_rewrites(
        CLEAN,
        """
        g (float[2] x) => (float[2] y) {
            w = Constant <value_ints = [1, 2]> ()
            a = Cast <to = 1> (w)
            y = Add(x, a)
        }
        """,
        """
        g (float[2] x) => (float[2] y) {
            w = Constant <value = float[2] {1, 2}> ()
            y = Add(x, w)
        }
        """,
    )


def test_a_constant_that_is_used_in_two_types_is_there_in_both():
    assert_rewrites(
        CLEAN,
        """
        g (float[2] x) => (float[2] y, float16[2] z) <float[2] w = {1.0, 2.5}> {
            y = Add(x, w)
            b = Cast <to = 10> (x)
            a = Cast <to = 10> (w)
            z = Add(b, a)
        }
        """,
        """
        g (float[2] x) => (float[2] y, float16[2] z) <float[2] w = {1.0, 2.5}, float16[2] a = {15360, 16640}> {
            y = Add(x, w)
            b = Cast <to = 10> (x)
            z = Add(b, a)
        }
        """,
    )


def test_what_is_filled_with_a_constant_is_filled_in_the_type_that_it_is_cast_to():
    assert_rewrites(
        CLEAN,
        """
        g (int64[2] shape, bool c, float16[2, 2] x) => (float16[c, d] y, float16[e, h] z) {
            f = ConstantOfShape <value = float[1] {2.5}> (shape)
            y = Cast <to = 10> (f)
            g = Cast <to = 10> (f)
            z = Where(c, g, x)
        }
        """,
        """
        g (int64[2] shape, bool c, float16[2, 2] x) => (float16[c, d] y, float16[e, h] z) {
            y = ConstantOfShape <value = float16[1] {16640}> (shape)
            z = Where(c, y, x)
        }
        """,
        feeds=[
            {"shape": np.array([2, 2]), "c": np.array(flag), "x": np.ones((2, 2), dtype=np.float16)}
            for flag in (True, False)
        ],
    )


def test_what_is_filled_with_a_constant_and_used_in_two_types_is_cast():
    assert_leaves_alone(
        CLEAN,
        """
        g (int64[2] shape) => (float16[a, b] y, float[a, b] z) {
            f = ConstantOfShape <value = float[1] {2.5}> (shape)
            y = Cast <to = 10> (f)
            z = Neg(f)
        }
        """,
    )


def test_a_weight_that_a_caller_may_override_is_cast():
    assert_leaves_alone(
        CLEAN,
        """
        g (float16[2] x, float[2] w = {1.0, 2.5}) => (float16[2] y) {
            a = Cast <to = 10> (w)
            y = Add(x, a)
        }
        """,
    )


def test_a_cast_of_a_weight_that_is_a_result_stays():
    assert_leaves_alone(
        CLEAN,
        """
        g () => (float16[2] y) <float[2] w = {1.0, 2.5}> {
            y = Cast <to = 10> (w)
        }
        """,
    )


@pytest.mark.parametrize(
    ("constant", "to"),
    [
        ("float[1] w = {300.0}", 3),  # no int8
        ("float[1] w = {-1.0}", 2),
        ("int64[1] w = {300}", 3),
        ("double[1] w = {1.00048828125909}", 10),  # rounded twice by some
        ("int64[1] w = {16842753}", 16),
    ],
)
def test_a_constant_about_which_runtimes_differ_is_cast_by_the_runtime(constant: str, to: int):
    result = {2: "uint8", 3: "int8", 10: "float16", 16: "bfloat16"}[to]
    assert_leaves_alone(
        CLEAN,
        f"""
        g (int64[1] shape) => ({result}[1] y) <{constant}> {{
            a = Cast <to = {to}> (w)
            y = Reshape(a, shape)
        }}
        """,
    )


def with_weight(source: str) -> ir.Model:
    """A weight of 512 numbers that is cast, to float16 or from it, before its rows are looked up."""
    dtype, to = {"float": (ir.DataType.FLOAT, 10), "float16": (ir.DataType.FLOAT16, 1)}[source]
    result = {"float": "float16", "float16": "float"}[source]
    model = parse(
        f"""
        g (int64[k] ids) => ({result}[k, 64] y) <{source}[8, 64] w = {{{", ".join("0" * 512)}}}> {{
            a = Cast <to = {to}> (w)
            y = Gather(a, ids)
        }}
        """
    )
    numbers = np.random.default_rng(0).standard_normal((8, 64)).astype(dtype.numpy())
    model.graph.initializers["w"].const_value = ir.tensor(numbers)
    return model


def test_a_large_weight_becomes_smaller_when_it_is_read():
    model = rewritten(CLEAN, with_weight("float"))
    (weight,) = model.graph.initializers.values()
    assert (weight.name, weight.dtype) == ("w", ir.DataType.FLOAT16)
    assert isinstance(weight.const_value, ir.LazyTensor)
    assert [node.op_type for node in model.graph] == ["Gather"]


def test_a_large_weight_does_not_become_larger():
    assert_leaves_alone(CLEAN, with_weight("float16"))


def test_a_large_weight_that_is_used_in_two_types_is_cast():
    model = with_weight("float")
    (weight,) = model.graph.initializers.values()
    other = ir.node("Neg", [weight])
    other.outputs[0].name, other.outputs[0].type = "z", ir.TensorType(ir.DataType.FLOAT)
    other.outputs[0].shape = ir.Shape((8, 64))
    model.graph.append(other)
    model.graph.outputs.append(other.outputs[0])
    assert_leaves_alone(CleanCasts(small_bytes=1023), model)


def test_a_large_weight_becomes_larger_if_that_is_asked_for():
    model = rewritten(CleanCasts(small_bytes=1 << 20), with_weight("float16"))
    assert model.graph.initializers["w"].dtype == ir.DataType.FLOAT


# The lossy rule


ROUNDING = """
    g (float[2] x) => (float[2] y) {
        a = Cast <to = 10> (x)
        b = Cast <to = 1> (a)
        y = Neg(b)
    }
    """


def test_rounding_is_kept_and_the_pass_exact():
    assert CLEAN.effect is Effect.EXACT
    assert_leaves_alone(CLEAN, ROUNDING)


def test_rounding_is_dropped_on_demand_and_the_pass_close():
    lossy = CleanCasts(drop_rounding=True)
    assert lossy.effect is Effect.CLOSE
    assert_rewrites(
        lossy,
        ROUNDING,
        """
        g (float[2] x) => (float[2] y) {
            y = Neg(x)
        }
        """,
    )


def test_truncation_is_not_dropped_on_demand():
    assert_leaves_alone(CleanCasts(drop_rounding=True), ROUNDING.replace("to = 10", "to = 7"))


# What is not known


def test_casts_in_local_functions_are_left_alone():
    assert_leaves_alone(
        CLEAN,
        """
        <ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[2] x) => (float[2] y) {
            y = local.f(x)
        }
        <opset_import: ["" : 21], domain: "local">
        f (x) => (y) {
            a = Cast <to = 1> (x)
            y = Neg(a)
        }
        """,
    )


def test_a_cast_of_a_value_of_unknown_type_is_left_alone():
    assert_leaves_alone(
        CLEAN,
        """
        <ir_version: 10, opset_import: ["" : 21, "local" : 1]>
        g (float[2] x) => (float[2] y) {
            a = local.f(x)
            b = Cast <to = 1> (a)
            y = Neg(b)
        }
        <opset_import: ["" : 21], domain: "local">
        f (x) => (y) {
            y = Neg(x)
        }
        """,
    )


def test_an_empty_tensor_is_cast_alike():
    assert_rewrites(
        CLEAN,
        """
        g (float16[0, 2] x) => (float16[0, 2] y) <float[0, 2] w = {}> {
            a = Cast <to = 1> (x)
            b = Cast <to = 10> (a)
            c = Cast <to = 10> (w)
            y = Add(b, c)
        }
        """,
        """
        g (float16[0, 2] x) => (float16[0, 2] y) <float16[0, 2] w = {}> {
            y = Add(x, w)
        }
        """,
    )


def test_casts_around_sequences_are_cleaned_and_sequences_left():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2] x) => (float16[2] y) {
            a = Cast <to = 1> (x)
            s = SequenceConstruct(a, a)
            i = Identity(s)
            one = Constant <value_int = 1> ()
            e = SequenceAt(i, one)
            b = Cast <to = 10> (e)
            c = Cast <to = 1> (b)
            y = Cast <to = 10> (c)
        }
        """,
        """
        g (float16[2] x) => (float16[2] y) {
            a = Cast <to = 1> (x)
            s = SequenceConstruct(a, a)
            i = Identity(s)
            one = Constant <value_int = 1> ()
            e = SequenceAt(i, one)
            y = Cast <to = 10> (e)
        }
        """,
    )


def test_it_says_how_many_casts_went():
    _, change = run_pass(CLEAN, parse(ROUNDING.replace("y = Neg(b)", "c = Cast <to = 10> (b)\n y = Cast <to = 1> (c)")))
    assert change == Change(2, "removed 2 of 4 casts")


def test_a_result_keeps_its_declared_shape():
    model = parse(
        """
        g (float16[a, 2] x) => (float16[rows, 2] y) {
            s = Neg(x)
            a = Cast <to = 1> (s)
            y = Cast <to = 10> (a)
        }
        """
    )
    bundle, _ = run_pass(CLEAN, model)
    (result,) = bundle[ROLE].graph.outputs
    assert (result.name, str(result.shape)) == ("y", "[rows,2]")
    assert_text(bundle[ROLE], "g (float16[a, 2] x) => (float16[rows, 2] y) { y = Neg(x) }")


def test_a_cast_that_leaves_a_branch_has_a_name_of_its_own():
    """ONNX Runtime takes no two nodes of one name in a graph."""
    model = parse(
        """
        g (bool c, float[2] x) => (float16[2] y, int32[2] z) {
            y = If (c) <
                then_branch = t () => (float16[2] t_y) { a = Cast <to = 10> (x) t_y = Neg(a) },
                else_branch = e () => (float16[2] e_y) { b = Cast <to = 10> (x) e_y = Exp(b) }
            >
            z = Cast <to = 6> (x)
        }
        """
    )
    for graph in graphs_of(model.graph):
        for node in graph:
            node.name = node.op_type
    cleaned = rewritten(CLEAN, model)
    names = [node.name for node in cleaned.graph]
    assert len(names) == len(set(names)) == 3


def test_a_large_weight_is_saved_in_its_new_type(tmp_path: Path):
    model = with_weight("float")
    tensor = model.graph.initializers["w"].const_value
    assert tensor is not None
    bundle, _ = run_pass(CLEAN, model)
    save_model(bundle[ROLE], tmp_path / "model.onnx", min_bytes=1)
    saved = open_model(tmp_path / "model.onnx").graph.initializers["w"].const_value
    assert saved is not None
    assert (tmp_path / "model.onnx_data").stat().st_size == tensor.nbytes // 2
    assert np.array_equal(saved.numpy(), tensor.numpy().astype(np.float16))


def test_a_constant_that_is_printed_is_left_alone():
    assert_leaves_alone(
        CleanCasts(), "g () => (string[2] y) <float[2] w = {1, 2.5}> { a = Cast <to = 8> (w)  y = Identity(a) }"
    )
