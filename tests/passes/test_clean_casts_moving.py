"""`clean_casts`: casts moved through operators that only move numbers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from rewriting import assert_leaves_alone, assert_rewrites, rewritten

from passes.clean_casts import CleanCasts
from passes.clean_casts.exactness import COMMON
from passes.clean_casts.neutral import MOVED, OF_ANY_TYPE, TYPES, moved_inputs, neutral_type
from surgery.element_types import infer_types
from surgery.graphs import cast_of, graphs_of, value_names
from surgery.runtime.sessions import open_session
from surgery.storage import open_model
from surgery.text import parse

CLEAN = CleanCasts()


@pytest.mark.parametrize(
    "moved",
    [
        "Flatten(IN)",
        "Identity(IN)",
        "Reshape(IN, shape)",
        "Transpose(IN)",
        "Slice(IN, first, second)",
        "Gather(IN, first)",
        "Expand(IN, shape)",
        "Tile(IN, pair)",
        "Pad(IN, four)",
        "Concat <axis = 0> (IN, IN)",
    ],
)
def test_there_and_back_around_what_only_moves_numbers_goes(moved: str):
    constants = (
        "int64[2] shape = {2, 3}, int64[1] first = {0}, int64[1] second = {1}, int64[2] pair = {2, 1}, "
        "int64[4] four = {1, 0, 0, 1}"
    )
    graph = """
        g (float16[2, 3] x) => (float16[a, b] y) <CONSTANTS> {
            BEFORE
            c = MOVED
            AFTER
            y = Neg(d)
        }
        """.replace("CONSTANTS", constants)
    before = graph.replace("BEFORE", "w = Cast <to = 1> (x)").replace("MOVED", moved.replace("IN", "w"))
    after = graph.replace("BEFORE", "").replace("MOVED", moved.replace("IN", "x")).replace("AFTER", "")
    assert_rewrites(CLEAN, before.replace("AFTER", "d = Cast <to = 10> (c)"), after.replace("Neg(d)", "Neg(c)"))


def test_casts_meet_through_several_nodes_and_give_their_name_to_a_result():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2, 6] x) => (float16[a, b, c] y, int64[3] z) <int64[3] shape = {2, 2, 3}> {
            w = Cast <to = 1> (x)
            r = Reshape(w, shape)
            t = Transpose <perm = [1, 0, 2]> (r)
            z = Shape(t)
            y = Cast <to = 10> (t)
        }
        """,
        """
        g (float16[2, 6] x) => (float16[a, b, c] y, int64[3] z) <int64[3] shape = {2, 2, 3}> {
            r = Reshape(x, shape)
            y = Transpose <perm = [1, 0, 2]> (r)
            z = Shape(y)
        }
        """,
    )


def test_a_concat_of_two_widened_tensors_that_is_narrowed():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2] x, float16[2] y) => (float16[4] z) {
            a = Cast <to = 1> (x)
            b = Cast <to = 1> (y)
            c = Concat <axis = 0> (a, b)
            d = Cast <to = 10> (c)
            z = Neg(d)
        }
        """,
        """
        g (float16[2] x, float16[2] y) => (float16[4] z) {
            c = Concat <axis = 0> (x, y)
            z = Neg(c)
        }
        """,
    )


def test_two_widened_tensors_are_widened_once_behind_a_concat():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2] x, float16[2] y) => (float[4] c) {
            a = Cast <to = 1> (x)
            b = Cast <to = 1> (y)
            c = Concat <axis = 0> (a, b)
        }
        """,
        """
        g (float16[2] x, float16[2] y) => (float[4] c) {
            c_float16 = Concat <axis = 0> (x, y)
            c = Cast <to = 1> (c_float16)
        }
        """,
    )


def test_the_other_input_of_a_concat_is_narrowed_before_it():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2] x, float[2] y) => (float16[4] z) {
            a = Cast <to = 1> (x)
            e = Exp(y)
            c = Concat <axis = 0> (a, e)
            d = Cast <to = 10> (c)
            z = Neg(d)
        }
        """,
        """
        g (float16[2] x, float[2] y) => (float16[4] z) {
            e = Exp(y)
            e_float16 = Cast <to = 10> (e)
            c = Concat <axis = 0> (x, e_float16)
            z = Neg(c)
        }
        """,
    )


def test_two_takers_that_both_narrow():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2, 3] x) => (float16[3, 2] y, float16[6] z) <int64[1] flat = {-1}> {
            a = Cast <to = 1> (x)
            t = Transpose(a)
            b = Cast <to = 10> (t)
            y = Neg(b)
            r = Reshape(t, flat)
            c = Cast <to = 10> (r)
            z = Neg(c)
        }
        """,
        """
        g (float16[2, 3] x) => (float16[3, 2] y, float16[6] z) <int64[1] flat = {-1}> {
            t = Transpose(x)
            y = Neg(t)
            r = Reshape(t, flat)
            z = Neg(r)
        }
        """,
    )


