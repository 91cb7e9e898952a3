"""Verdicts: two gaps, limits, coverage, and what the judge says of the source itself."""

from __future__ import annotations

import gc
import json
import os
from collections.abc import Iterator
from contextlib import closing

import numpy as np
import pytest
from models import CONFIG, decoder_pair, generic, single
from planting import Edit, pass_through, plant, rework, where

from surgery import Bundle, Check, Claim, Effect, HostLoop, Pipeline, Result, Tolerance
from surgery.accuracy.judge import Judge
from surgery.accuracy.runners import ModelProgram, threads
from surgery.accuracy.verdict import Coverage, Gap, Verdict
from surgery.claims import Fill, Measure, Program, Slice, Take
from surgery.errors import RecipeError, StepFailed, SurgeryError
from surgery.manager import Stopped
from surgery.recipe import OutputTolerance

FREE = Tolerance(max_error=10, p999_error=10, top1=0)


def scale(factor: float, name: str = "y") -> Edit:
    """Multiply an output."""
    return rework(name, lambda emit, value, _: emit("Mul", value, np.array(factor, dtype=np.float32)))


def verdicts(result: Result) -> list[Verdict]:
    return [record.verdict for record in result.records if record.verdict is not None]


def test_a_verdict_says_what_it_is_known_on() -> None:
    verdict = verdicts(Pipeline([plant("one", pass_through)]).run(decoder_pair()))[1]
    assert {role: str(coverage) for role, coverage in verdict.coverage.items()} == {
        "prefill": "5 samples: batch 1, 3; length 1, 2, 7, 100; padding no, yes",
        "decode": "5 samples: batch 1, 3; padding no, yes; past 0, 1, 7, 99",
    }
    assert verdict.warnings == ()
    assert json.loads(json.dumps(verdict.as_json()))["coverage"]["prefill"].startswith("5 samples")


def test_missing_coverage_is_a_warning_each() -> None:
    check = Check(batches=(1,), lengths=(1,), past=(1,))
    records = Pipeline([plant("one", pass_through)], check).run(decoder_pair()).records
    assert records[1].warnings == [
        "prefill: only one batch size was fed",
        "prefill: no prompt of more than one token was fed",
        "prefill: no padded row was fed",
        "decode: only one batch size was fed",
        "decode: no empty cache was fed",
        "decode: no cache of more than one token was fed",
        "decode: no padded row was fed",
    ]


def test_no_coverage_is_an_error() -> None:
    bundle = decoder_pair(config={**CONFIG, "n_positions": 4})
    with pytest.raises(
        Stopped, match="the source: prefill: the source runs on no sample, because there is none"
    ) as caught:
        Pipeline([plant("one", pass_through)], Check(lengths=(5,))).run(bundle)
    assert "check.data" in caught.value.hint


def test_coverages_of_two_branches_are_joined() -> None:
    one = Coverage(2, {"past": frozenset({"0"}), "batch": frozenset({"1", "3"})})
    other = Coverage(1, {"past": frozenset({"7", "10"})})
    assert str(one.joined(other)) == "3 samples: batch 1, 3; past 0, 7, 10"


@pytest.mark.parametrize(("effect", "passes"), [(Effect.CLOSE, True), (Effect.EXACT, False)], ids=str)
def test_the_tolerance_of_one_output_loosens_what_is_close_and_never_what_is_exact(
    effect: Effect, passes: bool
) -> None:
    check = Check(outputs={"y": OutputTolerance(max_error=0.2, p999_error=0.2)})
    step = plant("scale_one", scale(1.1), effect)
    if passes:
        verdict = verdicts(Pipeline([step], check).run(generic()))[1]
        assert 0.1 < verdict.outputs["model.y"].max_error < 0.2
        assert verdict.outputs["model.z"].is_exact
        return
    with pytest.raises(Stopped, match=r"output 'y' is off by .*; the step must be exact"):
        Pipeline([step], check).run(generic())


def test_the_tolerance_of_one_output_is_not_that_of_another() -> None:
    check = Check(outputs={"y": OutputTolerance(max_error=0.2, p999_error=0.2)})
    with pytest.raises(Stopped, match=r"output 'z' is off by .*, limit 0.001 \(max_error\)"):
        Pipeline([plant("scale_one", scale(1.1, "z"), Effect.CLOSE)], check).run(generic())


