"""Triton kernels compiled ahead of time: what is built, what is known of it, what is refused, and what is kept. No GPU is needed."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import cache
from pathlib import Path

import einfall as ef
import pytest
from cascades import CASES, traced
from einfall.backends.base import Source
from einfall.backends.triton import TritonCuda
from einfall.backends.triton import process as process_module
from einfall.backends.triton.build import INDEX, build, kernel_file, listings, restore, save
from einfall.backends.triton.emitted import check_emitted
from einfall.backends.triton.facts import facts
from einfall.backends.triton.listings import (
    Usage,
    program_hash,
    read_amd_usage,
    read_amdgcn,
    read_assembler_log,
    read_ptx,
    read_resource_usage,
    read_sass,
    widest_load,
)  # fmt: skip
from einfall.backends.triton.process import WORKERS, Workers
from einfall.backends.triton.resources import Resources, check_resources, occupancy
from einfall.backends.triton.signature import Memory, Parameter, Signature, Variant, signature_of
from einfall.backends.triton.tools import tool
from einfall.compiler.driver import compile_cascade
from einfall.ir.errors import BuildError, EinfallError, ScheduleError
from einfall.schedules.schedule import KernelOptions
from einfall.schedules.target import load_target

TARGETS = ("cuda:sm_80", "cuda:sm_90", "cuda:sm_100", "hip:gfx942")
MATRIX = {"cuda:sm_80": "mma.sync.", "cuda:sm_90": "wgmma.mma_async.", "cuda:sm_100": "tcgen05.mma.", "hip:gfx942": "v_mfma_"}
MATMUL = """
    m0 = tl.program_id(0) // tl.cdiv(n_n, B_n) * B_m
    n0 = tl.program_id(0) % tl.cdiv(n_n, B_n) * B_n
    a_m = m0 + tl.arange(0, B_m)
    a_n = n0 + tl.arange(0, B_n)
    a_k = tl.arange(0, B_k)
    z = tl.full([B_m, B_n], 0.0, tl.float32)
    for k0 in tl.range(0, n_k, B_k, num_stages=STAGES):
        x = tl.load(X + a_m[:, None] * X_m + (k0 + a_k)[None, :], mask=(a_m < n_m)[:, None], other=0)
        y = tl.load(Y + (k0 + a_k)[:, None] * Y_k + a_n[None, :])
        z = tl.dot(x, y, z)
    tl.store(Z + a_m[:, None] * Z_m + a_n[None, :], z.to(tl.bfloat16), mask=(a_m < n_m)[:, None])
"""


def matmul(
    target: str, *, tiles: tuple[int, int, int] = (64, 64, 32), warps: int = 4, stages: int = 3, body: str = MATMUL, name: str = "matmul"
) -> Source:
    """Z[m, n] = sum(k) X[m, k] Y[k, n] as the emitter writes it."""
    pointers = [Parameter(t, "pointer", t, "*bf16") for t in "XYZ"]
    strides = [Parameter(f"{t}_{rank}", "stride", t, "i32") for t, rank in zip("XYZ", "mkm", strict=True)]
    extents = [Parameter(f"n_{rank}", "extent", rank, "i32") for rank in "mnk"]
    memories = [Memory(t, "bf16", ((a,), (b,))) for t, a, b in (("X", "m", "k"), ("Y", "k", "n"), ("Z", "m", "n"))]
    signature = Signature(
        name, tuple(memories[:2]), tuple(memories[2:]), (), (*pointers, *strides, *extents), (), (("m", tiles[0]), ("n", tiles[1])),
        tuple(p.name for p in (*pointers, *strides)), warps, stages,
    )  # fmt: skip
    sizes = "".join(f"B_{rank} = tl.constexpr({size})\n" for rank, size in zip("mnk", tiles, strict=True))
    text = (
        f'"""A product."""\n\nimport triton\nimport triton.language as tl\n\nSIGNATURE = {signature.to_literal()!r}\n'
        f"STAGES = tl.constexpr({stages})\n{sizes}\n\n"
        f"@triton.jit\ndef {name}({', '.join(p.name for p in signature.parameters)}):\n{body.lstrip(chr(10))}"
    )
    return Source.make(text, name, load_target(target))


@cache
def built(target: str):
    """The product for a target, built once."""
    return build(matmul(target))


def tell(option: str, code: bytes, folder: Path) -> str:
    """What the vendor's tool says of a binary."""
    (folder / "kernel.cubin").write_bytes(code)
    return subprocess.run([str(tool("cuobjdump")), option, str(folder / "kernel.cubin")], capture_output=True, text=True, check=True).stdout


