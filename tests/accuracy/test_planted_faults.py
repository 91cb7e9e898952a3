"""Planted faults: each must stop the run at the right step and name program and output; each clean twin must pass."""

from __future__ import annotations

import gc
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
import pytest
from models import decoder_pair, generic, single, typed
from planting import Edit, Emit, Given, output, pass_through, plant, put, replace_output, rework, size_is, weight, where

from surgery import Bundle, BundlePass, Change, Claim, Context, Effect, HostLoop, ModelPass, Pipeline, Result, Tolerance
from surgery.contract import makes, reads
from surgery.errors import Inaccurate, StepFailed
from surgery.manager import Stopped

EXACT, CLOSE = (Effect.EXACT,), (Effect.CLOSE,)
BOTH = EXACT + CLOSE


@dataclass(frozen=True)
class Fault:
    """A fault and its twin: the same mechanics without the fault.

    Args:
        name: The recipe word of the step.
        source: What it is planted in.
        wrong: The edit with the fault.
        twin: The edit without it.
        says: What the error must say, beside the step.
        role: The model that is edited.
        effects: What the pass declares; the fault must be found under each.
    """

    name: str
    source: Callable[[], Bundle]
    wrong: Edit
    twin: Edit
    says: tuple[str, ...]
    role: str | None = None
    effects: tuple[Effect, ...] = BOTH

    def __str__(self) -> str:
        return self.name


def swap(first: str, second: str) -> Edit:
    """Let two outputs go by each other's names."""

    def edit(model: ir.Model) -> None:
        one, other = output(model, first), output(model, second)
        one.name, other.name = "in_between", first
        one.name = second

    return edit


def reorder(model: ir.Model) -> None:
    """Give the outputs in another order, by the same names."""
    values = list(model.graph.outputs)
    model.graph.outputs[:] = values[1:] + values[:1]


def drop(name: str) -> Edit:
    """Do not give an output any more."""
    return lambda model: model.graph.outputs.remove(output(model, name))


def rename(name: str, new: str) -> Edit:
    """Give an output by another name."""

    def edit(model: ir.Model) -> None:
        output(model, name).name = new

    return edit


def add_output(name: str) -> Edit:
    """Give one of the inner values too."""

    def edit(model: ir.Model) -> None:
        value = next(value for node in model.graph for value in node.outputs if value.name == name)
        value.dtype = ir.DataType.FLOAT
        value.shape = ir.Shape(["batch_size", "sequence_length", 8])
        model.graph.outputs.append(value)

    return edit


def rename_and_back(name: str) -> Edit:
    def edit(model: ir.Model) -> None:
        rename(name, "in_between")(model)
        pass_through(model)
        rename("in_between", name)(model)

    return edit


def add_and_drop(model: ir.Model) -> None:
    add_output("residual")(model)
    drop("residual")(model)
    pass_through(model)


def one_ulp(array: np.ndarray) -> np.ndarray:
    array[0, 0] = np.nextafter(array[0, 0], np.float32(np.inf))
    return array


def there_and_back(array: np.ndarray) -> np.ndarray:
    array[0, 0] = np.nextafter(np.nextafter(array[0, 0], np.float32(np.inf)), np.float32(-np.inf))
    return array


def row_is_padded(comparison: str, real_at_first: int) -> Callable[[Emit, Given], ir.Value]:
    """The first token of the row's mask compares so with a number; [batch, 1, 1]."""

    def condition(emit: Emit, inputs: Given) -> ir.Value:
        first = emit("ReduceMin", inputs["attention_mask"], np.array([1]), keepdims=1)
        return emit("Unsqueeze", emit(comparison, first, np.array(real_at_first)), np.array([2]))

    return condition


def position_is(comparison: str, number: int) -> Callable[[Emit, Given], ir.Value]:
    """The token's position compares so with a number; [batch, length, 1]."""
    return lambda emit, inputs: emit(
        "Unsqueeze", emit(comparison, inputs["position_ids"], np.array(number)), np.array([2])
    )


