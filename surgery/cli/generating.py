"""The command generate: text as it is generated."""

from __future__ import annotations

import json
import secrets
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Optional

import typer

from surgery.cli.prompting import Prompt, encoded, joined, prompts_of
from surgery.cli.shell import (
    INTERRUPTED,
    MOST_SEED,
    BundleArgument,
    DebugOption,
    ProvidersOption,
    ThreadsOption,
    console_of_terminal,
    errors_said,
    providers_named,
)

if TYPE_CHECKING:
    from surgery.runtime.generation import Generator


def generate(
    source: BundleArgument,
    prompt: Annotated[
        Optional[list[str]],  # noqa: UP045 - typer reads annotations at run time
        typer.Option(help="Continue this text; several make a batch. - reads one text from standard input."),
    ] = None,
    prompts_file: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="FILE", help="Continue each line of this file, - for standard input, as a batch."),
    ] = None,
    ids: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(metavar="1,2,3", help="Continue these tokens; no tokenizer is needed."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Add at most so many tokens.")] = 64,
    sample: Annotated[
        Optional[bool],  # noqa: UP045
        typer.Option("--sample/--greedy", help="Draw tokens, or take the likeliest; else as the config says."),
    ] = None,
    temperature: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, help="Sample at this temperature.", show_default=False),
    ] = None,
    top_k: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Sample among so many tokens.", show_default=False),
    ] = None,
    top_p: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, max=1.0, help="Sample among the likeliest tokens of this share.", show_default=False),
    ] = None,
    beams: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="Search with so many beams; printed when done.", show_default=False),
    ] = None,
    repetition_penalty: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(min=0.0, help="Make tokens that are there already less likely, from 1 on.", show_default=False),
    ] = None,
    seed: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            min=0, max=MOST_SEED, help="Sample from this seed; left out, another one each time.", show_default=False
        ),
    ] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Put each prompt into the tokenizer's chat template.")] = False,
    system: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Begin the chat with this message of the system.", show_default=False),
    ] = None,
    threads: ThreadsOption = 0,
    provider: ProvidersOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print tokens, texts and times as JSON when done.")] = False,
    stats: Annotated[bool, typer.Option("--stats", help="Say on standard error how fast it was.")] = False,
    debug: DebugOption = False,
) -> None:
    """Continue prompts, and print the text as it is generated."""
    with errors_said(console_of_terminal(is_error=True), debug):
        prompts = prompts_of(prompt, prompts_file, ids)
        options = {
            "max_new_tokens": max_new_tokens,
            "do_sample": _is_sampled(sample, temperature, top_k, top_p),
            "temperature": temperature,
            "top_k": top_k,
            "top_p": top_p,
            "num_beams": beams,
            "repetition_penalty": repetition_penalty,
        }
        given = {name: value for name, value in options.items() if value is not None}
        answer = _answer(
            source,
            prompts,
            given,
            seed=secrets.randbits(32) if seed is None else seed,
            system=system,
            is_chat=chat or system is not None,
            threads=threads,
            providers=providers_named(provider),
            is_streamed=not as_json,
        )
        if as_json:
            typer.echo(answer.as_json())
        if stats:
            typer.echo(answer.stats, err=True)
        if answer.is_interrupted:
            typer.echo("interrupted", err=True)
            raise typer.Exit(INTERRUPTED)


def _is_sampled(sample: bool | None, temperature: float | None, top_k: int | None, top_p: float | None) -> bool | None:
    """Say whether tokens are drawn; None if nobody says.

    Raises:
        RecipeError: Options of sampling stand beside `--greedy`.
    """
    from surgery.errors import RecipeError

    options = {"--temperature": temperature, "--top-k": top_k, "--top-p": top_p}
    named = [name for name, value in options.items() if value is not None]
    if named and sample is False:
        raise RecipeError(f"{named[0]} is for sampling", hint="--sample instead of --greedy")
    if temperature == 0:
        raise RecipeError("--temperature 0 is no temperature to sample at", hint="--greedy takes the likeliest token")
    return True if named else sample


