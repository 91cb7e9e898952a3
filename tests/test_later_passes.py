"""Passes to come need no change to the engine: a toy merge behind an `If` is claimed, fed and followed as any other."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import onnx
import onnx.compose
import onnx.helper
import onnx_ir as ir
import pytest
from models import decoder_pair, generic

from passes.dedup_weights import DedupWeights
from surgery import Bundle, BundlePass, Change, Claim, Context, HostLoop, ModelPass, Pipeline, Program
from surgery.claims import Fill, Measure
from surgery.contract import makes, takes
from surgery.errors import SurgeryError

EMPTY = Fill(0, "float32", (("input_ids", 0), 2, 0, 4))
PAST = ("past_key_values.0.key", "past_key_values.0.value")


class Merge(BundlePass):
    """Join prefill and decode behind an `If`."""

    prefill: str = takes("prefill", "The branch without a cache.")
    decode: str = takes("decode", "The branch with a cache.")
    merged: str = makes("decoder", "What it makes.")
    is_wrong: bool = False

    def transform(self, bundle: Bundle, context: Callable[[str], Context]) -> Change:
        with_cache = ir.to_proto(bundle[self.decode])
        branches = [_branch(bundle[role], f"{role}/") for role in (self.decode, self.prefill)]
        if self.is_wrong:
            branches.reverse()
        outputs = [_open(value) for value in with_cache.graph.output]
        inputs = [_open(value) for value in with_cache.graph.input]
        flag = onnx.helper.make_tensor_value_info("use_cache_branch", onnx.TensorProto.BOOL, [1])
        names = [value.name for value in outputs]
        node = onnx.helper.make_node(
            "If", [flag.name], names, then_branch=branches[0][0], else_branch=branches[1][0], name="merged"
        )
        weights = [tensor for _, tensors in branches for tensor in tensors]
        graph = onnx.helper.make_graph([node], "merged", [*inputs, flag], outputs, weights)
        model = onnx.helper.make_model(graph, opset_imports=with_cache.opset_import, ir_version=with_cache.ir_version)
        bundle.models[self.merged] = ir.from_proto(model)
        return Change(1, "merged 2 models")

    def claims(self, before: Bundle, after: Bundle) -> Sequence[Claim]:
        without = {"use_cache_branch": Fill(False, "bool", (1,)), **dict.fromkeys(PAST, EMPTY)}
        return [
            Claim(Program(self.prefill), Program(self.merged), inputs=without),
            Claim(Program(self.decode), Program(self.merged), inputs={"use_cache_branch": Fill(True, "bool", (1,))}),
        ]


def _branch(model: ir.Model, prefix: str) -> tuple[onnx.GraphProto, list[onnx.TensorProto]]:
    """Return a model as a branch, and its weights for the outer graph."""
    graph = onnx.compose.add_prefix_graph(ir.to_proto(model).graph, prefix)
    captured = [
        onnx.helper.make_node("Identity", [value.name.removeprefix(prefix)], [value.name], name=f"take/{value.name}")
        for value in graph.input
    ]
    return onnx.helper.make_graph([*captured, *graph.node], prefix, [], list(graph.output)), list(graph.initializer)


def _open(value: onnx.ValueInfoProto) -> onnx.ValueInfoProto:
    """Return an interface value whose axes but the batch promise nothing: the branches differ in them."""
    tensor = value.type.tensor_type
    sizes = [dim.dim_value if dim.dim_value > 1 else None for dim in tensor.shape.dim]
    return onnx.helper.make_tensor_value_info(value.name, tensor.elem_type, sizes)


class WriteNote(ModelPass):
    """Write a note into each model, after a look at its feeds."""

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        assert list(context.feeds(context.role)), "feeds reach a model that a pass has made"
        model.metadata_props["seen"] = "yes"
        return Change(1, "wrote 1 note")


class ClaimTokens(ModelPass):
    """Claim that greedy generation over both decoders still gives the same tokens."""

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        model.metadata_props["claimed"] = model.metadata_props.get("claimed", "") + "!"
        return Change(1, "wrote 1 note")

    def claims(self, before: Bundle, after: Bundle) -> Sequence[Claim]:
        loop = HostLoop("greedy", ("prefill", "decode"))
        return [*super().claims(before, after), Claim(loop, loop, measure=Measure.TOKENS)]


def test_a_merged_model_is_fed_through_its_claims_and_followed_to_the_source() -> None:
    bundle = decoder_pair()
    result = Pipeline([Merge(), DedupWeights(), WriteNote()]).run(bundle)
    assert list(result.bundle.models) == ["decoder"]
    for record in result.records[1:]:
        assert record.verdict is not None
        assert str(record.verdict.step) == str(record.verdict.source) == "exact"
    coverage = result.records[3].verdict.coverage  # type: ignore[union-attr]
    assert set(coverage) == {"decoder as prefill", "decoder as decode"}
    assert {"0", "1", "7", "99"} <= coverage["decoder as decode"].traits["past"]
    assert "shared" in result.records[2].change.summary


def test_branches_that_are_mixed_up_are_caught() -> None:
    with pytest.raises(SurgeryError, match=r"step 1 \(merge\).*decoder"):
        Pipeline([Merge(is_wrong=True)]).run(decoder_pair())


def test_a_model_that_a_pass_does_not_speak_of_is_still_checked() -> None:
    bundle = decoder_pair()
    bundle.models["model"] = generic()["model"]
    result = Pipeline([Merge(), WriteNote()]).run(bundle)
    assert set(result.bundle.models) == {"model", "decoder"}
    assert set(result.records[1].verdict.coverage) == {  # type: ignore[union-attr]
        "model",
        "decoder as prefill",
        "decoder as decode",
    }


def test_what_is_known_of_a_host_loop_outlives_steps_that_do_not_speak_of_it() -> None:
    steps = [ClaimTokens(), WriteNote(), ClaimTokens()]
    records = Pipeline(steps).run(decoder_pair()).records
    assert all("greedy over prefill + decode" in record.verdict.coverage for record in (records[1], records[3]))  # type: ignore[union-attr]