def from_the_end(number: int) -> Callable[[Emit, Given], ir.Value]:
    """The token is so many from the last one, which is 1; [length, 1]."""

    def condition(emit: Emit, inputs: Given) -> ir.Value:
        length = emit("Squeeze", emit("Shape", inputs["input_ids"], start=1, end=2))
        left = emit("Range", length, np.array(0), np.array(-1))
        return emit("Unsqueeze", emit("Equal", left, np.array(number)), np.array([1]))

    return condition


def one_element(index: int, size: int = 50) -> Callable[[Emit, Given], ir.Value]:
    """One element of the last axis; none if the index is beyond it."""
    return lambda emit, _: emit.constant(np.arange(size) == index)


def nothing(emit: Emit, value: ir.Value, inputs: Given) -> ir.Value:
    return emit("Identity", value)


def cast(name: str, dtype: ir.DataType, *, back: bool = False) -> Edit:
    """Give an output in another type, or in its own after a detour."""

    def make(emit: Emit, value: ir.Value, inputs: Given) -> ir.Value:
        other = emit("Cast", value, to=int(dtype))
        made = emit("Cast", other, to=int(value.dtype)) if back else other  # type: ignore[arg-type]
        made.dtype = value.dtype if back else dtype
        return made

    return rework(name, make)


def transpose(perm: list[int], again: list[int] | None = None) -> Edit:
    def edit(model: ir.Model) -> None:
        old, emit = output(model, "logits"), Emit(model.graph)
        new = emit("Transpose", old, perm=perm)
        if again:
            new = emit("Transpose", new, perm=again)
        assert old.shape is not None
        new.dtype = old.dtype
        new.shape = old.shape if again else ir.Shape([old.shape[axis] for axis in perm])
        replace_output(model, old, new)

    return edit


def unsqueeze(model: ir.Model) -> None:
    old, emit = output(model, "logits"), Emit(model.graph)
    new = emit("Unsqueeze", old, np.array([1]))
    assert old.shape is not None
    new.dtype, new.shape = old.dtype, ir.Shape([old.shape[0], 1, *old.shape[1:]])
    replace_output(model, old, new)


def fixed_reshape(batch: int) -> Edit:
    """A Reshape whose batch size is fixed; -1 leaves it free."""
    return rework("logits", lambda emit, value, _: emit("Reshape", value, np.array([batch, 1, 50])))


def ignore_mask(*, but_keep: bool = False) -> Edit:
    """Attend to padding too."""

    def edit(model: ir.Model) -> None:
        is_open = next(value for node in model.graph for value in node.outputs if value.name == "is_open")
        node = is_open.producer()
        assert node is not None
        seen, real = node.inputs
        kept = real if but_keep else seen
        new = ir.node("And", [seen, kept])
        model.graph.insert_before(node, new)
        new.outputs[0].name = "is_open_anew"
        is_open.replace_all_uses_with(new.outputs[0])

    return edit


def stale_cache(scale: float) -> Edit:
    """The cache that comes out lacks what the new token added, but has its shape."""

    def make(emit: Emit, value: ir.Value, inputs: Given) -> ir.Value:
        past = inputs["past_key_values.0.key"]
        start = emit("Shape", past, start=2, end=3)
        new = emit("Slice", value, start, np.array([1 << 40]), np.array([2]))
        return emit("Concat", past, emit("Mul", new, np.array(scale, dtype=np.float32)), axis=2)

    return rework("present.0.key", make)


def relabel(version: int) -> Edit:
    """Say that the operators are of another version, and change nothing else."""

    def edit(model: ir.Model) -> None:
        model.graph.opset_imports[""] = version
        model.metadata_props["relabelled"] = str(version)

    return edit


def softmax(axis: int) -> Callable[[], Bundle]:
    """Softmax of opset 11 flattens all axes from its own on; that of opset 13 works along the one."""
    return lambda: single(f"""
        <ir_version: 6, opset_import: ["" : 11]>
        shares (float[n, 2, 3] x) => (float[n, 2, 3] y) {{ y = Softmax <axis = {axis}> (x) }}
    """)


def source_with_inf() -> Bundle:
    """Half of the outputs are -inf or NaN in the source itself."""
    return single("""
        <ir_version: 8, opset_import: ["" : 18]>
        logs (float[n, 4] x) => (float[n, 4] y, float[n, 4] z) {
            positive = Relu(x)
            y = Log(positive)
            z = Sqrt(x)
        }
    """)


