"""A schedule made smaller where the target has no room for a kernel of it.

What a kernel takes is known when it was compiled. The default schedule is then made smaller in the kernel that was refused, a little at
a time, until there is room: fewer tiles in flight, then half of the longest tile. Where registers do not suffice, which is slow and
not wrong, there are more warps to share a tile, then shorter ones.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import TypeVar

from ..ir.errors import ScheduleError
from ..ir.tile import Loop, Node, TileProgram
from .gpu import options_of
from .schedule import Schedule
from .target import Target

SHORTEST = 16  # of a loop's tile that is halved to; those of the grid may become 1
MOST_WARPS = 8  # that registers are shared among

T = TypeVar("T")


class TooLarge(ScheduleError):
    """A kernel takes more of something than its target has: `times` as much."""

    def __init__(self, what: str, *, kernel: str, hint: str, times: float = 1.0) -> None:
        self.kernel = kernel
        self.halvings = max(1, math.ceil(math.log2(times)))  # of what it takes, until there may be room
        super().__init__(what, hint=hint)


def smaller(schedule: Schedule, program: TileProgram, target: Target) -> Schedule | None:
    """`schedule` with fewer tiles in flight in the kernel of `program`, else with half of its longest tile; None where nothing is left."""
    options = options_of(program, schedule, target)
    if options.stages > 1 and any(isinstance(node, Loop) for node in program.body):
        return replace(schedule, kernel=_with(schedule.kernel, program.name, replace(options, stages=options.stages - 1)))
    return _halved(schedule, program)


def roomier(schedule: Schedule, program: TileProgram, target: Target) -> Schedule | None:
    """`schedule` with more registers for the elements of a tile of `program`: more warps, else half of its longest tile; None as above."""
    options = options_of(program, schedule, target)
    if options.warps < MOST_WARPS:
        return replace(schedule, kernel=_with(schedule.kernel, program.name, replace(options, warps=2 * options.warps)))
    return _halved(schedule, program)


def _halved(schedule: Schedule, program: TileProgram) -> Schedule | None:
    """`schedule` with half of the longest tile, of a loop or of the grid, and when all of them are short of the grid alone."""
    grid = {axis.rank: axis.tile for axis in program.grid}
    tiles = {**grid, **{loop.rank: max(loop.tile, grid.get(loop.rank, 1)) for loop in _loops(program.body)}}
    if max(tiles.values(), default=1) <= SHORTEST:
        tiles = grid
    longest = max(tiles, key=lambda rank: tiles[rank], default=None)
    if longest is None or tiles[longest] == 1:
        return None
    return replace(schedule, tile=_with(schedule.tile, f"{program.name}.{longest}", tiles[longest] // 2))


def _loops(body: tuple[Node, ...]) -> list[Loop]:
    found = [node for node in body if isinstance(node, Loop)]
    return [*found, *(inner for loop in found for inner in _loops(loop.body))]


def _with(table: tuple[tuple[str, T], ...], key: str, value: T) -> tuple[tuple[str, T], ...]:
    return tuple(sorted({**dict(table), key: value}.items(), key=lambda entry: entry[0]))
