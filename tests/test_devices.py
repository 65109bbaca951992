"""Kernels run where their tensors lie: on a device that computes on the CPU, but mixes with nothing else."""

from __future__ import annotations

import warnings

import einfall as ef
import pytest
import torch
from einfall.backends.base import Source
from einfall.backends.tvm import TvmCpu
from einfall.compiler import devices, driver, parts
from einfall.compiler.driver import compile_cascade
from einfall.ir.binding import bind_sizes
from einfall.schedules import default
from einfall.schedules.target import load_target
from fake_cuda import FakeDevice, OnDevice, on_device
from variety import VARIETY


@ef.kernel
def attention(Q: "m e", K: "p e", V: "p f", *, scale: float = 1.0) -> "m f":
    return (ef.softmax((Q * K).sum("e") * scale, over="p") * V).sum("p")


@ef.kernel
def normalized(X: "i j") -> "i j":
    """Two kernels, with an intermediate between them."""
    r = X.sum("j")
    return X * (r * r).sum("i")


class OnCpu:
    """A backend of CUDA targets whose kernels are those of the CPU, given the elements of the device's tensors."""

    suffix = ".so"

    def __init__(self, launched):
        self.cpu, self.launched = TvmCpu(), launched

    def emit(self, program, schedule, target, *, strided=frozenset()):
        source = self.cpu.emit(program, schedule, load_target("cpu"), strided=strided)
        return Source.make(source.text, source.entry, target)

    def build(self, source):
        return self.cpu.build(Source.make(source.text, source.entry, load_target("cpu")))

    def facts(self, artifact):
        return {}

    def load(self, artifact):
        run = self.cpu.load(artifact)

        def launch(*given):
            tensors = [x for x in given if isinstance(x, torch.Tensor)]
            assert all(isinstance(t, OnDevice) for t in tensors) and len({t.device for t in tensors}) == 1
            self.launched.append(tensors[0].device)
            run(*[x.inner if isinstance(x, OnDevice) else x for x in given])

        return launch


@pytest.fixture
def gpu(monkeypatch):
    """Two devices of capability 9.0; where kernels were launched."""
    launched = []
    served, schedule = driver.backend_for, default.default_schedule
    for module in (driver, parts):
        monkeypatch.setattr(module, "backend_for", lambda t: OnCpu(launched) if t.kind == "cuda" else served(t))
    monkeypatch.setattr(default, "default_schedule", lambda plan, sizes, target: schedule(plan, sizes, load_target("cpu")))
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    with ef.configure(cache=None, database=None), FakeDevice():
        yield launched


def qkv(m=9, p=33, number=0):
    return [on_device(torch.randn(n, 16), number) for n in (m, p, p)]


def fresh(kernel):
    return ef.kernel(kernel.__wrapped__)


# -- where kernels run ---------------------------------------------------------------------------------------------------------------


def test_a_kernel_runs_on_the_device_of_its_tensors(gpu):
    kernel = fresh(attention)
    for number in (0, 1, 0):
        q, k, v = qkv(number=number)
        for _ in range(2):
            found = kernel(q, k, v, scale=0.5)
            assert found.device == torch.device("cuda", number)
            torch.testing.assert_close(found.inner, attention(q.inner, k.inner, v.inner, scale=0.5))
    assert [d.index for d in gpu] == [0, 0, 1, 1, 0, 0]
    on_cpu = kernel(*(t.inner for t in qkv()), scale=0.5)
    assert on_cpu.device == torch.device("cpu") and len(gpu) == 6


def test_what_lies_between_kernels_lies_on_their_device(gpu):
    x = on_device(torch.randn(500, 40), 1)
    torch.testing.assert_close(fresh(normalized)(x).inner, normalized(x.inner))
    assert len(gpu) > 1 and {d.index for d in gpu} == {1}


@pytest.mark.parametrize("name", ["kept", "ordered", "scans", "recurrent"])
def test_library_calls_and_loops_run_on_the_device(gpu, name):
    entry = VARIETY[name]
    cascade, tensors = entry.cascade(), entry.tensors(3)
    sizes = bind_sizes(cascade, tensors)
    wanted = compile_cascade(cascade, sizes=sizes, target="cpu")(*tensors.values())
    found = compile_cascade(cascade, sizes=sizes, target="cuda:sm_90")(*(on_device(t, 1) for t in tensors.values()))
    wanted, found = (x if isinstance(x, tuple) else (x,) for x in (wanted, found))
    for a, b in zip(found, wanted, strict=True):
        assert a.device == torch.device("cuda", 1)
        torch.testing.assert_close(a.inner, b)


def test_outputs_may_be_given_on_the_device_alone(gpu):
    kernel = fresh(attention)
    q, k, v = qkv()
    out = on_device(torch.full((9, 16), torch.nan))
    assert kernel(q, k, v, out=out) is out
    torch.testing.assert_close(out.inner, attention(q.inner, k.inner, v.inner))
    for wrong in (out.inner, on_device(out.inner, 1)):
        with pytest.raises(ef.BindingError, match=rf"on {wrong.device}, expected torch.float32 \[9, 16\] on cuda:0"):
            kernel(q, k, v, out=wrong)