@dataclass
class Answer:
    """What was generated.

    Args:
        prompts: What was continued.
        prompt_ids: The tokens of each prompt as the model was given them, without padding.
        tokens: The new tokens of each, up to its end.
        texts: As text; as ids where there is no tokenizer.
        stamps: The seconds from the call to each token; of beams to each step of the search.
        open_seconds: How long it took to open the bundle, imports and export included.
        options: What `generate` was given.
        seed: What sampling began with.
        is_interrupted: Somebody stopped it.
    """

    prompts: list[Prompt]
    prompt_ids: list[list[int]]
    options: dict[str, Any]
    seed: int
    open_seconds: float
    tokens: list[list[int]] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    stamps: list[float] = field(default_factory=list)
    is_interrupted: bool = False

    @property
    def seconds(self) -> float:
        """From the call to the last token."""
        return self.stamps[-1] if self.stamps else 0.0

    @property
    def count(self) -> int:
        """How many tokens there are, the end of each text included."""
        return sum(len(tokens) for tokens in self.tokens)

    @property
    def stats(self) -> str:
        """How fast it was."""
        if not self.stamps:
            return f"no token; opened in {self.open_seconds:.1f} s"
        rate = self.count / self.seconds
        noun = "token" if self.count == 1 else "tokens"
        return (
            f"{self.count} {noun} in {self.seconds:.3f} s: {rate:,.0f} a second; the first after "
            f"{self.stamps[0] * 1e3:.1f} ms; opened in {self.open_seconds:.1f} s"
        )

    def as_json(self) -> str:
        """Return all of it; times in seconds."""
        answers = zip(self.prompts, self.prompt_ids, self.tokens, self.texts, strict=True)
        content = {
            "answers": [
                {"prompt": prompt.text, "prompt_tokens": ids, "tokens": tokens, "text": text}
                for prompt, ids, tokens, text in answers
            ],
            "options": self.options,
            "seed": self.seed,
            "open_seconds": self.open_seconds,
            "seconds": self.seconds,
            "reached_seconds": self.stamps,
            "tokens_per_second": self.count / self.seconds if self.stamps else 0.0,
            "is_interrupted": self.is_interrupted,
        }
        return json.dumps(content, indent=1, ensure_ascii=False)


def _answer(
    source: str,
    prompts: list[Prompt],
    options: dict[str, Any],
    *,
    seed: int,
    system: str | None,
    is_chat: bool,
    threads: int,
    providers: tuple[str, ...],
    is_streamed: bool,
) -> Answer:
    """Open a bundle and let it continue prompts; text is printed as it comes, or line by line when a batch is done."""
    start = time.perf_counter()
    from surgery.runtime.generation import open_generator

    with console_of_terminal(is_error=True).status("opening") as status:
        generator = open_generator(source, providers=providers, threads=threads, progress=status.update)
    with generator:
        _silence()
        if generator.is_widened:
            typer.echo("note: on the CPU float16 is computed in float32; a GPU may answer otherwise", err=True)
        tokenizer = None if prompts[0].text is None else _tokenizer(generator)
        rows = encoded(prompts, tokenizer, system=system, is_chat=is_chat)
        _refuse_no_room(generator, rows, options)
        answer = Answer(prompts, rows, options, seed, time.perf_counter() - start)
        is_one = len(rows) == 1 and options.get("num_beams", generator.generation_config.num_beams or 1) == 1
        _generate(generator, tokenizer, answer, is_printed=is_streamed and is_one)
        if is_streamed and not is_one:
            for prompt, text in zip(prompts, answer.texts, strict=True):
                typer.echo(f"{prompt} -> {text}" if len(prompts) > 1 else text)
    return answer


def _silence() -> None:
    """Keep transformers from writing between the words."""
    from transformers.utils import logging

    logging.set_verbosity_error()


def _tokenizer(generator: Generator) -> Any:
    from surgery.errors import SurgeryError

    try:
        return generator.tokenizer
    except SurgeryError as error:
        raise SurgeryError(error.message, hint=f"--ids 1,2,3 instead of a text, or {error.hint}") from error


def _refuse_no_room(generator: Generator, rows: Sequence[Sequence[int]], options: dict[str, Any]) -> None:
    """Refuse what goes beyond the positions of the network.

    Raises:
        RecipeError: It does.
    """
    from surgery.accuracy.feeds import room
    from surgery.errors import RecipeError

    most = room(generator.config.to_dict())
    longest = max(len(row) for row in rows)
    new = options["max_new_tokens"]
    is_cross = generator.config.is_encoder_decoder
    left = most if is_cross else most - longest
    if longest > most or new > left:
        raise RecipeError(
            f"{longest:,} tokens and {new:,} new ones do not fit into the {most:,} positions of the network",
            hint=f"--max-new-tokens {left}" if left > 0 and longest <= most else "a shorter prompt",
        )