def source_with_zeros() -> Bundle:
    return single("""
        <ir_version: 8, opset_import: ["" : 18]>
        zeros (float[n, 4] x) => (float[n, 8] y) {
            zero = Sub(x, x)
            y = Concat <axis = 1> (x, zero)
        }
    """)


def source_with_near_ties() -> Bundle:
    return single("""
        <ir_version: 8, opset_import: ["" : 18]>
        ties (float[n, 4] x) => (float[n, 4] logits) {
            zero = Sub(x, x)
            near = Constant <value = float[4] {1.0, 0.999999, 0.5, 0.25}> ()
            logits = Add(zero, near)
        }
    """)


def nudge(index: int) -> Edit:
    step = np.where(np.arange(4) == index, 3e-6, 0).astype(np.float32)
    return rework("logits", lambda emit, value, _: emit("Add", value, step))


def swap_extremes(model: ir.Model) -> None:
    values = model.graph.initializers
    values["largest"].const_value, values["smallest"].const_value = (
        values["smallest"].const_value,
        values["largest"].const_value,
    )


def negate(name: str, times: int) -> Edit:
    def make(emit: Emit, value: ir.Value, inputs: Given) -> ir.Value:
        for _ in range(times):
            value = emit("Not", value)
        return value

    return rework(name, make)


def say(word: str) -> Edit:
    def edit(model: ir.Model) -> None:
        value = model.graph.initializers["say_odd"]
        value.const_value = ir.StringTensor(np.array(word.encode(), dtype=object), shape=ir.Shape([]))

    return edit


def zero_sign(op_type: str) -> Edit:
    """Write the zeros in the second half of the output anew."""

    def make(emit: Emit, value: ir.Value, inputs: Given) -> ir.Value:
        front = emit("Slice", value, np.array([0]), np.array([4]), np.array([1]))
        back = emit("Slice", value, np.array([4]), np.array([8]), np.array([1]))
        return emit("Concat", front, emit(op_type, back), axis=1)

    return rework("y", make)


def rename_input(model: ir.Model) -> None:
    model.graph.inputs[0].name = "ids"


def identity_on(name: str) -> Edit:
    return rework(name, nothing)


IS_EMPTY, IS_FILLED, IS_LONG, HAS_FIVE = (
    size_is("past_key_values.0.key", 2, comparison, number)
    for comparison, number in (("Equal", 0), ("Greater", 0), ("Greater", 1000), ("Equal", 5))
)

