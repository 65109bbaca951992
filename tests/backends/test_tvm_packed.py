"""Packed codes and paged rows on the CPU: nibbles unpacked on the way into a contraction, interleaved and planar, gathered rows."""

from __future__ import annotations

import re

import programs as p
import pytest
import torch
from einfall.ir.cascade import Output, RankDecl, Tensor
from einfall.ir.expr import Cast, Const, Extent, Index, Masked, Read, Tile, aligned
from einfall.ir.tile import Dot, GridRank, LoopState, Map, Reduce, Store, TileOutput, TileProgram
from einfall.ir.types import f32, i32, u8
from kernels import run, source_of

J = 64
NIBBLE = p.op("and", p.op("shr", Cast(aligned("C", "p", "j"), i32), p.op("mul", Index("s"), 4)), 15)
VALUE = p.op("mul", Cast(NIBBLE, f32), aligned("Z", "p"))
LOW = -1e30


def running_maximum(name, inputs, operand, over, *, rows, stream, tile, ranks, resident):
    """max over the stream of a contraction of the rows Q with `operand`."""
    dot = Dot("sc", ("r", stream), over, Tile("q"), operand)
    top = Reduce("t", ("r",), "max", (stream,), Masked(Tile("sc"), Const(LOW)))
    state = LoopState("m", ("r",), Const(LOW), p.op("maximum", Tile("m"), Tile("t")))
    query = Map("q", ("r", *over), aligned("Q", "b", "r", *over))
    body = (query, p.loop(stream, tile, (state,), dot, top), Store("O", p.idx("b", "r"), Tile("m")))
    declared = (*p.sizes(r=rows), *ranks)
    return TileProgram(name, inputs, (p.output("O", "b r"),), (), declared, (GridRank("b", 1),), ("r", *resident), body)


def codes(rows):
    return torch.randint(0, 256, (rows, J), generator=torch.Generator().manual_seed(rows), dtype=torch.uint8)


def unpacked(c, z):
    return torch.stack([c & 15, c >> 4], -1).double() * z.double()[:, None, None]


@pytest.mark.parametrize("rows", [1, 4, 32])
def test_nibbles_are_unpacked_in_vectors_on_the_way_into_a_contraction(rows):
    inputs = (p.tensor("Q", "b r j s"), p.tensor("C", "p j", u8), p.tensor("Z", "p"))
    program = running_maximum(
        "nibbles", inputs, VALUE, ("j", "s"), rows=rows, stream="p", tile=128, ranks=p.sizes(j=J, s=2), resident=("j", "s")
    )
    text = source_of(program).text.partition("wholly inside")[2].partition("at an edge")[0]
    assert "shr_int32_v" in text and "shr_int32_s" not in text and not re.search(r"for l(_\d+)? in", text)
    for n in (1, 130, 256):
        c, z = codes(n), torch.rand(n)
        q = torch.randn(2, rows, J, 2, generator=torch.Generator().manual_seed(n))
        expected = torch.einsum("brjs,pjs->brp", q.double(), unpacked(c, z)).amax(-1)
        torch.testing.assert_close(run(program, {"Q": q, "C": c, "Z": z})["O"].double(), expected, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("axis", [("j", "s"), ("s", "j")], ids=["interleaved", "planar"])
def test_unpacking_and_packing(axis):
    shape = TileOutput(Output("Y", (("p",), axis)), f32)
    store = Store("Y", p.idx("p", *axis), VALUE)
    sizes = p.sizes(j=J, s=2)
    program = TileProgram(
        "unpack", (p.tensor("C", "p j", u8), p.tensor("Z", "p")), (shape,), (), sizes, (GridRank("p", 4),), ("j", "s"), (store,)
    )
    for n in (1, 7):
        c, z = codes(n), torch.rand(n)
        values = unpacked(c, z)
        expected = (values if axis == ("j", "s") else values.transpose(1, 2)).reshape(n, -1)
        torch.testing.assert_close(run(program, {"C": c, "Z": z})["Y"].double(), expected, rtol=1e-6, atol=1e-6)
    both = p.op("or", Read("N", (Index("p"), Index("j"), Const(0))), p.op("shl", Read("N", (Index("p"), Index("j"), Const(1))), 4))
    if axis == ("s", "j"):
        both = p.op("or", Read("N", (Index("p"), Const(0), Index("j"))), p.op("shl", Read("N", (Index("p"), Const(1), Index("j"))), 4))
    pack = TileProgram(
        "pack", (Tensor("N", (("p",), axis), i32),), (p.output("C", "p j", u8),), (), sizes, (GridRank("p", 4),), ("j",),
        (Store("C", p.idx("p", "j"), Cast(both, u8)),),
    )  # fmt: skip
    for n in (1, 7):
        c = codes(n)
        nibbles = torch.stack([c & 15, c >> 4], -1).int()
        given = (nibbles if axis == ("j", "s") else nibbles.transpose(1, 2)).reshape(n, -1).contiguous()
        assert torch.equal(run(pack, {"N": given})["C"], c)


def test_pages_are_read_in_rows():
    """K[page[b, p // 16], p % 16, e]: a row is gathered, its elements lie along the lane."""
    page = Read("P", (Index("b"), p.op("floordiv", Index("p"), 16)))
    row = Read("K", (page, p.op("mod", Index("p"), 16), Index("e")))
    inputs = (p.tensor("Q", "b r e"), p.tensor("K", "g j e"), p.tensor("P", "b n", i32))
    ranks = (*p.sizes(j=16, e=64), RankDecl("p", p.op("mul", Extent("n"), Extent("j"))))
    program = running_maximum("paged", inputs, row, ("e",), rows=4, stream="p", tile=128, ranks=ranks, resident=("e",))
    text = source_of(program).text.partition("wholly inside")[2].partition("at an edge")[0]
    assert "T.ramp(k_e" in text
    for pages in (1, 5, 16):
        pool = torch.randn(40, 16, 64, generator=torch.Generator().manual_seed(pages))
        table = torch.randperm(40, generator=torch.Generator().manual_seed(pages))[: 2 * pages].view(2, pages).int()
        q = torch.randn(2, 4, 64)
        keys = pool[table.long()].reshape(2, -1, 64)
        expected = torch.einsum("bre,bpe->brp", q.double(), keys.double()).amax(-1)
        torch.testing.assert_close(run(program, {"Q": q, "K": pool, "P": table})["O"].double(), expected, rtol=1e-5, atol=1e-4)


def test_a_composed_last_coordinate_is_read_in_vectors_within_the_tensor():
    """X[m, n * J + j] along j: a tile of n that leaves its extent reads nothing beyond the memory."""
    coordinate = p.op("add", p.op("mul", Index("n"), Extent("j")), Index("j"))
    x = Map("x", ("n", "j"), Read("X", (Index("m"), coordinate)))
    program = TileProgram(
        "composed", (p.tensor("X", "m k"),), (p.output("Y", "m n j"),), (), (*p.sizes(j=J), RankDecl("n", Const(5))),
        (GridRank("m", 1), GridRank("n", 4)), ("j",), (x, Store("Y", p.idx("m", "n", "j"), Tile("x"))),
    )  # fmt: skip
    assert "T.unroll" not in source_of(program).text.partition("def main")[2]
    given = torch.randn(3, 5 * J)
    assert torch.equal(run(program, {"X": given})["Y"], given.view(3, 5, J))
