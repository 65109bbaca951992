"""The plan and the schedule that a cascade has before anything was measured."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ..ir.cascade import Cascade
from ..ir.plan import Plan
from ..schedules.default import default_schedule, default_split, streams_stretches
from ..schedules.schedule import Schedule
from ..schedules.target import Target


def default_plan(cascade: Cascade, sizes: Mapping[str, int], target: Target, plan: Plan | None = None) -> tuple[Plan, Schedule]:
    """The default's plan, streams cut where that is worth it, and its tiles; `plan` is that without cuts, if it is at hand."""
    from .passes import make_plan

    whole = make_plan(cascade, sizes) if plan is None else plan
    split = default_split(whole, sizes, target)
    cut = make_plan(cascade, sizes, split=split) if split else whole
    if not split or not streams_stretches(cut, split, sizes):
        return whole, default_schedule(whole, sizes, target)
    return cut, replace(default_schedule(cut, sizes, target), split=tuple(sorted(split.items())))
