"""TVMScript to CUDA C by TVM, and on to PTX and machine code where NVIDIA's compiler is there. No GPU is needed.

artifact.module          Compiled
artifact.module.cuda     the CUDA C of the kernel, its helpers included
artifact.module.code     Machine: PTX, cubin and what a block takes; None where there is no nvcc
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from ...ir.errors import BuildError
from ...schedules.target import Target
from ..base import Artifact, Source
from ..triton.listings import read_assembler_log
from ..triton.resources import Resources, check_resources
from ..triton.signature import Signature, signature_of
from ..tvm.build import split
from .spread import WARP

SECONDS = 300
# storage rewriting would merge registers with other buffers; the compiler finds common subexpressions itself
PASSES = {"tirx.disable_storage_rewrite": True, "tirx.disable_cse_tir": True}
OPTIONS = ("-std=c++17", "-w")
_PROTOTYPE = re.compile(r"(\w+)\(([^()]*)\);")


@dataclass(frozen=True, slots=True)
class Machine:
    """What NVIDIA's compilers made of a kernel: their version, PTX, machine code, and what a block takes."""

    compiler: str
    ptx: str = field(repr=False)
    cubin: bytes = field(repr=False)
    resources: Resources


@dataclass(frozen=True, slots=True)
class Compiled:
    """A kernel as CUDA C, and as machine code where that could be made."""

    cuda: str = field(repr=False)
    code: Machine | None


def architecture(target: Target) -> str:
    """NVIDIA's name of the target's generation, such as sm_90."""
    return target.name.partition(":")[2].partition("+")[0]


def build(source: Source) -> Artifact:
    """CUDA C, and machine code where nvcc is there. Raises `BuildError` with the words of the tool that refused."""
    cuda = cuda_of(source)
    return Artifact(source, Compiled(cuda, compile_cuda(cuda, source) if nvcc() is not None else None))


def cuda_of(source: Source) -> str:
    """The kernel as CUDA C, by TVM. Raises `BuildError` with its words."""
    import tvm
    from tvm.script import tirx
    from tvm.script.parser.core.entry import parse

    constants, function = split(source)
    try:
        parsed = parse(function, extra_vars={"T": tirx, **constants})
        target = tvm.target.Target({"kind": "cuda", "arch": architecture(source.target)}, host={"kind": "llvm"})
        with tvm.transform.PassContext(config=PASSES):
            built = tvm.compile(parsed, target=target)
    except Exception as error:  # TVM raises half a dozen unrelated classes; all of them mean that the source was refused
        raise BuildError(
            f"TVM refused the kernel: {error}", hint="this is a bug of the emitter; please report it with the source"
        ) from error
    return str(built.mod.imports[0].inspect_source("cuda"))


def entry_of(cuda: str) -> tuple[str, tuple[str, ...]]:
    """The name of the kernel in CUDA C, and of its parameters in their order. Raises `BuildError` where there is none."""
    found = _PROTOTYPE.search(cuda[max(0, cuda.find('extern "C" __global__')) :])
    if found is None:
        raise BuildError("the CUDA C has no kernel", hint="compile it again")
    return found[1], tuple(p.split()[-1].lstrip("*") for p in found[2].split(",") if p.strip())


@cache
def nvcc() -> str | None:
    """NVIDIA's compiler on the path, or in CUDA_HOME; None where there is none."""
    home = os.environ.get("CUDA_HOME")
    return shutil.which("nvcc") or shutil.which("nvcc", path=str(Path(home or "/usr/local/cuda") / "bin"))


@cache
def _version(program: str) -> str:
    done = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=SECONDS, check=False)
    found = re.search(r"release [\d.]+, V([\d.]+)", done.stdout)
    return f"nvcc {found[1]}" if found else "nvcc"


def compile_cuda(cuda: str, source: Source) -> Machine:
    """PTX and a cubin from CUDA C.

    Raises `BuildError` with the compiler's words, `ScheduleError` where a block takes more than the target has.
    """
    program, signature, arch = nvcc(), signature_of(source), architecture(source.target)
    if program is None:
        raise BuildError("there is no nvcc to make PTX with", hint="install the CUDA toolkit, or set CUDA_HOME")
    fusion = f"--fmad={'true' if signature.fusion else 'false'}"  # what decides must not depend on which products join which sums
    with tempfile.TemporaryDirectory(prefix="einfall-nvcc-") as scratch:
        folder = Path(scratch)
        (folder / "kernel.cu").write_text(cuda, encoding="utf-8")
        _run([program, *OPTIONS, fusion, f"-arch={arch}", "-ptx", "kernel.cu", "-o", "kernel.ptx"], folder)
        log = _run([program, f"-arch={arch}", "-cubin", "-Xptxas", "-v", "kernel.ptx", "-o", "kernel.cubin"], folder)
        ptx, cubin = (folder / "kernel.ptx").read_text(encoding="utf-8"), (folder / "kernel.cubin").read_bytes()
    resources = _resources(log, signature)
    check_resources(resources, signature, source.target)
    return Machine(_version(program), ptx, cubin, resources)


def _resources(log: str, signature: Signature) -> Resources:
    """What a block takes, from what the assembler says."""
    usage = read_assembler_log(log)
    if usage is None:
        raise BuildError(f"the registers of {signature.entry} cannot be read from what the assembler says: {log[:500]}")
    shared = re.search(r"(\d+) bytes smem", log)
    return Resources(
        usage.registers, usage.stack, usage.spills or 0, int(shared[1]) if shared else 0, signature.warps, signature.warps * WARP
    )


def _run(command: list[str], folder: Path) -> str:
    """What a compiler says. Raises `BuildError` where it fails or takes too long."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise BuildError(f"{Path(command[0]).name} could not be run: {error}", hint="nvcc --version") from None
    if done.returncode:
        words = (done.stderr or done.stdout).strip()[:2000]
        raise BuildError(f"{Path(command[0]).name} refused the kernel: {words}", hint="this is a bug of the emitter; please report it")
    return done.stderr + done.stdout
