"""Make the small foreign models of this folder: untrained networks, as other tools export and lay them out.

Each tool needs its own versions, so each has a command, run in an environment of its own:

    python make.py optimum FOLDER       # optimum 2.1, optimum-onnx 0.1, transformers 4.57, torch 2.13
    python make.py legacy FOLDER        # optimum 1.24, transformers 4.48, torch 2.13
    python make.py transformers FOLDER  # transformers 5.23, torch 2.13, onnxscript
    python make.py genai FOLDER         # onnxruntime-genai 0.18, transformers 5.23, torch 2.13

What comes out, by folder:

    gpt2_all         Optimum 1.24, legacy: decoder_model.onnx, decoder_with_past_model.onnx, decoder_model_merged.onnx
    t5_all           Optimum: an encoder and the same three
    gpt2_exporters   transformers.exporters: prefill.onnx, decode.onnx, export.json
    t5_exporters     the same of an encoder-decoder, of which it saves no encoder
    llama_genai      onnxruntime-genai: model.onnx and genai_config.json

The tests make the other layouts of these: two files, the merged one alone, `onnx/` below the configs.
"""

from __future__ import annotations

import functools
import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

VOCABULARY = 16
GPT2 = {"n_embd": 16, "n_head": 2, "n_positions": 128, "vocab_size": VOCABULARY}
T5 = {"d_model": 16, "d_kv": 8, "d_ff": 32, "num_heads": 2, "vocab_size": VOCABULARY}
LLAMA = {
    "hidden_size": 32,  # heads of 16, as ONNX Runtime's GroupQueryAttention wants them
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 128,
    "vocab_size": VOCABULARY,
}
IDS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
SEQ2SEQ_IDS = {"pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0}


def network(kind: str, layers: int = 1) -> Any:
    """Return an untrained network; its biases and norms are random, so that no exporter drops or shares them."""
    import torch
    import transformers

    if kind == "gpt2":
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**GPT2, n_layer=layers, **IDS))
    elif kind == "t5":
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, num_layers=layers, **SEQ2SEQ_IDS))
    else:
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**LLAMA, num_hidden_layers=layers, **IDS))
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0.0, 0.3)
    return model.eval()


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer of single characters: three special tokens, then the digits, + - ="""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers

    words = ["<pad>", "<bos>", "<eos>", *"0123456789+-="]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens(words[:3])
    tokenizer.save(str(folder / "tokenizer.json"))
    content = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>", "eos_token": "<eos>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(content, indent=2) + "\n")


def optimum(root: Path) -> None:
    """Export with Optimum's command line, which leaves all three decoders of an encoder-decoder."""
    with tempfile.TemporaryDirectory() as name:
        network("t5").save_pretrained(name)
        save_tokenizer(Path(name))
        shutil.rmtree(root / "t5_all", ignore_errors=True)
        command = [sys.executable, "-m", "optimum.commands.optimum_cli", "export", "onnx", "--model", name]
        subprocess.run([*command, "--task", "text2text-generation-with-past", str(root / "t5_all")], check=True)


def legacy(root: Path) -> None:
    """Export with an Optimum that still wrote decoders as three files."""
    import torch
    from optimum.exporters.onnx import main_export

    # That Optimum knows only the TorchScript exporter, which was the default until torch 2.9.
    torch.onnx.export = functools.partial(torch.onnx.export, dynamo=False)
    with tempfile.TemporaryDirectory() as name:
        network("gpt2").save_pretrained(name)
        save_tokenizer(Path(name))
        shutil.rmtree(root / "gpt2_all", ignore_errors=True)
        main_export(name, root / "gpt2_all", task="text-generation-with-past", legacy=True)
    config = root / "gpt2_all" / "config.json"
    content = json.loads(config.read_text())
    del content["_name_or_path"]  # the temporary folder
    config.write_text(json.dumps(content, indent=2) + "\n")


def transformers(root: Path) -> None:
    """Export with transformers.exporters, each generation stage as one file."""
    import torch
    from transformers.exporters.exporter_onnx import OnnxConfig, OnnxExporter

    for kind in ("gpt2", "t5"):
        ids = torch.randint(3, VOCABULARY, (2, 7))
        mask = torch.ones_like(ids)
        mask[0, :3] = 0
        inputs = {"input_ids": ids, "attention_mask": mask}
        if kind == "t5":
            inputs["decoder_input_ids"] = torch.randint(3, VOCABULARY, (2, 3))
        model = network(kind, layers=2 if kind == "gpt2" else 1)
        folder = root / f"{kind}_exporters"
        shutil.rmtree(folder, ignore_errors=True)
        exported = OnnxExporter().export_for_generation(model, inputs, OnnxConfig(dynamic=True, opset_version=18))
        for component in exported.components.values():
            for node in component.program.graph.all_nodes():
                node.metadata_props.clear()  # Python stack traces, longer than the graph
        exported.save_pretrained(folder)
        model.generation_config.save_pretrained(folder)
        save_tokenizer(folder)


def genai(root: Path) -> None:
    """Export with the model builder of onnxruntime-genai."""
    with tempfile.TemporaryDirectory() as name:
        model, cache = Path(name, "llama"), Path(name, "cache")
        network("llama", layers=2).save_pretrained(model)
        save_tokenizer(model)
        folder = root / "llama_genai"
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", str(model), "-o", str(folder)]
        subprocess.run([*command, "-p", "fp32", "-e", "cpu", "-c", str(cache)], check=True)


if __name__ == "__main__":
    commands = {"optimum": optimum, "legacy": legacy, "transformers": transformers, "genai": genai}
    commands[sys.argv[1]](Path(sys.argv[2]))
