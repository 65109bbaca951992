"""The property check on a target whose device is not here: the kernels that are emitted for it, interpreted."""

from __future__ import annotations

import einfall as ef
import pytest
import torch
from einfall.schedules.target import load_target
from einfall.tuner import property_check
from einfall.tuner.placement import moved
from einfall.tuner.property_check import draw_sizes, ran_where


@ef.kernel
def share(X: "m p") -> "m p":
    return ef.softmax(X, over="p")


@ef.kernel
def weighted(X: "m p", V: "p f") -> "m f":
    return (ef.softmax(X, over="p") * V).sum("p")


needs_no_device = pytest.mark.skipif(torch.cuda.is_available(), reason="looks at what happens without a device")


@needs_no_device
def test_kernels_for_a_device_that_is_not_here_are_interpreted_and_the_report_says_so():
    for kernel, dtypes in ((share, None), (weighted, "bf16")):
        report = kernel.check(target="cuda:sm_90", trials=2, dtypes=dtypes, seed=1)
        assert report.passed, report.to_dict()
        assert report.to_dict()["ran"] == "interpreter"
        assert report.title == f"{kernel.name} on cuda:sm_90: interpreted, not run on a device"
        assert all(n <= 33 for t in report.trials for _, n in t.sizes)


def test_kernels_for_this_processor_run_on_it():
    report = share.check(dims={"m": 3, "p": 5}, trials=1)
    assert report.passed and report.to_dict()["ran"] == "device" and report.title == "share on cpu"


@needs_no_device
def test_an_interpreted_kernel_that_is_wrong_is_told(monkeypatch):
    real = property_check.interpreted

    @ef.kernel
    def nearly(X: "m p") -> "m p":
        return ef.softmax(X, over="p") * 1.001

    monkeypatch.setattr(property_check, "interpreted", lambda cascade, **options: real(nearly.cascade, **options))
    report = share.check(target="cuda:sm_90", trials=1)
    assert not report.passed and "off by" in report.trials[0].failure


@needs_no_device
@pytest.mark.parametrize("name", ["cuda:sm_80", "cuda:sm_100", "hip:gfx942"])
def test_every_gpu_that_is_not_here_is_interpreted(name):
    assert ran_where(load_target(name)) == "interpreter"
    report = share.check(target=name, dims={"m": 3, "p": 19}, trials=1)
    assert report.passed and report.ran == "interpreter"


def test_targets_that_cannot_be_interpreted_say_so():
    assert ran_where(load_target("cpu")) == "device"
    report = share.check(target="ascend:910b3", trials=1)
    assert not report.passed and "UnsupportedError" in report.trials[0].failure


@pytest.mark.parametrize(
    ("name", "capability", "expected"),
    [
        ("cuda:sm_90", (9, 0), "device"),
        ("cuda:sm_80", (8, 6), "device"),
        ("cuda:sm_90", (10, 0), "interpreter"),
        ("hip:gfx942", (9, 0), "interpreter"),
    ],
)
def test_a_device_that_runs_the_target_s_code_is_taken(name, capability, expected, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    monkeypatch.setattr(torch.version, "hip", None)
    assert ran_where(load_target(name)) == expected


def test_tensors_are_moved_with_what_lies_around_them():
    memory = torch.arange(100, dtype=torch.float32)
    view = memory[20:80].view(6, 10)[:, 2:9]
    with moved((view,), torch.device("cpu")) as (copy,):
        assert torch.equal(copy, view) and copy.stride() == view.stride()
        assert copy.data_ptr() != view.data_ptr()
        copy.fill_(-1)
        copy.as_strided((1,), (1,), 21).fill_(7)  # beside it
        assert memory[22] == 22
    assert (view == -1).all() and memory[21] == 7 and memory[20] == 20


def test_few_extents_are_small():
    import random

    cascade = weighted.cascade
    drawn = [draw_sizes(cascade, {}, random.Random(seed), few=True) for seed in range(20)]
    assert max(max(sizes.values()) for sizes in drawn) == 33
    assert all(sizes["m"] * sizes["p"] * sizes["f"] <= 1 << 12 for sizes in drawn)
