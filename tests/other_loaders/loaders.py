"""What a folder says in Optimum and in transformers.js, each in an environment of its own, and in PyTorch.

Where to find them is said by two variables, or `prepare` sets them up below a folder:

    SURGERY_OPTIMUM_PYTHON   the Python of an environment with optimum-onnx, onnxruntime and torch
    SURGERY_NODE_FOLDER      a folder in which the package.json beside this file was installed by npm
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
OPTIMUM, NODE = "SURGERY_OPTIMUM_PYTHON", "SURGERY_NODE_FOLDER"
OPTIMUM_PACKAGES = ("torch==2.13.0", "optimum==2.1.0", "optimum-onnx==0.1.0", "onnxruntime==1.31.1")
FETCHES_NOTHING = {"ONNXRUNTIME_NODE_INSTALL": "skip", "ONNXRUNTIME_NODE_INSTALL_CUDA": "skip"}
"""The package of onnxruntime-node holds its CPU library; what its script would fetch besides is for CUDA."""


@dataclass(frozen=True)
class Job:
    """Rows to be continued greedily: texts, or ids [batch, length] with their mask.

    Args:
        folder: The models, their configs and tokenizer.
        prompts: Texts for the folder's tokenizer; empty where there is none.
        input_ids: The ids otherwise.
        attention_mask: Their mask.
        padding_side: Where texts of several lengths are padded.
        max_new_tokens: How many tokens to add at most.
        options: What has to be said to a loader beside the folder, by loader.
    """

    folder: Path
    prompts: Sequence[str] = ()
    input_ids: Sequence[Sequence[int]] = ()
    attention_mask: Sequence[Sequence[int]] = ()
    padding_side: str = "left"
    max_new_tokens: int = 16
    options: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def as_json(self) -> str:
        """Return it as the loaders read it."""
        rows: dict[str, Any] = (
            {"prompts": list(self.prompts)}
            if self.prompts
            else {"input_ids": self.input_ids, "attention_mask": self.attention_mask}
        )
        more = {"padding_side": self.padding_side, "max_new_tokens": self.max_new_tokens, "options": self.options}
        return json.dumps({"folder": str(self.folder), **rows, **more})


def by_optimum(job: Job, python: str) -> dict[str, Any]:
    """Return what Optimum says."""
    return _answer([python, str(HERE / "optimum_generate.py")], job, {"CUDA_VISIBLE_DEVICES": ""})


def by_transformers_js(job: Job, folder: Path) -> dict[str, Any]:
    """Return what transformers.js says on Node."""
    shutil.copy(HERE / "generate.mjs", folder / "generate.mjs")  # Node looks for packages beside the script
    return _answer(["node", str(folder / "generate.mjs")], job, {})


def by_torch(job: Job, source: Path) -> dict[str, Any]:
    """Return what PyTorch says of the network that the folder was made of."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    is_pair = AutoConfig.from_pretrained(source).is_encoder_decoder
    model = (AutoModelForSeq2SeqLM if is_pair else AutoModelForCausalLM).from_pretrained(source).eval()
    if job.prompts:
        tokenizer = AutoTokenizer.from_pretrained(source, padding_side=job.padding_side)
        inputs = dict(tokenizer(list(job.prompts), padding=True, return_tensors="pt"))
    else:
        inputs = {"input_ids": torch.tensor(job.input_ids), "attention_mask": torch.tensor(job.attention_mask)}
    with torch.no_grad():
        made = model.generate(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            max_new_tokens=job.max_new_tokens,
            do_sample=False,
            num_beams=1,
        )
    return {"input_ids": inputs["input_ids"].tolist(), "sequences": made.tolist()}


def until_end(answer: Mapping[str, Any], end: int | None) -> list[list[int]]:
    """Return what was generated after the prompt, or after the start token, up to the end of each row.

    transformers.js 4 goes on with rows that have ended until all do, where others fill them with padding.
    """
    rows = []
    for prompt, row in zip(answer["input_ids"], answer["sequences"], strict=True):
        new = row[len(prompt) :] if row[: len(prompt)] == prompt else row[1:]
        rows.append(new[: new.index(end) + 1] if end in new else new)
    return rows


def _answer(command: Sequence[str], job: Job, more: Mapping[str, str]) -> dict[str, Any]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    done = subprocess.run(
        command,
        input=job.as_json(),
        capture_output=True,
        text=True,
        check=False,
        timeout=1200,
        env={**environment, **more},
    )
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} stopped with {done.returncode}:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return answer


def prepare(folder: Path) -> tuple[str, Path]:
    """Return Optimum's Python and the folder of transformers.js: those that are named, else set up below a folder."""
    python, node = os.environ.get(OPTIMUM), os.environ.get(NODE)
    return python or _optimum_in(folder / "optimum"), Path(node) if node else _node_in(folder / "node")


def _optimum_in(folder: Path) -> str:
    python = folder / "bin" / "python"
    if not (folder / "installed").exists():
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *OPTIMUM_PACKAGES], check=True)
        (folder / "installed").touch()
    return str(python)


def _node_in(folder: Path) -> Path:
    if not (folder / "node_modules").exists():
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copy(HERE / "package.json", folder / "package.json")
        command = ["npm", "install", "--no-audit", "--no-fund", "--no-package-lock"]
        subprocess.run(command, cwd=folder, env={**os.environ, **FETCHES_NOTHING}, check=True)
    return folder
