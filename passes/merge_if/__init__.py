"""Two models behind one `If`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from passes.merge_if.hoisting import hoist_common
from passes.merge_if.interface import Interface, branch_claim
from passes.merge_if.joining import join
from passes.merge_if.opsets import level_opsets, refuse_ungiven
from passes.merge_if.tensorrt import find_stand_ins, find_violations
from surgery.claims import Fill, Measure
from surgery.contract import Bundle, BundlePass, Change, Claim, Context, Effect, Field, makes, takes
from surgery.errors import Refused
from surgery.registry import register
from surgery.runtime.host_loops import greedy_loop
from surgery.runtime.loops import PAIR
from surgery.units import in_bytes


@register
class MergeIf(BundlePass):
    """Join two models into one that runs either of them, by a boolean input, over one copy of the weights.

    From `prefill (input_ids, ...) -> (logits, present...)` and `decode (input_ids, past..., ...) -> (logits,
    present...)` comes `decoder (input_ids, past..., ..., use_cache_branch) -> (logits, present...)`: an `If` whose
    branches are the two graphs. Any two models can be joined whose equally named inputs and outputs are of one type.

    Inputs and outputs are matched by name. An input that only one side takes has to be fed all the same, with a tensor
    that may be empty; an output that only one side gives is empty when the other side runs. An axis keeps its name
    where both sides agree on it. Weights of `min_bytes` or more become initializers of the main graph, where both
    branches see them, and equal ones exist once; smaller ones stay in their branch, and so do quantized ones, which
    ONNX Runtime looks for there: equal ones share their bytes in an external data file. Other names change only where
    one would hide another. The lower operator set is raised to the higher one.

    Keeps: names, documentation and metadata of nodes and of the values that are not in each other's way.

    Refuses: inputs or outputs of one name and two types or ranks; inputs and outputs that only one side has and that
    are no tensors; operator sets between which an operator has changed that onnx's converter cannot convert.
    """

    effect = Effect.EXACT

    when_true: str = takes("decode", "The model that runs when the flag is true.")
    when_false: str = takes("prefill", "The model that runs when the flag is false.")
    into: str = makes("decoder", "What it makes.")
    flag: str = Field(
        "use_cache_branch", min_length=1, description="Name the boolean input [1] that chooses like this."
    )
    min_bytes: int = Field(
        128, ge=1, description="Leave weights that are smaller than this many bytes in the branches that use them."
    )
    for_tensorrt: bool = Field(
        False, description="Make an If that keeps the rules of TensorRT's parser, or refuse with the rule."
    )
    hoist: bool = Field(False, description="Compute once, before the If, what both branches compute alike.")

    def transform(self, bundle: Bundle, context: Callable[[str], Context]) -> Change:
        """Join the two models."""
        models = {role: bundle[role] for role in (self.when_true, self.when_false)}
        if len(set(map(id, models.values()))) == 1:
            raise Refused(f"{self.when_false!r} is the same model as {self.when_true!r}", hint="name two roles")
        graphs = [model.graph for model in models.values()]
        if any(self.flag == value.name for graph in graphs for value in (*graph.inputs, *graph.outputs)):
            raise Refused(
                f"an input or output is called {self.flag!r} already", hint="give the flag another name: flag: ..."
            )
        level_opsets(models)
        interface = Interface.of(models)
        if interface.outputs.keys() <= interface.inputs.keys():
            raise Refused("there is nothing to choose between: every output is an input")
        refuse_ungiven(interface.computed, models[self.when_true].graph.opset_imports[""])
        stand_ins = find_stand_ins(interface) if self.for_tensorrt else {}
        joined = join(models, interface, self.flag, self.into, self.min_bytes, stand_ins)
        hoisted = hoist_common(joined.model.graph) if self.hoist else 0
        violations = find_violations(joined.model) if self.for_tensorrt else []
        if violations:
            raise Refused(f"TensorRT would not take it: {'; '.join(violations)}", hint="for_tensorrt: false")
        bundle.models[self.into] = joined.model
        said = f"merged {self.when_true} and {self.when_false}"
        if joined.shared:
            said += f", {_counted(joined.shared, 'weight')} shared, {in_bytes(joined.shared_bytes)} saved"
        if hoisted:
            said += f", {_counted(hoisted, 'node')} moved before the If"
        return Change(1, said)

    def claims(self, before: Bundle, after: Bundle) -> Sequence[Claim]:
        """Each branch answers as the model that it was, and greedy generation gives the tokens that it gave."""
        sides = {self.when_true: True, self.when_false: False}
        interface = Interface.of({role: before[role] for role in sides})
        branches = [
            branch_claim(before[role], interface, role, self.into, {self.flag: Fill(is_true, "bool", (1,))})
            for role, is_true in sides.items()
        ]
        first, second = greedy_loop(before), greedy_loop(after)
        is_generation = (self.when_false, self.when_true) == PAIR  # a loop sets the flag after the prompt
        if first is None or second is None or not is_generation or self.into not in second.roles:
            return branches
        others = [Claim.same(role) for role in second.roles if role != self.into]
        return [*branches, *others, Claim(first, second, measure=Measure.TOKENS)]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"
