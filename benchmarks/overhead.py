"""What a user waits for beside the kernel itself: import, cold compile, cached compile, and the cost of a call.

    python benchmarks/overhead.py            numbers as JSON on stdout

Each figure is the median of several runs; import and the toolkit are timed in fresh processes, with the bare interpreter subtracted.
The overhead of a call is that of the kernel over calling the bare function with the same tensors and an output allocated alike,
interleaved, on a kernel so small that its work does not hide it.
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

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "1000")

import einfall as ef

DIMS = {"b": 1, "h": 8, "m": 512, "p": 512, "e": 64, "f": 64}


@ef.kernel
def attention(Q: "b h m e", K: "b h p e", V: "b h p f", *, scale: float) -> "b h m f":
    S = (Q * K).sum("e") * scale
    return (ef.softmax(S, over="p") * V).sum("p")


@ef.kernel
def rows(X: "i j") -> "i":
    return X.sum("j")


def process_s(code: str, runs: int = 7) -> float:
    """Seconds of a fresh interpreter that runs `code`: the median."""
    samples = []
    for _ in range(runs):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        samples.append(time.perf_counter() - start)
    return statistics.median(samples)


def compile_s(runs: int = 5) -> dict[str, float]:
    """Seconds of a compile with an empty cache, with a full one, and with a full one in a process of its own; toolkit imported."""
    cold, cached = [], []
    for _ in range(runs):
        with tempfile.TemporaryDirectory() as folder, ef.configure(cache=folder, database=None):
            for samples in (cold, cached):
                fresh = ef.Kernel.from_cascade(attention.cascade)
                start = time.perf_counter()
                fresh.compile(dims=DIMS)
                samples.append(time.perf_counter() - start)
    return {"cold_compile_s": statistics.median(cold), "cached_compile_s": statistics.median(cached), "cold_compile_samples_s": cold}


def call_us(rounds: int = 40, calls: int = 500) -> dict[str, float]:
    """Microseconds of a call of the kernel, of its executable, and of the bare function, in turns."""
    import torch

    x = torch.randn(4, 16)
    executable = rows.compile(x)
    executable(x)
    (step,) = executable.bind((x,)).steps

    def bare() -> object:
        return step.function(x, torch.empty((4,), dtype=torch.float32))

    subjects = {"bare_us": bare, "executable_us": lambda: executable(x), "kernel_us": lambda: rows(x)}
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for subject in subjects.values():
        for _ in range(calls):
            subject()
    for _ in range(rounds):
        for name, subject in subjects.items():
            start = time.perf_counter()
            for _ in range(calls):
                subject()
            samples[name].append((time.perf_counter() - start) / calls * 1e6)
    medians = {name: statistics.median(found) for name, found in samples.items()}
    over = {f"{name}_overhead_us": medians[f"{name}_us"] - medians["bare_us"] for name in ("executable", "kernel")}
    return {**medians, **over}


def main() -> None:
    """Print the numbers."""
    bare = process_s("pass")
    found = {
        "machine": {"processor": platform.machine(), "python": platform.python_version(), "einfall": ef.__version__},
        "import_einfall_s": process_s("import einfall") - bare,
        "import_and_decorate_s": process_s("import einfall as ef\n@ef.kernel\ndef f(X: 'i j') -> 'i': return X.sum('j')") - bare,
        "import_torch_s": process_s("import torch", 3) - bare,
        "import_toolkit_s": process_s("import tvm", 3) - bare,
    }
    attention.compile(dims={**DIMS, "e": 16, "f": 16})  # the toolkit is imported before anything is timed
    found |= compile_s()
    found |= call_us()
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
