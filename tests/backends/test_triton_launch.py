"""The launch path against a driver of our own: what it is told, in which order and width, and what is refused, by name."""

from __future__ import annotations

import struct
import threading

import einfall as ef
import pytest
import torch
from einfall.backends.base import Artifact, Source
from einfall.backends.triton import build as builder
from einfall.backends.triton import driver as cuda
from einfall.backends.triton import launch
from einfall.backends.triton.build import Builds, Built
from einfall.backends.triton.resources import Resources
from einfall.backends.triton.signature import Memory, Parameter, Signature
from einfall.ir.errors import BindingError, BuildError, EinfallError, UnsupportedError
from einfall.schedules.target import load_target
from fake_cuda import FakeDevice, FakeDriver, build_library, on_device
from hypothesis import given, settings
from hypothesis import strategies as st

SIGNATURE = Signature(
    entry="weigh",
    inputs=(Memory("X", "bf16", (("b",), ("i",), ("j",))), Memory("W", "f32", (("j",),))),
    outputs=(Memory("Y", "f32", (("b",), ("i",))),),
    scalars=("scale", "shift"),
    parameters=(
        Parameter("x_ptr", "pointer", "X", "*bf16"),
        Parameter("w_ptr", "pointer", "W", "*fp32"),
        Parameter("y_ptr", "pointer", "Y", "*fp32"),
        Parameter("x_b", "stride", "X", "i32", 0),
        Parameter("x_i", "stride", "X", "i32", 1),
        Parameter("y_b", "stride", "Y", "i32", 0),
        Parameter("n_i", "extent", "i", "i32"),
        Parameter("n_j", "extent", "j", "i32"),
        Parameter("scale", "scalar", "scale", "fp32"),
        Parameter("shift", "scalar", "shift", "i32"),
    ),
    sizes=(),
    grid=(("b", 1), ("i", 16)),
    aligned=("x_ptr", "w_ptr", "x_i", "n_j"),
    warps=4,
)
FORMS = "QQQiiiiifi"
KERNEL = f'''"""A kernel written by hand."""
import triton
import triton.language as tl

SIGNATURE = {SIGNATURE.to_literal()!r}


@triton.jit
def weigh(x_ptr, w_ptr, y_ptr, x_b, x_i, y_b, n_i, n_j, scale, shift):
    pid = tl.program_id(0)
    i = pid % tl.cdiv(n_i, 16) * 16 + tl.arange(0, 16)
    b = pid // tl.cdiv(n_i, 16)
    j = tl.arange(0, 16)
    w = tl.load(w_ptr + j, mask=j < n_j, other=0)
    x = tl.load(x_ptr + b * x_b + i[:, None] * x_i + j[None, :], mask=(i[:, None] < n_i) & (j[None, :] < n_j), other=0)
    tl.store(y_ptr + b * y_b + i, tl.sum(x * w[None, :], 1) * scale + shift, mask=i < n_i)
'''
WIDTHS = {"i32": 4, "i64": 8, "fp32": 4}


def ptx(types, *, name="weigh", target="sm_90a", scratch=2, threads=128):
    """What a compiler would write for parameters of these types."""
    kinds = [f".u{8 * WIDTHS[t]}" if t.startswith("i") else ".f32" if t == "fp32" else ".u64 .ptr .global .align 1" for t in types]
    parameters = [f"\t.param {kind} {name}_param_{i}" for i, kind in enumerate([*kinds, *[".u64 .ptr .global .align 1"] * scratch])]
    text = ",\n".join(parameters)
    return f".version 8.7\n.target {target}\n.address_size 64\n.visible .entry {name}(\n{text}\n)\n.reqntid {threads}\n{{\n\tret;\n}}\n"


class Variants(Builds):
    """Builds that are made up, and remembered."""

    def __init__(self, source, **changes):
        super().__init__(source)
        self.asked, self.changes = [], changes

    def get(self, variant):
        self.asked.append(variant)
        if self.changes.get("refuses") and variant != self.signature.full():
            raise BuildError("Triton refused it")
        types = self.signature.types(variant)
        options = {k: self.changes[k] for k in ("target", "scratch", "threads", "name") if k in self.changes}
        shared = self.changes.get("shared", 4096)
        metadata = {"name": "weigh", "shared": shared, "num_warps": 4, "num_ctas": 1, **self.changes.get("metadata", {})}
        resources = Resources(168, 0, 0, shared, 4, 128)
        text = ptx([types[p.name] for p in self.signature.parameters], **options)
        return Built(variant, b"\x7fELF made up", text, "", metadata, resources, "3.7.1")


