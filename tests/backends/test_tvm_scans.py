"""Running reductions on the CPU against torch: along vectors, across them, one by one; carried from tile to tile, of every type."""

from __future__ import annotations

import math

import programs as p
import pytest
import torch
from einfall.ir.expr import Cast, Const, Index, Masked, Tile, aligned
from einfall.ir.tile import Bounds, GridRank, Loop, LoopState, Map, Reduce, Scan, Store, TileProgram
from einfall.ir.types import boolean, f32, f64, i8, i32, i64, u8
from einfall.schedules.schedule import GroupSchedule, Schedule
from kernels import DEFAULT, run, source_of

INF = math.inf
IDENTITY = {"sum": 0.0, "prod": 1.0, "max": -INF, "min": INF}
COMBINE = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}
TORCH = {f32: torch.float32, f64: torch.float64, i64: torch.int64, i32: torch.int32, i8: torch.int8, u8: torch.uint8, boolean: torch.bool}


def scanned(op, *, rows=2, tile=None, size=None, exclusive=False, rows_last=False, dtype=f32, expr=None):
    """Y = op-scan of X along p: streamed `tile` at a time with a carry, or resident of `size`. X is [p,m] where rows lie last."""
    ranks = ("p", "m") if rows_last else ("m", "p")
    row = ("m",) if rows > 1 else ()
    own = tuple(r for r in ranks if r == "p" or rows > 1)
    x = expr or aligned("X", *ranks)
    store = Store("Y", p.idx(*ranks), Tile("y"))
    shape = " ".join(ranks)
    inputs, outputs, grid = (p.tensor("X", shape, dtype),), (p.output("Y", shape, dtype),), (GridRank("m", rows),)
    if size is not None:
        body = (Scan("y", own, op, "p", x, None, exclusive, dtype), store)
        return TileProgram("scan", inputs, outputs, (), p.sizes(p=size), grid, ("p",), body)
    guarded = Masked(x, Const(IDENTITY[op] if dtype.is_float else int(IDENTITY[op]) if op in ("sum", "prod") else 0))
    first = Const(IDENTITY[op]) if dtype.is_float else Cast(Const(int(op == "prod")), dtype)
    state = LoopState("before", row, first, p.op(COMBINE[op], Tile("before"), Tile("part")), dtype)
    nodes = (
        Scan("y", own, op, "p", guarded, Tile("before"), exclusive, dtype), store, Reduce("part", row, op, ("p",), guarded, dtype),
    )  # fmt: skip
    return TileProgram("scan", inputs, outputs, (), (), grid, (), (p.loop("p", tile, (state,), *nodes),))


def oracle(op, x, exclusive):
    """One step after the other, in Python's order along the last axis."""
    wide = x.double() if x.is_floating_point() else x.long()
    limits = {"max": torch.iinfo(wide.dtype).min, "min": torch.iinfo(wide.dtype).max} if wide.dtype == torch.int64 else {}
    before = torch.full(x.shape[:-1], limits.get(op, IDENTITY[op]), dtype=wide.dtype)
    result = torch.empty_like(wide)
    functions = {"sum": torch.add, "prod": torch.mul, "max": torch.maximum, "min": torch.minimum}
    for k in range(x.shape[-1]):
        after = functions[op](before, wide[..., k])
        result[..., k] = before if exclusive else after
        before = after
    return result


def values(dtype, *shape):
    generator = torch.Generator().manual_seed(sum(shape))
    if dtype.is_float:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(TORCH[dtype])
    return torch.randint(0 if dtype in (u8, boolean) else -9, 2 if dtype == boolean else 9, shape, generator=generator).to(TORCH[dtype])


def check(program, op, x, exclusive, rows_last, **options):
    given = x.t().contiguous() if rows_last else x
    actual = run(program, {"X": given}, **options)["Y"]
    actual = actual.t() if rows_last else actual
    expected = oracle(op, x, exclusive)
    if x.is_floating_point():
        torch.testing.assert_close(actual.double(), expected, rtol=1e-5, atol=1e-5)
    else:
        assert torch.equal(actual, expected.to(x.dtype))


@pytest.mark.parametrize("rows_last", [False, True], ids=["along", "across"])
@pytest.mark.parametrize("exclusive", [False, True], ids=["inclusive", "exclusive"])
@pytest.mark.parametrize("op", IDENTITY)
def test_streamed_scans(op, exclusive, rows_last):
    rows, tile = {"sum": (16, 32), "prod": (1, 64), "max": (3, 48), "min": (3, 7)}[op]
    program = scanned(op, rows=rows, tile=tile, exclusive=exclusive, rows_last=rows_last)
    for narrowed in (False, True) if exclusive else (False,):
        for m, n in ((1, 1), (5, 70), (17, 131)):
            check(program, op, values(f32, m, n), exclusive, rows_last, narrowed=narrowed)


