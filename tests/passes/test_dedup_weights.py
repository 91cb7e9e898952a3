"""`dedup_weights`: what is shared, what is left alone, and that the answers stay what they were."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
import onnxruntime
import pytest
from rewriting import (
    assert_leaves_alone,
    assert_rewrites,
    assert_same_numbers,
    assert_text,
    rewritten,
    run_pass,
    sample_feeds,
)

from passes.dedup_weights import DedupWeights
from surgery.contract import Bundle, Change, Context
from surgery.graphs import constant_tensor, graphs_of
from surgery.runtime.sessions import open_session
from surgery.storage import DataFile, Layout, Region, data_file_of, file_of_role, open_model, save_models
from surgery.text import parse
from surgery.watchers.validity import find_problem

DEDUP = DedupWeights(min_bytes=1)


def model_with(text: str, **tensors: np.ndarray | ir.TensorProtocol) -> ir.Model:
    """Return a drawn model with the values of some of its initializers replaced."""
    model = parse(text)
    for name, tensor in tensors.items():
        value = model.graph.initializers[name]
        value.const_value = ir.tensor(tensor) if isinstance(tensor, np.ndarray) else tensor
        assert value.const_value.dtype == value.dtype
    return model


# Initializers of one graph


def test_equal_initializers_are_one_and_it_keeps_its_name():
    assert_rewrites(
        DEDUP,
        """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] c = {1, 3}> {
            p = Add(x, a)
            q = Mul(p, b)
            y = Sub(q, c)
        }
        """,
        """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] c = {1, 3}> {
            p = Add(x, a)
            q = Mul(p, a)
            y = Sub(q, c)
        }
        """,
    )


def test_a_weight_that_two_nodes_use_and_one_uses_twice_is_replaced_everywhere():
    assert_rewrites(
        DEDUP,
        """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            p = Mul(b, b)
            q = Mul(x, b)
            r = Add(p, q)
            y = Add(r, a)
        }
        """,
        """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            p = Mul(a, a)
            q = Mul(x, a)
            r = Add(p, q)
            y = Add(r, a)
        }
        """,
    )


def test_a_twin_that_nothing_uses_goes_too():
    assert_rewrites(
        DEDUP,
        """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            y = Add(x, a)
        }
        """,
        """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            y = Add(x, a)
        }
        """,
    )


PAIR = """
    g (float[2] x) => (float[2] y) <{kind}[{shape}] a = {{{values}}}, {kind}[{shape}] b = {{{values}}}> {{
        p = Cast <to = 1> (a)
        q = Cast <to = 1> (b)
        r = Add(x, p)
        y = Mul(r, q)
    }}
    """
SHARED_PAIR = """
    g (float[2] x) => (float[2] y) <{kind}[{shape}] a = {{{values}}}> {{
        p = Cast <to = 1> (a)
        q = Cast <to = 1> (a)
        r = Add(x, p)
        y = Mul(r, q)
    }}
    """


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("double", "1.5, -2"),
        ("float16", "15360, 1"),  # 1.0 and the smallest subnormal, as bits
        ("bfloat16", "16256, 16384"),
        ("float8e4m3fn", "56, 1"),
        ("int64", "-9223372036854775808, 3"),
        ("int32", "-7, 7"),
        ("int8", "-128, 127"),
        ("uint8", "0, 255"),
        ("uint64", "18446744073709551615, 1"),
        ("bool", "1, 0"),
    ],
)
def test_every_type_of_tensor_is_shared(kind: str, values: str):
    before, after = (text.format(kind=kind, shape="2", values=values) for text in (PAIR, SHARED_PAIR))
    assert_rewrites(DEDUP, before, after)


@pytest.mark.parametrize("kind", ["int4", "uint4"])
def test_packed_4_bit_weights_are_shared_with_an_odd_number_of_elements_too(kind: str):
    array = np.array([[1], [2], [3]], dtype=getattr(ml_dtypes, kind))
    before, after = (text.format(kind=kind, shape="3, 1", values="0") for text in (PAIR, SHARED_PAIR))
    before, after = (text.replace("float[2] y", "float[3, 2] y") for text in (before, after))
    assert_rewrites(DEDUP, model_with(before, a=array, b=array.copy()), model_with(after, a=array))


def test_4_bit_weights_that_differ_in_one_element_are_left_alone():
    arrays = {"a": np.array([1, -2], dtype=ml_dtypes.int4), "b": np.array([1, -3], dtype=ml_dtypes.int4)}
    assert_leaves_alone(DEDUP, model_with(PAIR.format(kind="int4", shape="2", values="0"), **arrays))


def test_strings_are_left_alone():
    assert_leaves_alone(
        DEDUP,
        """
        g (string[2] x) => (string[2] y) <string[2] a = {"one", "two"}, string[2] b = {"one", "two"}> {
            k = Constant <value = string[2] {"one", "two"}> ()
            p = StringConcat(x, a)
            q = StringConcat(p, b)
            y = StringConcat(q, k)
        }
        """,
    )


def test_tensors_without_elements_are_left_alone():
    assert_leaves_alone(
        DEDUP,
        """
        g (float[2] x) => (float[2] y) <float[0] a = {}, float[0] b = {}, int64[2, 0] c = {}, int64[2, 0] d = {}> {
            p = Concat <axis = 0> (x, a)
            y = Concat <axis = 0> (p, b)
        }
        """,
    )


def test_the_same_bytes_of_another_type_are_another_weight():
    assert_leaves_alone(
        DEDUP,
        """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 1}, int32[2] b = {1065353216, 1065353216}> {
            p = Add(x, a)
            q = Cast <to = 1> (b)
            y = Mul(p, q)
        }
        """,
    )


def test_the_same_bytes_in_another_shape_are_another_weight():
    assert_leaves_alone(
        DEDUP,
        """
        g (float[1, 2] x) => (float[2, 2] y) <float[1, 2] a = {1, 2}, float[2, 1] b = {1, 2}, float[2] c = {1, 2}> {
            p = Add(x, a)
            q = Add(p, c)
            y = Add(q, b)
        }
        """,
    )


def test_zero_and_minus_zero_are_not_shared():
    assert_leaves_alone(
        DEDUP,
        """
        g (float[2] x) => (float[2] y, float[2] z) <float[2] a = {0.0, 1}, float[2] b = {-0.0, 1}> {
            y = Div(x, a)
            z = Div(x, b)
        }
        """,
    )


def test_nans_are_shared_by_their_bits():
    quiet, payload = (np.array([1, bits], np.uint32).view(np.float32) for bits in (0x7FC00000, 0x7FC00001))
    graph = """
        g (float[2] x) => (float[2] y) <float[2] a = {0, 0}, float[2] b = {0, 0}, float[2] c = {0, 0}> {
            p = Add(x, a)
            q = Add(p, b)
            y = Max(q, c)
        }
        """
    assert_rewrites(
        DEDUP,
        model_with(graph, a=quiet, b=payload, c=quiet.copy()),
        model_with(
            """
            g (float[2] x) => (float[2] y) <float[2] a = {0, 0}, float[2] b = {0, 0}> {
                p = Add(x, a)
                q = Add(p, b)
                y = Max(q, a)
            }
            """,
            a=quiet,
            b=payload,
        ),
    )


def test_a_tied_transposed_weight_is_not_merged():
    array = np.arange(6, dtype=np.float32)
    graph = """
        g (float[2] x) => (float[2] y) <float[2, 3] a = {0}, float[3, 2] b = {0}> {
            p = MatMul(x, a)
            y = MatMul(p, b)
        }
        """
    matrix = array.reshape(2, 3)
    assert_leaves_alone(DEDUP, model_with(graph, a=matrix, b=np.ascontiguousarray(matrix.T)))


def test_a_transposed_view_counts_by_the_bytes_that_onnx_stores():
    matrix = np.arange(4, dtype=np.float32).reshape(2, 2)
    graph = """
        g (float[2] x) => (float[2] y) <float[2, 2] a = {0}, float[2, 2] b = {0}, float[2, 2] c = {0}> {
            p = MatMul(x, a)
            q = MatMul(p, b)
            y = MatMul(q, c)
        }
        """
    after = """
        g (float[2] x) => (float[2] y) <float[2, 2] a = {0, 1, 2, 3}, float[2, 2] b = {0, 2, 1, 3}> {
            p = MatMul(x, a)
            q = MatMul(p, b)
            y = MatMul(q, b)
        }
        """
    assert_rewrites(DEDUP, model_with(graph, a=matrix, b=matrix.T, c=np.ascontiguousarray(matrix.T)), after)


def test_it_does_not_matter_which_field_or_file_holds_the_bytes(tmp_path: Path):
    array = np.array([1, 2], np.float32)
    (tmp_path / "weights").write_bytes(b"..." + array.tobytes() + array.tobytes())
    file = DataFile(tmp_path / "weights")
    kind, shape = ir.DataType.FLOAT, ir.Shape([2])
    model = model_with(
        """
        g (float[2] x) => (float[2] y) <
            float[2] typed = {1, 2}, float[2] array = {0, 0}, float[2] region = {0, 0}, float[2] next = {0, 0},
            float[2] external = {0, 0}, float[2] lazy = {0, 0}
        > {
            p = Add(x, typed)
            q = Mul(p, array)
            r = Sub(q, region)
            s = Div(r, next)
            t = Max(s, external)
            y = Min(t, lazy)
        }
        """,
        array=array,
        region=Region(file, 3, kind, ir.Shape([2])),
        next=Region(file, 11, kind, ir.Shape([2])),
        external=ir.ExternalTensor("weights", 3, 8, kind, shape=shape, name="external", base_dir=tmp_path),
        lazy=ir.LazyTensor(lambda: ir.tensor(array), dtype=kind, shape=shape, name="lazy"),
    )
    assert_rewrites(
        DEDUP,
        model,
        """
        g (float[2] x) => (float[2] y) <float[2] typed = {1, 2}> {
            p = Add(x, typed)
            q = Mul(p, typed)
            r = Sub(q, typed)
            s = Div(r, typed)
            t = Max(s, typed)
            y = Min(t, typed)
        }
        """,
    )


def test_weights_below_min_bytes_are_left_alone():
    graph = """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            p = Add(x, a)
            y = Mul(p, b)
        }
        """
    assert_leaves_alone(DedupWeights(min_bytes=9), graph)
    rewritten(DedupWeights(min_bytes=8), parse(graph))


def test_metadata_and_names_of_the_survivor_stay():
    model = parse(
        """
        g (float[2] x) => (float[2] y) <float[2] "layers.0/w" = {1, 2}, float[2] b = {1, 2}> {
            p = Add(x, "layers.0/w")
            y = Mul(p, b)
        }
        """
    )
    value = model.graph.initializers["layers.0/w"]
    value.metadata_props["from"] = "layers.0"
    value.doc_string = "tied"
    (kept,) = rewritten(DEDUP, model).graph.initializers.values()
    assert (kept.name, kept.metadata_props, kept.doc_string) == ("layers.0/w", {"from": "layers.0"}, "tied")


def test_metadata_of_a_lifted_weight_goes_with_it():
    model = parse(
        """
        g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] w = {1, 2}> { s = Add(x, w) },
                else_branch = e () => (float[2] r) <float[2] u = {1, 2}> { r = Mul(x, u) }
            >
        }
        """
    )
    value = model.graph[0].attributes["then_branch"].as_graph().initializers["w"]
    value.metadata_props["from"] = "layers.0"
    value.doc_string = "tied"
    (kept,) = rewritten(DEDUP, model).graph.initializers.values()
    assert (kept.name, kept.metadata_props, kept.doc_string) == ("w", {"from": "layers.0"}, "tied")


# Constant nodes


def test_a_constant_node_gives_way_to_an_initializer():
    assert_rewrites(
        DEDUP,
        """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            k = Constant <value = float[2] {1, 2}> ()
            p = Add(x, k)
            y = Mul(p, a)
        }
        """,
        """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            p = Add(x, a)
            y = Mul(p, a)
        }
        """,
    )


def test_equal_constant_nodes_become_one_initializer():
    assert_rewrites(
        DEDUP,
        """
        g (float[2] x) => (float[2] y) {
            k = Constant <value = float[2] {1, 2}> ()
            p = Add(x, k)
            l = Constant <value = float[2] {1, 2}> ()
            y = Mul(p, l)
        }
        """,
        """
        g (float[2] x) => (float[2] y) <float[2] k = {1, 2}> {
            p = Add(x, k)
            y = Mul(p, k)
        }
        """,
    )


def test_constants_given_as_numbers_count():
    assert_rewrites(
        DEDUP,
        """
        g (float[2] x) => (float[2] y, int64[2] z) <float[2] a = {1.5, 2}, float b = {3}, int64[2] c = {4, 5}> {
            floats = Constant <value_floats = [1.5, 2.0]> ()
            scalar = Constant <value_float = 3.0> ()
            ints = Constant <value_ints = [4, 5]> ()
            p = Add(x, floats)
            q = Mul(p, scalar)
            r = Add(q, a)
            y = Mul(r, b)
            z = Add(ints, c)
        }
        """,
        """
        g (float[2] x) => (float[2] y, int64[2] z) <float[2] a = {1.5, 2}, float b = {3}, int64[2] c = {4, 5}> {
            p = Add(x, a)
            q = Mul(p, b)
            r = Add(q, a)
            y = Mul(r, b)
            z = Add(c, c)
        }
        """,
    )


def test_a_constant_without_a_twin_stays_a_node():
    assert_leaves_alone(
        DEDUP,
        """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 3}> {
            k = Constant <value = float[2] {1, 2}> ()
            p = Add(x, k)
            y = Mul(p, a)
        }
        """,
    )


def test_a_constant_that_is_a_graph_output_stays_a_node():
    assert_leaves_alone(
        DEDUP,
        """
        g (float[2] x) => (float[2] y, float[2] k) <float[2] a = {1, 2}> {
            k = Constant <value = float[2] {1, 2}> ()
            p = Add(x, k)
            y = Mul(p, a)
        }
        """,
    )


# Branches


def test_equal_weights_of_both_branches_are_lifted_under_a_name_of_their_own():
    assert_rewrites(
        DEDUP,
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] "then_w" = {7, 8}> {
            v = Add(x, then_w)
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] w = {1, 2}> { s = Add(v, w) },
                else_branch = e () => (float[2] r) <float[2] u = {1, 2}> { r = Mul(v, u) }
            >
        }
        """,
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] "then_w" = {7, 8}, float[2] w = {1, 2}> {
            v = Add(x, then_w)
            y = If (c) <
                then_branch = t () => (float[2] s) { s = Add(v, w) },
                else_branch = e () => (float[2] r) { r = Mul(v, w) }
            >
        }
        """,
    )


def test_a_name_that_both_branches_have_for_the_same_weight_is_kept():
    assert_rewrites(
        DEDUP,
        """
        g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] w = {1, 2}> { s = Add(x, w) },
                else_branch = e () => (float[2] r) <float[2] w = {1, 2}> { r = Mul(x, w) }
            >
        }
        """,
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
            y = If (c) <
                then_branch = t () => (float[2] s) { s = Add(x, w) },
                else_branch = e () => (float[2] r) { r = Mul(x, w) }
            >
        }
        """,
    )


