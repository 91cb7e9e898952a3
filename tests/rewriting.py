"""Proofs for passes: what a graph becomes, that it computes the same, also one `If` deeper, and that it stays so."""

from __future__ import annotations

import difflib
import itertools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing

import numpy as np
import onnx_ir as ir

from surgery.accuracy.compare import compare_output
from surgery.accuracy.runners import ModelProgram
from surgery.claims import Program
from surgery.contract import Bundle, Change, Context, Pass
from surgery.text import parse, to_text
from surgery.watchers.validity import find_problem

Graph = str | ir.Model
Feeds = Mapping[str, np.ndarray]

ROLE = "model"
FLAG = "one_if_deeper"


def assert_rewrites(pass_: Pass, before: Graph, after: Graph, *, feeds: Sequence[Feeds] = ()) -> None:
    """Prove four things of a pass and a graph that it changes.

    The text is `after`; a second run changes nothing and says so; the numbers are the same, as the pass's own effect
    and claims want them; and, one `If` deeper, it changes something, leaves a valid model and the same numbers, and
    has nothing to do in a second run.

    Args:
        pass_: A pass on one model.
        before: ONNX text, or a model.
        after: What the first run must make of it.
        feeds: Inputs to compare at; left out, seeded ones are made from the types of the graph's inputs.
    """
    original = as_model(before)
    assert_text(rewritten(pass_, original, feeds), after)
    deeper_feeds = [{**sample, FLAG: np.array(flag)} for sample in feeds for flag in (True, False)]
    rewritten(pass_, one_if_deeper(original), deeper_feeds)


def assert_leaves_alone(pass_: Pass, graph: Graph) -> None:
    """Prove that a pass finds nothing to do in a valid graph, says so, and changes nothing."""
    original = as_model(graph)
    assert find_problem(original) == ""
    bundle, change = run_pass(pass_, original)
    assert change == Change(0, ""), change
    assert bundle.identities() == Bundle({ROLE: original}).identities(), f"changed to\n{to_text(bundle[ROLE])}"


def rewritten(pass_: Pass, original: ir.Model, feeds: Sequence[Feeds] = ()) -> ir.Model:
    """Return what a pass makes of a model, proven in all but its text: valid, of the same numbers, and final."""
    assert find_problem(original) == "", "the test's own graph is not valid"
    before = Bundle({ROLE: original})
    was = before.identities()
    after, change = run_pass(pass_, original)
    assert before.identities() == was, "the pass reached through a clone and changed the original"
    assert change.count > 0, f"nothing was changed in\n{to_text(original)}"
    assert change.summary
    assert find_problem(after[ROLE]) == "", f"not valid:\n{to_text(after[ROLE])}"
    assert_same_numbers(pass_, before, after, feeds)
    again, nothing = run_pass(pass_, after[ROLE])
    assert nothing == Change(0, ""), f"the second run: {nothing}"
    assert again.identities() == after.identities(), f"the second run changed\n{to_text(after[ROLE])}"
    return after[ROLE]


def run_pass(pass_: Pass, model: ir.Model) -> tuple[Bundle, Change]:
    """Return a bundle of the rewritten model, and the change; the model itself stays as it is."""
    bundle = Bundle({ROLE: model}).clone()
    outcome = pass_.apply(bundle, lambda role: Context(role=role))
    return bundle, outcome.change


def as_model(graph: Graph) -> ir.Model:
    """Read a graph that is given as text."""
    return parse(graph) if isinstance(graph, str) else graph


def assert_text(model: ir.Model, expected: Graph) -> None:
    """Prove that a model has the same canonical text as a graph."""
    found, wanted = to_text(model), to_text(as_model(expected))
    lines = difflib.unified_diff(wanted.splitlines(), found.splitlines(), "expected", "found", lineterm="", n=99)
    assert found == wanted, "\n" + "\n".join(lines)


def assert_same_numbers(pass_: Pass, before: Bundle, after: Bundle, feeds: Sequence[Feeds] = ()) -> None:
    """Prove in ONNX Runtime that all claims of a pass hold."""
    claims = pass_.claims(before, after)
    assert claims, "the pass claims nothing"
    for claim in claims:
        assert isinstance(claim.reference, Program)
        assert isinstance(claim.candidate, Program)
        model, rewritten_model = before[claim.reference.role], after[claim.candidate.role]
        with closing(ModelProgram(model)) as reference, closing(ModelProgram(rewritten_model)) as candidate:
            for sample in feeds or sample_feeds(model):
                expected = claim.expect(reference.run(sample))
                given = candidate.run(claim.feed(sample, candidate.inputs))
                assert expected.keys() == given.keys() - claim.extra
                for name, array in expected.items():
                    result = compare_output(name, array, given[name], pass_.effect, pass_.tolerance)
                    assert result, f"{name!r} {result.text}, at {result.index}, for {sample}"


