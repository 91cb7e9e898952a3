"""Architectures: which Hugging Face models are exported, and as which models; read off config.json, without PyTorch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from surgery.errors import RecipeError
from surgery.options import did_you_mean
from surgery.sources import forwards, names
from surgery.sources.forwards import Forward
from surgery.sources.names import Axes

ANOTHER_TOOL = "export it with another tool, for example optimum-cli, and give the folder of .onnx files as the source"


@dataclass(frozen=True)
class Architecture:
    """A kind of network: what it is loaded as, and for each of its roles what is run and how the axes are called."""

    auto_class: str
    forwards: Mapping[str, Forward]
    axes: Mapping[str, Mapping[str, Axes]]

    @property
    def roles(self) -> tuple[str, ...]:
        """The roles, each one fed by those before it."""
        return tuple(self.forwards)


Heads = Mapping[str, Architecture]
"""An architecture by the ending of the class that `config.json` names, which says what the network's head is."""


def _encoder_only(auto_class: str, outputs: Mapping[str, Axes]) -> Architecture:
    return Architecture(auto_class, {"model": forwards.encoder_only}, {"model": {**names.ENCODER_ONLY, **outputs}})


_DECODER = Architecture(
    "AutoModelForCausalLM", {"prefill": forwards.decoder_only, "decode": forwards.decoder_only}, names.DECODER_ONLY
)
_CROSS: Mapping[str, Forward] = {
    "encoder": forwards.encoder,
    "prefill": forwards.first_tokens,
    "decode": forwards.next_tokens,
}
_TEXT_TO_TEXT = Architecture("AutoModelForSeq2SeqLM", _CROSS, names.ENCODER_DECODER)
_SPEECH_TO_TEXT = Architecture("AutoModelForSpeechSeq2Seq", _CROSS, names.SPEECH)

DECODER_ONLY: Heads = {"ForCausalLM": _DECODER}
ENCODER_DECODER: Heads = {"ForConditionalGeneration": _TEXT_TO_TEXT}
SPEECH: Heads = {"ForConditionalGeneration": _SPEECH_TO_TEXT}
ENCODER_ONLY: Heads = {
    "ForSequenceClassification": _encoder_only("AutoModelForSequenceClassification", names.ONE_A_ROW),
    "ForTokenClassification": _encoder_only("AutoModelForTokenClassification", names.ONE_A_TOKEN),
    "ForMaskedLM": _encoder_only("AutoModelForMaskedLM", names.ONE_A_TOKEN),
    "ForQuestionAnswering": _encoder_only("AutoModelForQuestionAnswering", names.SPAN),
    "Model": _encoder_only("AutoModel", names.STATES),
}

# Each was exported and compared with PyTorch. To add one: name it here, and give the tests a tiny config of it.
FAMILIES: Mapping[str, Heads] = {
    **dict.fromkeys(
        (
            "bloom",
            "codegen",
            "cohere",
            "gemma",
            "gemma2",
            "gemma3_text",
            "gpt_bigcode",
            "gpt_neo",
            "gpt_neox",
            "gptj",
            "granite",
            "llama",
            "mistral",
            "olmo",
            "olmo2",
            "opt",
            "phi",
            "phi3",
            "qwen2",
            "qwen3",
            "smollm3",
            "stablelm",
            "starcoder2",
        ),
        DECODER_ONLY,
    ),
    "gpt2": {"LMHeadModel": _DECODER},
    **dict.fromkeys(("bart", "mt5", "t5"), ENCODER_DECODER),
    "marian": {"MTModel": _TEXT_TO_TEXT},
    "whisper": SPEECH,
    **dict.fromkeys(
        (
            "albert",
            "bert",
            "camembert",
            "deberta",
            "deberta-v2",
            "distilbert",
            "electra",
            "mpnet",
            "roberta",
            "xlm-roberta",
        ),
        ENCODER_ONLY,
    ),
}

_CLASS = re.compile(r".+?(For\w+|WithLMHeadModel|LMHeadModel|DoubleHeadsModel|MTModel|EncoderModel|DecoderModel|Model)")
OLD_NAMES: Mapping[str, str] = {"T5WithLMHeadModel": "T5ForConditionalGeneration"}
"""What transformers 2 called a class."""


def architecture_of(config: Mapping[str, Any]) -> Architecture:
    """Return what a model with this `config.json` is exported as.

    Raises:
        RecipeError: The network or its head is not supported, or the config does not say which head it has.
    """
    model_type = config.get("model_type")
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        near = did_you_mean(model_type, FAMILIES) if isinstance(model_type, str) else ""
        near = near if near.startswith("; did") else ""
        raise RecipeError(
            f"cannot export the architecture {model_type!r}{near}; supported are {', '.join(sorted(FAMILIES))}",
            hint=ANOTHER_TOOL,
        )
    heads = FAMILIES[model_type]
    name = class_of(config)
    if not name:
        raise RecipeError(
            f"config.json of this {model_type} does not say under 'architectures' which head the weights have",
            hint=f'write the saved class into config.json, for example "architectures": ["...{next(iter(heads))}"], '
            f"or {ANOTHER_TOOL}",
        )
    match = _CLASS.fullmatch(name)
    head = match[1] if match else name
    if head not in heads:
        raise RecipeError(
            f"cannot export {name!r}; of {model_type}, those are exported that are called {_listed(heads)}",
            hint=_way_out(name, head, heads),
        )
    return heads[head]


def class_of(config: Mapping[str, Any]) -> str:
    """Return the class that `config.json` names, by its present name; empty if it names none or several."""
    given = config.get("architectures")
    if not isinstance(given, list) or len(given) != 1 or not isinstance(given[0], str):
        return ""
    return OLD_NAMES.get(given[0], given[0])


def _listed(heads: Heads) -> str:
    return ", ".join(f"...{head}" for head in heads)


def _way_out(name: str, head: str, heads: Heads) -> str:
    """A bare decoder gives no logits; one whose output projection is its embedding lacks nothing for them."""
    if head != "Model" or "Model" in heads:
        return ANOTHER_TOOL
    whole = name.removesuffix("Model") + next(iter(heads))
    return (
        "this is the network without its head; if the head is the tied embedding, as in facebook/bart-base, write "
        f'"architectures": ["{whole}"] into config.json of a local folder'
    )