def test_a_lifted_weight_takes_no_name_that_any_scope_has():
    assert_rewrites(
        DEDUP,
        """
        g (bool c, float[2] x) => (float[2] y) {
            w_1 = Neg(x)
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] w = {1, 2}> { s = Add(w_1, w) },
                else_branch = e () => (float[2] r) <float[2] u = {1, 2}, float[2] w = {5, 6}> {
                    q = Mul(w_1, u)
                    r = Add(q, w)
                }
            >
        }
        """,
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] w_2 = {1, 2}> {
            w_1 = Neg(x)
            y = If (c) <
                then_branch = t () => (float[2] s) { s = Add(w_1, w_2) },
                else_branch = e () => (float[2] r) <float[2] w = {5, 6}> {
                    q = Mul(w_1, w_2)
                    r = Add(q, w)
                }
            >
        }
        """,
    )


def test_equal_names_with_different_contents_are_left_alone():
    assert_leaves_alone(
        DEDUP,
        """
        g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] w = {1, 2}> { s = Add(x, w) },
                else_branch = e () => (float[2] r) <float[2] w = {1, 3}> { r = Mul(x, w) }
            >
        }
        """,
    )


def test_constants_of_both_branches_are_lifted():
    assert_rewrites(
        DEDUP,
        """
        g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <
                then_branch = t () => (float[2] s) {
                    k = Constant <value = float[2] {1, 2}> ()
                    s = Add(x, k)
                },
                else_branch = e () => (float[2] r) {
                    k = Constant <value_floats = [1.0, 2.0]> ()
                    r = Mul(x, k)
                }
            >
        }
        """,
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] k = {1, 2}> {
            y = If (c) <
                then_branch = t () => (float[2] s) { s = Add(x, k) },
                else_branch = e () => (float[2] r) { r = Mul(x, k) }
            >
        }
        """,
    )