FAULTS = (
    Fault("swap_outputs", decoder_pair, swap("present.0.key", "present.0.value"), reorder,
          ("decode: output 'present.0.", "is off by"), "decode"),
    Fault("drop_output", decoder_pair, drop("present.0.value"), reorder,
          ("prefill: output 'present.0.value' is missing; the candidate gives 'logits', 'present.0.key'",), "prefill"),
    Fault("rename_output", decoder_pair, rename("logits", "answers"), rename_and_back("logits"),
          ("decode: output 'answers' is new", "decode: output 'logits' is missing"), "decode"),
    Fault("add_output", decoder_pair, add_output("residual"), add_and_drop,
          ("prefill: output 'residual' is new; the reference gives 'logits'",), "prefill"),
    Fault("rename_input", decoder_pair, rename_input, pass_through,
          ("the claim on decode says nothing of its input 'ids'",), "decode"),
    Fault("scale_weight", decoder_pair, weight("up_weight", lambda array: array * np.float32(1.01)),
          weight("up_weight", lambda array: array * np.float32(2) / np.float32(2)),
          ("prefill: output 'logits' is off by", "first differs at up (MatMul)"), "prefill"),
    Fault("move_one_ulp", decoder_pair, weight("head_weight", one_ulp), weight("head_weight", there_and_back),
          ("prefill: output 'logits' is off by", "the step must be exact"), "prefill", EXACT),
    Fault("only_with_past", decoder_pair, where(IS_FILLED), where(IS_LONG),
          ("decode: output 'logits' is off by", ", past "), "decode"),
    Fault("only_without_past", decoder_pair, where(IS_EMPTY), where(HAS_FIVE),
          ("decode: output 'logits' is off by", "sample 'batch 1, length 1, past 0'"), "decode"),
    Fault("only_in_padded_rows", decoder_pair, where(row_is_padded("Equal", 0)), where(row_is_padded("Less", 0)),
          ("prefill: output 'logits' is off by", "sample 'batch 3, length 7, padded'"), "prefill"),
    Fault("only_in_padded_rows_with_past", decoder_pair, where(row_is_padded("Equal", 0)),
          where(row_is_padded("Less", 0)),
          ("decode: output 'logits' is off by", "sample 'batch 3, length 1, past 7, padded'"), "decode"),
    Fault("only_at_batch_three", decoder_pair, where(size_is("input_ids", 0, "Equal", 3)),
          where(size_is("input_ids", 0, "Equal", 5)),
          ("decode: output 'logits' is off by", "sample 'batch 3, "), "decode"),
    Fault("only_at_length_hundred", decoder_pair, where(size_is("input_ids", 1, "Equal", 100)),
          where(size_is("input_ids", 1, "Equal", 101)),
          ("prefill: output 'logits' is off by", "sample 'batch 1, length 100'"), "prefill"),
    Fault("only_at_the_last_position", decoder_pair, where(from_the_end(1)), where(from_the_end(0)),
          ("prefill: output 'logits' is off by",), "prefill"),
    Fault("only_at_far_positions", decoder_pair, where(position_is("GreaterOrEqual", 64)),
          where(position_is("GreaterOrEqual", 128)),
          ("prefill: output 'logits' is off by", "sample 'batch 1, length 100'"), "prefill"),
    Fault("only_at_far_positions_with_past", decoder_pair, where(position_is("GreaterOrEqual", 64)),
          where(position_is("GreaterOrEqual", 128)),
          ("decode: output 'logits' is off by", "sample 'batch 1, length 1, past 99'"), "decode"),
    Fault("write_nan", decoder_pair, put(one_element(3), np.nan), put(one_element(50), np.nan),
          ("prefill: output 'logits' is nan, not ", "worst at [0, 0, 3]"), "prefill"),
    Fault("write_inf", decoder_pair, put(one_element(49), np.inf), put(one_element(50), np.inf),
          ("prefill: output 'logits' is inf, not ", "worst at [0, 0, 49]"), "prefill"),
    Fault("hide_inf", source_with_inf,
          rework("y", lambda emit, value, _: emit("Max", value, np.array(-100, dtype=np.float32))), identity_on("y"),
          ("model: output 'y' is -100, not -inf",)),
    Fault("turn_inf", source_with_inf,
          rework("y", lambda emit, value, _: emit("Where", emit("IsInf", value), emit("Neg", value), value)),
          identity_on("y"),
          ("model: output 'y' is inf, not -inf",)),
    Fault("hide_nan", source_with_inf,
          rework("z", lambda emit, value, _: emit("Where", emit("IsNaN", value), np.array(0, np.float32), value)),
          rework("z", lambda emit, value, _: emit("Where", emit("IsNaN", value), value, value)),
          ("model: output 'z' is 0, not nan",)),
    Fault("widen_output", decoder_pair, cast("logits", ir.DataType.DOUBLE),
          cast("logits", ir.DataType.DOUBLE, back=True),
          ("decode: output 'logits' has type float64, not float32",), "decode"),
    Fault("narrow_integers", typed, cast("next", ir.DataType.INT32), cast("next", ir.DataType.INT32, back=True),
          ("model: output 'next' has type int32, not int64",)),
    Fault("transpose_output", decoder_pair, transpose([1, 0, 2]), transpose([1, 0, 2], [1, 0, 2]),
          ("prefill: output 'logits' has shape [2, 1, 50], not [1, 2, 50]",), "prefill"),
    Fault("unsqueeze_output", decoder_pair, unsqueeze, transpose([1, 0, 2], [1, 0, 2]),
          ("decode: output 'logits' has shape [1, 1, 1, 50], not [1, 1, 50]",), "decode"),
    Fault("swap_extremes", typed, swap_extremes, pass_through,
          ("model: output 'extreme' differs in 100.00% of its elements: ", "9223372036854775807")),
    Fault("off_by_one", typed, rework("next", lambda emit, value, _: emit("Add", value, np.array(1))),
          rework("next", lambda emit, value, _: emit("Add", value, np.array(0))),
          ("model: output 'next' differs in 100.00% of its elements",)),
    Fault("flip_flag", typed, negate("even", 1), negate("even", 2),
          ("model: output 'even' differs in 100.00% of its elements: ",)),
    Fault("change_string", typed, say("Odd"), say("odd"),
          ("model: output 'word' differs in ", "'Odd', not 'odd'")),
    Fault("relabel_opset", softmax(1), relabel(13), relabel(12), ("model: output 'y' is off by",)),
    Fault("relabel_opset_harmlessly", softmax(1), relabel(13), relabel(11), ("model: output 'y' is off by",)),
    Fault("ignore_mask", decoder_pair, ignore_mask(), ignore_mask(but_keep=True),
          ("prefill: output 'logits' is off by", "sample 'batch 3, length 7, padded'"), "prefill"),
    Fault("ignore_mask_with_past", decoder_pair, ignore_mask(), ignore_mask(but_keep=True),
          ("decode: output 'logits' is off by", "sample 'batch 3, length 1, past 7, padded'"), "decode"),
    Fault("stale_cache", decoder_pair, stale_cache(0), stale_cache(1),
          ("decode: output 'present.0.key' is off by",), "decode"),
    Fault("flip_arg_max", source_with_near_ties, nudge(1), nudge(0),
          ("model: output 'logits' has the same arg max in 0.00% of positions, limit 99.90% (top1)",),
          effects=CLOSE),
    Fault("turn_zeros", source_with_zeros, zero_sign("Neg"), zero_sign("Abs"),
          ("model: output 'y' differs in the sign of a zero; the step must be exact",), effects=EXACT),
    Fault("fix_the_batch", decoder_pair, fixed_reshape(1), fixed_reshape(-1),
          ("decode does not run on sample 'batch 3, length 1, past 7, padded': ", "Reshape"), "decode"),
)  # fmt: skip


