"""The CPU emitter's speed on hand-written tile programs: GFLOP/s, the ratio to torch, the distance to a register-tile micro-kernel.

    python benchmarks/emitter.py [CASE ...] [--repeats 9] [--one-thread] [--json FILE]

Everything of a case is measured in one process, repeats interleaved, median and least time of each. The thread settings are made
before torch is imported: spinning OpenMP threads would halve a kernel that follows a torch call. Causal attention counts half the work,
for every contender. `--one-thread` runs everything in one thread and counts processor time: steady on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "1000")
os.environ.update({"TVM_NUM_THREADS": "1"} if "--one-thread" in sys.argv else {})

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "backends"))
import programs
from einfall.backends.base import Source
from einfall.backends.tvm import TvmCpu
from einfall.backends.tvm.build import build, load
from einfall.ir.tile import TileProgram
from einfall.ir.types import bf16, f32
from einfall.schedules.schedule import Schedule
from einfall.schedules.target import load_target

Run = Callable[[], object]
ONE_THREAD = "--one-thread" in sys.argv


def peak_source(bf16_dot: bool, lanes: int) -> Source:
    """A register tile of 8 x 2 vectors over operands that stay in the first cache: what a contraction could reach."""
    from einfall.backends.tvm.cpu import cpu_of
    from einfall.backends.tvm.vector_math import helpers_ir

    target = load_target("cpu")
    kind = "int32" if bf16_dot else "float32"
    acc, b = f"acc[r, T.ramp(v * {lanes}, 1, {lanes})]", f"B[k, T.ramp(v * {lanes}, 1, {lanes})]"
    a = f"T.broadcast(A[k, r], {lanes})"
    product = f'T.call_extern("float32x{lanes}", "dot_bf16_v{lanes}", {acc}, {a}, {b})' if bf16_dot else f"{acc} + {a} * {b}"
    text = f'''
@T.prim_func(s_tir=True)
def main(A: T.Buffer((256, 8), "{kind}"), B: T.Buffer((256, {2 * lanes}), "{kind}"), C: T.Buffer((64, 8, {2 * lanes}), "float32")):
    T.func_attr({{"tirx.noalias": True}})
    with T.attr(T.int32(0), "pragma_import_llvm", LL):
        for task in T.parallel(64):
            acc = T.alloc_buffer((8, {2 * lanes}), "float32", scope="global")
            for r in T.unroll(8):
                for v in T.unroll(2):
                    {acc} = T.broadcast(T.float32(0.0), {lanes})
            for again in range(200):
                for k in range(256):
                    for r in T.unroll(8):
                        for v in T.unroll(2):
                            {acc} = {product}
            for r in T.unroll(8):
                for v in T.unroll(2):
                    C[task, r, T.ramp(v * {lanes}, 1, {lanes})] = {acc}
'''
    ir = helpers_ir(cpu_of(target), (f"dot_bf16_v{lanes}" if bf16_dot else f"exp2_v{lanes}",))
    return Source.make(f"LL = r'''\n{ir}'''\n{text}", "main", target)


def peak(bf16_dot: bool) -> tuple[Run, float]:
    """The micro-kernel and the operations of one run."""
    lanes = load_target("cpu").vector_width
    kernel = load(build(peak_source(bf16_dot, lanes)))
    kind = torch.int32 if bf16_dot else torch.float32
    a, b, c = torch.zeros(256, 8, dtype=kind), torch.zeros(256, 2 * lanes, dtype=kind), torch.zeros(64, 8, 2 * lanes)
    return (lambda: kernel(a, b, c)), 2.0 * (2 if bf16_dot else 1) * 64 * 200 * 256 * 8 * 2 * lanes


def kernel_of(program: TileProgram, schedule: Schedule | None = None) -> Callable[..., object]:
    backend = TvmCpu()
    return backend.load(backend.build(backend.emit(program, schedule or Schedule(), load_target("cpu"))))


def attention(h: int, s: int, d: int, causal: bool, dtype: torch.dtype) -> tuple[dict[str, Run], float]:
    q, k, v = (torch.randn(1, h, s, d).to(dtype) for _ in range(3))
    o = torch.empty_like(q)
    program = programs.attention(e=d, f=d, causal=causal, dtype=bf16 if dtype == torch.bfloat16 else f32)
    kernel = kernel_of(program)
    runs: dict[str, Run] = {
        "einfall": lambda: kernel(q, k, v, o, d**-0.5),
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal),
    }
    return runs, 4.0 * h * s * s * d * (0.5 if causal else 1)


def decode(b: int, g: int, r: int, s: int, d: int, dtype: torch.dtype) -> tuple[dict[str, Run], float]:
    q, k, v = torch.randn(b, g * r, d).to(dtype), torch.randn(b, g, s, d).to(dtype), torch.randn(b, g, s, d).to(dtype)
    o = torch.empty_like(q)
    kernel = kernel_of(programs.decode(e=d, f=d, rows=r, dtype=bf16 if dtype == torch.bfloat16 else f32))
    rows = q.view(b, g, r, d)
    whole = k.view(torch.int16 if dtype == torch.bfloat16 else torch.int32)
    runs: dict[str, Run] = {
        "einfall": lambda: kernel(q, k, v, o, d**-0.5),
        "sdpa": lambda: torch.nn.functional.scaled_dot_product_attention(rows, k, v),
        "roof (sum of the bytes)": lambda: (whole.view(torch.int64).sum(), v.view(torch.int64).sum()),
    }
    return runs, 4.0 * b * g * r * s * d


def cross_entropy(t: int, v: int, e: int) -> tuple[dict[str, Run], float]:
    x, w, y, o = torch.randn(t, e), torch.randn(v, e), torch.randint(v, (t,)), torch.empty(t)
    kernel, labels = kernel_of(programs.cross_entropy(e=e, rows=128)), y.int()
    runs: dict[str, Run] = {
        "einfall": lambda: kernel(x, w, labels, o),
        "eager": lambda: torch.nn.functional.cross_entropy(x @ w.t(), y, reduction="none"),
    }
    return runs, 2.0 * t * v * e


def log_sum_exp(m: int, n: int) -> tuple[dict[str, Run], float]:
    x, o = torch.randn(m, n), torch.empty(m)
    kernel = kernel_of(programs.log_sum_exp(rows=2))
    return {"einfall": lambda: kernel(x, o), "eager": lambda: x.logsumexp(-1)}, 2.0 * m * n


def norm_matmul(m: int, e: int, n: int) -> tuple[dict[str, Run], float]:
    x, w, o = torch.randn(m, e), torch.randn(e, n), torch.empty(m, n)
    kernel = kernel_of(programs.norm_matmul(n=n))
    runs: dict[str, Run] = {
        "einfall": lambda: kernel(x, w, o, 1e-5),
        "eager": lambda: torch.nn.functional.layer_norm(x, (e,)) @ w,
    }
    return runs, 2.0 * m * e * n


CASES: Mapping[str, Callable[[], tuple[dict[str, Run], float]]] = {
    "f32_d64": lambda: attention(16, 2048, 64, False, torch.float32),
    "f32_d64_causal": lambda: attention(16, 2048, 64, True, torch.float32),
    "f32_d128": lambda: attention(8, 2048, 128, False, torch.float32),
    "f32_d128_causal": lambda: attention(8, 2048, 128, True, torch.float32),
    "bf16_d64": lambda: attention(16, 2048, 64, False, torch.bfloat16),
    "bf16_d64_causal": lambda: attention(16, 2048, 64, True, torch.bfloat16),
    "bf16_d128": lambda: attention(8, 2048, 128, False, torch.bfloat16),
    "bf16_d128_causal": lambda: attention(8, 2048, 128, True, torch.bfloat16),
    "decode_bf16": lambda: decode(4, 8, 4, 8192, 128, torch.bfloat16),
    "cross_entropy": lambda: cross_entropy(512, 16384, 256),
    "log_sum_exp": lambda: log_sum_exp(512, 65536),
    "norm_matmul": lambda: norm_matmul(1024, 1024, 256),
}


def measure(runs: Mapping[str, Run], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repeat, contenders interleaved."""
    for run in runs.values():
        run()
    samples: dict[str, list[float]] = {name: [] for name in runs}
    clock = time.process_time if ONE_THREAD else time.perf_counter
    for _ in range(repeats):
        for name, run in runs.items():
            begin = clock()
            run()
            samples[name].append(clock() - begin)
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    parser.add_argument("--repeats", type=int, default=9)
    parser.add_argument("--one-thread", action="store_true", help="one thread, processor time")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1 if ONE_THREAD else load_target("cpu").threads)
    peaks = {"f32": peak(False)}
    if load_target("cpu").has("avx512_bf16"):
        peaks["bf16"] = peak(True)
    report = {}
    for case in arguments.cases or CASES:
        runs, operations = CASES[case]()
        used, ceiling = peaks["bf16" if case.startswith("bf16") and "bf16" in peaks else "f32"]
        samples = measure({**runs, "micro-kernel": used}, arguments.repeats)
        best = {name: min(times) for name, times in samples.items()}
        middle = {name: statistics.median(times) for name, times in samples.items()}
        work = {name: ceiling if name == "micro-kernel" else operations for name in samples}
        report[case] = {
            name: {"gflops": work[name] / middle[name] / 1e9, "best_gflops": work[name] / best[name] / 1e9, "seconds": samples[name]}
            for name in samples
        }
        top = work["micro-kernel"] / best["micro-kernel"]
        print(case)
        for name in samples:
            rate, fastest = work[name] / middle[name] / 1e9, work[name] / best[name] / 1e9
            line = f"  {name:24s} {middle[name] * 1e3:9.2f} ms  {rate:7.1f} GFLOP/s (best {fastest:6.1f})"
            if name == "einfall":
                line += f"  {work[name] / best[name] / top:4.0%} of the micro-kernel"
            elif name != "micro-kernel":
                line += f"  {middle[name] / middle['einfall']:5.2f}x as long"
            print(line, flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps({"torch": torch.__version__, "threads": torch.get_num_threads(), "cases": report}, indent=1))


if __name__ == "__main__":
    main()