def test_twins_in_one_branch_stay_in_it():
    assert_rewrites(
        DEDUP,
        """
        g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
                    p = Add(x, a)
                    s = Mul(p, b)
                },
                else_branch = e () => (float[2] r) {
                    k = Constant <value = float[2] {3, 4}> ()
                    l = Constant <value = float[2] {3, 4}> ()
                    p = Add(x, k)
                    r = Mul(p, l)
                }
            >
        }
        """,
        """
        g (bool c, float[2] x) => (float[2] y) {
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] a = {1, 2}> {
                    p = Add(x, a)
                    s = Mul(p, a)
                },
                else_branch = e () => (float[2] r) <float[2] k = {3, 4}> {
                    p = Add(x, k)
                    r = Mul(p, k)
                }
            >
        }
        """,
    )


def test_a_weight_that_an_if_two_levels_down_captures_is_replaced_there():
    assert_rewrites(
        DEDUP,
        """
        g (bool c, bool d, float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            v = Add(x, a)
            y = If (c) <
                then_branch = t () => (float[2] s) {
                    s = If (d) <
                        then_branch = tt () => (float[2] ss) { ss = Mul(v, b) },
                        else_branch = te () => (float[2] sr) <float[2] w = {1, 2}> { sr = Sub(w, b) }
                    >
                },
                else_branch = e () => (float[2] r) { r = Div(v, b) }
            >
        }
        """,
        """
        g (bool c, bool d, float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            v = Add(x, a)
            y = If (c) <
                then_branch = t () => (float[2] s) {
                    s = If (d) <
                        then_branch = tt () => (float[2] ss) { ss = Mul(v, a) },
                        else_branch = te () => (float[2] sr) { sr = Sub(a, a) }
                    >
                },
                else_branch = e () => (float[2] r) { r = Div(v, a) }
            >
        }
        """,
    )


