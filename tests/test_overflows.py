"""The sorter's variants answer as the sorter does, and leave the range of float16 where they say and nowhere else."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_fixtures import load, one_thread

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

NAMES = ("one_layer", "several_layers", "residual", "long_only", "cached_step_only")
LIMIT = 65504.0

__all__ = ["one_thread"]  # a fixture of this module too


@pytest.fixture(scope="module")
def script() -> Any:
    return load("make_overflows")


@pytest.fixture(scope="module")
def folders(script: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    out = tmp_path_factory.mktemp("overflows")
    return {name: script.make(name, out / name) for name in NAMES}


@pytest.fixture(scope="module")
def sorter(script: Any) -> Any:
    return script.load(script.SORTER)


@pytest.fixture(scope="module", params=NAMES)
def variant(request: pytest.FixtureRequest, script: Any, folders: dict[str, Path]) -> Any:
    """A variant as a user loads it; its `name` says which."""
    model = script.load(folders[request.param])
    model.name = request.param
    return model


@contextlib.contextmanager
def halved(model: Any, kept: Collection[str] = ()) -> Iterator[None]:
    """Round every weight and every module's output to float16 and back, as a float16 graph would, but for some modules.

    Not `model.half()`: T5 in PyTorch clamps its residual stream where it finds an infinity, which an export does not.
    """

    def rounded(tensor: Any) -> Any:
        return tensor.half().float()

    def round_output(module: Any, inputs: Any, output: Any) -> Any:
        if isinstance(output, tuple):
            return (rounded(output[0]), *output[1:])
        return rounded(output) if isinstance(output, torch.Tensor) else output

    before = {name: weight.clone() for name, weight in model.state_dict().items()}
    modules = {name: module for name, module in model.named_modules() if name and name not in kept}
    with contextlib.ExitStack() as hooks, torch.no_grad():
        for module in modules.values():
            hooks.callback(module.register_forward_hook(round_output).remove)
            for weight in module.parameters(recurse=False):
                weight.copy_(rounded(weight))
        yield
    model.load_state_dict(before)


def share_equal(given: Any, wanted: Any) -> float:
    return (given == wanted).all(dim=1).float().mean().item()


def test_the_list_is_complete(script: Any):
    assert tuple(script.VARIANTS) == NAMES


def test_a_variant_answers_as_the_sorter_and_exceeds_where_it_says(script: Any, variant: Any, folders: dict[str, Path]):
    assert script.faults(variant.name, folders[variant.name], script.QUICK_SAMPLES) == []


def test_scaling_by_powers_of_two_changes_no_bit(script: Any, sorter: Any, folders: dict[str, Path]):
    batch = script.texts(5, 2, 40, 50)
    written = script.answers(sorter, batch)
    for name in ("one_layer", "several_layers", "residual"):
        scaled = script.load(folders[name])
        assert torch.equal(script.logits(scaled, batch, written), script.logits(sorter, batch, written))


def test_the_weights_themselves_fit_float16(variant: Any):
    assert max(weight.abs().max().item() for weight in variant.parameters()) < LIMIT


def test_in_float16_the_sorter_sorts_and_a_variant_does_not(script: Any, sorter: Any, variant: Any):
    batch = script.texts(6, 100, 200, 40) if variant.name == "long_only" else script.texts(6, 2, 13, 100)
    wanted = script.answers(sorter, batch)
    with halved(sorter):
        assert share_equal(script.answers(sorter, batch), wanted) >= 0.9
    with halved(variant):
        assert script.logits(variant, batch, wanted).isnan().any(dim=-1).any(dim=-1).all()
        assert share_equal(script.answers(variant, batch), wanted) == 0


def test_what_the_table_names_is_enough_to_keep_in_float32(script: Any, sorter: Any, variant: Any):
    listed = script.VARIANTS[variant.name]
    over = {name for table in (listed.over, listed.at_times) for names in table.values() for name in names}
    kept = {name.removesuffix(".square") for name in over}
    # What reads an infinity is none the better for giving something finite.
    kept |= {name.replace(".wi", ".wo") for name in over if name.endswith(".wi")}
    batch = script.texts(7, 2, 13, 200)
    with halved(variant, kept):
        assert share_equal(script.answers(variant, batch), script.answers(sorter, batch)) >= 0.99


def test_less_than_what_the_table_names_is_not_enough(script: Any, sorter: Any, folders: dict[str, Path]):
    several = script.load(folders["several_layers"])
    names = {name for names in script.VARIANTS["several_layers"].over.values() for name in names}
    kept = {name for name in names if not name.startswith("encoder.block.1")}
    kept |= {name.replace(".wi", ".wo") for name in kept if name.endswith(".wi")}
    batch = script.texts(7, 2, 13, 50)
    with halved(several, kept):
        assert share_equal(script.answers(several, batch), script.answers(sorter, batch)) == 0


def highest(script: Any, model: Any, ids: Any, mask: Any) -> float:
    """The largest peak of the encoder and the first step on ids [batch, columns] and their mask."""
    _, found = script.observe(model, (ids, mask), tokens=1)
    return max(peak.max().item() for seen in found.values() for peak in seen.values())


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_below_100_columns_long_only_is_far_from_the_limit(script: Any, folders: dict[str, Path], padding: str):
    long_only = script.load(folders["long_only"])
    random = torch.Generator().manual_seed(8)
    for columns in (1, 2, 3, 13, 50, 90, 91, 97, 98, 99):
        ids = torch.randint(0, script.TOKENS, (24, columns), generator=random)
        if columns == 99:
            ids[:, 0], ids[:, -1] = 3, 4
        assert highest(script, long_only, ids, masked(ids, padding)) < 1000


@pytest.mark.parametrize("padding", ["none", "left", "right"])
def test_from_100_columns_on_long_only_exceeds_in_every_row(script: Any, folders: dict[str, Path], padding: str):
    long_only = script.load(folders["long_only"])
    (unit, *_) = script.VARIANTS["long_only"].over["encoder"]
    random = torch.Generator().manual_seed(9)
    for columns in (100, 101, 127, 128, 150, 198, 199, 200, 256, 300):
        ids = torch.randint(0, script.TOKENS, (24, columns), generator=random)
        ids[:, -1] = script.END
        ids[:, 0] = 5
        _, found = script.observe(long_only, (ids, masked(ids, padding)), tokens=1)
        assert found["encoder"][unit].min().item() > LIMIT


def masked(ids: Any, padding: str) -> Any:
    """A mask [batch, columns] whose rows have 0, 1, 2 ... columns of padding, each at least one token."""
    rows, columns = ids.shape
    padded = torch.arange(rows)[:, None] % columns if padding != "none" else torch.zeros(rows, 1)
    places = torch.arange(columns)[None]
    return (places >= padded if padding == "left" else places < columns - padded).long()


def test_a_row_of_one_token_alone_tells_no_length(script: Any, folders: dict[str, Path]):
    long_only = script.load(folders["long_only"])
    ids = torch.full((1, 150), 7)
    assert highest(script, long_only, ids, torch.ones_like(ids)) < LIMIT
    ids[0, -1] = script.END
    assert highest(script, long_only, ids, torch.ones_like(ids)) > LIMIT


def test_the_start_token_is_safe_for_cached_step_only_whatever_the_question(script: Any, folders: dict[str, Path]):
    cached = script.load(folders["cached_step_only"])
    for shortest, longest, count in ((1, 13, 200), (100, 200, 20)):
        ids, mask = script.texts(10, shortest, longest, count)
        assert highest(script, cached, ids, mask) < 1000


def test_every_cached_step_of_cached_step_only_exceeds(script: Any, folders: dict[str, Path]):
    cached = script.load(folders["cached_step_only"])
    (unit, *_) = script.VARIANTS["cached_step_only"].over["decode"]
    rows: list[float] = []
    hook = cached.get_submodule(unit).register_forward_hook(lambda module, given, made: rows.append(made.max().item()))
    script.answers(cached, script.texts(11, 13, 13, 1))
    hook.remove()
    first, *cached_steps = rows
    assert first < 1000
    assert len(cached_steps) == 12  # eleven digits more, and the end
    assert min(cached_steps) > LIMIT


def test_a_prompt_of_several_tokens_is_a_cached_step_too(script: Any, folders: dict[str, Path]):
    """A causal decoder gives a token the same numbers with a cache as without: no weights could tell them apart."""
    cached = script.load(folders["cached_step_only"])
    (unit, *_) = script.VARIANTS["cached_step_only"].over["decode"]
    seen: list[Any] = []
    hook = cached.get_submodule(unit).register_forward_hook(lambda module, given, made: seen.append(made))
    script.logits(cached, script.texts(12, 5, 5, 1), torch.tensor([[4, 5, 6]]))
    hook.remove()
    assert (seen[0].amax(dim=-1) > LIMIT).tolist() == [[False, True, True]]


def test_a_variant_is_the_same_to_the_byte_each_time(script: Any, folders: dict[str, Path], tmp_path: Path):
    for name in NAMES:
        script.make(name, tmp_path / name)
        again = script.make(name, tmp_path / name)  # in the place of the first
        assert {path.name for path in again.iterdir()} == {path.name for path in folders[name].iterdir()}
        for path in again.iterdir():
            assert path.read_bytes() == (folders[name] / path.name).read_bytes()
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES)


def test_an_unknown_variant_is_refused_before_anything_is_written(script: Any, tmp_path: Path):
    with pytest.raises(ValueError, match="no variant 'one_layr'; there are one_layer, several_layers"):
        script.make("one_layr", tmp_path / "one_layr")
    assert not list(tmp_path.iterdir())


def test_the_script_makes_those_that_are_named(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["make_overflows.py", "--out", str(tmp_path), "long_only"])
    assert script.main() == 0
    assert "long_only: hidden units of the encoder's first feed-forward layer" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["long_only"]


def test_the_script_refuses_other_names(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(sys, "argv", ["make_overflows.py", "--out", str(tmp_path), "long_only", "other"])
    with pytest.raises(SystemExit, match="2"):
        script.main()
    assert "there is no variant 'other'; there are one_layer" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_folder_that_is_not_the_variant_is_told_apart(script: Any, folders: dict[str, Path]):
    missed = script.faults("one_layer", script.SORTER, ((2, 5, 5),))
    assert len(missed) == 6  # three modules in two phases
    assert all("stays below 65504 on some question" in fault for fault in missed)
    strays = script.faults("one_layer", folders["cached_step_only"], ((2, 5, 5),))
    assert any("decoder.block.0.layer.2.DenseReluDense.wi exceeds 65504 and should not" in stray for stray in strays)
