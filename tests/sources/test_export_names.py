"""The names that an export gets: free axes, and names with dots."""

from __future__ import annotations

import onnx_ir as ir
import pytest

from surgery.errors import SurgeryError
from surgery.sources import exporter, names


def draw(text: str) -> ir.Graph:
    import onnx.parser

    return ir.from_proto(onnx.parser.parse_model(f'<ir_version: 8, opset_import: ["": 18]>\n{text}')).graph


AXES = {"input_ids": ("batch_size", "length"), "mask": ("batch_size", "past + length"), "y": ("batch_size", "length")}


def test_symbols_become_the_names_of_the_axes_wherever_they_stand() -> None:
    graph = draw(
        "g (float[s1, s2] input_ids, float[s3, s4] mask) => (float[s1, s2] y) { a = Neg(mask)  y = Neg(input_ids) }"
    )
    neg = graph[0].outputs[0]
    for text, wanted in (
        ("s1", "batch_size"),
        ("s3", "batch_size"),
        ("s4", "past + length"),
        ("2*s2", "2*length"),
        ("s1*s4", "batch_size*(past + length)"),
        ("s4 + s9", None),
        ("u0", None),
    ):
        neg.shape = ir.Shape([text])
        names.name_axes(graph, AXES)
        assert neg.shape[0].value == wanted
        for value, symbols in ((graph.inputs[0], ("s1", "s2")), (graph.inputs[1], ("s3", "s4"))):
            value.shape = ir.Shape(symbols)


def test_one_symbol_for_two_sizes_is_refused() -> None:
    graph = draw("g (float[s1, s1] input_ids, float[s3, s4] mask) => (float[s1, s1] y) { y = Neg(input_ids) }")
    with pytest.raises(SurgeryError, match="takes 'batch_size' and 'length' for one size, at 'input_ids'"):
        names.name_axes(graph, AXES)


def test_an_axis_that_the_exporter_fixed_is_refused() -> None:
    graph = draw("g (float[s1, 1] input_ids, float[s3, s4] mask) => (float[s1, 1] y) { y = Neg(input_ids) }")
    with pytest.raises(SurgeryError, match="'decode' has fixed axis 1 of 'input_ids' to 1"):
        exporter._check_interface(graph, ("input_ids", "mask"), AXES, "decode")


def test_an_input_that_the_exporter_lost_is_refused() -> None:
    graph = draw("g (float[s1, s2] input_ids) => (float[s1, s2] y) { y = Neg(input_ids) }")
    with pytest.raises(SurgeryError, match="'decode' has lost the input 'mask'"):
        exporter._check_interface(graph, ("input_ids", "mask"), AXES, "decode")


def test_names_with_dots_nest_and_flatten_back() -> None:
    flat = {"input_ids": 1, "past_key_values.0.decoder.key": 2, "past_key_values.10.encoder.value": 3}
    nested = names.nest(flat)
    assert nested["past_key_values"] == {"0": {"decoder": {"key": 2}}, "10": {"encoder": {"value": 3}}}
    assert names.flatten(nested) == flat
    assert names.CACHE_PART.sub("", "past_key_values.10.encoder.value") == "past_key_values.encoder"
