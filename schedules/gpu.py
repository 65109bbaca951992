"""GPU schedules: the tiles and options that are taken before anything was measured.

The numbers are those with which kernels of each kind compile without spills on the targets that are described here; which is fastest is
the tuner's to find.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import replace

from ..ir.expr import Read, Tile, reads
from ..ir.infer import expression_ranks
from ..ir.plan import Plan
from ..ir.tile import Dot, Loop, Node, TileProgram, kernel_tiles
from .roles import Factors, Roles
from .schedule import KernelOptions, Schedule
from .target import Target

ROWS, FEW_ROWS = 128, 16  # rows of a matrix product; below the second number they are taken as they come
BYTES = 16384  # of the largest tile of a stream's operands
LONGEST, SHORTEST = 128, 32  # of the stream in a tile, where products are summed
FLAT = 4096  # elements of a tile without products
PLAIN = 1024  # elements of a task that streams nothing
WHOLE = 256  # elements of a product's sum that are held at once; deeper ones are done block by block
TASKS, STRETCH = 2, 4  # tasks a core that a cut stream makes, tiles a stretch at least
STAGED = 0.6  # of shared memory, for tiles in flight


def gpu_tiles(roles: Roles, sizes: Mapping[str, int], factors: Factors) -> dict[str, int]:
    """The tile of each grid rank and of the stream of one kernel; all are powers of two."""
    tile: dict[str, int] = dict.fromkeys(roles.units, 1)
    resident = math.prod(sizes.get(r, 1) for r in roles.resident)
    if not roles.contracts:
        budget = FLAT if roles.stream is not None else PLAIN
        return _flat_tiles(roles, sizes, tile, max(1, budget // ceil_power(resident)))
    deep = ceil_power(min(factors.depth, WHOLE))
    rows = ROWS if deep * factors.bytes <= 256 else ROWS // 2
    for rank in sorted(roles.rows, key=lambda r: -sizes.get(r, ROWS)):
        tile[rank] = min(rows, ceil_power(sizes.get(rank, ROWS)))
        rows = max(1, rows // tile[rank])
    for rank in roles.lanes:
        tile[rank] = min(LONGEST, ceil_power(sizes.get(rank, LONGEST), SHORTEST // 2))
        deep = max(deep, tile[rank])
    if roles.stream is not None:
        most = max(SHORTEST, min(LONGEST, BYTES // (deep * factors.bytes)))
        tile[roles.stream] = min(most, ceil_power(sizes.get(roles.stream, most), SHORTEST // 2))
    return tile


def gpu_split(plan: Plan, tiles: Mapping[str, Mapping[str, int]], sizes: Mapping[str, int], target: Target) -> dict[str, int]:
    """Into how many stretches to cut a stream whose kernel has fewer tasks than the machine has cores: about two tasks a core.

    A stretch holds several tiles, or merging would cost more than it wins. `tiles` are the default's, by kernel.
    """
    split: dict[str, int] = {}
    for kernel in plan.kernels:
        table = tiles[kernel.name]
        if kernel.stream is None or kernel.stream not in sizes or not any(stage.states for stage in kernel.stages):
            continue
        tasks = math.prod(-(-sizes.get(rank, 1) // n) for rank, n in table.items() if rank != kernel.stream)
        wanted = TASKS * target.cores // max(1, tasks)
        most = sizes[kernel.stream] // (STRETCH * table[kernel.stream])
        parts = 1 << max(0, min(wanted, most)).bit_length() - 1 if min(wanted, most) > 0 else 1
        if tasks < target.cores and parts > 1:
            split[kernel.stream] = max(parts, split.get(kernel.stream, 1))
    return split


def _flat_tiles(roles: Roles, sizes: Mapping[str, int], tile: dict[str, int], budget: int) -> dict[str, int]:
    """Tiles of a kernel that multiplies nothing: as long as possible along memory."""
    along = [*roles.lanes, *([roles.stream] if roles.stream is not None else []), *reversed(roles.rows)]
    for rank in along:
        tile[rank] = min(budget, ceil_power(sizes.get(rank, budget)))
        budget = max(1, budget // tile[rank])
    return tile


def options_of(program: TileProgram, schedule: Schedule, target: Target) -> KernelOptions:
    """The options of a kernel: the schedule's, else the default for the program and the target."""
    return dict(schedule.kernel).get(program.name, default_options(program, target))


def default_options(program: TileProgram, target: Target) -> KernelOptions:
    """Warps by the largest tile that is computed, tiles in flight by the shared memory they take."""
    tiles = kernel_tiles(program.body)
    largest = max((_elements(program, ranks) for ranks, _ in tiles.values()), default=1)
    dots = [node for node in _nodes(program.body) if isinstance(node, Dot)]
    if not dots:
        return KernelOptions(warps=8 if largest >= FLAT else 4 if largest >= PLAIN // 2 else 2, stages=3)
    products = max(_elements(program, node.ranks) for node in dots)
    warps = 8 if products >= 64 * 128 else 4
    streamed = sum(_streamed_bytes(program, loop) for loop in program.body if isinstance(loop, Loop))
    fixed = sum(2 * _elements(program, tiles[name][0]) for name in _operands(dots) - _inside(program))
    room = STAGED * target.limit("shared_memory", 1 << 16) - fixed
    stages = max(1, min(3, int(room // streamed))) if streamed else 1
    return KernelOptions(warps=warps, stages=stages, precision="tf32x3" if "tf32" in target.features else "ieee")


def complete(schedule: Schedule, default: Schedule) -> Schedule:
    """`schedule` with the tiles of `default` where it has none."""
    return replace(schedule, tile=tuple(sorted({**dict(default.tile), **dict(schedule.tile)}.items())))


def _nodes(body: tuple[Node, ...]) -> Iterator[Node]:
    for node in body:
        yield node
        if isinstance(node, Loop):
            yield from _nodes(node.body)


def _elements(program: TileProgram, ranks: tuple[str, ...]) -> int:
    loops = {node.rank: node for node in _nodes(program.body) if isinstance(node, Loop)}
    return math.prod(ceil_power(program.tile_size(r, loops.get(r))) for r in ranks)


def _streamed_bytes(program: TileProgram, loop: Loop) -> int:
    """Bytes that one pass of a loop reads into operands of products."""
    types = {t.name: t.dtype for t in program.inputs}
    total = 0.0
    seen: set[Read] = set()
    tiles = {name: ranks for name, (ranks, _) in kernel_tiles(program.body).items()}
    for node in loop.body:
        if not isinstance(node, Dot):
            continue
        for side in (node.a, node.b):
            for read in reads(side):
                ranks = tuple(dict.fromkeys(r for c in read.coords for r in expression_ranks(c, tiles)))
                if read in seen or loop.rank not in ranks or read.tensor not in types:
                    continue
                seen.add(read)
                total += types[read.tensor].bytes * math.prod(_tile_of(program, r, loop) for r in ranks)
    return int(total)


def _tile_of(program: TileProgram, rank: str, loop: Loop) -> int:
    try:
        return ceil_power(program.tile_size(rank, loop))
    except KeyError:
        return 1


def _operands(dots: list[Dot]) -> set[str]:
    return {side.name for node in dots for side in (node.a, node.b) if isinstance(side, Tile)}


def _inside(program: TileProgram) -> set[str]:
    return {name for node in program.body if isinstance(node, Loop) for name in kernel_tiles(node.body)}


def ceil_power(n: int, least: int = 1) -> int:
    """The smallest power of two that is at least `n` and `least`."""
    return max(least, 1 << max(0, n - 1).bit_length())
