"""What every part of the emitter shares while one kernel is emitted."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...ir.expr import Expr, Read, reads
from ...ir.infer import expression_ranks
from ...ir.tile import Dot, Map, Reduce, Scan, Store, TileProgram
from ...schedules.schedule import DotSchedule, GroupSchedule
from . import script as ts
from .cpu import Cpu
from .evaluate import Active, Evaluator, Point, RankPlace
from .memory import Memory
from .partition import Row, RowInfo, row_ranks
from .prepare import Assign, Step, tiles_read
from .script import For, Names, Statement, Value
from .tiles import TileBuffer


@dataclass(frozen=True, slots=True)
class Kernel:
    """The kernel being emitted.

    Args:
        pairs: of dots that multiply pairs of bf16, the rank of the pairs.
        readers: of every tile, the steps (by identity) that read it; the reading of an aliased state counts for the tile in its place.
    """

    program: TileProgram
    cpu: Cpu
    names: Names
    memory: Memory
    evaluator: Evaluator
    buffers: Mapping[str, TileBuffer]
    ranks: Mapping[str, tuple[str, ...]]
    places: Mapping[str, RankPlace]
    dots: Mapping[str, DotSchedule]
    groups: Mapping[str, GroupSchedule]
    pairs: Mapping[str, str]
    readers: Mapping[str, frozenset[int]]

    def size(self, rank: str, loops: tuple[Active, ...]) -> int:
        """The elements of `rank` in a tile here."""
        active = next((a for a in reversed(loops) if a.loop.rank == rank), None)
        return active.loop.tile if active is not None else self.places[rank].size

    def trip(self, rank: str, loops: tuple[Active, ...]) -> Value:
        """How many elements of `rank` are computed: in an edge body those that take part, else the whole tile."""
        active = next((a for a in reversed(loops) if a.loop.rank == rank), None)
        if active is not None and active.valid is not None:
            return active.valid
        return ts.integer(self.size(rank, loops))

    def span(self, rank: str, loops: tuple[Active, ...]) -> Value:
        """How many elements of `rank` are worked on: those computed, rounded up to what every statement of the loop's body covers."""
        active = next((a for a in reversed(loops) if a.loop.rank == rank), None)
        if active is not None and active.span is not None:
            return active.span
        return ts.integer(self.size(rank, loops))

    def spans_exactly(self, rank: str, loops: tuple[Active, ...]) -> bool:
        """Whether indices below `span` lie within the extent."""
        active = next((a for a in loops if a.loop.rank == rank), None)
        if active is not None:
            return active.span is None or active.span == active.valid
        return self.places[rank].fits

    def text(self, node: Row | Dot | Scan) -> str:
        """A statement as the tile program spells it."""
        shown = Map(node.dst, node.ranks, node.expr, node.dtype, node.note) if isinstance(node, Assign) else node
        return str(replace(self.program, body=(shown,))).splitlines()[-1].strip()

    def tiled(self, rank: str) -> bool:
        """Whether `rank` is a rank of tiles (not a grid rank of tile 1)."""
        return rank in self.places

    def is_exact(self, rank: str, loops: tuple[Active, ...]) -> bool:
        """Whether indices below `trip` lie within the extent."""
        active = next((a for a in loops if a.loop.rank == rank), None)
        return active is not None or self.places[rank].fits

    def info(self, row: Row) -> RowInfo:
        """Ranks, lane and size of a statement."""
        ranks = row_ranks(row, dict(self.ranks), self.tiled)
        over = row.over if isinstance(row, Reduce) else ()
        points = 1
        for rank in (*ranks, *over):
            points *= self.places[rank].size
        pair = self.buffers[row.dst].paired if isinstance(row, Map) else None
        return RowInfo(ranks, over, self._lane(row, ranks, over), points, pair)

    def scan_lane(self, scan: Scan) -> str | None:
        """The rank along the vectors of a scan, which may be the scanned one."""
        return self._lane(scan, scan.ranks, ())

    def _lane(self, row: Row | Scan, ranks: tuple[str, ...], over: tuple[str, ...]) -> str | None:
        buffer = None if isinstance(row, Store) else self.buffers[row.dst]
        pairs = buffer.paired if buffer is not None and isinstance(row, Map) else None  # two rows of a pair are computed at once
        space = tuple(r for r in (*ranks, *over) if self.places[r].size > 1 and self.places[r].padded % self.cpu.lanes == 0 and r != pairs)
        if buffer is not None and pairs is not None:  # a pair is packed along its buffer's lane or alone
            return buffer.lane if buffer.lane in space else None
        if not space:
            return None
        named = row.tensor if isinstance(row, Store) else row.dst
        chosen = self.groups.get(named)
        if chosen is not None and chosen.lane is not None and chosen.lane in space:
            return chosen.lane
        if isinstance(row, Store):
            last = [r for r in space if self._moves(row.tensor, row.coords, r)]
            return last[-1] if last else space[-1]
        if isinstance(row, (Map, Assign, Scan)) and self.buffers[row.dst].lane in space:
            return self.buffers[row.dst].lane
        for name in sorted(tiles_read(row)):
            if set(space) <= set(self.ranks[name]) and self.buffers[name].lane in space:
                return self.buffers[name].lane
        accesses = list(reads(row.expr))
        fewest = min(self._gathers(accesses, rank) for rank in space)
        best = [rank for rank in space if self._gathers(accesses, rank) == fewest]
        for read in accesses:
            for rank in reversed(best):
                if self._moves(read.tensor, read.coords, rank):
                    return rank
        return best[-1]

    def _gathers(self, accesses: list[Read], rank: str) -> int:
        """How many reads would gather element by element if vectors lay along `rank`."""
        varying = [r for r in accesses if any(rank in expression_ranks(c, self.ranks) for c in r.coords)]
        return sum(1 for r in varying if not self._moves(r.tensor, r.coords, rank))

    def _moves(self, tensor: str, coords: tuple[Expr, ...], rank: str) -> bool:
        array = self.memory.arrays[tensor]
        if not coords or not array.unit:
            return False
        probe = Point(local={rank: ts.integer(0)}, lane=rank, lanes=self.cpu.lanes)
        others = any(rank in expression_ranks(c, self.ranks) for c in coords[:-1])
        return not others and self.evaluator.stride(coords[-1], probe) == 1

    def leaves(self, tile: str, among: tuple[Step, ...]) -> bool:
        """Whether `tile` is read outside `among`."""
        return bool(self.readers.get(tile, frozenset()) - {id(step) for step in among})


@dataclass
class Nest:
    """Loops being opened one inside the other; `body` is the innermost."""

    body: list[Statement]
    point: Point

    def loop(
        self, names: Names, rank: str, count: Value, *, step: int = 1, kind: str = "range", prefix: str = "v", exact: bool = False
    ) -> Value:
        """Opens a loop of `count` turns, each `step` elements of `rank` further, inside what is open; returns its variable."""
        base = self.point.local.get(rank, ts.integer(0))
        if count.number == 1:
            variable = ts.integer(0)
        else:
            variable = ts.name(names.fresh(prefix, rank))
            inner: list[Statement] = []
            self.body.append(For(variable.text, ts.integer(0), count, kind, inner))
            self.body = inner
        local = ts.add(base, ts.mul(variable, ts.integer(step)))
        exact_ranks = self.point.exact | {rank} if exact else self.point.exact
        self.point = replace(self.point, local={**self.point.local, rank: local}, exact=exact_ranks)
        return variable