def test_pieces_that_are_all_narrowed_are_narrowed_as_one():
    assert_rewrites(
        CLEAN,
        """
        g (float[6] x) => (float16[2] y, float16[2] z, float16[2] u) {
            a, b, c = Split <num_outputs = 3> (x)
            a_16 = Cast <to = 10> (a)
            b_16 = Cast <to = 10> (b)
            c_16 = Cast <to = 10> (c)
            y = Neg(a_16)
            z = Exp(b_16)
            u = Abs(c_16)
        }
        """,
        """
        g (float[6] x) => (float16[2] y, float16[2] z, float16[2] u) {
            x_16 = Cast <to = 10> (x)
            a, b, c = Split <num_outputs = 3> (x_16)
            y = Neg(a)
            z = Exp(b)
            u = Abs(c)
        }
        """.replace("x_16", "x_float16"),
    )


def test_a_split_among_reshapes_is_left_out_as_a_whole():
    """No step from node to node leaves fewer casts here, only all at once."""
    assert_rewrites(
        CLEAN,
        """
        g (float16[6] x) => (float16[1, 2] y, float16[1, 2] z, float16[1, 2] u) <int64[2] row = {1, -1}> {
            w = Cast <to = 1> (x)
            a, b, c = Split <num_outputs = 3> (w)
            ra = Reshape(a, row)
            rb = Reshape(b, row)
            rc = Reshape(c, row)
            y = Cast <to = 10> (ra)
            z = Cast <to = 10> (rb)
            u = Cast <to = 10> (rc)
        }
        """,
        """
        g (float16[6] x) => (float16[1, 2] y, float16[1, 2] z, float16[1, 2] u) <int64[2] row = {1, -1}> {
            a, b, c = Split <num_outputs = 3> (x)
            y = Reshape(a, row)
            z = Reshape(b, row)
            u = Reshape(c, row)
        }
        """,
    )


def test_a_mask_of_the_lowest_float_is_narrowed_with_what_it_masks():
    assert_rewrites(
        CLEAN,
        """
        g (bool[2] c, float16[2] x) => (float16[2] y) <float lowest = {-3.4028234663852886e38}> {
            a = Cast <to = 1> (x)
            b = Where(c, a, lowest)
            d = Cast <to = 10> (b)
            y = Neg(d)
        }
        """,
        """
        g (bool[2] c, float16[2] x) => (float16[2] y) <float16 lowest = {64512}> {
            b = Where(c, x, lowest)
            y = Neg(b)
        }
        """,
    )


def test_a_mask_of_the_lowest_float_is_not_narrowed_where_it_is_read_as_a_float():
    assert_leaves_alone(
        CLEAN,
        """
        g (bool[2] c, float16[2] x) => (float[2] y) <float lowest = {-3.4028234663852886e38}> {
            a = Cast <to = 1> (x)
            b = Where(c, a, lowest)
            y = Exp(b)
        }
        """,
    )


def test_casts_meet_that_are_in_a_graph_and_in_the_branches_in_it():
    assert_rewrites(
        CLEAN,
        """
        g (bool c, float16[2, 3] x) => (float16[a, b] y) <int64[2] shape = {3, 2}> {
            w = Cast <to = 1> (x)
            y = If (c) <
                then_branch = t () => (float16[3, 2] t_y) {
                    t_r = Reshape(w, shape)
                    t_d = Cast <to = 10> (t_r)
                    t_y = Neg(t_d)
                },
                else_branch = e () => (float16[3, 2] e_y) {
                    e_t = Transpose(w)
                    e_y = Cast <to = 10> (e_t)
                }
            >
        }
        """,
        """
        g (bool c, float16[2, 3] x) => (float16[a, b] y) <int64[2] shape = {3, 2}> {
            y = If (c) <
                then_branch = t () => (float16[3, 2] t_y) {
                    t_r = Reshape(x, shape)
                    t_y = Neg(t_r)
                },
                else_branch = e () => (float16[3, 2] e_y) {
                    e_y = Transpose(x)
                }
            >
        }
        """,
    )


