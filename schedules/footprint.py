"""What the tiles of a kernel take of a multiprocessor, as far as its tile program tells: an estimate, before anything is compiled.

    fetched   operands of products that every pass of a loop reads: shared memory, once for each tile in flight
    held      operands of products that are made before the loops: shared memory
    states    what a loop carries: registers
    tiles     what is worked out on the way: registers, of which the largest counts

It is worked out once for a kernel and then answers for any tile sizes, so that a search may ask it about thousands of schedules. What a
kernel really takes is known when it was compiled.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from ..ir.expr import Expr, Read, Tile, reads, walk
from ..ir.infer import expression_ranks
from ..ir.tile import Dot, Loop, Map, TileProgram, kernel_tiles, nodes_of
from ..ir.types import f32

Ranks = tuple[str, ...]
NARROW = 2  # bytes of an element of an operand that is made: products of narrow types are the rule


@dataclass(frozen=True, slots=True)
class Operand:
    """A tile that a product reads in every pass of a loop: bytes of an element, its ranks, the loop at the top, and how deep it lies."""

    bytes: float
    ranks: Ranks
    loop: int
    depth: int


@dataclass(frozen=True, slots=True)
class Footprint:
    """See the module. `sizes` are the tiles of the program it was worked out from; those given to a method stand for them.

    Args:
        loops: whether there are any.
        precise: whether a product is one of f32.
    """

    name: str
    sizes: tuple[tuple[str, int], ...]
    fetched: tuple[Operand, ...]
    held: tuple[Ranks, ...]
    states: tuple[tuple[int, Ranks], ...]
    tiles: tuple[Ranks, ...]
    products: tuple[Ranks, ...]
    loops: bool
    precise: bool

    def elements(self, ranks: Ranks, tile: Mapping[str, int] = {}) -> int:
        """The lanes of a tile: every rank rounded up to a power of two."""
        sizes = {**dict(self.sizes), **tile}
        return math.prod(ceil_power(sizes.get(rank, 1)) for rank in ranks)

    def largest(self, tile: Mapping[str, int] = {}) -> int:
        """Elements of the largest tile that is computed."""
        return max((self.elements(ranks, tile) for ranks in self.tiles), default=1)

    def product(self, tile: Mapping[str, int] = {}) -> int:
        """Elements of the largest result of a product; 0 where there is none."""
        return max((self.elements(ranks, tile) for ranks in self.products), default=0)

    def held_bytes(self, tile: Mapping[str, int] = {}) -> int:
        """Shared memory for the operands that are made before the loops."""
        return sum(NARROW * self.elements(ranks, tile) for ranks in self.held)

    def pass_bytes(self, tile: Mapping[str, int] = {}) -> int:
        """What one pass of the loops at the top fetches for their own products."""
        return int(sum(o.bytes * self.elements(o.ranks, tile) for o in self.fetched if o.depth == 0))

    def shared_bytes(self, stages: int, tile: Mapping[str, int] = {}, *, kept: bool = True) -> int:
        """Shared memory with so many tiles in flight, in the loop that takes most of it.

        `kept`: whether what is held stays there, beside the loops; else it passes through once.
        """
        loops: dict[int, float] = {}
        for o in self.fetched:
            loops[o.loop] = loops.get(o.loop, 0.0) + o.bytes * self.elements(o.ranks, tile)
        flying, held = int(stages * max(loops.values(), default=0.0)), self.held_bytes(tile)
        return flying + held if kept else max(flying, held)

    def registers(self, threads: int, tile: Mapping[str, int] = {}) -> int:
        """Registers of a thread for what a loop carries and the largest tile beside it."""
        loops: dict[int, int] = {}
        for loop, ranks in self.states:
            loops[loop] = loops.get(loop, 0) + self.elements(ranks, tile)
        return -(-(max(loops.values(), default=0) + self.largest(tile)) // threads)


def footprint(program: TileProgram) -> Footprint:
    """The footprint of a program."""
    ranks_of = {name: ranks for name, (ranks, _) in kernel_tiles(program.body).items()}
    inside = {name for node in program.body if isinstance(node, Loop) for name in kernel_tiles(node.body)}
    dots = [node for node in nodes_of(program.body) if isinstance(node, Dot)]
    operands = {side.name for node in dots for side in (node.a, node.b) if isinstance(side, Tile)}
    tops = [node for node in program.body if isinstance(node, Loop)]
    return Footprint(
        name=program.name,
        sizes=tuple(_sizes(program).items()),
        fetched=tuple(o for number, loop in enumerate(tops) for o in _fetched(program, loop, ranks_of, number, 0)),
        held=tuple(ranks_of[name] for name in sorted(operands - inside)),
        states=tuple((number, s.ranks) for number, loop in enumerate(tops) for s in loop.states),
        tiles=tuple(dict.fromkeys(ranks_of.values())),
        products=tuple(dict.fromkeys(node.ranks for node in dots)),
        loops=bool(tops),
        precise=any(node.dtype == f32 for node in dots),
    )


def _sizes(program: TileProgram) -> dict[str, int]:
    """The tile of every rank: of the grid, whole, or of the longest loop over it."""
    sizes = {axis.rank: axis.tile for axis in program.grid}
    sizes.update({rank: size for rank in program.resident if (size := program.static_size(rank)) is not None})
    looped: dict[str, int] = {}
    for node in nodes_of(program.body):
        if isinstance(node, Loop):
            looped[node.rank] = max(node.tile, looped.get(node.rank, 1))
    return {**sizes, **looped}


def _fetched(program: TileProgram, loop: Loop, ranks_of: Mapping[str, Ranks], number: int, depth: int) -> Iterator[Operand]:
    """What a pass of a loop reads for operands of products, through what is made of it in the pass, every read once."""
    types = {t.name: t.dtype for t in program.inputs}
    made = {node.dst: node.expr for node in loop.body if isinstance(node, Map)}
    seen: set[Read] = set()
    for node in loop.body:
        if isinstance(node, Loop):
            yield from _fetched(program, node, ranks_of, number, depth + 1)
        if not isinstance(node, Dot):
            continue
        for read in (r for side in (node.a, node.b) for r in _reads_through(side, made)):
            ranks = tuple(dict.fromkeys(r for c in read.coords for r in expression_ranks(c, ranks_of)))
            if read not in seen and loop.rank in ranks and read.tensor in types:
                seen.add(read)
                yield Operand(types[read.tensor].bytes, ranks, number, depth)


def _reads_through(e: Expr, made: Mapping[str, Expr]) -> Iterator[Read]:
    """The reads of an expression and of the tiles in it that the pass makes."""
    yield from reads(e)
    for node in walk(e):
        if isinstance(node, Tile) and node.name in made:
            yield from _reads_through(made[node.name], made)


def ceil_power(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())