def source_for(target="cuda:sm_90", signature=SIGNATURE):
    return Source.make(KERNEL.replace(repr(SIGNATURE.to_literal()), repr(signature.to_literal())), "weigh", load_target(target))


def kernel(machine="cuda:sm_90", signature=SIGNATURE, **changes):
    """A launcher of made-up builds, and what they were asked for."""
    source = source_for(machine, signature)
    variants = Variants(source, **changes)
    return launch.load(Artifact(source, variants)), variants


def tensors(b=3, i=40, j=32, number=0):
    x = torch.randn(b, i, j).to(torch.bfloat16)
    return [on_device(t, number) for t in (x, torch.randn(j), torch.empty(b, i))]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return FakeDriver(build_library(tmp_path_factory.mktemp("fake_cuda")))


@pytest.fixture
def gpu(library, monkeypatch):
    """Two devices that record what they are told; the streams and the current device are the test's to choose."""
    library.reset()
    library.takes(*(struct.calcsize("=" + f) for f in FORMS), 8, 8)
    runtime = launch.Runtime(lambda: library.current, lambda n: library.streams[n], lambda size, n: on_device(torch.empty(size), n))
    monkeypatch.setattr(cuda, "LIBRARY", str(library.path))
    monkeypatch.setattr(launch, "torch_runtime", lambda: runtime)
    cuda.load_driver.cache_clear()
    yield library
    cuda.load_driver.cache_clear()


# -- what the driver is told ---------------------------------------------------------------------------------------------------------