def test_a_cast_to_a_third_type_needs_no_cast_before_it():
    assert_rewrites(
        CLEAN,
        """
        g (float16[2, 3] x) => (double[3, 2] y) {
            a = Cast <to = 1> (x)
            t = Transpose(a)
            y = Cast <to = 11> (t)
        }
        """,
        """
        g (float16[2, 3] x) => (double[3, 2] y) {
            t = Transpose(x)
            y = Cast <to = 11> (t)
        }
        """,
    )


def test_pieces_that_are_widened_are_widened_as_one_and_the_other_is_narrowed_again():
    assert_rewrites(
        CLEAN,
        """
        g (float16[8] x) => (float[2] y, float[2] z, float[2] u, float16[2] v) {
            a, b, c, d = Split <num_outputs = 4> (x)
            a_32 = Cast <to = 1> (a)
            y = Exp(a_32)
            b_32 = Cast <to = 1> (b)
            z = Exp(b_32)
            c_32 = Cast <to = 1> (c)
            u = Exp(c_32)
            v = Neg(d)
        }
        """,
        """
        g (float16[8] x) => (float[2] y, float[2] z, float[2] u, float16[2] v) {
            x_float = Cast <to = 1> (x)
            a, b, c, d_float = Split <num_outputs = 4> (x_float)
            d = Cast <to = 10> (d_float)
            y = Exp(a)
            z = Exp(b)
            u = Exp(c)
            v = Neg(d)
        }
        """,
    )


def test_an_embedding_is_looked_up_in_the_type_that_its_rows_are_cast_to():
    assert_rewrites(
        CLEAN,
        """
        g (int64[k] ids) => (float16[k, 2] y) <float[3, 2] w = {1, 2, 3, 4, 5, 6}> {
            a = Gather(w, ids)
            b = Cast <to = 10> (a)
            y = Neg(b)
        }
        """,
        """
        g (int64[k] ids) => (float16[k, 2] y)
        <float16[3, 2] w = {15360, 16384, 16896, 17408, 17664, 17920}> {
            a = Gather(w, ids)
            y = Neg(a)
        }
        """,
    )


# What stays


@pytest.mark.parametrize(
    "body",
    [
        # the same number of casts
        "a = Cast <to = 1> (x)  t = Transpose(a)  y = Exp(t)",
        # an operator that computes
        "a = Cast <to = 1> (x)  t = Exp(a)  b = Cast <to = 10> (t)  y = Cast <to = 1> (b)",
        # one of two takers needs all the bits
        "a = Exp(f)  t = Transpose(a)  b = Cast <to = 10> (t)  c = Cast <to = 1> (b)  y = Add(c, t)",
    ],
)
def test_what_would_not_leave_fewer_casts_stays(body: str):
    assert_leaves_alone(CLEAN, f"g (float16[2, 2] x, float[2, 2] f) => (float[2, 2] y) {{ {body} }}")


def test_a_cast_does_not_move_to_a_larger_tensor():
    assert_leaves_alone(
        CLEAN,
        """
        g (float[1000] x, int64[2] i, int64[2] j) => (float16[2] y, float16[2] z) {
            a = Gather(x, i)
            b = Cast <to = 10> (a)
            y = Neg(b)
            c = Gather(x, j)
            d = Cast <to = 10> (c)
            z = Exp(d)
        }
        """,
    )
    assert_leaves_alone(
        CLEAN,
        """
        g (float16[1] x, float16[1] u, bool[1000] c) => (float[1000] y) {
            a = Cast <to = 1> (x)
            b = Cast <to = 1> (u)
            y = Where(c, a, b)
        }
        """,
    )


def test_a_tensor_of_which_one_piece_is_needed_in_full_is_not_rounded_to_save_casts():
    assert_leaves_alone(
        CLEAN,
        """
        g (float[8] x) => (float16[2] y, float16[2] z, float16[2] u, float[2] v) {
            a, b, c, d = Split <num_outputs = 4> (x)
            y = Cast <to = 10> (a)
            z = Cast <to = 10> (b)
            u = Cast <to = 10> (c)
            v = Exp(d)
        }
        """,
    )


