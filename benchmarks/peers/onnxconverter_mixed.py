"""Convert with onnxconverter-common's auto mixed precision: `onnxconverter_mixed.py SAMPLES OUT_FOLDER MODEL ...`.

It keeps nodes in float32 until what it runs is within tolerances, here those of its own documentation. It takes one
sample: the largest.
"""

import sys
from pathlib import Path

from npz import largest, samples_of
from onnxconverter_common.auto_mixed_precision_model_path import auto_convert_mixed_precision_model_path

samples, target, *sources = map(Path, sys.argv[1:])
target.mkdir(parents=True)
for source in sources:
    feeds = largest(samples_of(samples, source))
    try:
        auto_convert_mixed_precision_model_path(
            str(source),
            feeds,
            str(target / source.name),
            ["CPUExecutionProvider"],
            location=f"{source.name}_data",
            rtol=0.01,
            atol=0.001,
            keep_io_types=True,
        )
    except ValueError as error:  # it goes on with all its arguments
        sys.exit(f"{source.name}: {str(error).partition(' Given parameters')[0]}")
