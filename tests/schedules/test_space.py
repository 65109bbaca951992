"""The space of schedules: every point is legal to write down, and its parts are found again."""

from __future__ import annotations

import random

import pytest
from cascades import CASES, traced
from einfall.compiler.lower import lower
from einfall.compiler.passes import make_plan
from einfall.ir.check import check_program
from einfall.schedules.default import default_schedule
from einfall.schedules.schedule import Schedule
from einfall.schedules.space import schedule_space
from einfall.schedules.target import load_target

TARGET = load_target("cpu:generic")
by_name = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def space_of(case):
    sizes = {r: max(n, 64) for r, n in case.sizes.items()}
    plan = make_plan(traced(case), sizes)
    return schedule_space(plan, sizes, TARGET), plan, sizes


@by_name
def test_points_are_schedules_that_lower(case):
    space, _, sizes = space_of(case)
    rng = random.Random(0)
    for _ in range(4):
        point = space.sample(rng)
        assert Schedule.from_json(point.to_json()) == point
        for program in lower(make_plan(traced(case), sizes, repeat=point.repeated), point, sizes):
            check_program(program)


@by_name
def test_a_point_remembers_its_choices(case):
    space, _, _ = space_of(case)
    rng = random.Random(1)
    for _ in range(8):
        chosen = [rng.choice(axis.choices) for axis in space.axes]
        assert list(space.choices_of(space.point(chosen))) == chosen


@by_name
def test_neighbours_differ_in_one_axis_and_features_have_one_length(case):
    space, _, _ = space_of(case)
    point = space.sample(random.Random(2))
    here = space.choices_of(point)
    count = 0
    for other in space.neighbours(point):
        assert sum(a != b for a, b in zip(here, space.choices_of(other), strict=True)) == 1
        assert len(space.features(other)) == len(space.features(point)) == len(space.axes)
        count += 1
    assert count == sum(len(axis.choices) - 1 for axis in space.axes)


@by_name
def test_the_default_is_a_point(case):
    space, plan, sizes = space_of(case)
    default = default_schedule(plan, sizes, TARGET)
    assert space.point(space.choices_of(default)) == default
    assert len(space) == len(set(space)) if len(space) < 5000 else len(space) > 0