# -- what is built ----------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("target", TARGETS)
def test_a_kernel_is_built_for_every_target(target, tmp_path):
    full = built(target).module.full
    known = facts(built(target))
    assert full.code.startswith(b"\x7fELF") and full.name == "matmul" and known["triton"]
    assert len(re.findall(rf"^\s.*{re.escape(MATRIX[target])}", full.assembly, re.M)) > 0
    assert all(other not in full.assembly for name, other in MATRIX.items() if name != target)
    assert known["shared_bytes"] == full.shared >= 2 * 64 * 32 * 2
    assert known["warps"] == 4 and known["threads"] == 4 * load_target(target).limit("warp")
    if target.startswith("cuda"):
        registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", tell("-res-usage", full.code, tmp_path)).groups()
        assert (known["registers"], known["stack_bytes"]) == (int(registers), int(stack))
    else:
        assert known["registers"] == int(re.search(r"; TotalNumVgprs: (\d+)", full.assembly)[1])
        assert known["stack_bytes"] == int(re.search(r"; ScratchSize: (\d+)", full.assembly)[1])


@pytest.mark.parametrize("target", TARGETS)
def test_instructions_are_those_that_a_search_finds(target):
    assembly, counts = built(target).module.full.assembly, facts(built(target))["instructions"]

    def lines(pattern: str) -> int:
        return sum(bool(re.search(pattern, line)) for line in assembly.splitlines() if not line.lstrip().startswith(("//", ";")))

    if target == "hip:gfx942":
        assert counts["mfma"] == lines(r"\tv_mfma") and counts["load 16"] == lines(r"\t(global|buffer)_load_dwordx4 ")
        assert counts["shared load"] == lines(r"\tds_read")
        return
    name = {"cuda:sm_80": "mma", "cuda:sm_90": "wgmma", "cuda:sm_100": "tcgen05.mma"}[target]
    assert counts[name] == lines(re.escape(MATRIX[target]))
    assert counts["cp.async 16"] == lines(r"cp\.async\.c[ag]\.shared\.global.*, 0x10") > 0
    assert counts["st.global 16"] == lines(r"st\.global\.v4\.b32")
    assert counts["bar"] == lines(r"\bbar\.(sync|warp)|\bbarrier\.")
    assert counts["ldmatrix"] == lines(r"\bldmatrix\.")


