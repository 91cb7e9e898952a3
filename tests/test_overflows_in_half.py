"""What half precision does to the sorter's variants is seen on the CPU; what an audit keeps is enough, and little."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import onnx
import onnx_ir as ir
import pytest
from test_fixtures import FIXTURES, load, one_thread

from passes.audit_ranges import AuditRanges
from passes.cast_fp16 import CastFp16
from passes.clean_casts import CleanCasts
from surgery import Bundle, Check, Claim, Effect, Pipeline
from surgery.accuracy.half import lower_half
from surgery.accuracy.judge import Judge
from surgery.accuracy.verdict import Verdict
from surgery.element_types import infer_types
from surgery.graphs import graphs_of
from surgery.storage import open_model

pytest.importorskip("torch")
pytest.importorskip("transformers")

NAMES = ("one_layer", "several_layers", "residual", "long_only", "cached_step_only")
QUICK = "one_layer"
EACH = [name if name == QUICK else pytest.param(name, marks=pytest.mark.long) for name in NAMES]
RECIPE = (AuditRanges(), CastFp16(), CleanCasts())
FEW = 0.05
# Its places alone, the whole residual stream and what writes to it, are a ninth of its nodes.
FEW_OF = {"residual": 0.14}
# The sorter knows no rows this long: some of its answers are near ties, which half precision may turn.
LONG_QUESTIONS, MOST_OF_THEM = (100, 200, 40), 0.95

__all__ = ["one_thread"]  # a fixture of this module too


@pytest.fixture(scope="module")
def script() -> Any:
    return load("make_overflows")


@pytest.fixture(scope="module")
def sources(
    script: Any, exported: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], Bundle]:
    """Return a trained fixture, or a variant of the sorter, as it is exported, in float32."""
    out = tmp_path_factory.mktemp("overflows")

    def export(name: str) -> Path:
        if (FIXTURES / name).exists():
            return exported(name)
        with Pipeline([], check=None).run(script.make(name, out / name)) as result:
            result.save(out / f"{name}-onnx")
        return out / f"{name}-onnx"

    @cache
    def source(name: str) -> Bundle:
        with Pipeline([], check=None).run(export(name)) as result:
            return result.bundle

    return source


def configs(bundle: Bundle) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    return bundle.config, bundle.generation_config


def all_half(bundle: Bundle, folder: Path) -> Bundle:
    """Return what ONNX Runtime's converter makes of a bundle: nothing is left in float32 but inputs and outputs."""
    from onnxruntime.transformers.onnx_model import OnnxModel

    models = {}
    for role, model in bundle.models.items():
        converted = OnnxModel(ir.to_proto(model))
        converted.convert_float_to_float16(keep_io_types=True)
        converted.topological_sort()
        onnx.save(converted.model, folder / f"{role}.onnx")
        models[role] = open_model(folder / f"{role}.onnx")
    return Bundle(models, *configs(bundle))


def verdict_on(before: Bundle, after: Bundle) -> Verdict:
    judge = Judge(before, Check())
    try:
        claims = [Claim.same(role) for role in before.models]
        return judge.judge(before, after, claims, Effect.CLOSE, CastFp16.tolerance)
    finally:
        judge.close()


def answers(script: Any, bundle: Bundle, batch: Any) -> Any:
    """Return what a bundle answers with half precision emulated."""
    from surgery.runtime.generation import Generator

    lowered = {role: lower_half(model) for role, model in bundle.models.items()}
    return script.answers(Generator(Bundle(lowered, *configs(bundle))), batch)


def nodes_of(model: ir.Model) -> Iterator[ir.Node]:
    for graph in graphs_of(model.graph):
        yield from graph


def kept_in(model: ir.Model) -> list[str]:
    """Return the names of the nodes that read or give float32, but for casts and what holds its numbers itself."""
    infer_types(model)
    return [
        node.name or ""
        for node in nodes_of(model)
        if node.op_type not in ("Cast", "Constant")
        and any(value is not None and value.dtype == ir.DataType.FLOAT for value in (*node.inputs, *node.outputs))
    ]


@pytest.mark.parametrize("name", EACH)
def test_a_model_all_in_half_precision_is_caught_without_a_gpu(
    script: Any, sources: Callable[[str], Bundle], name: str, tmp_path: Path
):
    source = sources(name)
    verdict = verdict_on(source, all_half(source, tmp_path))
    assert not verdict.is_accurate
    assert {role for role in source.models if any(failure.program == role for failure in verdict.failures)} >= {
        role for role, places in script.VARIANTS[name].over.items() if places
    }
    assert "is nan" in str(verdict) or "is inf" in str(verdict) or "is -inf" in str(verdict)


@pytest.mark.long
def test_the_sorter_itself_passes_all_in_half_precision(sources: Callable[[str], Bundle], tmp_path: Path):
    source = sources("sorter")
    assert verdict_on(source, all_half(source, tmp_path)).is_accurate


@pytest.mark.parametrize("name", EACH)
def test_an_audited_variant_keeps_its_places_few_others_and_all_answers(
    script: Any, sources: Callable[[str], Bundle], name: str
):
    source = sources(name)
    variant = script.VARIANTS[name]
    with Pipeline(RECIPE, Check()).run(source.clone()) as result:
        assert all(record.verdict is None or record.verdict.is_accurate for record in result.records)
        cast = result.bundle
        kept = {role: kept_in(model) for role, model in cast.models.items()}
        for role, places in variant.over.items():
            missing = [node for node in nodes_at(source[role], places) if node not in kept[role]]
            assert not missing, f"{role}: {missing} should be in float32"
        count = sum(len(list(nodes_of(model))) for model in source.models.values())
        assert sum(map(len, kept.values())) <= FEW_OF.get(name, FEW) * count
        assert share_equal(script, cast, source, (2, 13, 100)) == 1
        if variant.shortest > 1:
            assert share_equal(script, cast, source, LONG_QUESTIONS) >= MOST_OF_THEM


def share_equal(script: Any, cast: Bundle, source: Bundle, questions: tuple[int, int, int]) -> float:
    batch = script.texts(31, *questions)
    given, wanted = (answers(script, bundle, batch) for bundle in (cast, source))
    return float((given == wanted).all(dim=1).float().mean())


def nodes_at(model: ir.Model, places: tuple[str, ...]) -> list[str]:
    """Return the nodes of modules; the norm `X` reads what `X.square` says."""
    modules = {place.removesuffix(".square") for place in places}
    found = [node.name or "" for node in nodes_of(model) if (node.name or "").rpartition("/")[0] in modules]
    assert found
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", ["adder", "comparer", "sorter"])
def test_a_model_that_needs_no_float32_keeps_none(sources: Callable[[str], Bundle], name: str):
    with Pipeline(RECIPE, Check()).run(sources(name).clone()) as result:
        assert [name for model in result.bundle.models.values() for name in kept_in(model)] == []
