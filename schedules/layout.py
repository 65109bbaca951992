"""Layouts, lanes and register tiles of a tile program on a CPU: what a schedule leaves open is chosen, what it says is checked.

lanes      accumulated dots: the innermost rank of the result; other dots: the cheapest rank
layouts    other ranks, the contracted rank next to the lane, the lane last
registers  rows x vectors such that accumulators, one column of vectors and a broadcast fit the register file
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace

from ..ir.errors import ScheduleError
from ..ir.expr import Const, Expr, Index, Op, Read, Tile, reads, walk
from ..ir.infer import expression_ranks
from ..ir.tile import Dot, Loop, Map, Node, Reduce, Scan, Store, TileProgram, kernel_tiles
from .schedule import DotSchedule, Schedule
from .target import Target


@dataclass(frozen=True, slots=True)
class Shape:
    """What the choices depend on: rank sizes, tiles, and the machine's vectors."""

    program: TileProgram
    sizes: Mapping[str, int]
    tiles: Mapping[str, tuple[str, ...]]
    lanes: int
    registers: int

    def size(self, rank: str) -> int:
        return self.sizes.get(rank, 1)

    def tiled(self, ranks: tuple[str, ...]) -> tuple[str, ...]:
        """The ranks of tiles among `ranks`."""
        return tuple(r for r in ranks if r in self.sizes)


def nodes_of(nodes: tuple[Node, ...], depth: int = 0) -> Iterator[tuple[Node, int]]:
    """Every node with the number of loops around it, in order."""
    for node in nodes:
        yield node, depth
        if isinstance(node, Loop):
            yield from nodes_of(node.body, depth + 1)


def rank_sizes(program: TileProgram) -> dict[str, int]:
    """The tile size of every rank that tiles have; of a rank streamed by several loops the largest."""
    sizes = {axis.rank: axis.tile for axis in program.grid if axis.tile > 1}
    sizes.update({rank: program.tile_size(rank) for rank in program.resident})
    for node, _ in nodes_of(program.body):
        if isinstance(node, Loop):
            sizes[node.rank] = max(node.tile, sizes.get(node.rank, 1))
    return sizes


def complete(program: TileProgram, schedule: Schedule, target: Target) -> Schedule:
    """`schedule` with a layout for every tile and a register tile for every dot. Raises `ScheduleError` if it is not legal."""
    shape = _shape(program, target)
    _check_layouts(shape, schedule)
    dots = dict(schedule.dot)
    layouts = dict(schedule.layout)
    accumulated = _accumulated(program)
    for first in (True, False):
        for node, depth in nodes_of(program.body):
            if isinstance(node, Dot) and (node.dst in accumulated) is first:
                lane = _dot_lane(shape, node, depth, layouts, dots.get(node.dst), first)
                dots[node.dst] = replace(dots.get(node.dst, DotSchedule()), lane=lane)
                _lay_out_dot(shape, node, lane, layouts)
    _lay_out_rest(shape, program, layouts)
    for node, _ in nodes_of(program.body):
        if isinstance(node, Dot) and not dots[node.dst].register:
            dots[node.dst] = replace(dots[node.dst], register=_register(shape, node, dots[node.dst].lane))
    completed = replace(schedule, layout=tuple(sorted(layouts.items())), dot=tuple(sorted(dots.items())))
    check_schedule(program, completed, target)
    return completed


def _shape(program: TileProgram, target: Target) -> Shape:
    tiles = {name: ranks for name, (ranks, _) in kernel_tiles(program.body).items()}
    return Shape(program, rank_sizes(program), tiles, target.limit("vector_width", 4), target.limit("registers", 16))


def _accumulated(program: TileProgram) -> set[str]:
    """Dots whose result becomes a state."""
    found: set[str] = set()
    for node, _ in nodes_of(program.body):
        if isinstance(node, Loop):
            for state in node.states:
                found |= {n.name for n in walk(state.next) if isinstance(n, Tile)}
    return found


def _dot_lane(
    shape: Shape, dot: Dot, depth: int, layouts: Mapping[str, tuple[str, ...]], chosen: DotSchedule | None, accumulated: bool
) -> str | None:
    if chosen is not None and chosen.lane is not None:
        return chosen.lane
    wide = [r for r in dot.ranks if shape.size(r) > 1]
    if accumulated and wide and shape.size(wide[-1]) >= shape.lanes // 2:
        return wide[-1]
    candidates = [*wide, *(r for r in dot.over if shape.size(r) > 1)]
    if not candidates:
        return None
    return min(candidates, key=lambda r: _lane_cost(shape, dot, r, depth, layouts))