PTX = """
//
.version 8.7
.target sm_100a
.visible .entry kernel(
\t.param .u64 .ptr .global .align 1 kernel_param_0
)
.reqntid 256
{
\t.reg .b32 \t%r<9>;
$L__BB0_1:                              // ld.global.v4.b32 in a comment
\t// begin inline asm
\tmov.u32 %r1, 0x0;
\t@%p1 ld.global.v4.b32 { %r1, %r2, %r3, %r4 }, [ %rd1 + 0 ];
\t// end inline asm
\t@%p2 ld.global.L1::evict_first.L2::cache_hint.v8.b32 { %r1, %r2, %r3, %r4, %r5, %r6, %r7, %r8 }, [ %rd1 + 0 ], %rd2;
\tld.global.b16 \t%rs1, [%rd3];
\t@%p1 st.global.v2.b16 [ %rd1 + 0 ], { %rs1, %rs2 };
\tcp.async.cg.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x10, %r2;
\tcp.async.ca.shared.global [ %r1 + 0 ], [ %rd1 + 0 ], 0x4;
\tcp.async.commit_group;
\t@%p3 cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%r1], [%rd1, {%r2, %r3}], [%r4];
\twgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 {%f1}, %rd1, %rd2, p, 1, 1, 0, 1;
\t{ .reg .pred p; setp.ne.b32 p, %r1, 0; tcgen05.mma.cta_group::1.kind::f16 [ %r1 + 0 ], %rd1, %rd2, %r3, p; }
\tmma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 { %f1 }, { %r1 }, { %r2 }, { %f1 };
\tex2.approx.ftz.f32 \t%f1, %f2;
\tfma.rn.f32 \t%f1, %f2, %f3, %f4;
\tfma.rn.f32x2 \t%rd1, %rd2, %rd3, %rd4;
\tmad.lo.s32 \t%r1, %r2, %r3, %r4;
\tmul.lo.s32 \t%r1, %r2, %r3;
\tmul.f32 \t%f1, %f2, %f3;
\tshfl.sync.bfly.b32 \t%r1, %r2, 16, 31, -1;
\tbar.sync \t0;
\tret;
}
"""


def test_the_forms_of_instructions():
    assert read_ptx(PTX) == {
        "ld.global 16": 1, "ld.global 32": 1, "ld.global 2": 1, "st.global 4": 1, "cp.async 16": 1, "cp.async 4": 1,
        "cp.async.bulk.tensor": 1, "wgmma": 1, "tcgen05.mma": 1, "mma": 1, "ex2": 1, "fma.float": 2, "mul.float": 1, "shfl": 1, "bar": 1,
    }  # fmt: skip
    assert widest_load(read_ptx(PTX)) == 32
    sass = """
        /*0070*/                   LDG.E.128.CONSTANT R4, desc[UR6][R2.64] ;      /* 0x0000000602047981 */
                                                                                  /* 0x000ea8000c1e9d00 */
        /*0080*/              @!P0 STG.E.64 desc[UR6][R8.64], R4 ;                /* 0x0000000408008986 */
        /*0090*/             @!UP0 MUFU.EX2 R5, R4 ;                              /* 0x0000000400057308 */
        /*00a0*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;           /* 0x0000000c0804723c */
        /*00b0*/                   NOP;                                           /* 0x0000000000007918 */
    """
    assert read_sass(sass) == {"LDG 16": 1, "STG 8": 1, "MUFU EX2": 1, "HMMA": 1}
    amd = "\tv_mfma_f32_32x32x8_bf16 a[0:15], v[4:5], v[6:7], a[0:15]\n\tbuffer_load_dwordx4 v[0:3], v4, s[0:3], 0 offen\n"
    amd += (
        "\tglobal_load_ushort v1, v[2:3], off\n\tds_bpermute_b32 v1, v2, v3\n\tv_exp_f32_e32 v1, v2\n\tscratch_store_dword off, v1, s32\n"
    )
    assert read_amdgcn(amd) == {"mfma": 1, "load 16": 1, "load 2": 1, "shuffle": 1, "exp": 1, "scratch store": 1}
    log = "ptxas info    : Function properties for k\n    24 bytes stack frame, 20 bytes spill stores, 28 bytes spill loads\n"
    assert read_assembler_log(log + "ptxas info    : Used 255 registers, used 1 barriers\n") == Usage(255, 24, 48)
    assert read_assembler_log("") is None and read_resource_usage("") is None and read_amd_usage("") is None


