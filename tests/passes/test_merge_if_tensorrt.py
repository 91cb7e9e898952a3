"""The rules of TensorRT's parser for `If`: what breaks them is named, and `for_tensorrt` keeps them or refuses."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir
import pytest
from merging import branches, merge, run
from models import decoder_pair
from rewriting import as_model

from passes.merge_if import MergeIf
from passes.merge_if.tensorrt import find_violations
from surgery import Pipeline
from surgery.contract import Bundle, Context
from surgery.errors import Refused

CHOICE = """
g (float[n] x, {condition} c) => (float[?] y) {{
    y = If (c) <
        then_branch = yes () => ({first} {a}) {{ {do_a} }},
        else_branch = no () => ({second} {b}) {{ {do_b} }}
    >
}}
"""
FINE = {
    "condition": "bool[1]",
    "first": "float[n]",
    "a": "t",
    "do_a": "t = Neg(x)",
    "second": "float[n]",
    "b": "e",
    "do_b": "e = Abs(x)",
}


def choice(**changed: str) -> ir.Model:
    text = CHOICE.format(**{**FINE, **changed})
    model = as_model(text.replace("float[?]", "float[n]"))
    model.graph[0].name = "pick"
    return model


def test_a_choice_that_keeps_the_rules_has_no_violations():
    assert find_violations(choice()) == []
    assert find_violations(choice(condition="bool")) == []
    assert find_violations(as_model("g (float[n] x) => (float[n] y) { y = Neg(x) }")) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"condition": "bool[k]"}, ["If 'pick': its condition is not known to have one element"]),
        ({"condition": "bool[2]"}, ["If 'pick': its condition is not known to have one element"]),
        ({"b": "t", "do_b": "t = Abs(x)"}, ["If 'pick', output 'y': both branches call it 't'"]),
        (
            {"second": "float[1, n]", "do_b": "z = Constant <value = int64[1] {0}> () e = Unsqueeze(x, z)"},
            ["If 'pick', output 'y': it has 1 axes in one branch and 2 in the other"],
        ),
        (
            {"first": "float[2]", "second": "float[3]"},
            ["If 'pick', output 'y': axis 0 is 2 in one branch and 3 in the other"],
        ),
        (
            {"second": "float16[n]", "do_b": "e = Cast <to = 10> (x)"},
            ["If 'pick', output 'y': it is float in one branch and float16 in the other"],
        ),
        (
            {
                "first": "double[n]",
                "do_a": "t = Cast <to = 11> (x)",
                "second": "double[n]",
                "do_b": "e = Cast <to = 11> (x)",
            },
            ["If 'pick', output 'y': an If gives no double"],
        ),
    ],
)
def test_a_rule_that_is_broken_is_named_with_the_node_and_the_output(changed: dict[str, str], said: list[str]):
    assert find_violations(choice(**changed)) == said


def test_an_output_of_unknown_rank_is_named():
    model = choice()
    branches(model)["then_branch"].outputs[0].shape = None
    assert find_violations(model) == ["If 'pick', output 'y': its rank is not known in both branches"]


def test_an_if_inside_a_loop_inside_an_if_is_looked_at():
    model = as_model(
        """
        g (float[n] x, bool c, int64 count) => (float[n] y) {
            on = Constant <value = bool {1}> ()
            y = Loop (count, on, x) <
                body = turn (int64 i, bool go, float[n] before) => (bool stays, float[n] after) {
                    stays = Identity(go)
                    after = If (go) <
                        then_branch = yes () => (float[n] t) { t = Neg(before) },
                        else_branch = no () => (float[n] t) { t = Abs(before) }
                    >
                }
            >
        }
        """
    )
    assert find_violations(model) == ["the If that gives 'after', output 'after': both branches call it 't'"]


def test_graphs_that_are_nested_too_deep_are_named():
    text = "t = Neg(x)"
    for depth in range(25):
        inner, text = text, ""
        text = (
            f"t = If (c) <then_branch = y{depth} () => (float[n] t{depth}) {{ {inner} t{depth} = Neg(t) }}, "
            f"else_branch = n{depth} () => (float[n] e{depth}) {{ e{depth} = Abs(x) }}>"
        )
        text = text.replace(" t = ", f" u{depth} = ").replace("Neg(t)", f"Neg(u{depth})")
    model = as_model(f"g (float[n] x, bool c) => (float[n] t) {{ {text} }}")
    assert "graphs are nested more than 24 deep" in find_violations(model)


# The option


def test_what_merge_if_makes_of_a_decoder_pair_keeps_the_rules_either_way():
    for pass_ in (MergeIf(), MergeIf(for_tensorrt=True)):
        result = Pipeline([pass_]).run(decoder_pair())
        assert find_violations(result.bundle["decoder"]) == []
        assert str(result.records[1].verdict.step) == "exact"


CROSSED = """
<ir_version: 8, opset_import: ["" : 18]>
{name} (int64[b, s] input_ids, float[b, e, 4] encoder_hidden_states{past}) => (
    float[b, s, 4] logits,
    float[b, 2, {total}, 4] present__0__decoder__key,
    float[b, 2, {total}, 4] present__0__decoder__value
    {crossed}
) {{
    ids = Cast <to = 1> (input_ids)
    last = Constant <value = int64[1] {{-1}}> ()
    wide = Unsqueeze(ids, last)
    sum = ReduceSum <keepdims = 0> (encoder_hidden_states)
    one = Constant <value = float[1, 1, 4] {{1, 2, 3, 4}}> ()
    scaled = Mul(wide, one)
    logits = Add(scaled, sum)
    heads = Constant <value = int64[1] {{1}}> ()
    tall = Unsqueeze(scaled, heads)
    new = Concat <axis = 1> (tall, tall)
    {body}
}}
"""


def crossed_pair() -> dict[str, ir.Model]:
    """A decoder that attends to an encoder: only the prefill gives the encoder's keys and values."""
    parts = ("key", "value")
    past = "".join(f", float[b, 2, p, 4] past_key_values__0__decoder__{part}" for part in parts)
    past += "".join(f", float[b, 2, e, 4] past_key_values__0__encoder__{part}" for part in parts)
    given = "".join(f", float[b, 2, e, 4] present__0__encoder__{part}" for part in parts)
    texts = {
        "decode": CROSSED.format(
            name="decode",
            past=past,
            total='"p + s"',
            crossed="",
            body=" ".join(
                f"present__0__decoder__{part} = Concat <axis = 2> (past_key_values__0__decoder__{part}, new) "
                f"use_{part} = Neg(past_key_values__0__encoder__{part})"
                for part in parts
            ),
        ),
        "prefill": CROSSED.format(
            name="prefill",
            past="",
            total="s",
            crossed=given,
            body="up = Unsqueeze(encoder_hidden_states, heads) states = Concat <axis = 1> (up, up) "
            + " ".join(
                f"present__0__decoder__{part} = Identity(new) present__0__encoder__{part} = {op}(states)"
                for part, op in zip(parts, ("Neg", "Abs"), strict=True)
            ),
        ),
    }
    models = {role: as_model(text) for role, text in texts.items()}
    for model in models.values():
        for value in (*model.graph.inputs, *(value for node in model.graph for value in node.outputs)):
            value.name = str(value.name).replace("__", ".")
    return models


