"""Candidates for a GPU are checked and timed on it: tensors move there with the memory around them, and the clock waits."""

from __future__ import annotations

import contextlib
import re
from types import SimpleNamespace

import pytest
import torch
from einfall.ir.errors import UnsupportedError
from einfall.schedules.schedule import Schedule
from einfall.schedules.target import load_target
from einfall.tuner import placement, worker
from einfall.tuner.device import describe_device
from einfall.tuner.placement import clock_of, moved, place_of
from fake_cuda import FakeDevice, OnDevice, on_device

CASCADE = "cascade doubled(X[i]: f32) -> Y[i]\n  Y[i] = X[i] * 2.0\n"


@pytest.fixture
def gpu(monkeypatch):
    """A second device, which computes on the CPU; how often it was waited for."""
    waited = []
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: waited.append(1))
    with FakeDevice():
        yield waited


def test_places_and_their_clocks(gpu):
    assert place_of(load_target("cpu")) == torch.device("cpu")
    place = place_of(load_target("cuda:sm_90"))
    assert place == torch.device("cuda", 1)
    assert clock_of(torch.device("cpu"))() > 0 and gpu == []
    assert clock_of(place)() > 0 and gpu == [1]


def test_a_device_that_is_not_here_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for name in ("cuda:sm_90", "hip:gfx942"):
        with pytest.raises(UnsupportedError, match=f"no device for {name}"):
            place_of(load_target(name))


def test_why_there_is_no_device_is_said(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for version, why in ((None, "is built without CUDA"), ("13.0", "PyTorch finds no GPU, or no driver")):
        monkeypatch.setattr(torch.version, "cuda", version)
        for ask in (place_of, describe_device):
            with pytest.raises(UnsupportedError, match=why) as caught:
                ask(load_target("cuda:sm_90"))
            assert "`einfall explain`, `compile` and `check` need none" in str(caught.value)
    with pytest.raises(UnsupportedError, match="no device for hip:gfx942\n"):
        describe_device(load_target("hip:gfx942"))


@pytest.mark.parametrize(("capability", "target"), [((8, 0), "cuda:sm_90"), ((9, 0), "cuda:sm_100"), ((10, 0), "cuda:sm_90+tvm")])
def test_a_gpu_that_does_not_run_what_is_built_is_refused_before_anything_is_measured(gpu, monkeypatch, capability, target):
    properties = SimpleNamespace(name="GPU", major=capability[0], minor=capability[1], multi_processor_count=100, total_memory=1 << 30)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    with pytest.raises(UnsupportedError, match="the GPU of this machine is sm_.* where kernels for " + re.escape(target)):
        describe_device(load_target(target))
    assert describe_device(load_target("cuda:sm_80")).arch == f"sm_{capability[0]}{capability[1]}"


def test_tensors_move_with_the_memory_around_them():
    buffer = torch.arange(12.0)
    view = buffer[4:8].view(2, 2)
    with moved((view, buffer[8:]), torch.device("cpu")) as (copy, other):
        assert copy.data_ptr() != view.data_ptr() and torch.equal(copy, view) and copy.stride() == view.stride()
        copy.fill_(-1.0)
        torch.as_strided(copy, (1,), (1,), 3).fill_(-2.0)  # beside it
        assert torch.equal(other, buffer[8:])
        assert torch.equal(buffer, torch.arange(12.0))
    assert buffer.tolist() == [0, 1, 2, -2, -1, -1, -1, -1, 8, 9, 10, 11]


class Doubled(worker.Built):
    """A candidate whose kernel runs on a device alone."""

    code, facts, static = "", {}, {}

    def run(self, inputs, outputs):
        assert all(isinstance(t, OnDevice) and t.device == torch.device("cuda", 1) for t in (*inputs, *outputs))
        outputs[0].copy_(inputs[0] * 2.0)


def test_what_is_timed_lies_on_the_device_and_is_waited_for(gpu):
    job = worker.Job(CASCADE, (("i", 64),), (), Schedule(), load_target("cuda:sm_90").to_json(), policy="warm")
    session = worker._Session(lambda job: Doubled(), lambda stage: None)
    subject = session._subject(job)
    assert subject.sample() > 0 and len(gpu) == 2, "before and after"
    ((inputs, outputs),) = subject._sets
    torch.testing.assert_close(outputs[0].inner, inputs[0].inner * 2.0)


def test_what_is_checked_moves_there_and_back(gpu, monkeypatch):
    class Executable:
        target, source, facts, static = load_target("cuda:sm_90"), "", {}, {}

        class cascade:
            scalars = ()

        def bind(self, inputs):
            assert all(isinstance(t, OnDevice) for t in inputs)

        def launch(self, bound, inputs, scalars, outputs):
            outputs[0].copy_(inputs[0] * 2.0)

    @contextlib.contextmanager
    def to_device(tensors, device):
        yield [on_device(t, device.index) for t in tensors]

    monkeypatch.setattr(worker, "moved", to_device)
    candidate = worker._Compiled(Executable(), {})
    x, y = torch.randn(5), torch.empty(5)
    candidate.run([x], [y])
    torch.testing.assert_close(y, 2 * x)
    there = on_device(torch.empty(5), 1)
    candidate.run([on_device(x, 1)], [there])
    torch.testing.assert_close(there.inner, 2 * x)


def test_the_processor_moves_nothing(monkeypatch):
    monkeypatch.setattr(placement.torch.cuda, "synchronize", lambda: pytest.fail("there is nothing to wait for"))
    job = worker.Job(CASCADE, (("i", 64),), (), Schedule(), load_target("cpu").to_json(), policy="warm")

    class Plain(worker.Built):
        code, facts, static = "", {}, {}

        def run(self, inputs, outputs):
            outputs[0].copy_(inputs[0])

    assert worker._Session(lambda job: Plain(), lambda stage: None)._subject(job).sample() > 0
