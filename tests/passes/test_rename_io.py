"""`rename_io`: what is renamed and cast, what gives way, what is refused, and that claims follow the names."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from onnx_ir.passes import Sequential
from pydantic import ValidationError
from rewriting import assert_leaves_alone, assert_rewrites, assert_same_numbers, assert_text, rewritten, run_pass

from passes.dedup_weights import DedupWeights
from passes.rename_io import RenameIo
from surgery import Check, Pipeline
from surgery.accuracy.judge import Judge
from surgery.claims import Claim, HostLoop, Measure
from surgery.contract import Bundle, Change, Context, Effect, Tolerance
from surgery.errors import Refused, SurgeryError
from surgery.interfaces import recognise
from surgery.recipe import Source
from surgery.runtime.prompts import answer
from surgery.sources import find_source
from surgery.storage import open_model
from surgery.text import parse, to_text

FOREIGN = Path(__file__).parent.parent / "sources" / "foreign"
ROOT = Path(__file__).parent.parent.parent
SMALL = Check(batches=(1, 2), lengths=(1, 5), past=(0, 1, 5))


def opened(name: str, scratch: Path, names: str = "canonical") -> Bundle:
    source = Source(path=str(FOREIGN / name), names=names)  # type: ignore[arg-type]
    return find_source(source, Path()).open(scratch, lambda sentence: None).bundle


def interface(model: ir.Model) -> list[str]:
    return [value.name or "" for value in (*model.graph.inputs, *model.graph.outputs)]


# Names


def test_an_exact_name_and_a_pattern() -> None:
    assert_rewrites(
        RenameIo(names={"ids": "input_ids", "kv_*_in_*": "past_*_*"}),
        """
        g (int64[2] ids, float[2] kv_0_in_k, float[2] kv_11_in_v) => (float[2] y) {
            h = Add(kv_0_in_k, kv_11_in_v)
            c = Cast <to = 1> (ids)
            y = Add(h, c)
        }
        """,
        """
        g (int64[2] input_ids, float[2] past_0_k, float[2] past_11_v) => (float[2] y) {
            h = Add(past_0_k, past_11_v)
            c = Cast <to = 1> (input_ids)
            y = Add(h, c)
        }
        """,
    )


def test_an_exact_name_goes_before_a_pattern_and_the_first_pattern_before_the_second() -> None:
    model = parse("g (float[2] a_1, float[2] a_2, float[2] a) => (float[2] y) { y = Sum(a_1, a_2, a) }")
    after, change = run_pass(RenameIo(names={"a_*": "first_*", "a*": "second*", "a_1": "exact"}), model)
    assert interface(after["model"]) == ["exact", "first_2", "second", "y"]
    assert change == Change(3, "renamed 3 of 4 inputs and outputs")


def test_a_star_is_the_only_sign_and_brackets_and_dots_are_themselves() -> None:
    model = parse("g (float[2] a_b, float[2] axb) => (float[2] y) { y = Add(a_b, axb) }")
    model.graph.inputs[0].name = "a.[0]"
    after, _ = run_pass(RenameIo(names={"a.[*]": "z_*"}), model)
    assert interface(after["model"]) == ["z_0", "axb", "y"]


def test_names_of_weights_and_of_everything_inside_stay() -> None:
    assert_rewrites(
        RenameIo(names={"x": "z"}),
        """
        g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> {
            x_1 = Mul(x, w)
            y = Add(x_1, x)
        }
        """,
        """
        g (float[2] z) => (float[2] y) <float[2] w = {1, 2}> {
            x_1 = Mul(z, w)
            y = Add(x_1, z)
        }
        """,
    )


def test_an_input_that_branches_use_and_a_captured_weight() -> None:
    assert_rewrites(
        RenameIo(names={"x": "u", "y": "w_1"}),
        """
        g (float[2] x, bool c) => (float[2] y) <float[2] w = {1, 2}> {
            y = If(c) <then_branch = t () => (float[2] u) {
                u = Mul(x, w)
            }, else_branch = e () => (float[2] w_1) {
                w_1 = Sub(w, x)
            }>
        }
        """,
        """
        g (float[2] u, bool c) => (float[2] w_1) <float[2] w = {1, 2}> {
            w_1 = If(c) <then_branch = t () => (float[2] u_1) {
                u_1 = Mul(u, w)
            }, else_branch = e () => (float[2] w_1_1) {
                w_1_1 = Sub(w, u)
            }>
        }
        """,
    )


def test_an_output_that_another_node_uses() -> None:
    assert_rewrites(
        RenameIo(names={"h": "hidden"}),
        "g (float[2] x) => (float[2] h, float[2] y) { h = Neg(x) y = Abs(h) }",
        "g (float[2] x) => (float[2] hidden, float[2] y) { hidden = Neg(x) y = Abs(hidden) }",
    )


def test_an_input_that_is_an_output() -> None:
    assert_rewrites(
        RenameIo(names={"x": "z"}),
        "g (float[2] x) => (float[2] x, float[2] y) { y = Neg(x) }",
        "g (float[2] z) => (float[2] z, float[2] y) { y = Neg(z) }",
    )


def test_a_weight_that_is_an_output_or_may_be_overridden() -> None:
    model = parse(
        """
        g (float[2] x, float[2] a) => (float[2] y, float[2] w) <float[2] a = {1, 2}, float[2] w = {3, 4}> {
            y = Mul(x, a)
        }
        """
    )
    after = rewritten(RenameIo(names={"a": "scale", "w": "weight"}), model)
    assert interface(after) == ["x", "scale", "y", "weight"]
    assert set(after.graph.initializers) == {"scale", "weight"}


def test_two_models_may_call_each_others_names_their_own() -> None:
    there = parse("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    back = parse("g (float[2] y) => (float[2] x) { x = Neg(y) }")
    bundle = Bundle({"a": there, "b": back})
    pass_ = RenameIo(names={"x": "y", "y": "x"})
    after = bundle.clone()
    pass_.apply(after, lambda role: Context(role=role))
    assert interface(after["a"]) == ["y", "x"]
    assert interface(after["b"]) == ["x", "y"]
    assert_same_numbers(pass_, bundle, after)


def test_a_name_need_be_in_one_of_the_models_only() -> None:
    one = parse("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    other = parse("g (float[2] p) => (float[2] q) { q = Neg(p) }")
    bundle = Bundle({"a": one, "b": other})
    outcome = RenameIo(names={"p": "past"}).apply(bundle, lambda role: Context(role=role))
    assert outcome.change == Change(1, "b: renamed 1 of 2 inputs and outputs")
    assert interface(bundle["a"]) == ["x", "y"]


def test_models_that_are_not_named_are_left_alone_and_claim_to_be_the_same() -> None:
    one = parse("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    bundle = Bundle({"a": one, "b": one.clone()})
    pass_ = RenameIo(models=("b",), names={"x": "z"})
    after = bundle.clone()
    pass_.apply(after, lambda role: Context(role=role))
    assert interface(after["a"]) == ["x", "y"]
    assert [claim.is_same for claim in pass_.claims(bundle, after)] == [True, False]


def test_a_name_that_is_in_none_is_refused_with_the_nearest() -> None:
    model = parse("g (int64[2] input_ids) => (int64[2] y) { y = Neg(input_ids) }")
    with pytest.raises(Refused, match="no input or output is called 'input_idz'; did you mean 'input_ids'"):
        run_pass(RenameIo(names={"input_idz": "ids"}), model)
    with pytest.raises(Refused, match=r"no input or output is called 'past_\*'"):
        run_pass(RenameIo(names={"past_*": "p_*"}), model)


@pytest.mark.parametrize(("names", "said"), [({"x": "w"}, "a weight"), ({"x": "y"}, "another input or output")])
def test_a_name_that_is_taken_is_refused(names: dict[str, str], said: str) -> None:
    model = parse("g (float[2] x) => (float[2] y) <float[2] w = {1, 2}> { y = Mul(x, w) }")
    before = to_text(model)
    with pytest.raises(Refused, match=said):
        RenameIo(names=names).rewrite(model, Context())
    assert to_text(model) == before


@pytest.mark.parametrize(
    "options",
    [{}, {"names": {"a*": "b"}}, {"names": {"": "b"}}, {"names": {"a": ""}}, {"to": "nobody"}, {"integers": "int16"}],
)
def test_options_that_say_nothing_are_refused(options: dict[str, object]) -> None:
    with pytest.raises(ValidationError):
        RenameIo(**options)  # type: ignore[arg-type]


def test_it_runs_inside_a_sequence_of_onnx_ir() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    assert Sequential(RenameIo(names={"x": "z"}))(model).modified
    assert interface(model) == ["z", "y"]


# Integers


def test_integers_are_taken_and_given_in_32_bits() -> None:
    assert_rewrites(
        RenameIo(integers="int32"),
        """
        g (int64[2] ids, float[2] x, bool[2] m) => (int64[2] n, float[2] y, bool[2] k) {
            n = Neg(ids)
            y = Neg(x)
            k = Not(m)
        }
        """,
        """
        g (int32[2] ids, float[2] x, bool[2] m) => (int32[2] n, float[2] y, bool[2] k) {
            ids_int64 = Cast <to = 7> (ids)
            n_int64 = Neg(ids_int64)
            y = Neg(x)
            k = Not(m)
            n = Cast <to = 6> (n_int64)
        }
        """,
    )


def test_and_in_64_again() -> None:
    assert_rewrites(
        RenameIo(integers="int64"),
        "g (int32[2] ids) => (int32[2] n) { n = Neg(ids) }",
        """
        g (int64[2] ids) => (int64[2] n) {
            ids_int32 = Cast <to = 6> (ids)
            n_int32 = Neg(ids_int32)
            n = Cast <to = 7> (n_int32)
        }
        """,
    )


def test_integers_that_branches_and_several_nodes_use_are_cast_once() -> None:
    assert_rewrites(
        RenameIo(integers="int32"),
        """
        g (int64[2] ids, bool c) => (int64[2] y, int64[2] z) {
            y = If(c) <then_branch = t () => (int64[2] u) {
                u = Neg(ids)
            }, else_branch = e () => (int64[2] v) {
                v = Abs(ids)
            }>
            z = Add(y, ids)
        }
        """,
        """
        g (int32[2] ids, bool c) => (int32[2] y, int32[2] z) {
            ids_int64 = Cast <to = 7> (ids)
            y_int64 = If(c) <then_branch = t () => (int64[2] u) {
                u = Neg(ids_int64)
            }, else_branch = e () => (int64[2] v) {
                v = Abs(ids_int64)
            }>
            z_int64 = Add(y_int64, ids_int64)
            y = Cast <to = 6> (y_int64)
            z = Cast <to = 6> (z_int64)
        }
        """,
    )


def test_an_integer_that_goes_straight_through_needs_no_cast() -> None:
    assert_rewrites(
        RenameIo(integers="int32"),
        "g (int64[2] ids, float[2] x) => (int64[2] ids, float[2] y) { y = Neg(x) }",
        "g (int32[2] ids, float[2] x) => (int32[2] ids, float[2] y) { y = Neg(x) }",
    )


def test_a_graph_without_nodes() -> None:
    after = rewritten_alone(RenameIo(integers="int32"), "g (int64[2] ids) => (int64[2] ids) { }")
    assert_text(after, "g (int32[2] ids) => (int32[2] ids) { }")


def rewritten_alone(pass_: RenameIo, text: str) -> ir.Model:
    bundle, _ = run_pass(pass_, parse(text))
    return bundle["model"]


@pytest.mark.parametrize(
    "text",
    [
        "g (float[2] x) => (float[2] y) { y = Neg(x) }",
        "g (int32[2] x) => (int32[2] y) { y = Neg(x) }",
        "g (uint8[2] x) => (uint8[2] y) { y = Identity(x) }",
        # A caller may leave this input out, and the model's own value has 64 bits.
        "g (float[2] x, int64[1] s) => (float[2] y) <int64[1] s = {2}> { y = Reshape(x, s) }",
    ],
)
def test_what_is_no_64_bit_integer_that_is_fed_is_left_alone(text: str) -> None:
    assert_leaves_alone(RenameIo(integers="int32"), text)


def test_a_name_for_a_cast_that_is_taken_is_another() -> None:
    after = rewritten_alone(
        RenameIo(integers="int32"), "g (int64[2] a) => (float[2] y) { a_int64 = Neg(a) y = Cast <to = 1> (a_int64) }"
    )
    assert_text(
        after,
        """
        g (int32[2] a) => (float[2] y) {
            a_int64_1 = Cast <to = 7> (a)
            a_int64 = Neg(a_int64_1)
            y = Cast <to = 1> (a_int64)
        }
        """,
    )


@pytest.mark.parametrize("text", ["y = Identity(x)", "z = Mul(x, x) y = Sub(z, z)"])
def test_an_integer_beyond_32_bits_stops_the_check(text: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.array([1, 2**31], dtype=np.int64))
    bundle = Bundle({"model": parse(f"g (int64[n] x) => (int64[n] y) {{ {text} }}")})
    check = Check(data=tmp_path / "data.npz")
    with pytest.raises(SurgeryError, match="input 'x': it holds 2147483648, which is no int32"):
        Pipeline([RenameIo(integers="int32")], check).run(bundle)


def test_an_integer_that_comes_out_beyond_32_bits_stops_the_check(tmp_path: Path) -> None:
    np.savez(tmp_path / "data.npz", x=np.array([1, 2**20], dtype=np.int64))
    bundle = Bundle({"model": parse("g (int64[n] x) => (int64[n] y) { y = Mul(x, x) }")})
    check = Check(data=tmp_path / "data.npz")
    with pytest.raises(SurgeryError, match="output 'y': it holds 1099511627776, which is no int32"):
        Pipeline([RenameIo(integers="int32")], check).run(bundle)


# Whole models


@pytest.mark.parametrize("to", ["transformers.exporters", "onnxruntime-genai"])
@pytest.mark.parametrize("name", ["gpt2_exporters", "t5_exporters"])
def test_there_and_back_is_exact_and_the_names_are_what_they_were(name: str, to: str, tmp_path: Path) -> None:
    bundle = opened(name, tmp_path)
    steps = [RenameIo(to=to, integers="int32"), DedupWeights(), RenameIo(to="optimum", integers="int64")]  # type: ignore[arg-type]
    with Pipeline(steps, SMALL).run(bundle) as result:
        for record in result.records[1:]:
            assert record.verdict is not None
            assert record.verdict.step is not None
            assert record.verdict.step.is_exact
            assert record.verdict.source is not None
            assert record.verdict.source.is_exact
            assert "past 0, 1, 5" in str(record.verdict.coverage["decode"])
        for role, model in result.bundle.models.items():
            assert interface(model) == interface(bundle[role])
            assert [value.dtype for value in model.graph.inputs] == [value.dtype for value in bundle[role].graph.inputs]


def test_the_names_of_transformers_exporters_are_those_that_it_gives_itself(tmp_path: Path) -> None:
    bundle = opened("t5_exporters", tmp_path)
    RenameIo(to="transformers.exporters").apply(bundle, lambda role: Context(role=role))
    for role in ("prefill", "decode"):
        assert interface(bundle[role]) == interface(open_model(FOREIGN / "t5_exporters" / f"{role}.onnx"))


@pytest.mark.parametrize("name", ["adder", "sorter"])
@pytest.mark.long
def test_a_trained_model_still_answers_by_other_names_and_in_32_bits(name: str) -> None:
    prompt, text = {"adder": ("27+58=", "85"), "sorter": ("3142", "1234")}[name]
    check = Check(batches=(1, 2), prompts=(prompt,))
    there = RenameIo(to="transformers.exporters", integers="int32")
    for steps in ([there, DedupWeights()], [there, DedupWeights(), RenameIo(to="optimum", integers="int64")]):
        with Pipeline(steps, check).run(ROOT / "fixtures" / name) as result:
            assert result.answers[0].text == text
            assert all(record.verdict and record.verdict.step.is_exact for record in result.records[1:])  # type: ignore[union-attr]
            found = recognise(result.bundle["decode"])
            assert found is not None
            assert found.naming == ("optimum" if len(steps) == 3 else "transformers.exporters")


def test_prompts_are_continued_alike_under_any_known_names(tmp_path: Path) -> None:
    given = opened("gpt2_exporters", tmp_path)
    bundle = Bundle(given.models, files=given.files)  # without an id that would end the text at once
    renamed = bundle.clone()
    RenameIo(to="transformers.exporters", integers="int32").apply(renamed, lambda role: Context(role=role))
    with closing(Judge(bundle, SMALL)) as judge:
        first, second = (answer(each, ["=5", "1+2="], 6, judge.run) for each in (bundle, renamed))
    assert first == second
    assert len(set(first[0].tokens)) > 1


def test_prompts_say_that_they_cannot_go_by_names_of_ones_own(tmp_path: Path) -> None:
    bundle = opened("gpt2_exporters", tmp_path)
    RenameIo(names={"present.*": "kv.*", "past_key_values.*": "old.*"}).apply(bundle, lambda role: Context(role=role))
    with pytest.raises(Refused, match="'prefill' have names that no generation loop knows") as caught:
        answer(bundle, ["1+2="], 6, lambda model, feeds: {})
    assert "rename_io" in caught.value.hint


def test_what_is_known_of_a_host_loop_outlives_a_renaming(tmp_path: Path) -> None:
    """A later pass, such as one that wraps a loop, may still claim to do what the host loop over the source did."""
    bundle = opened("gpt2_exporters", tmp_path)
    pass_ = RenameIo(to="transformers.exporters", integers="int32")
    after = bundle.clone()
    pass_.apply(after, lambda role: Context(role=role))
    loop = HostLoop("greedy", ("prefill", "decode"))
    with closing(Judge(bundle, SMALL)) as judge:
        judge.judge_source()
        claims = pass_.claims(bundle, after)
        assert judge.judge(bundle, after, claims, Effect.EXACT, Tolerance()).failures == ()
        judge.accept(claims, Effect.EXACT, Tolerance())
        loops = [*(Claim.same(role) for role in after.models), Claim(loop, loop, measure=Measure.TOKENS)]
        verdict = judge.judge(after, after.clone(), loops, Effect.EXACT, Tolerance())
        assert verdict.failures == ()


def test_nothing_recognised_is_refused() -> None:
    model = parse("g (float[2] x) => (float[2] y) { y = Neg(x) }")
    with pytest.raises(Refused, match="no model is recognised"):
        run_pass(RenameIo(to="optimum"), model)


def test_what_has_the_names_already_is_left_alone(tmp_path: Path) -> None:
    bundle = opened("gpt2_exporters", tmp_path)
    before = bundle.identities()
    assert RenameIo(to="optimum").apply(bundle, lambda role: Context(role=role)).change.count == 0
    assert bundle.identities() == before
