"""What a call for a CUDA device costs the processor beside the driver's launch, measured without a device.

    python benchmarks/dispatch.py            numbers as JSON on stdout

A kernel is built for sm_90 and launched through a driver library that does nothing, on tensors of the CPU: the path from the call to the
driver is that of a device, its allocator is not. Subjects take turns; the clock is the processor time of this thread, so that figures
repeat on a busy machine. `benchmarks/cuda.py` has a row that measures the same on a GPU.
"""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: the folder above holds the package `benchmarks`
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import einfall as ef
import torch
from einfall.backends.triton import driver as cuda
from einfall.backends.triton import launch

from benchmarks.cascades import attention

NOTHING = """
#include <stddef.h>
int cuInit(unsigned f) { return 0; }
int cuGetErrorName(int c, const char **n) { return 1; }
int cuDeviceGet(int *d, int n) { *d = n; return 0; }
int cuDeviceGetAttribute(int *v, int a, int d) { *v = a == 75 ? 9 : a == 76 ? 0 : a == 97 ? 232448 : 132; return 0; }
int cuDevicePrimaryCtxRetain(void **c, int d) { *c = (void *)1; return 0; }
int cuCtxGetCurrent(void **c) { *c = (void *)1; return 0; }
int cuCtxSetCurrent(void *c) { return 0; }
int cuCtxPushCurrent_v2(void *c) { return 0; }
int cuCtxPopCurrent_v2(void **c) { return 0; }
int cuModuleLoadData(void **m, const void *i) { *m = (void *)1; return 0; }
int cuModuleGetFunction(void **f, void *m, const char *n) { *f = (void *)1; return 0; }
int cuFuncGetAttribute(int *v, int a, void *f) { *v = 0; return 0; }
int cuFuncSetCacheConfig(void *f, int c) { return 0; }
int cuFuncSetAttribute(void *f, int a, int v) { return 0; }
int cuOccupancyMaxActiveBlocksPerMultiprocessor(int *n, void *f, int t, size_t s) { *n = 1; return 0; }
typedef unsigned u;
int cuLaunchKernel(void *f, u a, u b, u c, u d, u e, u g, u s, void *t, void **p, void **x) { return 0; }
"""
ROUNDS, CALLS = 60, 300


def without_device(folder: Path) -> None:
    """Have launches go to a driver that does nothing, for tensors that lie on the CPU."""
    (folder / "nothing.c").write_text(NOTHING, encoding="utf-8")
    library = folder / "libnothing.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-O1", "-o", str(library), str(folder / "nothing.c")], check=True)
    cuda.LIBRARY = str(library)
    launch.torch_runtime = lambda: launch.Runtime(lambda: 0, lambda device: 0, lambda size, device: torch.empty(size))
    launch.Launcher._device = lambda self, tensors: 0  # type: ignore[method-assign]


def call_us() -> dict[str, float]:
    """Microseconds of processor time, by the medians of turns: of the driver's call, and of each layer above it."""
    tensors = [torch.randn(1, 2, 128, 64).to(torch.bfloat16) for _ in range(3)]
    executable = attention.compile(*tensors, scale=0.125, target="cuda:sm_90")
    layouts = [(tuple(t.shape), t.stride()) for t in tensors]
    # bound as for a device, but what a call allocates lies on the CPU
    bound = replace(executable._steps(executable.sizes, layouts, torch.device("cuda", 0)), device=None)
    signature = tuple([(t.shape, t.stride(), t.dtype, t.device, t.requires_grad) for t in tensors])
    attention(*tensors, scale=0.125)
    attention._memo[(signature, ())] = executable, bound
    (step,) = bound.steps
    ((shape, dtype),) = bound.allocated
    result = torch.empty(shape, dtype=dtype)
    driver = step.quick.prepared(*tensors, result, 0.125)

    def bare() -> object:
        torch.empty(shape, dtype=dtype)
        return driver()

    subjects: dict[str, Any] = {
        "driver": driver,
        "bare": bare,
        "launcher": lambda: step.quick(*tensors, torch.empty(shape, dtype=dtype), 0.125),
        "executable": lambda: executable.launch(bound, tensors, [0.125]),
        "kernel": lambda: attention(*tensors, scale=0.125),
    }
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(ROUNDS):
        for name, subject in subjects.items():
            start = time.thread_time_ns()
            for _ in range(CALLS):
                subject()
            samples[name].append((time.thread_time_ns() - start) / CALLS / 1e3)
    medians = {f"{name}_us": statistics.median(found) for name, found in samples.items()}
    fastest = {f"{name}_fastest_us": min(found) for name, found in samples.items()}
    over = {f"{name}_over_bare_us": medians[f"{name}_us"] - medians["bare_us"] for name in ("launcher", "executable", "kernel")}
    return {**medians, **fastest, **over}


def main() -> None:
    """Print the numbers."""
    with tempfile.TemporaryDirectory(prefix="einfall-dispatch-") as folder, ef.configure(database=None):
        without_device(Path(folder))
        found = {"machine": {"processor": platform.machine(), "python": platform.python_version(), "torch": torch.__version__}, **call_us()}
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
