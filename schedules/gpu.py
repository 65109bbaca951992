"""GPU schedules: the tiles and options that are taken before anything was measured.

The numbers are those with which kernels of each kind compile without spills on the targets that are described here; which is fastest is
the tuner's to find.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ..ir.plan import Plan
from ..ir.tile import TileProgram
from .footprint import Footprint, ceil_power, footprint
from .roles import Roles
from .schedule import KernelOptions, Schedule
from .target import Target

ROWS, FEW = 128, 16  # rows of a matrix product, and how many are so few that registers are no matter
BYTES = 16384  # of the largest tile of a stream's operands
LONGEST, SHORTEST = 128, 32  # of the stream in a tile, where products are summed
FLAT = 4096  # elements of a tile without products
PLAIN = 1024  # elements of a task that streams nothing
WIDE = 256  # bytes of an operand at one index of the stream, from which on fewer rows share it
TASKS, STRETCH = 2, 4  # tasks a core that a cut stream makes, tiles a stretch at least
DIRECT = {"wgmma", "tcgen05"}  # matrix units that read shared memory themselves
STAGED = 0.6  # of shared memory, for tiles in flight


def gpu_tiles(roles: Roles, sizes: Mapping[str, int], width: int, target: Target) -> dict[str, int]:
    """The tile of each grid rank and of the stream of one kernel; all are powers of two.

    `width` is the bytes of the largest operand of a product at one index of the stream.
    """
    direct = bool(DIRECT & set(target.features))  # other matrix units take both operands from registers
    longest = LONGEST if direct else LONGEST // 2
    tile: dict[str, int] = dict.fromkeys(roles.units, 1)
    resident = math.prod(sizes.get(r, 1) for r in roles.resident)
    if not roles.contracts:
        budget = FLAT if roles.stream is not None else PLAIN
        return _flat_tiles(roles, sizes, tile, max(1, budget // ceil_power(resident)))
    rows = ROWS if width <= WIDE else ROWS // 2
    for rank in sorted(roles.rows, key=lambda r: -sizes.get(r, ROWS)):
        tile[rank] = min(rows, ceil_power(sizes.get(rank, ROWS)))
        rows = max(1, rows // tile[rank])
    for rank in roles.lanes:
        tile[rank] = min(LONGEST, ceil_power(sizes.get(rank, LONGEST), SHORTEST // 2))
        width *= tile[rank]
    if roles.stream is not None:
        few = math.prod(tile.get(rank, 1) for rank in roles.rows) <= FEW
        most = max(SHORTEST, min(longest, (BYTES if direct or few else BYTES // 2) // width))
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
    """The options that a kernel of this program has if its schedule has none for it."""
    return fitting_options(footprint(program), target)


def fitting_options(takes: Footprint, target: Target, tile: Mapping[str, int] = {}) -> KernelOptions:
    """Warps by the largest tile that is computed, tiles in flight by the shared memory they take; `tile` stands for the program's."""
    if not takes.products:
        largest = takes.largest(tile)
        return KernelOptions(warps=8 if largest >= FLAT else 4 if largest >= PLAIN // 2 else 2, stages=3)
    warps = 8 if takes.product(tile) >= 64 * 128 else 4
    streamed = takes.pass_bytes(tile)
    room = STAGED * target.limit("shared_memory", 1 << 16) - takes.held_bytes(tile)
    stages = max(1, min(3, int(room // streamed))) if streamed else 1
    return KernelOptions(warps=warps, stages=stages, precision="tf32x3" if "tf32" in target.features else "ieee")


def complete(schedule: Schedule, default: Schedule) -> Schedule:
    """`schedule` with the tiles of `default` where it has none."""
    return replace(schedule, tile=tuple(sorted({**dict(default.tile), **dict(schedule.tile)}.items())))
