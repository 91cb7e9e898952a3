"""Inspection: what a model is and holds, found without reading its weights."""

from surgery.report.inspection.found import Inspection
from surgery.report.inspection.page import print_inspection
from surgery.report.inspection.survey import inspect_paths

__all__ = ["Inspection", "inspect_paths", "print_inspection"]
