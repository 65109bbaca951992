"""Triton kernels written by hand for tests: a file as the emitter writes it, from a few lines of a body."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from einfall.backends.base import Source
from einfall.backends.triton.interpret import interpret
from einfall.backends.triton.signature import Memory, Parameter, Signature
from einfall.ir.binding import to_torch
from einfall.ir.types import DTYPES
from einfall.schedules.target import load_target

POINTERS = {
    "f32": "*fp32", "f64": "*fp64", "f16": "*fp16", "bf16": "*bf16", "f8e4m3": "*fp8e4nv", "f8e5m2": "*fp8e5", "e8m0": "*u8",
    "f4e2m1": "*u8", "i4": "*i8", "i8": "*i8", "u8": "*u8", "i16": "*i16", "i32": "*i32", "i64": "*i64", "bool": "*i8",
}  # fmt: skip


def source_of(
    body: str, tensors: Mapping[str, tuple[str, str]], *, outputs: int = 1, scalars: Mapping[str, str] | None = None,
    grid: tuple[tuple[str, int], ...] = (), helpers: str = "", persistent: bool = False,
) -> Source:  # fmt: skip
    """A file with one kernel.

    Args:
        body: its lines; a pointer is called as its tensor, its stride along axis 0 `X_0`, an extent `n_i`, a scalar as itself.
        tensors: name to (ranks, type); the last `outputs` of them are written.
        scalars: name to Triton's type.
    """
    memories = tuple(Memory(name, dtype, tuple((r,) for r in ranks.split())) for name, (ranks, dtype) in tensors.items())
    ranks = dict.fromkeys(r for m in memories for axis in m.axes for r in axis)
    parameters = (
        *(Parameter(m.name, "pointer", m.name, POINTERS[m.dtype]) for m in memories),
        *(Parameter(f"{m.name}_{axis}", "stride", m.name, "i32", axis) for m in memories for axis in range(len(m.axes))),
        *(Parameter(f"n_{rank}", "extent", rank, "i32") for rank in ranks),
        *(Parameter(name, "scalar", name, kind) for name, kind in (scalars or {}).items()),
    )
    split = len(memories) - outputs
    signature = Signature(
        "kernel", memories[:split], memories[split:], tuple(scalars or ()), parameters, (), grid, (), persistent=persistent
    )
    lines = "\n".join(f"    {line}" for line in body.strip("\n").splitlines())
    text = (
        f'"""A kernel."""\n\nimport triton\nimport triton.language as tl\n\nSIGNATURE = {signature.to_literal()!r}\n\n{helpers}\n'
        f"@triton.jit\ndef kernel({', '.join(p.name for p in parameters)}):\n{lines}\n"
    )
    return Source.make(text, "kernel", load_target("cuda:sm_90"))


def elementwise(expression: str, inputs: Mapping[str, torch.Tensor], types: Mapping[str, str], result: str) -> torch.Tensor:
    """`expression` of tensors of one length, all elements in one tile; `types` names the inputs' types, `result` the output's."""
    (n,) = {x.numel() for x in inputs.values()}
    loads = "\n".join(f"{name.lower()} = tl.load({name} + i)" for name in inputs)
    body = f"i = tl.arange(0, {n})\n{loads}\ntl.store(Y + i, {expression})"
    return run(
        source_of(body, {**{name: ("i", types[name]) for name in inputs}, "Y": ("i", result)}), *inputs.values(), shape=(n,), result=result
    )


def run(
    source: Source, *inputs: torch.Tensor, shape: tuple[int, ...], result: str = "f32", scalars: tuple[float, ...] = ()
) -> torch.Tensor:
    """The one output of a launch, poisoned before it."""
    out = torch.full((max(1, torch.Size(shape).numel()) * to_torch(DTYPES[result]).itemsize,), 0xA5, dtype=torch.uint8)
    out = out[: torch.Size(shape).numel() * to_torch(DTYPES[result]).itemsize].view(to_torch(DTYPES[result])).reshape(shape)
    launch: Callable[..., None] = interpret(source)
    launch(*inputs, out, *scalars)
    return out
