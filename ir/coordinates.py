"""Coordinates that the extents alone decide, such as `X[5]` or `X[p + w]`: whether they stay inside their tensor."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping

from .cascade import Cascade, Concat, Einsum, Populate, Scan, Scatter, Statement, defined
from .errors import BindingError
from .expr import Const, Expr, Extent, Index, Op, Read, children, walk


def check_coordinates(cascade: Cascade, sizes: Mapping[str, int]) -> None:
    """Raise `BindingError` for a coordinate that leaves its tensor whatever the values are: outside any condition, without a fill."""
    ranks = cascade.tensor_ranks()
    for statement in cascade.body:
        for e in _unconditional(statement):
            for read in _reads(e):
                for c, rank in zip(read.coords, ranks.get(read.tensor, ()), strict=False):  # what is malformed is named elsewhere
                    if read.fill is None and c != Index(rank):
                        _check(cascade, statement, read.tensor, rank, sizes[rank], reach(c, sizes))


def _check(cascade: Cascade, statement: Statement, tensor: str, rank: str, extent: int, ends: tuple[int, int] | None) -> None:
    if ends is None or (ends[0] >= 0 and ends[1] < extent):
        return
    found = ends[0] if ends[0] < 0 else ends[1]
    raise BindingError(
        f"index {found} is outside rank {rank} of {tensor}, which has extent {extent}",
        cascade=cascade.name,
        statement=", ".join(name for name, _ in defined(statement)),
        location=statement.location,
        hint="give the access a fill value, or restrict it by a predicate",
    )


def reach(c: Expr, sizes: Mapping[str, int]) -> tuple[int, int] | None:
    """The least and the greatest value of a coordinate; None where values decide, at no point at all, or where this cannot tell."""
    indices = Counter(n.rank for n in walk(c) if isinstance(n, Index))
    if any(count > 1 or sizes[rank] == 0 for rank, count in indices.items()):
        return None
    return _reach(c, sizes)


def _reach(c: Expr, sizes: Mapping[str, int]) -> tuple[int, int] | None:
    """With each index occurring once, in monotone operations: both ends are values that it has."""
    match c:
        case Const(value=value) if isinstance(value, int):
            return int(value), int(value)
        case Extent(rank=rank):
            return sizes[rank], sizes[rank]
        case Index(rank=rank):
            return 0, sizes[rank] - 1
        case Op(name=name, args=(a, b)):
            x, y = _reach(a, sizes), _reach(b, sizes)
            return None if x is None or y is None else _combined(name, x, y)
        case _:
            return None


def _combined(name: str, x: tuple[int, int], y: tuple[int, int]) -> tuple[int, int] | None:
    match name:
        case "add":
            return x[0] + y[0], x[1] + y[1]
        case "sub":
            return x[0] - y[1], x[1] - y[0]
        case "mul":
            corners = [a * b for a in x for b in y]
            return min(corners), max(corners)
        case "minimum":
            return min(x[0], y[0]), min(x[1], y[1])
        case "maximum":
            return max(x[0], y[0]), max(x[1], y[1])
        case "floordiv" if y[0] == y[1] > 0:
            return x[0] // y[0], x[1] // y[0]
        case "mod" if y[0] == y[1] > 0 and x[0] // y[0] == x[1] // y[0]:
            return x[0] % y[0], x[1] % y[0]
        case _:
            return None


def _unconditional(statement: Statement) -> Iterator[Expr]:
    """The expressions that a statement evaluates at every point."""
    match statement:
        case Einsum() | Scan() | Populate() | Scatter():
            yield statement.expr if statement.where is None else statement.where
        case Concat(parts=parts):
            yield from (e for _, e in parts)
        case _:
            pass


def _reads(e: Expr) -> Iterator[Read]:
    """The accesses of an expression outside the branches of a choice."""
    if isinstance(e, Read):
        yield e
    inner = e.args[:1] if isinstance(e, Op) and e.name == "where" else children(e)
    for child in inner:
        yield from _reads(child)