def test_names_and_places_do_not_tell_programs_apart():
    text = """#blocked = #ttg.blocked<{sizePerThread = [1]}>
#loc = loc("/a (b)/kernel.py":3:0)
module attributes {"ttg.num-warps" = 4 : i32} {
  tt.func public @k(%X: !tt.ptr<f32> {tt.divisibility = 16 : i32} loc("X"(#loc))) attributes {noinline = false} {
    %x = tt.load %X : !tt.ptr<f32> loc(#loc1)
    tt.return loc(callsite(#loc2 at "f(\"x\")"))
  } loc(#loc)
} loc(#loc)
#loc1 = loc("x"(#loc2))
"""
    other = text.replace("%x ", "%other ").replace("/a (b)/kernel.py", "/c.py").replace("#loc1)", '"y"(#loc9))')
    assert program_hash(text) == program_hash(other)
    for one, another in (("= 4 : i32} {", "= 8 : i32} {"), ("divisibility = 16", "divisibility = 8"), ("Thread = [1]", "Thread = [2]")):
        assert one in text and program_hash(text) != program_hash(text.replace(one, another))


def test_machine_code_is_counted(tmp_path):
    sass = facts(built("cuda:sm_80"))["sass"]
    printed = tell("-sass", built("cuda:sm_80").module.full.code, tmp_path)
    assert sass["HMMA"] == len(re.findall(r"\bHMMA\.", printed)) > 0
    assert sass["LDGSTS 16"] == len(re.findall(r"\bLDGSTS\.[\w.]*128", printed))
    assert sass["STG 16"] == len(re.findall(r"\bSTG\.[\w.]*128", printed))
    assert facts(built("cuda:sm_90"))["sass"]["HGMMA"] == facts(built("cuda:sm_90"))["instructions"]["wgmma"]


def test_tensors_without_alignment_have_a_build_of_their_own():
    builds = built("cuda:sm_80").module
    plain = builds.get(Variant(frozenset()))
    wide = builds.get(Variant(frozenset(signature_of(builds.source).aligned), wide=True))
    assert builds.get(Variant(frozenset())) is plain and len(builds.built) == 3
    assert facts(built("cuda:sm_80"))["widest_load_bytes"] == 16
    assert "cp.async.cg" in builds.full.assembly and "cp.async.cg" not in plain.assembly  # 16 bytes at once, or element by element
    assert re.search(r"\.param \.u64 matmul_param_3", wide.assembly) and re.search(r"\.param \.u32 matmul_param_3", plain.assembly)


def test_a_stack_is_told_and_allowed(tmp_path):
    crowded = build(matmul("cuda:sm_80", tiles=(128, 128, 16), warps=2, stages=1))
    known, printed = facts(crowded), tell("-res-usage", crowded.module.full.code, tmp_path)
    assert (known["registers"], known["stack_bytes"]) == tuple(int(n) for n in re.search(r"REG:(\d+) STACK:(\d+)", printed).groups())
    assert known["stack_bytes"] > 0 and known["spill_bytes"] > 0
    assert any(known["sass"].get(f"STL {size}", 0) > 0 for size in (4, 8, 16))


def test_equal_programs_have_one_name():
    one = built("cuda:sm_80").module.full
    renamed = matmul(
        "cuda:sm_80",
        body="    # a comment moves every line\n\n"
        + MATMUL.lstrip("\n").replace("z =", "total =").replace("z.to", "total.to").replace(" z)", " total)"),
    )
    assert one.program == build(renamed).module.full.program
    assert one.program != build(matmul("cuda:sm_80", tiles=(64, 32, 32))).module.full.program
    assert one.program != built("cuda:sm_90").module.full.program


# -- what is refused --------------------------------------------------------------------------------------------------------------------


def test_shared_memory_beyond_the_target_is_refused_by_number():
    with pytest.raises(ScheduleError) as caught:
        build(matmul("cuda:sm_80", tiles=(128, 128, 64), warps=8, stages=7))
    said = str(caught.value)
    taken = int(re.search(r"takes (\d+) bytes of shared memory", said)[1])
    assert "kernel matmul" in said and "cuda:sm_80 has 166912" in said and "m (128), n (128)" in said and "fewer stages than 7" in said
    assert 166912 < taken <= 7 * (128 + 128) * 64 * 2


