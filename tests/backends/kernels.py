"""Building and running a tile program in a test: outputs poisoned and between guard bands, inputs strided and unaligned on demand."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cache

import torch
from einfall.backends.base import Source
from einfall.backends.tvm import TvmCpu
from einfall.ir.binding import to_torch
from einfall.ir.tile import TileProgram
from einfall.schedules.schedule import Schedule
from einfall.schedules.target import Target, load_target

DEFAULT = Schedule()
GUARD = 67  # elements before and after every output, odd so that outputs are not aligned to vectors


@cache
def host() -> Target:
    """The processor the tests run on."""
    return load_target("cpu")


@cache
def narrow() -> Target:
    """The same machine as if it had AVX2 and nothing newer."""
    limits = {**dict(host().limits), "vector_width": 8, "registers": 16}
    features = tuple(f for f in host().features if "avx512" not in f)
    return replace(host(), name="cpu:avx2", features=features, limits=tuple(sorted(limits.items())))


@cache
def source_of(program: TileProgram, schedule: Schedule = DEFAULT, narrowed: bool = False, strided: frozenset[str] = frozenset()) -> Source:
    """The emitted source."""
    return TvmCpu().emit(program, schedule, narrow() if narrowed else host(), strided=strided)


@cache
def kernel_of(program: TileProgram, schedule: Schedule = DEFAULT, narrowed: bool = False, strided: frozenset[str] = frozenset()):
    """The built kernel, once a program and schedule."""
    backend = TvmCpu()
    return backend.load(backend.build(source_of(program, schedule, narrowed, strided)))


def run(
    program: TileProgram, tensors: Mapping[str, torch.Tensor], scalars: Mapping[str, float] = {}, *, schedule: Schedule = DEFAULT,
    narrowed: bool = False, strided: frozenset[str] = frozenset(), sizes: Mapping[str, int] | None = None,
    kernel: Callable[..., object] | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The outputs of a launch, of the CPU's kernel or of another; raises `AssertionError` if anything beside them was written."""
    extents = dict(sizes or {})
    for t in program.inputs:
        for axis, size in zip(t.axes, tensors[t.name].shape, strict=True):
            if len(axis) == 1:
                extents[axis[0]] = size
    for declaration in program.ranks:
        size = program.static_size(declaration.name)
        if size is not None:
            extents[declaration.name] = size
    for t in program.inputs:
        for axis, size in zip(t.axes, tensors[t.name].shape, strict=True):
            for rank in axis:
                others = [extents.get(r) for r in axis if r != rank]
                if rank not in extents and None not in others:
                    extents[rank] = size // max(1, _product(others))
    outputs, bands = {}, []
    for o in program.outputs:
        shape = tuple(_product([extents[r] for r in axis]) for axis in o.output.axes)
        dtype = to_torch(o.dtype)
        poison = float("nan") if o.dtype.is_float else 1 if o.dtype.kind == "bool" else 77
        band = torch.full((_product(shape) + 2 * GUARD,), poison, dtype=dtype)
        outputs[o.name] = band[GUARD : GUARD + _product(shape)].view(shape)
        bands.append((o.name, band, poison))
    kernel = kernel or kernel_of(program, schedule, narrowed, strided)
    kernel(*[tensors[t.name] for t in program.inputs], *outputs.values(), *[scalars[s.name] for s in program.scalars])
    for name, band, poison in bands:
        guards = torch.cat([band[:GUARD], band[-GUARD:]])
        untouched = guards.isnan() if poison != poison else guards == poison
        assert untouched.all(), f"something wrote beside {name}"
    return outputs


def _product(numbers) -> int:
    result = 1
    for n in numbers:
        result *= n
    return result


def strided_copy(x: torch.Tensor, *, last: bool = False) -> torch.Tensor:
    """`x` as a view that is neither contiguous nor aligned; with `last`, not even along its last axis."""
    shape = [*x.shape[:-1], 2 * x.shape[-1] + 5] if last else [*x.shape[:-1], x.shape[-1] + 5]
    room = torch.full([*(n + 1 for n in shape[:-1]), shape[-1]], float("nan") if x.is_floating_point() else 3, dtype=x.dtype)
    view = room[(*(slice(1, None) for _ in shape[:-1]), slice(3, 3 + 2 * x.shape[-1], 2) if last else slice(3, 3 + x.shape[-1]))]
    view.copy_(x)
    return view
