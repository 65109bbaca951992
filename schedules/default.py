"""The schedule that is used before anything was measured: tile sizes from the roles of the ranks and their extents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

from ..ir.plan import KernelPlan, Plan
from .footprint import ceil_power
from .gpu import gpu_split, gpu_tiles
from .roles import POINTS, Roles, factor_bytes, kernel_roles, lone_rows
from .schedule import Schedule
from .target import Target

ROWS = 64
STREAM = 128
ROWS_SCORED, STREAM_SCORED = 256, 64  # a contraction of which only a few numbers a row are kept: more rows share the streamed operand
FEW_ROWS, STREAM_FEW = 8, 512  # too few rows to pay for a tile's bookkeeping
STREAM_FLAT = 1024  # read twice, so it stays in the first-level cache
LANES = 512


def default_schedule(plan: Plan, sizes: Mapping[str, int], target: Target) -> Schedule:
    """Tile sizes for every kernel; layouts and register tiles are left to `layout.complete`.

    For a GPU see `gpu.py`. For a CPU, with a contraction: 64 rows share tiles of 128 along the stream. Without: one row, a stream tile
    of up to 1024. The numbers are the best of a search on one machine (`docs/benchmarks.md`), within a few percent of the best for each
    of a dozen kernels.
    Entries are `rank`, or `kernel.rank` where two kernels differ.
    """
    known = plan.cascade.solve_sizes(sizes)
    tables = [(k, _tiles(plan, k, known, target)) for k in plan.kernels]
    tile: dict[str, int] = {}
    for kernel, table in tables:
        for rank, n in table.items():
            same = all(other.get(rank, n) == n for _, other in tables)
            tile[rank if same else f"{kernel.name}.{rank}"] = n
    return Schedule.make(tile=tile)


def default_split(plan: Plan, sizes: Mapping[str, int], target: Target) -> dict[str, int]:
    """The streams that the default cuts into stretches, each with their number: on GPUs, where there are too few tasks otherwise."""
    if target.kind == "cpu":
        return {}
    known = plan.cascade.solve_sizes(sizes)
    return gpu_split(plan, {k.name: _tiles(plan, k, known, target) for k in plan.kernels}, known, target)


def streams_stretches(plan: Plan, split: Mapping[str, int], sizes: Mapping[str, int]) -> bool:
    """Whether the kernels of a plan with cut streams run along the stretches, rather than hold one whole."""
    known = plan.cascade.solve_sizes(sizes)
    held = {rank for kernel in plan.kernels for rank in kernel_roles(plan.cascade, kernel, known).resident}
    return not held & {f"{rank}_in" for rank in split}


def _tiles(plan: Plan, kernel: KernelPlan, sizes: Mapping[str, int], target: Target) -> dict[str, int]:
    roles = kernel_roles(plan.cascade, kernel, sizes)
    if target.kind == "cpu":
        return default_tiles(roles, sizes)
    alone = lone_rows(plan.cascade, kernel, roles)
    roles = replace(roles, rows=tuple(r for r in roles.rows if r not in alone), units=(*roles.units, *sorted(alone)))
    return gpu_tiles(roles, sizes, factor_bytes(plan.cascade, kernel, roles, sizes), target)


def default_tiles(roles: Roles, sizes: Mapping[str, int]) -> dict[str, int]:
    """The tile of each grid rank and of the stream of one kernel."""
    tile: dict[str, int] = dict.fromkeys(roles.units, 1)
    budget = 1
    if roles.contracts:
        budget = ROWS if roles.accumulates else ROWS_SCORED
    if roles.stream is None and not roles.contracts:
        budget = max(1, POINTS // math.prod(sizes.get(r, 1) for r in (*roles.resident, *roles.lanes)))
    for rank in sorted(roles.rows, key=lambda r: -sizes.get(r, ROWS)):
        tile[rank] = min(budget, ceil_power(sizes.get(rank, ROWS)))
        budget = max(1, budget // tile[rank])
    for rank in roles.lanes:
        least = 16 if roles.stream is not None or roles.contracts else 1
        tile[rank] = min(LANES if roles.stream is not None else POINTS, ceil_power(sizes.get(rank, LANES), least))
    if roles.stream is not None:
        longest = _longest_stream(roles, math.prod(tile[rank] for rank in roles.rows))
        tile[roles.stream] = min(longest, ceil_power(sizes.get(roles.stream, longest), 16))
    return tile


def _longest_stream(roles: Roles, rows: int) -> int:
    """Elements of the stream in a tile."""
    if not roles.contracts and not roles.lanes:
        return STREAM_FLAT
    if roles.contracts and not roles.accumulates:
        return STREAM_SCORED
    return STREAM_FEW if rows <= FEW_ROWS and not roles.lanes else STREAM


def tile_of(schedule: Schedule, kernel: KernelPlan, rank: str) -> int | None:
    """The schedule's tile of a rank in a kernel; the kernel's own entry wins."""
    table = dict(schedule.tile)
    return table.get(f"{kernel.name}.{rank}", table.get(rank))