SMALL = Resources(registers=64, stack_bytes=0, spill_bytes=0, shared_bytes=1024, warps=4, threads=128)


@pytest.mark.parametrize(
    ("target", "change", "text"),
    [
        ("cuda:sm_80", {"shared_bytes": 166913}, "takes 166913 bytes of shared memory, and a block of cuda:sm_80 has 166912"),
        ("cuda:sm_90", {"shared_bytes": 232449}, "takes 232449 bytes of shared memory, and a block of cuda:sm_90 has 232448"),
        ("hip:gfx942", {"shared_bytes": 65537}, "takes 65537 bytes of shared memory, and a block of hip:gfx942 has 65536"),
        ("cuda:sm_90", {"warps": 64, "threads": 2048}, "takes 2048 threads, and a block of cuda:sm_90 has 1024"),
        ("cuda:sm_90", {"registers": 256}, "takes 256 registers a thread, and a block of cuda:sm_90 has 255"),
        (
            "cuda:sm_90",
            {"registers": 168, "warps": 16, "threads": 512},
            "takes 16 warps of 168 registers, and a block of cuda:sm_90 has 12",
        ),
        ("cuda:sm_100", {"tensor_columns": 513}, "takes 513 columns of tensor memory, and a block of cuda:sm_100 has 512"),
    ],
)
def test_what_a_block_cannot_have_is_refused(target, change, text):
    signature = signature_of(matmul(target))
    check_resources(SMALL, signature, load_target(target))
    check_resources(replace(SMALL, stack_bytes=4096, spill_bytes=9000), signature, load_target(target))
    with pytest.raises(ScheduleError, match=f"kernel matmul {re.escape(text)}"):
        check_resources(replace(SMALL, **change), signature, load_target(target))


def test_what_the_compiler_refuses_is_said_in_its_words():
    with pytest.raises(BuildError, match=r"(?s)refused the kernel matmul for cuda:sm_80: CompilationError.*nonsense"):
        build(matmul("cuda:sm_80", body="    tl.store(X, tl.nonsense(X))\n"))
    with pytest.raises(BuildError, match=r"(?s)refused the kernel matmul for cuda:sm_80.*K >= 16"):
        build(matmul("cuda:sm_80", tiles=(64, 64, 8)))
    with pytest.raises(BuildError, match=r"(?s)refused the kernel matmul for cuda:sm_80.*ptxas.*frobnicate"):
        asm = 'tl.inline_asm_elementwise("frobnicate $0, $1;", "=r,r", [n_m], dtype=tl.int32, is_pure=False, pack=1)'
        build(matmul("cuda:sm_80", body=f"    tl.store(X, {asm}.to(tl.bfloat16))\n"))
    assert build(matmul("cuda:sm_80", name="next")).module.full.name == "next"  # the process still serves


def test_a_process_that_dies_or_hangs_is_replaced(monkeypatch):
    monkeypatch.setenv("TRITON_INTERPRET", "1")  # a process started now must compile all the same
    unknown = replace(load_target("cuda:sm_90"), name="cuda:sm_101")  # LLVM has no such processor, and aborts
    with pytest.raises(BuildError, match=r"(?s)Triton ended \(killed by SIGABRT\) at matmul for cuda:sm_101: .*LLVM"):
        build(replace(matmul("cuda:sm_90"), target=unknown))
    with pytest.raises(BuildError, match=r"had not compiled matmul for cuda:sm_80 after 3 s and was stopped"):
        endless = "    for i in tl.static_range(0, 1000000000):\n        n_m += i * n_k\n    tl.store(X, n_m.to(tl.bfloat16))\n"
        build(matmul("cuda:sm_80", body=endless), seconds=3)
    assert build(matmul("cuda:sm_80", name="after")).module.full.name == "after"


