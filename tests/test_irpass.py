"""Passes of onnx_ir as steps, and ours among them."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from onnx_ir.passes import FunctionalPass, InPlacePass, PassResult, Sequential, common, functionalize
from pydantic import ValidationError

from surgery.contract import Change, Context, Effect, ModelPass
from surgery.errors import RecipeError
from surgery.irpass import wrap_ir_pass
from surgery.recipe import make_pass
from surgery.registry import find
from surgery.text import parse, to_text
from tests.rewriting import assert_leaves_alone, assert_rewrites
from tests.storage.small_models import everywhere

Run = Callable[..., subprocess.CompletedProcess[str]]
FOLDER = Path()

IDENTITY = """
g (float[n,2] x) => (float[n,2] y) <float[2] w = {1, 2}> {
    a = Identity(x)
    b = Add(a, w)
    y = Relu(b)
}
"""


def step(word: str, **options: Any) -> ModelPass:
    made = make_pass(find(word, FOLDER), options, FOLDER)
    assert isinstance(made, ModelPass)
    return made


def said(model: ir.Model) -> bytes:
    return bytes(ir.to_proto(model).SerializeToString(deterministic=True))


@pytest.mark.parametrize("name", common.__all__)
def test_every_common_pass_runs_as_a_step_and_leaves_a_valid_model(name: str) -> None:
    model = ir.from_proto(everywhere().proto)
    change = step(f"onnx_ir.passes.common:{name}").rewrite(model, Context())
    assert (change.count == 0) == (change.summary == "")
    # InlinePass (onnx_ir 1.1) lets a name of the function meet the same name in a branch.
    common.NameFixPass()(model)
    onnx.checker.check_model(ir.to_proto(model))


def test_a_pass_rewrites_as_ours_do() -> None:
    after = "g (float[n,2] x) => (float[n,2] y) <float[2] w = {1, 2}> {b = Add(x, w) y = Relu(b)}"
    assert_rewrites(step("onnx_ir.passes.common:IdentityEliminationPass"), IDENTITY, after)
    assert_leaves_alone(step("onnx_ir.passes.common:IdentityEliminationPass"), after)


def test_the_parameters_are_the_options() -> None:
    lift = find("onnx_ir.passes.common:LiftConstantsToInitializersPass", FOLDER)
    assert {field.alias or name for name, field in lift.model_fields.items()} == {
        "models",
        "effect",
        "lift_all_constants",
        "size_limit",
    }
    text = "g (float[2] x) => (float[2] y) {c = Constant <value = float[2] {1, 2}> () y = Add(x, c)}"
    small, large = parse(text), parse(text)
    word = "onnx_ir.passes.common:LiftConstantsToInitializersPass"
    assert step(word).rewrite(small, Context()) == Change(0, "")
    change = step(word, size_limit=2).rewrite(large, Context())
    assert change == Change(1, "LiftConstantsToInitializersPass changed the model")
    assert list(large.graph.initializers) == ["c"]


def test_options_are_checked_against_the_types_of_the_parameters() -> None:
    with pytest.raises(ValidationError, match="size_limit"):
        step("onnx_ir.passes.common:LiftConstantsToInitializersPass", size_limit="2")


def test_a_parameter_that_cannot_be_written_in_yaml_can_be_given_in_python() -> None:
    inline = find("onnx_ir.passes.common:InlinePass", FOLDER)
    model = ir.from_proto(everywhere().proto)
    assert inline(criteria=lambda function: False).rewrite(model, Context()) == Change(0, "")  # type: ignore[attr-defined,call-arg]
    assert inline().rewrite(model, Context()).count == 1  # type: ignore[attr-defined]
    assert not model.functions


class Awkward(InPlacePass):
    """Takes parameters whose names mean something to pydantic.

    More text.
    """

    def __init__(self, copy: int, *, _hidden: str = "h", model_config: bool = False, tags: NoSuchType = None) -> None:  # type: ignore[name-defined,assignment] # noqa: F821
        self.given = (copy, _hidden, model_config, tags)

    def call(self, model: ir.Model) -> PassResult:
        model.metadata_props["given"] = repr(self.given)
        return PassResult(model, True)


def test_any_parameter_name_and_any_type_will_do() -> None:
    made = wrap_ir_pass(Awkward).model_validate({"copy": 3, "_hidden": "x", "model_config": True, "tags": ["t"]})
    model = parse(IDENTITY)
    made.rewrite(model, Context())
    assert model.metadata_props["given"] == "(3, 'x', True, ['t'])"
    assert type(made).__doc__ == "Takes parameters whose names mean something to pydantic."


class Greedy(InPlacePass):
    def __init__(self, models: int) -> None: ...

    def call(self, model: ir.Model) -> PassResult:
        return PassResult(model, False)


def test_a_parameter_that_is_an_option_of_every_step_is_refused() -> None:
    with pytest.raises(RecipeError, match="Greedy needs a parameter 'models', which is an option of every step"):
        wrap_ir_pass(Greedy)


def test_the_effect_is_exact_unless_the_step_says_close() -> None:
    word = "onnx_ir.passes.common:IdentityEliminationPass"
    assert step(word).effect is Effect.EXACT
    assert step(word, effect="close").effect is Effect.CLOSE


class Rebuild(FunctionalPass):
    """Return a new model that shares the mappings of the old one."""

    def call(self, model: ir.Model) -> PassResult:
        made = model.clone()
        made._metadata_props = model._metadata_props
        made._functions = model._functions
        made.doc_string = "rebuilt"
        return PassResult(made, True)


def full_model() -> ir.Model:
    model = ir.from_proto(everywhere().proto)
    model.producer_name, model.producer_version, model.domain = "maker", "1.2", "org.maker"
    model.model_version, model.doc_string = 3, "a model"
    model.metadata_props["of"] = "model"
    model.graph.metadata_props["of"] = "graph"
    model.graph.doc_string = "a graph"
    model.opset_imports["unused"] = 7
    return model


@pytest.mark.parametrize("functional", [Rebuild(), functionalize(Rebuild())])
def test_a_functional_pass_loses_nothing(functional: FunctionalPass) -> None:
    class Made(type(functional)):  # type: ignore[misc]
        def __init__(self) -> None:
            self.__dict__.update(functional.__dict__)

    model, expected = full_model(), full_model()
    expected.doc_string = "rebuilt"
    assert wrap_ir_pass(Made)().rewrite(model, Context()).count == 1
    assert said(model) == said(expected)
    assert model.functions.keys() == expected.functions.keys()


class MarkNodes(ModelPass):
    """Mark nodes that are not marked yet."""

    def rewrite(self, model: ir.Model, context: Context) -> Change:
        left = [node for node in model.graph if "mark" not in node.metadata_props]
        for node in left:
            node.metadata_props["mark"] = "yes"
        return Change(len(left), f"marked {len(left)} nodes" if left else "")


def test_our_pass_runs_among_those_of_onnx_ir() -> None:
    line = Sequential(common.IdentityEliminationPass(), MarkNodes(), common.TopologicalSortPass())
    model = parse(IDENTITY)
    assert line(model).modified
    assert [(node.op_type, node.metadata_props["mark"]) for node in model.graph] == [("Add", "yes"), ("Relu", "yes")]
    assert not line(model).modified


def test_our_wrapper_of_their_pass_runs_among_those_of_onnx_ir() -> None:
    model = parse(IDENTITY)
    assert Sequential(step("onnx_ir.passes.common:IdentityEliminationPass"), MarkNodes())(model).modified
    assert "Identity" not in to_text(model)


OWN = """
import onnx_ir as ir


