"""Random tile programs that are right by construction: reductions over the stream are masked, everything else may be anything."""

from __future__ import annotations

import random

import torch
from einfall.ir.expr import Cast, Const, Count, Expr, Extent, Index, Masked, Seen, Start, Tile, aligned
from einfall.ir.tile import Bounds, Dot, GridRank, Loop, LoopState, Map, Reduce, Store, TileProgram
from einfall.ir.types import f32
from programs import INF, idx, op, output, sizes, tensor

EXTENTS = {"X": ("m", "p"), "Y": ("p", "f"), "Z": ("m", "e"), "W": ("e", "p"), "V": ("b", "m", "p", "f"), "R": ("m",)}
UNARY = ("tanh", "abs", "neg", "sigmoid", "exact")
BINARY = ("add", "sub", "mul", "maximum", "minimum")


class Maker:
    """Draws one program; `tiles` are the tiles that may be read where the maker stands, with their ranks."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.rows = self.random.choice([1, 2, 7, 16, 64])
        self.tile = self.random.choice([4, 16, 48, 64, 128])
        self.sizes = {"e": self.random.choice([1, 2, 5, 16, 24]), "f": self.random.choice([1, 3, 16, 40])}
        self.causal = self.random.random() < 0.4
        self.count = 0

    def name(self) -> str:
        self.count += 1
        return f"t{self.count}"

    def ranks(self, *allowed: str) -> tuple[str, ...]:
        allowed = tuple(r for r in allowed if r != "m" or self.rows > 1)
        chosen = [r for r in allowed if self.random.random() < 0.6]
        self.random.shuffle(chosen)
        return tuple(chosen)

    def masked(self, ranks: tuple[str, ...], over: tuple[str, ...]) -> tuple[str, ...]:
        """`ranks` of a result reduced over `over`: what a condition on the rows masks depends on the row."""
        needed = self.causal and self.rows > 1 and "p" in over and "m" not in ranks
        return ("m", *ranks) if needed else ranks

    def leaf(self, ranks: tuple[str, ...], tiles: dict[str, tuple[str, ...]], streaming: bool) -> Expr:
        points = {*ranks, "b", *(("m",) if self.rows == 1 else ())}
        options: list[Expr] = [Tile(t) for t, r in tiles.items() if set(r) <= set(ranks)]
        options += [aligned(name, *r) for name, r in EXTENTS.items() if set(r) <= points]
        options += [Const(self.random.choice([0.5, -1.25, 2.0]))]
        if streaming and self.random.random() < 0.15:
            return op("div", Cast(self.random.choice([Start("p"), Count("p"), Seen("p")]), f32), Cast(Extent("p"), f32))
        if ranks and self.random.random() < 0.1:
            return self.ramp(self.random.choice(ranks))
        return self.random.choice(options)

    def ramp(self, *ranks: str) -> Expr:
        """A value that depends on all `ranks`."""
        e: Expr = Const(0.125)
        for rank in ranks:
            e = op("add", e, op("mul", Cast(Index(rank), f32), 0.01))
        return e

    def expr(self, ranks: tuple[str, ...], tiles: dict[str, tuple[str, ...]], streaming: bool, depth: int = 2) -> Expr:
        if depth == 0 or self.random.random() < 0.2:
            return self.leaf(ranks, tiles, streaming)
        if self.random.random() < 0.35:
            return op(self.random.choice(UNARY), self.expr(ranks, tiles, streaming, depth - 1))
        a, b = (self.expr(ranks, tiles, streaming, depth - 1) for _ in range(2))
        if self.random.random() < 0.15:
            return op("where", op("lt", a, b), a, op("mul", b, 0.5))
        return op(self.random.choice(BINARY), a, b)

    def statements(self, tiles: dict[str, tuple[str, ...]], number: int, streaming: bool) -> list[Map | Reduce | Dot]:
        """Statements in order; `tiles` grows by what they define. Values stay near 1: reductions are scaled down."""
        result: list[Map | Reduce | Dot] = []
        free = ("m", "e", "f", "p") if streaming else ("m", "e", "f")
        for _ in range(number):
            kind = self.random.choice(["map", "map", "reduce", "dot"])
            dst = self.name()
            if kind == "map":
                ranks = self.ranks(*free)
                result.append(Map(dst, ranks, self.expr(ranks, tiles, streaming)))
            elif kind == "reduce":
                over = self.ranks("e", "f", *(("p",) if streaming else ())) or ("e",)
                ranks = self.masked(tuple(r for r in self.ranks(*free) if r not in over), over)
                word = self.random.choice(["sum", "max", "min"])
                x = op(
                    "mul",
                    op("tanh", op("mul", self.ramp(*over), self.expr((*ranks, *over), tiles, streaming))),
                    0.1 if word == "sum" else 1.0,
                )
                identity = {"sum": 0.0, "max": -INF, "min": INF}[word]
                x = Masked(x, Const(identity)) if "p" in over else x
                result.append(Reduce(dst, ranks, word, over, x))
                if "p" in over and word != "sum":  # a wholly masked row is infinite
                    tiles[dst] = ranks
                    dst = self.name()
                    ranks = tiles[result[-1].dst]
                    result.append(Map(dst, ranks, op("maximum", op("minimum", Tile(result[-1].dst), 2.0), -2.0)))
            else:
                over = ("p",) if streaming and self.random.random() < 0.5 else ("e",)
                left = self.masked(tuple(r for r in self.ranks("m", "f") if r not in over), over)
                right = tuple(r for r in self.ranks("f", *(("p",) if streaming else ())) if r not in (*over, *left))
                ranks = (*left, *right)
                a = op("mul", op("tanh", op("mul", self.ramp(*over), self.expr((*left, *over), tiles, streaming))), 0.1)
                a = Masked(a, Const(0.0)) if over == ("p",) else a
                b = op("tanh", op("mul", self.ramp(*over), self.expr((*over, *right), tiles, streaming, 1)))
                update = self.leaf(ranks, tiles, streaming) if self.random.random() < 0.4 else None
                post = op("tanh", Tile(dst)) if self.random.random() < 0.3 else None
                result.append(Dot(dst, ranks, over, a, b, update, post))
            tiles[dst] = result[-1].ranks
        return result


def random_program(seed: int) -> TileProgram:
    """The program of that seed."""
    make = Maker(seed)
    before: dict[str, tuple[str, ...]] = {}
    pre = make.statements(before, make.random.randrange(3), False)
    carried = {f"s{i}": make.ranks("m", "e", "f") for i in range(1 + make.random.randrange(3))}
    inside = {**before, **carried}
    body = make.statements(inside, 2 + make.random.randrange(6), True)
    states = []
    for name, ranks in carried.items():
        own = [t for t, r in inside.items() if set(r) == set(ranks) and t not in carried and t not in before]
        next_value: Expr = Tile(make.random.choice(own)) if own and make.random.random() < 0.7 else make.expr(ranks, inside, True)
        states.append(
            LoopState(
                name, ranks, Const(0.25), op("mul", op("add", next_value, Tile(name)), 0.5) if make.random.random() < 0.5 else next_value
            )
        )
    rows = make.rows
    conditions, whole_end, end = (), Extent("p"), Extent("p")
    if make.causal:
        first = Start("m") if rows > 1 else Index("m")
        conditions = (op("le", Index("p"), op("add", Index("m"), 3)),)
        whole_end, end = op("add", first, 4), op("add", first, rows + 3)
    loop = Loop("p", make.tile, conditions, Bounds(Const(0), Const(0), whole_end, end), tuple(states), tuple(body))
    after = {**before, **carried}
    post = make.statements(after, make.random.randrange(3), False)
    outputs, stores = [], []
    for i, (tile, ranks) in enumerate(sorted(after.items())):
        outputs.append(output(f"O{i}", " ".join(("b", "m", *(r for r in ranks if r != "m")))))
        stores.append(Store(f"O{i}", idx("b", "m", *(r for r in ranks if r != "m")), Tile(tile)))
    inputs = tuple(tensor(name, " ".join(ranks)) for name, ranks in EXTENTS.items())
    return TileProgram(
        f"random_{seed}", inputs, tuple(outputs), (), sizes(**make.sizes), (GridRank("b", 1), GridRank("m", rows)), ("e", "f"),
        (*pre, loop, *post, *stores),
    )  # fmt: skip


def random_tensors(program: TileProgram, extents: dict[str, int], seed: int) -> dict[str, torch.Tensor]:
    """Inputs for those extents of b, m and p."""
    generator = torch.Generator().manual_seed(seed)
    known = {**extents, **{d.name: program.static_size(d.name) for d in program.ranks}}
    return {t.name: torch.randn([known[r] for r in t.ranks], generator=generator) for t in program.inputs}
