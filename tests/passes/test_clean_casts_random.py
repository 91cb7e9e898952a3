"""`clean_casts` on random graphs: the same bits, never more casts, nothing to do in a second run."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import onnx_ir as ir
import pytest
from rewriting import ROLE, run_pass

from passes.clean_casts import CleanCasts
from surgery.accuracy.compare import compare_output
from surgery.accuracy.runners import ModelProgram
from surgery.contract import Change, Tolerance
from surgery.graphs import graphs_of
from surgery.text import to_text
from surgery.watchers.validity import find_problem

D = ir.DataType
ALL_TYPES = (D.FLOAT, D.FLOAT, D.FLOAT16, D.FLOAT16, D.DOUBLE, D.INT32, D.INT64, D.BOOL)
FLOAT_TYPES = (D.FLOAT, D.FLOAT16, D.DOUBLE, D.BOOL)
CAN_ADD = (D.FLOAT, D.FLOAT16, D.DOUBLE, D.INT32, D.INT64)
CLEAN = CleanCasts()


class Drawing:
    """Draws a graph of casts, of operators that move numbers, of additions, and of branches and loops of the same.

    All tensors are squares [2, 2], so that any two can be put together. In every other graph there are numbers of any
    size and no integers: what becomes of a number that an integer type does not hold is left open.
    """

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.types = FLOAT_TYPES if seed % 2 else ALL_TYPES
        self.count = 0

    def model(self) -> ir.Model:
        """Return a whole model."""
        inputs = [self.value(dtype, f"in_{dtype.name.lower()}") for dtype in set_of_inputs(self.types)]
        flag = ir.Value(name="flag", type=ir.TensorType(D.BOOL), shape=ir.Shape(()))
        graph = ir.Graph([*inputs, flag], [], nodes=[], opset_imports={"": 21}, name="g")
        for name, numbers in (("shape", [2, 2]), ("zero_one", [0, 1])):
            weight = ir.tensor(np.array(numbers, dtype=np.int64))
            graph.register_initializer(
                ir.Value(name=name, type=ir.TensorType(D.INT64), shape=ir.Shape((2,)), const_value=weight)
            )
        largest = 70000.0 if self.types is FLOAT_TYPES else 7.0
        weights = [dtype for dtype in set_of_inputs(self.types) if dtype != D.BOOL]
        for dtype in weights:
            with np.errstate(over="ignore"):
                weight = ir.tensor(np.array([[1.5, -2.25], [0.1, largest]]).astype(dtype.numpy()))
            graph.register_initializer(
                ir.Value(name=f"w_{dtype.name}", type=ir.TensorType(dtype), shape=ir.Shape((2, 2)), const_value=weight)
            )
        known = [*inputs, *(graph.initializers[f"w_{dtype.name}"] for dtype in weights)]
        self.outer = graph
        self.flag = flag
        self.fill(graph, known, int(self.random.integers(5, 16)), depth=0)
        return ir.Model(graph, ir_version=10)

    def value(self, dtype: D, name: str = "") -> ir.Value:
        self.count += 1
        return ir.Value(name=name or f"v{self.count}", type=ir.TensorType(dtype), shape=ir.Shape((2, 2)))

    def fill(self, graph: ir.Graph, known: list[ir.Value], length: int, depth: int) -> None:
        """Put nodes into a graph and choose its results."""
        known = list(known)
        made: list[ir.Value] = []
        for _ in range(length):
            new = self.step(graph, known, depth)
            made += new
            known += new
        results = [made[index] for index in sorted(self.random.permutation(len(made))[:3])] if depth == 0 else made[-1:]
        graph.outputs.extend(dict.fromkeys([*results, made[-1]]))

    def step(self, graph: ir.Graph, known: list[ir.Value], depth: int) -> list[ir.Value]:
        """Add one thing to a graph and return what it gives."""
        recent = known[-6:]
        x = recent[self.random.integers(len(recent))]
        kind = self.random.random()
        if kind < 0.5:
            dtype = self.types[self.random.integers(len(self.types))]
            return self.put(graph, "Cast", [x], [dtype], {"to": int(dtype)})
        if kind < 0.55 and depth < 2:
            return self.chosen(graph, known, depth)
        if kind < 0.58 and depth < 2:
            return self.looped(graph, known, x, depth)
        alike = [value for value in known if value.dtype == x.dtype]
        y = alike[self.random.integers(len(alike))]
        if kind < 0.68 and x.dtype in CAN_ADD:
            return self.put(graph, "Add", [x, y], [x.dtype])
        return self.moved(graph, x, y, known)

    def moved(self, graph: ir.Graph, x: ir.Value, y: ir.Value, known: list[ir.Value]) -> list[ir.Value]:
        shape, places = (self.outer.initializers[name] for name in ("shape", "zero_one"))
        dtype = x.dtype
        kind = self.random.integers(6)
        if kind == 0:
            return self.put(graph, "Transpose", [x], [dtype])
        if kind == 1:
            return self.put(graph, "Reshape", [x, shape], [dtype])
        if kind == 2:
            return self.put(graph, "Gather", [x, places], [dtype])
        if kind == 3:
            return self.put(graph, "Identity", [x], [dtype])
        conditions = [value for value in known if value.dtype == D.BOOL]
        if kind == 4 and dtype in CAN_ADD and dtype != D.BOOL:
            return self.put(graph, "Where", [conditions[self.random.integers(len(conditions))], x, y], [dtype])
        (both,) = self.put(graph, "Concat", [x, y], [dtype], {"axis": 0})
        both.shape = ir.Shape((4, 2))
        if dtype == D.BOOL:
            return self.put(graph, "Gather", [both, places], [dtype])
        return self.put(graph, "Split", [both], [dtype, dtype], {"axis": 0, "num_outputs": 2})

    def chosen(self, graph: ir.Graph, known: list[ir.Value], depth: int) -> list[ir.Value]:
        branches = []
        dtype = self.types[self.random.integers(len(self.types))]
        for name in ("then_branch", "else_branch"):
            branch = ir.Graph([], [], nodes=[], name=f"{name}{self.count}")
            self.fill(branch, known, int(self.random.integers(2, 5)), depth + 1)
            self.end(branch, dtype)
            branches.append(ir.AttrGraph(name, branch))
        return self.put(graph, "If", [self.flag], [dtype], {}, branches)

    def looped(self, graph: ir.Graph, known: list[ir.Value], x: ir.Value, depth: int) -> list[ir.Value]:
        trip = self.value(D.INT64)
        go = self.value(D.BOOL)
        trip.shape = go.shape = ir.Shape(())
        assert x.dtype is not None
        state = self.value(x.dtype)
        body = ir.Graph([trip, go, state], [], nodes=[], name=f"body{self.count}")
        (on,) = self.put(body, "Identity", [go], [D.BOOL])
        on.shape = ir.Shape(())
        self.fill(body, [*known, state], int(self.random.integers(2, 5)), depth + 1)
        self.end(body, x.dtype)
        body.outputs.insert(0, on)
        trips = ir.node("Constant", [], {"value": ir.tensor(np.array(2, dtype=np.int64))})
        self.count += 1
        trips.outputs[0].name, trips.outputs[0].type = f"v{self.count}", ir.TensorType(D.INT64)
        graph.append(trips)
        return self.put(graph, "Loop", [trips.outputs[0], None, x], [x.dtype], {}, [ir.AttrGraph("body", body)])

    def end(self, graph: ir.Graph, dtype: D) -> None:
        """Let a body's one result be of a type."""
        (result,) = graph.outputs
        if result.dtype != dtype:
            graph.outputs[:] = self.put(graph, "Cast", [result], [dtype], {"to": int(dtype)})

    def put(self, graph, operator, inputs, dtypes, attributes=None, others=()) -> list[ir.Value]:  # type: ignore[no-untyped-def]
        outputs = [self.value(dtype) for dtype in dtypes]
        node = ir.node(operator, inputs, attributes or {}, outputs=outputs)
        for attribute in others:
            node.attributes.add(attribute)
        graph.append(node)
        return outputs