@pytest.mark.parametrize(
    ("fault", "effect"), [(fault, effect) for fault in FAULTS for effect in fault.effects], ids=str
)
def test_a_planted_fault_stops_the_run_at_its_step_and_is_named(fault: Fault, effect: Effect) -> None:
    """The steps before and after it are harmless."""
    steps = [
        plant("one_before", pass_through),
        plant(fault.name, fault.wrong, effect, role=fault.role),
        plant("one_after", pass_through),
    ]
    with pytest.raises(Stopped) as caught:
        Pipeline(steps).run(fault.source())
    text = str(caught.value)
    assert text.startswith(f"step 2 ({fault.name}): "), text
    for part in fault.says:
        assert part in text
    assert "against the source" not in text
    assert caught.value.step is not None
    assert caught.value.step.number == 2


@pytest.mark.parametrize("fault", FAULTS, ids=str)
def test_its_clean_twin_passes(fault: Fault) -> None:
    effect = Effect.EXACT if Effect.EXACT in fault.effects else Effect.CLOSE
    result = Pipeline([plant(fault.name, fault.twin, effect, role=fault.role)]).run(fault.source())
    verdict = result.records[1].verdict
    assert verdict is not None
    assert verdict.is_accurate
    assert verdict.step is not None
    assert verdict.step.is_exact is (effect is Effect.EXACT)


def test_a_sign_of_zero_is_close() -> None:
    step = plant("turn_zeros", zero_sign("Neg"), Effect.CLOSE)
    verdict = Pipeline([step]).run(source_with_zeros()).records[1].verdict
    assert verdict is not None
    assert (verdict.is_accurate, verdict.step.is_exact, verdict.step.max_error) == (True, False, 0.0)  # type: ignore[union-attr]


