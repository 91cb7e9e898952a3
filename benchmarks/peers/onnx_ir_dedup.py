"""Deduplicate the weights of a model with onnx_ir's own pass: `onnx_ir_dedup.py MODEL OUT_FOLDER`."""

import sys
from pathlib import Path

import onnx_ir as ir
from onnx_ir.passes.common import DeduplicateHashedInitializersPass

source, target = Path(sys.argv[1]), Path(sys.argv[2])
target.mkdir(parents=True)
model = ir.load(source)
DeduplicateHashedInitializersPass(size_limit=1 << 40)(model)
ir.save(model, target / "model.onnx", external_data="model.onnx_data")
