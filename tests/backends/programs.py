"""Tile programs written by hand: what lowering would make of well-known computations, and odd ones that exercise the emitter."""

from __future__ import annotations

import math

from einfall.ir.cascade import Output, RankDecl, ScalarDecl, Tensor
from einfall.ir.expr import Cast, Const, Expr, Extent, Index, Masked, Op, Read, Scalar, Seen, Start, Tile, aligned
from einfall.ir.tile import Bounds, Dot, GridRank, Loop, LoopState, Map, Reduce, Store, TileOutput, TileProgram
from einfall.ir.types import DType, boolean, f32, i8, i32

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


def loop(rank: str, tile: int, states: tuple[LoopState, ...], *body, conditions: tuple[Expr, ...] = ()) -> Loop:
    """A loop over a whole rank."""
    end = Extent(rank)
    return Loop(rank, tile, conditions, Bounds(Const(0), Const(0), end, end), states, tuple(body))


def decode(*, e: int = 128, f: int = 128, rows: int = 4, tile: int = 128, dtype: DType = f32) -> TileProgram:
    """One query a sequence, `rows` query heads share a key head: rows of the tile are the heads of a group."""
    scores = op("mul", Tile("s"), op("mul", Scalar("scale"), math.log2(math.e)))
    body = (
        Dot("s", ("r", "p"), ("e",), Tile("q"), aligned("K", "b", "g", "p", "e"), dtype=dtype),
        Reduce("t", ("r",), "max", ("p",), Masked(scores, Const(-INF))),
        Map("mx'", ("r",), op("maximum", Tile("mx"), Tile("t"))),
        Map("ms", ("r",), op("maximum", Tile("mx'"), LOWEST)),
        Map("c", ("r",), op("exp2", op("sub", Tile("mx"), Tile("ms")))),
        Map("n", ("r", "p"), op("exp2", op("sub", Masked(scores, Const(-INF)), Tile("ms")))),
        Reduce("ds", ("r",), "sum", ("p",), Tile("n")),
        Dot("o'", ("r", "f"), ("p",), Tile("n"), aligned("V", "b", "g", "p", "f"), update=op("mul", Tile("o"), Tile("c")), dtype=dtype),
    )
    states = (
        LoopState("mx", ("r",), Const(-INF), Tile("mx'")),
        LoopState("d", ("r",), Const(0.0), op("add", op("mul", Tile("d"), Tile("c")), Tile("ds"))),
        LoopState("o", ("r", "f"), Const(0.0), Tile("o'")),
    )
    return TileProgram(
        "decode",
        (Tensor("Q", (("b",), ("g", "r"), ("e",)), dtype), tensor("K", "b g p e", dtype), tensor("V", "b g p f", dtype)),
        (TileOutput(Output("O", (("b",), ("g", "r"), ("f",))), dtype),),
        (ScalarDecl("scale", f32),),
        sizes(r=rows, e=e, f=f),
        (GridRank("b", 1), GridRank("g", 1)),
        ("r", "e", "f"),
        (
            Map("q", ("r", "e"), aligned("Q", "b", "g", "r", "e")),
            loop("p", tile, states, *body),
            Store("O", idx("b", "g", "r", "f"), op("div", Tile("o"), Tile("d"))),
        ),
    )


def log_sum_exp(*, rows: int = 2, tile: int = 4096, lanes_in_rows: bool = False) -> TileProgram:
    """max and log of the sum of exponentials of every row; or of every column, where rows are adjacent in memory."""
    row = _rows("m", rows)
    ranks = ("p", "m") if lanes_in_rows else ("m", "p")
    x = Masked(aligned("X", *ranks), Const(-INF))
    body = (
        Reduce("t", row, "max", ("p",), x),
        Map("mx'", row, op("maximum", Tile("mx"), Tile("t"))),
        Map("ms", row, op("maximum", Tile("mx'"), LOWEST)),
        Map("c", row, op("exp", op("sub", Tile("mx"), Tile("ms")))),
        Reduce("ds", row, "sum", ("p",), op("exp", op("sub", x, Tile("ms")))),
    )
    states = (
        LoopState("mx", row, Const(-INF), Tile("mx'")),
        LoopState("d", row, Const(0.0), op("add", op("mul", Tile("d"), Tile("c")), Tile("ds"))),
    )
    value = op("add", Tile("mx"), op("log", Tile("d")))
    return TileProgram(
        "log_sum_exp", (tensor("X", " ".join(ranks)),), (output("L", "m"),), (), (), (GridRank("m", rows),), (),
        (loop("p", tile, states, *body), Store("L", idx("m"), value)),
    )  # fmt: skip


