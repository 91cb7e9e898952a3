"""The line: facts, staleness, judge and roles, proved with toy passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from surgery import (
    Analysis,
    Bundle,
    BundlePass,
    Change,
    Check,
    Claim,
    Context,
    Effect,
    Fact,
    ModelPass,
    Pipeline,
    Program,
)
from surgery.contract import Field, edits, makes, reads, takes
from surgery.errors import RecipeError, Refused, SurgeryError
from surgery.manager import Stopped, plan
from surgery.recipe import Step

SCALES = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[batch, 4] x) => (float[batch, 4] y) <float[4] w = {1, 2, 3, 4}, float[4] tiny = {1e-6, 1e-6, 1e-6, 1e-6}> {
    a = Mul(x, w)
    b = Add(a, tiny)
    y = Neg(b)
}
"""


def scales() -> Bundle:
    """One small model."""
    return Bundle({"model": ir.from_proto(onnx.parser.parse_model(SCALES))})


def branches() -> Bundle:
    """Two models."""
    return Bundle({role: ir.from_proto(onnx.parser.parse_model(SCALES)) for role in ("prefill", "decode")})


class Peaks(Fact):
    """The largest value of each input, seen over the samples."""

    largest: dict[str, float]


class FindPeaks(Analysis):
    """Find the peaks of the inputs by looking at the feeds and at what the model gives."""

    gives = (Peaks,)

    def analyze(self, bundle: Bundle, context: Callable[[str], Context]) -> Mapping[str, Fact]:
        return {role: peaks(bundle[role], context(role)) for role in self.models or bundle.models}


def peaks(model: ir.Model, context: Context) -> Peaks:
    """Run the model on every feed."""
    largest: dict[str, float] = {}
    for feeds in context.feeds(context.role):
        for name, array in {**feeds, **context.run(model, feeds)}.items():
            largest[name] = max(largest.get(name, 0.0), float(np.abs(array).max()))
    return Peaks(largest=largest)


class UsePeaks(ModelPass):
    """Write the peak of x into the model's metadata."""

    needs = (Peaks,)

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        model.metadata_props["peak"] = f"{context.fact(Peaks).largest['y']:.3f}"
        return Change(1, "wrote 1 peak")


class AddTwice(ModelPass):
    """Split a node in two that do the same: a change that keeps the numbers."""

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        double_negation(model)
        return Change(1, "added 2 negations")


class AddTwiceKeepingPeaks(AddTwice):
    """As its base, and says that peaks stay true."""

    preserves = (Peaks,)


def double_negation(model: ir.Model) -> None:
    """Put Neg(Neg(y)) in place of y."""
    graph = model.graph
    output = graph.outputs[0]
    node = output.producer()
    assert node is not None
    inner = ir.node("Neg", [node.inputs[0]])
    middle = ir.node("Neg", inner.outputs)
    node.replace_input_with(0, middle.outputs[0])
    graph.insert_before(node, [inner, middle])


class DropSmallest(ModelPass):
    """A refining pass: drops as many of the smallest terms as the verdict allows."""

    effect = Effect.CLOSE
    limit: float = Field(1e-3, description="Nothing that this pass itself uses; shows that options travel.")

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        dropped = 0
        for name in ("tiny", "w"):
            candidate = model.clone()
            zero(candidate, name)
            if context.judge(candidate).is_accurate and context.judge(candidate).is_accurate:
                zero(model, name)
                dropped += 1
        return Change(dropped, f"dropped {dropped} terms")


def zero(model: ir.Model, name: str) -> None:
    """Set a weight to zero."""
    value = model.graph.initializers[name]
    assert value.const_value is not None
    value.const_value = ir.tensor(np.zeros_like(value.const_value.numpy()), name=name)


class Join(BundlePass):
    """Take two models and make one that answers as the first did."""

    first: str = takes("prefill", "The model that answers.")
    second: str = takes("decode", "The model that is dropped.")
    made: str = makes("decoder", "What it makes.")

    def transform(self, bundle: Bundle, context: Callable[[str], Context]) -> Change:
        bundle.models[self.made] = bundle[self.first]
        return Change(1, "joined 2 models")

    def claims(self, before: Bundle, after: Bundle) -> Sequence[Claim]:
        return [Claim(Program(role), Program(self.made)) for role in (self.first, self.second)]