def test_a_process_ends_with_the_one_that_started_it(tmp_path):
    code = """
import os, sys
from einfall.backends.triton.listings import (
    Usage, program_hash, read_amd_usage, read_amdgcn, read_assembler_log, read_ptx, read_resource_usage, read_sass, widest_load,
)  # fmt: skip
from einfall.backends.triton.process import Worker
worker = Worker()
print(worker.process.pid, worker.scratch, flush=True)
os._exit(0)  # as if it were killed
"""
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    end = time.monotonic() + 60
    while (Path(f"/proc/{said[0]}").exists() or Path(said[1]).exists()) and time.monotonic() < end:
        time.sleep(0.05)
    assert not Path(said[1]).exists()


def test_no_triton_is_one_sentence(monkeypatch):
    monkeypatch.setattr(process_module.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(BuildError, match="not installed") as caught:
        Workers().compile({"entry": "matmul", "target": ["cuda", 90, 32]})
    assert "pip install triton==3.7.1" in str(caught.value)


@pytest.mark.parametrize(
    "line",
    [
        "import os",
        "from os import system",
        "x = __import__('os')",
        "print(1)",
        "@triton.jit\ndef f(x=print(1)):\n    pass",
        "@triton.jit\ndef f(x: print(1)):\n    pass",
        "@print\ndef f():\n    pass",
        "def f():\n    pass",
        "class C:\n    pass",
        "@triton.jit\ndef f(x):\n    tl.core.builtins.open('x')",
        "@triton.jit\ndef f(x):\n    m = tl\n    m.core",
        "@triton.jit\ndef f(x):\n    x.__class__",
        "@triton.jit\ndef f(x):\n    getattr(tl, 'core')",
        "@triton.jit\ndef f(x):\n    import os",
        "@triton.jit\ndef f(x):\n    triton.runtime.jit.os.abort()",
        "if __name__ == '__main__':\n    print(1)",
        "def main():\n    pass\n\nmain()",
        "def broken(:",
    ],
)
def test_a_file_that_is_no_kernel_is_not_run(line):
    text = matmul("cuda:sm_80").text
    check_emitted(
        Source.make(
            text + '\n\ndef main():\n    print(1)\n\n\nif __name__ == "__main__":\n    main()\n', "matmul", load_target("cuda:sm_80")
        )
    )
    with pytest.raises(BuildError, match="no emitted kernel"):
        check_emitted(Source.make(f"{text}\n\n{line}\n", "matmul", load_target("cuda:sm_80")))


def test_threads_compile_at_once():
    names = ("one", "two", "three")
    with ThreadPoolExecutor(2) as threads:
        artifacts = list(threads.map(lambda name: build(matmul("hip:gfx942", name=name)), names))
    assert [a.module.full.name for a in artifacts] == list(names)


# -- a whole cascade --------------------------------------------------------------------------------------------------------------------


def test_a_default_schedule_is_made_smaller_until_there_is_room(tmp_path):
    case = next(c for c in CASES if c.name == "plain")
    whole = load_target("cuda:sm_80")
    little = replace(whole, limits=tuple((name, 8192 if name == "shared_memory" else n) for name, n in whole.limits))
    plain = compile_cascade(traced(case, ef.bf16), sizes=case.sizes, target=whole, cache=tmp_path)
    assert plain.facts["shared_bytes"] > 8192
    with pytest.raises(ScheduleError, match="and a block of cuda:sm_80 has 8192"):
        given = replace(plain.schedule, kernel=(("plain", KernelOptions(warps=4, stages=3)),))
        compile_cascade(traced(case, ef.bf16), sizes=case.sizes, target=little, schedule=given, cache=tmp_path)
    little = replace(little, limits=tuple((name, 4096 if name == "shared_memory" else n) for name, n in little.limits))
    fitting = compile_cascade(traced(case, ef.bf16), sizes=case.sizes, target=little, cache=tmp_path)
    assert fitting.facts["shared_bytes"] <= 4096 and fitting.schedule != plain.schedule
    again = compile_cascade(traced(case, ef.bf16), sizes=case.sizes, target=little, cache=tmp_path)
    assert again.schedule == fitting.schedule and again.facts == fitting.facts


# -- what is kept -----------------------------------------------------------------------------------------------------------------------


def test_a_saved_kernel_is_the_same(tmp_path, monkeypatch):
    artifact, path = built("cuda:sm_80"), tmp_path / "deep" / "kernel.zip"
    artifact.module.get(Variant(frozenset()))
    save(artifact, path)
    save(artifact, tmp_path / "again.zip")
    assert path.read_bytes() == (tmp_path / "again.zip").read_bytes()
    monkeypatch.setattr(WORKERS, "compile", None)  # nothing is compiled from here on
    again = restore(path, artifact.source)
    assert {b.variant: b for b in again.module.built} == {b.variant: b for b in artifact.module.built}
    assert facts(again) == facts(artifact)
    assert listings(again) == {"ptx": artifact.module.full.assembly.encode(), "cubin": artifact.module.full.code}
    assert TritonCuda().suffix == path.suffix
    assert str(Path.home()).encode() not in zipfile.ZipFile(path).read(INDEX)


def damaged(path: Path, change) -> None:
    """The zip written anew with its entries changed."""
    with zipfile.ZipFile(path) as archive:
        files = {name: archive.read(name) for name in archive.namelist()}
    change(files)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)