def test_a_cast_of_a_branch_is_not_made_outside_where_the_branch_may_not_run():
    assert_leaves_alone(
        CLEAN,
        """
        g (bool c, float16[2] x, float[2] f) => (float16[4] y) {
            a = Cast <to = 1> (x)
            e = Exp(f)
            t = Concat <axis = 0> (a, e)
            y = If (c) <
                then_branch = t () => (float16[4] t_y) { t_d = Cast <to = 10> (t) t_y = Neg(t_d) },
                else_branch = e () => (float16[4] e_y) { e_y = Constant <value = float16[4] {1, 2, 3, 4}> () }
            >
        }
        """,
    )


def test_a_weight_is_not_cast_at_each_run_to_save_casts():
    graph = """
        g (int64[2] i, float[4] w = {1.0, 2.0, 3.0, 4.0}) => (float16[2] y, float16[2] z) {
            a, b = Split <num_outputs = 2> (w)
            y = Cast <to = 10> (a)
            z = Cast <to = 10> (b)
        }
        """
    assert_leaves_alone(CLEAN, graph)


def test_pieces_of_a_rounded_tensor_are_not_the_tensor_before_it_was_rounded():
    assert_leaves_alone(
        CLEAN,
        """
        g (float[2, 3] x) => (float[3, 2] y) {
            a = Cast <to = 10> (x)
            t = Transpose(a)
            b = Cast <to = 1> (t)
            y = Neg(b)
        }
        """,
    )


def test_a_taker_in_a_branch_keeps_its_type():
    assert_rewrites(
        CLEAN,
        """
        g (bool c, float16[2] x, float16[2] u) => (float[4] y) {
            a = Cast <to = 1> (x)
            b = Cast <to = 1> (u)
            t = Concat <axis = 0> (a, b)
            y = If (c) <
                then_branch = n () => (float[4] n_y) { n_y = Neg(t) },
                else_branch = e () => (float[4] e_y) { h = Cast <to = 10> (t) k = Cast <to = 1> (h) e_y = Exp(k) }
            >
        }
        """,
        """
        g (bool c, float16[2] x, float16[2] u) => (float[4] y) {
            t_float16 = Concat <axis = 0> (x, u)
            t = Cast <to = 1> (t_float16)
            y = If (c) <
                then_branch = n () => (float[4] n_y) { n_y = Neg(t) },
                else_branch = e () => (float[4] e_y) { e_y = Exp(t) }
            >
        }
        """,
    )


# All operators, in all types


SHAPES = {
    "Concat": ("IN, IN", {"axis": 0}),
    "Expand": ("IN, shape", {}),
    "Flatten": ("IN", {}),
    "Gather": ("IN, ints", {}),
    "GatherElements": ("IN, full", {}),
    "GatherND": ("IN, pairs", {}),
    "Identity": ("IN", {}),
    "Pad": ("IN, pads", {}),
    "Reshape": ("IN, shape", {}),
    "Slice": ("IN, start, stop", {}),
    "Split": ("IN", {"num_outputs": 2, "axis": 1}),
    "Squeeze": ("IN, axis", {}),
    "Tile": ("IN, shape", {}),
    "Transpose": ("IN", {}),
    "Unsqueeze": ("IN, axis", {}),
    "Where": ("flag, IN, IN", {}),
}

RANKS = {"Flatten": 2, "GatherND": 3, "Squeeze": 3, "Unsqueeze": 5}


def around(operator: str, narrow: ir.DataType, wide: ir.DataType) -> ir.Model:
    """A cast to a wider type, an operator, and the cast back."""
    inputs, attributes = SHAPES[operator]
    given = ", ".join(f"{name} = {number}" for name, number in attributes.items())
    sizes = ", ".join("ijklm"[: RANKS.get(operator, 4)])
    results = "b, rest" if operator == "Split" else "b"
    text = f"""
        g (float[1, 4, 2, 2] f) => (float[{sizes}] y)
        <int64[4] shape = {{1, 4, 2, 2}}, bool[1] flag = {{1}}, int64[1] ints = {{0}},
         int64[1, 1, 1, 1] full = {{0}}, int64[1, 2] pairs = {{0, 1}}, int64[8] pads = {{0, 1, 0, 0, 0, 0, 0, 1}},
         int64[1] start = {{0}}, int64[1] stop = {{1}}, int64[1] axis = {{0}}> {{
            x = Cast <to = {int(narrow)}> (f)
            a = Cast <to = {int(wide)}> (x)
            {results} = {operator} <{given}> ({inputs.replace("IN", "a")})
            c = Cast <to = {int(narrow)}> (b)
            y = Cast <to = 1> (c)
        }}
        """.replace(" <>", "")
    return parse(text)


