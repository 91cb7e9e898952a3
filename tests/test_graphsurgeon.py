"""A plain graphsurgeon function as a pass: what it may do, and that everything it leaves alone stays."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx_graphsurgeon as gs
import onnx_ir as ir
import pytest
from onnx import TensorProto, helper, numpy_helper

from passes.graphsurgeon import Graphsurgeon
from surgery.contract import Change, Context, Effect
from surgery.errors import RecipeError, Refused
from surgery.graphsurgeon import apply
from surgery.recipe import make_pass
from surgery.registry import find
from surgery.storage import Region, open_model
from surgery.text import parse, to_text
from tests.rewriting import assert_leaves_alone, assert_rewrites, assert_text
from tests.storage.small_models import everywhere

Run = Callable[..., subprocess.CompletedProcess[str]]


def every_graph(graph: gs.Graph) -> list[gs.Graph]:
    return [graph, *graph.subgraphs(recursive=True)]


def drop_dropout(graph: gs.Graph) -> gs.Graph:
    for body in every_graph(graph):
        for node in [node for node in body.nodes if node.op == "Dropout"]:
            for after in list(node.outputs[0].outputs):
                after.inputs[after.inputs.index(node.outputs[0])] = node.inputs[0]
    return graph.cleanup().toposort()


def constant(graph: gs.Graph, name: str) -> gs.Constant:
    found = [body.tensors()[name] for body in every_graph(graph) if name in body.tensors()]
    assert isinstance(found[0], gs.Constant)
    return found[0]


def said(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


DROPOUT = """
g (float[n,2] x) => (float[n,2] y) <float[2] w = {1, 2}, float ratio = {0.5}> {
    a = Add(x, w)
    b, mask = Dropout(a, ratio)
    c = Relu(b)
    y = Add(c, w)
}
"""


# What a function can do


def test_a_function_removes_nodes() -> None:
    after = """
    g (float[n,2] x) => (float[n,2] y) <float[2] w = {1, 2}> {
        a = Add(x, w)
        c = Relu(a)
        y = Add(c, w)
    }
    """
    assert_rewrites(Graphsurgeon(function=drop_dropout), DROPOUT, after)


def test_a_function_that_finds_nothing_changes_nothing_though_it_sorts_the_nodes() -> None:
    deep = """
    g (bool c, float[n,2] x) => (float[n,2] y) <float[2] w = {1, 2}, float[2] unused = {3, 4}> {
        late = Relu(x)
        a = Add(x, w)
        b = If (c) <
            then_branch = then () => (float[n,2] t) <float[2] local = {5, 6}> { t = Add(a, local) },
            else_branch = else () => (float[n,2] e) { e = Mul(a, w) }
        >
        y = Add(b, late)
    }
    """
    assert_leaves_alone(Graphsurgeon(function=drop_dropout), deep)


def test_a_function_may_return_another_graph() -> None:
    model = parse(DROPOUT)
    assert apply(lambda graph: drop_dropout(graph.copy()), model)
    assert [node.op_type for node in model.graph] == ["Add", "Relu", "Add"]


def test_a_function_that_edits_a_weight_leaves_the_others_the_same_objects() -> None:
    model = parse(
        "g (float[2] x) => (float[2] y) <float[2] a = {1, 2}, float[2] b = {3, 4}> {s = Add(x, a) y = Mul(s, b)}"
    )
    kept = model.graph.initializers["b"].const_value

    def double(graph: gs.Graph) -> None:
        constant(graph, "a").values *= 2
        np.sum(constant(graph, "b").values)  # looked at, not changed

    assert apply(double, model)
    assert_text(
        model, "g (float[2] x) => (float[2] y) <float[2] a = {2, 4}, float[2] b = {3, 4}> {s = Add(x, a) y = Mul(s, b)}"
    )
    assert model.graph.initializers["b"].const_value is kept


def test_a_weight_takes_the_type_that_it_is_given() -> None:
    model = parse("g (float[2] x) => (float16[2] y) <float[2] a = {1, 2}> {h = Cast<to = 10>(x) y = Add(h, a)}")
    apply(lambda graph: setattr(constant(graph, "a"), "values", np.array([1, 2], np.float16)), model)
    assert model.graph.initializers["a"].dtype == ir.DataType.FLOAT16


def test_a_weight_that_only_a_branch_reads_stays_outside_and_is_not_copied_into_it() -> None:
    text = """
    g (bool c, float[n,2] x) => (float[n,2] y) <float[2] w = {1, 2}> {
        y = If (c) <
            then_branch = then () => (float[n,2] t) { t = Add(x, w) },
            else_branch = else () => (float[n,2] e) { e = Mul(x, w) }
        >
    }
    """
    model = parse(text)

    def rename_and_double(graph: gs.Graph) -> None:
        graph.nodes[0].name = "choice"
        constant(graph, "w").values *= 2

    assert apply(rename_and_double, model)
    assert_text(model, text.replace("{1, 2}", "{2, 4}").replace("y = If", "[choice] y = If"))


def test_new_nodes_weights_branches_and_domains_arrive() -> None:
    model = parse("g (bool c, float[2] x) => (float[2] y) {y = Relu(x)}")

    def choose(graph: gs.Graph) -> None:
        flag, x = graph.inputs
        branches = {}
        for name, number in (("then_branch", 1), ("else_branch", 2)):
            out = gs.Variable(f"{name}_out", np.float32, [2])
            weight = gs.Constant("number", np.full(2, number, np.float32))
            branches[name] = gs.Graph([gs.Node("Add", inputs=[x, weight], outputs=[out])], [], [out], name=name)
        chosen = gs.Variable("chosen", np.float32, [2])
        graph.nodes[0].inputs[0] = chosen
        graph.nodes.insert(0, gs.Node("If", "new", branches, [flag], [chosen]))
        graph.nodes.append(gs.Node("Note", inputs=[x], outputs=[gs.Variable("unused")], domain="mine"))

    assert apply(choose, model)
    assert model.opset_imports == {"": 21, "mine": 1}
    apply(lambda graph: graph.cleanup(), model)
    assert_text(
        model,
        """
        <ir_version: 10, opset_import: ["" : 21, "mine" : 1]>
        g (bool c, float[2] x) => (float[2] y) {
            [new] chosen = If (c) <
                then_branch = then_branch () => (float[2] then_branch_out) <float[2] number = {1, 1}> {
                    then_branch_out = Add(x, number)
                },
                else_branch = else_branch () => (float[2] else_branch_out) <float[2] number = {2, 2}> {
                    else_branch_out = Add(x, number)
                }
            >
            y = Relu(chosen)
        }
        """,
    )


def test_constants_fold() -> None:
    model = parse(
        """
        g (float[n,2] x) => (float[n,2] y) {
            k = Constant <value_float = 1.5> ()
            j = Constant <value = float[2] {1, 2}> ()
            kj = Mul(k, j)
            y = Add(x, kj)
        }
        """
    )
    assert apply(lambda graph: graph.fold_constants().cleanup(), model)
    assert_text(model, "g (float[n,2] x) => (float[n,2] y) <float[2] kj = {1.5, 3}> {y = Add(x, kj)}")


def test_an_operator_a_type_and_an_opset_change_where_the_function_says_so() -> None:
    model = parse("g (float[n,2] x) => (float[n,2] y) {y = Elu <alpha = 2.0> (x)}")

    def edit(graph: gs.Graph) -> None:
        graph.opset = 22
        graph.inputs[0].shape = ["batch", 2]
        graph.outputs[0].shape[0] = -1
        graph.nodes[0].op = "LeakyRelu"
        graph.nodes[0].attrs["alpha"] = 3

    assert apply(edit, model)
    proto = ir.to_proto(model)
    assert model.opset_imports == {"": 22}
    assert [dim.dim_param for dim in proto.graph.input[0].type.tensor_type.shape.dim] == ["batch", ""]
    assert not proto.graph.output[0].type.tensor_type.shape.dim[0].HasField("dim_value")
    assert (proto.graph.node[0].op_type, proto.graph.node[0].attribute[0].i) == ("LeakyRelu", 3)


def test_the_body_of_a_function_can_be_edited_and_get_weights() -> None:
    model = everywhere_model()
    (name,) = model.functions

    def negate(graph: gs.Graph) -> None:
        (function,) = graph.functions
        last = function.nodes[-1]
        out, inner = last.outputs[0], gs.Variable("inner_result")
        last.outputs[0] = inner
        weight = gs.Constant("minus", np.array(-1, np.float32))
        function.nodes.append(gs.Node("Mul", inputs=[inner, weight], outputs=[out]))

    before = [node.op_type for node in model.functions[name]]
    assert apply(negate, model)
    assert [node.op_type for node in model.functions[name]] == ["Constant", *before, "Mul"]
    onnx.checker.check_model(ir.to_proto(model))


# What stays


def everywhere_model() -> ir.Model:
    return ir.from_proto(everywhere().proto)


def described_model() -> ir.Model:
    """Return a model that says all that a model can say, and that graphsurgeon alone loses."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", None], "an input")
    x.type.denotation = "IMAGE"
    x.type.tensor_type.shape.dim[0].denotation = "DATA_BATCH"
    x.metadata_props.add(key="of", value="input")
    default = helper.make_tensor_value_info("default", TensorProto.FLOAT, [2])
    h = helper.make_tensor_value_info("h", TensorProto.FLOAT, ["batch", 2], "a value")
    h.metadata_props.add(key="of", value="value")
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, ["batch", 2])
    maybe = helper.make_value_info("maybe", helper.make_optional_type_proto(x.type))
    weights = [numpy_helper.from_array(np.array([1, 2], np.float32), name) for name in ("default", "w", "unused")]
    nodes = [
        helper.make_node("F", ["x", "w"], ["h"], "call", domain="local", overload="second", q=1),
        helper.make_node("Clip", ["h", "", "w"], ["clipped"], doc_string="a node"),
        helper.make_node("Optional", [], ["none"], type=helper.make_tensor_type_proto(TensorProto.FLOAT, [2])),
        helper.make_node("Custom", ["clipped", "none", "maybe"], ["z", "", "side"], domain="other", t=weights[:2]),
        helper.make_node("Add", ["z", "default"], ["y"]),
    ]
    nodes[1].metadata_props.add(key="of", value="node")
    nodes[3].attribute.append(onnx.AttributeProto(name="nothing", type=onnx.AttributeProto.INTS))
    functions = []
    for overload in ("first", "second"):
        body = [helper.make_node("Add", ["a", "b"], ["c"], doc_string=overload)]
        opsets = [helper.make_opsetid("", 20)]
        made = helper.make_function("local", "F", ["a", "b"], ["c"], body, opsets, ["q"], doc_string="a function")
        made.overload = overload
        made.value_info.append(helper.make_tensor_value_info("c", TensorProto.FLOAT, [2]))
        made.metadata_props.add(key="of", value="function")
        functions.append(made)
    graph = helper.make_graph(nodes, "g", [x, default, maybe], [y], weights, "a graph", [h])
    graph.metadata_props.add(key="of", value="graph")
    graph.quantization_annotation.add(tensor_name="h").quant_parameter_tensor_names.add(key="SCALE_TENSOR", value="w")
    opsets = [helper.make_opsetid(*opset) for opset in (("", 21), ("local", 1), ("other", 4), ("unused", 7))]
    proto = helper.make_model(graph, functions=functions, opset_imports=opsets, ir_version=10, doc_string="a model")
    proto.producer_name, proto.producer_version, proto.domain, proto.model_version = "maker", "1.2", "org.maker", 3
    proto.metadata_props.add(key="of", value="model")
    return ir.from_proto(proto)


