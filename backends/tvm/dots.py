"""Contractions as register tiles: vectors along one rank times broadcast elements, accumulated in registers."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeAlias

from ...ir.expr import Expr, Index, Read, Tile
from ...ir.infer import expression_ranks
from ...ir.tile import Dot
from ...ir.types import bf16, f64
from . import script as ts
from .evaluate import Active, Point
from .kernel import Kernel, Nest
from .script import Alloc, Comment, For, Set, Statement, Value
from .stores import write_tile

UNROLLED = 16  # vectors of a row up to which a horizontal dot has no loop: what an operand's parts share is loaded and converted once


@dataclass(frozen=True, slots=True)
class RegisterTile:
    """The register tile of one dot: `rows` elements of every other rank times `vectors` vectors along the lane."""

    rows: tuple[tuple[str, int], ...]
    lane: str | None
    vectors: int
    lanes: int
    horizontal: bool
    dtype: str

    @property
    def shape(self) -> tuple[int, ...]:
        return (*(n for _, n in self.rows if n > 1), self.vectors * self.lanes)

    def width(self, rank: str) -> int:
        """Elements of an output rank a register tile covers."""
        if rank == self.lane:
            return self.vectors * self.lanes
        return dict(self.rows)[rank]


def register_tile(kernel: Kernel, dot: Dot) -> RegisterTile:
    """The schedule's register tile as data for the loops."""
    chosen = kernel.dots[dot.dst]
    sizes = dict(chosen.register)
    lane = chosen.lane
    lanes = kernel.cpu.lanes if lane is not None else 1
    horizontal = lane in dot.over
    rows = tuple((r, sizes.get(r, 1)) for r in dot.ranks if r != lane)
    vectors = 1 if lane is None or horizontal else max(1, sizes.get(lane, lanes) // lanes)
    return RegisterTile(rows, lane, vectors, lanes, horizontal, "float64" if dot.dtype == f64 else "float32")


def emit_dot(kernel: Kernel, dot: Dot, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """The loops of a contraction, appended to `out`."""
    kernel.evaluator.statement = dot.dst
    out.append(Comment(kernel.text(dot)))
    tile = register_tile(kernel, dot)
    blocks = _k_blocks(kernel, dot, tile, loops)
    if blocks is None:
        at_load = kernel.dots[dot.dst].update_at_load and not tile.horizontal
        _block(kernel, dot, tile, _Depth(None, first=True, last=True, at_load=at_load), loops, out)
        return
    rank, depth, count = blocks
    for number in range(count):  # partial sums wait in the tile; the update enters with the first, where its operand may lie as well
        part = KBlock(rank, number * depth, depth)
        _block(kernel, dot, tile, _Depth(part, first=number == 0, last=number == count - 1, at_load=True), loops, out)


@dataclass(frozen=True, slots=True)
class KBlock:
    """A part of the contracted rank."""

    rank: str
    start: int
    size: int


@dataclass(frozen=True, slots=True)
class _Depth:
    """Which part of the contraction a block computes, and when the update enters."""

    part: KBlock | None
    first: bool
    last: bool
    at_load: bool


def _k_blocks(kernel: Kernel, dot: Dot, tile: RegisterTile, loops: tuple[Active, ...]) -> tuple[str, int, int] | None:
    """The rank, size and number of blocks where the schedule splits the contraction; only a known depth that it divides is split."""
    depth = kernel.dots[dot.dst].k_block
    rank = dot.over[-1]
    size = kernel.size(rank, loops)
    if depth is None or tile.horizontal or size <= depth or size % depth or depth % 2 or any(a.loop.rank == rank for a in loops):
        return None
    return rank, depth, size // depth


def _block(kernel: Kernel, dot: Dot, tile: RegisterTile, depth: _Depth, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """One sweep over the register tiles of the result."""
    nest = _blocks(kernel, dot, tile, loops, out)
    acc = kernel.names.fresh("acc")
    nest.body.append(Alloc(acc, tile.shape, tile.dtype))

    def load(at: Point, target: Value, body: list[Statement]) -> None:
        body.append(Set(target, _first(kernel, dot, tile, at, depth, body)))

    def store(at: Point, target: Value, body: list[Statement]) -> None:
        if depth.last:
            _write_back(kernel, dot, at, target, None if depth.at_load else dot.update, body)
        else:
            write_tile(kernel, dot.dst, at, target, body)

    _each(kernel, tile, nest.point, nest.body, load, acc)
    _contract(kernel, dot, tile, nest, acc, depth.part)
    if tile.horizontal:
        _write_horizontal(kernel, dot, tile, nest.point, nest.body, acc, dot.update)
    else:
        _each(kernel, tile, nest.point, nest.body, store, acc)


def _blocks(kernel: Kernel, dot: Dot, tile: RegisterTile, loops: tuple[Active, ...], out: list[Statement]) -> Nest:
    """Loops over register tiles: batch ranks, then the lane, then the rest, so that the vectors of one column stay in the cache."""
    lane = None if tile.horizontal else tile.lane
    nest = Nest(out, Point(local={}, lane=lane, lanes=tile.lanes if lane else 1, loops=loops))
    both = set(expression_ranks(dot.a, kernel.ranks)) & set(expression_ranks(dot.b, kernel.ranks))
    order = sorted(dot.ranks, key=lambda r: (r not in both, r != lane))
    for rank in order:
        width = tile.width(rank)
        exact = width == 1 and kernel.spans_exactly(rank, loops)
        nest.loop(kernel.names, rank, ts.ceil_div(kernel.span(rank, loops), width), step=width, prefix="b", exact=exact)
    return nest


def _rows(kernel: Kernel, tile: RegisterTile, at: Point, out: list[Statement]) -> tuple[Point, list[Value], list[Statement]]:
    """Unrolled loops over the rows of the register tile; the point and index within it."""
    index: list[Value] = []
    for rank, n in tile.rows:
        if n == 1:
            continue
        c = ts.name(kernel.names.fresh("c", rank))
        inner: list[Statement] = []
        out.append(For(c.text, ts.integer(0), ts.integer(n), "T.unroll", inner))
        out = inner
        at = replace(at, local={**at.local, rank: ts.add(at.local[rank], c)}, exact=at.exact - {rank})
        index.append(c)
    return at, index, out


Visit: TypeAlias = Callable[[Point, Value, list[Statement]], None]


def _each(kernel: Kernel, tile: RegisterTile, at: Point, out: list[Statement], visit: Visit, acc: str) -> None:
    """Calls `visit(point, accumulator, body)` inside unrolled loops over the register tile."""
    at, index, out = _rows(kernel, tile, at, out)
    if tile.vectors > 1:
        c = ts.name(kernel.names.fresh("cv"))
        inner: list[Statement] = []
        out.append(For(c.text, ts.integer(0), ts.integer(tile.vectors), "T.unroll", inner))
        out = inner
        along = ts.mul(c, ts.integer(tile.lanes))
        at = replace(at, local={**at.local, str(tile.lane): ts.add(at.local[str(tile.lane)], along)})
        last = along
    else:
        last = ts.integer(0)
    text = ", ".join(i.text for i in (*index, ts.ramp(last, tile.lanes)))
    visit(at, Value(f"{acc}[{text}]", tile.dtype, tile.lanes), out)


def _first(kernel: Kernel, dot: Dot, tile: RegisterTile, at: Point, depth: _Depth, out: list[Statement]) -> Value:
    """What an accumulator starts from: nothing, the update, or the partial sum of the block before."""
    v = ts.constant(0, tile.dtype)
    if not depth.first:
        v = kernel.evaluator.value(Tile(dot.dst), at, out)
    elif depth.at_load and dot.update is not None:
        v = kernel.evaluator.cast(kernel.evaluator.value(dot.update, at, out), tile.dtype)
    return ts.broadcast(v, tile.lanes) if tile.lanes > 1 else v


def _contract(kernel: Kernel, dot: Dot, tile: RegisterTile, nest: Nest, acc: str, part: KBlock | None) -> None:
    """The loops over the contracted ranks around the multiply-adds."""
    paired = kernel.pairs.get(dot.dst)
    loops = nest.point.loops
    inner = Nest(nest.body, nest.point)
    kind = "T.unroll" if tile.horizontal and _vectors_deep(kernel, dot, tile, loops) <= UNROLLED else "range"
    for rank in dot.over:
        if rank == tile.lane:
            continue
        count = kernel.trip(rank, loops)
        if part is not None and part.rank == rank:
            count = ts.integer(part.size)
            inner.point = replace(inner.point, local={**inner.point.local, rank: ts.integer(part.start)})
        if rank == paired:
            inner.loop(kernel.names, rank, ts.ceil_div(count, 2), step=2, prefix="k")
        else:
            inner.loop(kernel.names, rank, count, kind=kind, prefix="k", exact=kernel.is_exact(rank, loops))
    neighbours = _pairs_of_neighbours(kernel, dot, tile, loops)
    if tile.horizontal:
        lane = str(tile.lane)
        step = tile.lanes * (2 if neighbours else 1)
        inner.loop(kernel.names, lane, ts.ceil_div(kernel.trip(lane, loops), step), step=step, prefix="k")
        inner.point = replace(inner.point, lane=lane, lanes=tile.lanes)

    def multiply(at: Point, target: Value, body: list[Statement]) -> None:
        if paired is not None or neighbours:
            a, b = (_neighbours(kernel, e, at, body) if paired is None else _pair(kernel, e, paired, at, body) for e in (dot.a, dot.b))
            function = f"dot_bf16_v{tile.lanes}"
            kernel.evaluator.helpers.add(function)
            total = ts.extern(function, target, ts.broadcast(a, tile.lanes), ts.broadcast(b, tile.lanes), dtype="float32", lanes=tile.lanes)
            body.append(Set(target, total))
            return
        a, b = (kernel.evaluator.cast(_operand(kernel, e, tile, at, body), tile.dtype) for e in (dot.a, dot.b))
        a, b = (ts.broadcast(v, tile.lanes) if tile.lanes > 1 else v for v in (a, b))
        body.append(Set(target, Value(f"{target.text} + {a.text} * {b.text}", tile.dtype, tile.lanes)))

    _each(kernel, tile, inner.point, inner.body, multiply, acc)


def _operand(kernel: Kernel, e: Expr, tile: RegisterTile, at: Point, out: list[Statement]) -> Value:
    """An operand at a point; in a horizontal dot the padding of the contracted rank is 0."""
    v = kernel.evaluator.value(e, at, out)
    if not tile.horizontal:
        return v
    lane = str(tile.lane)
    tests = []
    size = kernel.size(lane, at.loops)
    if size % tile.lanes:
        tests.append(
            Value(
                f"{ts.ramp(at.local[lane], tile.lanes).text} < {ts.broadcast(ts.integer(size), tile.lanes).text}",
                "bool",
                tile.lanes,
                binding=ts.OTHER,
            )
        )
    active = next((a for a in at.loops if a.loop.rank == lane), None)
    if active is not None and active.edge:
        index = ts.ramp(ts.narrow(kernel.evaluator.index(lane, at)), tile.lanes)
        limit = ts.broadcast(ts.narrow(kernel.memory.extent(lane)), tile.lanes)
        tests.append(Value(f"{index.text} < {limit.text}", "bool", tile.lanes, binding=ts.OTHER))
    inside = kernel.evaluator.all_of(tests)
    return v if inside is None else kernel.evaluator.select(inside, v, ts.constant(0, v.dtype))


def _vectors_deep(kernel: Kernel, dot: Dot, tile: RegisterTile, loops: tuple[Active, ...]) -> float:
    """Vectors of a row of a horizontal dot; without end where that is not known."""
    if any(kernel.trip(rank, loops).number is None for rank in dot.over):
        return math.inf
    return math.prod(kernel.size(rank, loops) for rank in dot.over) / tile.lanes


def _pairs_of_neighbours(kernel: Kernel, dot: Dot, tile: RegisterTile, loops: tuple[Active, ...]) -> bool:
    """Whether a horizontal dot multiplies two neighbours at once in bf16: a contracted rank of a known number of such vectors."""
    if not tile.horizontal or dot.dtype != bf16 or not kernel.cpu.bf16_dot or any(a.loop.rank == tile.lane for a in loops):
        return False
    return kernel.size(str(tile.lane), loops) % (2 * tile.lanes) == 0 and kernel.is_exact(str(tile.lane), loops)


def _lies_in_pairs(kernel: Kernel, e: Read, at: Point) -> bool:
    array = kernel.memory.arrays[e.tensor]
    own = bool(e.coords) and e.coords[-1] == Index(array.ranks[-1])  # all of them lie in the tensor
    return array.dtype == bf16 and e.fill is None and own and kernel.evaluator.is_vector(e, array, at)


def _neighbours(kernel: Kernel, e: Expr, at: Point, out: list[Statement]) -> Value:
    """Two vectors along the lane as one of bf16: from memory as it lies there, else rounded."""
    lane = str(at.lane)
    if isinstance(e, Read) and _lies_in_pairs(kernel, e, at):
        element = kernel.evaluator.element(e, replace(at, lane=None, lanes=1, exact=at.exact | {lane}), out)
        function = f"load_pairs_v{at.lanes}"
        kernel.evaluator.helpers.add(function)
        return ts.extern(function, Value(f"T.address_of({element.text})", "handle"), dtype="int32", lanes=at.lanes)
    after = replace(at, local={**at.local, lane: ts.add(at.local[lane], ts.integer(at.lanes))})
    low, high = (ts.broadcast(kernel.evaluator.cast(kernel.evaluator.value(e, p, out), "float32"), at.lanes) for p in (at, after))
    function = f"join_bf16_v{at.lanes}"
    kernel.evaluator.helpers.add(function)
    return ts.extern(function, low, high, dtype="int32", lanes=at.lanes)


def _pair(kernel: Kernel, e: Expr, paired: str, at: Point, out: list[Statement]) -> Value:
    """Two neighbouring elements along the contracted rank as one i32."""
    if isinstance(e, Tile):
        buffer = kernel.buffers[e.name]
        return buffer.at(at.local, at.lane, at.lanes) if at.lane in buffer.ranks else buffer.at(at.local)
    assert isinstance(e, Read)
    element = kernel.evaluator.element(e, replace(at, lane=None, lanes=1, exact=at.exact | {paired}), out)
    kernel.evaluator.helpers.add("load_pair")
    return ts.extern("load_pair", Value(f"T.address_of({element.text})", "handle"), dtype="int32")


def _write_back(kernel: Kernel, dot: Dot, at: Point, total: Value, update: Expr | None, out: list[Statement]) -> None:
    """post(total + update) into the tile."""
    evaluator = kernel.evaluator
    v = total
    if update is not None:
        a, b = evaluator.unify(v, evaluator.value(update, at, out))
        v = Value(f"({a.text} + {b.text})", a.dtype, a.lanes)
    if dot.post is not None:
        v = evaluator.value(dot.post, at.with_values(**{dot.dst: v}), out)
    v = evaluator.cast(v, "float64" if dot.dtype == f64 else "float32")
    write_tile(kernel, dot.dst, at, v, out)


def _write_horizontal(kernel: Kernel, dot: Dot, tile: RegisterTile, at: Point, out: list[Statement], acc: str, update: Expr | None) -> None:
    """The sum of every accumulator's lanes into the tile, four neighbours at once where the tile has them adjacent."""
    rank = kernel.buffers[dot.dst].lane
    inner = next((r for r, n in reversed(tile.rows) if n > 1), None)
    four = rank is not None and rank == inner and dict(tile.rows)[rank] % 4 == 0 and tile.lanes >= 4 and tile.dtype == "float32"
    if four and kernel.buffers[dot.dst].contiguous(str(rank), 4):
        _write_fours(kernel, dot, tile, at, out, acc, update, str(rank))
        return
    function = f"hsum_{tile.dtype}_v{tile.lanes}"
    kernel.evaluator.helpers.add(function)

    def write(point: Point, target: Value, body: list[Statement]) -> None:
        total = ts.extern(function, target, dtype=tile.dtype)
        _write_back(kernel, dot, replace(point, lane=None, lanes=1), kernel.evaluator.bind(total, dot.dst, body), update, body)

    _each(kernel, tile, at, out, write, acc)


def _write_fours(
    kernel: Kernel, dot: Dot, tile: RegisterTile, at: Point, out: list[Statement], acc: str, update: Expr | None, rank: str
) -> None:
    function = f"hsum4_float32_v{tile.lanes}"
    kernel.evaluator.helpers.add(function)
    outer = replace(tile, rows=tuple((r, n // 4 if r == rank else n) for r, n in tile.rows))
    rows = [(r, n) for r, n in outer.rows if r != rank]
    at, index, body = _rows(kernel, replace(outer, rows=tuple(rows)), at, out)
    c = ts.integer(0)
    if dict(outer.rows)[rank] > 1:
        c = ts.name(kernel.names.fresh("c", rank))
        inner: list[Statement] = []
        body.append(For(c.text, ts.integer(0), ts.integer(dict(outer.rows)[rank]), "T.unroll", inner))
        body = inner
    first = ts.mul(c, ts.integer(4))
    lanes = ts.ramp(ts.integer(0), tile.lanes).text
    parts = []
    for k in range(4):
        text = ", ".join(i.text for i in (*index, ts.add(first, ts.integer(k))))
        parts.append(Value(f"{acc}[{text}, {lanes}]", "float32", tile.lanes))
    total = Value(ts.extern(function, *parts, dtype="float32", lanes=4).text, "float32", 4)
    point = replace(at, local={**at.local, rank: ts.add(at.local[rank], first)}, lane=rank, lanes=4, exact=at.exact - {rank})
    _write_back(kernel, dot, point, kernel.evaluator.bind(total, dot.dst, body), update, body)


def covered_by_dot(kernel: Kernel, dot: Dot, rank: str) -> int:
    """How many elements along `rank` the dot computes at once."""
    return register_tile(kernel, dot).width(rank) if rank in dot.ranks else 1