def cross_entropy(*, e: int = 64, rows: int = 64, tile: int = 128) -> TileProgram:
    """log of the sum of exponentials of X W^T minus the logit of the label, the logits never stored."""
    body = (
        Dot("s", ("t", "v"), ("e",), Tile("x"), aligned("W", "v", "e")),
        Reduce("m1", ("t",), "max", ("v",), Masked(Tile("s"), Const(-INF))),
        Map("m'", ("t",), op("maximum", Tile("m"), Tile("m1"))),
        Map("c", ("t",), op("exp", op("sub", Tile("m"), Tile("m'")))),
        Reduce("d1", ("t",), "sum", ("v",), op("exp", op("sub", Masked(Tile("s"), Const(-INF)), Tile("m'")))),
    )
    states = (
        LoopState("m", ("t",), Const(LOWEST), Tile("m'")),
        LoopState("d", ("t",), Const(0.0), op("add", op("mul", Tile("d"), Tile("c")), Tile("d1"))),
    )
    label = Read("W", (Read("Y", idx("t")), Index("e")))
    return TileProgram(
        "cross_entropy", (tensor("X", "t e"), tensor("W", "v e"), tensor("Y", "t", i32)), (output("L", "t"),), (), sizes(e=e),
        (GridRank("t", rows),), ("e",),
        (
            Map("x", ("t", "e"), aligned("X", "t", "e")),
            loop("v", tile, states, *body),
            Reduce("own", ("t",), "sum", ("e",), op("mul", Tile("x"), label)),
            Store("L", idx("t"), op("sub", op("add", Tile("m"), op("log", Tile("d"))), Tile("own"))),
        ),
    )  # fmt: skip


def norm_matmul(*, n: int = 64, rows: int = 64, tile: int = 128) -> TileProgram:
    """LayerNorm(X) W with the mean and the squared deviations carried beside the product: sums at a moving mean, rank-one corrections."""
    centred = op("sub", aligned("X", "m", "e"), Tile("mu'"))
    product = Masked(centred, Const(0.0))
    body = (
        Reduce("s", ("m",), "sum", ("e",), Masked(aligned("X", "m", "e"), Const(0.0))),
        Map("mu'", ("m",), op("div", op("add", op("mul", Tile("mu"), Start("e")), Tile("s")), Seen("e"))),
        Map("dmu", ("m",), op("sub", Tile("mu"), Tile("mu'"))),
        Reduce("v1", ("m",), "sum", ("e",), op("mul", product, product)),
        Map("y", ("m", "e"), product),
        Map("w", ("e", "n"), aligned("W", "e", "n")),
        Reduce("g1", ("n",), "sum", ("e",), Masked(Tile("w"), Const(0.0))),
        Dot("a'", ("m", "n"), ("e",), Tile("y"), Tile("w"), update=op("add", Tile("a"), op("mul", Tile("dmu"), Tile("g")))),
    )
    states = (
        LoopState("mu", ("m",), Const(0.0), Tile("mu'")),
        LoopState(
            "v", ("m",), Const(0.0), op("add", op("add", Tile("v"), op("mul", Start("e"), op("mul", Tile("dmu"), Tile("dmu")))), Tile("v1"))
        ),
        LoopState("g", ("n",), Const(0.0), op("add", Tile("g"), Tile("g1"))),
        LoopState("a", ("m", "n"), Const(0.0), Tile("a'")),
    )
    deviation = op("rsqrt", op("add", op("div", Tile("v"), Extent("e")), Scalar("eps")))
    return TileProgram(
        "norm_matmul", (tensor("X", "m e"), tensor("W", "e n")), (output("O", "m n"),), (ScalarDecl("eps", f32),), sizes(n=n),
        (GridRank("m", rows),), ("n",),
        (loop("e", tile, states, *body), Store("O", idx("m", "n"), op("mul", Tile("a"), deviation))),
    )  # fmt: skip


