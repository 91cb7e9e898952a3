"""Opening a model: its graph is parsed, its weights stay on disk."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Iterator, MutableMapping
from itertools import chain
from pathlib import Path, PurePosixPath, PureWindowsPath

import onnx
import onnx_ir as ir
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from surgery.errors import ModelFileError
from surgery.storage.hollow import root_cause
from surgery.storage.naming import MIN_DATA_BYTES
from surgery.storage.region import DataFile, Region, Window, bytes_of_shape
from surgery.storage.structure import find_disorder
from surgery.storage.wire import MARKER, lift

_LFS_POINTER = b"version https://git-lfs"
_ABSENT = "\0absent/"


OnFault = Callable[[ModelFileError], None]


def open_model(
    path: str | os.PathLike[str], *, min_bytes: int = MIN_DATA_BYTES, on_fault: OnFault | None = None
) -> ir.Model:
    """Open an .onnx file; every weight of `min_bytes` or more, and every external one, becomes a `Region`.

    Nodes that are out of order are sorted.

    Args:
        path: The file.
        min_bytes: Smaller weights that are inline stay in memory.
        on_fault: For those who only look: called with what is wrong with the data of a tensor, instead of raising it,
            and the tensor becomes a region of an `AbsentFile`; also called when nodes are out of order.

    Raises:
        ModelFileError: If this is not an ONNX model, or a broken one, or if its external data is missing, too short,
            misdescribed, or outside the model's folder.
    """
    path = Path(path)
    if path.is_dir():
        raise ModelFileError(f"{path}: is a folder, not an ONNX model", hint="name an .onnx file in it")
    file = DataFile(path)
    proto = _parse(file, min_bytes)
    disorder = _named(path, lambda: find_disorder(proto))
    tensors = _Tensors(file)
    for where, tensor in _tensors_of(proto):
        try:
            tensors.check(where, tensor)
        except ModelFileError as error:
            if on_fault is None or not tensors.can_do_without(tensor):
                raise
            on_fault(error)
    if disorder and on_fault is not None:
        on_fault(ModelFileError(f"{path}: {disorder}", hint="any run sorts them"))
    model = _deserialize(path, proto)
    _attach(model, tensors.region)
    if disorder:
        model.graph.sort()
        for function in model.functions.values():
            function.sort()
    return model


def _parse(file: DataFile, min_bytes: int) -> onnx.ModelProto:
    if file.size == 0:
        raise ModelFileError(f"{file.path}: is empty, not an ONNX model", hint="download or export the file again")
    if file.read(0, min(file.size, len(_LFS_POINTER))) == _LFS_POINTER:
        raise ModelFileError(f"{file.path}: is a Git LFS pointer, not an ONNX model", hint="git lfs pull")
    slim, _ = lift(Window(file), path=file.path, min_bytes=min_bytes)
    try:
        proto = onnx.ModelProto.FromString(slim)
    except DecodeError as error:
        raise ModelFileError(f"{file.path}: is not an ONNX model: {error}") from error
    if not proto.HasField("graph"):
        raise ModelFileError(f"{file.path}: is not an ONNX model: it has no graph")
    _refuse_what_would_be_lost(file.path, proto)
    return proto


def _refuse_what_would_be_lost(path: str, proto: onnx.ModelProto) -> None:
    """Raise for the parts of a file that onnx_ir 1.1 drops without a word."""
    if proto.training_info:
        raise ModelFileError(f"{path}: holds training information, which cannot be kept", hint="export for inference")
    domains = [entry.domain for entry in proto.opset_import]
    if len(domains) != len(set(domains)):
        raise ModelFileError(f"{path}: imports an operator set twice: {sorted(domains)}")
    for _, graph in _graphs(proto):
        if graph.sparse_initializer:
            name = graph.sparse_initializer[0].values.name
            raise ModelFileError(f"{path}: sparse initializer {name!r} cannot be kept", hint="export it dense")


def _deserialize(path: Path, proto: onnx.ModelProto) -> ir.Model:
    try:
        return ir.serde.deserialize_model(proto)
    except Exception as error:
        raise ModelFileError(f"{path}: cannot be read: {root_cause(error)}") from error


def _named(path: Path, check: Callable[[], str]) -> str:
    try:
        return check()
    except ModelFileError as error:
        raise ModelFileError(f"{path}: {error.message}", hint=error.hint) from error


class _Tensors:
    """The external tensors of one model, and the files they are in."""

    def __init__(self, model_file: DataFile) -> None:
        self.model_file = model_file
        self.files = {MARKER: model_file}
        self.absent_bytes: dict[str, int] = {}

    def check(self, where: str, proto: onnx.TensorProto) -> None:
        """Raise unless the tensor's bytes are all there."""
        what = f"tensor {proto.name!r}" if proto.name else f"the tensor of {where}"
        if any(size < 0 for size in proto.dims):
            raise self.error(f"{what} has the shape {list(proto.dims)}")
        if proto.data_type == onnx.TensorProto.UNDEFINED:
            raise self.error(f"{what} has no element type")
        if proto.data_location == onnx.TensorProto.EXTERNAL:
            self.check_external(what, proto)
        elif proto.HasField("raw_data"):
            self.check_length(what, proto, len(proto.raw_data))

    def check_external(self, what: str, proto: onnx.TensorProto) -> None:
        keys = [entry.key for entry in proto.external_data]
        reference = {entry.key: entry.value for entry in proto.external_data}
        if len(keys) != len(reference):
            raise self.error(f"{what} says twice where its data is")
        if proto.HasField("raw_data"):
            raise self.error(f"{what} has its data both inside and outside the file")
        location = reference.get("location", "")
        offset = self.whole_number(what, "offset", reference.get("offset") or "0")
        expected = self.expected_length(what, proto)
        if reference.get("length"):
            length = self.whole_number(what, "length", reference["length"])
            self.check_length(what, proto, length)
        if location not in self.files:
            self.files[location] = DataFile(self.find(what, location))
        file = self.files[location]
        if offset + expected > file.size:
            raise self.error(
                f"{what} needs bytes {offset:,} to {offset + expected:,} of {file.path}, which has {file.size:,}",
                hint="the data file is incomplete or belongs to another model: download or export both again",
            )

    def can_do_without(self, proto: onnx.TensorProto) -> bool:
        """Let an absent file have the tensor's data, if it is known at all how long that is."""
        if proto.data_type == onnx.TensorProto.UNDEFINED or any(size < 0 for size in proto.dims):
            return False
        length = self.expected_length("it", proto)
        named = next((entry.value for entry in proto.external_data if entry.key == "location"), "")
        location = f"{_ABSENT}{named}"
        self.absent_bytes[location] = max(length, self.absent_bytes.get(location, 0))
        proto.ClearField("raw_data")
        proto.ClearField("external_data")
        proto.data_location = onnx.TensorProto.EXTERNAL
        for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
            proto.external_data.add(key=key, value=value)
        return True

    def region(self, tensor: ir.ExternalTensor) -> Region:
        location = os.fspath(tensor.location)
        if location not in self.files:
            self.files[location] = AbsentFile(location.removeprefix(_ABSENT), self.absent_bytes[location])
        return Region(
            self.files[location],
            tensor.offset or 0,
            tensor.dtype,
            tensor.shape,
            name=tensor.name,
            doc_string=tensor.doc_string,
            metadata_props=dict(tensor.metadata_props) or None,
        )

    def find(self, what: str, location: str) -> str:
        """Return the data file's real path; it must not leave the model's folder."""
        if not location:
            raise self.error(f"{what} is external, but does not say in which file")
        if PurePosixPath(location).is_absolute() or PureWindowsPath(location).is_absolute():
            raise self.error(f"{what}: its data file {location!r} is an absolute path", hint=_PUT_BESIDE)
        if os.path.normpath(location).split(os.sep)[0] == "..":
            raise self.error(f"{what}: its data file {location!r} leaves the model's folder", hint=_PUT_BESIDE)
        for folder in self.folders():
            target = os.path.realpath(os.path.join(folder, location))
            if not os.path.lexists(os.path.join(folder, location)):
                continue
            is_inside = any(_is_inside(target, one) for one in self.folders())
            if not is_inside and not _is_in_same_hub_repository(target, folder):
                raise self.error(
                    f"{what}: its data file {location!r} is a link that leaves the model's folder, to {target}"
                )
            if os.path.isfile(target):
                return target
        raise self.error(
            f"{what}: its data file {location!r} is missing from {self.folders()[0]}",
            hint="put the data file beside the model under the very name it was exported with",
        )

    def folders(self) -> tuple[str, ...]:
        """The folder the model was named in and, if the model is a link, the folder it is in."""
        path = self.model_file.path
        return tuple(dict.fromkeys((os.path.realpath(os.path.dirname(path)), os.path.dirname(os.path.realpath(path)))))

    def check_length(self, what: str, proto: onnx.TensorProto, length: int) -> None:
        expected = self.expected_length(what, proto)
        if length != expected:
            kind = onnx.TensorProto.DataType.Name(proto.data_type)
            raise self.error(f"{what} has {length:,} bytes, but {kind} {list(proto.dims)} takes {expected:,}")

    def expected_length(self, what: str, proto: onnx.TensorProto) -> int:
        try:
            dtype = ir.DataType(proto.data_type)
            return bytes_of_shape(dtype, tuple(proto.dims))
        except (ValueError, TypeError) as error:
            sentence = f"{what} has raw bytes of element type {proto.data_type}, whose size is not known"
            raise self.error(sentence) from error

    def whole_number(self, what: str, key: str, text: str) -> int:
        if not (text.isascii() and text.isdigit()):
            raise self.error(f"{what}: its {key} is {text!r}, not a whole number")
        return int(text)

    def error(self, sentence: str, *, hint: str = "") -> ModelFileError:
        return ModelFileError(f"{self.model_file.path}: {sentence}", hint=hint)


