"""Tile programs written by hand: what lowering would make of well-known computations, and odd ones that exercise the emitter."""

from __future__ import annotations

import math

from einfall.ir.cascade import Output, RankDecl, ScalarDecl, Tensor
from einfall.ir.expr import Const, Expr, Extent, Index, Masked, Op, Read, Scalar, Start, Tile, aligned
from einfall.ir.tile import Bounds, Dot, GridRank, Loop, LoopState, Map, Reduce, Store, TileOutput, TileProgram
from einfall.ir.types import DType, f32

INF = float("inf")
LOWEST = -3.4028234663852886e38


def op(name: str, *args: Expr | float) -> Expr:
    return Op(name, tuple(a if not isinstance(a, (int, float)) else Const(a) for a in args))


def idx(*ranks: str) -> tuple[Expr, ...]:
    return tuple(Index(r) for r in ranks)


def tensor(name: str, ranks: str, dtype: DType = f32) -> Tensor:
    return Tensor(name, tuple((r,) for r in ranks.split()), dtype)


def output(name: str, ranks: str, dtype: DType = f32) -> TileOutput:
    return TileOutput(Output(name, tuple((r,) for r in ranks.split())), dtype)


def sizes(**ranks: int) -> tuple[RankDecl, ...]:
    return tuple(RankDecl(r, Const(n)) for r, n in ranks.items())


def attention(
    *, e: int = 64, f: int = 64, rows: int = 64, tile: int = 128, causal: bool = False, window: int | None = None, dtype: DType = f32
) -> TileProgram:
    """softmax(Q K^T * scale) V with a running maximum; the scale is folded into Q together with log2(e)."""
    conditions: list[Expr] = []
    first: Expr = Const(0)
    whole_first: Expr = Const(0)
    whole_last: Expr = Extent("p")
    last: Expr = Extent("p")
    start = Start("m")
    if causal or window:
        conditions.append(op("le", Index("p"), Index("m")))
        whole_last = op("add", start, 1)
        last = op("add", start, rows)
    if window:
        conditions.append(op("gt", Index("p"), op("sub", Index("m"), window)))
        first = op("sub", start, window - 1)
        whole_first = op("add", start, rows - window)
    body = (
        Dot("s", ("m", "p"), ("e",), Tile("q"), aligned("K", "b", "h", "p", "e"), dtype=dtype),
        Reduce("t", ("m",), "max", ("p",), Masked(Tile("s"), Const(-INF))),
        Map("mx'", ("m",), op("maximum", Tile("mx"), Tile("t"))),
        Map("ms", ("m",), op("maximum", Tile("mx'"), LOWEST)),
        Map("c", ("m",), op("exp2", op("sub", Tile("mx"), Tile("ms")))),
        Map("n", ("m", "p"), op("exp2", op("sub", Masked(Tile("s"), Const(-INF)), Tile("ms")))),
        Reduce("ds", ("m",), "sum", ("p",), Tile("n")),
        Map("d'", ("m",), op("add", op("mul", Tile("d"), Tile("c")), Tile("ds"))),
        Dot("o'", ("m", "f"), ("p",), Tile("n"), aligned("V", "b", "h", "p", "f"), update=op("mul", Tile("o"), Tile("c")), dtype=dtype),
    )
    states = (
        LoopState("mx", ("m",), Const(-INF), Tile("mx'")),
        LoopState("d", ("m",), Const(0.0), Tile("d'")),
        LoopState("o", ("m", "f"), Const(0.0), Tile("o'")),
    )
    loop = Loop("p", tile, tuple(conditions), Bounds(first, whole_first, whole_last, last), states, body)
    scaled = op("mul", aligned("Q", "b", "h", "m", "e"), op("mul", Scalar("scale"), math.log2(math.e)))
    return TileProgram(
        "attention",
        (tensor("Q", "b h m e", dtype), tensor("K", "b h p e", dtype), tensor("V", "b h p f", dtype)),
        (output("O", "b h m f", dtype),),
        (ScalarDecl("scale", f32),),
        sizes(e=e, f=f),
        (GridRank("b", 1), GridRank("h", 1), GridRank("m", rows)),
        ("e", "f"),
        (
            Map("q", ("m", "e"), scaled),
            loop,
            Store("O", idx("b", "h", "m", "f"), op("div", Tile("o"), Tile("d"))),
        ),
    )
