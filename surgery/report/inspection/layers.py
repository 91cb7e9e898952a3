"""Which layer a weight belongs to, by its name, or by the names of the nodes that read it."""

from __future__ import annotations

import re
from collections.abc import Iterator

import onnx_ir as ir

from surgery.sources.names import module_of as torch_module_of

CONSTANTS = "(small constants)"
FEW_ELEMENTS = 16

# What exporters call a weight that has no name of its own: `onnx::MatMul_123`, `val_12`, `/Constant_3_output_0`.
_MADE_UP = re.compile(r"(.*::)?\w*?_?\d+|\w*constant\w*|c?_?lifted\w*", re.IGNORECASE)
_MERGED = re.compile(r"_merged_\d+$")
_NUMBERED = re.compile(r"\d+|(layers?|blocks?|h|resblocks)_\d+", re.IGNORECASE)
_LEAVES = frozenset(("weight", "bias", "transposed", "plus_one", "kernel", "gamma", "beta", "scale", "zero_point"))
_MOST_STEPS = 3


def layer_of(value: ir.Value, tensor: ir.TensorProtocol) -> str:
    """Return the layer of a weight: `transformer.h.3`, or the module for what is in none: `transformer.wte`.

    A name that an exporter made up says nothing; then the names of the nodes that read the weight do, which carry the
    path of a module: `/transformer/h.3/attn/c_attn/MatMul`.
    """
    if is_small_constant(tensor):
        return CONSTANTS
    name = _MERGED.sub("", value.name or "")
    if not _MADE_UP.fullmatch(name.strip("/").rpartition("/")[2]):
        return layer_of_path(name)
    path = next(_paths_of_readers(value), "")
    if path:
        return layer_of_path(path)
    return layer_of_path(name) if _has_path(name) else re.sub(r"\d+$", "*", name) or "(unnamed)"


def layer_of_path(path: str) -> str:
    """Return a path up to its first number, or without its last part if that is `weight`, `bias` and the like."""
    parts = [part for part in re.split(r"[./]", path) if part]
    for index, part in enumerate(parts):
        if _NUMBERED.fullmatch(part) and index:
            return ".".join(parts[: index + 1])
    while len(parts) > 1 and parts[-1] in _LEAVES:
        parts.pop()
    return ".".join(parts)


def is_small_constant(tensor: ir.TensorProtocol) -> bool:
    """Tell a number that steers the graph (an axis, a shape, an epsilon) from a weight of the network."""
    return tensor.size <= 1 or (not tensor.dtype.is_floating_point() and tensor.size <= FEW_ELEMENTS)


def _paths_of_readers(value: ir.Value) -> Iterator[str]:
    """Yield the module paths of the nodes that read a value, of those next to it first."""
    reached = [value]
    for _ in range(_MOST_STEPS):
        readers = [node for one in reached for node, _ in one.uses()]
        yield from filter(None, map(module_of, readers))
        reached = [output for node in readers for output in node.outputs]


def module_of(node: ir.Node) -> str:
    """Return the path of the module that a node comes from, empty if nothing says so.

    By its name (`/layers.0/mlp/MatMul`, `layers.0.mlp/MatMul`), or by the note that torch.onnx leaves in its metadata.
    """
    if _has_path(node.name or ""):
        return (node.name or "").strip("/").rpartition("/")[0] if "/" in (node.name or "") else node.name or ""
    return torch_module_of(node)


def _has_path(name: str) -> bool:
    return "/" in name.strip("/") or "." in name
