"""Modules that load at the first look: absent until then, and whole from then on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
START = """
import sys
from surgery.late_imports import import_late
import_late()
import onnx_ir as ir
is_loaded = lambda: "sympy.core" in sys.modules
"""


def said(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", START + code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_sizes_with_names_are_read_compared_and_written_without_sympy() -> None:
    assert (
        said("""
shape = ir.Shape(["batch", 3, None])
value = ir.Value(name="x", shape=shape, type=ir.TensorType(ir.DataType.FLOAT))
proto = ir.serde.serialize_value(value)
assert ir.serde.deserialize_value_info_proto(proto, None).shape == shape
assert shape[0] == "batch" and shape[0] != "rows"
print(is_loaded())
""")
        == "False"
    )


def test_a_calculation_with_a_size_loads_sympy_and_is_right() -> None:
    assert (
        said("""
print(ir.SymbolicDim("past") + 1, (ir.SymbolicDim("a") * 2).evaluate({"a": 4}), is_loaded())
""")
        == "past + 1 8 True"
    )


def test_sympy_is_itself_for_whoever_imports_it() -> None:
    assert (
        said("""
import sympy
from sympy import Symbol
import sympy.core.numbers
print(type(sympy).__name__, sympy.Symbol is Symbol, Symbol("x") + 1 - Symbol("x"))
""")
        == "module True 1"
    )


def test_a_command_that_checks_nothing_loads_neither_sympy_nor_a_runtime(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"source: {ROOT}/tests/sources/foreign/t5_all\nsteps: [dedup_weights]\noutput: {tmp_path}/out\n")
    code = f"""
import atexit
atexit.register(lambda: print("LOADED", is_loaded(), "onnxruntime" in sys.modules))
sys.argv = ["surgery", "run", {str(recipe)!r}, "--no-check"]
from surgery.__main__ import main
main()
"""
    assert said(code).splitlines()[-1] == "LOADED False False"
    assert (tmp_path / "out" / "encoder_model.onnx").is_file()