def test_a_weight_is_lifted_out_of_two_levels():
    assert_rewrites(
        DEDUP,
        """
        g (bool c, bool d, float[2] x) => (float[2] y) {
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] a = {1, 2}> {
                    p = Add(x, a)
                    s = If (d) <
                        then_branch = tt () => (float[2] ss) { ss = Mul(p, a) },
                        else_branch = te () => (float[2] sr) <float[2] w = {1, 2}> { sr = Sub(p, w) }
                    >
                },
                else_branch = e () => (float[2] r) { r = Neg(x) }
            >
        }
        """,
        """
        g (bool c, bool d, float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            y = If (c) <
                then_branch = t () => (float[2] s) {
                    p = Add(x, a)
                    s = If (d) <
                        then_branch = tt () => (float[2] ss) { ss = Mul(p, a) },
                        else_branch = te () => (float[2] sr) { sr = Sub(p, a) }
                    >
                },
                else_branch = e () => (float[2] r) { r = Neg(x) }
            >
        }
        """,
    )


def test_a_survivor_whose_name_a_branch_hides_gets_another():
    assert_rewrites(
        DEDUP,
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            v = Add(x, a)
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] a = {5, 6}> {
                    p = Mul(v, a)
                    s = Add(p, b)
                },
                else_branch = e () => (float[2] r) { r = Sub(v, b) }
            >
        }
        """,
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] a_1 = {1, 2}> {
            v = Add(x, a_1)
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] a = {5, 6}> {
                    p = Mul(v, a)
                    s = Add(p, a_1)
                },
                else_branch = e () => (float[2] r) { r = Sub(v, a_1) }
            >
        }
        """,
    )


def test_a_survivor_that_its_own_twin_hid_keeps_its_name():
    assert_rewrites(
        DEDUP,
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            v = Add(x, a)
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] a = {1, 2}> { s = Mul(v, a) },
                else_branch = e () => (float[2] r) { r = Sub(v, a) }
            >
        }
        """,
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            v = Add(x, a)
            y = If (c) <
                then_branch = t () => (float[2] s) { s = Mul(v, a) },
                else_branch = e () => (float[2] r) { r = Sub(v, a) }
            >
        }
        """,
    )


def test_a_fresh_name_does_not_meet_a_twin_of_that_name():
    assert_rewrites(
        DEDUP,
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] a_1 = {1, 2}> {
            v = Add(x, a_1)
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] a = {5, 6}> { s = Mul(v, a) },
                else_branch = e () => (float[2] r) { r = Sub(v, a_1) }
            >
        }
        """,
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] a_1 = {1, 2}> {
            v = Add(x, a_1)
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] a = {5, 6}> { s = Mul(v, a) },
                else_branch = e () => (float[2] r) { r = Sub(v, a_1) }
            >
        }
        """,
    )


