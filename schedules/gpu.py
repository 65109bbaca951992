"""GPU schedules: what is taken before anything was measured."""

from __future__ import annotations

from ..ir.tile import TileProgram
from .schedule import KernelOptions, Schedule
from .target import Target


def options_of(program: TileProgram, schedule: Schedule, target: Target) -> KernelOptions:
    """The options of a kernel: the schedule's, else the default for the program and the target."""
    return dict(schedule.kernel).get(program.name, default_options(program, target))


def default_options(program: TileProgram, target: Target) -> KernelOptions:
    """Four warps and two tiles in flight."""
    return KernelOptions()
