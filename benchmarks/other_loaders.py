"""Whether other tools load merged bundles as they are saved, and generate what PyTorch does.

    python benchmarks/other_loaders.py [--quick] [--rows adder t5-base ...]

Each network is exported, its two decoders merged, and the bundle saved in both layouts. Optimum and transformers.js
load the folders, each in an environment of its own, which is set up in benchmarks/.cache unless two variables name one
(tests/other_loaders/loaders.py). They continue the same rows greedily, padded ones among them. What differs from
PyTorch is counted. `--quick` leaves the networks of real size out. A row that is done stays in the results and is not
made again, unless `--again` is said.
"""

from __future__ import annotations

import argparse
import json
import platform
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import families
import numpy as np
from models import CACHE

from passes.merge_if import MergeIf
from surgery import Pipeline

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT / "tests" / "other_loaders"))

from loaders import Job, by_optimum, by_torch, by_transformers_js, prepare, until_end  # noqa: E402

FOLDER = CACHE / "other_loaders"
RESULTS = HERE / "results" / "other_loaders"
LAYOUTS: Mapping[str, Mapping[str, Any]] = {
    "hub": {},
    "optimum": {"transformers_js": {"subfolder": "", "model_file_name": "decoder_model_merged"}},
}
LONGEST, ROWS, NEW_TOKENS = 24, 3, 32


@dataclass(frozen=True)
class Network:
    """A network: what is said of it, how its folder is made, and prompts if it has a tokenizer."""

    title: str
    make: Callable[[Path], None] | None
    prompts: tuple[str, ...] = ()
    is_big: bool = False


def tiny_bart(folder: Path) -> None:
    """Save a BART of two layers whose every weight is random, on a scale on which it does not say one thing only."""
    import torch
    from transformers import BartConfig, BartForConditionalGeneration

    sizes = {"d_model": 32, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "vocab_size": 64}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4, "encoder_layers": 2, "decoder_layers": 2}
    torch.manual_seed(0)
    model = BartForConditionalGeneration(BartConfig(**sizes, **heads, max_position_embeddings=128))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter), alpha=0.05)
            else:
                parameter.normal_(0.0, 1.0)
    model.save_pretrained(folder)


def t5_base(folder: Path) -> None:
    """Save a T5-base with random weights and a head of its own: a tied one would say the token that it was given."""
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
    model = T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=False))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.02)
    model.save_pretrained(folder)


NETWORKS: Mapping[str, Network] = {
    "adder": Network("GPT-2 that adds (trained)", None, ("27+58=", "9+94=", "111+3=")),
    "reverser": Network("Llama that spells backwards (trained)", None, ("stressed=", "abca=", "no=")),
    "sorter": Network("T5 that sorts (trained)", None, ("3142", "90716", "55")),
    "bart": Network("BART, 2 layers of width 32, random", tiny_bart),
    "gpt2": Network("GPT-2 124M, random", lambda folder: families.make("gpt2", folder), is_big=True),
    "t5-base": Network("T5-base with a head of its own, random", t5_base, is_big=True),
}


def main() -> None:
    """Compare what is asked for and write the table."""
    options = parse()
    done: dict[str, dict[str, Any]] = {}
    if RESULTS.with_suffix(".json").exists() and not options.again:
        done = json.loads(RESULTS.with_suffix(".json").read_text())["rows"]
    FOLDER.mkdir(parents=True, exist_ok=True)
    python, node = prepare(FOLDER)
    for name in options.rows or NETWORKS:
        network = NETWORKS[name]
        if name in done or (options.quick and network.is_big):
            continue
        print(f"{name}: exporting and merging", flush=True)
        source = source_of(name, network)
        save_layouts(name, source, again=options.again)
        done[name] = {"title": network.title, **compare(name, network, source, python, node)}
        write(done)
    write(done)
    print(RESULTS.with_suffix(".md").read_text())


