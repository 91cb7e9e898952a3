"""What the installed ONNX Runtime takes, and what of a model it refuses."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import onnx
import onnx.parser
import onnx_ir as ir

from surgery.errors import ModelFileError, SurgeryError
from surgery.report.inspection.counting import Scope
from surgery.report.inspection.found import Finding, Runtime
from surgery.report.inspection.inference import fill_in_types
from surgery.report.inspection.kernels import find_gaps
from surgery.runtime.sessions import open_skeleton, runtime
from surgery.storage import skeleton
from surgery.units import in_bytes

RUNTIME = "ONNX Runtime"
MOST_PROTO_BYTES = (1 << 31) - 1
"""Protobuf parses no longer message: https://protobuf.dev/programming-guides/proto-limits."""

_PLAIN = '<ir_version: {}, opset_import: ["" : {}]> g (float[1] x) => (float[1] y) {{ y = Neg(x) }}'
_SURELY_IR, _SURELY_OPSET = 8, 13
# "/onnxruntime_src/.../model.cc:256 onnxruntime::Model::Model(onnx::ModelProto&&, ...) ", in front of what went wrong.
_SOURCE_PLACE = re.compile(r"/\S+\.(?:cc|h):\d+ [^()]*\([^()]*(?:\([^()]*\)[^()]*)*\)(?: const)? ")


def installed() -> Runtime | None:
    """Return what the installed ONNX Runtime takes, None if there is none.

    No call tells how new an IR version and operator set it knows, so models of one node are tried: 30 ms.
    """
    try:
        onnxruntime = runtime()
    except SurgeryError:
        return None
    opset = _newest(_SURELY_OPSET, lambda version: _takes(_SURELY_IR, version))
    newest_ir = _newest(_SURELY_IR, lambda version: _takes(version, opset))
    return Runtime(onnxruntime.__version__, list(onnxruntime.get_available_providers()), newest_ir, opset)


def _newest(known: int, is_taken: Callable[[int], bool]) -> int:
    while is_taken(known + 1):
        known += 1
    return known


def _takes(ir_version: int, opset: int) -> bool:
    try:
        open_skeleton(onnx.parser.parse_model(_PLAIN.format(ir_version, opset)).SerializeToString(), {})
    except ModelFileError:
        return False
    return True


@dataclass(frozen=True)
class Weightless:
    """A model without its weights, serialised as it is and as a run would write it.

    Args:
        as_is: With the IR version and operator sets that the file declares.
        lowered: With the lowest that say the same.
        weights: What both leave out, by initializer.
        needs_ir_version: The lowest IR version.
        needs_opsets: The lowest operator sets, by domain; ONNX's own is `ai.onnx`.
    """

    as_is: bytes
    lowered: bytes
    weights: Mapping[str, ir.TensorProtocol]
    needs_ir_version: int
    needs_opsets: dict[str, int]


def weightless(model: ir.Model) -> Weightless:
    """Serialise a model without its weights.

    Raises:
        ModelFileError: It cannot be serialised.
    """
    lowered, weights = skeleton(model)
    proto = onnx.ModelProto.FromString(lowered)
    needs_ir, needs_opsets = proto.ir_version, opsets_by_name({one.domain: one.version for one in proto.opset_import})
    proto.ir_version = model.ir_version
    _declare(proto.opset_import, model.opset_imports)
    for function in proto.functions:
        identifier = function.domain, function.name, function.overload
        _declare(function.opset_import, model.functions[identifier].opset_imports)
    return Weightless(proto.SerializeToString(), lowered, weights, needs_ir, needs_opsets)


def _declare(entries: Sequence[onnx.OperatorSetIdProto], versions: Mapping[str, int]) -> None:
    for entry in entries:
        entry.version = versions.get(entry.domain, entry.version)


def opsets_by_name(imports: Mapping[str, int]) -> dict[str, int]:
    """Return operator sets with ONNX's own under its long name."""
    return {domain or "ai.onnx": version for domain, version in imports.items()}


def refusals(
    model: ir.Model, file: Path, scopes: Sequence[Scope], content: Weightless, runtime: Runtime
) -> list[Finding]:
    """Return what ONNX Runtime refuses of a model, its weights aside.

    A session over the model without weights decides; why it refuses is then looked up in the runtime's registry.
    """
    found = [*_too_large(file), *_too_new(model, content, runtime)]
    is_declared_fine = not any(finding.where == _VERSIONS for finding in found)
    error: str | None = ""
    if is_declared_fine or _is_known(content.needs_ir_version, content.needs_opsets, runtime):
        error = _try(content.as_is if is_declared_fine else content.lowered, content.weights)
    if error is None:
        return found
    return [*found, *_explained(model, scopes, runtime, error)]


_VERSIONS = "versions"


def _too_large(file: Path) -> list[Finding]:
    size = file.stat().st_size
    if size <= MOST_PROTO_BYTES:
        return []
    what = f"takes {in_bytes(size)}, and protobuf reads no more than 2 GiB at once"
    return [Finding(RUNTIME, file.name, what, "save it with external data: output.layout optimum or shared")]


def _too_new(model: ir.Model, content: Weightless, runtime: Runtime) -> list[Finding]:
    found = []
    if model.ir_version > runtime.max_ir_version:
        what = f"declares IR version {model.ir_version}; {RUNTIME} {runtime.version} takes {runtime.max_ir_version}"
        found.append(
            Finding(RUNTIME, _VERSIONS, what, _lower("IR version", content.needs_ir_version, runtime.max_ir_version))
        )
    opset, needed = model.opset_imports.get(""), content.needs_opsets.get("ai.onnx", 0)
    if opset is not None and opset > runtime.max_opset:
        what = f"declares opset {opset}; {RUNTIME} {runtime.version} takes {runtime.max_opset}"
        found.append(Finding(RUNTIME, _VERSIONS, what, _lower("opset", needed, runtime.max_opset)))
    return found


def _is_known(ir_version: int, opsets: Mapping[str, int], runtime: Runtime) -> bool:
    return ir_version <= runtime.max_ir_version and opsets.get("ai.onnx", 0) <= runtime.max_opset


def _lower(what: str, needed: int, most: int) -> str:
    if needed <= most:
        return f"any run writes {what} {needed}, which says the same here"
    return f"export for {what} {most} or older: something in it is newer"


def _try(content: bytes, weights: Mapping[str, ir.TensorProtocol]) -> str | None:
    """Return why no session opens, None if one does."""
    try:
        open_skeleton(content, weights)
    except ModelFileError as error:
        text = str(error.__cause__ or error.message).partition("\n")[0]
        text = re.sub(r"^\[ONNXRuntimeError\] : \d+ : \w+ : (This is an invalid model\. )?", "", text)
        return _SOURCE_PLACE.sub("", text).strip()
    return None


def _explained(model: ir.Model, scopes: Sequence[Scope], runtime: Runtime, error: str) -> list[Finding]:
    """Return every operator that the runtime has nothing for, and its own words where they are about something else."""
    fill_in_types(model)
    gaps = find_gaps(model, scopes, runtime.providers)
    found = [
        Finding(RUNTIME, _operator(gap.domain, gap.name, gap.opset), gap.what, gap.way_out, len(nodes))
        for gap, nodes in sorted(gaps.items(), key=lambda item: -len(item[1]))
    ]
    is_named = not error or any(re.search(rf"\b{re.escape(gap.name)}\b", error) for gap in gaps)
    return found if is_named else [Finding(RUNTIME, "graph", error), *found]


def _operator(domain: str, name: str, opset: int) -> str:
    return f"{domain}.{name}, version {opset}" if domain else f"{name}, opset {opset}"
