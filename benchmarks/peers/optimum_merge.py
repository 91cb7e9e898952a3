"""Merge two decoders as Optimum does: `optimum_merge.py PREFILL DECODE OUT_FOLDER`.

Optimum 2.1 saves without external data whatever its inputs had, and does not call weights equal that are `Constant`
nodes. `strict=False` is what its exporter says for encoder-decoders, whose decode gives no encoder keys and values.
"""

import sys
from pathlib import Path

from optimum.onnx.graph_transformations import merge_decoders

prefill, decode, target = map(Path, sys.argv[1:])
target.mkdir(parents=True)
merge_decoders(prefill, decode, save_path=target / "decoder_model_merged.onnx", strict=False)
