"""The command line as a user meets it: what it prints, what it writes, its exit codes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnx.parser
import onnx_ir as ir
import pytest

from surgery.storage import open_model

Run = Callable[..., subprocess.CompletedProcess[str]]

TWINS = """
<ir_version: 10, opset_import: ["" : 18]>
g (float[batch, 64] x) => (float[batch, 64] y) {
    h = MatMul(x, w1)
    t = MatMul(h, w2)
    y = Relu(t)
}
"""

PASSES = """
import time

import onnx_ir as ir
from surgery import Change, Effect, ModelPass


class Breaks(ModelPass):
    '''Raises.'''

    def rewrite(self, model, context):
        raise ValueError("something is off")


class Works(ModelPass):
    '''Says what it did.'''

    def rewrite(self, model, context):
        model.metadata_props["worked"] = "yes"
        return Change(1, "wrote 1 note")


class Drops(ModelPass):
    '''Takes the Relu away.'''

    def rewrite(self, model, context):
        relu = model.graph.outputs[0].producer()
        before = relu.inputs[0].producer()
        relu.inputs[0].type, relu.inputs[0].shape = relu.outputs[0].type, relu.outputs[0].shape
        relu.inputs[0].name, relu.outputs[0].name = "y", "gone"
        model.graph.outputs[0] = relu.inputs[0]
        model.graph.remove(relu, safe=True)
        return Change(1, "dropped 1 Relu")


class Tangles(ModelPass):
    '''Leaves a node in front of what it reads.'''

    def rewrite(self, model, context):
        nodes = list(model.graph)
        model.graph.remove(nodes[0])
        model.graph.append(nodes[0])
        return Change(1, "moved 1 node")


