"""Plan and schedule to tile programs: a pure function, free of any target.

    values.py        expressions over tiles; inner reductions on demand
    contractions.py  which products are matrix products
    stages.py        a stage as a loop over the stream
    bounds.py        where the loop must run
    share.py         clean-up: shared, hoisted and folded work
    kernel.py        one kernel: loops one after the other, then what is stored
"""

from __future__ import annotations

from collections.abc import Mapping

from ...ir.plan import Plan
from ...ir.tile import TileProgram
from ...schedules.default import default_schedule
from ...schedules.gpu import complete
from ...schedules.schedule import Schedule
from ...schedules.target import Target
from .kernel import lower_kernel


def lower(plan: Plan, schedule: Schedule, sizes: Mapping[str, int], target: Target | None = None) -> tuple[TileProgram, ...]:
    """One tile program a kernel, in launch order. Tiles that the schedule leaves open are the default's for the target, a CPU if None.

    `sizes` gives the extents of ranks that are held whole; these become constants of the program, all others stay arguments.
    Raises `ScheduleError` for a tile that the plan cannot have, `UnsupportedError` naming a statement that cannot be lowered.
    """
    if target is not None and target.kind != "cpu":
        schedule = complete(schedule, default_schedule(plan, sizes, target))
    return tuple(lower_kernel(plan.cascade, kernel, schedule, sizes) for kernel in plan.kernels)