def sample_feeds(model: ir.Model, seed: int = 0) -> Iterator[Feeds]:
    """Yield seeded inputs of a model: every combination of its boolean scalars, each with two draws of the others.

    Symbolic dimensions are 2 in the first draw and 3 in the second; integers are 0 to 2. Weights that a caller may
    override have their own values.
    """
    given = [value for value in model.graph.inputs if not value.is_initializer()]
    flags = [value.name for value in given if value.dtype == ir.DataType.BOOL and not _dimensions(value, 1)]
    for settings in itertools.product((True, False), repeat=len(flags)):
        for draw in (0, 1):
            random = np.random.default_rng([seed, draw])
            arrays = {value.name: _sample(value, random, 2 + draw) for value in given}
            fixed = {name: np.array(setting) for name, setting in zip(flags, settings, strict=True)}
            yield {**arrays, **fixed}


def _sample(value: ir.Value, random: np.random.Generator, symbolic: int) -> np.ndarray:
    assert value.dtype is not None
    shape = _dimensions(value, symbolic)
    if value.dtype == ir.DataType.STRING:
        return random.choice(np.array(["", "one", "two"], dtype=object), shape)
    if value.dtype == ir.DataType.BOOL:
        return random.random(shape) < 0.5
    if value.dtype.is_integer():
        return random.integers(0, 3, shape).astype(value.dtype.numpy())
    return random.standard_normal(shape).astype(value.dtype.numpy())


def _dimensions(value: ir.Value, symbolic: int) -> tuple[int, ...]:
    assert value.shape is not None, f"the input {value.name!r} is drawn without a shape"
    return tuple(size if isinstance(size, int) else symbolic for size in value.shape)


def one_if_deeper(model: ir.Model) -> ir.Model:
    """Return a model whose whole body stands in both branches of an `If`, on a new boolean input.

    Inputs, and the initializers that are inputs too, stay outside and are captured; each branch has its own copy of
    everything else, under the same names, as exporters write it.
    """
    graph = model.graph
    inputs = [_like(value, value.name) for value in graph.inputs]
    flag = ir.Value(name=FLAG, type=ir.TensorType(ir.DataType.BOOL), shape=ir.Shape(()))
    branches = [
        ir.AttrGraph("then_branch", _branch(graph, inputs, "_then")),
        ir.AttrGraph("else_branch", _branch(graph, inputs, "_else")),
    ]
    # An output that is an input passes by the `If`.
    by_name = {value.name: value for value in inputs}
    outputs = [by_name.get(value.name) or _like(value, value.name) for value in graph.outputs]
    computed = [value for value in outputs if value not in inputs]
    main = ir.Graph(
        [*inputs, flag],
        outputs,
        nodes=[ir.Node("", "If", [flag], branches, outputs=computed, name="deeper")],
        initializers=[value for value in inputs if value.const_value is not None],
        opset_imports=dict(graph.opset_imports),
        name=graph.name,
    )
    functions = [function.clone() for function in model.functions.values()]
    return ir.Model(main, ir_version=model.ir_version, functions=functions)


def _branch(main: ir.Graph, captured: Sequence[ir.Value], suffix: str) -> ir.Graph:
    """Return a copy of the main graph as a branch that captures the inputs from outside."""
    branch = main.clone()
    branch.name = f"{main.name}{suffix}"
    results = [value for value in branch.outputs if not value.is_graph_input()]
    branch.outputs.clear()
    for inner, value in zip(branch.inputs, captured, strict=True):
        inner.replace_all_uses_with(value)
        if inner.is_initializer():
            del branch.initializers[inner.name]
    branch.inputs.clear()
    for result in results:
        branch.outputs.append(_result(branch, result, f"{result.name}{suffix}"))
    return branch


def _result(branch: ir.Graph, value: ir.Value, name: str) -> ir.Value:
    """Return a branch's output for a value: itself under another name, or a copy if it is a weight or one already."""
    if value.producer() is not None and not value.is_graph_output():
        value.name = name
        return value
    copy = ir.Node("", "Identity", [value], outputs=[_like(value, name)], name=name)
    branch.append(copy)
    return copy.outputs[0]


def _like(value: ir.Value, name: str | None) -> ir.Value:
    const_value = value.const_value if value.is_graph_input() else None
    return ir.Value(name=name, type=value.type, shape=value.shape, const_value=const_value)
