"""What generation takes of a bundle: its models in the order of use, and its configs."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, GenerationConfig, PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from surgery.bundle import Bundle
from surgery.errors import ModelFileError, Refused
from surgery.interfaces import recognise

IDS = ("bos_token_id", "pad_token_id", "eos_token_id", "decoder_start_token_id")


def models_of(bundle: Bundle) -> dict[str, Any]:
    """Return the models that are used: the encoder, then one decoder or the two, that for prompts first.

    Raises:
        Refused: There is none.
    """
    models = dict(bundle.models)
    if set(models) == {"model"}:
        recognised = recognise(models["model"])
        if recognised is not None and recognised.role != "encoder":
            models = {recognised.role: models["model"]}
    pairs = (("decoder",), ("prefill", "decode"), ("decode",), ("prefill",))
    wanted = next((pair for pair in pairs if set(pair) <= set(models)), None)
    if wanted is None:
        raise Refused(
            f"cannot generate with {', '.join(sorted(models)) or 'no models'}; "
            "'prefill' and 'decode', or 'decoder', are needed",
            hint="give a folder with decoder_model.onnx and decoder_with_past_model.onnx, or decoder_model_merged.onnx",
        )
    return {role: models[role] for role in ("encoder", *wanted) if role in models}


def config_of(bundle: Bundle, *, has_encoder: bool) -> Any:
    """Return the network's config, of a kind that transformers knows or else a plain one.

    Raises:
        Refused: There is none, or it is an encoder-decoder's and there is no encoder.
        ModelFileError: transformers does not take it.
    """
    if not bundle.config:
        raise Refused(
            "the bundle has no config.json, so the sizes of its network and its special tokens are not known",
            hint="put config.json and generation_config.json beside the models",
        )
    known = {name: value for name, value in bundle.config.items() if name != "model_type"}
    model_type = bundle.config.get("model_type")
    try:
        if model_type in CONFIG_MAPPING:
            config = AutoConfig.for_model(model_type, **known)
        else:
            config = PreTrainedConfig.from_dict({**known, "is_encoder_decoder": has_encoder})
    except Exception as error:  # each kind of network checks its config in its own way
        raise _strange("config.json", error) from error
    if config.is_encoder_decoder and not has_encoder:
        raise Refused(
            f"{model_type!r} is an encoder-decoder, and the bundle has no 'encoder'",
            hint="put encoder_model.onnx beside the decoders",
        )
    config.is_encoder_decoder = has_encoder
    return config


def generation_config_of(bundle: Bundle) -> Any:
    """Return the generation config; without one, what the config says of generation, as transformers does.

    What it says of the cache's kind is about PyTorch's memory, and changes no token.

    Raises:
        ModelFileError: transformers does not take it, or a special token has no id.
    """
    name = "generation_config.json" if bundle.generation_config else "config.json"
    try:
        if bundle.generation_config:
            made = GenerationConfig.from_dict(dict(bundle.generation_config))
        else:
            made = GenerationConfig.from_model_config(dict(bundle.config))
    except Exception as error:  # transformers raises nothing more specific
        raise _strange(name, error) from error
    for word in IDS:
        ids = getattr(made, word)
        if not all(one is None or isinstance(one, int) for one in (ids if isinstance(ids, list) else [ids])):
            raise ModelFileError(f"{name}: {word} is {ids!r}, not the id of a token")
    made.cache_implementation = made.cache_config = None
    made.output_attentions = made.output_hidden_states = None
    return made


def _strange(name: str, error: Exception) -> ModelFileError:
    return ModelFileError(
        f"{name}: transformers does not take it: {' '.join(str(error).split())}",
        hint="put the file there that came with the network",
    )
