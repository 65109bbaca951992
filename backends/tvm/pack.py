"""Operands of contractions made fit for their register tiles: pairs of bf16 for the bf16 dot, copies where reading in place is slow.

A copy is a map before the dot; what does not change from tile to tile is computed before the loop.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...ir.expr import Cast, Expr, Index, Masked, Op, Read, Tile, walk
from ...ir.infer import expression_ranks
from ...ir.tile import Dot, Map, Reduce, TileProgram
from ...ir.types import DType, bf16, f32, f64
from ...schedules.layout import is_adjacent, rank_sizes, reads_in_vectors
from ...schedules.schedule import DotSchedule, Schedule
from .cpu import Cpu
from .prepare import Step, Stream, all_steps, depends_on_loop, tile_table, tiles_read, tiles_written

PAIRED_ROWS = 16  # fewer rows do not pay for interleaving the vector operand
REUSE = 4  # an operand that needs conversion is copied if each element is used by at least so many register tiles


@dataclass(frozen=True, slots=True)
class Packed:
    """The steps with copies, the layouts of all tiles, and for dots of bf16 pairs the rank of the pairs."""

    steps: tuple[Step, ...]
    layouts: dict[str, tuple[str, ...]]
    pairs: dict[str, str]


@dataclass(slots=True)
class _Packer:
    program: TileProgram
    cpu: Cpu
    dots: dict[str, DotSchedule]
    layouts: dict[str, tuple[str, ...]]
    strided: frozenset[str]
    whole: tuple[Step, ...]
    tiles: dict[str, tuple[str, ...]]
    sizes: dict[str, int]
    types: dict[str, DType]
    retyped: dict[str, str]
    pairs: dict[str, str]
    group_lanes: dict[str, str | None]

    def ranks(self, e: Expr) -> tuple[str, ...]:
        """The tiled ranks of an expression."""
        return tuple(r for r in expression_ranks(e, self.tiles) if r in self.sizes)


def pack_operands(steps: tuple[Step, ...], program: TileProgram, schedule: Schedule, cpu: Cpu, strided: frozenset[str]) -> Packed:
    """The steps with every dot's operands as its register tile wants them."""
    packer = _Packer(
        program,
        cpu,
        dict(schedule.dot),
        dict(schedule.layout),
        strided,
        steps,
        {name: ranks for name, (ranks, _) in tile_table(steps).items()},
        rank_sizes(program),
        {t.name: t.dtype for t in program.inputs},
        {},
        {},
        {name: group.lane for name, group in schedule.group},
    )
    packed = _level(packer, steps)
    return Packed(_retype(packed, packer.retyped), packer.layouts, packer.pairs)