def test_a_tolerance_follows_its_output_through_a_rename() -> None:
    def rename(model: object) -> None:
        model.graph.outputs[0].name = "renamed"  # type: ignore[attr-defined]

    check = Check(outputs={"y": OutputTolerance(max_error=0.2, p999_error=0.2)})
    steps = [
        plant("rename_one", rename, outputs={"renamed": Take("y")}),
        plant("scale_one", scale(1.1, "renamed"), Effect.CLOSE),
    ]
    assert verdicts(Pipeline(steps, check).run(generic()))[2].is_accurate


def test_the_global_tolerance_of_a_recipe_goes_before_the_passes_own() -> None:
    step = plant("scale_one", scale(1.1), Effect.CLOSE)
    assert verdicts(Pipeline([step], Check(max_error=0.2, p999_error=0.2)).run(generic()))[1].is_accurate


def test_an_unknown_output_is_an_error_with_a_suggestion() -> None:
    check = Check(outputs={"logit": OutputTolerance(max_error=1)})
    with pytest.raises(RecipeError, match="no model of the source has an output 'logit'; did you mean 'logits'?"):
        Judge(decoder_pair(), check)


def test_the_gap_to_the_source_grows_while_the_steps_stay_small() -> None:
    tolerance = Tolerance(max_error=0.03, p999_error=0.03)
    steps = [plant(f"scale_{word}", scale(1.01), Effect.CLOSE, tolerance=tolerance) for word in ("one", "two", "three")]
    steps.append(plant("four", pass_through))
    found = verdicts(Pipeline(steps).run(generic()))[1:]
    by_step = [verdict.step.max_error for verdict in found]  # type: ignore[union-attr]
    by_source = [verdict.source.max_error for verdict in found]  # type: ignore[union-attr]
    assert by_step[:3] == pytest.approx([by_step[0]] * 3, rel=1e-3)
    assert by_step[3] == 0
    assert by_source == pytest.approx(
        [by_step[0], 2.01 * by_step[0], 3.0301 * by_step[0], 3.0301 * by_step[0]], rel=1e-3
    )
    assert found[3].step is not None
    assert found[3].step.is_exact
    assert found[3].source is not None
    assert not found[3].source.is_exact


def test_the_drift_may_be_as_large_as_the_tolerances_together_and_no_larger() -> None:
    """Each step is off by 0.7 of the RMS that it was given; together they are by 1.8 of the source's."""
    near, far = (Tolerance(max_error=error, p999_error=error) for error in (1.0, 0.75))
    steps = [plant(f"scale_{word}", scale(1.5), Effect.CLOSE, tolerance=near) for word in ("one", "two")]
    assert len(Pipeline(steps).run(generic()).records) == 3
    steps = [plant(f"scale_{word}", scale(1.5), Effect.CLOSE, tolerance=far) for word in ("one", "two")]
    with pytest.raises(
        Stopped, match=r"step 2 \(scale_two\): model: output 'y' is off by .*, limit 1.5 .*, against the source"
    ):
        Pipeline(steps).run(generic())


def test_the_tolerance_of_one_output_adds_up_too() -> None:
    check = Check(outputs={"y": OutputTolerance(max_error=0.02, p999_error=0.02)})
    steps = [plant(f"scale_{word}", scale(1.01), Effect.CLOSE) for word in ("one", "two", "three")]
    assert len(Pipeline(steps, check).run(generic()).records) == 4


def test_a_step_that_must_be_exact_may_not_add_to_the_drift() -> None:
    steps = [plant("scale_one", scale(1.01), Effect.CLOSE, tolerance=FREE), plant("scale_two", scale(1.0001))]
    with pytest.raises(Stopped, match=r"step 2 \(scale_two\): model: output 'y' is off by .*; the step must be exact"):
        Pipeline(steps).run(generic())


def test_the_worst_output_is_named_first_and_where_it_began() -> None:
    def both(model: object) -> None:
        scale(1.1, "z")(model)  # type: ignore[arg-type]
        scale(2.0, "y")(model)  # type: ignore[arg-type]

    with pytest.raises(Stopped) as caught:
        Pipeline([plant("scale_both", both)]).run(generic())
    lines = caught.value.message.splitlines()
    assert lines[0].startswith("step 1 (scale_both): model: output 'y'")
    assert lines[1].startswith("  worst at [")
    assert any(line.startswith("model: output 'z'") for line in lines)


# The source itself


