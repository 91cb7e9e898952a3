"""Deduplicate the weights of a model as Optimum does: `optimum_dedup.py MODEL OUT_FOLDER`.

Optimum 2.1's `remove_duplicate_weights` raises KeyError on any model with a scalar or an integer vector among its
weights, as every export of today has; its own steps are called here one by one, with those left as they are.
"""

import sys
from pathlib import Path

import onnx
from optimum.onnx import transformations_utils as steps
from optimum.onnx.graph_transformations import check_and_save_model

source, target = Path(sys.argv[1]), Path(sys.argv[2])
target.mkdir(parents=True)
model = onnx.load(source)
names = steps._create_name_sharing_dict(steps._find_duplicate_initializers([model]))
for initializer in model.graph.initializer:
    names.setdefault((initializer.name, 0), initializer.name)
steps._replace_input_names([model], names)
steps._remove_redundant_initializers([model], names)
check_and_save_model(model, target / "model.onnx")