@pytest.mark.parametrize("exclusive", [False, True], ids=["inclusive", "exclusive"])
@pytest.mark.parametrize("size", [1, 5, 16, 40])
def test_resident_scans(size, exclusive):
    for rows_last in (False, True):
        program = scanned("sum", rows=16, size=size, exclusive=exclusive, rows_last=rows_last)
        check(program, "sum", values(f32, 21, size), exclusive, rows_last)


@pytest.mark.parametrize("op", IDENTITY)
@pytest.mark.parametrize("dtype", [f64, i64, i32, i8, u8], ids=str)
def test_scans_of_every_type(dtype, op):
    for size in (5, 40):
        for exclusive in (False, True) if dtype.is_float or op in ("sum", "prod") else (False,):
            check(scanned(op, rows=2, size=size, exclusive=exclusive, dtype=dtype), op, values(dtype, 3, size), exclusive, False)
    if dtype.is_float or op in ("sum", "prod"):
        check(scanned(op, rows=2, tile=32, dtype=dtype), op, values(dtype, 3, 70), False, False)


@pytest.mark.parametrize("op", ["max", "min"])
def test_scans_of_bools(op):
    x = values(boolean, 3, 40)
    for exclusive in (False, True):
        actual = run(scanned(op, rows=2, size=40, exclusive=exclusive, dtype=boolean), {"X": x})["Y"]
        inclusive = x.long().cummax(-1).values if op == "max" else x.long().cummin(-1).values
        shifted = torch.cat([torch.full((3, 1), int(op == "min")), inclusive[:, :-1]], 1)
        assert torch.equal(actual, (shifted if exclusive else inclusive).bool())


def test_scans_start_from_what_came_before_and_may_be_read_in_other_orders():
    """Decay factors: the running sum of logarithms from a start, its exponential, and a sum over another rank."""
    start = aligned("S", "m")
    body = (
        Scan("g", ("m", "p"), "sum", "p", p.op("log", aligned("X", "m", "p")), start),
        Map("y", ("m", "p"), p.op("exp", Tile("g"))),
        Reduce("total", ("p",), "sum", ("m",), Tile("y")),
        Store("Y", p.idx("m", "p"), Tile("y")),
        Store("T", p.idx("p"), Tile("total")),
    )
    inputs = (p.tensor("X", "m p"), p.tensor("S", "m"))
    program = TileProgram("decay", inputs, (p.output("Y", "m p"), p.output("T", "p")), (), p.sizes(m=6, p=20), (), ("m", "p"), body)
    x, s = values(f32, 6, 20).abs() + 0.5, values(f32, 6)
    expected = (s.double()[:, None] + x.double().log().cumsum(-1)).exp()
    for schedule in (DEFAULT, Schedule.make(group={"g": GroupSchedule(lane="p")}), Schedule.make(layout={"g": ("p", "m")})):
        result = run(program, {"X": x, "S": s}, schedule=schedule)
        torch.testing.assert_close(result["Y"].double(), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(result["T"].double(), expected.sum(0), rtol=1e-5, atol=1e-5)


def test_what_a_condition_excludes_is_masked_and_lower_edges_are_clamped():
    """A window that starts late: position p in [3, 100) of every row, streamed."""
    end = Const(100)
    x = Masked(aligned("X", "m", "p"), Const(0.0))
    state = LoopState("before", ("m",), Const(0.0), p.op("add", Tile("before"), Tile("part")))
    nodes = (
        Scan("y", ("m", "p"), "sum", "p", x, Tile("before")),
        Store("Y", p.idx("m", "p"), Tile("y")),
        Reduce("part", ("m",), "sum", ("p",), x),
    )
    conditions = (p.op("ge", Index("p"), 3), p.op("lt", Index("p"), 100))
    loop = Loop("p", 16, conditions, Bounds(Const(3), Const(3), end, end), (state,), nodes)
    program = TileProgram("window", (p.tensor("X", "m p"),), (p.output("Y", "m p"),), (), (), (GridRank("m", 2),), (), (loop,))
    given = values(f32, 3, 150)
    given[:, :3], given[:, 100:] = math.nan, math.nan
    actual = run(program, {"X": given})["Y"]
    torch.testing.assert_close(actual[:, 3:100].double(), given[:, 3:100].double().cumsum(-1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows_last", [False, True], ids=["along", "across"])
@pytest.mark.parametrize("op", IDENTITY)
def test_a_nan_stays_in_all_that_follows(op, rows_last):
    x = values(f32, 3, 40)
    x[1, 17] = math.nan
    given = x.t().contiguous() if rows_last else x
    actual = run(scanned(op, rows=16, size=40, rows_last=rows_last), {"X": given})["Y"]
    actual = actual.t() if rows_last else actual
    assert actual[1, 17:].isnan().all() and not actual[1, :17].isnan().any() and not actual[::2].isnan().any()


def test_a_scan_along_the_lane_is_done_in_registers():
    text = source_of(scanned("sum", rows=2, tile=64)).text
    assert "prefixsum_float32_v" in text and "lastsum_float32_v" in text
    assert "prefixsum" not in source_of(scanned("sum", rows=16, tile=64, rows_last=True)).text
