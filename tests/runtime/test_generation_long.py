"""`generate` at real configurations with random weights: the tokens of PyTorch, but for ties."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from ties import compare

from passes.last_logits import LastLogits
from passes.merge_if import MergeIf
from surgery.bundle import Bundle
from surgery.contract import Context
from surgery.recipe import Source
from surgery.runtime.generation import Generator, open_generator
from surgery.sources import find_source

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.long

SMOLLM2 = {
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rope_theta": 100000,
    "tie_word_embeddings": True,
}
"""SmolLM2-135M."""

T5_BASE = {"d_model": 768, "d_kv": 64, "d_ff": 3072, "num_layers": 12, "num_heads": 12}
BART_BASE = {
    "d_model": 768,
    "encoder_layers": 6,
    "decoder_layers": 6,
    "encoder_attention_heads": 12,
    "decoder_attention_heads": 12,
    "encoder_ffn_dim": 3072,
    "decoder_ffn_dim": 3072,
    "vocab_size": 50265,
    "forced_eos_token_id": None,
}
WHISPER_TINY = {
    "d_model": 384,
    "encoder_layers": 4,
    "decoder_layers": 4,
    "encoder_attention_heads": 6,
    "decoder_attention_heads": 6,
    "encoder_ffn_dim": 1536,
    "decoder_ffn_dim": 1536,
}

NETWORKS: dict[str, Callable[[], Any]] = {
    "gpt2": lambda: transformers.GPT2LMHeadModel(transformers.GPT2Config()),
    "llama": lambda: transformers.LlamaForCausalLM(transformers.LlamaConfig(**SMOLLM2)),
    "t5": lambda: transformers.T5ForConditionalGeneration(transformers.T5Config(**T5_BASE, decoder_start_token_id=0)),
    "bart": lambda: transformers.BartForConditionalGeneration(transformers.BartConfig(**BART_BASE)),
}


def random_network(make: Callable[[], Any]) -> Any:
    """A network as if trained: transformers' initial biases are zero and its norms one, which hides what is lost."""
    torch.manual_seed(0)
    model = make().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.fixture(scope="module", params=list(NETWORKS))
def network(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Bundle]:
    """A PyTorch model and what it is exported as."""
    folder = tmp_path_factory.mktemp(request.param)
    model = random_network(NETWORKS[request.param])
    model.save_pretrained(folder / "model")
    return model, find_source(Source(path=str(folder / "model")), Path()).open(folder, print).bundle


@pytest.fixture(scope="module", params=["pair", "merged"])
def generator(network: tuple[Any, Bundle], request: pytest.FixtureRequest) -> Iterator[Generator]:
    bundle = network[1]
    if request.param == "merged":
        bundle = bundle.clone()
        LastLogits(models=("prefill",)).apply(bundle, lambda role: Context(role=role))
        MergeIf().apply(bundle, lambda role: Context(role=role))
    with open_generator(bundle) as opened:
        assert opened.roles[-1] == ("decoder" if request.param == "merged" else "decode")
        yield opened


def prompts(model: Any, lengths: tuple[int, ...]) -> dict[str, Any]:
    """Random prompts of several lengths, padded on the left for a decoder, on the right for an encoder."""
    generator = torch.Generator().manual_seed(1)
    longest = max(lengths)
    ids = torch.randint(5, 30000, (len(lengths), longest), generator=generator)
    mask = torch.ones_like(ids)
    for row, length in enumerate(lengths):
        padding = slice(length, None) if model.config.is_encoder_decoder else slice(0, longest - length)
        ids[row, padding], mask[row, padding] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@pytest.mark.parametrize("lengths", [(7,), (12, 5, 9)], ids=["one", "padded"])
@pytest.mark.parametrize("beams", [1, 4])
def test_tokens_are_those_of_pytorch(
    network: tuple[Any, Bundle], generator: Generator, lengths: tuple[int, ...], beams: int
):
    # No pair of tokens twice, since a random network falls into repeating one.
    options = {"max_new_tokens": 24, "num_beams": beams, "no_repeat_ngram_size": 2, "do_sample": False}
    options |= {"pad_token_id": 0}
    compared = compare(network[0], generator, prompts(network[0], lengths), **options)
    print(f"{network[0].config.model_type} {generator.roles} {lengths} beams {beams}: {compared}")
    assert not compared.faults
    assert compared.equal >= 0.5, "so many ties are no test"


def test_a_fault_is_no_tie(network: tuple[Any, Bundle], generator: Generator):
    faulty = random_network(NETWORKS[network[0].config.model_type])
    # The last one before the scores: what changes BART's embedding is lost in its first layer, and a change of one
    # channel chooses no other token.
    norms = [(name, each) for name, each in faulty.named_parameters() if "norm" in name or "ln_" in name]
    last = [each for name, each in norms if "embedding" not in name][-1]
    with torch.no_grad():
        last += 3 * torch.randn_like(last)
    options = {"max_new_tokens": 24, "no_repeat_ngram_size": 2, "pad_token_id": 0}
    assert compare(faulty, generator, prompts(network[0], (12, 5, 9)), **options).faults


def test_whisper_writes_what_pytorch_writes(tmp_path: Path):
    config = transformers.WhisperConfig(**WHISPER_TINY)
    model = random_network(lambda: transformers.WhisperForConditionalGeneration(config))
    model.save_pretrained(tmp_path / "model")
    bundle = find_source(Source(path=str(tmp_path / "model")), Path()).open(tmp_path, print).bundle
    features = torch.randn(2, config.num_mel_bins, 2 * config.max_source_positions)
    options = {"max_new_tokens": 16, "no_repeat_ngram_size": 2, "pad_token_id": 0}
    # Whisper's own `generate` cuts audio and chooses languages; what is compared is the one below it.
    plain = type(
        "Plain", (), {"generate": lambda self, **kwargs: transformers.GenerationMixin.generate(model, **kwargs)}
    )
    with open_generator(bundle) as generator:
        assert generator.main_input_name == "input_features"
        for beams in (1, 4):
            compared = compare(plain(), generator, {"input_features": features}, **options, num_beams=beams)
            assert not compared.faults
            assert compared.equal >= 0.5
