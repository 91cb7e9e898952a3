"""The rows of a bench: what each opens, and how the time of each token is taken.

A generation by transformers is asked for a stopping criterion after each token: ours writes down the clock and stops
nothing. That is 13 microseconds a token here, 4 of them its own, and the same for PyTorch and ONNX. It is called when
the token is chosen and appended; on a GPU transformers waits for the token at the same place. The numpy loop is timed
where it calls a decoder: a token is chosen when it is fed back.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from surgery.bench.cases import Case, Settings
from surgery.bundle import Bundle
from surgery.errors import Refused, SurgeryError
from surgery.recipe import Source
from surgery.sources import find_source

CPU = "CPUExecutionProvider"


class Row(Protocol):
    """Something that is measured."""

    facts: dict[str, str]

    def run(self, case: Case) -> list[float]:
        """Return the seconds from the call to each token, or to the only answer."""


@dataclass(frozen=True)
class Network:
    """A bundle without its models' weights read: what it is, and what to feed it."""

    bundle: Bundle
    seed: int

    @classmethod
    def of(cls, settings: Settings) -> Network:
        """Open the source, which holds ONNX models."""
        kind = find_source(Source(path=settings.source), Path())
        return cls(kind.open(Path(), lambda text: None).bundle, settings.seed)

    @property
    def vocabulary(self) -> int:
        """How many tokens there are to draw prompts from.

        Raises:
            SurgeryError: The config does not say.
        """
        found = self.bundle.config.get("vocab_size")
        if not isinstance(found, int):
            raise SurgeryError("the bundle's config.json says no vocab_size, so no prompts can be drawn")
        return found

    def prompts(self, case: Case) -> np.ndarray:
        """Return prompts int64 [batch, tokens]: random ids, the same for every row."""
        random = np.random.default_rng([self.seed, case.batch, case.prompt_tokens])
        return random.integers(0, self.vocabulary, size=(case.batch, case.prompt_tokens), dtype=np.int64)

    def inputs(self, case: Case) -> Mapping[str, np.ndarray]:
        """Return the inputs of the single model at a size."""
        from surgery.accuracy.feeds import FeedMaker, Request
        from surgery.recipe import Check

        maker = FeedMaker(self.bundle, Check(seed=self.seed), _nothing_runs)
        return maker.sample("model", Request(case.batch, case.prompt_tokens)).arrays


