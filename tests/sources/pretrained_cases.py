"""Tiny Hugging Face models of every family, exported, with feeds for them and comparisons with PyTorch."""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import onnxruntime

from surgery.runtime.loops import Callee, Signature, greedy, position_ids
from surgery.sources.architectures import FAMILIES
from surgery.sources.huggingface import Exported, export

Arrays = dict[str, np.ndarray]

LIMIT = 1e-4  # of the largest error, in units of the reference's root mean square
VOCABULARY = 67
WINDOW = 16
IDS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 1}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
LLAMA = {"hidden_size": 32, "num_hidden_layers": 1, "intermediate_size": 64, "max_position_embeddings": 256, **HEADS}
GPT2 = {"n_positions": 256, "n_embd": 32, "n_layer": 1, "n_head": 4}
T5 = {"d_model": 32, "d_kv": 8, "d_ff": 64, "num_layers": 1, "num_heads": 4, "decoder_start_token_id": 0}
BART = {
    "d_model": 32,
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 1),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 64),
    "max_position_embeddings": 256,
    "decoder_start_token_id": 1,
    "forced_eos_token_id": None,
}
BERT = {
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 256,
}
ONE_TYPE = {**BERT, "type_vocab_size": 1}
SLIDING_THEN_FULL = {
    **LLAMA,
    "num_hidden_layers": 2,
    "head_dim": 8,
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"],
}
MEL_BANDS, FRAMES = 16, 40
TINY: Mapping[str, Mapping[str, Any]] = {
    "albert": {**BERT, "embedding_size": 16},
    "bart": BART,
    "bert": BERT,
    "bloom": {"hidden_size": 32, "n_layer": 1, "n_head": 4},
    "camembert": ONE_TYPE,
    "codegen": {**GPT2, "rotary_dim": 4},
    "cohere": LLAMA,
    "deberta": {
        **BERT,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "max_relative_positions": WINDOW,
        "position_biased_input": False,
    },
    "deberta-v2": {
        **BERT,
        "relative_attention": True,
        "pos_att_type": ["c2p", "p2c"],
        "position_buckets": WINDOW,
        "share_att_key": True,
        "norm_rel_ebd": "layer_norm",
        "position_biased_input": False,
    },
    "distilbert": {"dim": 32, "n_layers": 1, "n_heads": 4, "hidden_dim": 64, "max_position_embeddings": 256},
    "electra": {**BERT, "embedding_size": 16},
    "gemma": {**LLAMA, "head_dim": 8},
    "gemma2": {**SLIDING_THEN_FULL, "query_pre_attn_scalar": 8},
    "gemma3_text": {**SLIDING_THEN_FULL, "query_pre_attn_scalar": 8},
    "gpt2": GPT2,
    "gpt_bigcode": GPT2,
    "gpt_neo": {
        "hidden_size": 32,
        "num_layers": 2,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1]],
        "window_size": WINDOW,
        "max_position_embeddings": 256,
    },
    "gpt_neox": LLAMA,
    "gptj": {**GPT2, "rotary_dim": 4},
    "granite": LLAMA,
    "llama": LLAMA,
    "marian": BART,
    "mistral": {**LLAMA, "sliding_window": WINDOW},
    "mpnet": BERT,
    "mt5": T5,
    "olmo": LLAMA,
    "olmo2": LLAMA,
    "opt": {**LLAMA, "ffn_dim": 64, "word_embed_proj_dim": 32},
    "phi": LLAMA,
    "phi3": {**LLAMA, "sliding_window": WINDOW},
    "qwen2": LLAMA,
    "qwen3": {**LLAMA, "head_dim": 8},
    "roberta": ONE_TYPE,
    "smollm3": LLAMA,
    "stablelm": LLAMA,
    "starcoder2": {**LLAMA, "sliding_window": WINDOW},
    "t5": T5,
    "whisper": {
        **BART,
        "num_mel_bins": MEL_BANDS,
        "max_source_positions": FRAMES // 2,
        "max_target_positions": 256,
        "suppress_tokens": None,
        "begin_suppress_tokens": None,
    },
    "xlm-roberta": ONE_TYPE,
}