def _level(packer: _Packer, steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """One level: copies before their dots, those of a loop that never change in it before the loop."""
    result: list[Step] = []
    for step in steps:
        if isinstance(step, Stream):
            body = _level(packer, step.body)
            kept = list(body)
            for copy in [s for s in body if isinstance(s, Map) and s.dst not in packer.tiles]:
                inside = frozenset(t for s in all_steps(tuple(kept)) for t in tiles_written(s))
                if not depends_on_loop(copy.expr, step.loop, inside) and step.loop.rank not in copy.ranks:
                    kept.remove(copy)
                    result.append(copy)
            result.append(Stream(step.loop, tuple(kept)))
        elif isinstance(step, Dot):
            copies, dot = _dot(packer, step)
            result += [*copies, dot]
        else:
            result.append(step)
    return tuple(result)


def _dot(packer: _Packer, dot: Dot) -> tuple[list[Step], Dot]:
    paired = _pair_rank(packer, dot)
    if paired is not None:
        packer.pairs[dot.dst] = paired
    copies: list[Step] = []
    operands = []
    for side, e in (("a", dot.a), ("b", dot.b)):
        new = _paired(packer, dot, side, e, paired, copies) if paired is not None else _plain(packer, dot, side, e, copies)
        operands.append(new)
    return copies, replace(dot, a=operands[0], b=operands[1])


def _copy(packer: _Packer, dot: Dot, side: str, e: Expr, layout: tuple[str, ...], dtype: DType, copies: list[Step]) -> Tile:
    name = f"{dot.dst}.{side}"
    copies.append(Map(name, packer.ranks(e), e, dtype, f"operand of {dot.dst}"))
    packer.layouts[name] = layout
    return Tile(name)


def _plain(packer: _Packer, dot: Dot, side: str, e: Expr, copies: list[Step]) -> Expr:
    """An operand in f32 or f64: copied if it is computed, lies across the lane, or is converted again and again."""
    lane = packer.dots[dot.dst].lane
    ranks = packer.ranks(e)
    if not ranks or not _worth_copying(packer, dot, e, lane):
        return e
    along = lane if lane in ranks else _vector_rank(packer, e)
    first = [r for r in ranks if r not in dot.over and r != along]
    last = [r for r in ranks if r in dot.over and r != along]
    layout = (*first, *last, *([along] if along is not None else []))
    return _copy(packer, dot, side, e, layout, f64 if dot.dtype == f64 else f32, copies)


def _worth_copying(packer: _Packer, dot: Dot, e: Expr, lane: str | None) -> bool:
    ranks = packer.ranks(e)
    uses = 1.0
    covered = dict(packer.dots[dot.dst].register)
    for rank in dot.ranks:
        if rank not in ranks:
            uses *= packer.sizes[rank] / max(1, covered.get(rank, 1))
    if any(isinstance(n, Masked) for n in walk(e)):
        return False
    if isinstance(e, Tile):
        across = lane in ranks and lane is not None and packer.layouts[e.name][-1].partition("/")[0].partition("%")[0] != lane
        return across and uses >= 2
    if isinstance(e, Read):
        across = lane in ranks and not (
            e.tensor not in packer.strided and is_adjacent(e.coords, str(lane), packer.tiles) and e.fill is None
        )
        converted = packer.types[e.tensor].name not in ("f32", "f64") and uses >= REUSE
        return across or converted
    computed = any(isinstance(n, Op) for n in walk(e)) or isinstance(e, Cast)
    if not computed:
        return False
    scalars = lane is not None and lane not in ranks  # element by element where it is multiplied, or in vectors before
    return uses >= 2 or (scalars and _vector_rank(packer, e) is not None)


def _vector_rank(packer: _Packer, e: Expr) -> str | None:
    """The rank along which a computed operand can be computed in vectors from memory."""
    if isinstance(e, (Read, Tile)):
        return None
    long = (r for r in reversed(packer.ranks(e)) if packer.sizes[r] >= packer.cpu.lanes)
    return next((r for r in long if reads_in_vectors(e, r, packer.tiles)), None)


def _pair_rank(packer: _Packer, dot: Dot) -> str | None:
    """The contracted rank along which pairs of bf16 are multiplied at once, if this dot runs so."""
    lane = packer.dots[dot.dst].lane
    if dot.dtype != bf16 or not packer.cpu.bf16_dot or lane is None or lane in dot.over:
        return None
    if math.prod(packer.sizes[r] for r in dot.ranks if r != lane) < PAIRED_ROWS:
        return None
    streamed = {s.loop.rank for s in all_steps(packer.whole) if isinstance(s, Stream)}
    for rank in reversed(dot.over):
        both = all(rank in packer.ranks(e) for e in (dot.a, dot.b))
        if both and packer.sizes[rank] % 2 == 0 and (rank in streamed or packer.program.static_size(rank) is not None):
            return rank
    return None


def _paired(packer: _Packer, dot: Dot, side: str, e: Expr, rank: str, copies: list[Step]) -> Expr:
    """An operand as pairs of bf16 along `rank`."""
    lane = packer.dots[dot.dst].lane
    ranks = packer.ranks(e)
    if isinstance(e, Read) and lane not in ranks and _pairs_in_memory(packer, e, rank):
        return e
    vector = lane if lane in ranks else next((r for r in reversed(ranks) if r != rank), None)
    if isinstance(e, Tile) and _can_be_paired(packer, e.name, dot, rank, vector):
        packer.retyped[e.name] = rank
        old = [entry for entry in packer.layouts[e.name] if entry != rank]
        if lane in ranks and old[-1] != lane:
            old = [*(x for x in old if x != lane), str(lane)]
        packer.layouts[e.name] = (*old[:-1], f"{rank}/2", *old[-1:], f"{rank}%2")
        return e
    others = [r for r in ranks if r not in (rank, vector)]
    layout = (*others, f"{rank}/2", *([vector] if vector is not None else []), f"{rank}%2")
    return _copy(packer, dot, side, e, layout, bf16, copies)


def _pairs_in_memory(packer: _Packer, e: Read, rank: str) -> bool:
    """Whether two neighbours along `rank` are one aligned-enough 32-bit load."""
    streamed = {s.loop.rank for s in all_steps(packer.whole) if isinstance(s, Stream)}
    plain = e.fill is None and e.tensor not in packer.strided and packer.types[e.tensor] == bf16
    own = any(t.name == e.tensor and bool(e.coords) and e.coords[-1] == Index(t.ranks[-1]) for t in packer.program.inputs)  # both inside
    return plain and own and rank not in streamed and is_adjacent(e.coords, rank, packer.tiles)


def _can_be_paired(packer: _Packer, tile: str, dot: Dot, rank: str, vector: str | None) -> bool:
    """Whether a tile may itself be kept as pairs: computed by one map, and read otherwise only by reductions in the same loops."""
    if tile in packer.retyped:
        return packer.retyped[tile] == rank
    makers = [s for s in all_steps(packer.whole) if not isinstance(s, Stream) and tile in tiles_written(s)]
    if len(makers) != 1 or not isinstance(makers[0], Map) or makers[0].dtype not in (f32, bf16) or vector is None:
        return False
    if (
        packer.group_lanes.get(tile) == rank
        or packer.layouts[tile][-1] == rank
        or any(mark in entry for entry in packer.layouts[tile] for mark in "/%")
    ):
        return False
    for step in all_steps(packer.whole):
        if isinstance(step, Stream) or step is dot or tile not in tiles_read(step):
            continue
        if not isinstance(step, Reduce) or set(step.over) != {rank}:
            return False
    return True


def _retype(steps: tuple[Step, ...], retyped: dict[str, str]) -> tuple[Step, ...]:
    result: list[Step] = []
    for step in steps:
        if isinstance(step, Stream):
            result.append(Stream(step.loop, _retype(step.body, retyped)))
        elif isinstance(step, Map) and step.dst in retyped:
            result.append(replace(step, dtype=bf16))
        else:
            result.append(step)
    return tuple(result)
