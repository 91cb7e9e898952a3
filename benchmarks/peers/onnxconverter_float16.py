"""Convert models with onnxconverter-common: `onnxconverter_float16.py SAMPLES OUT_FOLDER MODEL ...`.

`convert_float_to_float16_model_path` is its function for paths, without a limit of 2 GB.
"""

import sys
from pathlib import Path

import onnx
from onnxconverter_common.float16 import convert_float_to_float16_model_path

_, target, *sources = map(Path, sys.argv[1:])
target.mkdir(parents=True)
for source in sources:
    model = convert_float_to_float16_model_path(str(source), keep_io_types=True)
    onnx.save(model, target / source.name, save_as_external_data=True, location=f"{source.name}_data")