def _generate(generator: Generator, tokenizer: Any, answer: Answer, *, is_printed: bool) -> None:
    """Fill in an answer; text is printed as it comes if it is to be. An interruption leaves what is there."""
    import torch
    import transformers
    from transformers import StoppingCriteriaList

    from surgery.errors import RecipeError

    ids, mask = _padded(answer.prompt_ids, generator)
    watch = _Watch(torch.bool)
    streamer = _Printer(tokenizer) if is_printed else None
    transformers.set_seed(answer.seed)
    watch.start = time.perf_counter()
    try:
        with torch.inference_mode():
            sequences = generator.generate(
                input_ids=ids.to(generator.device),
                attention_mask=mask.to(generator.device),
                stopping_criteria=StoppingCriteriaList([watch]),
                streamer=streamer,
                **answer.options,
            )
    except KeyboardInterrupt:
        answer.is_interrupted = True
        sequences = watch.so_far(len(answer.prompts))
    except ValueError as error:
        raise RecipeError(f"transformers refuses to generate so: {str(error).partition(chr(10))[0]}") from error
    finally:
        if streamer is not None:
            streamer.close()
    answer.stamps = watch.stamps
    started = 1 if generator.config.is_encoder_decoder else ids.shape[1]
    ends = _ends(generator)
    rows = sequences.tolist() if sequences is not None else [[] for _ in answer.prompts]
    answer.tokens = [_until_end(row[started:], ends) for row in rows]
    answer.texts = [
        tokenizer.decode(row, skip_special_tokens=True) if tokenizer is not None else joined(row)
        for row in answer.tokens
    ]


def _padded(rows: Sequence[Sequence[int]], generator: Generator) -> tuple[Any, Any]:
    """Return ids and mask [batch, longest], padded on the left; an encoder pads on the right, as it was trained."""
    import torch

    pad = generator.generation_config.pad_token_id
    longest = max(len(row) for row in rows)
    ids = torch.full((len(rows), longest), pad if isinstance(pad, int) else 0, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for index, row in enumerate(rows):
        place = slice(0, len(row)) if generator.config.is_encoder_decoder else slice(longest - len(row), longest)
        ids[index, place] = torch.tensor(row)
        mask[index, place] = 1
    return ids, mask


def _ends(generator: Generator) -> frozenset[int]:
    found = generator.generation_config.eos_token_id
    return frozenset(found if isinstance(found, list) else [] if found is None else [found])


def _until_end(row: Sequence[int], ends: frozenset[int]) -> list[int]:
    """Return tokens up to the end token, that one included; what follows is padding."""
    first = next((index for index, token in enumerate(row) if token in ends), len(row))
    return list(row[: first + 1])


class _Watch:
    """A stopping criterion of transformers that stops nothing, and remembers what there is and since when."""

    def __init__(self, boolean: Any) -> None:
        self._boolean = boolean
        self._ids: Any = None
        self.start = 0.0
        self.stamps: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.stamps.append(time.perf_counter() - self.start)
        self._ids = input_ids
        return input_ids.new_zeros(input_ids.shape[0], dtype=self._boolean)

    def so_far(self, count: int) -> Any:
        """Return the tokens of each prompt so far, of several beams the first; None if there are none."""
        return None if self._ids is None else self._ids[:: len(self._ids) // count]


class _Printer:
    """A streamer of transformers that prints words when they are whole; tokens one by one if there is no tokenizer."""

    def __init__(self, tokenizer: Any) -> None:
        self._text = _text_streamer(tokenizer) if tokenizer is not None else None
        self._calls = 0

    def put(self, value: Any) -> None:
        """Take the prompt, then the tokens, as they come."""
        if self._text is not None:
            self._text.put(value)
        elif self._calls:
            typer.echo(f"{joined(value.flatten().tolist())} ", nl=False)
        self._calls += 1
        sys.stdout.flush()

    def end(self) -> None:
        """The last token is there."""

    def close(self) -> None:
        """Print what is left of a word, and end the line; nothing if no token came."""
        if self._calls < 2:
            return
        if self._text is not None:
            self._text.end()
        else:
            typer.echo()


def _text_streamer(tokenizer: Any) -> Any:
    from transformers import TextStreamer

    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
