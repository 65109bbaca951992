"""What `explain` says of the schedule that a GPU's kernels have by default: tiles, options, what they take of a multiprocessor.

Nothing is compiled: shared memory and registers are estimates from the tiles. `einfall compile` tells what the compilers made of them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..ir.cascade import Cascade
from ..ir.plan import KernelPlan, Plan
from ..schedules.footprint import Footprint
from ..schedules.gpu import fitting_options
from ..schedules.roles import kernel_roles
from ..schedules.schedule import Schedule
from ..schedules.space_gpu import shared_bytes
from ..schedules.target import SECOND, Target
from .default_plan import default_plan
from .search_space import derive_variant

SCHEDULED = ("cuda", "hip")
PRODUCTS = {
    "ieee": "in f32, without a matrix unit (ieee)",
    "tf32x3": "as three tf32 products each on the matrix unit (tf32x3), which stand for one of f32",
    "tf32": "in tf32 on the matrix unit: ten mantissa bits",
}


@dataclass(frozen=True, slots=True)
class KernelSchedule:
    """How a kernel is run by default.

    Args:
        tiles: elements of each rank of the grid and of the stream in a tile; ranks of one element are left out.
        whole: elements at once of each rank that is held in a tile, or summed block by block.
        tasks: of the grid.
        f32_products: how products of f32 are done; None where there are none.
        shared_bytes, registers: of a block and of a thread, estimated; None where nothing is multiplied, where they are small.
    """

    name: str
    tiles: tuple[tuple[str, int], ...]
    whole: tuple[tuple[str, int], ...]
    tasks: int
    warps: int
    stages: int
    f32_products: str | None
    shared_bytes: int | None
    registers: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**asdict(self), "tiles": dict(self.tiles), "whole": dict(self.whole)}


@dataclass(frozen=True, slots=True)
class ScheduleReport:
    """The default schedule on a target. `split`: the streams that it cuts, with their numbers of stretches."""

    target: str
    split: tuple[tuple[str, int], ...]
    kernels: tuple[KernelSchedule, ...]
    shared_limit: int

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "basis": "estimated",
            "split": dict(self.split),
            "shared_limit": self.shared_limit,
            "kernels": [kernel.to_dict() for kernel in self.kernels],
        }

    @property
    def notes(self) -> list[str]:
        """What has to be said in words: how streams are cut, and what stands for f32."""
        lines = [f"the stream over {rank} is cut into {parts} stretches, merged by another kernel" for rank, parts in self.split]
        for choice, text in PRODUCTS.items():
            names = [kernel.name for kernel in self.kernels if kernel.f32_products == choice]
            lines += [f"products of f32 in {', '.join(names)}: {text}"] if names else []
        return lines

    def rows(self) -> list[list[str]]:
        """A row of words for each kernel, under `HEAD`."""
        return [
            [
                k.name, _sizes(k.tiles), _sizes(k.whole), str(k.tasks), str(k.warps), str(k.stages),
                "-" if k.shared_bytes is None else f"{k.shared_bytes / 1024:.0f} of {self.shared_limit / 1024:.0f} KiB",
            ]
            for k in self.kernels
        ]  # fmt: skip


HEAD = ["kernel", "tiles", "whole", "tasks", "warps", "stages", "shared memory, estimated"]


def scheduled(cascade: Cascade, plan: Plan, sizes: Mapping[str, int], target: Target) -> ScheduleReport | None:
    """The default schedule of a GPU target; None for other targets. Raises what lowering raises."""
    if target.kind not in SCHEDULED:
        return None
    variant = derive_variant(cascade, Schedule(split=default_plan(cascade, sizes, target, plan)[1].split), sizes, target)
    known = variant.plan.cascade.solve_sizes(sizes)
    kernels = zip(variant.plan.kernels, variant.footprints, strict=True)
    return ScheduleReport(
        target=target.name,
        split=variant.schedule.split,
        kernels=tuple(_kernel(variant.plan, kernel, takes, known, target) for kernel, takes in kernels),
        shared_limit=target.limit("shared_memory"),
    )


def _kernel(plan: Plan, kernel: KernelPlan, takes: Footprint, sizes: Mapping[str, int], target: Target) -> KernelSchedule:
    roles = kernel_roles(plan.cascade, kernel, sizes)
    tile = dict(takes.sizes)
    along = (*roles.grid, *((roles.stream,) if roles.stream is not None else ()))
    options = fitting_options(takes, target)
    multiplies = bool(takes.products) and not target.name.endswith(SECOND)
    return KernelSchedule(
        name=kernel.name,
        tiles=tuple((rank, tile[rank]) for rank in along if tile.get(rank, 1) > 1),
        whole=tuple((rank, tile[rank]) for rank in roles.resident if tile.get(rank, 1) > 1),
        tasks=math.prod(-(-sizes.get(rank, 1) // tile.get(rank, 1)) for rank in roles.grid),
        warps=options.warps,
        stages=options.stages if takes.loops else 1,
        f32_products=options.precision if multiplies and takes.precise else None,
        shared_bytes=shared_bytes(takes, options, target) if multiplies else None,
        registers=takes.registers(options.warps * target.limit("warp", 32)) if multiplies else None,
    )


def _sizes(table: tuple[tuple[str, int], ...]) -> str:
    return ", ".join(f"{rank} {n}" for rank, n in table) or "-"