def test_parameters_come_in_the_order_of_the_kernel_and_scratch_is_null(gpu):
    run, variants = kernel()
    x, w, y = tensors()
    run(x, w, y, 0.5, 7)
    (found,) = gpu.launches
    assert found.values(FORMS + "QQ") == (x.data_ptr(), w.data_ptr(), y.data_ptr(), 1280, 32, 40, 40, 32, 0.5, 7, 0, 0)
    assert (found.name, found.device, found.image) == ("weigh", 0, "cubin")
    assert found.grid == (3 * 3, 1, 1) and found.block == (128, 1, 1) and found.shared == 4096
    assert found.stream == gpu.streams[0]
    assert [v.name for v in variants.asked] == [SIGNATURE.full().name]


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_any_extents_and_strides_arrive_as_they_are(library, data):
    with pytest.MonkeyPatch.context() as patch:
        library.reset()
        library.takes(*(struct.calcsize("=" + f) for f in FORMS))
        patch.setattr(cuda, "LIBRARY", str(library.path))
        patch.setattr(launch, "torch_runtime", lambda: launch.Runtime(lambda: 0, lambda n: 5, lambda size, n: None))
        cuda.load_driver.cache_clear()
        run, variants = kernel(scratch=0)
        b, i, j = (data.draw(st.integers(1, n)) for n in (5, 70, 40))
        x_i = data.draw(st.integers(j, 64))
        x_b = data.draw(st.integers(i * x_i, 4096 + i * x_i))
        y_b = data.draw(st.integers(i, 200))
        skipped = data.draw(st.integers(0, 8))
        base = torch.empty(b * x_b + skipped, dtype=torch.bfloat16)
        x = on_device(base[skipped:].as_strided((b, i, j), (x_b, x_i, 1), skipped))
        w, y = on_device(torch.empty(j)), on_device(torch.empty(b * y_b).as_strided((b, i), (y_b, 1)))
        scale = data.draw(st.floats(width=32, allow_nan=False))
        shift = data.draw(st.integers(-(1 << 31), (1 << 31) - 1))
        for _ in range(2):
            run(x, w, y, scale, shift)
        first, second = library.launches
        assert first == second
        seen = first.values(FORMS)
        # the stride of an axis of one element means nothing
        strides = (x_b if b > 1 else 0, x_i if i > 1 else 0, y_b if b > 1 else 0)
        assert seen == (x.data_ptr(), w.data_ptr(), y.data_ptr(), *strides, i, j, scale, shift)
        assert first.grid == (b * -(-i // 16), 1, 1)
        values = {"x_ptr": x.data_ptr(), "w_ptr": w.data_ptr(), "x_i": strides[1], "n_j": j}
        assert [v.aligned for v in variants.asked] == [{name for name in SIGNATURE.aligned if values[name] % 16 == 0}]
    cuda.load_driver.cache_clear()


def test_far_tensors_have_strides_of_64_bits(gpu):
    gpu.takes(8, 8, 8, 8, 8, 8, 4, 4, 4, 4, 8, 8)
    run, variants = kernel()
    x, w, y = tensors(b=2)
    x.stride = lambda: (1 << 33, 32, 1)  # 32 GiB apart
    run(x, w, y, 1.0, 0)
    assert variants.asked[0].wide
    (found,) = gpu.launches
    assert found.values("QQQqqqiifiQQ")[3:6] == (1 << 33, 32, 40)


def test_the_same_shapes_are_worked_out_once(gpu):
    run, variants = kernel()
    x, w, y = tensors()
    for scale in (1.0, 2.0, 3.0):
        run(x, w, y, scale, 0)
    other = tensors()
    run(*other, 4.0, 0)
    assert [found.values(FORMS + "QQ")[8] for found in gpu.launches] == [1.0, 2.0, 3.0, 4.0]
    assert gpu.launches[3].values(FORMS + "QQ")[:3] == tuple(t.data_ptr() for t in other)
    assert len(variants.asked) == 1 and sum(line.startswith("function") for line in gpu.lines) == 1
    run(*tensors(i=41), 1.0, 0)
    assert gpu.launches[-1].values(FORMS + "QQ")[6] == 41
    assert sum(line.startswith("function") for line in gpu.lines) == 1, "another extent needs no other build"


def test_nothing_to_do_is_not_launched(gpu):
    run, variants = kernel()
    run(*tensors(b=0), 1.0, 0)
    assert gpu.launches == [] and variants.asked == []


def test_a_tensor_of_another_alignment_has_a_build_of_its_own(gpu):
    run, variants = kernel()
    x, w, y = tensors()
    shifted = on_device(torch.empty(33)[1:])
    run(x, w, y, 1.0, 0)
    run(x, shifted, y, 1.0, 0)
    run(x, w, on_device(torch.empty(121)[1:].view(3, 40)), 1.0, 0)  # Y is not declared aligned
    run(shifted_x := on_device(torch.empty(3 * 40 * 32 + 1, dtype=torch.bfloat16)[1:].view(3, 40, 32)), w, y, 1.0, 0)
    assert [v.aligned for v in variants.asked] == [{"x_ptr", "w_ptr", "x_i", "n_j"}, {"x_ptr", "x_i", "n_j"}, {"w_ptr", "x_i", "n_j"}]
    assert gpu.launches.pop().values(FORMS + "QQ")[0] == shifted_x.data_ptr()
    assert [found.values(FORMS + "QQ")[1] for found in gpu.launches] == [
        w.data_ptr(), shifted.data_ptr(), w.data_ptr(), w.data_ptr()
    ]  # fmt: skip


def test_streams_and_devices_are_those_of_pytorch(gpu):
    run, _ = kernel()
    run(*tensors(), 1.0, 0)
    gpu.streams[0] = 0xDEADBEEF0000
    run(*tensors(), 1.0, 0)
    run(*tensors(number=1), 1.0, 0)  # cuda:0 stays the current device
    assert [(found.device, found.stream) for found in gpu.launches] == [(0, 0x700000001000), (0, 0xDEADBEEF0000), (1, gpu.streams[1])]
    assert gpu.library.fake_depth() == 1, "the context of the other device is left again"


def test_much_shared_memory_is_asked_for(gpu):
    run, _ = kernel(shared=200_000)
    run(*tensors(), 1.0, 0)
    assert gpu.launches[0].shared == gpu.launches[0].allowed == 200_000
    few, _ = kernel(shared=40_000)
    few(*tensors(), 1.0, 0)
    assert gpu.launches[1].allowed == 49152
    gpu.device(optin=101376)
    with pytest.raises(UnsupportedError, match="weigh needs 200016 bytes of shared memory, and a block of this GPU has 101376"):
        kernel(shared=200_000)[0](*tensors(), 1.0, 0)


def test_persistent_kernels_have_as_many_programs_as_run_at_once(gpu):
    signature = Signature.from_literal({**SIGNATURE.to_literal(), "persistent": True})
    gpu.device(cores=4, blocks=2)
    run, _ = kernel(signature=signature)
    run(*tensors(), 1.0, 0)
    run(*tensors(i=16), 1.0, 0)
    assert [found.grid[0] for found in gpu.launches] == [8, 3]


def test_scratch_memory_is_for_every_program(gpu, monkeypatch):
    asked = []
    run, _ = kernel(metadata={"global_scratch_size": 128})
    runtime = launch.torch_runtime()
    plan_memory = on_device(torch.empty(9 * 128, dtype=torch.uint8))

    def allocate(size, number):
        asked.append((size, number))
        return plan_memory

    monkeypatch.setattr(launch, "torch_runtime", lambda: launch.Runtime(runtime.current_device, runtime.current_stream, allocate))
    run(*tensors(), 1.0, 0)
    assert asked == [(9 * 128, 0)]
    assert gpu.launches[0].values(FORMS + "QQ")[10:] == (plan_memory.data_ptr(), 0)


@pytest.mark.parametrize("scratch", [0, 1, 2])
def test_as_many_scratch_pointers_are_passed_as_the_binary_takes(gpu, scratch):
    gpu.takes(*(struct.calcsize("=" + f) for f in FORMS), *[8] * scratch)
    run, _ = kernel(scratch=scratch)
    run(*tensors(), 1.5, 3)
    assert gpu.launches[0].values(FORMS + "Q" * scratch)[8:] == (1.5, 3, *[0] * scratch)


def test_the_threads_of_a_block_are_those_of_the_binary(gpu):
    run, _ = kernel(threads=384)
    run(*tensors(), 1.0, 0)
    assert gpu.launches[0].block == (384, 1, 1)


def test_threads_that_launch_at_once_do_not_mix_their_arguments(gpu):
    run, _ = kernel()
    sets = [tensors() for _ in range(8)]

    def work(k):
        for _ in range(50):
            run(*sets[k], float(k), k)

    threads = [threading.Thread(target=work, args=(k,)) for k in range(len(sets))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gpu.launches) == 400
    for found in gpu.launches:
        values = found.values(FORMS + "QQ")
        k = values[9]
        assert values[8] == k and values[:3] == tuple(t.data_ptr() for t in sets[k])


def test_a_kernel_that_triton_compiled_takes_what_its_signature_says(gpu):
    source = source_for()
    artifact = builder.build(source)
    full = artifact.module.full
    entry = launch.Entry.of(full.assembly, full.name, full.warps)
    assert entry.parameters[:10] == (8, 8, 8, 4, 4, 4, 4, 4, 4, 4) and set(entry.parameters[10:]) <= {8}
    assert entry.threads == 128 and entry.capability == (9, 0) and entry.exact
    gpu.takes(*entry.parameters)
    x, w, y = tensors()
    launch.load(artifact)(x, w, y, 0.25, 2)
    assert gpu.launches[0].values(FORMS + "Q" * (len(entry.parameters) - 10))[:10] == (
        x.data_ptr(), w.data_ptr(), y.data_ptr(), 1280, 32, 40, 40, 32, 0.25, 2,
    )  # fmt: skip
    assert gpu.launches[0].shared == full.shared


# -- what is loaded ------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "code", "capability", "image"),
    [("cuda:sm_80", "sm_80", (8, 0), "cubin"), ("cuda:sm_80", "sm_80", (8, 9), "cubin"), ("cuda:sm_80", "sm_80", (12, 0), "ptx")],
)
def test_another_generation_is_given_the_ptx(gpu, target, code, capability, image):
    gpu.device(capability=capability)
    run, _ = kernel(target, target=code)
    run(*tensors(), 1.0, 0)
    assert gpu.launches[0].image == image


@pytest.mark.parametrize(("code", "capability"), [("sm_90a", (10, 0)), ("sm_90a", (8, 0)), ("sm_100a", (10, 3)), ("sm_80", (7, 5))])
def test_code_for_another_gpu_is_refused(gpu, code, capability):
    gpu.device(capability=capability)
    built = code.rstrip("a")
    with pytest.raises(UnsupportedError, match=f"weigh was built for {built}, and this GPU is sm_{capability[0]}{capability[1]}"):
        kernel(target=code)[0](*tensors(), 1.0, 0)


# -- what goes wrong -----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("call", "code", "kind", "text"),
    [
        ("cuModuleLoadData", 2, EinfallError, "cuModuleLoadData failed: CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuModuleLoadData", 200, BuildError, "CUDA_ERROR_INVALID_IMAGE"),
        ("cuModuleLoadData", 209, BuildError, "CUDA_ERROR_NO_BINARY_FOR_GPU"),
        ("cuModuleLoadData", 900, EinfallError, "before a graph is captured"),
        ("cuModuleGetFunction", 500, EinfallError, "CUDA_ERROR_NOT_FOUND"),
        ("cuLaunchKernel", 2, EinfallError, "the launch of weigh failed: CUDA_ERROR_OUT_OF_MEMORY"),
        ("cuLaunchKernel", 701, UnsupportedError, "CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"),
        ("cuLaunchKernel", 700, EinfallError, "an earlier kernel of this process failed"),
        ("cuLaunchKernel", 12345, EinfallError, "CUDA error 12345"),
        ("cuDevicePrimaryCtxRetain", 2, EinfallError, "cuDevicePrimaryCtxRetain failed: CUDA_ERROR_OUT_OF_MEMORY"),
    ],
)
def test_errors_of_the_driver_have_their_names(gpu, call, code, kind, text):
    run, _ = kernel()
    gpu.fail(call, code)
    with pytest.raises(kind, match=text):
        run(*tensors(), 1.0, 0)
    gpu.fail("", 0)
    run(*tensors(), 1.0, 0)
    assert len(gpu.launches) == 1, "what failed for a while works afterwards"


