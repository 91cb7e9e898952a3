"""Names and order of graphs, as files and as objects."""

from __future__ import annotations

from itertools import pairwise

import onnx
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper
from small_models import everywhere, floats

from surgery.errors import ModelFileError
from surgery.storage import check_structure, find_disorder

HEADER = '<ir_version: 8, opset_import: ["" : 17]>\n'


def parsed(text: str) -> onnx.ModelProto:
    return onnx.parser.parse_model(HEADER + text)


def faulty(text: str, words: str) -> None:
    with pytest.raises(ModelFileError) as caught:
        check_structure(parsed(text))
    assert words in str(caught.value), str(caught.value)


def with_branch(*nodes: onnx.NodeProto, before: int = 0, **branch: object) -> onnx.ModelProto:
    """y = If(c) of a branch with these nodes, between a = Neg(x) and b = Neg(a)."""
    body = helper.make_graph(list(nodes), "body", branch.get("inputs", []), [floats(nodes[-1].output[0], [2])])
    main = [helper.make_node("Neg", ["x"], ["a"]), helper.make_node("Neg", ["a"], ["b"])]
    main.insert(2 - before, helper.make_node("If", ["c"], ["y"], name="choose", then_branch=body, else_branch=body))
    inputs = [floats("x", [2]), helper.make_tensor_value_info("c", TensorProto.BOOL, [])]
    graph = helper.make_graph(main, "g", inputs, [floats("y", [2])])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def test_good_models_pass_as_files_and_as_objects():
    check_structure(everywhere().proto)
    check_structure(ir.from_proto(everywhere().proto))


def test_names_used_twice_are_named_with_both_makers():
    faulty(
        "g (float[2] x, float[2] x) => (float[2] y) { y = Neg(x) }", "'x' is defined twice, by an input and by an input"
    )
    faulty(
        "g (float[2] x) => (float[2] y) { [first] y = Neg(x) [second] y = Abs(x) }",
        "'y' is defined twice, by node 'first' (Neg) and by node 'second' (Abs)",
    )
    faulty(
        "g (float[2] x) => (float[2] x) { x = Neg(x) }",
        "'x' is defined twice, by an input and by the Neg that makes 'x'",
    )


def test_an_initializer_that_is_also_an_input_is_not_used_twice():
    check_structure(parsed("g (float[2] x, float[2] w) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }"))


def test_an_input_that_nothing_defines_is_named():
    faulty("g (float[2] x) => (float[2] y) { y = Add(x, nobody) }", "reads 'nobody', which nothing defines")


def test_an_output_that_the_graph_does_not_make_is_named():
    faulty("g (float[2] x) => (float[2] z) { y = Neg(x) }", "graph 'g': output 'z' is not defined in it")


def test_a_use_before_its_definition_is_named_and_can_be_sorted():
    text = "g (float[2] x) => (float[2] y) { [late] y = Neg(a) [early] a = Neg(x) }"
    faulty(text, "not topologically sorted: node 'late' (Neg) reads 'a' before node 'early' (Neg) makes it")
    assert "not topologically sorted" in find_disorder(parsed(text))
    model = ir.from_proto(parsed(text))
    model.graph.sort()
    assert find_disorder(model) == ""


def test_a_cycle_is_named_in_the_order_in_which_values_flow():
    text = "g (float[2] x) => (float[2] y) { [one] a = Add(x, c) [two] b = Neg(a) [three] c = Neg(b) y = Neg(c) }"
    with pytest.raises(ModelFileError, match="the nodes form a cycle: ") as caught:
        check_structure(parsed(text))
    names = [label.split("'")[1] for label in caught.value.message.split("cycle: ")[1].split(" -> ")]
    follows = {"one": "two", "two": "three", "three": "one"}
    assert len(names) == 4
    assert all(follows[before] == after for before, after in pairwise(names))