def test_ifs_with_the_same_names_in_all_their_branches_share():
    assert_rewrites(
        DEDUP,
        """
        g (bool c, float[2] x) => (float[2] y) {
            v = Neg(x)
            u = If (c) <
                then_branch = t () => (float[2] o) <float[2] w = {1, 2}> { o = Add(v, w) },
                else_branch = e () => (float[2] o) <float[2] w = {3, 4}> { o = Add(v, w) }
            >
            y = If (c) <
                then_branch = t () => (float[2] o) <float[2] w = {1, 2}> { o = Add(u, w) },
                else_branch = e () => (float[2] o) <float[2] w = {3, 4}> { o = Add(u, w) }
            >
        }
        """,
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] w_1 = {1, 2}, float[2] w = {3, 4}> {
            v = Neg(x)
            u = If (c) <
                then_branch = t () => (float[2] o) { o = Add(v, w_1) },
                else_branch = e () => (float[2] o) { o = Add(v, w) }
            >
            y = If (c) <
                then_branch = t () => (float[2] o) { o = Add(u, w_1) },
                else_branch = e () => (float[2] o) { o = Add(u, w) }
            >
        }
        """,
    )


# Loop and Scan


def test_weights_of_loop_bodies_are_lifted():
    assert_rewrites(
        DEDUP,
        """
        g (int64 n, float[2] x) => (float[2] y) <bool go = {1}> {
            v = Loop (n, go, x) <
                body = b (int64 i, bool more, float[2] s) => (bool on, float[2] r) <float[2] w = {1, 2}> {
                    on = Identity(more)
                    r = Add(s, w)
                }
            >
            y = Loop (n, go, v) <body = b (int64 i, bool more, float[2] s) => (bool on, float[2] r) {
                k = Constant <value = float[2] {1, 2}> ()
                on = Identity(more)
                r = Mul(s, k)
            }>
        }
        """,
        """
        g (int64 n, float[2] x) => (float[2] y) <bool go = {1}, float[2] w = {1, 2}> {
            v = Loop (n, go, x) <body = b (int64 i, bool more, float[2] s) => (bool on, float[2] r) {
                on = Identity(more)
                r = Add(s, w)
            }>
            y = Loop (n, go, v) <body = b (int64 i, bool more, float[2] s) => (bool on, float[2] r) {
                on = Identity(more)
                r = Mul(s, w)
            }>
        }
        """,
    )


def test_a_scan_body_shares_with_the_main_graph():
    assert_rewrites(
        DEDUP,
        """
        g (float[2] x, float[4, 2] xs) => (float[2] y, float[4, 2] ys) <float[2] a = {1, 2}> {
            v = Add(x, a)
            y, ys = Scan (v, xs) <num_scan_inputs = 1,
                body = b (float[2] s, float[2] e) => (float[2] t, float[2] o) <float[2] w = {1, 2}> {
                    t = Add(s, e)
                    o = Mul(t, w)
                }
            >
        }
        """,
        """
        g (float[2] x, float[4, 2] xs) => (float[2] y, float[4, 2] ys) <float[2] a = {1, 2}> {
            v = Add(x, a)
            y, ys = Scan (v, xs) <num_scan_inputs = 1,
                body = b (float[2] s, float[2] e) => (float[2] t, float[2] o) {
                    t = Add(s, e)
                    o = Mul(t, a)
                }
            >
        }
        """,
    )


def test_a_loop_inside_a_branch_inside_a_loop_shares():
    rewritten(
        DEDUP,
        parse(
            """
            g (int64 n, bool c, float[2] x) => (float[2] y) <bool go = {1}> {
                y = Loop (n, go, x) <body = b (int64 i, bool more, float[2] s) => (bool on, float[2] r)
                <float[2] w = {1, 2}> {
                    on = Identity(more)
                    p = Add(s, w)
                    r = If (c) <
                        then_branch = t () => (float[2] o) <float[2] u = {1, 2}> {
                            yes = Constant <value = bool {1}> ()
                            o = Loop (n, yes, p) <body = bb (int64 j, bool m, float[2] s2) => (bool on2, float[2] r2) {
                                w2 = Constant <value = float[2] {1, 2}> ()
                                on2 = Identity(m)
                                q = Mul(s2, w2)
                                r2 = Sub(q, u)
                            }>
                        },
                        else_branch = e () => (float[2] o) { o = Neg(p) }
                    >
                }>
            }
            """
        ),
    )


# What belongs to the interface


def test_a_weight_that_a_caller_may_override_is_left_alone_and_stands_for_no_other():
    assert_leaves_alone(
        DEDUP,
        """
        g (float[2] x, float[2] a) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            p = Add(x, a)
            y = Mul(p, b)
        }
        """,
    )


def test_weights_beside_one_that_may_be_overridden_are_shared():
    assert_rewrites(
        DEDUP,
        """
        g (float[2] x, float[2] b) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] c = {1, 2}> {
            p = Add(x, a)
            q = Mul(p, b)
            y = Sub(q, c)
        }
        """,
        """
        g (float[2] x, float[2] b) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            p = Add(x, a)
            q = Mul(p, b)
            y = Sub(q, a)
        }
        """,
    )


def test_an_overridden_weight_answers_as_it_did():
    before = parse(
        """
        g (float[2] x, float[2] b) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] c = {1, 2}> {
            p = Add(x, a)
            q = Mul(p, b)
            y = Sub(q, c)
        }
        """
    )
    feeds = {"x": np.array([3, 4], np.float32), "b": np.array([5, 6], np.float32)}
    (expected,), (given,) = (open_session(model).run(None, feeds) for model in (before, rewritten(DEDUP, before)))
    np.testing.assert_array_equal(given, expected)
    np.testing.assert_array_equal(given, [4 * 5 - 1, 6 * 6 - 2])


def test_ir_version_3_where_every_initializer_is_an_input_is_left_alone():
    assert_leaves_alone(
        DEDUP,
        """
        <ir_version: 3, opset_import: ["" : 7]>
        g (float[2] x, float[2] a, float[2] b) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            p = Add(x, a)
            y = Mul(p, b)
        }
        """,
    )


def test_constants_of_ir_version_3_are_shared():
    assert_rewrites(
        DEDUP,
        """
        <ir_version: 3, opset_import: ["" : 7]>
        g (float[2] x, float[2] a) => (float[2] y) <float[2] a = {1, 2}> {
            k = Constant <value = float[2] {1, 2}> ()
            l = Constant <value = float[2] {1, 2}> ()
            p = Add(x, a)
            q = Mul(p, k)
            y = Sub(q, l)
        }
        """,
        """
        g (float[2] x, float[2] a) => (float[2] y) <float[2] a = {1, 2}, float[2] k = {1, 2}> {
            p = Add(x, a)
            q = Mul(p, k)
            y = Sub(q, k)
        }
        """,
    )


def test_a_weight_that_is_a_graph_output_stays_and_stands_for_the_others():
    assert_rewrites(
        DEDUP,
        """
        g (float[2] x) => (float[2] y, float[2] b) <float[2] a = {1, 2}, float[2] b = {1, 2}, float[2] c = {1, 2}> {
            p = Add(x, a)
            q = Mul(p, b)
            y = Sub(q, c)
        }
        """,
        """
        g (float[2] x) => (float[2] y, float[2] b) <float[2] b = {1, 2}> {
            p = Add(x, b)
            q = Mul(p, b)
            y = Sub(q, b)
        }
        """,
    )


def test_two_weights_that_are_graph_outputs_both_stay():
    assert_leaves_alone(
        DEDUP,
        """
        g (float[2] x) => (float[2] y, float[2] a, float[2] b) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            p = Add(x, a)
            y = Mul(p, b)
        }
        """,
    )


def test_a_graph_output_whose_name_a_branch_hides_stands_for_no_other():
    graph = """
        g (bool c, float[2] x) => (float[2] y, float[2] a) <float[2] a = {1, 2}, %s> {
            v = Add(x, %s)
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] a = {5, 6}> {
                    p = Mul(v, a)
                    s = Add(p, %s)
                },
                else_branch = e () => (float[2] r) { r = Neg(v) }
            >
        }
        """
    assert_rewrites(
        DEDUP,
        graph % ("float[2] b = {1, 2}, float[2] d = {1, 2}", "b", "d"),
        graph % ("float[2] b = {1, 2}", "b", "b"),
    )


def test_a_graph_output_whose_name_only_a_twin_hides_stands_for_it():
    assert_rewrites(
        DEDUP,
        """
        g (bool c, float[2] x) => (float[2] y, float[2] a) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            v = Add(x, b)
            y = If (c) <
                then_branch = t () => (float[2] s) <float[2] a = {1, 2}> { s = Mul(v, a) },
                else_branch = e () => (float[2] r) { r = Neg(v) }
            >
        }
        """,
        """
        g (bool c, float[2] x) => (float[2] y, float[2] a) <float[2] a = {1, 2}> {
            v = Add(x, a)
            y = If (c) <
                then_branch = t () => (float[2] s) { s = Mul(v, a) },
                else_branch = e () => (float[2] r) { r = Neg(v) }
            >
        }
        """,
    )


def test_a_weight_that_is_the_output_of_a_branch_stays_in_it():
    assert_leaves_alone(
        DEDUP,
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            p = Add(x, a)
            q = If (c) <
                then_branch = t () => (float[2] s) <float[2] s = {1, 2}> { n = Neg(p) },
                else_branch = e () => (float[2] r) { r = Constant <value = float[2] {1, 2}> () }
            >
            y = Add(p, q)
        }
        """,
    )


