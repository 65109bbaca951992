"""How the tiles of a kernel lie over the threads of a block: every rank the same way in every tile, so that maps need no exchange.

    index of a rank in a tile  =  (step * threads + thread) * vector + element

`thread` is a digit of the thread's index. Ranks that stand together in no statement may share a digit. A tile is held by the threads of
its ranks' digits and repeated in the others. What decides: the rank along which most bytes are adjacent in memory gets the lowest digit
and 16-byte vectors, and as many threads as fill a warp; then ranks that are not reduced, whose results need no exchange; then the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from ...ir.expr import Expr, Index, Masked, Read, walk
from ...ir.infer import expression_ranks
from ...ir.tile import Dot, Loop, Map, Node, Reduce, Scan, Store, TileProgram, kernel_tiles
from ...ir.types import DType

THREADS = 256
WARP = 32
VECTOR_BYTES = 16
MINOR = 16  # a rank along which so many times fewer bytes are adjacent than along another has no vectors: threads serve it better


@dataclass(frozen=True, slots=True)
class Spread:
    """A rank over the threads; `shift` is the place of its digit among the bits of the thread's index."""

    rank: str
    size: int
    threads: int = 1
    vector: int = 1
    shift: int = 0

    @property
    def steps(self) -> int:
        return -(-self.size // (self.threads * self.vector))

    @property
    def padded(self) -> int:
        return self.steps * self.threads * self.vector

    @property
    def held(self) -> int:
        """The elements one thread holds."""
        return self.steps * self.vector

    @property
    def bits(self) -> int:
        """The bits of the thread's index that are its digit."""
        return (self.threads - 1) << self.shift


@dataclass(frozen=True, slots=True)
class Block:
    """The ranks of a kernel and the threads of a block."""

    spreads: Mapping[str, Spread]
    threads: int

    def bits(self, ranks: Iterable[str]) -> int:
        """The bits of the thread's index along which `ranks` lie."""
        bits = 0
        for rank in ranks:
            bits |= self.spreads[rank].bits
        return bits


@dataclass(frozen=True, slots=True)
class _Space:
    """A statement: the ranks of its points, those it reduces, and its expressions."""

    ranks: frozenset[str]
    over: frozenset[str]
    exprs: tuple[Expr, ...]
    stores: tuple[str, tuple[Expr, ...]] | None = None


def spread_tiles(program: TileProgram, types: Mapping[str, DType], most: int = THREADS) -> Block:
    """The layout of a kernel whose blocks have at most `most` threads."""
    sizes = tile_sizes(program)
    spaces = list(_spaces(program, sizes))
    weights, vectors = _adjacent(spaces, types, sizes)
    chosen: dict[str, Spread] = {rank: Spread(rank, size, vector=vectors.get(rank, 1)) for rank, size in sizes.items()}
    together = {rank: {r for s in spaces if rank in s.ranks for r in s.ranks} - {rank} for rank in sizes}
    reduced = {rank for s in spaces for rank in s.over}
    by_weight = sorted((r for r in sizes if weights.get(r)), key=lambda r: -weights[r])
    kept = sorted((r for r in sizes if r not in reduced), key=lambda r: -sizes[r])
    rest = sorted(sizes, key=lambda r: (-weights.get(r, 0), -sizes[r]))
    for ranks, limit in ((by_weight[:1], WARP), (kept, most), (rest, most)):
        for rank in ranks:
            chosen[rank] = _widened(chosen, together[rank], chosen[rank], limit, most)
    used = max((s.bits for s in chosen.values()), default=0).bit_length()
    return Block(chosen, max(WARP, 1 << used))


def _widened(chosen: Mapping[str, Spread], others: set[str], own: Spread, limit: int, most: int) -> Spread:
    """`own` with as many threads as it has use for and there is room."""
    taken = 0
    for rank in others:
        if rank in chosen:
            taken |= chosen[rank].bits
    shift = own.shift
    if own.threads == 1:
        shift = 0
        while taken >> shift & 1:
            shift += 1
    threads = own.threads
    useful = -(-own.size // own.vector)
    while threads < useful and threads < limit and (threads << shift) < most and not taken & (threads << shift):
        threads *= 2
    return replace(own, threads=threads, shift=shift if threads > 1 else 0)


def tile_sizes(program: TileProgram) -> dict[str, int]:
    """Every rank of tiles and the elements of it in the largest tile."""
    sizes = {rank: program.tile_size(rank) for rank in program.resident}
    sizes |= {axis.rank: axis.tile for axis in program.grid if axis.tile > 1}
    for loop in loops_of(program.body):
        sizes[loop.rank] = max(sizes.get(loop.rank, 1), loop.tile)
    return sizes


def loops_of(nodes: tuple[Node, ...]) -> list[Loop]:
    """Every loop, nested ones included."""
    found = []
    for node in nodes:
        if isinstance(node, Loop):
            found += [node, *loops_of(node.body)]
    return found


def _spaces(program: TileProgram, sizes: Mapping[str, int]) -> Iterable[_Space]:
    tiles = {name: ranks for name, (ranks, _) in kernel_tiles(program.body).items()}

    def space(
        ranks: Iterable[str], over: Iterable[str], given: Iterable[Expr], loops: tuple[Loop, ...], store: Store | None = None
    ) -> _Space:
        exprs: tuple[Expr, ...] = tuple(given)
        if any(isinstance(n, Masked) for e in exprs for n in walk(e)):
            exprs = (*exprs, *(c for loop in loops for c in loop.conditions))
        found = {*ranks, *over, *(r for e in exprs for r in expression_ranks(e, tiles))}
        stored = None if store is None else (store.tensor, store.coords)
        return _Space(frozenset(found & set(sizes)), frozenset(over), exprs, stored)

    def visit(nodes: tuple[Node, ...], loops: tuple[Loop, ...]) -> Iterable[_Space]:
        for node in nodes:
            match node:
                case Map():
                    yield space(node.ranks, (), (node.expr,), loops)
                case Reduce():
                    yield space(node.ranks, node.over, (node.expr,), loops)
                case Scan():
                    yield space(node.ranks, (node.over,), (node.expr, *(() if node.start is None else (node.start,))), loops)
                case Dot():
                    exprs = tuple(e for e in (node.a, node.b, node.update, node.post) if e is not None)
                    yield space(node.ranks, node.over, exprs, loops)
                case Store():
                    yield space((), (), (*node.coords, node.expr), loops, node)
                case Loop():
                    yield from (space(s.ranks, (), (s.init,), loops) for s in node.states)
                    yield from (space(s.ranks, (), (s.next,), (*loops, node)) for s in node.states)
                    yield from visit(node.body, (*loops, node))

    return visit(program.body, ())


def _adjacent(spaces: list[_Space], types: Mapping[str, DType], sizes: Mapping[str, int]) -> tuple[dict[str, float], dict[str, int]]:
    """Of every rank the bytes that are adjacent in memory along it, and the elements of a 16-byte vector of what moves most of them."""
    moved: dict[str, dict[int, float]] = {}
    seen: set[tuple[str, tuple[Expr, ...]]] = set()
    for space in spaces:
        accesses = [(n.tensor, n.coords) for e in space.exprs for n in walk(e) if isinstance(n, Read)]
        if space.stores is not None:
            accesses.append(space.stores)
        for tensor, coords in accesses:
            rank = adjacent_rank(coords)
            if rank is None or rank not in sizes or (tensor, coords) in seen:
                continue
            seen.add((tensor, coords))
            points = 1
            for r in {r for c in coords for r in expression_ranks(c)} & set(sizes):
                points *= sizes[r]
            size = max(1, types[tensor].bits // 8)
            table = moved.setdefault(rank, {})
            table[size] = table.get(size, 0.0) + size * points
    weights = {rank: sum(table.values()) for rank, table in moved.items()}
    most = max(weights.values(), default=0.0)
    vectors = {}
    for rank, table in moved.items():
        if weights[rank] * MINOR < most:
            continue
        heaviest = max(table, key=lambda size: (table[size], size))
        vector = max(1, VECTOR_BYTES // heaviest)
        while sizes[rank] % vector:
            vector //= 2
        vectors[rank] = vector
    return weights, vectors


def adjacent_rank(coords: tuple[Expr, ...]) -> str | None:
    """The rank along which elements at `coords` are adjacent in memory."""
    if not coords or not isinstance(coords[-1], Index):
        return None
    rank = coords[-1].rank
    return None if any(rank in expression_ranks(c) for c in coords[:-1]) else rank
