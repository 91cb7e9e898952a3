"""Cutting weights out of the wire format, and putting them back."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper
from small_models import chain, everywhere, matrix, with_initializer

from surgery.errors import ModelFileError
from surgery.storage.region import memory_of
from surgery.storage.wire import MARKER, inline, lift, size_of


def lifted(proto: onnx.ModelProto, **options: int) -> tuple[onnx.ModelProto, list[bytes]]:
    content = proto.SerializeToString()
    slim, payloads = lift(memoryview(content), path="m.onnx", **options)
    cut = [content[payload.offset : payload.offset + payload.length] for payload in payloads]
    return onnx.ModelProto.FromString(slim), cut


def all_bytes(chunks: list) -> bytes:
    return b"".join(chunk if isinstance(chunk, (bytes, memoryview)) else memory_of(chunk) for chunk in chunks)


def test_every_big_tensor_is_lifted_wherever_it_is():
    model = everywhere()
    slim, cut = lifted(model.proto)
    assert sorted(cut) == sorted(weight.tobytes() for weight in model.matrices.values())
    assert slim.ByteSize() < 4096
    reference = {entry.key: entry.value for entry in slim.graph.initializer[0].external_data}
    assert reference["location"] == MARKER
    assert reference["length"] == "4096"


def test_what_is_small_stays_where_it_is():
    slim, cut = lifted(everywhere().proto, min_bytes=4097)
    assert cut == []
    assert slim == everywhere().proto


def test_names_metadata_and_shapes_of_lifted_tensors_stay():
    tensor = lifted(everywhere().proto)[0].graph.initializer[0]
    assert (tensor.name, list(tensor.dims), tensor.metadata_props[0].value) == ("main", [32, 32], "yes")


@pytest.mark.parametrize(
    ("field", "dtype", "numpy_type"),
    [("float_data", TensorProto.FLOAT, np.float32), ("double_data", TensorProto.DOUBLE, np.float64)],
)
def test_packed_floats_are_lifted_as_if_they_were_raw(field, dtype, numpy_type):
    values = np.arange(500, dtype=numpy_type)
    tensor = TensorProto(name="w", data_type=dtype, dims=[500])
    getattr(tensor, field).extend(values.tolist())
    assert lifted(with_initializer(tensor))[1] == [values.tobytes()]


def test_varint_packed_integers_are_not_lifted():
    tensor = helper.make_tensor("w", TensorProto.INT64, [1000], list(range(1000)))
    assert lifted(with_initializer(tensor))[1] == []


def test_strings_are_not_lifted():
    tensor = helper.make_tensor("w", TensorProto.STRING, [1000], [b"abcdef"] * 1000)
    assert lifted(with_initializer(tensor))[1] == []


def test_a_tensor_that_has_its_bytes_twice_is_not_lifted():
    tensor = numpy_helper.from_array(matrix(0), "w")
    tensor.float_data.extend([1.0] * 1000)
    assert lifted(with_initializer(tensor))[1] == []


def test_two_graphs_in_one_file_merge_as_protobuf_merges_them():
    one, two = chain(matrix(0)), chain(matrix(1))
    two.graph.initializer[0].name = "other"
    content = one.SerializeToString() + two.SerializeToString()
    slim, payloads = lift(memoryview(content), path="m.onnx")
    merged = onnx.ModelProto.FromString(slim)
    assert [tensor.name for tensor in merged.graph.initializer] == ["w0", "other"]
    assert [content[p.offset : p.offset + p.length] for p in payloads] == [matrix(0).tobytes(), matrix(1).tobytes()]


def test_what_was_lifted_can_be_put_back():
    proto = everywhere().proto
    content = proto.SerializeToString()
    slim, payloads = lift(memoryview(content), path="m.onnx")
    import onnx_ir as ir

    tensors = {p.offset: ir.tensor(np.frombuffer(content, np.uint8, p.length, p.offset)) for p in payloads}
    chunks = inline(slim, tensors.__getitem__)
    assert size_of(chunks) == len(all_bytes(chunks))
    assert onnx.ModelProto.FromString(all_bytes(chunks)) == proto


def test_putting_back_nothing_changes_nothing():
    content = everywhere().proto.SerializeToString()
    assert inline(content, lambda index: pytest.fail("nothing to fill")) == [content]


@pytest.mark.parametrize("size", [1, 7, 100, 3000, 9000])
def test_a_file_that_stops_early_is_refused_with_the_byte(size):
    content = everywhere().proto.SerializeToString()[:size]
    if size == 7:
        content = content[:-1] + b"\xff"
    try:
        onnx.ModelProto.FromString(content)
    except Exception:
        with pytest.raises(ModelFileError, match=r"m\.onnx: is not an ONNX model, or only a part of one: byte [\d,]+"):
            lift(memoryview(content), path="m.onnx")


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"\x3a\xff\xff\xff\xff\x0f", "beyond its message's end"),
        (b"\x08" + b"\xff" * 11, "more than 64 bits"),
        (b"\x08\xff", "in the middle of a number"),
        (b"\x0b\x01", "wire type 3"),
        (b"\x0e\x01", "wire type 6"),
        (b"\x02\x00", "field number 0"),
        (b"\x0d\x00\x00", "beyond its message's end"),
        (b"\x09\x00\x00", "beyond its message's end"),
    ],
)
def test_each_kind_of_broken_wire_format_is_named(content, words):
    with pytest.raises(ModelFileError, match=words):
        lift(memoryview(content), path="m.onnx")


def test_a_file_that_nests_without_end_is_refused():
    graph = onnx.GraphProto()
    graph.initializer.append(numpy_helper.from_array(matrix(0), "w"))
    content = graph.SerializeToString()

    def field(number: int, body: bytes) -> bytes:
        length, out = len(body), b""
        while length > 0x7F:
            out, length = out + bytes([length & 0x7F | 0x80]), length >> 7
        return bytes([number << 3 | 2]) + out + bytes([length]) + body

    for _ in range(60):
        content = field(1, field(5, field(6, content)))
    with pytest.raises(ModelFileError, match="nested deeper than 100 levels"):
        lift(memoryview(field(7, content)), path="m.onnx")


def test_a_tensor_with_a_forged_marker_reads_its_own_file_only(tmp_path):
    from small_models import outside, write

    from surgery.storage import open_model

    proto = with_initializer(outside("w", [1 << 20], location=MARKER, offset=0, length=4 << 20))
    with pytest.raises(ModelFileError, match="needs bytes 0 to 4,194,304 of"):
        open_model(write(proto, tmp_path / "m.onnx"))
