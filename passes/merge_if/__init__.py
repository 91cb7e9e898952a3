"""Two models behind one `If`."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from passes.merge_if.hoisting import hoist_common
from passes.merge_if.interface import Interface, branch_claim
from passes.merge_if.joining import join
from passes.merge_if.opsets import level_opsets
from surgery.claims import Fill
from surgery.contract import Bundle, BundlePass, Change, Claim, Context, Effect, Field, makes, takes
from surgery.errors import Refused
from surgery.registry import register
from surgery.units import in_bytes


@register
class MergeIf(BundlePass):
    """Join two models into one that runs either of them, by a boolean input, over one copy of the weights.

    From `prefill (input_ids, ...) -> (logits, present...)` and `decode (input_ids, past..., ...) -> (logits,
    present...)` comes `decoder (input_ids, past..., ..., use_cache_branch) -> (logits, present...)`: an `If` whose
    branches are the two graphs. Any two models can be joined whose equally named inputs and outputs are of one type.

    Inputs and outputs are matched by name. An input that only one side takes has to be fed all the same, with a tensor
    that may be empty; an output that only one side gives is empty when the other side runs. An axis keeps its name where
    both sides agree on it. Weights of 128 bytes or more become initializers of the main graph, where both branches see
    them, and equal ones exist once; smaller ones stay in their branch. Other names change only where one would hide
    another.

    Keeps: names, documentation and metadata of nodes and of the values that are not in each other's way.

    Refuses: inputs or outputs of one name and two types; outputs that only one side gives and that are no tensors.
    """

    effect = Effect.EXACT

    when_true: str = takes("decode", "The model that runs when the flag is true.")
    when_false: str = takes("prefill", "The model that runs when the flag is false.")
    into: str = makes("decoder", "What it makes.")
    flag: str = Field(
        "use_cache_branch", min_length=1, description="Name the boolean input [1] that chooses like this."
    )
    hoist: bool = Field(False, description="Compute once, before the If, what both branches compute alike.")

    def transform(self, bundle: Bundle, context: Callable[[str], Context]) -> Change:
        """Join the two models."""
        models = {role: bundle[role] for role in (self.when_true, self.when_false)}
        if any(self.flag == value.name for model in models.values() for value in model.graph.inputs):
            raise Refused(f"an input is called {self.flag!r} already", hint="give the flag another name: flag: ...")
        level_opsets(models)
        interface = Interface.of(models)
        joined = join(models, interface, self.flag, self.into)
        hoisted = hoist_common(joined.model.graph) if self.hoist else 0
        bundle.models[self.into] = joined.model
        said = f"merged {self.when_true} and {self.when_false}"
        if joined.shared:
            said += f", {_counted(joined.shared, 'weight')} shared, {in_bytes(joined.shared_bytes)} saved"
        if hoisted:
            said += f", {_counted(hoisted, 'node')} moved before the If"
        return Change(1, said)

    def claims(self, before: Bundle, after: Bundle) -> Sequence[Claim]:
        """Each branch answers as the model that it was."""
        sides = {self.when_true: True, self.when_false: False}
        interface = Interface.of({role: before[role] for role in sides})
        return [
            branch_claim(before[role], interface, role, self.into, {self.flag: Fill(is_true, "bool", (1,))})
            for role, is_true in sides.items()
        ]


def _counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' if count != 1 else ''}"
