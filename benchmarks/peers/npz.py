"""The samples of a model, as the benchmark leaves them: a folder for each model, in it a `.npz` for each sample."""

from pathlib import Path

import numpy as np


def samples_of(folder, model):
    """Return the samples of a model, by name."""
    found = {}
    for path in sorted((Path(folder) / Path(model).stem).glob("*.npz")):
        with np.load(path) as arrays:
            found[path.stem] = dict(arrays)
    return found


def largest(samples):
    """Return the sample of one row that is longest, cache and all."""
    rows = [sample for sample in samples.values() if len(next(iter(sample.values()))) == 1]
    return max(rows or samples.values(), key=lambda sample: sum(array.size for array in sample.values()))