def test_weights_in_local_functions_are_left_alone():
    assert_leaves_alone(
        DEDUP,
        """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            p = local.f(x)
            y = Add(p, a)
        }
        <domain: "local", opset_import: ["" : 21]>
        f (x) => (y) {
            k = Constant <value = float[2] {1, 2}> ()
            l = Constant <value = float[2] {1, 2}> ()
            p = Add(x, k)
            y = Mul(p, l)
        }
        """,
    )


def test_weights_around_a_call_of_a_local_function_are_shared():
    function = """
        <domain: "local", opset_import: ["" : 21]>
        f (x, w) => (y) {
            a = Constant <value = float[2] {1, 2}> ()
            p = Add(x, a)
            y = Mul(p, w)
        }
        """
    assert_rewrites(
        DEDUP,
        """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            p = local.f(x, b)
            y = Add(p, a)
        }
        """
        + function,
        """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            p = local.f(x, a)
            y = Add(p, a)
        }
        """
        + function,
    )


# Anything at all


CONTENTS = ("{1, 2}", "{3, 4}", "{1, 3}")


def draw_at_random(seed: int) -> str:
    """Return a graph of nested branches with so few names and contents that they meet; no scope hides a name."""
    random = np.random.default_rng(seed)
    weights, body, result = _random_scope(random, ["x"], 0)
    shows_weight = weights and seed % 3 == 0
    outputs = f"float[2] {result}, float[2] {weights[0]}" if shows_weight else f"float[2] {result}"
    return f"g (bool c, float[2] x) => ({outputs}) {_declared(weights, random)} {{ {body} }}"