def _lane_cost(shape: Shape, dot: Dot, lane: str, depth: int, layouts: Mapping[str, tuple[str, ...]]) -> float:
    """What vectors along `lane` cost a dot: packing, gathers, idle lanes."""
    cost, vectors = 0.0, 0
    for operand in (dot.a, dot.b):
        if lane in expression_ranks(operand, shape.tiles):
            vectors += 1
            cost += _operand_cost(shape, operand, lane, depth, layouts)
    if vectors == 2:
        cost += 3
    if shape.size(lane) < shape.lanes:
        cost += 4
    return cost


def _operand_cost(shape: Shape, e: Expr, lane: str, depth: int, layouts: Mapping[str, tuple[str, ...]]) -> float:
    match e:
        case Tile(name=name):
            if name not in layouts:
                return 0.5
            return 0.0 if layouts[name] and layouts[name][-1] == lane else 100.0
        case Read(coords=coords) if coords and is_adjacent(coords, lane, shape.tiles):
            return 0.0
    if reads_in_vectors(e, lane, shape.tiles):
        return 0.5
    streamed = {n.rank for n, _ in nodes_of(shape.program.body) if isinstance(n, Loop)}
    moves = depth > 0 and any(r in streamed for r in expression_ranks(e, shape.tiles))
    return 8.0 if moves else 1.0


