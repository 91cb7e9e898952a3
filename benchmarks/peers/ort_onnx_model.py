"""Convert models with ONNX Runtime's `OnnxModel`: `ort_onnx_model.py SAMPLES OUT_FOLDER MODEL ...`.

Its optimizer is made of that class. `convert_float_to_float16` infers types symbolically before it calls the function
of `ort_float16.py`, and sorts the nodes when it saves.
"""

import sys
from pathlib import Path

import onnx
from onnxruntime.transformers.onnx_model import OnnxModel

_, target, *sources = map(Path, sys.argv[1:])
target.mkdir(parents=True)
for source in sources:
    model = OnnxModel(onnx.load(source))
    model.convert_float_to_float16(keep_io_types=True)
    model.save_model_to_file(str(target / source.name), use_external_data_format=True)