def test_a_function_that_does_nothing_leaves_every_byte() -> None:
    for model in (described_model(), everywhere_model()):
        before, graph = said(model), model.graph
        for function in (lambda graph: None, lambda graph: graph, lambda graph: graph.copy()):
            assert not apply(function, model)
            assert said(model) == before
            assert model.graph is graph


def test_what_the_function_does_not_touch_is_as_it_was() -> None:
    model, expected = described_model(), described_model()
    list(expected.graph)[-1].name = "sum"
    assert apply(lambda graph: setattr(graph.nodes[-1], "name", "sum"), model)
    assert to_text(model) == to_text(expected)
    assert said(model) == said(expected)


def test_metadata_follows_its_node_and_value_when_others_go() -> None:
    model = described_model()

    def keep_the_clip(graph: gs.Graph) -> None:
        graph.nodes[1].name = "the clip"
        graph.outputs = [graph.nodes[1].outputs[0]]
        graph.outputs[0].name = "renamed"
        graph.cleanup()

    assert apply(keep_the_clip, model)
    call, clip = model.graph
    assert (call.overload, call.outputs[0].doc_string) == ("second", "a value")
    assert (clip.name, clip.doc_string, clip.metadata_props) == ("the clip", "a node", {"of": "node"})
    assert [value.name for value in model.graph.inputs] == ["x", "maybe"]
    assert list(model.graph.initializers) == ["w", "unused"]