def set_of_inputs(types: tuple[D, ...]) -> list[D]:
    return [dtype for dtype in (D.FLOAT, D.FLOAT16, D.INT64, D.BOOL) if dtype in types]


def feeds(seed: int) -> dict[str, np.ndarray]:
    random = np.random.default_rng([seed, 1])
    size = random.choice([1, 1e-6, 1e4, 1e20]) if seed % 2 else 3.0
    return {
        "in_float": (random.standard_normal((2, 2)) * size).astype(np.float32),
        "in_float16": (random.standard_normal((2, 2)) * 3).astype(np.float16),
        "in_int64": random.integers(-9, 9, (2, 2)),
        "in_bool": random.random((2, 2)) < 0.5,
    }


def count_casts(model: ir.Model) -> int:
    return sum(node.op_type == "Cast" for graph in graphs_of(model.graph) for node in graph)


@pytest.mark.parametrize("start", range(0, 150, 25))
def test_random_graphs_keep_every_bit(start: int):
    removed = 0
    for seed in range(start, start + 25):
        model = Drawing(seed).model()
        bundle, change = run_pass(CLEAN, model)
        cleaned = bundle[ROLE]
        assert find_problem(cleaned) == "", f"{seed}:\n{to_text(model)}\n{to_text(cleaned)}"
        assert count_casts(model) - count_casts(cleaned) == change.count >= 0
        again, nothing = run_pass(CLEAN, cleaned)
        assert nothing == Change(0, ""), f"{seed}: {nothing}\n{to_text(cleaned)}\n{to_text(again[ROLE])}"
        removed += change.count
        with closing(ModelProgram(model)) as before, closing(ModelProgram(cleaned)) as after:
            for flag in (True, False):
                sample = {**feeds(seed), "flag": np.array(flag)}
                expected, found = before.run(sample), after.run(sample)
                assert expected.keys() == found.keys()
                for name, array in expected.items():
                    same = compare_output(name, array, found[name], CLEAN.effect, Tolerance())
                    assert same, f"{seed}, {name}: {same.text}\n{to_text(model)}\n{to_text(cleaned)}"
    assert removed > 25


def test_the_result_does_not_depend_on_where_objects_lie():
    for seed in range(20):
        texts = {to_text(run_pass(CLEAN, Drawing(seed).model())[0][ROLE]) for _ in range(3)}
        assert len(texts) == 1, seed