def test_a_missing_driver_and_a_missing_gpu_are_one_sentence(gpu, monkeypatch):
    gpu.device(count=0)
    with pytest.raises(UnsupportedError, match=r"^the CUDA driver finds no GPU \(CUDA_ERROR_NO_DEVICE\)\n  try: nvidia-smi"):
        kernel()[0](*tensors(), 1.0, 0)
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda_absent.so.1")
    with pytest.raises(UnsupportedError, match=r"^this machine has no CUDA driver: libcuda_absent.so.1 cannot be loaded\n  try: install"):
        kernel()[0](*tensors(), 1.0, 0)


def test_a_pytorch_without_cuda_is_named():
    if torch.version.cuda is not None:
        pytest.skip("this PyTorch has CUDA")
    with pytest.raises(UnsupportedError, match="built without CUDA"):
        launch.torch_runtime()


def test_amd_kernels_are_only_built():
    source = source_for("hip:gfx942")
    with pytest.raises(UnsupportedError, match="kernels for hip:gfx942 are built ahead of time only"):
        launch.load(Artifact(source, Variants(source)))


def test_tensors_elsewhere_are_refused(gpu):
    run, _ = kernel()
    x, w, y = tensors()
    with pytest.raises(BindingError, match="weigh takes tensors of one CUDA device: X on cuda:0, W on cuda:1, Y on cuda:0"):
        run(x, on_device(w.inner, 1), y, 1.0, 0)
    with pytest.raises(BindingError, match="X on cpu"):
        run(x.inner, w.inner, y.inner, 1.0, 0)


