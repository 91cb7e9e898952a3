"""Generation on this machine's CPU: PyTorch eager, Optimum, a numpy host loop and ours, in turns.

    python benchmarks/generate.py [--rounds 3] [--threads 2] [--rows gpt2 "t5-base, batch 1"] [--optimum PYTHON]
                                  [--quick] [--again]

GPT-2 124M, T5-base and a DistilBERT classifier at their real configurations, with random weights, biases and norms.
Greedy search at batch 1, 16 and 64, four beams, and one long greedy row for the time of a token by what is cached. Each
tool of a row is a process that holds its model; all take turns, one warm-up and then `--rounds` that count. No token
ends a text, so all generate as much. Tokens are compared with PyTorch's; where they differ, PyTorch says how
close its own two scores are: at a tie rounding chooses. `--optimum` names the Python of an environment with Optimum
(`pip install torch optimum-onnx`), which exports the same weights itself; without it that peer is left out. `--rows`
takes beginnings of row names. Rows that are in benchmarks/results already are left as they are, unless `--again` is
given. `--quick` generates a sixth as much, once, and writes nothing.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from models import CACHE
from racing import Facts, Worker, serve, timed

HERE = Path(__file__).resolve().parent
RESULTS = HERE / "results"
MODELS = CACHE / "generate"
T5_BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12}
KINDS = {"gpt2": "decoder", "t5-base": "encoder-decoder", "distilbert": "classifier"}
PAIR, MERGED = ("tie_transposed", "fuse_cache"), ("merge_if",)
TORCH, OPTIMUM, NUMPY, OURS, OURS_MERGED = "PyTorch", "Optimum", "numpy loop", "ours", "ours, merged"
TOOLS = (TORCH, OPTIMUM, NUMPY, OURS, OURS_MERGED)
CALLS = 10
"""How often a classifier is called in a run, which takes milliseconds."""
TIE = 1e-4
"""Two scores closer than this share of their spread are a tie."""
START = 0
"""T5's first token."""


@dataclasses.dataclass(frozen=True)
class Case:
    """A row: how many prompts, of how many tokens, continued by how many."""

    model: str
    batch: int
    prompt: int
    new: int = 0
    beams: int = 1

    @property
    def kind(self) -> str:
        return KINDS[self.model]

    @property
    def name(self) -> str:
        if self.kind == "classifier":
            return f"{self.model}, batch {self.batch}, {self.prompt} tokens, {CALLS} times"
        beams = f", {self.beams} beams" if self.beams > 1 else ""
        return f"{self.model}, batch {self.batch}{beams}, {self.prompt} + {self.new}"

    def for_peers(self) -> str:
        return json.dumps({**dataclasses.asdict(self), "kind": self.kind, "calls": CALLS})


CASES = (
    *(
        case
        for model in ("gpt2", "t5-base")
        for case in (
            Case(model, 1, 6, 250),
            Case(model, 16, 36, 36),
            Case(model, 64, 36, 36),
            Case(model, 1, 36, 36, beams=4),
            Case(model, 1, 6, 1010),
            Case(model, 16, 36, 260),
        )
    ),
    Case("distilbert", 1, 128),
    Case("distilbert", 16, 128),
)


