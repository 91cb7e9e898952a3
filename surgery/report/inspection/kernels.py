"""Which operators of a model the installed ONNX Runtime has no kernel for, by its own registry."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import onnx_ir as ir
from onnx.defs import SchemaError, get_schema

from surgery.report.inspection.counting import Scope, type_name
from surgery.runtime.schemas import Operator, newest, runtime_schemas

CPU = "CPUExecutionProvider"
_OPEN_END = (1 << 31) - 1
# The CPU provider computes in float32 what it has no float16 kernel for.
_WIDENED = {"tensor(float16)": "tensor(float)"}


@dataclass(frozen=True)
class Gap:
    """Nodes that nothing can run.

    Args:
        domain: The domain of the operator.
        name: The operator.
        opset: The version of the domain that the model asks for.
        what: What is missing.
        way_out: What can be done.
    """

    domain: str
    name: str
    opset: int
    what: str
    way_out: str


def find_gaps(model: ir.Model, scopes: Sequence[Scope], providers: Sequence[str]) -> dict[Gap, list[ir.Node]]:
    """Return the nodes that ONNX Runtime has no operator or no kernel for, by what is missing.

    Kernels are matched as `onnxruntime/core/framework/kernel_registry.cc` does (`KernelRegistry::VerifyKernelDef`).
    Types that are not known fit; so do operators that the runtime can expand into others.
    """
    registry = _Registry.read()
    if registry is None:
        return {}
    own = {(function.domain, function.name) for function in model.functions.values()}
    gaps: defaultdict[Gap, list[ir.Node]] = defaultdict(list)
    for scope in scopes:
        for node in scope.graph:
            opset = _opset_of(node, model)
            if (node.domain, node.op_type) in own or opset is None:
                continue
            gap = registry.gap(node, opset, providers)
            if gap is not None:
                gaps[gap].append(node)
    return dict(gaps)


def _opset_of(node: ir.Node, model: ir.Model) -> int | None:
    return node.version or model.opset_imports.get(node.domain)


class _Registry:
    """What ONNX Runtime's Python module says of its operators and kernels."""

    def __init__(self, schemas: Mapping[Operator, Sequence[Any]], kernels: Sequence[Any]) -> None:
        self.schemas = schemas
        self.kernels: defaultdict[Operator, list[Any]] = defaultdict(list)
        for kernel in kernels:
            self.kernels[kernel.domain, kernel.op_name].append(kernel)
        self.domains = {domain for domain, _ in self.schemas}

    @classmethod
    def read(cls) -> _Registry | None:
        """Return the registry, None from a build that does not tell."""
        try:
            from onnxruntime.capi.onnxruntime_pybind11_state import get_all_opkernel_def
        except ImportError:
            return None
        schemas = runtime_schemas()
        return cls(schemas, get_all_opkernel_def()) if schemas else None

    def gap(self, node: ir.Node, opset: int, providers: Sequence[str]) -> Gap | None:
        """Return what is missing for a node, None if nothing is."""
        key = node.domain, node.op_type
        schema = newest(self.schemas.get(key, ()), opset)
        if schema is None:
            return Gap(*key, opset, *self._unknown(key))
        here = [kernel for kernel in self.kernels[key] if kernel.provider == CPU]
        types = dict(_types_by_parameter(node, schema))
        fitting = [kernel for kernel in here if _fits_version(kernel, schema.since_version)]
        if any(_fits_types(kernel, types) for kernel in fitting) or _has_body(key, schema.since_version):
            return None
        elsewhere = sorted(
            {
                kernel.provider
                for kernel in self.kernels[key]
                if kernel.provider != CPU
                and kernel.provider in providers
                and _fits_version(kernel, schema.since_version)
                and _fits_types(kernel, types)
            }
        )
        also = f"; {', '.join(elsewhere)} has one" if elsewhere else ""
        if not fitting:
            return Gap(*key, opset, f"{_no_kernel_of_version(here, schema)}{also}", _older(schema))
        given = ", ".join(sorted({name for names in types.values() for name in names}))
        return Gap(
            *key, opset, f"no kernel on the CPU for {_plain(given)}{also}", "cast around it, or export in float32"
        )

    def _unknown(self, key: Operator) -> tuple[str, str]:
        domain, _ = key
        if domain not in self.domains:
            return (
                "no operators of this domain are built in",
                "SessionOptions.register_custom_ops_library with the library that has them",
            )
        newer = [one.since_version for one in self.schemas.get(key, ())]
        if newer:
            return f"comes only with opset {min(newer)}", "declare a newer operator set"
        return (
            "there is no such operator in this ONNX Runtime",
            "another version of ONNX Runtime, or of the operator set",
        )


def _no_kernel_of_version(kernels: Sequence[Any], schema: Any) -> str:
    if not kernels:
        return "no kernel on the CPU"
    newest = max(kernel.version_range[0] for kernel in kernels)
    return f"no kernel on the CPU for its definition of opset {schema.since_version}, only for that of opset {newest}"


def _older(schema: Any) -> str:
    return f"export for opset {schema.since_version - 1} or older" if schema.since_version > 1 else ""


def _fits_version(kernel: Any, since: int) -> bool:
    start, end = kernel.version_range
    return bool(start == since or (start < since <= end and end != _OPEN_END))


def _fits_types(kernel: Any, types: Mapping[str, set[str]]) -> bool:
    return all(
        name in allowed or _WIDENED.get(name) in allowed
        for parameter, allowed in kernel.type_constraints.items()
        for name in types.get(parameter, ())
    )


def _types_by_parameter(node: ir.Node, schema: Any) -> Iterator[tuple[str, set[str]]]:
    """Yield the types that a node's values have, by the schema's type parameters and by its names for them."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    for values, formal in ((node.inputs, schema.inputs or ()), (node.outputs, schema.outputs or ())):
        for index, value in enumerate(values):
            if value is None or not formal or not isinstance(value.type, ir.TensorType):
                continue
            parameter = formal[min(index, len(formal) - 1)]
            found[parameter.typeStr].add(f"tensor({type_name(value)})")
            found[parameter.name].add(f"tensor({type_name(value)})")
    yield from found.items()


def _has_body(key: Operator, since: int) -> bool:
    """Tell whether the operator is made of others, which the runtime then runs instead."""
    try:
        schema = get_schema(key[1], since, key[0])
    except SchemaError:
        return False
    return bool(schema.has_function or schema.has_context_dependent_function)


def _plain(types: str) -> str:
    return types.replace("tensor(", "").replace(")", "")
