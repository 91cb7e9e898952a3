"""The least that a conversion takes: map float32, convert, write float16: `floor.py SAMPLES OUT_FOLDER MODEL ...`."""

import sys
from pathlib import Path

import numpy as np

CHUNK = 1 << 22

_, target, *sources = map(Path, sys.argv[1:])
target.mkdir(parents=True)
for source in sources:
    weights = np.memmap(f"{source}_data", dtype=np.float32, mode="r")
    with (target / f"{source.name}_data").open("wb") as file, np.errstate(over="ignore"):
        for start in range(0, len(weights), CHUNK):
            file.write(weights[start : start + CHUNK].astype(np.float16).data)
