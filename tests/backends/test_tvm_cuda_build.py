"""What is built of the second emitter's kernels: CUDA C everywhere, PTX and registers where nvcc is there; files; launches."""

from __future__ import annotations

import json
import zipfile

import einfall as ef
import programs as p
import pytest
import torch
from einfall.backends.triton.launch import Entry, Launcher, Places
from einfall.backends.tvm_cuda import TvmCuda, build
from einfall.backends.tvm_cuda.build import entry_of, nvcc
from einfall.backends.tvm_cuda.launch import load
from einfall.ir.errors import BuildError, UnsupportedError
from einfall.ir.expr import Cast, aligned
from einfall.ir.types import bf16, f32, i8
from einfall.schedules.schedule import Schedule
from einfall.schedules.target import load_target

needs_nvcc = pytest.mark.skipif(nvcc() is None, reason="there is no nvcc to make PTX of CUDA C")
PROGRAMS = {
    "rows": p.log_sum_exp(rows=1),
    "columns": p.log_sum_exp(rows=128, tile=32, lanes_in_rows=True),
    "two loops": p.normalise(tile=1024),
    "bf16": p.elementwise(aligned("A", "i", "j"), (p.tensor("A", "i j", bf16),), bf16, tile=2048),
    "codes": p.elementwise(Cast(aligned("A", "i", "j"), f32), (p.tensor("A", "i j", i8),), f32, tile=4096),
    "few rows": p.decode(dtype=bf16, rows=4, tile=64),
}


@pytest.fixture(scope="module")
def built():
    """The kernels for one target, built once."""
    backend, target = TvmCuda(), load_target("cuda:sm_90+tvm")
    return {name: backend.build(backend.emit(program, Schedule(), target)) for name, program in PROGRAMS.items()}


@pytest.fixture(scope="module")
def known(built):
    """What is known of them."""
    return {name: TvmCuda().facts(artifact) for name, artifact in built.items()}


def test_cuda_c_without_a_gpu(built):
    for name, artifact in built.items():
        cuda = artifact.module.cuda
        entry, parameters = entry_of(cuda)
        assert entry == f"{PROGRAMS[name].name}_kernel" and f"__launch_bounds__({32 * build.signature_of(artifact.source).warps})" in cuda
        assert set(parameters) <= {q.name for q in build.signature_of(artifact.source).parameters}, name
        assert "load_" in cuda.rpartition(entry)[2], name


@needs_nvcc
def test_vectors_of_16_bytes_and_no_spills(known):
    for name, facts in known.items():
        assert facts["vectors"], name
        most = "st.global 16" if name == "codes" else "ld.global 16"  # the vectors are those of what moves most bytes
        assert most in facts["instructions"], name
        assert facts["widest_load_bytes"] == (4 if name == "codes" else 16), name
        assert facts["spill_bytes"] == 0 and facts["stack_bytes"] == 0, name
        assert 0 < facts["registers"] <= 128, name
        assert facts["occupancy"]["warps"] >= 8, name


@needs_nvcc
def test_reductions_go_by_shuffles(known):
    counts = known["rows"]["instructions"]
    assert counts["shfl"] == 2 * 2 * 5 and counts["bar"] == 2 * 2 * 2  # two reductions in each of two bodies
    counts = known["two loops"]["instructions"]
    assert counts["shfl"] == 5 and counts["bar"] == 2  # one reduction, after the loop


@needs_nvcc
@pytest.mark.parametrize("target", ["cuda:sm_80", "cuda:sm_100"])
def test_other_generations(target):
    backend = TvmCuda()
    artifact = backend.build(backend.emit(PROGRAMS["rows"], Schedule(), load_target(f"{target}+tvm")))
    assert f".target {target.partition(':')[2]}" in artifact.module.code.ptx
    assert backend.facts(artifact)["spill_bytes"] == 0


def test_without_nvcc_there_is_cuda_c_alone(built, monkeypatch):
    monkeypatch.setattr(build, "nvcc", lambda: None)
    backend = TvmCuda()
    artifact = backend.build(built["rows"].source)
    assert artifact.module.code is None and "log_sum_exp_kernel" in artifact.module.cuda
    assert set(backend.facts(artifact)) == {"vectors"}
    with pytest.raises(UnsupportedError, match=r"(?s)CUDA C alone.*nvcc.*try: install the CUDA toolkit"):
        backend.load(artifact)
    with pytest.raises(BuildError, match="no nvcc"):
        build.compile_cuda(artifact.module.cuda, artifact.source)


