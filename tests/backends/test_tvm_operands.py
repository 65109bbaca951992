"""Operands computed where they are multiplied: the same results as from tiles, and a tile wherever one pays or is asked for."""

from __future__ import annotations

import programs as p
import pytest
import torch
from einfall.ir.expr import Const, Tile, aligned
from einfall.ir.tile import Dot, GridRank, Loop, LoopState, Map, Store, TileProgram
from einfall.ir.types import i8
from einfall.schedules.operands import fold_operands
from einfall.schedules.schedule import DotSchedule, Schedule
from kernels import run
from test_tvm_kernels import close, random


def scaled(*, rows: int = 4, c: int = 3, j: int = 20, f: int = 37, tile: int = 48) -> TileProgram:
    """O[r,f] = sum(p) (sum(c,j) Q K Ks) (V Vs + Vz): both products have an operand that is computed from memory."""
    keys = p.op("mul", aligned("K", "b", "p", "c", "j"), aligned("Ks", "b", "p", "c"))
    values = p.op("add", p.op("mul", aligned("V", "b", "p", "f"), aligned("Vs", "b", "p")), aligned("Vz", "b", "p"))
    body = (
        Map("k", ("p", "c", "j"), keys),
        Dot("s", ("r", "p"), ("c", "j"), Tile("q"), Tile("k")),
        Map("v", ("p", "f"), values),
        Dot("o'", ("r", "f"), ("p",), Tile("s"), Tile("v"), update=Tile("o")),
    )
    return TileProgram(
        "scaled",
        (
            p.tensor("Q", "b r c j"), p.tensor("K", "b p c j", i8), p.tensor("Ks", "b p c"), p.tensor("V", "b p f", i8),
            p.tensor("Vs", "b p"), p.tensor("Vz", "b p"),
        ),
        (p.output("O", "b r f"),),
        (),
        p.sizes(c=c, j=j, f=f),
        (GridRank("b", 1), GridRank("r", rows)),
        ("c", "j", "f"),
        (
            Map("q", ("r", "c", "j"), aligned("Q", "b", "r", "c", "j")),
            p.loop("p", tile, (LoopState("o", ("r", "f"), Const(0.0), Tile("o'")),), *body),
            Store("O", p.idx("b", "r", "f"), Tile("o")),
        ),
    )  # fmt: skip


def tiles(program: TileProgram) -> set[str]:
    """The maps inside of the loop."""
    (loop,) = (n for n in program.body if isinstance(n, Loop))
    return {n.dst for n in loop.body if isinstance(n, Map)}


@pytest.mark.parametrize("narrowed", [False, True])
@pytest.mark.parametrize("rows, keys, c, j, f", [(4, 131, 3, 20, 37), (3, 96, 4, 32, 64), (2, 7, 2, 48, 16), (8, 131, 3, 20, 37)])
def test_products_of_computed_operands(rows, keys, c, j, f, narrowed):
    q, ks, vs, vz = random(1, 2, 5, c, j), random(2, 2, keys, c), random(3, 2, keys), random(4, 2, keys)
    g = torch.Generator().manual_seed(5)
    k, v = (torch.randint(-128, 128, s, generator=g).to(torch.int8) for s in ((2, keys, c, j), (2, keys, f)))
    program = scaled(rows=rows, c=c, j=j, f=f)
    actual = run(program, {"Q": q, "K": k, "Ks": ks, "V": v, "Vs": vs, "Vz": vz}, narrowed=narrowed)["O"]
    scores = q.double().flatten(2) @ (k.double() * ks.double()[..., None]).flatten(2).mT
    expected = scores @ (v.double() * vs.double()[..., None] + vz.double()[..., None])
    largest = expected.abs().max()
    close(actual / largest, expected / largest, 1e-6)


def test_what_few_rows_use_is_no_tile():
    assert tiles(fold_operands(scaled(rows=4), Schedule())) == set()
    assert tiles(fold_operands(scaled(rows=8), Schedule())) == {"k", "v"}
    kept = Schedule.make(layout={"k": ("p", "c", "j")}, dot={"s": DotSchedule(lane="j")})
    assert tiles(fold_operands(scaled(rows=4), kept)) == {"k"}
