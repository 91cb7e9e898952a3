"""One model on many samples: the same numbers here, in processes and on a cluster."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import count

import numpy as np
import onnx_ir as ir
import pytest

from surgery.errors import ModelFileError, SurgeryError
from surgery.runtime.farm import run_all
from surgery.storage import open_model, save_model
from surgery.text import parse

WIDTH = 64


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> ir.Model:
    """A model with a weight in a file and one in memory."""
    drawn = parse(
        "g (float[n, 64] x) => (float[n, 64] y, float[n, 64] z) <float[1] w = {1}, float[1] b = {1}>"
        "{ y = MatMul(x, w)  z = Add(y, b) }"
    )
    random = np.random.default_rng(0)
    for name, shape in (("w", (WIDTH, WIDTH)), ("b", (WIDTH,))):
        value = drawn.graph.initializers[name]
        value.const_value = ir.tensor(random.standard_normal(shape).astype(np.float32))
        value.shape = ir.Shape(shape)
    path = tmp_path_factory.mktemp("farm") / "model.onnx"
    save_model(drawn, path)
    opened = open_model(path)
    bias = opened.graph.initializers["b"]
    bias.const_value = ir.tensor(bias.const_value.numpy() * 2)
    return opened


def samples() -> Iterator[dict[str, np.ndarray]]:
    """Yield samples without end."""
    return ({"x": np.full((2, WIDTH), number, np.float32)} for number in count())


def first(model: ir.Model, number: int, **where: object) -> list[np.ndarray]:
    runs = run_all(model, samples(), ["z"], **where)
    found = [next(runs)["z"] for _ in range(number)]
    runs.close()
    return found


def test_only_what_is_asked_for_comes_back_in_the_order_of_the_samples(model):
    weight, bias = (model.graph.initializers[name].const_value.numpy() for name in ("w", "b"))
    (zeros, ones) = first(model, 2)
    np.testing.assert_array_equal(zeros, np.broadcast_to(bias, (2, WIDTH)))
    np.testing.assert_allclose(ones, weight.sum(axis=0) + np.broadcast_to(bias, (2, WIDTH)), rtol=1e-4, atol=1e-5)


def test_processes_give_the_same(model):
    here = first(model, 5)
    for ours, theirs in zip(here, first(model, 5, workers=2), strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_cluster_gives_the_same(model):
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(
        n_workers=2, threads_per_worker=1, processes=True, dashboard_address=None, silence_logs=50
    ) as cluster:
        there = first(model, 5, cluster=cluster.scheduler_address)
    for ours, theirs in zip(first(model, 5), there, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_no_sample_is_drawn_before_it_is_needed(model):
    drawn: list[int] = []

    def noting() -> Iterator[dict[str, np.ndarray]]:
        for number, sample in enumerate(samples()):
            drawn.append(number)
            yield sample

    runs = run_all(model, noting(), ["z"])
    next(runs)
    runs.close()
    assert drawn == [0]


def test_a_cluster_that_is_not_there_is_said(model):
    pytest.importorskip("distributed")
    with pytest.raises(SurgeryError, match="no dask scheduler at 'tcp://127.0.0.1:1'") as error:
        first(model, 1, cluster="tcp://127.0.0.1:1")
    assert "tcp://host:8786" in str(error.value.hint)


def test_what_the_runtime_does_not_take_is_said():
    unknown = parse(
        '<ir_version: 8, opset_import: ["" : 18, "nobody" : 1]> g (float[n] x) => (float[n] z) { z = nobody.knows(x) }'
    )
    with pytest.raises(ModelFileError):
        first(unknown, 1)