D = ir.DataType
PAIRS = [(D.FLOAT16, D.FLOAT), (D.BFLOAT16, D.FLOAT), (D.FLOAT, D.DOUBLE), (D.INT32, D.INT64), (D.INT8, D.INT32)]


@pytest.mark.parametrize(("narrow", "wide"), PAIRS, ids=lambda dtype: dtype.name)
def test_every_operator_runs_in_the_types_that_casts_are_moved_to(narrow: ir.DataType, wide: ir.DataType):
    """An operator that the runtime lacks for a type would fail here: the result is run."""
    assert SHAPES.keys() == MOVED.keys()
    feeds = [{"f": np.linspace(-3, 3, 16, dtype=np.float32).reshape(1, 4, 2, 2)}]
    for operator in SHAPES:
        model = around(operator, narrow, wide)
        if operator not in OF_ANY_TYPE and narrow not in TYPES:
            assert_leaves_alone(CLEAN, model)
            continue
        targets = [node.attributes.get_int("to", 0) for node in rewritten(CLEAN, model, feeds).graph]
        assert targets.count(int(wide)) == (wide is D.FLOAT), operator  # the last one, which makes the result


@pytest.mark.parametrize("operator", MOVED)
def test_onnx_runtime_has_every_operator_for_the_types_that_it_may_be_moved_to(operator: str):
    for dtype in sorted(COMMON if operator in OF_ANY_TYPE else TYPES):
        model = around(operator, dtype, dtype)
        session = open_session(model, threads=1)
        session.run(None, {"f": np.ones((1, 4, 2, 2), dtype=np.float32)})


# A whole decoder


MERGED = Path(__file__).resolve().parent.parent / "sources" / "foreign" / "gpt2_all" / "decoder_model_merged.onnx"
SIZES = {"batch_size": 2, "sequence_length": 1, "past_sequence_length": 4, "attention_mask_sequence_length": 5}


def round_everything(model: ir.Model) -> None:
    """Send what each node gives through float16 and back."""
    infer_types(model)
    names = value_names(model.graph)
    for graph in tuple(graphs_of(model.graph)):
        for node in tuple(graph):
            for value in [value for value in node.outputs if value.dtype == D.FLOAT and not value.is_graph_output()]:
                down = cast_of(value, D.FLOAT16, names)
                up = cast_of(down.outputs[0], D.FLOAT, names)
                for user, index in value.uses():
                    if user is not down:
                        user.replace_input_with(index, up.outputs[0])
                graph.insert_after(node, [down, up])


def drawn(value: ir.Value) -> np.ndarray:
    assert value.shape is not None
    assert value.dtype is not None
    shape = [size if isinstance(size, int) else SIZES[str(size)] for size in value.shape]
    if value.dtype == D.FLOAT:
        return np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    return np.ones(shape, dtype=value.dtype.numpy())


def test_in_a_decoder_that_is_rounded_everywhere_nothing_that_only_moves_numbers_stays_between_casts():
    model = open_model(MERGED)
    round_everything(model)
    sample = {str(value.name): drawn(value) for value in model.graph.inputs}
    flag = "use_cache_branch"
    cleaned = rewritten(CLEAN, model, [{**sample, flag: np.full((1,), choice)} for choice in (True, False)])
    infer_types(cleaned)
    for graph in graphs_of(cleaned.graph):
        for node in graph:
            if neutral_type(node) == D.FLOAT:
                givers = [giver_of(node.inputs[index]) for index in moved_inputs(node)]
                takers = [user.op_type for output in node.outputs for user, _ in output.uses()]
                assert not set(givers) <= {"Cast"} or not set(takers) <= {"Cast", "Shape"}, node
    assert sum(node.op_type == "Cast" for graph in graphs_of(cleaned.graph) for node in graph) < 240  # of 340


def giver_of(value: ir.Value | None) -> str | None:
    giver = value.producer() if value is not None else None
    return giver.op_type if giver is not None else None
