"""Any `onnx_ir` pass as a step: its constructor's parameters become the options."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Iterator
from typing import Any, ClassVar

import onnx_ir as ir
from onnx_ir.passes import PassBase
from pydantic import Field, PydanticUserError, TypeAdapter, create_model
from pydantic_core import SchemaError

from surgery.contract import Change, Context, Effect, ModelPass
from surgery.errors import RecipeError

# Parameters become fields under another name, since a field may not be called `copy`, `json` or `_x`.
PREFIX = "option_"


class ForeignPass(ModelPass):
    """A pass whose work somebody else wrote, for whom the recipe says what it may do to the numbers."""

    declared_effect: Effect = Field(
        Effect.EXACT, alias="effect", description="What it may do to the numbers: exact or close."
    )

    @property
    def effect(self) -> Effect:  # type: ignore[override]
        """What the recipe declares."""
        return self.declared_effect


class IrPass(ForeignPass):
    """Base of the wrappers that `wrap_ir_pass` makes."""

    wrapped: ClassVar[type[PassBase]]

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        """Run the wrapped pass; one that returns a new model has all of it moved into the given one."""
        names = [name for name in type(self).model_fields if name.startswith(PREFIX)]
        chosen = {name.removeprefix(PREFIX): getattr(self, name) for name in names}
        result = self.wrapped(**chosen)(model)
        if result.model is not model:
            move_into(result.model, model)
        return Change(1, f"{self.wrapped.__name__} changed the model") if result.modified else Change(0, "")


def wrap_ir_pass(wrapped: type[PassBase]) -> type[ModelPass]:
    """Return a pass class whose options are the parameters of an `onnx_ir` pass.

    Raises:
        RecipeError: A parameter that must be given has the name of an option that every step has.
    """
    summary = (inspect.getdoc(wrapped) or wrapped.__name__).split("\n\n")[0]
    hints = _type_hints(wrapped)
    own = {field.alias or name for name, field in IrPass.model_fields.items()}
    fields: dict[str, Any] = {}
    for parameter in _parameters(wrapped):
        name = parameter.name
        is_required = parameter.default is parameter.empty
        if name in own:
            if is_required:
                raise RecipeError(f"{wrapped.__name__} needs a parameter {name!r}, which is an option of every step")
            continue
        description = f"As the parameter {name!r} of {wrapped.__name__}."
        field = Field(... if is_required else parameter.default, alias=name, description=description)
        fields[PREFIX + name] = (_checkable(hints.get(name, Any)), field)
    made = create_model(wrapped.__name__, __base__=IrPass, __doc__=summary, __module__=wrapped.__module__, **fields)
    made.wrapped = wrapped
    return made


def _parameters(wrapped: type[PassBase]) -> Iterator[inspect.Parameter]:
    parameters = list(inspect.signature(wrapped.__init__).parameters.values())[1:]
    return (one for one in parameters if one.kind not in (one.VAR_POSITIONAL, one.VAR_KEYWORD, one.POSITIONAL_ONLY))


def _type_hints(wrapped: type[PassBase]) -> dict[str, Any]:
    try:
        return typing.get_type_hints(wrapped.__init__)
    except (NameError, TypeError, AttributeError):  # a type that its module imports for type checkers only
        return {}


def _checkable(hint: Any) -> Any:
    """Return the type if values can be checked against it, else `Any`."""
    try:
        adapter = TypeAdapter(hint, config={"arbitrary_types_allowed": True})
        adapter.validator.isinstance_python(object())
    except (PydanticUserError, SchemaError, TypeError):
        return Any
    return hint


def move_into(changed: ir.Model, model: ir.Model) -> None:
    """Make `model` be all that `changed` is; `changed` is not to be used afterwards."""
    # A pass may have handed the mappings of its input on to its result.
    functions, metadata_props, meta = dict(changed.functions), dict(changed.metadata_props), dict(changed.meta)
    model.graph = changed.graph  # it holds the opset imports
    model.functions.clear()
    model.functions.update(functions)
    model.metadata_props.clear()
    model.metadata_props.update(metadata_props)
    model.meta.clear()
    model.meta.update(meta)
    model.ir_version = changed.ir_version
    model.producer_name = changed.producer_name
    model.producer_version = changed.producer_version
    model.domain = changed.domain
    model.model_version = changed.model_version
    model.doc_string = changed.doc_string
    model.device_configurations = changed.device_configurations