def parse() -> argparse.Namespace:
    """Return the options."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="leave out the networks of real size")
    parser.add_argument("--rows", nargs="+", choices=list(NETWORKS), help="only these")
    parser.add_argument("--again", action="store_true", help="forget the results that there are")
    return parser.parse_args()


def source_of(name: str, network: Network) -> Path:
    """Return the folder of a network, made if need be."""
    if network.make is None:
        return ROOT / "fixtures" / name
    folder = FOLDER / name / "pretrained"
    if not folder.exists():
        draft = folder.with_suffix(".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        network.make(draft)
        draft.rename(folder)
    return folder


def save_layouts(name: str, source: Path, *, again: bool) -> None:
    """Save the merged bundle in each layout."""
    if not again and all((FOLDER / name / layout).exists() for layout in LAYOUTS):
        return
    with Pipeline([MergeIf()], None).run(source) as result:
        for layout in LAYOUTS:
            result.save(FOLDER / name / layout, layout=layout, overwrite=True)


def compare(name: str, network: Network, source: Path, python: str, node: Path) -> dict[str, Any]:
    """Return for each layout and loader how many tokens were compared and how many differ."""
    config = json.loads((source / "config.json").read_text())
    is_pair = bool(config.get("is_encoder_decoder"))
    jobs = {layout: job(FOLDER / name / layout, network, config, is_pair, layout) for layout in LAYOUTS}
    end = config.get("eos_token_id")
    wanted = by_torch(jobs["hub"], source)
    rows = until_end(wanted, end)
    found: dict[str, Any] = {
        "tokens": sum(map(len, rows)),
        "distinct": len({token for row in rows for token in row}),
        "loaders": {},
    }
    tools: Mapping[str, Callable[[Job], dict[str, Any]]] = {
        "Optimum": lambda job: by_optimum(job, python),
        "transformers.js": lambda job: by_transformers_js(job, node),
    }
    for layout, one in jobs.items():
        for tool, ask in tools.items():
            print(f"{name}: {tool}, layout {layout}", flush=True)
            told = ask(one)
            assert told["input_ids"] == wanted["input_ids"], f"{tool} reads the prompts otherwise"
            differ = sum(different(row, other) for row, other in zip(until_end(told, end), rows, strict=True))
            found["loaders"][f"{tool}, {layout}"] = {"differ": differ, "by": told["loaded_by"], "as": told["model"]}
    return found


def job(folder: Path, network: Network, config: Mapping[str, Any], is_pair: bool, layout: str) -> Job:
    """Return what is asked of a folder: its prompts, or random ids in rows of several lengths."""
    side = "right" if is_pair else "left"
    if network.prompts:
        return Job(folder, network.prompts, padding_side=side, max_new_tokens=NEW_TOKENS, options=LAYOUTS[layout])
    random = np.random.default_rng(0)
    ids = random.integers(3, config["vocab_size"] - 1, (ROWS, LONGEST))
    mask = np.ones_like(ids)
    for row in range(1, ROWS):
        zeros = slice(-row * 5, None) if is_pair else slice(0, row * 5)
        mask[row, zeros] = 0
        ids[row, zeros] = config.get("pad_token_id") or 0
    return Job(
        folder,
        input_ids=ids.tolist(),
        attention_mask=mask.tolist(),
        max_new_tokens=NEW_TOKENS,
        options=LAYOUTS[layout],
    )


def different(row: list[int], other: list[int]) -> int:
    """Return at how many places two rows differ."""
    return sum(one != two for one, two in zip(row, other, strict=False)) + abs(len(row) - len(other))


def write(done: Mapping[str, Mapping[str, Any]]) -> None:
    """Write the results so far."""
    ordered = {name: done[name] for name in NETWORKS if name in done}
    content = {"machine": platform.machine(), "python": platform.python_version(), "rows": ordered}
    RESULTS.with_suffix(".json").write_text(json.dumps(content, indent=2) + "\n")
    RESULTS.with_suffix(".md").write_text(table(ordered))


def table(done: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the results as Markdown."""
    return "\n".join(lines(done)) + "\n"


def lines(done: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yield the lines of the table."""
    loaders = list(next(iter(done.values()))["loaders"])
    by = {loader: row["loaders"][loader]["by"] for row in done.values() for loader in loaders}
    yield "# Merged bundles in other tools\n"
    yield (
        f"Made by `benchmarks/other_loaders.py`: greedy, {ROWS} rows of several lengths, up to {NEW_TOKENS} new "
        "tokens, compared with PyTorch's `generate` up to the end of each row (transformers.js goes on with rows that "
        "have ended). Tools: " + "; ".join(sorted(set(by.values()))) + ".\n"
    )
    yield f"| network | tokens | distinct | {' | '.join(f'{loader}: differ' for loader in loaders)} |"
    yield f"|---|---:|---:|{'---:|' * len(loaders)}"
    for row in done.values():
        cells = [str(row["loaders"][loader]["differ"]) for loader in loaders]
        yield f"| {row['title']} | {row['tokens']} | {row['distinct']} | {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