class Promise(Join):
    """Says that it makes a model, and does not."""

    def transform(self, bundle: Bundle, context: Callable[[str], Context]) -> Change:
        return Change(0, "")


class JoinSilently(Join):
    """Claims nothing about what it makes."""

    def claims(self, before: Bundle, after: Bundle) -> Sequence[Claim]:
        return []


class Compare(BundlePass):
    """Read one model and change another."""

    read: str = reads("encoder", "The model that is read.")
    edited: str = edits("decode", "The model that is changed.")

    def transform(self, bundle: Bundle, context: Callable[[str], Context]) -> Change:
        return Change(0, "")


class Raises(ModelPass):
    """Changes the model and then raises."""

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        model.graph.outputs.clear()
        raise ValueError("the pass is broken")


class Refuses(ModelPass):
    """May not."""

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        raise Refused("this model is of the wrong kind", hint="another model")


def steps(*passes: object) -> list[Step]:
    return [Step(number, type(pass_).__name__, pass_, f"r.yaml:{number}") for number, pass_ in enumerate(passes, 1)]  # type: ignore[arg-type]


def test_a_fact_reaches_the_pass_that_needs_it() -> None:
    result = Pipeline([FindPeaks(), UsePeaks()]).run(scales())
    assert float(result.bundle["model"].metadata_props["peak"]) > 1
    assert result.records[1].change == Change(0, "")


def test_a_fact_that_nobody_gives_is_found_while_planning() -> None:
    with pytest.raises(
        RecipeError, match=r"r.yaml:1: step 1 \(UsePeaks\): needs Peaks of 'model', which no earlier step"
    ):
        plan(steps(UsePeaks()), ["model"])


def test_a_fact_is_stale_once_its_model_may_have_changed() -> None:
    with pytest.raises(RecipeError, match="needs Peaks of 'model'"):
        plan(steps(FindPeaks(), AddTwice(), UsePeaks()), ["model"])


def test_a_preserved_fact_outlives_a_change() -> None:
    plan(steps(FindPeaks(), AddTwiceKeepingPeaks(), UsePeaks()), ["model"])
    result = Pipeline([FindPeaks(), AddTwiceKeepingPeaks(), UsePeaks()]).run(scales())
    assert "peak" in result.bundle["model"].metadata_props


def test_a_fact_of_one_model_is_none_of_another() -> None:
    with pytest.raises(RecipeError, match="needs Peaks of 'decode'"):
        plan(steps(FindPeaks(models=("prefill",)), UsePeaks()), ["prefill", "decode"])


def test_a_saved_fact_comes_back_for_its_model_and_refuses_another(tmp_path: Path) -> None:
    model = scales()["model"]
    fact = Peaks(largest={"y": 2.5})
    fact.save(tmp_path / "peaks.json", model)
    assert Peaks.load(tmp_path / "peaks.json", scales()["model"]) == fact
    zero(model, "tiny")
    with pytest.raises(Refused, match="describe another model"):
        Peaks.load(tmp_path / "peaks.json", model)
    (tmp_path / "garbage.json").write_text("{")
    with pytest.raises(RecipeError, match="not a saved fact of type Peaks"):
        Peaks.load(tmp_path / "garbage.json", model)


def test_a_refining_pass_asks_the_judge_and_keeps_what_passes() -> None:
    result = Pipeline([DropSmallest()]).run(scales())
    record = result.records[1]
    assert record.change == Change(1, "dropped 1 terms")
    assert record.judged == 3
    assert not result.bundle["model"].graph.initializers["tiny"].const_value.numpy().any()  # type: ignore[union-attr]
    assert record.verdict is not None
    assert record.verdict.step is not None
    assert 0 < record.verdict.step.max_error < 1e-3


def test_the_same_question_is_answered_from_memory() -> None:
    class AskTwice(ModelPass):
        """Asks the same thing twice."""

        effect = Effect.CLOSE

        def rewrite(self, model: ir.Model, context: Context) -> Change:
            candidate = model.clone()
            zero(candidate, "tiny")
            first, second = context.judge(candidate), context.judge(candidate)
            assert first is second
            return Change(0, "")

    assert Pipeline([AskTwice()]).run(scales()).records[1].judged == 2


