"""Published configurations, one for each family of Hugging Face models, as their config.json has them on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

STRAY = 0.02


@dataclass(frozen=True)
class Published:
    """A model as it was published.

    Args:
        hub_id: Where the configuration comes from.
        config: What differs from the defaults of transformers 5.23.
        head: The ending of its class, where a family has several heads.
        cut: The keys of the config that count layers, and how many are kept of a model of more than 1.5 GB.
    """

    hub_id: str
    config: Mapping[str, Any] = field(default_factory=dict)
    head: str | None = None
    cut: Mapping[str, int] = field(default_factory=dict)


PUBLISHED: Mapping[str, Published] = {
    "gpt2": Published("openai-community/gpt2"),
    "gpt_neox": Published(
        "EleutherAI/pythia-160m",
        {
            "vocab_size": 50304,
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "intermediate_size": 3072,
        },
    ),
    "opt": Published("facebook/opt-125m", {"prefix": "</s>"}),
    "llama": Published(
        "HuggingFaceTB/SmolLM2-135M",
        {
            "vocab_size": 49152,
            "hidden_size": 576,
            "intermediate_size": 1536,
            "num_hidden_layers": 30,
            "num_attention_heads": 9,
            "num_key_value_heads": 3,
            "max_position_embeddings": 8192,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
            "tie_word_embeddings": True,
        },
    ),
    "mistral": Published("mistralai/Mistral-7B-v0.1", {"max_position_embeddings": 32768}, cut={"num_hidden_layers": 2}),
    "qwen2": Published(
        "Qwen/Qwen2.5-0.5B",
        {
            "hidden_size": 896,
            "intermediate_size": 4864,
            "num_hidden_layers": 24,
            "num_attention_heads": 14,
            "num_key_value_heads": 2,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": True,
        },
        cut={"num_hidden_layers": 4},
    ),
    "qwen3": Published(
        "Qwen/Qwen3-0.6B",
        {
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_hidden_layers": 28,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "max_position_embeddings": 40960,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
            "tie_word_embeddings": True,
        },
        cut={"num_hidden_layers": 4},
    ),
    "phi": Published(
        "microsoft/phi-1_5",
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5}},
        cut={"num_hidden_layers": 2},
    ),
    "phi3": Published(
        "microsoft/Phi-3-mini-4k-instruct",
        {"vocab_size": 32064, "sliding_window": 2047, "pad_token_id": 32000},
        cut={"num_hidden_layers": 2},
    ),
    "gemma": Published(
        "google/gemma-2b",
        {
            "hidden_size": 2048,
            "intermediate_size": 16384,
            "num_hidden_layers": 18,
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
        },
        cut={"num_hidden_layers": 2},
    ),
    "gemma2": Published("google/gemma-2-2b", cut={"num_hidden_layers": 2}),
    "gemma3_text": Published(
        "google/gemma-3-270m",
        {
            "vocab_size": 262144,
            "hidden_size": 640,
            "intermediate_size": 2048,
            "num_hidden_layers": 18,
            "num_attention_heads": 4,
            "num_key_value_heads": 1,
            "max_position_embeddings": 32768,
            "sliding_window": 512,
        },
    ),
    "t5": Published("google-t5/t5-small", {"decoder_start_token_id": 0}),
    "mt5": Published(
        "google/mt5-small",
        {"num_layers": 8, "num_decoder_layers": 8, "tie_word_embeddings": False, "decoder_start_token_id": 0},
    ),
    "bart": Published(
        "facebook/bart-base",
        {
            "d_model": 768,
            **dict.fromkeys(("encoder_layers", "decoder_layers"), 6),
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 12),
            **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 3072),
        },
    ),
    "marian": Published(
        "Helsinki-NLP/opus-mt-en-de",
        {
            "vocab_size": 58101,
            "decoder_vocab_size": 58101,
            "d_model": 512,
            **dict.fromkeys(("encoder_layers", "decoder_layers"), 6),
            **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 8),
            **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 2048),
            "max_position_embeddings": 512,
            "activation_function": "swish",
            "scale_embedding": True,
            "pad_token_id": 58100,
            "eos_token_id": 0,
            "forced_eos_token_id": 0,
            "decoder_start_token_id": 58100,
        },
    ),
    "whisper": Published("openai/whisper-tiny"),
    "bert": Published("google-bert/bert-base-uncased", head="ForMaskedLM"),
    "distilbert": Published(
        "distilbert/distilbert-base-uncased-finetuned-sst-2-english", head="ForSequenceClassification"
    ),
    "roberta": Published(
        "deepset/roberta-base-squad2",
        {"vocab_size": 50265, "max_position_embeddings": 514, "type_vocab_size": 1, "layer_norm_eps": 1e-5},
        head="ForQuestionAnswering",
    ),
    "albert": Published(
        "albert/albert-base-v2",
        {"hidden_size": 768, "intermediate_size": 3072, "num_attention_heads": 12},
        head="ForTokenClassification",
    ),
    "deberta-v2": Published(
        "microsoft/deberta-v3-base",
        {
            "hidden_size": 768,
            "intermediate_size": 3072,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "layer_norm_eps": 1e-7,
            "relative_attention": True,
            "max_relative_positions": -1,
            "position_buckets": 256,
            "norm_rel_ebd": "layer_norm",
            "share_att_key": True,
            "pos_att_type": ["p2c", "c2p"],
            "position_biased_input": False,
            "type_vocab_size": 0,
        },
        head="ForSequenceClassification",
    ),
    "mpnet": Published("sentence-transformers/all-mpnet-base-v2", {"max_position_embeddings": 514}, head="Model"),
}


def make(model_type: str, folder: Path) -> None:
    """Save a model of a family with random weights; no bias is zero and no norm is one, as in a trained model."""
    import torch
    import transformers

    from surgery.sources.architectures import FAMILIES

    published = PUBLISHED[model_type]
    heads = FAMILIES[model_type]
    auto_class = heads[published.head or next(iter(heads))].auto_class
    config = transformers.AutoConfig.for_model(model_type, **{**published.config, **published.cut})
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * STRAY)
    model.save_pretrained(folder)