def main() -> None:
    """Measure and write the table, or be one of the processes that take turns."""
    options = parse()
    if options.worker:
        tool, case = options.worker[0], Case(**json.loads(options.worker[1]))
        serve(WORKERS[tool](case, options.threads))
        return
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / "generate.json"
    known: dict[str, Any] = json.loads(path.read_text()) if path.exists() and not options.quick else {}
    cases = [case for case in CASES if not options.rows or any(case.name.startswith(row) for row in options.rows)]
    for model in dict.fromkeys(case.model for case in cases):
        make_models(model)
    for case in cases:
        if case.name in known and not options.again:
            print(f"{case.name}: measured before; --again measures it again", flush=True)
            continue
        print(f"{case.name} ...", flush=True)
        if options.quick and case.new:
            case = dataclasses.replace(case, new=max(case.new // 6, 8))
        known[case.name] = {**machine(options), **race(case, options)}
        if not options.quick:
            path.write_text(json.dumps(known, indent=1) + "\n")
            (RESULTS / "generate.md").write_text(text_of(known))
        print(text_of({case.name: known[case.name]}), flush=True)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="rounds that count, after one warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rows", nargs="+", default=[], help="only rows whose names begin like this")
    parser.add_argument("--tools", nargs="+", default=TOOLS, choices=TOOLS)
    parser.add_argument("--optimum", help="the Python of an environment with Optimum")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--again", action="store_true", help="measure rows again that are in the results")
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.quick:
        options.rounds = 1
    return options


def machine(options: argparse.Namespace) -> Facts:
    import onnxruntime
    import torch
    import transformers

    return {
        "rounds": options.rounds,
        "threads": options.threads,
        "cores": os.cpu_count(),
        "machine": platform.machine(),
        "load": os.getloadavg()[0],
        "python": platform.python_version(),
        "onnxruntime": onnxruntime.__version__,
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
    }


def make_models(name: str) -> None:
    """Make the weights, the pair of decoders and the merged one, where they are not there yet."""
    home = MODELS / name
    home.mkdir(parents=True, exist_ok=True)
    if not (home / "hf").exists():
        save_random(name, home / "hf")
    steps = {"classifier": {"two": ("dedup_weights",)}}.get(KINDS[name], {"two": PAIR, "merged": MERGED})
    for folder, words in steps.items():
        if (home / folder).exists():
            continue
        print(f"making {name}, {folder} ...", flush=True)
        recipe = home / f"{folder}.yaml"
        source = home / ("two" if folder == "merged" else "hf")
        recipe.write_text(f"source: {source}\nsteps: [{', '.join(words)}]\noutput: {{folder: {folder}.tmp}}\n")
        shutil.rmtree(home / f"{folder}.tmp", ignore_errors=True)
        command = [sys.executable, "-m", "surgery", "run", str(recipe), "--no-check"]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        (home / f"{folder}.tmp").rename(home / folder)


def save_random(name: str, folder: Path) -> None:
    """Write a network at its published configuration; biases and norms are random too, as in a trained one."""
    import torch
    import transformers

    torch.manual_seed(0)
    makers: Mapping[str, Callable[[], Any]] = {
        "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
        "t5-base": lambda: transformers.T5ForConditionalGeneration(
            transformers.T5Config(**T5_BASE, decoder_start_token_id=START)
        ),
        "distilbert": lambda: transformers.DistilBertForSequenceClassification(transformers.DistilBertConfig()),
    }
    network = makers[name]()
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    draft = folder.with_suffix(".tmp")
    network.save_pretrained(draft)
    draft.rename(folder)


def race(case: Case, options: argparse.Namespace) -> Facts:
    """Let the tools take turns on one row."""
    log = MODELS / "logs"
    log.mkdir(exist_ok=True)
    workers = {tool: Worker(command, log / f"{tool}.log") for tool, command in commands(case, options)}
    runs: dict[str, list[Facts]] = {tool: [] for tool in workers}
    failed: dict[str, str] = {}
    ids = prompts(case)
    try:
        for number in range(options.rounds + 1):
            for tool, worker in rotated(tuple(workers.items()), number):
                if tool in failed:
                    continue
                try:
                    run = worker.ask(ids=ids)
                except RuntimeError as error:
                    failed[tool] = str(error)
                    print(f"  {tool} failed: {error}", flush=True)
                    continue
                print(f"  round {number}, {tool}: {run['seconds']:.2f} s", flush=True)
                if number:
                    runs[tool].append(run)
        facts = {tool: summary(case, some) for tool, some in runs.items() if some}
        expected = runs[TORCH][0]["tokens"] if runs.get(TORCH) else None
        for tool, some in runs.items():
            if some and expected is not None:
                facts[tool]["tokens"] = compared(case, some, expected, ids, workers[TORCH])
    finally:
        for worker in workers.values():
            worker.close()
    return {"tools": facts, "failed": failed, "cache_bytes_a_token": cache_bytes(case)}


def rotated(workers: Sequence[tuple[str, Worker]], number: int) -> Sequence[tuple[str, Worker]]:
    """Return who comes when in a round: each tool is once the first of all, so that none follows another always."""
    start = number % len(workers)
    return (*workers[start:], *workers[:start])


def commands(case: Case, options: argparse.Namespace) -> Iterator[tuple[str, Sequence[str]]]:
    threads = str(options.threads)
    home = MODELS / case.model
    for tool in options.tools:
        if tool == OPTIMUM and options.optimum:
            peer = [options.optimum, str(HERE / "peers" / "optimum_generate.py")]
            yield tool, [*peer, str(home / "hf"), str(home / "optimum"), case.for_peers(), threads]
        if tool == OPTIMUM or (tool == NUMPY and case.beams > 1) or (tool == OURS_MERGED and not case.new):
            continue
        asked = json.dumps(dataclasses.asdict(case))
        yield tool, [sys.executable, __file__, "--threads", threads, "--worker", tool, asked]


def prompts(case: Case) -> list[list[int]]:
    """Return ids [batch, prompt]; none of them is a special token's."""
    found: list[list[int]] = np.random.default_rng(0).integers(1000, 30000, (case.batch, case.prompt)).tolist()
    return found


def cache_bytes(case: Case) -> int:
    """Return how many bytes of keys and values a token adds to the cache: 12 layers of 768 floats."""
    return 2 * 12 * 768 * 4 * case.batch * case.beams if case.new else 0


def summary(case: Case, runs: Sequence[Facts]) -> Facts:
    """Return medians of the runs; a token's time is the median over its neighbours too."""
    facts: Facts = {key: statistics.median(run[key] for run in runs) for key in ("seconds", "cpu_seconds")}
    facts["all_seconds"] = [run["seconds"] for run in runs]
    if not case.new:
        return facts
    facts["first_ms"] = 1e3 * statistics.median(run["steps"][0] for run in runs)
    times = [1e3 * statistics.median(pair) for pair in zip(*(np.diff(run["steps"]) for run in runs), strict=True)]
    facts["token_ms"] = statistics.median(times)
    start = case.prompt if case.kind == "decoder" else 0
    marks = [mark for mark in (50, 100, 250, 500, 1000) if 25 <= mark - start <= len(times)]
    facts["token_ms_at"] = {str(mark): statistics.median(times[mark - start - 25 : mark - start]) for mark in marks}
    return facts


def compared(case: Case, runs: Sequence[Facts], expected: Any, ids: Any, torch_worker: Worker) -> str:
    """Say whether every run gave PyTorch's tokens, and if not, how close PyTorch's own scores are where they part."""
    if case.kind == "classifier":
        gap = max(float(np.abs(np.array(run["tokens"]) - np.array(expected)).max()) for run in runs)
        return f"logits off by {gap:.1e}"
    rows = [
        (ids[row], expected[row], given[row]) for given in (run["tokens"] for run in runs) for row in range(case.batch)
    ]
    parted = [row for row in rows if row[1] != row[2]]
    if not parted:
        return "equal"
    margins = [torch_worker.ask(margin=row)["margin"] for row in parted]
    kind = "ties" if max(margins) < TIE else "DIFFERENT"
    return f"{kind}: {len(parted)} of {len(rows)} rows part where scores are {max(margins):.1e} apart"


# The workers


def torch_worker(case: Case, threads: int) -> Callable[[Facts], Facts]:
    """PyTorch eager, with transformers' own cache."""
    import torch
    import transformers

    torch.set_num_threads(threads)
    loaders = {
        "decoder": transformers.AutoModelForCausalLM,
        "encoder-decoder": transformers.AutoModelForSeq2SeqLM,
        "classifier": transformers.AutoModelForSequenceClassification,
    }
    network = loaders[case.kind].from_pretrained(MODELS / case.model / "hf").eval()

    def margin(ids: list[int], expected: list[int], given: list[int]) -> float:
        """Return how far apart two continuations are: the difference of their likelihoods, over the scores' spread."""
        part = next(index for index, (a, b) in enumerate(zip(expected, given, strict=True)) if a != b)
        length = case.new if case.beams > 1 else part + 1
        sums, spread = [], 1.0
        for tokens in (expected[:length], given[:length]):
            new = torch.tensor([tokens])
            if case.kind == "decoder":
                scores = network(torch.cat([torch.tensor([ids]), new], 1)).logits[:, -length - 1 : -1]
            else:
                fed = torch.cat([torch.tensor([[START]]), new[:, :-1]], 1)
                scores = network(input_ids=torch.tensor([ids]), decoder_input_ids=fed).logits
            spread = float(scores.std())
            chosen = scores.log_softmax(-1).gather(-1, new[..., None])[0, :, 0]
            sums.append(float(chosen.sum() if case.beams > 1 else chosen[part]))
        return abs(sums[0] - sums[1]) / spread

    @torch.inference_mode()
    def answer(question: Facts) -> Facts:
        if "margin" in question:
            return {"margin": margin(*question["margin"])}
        ids = torch.tensor(question["ids"])
        if case.kind == "classifier":
            return repeated(lambda: network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.tolist())
        return timed(lambda tick: generated(network, case, ids, tick))

    return answer


def ours_worker(case: Case, threads: int) -> Callable[[Facts], Facts]:
    """Our generator over the pair of decoders; a bound session over the classifier."""
    import torch

    torch.set_num_threads(threads)
    if case.kind == "classifier":
        return our_classifier(case, threads)
    return our_generator(case, threads, "two")


def merged_worker(case: Case, threads: int) -> Callable[[Facts], Facts]:
    """Our generator over the merged decoder."""
    import torch

    torch.set_num_threads(threads)
    return our_generator(case, threads, "merged")


def our_generator(case: Case, threads: int, folder: str) -> Callable[[Facts], Facts]:
    import torch

    from surgery.runtime.generation import open_generator

    generator = open_generator(MODELS / case.model / folder, threads=threads)

    @torch.inference_mode()
    def answer(question: Facts) -> Facts:
        ids = torch.tensor(question["ids"])
        return timed(lambda tick: generated(generator, case, ids, tick))

    return answer


def our_classifier(case: Case, threads: int) -> Callable[[Facts], Facts]:
    import torch

    from surgery.runtime.bound import BoundSession, as_torch, as_value
    from surgery.runtime.sessions import open_fast_session
    from surgery.storage import open_model

    model = open_model(MODELS / case.model / "two" / "model.onnx")
    session = BoundSession(open_fast_session(model, threads=threads))

    def classify(ids: torch.Tensor) -> list[list[float]]:
        fed = {"input_ids": as_value(ids), "attention_mask": as_value(torch.ones_like(ids))}
        found: list[list[float]] = as_torch(session.run(fed)["logits"]).tolist()
        return found

    return lambda question: repeated(lambda: classify(torch.tensor(question["ids"])))


def repeated(classify: Callable[[], list[list[float]]]) -> Facts:
    """Time some calls, and say the logits of the last."""
    return timed(lambda _: [classify() for _ in range(CALLS)][-1])


def generated(network: Any, case: Case, ids: Any, tick: Callable[[], None]) -> list[list[int]]:
    """Return the new tokens [batch, new] of transformers' `generate`, which is told apart from ours by nothing."""
    import torch
    import transformers

    class Clock(transformers.LogitsProcessor):  # type: ignore[misc]
        def __call__(self, input_ids: Any, scores: Any) -> Any:
            tick()
            return scores

    # Not `min_new_tokens`: that looks through the whole vocabulary at every step, here an eighth of its time.
    network.generation_config.eos_token_id = None
    found = network.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        logits_processor=transformers.LogitsProcessorList([Clock()]),
        do_sample=False,
        num_beams=case.beams,
        max_new_tokens=case.new,
        pad_token_id=0,
    )
    new: list[list[int]] = found[:, -case.new :].tolist()
    return new