@pytest.mark.parametrize("name", ["BFLOAT16", "FLOAT8E4M3FNUZ", "FLOAT8E8M0", "INT4", "FLOAT4E2M1", "UINT2", "STRING"])
def test_weights_of_any_type_come_back_and_can_be_edited(name: str) -> None:
    kind = ir.DataType[name]
    array = np.array(["a", "b", "c"], object) if name == "STRING" else np.array([1, 1, 2]).astype(kind.numpy())
    tensor = ir.StringTensor([b"a", b"b", b"c"], shape=ir.Shape([3])) if name == "STRING" else ir.tensor(array, kind)
    weight = ir.val("w", const_value=tensor)
    node = ir.node("Identity", [weight], name="copy")
    graph = ir.Graph([], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 25}, name="g")
    model = ir.Model(graph, ir_version=13)

    def swap(graph: gs.Graph) -> None:
        values = constant(graph, "w").values
        values[2], values[0] = values[0], values[2]

    assert not apply(lambda graph: graph.tensors() and None, model)
    assert apply(swap, model)
    found = model.graph.initializers["w"]
    assert found.dtype == found.const_value.dtype == kind  # type: ignore[union-attr]
    assert np.array_equal(numpy_helper.to_array(ir.to_proto(model).graph.initializer[0]), array[[2, 1, 0]])