class Exported:
    """What a source was exported from: another model, run as it is."""

    def __init__(self, bundle: Bundle) -> None:
        self._programs = {role: ModelProgram(model) for role, model in bundle.models.items()}

    def run(self, role: str, feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        return self._programs[role].run(feeds)

    def close(self) -> None:
        for program in self._programs.values():
            program.close()


@pytest.fixture
def exported() -> Iterator[Exported]:
    bundle = generic()
    scale(1.005)(bundle["model"])
    with closing(Exported(bundle)) as reference:
        yield reference


@pytest.mark.parametrize(("error", "is_accurate"), [(None, False), (0.02, True)])
def test_the_source_is_compared_with_what_it_was_exported_from(
    exported: Exported, error: float | None, is_accurate: bool
) -> None:
    with closing(Judge(generic(), Check(max_error=error, p999_error=error), exported)) as judge:
        verdict = judge.judge_source()
    assert verdict.is_accurate is is_accurate
    assert verdict.step is not None
    assert 0.004 < verdict.step.max_error < 0.02


def test_a_source_without_origin_has_no_gap() -> None:
    with closing(Judge(generic(), Check())) as judge:
        verdict = judge.judge_source()
    assert (verdict.step, verdict.source, verdict.is_accurate) == (None, None, True)


def test_a_source_that_answers_differently_each_time_is_refused() -> None:
    bundle = single("""
        <ir_version: 8, opset_import: ["" : 18]>
        noise (float[n, 4] x) => (float[n, 4] y) { y = RandomNormalLike(x) }
    """)
    with pytest.raises(Stopped, match="the source: model: output 'y' is off by"):
        Pipeline([plant("one", pass_through)]).run(bundle)


def test_a_sample_that_the_source_itself_cannot_run_is_left_out_and_said() -> None:
    bundle = decoder_pair()
    rework("logits", lambda emit, value, _: emit("Reshape", value, np.array([1, 1, 50])))(bundle["decode"])
    records = Pipeline([plant("one", pass_through, role="prefill")]).run(bundle).records
    said = "decode: the source itself cannot run 'batch 3, length 1, past 7, padded', so it is left out"
    assert said in records[0].warnings
    assert "decode: only one batch size was fed" in records[1].warnings


def test_a_source_that_runs_on_nothing_is_an_error_that_says_why() -> None:
    bundle = decoder_pair()
    rework("logits", lambda emit, value, _: emit("Reshape", value, np.array([7, 11, 50])))(bundle["prefill"])
    with pytest.raises(Stopped, match="prefill: the source runs on no sample: prefill does not run: .*Reshape"):
        Pipeline([plant("one", pass_through)]).run(bundle)


def test_what_is_not_finite_in_the_source_is_said() -> None:
    bundle = single("""
        <ir_version: 8, opset_import: ["" : 18]>
        roots (float[n, 40] x) => (float[n, 40] y, float[n, 40] z) {
            y = Sqrt(x)
            z = Neg(x)
        }
    """)
    with closing(Judge(bundle, Check())) as judge:
        said = judge.judge_source().warnings
    assert said == ("model: output 'y' of the source itself is not finite on sample 'batch 1, length 1'",)


# The judge


def judged(
    claims: list[Claim],
    before: Bundle,
    after: Bundle,
    effect: Effect = Effect.EXACT,
    batches: tuple[int, ...] = (1, 3),
) -> Verdict:
    with closing(Judge(before, Check(batches=batches))) as judge:
        return judge.judge(before, after, claims, effect, Tolerance())


def test_a_verdict_is_kept_for_the_same_question_only() -> None:
    pair = decoder_pair()
    wrong = pair.clone()
    scale(2.0, "logits")(wrong["decode"])
    swapped = Bundle({"prefill": pair["decode"], "decode": pair["prefill"]})
    same = [Claim.same("prefill"), Claim.same("decode")]
    with closing(Judge(pair, Check())) as judge:
        assert judge.judge(pair, pair, same, Effect.EXACT, Tolerance()).is_accurate
        with pytest.raises(SurgeryError, match="says nothing of its input"):
            judge.judge(pair, swapped, same, Effect.EXACT, Tolerance())
        first = judge.judge(pair, wrong, same, Effect.EXACT, Tolerance())
        assert judge.judge(pair, wrong, same, Effect.EXACT, Tolerance()) is first
        halved = [same[0], Claim(Program("decode"), Program("decode"), extra=frozenset({"logits"}))]
        assert judge.judge(pair, wrong, halved, Effect.EXACT, Tolerance()) is not first
        assert not judge.judge(pair, wrong, same, Effect.CLOSE, Tolerance()).is_accurate
        assert judge.judge(pair, wrong, same, Effect.CLOSE, FREE).is_accurate
        assert judge.calls == 7


def test_a_claim_on_a_model_that_nothing_feeds_is_an_error() -> None:
    bundle = generic()
    claim = Claim(Program("other"), Program("model"))
    with pytest.raises(StepFailed, match="nothing is known to feed 'other' with"):
        judged([claim], bundle, bundle)


def test_an_entry_of_a_claim_for_an_unknown_input_is_an_error() -> None:
    bundle = generic()
    claim = Claim(Program("model"), Program("model"), inputs={"xx": Take("x")})
    with pytest.raises(SurgeryError, match="maps 'xx', which is not an input of it; did you mean 'x'?"):
        judged([claim], bundle, bundle)


def test_an_output_made_of_an_unknown_one_is_an_error() -> None:
    bundle = generic()
    claim = Claim(Program("model"), Program("model"), outputs={"y": Take("yy")})
    with pytest.raises(SurgeryError, match="cannot make the output 'y': model has no output 'yy'"):
        judged([claim], bundle, bundle)


def test_a_claim_of_one_branch_alone_is_covered_by_its_own_samples() -> None:
    """Two models of the source become one, as `merge_if` will claim it; here the decode alone is that one.

    There are no padded rows: a row's first token, which is all that is compared of a prompt, would be padding.
    """
    pair = decoder_pair()
    merged = Bundle({"decoder": pair["decode"]}, pair.config)
    from_prefill = Claim(
        Program("prefill"),
        Program("decoder"),
        inputs={
            "input_ids": Take("input_ids", (Slice(1, 0, 1),)),
            "attention_mask": Take("attention_mask", (Slice(1, 0, 1),)),
            "position_ids": Take("position_ids", (Slice(1, 0, 1),)),
            "past_key_values.0.key": Fill(0, "float32", (("input_ids", 0), 2, 0, 4)),
            "past_key_values.0.value": Fill(0, "float32", (("input_ids", 0), 2, 0, 4)),
        },
        outputs={
            "logits": Take("logits", (Slice(1, 0, 1),)),
            "present.0.key": Take("present.0.key", (Slice(2, 0, 1),)),
            "present.0.value": Take("present.0.value", (Slice(2, 0, 1),)),
        },
    )
    claims = [from_prefill, Claim(Program("decode"), Program("decoder"))]
    verdict = judged(claims, pair, merged, Effect.CLOSE, (1,))
    assert verdict.is_accurate
    covered = {name: str(coverage) for name, coverage in verdict.coverage.items()}
    assert covered == {
        "decoder as prefill": "4 samples: batch 1; length 1, 2, 7, 100; padding no",
        "decoder as decode": "4 samples: batch 1; padding no; past 0, 1, 7, 99",
    }
    wrong = merged.clone()
    where(
        lambda emit, inputs: emit("Less", emit("Shape", inputs["past_key_values.0.key"], start=2, end=3), np.array([1]))
    )(wrong["decoder"])
    failed = judged(claims, pair, wrong, Effect.CLOSE, (1,))
    assert failed.failures[0].program == "decoder as prefill"
    assert failed.failures[0].output == "logits"


def test_tokens_of_a_loop_may_differ_by_the_tolerance() -> None:
    pair = decoder_pair()
    changed = pair.clone()
    where(lambda emit, inputs: emit.constant(np.arange(50) == 7), 100.0)(changed["decode"])
    loop = HostLoop("greedy", ("prefill", "decode"))
    claim = Claim(loop, loop, measure=Measure.TOKENS)
    with closing(Judge(pair, Check())) as judge:
        exact = judge.judge(pair, changed, [claim], Effect.EXACT, Tolerance())
        close = judge.judge(pair, changed, [claim], Effect.CLOSE, Tolerance(top1=0))
    assert "of its tokens as they were; the step must be exact" in exact.failures[0].text
    assert close.is_accurate
    assert close.step is not None
    assert 0 < (close.step.top1 or 0) < 1


def test_sessions_share_one_number_of_threads() -> None:
    bundle = generic()
    with closing(ModelProgram(bundle["model"])) as program:
        assert program.session.get_session_options().intra_op_num_threads == threads() == min(os.cpu_count() or 1, 8)


def test_a_closed_judge_leaves_nothing_behind(capfd: pytest.CaptureFixture[str]) -> None:
    judge = Judge(generic(), Check())
    judge.judge_source()
    judge.close()
    del judge
    gc.collect()
    assert capfd.readouterr() == ("", "")


def test_a_gap_that_is_infinite_is_written_as_text() -> None:
    gap = Gap(float("inf"), float("nan"), None, is_exact=False)
    assert json.loads(json.dumps(gap.as_json())) == {
        "exact": False,
        "max_error": "inf",
        "p999_error": "nan",
        "top1": None,
    }
