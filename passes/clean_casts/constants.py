"""Casts of constants are constants."""

from __future__ import annotations

from functools import partial

import numpy as np
import onnx_ir as ir

from passes.clean_casts.exactness import COMMON, INTEGERS, keeps_all
from passes.clean_casts.site import Site, is_cast, key_of_cast, source_of, target_type
from surgery.graphs import constant_tensor

D = ir.DataType

# What ONNX Runtime's ConstantOfShape makes.
FILLED = COMMON - {D.BFLOAT16}

# Above this a constant is converted when somebody reads it, each time.
EAGER_BYTES = 1024


def fold_constants(site: Site, small_bytes: int) -> bool:
    """Let constants stand for casts of them, where the model does not grow by more than a little."""
    changed = False
    for graph in site.graphs:
        for cast in site.casts(graph):
            changed |= fold(site, cast, small_bytes) or fold_fill(site, cast)
    return changed


def fold(site: Site, cast: ir.Node, small_bytes: int) -> bool:
    """Cast(constant, to=T) -> a constant of type T; if all that uses the old one are such casts, the old one goes."""
    constant = source_of(cast)
    tensor = constant_of(constant)
    if tensor is None:
        return False
    equal = [user for user, index in constant.uses() if index == 0 and is_cast(user)]
    equal = [user for user in equal if key_of_cast(user) == key_of_cast(cast) and can_go(user)]
    goes = len(equal) == len(constant.uses()) and not constant.is_graph_output()
    if cast not in equal or not is_worth(tensor, target_type(cast), small_bytes, goes=goes):
        return False
    converted = convert(tensor, target_type(cast))
    if converted is None:
        return False
    if goes:
        made = constant
        become(constant, converted)
    else:
        site.forget(cast.outputs[0])
        made = put_beside(site, constant, converted, str(cast.outputs[0].name))
        site.names[str(cast.outputs[0].name)] += 1
    for user in equal:
        user.outputs[0].replace_all_uses_with(made)
        site.remove(user)
    if not all(site.shows(made, user.graph) for user, _ in made.uses()):
        site.make_seen(made)
    return True


def fold_fill(site: Site, cast: ir.Node) -> bool:
    """Cast(ConstantOfShape(shape), to=T) -> a ConstantOfShape of type T, if all that uses it are such casts."""
    value, target = source_of(cast), target_type(cast)
    node = value.producer()
    if node is None or node.domain or node.op_type != "ConstantOfShape" or value.is_graph_output():
        return False
    uses = value.uses()
    if target not in FILLED or any(index or not is_cast(user) or target_type(user) != target for user, index in uses):
        return False
    results = [user.outputs[0] for user, _ in uses]
    if not any(site.can_stand_for(value, result) for result in results):
        return False
    given = node.attributes.get("value")
    tensor = given.as_tensor() if given is not None else ir.tensor(np.zeros(1, dtype=np.float32))
    converted = convert(tensor, target)
    if converted is None:
        return False
    node.attributes["value"] = ir.AttrTensor("value", converted)
    value.type = ir.TensorType(target)
    for result in results:
        site.stand_for(value, result)
    return True


def can_go(cast: ir.Node) -> bool:
    """Return whether a constant can stand for a cast: a result of a graph has to be given by a node."""
    return not cast.outputs[0].is_graph_output()


def constant_of(value: ir.Value) -> ir.TensorProtocol | None:
    """Return what a value always is: an initializer that nobody can override, or what a `Constant` gives."""
    if value.is_graph_input():
        return None
    return value.const_value if value.is_initializer() else constant_tensor(value.producer())


def is_worth(tensor: ir.TensorProtocol, dtype: D, small_bytes: int, *, goes: bool) -> bool:
    """Return whether a constant may be there in another type, in place of the old one or beside it."""
    if dtype not in COMMON:  # numbers as text have no size
        return False
    size = tensor.size * dtype.itemsize
    return size <= (max(small_bytes, tensor.nbytes) if goes else small_bytes)


def become(constant: ir.Value, tensor: ir.TensorProtocol) -> None:
    """Let a constant be another tensor."""
    constant.type = ir.TensorType(tensor.dtype)
    node = constant.producer()
    if node is None:
        constant.const_value = tensor
    else:
        node.attributes.clear()
        node.attributes.add(ir.AttrTensor("value", tensor))


