"""Models at real configuration with random weights, made once and kept in benchmarks/.cache."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import onnx_ir as ir

from surgery.recipe import Source
from surgery.sources import find_source
from surgery.storage import save_model, save_models

CACHE = Path(__file__).parent / ".cache"
SIZES = {"gpt2": {}, "gpt2-large": {"n_embd": 1280, "n_layer": 36, "n_head": 20}}
T5_BASE = {"d_model": 768, "d_ff": 3072, "num_layers": 12, "num_decoder_layers": 12, "num_heads": 12}


def pretrained_gpt2(name: str) -> Path:
    """Return a Hugging Face folder of GPT-2 at a real size; biases and norms are random too, as in a trained model."""
    folder = CACHE / name
    if folder.exists():
        return folder
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**SIZES[name]))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    draft = folder.with_suffix(".tmp")
    model.save_pretrained(draft)
    draft.rename(folder)
    return folder


def pretrained_t5_base() -> Path:
    """Return a Hugging Face folder of T5-base with random weights, in norms too."""
    folder = CACHE / "t5-base"
    if folder.exists():
        return folder
    import torch
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(**T5_BASE, decoder_start_token_id=0))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    draft = folder.with_suffix(".tmp")
    model.save_pretrained(draft)
    draft.rename(folder)
    return folder


def exported(pretrained: Path, folder: Path, *roles: str) -> Path:
    """Return a folder with the models of a Hugging Face folder, each with a copy of all its weights, and its configs.

    Args:
        pretrained: The Hugging Face folder.
        folder: Where the models are, or will be.
        roles: Only these; all of them without one.
    """
    if not folder.exists():
        scratch = folder.with_suffix(".scratch")
        shutil.rmtree(scratch, ignore_errors=True)
        scratch.mkdir(parents=True)
        bundle = find_source(Source(path=str(pretrained)), Path()).open(scratch, print).bundle
        models = {role: bundle[role] for role in roles or bundle.models}
        save_models(models, folder, layout="optimum", extras=bundle.files)
        shutil.rmtree(scratch)
    return folder


def two_decoders(name: str) -> Path:
    """Return a folder with prefill and decode as Optimum lays them out: each with a copy of all the weights."""
    return exported(pretrained_gpt2(name), CACHE / f"{name}-two")


def with_a_twin(name: str, layout: str) -> Path:
    """Return a model that holds its embedding twice, byte for byte, as exporters write it that know no tied weights."""
    folder = CACHE / f"{name}-twin-{layout}"
    path = folder / "model.onnx"
    if not folder.exists():
        from surgery.storage import open_model

        model = open_model(two_decoders(name) / "decoder_with_past_model.onnx")
        split_largest(model)
        draft = folder.with_suffix(".tmp")
        shutil.rmtree(draft, ignore_errors=True)
        draft.mkdir()
        save_model(model, draft / "model.onnx", layout=layout)  # type: ignore[arg-type]
        draft.rename(folder)
    return path


def split_largest(model: ir.Model) -> None:
    """Give each use of the largest weight a copy of its own."""
    value = max(
        model.graph.initializers.values(), key=lambda value: value.const_value.nbytes if value.const_value else 0
    )
    assert value.const_value is not None
    uses = list(value.uses())
    assert len(uses) > 1, f"{value.name} is used once only, so there is nothing to split"
    array = np.array(value.const_value.numpy())
    for number, (node, index) in enumerate(uses[1:]):
        copy = ir.Value(
            name=f"{value.name}_twin_{number}", const_value=ir.tensor(array), shape=value.shape, type=value.type
        )
        model.graph.register_initializer(copy)
        node.replace_input_with(index, copy)


def bytes_of(path: Path) -> int:
    """Return the size of a file, or of all files in a folder."""
    return (
        path.stat().st_size
        if path.is_file()
        else sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
    )