def test_weights_on_disk_are_found_from_another_folder_and_stay_the_same_objects(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    proto = everywhere().proto
    onnx.save(proto, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    model = open_model(tmp_path / "m.onnx")
    main, body = (next(graph.initializers[name] for graph in model.graphs() if name in graph.initializers)
                  for name in ("main", "body"))  # fmt: skip
    expected = main.const_value.numpy() * 2  # type: ignore[union-attr]
    assert isinstance(body.const_value, Region)
    assert apply(lambda graph: setattr(constant(graph, "main"), "values", constant(graph, "main").values * 2), model)
    initializers = {name: value for graph in model.graphs() for name, value in graph.initializers.items()}
    assert initializers["body"].const_value is body.const_value
    assert np.array_equal(initializers["main"].const_value.numpy(), expected)


RESIDENT = """
import re, sys
from pathlib import Path
import onnx_graphsurgeon as gs
from surgery.graphsurgeon import apply
from surgery.storage import open_model

def rename(graph):
    graph.nodes[0].name = "renamed"

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) >> 10

model = open_model(Path(sys.argv[1]))
before = anonymous()
assert apply(rename, model)
print(anonymous() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="resident memory is read from /proc")
def test_a_weight_of_500_mb_that_nobody_looks_at_is_not_loaded(tmp_path: Path) -> None:
    side = 11_200
    model = parse(f"g (float[n,{side}] x) => (float[n,{side}] y) {{y = MatMul(x, w)}}")
    weight = TensorProto(name="w", data_type=TensorProto.FLOAT, dims=[side, side], data_location=TensorProto.EXTERNAL)
    weight.external_data.add(key="location", value="w.data")
    proto = ir.to_proto(model)
    proto.graph.initializer.append(weight)
    (tmp_path / "m.onnx").write_bytes(proto.SerializeToString())
    with open(tmp_path / "w.data", "wb") as file:
        file.truncate(4 * side * side)
    command = [sys.executable, "-c", RESIDENT, tmp_path / "m.onnx"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 30, f"{done.stdout} MB"


# What is refused


def test_a_function_that_returns_no_graph_is_refused_by_the_type() -> None:
    with pytest.raises(Refused, match="returned int, not a graphsurgeon Graph or None"):
        apply(lambda graph: 3, parse(DROPOUT))


def test_a_function_that_raises_leaves_the_model() -> None:
    model = parse(DROPOUT)
    before = said(model)

    def fail(graph: gs.Graph) -> None:
        graph.nodes.clear()
        raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        apply(fail, model)
    assert said(model) == before


def test_a_node_left_reading_nothing_is_refused_by_name() -> None:
    with pytest.raises(Refused, match=r"left a Relu node reading 'b', which nothing gives"):
        apply(lambda graph: graph.nodes.remove(graph.nodes[1]), parse(DROPOUT))


def test_an_output_that_nothing_gives_is_refused_by_name() -> None:
    with pytest.raises(Refused, match=r"left the output 'y' of 'g', which nothing gives"):
        apply(lambda graph: graph.nodes.remove(graph.nodes[-1]), parse(DROPOUT))


def test_a_value_given_twice_is_refused_by_name() -> None:
    with pytest.raises(Refused, match="left two values named 'a' in one graph"):
        apply(lambda graph: graph.nodes[0].outputs[0].to_constant(np.ones(2, np.float32)) and None, parse(DROPOUT))


def test_equal_constants_of_one_name_are_one_and_different_ones_are_refused() -> None:
    def add(*numbers: float) -> Callable[[gs.Graph], None]:
        def function(graph: gs.Graph) -> None:
            for number, node in zip(numbers, graph.nodes, strict=True):
                node.inputs.append(gs.Constant("one", np.array([number], np.float32)))

        return function

    text = "g (float[2] x) => (float[2] y) {a = Max(x) y = Max(a)}"
    model = parse(text)
    assert apply(add(1, 1), model)
    assert_text(model, "g (float[2] x) => (float[2] y) <float[1] one = {1}> {a = Max(x, one) y = Max(a, one)}")
    with pytest.raises(Refused, match="left two values named 'one'"):
        apply(add(1, 2), parse(text))


def test_an_initializer_that_hides_an_outer_value_is_refused_by_name() -> None:
    model = parse(
        """
        g (bool c, float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
            a = Add(x, w)
            y = If (c) <
                then_branch = then () => (float[2] t) <float[2] v = {3, 4}> { t = Add(a, v) },
                else_branch = else () => (float[2] e) { e = Mul(a, w) }
            >
        }
        """
    )
    next(value for graph in model.graphs() for value in graph.initializers.values() if value.name == "v").name = "w"
    with pytest.raises(Refused, match="initializer 'w' of 'then' hides another value"):
        apply(lambda graph: None, model)


# As a step


EDITS = """
import onnx_graphsurgeon as gs

NUMBER = 3

def drop_dropout(graph):
    for node in [node for node in graph.nodes if node.op == "Dropout"]:
        node.o().inputs[0] = node.inputs[0]
    graph.cleanup().toposort()

def nudge(graph):
    weight = graph.tensors()["w"]
    weight.values = weight.values + 1e-5

def fail(graph):
    raise KeyError("no such thing")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "my_edits.py").write_text(EDITS)
    (tmp_path / "m.onnx").write_bytes(ir.to_proto(parse(DROPOUT)).SerializeToString())
    return tmp_path


def recipe(folder: Path, function: str, more: str = "") -> None:
    text = f"source: m.onnx\nsteps:\n  - pass: graphsurgeon\n    function: {function}\n{more}output: out\n"
    (folder / "r.yaml").write_text(text)


def test_the_pass_counts_nodes_and_says_which_function_it_was() -> None:
    pass_ = Graphsurgeon(function=drop_dropout)
    model = parse(DROPOUT)
    assert pass_.rewrite(model, Context()) == Change(1, "drop_dropout: 4 nodes became 3")
    assert pass_.rewrite(model, Context()) == Change(0, "")
    assert pass_.effect is Effect.EXACT


def test_the_recipe_says_the_effect(folder: Path) -> None:
    options = {"function": "my_edits:nudge", "effect": "close"}
    assert make_pass(find("graphsurgeon", folder), options, folder).effect is Effect.CLOSE


@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("my_edit:drop_dropout", "cannot import module 'my_edit'"),
        ("my_edits:drop_dropouts", "has no 'drop_dropouts'; did you mean 'drop_dropout'?"),
        ("my_edits:NUMBER", "'my_edits:NUMBER' is 3, not a function"),
        ("my_edits", "'my_edits' is not of the form 'module:name'"),
    ],
)
def test_a_wrong_function_is_an_error_of_the_recipe_before_any_model_is_opened(
    folder: Path, surgery: Run, function: str, problem: str
) -> None:
    recipe(folder, function)
    (folder / "m.onnx").write_bytes(b"not read")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 2
    assert "r.yaml:3: step 1" in done.stderr
    assert problem in done.stderr


