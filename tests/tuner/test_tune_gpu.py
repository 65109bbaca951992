"""Tuning for a GPU, as far as that goes without one: its own space, its own device in the database, the default that a call gets.

The device is made up in this process, and the workers' kernels are eager PyTorch on the CPU: nothing here is a time of a GPU.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace

import gpu_worker
import pytest
import torch
from einfall.compiler import driver
from einfall.ir.errors import UnsupportedError
from einfall.ir.text import parse_cascade
from einfall.schedules.schedule import KernelOptions, Schedule
from einfall.schedules.target import load_target
from einfall.tuner.database import Database
from einfall.tuner.lookup import Lookup
from einfall.tuner.measure import Protocol
from einfall.tuner.search import Failure
from einfall.tuner.tune import plan_space, tune
from gpu_worker import slow_ms

COMMAND = (sys.executable, str(Path(gpu_worker.__file__)))
QUICK = Protocol(warm_up_ms=1, budget_ms=15, max_samples=5, final_rounds=5, final_budget_ms=30)
CASCADE = "cascade total(X[m,e]: f32) -> Y[m]\n  Y[m] = sum(e) X[m,e] * X[m,e]\n"
SIZES = {"m": 300, "e": 2000}
SM90 = load_target("cuda:sm_90")


@pytest.fixture
def gpu(monkeypatch):
    """A GPU of capability 9.0, as PyTorch tells of it. What was built for it by default."""
    built = []
    properties = SimpleNamespace(name="Made-up GPU", major=9, minor=0, multi_processor_count=132, total_memory=80 << 30)

    def compiled(cascade, *, sizes, target, schedule=None, **options):
        built.append(schedule)
        plan = driver.lower_cascade(driver.Order(cascade, sizes, target, frozenset()), schedule)
        fewer = KernelOptions(warps=8, stages=1)
        return SimpleNamespace(schedule=Schedule.make(tile=dict(plan.schedule.tile), kernel={"total": fewer}))

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda number: properties)
    monkeypatch.setattr(driver, "compile_cascade", compiled)
    return built


def test_candidates_of_a_gpu_go_through_the_usual_tuner(gpu, path):
    cascade = parse_cascade(CASCADE)
    result = tune(cascade, sizes=SIZES, target=SM90, database=path, trials=14, workers=1, threads=1, command=COMMAND, protocol=QUICK)
    assert gpu == [None], "the default is built once, as a call builds it"
    first = result.history.trials[0].point
    assert dict(first.kernel)["total"].stages == 1, "and it is what the build made of it that competes"
    failures = [t for t in result.history if isinstance(t.result, Failure)]
    timed = [slow_ms(t.point) for t in result.history if t not in failures]
    assert slow_ms(result.schedule) == min(timed) < slow_ms(first) and result.speedup > 1
    assert all(any(o.stages == 4 for _, o in t.point.kernel) and "shared memory" in t.result.reason for t in failures)
    assert len({t.point for t in result.history}) == 14
    assert (result.device.vendor, result.device.model, result.device.arch) == ("nvidia", "Made-up GPU", "sm_90")
    found = Lookup(path).find(cascade, SIZES, SM90)
    assert found.schedule == result.schedule
    assert Lookup(path).find(cascade, SIZES, load_target("cpu")) is None
    with Database.open(path, read_only=True) as db:
        assert [r.schedule for r in db.ls()] == [result.schedule]


def test_the_space_is_that_of_the_target(gpu):
    space, default = plan_space(parse_cascade(CASCADE), SIZES, SM90)
    assert dict(default.kernel) == {"total": KernelOptions(warps=8, stages=1)} and default in list(space)
    assert len(space.features(default)) == len(space.features(next(iter(space))))


def test_nothing_is_derived_built_or_written_without_a_device(gpu, path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UnsupportedError, match="this machine has no device for cuda:sm_90"):
        tune(parse_cascade(CASCADE), sizes=SIZES, target=SM90, database=path, trials=2)
    assert gpu == [] and not path.exists()