_PUT_BESIDE = "put the data file beside the model and export again with a relative location"


class AbsentFile(DataFile):
    """Stands for a data file that is missing or not to be used: nothing but zeros, which take no room.

    Args:
        location: The file's name as the model gives it, empty for data inside the model file.
        size: How many bytes.
    """

    def __init__(self, location: str, size: int) -> None:
        with tempfile.NamedTemporaryFile() as file:
            file.truncate(size)
            super().__init__(file.name)
        self.path = location


def _is_inside(path: str, folder: str) -> bool:
    return os.path.commonpath((path, folder)) == folder


def _is_in_same_hub_repository(path: str, folder: str) -> bool:
    """Tell whether both are in one `models--owner--name` of a Hugging Face cache, where `blobs` has the files."""
    for parent in (Path(folder), *Path(folder).parents):
        if parent.name.startswith("models--"):
            return _is_inside(path, str(parent / "blobs"))
    return False


def _attach(model: ir.Model, region: Callable[[ir.ExternalTensor], Region]) -> None:
    """Put a region in the place of each external tensor."""
    for graph in chain(model.graphs(), *(function.graph.subgraphs() for function in model.functions.values())):
        for value in graph.initializers.values():
            if isinstance(value.const_value, ir.ExternalTensor):
                value.const_value = region(value.const_value)
    for node in chain(model.graph.all_nodes(), *(function.all_nodes() for function in model.functions.values())):
        _attach_attributes(node.attributes, region)
    for function in model.functions.values():
        _attach_attributes(function.attributes, region)


