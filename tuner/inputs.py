"""Random inputs for a cascade: floats of several distributions, integers within what the cascade uses them for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Literal, get_args

import torch

from ..compiler.binding import shape_of
from ..ir.binding import to_torch
from ..ir.cascade import Cascade, Iterate, Scatter, Statement, Tensor, expressions
from ..ir.expr import Const, Expr, Extent, Index, Op, Read, children, reads, walk
from ..ir.types import DType

Distribution = Literal["normal", "uniform", "offset", "tiny", "holes"]
DISTRIBUTIONS: tuple[Distribution, ...] = get_args(Distribution)
_COMPARES = ("lt", "le", "gt", "ge", "eq", "ne")
_OFFSET, _TINY, _HOLES = 24.0, 1e-4, 0.03


def make_inputs(
    cascade: Cascade, sizes: Mapping[str, int], distribution: Distribution, seed: int, *, holed: str | None = None
) -> dict[str, torch.Tensor]:
    """A tensor for every input of `cascade` at the extents `sizes`, contiguous, on the CPU, the same for the same seed.

    Args:
        distribution: of the float inputs: `normal`; `uniform` in (0, 1); `offset`, normal around 24; `tiny`, normal of size 1e-4;
            `holes`, normal with a few elements of one input at -inf.
        holed: the input that has the holes.
    """
    generator = torch.Generator().manual_seed(seed)
    ranges = integer_ranges(cascade, sizes)
    return {
        t.name: _tensor(t, shape_of(t.axes, sizes), distribution, ranges.get(t.name), generator, holed=t.name == holed)
        for t in cascade.inputs
    }


def _tensor(
    t: Tensor, shape: tuple[int, ...], distribution: Distribution, bounds: tuple[int, int] | None, rng: torch.Generator, *, holed: bool
) -> torch.Tensor:
    if not t.dtype.is_float:
        return _integers(t.dtype, shape, bounds, rng)
    if distribution == "uniform":
        values = torch.rand(shape, generator=rng) * 0.98 + 0.01
    else:
        values = torch.randn(shape, generator=rng)
    if distribution == "offset":
        values = values + (_OFFSET if t.dtype.bits >= 16 else 3.0)
    elif distribution == "tiny":
        values = values * (_TINY if t.dtype.bits >= 16 else 0.05)
    if t.dtype.name == "e8m0":  # a scale: a positive power of two near 1
        values = torch.exp2(values.clamp(-4, 4).round())
    elif holed and distribution == "holes":
        holes = torch.rand(shape, generator=rng) < _HOLES
        if values.numel() > 1 and not holes.any():
            holes.view(-1)[int(torch.randint(values.numel(), (1,), generator=rng))] = True
        values = torch.where(holes, float("-inf"), values)
    return values.to(to_torch(t.dtype))


def has_holes(dtype: DType) -> bool:
    """Whether the type can hold -inf."""
    return dtype.name in ("f64", "f32", "f16", "bf16")


def _integers(t: DType, shape: tuple[int, ...], bounds: tuple[int, int] | None, rng: torch.Generator) -> torch.Tensor:
    if t.kind == "bool":
        return torch.rand(shape, generator=rng) < 0.7
    lowest, highest = (0, (1 << t.bits) - 1) if t.kind == "uint" else (-(1 << (t.bits - 1)), (1 << (t.bits - 1)) - 1)
    low, high = bounds if bounds is not None else (max(lowest, -1000), min(highest, 1000))
    low, high = max(low, lowest), min(high, highest)
    return torch.randint(low, max(high, low) + 1, shape, generator=rng).to(to_torch(t))


def integer_ranges(cascade: Cascade, sizes: Mapping[str, int]) -> dict[str, tuple[int, int]]:
    """Bounds, both inclusive, of the integer inputs that are coordinates or are compared with a rank's index."""
    integers = {t.name for t in cascade.inputs if not t.dtype.is_float}
    ranks = cascade.tensor_ranks()
    gathers: dict[str, int] = {}
    compared: dict[str, int] = {}
    for coordinate, extent in _coordinates(cascade.body, ranks, sizes):
        for name in {read.tensor for read in reads(coordinate)} & integers:
            highest = _highest(coordinate, name, extent, sizes)
            if highest is not None:
                gathers[name] = min(gathers.get(name, highest), highest)
    for e in _nodes(cascade.body):
        if isinstance(e, Op) and e.name in _COMPARES:
            indexed = [rank for arg in e.args for rank in _bare_indices(arg)]
            for name in {read.tensor for read in reads(e)} & integers:
                compared[name] = max([compared.get(name, 0), *(sizes[rank] for rank in indexed if rank in sizes)])
    return {name: (0, highest) for name, highest in {**compared, **gathers}.items() if highest > 0 or name in gathers}


def _bare_indices(e: Expr) -> Iterator[str]:
    """The ranks whose index enters the value of `e` itself, not only the place where a tensor is read."""
    if isinstance(e, Index):
        yield e.rank
    elif not isinstance(e, Read):
        for child in children(e):
            yield from _bare_indices(child)


def _nodes(body: tuple[Statement, ...]) -> Iterator[Expr]:
    return (node for statement in body for e in expressions(statement) for node in walk(e))


def _coordinates(
    body: tuple[Statement, ...], ranks: Mapping[str, tuple[str, ...]], sizes: Mapping[str, int]
) -> Iterator[tuple[Expr, int]]:
    """Every coordinate of every access with the extent it must stay below."""
    for node in _nodes(body):
        if isinstance(node, Read):
            for coordinate, rank in zip(node.coords, ranks[node.tensor], strict=True):
                if rank in sizes:
                    yield coordinate, sizes[rank]
    for statement in body:
        if isinstance(statement, Scatter):
            yield from ((coordinate, sizes[rank]) for rank, coordinate in statement.at if rank in sizes)
        elif isinstance(statement, Iterate):
            yield from _coordinates(statement.body, ranks, sizes)


def _highest(coordinate: Expr, name: str, extent: int, sizes: Mapping[str, int]) -> int | None:
    """The largest value of input `name` that keeps a coordinate linear in it below `extent`; None if it does not depend on it."""
    at_zero, at_one = (_largest(coordinate, name, value, sizes) for value in (0, 1))
    if at_zero is None or at_one is None:
        return max(extent - 1, 0)
    if at_one <= at_zero:
        return None
    return max((extent - 1 - at_zero) // (at_one - at_zero), 0)


def _largest(e: Expr, name: str, value: int, sizes: Mapping[str, int]) -> int | None:
    """A coordinate with input `name` at `value` and every index at its end; None for what is not plain arithmetic."""
    match e:
        case Const(value=number):
            return int(number)
        case Index(rank=rank):
            return sizes[rank] - 1 if rank in sizes else None
        case Extent(rank=rank):
            return sizes.get(rank)
        case Read(tensor=tensor):
            return value if tensor == name else None
        case Op(name=op, args=(a, b)):
            x, y = _largest(a, name, value, sizes), _largest(b, name, value, sizes)
            if x is None or y is None:
                return None
            return {"add": x + y, "sub": x - y, "mul": x * y, "floordiv": x // y if y else 0, "mod": x % y if y else 0}.get(op)
        case _:
            return None