def best(*, rows: int = 1, tile: int = 256, smallest: bool = False) -> TileProgram:
    """The largest (smallest) value of every row and the first place it stands."""
    word, worst, better = ("min", INF, "lt") if smallest else ("max", -INF, "gt")
    x = Masked(aligned("X", "m", "p"), Const(worst))
    taken = op(better, Tile("t"), Tile("v"))
    states = (
        LoopState("v", _rows("m", rows), Const(worst), op("where", taken, Tile("t"), Tile("v"))),
        LoopState("i", _rows("m", rows), Const(0), op("where", taken, Tile("j"), Tile("i")), i32),
    )
    body = (
        Reduce("t", _rows("m", rows), word, ("p",), x),
        Reduce("j", _rows("m", rows), f"arg{word}", ("p",), x, i32),
    )
    return TileProgram(
        "best", (tensor("X", "m p"),), (output("V", "m"), output("I", "m", i32)), (), (), (GridRank("m", rows),), (),
        (loop("p", tile, states, *body), Store("V", idx("m"), Tile("v")), Store("I", idx("m"), Tile("i"))),
    )  # fmt: skip


def _rows(rank: str, tile: int) -> tuple[str, ...]:
    return (rank,) if tile > 1 else ()


def matmul(*, rows: int = 64, columns: int = 64, tile: int = 128, dtype: DType = f32, transposed: bool = False) -> TileProgram:
    """A B, or A B^T."""
    right = aligned("B", "n", "k") if transposed else aligned("B", "k", "n")
    left = Masked(aligned("A", "m", "k"), Const(0.0))
    dot = Dot("c'", ("m", "n"), ("k",), left, right, update=Tile("c"), dtype=dtype)
    return TileProgram(
        "matmul", (tensor("A", "m k", dtype), tensor("B", "n k" if transposed else "k n", dtype)), (output("C", "m n", dtype),), (), (),
        (GridRank("m", rows), GridRank("n", columns)), (),
        (loop("k", tile, (LoopState("c", ("m", "n"), Const(0.0), Tile("c'")),), dot), Store("C", idx("m", "n"), Tile("c"))),
    )  # fmt: skip


def elementwise(
    expr: Expr, inputs: tuple[Tensor, ...], dtype: DType = f32, *, tile: int = 64, scalars: tuple[ScalarDecl, ...] = ()
) -> TileProgram:
    """Y[i, j] = expr, a row a task, no loop."""
    return TileProgram(
        "elementwise",
        inputs,
        (output("Y", "i j", dtype),),
        scalars,
        (),
        (GridRank("i", 1), GridRank("j", tile)),
        (),
        (Store("Y", idx("i", "j"), expr),),
    )


def normalise(*, tile: int = 128) -> TileProgram:
    """X / sum(X) by two loops over the same rank, the second of which stores."""
    x = aligned("X", "m", "p")
    total = LoopState("d", (), Const(0.0), op("add", Tile("d"), Tile("s")))
    return TileProgram(
        "normalise", (tensor("X", "m p"),), (output("Y", "m p"), output("D", "m")), (), (), (GridRank("m", 1),), (),
        (
            loop("p", tile, (total,), Reduce("s", (), "sum", ("p",), Masked(x, Const(0.0)))),
            Map("r", (), op("div", 1.0, Tile("d"))),
            loop("p", tile, (), Store("Y", idx("m", "p"), op("mul", x, Tile("r")))),
            Store("D", idx("m"), Tile("d")),
        ),
    )  # fmt: skip