def test_a_function_needs_no_registration_only_its_name(folder: Path) -> None:
    with pytest.raises(RecipeError, match="not a function"):
        Graphsurgeon(function=f"{folder}/my_edits.py:NUMBER")
    assert Graphsurgeon(function=f"{folder}/my_edits.py:fail").function.endswith("my_edits.py:fail")  # type: ignore[union-attr]


def test_a_recipe_runs_a_function_from_another_folder_and_finds_it_exact(folder: Path, surgery: Run) -> None:
    recipe(folder, "my_edits:drop_dropout")
    (folder / "elsewhere").mkdir()
    done = surgery("run", "../r.yaml", cwd=folder / "elsewhere")
    assert done.returncode == 0, done.stderr
    assert "step 1 graphsurgeon: exact; drop_dropout: 4 nodes became 3" in done.stdout
    assert [node.op_type for node in open_model(folder / "out" / "model.onnx").graph] == ["Add", "Relu", "Add"]


def test_a_function_that_moves_the_numbers_is_caught_unless_it_may(folder: Path, surgery: Run) -> None:
    recipe(folder, "my_edits:nudge")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 1
    assert "step 1 (graphsurgeon): model: output 'y' is off by" in done.stderr
    assert not (folder / "out").exists()
    recipe(folder, "my_edits:nudge", "    effect: close\n")
    assert surgery("run", "r.yaml", cwd=folder).returncode == 0


def test_a_function_that_raises_is_named_with_its_step(folder: Path, surgery: Run) -> None:
    recipe(folder, "my_edits:fail")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 1
    assert "step 1 (graphsurgeon): raised KeyError: 'no such thing'" in done.stderr


def test_the_manual_and_the_schema_know_the_pass(surgery: Run) -> None:
    assert "graphsurgeon (by option)" in surgery("passes", "graphsurgeon").stdout
    done = surgery("schema")
    assert '"const": "graphsurgeon"' in done.stdout
    assert done.stderr == ""