class RaiseWeight(ir.passes.InPlacePass):
    '''Raise a weight.'''

    def __init__(self, by: float = 0.0, name: str = "w"):
        self.by, self.name = by, name

    def call(self, model):
        value = model.graph.initializers[self.name]
        value.const_value = ir.tensor(value.const_value.numpy() + self.by, dtype=value.dtype, name=self.name)
        return ir.passes.PassResult(model, True)
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    (tmp_path / "m.onnx").write_bytes(ir.to_proto(parse(IDENTITY)).SerializeToString())
    return tmp_path


def recipe(folder: Path, options: str) -> None:
    steps = f"  - onnx_ir.passes.common:IdentityEliminationPass\n  - pass: own:RaiseWeight\n{options}"
    (folder / "r.yaml").write_text(f"source: m.onnx\nsteps:\n{steps}output: out\n")


def test_a_recipe_runs_passes_of_onnx_ir_and_one_beside_it(folder: Path, surgery: Run) -> None:
    recipe(folder, "    by: 1.0e-5\n    effect: close\n")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "step 1 onnx_ir.passes.common:IdentityEliminationPass: exact; IdentityEliminationPass changed" in done.stdout
    saved = ir.load(folder / "out" / "model.onnx")
    assert [node.op_type for node in saved.graph] == ["Add", "Relu"]
    weight = saved.graph.initializers["w"].const_value
    assert weight is not None
    assert np.allclose(weight.numpy(), [1.00001, 2.00001], atol=1e-7)


def test_a_recipe_catches_one_that_moves_the_numbers(folder: Path, surgery: Run) -> None:
    recipe(folder, "    by: 1.0e-5\n")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 1
    assert "step 2 (own:RaiseWeight): model: output 'y' is off by" in done.stderr


def test_a_misspelt_option_is_an_error_of_the_recipe(folder: Path, surgery: Run) -> None:
    recipe(folder, "    nam: w\n")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 2
    assert "r.yaml:5: step 2 (own:RaiseWeight): unknown option 'nam'; did you mean 'name'?" in done.stderr
