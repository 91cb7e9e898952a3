"""A generator over whatever names or holds a bundle: a folder, a Hub id, or a bundle in memory."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from surgery.bundle import Bundle
from surgery.recipe import Source
from surgery.runtime.generation.generator import Generator
from surgery.runtime.sessions import Provider
from surgery.sources import find_source


def _silently(_: str) -> None:
    pass


def open_generator(
    source: str | Path | Bundle,
    *,
    providers: Sequence[Provider] | None = None,
    threads: int = 0,
    prepacking: bool | None = None,
    progress: Callable[[str], None] = _silently,
) -> Generator:
    """Open what can generate, with its configs and tokenizer.

    Args:
        source: A folder of .onnx files, a Hugging Face folder or Hub id, which is exported, or a bundle.
        providers: Where to run, by preference; None for the CPU.
        threads: Threads within an operator; 0 for as many as there are cores.
        prepacking: Let ONNX Runtime keep rearranged copies of weights; None for what the runtime finds best.
        progress: Is told what is being done.

    Returns:
        A generator; as a context it closes itself, and removes what was exported.

    Raises:
        RecipeError: There is no such source, or it cannot be told what its files are.
        Refused: What it holds cannot generate.
        ModelFileError: A file is malformed, or ONNX Runtime does not take a model.
    """
    if isinstance(source, Bundle):
        return Generator(source, threads=threads, providers=providers, prepacking=prepacking)
    kind = find_source(Source(path=str(source)), Path())
    scratch = tempfile.TemporaryDirectory(prefix="surgery-")
    try:
        bundle = kind.open(Path(scratch.name), progress).bundle
        progress("opening sessions")
        generator = Generator(bundle, threads=threads, providers=providers, prepacking=prepacking)
    except BaseException:
        scratch.cleanup()
        raise
    generator.keep(scratch)
    return generator