def _random_scope(random: np.random.Generator, visible: list[str], depth: int) -> tuple[list[str], str, str]:
    """Return the names of a scope's initializers, its nodes, and the name of its result; siblings have equal names."""
    names = [f"a{depth}", f"a{depth}_1", f"b{depth}"]
    weights = [str(name) for name in random.choice(names, random.integers(0, 4), replace=False)]
    visible = [*visible, *weights]
    nodes = []
    for number in range(random.integers(2, 5)):
        made = f"v{depth}_{number}"
        draw = random.random()
        if draw < 0.3:
            nodes.append(f"{made} = Constant <value = float[2] {random.choice(CONTENTS)}> ()")
        elif draw < 0.6 and depth < 3:
            then, other = (_random_branch(random, visible, depth + 1) for _ in range(2))
            nodes.append(f"{made} = If (c) <then_branch = {then}, else_branch = {other}>")
        else:
            left, right = random.choice(visible, 2)
            nodes.append(f"{made} = {random.choice(['Add', 'Mul', 'Sub'])} ({left}, {right})")
        visible.append(made)
    nodes.append(f"result{depth} = Add ({visible[-1]}, {random.choice(visible)})")
    return weights, "\n".join(nodes), f"result{depth}"


def _random_branch(random: np.random.Generator, visible: list[str], depth: int) -> str:
    weights, body, result = _random_scope(random, visible, depth)
    return f"b () => (float[2] {result}) {_declared(weights, random)} {{ {body} }}"


def _declared(weights: list[str], random: np.random.Generator) -> str:
    declared = ", ".join(f"float[2] {name} = {random.choice(CONTENTS)}" for name in weights)
    return f"<{declared}>" if weights else ""


@pytest.mark.parametrize("seed", range(60))
def test_a_graph_drawn_at_random_answers_as_it_did_and_has_no_twins_left(seed: int):
    model = parse(draw_at_random(seed))
    change = run_pass(DEDUP, model)[1]
    if not change.count:
        assert_leaves_alone(DEDUP, model)
        return
    after = rewritten(DEDUP, model)
    held = [tensor.tobytes() for graph in graphs_of(after.graph) for tensor in removable_weights(graph)]
    assert len(held) == len(set(held))


def removable_weights(graph: ir.Graph) -> Iterator[ir.TensorProtocol]:
    """Yield the weights of a graph that are no outputs of it."""
    values = [*graph.initializers.values(), *(node.outputs[0] for node in graph if node.op_type == "Constant")]
    for value in values:
        tensor = value.const_value if value.is_initializer() else constant_tensor(value.producer())
        if tensor is not None and not value.is_graph_output():
            yield tensor


# Several models


def numbers(first: int) -> str:
    """Return a weight of 300 numbers: long enough for a save to put it into the data file."""
    return "{" + ", ".join(str(first + index) for index in range(300)) + "}"


PREFILL = f"""
    g (float[300] x) => (float[300] y) <float[300] w = {numbers(0)}, float[300] mine = {numbers(1000)}> {{
        p = Add(x, w)
        y = Sub(p, mine)
    }}
    """
DECODE = f"""
    g (bool c, float[300] x) => (float[300] y) <float[300] mine = {numbers(2000)}> {{
        p = Add(x, mine)
        y = If (c) <
            then_branch = t () => (float[300] s) <float[300] tied = {numbers(0)}> {{ s = Sub(p, tied) }},
            else_branch = e () => (float[300] r) {{ r = Neg(p) }}
        >
    }}
    """
SAYS_1_REGION = "1 weight stored once for several models, 1.2 kB saved in layout shared"


def transformed(bundle: Bundle, pass_: DedupWeights = DEDUP) -> tuple[Bundle, Change]:
    """Return what the pass makes of a bundle, proven to answer as before and to be final, and the change."""
    after = bundle.clone()
    change = pass_.apply(after, lambda role: Context(role=role)).change
    for model in after.models.values():
        assert find_problem(model) == ""
    assert_same_numbers(DEDUP, bundle, after)
    identities = after.identities()
    assert pass_.apply(after, lambda role: Context(role=role)).change == Change(0, "")
    assert after.identities() == identities
    return after, change


def saved(bundle: Bundle, folder: Path, layout: Layout) -> Path:
    """Return the folder of a bundle that was saved, opened again, and proven to answer as before."""
    save_models(bundle.models, folder, layout=layout)
    opened = Bundle({role: open_model(folder / file_of_role(role)) for role in bundle.models})
    assert_same_numbers(DEDUP, bundle, opened)
    return folder


def copies_in(path: Path) -> int:
    """Return how often the weight `numbers(0)` is in the files of a folder, or in one file."""
    files = path.iterdir() if path.is_dir() else [path]
    return sum(file.read_bytes().count(np.arange(300, dtype=np.float32).tobytes()) for file in files)


def test_a_weight_of_several_models_is_in_the_shared_file_once(tmp_path: Path):
    before = Bundle({"prefill": parse(PREFILL), "decode": parse(DECODE)})
    after, change = transformed(before)
    assert change == Change(1, SAYS_1_REGION)
    for role in ("prefill", "decode"):
        assert_text(after[role], before[role])
    assert copies_in(saved(before, tmp_path / "before", "shared")) == 2
    assert copies_in(saved(after, tmp_path / "after", "shared")) == 1