def test_a_misaligned_tensor_whose_build_fails_is_refused_by_name(gpu):
    run, _ = kernel(refuses=True)
    x, _, y = tensors()
    refused = r"weigh is called with W at an address that is no multiple of 16.*Triton refused it"
    with pytest.raises(UnsupportedError, match=refused) as caught:
        run(x, on_device(torch.empty(33)[1:]), y, 1.0, 0)
    assert "W.clone()" in str(caught.value)
    with pytest.raises(UnsupportedError, match="extents or strides that are no multiple of 16"):
        run(*tensors(j=31), 1.0, 0)
    run(*tensors(), 1.0, 0)
    assert len(gpu.launches) == 1


def test_numbers_that_do_not_fit_are_refused(gpu):
    run, _ = kernel()
    with pytest.raises(BindingError, match=r"a scalar of weigh does not fit its type: scale = 1e\+300, shift = 0"):
        run(*tensors(), 1e300, 0)
    with pytest.raises(BindingError, match="shift = 4294967296"):
        run(*tensors(), 1.0, 1 << 32)
    with pytest.raises(BindingError, match="takes 2 scalars, found 1"):
        run(*tensors(), 1.0)


def test_a_binary_of_another_kernel_is_refused(gpu):
    with pytest.raises(BuildError, match="takes 13 parameters, and its signature has 10"):
        kernel(scratch=3)[0](*tensors(), 1.0, 0)
    with pytest.raises(BuildError, match="the PTX of weigh has no such entry"):
        kernel(name="other")[0](*tensors(), 1.0, 0)
    with pytest.raises(UnsupportedError, match="num_ctas"):
        kernel(metadata={"num_ctas": 2})[0](*tensors(), 1.0, 0)