def test_an_encoders_keys_are_handed_on_where_they_would_be_empty():
    pair = crossed_pair()
    plain, _ = merge(pair["decode"].clone(), pair["prefill"].clone())
    made, _ = merge(pair["decode"].clone(), pair["prefill"].clone(), for_tensorrt=True)
    random = np.random.default_rng(0)
    feeds = {
        "input_ids": np.array([[3]]),
        "encoder_hidden_states": random.standard_normal((1, 5, 4)).astype(np.float32),
        **{
            f"past_key_values.0.{of}.{part}": random.standard_normal((1, 2, length, 4)).astype(np.float32)
            for of, length in (("decoder", 2), ("encoder", 5))
            for part in ("key", "value")
        },
        "use_cache_branch": np.array([True]),
    }
    assert run(plain, **feeds)["present.0.encoder.key"].size == 0
    handed_on = run(made, **feeds)["present.0.encoder.key"]
    np.testing.assert_array_equal(handed_on, feeds["past_key_values.0.encoder.key"])
    assert find_violations(made) == []
    assert str(made.graph.outputs[3].shape) == "[b,2,e,4]"


@pytest.mark.parametrize(
    ("when_true", "when_false", "said"),
    [
        (
            "decode (float[n] x) => (float[n] y) { y = Neg(x) }",
            "prefill (float[n] x) => (float[n] y, float[n] more) { y = Abs(x) more = Neg(x) }",
            "the output 'more' is given by 'prefill' only, and TensorRT wants one of the same rank from both",
        ),
        (
            "decode (float[2] x) => (float[2] y) { y = Neg(x) }",
            "prefill (float[3] x) => (float[3] y) { y = Abs(x) }",
            "TensorRT would not take it: If 'decoder/If', output 'y': axis 0 is 2 in one branch and 3 in the other",
        ),
        (
            "decode (int8[n] x) => (int8[n] y) { y = Neg(x) }",
            "prefill (int8[n] x) => (int8[n] y) { y = Abs(x) }",
            "an If gives no int8",
        ),
    ],
)
def test_models_that_cannot_keep_the_rules_are_refused_with_the_rule(when_true: str, when_false: str, said: str):
    pair = {"decode": as_model(when_true), "prefill": as_model(when_false)}
    with pytest.raises(Refused, match=said):
        MergeIf(for_tensorrt=True).apply(Bundle(pair).clone(), lambda role: Context(role=role))
    MergeIf().apply(Bundle(pair).clone(), lambda role: Context(role=role))