def put_beside(site: Site, constant: ir.Value, tensor: ir.TensorProtocol, name: str) -> ir.Value:
    """Put another constant beside one, of the same kind, and return it."""
    name = site.fresh_name(name)
    node = constant.producer()
    if node is None:
        made = ir.Value(name=name, type=ir.TensorType(tensor.dtype), shape=constant.shape, const_value=tensor)
        assert isinstance(constant.graph, ir.Graph)
        constant.graph.register_initializer(made)
        return made
    maker = ir.node("Constant", [], {"value": tensor})
    made = maker.outputs[0]
    made.name, made.type, made.shape = name, ir.TensorType(tensor.dtype), constant.shape
    assert isinstance(node.graph, ir.Graph)
    node.graph.insert_after(node, maker)
    return made


def convert(tensor: ir.TensorProtocol, dtype: D) -> ir.TensorProtocol | None:
    """Return a tensor in another type, None if runtimes differ about it; a large one is converted when it is read."""
    if tensor.dtype not in COMMON or dtype not in COMMON:
        return None
    if tensor.nbytes <= EAGER_BYTES:
        array = cast_array(tensor.numpy(), dtype)
        return ir.tensor(array, dtype=dtype) if array is not None else None
    if not is_alike_everywhere(tensor.dtype, dtype) and cast_array(tensor.numpy(), dtype) is None:
        return None
    return ir.LazyTensor(partial(_converted, tensor, dtype), dtype, ir.Shape(tensor.shape.numpy()), name=tensor.name)


def _converted(tensor: ir.TensorProtocol, dtype: D) -> ir.TensorProtocol:
    array = cast_array(tensor.numpy(), dtype)
    assert array is not None
    return ir.tensor(array, dtype=dtype)


def remove_constant(site: Site, constant: ir.Value) -> None:
    """Take a constant out of its graph that nothing uses any more."""
    node = constant.producer()
    if node is not None:
        site.remove(node)
        return
    assert constant.graph is not None
    assert constant.name is not None
    del constant.graph.initializers[constant.name]
    site.forget(constant)


def is_alike_everywhere(source: D, target: D) -> bool:
    """Return whether all runtimes cast all numbers of a type alike, so that nobody has to look at them."""
    return keeps_all(source, target) or target == D.BOOL or (source == D.FLOAT and target in (D.FLOAT16, D.BFLOAT16))


def cast_array(array: np.ndarray, dtype: D) -> np.ndarray | None:
    """Return an array in another type, None if a number is out of range or is rounded otherwise on the way to it.

    ONNX leaves open what becomes of a number that an integer type does not hold. A double and a large integer may reach
    a half type through float32, as in ONNX Runtime, or directly.
    """
    with np.errstate(over="ignore", invalid="ignore"):
        if dtype == D.BOOL:
            return np.asarray(array != 0)
        if dtype in INTEGERS and not _is_in_range(array, np.iinfo(dtype.numpy())):
            return None
        direct = array.astype(dtype.numpy())
        if dtype in (D.FLOAT16, D.BFLOAT16) and array.dtype.itemsize > 2 and array.dtype != np.float32:
            by_way = array.astype(np.float32)
            is_same = np.array_equal(direct, by_way.astype(dtype.numpy()), equal_nan=True)
            # ml_dtypes takes the way through float32 as well, so that of bfloat16 nothing is known then.
            if not is_same or (dtype == D.BFLOAT16 and not np.array_equal(array, by_way, equal_nan=True)):
                return None
    return direct


def _is_in_range(array: np.ndarray, limits: np.iinfo) -> bool:
    """Return whether an integer type holds all numbers once they are truncated."""
    if array.size == 0 or array.dtype == bool:
        return True
    if np.issubdtype(array.dtype, np.integer):
        return int(array.min()) >= limits.min and int(array.max()) <= limits.max
    whole = np.trunc(array.astype(np.float64))
    # The largest integer is no double for 64 bits, but the one above it is.
    return bool(np.all((whole >= float(limits.min)) & (whole < float(limits.max + 1))))
