"""The user's own data: every form, and what is said of data that do not fit."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from textwrap import dedent

import numpy as np
import pytest
from models import decoder_pair, generic, single
from planting import pass_through, plant, where
from polygraphy.json import save_json

from surgery import Bundle, Check, Pipeline
from surgery.accuracy.data import load_samples
from surgery.accuracy.feeds import Interface, Sample
from surgery.accuracy.judge import Judge
from surgery.errors import RecipeError
from surgery.manager import Stopped

X = np.array([[1, 2, 3, 4]], dtype=np.float32)
PROMPT = {
    "input_ids": np.array([[1, 2, 3], [4, 5, 6]]),
    "attention_mask": np.array([[0, 1, 1], [1, 1, 1]]),
    "position_ids": np.array([[0, 0, 1], [0, 1, 2]]),
}


def load(path: Path, bundle: Bundle | None = None, role: str = "model") -> list[Sample]:
    return list(load_samples(path, role, Interface((bundle or generic())[role])))


def script(folder: Path, text: str) -> Path:
    path = folder / "data_loader.py"
    path.write_text("import numpy as np\n" + dedent(text))
    return path


def test_a_data_loader_gives_a_sample_at_each_yield(tmp_path: Path) -> None:
    path = script(
        tmp_path,
        """
        def load_data():
            for batch in (1, 2):
                yield {"x": np.full((batch, 4), batch, dtype=np.float32)}
        """,
    )
    made = load(path)
    assert [sample.name for sample in made] == ["data_loader.py[0]", "data_loader.py[1]"]
    assert [dict(sample.traits) for sample in made] == [{"batch": "1"}, {"batch": "2"}]
    assert made[1].arrays["x"].tolist() == [[2] * 4] * 2


def test_a_npz_is_one_sample(tmp_path: Path) -> None:
    np.savez(tmp_path / "feeds.npz", **PROMPT)
    (made,) = load(tmp_path / "feeds.npz", decoder_pair(), "prefill")
    assert dict(made.traits) == {"batch": "2", "length": "3", "padding": "yes"}
    assert all(np.array_equal(made.arrays[name], array) for name, array in PROMPT.items())


@pytest.mark.parametrize("content", [[{"x": X}, {"x": X + 1}], {"x": X}])
def test_polygraphy_json_is_one_sample_or_several(tmp_path: Path, content: object) -> None:
    save_json(content, str(tmp_path / "feeds.json"))
    made = load(tmp_path / "feeds.json")
    assert len(made) == (2 if isinstance(content, list) else 1)
    assert made[0].arrays["x"].tolist() == X.tolist()


def test_strings_are_strings_however_numpy_holds_them(tmp_path: Path) -> None:
    bundle = single("""
        <ir_version: 8, opset_import: ["" : 18]>
        words (string[n] s) => (string[n] t) { t = Identity(s) }
    """)
    np.savez(tmp_path / "feeds.npz", s=np.array(["a", "b"]))
    assert load(tmp_path / "feeds.npz", bundle)[0].arrays["s"].tolist() == ["a", "b"]
    with closing(Judge(bundle, Check(data=tmp_path / "feeds.npz"))) as judge:
        assert judge.judge_source().is_accurate


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "gives no samples at all"),
        ({"y": X}, "lacks the input 'x' of 'model'; it has 'y'"),
        ({"x": X, "xx": X}, "has 'xx', which is no input of 'model'; did you mean 'x'?"),
        ({"x": X.astype(np.float64)}, "the input 'x' is float64, and the model takes float"),
        ({"x": X.astype(np.int64)}, "the input 'x' is int64, and the model takes float"),
        ({"x": X[0]}, r"the input 'x' has shape \[4\], and the model takes \[n, 4\]"),
        ({"x": X[:, :3]}, r"the input 'x' has shape \[1, 3\], and the model takes \[n, 4\]"),
        ({"x": X[None]}, r"the input 'x' has shape \[1, 1, 4\]"),
        ({"x": X[:0]}, r"the input 'x' is empty, of shape \[0, 4\]"),
    ],
)
def test_data_that_do_not_fit_are_refused(tmp_path: Path, arrays: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "feeds.npz", **arrays)
    with pytest.raises(RecipeError, match=message) as caught:
        load(tmp_path / "feeds.npz")
    assert caught.value.message.startswith("check.data: ")
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("def load_data(): return []", "gives no samples at all"),
        ("def load_data():\n    if False: yield", "gives no samples at all"),
        ("def load_data(): return [np.ones(3)]", "sample 0 of .* is a ndarray, not arrays by input name"),
        ("def load_data(): raise OSError('no disk')", "raised OSError: no disk"),
        (
            "def load_data():\n    yield {'x': np.ones((1, 4), np.float32)}\n    raise KeyError('later')",
            "raised KeyError",
        ),
        ("def load_data(): raise ValueError", r"raised ValueError: \(no text\)"),
        ("def load_data(): return 3", "raised TypeError: 'int' object is not iterable"),
        ("def load(): pass", "data_loader.py raised "),
        ("def load_data(: pass", "raised SyntaxError"),
        ("import nowhere_to_be_found", "raised ModuleNotFoundError"),
    ],
)
def test_a_script_that_is_wrong_is_an_error_of_the_recipe(
    tmp_path: Path, body: str, message: str, capfd: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(RecipeError, match=message):
        load(script(tmp_path, body))
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("feeds.npz", b"nonsense", "feeds.npz"),
        ("feeds.npz", b"", "feeds.npz"),
        ("feeds.json", b"{", "feeds.json"),
        ("feeds.json", b"[3]", "is a int, not arrays by input name"),
        ("feeds.bin", b"", "feeds.bin is of no known form"),
    ],
)
def test_a_broken_file_is_an_error_of_the_recipe(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(RecipeError, match=message):
        load(tmp_path / name)


def test_a_missing_file_is_an_error_of_the_recipe(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="there is no file"):
        load(tmp_path / "feeds.npz")


def test_only_a_cache_may_be_empty(tmp_path: Path) -> None:
    inputs = Interface(decoder_pair()["decode"]).inputs
    feed = {}
    for value in inputs:
        assert value.shape is not None
        assert value.dtype is not None
        free = 0 if (value.name or "").startswith("past") else 1
        shape = [size if isinstance(size, int) else free if axis == 2 else 1 for axis, size in enumerate(value.shape)]
        feed[value.name or ""] = np.ones(shape, value.dtype.numpy())
    assert any(array.size == 0 for array in feed.values())
    np.savez(tmp_path / "feeds.npz", **feed)
    assert len(load(tmp_path / "feeds.npz", decoder_pair(), "decode")) == 1


def test_own_data_are_what_a_run_is_judged_on(tmp_path: Path) -> None:
    np.savez(tmp_path / "prompt.npz", **PROMPT)
    check = Check(data={"prefill": tmp_path / "prompt.npz"})
    step = plant("one", pass_through)
    records = Pipeline([step], check).run(decoder_pair()).records
    assert records[1].verdict is not None
    coverage = {role: str(covered) for role, covered in records[1].verdict.coverage.items()}
    assert coverage["prefill"] == "1 sample: batch 2; length 3; padding yes"
    assert coverage["decode"].startswith("5 samples: batch 1, 3; ")
    assert records[1].verdict.warnings == ()


def test_a_fault_on_own_data_names_the_sample(tmp_path: Path) -> None:
    save_json([{"x": X}, {"x": -X}], str(tmp_path / "feeds.json"))
    wrong = plant("wrong", where(lambda emit, inputs: emit("Less", inputs["x"], np.array(0, np.float32)), name="z"))
    with pytest.raises(Stopped, match=r"output 'z' is off by(.|\n)*sample 'feeds.json\[1\]'"):
        Pipeline([wrong], Check(data=tmp_path / "feeds.json")).run(generic())


def test_data_of_the_wrong_type_stop_the_run_before_it_begins(tmp_path: Path) -> None:
    np.savez(tmp_path / "feeds.npz", x=X.astype(np.float64))
    with pytest.raises(Stopped, match="the input 'x' is float64, and the model takes float") as caught:
        Pipeline([plant("one", pass_through)], Check(data=tmp_path / "feeds.npz")).run(generic())
    assert caught.value.step is None
    assert caught.value.exit_code == 2


def test_data_for_a_model_that_is_not_there_are_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="check.data: the source has no model 'prefil'; did you mean 'prefill'?"):
        Judge(decoder_pair(), Check(data={"prefil": tmp_path / "x.npz"}))


def test_one_file_for_several_models_is_an_error_with_a_way_out(tmp_path: Path) -> None:
    np.savez(tmp_path / "prompt.npz", **PROMPT)
    with pytest.raises(Stopped, match="lacks the input 'past_key_values.0.key' of 'decode'") as caught:
        Pipeline([plant("one", pass_through)], Check(data=tmp_path / "prompt.npz")).run(decoder_pair())
    assert "check.data as a mapping of role and path" in caught.value.hint
