"""Commands that measure: bench and profile."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Annotated, Optional

import typer

from surgery.cli.shell import (
    INTERRUPTED,
    MOST_SEED,
    BundleArgument,
    DebugOption,
    ProvidersOption,
    ThreadsOption,
    console_of_terminal,
    errors_said,
    numbers_in,
    opened_bundle,
    providers_named,
    refuse_no_file,
    refuse_no_folder,
    short,
    write_file,
)

JsonFileOption = Annotated[
    Optional[str],  # noqa: UP045 - typer reads annotations at run time
    typer.Option("--json", metavar="FILE", help="Write everything that was measured to this file; - prints it."),
]


def bench(
    source: BundleArgument,
    rows: Annotated[
        str,
        typer.Option(
            metavar="WORD,...",
            help="Measure these: torch, torch-no-cache, onnx, onnx-no-cache, numpy. Left out, all but numpy.",
        ),
    ] = "",
    batch: Annotated[str, typer.Option(metavar="N,...", help="Rows of a batch; several are measured in turn.")] = "1",
    prompt_tokens: Annotated[
        str, typer.Option(metavar="N,...", help="Tokens of a prompt, or the length of a single model's inputs.")
    ] = "32",
    new_tokens: Annotated[int, typer.Option(min=1, help="Tokens to generate, no more and no fewer.")] = 64,
    beams: Annotated[int, typer.Option(min=1, help="Beams; 1 is greedy.")] = 1,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds that count: every row once in each.")] = 3,
    warmup: Annotated[int, typer.Option(min=0, help="Rounds before them that do not count.")] = 1,
    threads: ThreadsOption = 0,
    provider: ProvidersOption = None,
    torch: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="PyTorch's weights; without them random ones at the same configuration."),
    ] = None,
    seed: Annotated[int, typer.Option(min=0, max=MOST_SEED, help="Draw the prompts from this seed.")] = 0,
    json_file: JsonFileOption = None,
    plots: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FOLDER", help="Draw the latency of each token and the time until each."),
    ] = None,
    plot_format: Annotated[str, typer.Option("--plot-format", metavar="svg|png", help="What to draw as.")] = "svg",
    debug: DebugOption = False,
) -> None:
    """Measure generation, or a single model, against PyTorch: latency of each token, and memory."""
    from surgery.bench.cases import Case, Settings
    from surgery.bench.plots import draw_bench
    from surgery.bench.report import bench_json, bench_notes, bench_tables
    from surgery.bench.running import run_bench
    from surgery.errors import RecipeError
    from surgery.report.plotting import refuse_strange_format, refuse_without_plots

    console = console_of_terminal(is_error=json_file == "-")
    with errors_said(console, debug):
        if plots is not None:
            refuse_strange_format(plots / f"latency.{plot_format}")
            refuse_without_plots()
            refuse_no_folder(plots)
        if json_file is not None:
            refuse_no_file(json_file)
        if torch is not None and not (torch / "config.json").is_file():
            raise RecipeError(f"{torch}: no config.json is there", hint="--torch with a Hugging Face folder")
        cases = [
            Case(rows_of_batch, tokens, new_tokens, beams)
            for rows_of_batch in numbers_in(batch, "--batch")
            for tokens in numbers_in(prompt_tokens, "--prompt-tokens")
        ]
        folder = str(torch.resolve()) if torch is not None else None
        settings = Settings(source, folder, threads, providers_named(provider), seed)
        words = [word.strip() for word in rows.split(",") if word.strip()]
        with console.status("starting") as status:
            result = run_bench(settings, words, cases, rounds=rounds, warmup=warmup, say=status.update)
        for table in bench_tables(result):
            console.print(table)
            console.print()
        for note in bench_notes(result):
            console.print(note, markup=False)
        if json_file is not None:
            write_file(json_file, bench_json(result))
        for file in draw_bench(result, plots, plot_format) if plots is not None else ():
            console.print(f"drawn: {short(file)}", markup=False)
        if result.is_interrupted:
            raise typer.Exit(INTERRUPTED)
        if all(row.problem for row in result.rows):
            raise typer.Exit(1)


def profile(
    source: BundleArgument,
    role: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(help="Which model of several; left out, the one that makes the tokens.", show_default=False),
    ] = None,
    branch: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(metavar="prefill|decode", help="Which branch of a merged decoder; decode if left out."),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Rows.")] = 1,
    length: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=1, help="New tokens; left out, 32 of a prompt and 1 after a past.", show_default=False),
    ] = None,
    past: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(min=0, help="Tokens in the cache, if there is one; 32 if left out.", show_default=False),
    ] = None,
    runs: Annotated[int, typer.Option(min=1, help="Runs that count.")] = 10,
    warmup: Annotated[int, typer.Option(min=0, help="Runs before them that do not.")] = 3,
    level: Annotated[
        str, typer.Option(metavar="none|basic|extended|layout|all", help="How far ONNX Runtime may rewrite the graph.")
    ] = "all",
    unoptimized: Annotated[bool, typer.Option("--unoptimized", help="The graph as it is: --level none.")] = False,
    threads: ThreadsOption = 0,
    provider: ProvidersOption = None,
    top: Annotated[int, typer.Option(min=1, help="Show so many operators and nodes.")] = 10,
    json_file: JsonFileOption = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(metavar="FILE", help="Draw them as bars, into a .svg or .png file."),
    ] = None,
    debug: DebugOption = False,
) -> None:
    """Say which operators and nodes a model's time goes to, those inside branches and loops too."""
    from surgery.bench.feeding import role_in, sample_of
    from surgery.report.plotting import refuse_strange_format, refuse_without_plots
    from surgery.report.profiles import ProfiledModel, draw_profile, profile_json, profile_notes, profile_tables
    from surgery.runtime.profiling import checked_level, profile_model

    console = console_of_terminal(is_error=json_file == "-")
    with errors_said(console, debug), tempfile.TemporaryDirectory(prefix="surgery-") as scratch:
        chosen = checked_level("none" if unoptimized else level)
        providers = providers_named(provider)
        if plot is not None:
            refuse_strange_format(plot)
            refuse_without_plots()
            refuse_no_folder(plot.parent)
        if json_file is not None:
            refuse_no_file(json_file)
        with console.status("opening") as status:
            bundle = opened_bundle(source, Path(scratch), status.update)
            role = role_in(bundle, role)
            status.update("making inputs")
            sample = sample_of(bundle, role, batch=batch, length=length, past=past, branch=branch, providers=providers)
            status.update(f"running {role!r}")
            measured = profile_model(
                bundle[role],
                sample.arrays,
                runs=runs,
                warmup=warmup,
                level=chosen,
                threads=threads,
                providers=providers,
            )
        name = Path(source).name or source
        profiled = ProfiledModel(name, role, sample.name, chosen, threads, providers, measured)
        console.print(profiled.heading, markup=False)
        for table in profile_tables(profiled, top):
            console.print()
            console.print(table)
        console.print()
        for note in profile_notes(profiled):
            console.print(note, markup=False)
        others = [other for other in bundle.models if other != role]
        if others:
            console.print(f"there is also {', '.join(others)}: --role", markup=False)
        if json_file is not None:
            write_file(json_file, profile_json(profiled))
        if plot is not None:
            draw_profile(profiled, plot, top)
            console.print(f"drawn: {short(plot)}", markup=False)
