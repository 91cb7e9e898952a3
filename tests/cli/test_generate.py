"""`surgery generate`: what it prints, where, and what it refuses."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result
from models import generic

from passes.audit_ranges import AuditRanges
from passes.cast_fp16 import CastFp16
from surgery.pipeline import Pipeline
from surgery.storage import save_models

Call = Callable[..., Result]

SUM, ANSWER = "27+58=", "85"


def test_a_prompt_is_continued_and_nothing_else_is_printed(adder: Path, call: Call) -> None:
    done = call("generate", adder, "--prompt", SUM)
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{ANSWER}\n"


def test_a_merged_decoder_gives_the_same_text(merged_adder: Path, call: Call) -> None:
    assert call("generate", merged_adder, "--prompt", SUM).stdout == f"{ANSWER}\n"


def test_half_precision_on_the_cpu_is_said_to_be_none(adder: Path, call: Call, tmp_path: Path) -> None:
    with Pipeline([AuditRanges(rounds=1), CastFp16(refine=False)], check=None).run(adder) as result:
        result.save(tmp_path / "half")
    done = call("generate", tmp_path / "half", "--prompt", SUM)
    assert done.stdout == f"{ANSWER}\n"
    assert done.stderr == "note: on the CPU float16 is computed in float32; a GPU may answer otherwise\n"


@pytest.mark.long
def test_an_encoder_decoder_gives_its_text(merged_sorter: Path, call: Call) -> None:
    assert call("generate", merged_sorter, "--prompt", "3142").stdout == "1234\n"


def test_several_prompts_of_different_lengths_are_a_batch_with_a_line_each(adder: Path, call: Call) -> None:
    done = call("generate", adder, "--prompt", SUM, "--prompt", "9+94=", "--prompt", "1+1=")
    assert done.stdout.splitlines() == ["27+58= -> 85", "9+94= -> 103", "1+1= -> 2"]


@pytest.mark.long
def test_an_encoder_decoder_takes_a_batch(merged_sorter: Path, call: Call) -> None:
    done = call("generate", merged_sorter, "--prompt", "3142", "--prompt", "907")
    assert done.stdout.splitlines() == ["3142 -> 1234", "907 -> 079"]


@pytest.mark.parametrize("option", ["--prompts-file", "--prompt"])
def test_standard_input_is_read(adder: Path, call: Call, option: str) -> None:
    assert call("generate", adder, option, "-", stdin=f"{SUM}\n").stdout == f"{ANSWER}\n"


def test_a_file_holds_a_prompt_a_line(adder: Path, call: Call, tmp_path: Path) -> None:
    (tmp_path / "sums").write_text("27+58=\n\n9+94=\n")
    done = call("generate", adder, "--prompts-file", tmp_path / "sums")
    assert done.stdout.splitlines() == ["27+58= -> 85", "9+94= -> 103"]


def test_tokens_are_continued_without_a_tokenizer(adder: Path, call: Call, tmp_path: Path) -> None:
    bare = tmp_path / "bare"
    shutil.copytree(adder, bare)
    for file in bare.glob("tokenizer*"):
        file.unlink()
    refused = call("generate", bare, "--prompt", SUM)
    assert refused.exit_code == 1
    assert "the bundle has no tokenizer" in refused.stderr
    assert "--ids" in refused.stderr
    said = json.loads(call("generate", adder, "--prompt", SUM, "--json").stdout)["answers"][0]
    ids = ",".join(map(str, said["prompt_tokens"]))
    done = call("generate", bare, "--ids", ids)
    assert done.exit_code == 0, done.stderr
    assert [int(word) for word in done.stdout.split()] == said["tokens"]


def test_beams_answer_too(adder: Path, call: Call) -> None:
    assert call("generate", adder, "--prompt", SUM, "--beams", "3").stdout == f"{ANSWER}\n"


def test_json_holds_tokens_text_and_a_time_for_each_token(adder: Path, call: Call) -> None:
    done = call("generate", adder, "--prompt", SUM, "--json")
    content = json.loads(done.stdout)
    (answer,) = content["answers"]
    assert answer["text"] == ANSWER
    assert len(content["reached_seconds"]) == len(answer["tokens"])
    assert content["reached_seconds"] == sorted(content["reached_seconds"])
    assert content["seconds"] == content["reached_seconds"][-1] > 0


def test_what_follows_the_end_of_a_row_is_not_counted(adder: Path, call: Call) -> None:
    """1+1= has one digit and 998+999= four; the shorter one is padded while the longer one goes on."""
    content = json.loads(call("generate", adder, "--prompt", "1+1=", "--prompt", "998+999=", "--json").stdout)
    assert [len(answer["tokens"]) for answer in content["answers"]] == [2, 5]
    assert len(content["reached_seconds"]) == 5


def test_statistics_go_to_standard_error(adder: Path, call: Call) -> None:
    done = call("generate", adder, "--prompt", SUM, "--stats")
    assert done.stdout == f"{ANSWER}\n"
    assert "3 tokens in" in done.stderr


def test_a_seed_repeats_what_was_sampled_and_another_does_not(foreign_t5: Path, call: Call) -> None:
    arguments = ("generate", foreign_t5, "--ids", "3,1,4", "--temperature", "50", "--json", "--max-new-tokens", "20")
    tokens = [json.loads(call(*arguments, "--seed", seed).stdout)["answers"][0]["tokens"] for seed in ("1", "1", "2")]
    assert tokens[0] == tokens[1] != tokens[2]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "there is nothing to continue"),
        (("--prompt", ""), "a prompt is empty"),
        (("--prompt", SUM, "--ids", "1"), "texts and tokens do not go together"),
        (("--ids", "1,x"), "these are no ids of tokens"),
        (("--ids", "99"), "the vocabulary has"),
        (("--prompt", "1+?="), "the tokenizer cannot read '1+?='"),
        (("--prompt", SUM, "--greedy", "--top-k", "3"), "--top-k is for sampling"),
        (("--prompt", SUM, "--temperature", "0"), "--greedy takes the likeliest token"),
        (("--prompt", SUM, "--chat"), "the tokenizer has no chat template"),
        (("--ids", "1", "--system", "Be brief."), "a chat is of texts"),
        (("--prompt", SUM, "--max-new-tokens", "1000"), "--max-new-tokens 250"),
        (("--prompts-file", "nowhere"), "--prompts-file nowhere: cannot be read"),
        (("--prompt", "1\udcff="), r"the prompt '1\udcff=' is not UTF-8"),
        (("--prompt", SUM, "--seed", str(2**32)), "'--seed'"),
        (("--prompt", SUM, "--provider", "NoSuchExecutionProvider"), "NoSuchExecutionProvider"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else "",
)
def test_what_cannot_be_done_is_said(adder: Path, call: Call, arguments: tuple[str, ...], said: str) -> None:
    done = call("generate", adder, *arguments)
    assert done.exit_code in (1, 2)
    assert said in done.stderr
    assert done.stdout == ""


def test_standard_input_of_another_encoding_is_said(adder: Path, call: Call) -> None:
    done = call("generate", adder, "--prompt", "-", stdin=b"\xff\xfe")
    assert done.exit_code == 2
    assert done.stderr.startswith("error: standard input is not UTF-8")


def test_a_line_ends_where_a_line_of_a_file_does(call: Call, adder: Path, tmp_path: Path) -> None:
    (tmp_path / "sums").write_text("27+\u202858=\r\n", encoding="utf-8", newline="")
    done = call("generate", adder, "--prompts-file", tmp_path / "sums")
    assert r"the tokenizer cannot read '27+\u202858='" in done.stderr


def test_whoever_has_read_enough_is_not_told_of_an_error(adder: Path) -> None:
    command = [sys.executable, "-m", "surgery", "generate", str(adder), "--prompt", SUM]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 1


def test_a_chat_template_is_filled_in(adder: Path, call: Call, tmp_path: Path) -> None:
    chatty = tmp_path / "chatty"
    shutil.copytree(adder, chatty)
    config = json.loads((chatty / "tokenizer_config.json").read_text())
    config["chat_template"] = "{{ messages[0].content }}+{{ messages[1].content }}="
    (chatty / "tokenizer_config.json").write_text(json.dumps(config))
    done = call("generate", chatty, "--prompt", "58", "--system", "27")
    assert done.exit_code == 0, done.stderr
    assert done.stdout == f"{ANSWER}\n"


def test_a_single_model_that_does_not_generate_is_refused(tmp_path: Path, call: Call) -> None:
    save_models(generic().models, tmp_path / "single", layout="optimum")
    done = call("generate", tmp_path / "single", "--prompt", SUM)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr


def test_an_interruption_leaves_the_tokens_so_far(foreign_t5: Path, tmp_path: Path) -> None:
    """Without an end token a T5 goes on; it has no limit of positions."""
    endless = tmp_path / "endless"
    shutil.copytree(foreign_t5, endless)
    for name in ("config.json", "generation_config.json"):
        config = json.loads((endless / name).read_text())
        config["eos_token_id"] = None
        (endless / name).write_text(json.dumps(config))
    command = [
        sys.executable,
        "-m",
        "surgery",
        "generate",
        str(endless),
        "--ids",
        "3,1,4",
        "--max-new-tokens",
        "100000",
    ]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # A shell starts what it puts into the background with SIGINT ignored, and then Python ignores it too.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    first = process.stdout.read(6)
    process.send_signal(signal.SIGINT)
    rest, said = process.communicate(timeout=60)
    assert process.returncode == 130
    tokens = [int(word) for word in (first + rest).split()]
    assert 2 <= len(tokens) < 100000
    assert b"interrupted" in said
    assert b"Traceback" not in said