def index(change):
    """A change of what the index says."""

    def apply(files):
        data = json.loads(files[INDEX])
        change(data)
        files[INDEX] = json.dumps(data).encode()

    return apply


DAMAGES = {
    "no kernel": (lambda f: f.pop("0.cubin"), "lacks|no item"),
    "other code": (lambda f: f.update({"0.cubin": f["0.cubin"][:-1] + b"?"}), "0.cubin does not match its hash"),
    "no index": (lambda f: f.pop(INDEX), "lacks|no item"),
    "no JSON": (lambda f: f.update({INDEX: b"{"}), "cannot be loaded"),
    "a list": (lambda f: f.update({INDEX: b"[]"}), "cannot be loaded"),
    "format": (index(lambda d: d.update(format=99)), "its format is 99, not 1"),
    "target": (index(lambda d: d.update(target="cuda:sm_90")), "its target is 'cuda:sm_90', not 'cuda:sm_80'"),
    "source": (index(lambda d: d.update(source="0")), "its source is '0'"),
    "no builds": (index(lambda d: d.pop("builds")), "lacks 'builds'"),
    "name": (index(lambda d: d["builds"][0]["metadata"].update(name="a b")), "names no function"),
    "less": (index(lambda d: d["builds"][0]["resources"].update(shared_bytes=1)), "are not those of its metadata"),
    "negative": (index(lambda d: d["builds"][0]["resources"].update(registers=-1)), "registers is -1"),
    "text": (index(lambda d: d["builds"][0]["resources"].update(registers="12")), "registers is '12'"),
    "outside": (index(lambda d: d["builds"][0]["files"].update({"../x": "0"})), "lacks|no item"),
}


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_file_is_refused(name, tmp_path):
    change, text = DAMAGES[name]
    save(built("cuda:sm_80"), tmp_path / "kernel.zip")
    damaged(tmp_path / "kernel.zip", change)
    with pytest.raises(BuildError, match=text) as caught:
        restore(tmp_path / "kernel.zip", built("cuda:sm_80").source)
    assert "kernel.zip" in str(caught.value)