def whole_sum() -> TileProgram:
    """The sum of all elements: no grid, one task, two loops one inside the other."""
    inner = loop(
        "j", 64, (LoopState("r", (), Const(0.0), op("add", Tile("r"), Tile("s"))),), Reduce("s", (), "sum", ("i", "j"), _both("i", "j"))
    )
    outer = loop("i", 8, (LoopState("a", (), Const(0.0), op("add", Tile("a"), Tile("r"))),), inner)
    return TileProgram(
        "whole_sum", (tensor("X", "i j"),), (TileOutput(Output("S", ()), f32),), (), (), (), (), (outer, Store("S", (), Tile("a")))
    )


def _both(*ranks: str) -> Expr:
    return Masked(aligned("X", *ranks), Const(0.0))


def grouped_codes(*, groups: int = 8) -> TileProgram:
    """Integer codes in groups along a composed axis, a scale a group; sums along the row, and the largest code."""
    value = op("mul", Cast(aligned("C", "m", "n", "j"), f32), aligned("Z", "m", "n"))
    states = (
        LoopState("a", (), Const(0.0), op("add", Tile("a"), Tile("s"))),
        LoopState("h", (), Const(-128), op("maximum", Tile("h"), Tile("g")), i32),
        LoopState("y", (), Const(False), op("or", Tile("y"), Tile("z")), boolean),
    )
    body = (
        Reduce("s", (), "sum", ("n", "j"), Masked(value, Const(0.0))),
        Reduce("g", (), "max", ("n", "j"), Masked(Cast(aligned("C", "m", "n", "j"), i32), Const(-128)), i32),
        Reduce("z", (), "any", ("n", "j"), Masked(op("eq", aligned("C", "m", "n", "j"), 7), Const(False)), boolean),
    )
    return TileProgram(
        "grouped_codes", (Tensor("C", (("m",), ("n", "j")), i8), tensor("Z", "m n")),
        (output("A", "m"), output("H", "m", i32), output("S", "m", boolean)), (), sizes(j=groups), (GridRank("m", 1),), ("j",),
        (
            loop("n", 16, states, *body),
            Store("A", idx("m"), Tile("a")), Store("H", idx("m"), Tile("h")), Store("S", idx("m"), Tile("y")),
        ),
    )  # fmt: skip


def exchange() -> TileProgram:
    """Fibonacci numbers by steps along p: two states that take each other's values."""
    states = (
        LoopState("x", (), Const(0.0), Tile("y")),
        LoopState("y", (), Const(1.0), op("add", Tile("x"), Tile("y"))),
    )
    return TileProgram(
        "exchange",
        (tensor("Z", "p"),),
        (TileOutput(Output("X", ()), f32),),
        (),
        (),
        (),
        (),
        (loop("p", 1, states), Store("X", (), Tile("x"))),
    )


def table_lookup() -> TileProgram:
    """Rows gathered by an index, shifted by one with a fill, beside an offset that stays inside."""
    row = Read("I", idx("i"))
    gathered = Read("T", (row, Index("j")))
    shifted = Read("T", (row, op("sub", Index("j"), 1)), Const(-1.0))
    reversed_ = Read("T", (row, op("sub", op("sub", Extent("j"), 1), Index("j"))))
    return elementwise(
        op("add", op("add", gathered, op("mul", shifted, 10.0)), op("mul", reversed_, 100.0)), (tensor("T", "v j"), tensor("I", "i", i32))
    )


def weighted_sums(*, rows: int = 32, f: int = 48, tile: int = 32, dtype: DType = f32) -> TileProgram:
    """S[m, f] = sum(p) w[p] V[m, p, f]: the contraction's other operand has no rank but the contracted one."""
    weight = Map("w", ("p",), Masked(op("exp", aligned("W", "p")), Const(0.0)))
    body = (weight, Dot("s'", ("m", "f"), ("p",), Tile("w"), aligned("V", "m", "p", "f"), update=Tile("s"), dtype=dtype))
    return TileProgram(
        "weighted_sums", (tensor("W", "p", dtype), tensor("V", "m p f", dtype)), (output("S", "m f"),), (), sizes(f=f),
        (GridRank("m", rows),), ("f",),
        (loop("p", tile, (LoopState("s", ("m", "f"), Const(0.0), Tile("s'")),), *body), Store("S", idx("m", "f"), Tile("s"))),
    )  # fmt: skip
