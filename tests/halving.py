"""Proofs for `cast_fp16`: what a graph becomes, that it is valid everywhere, computes nearly the same, and stays so."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime
from rewriting import ROLE, Feeds, Graph, as_model, assert_same_numbers, assert_text, sample_feeds

from passes.audit_ranges import Range, Ranges
from passes.audit_ranges.kinds import Origin, origins_of
from passes.audit_ranges.ranges import LARGEST
from passes.cast_fp16 import CastFp16
from surgery.accuracy.half import holds_half, lower_half
from surgery.contract import Bundle, Change, Context
from surgery.element_types import infer_types
from surgery.facts import Facts
from surgery.graphs import value_names
from surgery.storage import find_disorder, save_model
from surgery.watchers.validity import find_problem

LEVELS = ("DISABLE_ALL", "ENABLE_BASIC", "ENABLE_EXTENDED", "ENABLE_ALL")


def casting(**options: Any) -> CastFp16:
    """Return the pass with options of a test: no verdicts are asked for unless it says so."""
    return CastFp16(**{"refine": False, **options})


def halved(
    graph: Graph,
    *,
    feeds: Sequence[Feeds] = (),
    ranges: Mapping[str, Mapping[str, Any]] | None = None,
    pass_: CastFp16 | None = None,
    is_compared: bool = True,
) -> tuple[ir.Model, Change]:
    """Return what the pass makes of a model, proven in all but its text, and what it says.

    It is valid with strict types, sorted, has unique names, opens in ONNX Runtime at all optimization levels, emulated
    gives nearly the same numbers as in float32, and a second run changes nothing and says so.

    Args:
        graph: ONNX text, or a model.
        feeds: Inputs to measure ranges on and to compare at; left out, seeded ones.
        ranges: What the audit is said to have found, over what is measured on `feeds`.
        pass_: The pass with its options.
        is_compared: Whether the numbers are compared.
    """
    pass_ = pass_ or casting()
    original = as_model(graph)
    assert find_problem(original) == "", "the test's own graph is not valid"
    before = Bundle({ROLE: original})
    was = before.identities()
    feeds = feeds or tuple(sample_feeds(original))
    after, change = cast_bundle(pass_, before, {ROLE: measured(original, feeds, ranges)})
    assert before.identities() == was, "the pass reached through a clone and changed the original"
    assert change.count > 0, "nothing was changed"
    assert change.summary
    model = after[ROLE]
    assert_valid(model)
    if is_compared:
        assert_same_numbers(pass_, before, after, feeds)
    claim = pass_.claims(before, after)[0]
    wanted = [value.name or "" for value in model.graph.inputs if not value.is_initializer()]
    again_feeds = [claim.feed(sample, wanted) for sample in feeds]
    again, nothing = cast_bundle(pass_, after, {ROLE: measured(model, again_feeds, ranges)})
    assert nothing == Change(0, ""), f"the second run: {nothing}"
    assert again.identities() == after.identities(), "the second run changed it"
    return model, change


def assert_halves(before: Graph, after: Graph, **arguments: Any) -> Change:
    """Prove that the pass makes one graph of another, with all that `halved` proves, and return what it says."""
    model, change = halved(before, **arguments)
    assert_text(model, after)
    return change


def cast_bundle(pass_: CastFp16, bundle: Bundle, ranges: Mapping[str, Ranges]) -> tuple[Bundle, Change]:
    """Run the pass on a clone of a bundle."""
    clone = bundle.clone()
    facts = Facts().given(ranges, clone.identities())
    outcome = pass_.apply(clone, lambda role: Context(role=role, facts=facts))
    return clone, outcome.change


def assert_valid(model: ir.Model) -> None:
    """Prove that a model is valid, sorted, has unique names, and opens in ONNX Runtime at all optimization levels."""
    assert find_problem(model) == ""
    assert not find_disorder(model)
    twice = [name for name, count in value_names(model.graph).items() if count > 1]
    assert not twice, f"given twice: {twice}"
    content = ir.to_proto(model).SerializeToString()
    for level in LEVELS:
        options = onnxruntime.SessionOptions()
        options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, f"ORT_{level}")
        options.log_severity_level = 4
        onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def measured(model: ir.Model, feeds: Iterable[Feeds], said: Mapping[str, Mapping[str, Any]] | None = None) -> Ranges:
    """Return the ranges of the float32 tensors of a model's main graph, measured here, and what a test says of others.

    Args:
        model: The model.
        feeds: Inputs.
        said: Fields of ranges by key, over what is measured.
    """
    feeds = list(feeds)
    model = model.clone()
    infer_types(model)
    shown = lower_half(model) if holds_half(model) else model.clone()
    infer_types(shown)
    origins = origins_of(model)
    values = [
        value for node in shown.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT and value.name
    ]
    known = {value.name for value in shown.graph.outputs}
    floats = {value.name for value in (*model.graph.inputs, *_made(model)) if value.dtype == ir.DataType.FLOAT}
    shown.graph.outputs.extend(value for value in values if value.name not in known)
    session = onnxruntime.InferenceSession(ir.to_proto(shown).SerializeToString(), providers=["CPUExecutionProvider"])
    found: dict[str, Range] = {}
    for sample in feeds:
        arrays = dict(zip([one.name for one in session.get_outputs()], session.run(None, dict(sample)), strict=True))
        for name, array in {**sample, **arrays}.items():
            if name in floats and np.asarray(array).dtype == np.float32:
                one = range_of(np.asarray(array), origins[name])
                found[name] = found[name].joined(one) if name in found else one
    for key, fields in (said or {}).items():
        found[key] = (found.get(key) or range_of(np.ones(1, np.float32))).model_copy(update=dict(fields))
    return Ranges(values=found, samples=len(feeds))


def _made(model: ir.Model) -> Iterable[ir.Value]:
    return (value for node in model.graph for value in node.outputs)


def range_of(array: np.ndarray, origin: Origin = Origin("activation")) -> Range:
    """Return the range of an array."""
    flat = array.reshape(-1).astype(np.float64)
    finite = flat[np.isfinite(flat)]
    magnitudes = np.abs(finite[finite != 0])
    with np.errstate(over="ignore", under="ignore"):
        half = np.abs(magnitudes.astype(np.float16))
    return Range(
        kind=origin.kind,
        is_masked=origin.is_masked,
        low=float(finite.min(initial=0)),
        high=float(finite.max(initial=0)),
        smallest=float(magnitudes.min()) if magnitudes.size else None,
        fraction=float((finite - np.floor(finite)).max(initial=0)),
        elements=int(flat.size),
        infinite=int(np.isinf(flat).sum()),
        nan=int(np.isnan(flat).sum()),
        zero=int((flat == 0).sum()),
        underflow=int((half == 0).sum()),
        subnormal=int(((half > 0) & (half < 2.0**-14)).sum()),
        squares=float((np.minimum(magnitudes, 1e18) ** 2).sum()),
        error=None,
        compared=0,
        squared_errors=0.0,
        broken=0,
    )


__all__ = ["LARGEST", "assert_halves", "assert_valid", "cast_bundle", "casting", "halved", "measured", "save_model"]