def is_adjacent(coords: tuple[Expr, ...], lane: str, tiles: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether elements along `lane` lie next to each other: only the last coordinate moves, as the index itself plus something fixed."""
    if any(lane in expression_ranks(c, tiles) for c in coords[:-1]):
        return False
    return _step(coords[-1], lane, tiles) == 1


def reads_in_vectors(e: Expr, lane: str, tiles: Mapping[str, tuple[str, ...]]) -> bool:
    """Whether `e` is computed along `lane` from memory alone, each read of which is adjacent there or does not move."""
    moving = [r for r in reads(e) if any(lane in expression_ranks(c, tiles) for c in r.coords)]
    whole = all(r.fill is None and is_adjacent(r.coords, lane, tiles) for r in moving)
    return bool(moving) and whole and not any(isinstance(n, Tile) for n in walk(e))


def _step(e: Expr, lane: str, tiles: Mapping[str, tuple[str, ...]]) -> int | None:
    match e:
        case Index(rank=rank):
            return int(rank == lane)
        case Op(name="add", args=(a, b)):
            x, y = _step(a, lane, tiles), _step(b, lane, tiles)
            return None if x is None or y is None else x + y
        case Op(name="mul", args=(Const(), x)) | Op(name="mul", args=(x, Const())) if lane in expression_ranks(x, tiles):
            return None
        case _:
            return None if lane in expression_ranks(e, tiles) else 0


def _lay_out_dot(shape: Shape, dot: Dot, lane: str | None, layouts: dict[str, tuple[str, ...]]) -> None:
    """Layouts of a dot's result and of its operands that are tiles."""
    for operand in (dot.a, dot.b):
        for node in walk(operand):
            if isinstance(node, Tile) and node.name not in layouts and lane in shape.tiles[node.name]:
                layouts[node.name] = _ordered(shape.tiles[node.name], dot.over, lane)
    if dot.dst not in layouts and lane in dot.ranks:
        layouts[dot.dst] = _ordered(dot.ranks, (), lane)


def _ordered(ranks: tuple[str, ...], over: tuple[str, ...], lane: str | None) -> tuple[str, ...]:
    first = [r for r in ranks if r != lane and r not in over]
    return (*first, *(r for r in ranks if r in over and r != lane), *([lane] if lane in ranks and lane is not None else []))


def _lay_out_rest(shape: Shape, program: TileProgram, layouts: dict[str, tuple[str, ...]]) -> None:
    """Remaining tiles follow a tile they are computed from or compute, else their reads, else their last rank is the lane."""
    definitions = list(_definitions(program))
    for _ in range(2):  # forwards along definitions, then what states and users say
        for name, ranks, e in definitions:
            if name in layouts:
                continue
            for node in walk(e):
                if isinstance(node, Tile) and node.name in layouts and set(shape.tiles.get(node.name, ())) == set(ranks):
                    layouts[name] = layouts[node.name]
                    break
        for name, ranks, e in definitions:
            if name in layouts:
                for node in walk(e):
                    if isinstance(node, Tile) and node.name not in layouts and set(shape.tiles.get(node.name, ())) == set(ranks):
                        layouts[node.name] = layouts[name]
    for name, ranks, e in definitions:
        if name not in layouts:
            lane = _memory_lane(shape, ranks, e)
            layouts[name] = _ordered(ranks, (), lane)
    for name, ranks in shape.tiles.items():
        layouts.setdefault(name, ranks)


def _definitions(program: TileProgram) -> Iterator[tuple[str, tuple[str, ...], Expr]]:
    for node, _ in nodes_of(program.body):
        match node:
            case Map() | Scan():
                yield node.dst, node.ranks, node.expr
            case Loop():
                for state in node.states:
                    yield state.name, state.ranks, state.next
            case Dot() if node.update is not None:
                yield node.dst, node.ranks, node.update
            case Reduce():
                yield node.dst, node.ranks, Const(0)
            case _:
                continue


def _memory_lane(shape: Shape, ranks: tuple[str, ...], e: Expr) -> str | None:
    wide = [r for r in ranks if shape.size(r) > 1]
    for read in reads(e):
        for rank in reversed(wide):
            if read.coords and is_adjacent(read.coords, rank, shape.tiles):
                return rank
    return wide[-1] if wide else (ranks[-1] if ranks else None)


def _register(shape: Shape, dot: Dot, lane: str | None) -> tuple[tuple[str, int], ...]:
    """The default register tile: 4 vectors x 4 rows along a long lane, 2 x 8 along a short one; horizontal 4 x 4 rows."""
    budget = shape.registers
    rows = [r for r in dot.ranks if r != lane]
    if lane is None:
        return tuple((r, 1) for r in rows)
    if lane in dot.over:
        return _fill_rows(shape, rows, lambda n: n + 2 <= budget and n <= budget // 2, 4)
    vectors = _vectors(shape, dot, lane)
    entry = ((lane, vectors * shape.lanes),)
    rows.sort(key=lambda r: not _varies_computed(shape, dot, r))  # filled from the last: what is computed is used by many rows at once
    return (*_fill_rows(shape, rows, lambda n: n * vectors + vectors + 1 <= budget and n * vectors <= budget // 2 + 4, None), *entry)


def _varies_computed(shape: Shape, dot: Dot, rank: str) -> bool:
    """Whether an operand that is computed as it is multiplied varies along `rank`."""
    return any(not isinstance(e, (Tile, Read)) and rank in expression_ranks(e, shape.tiles) for e in (dot.a, dot.b))


def _vectors(shape: Shape, dot: Dot, lane: str) -> int:
    """Vectors of a register tile along the lane; they divide those of the tile."""
    count = -(-shape.size(lane) // shape.lanes)
    most = 4 if shape.registers >= 32 else 2
    rows = math.prod(shape.size(r) for r in dot.ranks if r != lane)
    if (
        rows <= 8
        and shape.registers >= 32
        and any(isinstance(e, Read) and lane in expression_ranks(e, shape.tiles) for e in (dot.a, dot.b))
    ):
        return max(v for v in range(1, 9) if count % v == 0)  # memory-bound: whole rows of the operand, one after the other
    streamed = {n.rank for n, _ in nodes_of(shape.program.body) if isinstance(n, Loop)}
    if not any(r in streamed for r in dot.over):
        most = min(most, 2)
    best = max(v for v in range(1, most + 1) if count % v == 0)
    if best == 1 and count in (5, 7) and shape.registers >= 32:
        return count
    return best


def _fill_rows(shape: Shape, rows: list[str], fits: Callable[[int], bool], most: int | None) -> tuple[tuple[str, int], ...]:
    """Rows a register tile covers, from the innermost rank outwards: powers of two, which pad a rank by a third at most."""
    chosen, used = {}, 1
    for rank in reversed(rows):
        size = shape.size(rank)
        counts = [n for n in (1, 2, 4, 8, 16) if (most is None or n <= most) and 3 * -(-size // n) * n <= 4 * size]
        chosen[rank] = max(n for n in counts if n == 1 or fits(used * n))
        used *= chosen[rank]
    return tuple((rank, chosen[rank]) for rank in rows)


def padded_sizes(program: TileProgram, schedule: Schedule, lanes: int) -> dict[str, int]:
    """The size of every rank in tile buffers: whole vectors along possible lanes, whole register tiles.

    Raises `ScheduleError` where register tiles of different sizes would more than double a rank.
    """
    sizes = rank_sizes(program)
    tiles = {name: ranks for name, (ranks, _) in kernel_tiles(program.body).items()}
    multiples = dict.fromkeys(sizes, 1)

    def need(rank: str | None, multiple: int) -> None:
        if rank is not None and rank in multiples and sizes[rank] > 1:
            multiples[rank] = math.lcm(multiples[rank], multiple)

    for name, layout in schedule.layout:
        if name not in tiles:
            continue
        for entry in layout:
            rank, _, number = entry.replace("%", "/").partition("/")
            if number:
                need(rank, int(number))
        if layout and "%" not in layout[-1]:
            need(_rank_of(layout[-1]), lanes)
    for name, dot in schedule.dot:
        if name not in tiles:
            continue
        need(dot.lane, lanes)
        for rank, n in dot.register:
            need(rank, n)
    for name, group in schedule.group:
        if name in tiles:
            need(group.lane, lanes)
    for coords in _accesses(program):
        for rank in sizes:
            if is_adjacent(coords, rank, tiles) and 4 * sizes[rank] >= lanes:  # a vector of few elements costs more than it saves
                need(rank, lanes)
    padded = {rank: -(-size // multiples[rank]) * multiples[rank] for rank, size in sizes.items()}
    for rank, size in padded.items():
        if size > max(2 * sizes[rank], 8 * lanes):
            raise ScheduleError(f"rank {rank!r} of {sizes[rank]} would be padded to {size}", hint="register tiles that divide each other")
    return padded


def _accesses(program: TileProgram) -> Iterator[tuple[Expr, ...]]:
    """The coordinates of every access to memory."""

    def of(e: Expr | None) -> Iterator[tuple[Expr, ...]]:
        if e is not None:
            yield from (r.coords for r in reads(e) if r.coords)

    for node, _ in nodes_of(program.body):
        match node:
            case Map() | Reduce():
                yield from of(node.expr)
            case Scan():
                yield from of(node.expr)
                yield from of(node.start)
            case Dot():
                for e in (node.a, node.b, node.update, node.post):
                    yield from of(e)
            case Store():
                if node.coords:
                    yield node.coords
                yield from of(node.expr)
            case Loop():
                for state in node.states:
                    yield from of(state.init)
                    yield from of(state.next)


def check_schedule(program: TileProgram, schedule: Schedule, target: Target) -> None:
    """Raises `ScheduleError` naming the entry and the number that is not legal for `program` on `target`."""
    shape = _shape(program, target)
    for node, _ in nodes_of(program.body):
        if isinstance(node, Dot):
            chosen = dict(schedule.dot).get(node.dst)
            if chosen is not None:
                _check_dot(shape, node, chosen)
    _check_layouts(shape, schedule)
    padded_sizes(program, schedule, shape.lanes)


def _check_layouts(shape: Shape, schedule: Schedule) -> None:
    """Entries of other kernels of the same cascade are not looked at."""
    for name, layout in schedule.layout:
        if name in shape.tiles and {_rank_of(entry) for entry in layout} != set(shape.tiles[name]):
            raise ScheduleError(
                f"layout[{name}] = ({', '.join(layout)})", hint=f"lay out exactly the ranks {', '.join(shape.tiles[name]) or '(none)'}"
            )


def _rank_of(entry: str) -> str:
    """The rank of a layout's axis `r`, `r/n` or `r%n`."""
    return entry.replace("%", "/").partition("/")[0]


def _check_dot(shape: Shape, dot: Dot, chosen: DotSchedule) -> None:
    entry = f"dot[{dot.dst}]"
    if chosen.lane is not None and chosen.lane not in (*dot.ranks, *dot.over):
        raise ScheduleError(f"{entry}.lane is {chosen.lane!r}", hint=f"one of {', '.join((*dot.ranks, *dot.over))}")
    sizes = dict(chosen.register)
    foreign = set(sizes) - set(dot.ranks)
    if foreign:
        raise ScheduleError(f"{entry}.register names {sorted(foreign)[0]!r}", hint=f"ranks of the result: {', '.join(dot.ranks)}")
    horizontal = chosen.lane in dot.over
    vectors = 1
    if chosen.lane in sizes and chosen.lane is not None:
        if sizes[chosen.lane] % shape.lanes:
            raise ScheduleError(
                f"{entry}.register[{chosen.lane}] is {sizes[chosen.lane]}, the lane's entry must be a multiple of {shape.lanes}"
            )
        vectors = sizes[chosen.lane] // shape.lanes
    rows = math.prod(n for rank, n in sizes.items() if rank != chosen.lane)
    needed = rows * vectors + (2 if horizontal else vectors + 1)
    if needed > shape.registers:
        raise ScheduleError(
            f"{entry}.register needs {needed} vector registers ({rows} rows x {vectors} vectors), the processor has {shape.registers}",
            hint="fewer rows or vectors",
        )
