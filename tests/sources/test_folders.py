"""Folders and files of other tools: real exports go through whole recipes, and what cannot be told is asked."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from typer.testing import CliRunner

from surgery import Pipeline
from surgery.accuracy.judge import Judge
from surgery.bundle import Bundle
from surgery.claims import Program
from surgery.cli import app
from surgery.errors import ModelFileError, RecipeError
from surgery.recipe import Check, Source, load_recipe
from surgery.report.rest import rest_of_recipe
from surgery.runtime.sessions import open_session
from surgery.sources import Opened, find_source
from surgery.sources.pretrained import Pretrained
from surgery.storage import open_model

FOREIGN = Path(__file__).parent / "foreign"
Run = Callable[..., subprocess.CompletedProcess[str]]

CHECK = "check: {batches: [1, 2], lengths: [1, 2, 7], past: [0, 1, 7]}\n"
WITH_PAST = "past 0, 1, 7"


def opened(path: Path | str, folder: Path = Path(), **options: object) -> Opened:
    return find_source(Source(path=str(path), **options), folder).open(Path(), lambda sentence: None)  # type: ignore[arg-type]


def interface(model: ir.Model) -> list[str]:
    return [value.name or "" for value in (*model.graph.inputs, *model.graph.outputs)]


def run(recipe: Path, *arguments: str) -> dict[str, object]:
    """Run a recipe in this process and return its report."""
    out = recipe.parent / "out"
    done = CliRunner().invoke(app, ["run", str(recipe), "--out", str(out), *arguments])
    assert done.exit_code == 0, done.output
    report: dict[str, object] = json.loads((out / "report.json").read_text())
    return report


def hub(folder: Path, *names: str) -> Path:
    """Lay out files of the T5 as on the Hub: the models in `onnx/`, the rest above it."""
    shutil.copytree(FOREIGN / "t5_all", folder, ignore=shutil.ignore_patterns("*.onnx"))
    (folder / "onnx").mkdir()
    for name in names:
        shutil.copy(FOREIGN / "t5_all" / name, folder / "onnx" / name)
    return folder


def two_files(folder: Path) -> Path:
    return Path(shutil.copytree(FOREIGN / "gpt2_all", folder, ignore=shutil.ignore_patterns("*merged*")))


LAYOUTS: dict[str, tuple[Callable[[Path], Path], list[str]]] = {
    "two files of Optimum": (two_files, ["prefill", "decode"]),
    "three decoders of Optimum": (lambda folder: FOREIGN / "gpt2_all", ["prefill", "decoder", "decode"]),
    "an encoder and three decoders": (
        lambda folder: FOREIGN / "t5_all",
        ["prefill", "decoder", "decode", "encoder"],
    ),
    "onnx/ as on the Hub": (
        lambda folder: hub(folder, "encoder_model.onnx", "decoder_model_merged.onnx"),
        ["decoder", "encoder"],
    ),
    "transformers.exporters": (lambda folder: FOREIGN / "gpt2_exporters", ["prefill", "decode"]),
    "transformers.exporters without its encoder": (lambda folder: FOREIGN / "t5_exporters", ["prefill", "decode"]),
    "onnxruntime-genai": (lambda folder: FOREIGN / "llama_genai", ["decode"]),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_folder_of_another_tool_goes_through_a_whole_recipe(layout: str, tmp_path: Path) -> None:
    make, roles = LAYOUTS[layout]
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"source: {make(tmp_path / 'models')}\nsteps: [dedup_weights]\noutput: {{layout: shared}}\n{CHECK}"
    )
    source, dedup = run(recipe)["steps"]  # type: ignore[misc]
    assert sorted(source["models"]) == sorted(roles)
    assert not source["warnings"]
    assert dedup["verdict"]["step"]["exact"]
    assert dedup["verdict"]["source"]["exact"]
    coverage = source["verdict"]["coverage"]
    assert set(coverage) == set(roles)
    assert all("padding no, yes" in said for said in coverage.values())
    assert all(WITH_PAST in coverage[role] for role in ("decode", "decoder") if role in roles)
    if "decoder" in roles:
        assert "use_cache_branch no, yes" in coverage["decoder"]
    saved = opened(tmp_path / "out").bundle
    assert set(saved.models) == set(roles)
    assert "tokenizer.json" in saved.files
    if len(roles) > 1:
        assert dedup["changes"] > 0
        assert dedup["verdict"]["coverage"] == coverage


def test_the_command_line_takes_a_folder_and_continues_prompts(surgery: Run, tmp_path: Path) -> None:
    """Under canonical names and under its own, an export continues a prompt alike."""
    said = []
    for names in ("canonical", "keep"):
        recipe = tmp_path / f"{names}.yaml"
        recipe.write_text(
            f"source: {{path: {FOREIGN / 'gpt2_exporters'}, names: {names}}}\nsteps: [dedup_weights]\n"
            "check: {prompts: ['3=4'], batches: [1, 2], lengths: [7], past: [0, 1, 7]}\n"
        )
        done = surgery("run", recipe, "--out", tmp_path / names)
        assert done.returncode == 0, done.stderr
        assert WITH_PAST in done.stdout
        said.append(re.findall("3=4 -> .*", done.stdout))
    assert said[0] == said[1] != []
    decode = opened(tmp_path / "keep", names="keep").bundle["decode"]
    assert interface(decode) == interface(open_model(FOREIGN / "gpt2_exporters" / "decode.onnx"))


# Names


def test_what_is_recognised_gets_canonical_names_and_says_so() -> None:
    source = opened(FOREIGN / "t5_exporters")
    bundle = source.bundle
    assert "encoder_hidden_states" in interface(bundle["prefill"])
    assert "past_key_values.0.encoder.value" in interface(bundle["decode"])
    assert "present.0.decoder.key" in interface(bundle["decode"])
    assert source.notes == (
        "prefill: 7 names of transformers.exporters made optimum's",
        "decode: 11 names of transformers.exporters made optimum's",
    )


def test_the_ledger_says_what_was_renamed() -> None:
    with Pipeline([], None).run(FOREIGN / "gpt2_exporters") as result:
        assert "decode: 8 names of transformers.exporters made optimum's" in result.records[0].change.summary
        assert "made optimum's" in result.table()


def test_names_can_be_kept() -> None:
    bundle = opened(FOREIGN / "t5_exporters", names="keep").bundle
    for role, model in bundle.models.items():
        assert interface(model) == interface(open_model(FOREIGN / "t5_exporters" / f"{role}.onnx"))


def test_a_single_file_is_never_renamed_unless_its_role_is_given() -> None:
    path = FOREIGN / "gpt2_exporters" / "decode.onnx"
    single = opened(path).bundle
    assert list(single.models) == ["model"]
    assert interface(single["model"]) == interface(open_model(path))
    given = opened(path, roles={"decode": "decode.onnx"}).bundle
    assert list(given.models) == ["decode"]
    assert "past_key_values.0.key" in interface(given["decode"])
    assert given.config["model_type"] == "gpt2"


def test_a_role_of_ones_own_is_never_renamed() -> None:
    bundle = opened(FOREIGN / "gpt2_exporters", roles={"drafter": "decode.onnx", "model": "prefill.onnx"}).bundle
    assert "input.past_key_values.layers.0.keys" in interface(bundle["drafter"])
    assert "past_key_values.layers.0.keys" in interface(bundle["model"])


def test_a_canonical_name_that_is_taken_is_refused_by_name(tmp_path: Path) -> None:
    shutil.copytree(FOREIGN / "gpt2_exporters", tmp_path / "models")
    path = tmp_path / "models" / "decode.onnx"
    model = onnx.load(path, load_external_data=False)
    model.graph.input.append(onnx.helper.make_tensor_value_info("past_key_values.0.key", 1, [1]))
    path.write_bytes(model.SerializeToString())
    with pytest.raises(RecipeError, match=r"cannot be called 'past_key_values\.0\.key': another input") as caught:
        opened(tmp_path / "models")
    assert "names: keep" in caught.value.hint
    assert opened(tmp_path / "models", names="keep").bundle.models


def test_what_a_run_left_keeps_its_names_when_it_goes_on(tmp_path: Path) -> None:
    file = tmp_path / "r.yaml"
    file.write_text(f"source: {FOREIGN / 'gpt2_exporters'}\nsteps: [dedup_weights]\n")
    rest = rest_of_recipe(load_recipe(file), 1, ("prefill", "decode"))
    (tmp_path / "rest.yaml").write_text(rest)
    assert load_recipe(tmp_path / "rest.yaml").source == Source(path=".", names="keep")


# Roles in the recipe


def renamed_models(folder: Path) -> Path:
    """Put an export into a folder under names that say nothing."""
    folder.mkdir()
    for name, other in (("prefill", "a"), ("decode", "b")):
        onnx.save(onnx.load(FOREIGN / "gpt2_exporters" / f"{name}.onnx"), folder / f"{other}.onnx")
    return folder


def test_roles_say_which_file_is_which(tmp_path: Path) -> None:
    renamed_models(tmp_path / "models")
    (tmp_path / "models" / "notes.onnx").write_text("not a model, and not named")
    for path in ("models", "models/*.onnx", "models/a.onnx"):
        found = opened(path, tmp_path, roles={"prefill": "a.onnx", "decode": "b.onnx"})
        assert list(found.bundle.models) == ["prefill", "decode"]
        assert "past_key_values.0.key" in interface(found.bundle["decode"])
        assert found.inputs == (tmp_path / "models",)


def test_a_file_that_looks_like_another_role_is_taken_and_said() -> None:
    swapped = opened(FOREIGN / "gpt2_exporters", roles={"prefill": "decode.onnx", "decode": "prefill.onnx"}).notes
    assert "prefill: decode.onnx has the inputs and outputs of 'decode'" in swapped
    assert "decode: prefill.onnx has the inputs and outputs of 'prefill'" in swapped
    for layout in ("gpt2_exporters", "gpt2_all", "t5_all", "t5_exporters", "llama_genai"):
        assert not any("has the inputs and outputs of" in note for note in opened(FOREIGN / layout).notes)


@pytest.mark.parametrize(
    ("layout", "roles"),
    [
        ("t5_all", {"decode": "decoder_with_past_model.onnx"}),
        ("t5_all", {"encoder": "encoder_model.onnx", "decode": "decoder_with_past_model.onnx"}),
        ("t5_exporters", {"decode": "decode.onnx"}),
    ],
)
def test_a_decoder_whose_prefill_is_not_there_is_fed_an_encoder_s_keys_and_values(
    layout: str, roles: dict[str, str]
) -> None:
    bundle = opened(FOREIGN / layout, roles=roles).bundle
    check = Check(batches=(1, 3), lengths=(1, 5), past=(0, 1, 7))
    with closing(Judge(bundle, check)) as judge:
        assert judge.judge_source().failures == ()
        fed = list(judge.feeds(bundle, "decode"))
    for arrays in fed:
        crossed = arrays["past_key_values.0.encoder.key"]
        assert crossed.any()
        assert crossed.shape[2] == arrays["encoder_attention_mask"].shape[1]
    assert {arrays["past_key_values.0.decoder.key"].shape[2] for arrays in fed} == {0, 1, 7}


def test_a_file_outside_the_folder_is_protected_too(tmp_path: Path) -> None:
    renamed_models(tmp_path / "models")
    (tmp_path / "models" / "b.onnx").rename(tmp_path / "b.onnx")
    found = opened("models", tmp_path, roles={"prefill": "a.onnx", "decode": "../b.onnx"})
    assert [path.resolve() for path in found.inputs] == [tmp_path / "models", tmp_path / "b.onnx"]


def test_an_ambiguous_folder_lists_its_files_and_what_to_write_does(tmp_path: Path) -> None:
    models = renamed_models(tmp_path / "models")
    shutil.copy(models / "a.onnx", models / "d.onnx")
    (models / "c.onnx").write_text("version https://git-lfs.github.com/spec/v1\n")
    text = '<ir_version: 10, opset_import: ["" : 18]> g (float[2] x) => (float[2] y) { y = Neg(x) }'
    onnx.save(onnx.parser.parse_model(text), models / "3e.onnx")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("# What comes out.\nsource: models\nsteps: [dedup_weights]\n")
    done = CliRunner().invoke(app, ["plan", str(recipe)])
    assert done.exit_code == 2
    said = done.stderr.splitlines()
    assert said[0] == f"error: {recipe}:2: {models}: cannot tell the role of '3e.onnx'"
    assert said[1] == "  3e.onnx: neither an encoder nor a decoder with a cache: x -> y"
    assert said[2] == "  a.onnx: looks like 'prefill' of 2 layers, with the names of transformers.exporters"
    assert said[3] == "  b.onnx: looks like 'decode' of 2 layers, with the names of transformers.exporters"
    assert said[4].startswith("  c.onnx: cannot be opened: ")
    assert said[6].startswith("  try: say which file is which")
    pasted = said[7:]
    assert pasted[-1] == "    # prefill: d.onnx"
    recipe.write_text("\n".join([*pasted, "steps: [dedup_weights]"]))
    assert load_recipe(recipe).source.roles == {"_3e": "3e.onnx", "prefill": "a.onnx", "decode": "b.onnx"}
    assert CliRunner().invoke(app, ["plan", str(recipe)]).exit_code == 0


def test_an_ambiguous_pattern_does_too(tmp_path: Path) -> None:
    renamed_models(tmp_path / "models")
    recipe = tmp_path / "r.yaml"
    recipe.write_text("source: '*/*.onnx'\nsteps: [dedup_weights]\n")
    done = CliRunner().invoke(app, ["plan", str(recipe)])
    assert done.exit_code == 2
    recipe.write_text("\n".join([*done.stderr.splitlines()[4:], "steps: [dedup_weights]"]))
    assert load_recipe(recipe).source.roles == {"prefill": "models/a.onnx", "decode": "models/b.onnx"}
    assert CliRunner().invoke(app, ["plan", str(recipe)]).exit_code == 0


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("{path: models, roles: {prefill: a.onxx}}", "r.yaml:1: source.roles: prefill: there is no file 'a.onxx' in"),
        ("{path: models, roles: {prefill: a.onxx}}", "did you mean 'a.onnx'?"),
        ("{path: nowhere, roles: {prefill: a.onnx}}", "nowhere: no such folder"),
        ("{path: models, roles: {'a b': a.onnx}}", "r.yaml:1: keys are words, not 'a b'"),
        ("{path: models, roles: {prefill: 3}}", "r.yaml:1: prefill: input should be a valid string, not 3"),
        ("{path: models, roles: {}}", "r.yaml:1: roles: "),
        ("{path: models, roles: a.onnx}", "r.yaml:1: roles: "),
        ("{path: models, names: kept}", "r.yaml:1: names: input should be 'canonical' or 'keep', not 'kept'"),
        ("{path: models, rolls: {prefill: a.onnx}}", "unknown option 'rolls'; did you mean 'roles'?"),
        ("{path: models, opset: 18, roles: {prefill: a.onnx}}", "source.opset is for Hugging Face models"),
        ("models/c*.onnx", "models/c*.onnx: no .onnx file in"),
        ("nowhere/*.onnx", "nowhere/*.onnx: no .onnx file in"),
    ],
)
def test_a_mistake_in_the_source_says_its_line(source: str, said: str, tmp_path: Path) -> None:
    renamed_models(tmp_path / "models")
    (tmp_path / "r.yaml").write_text(f"source: {source}\nsteps: [dedup_weights]\n")
    done = CliRunner().invoke(app, ["plan", str(tmp_path / "r.yaml")])
    assert done.exit_code == 2
    assert said in done.stderr


def test_a_pattern_takes_the_files_that_it_finds_by_their_names(tmp_path: Path) -> None:
    folder = two_files(tmp_path / "models")
    found = opened("mod*/decoder_*.onnx", tmp_path)
    assert list(found.bundle.models) == ["prefill", "decode"]
    assert set(found.inputs) == set(folder.glob("*.onnx"))
    assert list(opened("models/*past*.onnx", tmp_path).bundle.models) == ["decode"]


# Layouts


def test_companions_above_onnx_travel_along_also_when_onnx_itself_is_named(tmp_path: Path) -> None:
    folder = hub(tmp_path / "t5", "encoder_model.onnx", "decoder_model_merged.onnx")
    for path in (folder, folder / "onnx"):
        bundle = opened(path).bundle
        assert {"config.json", "generation_config.json", "tokenizer.json"} <= set(bundle.files)
        assert bundle.config["model_type"] == "t5"
        assert bundle.generation_config["decoder_start_token_id"] == 0


def test_pytorch_weights_go_before_onnx_below_them(tmp_path: Path) -> None:
    folder = hub(tmp_path / "t5", "encoder_model.onnx", "decoder_model_merged.onnx")
    (folder / "model.safetensors").touch()
    assert isinstance(find_source(Source(path=str(folder)), Path()), Pretrained)
    assert opened(folder / "onnx").bundle.models


def test_other_precisions_are_left_aside_and_said(tmp_path: Path) -> None:
    folder = hub(tmp_path / "t5", "encoder_model.onnx", "decoder_model_merged.onnx")
    for name in (
        "decoder_model_merged_fp16",
        "decoder_model_merged_quantized",
        "encoder_model_q4f16",
        "encoder_model_int8",
    ):
        shutil.copy(folder / "onnx" / "encoder_model.onnx", folder / "onnx" / f"{name}.onnx")
    source = opened(folder)
    bundle = source.bundle
    assert interface(bundle["decoder"]) == interface(open_model(FOREIGN / "t5_all" / "decoder_model_merged.onnx"))
    assert set(bundle.models) == {"encoder", "decoder"}
    assert source.notes == (
        "decoder_model_merged_fp16.onnx, decoder_model_merged_quantized.onnx, encoder_model_int8.onnx, "
        "encoder_model_q4f16.onnx left aside, of other precisions",
    )


def test_a_single_precision_is_taken_and_a_mixture_is_asked_about(tmp_path: Path) -> None:
    folder = hub(tmp_path / "t5")
    for name in ("encoder_model", "decoder_model_merged"):
        shutil.copy(FOREIGN / "t5_all" / f"{name}.onnx", folder / "onnx" / f"{name}_fp16.onnx")
    assert set(opened(folder).bundle.models) == {"encoder", "decoder"}
    (folder / "onnx" / "encoder_model_fp16.onnx").rename(folder / "onnx" / "encoder_model.onnx")
    with pytest.raises(RecipeError, match="of 'decoder_model_merged' there are only other precisions") as caught:
        opened(folder)
    assert "    decoder: onnx/decoder_model_merged_fp16.onnx" in caught.value.hint.splitlines()
    roles = {"encoder": "onnx/encoder_model.onnx", "decoder": "onnx/decoder_model_merged_fp16.onnx"}
    assert set(opened(folder, roles=roles).bundle.models) == {"encoder", "decoder"}


def test_the_list_of_transformers_exporters_says_which_file_is_which(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(FOREIGN / "gpt2_exporters", folder)
    listing = json.loads((folder / "export.json").read_text())
    (folder / "prefill.onnx").rename(folder / "one.onnx")
    listing["components"]["prefill"]["file"] = "one.onnx"
    (folder / "export.json").write_text(json.dumps(listing))
    assert find_source(Source(path=str(folder)), Path()).roles == ("prefill", "decode")


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        (lambda listing: listing.update(export_format="openvino"), RecipeError, "an export to 'openvino', not to ONNX"),
        (
            lambda listing: listing["components"]["decode"].update(file="gone.onnx"),
            RecipeError,
            "there is no 'gone.onnx'",
        ),
        (lambda listing: listing["components"]["decode"].update(file="../../decode.onnx"), None, ""),
        (lambda listing: listing["components"]["decode"].pop("file"), ModelFileError, "names no file for 'decode'"),
        (lambda listing: listing.pop("components"), None, ""),
    ],
)
def test_a_list_that_does_not_add_up(
    change: Callable[[dict[str, object]], None], error: type[Exception] | None, said: str, tmp_path: Path
) -> None:
    folder = tmp_path / "models"
    shutil.copytree(FOREIGN / "gpt2_exporters", folder)
    listing = json.loads((folder / "export.json").read_text())
    change(listing)
    (folder / "export.json").write_text(json.dumps(listing))
    if error is None:  # by the file's name alone, in the folder itself
        assert set(find_source(Source(path=str(folder)), Path()).roles) == {"prefill", "decode"}
        return
    with pytest.raises(error, match=said):
        find_source(Source(path=str(folder)), Path())


def test_a_list_that_is_no_json_is_a_broken_file(tmp_path: Path) -> None:
    shutil.copytree(FOREIGN / "gpt2_exporters", tmp_path / "models")
    (tmp_path / "models" / "export.json").write_text("{")
    with pytest.raises(ModelFileError, match=r"export\.json: not JSON"):
        find_source(Source(path=str(tmp_path / "models")), Path())


def test_the_config_of_onnxruntime_genai_travels_along_with_the_saved_file_s_name(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(f"source: {FOREIGN / 'llama_genai'}\nsteps: [dedup_weights]\n{CHECK}")
    run(recipe)
    config = json.loads((tmp_path / "out" / "genai_config.json").read_text())
    assert config["model"]["decoder"]["filename"] == "decoder_with_past_model.onnx"
    assert (tmp_path / "out" / "decoder_with_past_model.onnx").is_file()
    bundle = opened(FOREIGN / "llama_genai").bundle
    assert (bundle.config["vocab_size"], bundle.config["head_dim"]) == (16, 16)
    assert bundle.generation_config["eos_token_id"] == 2


def test_a_pipeline_of_onnxruntime_genai_is_asked_about(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    shutil.copytree(FOREIGN / "llama_genai", folder)
    config = json.loads((folder / "genai_config.json").read_text())
    config["model"]["decoder"]["pipeline"] = [{"embeddings": {"filename": "model.onnx"}}]
    (folder / "genai_config.json").write_text(json.dumps(config))
    with pytest.raises(RecipeError, match="a pipeline of several decoders") as caught:
        find_source(Source(path=str(folder)), Path())
    assert "    decode: model.onnx" in caught.value.hint.splitlines()


def test_a_source_is_never_written_to(tmp_path: Path) -> None:
    folder = two_files(tmp_path / "models")
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"source: 'models/*.onnx'\nsteps: [dedup_weights]\n{CHECK}output: {{folder: models, overwrite: true}}\n"
    )
    done = CliRunner().invoke(app, ["run", str(recipe)])
    assert done.exit_code == 1
    assert "the source, which is never written to" in done.stderr
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


# Feeds of merged decoders


def test_both_branches_of_a_merged_decoder_say_what_the_two_decoders_say() -> None:
    """The samples of a merged decoder hold a real past: with it, it answers as the decoder with past does."""
    bundle = opened(FOREIGN / "t5_all").bundle
    merged = {"encoder": bundle["encoder"], "decoder": bundle["decoder"]}
    check = Check(batches=(1, 2), lengths=(1, 7), past=(0, 1, 7))
    with closing(Judge(Bundle(merged, bundle.config), check)) as judge:
        samples = [*judge._samples.of(Program("decoder"))]
    sessions = {role: open_session(bundle[role]) for role in ("prefill", "decode", "decoder")}
    seen: dict[str, int] = {}
    for sample in samples:
        feeds = dict(sample.arrays)
        alone = "decode" if feeds["use_cache_branch"].all() else "prefill"
        seen[alone] = seen.get(alone, 0) + 1
        wanted = [value.name for value in sessions[alone].get_inputs()]
        (logits,) = sessions["decoder"].run(["logits"], feeds)
        (expected,) = sessions[alone].run(["logits"], {name: feeds[name] for name in wanted})
        assert np.allclose(logits, expected, atol=1e-5)
        if alone == "decode" and feeds["past_key_values.0.decoder.key"].shape[2]:
            assert np.abs(feeds["past_key_values.0.decoder.key"]).max() > 0
            assert np.abs(feeds["past_key_values.0.encoder.key"]).max() > 0
    assert seen == {"prefill": 3, "decode": 6}