# -- the whole way -------------------------------------------------------------------------------------------------------------------


@ef.kernel
def weighted(X: "i j", W: "j", *, scale: float) -> "i":
    return (X * W).sum("j") * scale


def test_a_call_goes_from_the_cascade_to_the_driver(gpu, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    x, w = torch.randn(48, 64).to(torch.bfloat16), torch.randn(65).to(torch.bfloat16)
    with ef.configure(cache=tmp_path, database=None), FakeDevice():
        on_x, on_w = on_device(x), on_device(w[:64])
        executable = weighted.compile(on_x, on_w, scale=2.0)
        (part,) = executable.parts
        builds = part.restored().module
        entry = launch.Entry.of(builds.full.assembly, builds.full.name, builds.full.warps)
        gpu.takes(*entry.parameters)
        kept = weighted(on_x, on_w, scale=2.0)
        found = weighted(on_x, on_w, scale=2.0)
        weighted(on_x, on_device(w[1:]), scale=2.0)
        out = on_device(torch.empty(48, dtype=torch.bfloat16))
        assert weighted(on_x, on_w, scale=3.0, out=out) is out
    assert found.device == torch.device("cuda", 0) and found.shape == (48,) and found.dtype == torch.bfloat16
    first, second, shifted, given = gpu.launches
    forms = ["Q" if p.kind == "pointer" else "f" if p.kind == "scalar" else "i" for p in builds.signature.parameters]
    forms += ["Q"] * (len(entry.parameters) - len(forms))
    values = dict(zip([p.name for p in builds.signature.parameters], second.values(forms), strict=False))
    places = {(p.kind, p.of, p.axis): values[p.name] for p in builds.signature.parameters}
    assert places["pointer", "X", 0] == x.data_ptr() and places["pointer", "W", 0] == w.data_ptr()
    assert places["stride", "X", 0] == 64 and places["extent", "i", 0] == 48 and places["scalar", "scale", 0] == 2.0
    grid = builds.signature.programs({"i": 48, "j": 64})
    assert all(found.grid == (grid, 1, 1) and found.block == (32 * builds.full.warps, 1, 1) for found in gpu.launches)
    output = builds.signature.outputs[0].name
    place = [(p.kind, p.of) for p in builds.signature.parameters].index(("pointer", output))
    assert second.values(forms)[place] == found.data_ptr() and given.values(forms)[place] == out.data_ptr()
    assert first.values(forms)[place] == kept.data_ptr() != second.values(forms)[place], "both are alive"
    assert shifted.values(forms)[[p.of for p in builds.signature.parameters].index("W")] == w.data_ptr() + 2
    assert len(builds.built) == 2, "a tensor at an odd address has a build of its own"
