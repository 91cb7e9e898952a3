"""Deduplicate the weights of a model as Optimum does: `optimum_dedup.py MODEL OUT_FOLDER`."""

import sys
from pathlib import Path

import onnx
from optimum.onnx.graph_transformations import check_and_save_model, remove_duplicate_weights

source, target = Path(sys.argv[1]), Path(sys.argv[2])
target.mkdir(parents=True)
model = onnx.load(source)
remove_duplicate_weights(model, inplace=True)
check_and_save_model(model, target / "model.onnx")
