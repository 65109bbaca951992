"""The schedules worth trying for a cascade on a target: what a search is given.

On a CPU they follow from the plan and the target alone. On a GPU every choice of the plan is derived, and its kernels are lowered, so that
the space knows what their tiles take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

from ..ir.cascade import Cascade
from ..ir.plan import Plan
from ..ir.tile import Dot, TileProgram, nodes_of
from ..schedules.default import default_schedule
from ..schedules.footprint import footprint
from ..schedules.schedule import Schedule
from ..schedules.space import Space, schedule_space
from ..schedules.space_gpu import GpuSpace, Variant, gpu_space
from ..schedules.target import SECOND, Target
from .default_plan import default_plan
from .lower import lower
from .passes import make_plan

AnySpace: TypeAlias = Space | GpuSpace


def search_space(cascade: Cascade, sizes: Mapping[str, int], target: Target, *, tf32: bool = False) -> tuple[AnySpace, Schedule]:
    """The space and the default schedule, which is a point of it.

    `tf32` admits products of f32 with ten mantissa bits. Raises what planning and lowering the default raise.
    """
    plan, default = default_plan(cascade, sizes, target)
    if target.kind == "cpu":
        return schedule_space(plan, sizes, target), default

    def derive(choices: Schedule) -> Variant:
        return derive_variant(cascade, choices, sizes, target)

    space = gpu_space(derive, Schedule(split=default.split), sizes, target, tf32=tf32)
    return space, space.default


def derive_variant(cascade: Cascade, choices: Schedule, sizes: Mapping[str, int], target: Target) -> Variant:
    """The plan under some choices, the default's tiles for it, and what its kernels take."""
    plan = make_plan(cascade, sizes, **choices.plan)
    schedule = replace(choices, tile=default_schedule(plan, sizes, target).tile)
    programs = lower(plan, schedule, sizes, target)
    if target.name.endswith(SECOND):
        return Variant(schedule, plan, tuple(footprint(program) for program in programs))
    from ..backends.triton.blocks import block_contractions

    blocked = tuple(footprint(block_contractions(program, {})) for program in programs)
    return Variant(schedule, plan, blocked, tuple(found for program in programs for found in _blocks(plan, program)))


def _blocks(plan: Plan, program: TileProgram) -> Iterator[tuple[str, str, str, int]]:
    """The products that can be done block by block, one for each rank they sum over: kernel, name, rank and extent."""
    from ..backends.triton.blocks import block_contractions

    for rank in program.resident:
        names = [node.dst for node in nodes_of(program.body) if isinstance(node, Dot) and node.over == (rank,)]
        size = program.static_size(rank)
        if names and size is not None and rank not in block_contractions(program, {names[0]: 1}).resident:
            yield program.name, names[0], rank, size
