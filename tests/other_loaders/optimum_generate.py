"""Loads a folder with Optimum, as a user does, and continues rows greedily: a job comes in, an answer goes out.

Run by the Python of an environment of its own, whose transformers is older than ours.
"""

import json
import sys
from importlib.metadata import version

import torch
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM
from transformers import AutoConfig, AutoTokenizer


def main() -> None:
    job = json.load(sys.stdin)
    config = AutoConfig.from_pretrained(job["folder"])
    model_class = ORTModelForSeq2SeqLM if config.is_encoder_decoder else ORTModelForCausalLM
    model = model_class.from_pretrained(job["folder"], **job["options"].get("optimum", {}))
    if "prompts" in job:
        tokenizer = AutoTokenizer.from_pretrained(job["folder"], padding_side=job["padding_side"])
        inputs = dict(tokenizer(job["prompts"], padding=True, return_tensors="pt"))
    else:
        inputs = {name: torch.tensor(job[name]) for name in ("input_ids", "attention_mask")}
    made = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=job["max_new_tokens"],
        do_sample=False,
        num_beams=1,
    )
    answer = {
        "loaded_by": f"Optimum {version('optimum')}, transformers {version('transformers')}",
        "model": model_class.__name__,
        "input_ids": inputs["input_ids"].tolist(),
        "sequences": made.tolist(),
    }
    print(json.dumps(answer))


main()