def test_a_file_cut_short_or_of_another_kind_is_refused(tmp_path):
    source = built("cuda:sm_80").source
    save(built("cuda:sm_80"), tmp_path / "kernel.zip")
    whole = (tmp_path / "kernel.zip").read_bytes()
    for data in (b"", b"not a zip", whole[:-30], whole[: len(whole) // 2], whole[:200] + b"????" + whole[204:]):
        (tmp_path / "kernel.zip").write_bytes(data)
        with pytest.raises(BuildError, match=r"kernel\.zip"):
            restore(tmp_path / "kernel.zip", source)
    with pytest.raises(BuildError, match=r"missing\.zip"):
        restore(tmp_path / "missing.zip", source)


def test_a_kernel_that_takes_too_much_is_not_restored(tmp_path):
    save(built("cuda:sm_80"), tmp_path / "kernel.zip")

    def more(data):
        data["builds"][0]["metadata"]["shared"] = data["builds"][0]["resources"]["shared_bytes"] = 1 << 20

    damaged(tmp_path / "kernel.zip", index(more))
    with pytest.raises(EinfallError, match="takes 1048576 bytes of shared memory"):
        restore(tmp_path / "kernel.zip", built("cuda:sm_80").source)


def test_the_file_of_a_source_is_named_by_its_content(tmp_path):
    with ef.configure(cache=tmp_path):
        path = kernel_file(matmul("cuda:sm_80"))
        assert path.is_relative_to(tmp_path) and path.read_text() == matmul("cuda:sm_80").text
        assert kernel_file(matmul("cuda:sm_90")) == path and kernel_file(matmul("cuda:sm_80", stages=2)) != path
        path.write_text("something else")
        assert kernel_file(matmul("cuda:sm_80")).read_text() == matmul("cuda:sm_80").text
    (tmp_path / "file").write_text("no folder")
    for place in (None, tmp_path / "file"):
        with ef.configure(cache=place):
            assert kernel_file(matmul("cuda:sm_80")).read_text() == matmul("cuda:sm_80").text


# -- how many run at once ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "registers", "warps", "shared", "blocks", "limited_by"),
    [  # worked out by hand from the tables of the vendors
        ("cuda:sm_80", 128, 8, 0, 2, "registers"),  # 64 K / (128 x 256)
        ("cuda:sm_80", 255, 4, 0, 2, "registers"),  # 8192 a warp, 2 in each of 4 partitions
        ("cuda:sm_80", 32, 1, 0, 32, "blocks"),
        ("cuda:sm_80", 32, 4, 0, 16, "warps"),  # 64 warps
        ("cuda:sm_80", 33, 4, 0, 12, "registers"),  # 1280 a warp in units of 256: 12 in a partition
        ("cuda:sm_80", 40, 4, 82 * 1024, 1, "shared memory"),  # 83 KB with what is reserved, twice is over 164
        ("cuda:sm_80", 40, 4, 81 * 1024, 2, "shared memory"),
        ("cuda:sm_90", 168, 12, 100 * 1024, 1, "registers"),  # warp-specialized: 3 warps of 5376 in a partition
        ("cuda:sm_90", 32, 4, 75 * 1024, 3, "shared memory"),  # 3 x 76 = 228
        ("hip:gfx942", 128, 4, 0, 4, "registers"),  # 512 / 128 waves a SIMD
        ("hip:gfx942", 130, 4, 0, 3, "registers"),  # 136 in units of 8
        ("hip:gfx942", 32, 1, 0, 32, "warps"),  # no barrier for one wave
        ("hip:gfx942", 32, 2, 0, 16, "warps"),
        ("hip:gfx942", 64, 4, 33 * 1024, 1, "shared memory"),
    ],
)
def test_occupancy(target, registers, warps, shared, blocks, limited_by):
    machine = load_target(target)
    found = occupancy(Resources(registers, 0, 0, shared, warps, warps * machine.limit("warp")), machine)
    assert (found.blocks, found.limited_by, found.warps) == (blocks, limited_by, blocks * warps)
