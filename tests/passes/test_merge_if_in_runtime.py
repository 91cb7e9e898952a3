"""What ONNX Runtime makes of merged models at each of its optimization levels, with every constant captured.

Optimum keeps scalars and integer vectors in the branches "because ONNX Runtime breaks after optimization". Here they
are all captured (`min_bytes=1`), to know whether it still does.
"""

from __future__ import annotations

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime
import pytest
from merging import branches
from rewriting import as_model, sample_feeds

from passes.merge_if import MergeIf
from surgery.contract import Bundle, Context
from surgery.runtime.sessions import open_session
from surgery.storage import save_model

LEVELS = ("ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL")
SQUARE = ", ".join(str((number * 7 % 13) / 8 - 0.7) for number in range(64))
BYTES = ", ".join(map(str, range(64)))
EIGHT = "{1, 2, 3, 4, 5, 6, 7, 8}"
OPSETS = '<ir_version: 10, opset_import: ["" : 21, "com.microsoft" : 1]>'

# name: inputs, outputs, constants, nodes
CASES = {
    "shape of Reshape": ("float[n, 8] x", "float[a, b] y", "int64[2] s = {4, -1}", "y = Reshape(x, s)"),
    "bounds and axes of Slice": (
        "float[n, 8] x",
        "float[n, 4] y",
        "int64[1] s = {1}, int64[1] e = {5}, int64[1] a = {1}",
        "y = Slice(x, s, e, a)",
    ),
    "shape of Expand": ("float[n, 8] x", "float[a, b, c] y", "int64[3] s = {2, 1, 8}", "y = Expand(x, s)"),
    "scalars of Clip": ("float[n, 8] x", "float[n, 8] y", "float l = {-0.5}, float h = {0.5}", "y = Clip(x, l, h)"),
    "scalars of Range": (
        "float[n, 8] x",
        "int64[k] y",
        "int64 a = {1}, int64 b = {9}, int64 c = {2}",
        "y = Range(a, b, c)",
    ),
    "k of TopK": ("float[n, 8] x", "float[n, 3] y", "int64[1] k = {3}", "y, i = TopK(x, k)"),
    "pads and value of Pad": (
        "float[n, 8] x",
        "float[a, b] y",
        "int64[4] p = {0, 1, 0, 1}, float v = {3.0}",
        "y = Pad(x, p, v)",
    ),
    "axes of Unsqueeze and Squeeze": (
        "float[n, 8] x",
        "float[n, 8] y",
        "int64[1] a = {1}",
        "u = Unsqueeze(x, a) v = Neg(u) y = Squeeze(v, a)",
    ),
    "axes of ReduceSum": ("float[n, 8] x", "float[n] y", "int64[1] a = {1}", "y = ReduceSum <keepdims = 0> (x, a)"),
    "repeats of Tile": ("float[n, 8] x", "float[a, b] y", "int64[2] r = {1, 2}", "y = Tile(x, r)"),
    "sizes of Split": (
        "float[n, 8] x",
        "float[n, 3] y, float[n, 5] z",
        "int64[2] r = {3, 5}",
        "y, z = Split <axis = 1> (x, r)",
    ),
    "index of Gather": ("float[n, 8] x", "float[n] y", "int64 i = {2}", "y = Gather <axis = 1> (x, i)"),
    "shape of ConstantOfShape": ("float[n, 8] x", "float[2, 3] y", "int64[2] s = {2, 3}", "y = ConstantOfShape(s)"),
    "axis of CumSum": ("float[n, 8] x", "float[n, 8] y", "int64 a = {1}", "y = CumSum(x, a)"),
    "depth and values of OneHot": (
        "int64[n] x",
        "float[n, 4] y",
        "int64 d = {4}, float[2] v = {0.0, 1.0}",
        "y = OneHot(x, d, v)",
    ),
    "scales of Resize": (
        "float[n, 1, 4, 4] x",
        "float[n, 1, 8, 8] y",
        "float[4] s = {1.0, 1.0, 2.0, 2.0}",
        "y = Resize(x, , s)",
    ),
    "Loop's count and condition": (
        "float[n, 8] x",
        "float[n, 8] y",
        "int64 t = {3}, bool c = {1}",
        "y = Loop(t, c, x) <body = b (int64 i, bool g, float[n, 8] v) => (bool g2, float[n, 8] w) "
        "{ g2 = Identity(g) w = Add(v, v) }>",
    ),
    "a shape that is computed": (
        "float[n, 8] x",
        "float[a, b] y",
        "int64[1] i = {0}, int64[1] m = {-1}, int64[1] four = {4}",
        "s = Shape(x) d = Gather(s, i) e = Mul(d, four) t = Concat <axis = 0> (e, m) y = Reshape(x, t)",
    ),
    "transposes that are moved": (
        "float[n, 2, 4] x",
        "float[a, b] y",
        "int64[2] s = {-1, 8}, int64[1] a = {2}, float k = {2.0}",
        "t = Transpose <perm = [0, 2, 1]> (x) u = Unsqueeze(t, a) m = Mul(u, k) q = Squeeze(m, a) "
        "w = Transpose <perm = [0, 2, 1]> (q) y = Reshape(w, s)",
    ),
    "arithmetic that changes nothing": (
        "float[n, 8] x",
        "float[n, 8] y",
        "float z = {0.0}, float o = {1.0}",
        "a = Add(x, z) b = Mul(a, o) y = Sub(b, z)",
    ),
    "Gelu": (
        "float[n, 8] x",
        "float[n, 8] y",
        "float s = {1.41421354}, float o = {1.0}, float h = {0.5}",
        "d = Div(x, s) e = Erf(d) a = Add(e, o) m = Mul(x, a) y = Mul(m, h)",
    ),
    "LayerNormalization": (
        "float[n, 8] x",
        "float[n, 8] y",
        f"float p = {{2.0}}, float e = {{0.00001}}, float[8] g = {EIGHT}, float[8] b = {EIGHT}, int64[1] a = {{-1}}",
        "m = ReduceMean(x, a) d = Sub(x, m) q = Pow(d, p) v = ReduceMean(q, a) w = Add(v, e) s = Sqrt(w) "
        "r = Div(d, s) t = Mul(r, g) y = Add(t, b)",
    ),
    "MatMul, bias and scale": (
        "float[n, 8] x",
        "float[n, 8] y",
        f"float[8, 8] w = {{{SQUARE}}}, float[8] b = {EIGHT}, float k = {{0.125}}",
        "t = Transpose <perm = [1, 0]> (w) m = MatMul(x, t) a = Add(m, b) y = Mul(a, k)",
    ),
    "MatMulInteger": (
        "float[n, 8] x",
        "float[n, 8] y",
        f"uint8[8, 8] w = {{{BYTES}}}, uint8 z = {{3}}, float s = {{0.1}}",
        "q, qs, qz = DynamicQuantizeLinear(x) m = MatMulInteger(q, w, qz, z) f = Cast <to = 1> (m) k = Mul(qs, s) "
        "y = Mul(f, k)",
    ),
    "MatMulNBits": (
        "float[n, 32] x",
        "float[n, 2] y",
        f"uint8[2, 1, 16] w = {{{', '.join(map(str, range(32)))}}}, float[2] s = {{0.1, 0.2}}",
        "y = com.microsoft.MatMulNBits <K = 32, N = 2, bits = 4, block_size = 32> (x, w, s)",
    ),
    "MatMul of a quantized weight": (
        "float[n, 8] x",
        "float[n, 8] y",
        f"int8[8, 8] w = {{{BYTES}}}, float s = {{0.1}}, int8 z = {{0}}",
        "f = DequantizeLinear(w, s, z) y = MatMul(x, f)",
    ),
    "MatMul between quantized activations": (
        "float[n, 8] x",
        "float[n, 8] y",
        f"int8[8, 8] w = {{{BYTES}}}, float s = {{0.1}}, int8 z = {{0}}, uint8 u = {{3}}",
        "q = QuantizeLinear(x, s, u) d = DequantizeLinear(q, s, u) f = DequantizeLinear(w, s, z) m = MatMul(d, f) "
        "o = QuantizeLinear(m, s, u) y = DequantizeLinear(o, s, u)",
    ),
}


