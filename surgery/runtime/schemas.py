"""What ONNX Runtime's Python module says of the operators that it knows."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Operator = tuple[str, str]
"""Domain and name."""


def runtime_schemas() -> Mapping[Operator, Sequence[Any]]:
    """Return the definitions of ONNX Runtime's operators in all versions; none from a build that does not tell."""
    try:
        from onnxruntime.capi.onnxruntime_pybind11_state import get_all_operator_schema
    except ImportError:
        return {}
    found: defaultdict[Operator, list[Any]] = defaultdict(list)
    for schema in get_all_operator_schema():
        found[schema.domain, schema.name].append(schema)
    return dict(found)


def newest(schemas: Iterable[Any], opset: int) -> Any | None:
    """Return the definition that an operator set has of an operator, None if it has come only later."""
    known = (schema for schema in schemas if schema.since_version <= opset)
    return max(known, key=lambda schema: int(schema.since_version), default=None)
