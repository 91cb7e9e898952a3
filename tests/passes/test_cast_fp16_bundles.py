"""`cast_fp16` on whole bundles: shared weights, the cache, verdicts, refinement, and real files."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from conftest import ROOT
from halving import assert_valid, cast_bundle, casting, measured
from rewriting import ROLE, sample_feeds

from passes.audit_ranges import AuditRanges, Ranges
from passes.cast_fp16 import CastFp16
from passes.cast_fp16.casting import Halves, cast
from passes.cast_fp16.places import computes, map_of
from passes.cast_fp16.rules import Limits, Site, reasons_of
from passes.cast_fp16.weights import Survey, facts_of
from surgery.accuracy.judge import Judge
from surgery.accuracy.runners import ModelProgram
from surgery.bundle import Bundle
from surgery.claims import CastTo, Take
from surgery.contract import Change
from surgery.element_types import infer_types
from surgery.manager import Stopped
from surgery.pipeline import Pipeline, Result
from surgery.recipe import Check
from surgery.storage import open_model, save_model, save_models
from surgery.text import parse

BIG_BYTES = 64 * 64 * 4
NOTHING = Ranges(values={}, samples=1)

PREFILL = """
prefill (float[b, n, 64] x) => (float[b, n, 64] y, float[b, n, 64] "present.0.key") {
    "present.0.key" = MatMul(x, w)
    y = Relu("present.0.key")
}
"""
DECODE = """
decode (float[b, 1, 64] x, float[b, p, 64] "past_key_values.0.key") => (
    float[b, 1, 64] y, float[b, q, 64] "present.0.key"
) {
    key = MatMul(x, w)
    "present.0.key" = Concat <axis = 1> ("past_key_values.0.key", key)
    y = Relu(key)
}
"""


def pair() -> Bundle:
    """Return two models, each with its own copy of a weight."""
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32) / 8
    return Bundle({role: with_weight(text, weight) for role, text in (("prefill", PREFILL), ("decode", DECODE))})


def with_weight(text: str, weight: np.ndarray) -> ir.Model:
    """Return a model that reads a weight `w`, which is too large to draw."""
    model = parse(text.replace(") =>", ", float[64, 64] w) =>", 1))
    (value,) = (value for value in model.graph.inputs if value.name == "w")
    model.graph.inputs.remove(value)
    value.const_value = ir.tensor(weight.copy(), name="w")
    model.graph.register_initializer(value)
    return model


def ranges_of(bundle: Bundle) -> dict[str, Ranges]:
    return {role: measured(bundle[role], sample_feeds(bundle[role])) for role in bundle.models}


# Weights of several models


def test_a_weight_of_two_models_is_one_float16_weight(tmp_path: Path):
    after, change = cast_bundle(casting(), pair(), ranges_of(pair()))
    assert f"{BIG_BYTES / 1000:.1f} kB of weights saved" in change.summary
    save_models(after.models, tmp_path / "shared", layout="shared")
    (data,) = (tmp_path / "shared").glob("*.onnx_data")
    assert data.stat().st_size < BIG_BYTES * 0.75


def test_a_weight_that_a_model_which_stays_shares_is_said_to_be_there_twice():
    _, change = cast_bundle(casting(models=["prefill"]), pair(), ranges_of(pair()))
    assert "w: two copies, float16 for prefill and float32 for decode" in change.details


def test_a_weight_that_two_models_want_in_two_precisions_is_there_once_in_each():
    bundle = pair()
    (product,) = (node for node in bundle["decode"].graph if node.op_type == "MatMul")
    product.name = "wide"
    after, change = cast_bundle(casting(keep=["wide"]), bundle, ranges_of(bundle))
    weights = {
        role: [value.dtype for value in model.graph.initializers.values()] for role, model in after.models.items()
    }
    assert weights == {"prefill": [ir.DataType.FLOAT16], "decode": [ir.DataType.FLOAT]}
    assert "w: two copies, float16 for prefill and float32 for decode" in change.details


def test_models_that_are_not_named_stay_as_they_are():
    bundle = pair()
    after, _ = cast_bundle(casting(models=["prefill"]), bundle, ranges_of(bundle))
    assert after.identities()["decode"] == bundle.identities()["decode"]


# The cache


@pytest.mark.parametrize("keep_cache", [False, True])
def test_the_cache_is_a_choice_of_its_own(*, keep_cache: bool):
    after, _ = cast_bundle(casting(keep_cache=keep_cache), pair(), ranges_of(pair()))
    types = {
        (role, value.name): value.dtype
        for role, model in after.models.items()
        for value in (*model.graph.inputs, *model.graph.outputs)
    }
    cache = ir.DataType.FLOAT if keep_cache else ir.DataType.FLOAT16
    assert types == {
        ("prefill", "x"): ir.DataType.FLOAT,
        ("prefill", "y"): ir.DataType.FLOAT,
        ("prefill", "present.0.key"): cache,
        ("decode", "x"): ir.DataType.FLOAT,
        ("decode", "past_key_values.0.key"): cache,
        ("decode", "y"): ir.DataType.FLOAT,
        ("decode", "present.0.key"): cache,
    }


def test_a_cache_that_overflows_in_one_model_is_float32_in_all():
    ranges = ranges_of(pair())
    key = ranges["decode"].values["present.0.key"]
    ranges["decode"].values["present.0.key"] = key.model_copy(update={"high": 1e6})
    after, change = cast_bundle(casting(), pair(), ranges)
    assert any("present.0.key: peaks at 1,000,000, above 0.5 x 65,504" in line for line in change.details)
    for model in after.models.values():
        cache = [value for value in (*model.graph.inputs, *model.graph.outputs) if "key" in (value.name or "")]
        assert {value.dtype for value in cache} == {ir.DataType.FLOAT}
        assert_valid(model)


def test_what_became_float16_is_claimed_as_float16():
    bundle = pair()
    pass_ = casting(keep_io="none")
    after, _ = cast_bundle(pass_, bundle, ranges_of(bundle))
    claims = {claim.candidate.roles[0]: claim for claim in pass_.claims(bundle, after)}
    half = (CastTo("float16"),)
    assert claims["decode"].inputs == {name: Take(name, half) for name in ("x", "past_key_values.0.key")}
    assert claims["decode"].outputs == {name: Take(name, half) for name in ("y", "present.0.key")}


# Files


def test_the_same_bytes_come_out_whatever_the_hash_seed(tmp_path: Path):
    script = tmp_path / "cast.py"
    script.write_text(
        "import sys\n"
        "from test_cast_fp16_bundles import DECODE, PREFILL, pair, ranges_of\n"
        "from halving import cast_bundle, casting\n"
        "import onnx_ir as ir\n"
        "after, change = cast_bundle(casting(keep=['Relu']), pair(), ranges_of(pair()))\n"
        "content = b''.join(ir.to_proto(model).SerializeToString() for model in after.models.values())\n"
        "sys.stdout.buffer.write(content + repr(change).encode())\n",
        encoding="utf-8",
    )
    folders = os.pathsep.join(map(str, (ROOT, ROOT / "tests", ROOT / "tests" / "passes")))
    contents = [
        subprocess.run(
            [sys.executable, script],
            env={**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": folders},
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert contents[0] == contents[1]
    assert len(contents[0]) > BIG_BYTES / 2


def test_a_large_weight_is_converted_when_it_is_written_and_the_file_it_came_from_is_untouched(tmp_path: Path):
    bundle = pair()
    save_model(bundle["prefill"], tmp_path / "wide.onnx")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    model = open_model(tmp_path / "wide.onnx")
    after, _ = cast_bundle(casting(), Bundle({ROLE: model}), {ROLE: NOTHING})
    weight = after[ROLE].graph.initializers["w"].const_value
    assert isinstance(weight, ir.LazyTensor)
    save_model(after[ROLE], tmp_path / "narrow.onnx")
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    saved = open_model(tmp_path / "narrow.onnx").graph.initializers["w"].const_value
    assert saved is not None
    wide = bundle["prefill"].graph.initializers["w"].const_value
    assert wide is not None
    np.testing.assert_array_equal(saved.numpy(), wide.numpy().astype(np.float16))


LARGE = """
import sys
from halving import cast_bundle, casting
from passes.audit_ranges import Ranges
from surgery.bundle import Bundle
from surgery.storage import open_model, save_model
from surgery.watchers.ledger import MemoryMeter
meter = MemoryMeter()
meter.start()
model = open_model(sys.argv[1])
after, change = cast_bundle(casting(), Bundle({"model": model}), {"model": Ranges(values={}, samples=1)})
save_model(after["model"], sys.argv[2])
print(meter.stop())
print(change.summary)
"""


@pytest.mark.long
def test_a_model_over_2_gb_is_cast_in_the_memory_of_one_weight(tmp_path: Path):
    size, count = 5000, 24
    weight_bytes = size * size * 4
    weights = [f"w{number}" for number in range(count)]
    inputs = ", ".join(f"float[{size}, {size}] {name}" for name in weights)
    products = " ".join(f"x{n + 1} = MatMul(x{n}, {name})" for n, name in enumerate(weights))
    model = parse(f"g (float[1, {size}] x0, {inputs}) => (float[1, {size}] x{count}) {{ {products} }}")
    for number, value in enumerate(model.graph.inputs[1:]):
        model.graph.inputs.remove(value)
        value.const_value = ir.ExternalTensor(
            "weights.bin",
            number * weight_bytes,
            weight_bytes,
            ir.DataType.FLOAT,
            shape=ir.Shape((size, size)),
            name=value.name or "",
            base_dir=tmp_path,
        )
        model.graph.register_initializer(value)
    with (tmp_path / "weights.bin").open("wb") as file:
        file.truncate(count * weight_bytes)
    (tmp_path / "wide.onnx").write_bytes(ir.to_proto(model).SerializeToString())
    (tmp_path / "cast.py").write_text(LARGE, encoding="utf-8")
    command = [sys.executable, tmp_path / "cast.py", tmp_path / "wide.onnx", tmp_path / "narrow.onnx"]
    folders = os.pathsep.join(map(str, (ROOT, ROOT / "tests")))
    done = subprocess.run(
        command, env={**os.environ, "PYTHONPATH": folders}, capture_output=True, check=True, text=True
    )
    peak, summary = done.stdout.splitlines()
    assert f"0 of {count} nodes compute in float32, 2 casts, 1.2 GB of weights saved" == summary
    assert int(peak) < 4 * weight_bytes < count * weight_bytes / 5


def test_what_float16_does_to_a_weight_is_counted_as_numpy_rounds():
    numbers = [0, -0.0, 2.0**-25, -(2.0**-25), 2.1**-25, 1e-45, np.inf, -np.inf, np.nan, 65519, -65520]
    array = np.array(numbers, np.float32)
    with np.errstate(over="ignore"):
        half = array.astype(np.float16)
    facts = facts_of(array)
    assert facts.vanishing == np.count_nonzero((half == 0) & (array != 0))
    assert (facts.low, facts.high, facts.infinite, facts.elements) == (-65520, 65519, 2, len(numbers))
    assert facts.overflows
    assert not facts_of(array[:-1]).overflows


# Verdicts and refinement

# Each difference is of like numbers; the last one is the only one that matters.
DIFFERENCES = """
<ir_version: 10, opset_import: ["": 21]>
g (float[b, 8] x) => (float[b, 8] y)
<float one = {1}, float far = {512}, float small = {1e-3}>
{
    s = Sigmoid(x)
    a = Add(s, one)
    b = Mul(a, small)
    c = Add(s, far)
    d = Sub(c, far)
    y = Add(b, d)
}
"""


def run_refined(folder: Path, **options: Any) -> Result:
    """Audit and cast a drawn model with rules that see no reason for anything."""
    save_model(parse(DIFFERENCES), folder / "model.onnx")
    np.savez(folder / "data.npz", x=np.random.default_rng(0).standard_normal((4, 8)).astype(np.float32))
    check = Check(data=folder / "data.npz")
    return Pipeline([AuditRanges(), CastFp16(worst_error=9.0, **options)], check).run(folder / "model.onnx")


def test_a_verdict_over_its_limits_keeps_the_least_exact_nodes_and_no_others(tmp_path: Path):
    with run_refined(tmp_path) as result:
        model = result.bundle["model"]
        record = result.records[-1]
    wide = {value.name for node in model.graph for value in node.outputs if value.dtype == ir.DataType.FLOAT}
    assert {"c", "d"} <= wide
    assert "b" not in wide
    assert record.judged > 1
    assert "kept until the verdict was within its limits" in " ".join(record.change.details)
    assert "which" in record.change.summary


def test_without_refinement_the_run_stops_at_such_a_verdict(tmp_path: Path):
    with pytest.raises(Stopped, match="output 'y' is off by"):
        run_refined(tmp_path, refine=False)


def test_refinement_asks_for_no_more_verdicts_than_it_may(tmp_path: Path):
    with pytest.raises(Stopped, match="output 'y' is off by"):
        run_refined(tmp_path, most_verdicts=1)


# The smallest list


SMALLEST = """
g (float[4, 4] x) => (float[4, 4] y)
<float big = {300}, float small = {0.003}, float[4, 4] w = {1, 2, 0, 1, 0, 1, 1, 0, 1, 1, 0, 2, 0, 1, 0, 1}>
{
    a = MatMul(x, w)
    b = Mul(a, big)
    c = Mul(b, big)
    d = Sigmoid(a)
    e = Mul(c, small)
    f = Mul(e, small)
    y = Add(d, f)
}
"""


def test_rules_keep_the_nodes_of_the_smallest_list_that_all_trials_find():
    model = parse(SMALLEST)
    feeds = list(sample_feeds(model))
    ranges = measured(model, feeds)
    with closing(ModelProgram(model)) as program:
        wanted = [program.run(sample)["y"] for sample in feeds]
    site = site_of(model, ranges)
    names = [place.outputs[0].name for place in site.places.all() if computes(place) and isinstance(place, ir.Node)]
    kept = {
        place.outputs[0].name for reason in reasons_of(site) for place in reason.places if isinstance(place, ir.Node)
    }
    good = [
        set(choice)
        for count in range(len(names) + 1)
        for choice in itertools.combinations(names, count)
        if is_near(model, ranges, set(choice), feeds, wanted)
    ]
    smallest = min(map(len, good))
    assert [choice for choice in good if len(choice) == smallest] == [kept]


def site_of(model: ir.Model, ranges: Ranges) -> Site:
    clone = model.clone()
    infer_types(clone)
    return Site(ROLE, clone, map_of(clone, ROLE), ranges, Limits(), Survey())


def is_near(
    model: ir.Model, ranges: Ranges, names: set[str | None], feeds: list[Any], wanted: list[np.ndarray]
) -> bool:
    """Return whether a model with these nodes in float32 and all others in float16 gives what it gave."""
    site = site_of(model, ranges)
    places = site.places.all()
    float32 = {place for place in places if not isinstance(place, ir.Node) or place.outputs[0].name in names}
    cast(site.model, site.places, float32, Halves())
    with closing(ModelProgram(site.model)) as program:
        return all(
            bool(np.abs(program.run(sample)["y"] - array).max() < 0.02 * np.sqrt((array**2).mean()))
            for sample, array in zip(feeds, wanted, strict=True)
        )


# Fixtures


def test_a_trained_classifier_is_cast_whole_answers_as_before_and_is_not_cast_again(exported: Callable[[str], Path]):
    with Pipeline([AuditRanges(), CastFp16(), AuditRanges(), CastFp16()]).run(exported("comparer")) as result:
        _, _, first, _, second = result.records
        assert first.change.summary.startswith("0 of ")
        assert first.verdict is not None
        assert first.verdict.is_accurate
        assert second.change == Change(0, "")


def test_the_verdict_that_the_pass_asked_for_is_the_verdict_on_the_step(
    exported: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
):
    judged: list[str] = []
    judge = Judge._judge

    def counted(self: Judge, cut: Any, claims: Any) -> Any:
        judged.append("a verdict")
        return judge(self, cut, claims)

    monkeypatch.setattr(Judge, "_judge", counted)
    with Pipeline([AuditRanges(), CastFp16()]).run(exported("comparer")) as result:
        audit, cast_ = result.records[1:]
        assert (audit.judged, cast_.judged) == (0, 1)
    assert len(judged) == 1


@pytest.mark.long
@pytest.mark.parametrize(
    "options", [{}, {"keep_io": "none"}, {"keep_cache": True}, {"keep_io": "none", "keep_cache": True}]
)
@pytest.mark.parametrize("fixture", ["adder", "reverser", "sorter"])
def test_trained_fixtures_are_cast_in_every_interface(
    fixture: str, options: dict[str, Any], exported: Callable[[str], Path]
):
    with Pipeline([AuditRanges(), CastFp16(**options)]).run(exported(fixture)) as result:
        verdict = result.records[-1].verdict
        assert verdict is not None
        assert verdict.is_accurate
        for model in result.bundle.models.values():
            assert_valid(model)