def session(content: bytes, level: str) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = getattr(onnxruntime.GraphOptimizationLevel, level)
    options.log_severity_level = 4
    options.intra_op_num_threads = 1
    return onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])


def pair(case: str) -> dict[str, ir.Model]:
    inputs, outputs, constants, nodes = CASES[case]
    body = f"({inputs}) => ({outputs}) <{constants}> {{ {nodes} }}"
    return {role: as_model(f"{OPSETS} {role} {body}") for role in ("decode", "prefill")}


@pytest.mark.parametrize("case", CASES)
def test_captured_constants_do_no_harm_at_any_level(case: str):
    models = pair(case)
    bundle = Bundle(models).clone()
    MergeIf(min_bytes=1).apply(bundle, lambda role: Context(role=role))
    merged, own = (ir.to_proto(model).SerializeToString() for model in (bundle["decoder"], models["decode"]))
    for level in LEVELS:
        alone, joined = session(own, level), session(merged, level)
        for feeds in sample_feeds(models["decode"]):
            for flag in (True, False):
                expected = alone.run(None, feeds)
                given = joined.run([value.name for value in alone.get_outputs()], {**feeds, "use_cache_branch": [flag]})
                for one, other in zip(expected, given, strict=True):
                    np.testing.assert_array_equal(one, other, err_msg=f"{case}, {level}")


