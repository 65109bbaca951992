"""Smaller schedules where the target has no room: each step takes something away, and there is a last one."""

from __future__ import annotations

import pytest
from cascades import CASES, traced
from einfall.compiler.lower import lower
from einfall.compiler.passes import make_plan
from einfall.schedules.default import default_schedule
from einfall.schedules.fit import roomier, smaller
from einfall.schedules.gpu import options_of
from einfall.schedules.target import load_target

TARGET = load_target("cuda:sm_90")


def lowered(case, schedule=None):
    plan = make_plan(traced(case), case.sizes)
    schedule = schedule or default_schedule(plan, case.sizes, TARGET)
    return schedule, lower(plan, schedule, case.sizes, TARGET)


def room(programs, schedule):
    """What a step may change: options, tiles of the grid, and steps of loops, which have the tile at their end."""
    return [(options_of(p, schedule, TARGET), [a.tile for a in p.grid], str(p)) for p in programs]


@pytest.mark.parametrize("step", [smaller, roomier])
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_step_takes_something_and_the_last_is_small(case, step):
    schedule, programs = lowered(case)
    for _ in range(80):
        less = next((found for program in programs if (found := step(schedule, program, TARGET)) is not None), None)
        if less is None:
            break
        before = room(programs, schedule)
        schedule, programs = lowered(case, less)
        assert room(programs, schedule) != before
    else:
        pytest.fail("it never ends")
    for program in programs:
        assert all(axis.tile == 1 for axis in program.grid)
        if step is smaller:
            assert options_of(program, schedule, TARGET).stages == 1 or not any(hasattr(node, "body") for node in program.body)