def numpy_worker(case: Case, threads: int) -> Callable[[Facts], Facts]:
    """A loop of `session.run` over numpy arrays on the pair of decoders, as one writes it by hand."""
    import onnxruntime

    def opened(name: str) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        path = str(MODELS / case.model / "two" / f"{name}.onnx")
        return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def call(session: Any, feeds: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        wanted = {one.name: feeds[one.name] for one in session.get_inputs()}
        return dict(zip([one.name for one in session.get_outputs()], session.run(None, wanted), strict=True))

    if case.kind == "classifier":
        model = opened("model")

        def classify(ids: np.ndarray) -> list[list[float]]:
            found: list[list[float]] = call(model, {"input_ids": ids, "attention_mask": np.ones_like(ids)})[
                "logits"
            ].tolist()
            return found

        return lambda question: repeated(lambda: classify(np.array(question["ids"])))

    crossed = case.kind == "encoder-decoder"
    encoder = opened("encoder_model") if crossed else None
    first, following = opened("decoder_model"), opened("decoder_with_past_model")

    def generate(ids: np.ndarray, tick: Callable[[], None]) -> list[list[int]]:
        batch, length = ids.shape
        feeds: dict[str, np.ndarray] = {"encoder_attention_mask": np.ones_like(ids)}
        if encoder is not None:
            states = call(encoder, {"input_ids": ids, "attention_mask": np.ones_like(ids)})
            feeds["encoder_hidden_states"] = states["last_hidden_state"]
            ids = np.full((batch, 1), START)
        mask = np.ones((batch, length + case.new), np.int64)
        tokens = np.empty((batch, case.new), np.int64)
        new, session = ids, first
        for number in range(case.new):
            fed = 0 if number == 0 else length + number - 1
            feeds["input_ids"] = new
            feeds["attention_mask"] = mask[:, : length + number]
            feeds["position_ids"] = np.arange(fed, length + number)[None].repeat(batch, 0)
            outputs = call(session, feeds)
            tick()
            tokens[:, number] = outputs["logits"][:, -1].argmax(-1)
            new, session = tokens[:, number : number + 1], following
            for name, array in outputs.items():
                if name.startswith("present"):
                    feeds["past_key_values" + name.removeprefix("present")] = array
        return tokens.tolist()

    return lambda question: timed(lambda tick: generate(np.array(question["ids"]), tick))


WORKERS: Mapping[str, Callable[[Case, int], Callable[[Facts], Facts]]] = {
    TORCH: torch_worker,
    NUMPY: numpy_worker,
    OURS: ours_worker,
    OURS_MERGED: merged_worker,
}

# The table


def text_of(known: Mapping[str, Facts]) -> str:
    """Write all rows that are known."""
    some = next(iter(known.values()))
    lines = [
        "# Generation",
        "",
        f"Made by `benchmarks/generate.py`: random weights at real configurations, float32. {some['cores']} cores, "
        f"{some['machine']}, {some['threads']} threads for each, Python {some['python']}, ONNX Runtime "
        f"{some['onnxruntime']}, PyTorch {some['torch']}, transformers {some['transformers']}. Medians over "
        "rounds in which the tools take turns, after one to warm up. Seconds are of the whole generation; a token is "
        "one step after the first, median over all. Ratios are medians of those of each round. Ours and the numpy loop "
        "run the same two files; merged is one.",
        "",
        "| row | tool | seconds | CPU s | first, ms | token, ms | PyTorch / it | numpy loop / it | tokens | rounds |",
        "|---|---|---:|---:|---:|---:|---:|---:|---|---:|",
    ]
    for name, facts in known.items():
        for tool, measured in facts["tools"].items():
            lines.append(row(name, tool, measured, facts["tools"]))
        lines += [f"| {name} | {tool} | failed: {why} | | | | | | | |" for tool, why in facts["failed"].items()]
    return "\n".join([*lines, "", *latency(known)]) + "\n"


def row(name: str, tool: str, facts: Facts, tools: Mapping[str, Facts]) -> str:
    def over(other: str) -> str:
        if other not in tools:
            return ""
        pairs = zip(tools[other]["all_seconds"], facts["all_seconds"], strict=True)
        return f"{statistics.median(theirs / its for theirs, its in pairs):.2f}"

    steps = [f"{facts[key]:.1f}" if key in facts else "" for key in ("first_ms", "token_ms")]
    seconds = [f"{facts[key]:.3g}" for key in ("seconds", "cpu_seconds")]
    cells = [
        name,
        tool,
        *seconds,
        *steps,
        over(TORCH),
        over(NUMPY),
        facts.get("tokens", ""),
        str(len(facts["all_seconds"])),
    ]
    return f"| {' | '.join(cells)} |"


def latency(known: Mapping[str, Facts]) -> Iterator[str]:
    """Yield the table of a token's time by how many are cached."""
    marks = ("50", "100", "250", "500", "1000")
    rows = [
        (name, tool, measured["token_ms_at"], facts["cache_bytes_a_token"])
        for name, facts in known.items()
        for tool, measured in facts["tools"].items()
        if len(measured.get("token_ms_at", {})) > 2
    ]
    if not rows:
        return
    yield "A token's time by the tokens in the cache, ms. Last column: the growth of the cache over that of the time."
    yield ""
    yield f"| row | tool | {' | '.join(marks)} | last / 100 | GB/s |"
    yield f"|---|---|{'---:|' * (len(marks) + 2)}"
    for name, tool, times, bytes_a_token in rows:
        last = max(times, key=int)
        if last == "100" or "100" not in times:
            continue
        grown = (int(last) - 100) * bytes_a_token / 1e9
        slower = (times[last] - times["100"]) / 1e3
        cells = [f"{times[mark]:.1f}" if mark in times else "" for mark in marks]
        speed = f"{grown / slower:.1f}" if slower > 0 else ""
        yield f"| {name} | {tool} | {' | '.join(cells)} | {times[last] / times['100']:.2f} | {speed} |"


if __name__ == "__main__":
    main()
