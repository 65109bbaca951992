"""The schedules worth trying for a plan on a target: a product of axes, each a short list of choices.

Axes follow from the roles of the ranks: tile sizes of rows, lanes and stream; the order of the grid where the work of tasks differs;
the register tile of each contraction and where its update enters; online or repeated passes where states are corrected. A choice of
None leaves the matter to the default.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from ..ir.cascade import Einsum
from ..ir.plan import KernelPlan, Plan
from .default import default_schedule, default_tiles
from .footprint import ceil_power
from .roles import Roles, is_contraction, kernel_roles
from .schedule import DotSchedule, GridOrder, Schedule
from .target import Target

ROW_TILES = (16, 32, 64, 96, 128, 256)
STREAM_TILES = (32, 64, 128, 256, 512)
FLAT_ROWS = (1, 2, 4, 8)
FLAT_STREAMS = (512, 1024, 2048, 4096, 8192, 16384)
LANE_TILES = (64, 128, 256, 512, 1024)
LONG = 4096  # elements of a stream that are worth a second kernel
REGISTER_TILES = ((4, 4), (6, 4), (8, 2), (12, 2), (8, 3), (16, 1))  # rows x vectors


@dataclass(frozen=True, slots=True)
class Axis:
    """One decision. `kind` is tile, grid_order, register, update, stream, result or split; `key` names the rank or tile it is about."""

    kind: str
    key: str
    choices: tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class Space:
    """The product of `axes`, applied to the default schedule `base`. Points are `Schedule`s."""

    base: Schedule
    axes: tuple[Axis, ...]

    def __len__(self) -> int:
        return math.prod(len(axis.choices) for axis in self.axes)

    def __iter__(self) -> Iterator[Schedule]:
        return (self.point(chosen) for chosen in itertools.product(*(axis.choices for axis in self.axes)))

    def point(self, chosen: Sequence[Any]) -> Schedule:
        """The schedule with one choice for each axis."""
        tile, order, dots, stream = dict(self.base.tile), self.base.grid_order, dict(self.base.dot), dict(self.base.stream)
        result, split = dict(self.base.result), dict(self.base.split)
        for axis, choice in zip(self.axes, chosen, strict=True):
            match axis.kind:
                case "tile":
                    tile[axis.key] = choice
                case "grid_order":
                    order = choice
                case "register" if choice is not None:
                    dots[axis.key] = replace(dots.get(axis.key, DotSchedule()), register=choice.register, lane=choice.lane)
                case "update" if choice:
                    dots[axis.key] = replace(dots.get(axis.key, DotSchedule()), update_at_load=True)
                case "stream" if choice != "online":
                    stream[axis.key] = choice
                case "result" if choice != "keep":
                    result[axis.key] = choice
                case "split" if choice > 1:
                    split[axis.key] = choice
        layout, group = dict(self.base.layout), dict(self.base.group)
        return Schedule.make(tile=tile, dot=dots, grid_order=order, stream=stream, layout=layout, group=group, result=result, split=split)

    def choices_of(self, point: Schedule) -> tuple[Any, ...]:
        """The inverse of `point`. A value that is no choice of its axis is returned as it is."""
        return tuple(self._choice(axis, point) for axis in self.axes)

    def _choice(self, axis: Axis, point: Schedule) -> Any:
        match axis.kind:
            case "tile":
                return dict(point.tile).get(axis.key)
            case "grid_order":
                return point.grid_order
            case "register":
                chosen = dict(point.dot).get(axis.key, DotSchedule())
                return DotSchedule(register=chosen.register, lane=chosen.lane) if chosen.register else None
            case "update":
                return dict(point.dot).get(axis.key, DotSchedule()).update_at_load
            case "split":
                return dict(point.split).get(axis.key, 1)
            case "result":
                return dict(point.result).get(axis.key, "keep")
            case _:
                return dict(point.stream).get(axis.key, "online")

    def sample(self, rng: random.Random) -> Schedule:
        """A point drawn evenly."""
        return self.point([rng.choice(axis.choices) for axis in self.axes])

    def neighbours(self, point: Schedule) -> Iterator[Schedule]:
        """The points that differ in one axis."""
        current = self.choices_of(point)
        for i, axis in enumerate(self.axes):
            for choice in axis.choices:
                if choice != current[i]:
                    yield self.point([*current[:i], choice, *current[i + 1 :]])

    def features(self, point: Schedule) -> list[float]:
        """The point as numbers: the logarithm of a size, nan for one that a foreign point leaves open, else the position in the axis."""
        row: list[float] = []
        for axis, choice in zip(self.axes, self.choices_of(point), strict=True):
            if axis.kind == "tile":
                row.append(math.nan if choice is None else math.log2(choice))
            else:
                row.append(float(axis.choices.index(choice)) if choice in axis.choices else -1.0)
        return row


def schedule_space(plan: Plan, sizes: Mapping[str, int], target: Target) -> Space:
    """The space for a plan at extents like `sizes`; its default point is among the choices."""
    known = plan.cascade.solve_sizes(sizes)
    base = default_schedule(plan, known, target)
    axes: list[Axis] = []
    for kernel in plan.kernels:
        roles = kernel_roles(plan.cascade, kernel, known)
        axes.extend(_tile_axes(base, kernel, roles, known))
        axes.extend(_dot_axes(kernel, roles, known, target.limit("vector_width", 4)))
        if any(s.domain.predicates for s in kernel.stages):
            orders: tuple[GridOrder, ...] = ("heavy_first", "zigzag", "rising")
            axes.append(Axis("grid_order", kernel.name, orders))
    streams = {k.stream for k in plan.kernels if k.stream is not None and any(s.origins for s in k.stages)}
    axes.extend(Axis("stream", rank, ("online", "repeat")) for rank in sorted(streams))
    axes.extend(_split_axes(base, plan, known, target))
    axes.extend(Axis("result", name, ("keep", "again")) for k in plan.kernels for name in k.kept)
    unique = {(a.kind, "" if a.kind == "grid_order" else a.key): a for a in axes}
    return Space(base, tuple(unique.values()))


def _split_axes(base: Schedule, plan: Plan, sizes: Mapping[str, int], target: Target) -> Iterator[Axis]:
    """Where a stream's tasks are fewer than the threads: stretches of it as tasks of their own."""
    for kernel in plan.kernels:
        roles = kernel_roles(plan.cascade, kernel, sizes)
        tiles = {**default_tiles(roles, sizes), **dict(base.tile)}
        tasks = math.prod(-(-sizes.get(rank, 1) // tiles.get(rank, 1)) for rank in roles.grid)
        if roles.stream is not None and tasks < target.cores and sizes.get(roles.stream, 0) >= LONG:
            yield Axis("split", roles.stream, tuple(dict.fromkeys((1, target.cores, 2 * target.cores))))


def _tile_axes(base: Schedule, kernel: KernelPlan, roles: Roles, sizes: Mapping[str, int]) -> Iterator[Axis]:
    defaults = default_tiles(roles, sizes)
    entries = dict(base.tile)
    for rank, default in defaults.items():
        options: tuple[int, ...]
        if rank == roles.stream:
            options = STREAM_TILES if roles.contracts or roles.lanes else FLAT_STREAMS
        elif rank in roles.lanes:
            options = LANE_TILES
        elif roles.contracts:
            if rank in roles.units:  # every streamed input has the rank: a larger tile shares nothing
                continue
            options = ROW_TILES
        else:
            options = FLAT_ROWS
        key = rank if rank in entries else f"{kernel.name}.{rank}"
        longest = ceil_power(sizes.get(rank, max(options)), min(16, default))
        choices = sorted({n for n in options if n <= longest} | {default})
        if len(choices) > 1:
            yield Axis("tile", key, tuple(choices))


def _dot_axes(kernel: KernelPlan, roles: Roles, sizes: Mapping[str, int], lanes: int) -> Iterator[Axis]:
    """Register tiles of each contraction, and for those that are corrected where the update enters."""
    for name, ranks, corrected in _contractions(kernel):
        wide = [r for r in ranks if r not in roles.units and sizes.get(r, 2) > 1]
        if corrected:
            yield Axis("update", f"{name}_new", (False, True))
            name = f"{name}_new"
        if len(wide) == 2:
            first, last = wide
            lane = last if corrected or last in roles.lanes else first
            choices = tuple(_register_tile(first if lane == last else last, lane, sizes, lanes))
            yield Axis("register", name, (None, *choices))


def _contractions(kernel: KernelPlan) -> Iterator[tuple[str, tuple[str, ...], bool]]:
    """(tile, result ranks, whether it accumulates along the stream) of every contraction."""
    for stage in kernel.stages:
        for state in stage.states:
            if state.op == "sum" and is_contraction(state.summand, state.ranks, state.over):
                yield state.name, state.ranks, True
    for s in kernel.statements:
        if isinstance(s, Einsum) and s.op == "sum" and is_contraction(s.expr, s.ranks, s.over):
            yield s.out, s.ranks, False


def _register_tile(row: str, lane: str, sizes: Mapping[str, int], lanes: int) -> Iterator[DotSchedule]:
    for rows, vectors in REGISTER_TILES:
        if lanes * vectors <= ceil_power(sizes.get(lane, lanes * vectors), lanes) and rows <= ceil_power(sizes.get(row, rows)):
            yield DotSchedule(register=((row, rows), (lane, lanes * vectors)), lane=lane)