@pytest.mark.parametrize("layout", ["optimum", "shared", "single"])
def test_onnx_runtime_loads_what_was_saved_from_the_disk(tmp_path: Path, layout: Layout):
    before = Bundle({"prefill": parse(PREFILL), "decode": parse(DECODE)})
    folder = saved(transformed(before)[0], tmp_path / "out", layout)
    for role, model in before.models.items():
        session = onnxruntime.InferenceSession(folder / file_of_role(role), providers=["CPUExecutionProvider"])
        for feeds in sample_feeds(model):
            (expected,), (given,) = open_session(model).run(None, feeds), session.run(None, feeds)
            np.testing.assert_array_equal(given, expected)


def test_in_layout_optimum_each_model_has_its_own_copy(tmp_path: Path):
    after, _ = transformed(Bundle({"prefill": parse(PREFILL), "decode": parse(DECODE)}))
    folder = saved(after, tmp_path / "out", "optimum")
    assert [copies_in(folder / data_file_of(file_of_role(role))) for role in ("prefill", "decode")] == [1, 1]


def test_models_opened_from_files_of_their_own_share_bytes_too(tmp_path: Path):
    sources = Bundle({"prefill": parse(PREFILL), "decode": parse(DECODE)})
    folder = saved(sources, tmp_path / "in", "optimum")
    before = Bundle({role: open_model(folder / file_of_role(role)) for role in sources.models})
    after, change = transformed(before)
    assert change == Change(1, SAYS_1_REGION)
    assert copies_in(saved(after, tmp_path / "out", "shared")) == 1


def test_models_that_share_the_bytes_on_disk_already_have_nothing_to_do(tmp_path: Path):
    sources, _ = transformed(Bundle({"prefill": parse(PREFILL), "decode": parse(DECODE)}))
    folder = saved(sources, tmp_path / "in", "shared")
    before = Bundle({role: open_model(folder / file_of_role(role)) for role in sources.models})
    _, change = transformed(before)
    assert change == Change(0, "")


def test_constants_of_several_models_become_initializers_that_share(tmp_path: Path):
    graph = """
        g (float[300] x) => (float[300] y) {
            %s = Constant <value = float[300] %s> ()
            y = Add(x, %s)
        }
        """
    after = """
        g (float[300] x) => (float[300] y) <float[300] %s = %s> {
            y = Add(x, %s)
        }
        """
    name_of = {"prefill": "k", "decode": "weight"}
    before = Bundle({role: parse(graph % (name, numbers(0), name)) for role, name in name_of.items()})
    bundle, change = transformed(before)
    assert change == Change(1, SAYS_1_REGION)
    for role, name in name_of.items():
        assert_text(bundle[role], after % (name, numbers(0), name))
    assert copies_in(saved(bundle, tmp_path / "out", "shared")) == 1


def test_a_constant_that_is_an_output_shares_with_no_other_model():
    prefill = """
        g (float[2] x) => (float[2] y, float[2] k) {
            k = Constant <value = float[2] {1, 2}> ()
            y = Add(x, k)
        }
        """
    decode = """
        g (float[2] x) => (float[2] y) {
            k = Constant <value = float[2] {1, 2}> ()
            y = Add(x, k)
        }
        """
    bundle, change = transformed(Bundle({"prefill": parse(prefill), "decode": parse(decode)}))
    assert change == Change(0, "")
    assert_text(bundle["prefill"], prefill)
    assert_text(bundle["decode"], decode)


def test_what_is_shared_within_models_and_across_them_is_said():
    graph = f"""
        g (float[300] x) => (float[300] y) <float[300] a = {numbers(0)}, float[300] b = {numbers(0)}> {{
            p = Add(x, a)
            y = Mul(p, b)
        }}
        """
    _, change = transformed(Bundle({role: parse(graph) for role in ("encoder", "prefill", "decode")}))
    within, across = "shared 3 weights, 3.6 kB saved", "2 weights stored once for several models, 2.4 kB saved in"
    assert change == Change(5, f"{within}; {across} layout shared")


def test_weights_that_stand_in_the_graph_file_are_not_stored_once_for_several_models():
    graph = """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}> {
            y = Add(x, a)
        }
        """
    _, change = transformed(Bundle({role: parse(graph) for role in ("prefill", "decode")}))
    assert change == Change(0, "")


def test_only_the_models_that_are_named_are_changed():
    graph = """
        g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {1, 2}> {
            p = Add(x, a)
            y = Mul(p, b)
        }
        """
    before = Bundle({"prefill": parse(graph), "decode": parse(graph)})
    after, change = transformed(before, DedupWeights(models=("decode",), min_bytes=1))
    assert change.count == 1
    assert after.identities()["prefill"] == before.identities()["prefill"]
    assert list(after["decode"].graph.initializers) == ["a"]


def test_sharing_across_models_renames_nothing():
    other = PREFILL.replace("(x, w)", "(x, v)").replace("[300] w", "[300] v")
    after, change = transformed(Bundle({"prefill": parse(PREFILL), "decode": parse(other)}))
    assert change.count == 2
    assert list(after["prefill"].graph.initializers) == ["w", "mine"]
    assert list(after["decode"].graph.initializers) == ["v", "mine"]
    names = [tensor.name for tensor in ir.to_proto(after["decode"]).graph.initializer]
    assert names == ["v", "mine"]