def _nothing_runs(role: str, arrays: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    raise SurgeryError(f"the inputs of {role!r} depend on other models", hint="bench the whole bundle")


class TransformersRow:
    """Generation by `generate` of transformers, of a PyTorch model or of ONNX models.

    Args:
        model: What generates.
        network: What to feed it.
        use_cache: Keep keys and values from token to token; if not, the whole text is read again for each.
    """

    def __init__(self, model: Any, network: Network, *, use_cache: bool, facts: Mapping[str, str]) -> None:
        self._model = model
        self._network = network
        self._use_cache = use_cache
        self.facts = {**facts, "transformers": _version("transformers"), "torch": _version("torch")}

    def run(self, case: Case) -> list[float]:
        """Generate greedily, or by beams; the end token is suppressed until the last one."""
        import torch
        from transformers import StoppingCriteriaList

        ids = torch.from_numpy(self._network.prompts(case)).to(self._model.device)
        watch = _Watch(torch.bool)
        with torch.inference_mode():
            watch.start = time.perf_counter()
            self._model.generate(
                input_ids=ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=case.new_tokens,
                min_new_tokens=case.new_tokens,
                do_sample=False,
                num_beams=case.beams,
                use_cache=self._use_cache,
                pad_token_id=self._pad,
                stopping_criteria=StoppingCriteriaList([watch]),
            )
        return watch.stamps

    @property
    def _pad(self) -> int:
        pad = self._model.generation_config.pad_token_id
        return pad if isinstance(pad, int) else 0


class _Watch:
    """A stopping criterion of transformers that stops nothing and writes down when each token is there."""

    def __init__(self, boolean: Any) -> None:
        self._boolean = boolean
        self.start = 0.0
        self.stamps: list[float] = []

    def __call__(self, input_ids: Any, scores: Any, **_: Any) -> Any:
        self.stamps.append(time.perf_counter() - self.start)
        return input_ids.new_zeros(input_ids.shape[0], dtype=self._boolean)


class NumpyRow:
    """Greedy generation by the plain loop on the host (`surgery.runtime.loops.greedy`)."""

    def __init__(self, network: Network, settings: Settings) -> None:
        from surgery.runtime.loops import Callee, Signature, decoders_in
        from surgery.runtime.sessions import open_fast_session

        self._network = network
        self._entries: list[float] = []
        models = network.bundle.models
        roles = [role for role in ("encoder", *decoders_in(models)) if role in models]
        self._models: dict[str, Callee] = {}
        for role in dict.fromkeys(roles):
            model = models[role]
            session = open_fast_session(model, threads=settings.threads, providers=settings.providers)
            self._models[role] = Callee(Signature.of(model), self._timed(session, is_decoder=role != "encoder"))
        self.facts = {"onnxruntime": _version("onnxruntime"), "models": ", ".join(self._models)}

    def _timed(self, session: Any, *, is_decoder: bool) -> Callable[[dict[str, np.ndarray]], dict[str, np.ndarray]]:
        names = [value.name for value in session.get_outputs()]

        def call(arrays: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            if is_decoder:
                self._entries.append(time.perf_counter())
            return dict(zip(names, session.run(None, arrays), strict=True))

        return call

    def run(self, case: Case) -> list[float]:
        """Generate greedily; no token is taken for the end."""
        from surgery.runtime.loops import greedy

        if case.beams > 1:
            raise Refused("the numpy loop has no beams")
        ids = self._network.prompts(case)
        feeds = {"input_ids": ids, "attention_mask": np.ones_like(ids), "max_new_tokens": np.array(case.new_tokens)}
        bundle = self._network.bundle
        config = {**bundle.config, **bundle.generation_config, "eos_token_id": None}
        self._entries.clear()
        start = time.perf_counter()
        greedy(self._models, feeds, config)
        # The last token may be fed back too, to a step that nobody reads; if it is not, it was chosen at the end.
        ends = [*self._entries[1:], time.perf_counter()]
        return [end - start for end in ends[: case.new_tokens]]


class SingleOnnxRow:
    """One model in ONNX Runtime, its inputs and outputs bound where they lie."""

    def __init__(self, network: Network, settings: Settings) -> None:
        from surgery.runtime.sessions import open_fast_session

        self._network = network
        model = network.bundle["model"]
        self._session = open_fast_session(model, threads=settings.threads, providers=settings.providers)
        self._names = [value.name for value in self._session.get_outputs()]
        self.facts = {"onnxruntime": _version("onnxruntime"), "provider": self._session.get_providers()[0]}

    def run(self, case: Case) -> list[float]:
        """Run once."""
        import onnxruntime

        device = "cpu" if self.facts["provider"] == CPU else "cuda"
        binding = self._session.io_binding()
        for name, array in self._network.inputs(case).items():
            binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(array, device))
        start = time.perf_counter()
        for name in self._names:
            binding.bind_output(name, device)
        try:
            self._session.run_with_iobinding(binding)
        except Exception as error:
            raise SurgeryError(f"ONNX Runtime cannot run the model: {error}") from error
        binding.synchronize_outputs()
        return [time.perf_counter() - start]


class SingleTorchRow:
    """One model in PyTorch."""

    def __init__(self, network: Network, settings: Settings) -> None:
        from surgery.sources.architectures import architecture_of

        self._model, self.facts = open_torch(network, settings)
        self._network = network
        self._forward = architecture_of(network.bundle.config).forwards["model"]

    def run(self, case: Case) -> list[float]:
        """Run once."""
        import torch

        arrays = self._network.inputs(case)
        tensors = {name: torch.from_numpy(array).to(self._model.device) for name, array in arrays.items()}
        with torch.inference_mode():
            start = time.perf_counter()
            self._forward(self._model, **tensors)
            if self._model.device.type == "cuda":
                torch.cuda.synchronize()
            return [time.perf_counter() - start]


def open_torch(network: Network, settings: Settings) -> tuple[Any, dict[str, str]]:
    """Return the PyTorch model of a network in float32, and what is to be known about it.

    Raises:
        SurgeryError: PyTorch or transformers is not installed, the network is not one that is known here, or its
            weights cannot be loaded.
    """
    try:
        import torch
        import transformers
    except ImportError as error:
        raise SurgeryError(
            f"torch and transformers are needed: {error}", hint="pip install 'graph-surgery[transformers]'"
        ) from error
    from surgery.sources.architectures import architecture_of
    from surgery.sources.huggingface import quiet

    config = dict(network.bundle.config)
    if not config:
        raise SurgeryError("there is no config.json that says what PyTorch is to run", hint="--torch FOLDER")
    if settings.threads:
        torch.set_num_threads(settings.threads)
    loader = getattr(transformers, architecture_of(config).auto_class)
    with quiet():
        try:
            if settings.torch is not None:
                model = loader.from_pretrained(
                    settings.torch, dtype=torch.float32, trust_remote_code=False, local_files_only=True
                )
            else:
                torch.manual_seed(settings.seed)
                model = loader.from_config(transformers.AutoConfig.for_model(**config), dtype=torch.float32)
        except Exception as error:
            raise SurgeryError(f"PyTorch cannot open the model: {str(error).partition(chr(10))[0]}") from error
    if model.can_generate():
        generation = {**model.generation_config.to_dict(), **network.bundle.generation_config}
        model.generation_config = transformers.GenerationConfig.from_dict(generation)
    device = "cpu" if settings.providers[0] == CPU else "cuda"
    weights = f"of {settings.torch}" if settings.torch is not None else "random"
    facts = {
        "torch": _version("torch"),
        "transformers": _version("transformers"),
        "weights": weights,
        "attention": str(model.config._attn_implementation),
        "threads": str(torch.get_num_threads()),
    }
    return model.eval().to(device), facts


def open_row(word: str, settings: Settings) -> Row:
    """Open a row.

    Args:
        word: One of `ROWS`, or of `SINGLE_ROWS` for a bundle of one model that does not generate.
        settings: What to open it with; its source holds ONNX models.

    Raises:
        SurgeryError: It cannot be opened.
    """
    network = Network.of(settings)
    if is_single(tuple(network.bundle.models)):
        return SingleTorchRow(network, settings) if word == "torch" else SingleOnnxRow(network, settings)
    if word == "numpy":
        return NumpyRow(network, settings)
    use_cache = not word.endswith("-no-cache")
    if word.startswith("torch"):
        model, facts = open_torch(network, settings)
        return TransformersRow(model, network, use_cache=use_cache, facts=facts)
    from surgery.runtime.generation import open_generator

    generator = open_generator(network.bundle, providers=settings.providers, threads=settings.threads)
    facts = {"onnxruntime": _version("onnxruntime"), "models": ", ".join(generator.roles)}
    return TransformersRow(generator, network, use_cache=use_cache, facts=facts)


def is_single(roles: Sequence[str]) -> bool:
    """Say whether a bundle is one model that does not generate."""
    return tuple(roles) == ("model",)


def _version(package: str) -> str:
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version(package)
    except PackageNotFoundError:
        return version(f"{package}-gpu") if package == "onnxruntime" else ""
