"""The encoder as `generate` calls it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from transformers.modeling_outputs import BaseModelOutput

from surgery.errors import Refused, SurgeryError
from surgery.interfaces import recognise_names
from surgery.runtime.bound import BoundSession, as_torch, as_value
from surgery.runtime.generation.refusals import refuse_padding
from surgery.runtime.generation.types import TYPES

if TYPE_CHECKING:
    import onnxruntime

MAIN = ("input_ids", "input_features")


class Encoder:
    """A session of an encoder, whatever its inputs and outputs are called.

    Args:
        session: The session.
        device: Where its values lie.

    Raises:
        Refused: Generation has nothing to feed to one of its inputs, or it gives no states.
    """

    def __init__(self, session: onnxruntime.InferenceSession, device: torch.device) -> None:
        bound = BoundSession(session, device.type, device.index or 0)
        self._session = bound
        self._device = device
        recognised = recognise_names(list(bound.inputs), bound.outputs)
        canonical = recognised.canonical if recognised is not None else {}
        own = {canonical.get(name, name): name for name in bound.inputs}
        strange = [name for kind, name in own.items() if kind not in (*MAIN, "attention_mask")]
        if strange:
            raise Refused(
                f"generation has nothing to feed to the input {strange[0]!r} of 'encoder'",
                hint="export the model without it, or rename_io if it is a known input of another name",
            )
        mains = [kind for kind in MAIN if kind in own]
        states = [name for name in bound.outputs if canonical.get(name, name) == "last_hidden_state"]
        if len(mains) != 1 or len(states) != 1 or len(bound.outputs) != 1:
            raise Refused(
                f"'encoder' gives {', '.join(bound.outputs)} for {', '.join(bound.inputs)}",
                hint="it has to give last_hidden_state alone, for input_ids or input_features",
            )
        self.main_input_name = mains[0]
        self._states = states[0]
        self._own = {kind: (name, TYPES[bound.inputs[name].type]) for kind, name in own.items()}

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        input_features: torch.Tensor | None = None,
        **ignored: Any,
    ) -> Any:
        """Encode.

        Args:
            input_ids: Tokens [batch, length].
            attention_mask: 1 for tokens, 0 for padding [batch, length]; left out, all are tokens.
            input_features: Of speech [batch, bins, frames].
            ignored: What transformers hands to any encoder.

        Returns:
            `last_hidden_state` [batch, length, hidden].

        Raises:
            SurgeryError: There is nothing to encode, or shapes do not agree.
        """
        given = {"input_ids": input_ids, "input_features": input_features}[self.main_input_name]
        if given is None:
            raise SurgeryError(f"there is nothing to encode: {self.main_input_name} are missing")
        feeds = {self.main_input_name: given}
        if self.main_input_name == "input_ids":
            mask = attention_mask if attention_mask is not None else torch.ones_like(given)
            if mask.shape != given.shape:
                raise SurgeryError(
                    f"attention_mask is {list(mask.shape)}, and input_ids are {list(given.shape)}",
                    hint="give the mask that the tokenizer returns",
                )
            if "attention_mask" not in self._own:
                refuse_padding(mask, "attention_mask", "encoder")
            feeds["attention_mask"] = mask
        values = {
            name: as_value(feeds[kind].to(device=self._device, dtype=dtype))
            for kind, (name, dtype) in self._own.items()
        }
        return BaseModelOutput(last_hidden_state=as_torch(self._session.run(values)[self._states]))

    __call__ = forward
