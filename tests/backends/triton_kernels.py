"""Running a tile program's Triton kernel in the interpreter: outputs poisoned and between guard bands, inputs strided and unaligned."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from math import prod

import torch
from einfall.backends.base import Source
from einfall.backends.triton.emit import emit
from einfall.backends.triton.interpret import interpret
from einfall.backends.triton.signature import signature_of
from einfall.ir.binding import to_torch
from einfall.ir.tile import TileProgram
from einfall.ir.types import DTYPES
from einfall.schedules.schedule import Schedule
from einfall.schedules.target import load_target

DEFAULT = Schedule()
GUARD = 67  # elements before and after every output, odd so that outputs are not aligned


@cache
def source_of(program: TileProgram, schedule: Schedule = DEFAULT, strided: frozenset[str] = frozenset()) -> Source:
    """The emitted source."""
    return emit(program, schedule, load_target("cuda:sm_90"), strided=strided)


@cache
def kernel_of(program: TileProgram, schedule: Schedule = DEFAULT, strided: frozenset[str] = frozenset()):
    """The interpreted kernel; a persistent one runs as three programs."""
    return interpret(source_of(program, schedule, strided), programs=3)


def run(
    program: TileProgram, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, float] = {}, *, schedule: Schedule = DEFAULT,
    strided: frozenset[str] = frozenset(), sizes: Mapping[str, int] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The outputs of a launch; raises `AssertionError` if anything beside them was written, or an input."""
    signature = signature_of(source_of(program, schedule, strided))
    extents = dict(signature.sizes) | dict(sizes or {})
    for t in program.inputs:
        for axis, size in zip(t.axes, tensors[t.name].shape, strict=True):
            unknown = [r for r in axis if r not in extents]
            if len(unknown) == 1:
                extents[unknown[0]] = size // max(1, prod(extents[r] for r in axis if r in extents))
    outputs, bands = {}, []
    for o in signature.outputs:
        shape = tuple(prod(extents[r] for r in axis) for axis in o.axes)
        kind = DTYPES[o.dtype]
        poison = float("nan") if kind.is_float else 1 if kind.kind == "bool" else 77
        band = torch.full((prod(shape) + 2 * GUARD,), poison, dtype=to_torch(kind))
        outputs[o.name] = band[GUARD : GUARD + prod(shape)].view(shape)
        bands.append((o.name, band, poison))
    given = [tensors[t.name] for t in program.inputs]
    before = [t.clone() for t in given]
    kernel_of(program, schedule, strided)(*given, *outputs.values(), *[scalars[s.name] for s in program.scalars])
    for name, band, poison in bands:
        guards = torch.cat([band[:GUARD], band[-GUARD:]]).float()
        untouched = guards.isnan() if poison != poison else guards == poison
        assert untouched.all(), f"something wrote beside {name}"
    for t, x, copy in zip(program.inputs, given, before, strict=True):
        assert torch.equal(bits(x), bits(copy)), f"{t.name} was written"
    return outputs


def bits(x: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor."""
    return (x if x.ndim else x.reshape(1)).contiguous().view(torch.uint8)