@pytest.mark.parametrize("captured", ["w", "s"])
def test_the_witness_a_captured_weight_or_scale_of_a_quantized_product_does_not_load(captured: str):
    """ONNX Runtime 1.31; once this test fails, `merge_if` may put quantized weights where both branches see them."""
    model = pair("MatMul of a quantized weight")["decode"]
    bundle = Bundle({"decode": model, "prefill": model.clone()})
    MergeIf(min_bytes=1).apply(bundle, lambda role: Context(role=role))
    merged = bundle["decoder"]
    assert all(list(branch.initializers) == ["w", "s", "z"] for branch in branches(merged).values())
    proto = ir.to_proto(merged)
    session(proto.SerializeToString(), "ORT_ENABLE_ALL")
    for attribute in proto.graph.node[0].attribute:
        kept = [one for one in attribute.g.initializer if one.name != captured]
        moved = [one for one in attribute.g.initializer if one.name == captured]
        del attribute.g.initializer[:]
        attribute.g.initializer.extend(kept)
    proto.graph.initializer.extend(moved)
    onnx.checker.check_model(proto, full_check=True)
    for level in LEVELS[:2]:
        session(proto.SerializeToString(), level)
    for level in LEVELS[2:]:
        with pytest.raises(Exception, match="TransposeDQWeightsForMatMulNBits Missing required (weight|scale)"):
            session(proto.SerializeToString(), level)


def test_quantized_weights_of_both_branches_are_in_the_data_file_once(tmp_path):
    text = """
    {name} (float[n, 64] x) => (float[n, 64] y) <int8[64, 64] w = {{{bytes}}}, float s = {{0.1}}, int8 z = {{0}}> {{
        f = DequantizeLinear(w, s, z)
        p = MatMul(x, f)
        y = {op}(p)
    }}
    """
    content = ", ".join(str(number % 100) for number in range(4096))
    models = [
        as_model(text.format(name=name, bytes=content, op=op)) for name, op in (("decode", "Neg"), ("prefill", "Abs"))
    ]
    bundle = Bundle(dict(zip(("decode", "prefill"), models, strict=True)))
    MergeIf().apply(bundle, lambda role: Context(role=role))
    save_model(bundle["decoder"], tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx_data").stat().st_size == 4096
    feeds = {"x": np.ones((2, 64), np.float32), "use_cache_branch": np.array([True])}
    saved = onnxruntime.InferenceSession(tmp_path / "m.onnx", providers=["CPUExecutionProvider"]).run(None, feeds)[0]
    for optimize in (False, True):
        given = open_session(bundle["decoder"], optimize=optimize).run(None, feeds)[0]
        np.testing.assert_allclose(given, saved, rtol=1e-3)


@pytest.mark.parametrize(("min_bytes", "is_known"), [(1, False), (128, True)])
def test_the_witness_onnx_infers_no_shape_from_a_captured_constant(min_bytes: int, is_known: bool):
    """onnx 1.23: why small constants stay in their branches; ONNX Runtime itself looks outside."""
    bundle = Bundle(pair("shape of Expand"))
    MergeIf(min_bytes=min_bytes).apply(bundle, lambda role: Context(role=role))
    proto = ir.to_proto(bundle["decoder"])
    for attribute in proto.graph.node[0].attribute:
        attribute.g.output[0].type.tensor_type.ClearField("shape")
    inferred = onnx.shape_inference.infer_shapes(proto, strict_mode=True, data_prop=True)
    shapes = [attribute.g.output[0].type.tensor_type.shape for attribute in inferred.graph.node[0].attribute]
    assert [len(shape.dim) == 3 and shape.dim[0].dim_value == 2 for shape in shapes] == [is_known, is_known]
