"""Inputs that other models, or the model itself, must make: states of an encoder, and caches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import onnx_ir as ir

from surgery.accuracy.feeds.arrays import PlainInputs, mask_of
from surgery.accuracy.feeds.interface import PAST, Interface, dimensions_of, numpy_type
from surgery.accuracy.feeds.requests import Request, room
from surgery.bundle import Bundle
from surgery.errors import SurgeryError

Arrays = dict[str, np.ndarray]
Run = Callable[[str, Mapping[str, np.ndarray]], Arrays]

ENCODER_EXTRA = 3  # the encoder's prompt is that much longer than the decoder's, so that a mixed-up axis shows


class ChainedInputs:
    """Makes inputs by running models of a bundle with canonical names.

    Args:
        bundle: The models.
        seed: What random ids are made from.
        plain: Makes the inputs of these models that nothing has to be run for.
        run: Runs the model of a role.
    """

    def __init__(self, bundle: Bundle, seed: int, plain: PlainInputs, run: Run) -> None:
        self._bundle = bundle
        self._seed = seed
        self._plain = plain
        self._run = run

    def of(self, role: str, interface: Interface, request: Request) -> Arrays:
        """Return encoder states and the past for a model, as far as it takes them."""
        chained: Arrays = {}
        names = {value.name for value in interface.inputs}
        if role != "encoder" and names & {"encoder_hidden_states", "encoder_attention_mask"}:
            chained |= self._encoded(request) if "encoder" in self._bundle.models else self._made_up_states(request)
        if interface.has_past and request.is_cached:
            chained |= self._past(role, interface, request, chained)
        return chained

    def _encoder_prompt(self, request: Request) -> Request:
        length = min(request.length + request.past + ENCODER_EXTRA, room(self._bundle.config))
        return Request(request.batch, length, 0, request.is_padded)

    def _encoded(self, request: Request) -> Arrays:
        prompt = self._encoder_prompt(request)
        random = np.random.default_rng([self._seed, prompt.batch, prompt.length])
        inputs = self._plain.fill(Interface(self._bundle["encoder"]), prompt, random, {})
        states = next(iter(self._run("encoder", inputs).values()))
        return {
            "encoder_hidden_states": states,
            "encoder_attention_mask": inputs.get("attention_mask", mask_of(prompt, 0)),
        }

    def _made_up_states(self, request: Request) -> Arrays:
        """Return what an encoder that is not in the bundle might give: random states, of one length with their mask."""
        inputs = [value for model in self._bundle.models.values() for value in Interface(model).inputs]
        states = [value for value in inputs if value.name == "encoder_hidden_states"]
        sizes = [dimensions_of(value)[-1] for value in states if dimensions_of(value)]
        size = next((size for size in sizes if isinstance(size, int)), self._bundle.config.get("d_model"))
        prompt = self._encoder_prompt(request)
        if not states:
            return {"encoder_attention_mask": mask_of(prompt, 0)}
        if not isinstance(size, int):
            return {}
        random = np.random.default_rng([self._seed, prompt.batch, prompt.length])
        made = random.standard_normal((prompt.batch, prompt.length, size)).astype(numpy_type(states[0]))
        return {"encoder_hidden_states": made, "encoder_attention_mask": mask_of(prompt, 0)}

    def _past(self, role: str, interface: Interface, request: Request, encoded: Arrays) -> Arrays:
        """Return a cache that holds `request.past` tokens; an empty one still needs real encoder keys and values."""
        giver = "prefill" if "prefill" in self._bundle.models and role != "prefill" else role
        cross = [value for value in interface.past if ".encoder." in (value.name or "")]
        if request.past == 0 and not cross:
            return {}
        if giver == role and not interface.has_flag:
            return self._own_past(role, interface, request, encoded)
        prompt = Request(request.batch, max(request.past, 1), 0, request.is_padded, is_cached=False)
        random = np.random.default_rng([self._seed, prompt.batch, prompt.length, 1])
        inputs = self._plain.fill(Interface(self._bundle[giver]), prompt, random, encoded)
        past = as_past(interface.past, self._run(giver, inputs))
        if request.past == 0:
            return {name: array for name, array in past.items() if ".encoder." in name}
        return past

    def _own_past(self, role: str, interface: Interface, request: Request, encoded: Arrays) -> Arrays:
        """Grow a cache by running the model on its own outputs: at once if it takes several tokens, else one by one.

        Keys and values of an encoder are random. One by one, nothing is padding while it grows: the first tokens of a
        row would have nothing to attend to.
        """
        random = np.random.default_rng([self._seed, request.batch, request.past, 2])
        crossed = self._made_up_cross(interface, request, encoded, random)
        own = [value for value in interface.past if value.name not in crossed]
        at_once = interface.takes_several_tokens
        step = max(request.past, 1) if at_once else interface.lengths((1,))[0]
        past: Arrays = {}
        for done in range(0, request.past, step):
            part = Request(request.batch, step, done, request.is_padded and at_once)
            made = self._plain.fill(interface, part, random, {})
            past = as_past(own, self._run(role, made | encoded | crossed | past))
        return crossed | past

    def _made_up_cross(
        self, interface: Interface, request: Request, encoded: Arrays, random: np.random.Generator
    ) -> Arrays:
        """Return random keys and values of an encoder, [batch, heads, tokens of its mask, size of a head]."""
        mask = encoded.get("encoder_attention_mask")
        tokens = mask.shape[1] if mask is not None else request.length + request.past + ENCODER_EXTRA
        made: Arrays = {}
        for value in interface.past:
            if ".encoder." in (value.name or ""):
                batch, heads, _, size = self._plain.cache_shape(value, interface.shape(value, request))
                made[value.name or ""] = random.standard_normal((batch, heads, tokens, size)).astype(numpy_type(value))
        return made


def as_past(past: Sequence[ir.Value], outputs: Mapping[str, Any]) -> Arrays:
    """Return the outputs that hold the cache under the names of the inputs that take it: by name, else by order."""
    names = [value.name or "" for value in past]
    by_name = {name: PAST.sub("past", name).replace("past_key_values", "present", 1) for name in names}
    if all(given in outputs for given in by_name.values()):
        return {name: np.asarray(outputs[given]) for name, given in by_name.items()}
    caches = [array for name, array in outputs.items() if name.startswith(("present", "output.past"))]
    if len(caches) != len(names):
        raise SurgeryError(
            f"the cache inputs {names[0]!r}, ... do not match the cache outputs", hint="give check.data instead"
        )
    return dict(zip(names, caches, strict=True))