class Sleeps(ModelPass):
    '''Takes long.'''

    def rewrite(self, model, context):
        print("sleeping", flush=True)
        time.sleep(60)
        return Change(0, "")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder with a model that holds one weight twice, passes, and a recipe."""
    model = onnx.parser.parse_model(TWINS)
    weight = np.random.default_rng(0).standard_normal((64, 64)).astype(np.float32)
    model.graph.initializer.extend(onnx.numpy_helper.from_array(weight, name) for name in ("w1", "w2"))
    onnx.save(model, tmp_path / "twins.onnx")
    (tmp_path / "mine.py").write_text(PASSES)
    recipe(tmp_path, "dedup_weights")
    return tmp_path


def recipe(folder: Path, *words: str, source: str = "twins.onnx", more: str = "") -> Path:
    file = folder / "r.yaml"
    file.write_text(f"source: {source}\nsteps: [{', '.join(repr(word) for word in words)}]\noutput: out\n{more}")
    return file


def test_run_shows_a_line_a_step_and_the_ledger_and_writes_the_result(folder: Path, surgery: Run) -> None:
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "step 1 dedup_weights: exact; shared 1 weight, 16.4 kB saved" in done.stdout
    assert "gap to" in done.stdout
    assert "model: 2 samples: batch 1, 3" in done.stdout
    assert sorted(file.name for file in (folder / "out").iterdir()) == [
        "bundle.json",
        "model.onnx",
        "model.onnx_data",
        "report.json",
    ]
    assert list(open_model(folder / "out" / "model.onnx").graph.initializers) == ["w1"]


def test_the_report_says_what_the_ledger_says(folder: Path, surgery: Run) -> None:
    surgery("run", "r.yaml", cwd=folder)
    report = json.loads((folder / "out" / "report.json").read_text())
    source, step = report["steps"]
    assert source["pass"] == "source"
    assert (step["pass"], step["changes"], step["effect"]) == ("dedup_weights", 1, "exact")
    assert step["verdict"]["step"]["exact"]
    assert step["verdict"]["source"]["exact"]
    assert step["verdict"]["outputs"]["model.y"]["max_error"] == 0
    assert report["versions"]["onnx"]
    assert report["check"]["batches"] == [1, 3]


def test_an_output_folder_is_not_replaced_unasked(folder: Path, surgery: Run) -> None:
    assert surgery("run", "r.yaml", cwd=folder).returncode == 0
    (folder / "out" / "notes.txt").write_text("mine")
    refused = surgery("run", "r.yaml", cwd=folder)
    assert refused.returncode == 1
    assert "exists already" in refused.stderr
    assert "--overwrite" in refused.stderr
    assert "step 0" not in refused.stdout
    assert surgery("run", "r.yaml", "--overwrite", cwd=folder).returncode == 0
    assert (folder / "out" / "notes.txt").read_text() == "mine"


def test_the_source_is_never_written_to(folder: Path, surgery: Run) -> None:
    source = folder / "twins.onnx"
    before = source.read_bytes()
    (folder / "models").mkdir()
    source.rename(folder / "models" / "model.onnx")
    refused = surgery("run", "r.yaml", "--source", "models", "--out", "models", "--overwrite", cwd=folder)
    assert refused.returncode == 1
    assert [file.name for file in (folder / "models").iterdir()] == ["model.onnx"]
    assert (folder / "models" / "model.onnx").read_bytes() == before


def test_keep_steps_saves_every_step_over_one_weights_file(folder: Path, surgery: Run) -> None:
    assert surgery("run", "r.yaml", "--keep-steps", cwd=folder).returncode == 0
    steps = folder / "out.steps"
    assert sorted(file.name for file in steps.glob("*.onnx*")) == [
        "0_source.model.onnx",
        "1_dedup_weights.model.onnx",
        "weights.onnx_data",
    ]
    assert list(open_model(steps / "0_source.model.onnx").graph.initializers) == ["w1", "w2"]


def test_no_check_checks_nothing(folder: Path, surgery: Run) -> None:
    recipe(folder, "mine:Drops")
    assert surgery("run", "r.yaml", cwd=folder).returncode == 1
    done = surgery("run", "r.yaml", "--no-check", cwd=folder)
    assert done.returncode == 0
    assert "not checked" in done.stdout


def test_an_inaccurate_step_stops_the_run_and_says_where_and_what(folder: Path, surgery: Run) -> None:
    recipe(folder, "dedup_weights", "mine:Drops", "mine:Works")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 1
    assert "step 2 (mine:Drops): model: output 'y' is off by" in done.stderr
    assert "worst at [" in done.stderr
    assert "sample 'batch" in done.stderr
    assert not (folder / "out").exists()


def test_an_invalid_graph_stops_the_run(folder: Path, surgery: Run) -> None:
    recipe(folder, "mine:Tangles")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 1
    assert "step 1 (mine:Tangles): model: left an invalid model:" in done.stderr
    assert "'h'" in done.stderr


def test_a_pass_that_raises_leaves_a_recipe_that_goes_on_from_there(folder: Path, surgery: Run) -> None:
    recipe(folder, "dedup_weights", "mine:Breaks", "mine:Works", more="check: {seed: 3}\n")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 1
    assert "step 2 (mine:Breaks): raised ValueError: something is off" in done.stderr
    assert "Traceback" not in done.stderr
    assert "python -m surgery run out.stopped/recipe.yaml" in done.stderr
    again = surgery("run", "out.stopped/recipe.yaml", cwd=folder)
    assert "step 1 (" in again.stderr
    assert "raised ValueError: something is off" in again.stderr
    (folder / "mine.py").write_text(PASSES.replace('raise ValueError("something is off")', 'return Change(0, "")'))
    again = surgery("run", "out.stopped/recipe.yaml", cwd=folder)
    assert again.returncode == 0, again.stderr
    assert open_model(folder / "out" / "model.onnx").metadata_props["worked"] == "yes"


def test_debug_shows_the_traceback(folder: Path, surgery: Run) -> None:
    recipe(folder, "mine:Breaks")
    done = surgery("run", "r.yaml", "--debug", cwd=folder)
    assert done.returncode != 0
    assert "Traceback" in done.stderr


def test_an_interrupt_writes_nothing(folder: Path) -> None:
    recipe(folder, "mine:Sleeps")
    process = subprocess.Popen(
        [sys.executable, "-m", "surgery", "run", "r.yaml"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts what it puts into the background with SIGINT ignored, and then Python ignores it too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    while "sleeping" not in process.stdout.readline():
        assert process.poll() is None
    before = set(folder.iterdir())
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert process.returncode == 130
    assert said.strip() == "interrupted: nothing was written"
    assert set(folder.iterdir()) == before


@pytest.mark.parametrize("moment", [0.0, 0.05, 0.2])
def test_a_kill_leaves_no_half_written_output(folder: Path, moment: float) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "surgery", "run", "r.yaml"], cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    while "step 1" not in process.stdout.readline():
        assert process.poll() is None
    time.sleep(moment)
    process.kill()
    process.wait()
    if (folder / "out").exists():
        open_model(folder / "out" / "model.onnx").graph.initializers["w1"].const_value.numpy()  # type: ignore[union-attr]


def test_a_full_disk_is_said_and_leaves_nothing(folder: Path) -> None:
    tiny = folder / "tiny"
    tiny.mkdir()
    script = (
        f"mount -t tmpfs -o size=16k none {tiny} && cp r.yaml {tiny}/; "
        f"{sys.executable} -m surgery run r.yaml --source twins.onnx --out {tiny}/out; code=$?; "
        f"ls -A {tiny}; exit $code"
    )
    probe = subprocess.run(
        ["unshare", "-rm", "mount", "-t", "tmpfs", "none", str(tiny)], capture_output=True, check=False
    )
    if probe.returncode != 0:
        pytest.skip("this machine does not let a user mount a small disk")
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", script], cwd=folder, capture_output=True, text=True, check=False, timeout=120
    )
    assert done.returncode == 1, done.stdout + done.stderr
    assert "space" in done.stderr or "full" in done.stderr
    assert done.stdout.splitlines()[-1] == "r.yaml"


def test_plan_shows_the_steps_without_opening_a_model(folder: Path, surgery: Run) -> None:
    (folder / "twins.onnx").write_bytes(b"not read")
    done = surgery("plan", "r.yaml", cwd=folder)
    assert done.returncode == 0
    assert "dedup_weights" in done.stdout
    assert "exact" in done.stdout


def test_plan_finds_what_run_would_stumble_over(folder: Path, surgery: Run) -> None:
    file = recipe(folder, "dedup_weights")
    file.write_text(file.read_text().replace("['dedup_weights']", "[{pass: dedup_weights, models: [decoder]}]"))
    done = surgery("plan", "r.yaml", cwd=folder)
    assert done.returncode == 2
    assert "r.yaml:2: step 1 (dedup_weights): there is no model 'decoder' here" in done.stderr


def test_passes_lists_and_explains(folder: Path, surgery: Run) -> None:
    listed = surgery("passes").stdout
    assert "dedup_weights" in listed
    assert "Keep one copy of every weight." in listed
    page = surgery("passes", "dedup_weights").stdout
    assert "min_bytes: 128" in page
    assert "Leave weights that are smaller" in page
    unknown = surgery("passes", "dedup")
    assert unknown.returncode == 2
    assert "did you mean 'dedup_weights'?" in unknown.stderr


def test_the_schema_knows_every_pass_and_option(surgery: Run) -> None:
    schema = json.loads(surgery("schema").stdout)
    choices = schema["properties"]["steps"]["items"]["anyOf"]
    dedup = next(choice for choice in choices if choice.get("title") == "DedupWeights")
    assert dedup["properties"]["pass"]["const"] == "dedup_weights"
    assert dedup["properties"]["min_bytes"]["minimum"] == 1
    assert not dedup["additionalProperties"]


def test_folders_of_the_same_names_in_the_current_folder_shadow_nothing(folder: Path, surgery: Run) -> None:
    for name in ("passes", "tests", "onnx", "recipes"):
        (folder / name).mkdir()
        (folder / name / "__init__.py").write_text("raise ImportError('shadowed')\n")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    script = Path(sys.executable).with_name("surgery")
    assert script.exists(), "the console script is installed with the package"
    again = subprocess.run([script, "run", "r.yaml", "--overwrite"], cwd=folder, capture_output=True, check=False)
    assert again.returncode == 0


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; sys.argv = ['surgery', '--help']\n"
        "import runpy\n"
        "try: runpy.run_module('surgery', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = ('onnx', 'onnx_ir', 'numpy', 'torch', 'onnxruntime', 'polygraphy')\n"
        "print([name for name in heavy if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_planning_imports_no_torch_and_no_runtime(folder: Path) -> None:
    code = (
        "import sys; sys.argv = ['surgery', 'plan', 'r.yaml']\n"
        "import runpy\n"
        "try: runpy.run_module('surgery', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([name for name in ('torch', 'transformers', 'onnxruntime', 'polygraphy') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_without_a_runtime_no_check_still_works(folder: Path) -> None:
    """The core has no runtime: block its import as if it were not installed."""
    code = (
        "import sys; sys.modules['onnxruntime'] = None; sys.argv = ['surgery', 'run', 'r.yaml', *sys.argv[1:]]\n"
        "import runpy; runpy.run_module('surgery', run_name='__main__')\n"
    )
    environment = {**os.environ}
    checked = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=False, env=environment
    )
    assert checked.returncode == 1
    assert "pip install graph-surgery[cpu]" in checked.stderr
    unchecked = subprocess.run(
        [sys.executable, "-c", code, "--no-check"], cwd=folder, capture_output=True, text=True, check=False
    )
    assert unchecked.returncode == 0, unchecked.stderr
    assert isinstance(open_model(folder / "out" / "model.onnx"), ir.Model)


def test_a_pass_that_leaves_the_process_is_a_failed_step(folder: Path, surgery: Run) -> None:
    (folder / "mine.py").write_text(PASSES.replace('raise ValueError("something is off")', "raise SystemExit(0)"))
    recipe(folder, "mine:Breaks")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 1
    assert "step 1 (mine:Breaks): raised SystemExit" in done.stderr


def test_a_pass_that_returns_nothing_is_told_what_to_return(folder: Path, surgery: Run) -> None:
    (folder / "mine.py").write_text(PASSES.replace('return Change(1, "wrote 1 note")', "return None"))
    recipe(folder, "mine:Works")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 1
    assert "Works returned None, not a Change" in done.stderr


def test_files_of_the_user_in_the_way_of_a_rescue_are_kept(folder: Path, surgery: Run) -> None:
    (folder / "out.stopped").mkdir()
    (folder / "out.stopped" / "model.onnx").write_text("precious")
    recipe(folder, "mine:Breaks")
    done = surgery("run", "r.yaml", cwd=folder)
    assert "run out.stopped.again/recipe.yaml" in done.stderr
    assert (folder / "out.stopped" / "model.onnx").read_text() == "precious"


@pytest.mark.parametrize(
    ("more", "said"),
    [
        ("check: {data: nowhere.npz}", "check.data: there is no file"),
        ("check: {data: {modl: r.yaml}}", "check.data: the source has no model 'modl'; did you mean 'model'?"),
        ("check: {prompts: [a]}", "check.prompts: they need the models 'prefill' and 'decode'"),
    ],
)
def test_what_a_check_could_not_do_is_found_while_planning(folder: Path, surgery: Run, more: str, said: str) -> None:
    recipe(folder, "dedup_weights", more=more + "\n")
    done = surgery("plan", "r.yaml", cwd=folder)
    assert done.returncode == 2
    assert said in done.stderr


def test_a_model_named_twice_is_a_mistake(folder: Path, surgery: Run) -> None:
    file = recipe(folder, "dedup_weights")
    file.write_text(file.read_text().replace("['dedup_weights']", "[{pass: dedup_weights, models: [model, model]}]"))
    done = surgery("plan", "r.yaml", cwd=folder)
    assert done.returncode == 2
    assert "names the model 'model' twice" in done.stderr


def test_an_overridable_weight_is_valid_and_left_alone(folder: Path, surgery: Run) -> None:
    model = onnx.load(folder / "twins.onnx")
    model.graph.input.append(onnx.helper.make_tensor_value_info("w2", onnx.TensorProto.FLOAT, [64, 64]))
    onnx.save(model, folder / "twins.onnx")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "nothing to do" in done.stdout


def test_a_run_without_an_output_says_that_nothing_is_saved(folder: Path, surgery: Run) -> None:
    (folder / "r.yaml").write_text("source: twins.onnx\nsteps: [dedup_weights]\n")
    done = surgery("run", "r.yaml", cwd=folder)
    assert done.returncode == 0
    assert "nothing is saved" in done.stdout