def test_empty_results_are_not_launched(gpu):
    found = fresh(attention)(*(on_device(t) for t in (torch.empty(0, 16), torch.randn(5, 16), torch.randn(5, 16))))
    assert found.shape == (0, 16) and found.is_cuda and gpu == []


def test_compile_takes_the_device_of_the_tensors(gpu):
    assert fresh(attention).compile(*qkv()).target.name == "cuda:sm_90"
    assert fresh(attention).compile(*(t.inner for t in qkv())).target.name == "cpu"
    assert fresh(attention).compile(*qkv(), target="cpu").target.name == "cpu"
    assert fresh(attention).explain(*qkv(), show=False).to_dict()["target"]["name"] == "cuda:sm_90"


def test_calls_of_a_signature_share_an_executable_whatever_the_address(gpu):
    kernel = fresh(attention)
    base = torch.randn(9 * 16 + 1)
    shifted = on_device(base[1:].view(9, 16))
    q, k, v = qkv()
    kernel(q, k, v)
    kernel(shifted, k, v)
    assert len(kernel._memo) == 1, "what depends on addresses is the launcher's"


# -- what is refused -----------------------------------------------------------------------------------------------------------------


def test_tensors_on_two_devices_are_refused_by_name(gpu):
    q, k, v = qkv()
    with pytest.raises(ef.BindingError, match="the tensors lie on different devices: Q on cuda:0, K on cpu, V on cuda:0"):
        fresh(attention)(q, k.inner, v)
    executable = fresh(attention).compile(q, k, v)
    with pytest.raises(ef.BindingError, match="Q on cuda:0, K on cuda:1, V on cuda:0"):
        executable(q, on_device(k.inner, 1), v, scale=1.0)


def test_an_executable_refuses_tensors_of_another_kind_of_device(gpu):
    q, k, v = qkv()
    for_cuda, for_cpu = fresh(attention).compile(q, k, v), fresh(attention).compile(q, k, v, target="cpu")
    with pytest.raises(ef.UnsupportedError, match="Q lies on cpu; this executable was built for cuda:sm_90") as caught:
        for_cuda(q.inner, k.inner, v.inner, scale=1.0)
    assert "Q.cuda()" in str(caught.value)
    with pytest.raises(ef.UnsupportedError, match="Q lies on cuda:0; this executable was built for cpu") as caught:
        for_cpu(q, k, v, scale=1.0)
    assert "Q.cpu()" in str(caught.value)


def test_an_executable_refuses_another_gpu(gpu, monkeypatch):
    q, k, v = qkv()
    executable = fresh(attention).compile(q, k, v)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(ef.UnsupportedError, match="built for cuda:sm_90, and cuda:0 is sm_80"):
        executable(q, k, v, scale=1.0)


def test_amd_devices_are_refused(gpu, monkeypatch):
    q, k, v = qkv()
    executable = fresh(attention).compile(q, k, v)
    monkeypatch.setattr(torch.version, "hip", "6.4")
    with pytest.raises(ef.UnsupportedError, match="Q lies on cuda:0, an AMD device"):
        fresh(attention)(q, k, v)
    with pytest.raises(ef.UnsupportedError, match="built for cuda:sm_90"):
        executable(q, k, v, scale=1.0)


def test_what_is_only_built_is_not_launched():
    with pytest.raises(ef.UnsupportedError, match="built for hip:gfx942, for which this version builds ahead of time only"):
        devices.check_device(load_target("hip:gfx942"), "Q", torch.empty(3), "attention")


# -- which target a device has -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("capability", [(8, 0), (9, 0), (10, 0)])
def test_a_known_gpu_has_its_own_target(capability):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert devices.cuda_target.__wrapped__(capability) == "cuda:sm_{}{}".format(*capability)


@pytest.mark.parametrize("capability", [(8, 6), (8, 9), (10, 3), (12, 0)])
def test_an_unknown_gpu_has_the_nearest_whose_code_it_runs_and_says_so(capability):
    # sm_90a and sm_100a hold instructions of their own, which no later GPU promises to have
    said = "this GPU is cuda:sm_{}{}, which is no target; kernels are built for cuda:sm_80".format(*capability)
    with pytest.warns(UserWarning, match=said):
        assert devices.cuda_target.__wrapped__(capability) == "cuda:sm_80"


def test_an_old_gpu_is_refused():
    with pytest.raises(ef.UnsupportedError, match="this GPU is cuda:sm_75, older than any"):
        devices.cuda_target((7, 5))


def test_the_second_emitter_has_the_capability_of_the_first():
    assert devices.capability_of("cuda:sm_90+tvm") == (9, 0)