def save_tiny(model_type: str, folder: Path, head: str | None = None, **changes: Any) -> Path:
    """Save a tiny model whose biases and norms are random too; left at 0 and 1, exporters drop and share them.

    Args:
        model_type: The family.
        folder: Where to.
        head: The ending of the class, where a family has several heads.
        changes: To its config.
    """
    import torch
    import transformers
    from transformers.utils import logging

    heads = FAMILIES.get(model_type)
    auto_class = heads[head or next(iter(heads))].auto_class if heads else "AutoModelForCausalLM"
    config = transformers.AutoConfig.for_model(model_type, **{**IDS, **TINY.get(model_type, {}), **changes})
    torch.manual_seed(0)
    model = getattr(transformers, auto_class).from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    logging.disable_progress_bar()
    model.eval().save_pretrained(folder)
    return folder


class Session:
    """The exported models in ONNX Runtime."""

    def __init__(self, exported: Exported, folder: Path) -> None:
        self.sessions = {role: _session(model, folder / f"{role}.onnx") for role, model in exported.models.items()}

    def inputs(self, role: str) -> list[str]:
        return [value.name for value in self.sessions[role].get_inputs()]

    def run(self, role: str, feeds: Mapping[str, np.ndarray]) -> Arrays:
        outputs = [value.name for value in self.sessions[role].get_outputs()]
        given = {name: feeds[name] for name in self.inputs(role)}
        return dict(zip(outputs, self.sessions[role].run(None, given), strict=True))


def _session(model: ir.Model, path: Path) -> Any:
    # Saving moves a model's weights, and the tests look at where those of the export are.
    ir.save(model.clone(), path, external_data=f"{path.name}_data")
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])


@dataclass(frozen=True)
class Case:
    """A tiny model: its folder, its export, that export in a runtime, and what the terminal showed meanwhile."""

    folder: Path
    exported: Exported
    onnx: Session
    said: tuple[str, ...]
    shown: str


@contextmanager
def terminal() -> Iterator[Callable[[], str]]:
    """Catch what is written to the process's standard output and error, whoever writes it."""
    sys.stdout.flush()
    sys.stderr.flush()
    with tempfile.TemporaryFile() as file:
        kept = [os.dup(1), os.dup(2)]
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)

        def shown() -> str:
            file.seek(0)
            return file.read().decode(errors="replace")

        try:
            yield shown
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for number, copy in zip((1, 2), kept, strict=True):
                os.dup2(copy, number)
                os.close(copy)


def make_case(model_type: str, folder: Path, opset: int | None = None, head: str | None = None, **changes: Any) -> Case:
    save_tiny(model_type, folder / "source", head, **changes)
    said: list[str] = []
    with terminal() as shown:
        exported = export(str(folder / "source"), opset=opset, scratch=folder / "scratch", progress=said.append)
        text = shown()
    return Case(folder / "source", exported, Session(exported, folder), tuple(said), text)


def interface(case: Case, role: str) -> str:
    graph = case.exported.models[role].graph
    lines = []
    for arrow, values in (("in ", graph.inputs), ("out", graph.outputs)):
        for value in values:
            assert value.shape is not None
            sizes = ", ".join(str(size if isinstance(size, int) else size.value) for size in value.shape)
            lines.append(f"{arrow} {value.name} [{sizes}] {value.dtype}")
    return "\n".join(lines)


# Feeds


def some_ids(batch: int, length: int) -> np.ndarray:
    return np.random.default_rng([batch, length]).integers(2, VOCABULARY, (batch, length))


