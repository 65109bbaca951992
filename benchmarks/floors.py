"""What this machine can do at best, measured beside the kernels: multiply-adds a second, and bytes a second.

The peaks are those of small register-tile kernels whose operands stay in the first-level cache, built through the backend's own
toolchain, and of torch's matrix products (plain `matmul`, and a 1x1 convolution, which goes another way through oneDNN). Naming only
one of torch's would flatter whoever is compared with it. Bandwidths are those of a copy and of a sum of 128 MiB.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from einfall.backends.base import Source
from einfall.backends.registry import backend_for
from einfall.backends.tvm.cpu import cpu_of
from einfall.backends.tvm.vector_math import helpers_ir
from einfall.schedules.target import Target, load_target

from benchmarks.protocol import Samples, Subject

K, ROWS, VECTORS, REPEATS = 256, 8, 2, 96
MATMUL = 1024
STREAM = 32 << 20  # f32 elements: 128 MiB
Kind = Literal["f32", "bf16", "bytes"]

FMA = "acc[r, {vector}] + T.broadcast(A[t, k, r], {lanes}) * B[t, k, {vector}]"
DOT = 'T.call_extern("float32x{lanes}", "dot_bf16_v{lanes}", acc[r, {vector}], T.broadcast(A[t, k, r], {lanes}), B[t, k, {vector}])'
KERNEL = '''"""The fastest {name} multiply-adds: a register tile of {rows} x {columns}, operands in the first-level cache."""

LL = r"""{helpers}"""


@T.prim_func(s_tir=True)
def main(
    A: T.Buffer(({tasks}, {k}, {rows}), "{dtype}"),
    B: T.Buffer(({tasks}, {k}, {columns}), "{dtype}"),
    C: T.Buffer(({tasks}, {rows}, {columns}), "float32"),
):
    T.func_attr({{"tirx.noalias": True}})
    {imports}for t in T.parallel({tasks}):
        for i in range({repeats}):
            acc = T.alloc_buffer(({rows}, {columns}), "float32", scope="global")
            for r in T.unroll({rows}):
                for v in T.unroll({vectors}):
                    acc[r, {vector}] = C[t, r, {vector}]
            for k in range({k}):
                for r in T.unroll({rows}):
                    for v in T.unroll({vectors}):
                        acc[r, {vector}] = {step}
            for r in T.unroll({rows}):
                for v in T.unroll({vectors}):
                    C[t, r, {vector}] = acc[r, {vector}]
'''


@dataclass(frozen=True, slots=True)
class Floor:
    """A limit of the machine: `amount` floating-point operations (a multiply-add counts 2) or bytes, done by one call of `run`."""

    name: str
    kind: Kind
    amount: float
    run: Callable[[], object]

    @property
    def subject(self) -> Subject:
        """To be timed in turns with what is measured against it."""
        return Subject(self.name, self.run)

    def rate(self, samples: Samples) -> float:
        """Billions a second (GFLOP/s or GB/s), by the median."""
        return self.amount / samples.median / 1e6


def micro_kernel(name: Literal["f32", "bf16"], target: Target | None = None) -> Floor:
    """The peak of multiply-adds: f32, or pairs of bf16 added up in f32. Raises `UnsupportedError` where there is no bf16 dot."""
    from einfall import UnsupportedError

    machine = target or load_target("cpu")
    cpu = cpu_of(machine)
    if name == "bf16" and not cpu.bf16_dot:
        raise UnsupportedError("this processor has no bf16 dot product")
    columns = VECTORS * cpu.lanes
    rows = ROWS if cpu.registers >= 32 else 4
    helper = f"dot_bf16_v{cpu.lanes}"
    vector = f"T.ramp(v * {cpu.lanes}, 1, {cpu.lanes})"
    text = KERNEL.format(
        name=name, rows=rows, columns=columns, vectors=VECTORS, k=K, repeats=REPEATS, tasks=cpu.threads, vector=vector,
        dtype="float32" if name == "f32" else "int32",
        helpers="" if name == "f32" else helpers_ir(cpu, (helper,)),
        imports="" if name == "f32" else 'with T.attr(T.int32(0), "pragma_import_llvm", LL):\n     ',
        step=(FMA if name == "f32" else DOT).format(lanes=cpu.lanes, vector=vector),
    )  # fmt: skip
    backend = backend_for(machine)
    function = backend.load(backend.build(Source.make(text, "main", machine)))
    shapes = ((cpu.threads, K, rows), (cpu.threads, K, columns))
    if name == "f32":
        operands = [torch.full(shape, 1e-3) for shape in shapes]
    else:
        operands = [torch.full((*shape[:-1], 2 * shape[-1]), 1e-3, dtype=torch.bfloat16).view(torch.int32) for shape in shapes]
    result = torch.zeros(cpu.threads, rows, columns)
    pairs = 2 if name == "bf16" else 1
    flops = 2.0 * pairs * cpu.threads * REPEATS * K * rows * columns
    return Floor(f"{name} micro-kernel", name, flops, lambda: function(*operands, result))


def torch_products(name: Literal["f32", "bf16"]) -> tuple[Floor, ...]:
    """torch's matrix products of 1024 squared: `matmul`, and the same product as a convolution."""
    dtype = {"f32": torch.float32, "bf16": torch.bfloat16}[name]
    n, flops = MATMUL, 2.0 * MATMUL**3
    a, b = torch.rand(n, n).to(dtype), torch.rand(n, n).to(dtype)
    image, weights = b.view(1, n, 32, n // 32), a.view(n, n, 1, 1)
    return (
        Floor(f"{name} torch.matmul", name, flops, lambda: a @ b),
        Floor(f"{name} torch conv2d (oneDNN)", name, flops, lambda: torch.nn.functional.conv2d(image, weights)),
    )


def bandwidths() -> tuple[Floor, ...]:
    """A copy (read and written bytes both count) and a read of 128 MiB."""
    source, copy = torch.ones(STREAM), torch.empty(STREAM)
    return (
        Floor("copy", "bytes", 8.0 * STREAM, lambda: copy.copy_(source)),
        Floor("read", "bytes", 4.0 * STREAM, lambda: source.sum()),
    )


def floor_ms(flops: float, bytes_moved: float, peaks: Mapping[Kind, float]) -> float:
    """The least a kernel can take, in milliseconds: operations over the peak (GFLOP/s) or bytes over bandwidth (GB/s), whichever is
    more. `flops` are of the type whose peak is given as f32 or bf16."""
    peak = peaks.get("bf16", peaks.get("f32", 0.0))
    times = [flops / peak / 1e6] if peak else []
    if "bytes" in peaks:
        times.append(bytes_moved / peaks["bytes"] / 1e6)
    return max(times, default=0.0)
