"""Where a stream must run: interval arithmetic of the domain over one task's tile.

`p <= m + k` with rows m0 .. m0 + 63 of a tile gives: everything beyond m0 + 63 + k is outside for all rows, everything up to
m0 + k is inside for all rows. Only comparisons that bound the stream rank narrow the loop; others stay conditions.
"""

from __future__ import annotations

from collections.abc import Callable

from ...ir.expr import Const, Expr, Extent, Index, Op, Read, Scalar, Start
from ...ir.infer import expression_ranks
from ...ir.tile import Bounds
from ..passes.stream_reductions import bound_of

Interval = tuple[Expr, Expr]


def loop_bounds(stream: str, conditions: tuple[Expr, ...], tile: Callable[[str], int | None], is_integer: Callable[[Expr], bool]) -> Bounds:
    """The bounds of a loop over `stream` within the domain `conditions`.

    Args:
        tile: elements of a rank in a tile: 1 for a number of the task, None for a rank held whole.
        is_integer: whether an expression is a whole number, so that + 1 turns <= into <.
    """
    begin: list[Expr] = []
    whole_begin: list[Expr] = []
    end: list[Expr] = [Extent(stream)]
    whole_end: list[Expr] = [Extent(stream)]
    for condition in conditions:
        bound = bound_of(condition, stream)
        interval = None if bound is None or not is_integer(bound[1]) else interval_of(bound[1], tile)
        if bound is None or interval is None:
            whole_end = [Const(0)]
            continue
        low, high = interval
        name = bound[0]
        if name in ("lt", "le", "eq"):
            end.append(_plus(high, name != "lt"))
            whole_end.append(_plus(low, name != "lt"))
        if name in ("gt", "ge", "eq"):
            begin.append(_plus(low, name == "gt"))
            whole_begin.append(_plus(high, name == "gt"))
    return Bounds(_join("maximum", begin), _join("maximum", whole_begin), _join("minimum", whole_end), _join("minimum", end))


def interval_of(e: Expr, tile: Callable[[str], int | None]) -> Interval | None:
    """The least and greatest value of `e` over a tile, as expressions over the task's own numbers; None if that is not known."""
    match e:
        case Const() | Extent() | Scalar():
            return e, e
        case Index(rank=rank):
            size = tile(rank)
            if size is None:
                return Const(0), Op("sub", (Extent(rank), Const(1)))
            if size == 1:
                return e, e
            last = Op("sub", (Op("minimum", (Op("add", (Start(rank), Const(size))), Extent(rank))), Const(1)))
            return Start(rank), last
        case Op(name="add" | "minimum" | "maximum" as name, args=(a, b)):
            x, y = interval_of(a, tile), interval_of(b, tile)
            return None if x is None or y is None else (Op(name, (x[0], y[0])), Op(name, (x[1], y[1])))
        case Op(name="sub", args=(a, b)):
            x, y = interval_of(a, tile), interval_of(b, tile)
            return None if x is None or y is None else (Op("sub", (x[0], y[1])), Op("sub", (x[1], y[0])))
        case Op(name="mul" | "floordiv" as name, args=(a, Const(value=int(k)))) if k > 0:
            x = interval_of(a, tile)
            return None if x is None else (Op(name, (x[0], Const(k))), Op(name, (x[1], Const(k))))
        case Op(name="mul", args=(a, Extent() as k)):
            x = interval_of(a, tile)
            return None if x is None else (Op("mul", (x[0], k)), Op("mul", (x[1], k)))
        case Read(coords=coords, fill=None) if all(tile(rank) == 1 for c in coords for rank in expression_ranks(c)):
            return e, e
        case _:
            return None


def _plus(e: Expr, one: bool) -> Expr:
    match e:
        case Op(name="sub", args=(a, Const(value=1))) if one:
            return a
        case Const(value=value) if one:
            return Const(value + 1)
        case _:
            return Op("add", (e, Const(1))) if one else e


def _join(name: str, parts: list[Expr]) -> Expr:
    result: Expr = parts[0] if parts else Const(0)
    for part in parts[1:]:
        result = Op(name, (result, part))
    return result
