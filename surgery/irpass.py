"""Any `onnx_ir` pass as a step: its constructor's parameters become the options."""

from __future__ import annotations

import inspect
import typing
from typing import Any, ClassVar

import onnx_ir as ir
from onnx_ir.passes import PassBase
from pydantic import Field, create_model

from surgery.contract import Change, Context, Effect, ModelPass

OWN_OPTIONS = frozenset({"models", "declared_effect"})


class IrPass(ModelPass):
    """Base of the wrappers that `wrap_ir_pass` makes."""

    wrapped: ClassVar[type[PassBase]]
    declared_effect: Effect = Field(
        Effect.EXACT, alias="effect", description="What the pass may do to the numbers: exact or close."
    )

    @property
    def effect(self) -> Effect:  # type: ignore[override]
        """What the recipe declares."""
        return self.declared_effect

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        """Run the wrapped pass; one that returns a new model has its graph moved into the given one."""
        chosen = {name: getattr(self, name) for name in type(self).model_fields if name not in OWN_OPTIONS}
        result = self.wrapped(**chosen)(model)
        if result.model is not model:
            move_into(result.model, model)
        return Change(int(result.modified), f"{self.wrapped.__name__} changed the model" if result.modified else "")


def wrap_ir_pass(wrapped: type[PassBase]) -> type[ModelPass]:
    """Return a pass class whose options are the parameters of an `onnx_ir` pass."""
    summary = (inspect.getdoc(wrapped) or wrapped.__name__).split("\n\n")[0]
    hints = typing.get_type_hints(wrapped.__init__)
    fields: dict[str, Any] = {}
    for name, parameter in list(inspect.signature(wrapped.__init__).parameters.items())[1:]:
        if parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        default = ... if parameter.default is parameter.empty else parameter.default
        description = f"As the parameter {name!r} of {wrapped.__name__}."
        fields[name] = (hints.get(name, Any), Field(default, description=description))
    made = create_model(wrapped.__name__, __base__=IrPass, __doc__=summary, __module__=wrapped.__module__, **fields)
    made.wrapped = wrapped
    return made


def move_into(changed: ir.Model, model: ir.Model) -> None:
    """Make `model` be what `changed` is; `changed` is not to be used afterwards."""
    model.graph = changed.graph
    model.ir_version = changed.ir_version
    model.functions.clear()
    model.functions.update(changed.functions)
    model.metadata_props.clear()
    model.metadata_props.update(changed.metadata_props)