def test_what_nvcc_refuses_is_said(built):
    if nvcc() is None:
        pytest.skip("there is no nvcc to refuse anything")
    with pytest.raises(BuildError, match=r"(?s)nvcc refused the kernel: .*error"):
        build.compile_cuda("__global__ void k() { nonsense; }", built["rows"].source)


def test_what_tvm_refuses_is_said(built):
    source = built["rows"].source
    wrong = type(source).make(source.text.replace("T.handle", "T.nothing"), source.entry, source.target)
    with pytest.raises(BuildError, match="TVM refused the kernel"):
        TvmCuda().build(wrong)


def test_files(built, tmp_path):
    backend = TvmCuda()
    for name, artifact in built.items():
        path = tmp_path / name / "kernel.zip"
        backend.save(artifact, path)
        assert backend.restore(path, artifact.source).module == artifact.module
        endings = {"cu"} if artifact.module.code is None else {"cu", "ptx", "cubin"}
        assert set(backend.listings(path, artifact.source)) == endings
        assert backend.listings(path, artifact.source)["cu"].decode() == artifact.module.cuda


def rewritten(path, change):
    """The file with its entries changed."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def edited(key, value):
    def change(files):
        files["build.json"] = json.dumps({**json.loads(files["build.json"]), key: value}).encode()

    return change


@pytest.mark.parametrize(
    "change",
    [
        lambda files: files.update(cu=b"// other code"),
        lambda files: files.pop("cu"),
        lambda files: files.update({"build.json": b"[1, 2"}),
        lambda files: files.update({"build.json": b"[]"}),
        edited("format", 99),
        edited("target", "cuda:sm_80+tvm"),
        edited("source", "0" * 16),
        edited("files", {"../../etc/passwd": "00"}),
    ],
)
def test_damaged_files_are_refused(built, tmp_path, change):
    path = tmp_path / "kernel.zip"
    TvmCuda().save(built["rows"], path)
    rewritten(path, change)
    with pytest.raises(BuildError, match=r"(?s)cannot be read.*try: compile the kernel again"):
        TvmCuda().restore(path, built["rows"].source)


def test_a_file_that_is_no_zip(built, tmp_path):
    path = tmp_path / "kernel.zip"
    for data in (b"", b"PK\x03\x04 cut off", b"text"):
        path.write_bytes(data)
        with pytest.raises(BuildError, match="cannot be read"):
            TvmCuda().restore(path, built["rows"].source)


@needs_nvcc
def test_the_launcher_passes_what_the_ptx_takes(built):
    """Number and width of the parameters in the PTX are those that the launcher packs, in the order of the CUDA C."""
    for name, artifact in built.items():
        launcher = load(artifact)
        assert isinstance(launcher, Launcher)
        signature, (one,) = launcher.signature, (launcher._builds,)
        assert tuple(q.name for q in signature.parameters) == entry_of(artifact.module.cuda)[1], name
        entry = Entry.of(one.assembly, one.name, one.warps)
        assert entry.threads == 32 * signature.warps
        fixed = {q.name: 7 for q in signature.parameters if q.kind in ("stride", "extent")}
        places = Places.of(signature, signature.full(), entry, fixed)
        assert len(places.slots) == len(entry.parameters) == len(signature.parameters)
        assert one.get(signature.full()) is one and one.shared == 0


@needs_nvcc
def test_a_tensor_on_the_wrong_device_is_refused_by_name(built):
    from einfall.ir.errors import BindingError

    with pytest.raises(BindingError, match="X on cpu"):
        load(built["rows"])(torch.zeros(2, 8), torch.zeros(2))


def test_from_a_function_to_a_folder_and_back(tmp_path):
    @ef.kernel
    def spread(X: "m p") -> "m":
        return ef.var(X, "p")

    with ef.configure(cache=tmp_path / "cache", database=None):
        exe = spread.compile(dims={"m": 8, "p": 4096}, target="cuda:sm_90+tvm")
        assert "T.launch_thread" in exe.source and exe.target.name == "cuda:sm_90+tvm"
        exe.save(tmp_path / "saved")
        assert {"0_spread.py", "0_spread.cu"} <= {f.name for f in (tmp_path / "saved").iterdir()}
        again = ef.load(tmp_path / "saved")
        assert again.source == exe.source
        with pytest.raises(UnsupportedError, match=r"X lies on cpu; this executable was built for cuda:sm_90\+tvm"):
            again(torch.zeros(8, 4096))
        report = spread.check(dims={"m": 3}, target="cuda:sm_90+tvm", trials=2)
        assert report.ran == "interpreter" and all(not trial.failure for trial in report.trials)
        assert spread.explain(dims={"m": 8, "p": 4096}, target="cuda:sm_90+tvm", show=False).to_dict()["kernels"]
