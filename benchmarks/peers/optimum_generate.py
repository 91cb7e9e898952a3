"""Generate or classify with Optimum, one question a line: `optimum_generate.py HF_FOLDER EXPORT_FOLDER CASE THREADS`.

Optimum exports the model by itself, once; a decoder comes out as one file that takes a prompt and a cache, an
encoder-decoder as encoder, decoder and decoder with past.
"""

import json
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import onnxruntime
import torch
from optimum.exporters.onnx import main_export
from optimum.onnxruntime import ORTModelForCausalLM, ORTModelForSeq2SeqLM, ORTModelForSequenceClassification
from racing import serve, timed
from transformers import LogitsProcessor, LogitsProcessorList

TASKS = {
    "decoder": ("text-generation-with-past", ORTModelForCausalLM),
    "encoder-decoder": ("text2text-generation-with-past", ORTModelForSeq2SeqLM),
    "classifier": ("text-classification", ORTModelForSequenceClassification),
}

source, folder = Path(sys.argv[1]), Path(sys.argv[2])
case, threads = json.loads(sys.argv[3]), int(sys.argv[4])
torch.set_num_threads(threads)
task, loader = TASKS[case["kind"]]
if not folder.exists():
    draft = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    main_export(str(source), draft, task=task, do_validation=False)
    draft.rename(folder)
options = onnxruntime.SessionOptions()
options.intra_op_num_threads = threads
options.log_severity_level = 3
model = loader.from_pretrained(folder, session_options=options)


class Clock(LogitsProcessor):
    def __init__(self, tick):
        self.tick = tick

    def __call__(self, input_ids, scores):
        self.tick()
        return scores


def answer(question):
    ids = torch.tensor(question["ids"])
    mask = torch.ones_like(ids)
    if case["kind"] == "classifier":
        calls = range(case["calls"])
        return timed(lambda tick: [model(input_ids=ids, attention_mask=mask).logits.tolist() for _ in calls][-1])
    settings = {
        "do_sample": False,
        "num_beams": case["beams"],
        "max_new_tokens": case["new"],
        "pad_token_id": 0,
    }

    model.generation_config.eos_token_id = None  # no token ends a text

    def generate(tick):
        clock = LogitsProcessorList([Clock(tick)])
        given = model.generate(input_ids=ids, attention_mask=mask, logits_processor=clock, **settings)
        return given[:, -case["new"] :].tolist()

    return timed(generate)


serve(answer)