def _attach_attributes(attributes: MutableMapping[str, ir.Attr], region: Callable[[ir.ExternalTensor], Region]) -> None:
    for name, attribute in list(attributes.items()):
        if attribute.is_ref():
            continue
        if attribute.type == ir.AttributeType.TENSOR and isinstance(attribute.value, ir.ExternalTensor):
            attributes[name] = ir.AttrTensor(name, region(attribute.value), doc_string=attribute.doc_string)
        elif attribute.type == ir.AttributeType.TENSORS:
            tensors = [region(one) if isinstance(one, ir.ExternalTensor) else one for one in attribute.value]
            attributes[name] = ir.AttrTensors(name, tensors, doc_string=attribute.doc_string)


def _tensors_of(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.TensorProto]]:
    """Yield every tensor of a model with words for where it is."""
    for where, graph in _graphs(proto):
        for tensor in graph.initializer:
            yield where, tensor
    for where, attribute in _attributes(proto):
        if attribute.type == onnx.AttributeProto.TENSOR:
            yield where, attribute.t
        elif attribute.type == onnx.AttributeProto.TENSORS:
            for tensor in attribute.tensors:
                yield where, tensor


def _graphs(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.GraphProto]]:
    yield f"graph {proto.graph.name!r}", proto.graph
    for where, attribute in _attributes(proto):
        if attribute.type == onnx.AttributeProto.GRAPH:
            yield where, attribute.g
        elif attribute.type == onnx.AttributeProto.GRAPHS:
            for graph in attribute.graphs:
                yield where, graph


def _attributes(proto: onnx.ModelProto) -> Iterator[tuple[str, onnx.AttributeProto]]:
    """Yield every attribute of every node and function, subgraphs included."""
    for function in proto.functions:
        for attribute in function.attribute_proto:
            yield f"function {function.name!r}", attribute
    pending = [proto.graph.node, *(function.node for function in proto.functions)]
    while pending:
        for node in pending.pop():
            for attribute in node.attribute:
                yield f"node {node.name or node.op_type!r}", attribute
                if attribute.type == onnx.AttributeProto.GRAPH:
                    pending.append(attribute.g.node)
                elif attribute.type == onnx.AttributeProto.GRAPHS:
                    pending += [graph.node for graph in attribute.graphs]