@pytest.mark.parametrize("effect", BOTH, ids=str)
def test_an_error_at_the_limit_passes_and_over_it_fails(effect: Effect) -> None:
    step = plant(
        "add_little", where(IS_FILLED, 0.001), effect, role="decode", tolerance=Tolerance(max_error=1, p999_error=1)
    )
    if effect is Effect.CLOSE:
        verdict = Pipeline([step]).run(decoder_pair()).records[1].verdict
        assert verdict is not None
        assert not verdict.step.is_exact  # type: ignore[union-attr]
        return
    with pytest.raises(Stopped, match="must be exact"):
        Pipeline([step]).run(decoder_pair())


class SayNothingChanged(ModelPass):
    """Changes the model and does not say so."""

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        pass_through(model)
        return Change(0, "")


def test_a_pass_that_says_it_changed_nothing_and_did_is_stopped() -> None:
    with pytest.raises(Stopped, match=r"step 2 \(say_nothing_changed\): says that it changed nothing") as caught:
        Pipeline([plant("one_before", pass_through), SayNothingChanged()]).run(generic())
    assert isinstance(caught.value.__cause__, StepFailed)


class MakeCopy(BundlePass):
    """Makes a second model of one."""

    of: str = reads("model", "The model.")
    made: str = makes("copy", "Its copy.")
    claimed: tuple[str, ...] = ()

    def transform(self, bundle: Bundle, context: object) -> Change:
        bundle.models[self.made] = bundle[self.of].clone()
        return Change(1, "made a copy")

    def claims(self, before: Bundle, after: Bundle) -> list[Claim]:
        same = Claim.same(self.of)
        return [same, *(Claim(same.reference, Claim.same(role).candidate) for role in self.claimed)]


def test_a_pass_that_claims_nothing_about_what_it_made_is_stopped() -> None:
    with pytest.raises(Stopped, match=r"step 1 \(make_copy\): nothing is claimed about the model 'copy'"):
        Pipeline([MakeCopy()]).run(generic())


def test_a_claim_on_a_model_that_is_not_there_is_an_error() -> None:
    with pytest.raises(Stopped, match="runs 'copi', which the bundle does not have"):
        Pipeline([MakeCopy(claimed=("copy", "copi"))]).run(generic())


def test_a_made_model_is_judged_by_what_it_was_made_of_in_later_steps_too() -> None:
    wrong = plant(
        "scale_one", rework("y", lambda emit, value, _: emit("Mul", value, np.array(2, np.float32))), role="copy"
    )
    with pytest.raises(Stopped, match=r"step 2 \(scale_one\): copy as model: output 'y' is off by"):
        Pipeline([MakeCopy(claimed=("copy",)), wrong]).run(generic())


class ClaimTheLoop(BundlePass):
    """Claims of two models only that they generate the same."""

    scale: float = 1.0
    of: str = reads("decode", "The decoder with a cache.")

    def transform(self, bundle: Bundle, context: object) -> Change:
        factor = np.array(self.scale, dtype=np.float32)
        rework("logits", lambda emit, value, _: emit("Mul", value, factor))(bundle["decode"])
        return Change(1, "scaled the logits")

    def claims(self, before: Bundle, after: Bundle) -> list[Claim]:
        loop = HostLoop("greedy", ("prefill", "decode"))
        return [Claim(loop, loop)]


def test_a_loop_that_generates_the_same_tokens_passes_though_its_tensors_differ() -> None:
    records = Pipeline([ClaimTheLoop(scale=2.0)]).run(decoder_pair()).records
    verdict = records[1].verdict
    assert verdict is not None
    assert list(verdict.outputs) == ["greedy over prefill + decode.sequences"]
    assert str(verdict.coverage["greedy over prefill + decode"]).startswith("5 samples")


def test_a_loop_that_generates_other_tokens_is_named() -> None:
    with pytest.raises(Stopped, match=r"greedy over prefill \+ decode: output 'sequences'") as caught:
        Pipeline([ClaimTheLoop(scale=-1.0)]).run(decoder_pair())
    assert isinstance(caught.value.__cause__, Inaccurate)


def test_nothing_is_printed_and_no_session_is_left_behind(capfd: pytest.CaptureFixture[str]) -> None:
    result: Result = Pipeline([plant("one", pass_through)]).run(decoder_pair())
    del result
    gc.collect()
    assert capfd.readouterr() == ("", "")
