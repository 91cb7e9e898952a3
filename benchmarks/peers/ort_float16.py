"""Convert models with ONNX Runtime's `float16.convert_float_to_float16`: `ort_float16.py SAMPLES OUT_FOLDER MODEL ...`.

It is given paths, as it asks for models above 2 GB; it writes beside them for a moment.
"""

import sys
from pathlib import Path

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16

_, target, *sources = map(Path, sys.argv[1:])
target.mkdir(parents=True)
for source in sources:
    model = convert_float_to_float16(str(source), keep_io_types=True)
    onnx.save(model, target / source.name, save_as_external_data=True, location=f"{source.name}_data")
