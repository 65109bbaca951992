"""An emulator of the CUDA C that is emitted here: each block runs on this processor, its threads as fibers in lock step.

It knows what emitted kernels use and nothing more: thread and block indices, shared memory, `__syncthreads`, shuffles of whole warps, a
few intrinsics. Threads run one after the other from barrier to barrier, in rising or falling order, so that what lacks a barrier gives
different results; a barrier or shuffle that not all threads of a block reach together is an error. It tells a kernel's numbers, nothing
of its speed, and nothing of what NVIDIA's compiler makes of the same text. It needs a C++ compiler.
"""

from __future__ import annotations

import ctypes
import os
import re
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ...ir.errors import BindingError, BuildError
from ..base import Source
from ..triton.signature import Parameter, signature_of
from ..tvm.build import split
from .build import SECONDS, cuda_of, entry_of
from .emulator_c import LAUNCH, SHIM

FLAGS = ("-O1", "-fPIC", "-shared", "-fno-strict-aliasing", "-ffp-contract=off", "-w")


@cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    """Where libraries lie until this process ends."""
    return tempfile.TemporaryDirectory(prefix="einfall-emulator-")


def compiler() -> str:
    """A C++ compiler. Raises `BuildError` where there is none."""
    found = shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++")
    if found is None:
        raise BuildError("there is no C++ compiler to emulate CUDA C with", hint="install g++, or set CXX")
    return found


def translated(cuda: str, source: Source) -> str:
    """The kernel as C++ for this processor: the shim, the imported helpers, and the kernel without TVM's own prelude."""
    text = cuda[cuda.index('extern "C" __global__') :]
    entry, _ = entry_of(cuda)
    threads = re.search(r"__launch_bounds__\((\d+)\)", text)
    types = _types(cuda)
    if threads is None:
        raise BuildError("the CUDA C does not say how many threads a block has", hint="compile the kernel again")
    arguments = ", ".join(f"*({t}*)given[{i}]" for i, t in enumerate(types))
    return SHIM + str(split(source)[0]["CU"]) + text + LAUNCH.format(entry=entry, arguments=arguments, threads=threads[1])


def _types(cuda: str) -> list[str]:
    """The C types of the kernel's parameters."""
    entry, _ = entry_of(cuda)
    found = re.search(rf"{entry}\(([^()]*)\);", cuda)
    assert found is not None
    return [p.replace("__restrict__", "").strip().rpartition(" ")[0] for p in found[1].split(",") if p.strip()]


def emulate(source: Source) -> Emulated:
    """The emitted kernel as a function of CPU tensors. Raises `BuildError` with the words of the compiler that refused."""
    return Emulated(source, cuda_of(source))


class Emulated:
    """`launch(*inputs, *outputs, *scalars)` on CPU tensors; `falling` lets the threads of a block run in falling order."""

    def __init__(self, source: Source, cuda: str) -> None:
        self.signature = signature_of(source)
        known = {p.name: p for p in self.signature.parameters}
        self.parameters: tuple[Parameter, ...] = tuple(known[name] for name in entry_of(cuda)[1])
        folder = Path(tempfile.mkdtemp(dir=_folder().name))
        (folder / "kernel.cpp").write_text(translated(cuda, source), encoding="utf-8")
        command = [compiler(), *FLAGS, "kernel.cpp", "-o", "kernel.so"]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=SECONDS, check=False)
        if done.returncode:
            raise BuildError(f"the emulator cannot compile the kernel: {done.stderr[:2000]}", hint="please report it with the source")
        self._launch = ctypes.CDLL(str(folder / "kernel.so")).launch

    def __call__(self, *given: Any, falling: bool = False) -> None:
        signature = self.signature
        count = len(signature.tensors)
        tensors: dict[str, torch.Tensor] = dict(zip((t.name for t in signature.tensors), given[:count], strict=True))
        for name, t in tensors.items():
            if t.device.type != "cpu":
                raise BindingError(f"{name} lies on {t.device}, and an emulated kernel takes CPU tensors", hint=f"{name}.cpu()")
        scalars = dict(zip(signature.scalars, given[count:], strict=True))
        extents = signature.extents([t.shape for t in tensors.values()])

        def value(p: Parameter) -> ctypes.c_void_p | ctypes.c_int64 | ctypes.c_float | ctypes.c_double:
            match p.kind:
                case "pointer":
                    return ctypes.c_void_p(tensors[p.of].data_ptr())
                case "stride":
                    return ctypes.c_int64(tensors[p.of].stride(p.axis))
                case "extent":
                    return ctypes.c_int64(extents[p.of])
                case _:
                    return (ctypes.c_double if p.type == "fp64" else ctypes.c_float)(scalars[p.of])

        held = [value(p) for p in self.parameters]
        pointers = (ctypes.c_void_p * max(1, len(held)))(*(ctypes.addressof(v) for v in held))
        site = self._launch(pointers, ctypes.c_long(signature.programs(extents)), int(falling))
        if site:
            raise BuildError(
                f"threads of {signature.entry} part at a barrier (line {site} of its C++)", hint="a bug of the emitter; please report"
            )
