"""Bound sessions: the same memory on both sides, for tensors of every kind, for as long as anybody looks."""

from __future__ import annotations

import gc

import pytest
import torch

from surgery.errors import SurgeryError
from surgery.runtime.bound import BoundSession, as_torch, as_value, one_torch_thread
from surgery.runtime.sessions import open_fast_session
from surgery.text import parse

GROWS = """
<ir_version: 8, opset_import: ["" : 18]>
g (float[b, past] cache, float[b, new] more, bool[1] flip) => (float[b, total] grown, bool[1] flipped) {
    grown = Concat <axis = 1> (cache, more)
    flipped = Not(flip)
}
"""
FLIP = torch.tensor([True])


@pytest.fixture
def session():
    return BoundSession(open_fast_session(parse(GROWS), threads=1))


def feeds(cache: torch.Tensor, more: torch.Tensor, flip: torch.Tensor = FLIP) -> dict:
    return {"cache": as_value(cache), "more": as_value(more), "flip": as_value(flip)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.bool])
def test_a_tensor_and_its_value_are_one_memory_both_ways(dtype):
    tensor = torch.ones(2, 3).to(dtype)
    value = as_value(tensor)
    assert value.data_ptr() == tensor.data_ptr()
    back = as_torch(value)
    assert (back.data_ptr(), back.dtype, back.shape) == (tensor.data_ptr(), dtype, tensor.shape)
    tensor[0, 0] = 0
    assert not back[0, 0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bool])
def test_an_empty_tensor_keeps_its_shape_and_type(dtype):
    back = as_torch(as_value(torch.zeros(2, 0, 4, dtype=dtype)))
    assert (tuple(back.shape), back.dtype) == ((2, 0, 4), dtype)


def test_a_tensor_that_is_not_contiguous_is_copied_in_its_order():
    tensor = torch.arange(6.0).reshape(2, 3).T
    value = as_value(tensor)
    assert value.data_ptr() != tensor.data_ptr()
    assert torch.equal(as_torch(value), tensor)


def test_a_tensor_that_wants_a_gradient_is_fed_without_it(session):
    outputs = session.run(feeds(torch.ones(1, 1, requires_grad=True), torch.ones(1, 1)))
    assert as_torch(outputs["grown"]).tolist() == [[1, 1]]


def test_a_cache_grows_from_nothing_by_feeding_outputs_as_they_are(session):
    cache = as_value(torch.zeros(2, 0))
    for step in range(3):
        more = torch.full((2, 1), float(step))
        cache = session.run({"cache": cache, "more": as_value(more), "flip": as_value(FLIP)})["grown"]
    assert as_torch(cache).tolist() == [[0, 1, 2]] * 2


def test_booleans_go_in_and_come_out(session):
    for flag in (True, False):
        outputs = session.run(feeds(torch.ones(1, 1), torch.ones(1, 1), torch.tensor([flag])))
        assert as_torch(outputs["flipped"]).tolist() == [not flag]


def test_an_output_is_not_overwritten_by_later_runs(session):
    first = session.run(feeds(torch.ones(1, 1), torch.ones(1, 1)))["grown"]
    seen = as_torch(first)
    for _ in range(5):
        session.run(feeds(torch.zeros(1, 1), torch.zeros(1, 1)))
    assert seen.tolist() == [[1, 1]]


def test_an_output_outlives_its_value_its_siblings_and_its_session():
    session = BoundSession(open_fast_session(parse(GROWS), threads=1))
    seen = as_torch(session.run(feeds(torch.full((64, 64), 3.0), torch.full((64, 64), 4.0)))["grown"])
    del session
    gc.collect()
    others = [torch.rand(64, 128) for _ in range(64)]  # would take memory that was given back
    assert torch.equal(seen, torch.tensor([3.0, 4.0]).repeat_interleave(64).expand(64, -1))
    assert len(others) == 64


def test_an_input_outlives_the_tensor_that_it_was_made_of(session):
    value = as_value(torch.full((64, 64), 5.0))
    gc.collect()
    others = [torch.rand(64, 64) for _ in range(64)]
    outputs = session.run({"cache": value, "more": as_value(torch.zeros(64, 0)), "flip": as_value(FLIP)})
    assert (as_torch(outputs["grown"]) == 5).all()
    assert len(others) == 64


def test_what_was_fed_is_not_kept_after_the_run(session):
    import weakref

    tensor = torch.ones(4, 4)
    died = weakref.ref(tensor)
    given = feeds(tensor, torch.ones(4, 1))
    outputs = session.run(given)
    value = given.pop("cache")
    gone = weakref.ref(value)
    del value, tensor
    gc.collect()
    assert gone() is None
    assert died() is None
    assert as_torch(outputs["grown"]).shape == (4, 5)


def test_a_missing_input_is_named(session):
    with pytest.raises(SurgeryError, match="nothing is fed to the input 'more'"):
        session.run({"cache": as_value(torch.ones(1, 1)), "flip": as_value(FLIP)})


def test_values_that_do_not_fit_are_refused_and_the_session_goes_on(session):
    with pytest.raises(SurgeryError, match="ONNX Runtime cannot run the model"):
        session.run(feeds(torch.ones(1, 1), torch.ones(2, 1)))
    with pytest.raises(SurgeryError, match="ONNX Runtime cannot run the model"):
        session.run(feeds(torch.ones(1, 1, dtype=torch.int64), torch.ones(1, 1)))
    assert as_torch(session.run(feeds(torch.ones(1, 1), torch.ones(1, 1)))["grown"]).tolist() == [[1, 1]]


def test_what_the_model_does_not_take_is_ignored(session):
    given = feeds(torch.ones(1, 1), torch.ones(1, 1)) | {"another": as_value(torch.ones(1))}
    assert set(session.run(given)) == {"grown", "flipped"}


def test_a_device_that_the_session_does_not_run_on_is_refused():
    session = open_fast_session(parse(GROWS), threads=1)
    with pytest.raises(SurgeryError, match="does not run on 'cuda'"):
        BoundSession(session, "cuda")
    with pytest.raises(SurgeryError, match="devices are cpu and cuda"):
        BoundSession(session, "tpu")


def test_torch_has_its_threads_back_after_an_error():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with one_torch_thread():
            assert torch.get_num_threads() == 1
        assert torch.get_num_threads() == 3
        with pytest.raises(RuntimeError), one_torch_thread():
            torch.ones(2) @ torch.ones(3)
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


@pytest.mark.gpu
def test_on_a_gpu_everything_stays_there():
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    providers = ("CUDAExecutionProvider", "CPUExecutionProvider")
    session = BoundSession(open_fast_session(parse(GROWS), threads=1, providers=providers), "cuda")
    cache = as_value(torch.zeros(2, 0, device="cuda"))
    for step in range(3):
        more = torch.full((2, 1), float(step), device="cuda")
        outputs = session.run({"cache": cache, "more": as_value(more), "flip": as_value(FLIP.cuda())})
        cache = outputs["grown"]
        assert cache.device_name() == "cuda"
    grown = as_torch(cache)
    assert grown.device.type == "cuda"
    assert grown.data_ptr() == cache.data_ptr()
    assert grown.tolist() == [[0, 1, 2]] * 2
