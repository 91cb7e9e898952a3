"""Proofs for `merge_if`: a merged model is valid and answers as both models did, whatever the runtime does to it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import onnx_ir as ir
from rewriting import Graph, as_model, assert_same_numbers, sample_feeds

from passes.merge_if import MergeIf
from surgery.claims import Program
from surgery.contract import Bundle, Change, Context
from surgery.runtime.sessions import open_session
from surgery.watchers.validity import find_problem

Feeds = Mapping[str, np.ndarray]


def merge(
    when_true: Graph, when_false: Graph, *, feeds: Sequence[Feeds] = (), **options: object
) -> tuple[ir.Model, Change]:
    """Return what two models become, proven valid and to answer as both of them did.

    Without optimizations the answers are the same bit for bit; with all of them, what the models themselves then give.
    """
    before = Bundle({"decode": as_model(when_true), "prefill": as_model(when_false)})
    was = before.identities()
    problems = [find_problem(model) for model in before.models.values()]
    assert problems == ["", ""], f"the test's own graphs are not valid: {problems}"
    after = before.clone()
    pass_ = MergeIf(**options)
    outcome = pass_.apply(after, lambda role: Context(role=role))
    assert before.identities() == was
    assert list(after.models) == ["decoder"]
    assert find_problem(after["decoder"]) == ""
    assert_same_numbers(pass_, before, after, feeds)
    assert_same_when_optimized(pass_, before, after, feeds)
    return after["decoder"], outcome.change


def assert_same_when_optimized(pass_: MergeIf, before: Bundle, after: Bundle, feeds: Sequence[Feeds]) -> None:
    """Prove that ONNX Runtime's optimizers leave the merged model what it is; they may move the last bits."""
    merged = open_session(after[pass_.into], optimize=True, prepacking=True)
    names = [value.name for value in merged.get_outputs()]
    wanted = [value.name for value in merged.get_inputs()]
    for claim in pass_.claims(before, after):
        if not isinstance(claim.reference, Program):
            continue
        model = before[claim.reference.role]
        session = open_session(model, optimize=True, prepacking=True)
        for sample in feeds or sample_feeds(model):
            given = dict(zip(names, merged.run(None, claim.feed(sample, wanted)), strict=True))
            own = {value.name: sample[value.name] for value in session.get_inputs()}
            expected = zip([value.name for value in session.get_outputs()], session.run(None, own), strict=True)
            for name, array in expected:
                assert given[name].shape == array.shape
                if array.dtype.kind == "f":
                    np.testing.assert_allclose(given[name], array, rtol=1e-5, atol=1e-6, err_msg=name)
                else:
                    np.testing.assert_array_equal(given[name], array, err_msg=name)


def branches(model: ir.Model) -> dict[str, ir.Graph]:
    """Return the branches of a merged model by the names of their attributes."""
    chooser = next(node for node in model.graph if node.op_type == "If")
    return {name: attribute.as_graph() for name, attribute in chooser.attributes.items()}


def inner_names(model: ir.Model) -> Iterator[str]:
    """Yield the names of all values that nodes of the branches give."""
    for branch in branches(model).values():
        for node in branch.all_nodes():
            yield from (str(value.name) for value in node.outputs)


def run(model: ir.Model, **feeds: np.ndarray) -> dict[str, np.ndarray]:
    """Run a model without optimizations."""
    session = open_session(model)
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, feeds), strict=True))
