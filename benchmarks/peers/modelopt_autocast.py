"""Convert models with NVIDIA ModelOpt AutoCast: `modelopt_autocast.py SAMPLES OUT_FOLDER MODEL ...`.

What its command line does, with its defaults; it is given the samples that the audit measures on.
"""

import sys
from pathlib import Path

import modelopt.onnx.utils
from modelopt.onnx.autocast import convert_to_mixed_precision

samples, target, *sources = map(Path, sys.argv[1:])
target.mkdir(parents=True)
for source in sources:
    model = convert_to_mixed_precision(
        str(source), keep_io_types=True, calibration_data=str(samples / source.stem), providers=["cpu"]
    )
    modelopt.onnx.utils.save_onnx(model, str(target / source.name), save_as_external_data=True)