def test_a_node_that_reads_itself_is_a_cycle():
    faulty("g (float[2] x) => (float[2] y) { [self] y = Add(x, y) }", "cycle: node 'self' (Add) -> node 'self' (Add)")


def test_a_body_may_read_outer_values():
    check_structure(with_branch(helper.make_node("Neg", ["b"], ["z"])))


def test_a_body_that_reads_an_outer_value_too_early_is_named():
    proto = with_branch(helper.make_node("Neg", ["b"], ["z"]), before=1)
    with pytest.raises(ModelFileError, match=r"node 'choose' \(If\) reads 'b' before the Neg that makes 'b' makes it"):
        check_structure(proto)


def test_a_cycle_through_a_body_is_found():
    proto = with_branch(helper.make_node("Neg", ["b"], ["z"]), before=1)
    proto.graph.node[2].input[0] = "y"
    with pytest.raises(ModelFileError, match="form a cycle"):
        check_structure(proto)


def test_a_body_that_reads_what_nothing_defines_is_named():
    with pytest.raises(ModelFileError, match=r"graph 'body': the Neg that makes 'z' reads 'nobody'"):
        check_structure(with_branch(helper.make_node("Neg", ["nobody"], ["z"])))


def test_a_body_whose_output_is_an_outer_value_is_named():
    proto = with_branch(helper.make_node("Neg", ["b"], ["z"]))
    proto.graph.node[2].attribute[0].g.output[0].name = "b"
    with pytest.raises(ModelFileError, match="output 'b' is not defined in it"):
        check_structure(proto)


def test_names_of_one_body_may_be_used_in_another():
    check_structure(with_branch(helper.make_node("Neg", ["b"], ["t"]), helper.make_node("Neg", ["t"], ["z"])))


def test_functions_have_names_of_their_own():
    proto = everywhere().proto
    proto.functions[0].node[1].input[0] = "x"
    with pytest.raises(ModelFileError, match="function 'Project': the MatMul that makes 'q' reads 'x', which nothing"):
        check_structure(proto)


def test_functions_of_one_name_and_functions_in_a_circle_are_named():
    proto = everywhere().proto
    proto.functions.append(proto.functions[0])
    with pytest.raises(ModelFileError, match="two functions are named 'local::Project'"):
        check_structure(proto)
    proto = everywhere().proto
    proto.functions[0].node[1].op_type, proto.functions[0].node[1].domain = "Project", "local"
    with pytest.raises(ModelFileError, match="in a circle: 'local::Project' -> 'local::Project'"):
        check_structure(proto)


def test_an_object_of_the_right_name_that_is_not_the_one_in_scope_is_named():
    model = ir.from_proto(parsed("g (float[2] x) => (float[2] y) { a = Neg(x) y = Neg(a) }"))
    list(model.graph)[1].replace_input_with(0, ir.Value(name="a"))
    with pytest.raises(ModelFileError, match="reads a value named 'a', but another value of that name"):
        check_structure(model)


def test_an_object_without_a_name_is_named_by_its_node():
    model = ir.from_proto(parsed("g (float[2] x) => (float[2] y) { a = Neg(x) [end] y = Neg(a) }"))
    next(iter(model.graph)).outputs[0].name = None
    with pytest.raises(ModelFileError, match="a value that is used has no name"):
        check_structure(model)


def test_an_output_that_nobody_reads_needs_no_name():
    check_structure(parsed('g (float[2] x) => (float[1] y) { y, "" = TopK(x, x) }'.replace('y, ""', "y, unused")))
    model = ir.from_proto(parsed("g (float[2] x, int64[1] k) => (float[1] y) { y, i = TopK(x, k) }"))
    next(iter(model.graph)).outputs[1].name = ""
    check_structure(model)


def test_removing_a_weight_that_is_still_read_is_found_in_the_object():
    model = ir.from_proto(parsed("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Add(x, w) }"))
    model.graph.initializers.pop("w")
    with pytest.raises(ModelFileError, match="reads 'w', which nothing defines"):
        check_structure(model)