def left_padded(batch: int, length: int) -> np.ndarray:
    """Return a mask [batch, length] whose last row is full and the others are not, where there is room."""
    mask = np.ones((batch, length), np.int64)
    for row in range(batch - 1):
        mask[row, : min(row + 1 + length // 3, length - 1)] = 0
    return mask


def right_padded(batch: int, length: int) -> np.ndarray:
    """Return such a mask the other way round, as encoders are fed."""
    return np.ascontiguousarray(left_padded(batch, length)[:, ::-1])


def as_past(outputs: Arrays, length: int) -> Arrays:
    """Return the caches of a prefill, its own tokens cut to a length."""
    past = {name.replace("present", "past_key_values"): x for name, x in outputs.items() if name.startswith("present")}
    return {name: x if ".encoder." in name else x[:, :, :length] for name, x in past.items()}


def decoder_feeds(mask: np.ndarray, length: int, past: Arrays) -> Arrays:
    """Return the feeds of the last `length` tokens under a mask; a model without `position_ids` does not take them."""
    ids = some_ids(len(mask), length)
    return {"input_ids": ids, "attention_mask": mask, "position_ids": position_ids(mask)[:, -length:], **past}


def encoder_feeds(mask: np.ndarray) -> Arrays:
    """Return the feeds of an encoder, of two texts in one; a model without `token_type_ids` does not take them."""
    types = np.broadcast_to(np.arange(mask.shape[1]) > mask.shape[1] // 2, mask.shape).astype(np.int64)
    return {"input_ids": some_ids(*mask.shape), "attention_mask": mask, "token_type_ids": types}


def some_sound(batch: int) -> np.ndarray:
    return np.random.default_rng(batch).standard_normal((batch, MEL_BANDS, FRAMES)).astype(np.float32)


# Comparisons


def assert_close(role: str, case: Case, feeds: Arrays) -> Arrays:
    """Assert that ONNX Runtime gives what PyTorch gives, at padding too; return it."""
    given = {name: feeds[name] for name in case.onnx.inputs(role)}
    wanted, got = case.exported.reference.run(role, given), case.onnx.run(role, given)
    assert list(got) == list(wanted)
    for name, array in wanted.items():
        assert got[name].shape == array.shape, name
        error = np.abs(got[name] - array).max() / np.sqrt(np.square(array).mean())
        assert error < LIMIT, f"{role}: {name} is off by {error}"
    return wanted


def assert_agrees(case: Case, lengths: tuple[int, ...]) -> None:
    """Assert that every role answers as PyTorch, for one row and for three with padding."""
    if "model" in case.exported.models:
        return assert_encoder_only_agrees(case, lengths)
    if "encoder" in case.exported.models:
        return assert_encoder_decoder_agrees(case, lengths)
    return assert_decoder_only_agrees(case, lengths)


def assert_encoder_only_agrees(case: Case, lengths: tuple[int, ...]) -> None:
    for length in lengths:
        assert_close("model", case, encoder_feeds(left_padded(1, length)))
        for mask in (left_padded(3, length), right_padded(3, length)):
            assert_close("model", case, encoder_feeds(mask))


def assert_decoder_only_agrees(case: Case, lengths: tuple[int, ...]) -> None:
    for batch in (1, 3):
        for length in lengths:
            mask = left_padded(batch, length)
            outputs = assert_close("prefill", case, decoder_feeds(mask, length, {}))
            for new in (1, 4):
                longer = np.concatenate([mask, np.ones((batch, new), np.int64)], axis=1)
                assert_close("decode", case, decoder_feeds(longer, new, as_past(outputs, length)))


def assert_encoder_decoder_agrees(case: Case, lengths: tuple[int, ...]) -> None:
    hears = "input_features" in case.onnx.inputs("encoder")
    for batch in (1, 3):
        for length in lengths[:1] if hears else lengths:
            mask = left_padded(batch, length)
            read = {"input_ids": some_ids(batch, length), "attention_mask": mask, "input_features": some_sound(batch)}
            states = assert_close("encoder", case, read)["last_hidden_state"]
            encoded = {"encoder_hidden_states": states, "encoder_attention_mask": mask}
            for prompt in lengths if hears else (1, 3):
                outputs = assert_close("prefill", case, {"input_ids": some_ids(batch, prompt), **encoded})
                for past, new in ((0, 1), (0, 4), (1, 1), (prompt, 1), (prompt, 4)):
                    feeds = {"input_ids": some_ids(batch, new), **encoded, **as_past(outputs, past)}
                    assert_close("decode", case, feeds)


def assert_generates_the_same(case: Case) -> None:
    """Assert equal tokens for a padded batch: a host loop over the exports, and `generate` of transformers."""
    import torch

    mask = left_padded(3, 9)
    ids = np.where(mask == 1, some_ids(3, 9), 0)
    callees = {
        role: Callee(Signature.of(model), lambda feeds, role=role: case.onnx.run(role, feeds))
        for role, model in case.exported.models.items()
    }
    feeds = {"input_ids": ids, "attention_mask": mask, "max_new_tokens": np.int64(24)}
    got = greedy(callees, feeds, case.exported.generation_config)["sequences"]
    model = case.exported.reference._model
    tensors = {"input_ids": torch.tensor(ids), "attention_mask": torch.tensor(mask)}
    whole = model.generate(**tensors, max_new_tokens=24, do_sample=False, num_beams=1).numpy()
    start = 1 if "encoder" in case.exported.models else ids.shape[1]
    assert np.array_equal(got, whole[:, start:])