def test_roles_that_are_taken_are_gone_and_those_made_are_there() -> None:
    planned = plan(steps(Join(), AddTwice(models=("decoder",))), ["encoder", "prefill", "decode"])
    assert [entry.roles for entry in planned] == [("encoder", "decoder")] * 2
    result = Pipeline([Join(), AddTwice()]).run(branches())
    assert list(result.bundle.models) == ["decoder"]
    assert result.records[2].verdict is not None
    assert str(result.records[2].verdict.source) == "exact"


def test_a_taken_model_is_named_with_the_step_that_took_it() -> None:
    with pytest.raises(RecipeError, match=r"the model 'prefill' is gone: step 1 \(Join\) took it"):
        plan(steps(Join(), AddTwice(models=("prefill",))), ["prefill", "decode"])


def test_a_model_that_was_never_there_is_named_with_a_suggestion() -> None:
    with pytest.raises(RecipeError, match="there is no model 'decod' here; did you mean 'decode'?"):
        plan(steps(AddTwice(models=("decod",))), ["prefill", "decode"])
    with pytest.raises(RecipeError, match="there is no model 'encoder' here"):
        plan(steps(Compare()), ["prefill", "decode"])


def test_a_model_is_not_made_over_another() -> None:
    with pytest.raises(RecipeError, match="would make 'decoder', which is there already"):
        plan(steps(Join()), ["prefill", "decode", "decoder"])


def test_every_mistake_of_a_plan_is_said_at_once() -> None:
    with pytest.raises(RecipeError) as caught:
        plan(steps(UsePeaks(), AddTwice(models=("nobody",))), ["model"])
    assert len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize(
    ("pass_", "text"),
    [
        (Promise(), "did not make 'decoder'"),
        (JoinSilently(), "nothing is claimed about the model 'decoder'"),
        (Raises(), r"step 1 \(raises\): raised ValueError: the pass is broken"),
        (Refuses(), "this model is of the wrong kind"),
    ],
)
def test_a_step_that_fails_leaves_the_bundle_as_it_was(pass_: ModelPass, text: str) -> None:
    bundle = branches()
    before = bundle.identities()
    with pytest.raises(Stopped, match=text) as caught:
        Pipeline([pass_]).run(bundle)
    assert caught.value.bundle.identities() == before == bundle.identities()
    assert caught.value.step is not None
    assert caught.value.step.number == 1


def test_the_given_bundle_is_never_changed() -> None:
    bundle = scales()
    before = bundle.identities()
    Pipeline([AddTwice(), DropSmallest()]).run(bundle)
    assert bundle.identities() == before


def test_without_checks_a_pass_may_still_ask() -> None:
    result = Pipeline([DropSmallest()], check=None).run(scales())
    assert result.records[1].verdict is None
    assert result.records[1].judged == 3


def test_drift_from_the_source_is_summed_over_close_steps() -> None:
    class Nudge(ModelPass):
        """Moves the answers a little."""

        effect = Effect.CLOSE

        def rewrite(self, model: ir.Model, context: Context) -> Change:
            value = model.graph.initializers["w"]
            assert value.const_value is not None
            value.const_value = ir.tensor(value.const_value.numpy() * np.float32(1 + 1e-4), name="w")
            return Change(1, "nudged 1 weight")

    records = Pipeline([Nudge(), Nudge(), AddTwice()], Check(p999_error=1e-3)).run(scales()).records
    gaps = [record.verdict.source.max_error for record in records[1:]]  # type: ignore[union-attr]
    assert gaps[1] == pytest.approx(2 * gaps[0], rel=0.05)
    assert gaps[2] == gaps[1]
    assert str(records[3].verdict.step) == "exact"  # type: ignore[union-attr]


def test_a_pass_of_ours_runs_inside_a_sequence_of_onnx_ir() -> None:
    model = scales()["model"]
    result = ir.passes.Sequential(AddTwice())(model)
    assert result.modified
    assert len(list(model.graph)) == 5


def test_a_pass_outside_a_recipe_cannot_ask() -> None:
    with pytest.raises(SurgeryError, match="only inside a recipe or a Pipeline"):
        DropSmallest().rewrite(scales()["model"], Context())


def test_an_analysis_must_find_what_it_says() -> None:
    class Idle(Analysis):
        """Finds nothing."""

        gives = (Peaks,)

        def analyze(self, bundle: Bundle, context: Callable[[str], Context]) -> Mapping[str, Fact]:
            return {}

    with pytest.raises(Stopped, match="Idle found nothing about 'model'"):
        Pipeline([Idle()]).run(scales())
