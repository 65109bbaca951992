"""The schedules worth trying for a cascade on a GPU.

    choices of the plan   how streams are cut, online or repeated passes, what is kept: each a branch with kernels of its own
    tiles                 powers of two around the default
    options               warps, tiles in flight, edges, persistent programs, descriptors, the precision of f32 products
    blocks                elements of a deep product's sum that are held at once

A point that certainly does not fit, by what its tiles take (`footprint.py`), is none. Whether a kernel of a point really fits is known
when it was compiled. Options that a kernel would have anyway are not written down, so that points that are the same are equal.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

from ..ir.errors import ScheduleError, UnsupportedError
from ..ir.plan import KernelPlan, Plan
from .default import tile_of
from .footprint import Footprint, ceil_power
from .gpu import DIRECT, fitting_options
from .roles import WHOLE, Roles, kernel_roles
from .schedule import DotSchedule, KernelOptions, Schedule
from .space import Axis
from .target import SECOND, Target

AROUND = 4  # how many times smaller or larger than the default a tile may be
LEAST = 16  # of a tile of a rank that products have
LONGEST = 256  # of such a tile
MOST = 1 << 20  # elements of a tile, by the compiler
FEW_ROWS = 8  # of a kernel that multiplies nothing
WARPS, MANY_WARPS, WIDE = (2, 4, 8), 16, 1 << 14  # more than eight where a tile has so many elements
STAGES = (1, 2, 3, 4)
BLOCKS = (32, 64, 128)
BLOCKED = 64  # the default of a block
WORTH = 64  # a kernel with so many times less work than the largest has no axes of its own
TILES, CROWD = 2, 8  # tiles a stretch at least, tasks a core at most that a cut stream makes
CUTS = 5  # numbers of stretches that are tried
TRIES = 64  # random points, before the default is taken for one that fits
LISTED = 4096  # points that are counted one by one


@dataclass(frozen=True, slots=True)
class Variant:
    """What becomes of a cascade under some choices of the plan.

    Args:
        schedule: these choices, and the default's tiles for them.
        footprints: one a kernel.
        blocks: products that can be done block by block: kernel, name, and the rank they sum over with its extent.
    """

    schedule: Schedule
    plan: Plan
    footprints: tuple[Footprint, ...]
    blocks: tuple[tuple[str, str, str, int], ...] = ()


Derive = Callable[[Schedule], Variant]


@dataclass(frozen=True, slots=True)
class _Kernel:
    """What the points of a branch need of a kernel."""

    plan: KernelPlan
    takes: Footprint
    ranks: tuple[str, ...]  # that have tiles
    blocks: tuple[tuple[str, str], ...]  # of products, each with its rank


@dataclass(frozen=True, slots=True)
class Branch:
    """The points with the same choices of the plan: the product of `axes`, less what does not fit."""

    base: Schedule
    axes: tuple[Axis, ...]
    kernels: tuple[_Kernel, ...]
    target: Target

    @property
    def size(self) -> int:
        """How many points there would be if all fitted."""
        return math.prod(len(axis.choices) for axis in self.axes)

    def point(self, chosen: Sequence[Any]) -> Schedule:
        """The schedule with one choice for each axis."""
        tile, dots = dict(self.base.tile), dict(self.base.dot)
        order = self.base.grid_order
        options: dict[str, dict[str, Any]] = {}
        for axis, choice in zip(self.axes, chosen, strict=True):
            kernel, _, field = axis.key.rpartition("/")
            match axis.kind:
                case "tile":
                    tile[axis.key] = choice
                case "grid_order":
                    order = choice
                case "option":
                    options.setdefault(kernel, {})[field] = choice
                case "block" if choice is not None:
                    dots[axis.key] = DotSchedule(k_block=choice)
                case _:
                    pass
        point = replace(self.base, tile=_sorted(tile), dot=_sorted(dots), grid_order=order)
        return replace(point, kernel=_sorted(dict(self._options(point, options))))

    def _options(self, point: Schedule, chosen: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, KernelOptions]]:
        """The options that have to be written down: those that the kernel would not have by itself."""
        for kernel in self.kernels:
            if kernel.plan.name in chosen:
                default = self.default_options(point, kernel)
                options = replace(default, **chosen[kernel.plan.name])
                if options != default or any(name in dict(point.dot) for name, _ in kernel.blocks):
                    yield kernel.plan.name, options

    def default_options(self, point: Schedule, kernel: _Kernel) -> KernelOptions:
        """The options a kernel has where the schedule says nothing."""
        return fitting_options(kernel.takes, self.target, self.tiles(point, kernel))

    def options(self, point: Schedule, kernel: _Kernel) -> KernelOptions:
        """The options a kernel has."""
        return dict(point.kernel).get(kernel.plan.name) or self.default_options(point, kernel)

    def tiles(self, point: Schedule, kernel: _Kernel) -> dict[str, int]:
        """The tile of every rank that the schedule decides about."""
        found = {rank: n for rank in kernel.ranks if (n := tile_of(point, kernel.plan, rank)) is not None}
        blocks = dict(point.dot)
        return found | {rank: n for name, rank in kernel.blocks if name in blocks and (n := blocks[name].k_block) is not None}

    def choices_of(self, point: Schedule) -> tuple[Any, ...]:
        """The inverse of `point`. A value that is no choice of its axis is returned as it is."""
        named = {kernel.plan.name: kernel for kernel in self.kernels}
        found: list[Any] = []
        for axis in self.axes:
            kernel, _, field = axis.key.rpartition("/")
            match axis.kind:
                case "tile":
                    found.append(self._tile(point, axis.key))
                case "grid_order":
                    found.append(point.grid_order)
                case "option":
                    found.append(getattr(self.options(point, named[kernel]), field))
                case _:
                    found.append(dict(point.dot).get(axis.key, DotSchedule()).k_block)
        return tuple(found)

    def _tile(self, point: Schedule, key: str) -> int | None:
        """The tile that an axis is about: what a kernel says of its own rank goes before what is said of the rank."""
        owner, _, rank = key.rpartition(".")
        kernels = [k.plan for k in self.kernels if rank in k.ranks and owner in ("", k.plan.name)]
        found = next((n for k in kernels if (n := tile_of(point, k, rank)) is not None), None)
        return dict(self.base.tile).get(key) if found is None else found

    def fits(self, point: Schedule) -> bool:
        """Whether nothing says that a kernel does not fit. The default is tried, whatever is estimated."""
        if point == self.base:
            return True
        for kernel in self.kernels:
            tiles, options = self.tiles(point, kernel), self.options(point, kernel)
            threads = options.warps * self.target.limit("warp", 32)
            if threads > self.target.limit("threads", 1024) or kernel.takes.largest(tiles) > MOST:
                return False
            if self.target.name.endswith(SECOND):
                continue
            if least_shared_bytes(kernel.takes, options, tiles) > self.target.limit("shared_memory", 1 << 16):
                return False
            if kernel.takes.registers(threads, tiles) > self.target.limit("registers", 255) or not _specializes(options, self.target):
                return False
        return True

    def neighbours(self, point: Schedule) -> Iterator[Schedule]:
        """The points of the branch that differ in one axis."""
        current = self.choices_of(point)
        for i, axis in enumerate(self.axes):
            for choice in axis.choices:
                if choice != current[i]:
                    found = self.point([*current[:i], choice, *current[i + 1 :]])
                    if self.fits(found):
                        yield found

    def like(self, point: Schedule, other: Branch) -> Schedule:
        """The point of this branch nearest to one of another: the same choices where the axes are the same, else the default's."""
        same = {(axis.kind, axis.key): choice for axis, choice in zip(other.axes, other.choices_of(point), strict=True)}
        own = self.choices_of(self.base)
        chosen = [same.get((axis.kind, axis.key), default) for axis, default in zip(self.axes, own, strict=True)]
        return self.point([c if c in axis.choices else d for axis, c, d in zip(self.axes, chosen, own, strict=True)])


@dataclass(frozen=True, slots=True)
class GpuSpace:
    """All branches, the default's first. Points are `Schedule`s."""

    branches: tuple[Branch, ...]

    @property
    def default(self) -> Schedule:
        """The default schedule."""
        return self.branches[0].base

    def __len__(self) -> int:
        """How many points there are; where they are too many to try each, before those that do not fit are left out."""
        total = sum(branch.size for branch in self.branches)
        return total if total > LISTED else sum(1 for _ in self)

    def __iter__(self) -> Iterator[Schedule]:
        for branch in self.branches:
            for chosen in itertools.product(*(axis.choices for axis in branch.axes)):
                point = branch.point(chosen)
                if branch.fits(point):
                    yield point

    def sample(self, rng: random.Random) -> Schedule:
        """A random point that fits."""
        branch = rng.choice(self.branches)
        for _ in range(TRIES):
            point = branch.point([rng.choice(axis.choices) for axis in branch.axes])
            if branch.fits(point):
                return point
        return branch.base

    def neighbours(self, point: Schedule) -> list[Schedule]:
        """The points that differ in one axis or in one choice of the plan; none of a schedule that is of another space."""
        own = self.branch_of(point)
        if own is None:
            return []
        found = list(own.neighbours(point))
        found += [p for branch in self.branches if branch is not own and branch.fits(p := branch.like(point, own))]
        return list(dict.fromkeys(found))

    def nearest(self, point: Schedule) -> Schedule:
        """The point that says what `point` does, in the space's words; `point` itself where there is none."""
        branch = self.branch_of(point)
        if branch is None:
            return point
        choices = branch.choices_of(point)
        known = all(choice in axis.choices for axis, choice in zip(branch.axes, choices, strict=True))
        return branch.point(choices) if known else point

    def branch_of(self, point: Schedule) -> Branch | None:
        """The branch with the point's choices of the plan."""
        return next((b for b in self.branches if _plan_choices(b.base) == _plan_choices(point)), None)

    def features(self, point: Schedule) -> list[float]:
        """The point as numbers: choices of the plan, then every axis of every branch, then what the point takes of the machine.

        A size is its logarithm; what the point's branch has not is nan.
        """
        branch = self.branch_of(point)
        choices = {} if branch is None else {(a.kind, a.key): c for a, c in zip(branch.axes, branch.choices_of(point), strict=True)}
        row = [math.log2(math.prod(n for _, n in point.split)), float(len(point.repeated)), float(len(point.result))]
        for axis in {(a.kind, a.key): a for b in self.branches for a in b.axes}.values():
            key = (axis.kind, axis.key)
            row.append(_number(axis, choices[key]) if key in choices else math.nan)
        return [*row, *(_taken(branch, point) if branch is not None else (math.nan,) * 3)]


def gpu_space(derive: Derive, choices: Schedule, sizes: Mapping[str, int], target: Target, *, tf32: bool = False) -> GpuSpace:
    """The space around the default, at extents like `sizes`.

    Args:
        derive: what becomes of the cascade under choices of the plan. Choices that it refuses are not of the space.
        choices: those of the default.
        tf32: whether products of f32 may be of ten mantissa bits, which changes results beyond rounding in f32.
    """
    first = derive(choices)
    found = [first]
    for other in _other_choices(derive, first, sizes, target):
        try:
            variant = derive(other)
        except (ScheduleError, UnsupportedError):
            continue
        if all(variant.plan != known.plan for known in found):
            found.append(variant)
    return GpuSpace(tuple(_branch(variant, sizes, target, tf32=tf32) for variant in found))


def _other_choices(derive: Derive, first: Variant, sizes: Mapping[str, int], target: Target) -> Iterator[Schedule]:
    """Other cuts of the streams, then repeated passes and reductions that are worked out again, with the default's cuts and without."""
    split = dict(first.schedule.split)
    whole = derive(Schedule()) if split else first
    for rank, parts in _cuts(whole, split, sizes, target):
        yield Schedule.make(split={**split, rank: parts} if parts > 1 else {r: n for r, n in split.items() if r != rank})
    kernels = whole.plan.kernels
    streams = sorted({k.stream for k in kernels if k.stream is not None and any(s.origins for s in k.stages)})
    results = [name for k in kernels for name in k.kept]
    for cut in (split, {}) if split else (split,):
        for count in range(1, len(streams) + 1):
            for ranks in itertools.combinations(streams, count):
                yield Schedule.make(split=cut, stream=dict.fromkeys(ranks, "repeat"))
        yield from (Schedule.make(split=cut, result={name: "again"}) for name in results)


def _cuts(whole: Variant, default: Mapping[str, int], sizes: Mapping[str, int], target: Target) -> Iterator[tuple[str, int]]:
    """Other numbers of stretches for each stream of the uncut plan with few tasks."""
    known = whole.plan.cascade.solve_sizes(sizes)
    for kernel in whole.plan.kernels:
        rank = kernel.stream
        if rank is None or rank not in known or not any(stage.states for stage in kernel.stages):
            continue
        grid = kernel_roles(whole.plan.cascade, kernel, known).grid
        tasks = math.prod(-(-known.get(r, 1) // (tile_of(whole.schedule, kernel, r) or 1)) for r in grid)
        longest = known[rank] // (TILES * (tile_of(whole.schedule, kernel, rank) or 1))
        most = min(longest, CROWD * target.cores // max(1, tasks)) if tasks < target.cores else 1
        own = default.get(rank, 1)
        powers = [1 << n for n in range(1, max(1, most).bit_length())]
        near = sorted((n for n in powers if n != own), key=lambda n: (abs(math.log2(n / own)), n))[: CUTS - 1]
        yield from ((rank, n) for n in ([1] if own > 1 else []) + sorted(near))


def _branch(variant: Variant, sizes: Mapping[str, int], target: Target, *, tf32: bool) -> Branch:
    plan, base = variant.plan, variant.schedule
    known = plan.cascade.solve_sizes(sizes)
    roles = [kernel_roles(plan.cascade, kernel, known) for kernel in plan.kernels]
    kernels = [
        _Kernel(
            kernel, takes, tuple(r for r in (*role.grid, role.stream) if r is not None),
            tuple((name, rank) for owner, name, rank, _ in variant.blocks if owner == kernel.name),
        )
        for kernel, role, takes in zip(plan.kernels, roles, variant.footprints, strict=True)
    ]  # fmt: skip
    work = [_points(role, known) for role in roles]
    axes: list[Axis] = []
    for kernel, role, points in zip(kernels, roles, work, strict=True):
        if points * WORTH < max(work):
            continue
        axes += _tile_axes(base, kernel, role, known)
        axes += _option_axes(base, kernel, role, known, target, tf32=tf32)
        axes += _block_axes(kernel, variant)
        if not target.name.endswith(SECOND) and any(s.domain.predicates for s in kernel.plan.stages):
            axes.append(Axis("grid_order", "", ("heavy_first", "rising")))
    unique = {(axis.kind, axis.key): axis for axis in axes if len(axis.choices) > 1}
    return Branch(base, tuple(unique.values()), tuple(kernels), target)


def _points(roles: Roles, sizes: Mapping[str, int]) -> int:
    ranks = (*roles.grid, *roles.resident, *((roles.stream,) if roles.stream is not None else ()))
    return math.prod(sizes.get(rank, 1) for rank in ranks)


def _tile_axes(base: Schedule, kernel: _Kernel, roles: Roles, sizes: Mapping[str, int]) -> Iterator[Axis]:
    entries = dict(base.tile)
    for rank in kernel.ranks:
        default = tile_of(base, kernel.plan, rank)
        if default is None or (roles.contracts and rank in roles.units):  # every streamed input has it: a longer tile shares nothing
            continue
        least, most = max(1, default // AROUND), default * AROUND
        if roles.contracts:
            least, most = max(least, min(LEAST, default)), max(default, min(most, LONGEST))
        elif rank in (*roles.rows, *roles.units) and roles.stream is not None:
            most = max(default, min(most, FEW_ROWS))
        longest = max(default, ceil_power(sizes.get(rank, most)))
        choices = tuple(n for n in _powers(least, most) if n <= longest)
        own = f"{kernel.plan.name}.{rank}"
        yield Axis("tile", own if own in entries or rank not in entries else rank, tuple(sorted({*choices, default})))


def _option_axes(base: Schedule, kernel: _Kernel, roles: Roles, sizes: Mapping[str, int], target: Target, *, tf32: bool) -> Iterator[Axis]:
    """The options that change something in this kernel, on this target."""
    takes, name = kernel.takes, kernel.plan.name
    default = fitting_options(takes, target)
    warps = (*WARPS, MANY_WARPS) if takes.largest() * AROUND >= WIDE else WARPS
    found: dict[str, tuple[Any, ...]] = {"warps": warps}
    if not target.name.endswith(SECOND):
        tasks = math.prod(-(-sizes.get(r, 1) // (tile_of(base, kernel.plan, r) or 1)) for r in roles.grid)
        if takes.loops:
            found["stages"] = STAGES
            found["edge"] = ("split", "mask")
            found["loads"] = ("late", "first")
        if tasks > target.cores:
            found["persistent"] = (False, True)
        if takes.precise and "tf32" in target.features:
            found["precision"] = ("ieee", "tf32x3", "tf32") if tf32 else ("ieee", "tf32x3")
        if takes.products and takes.loops and "tma" in target.features:
            found["descriptors"] = found["warp_specialize"] = (False, True)
    for field in (f.name for f in fields(KernelOptions) if f.name in found):
        choices = found[field]
        yield Axis("option", f"{name}/{field}", choices if getattr(default, field) in choices else (getattr(default, field), *choices))


def _block_axes(kernel: _Kernel, variant: Variant) -> Iterator[Axis]:
    """Blocks other than the default, which is one block up to `WHOLE` elements and blocks of `BLOCKED` beyond."""
    for owner, name, _, size in variant.blocks:
        if owner == kernel.plan.name:
            yield Axis("block", name, (None, *(n for n in BLOCKS if n < size and (n != BLOCKED or size <= WHOLE))))


def shared_bytes(takes: Footprint, options: KernelOptions, target: Target, tile: Mapping[str, int] = {}) -> int:
    """Shared memory of a block, estimated: matrix units that read it themselves need what is held there all the time."""
    return takes.shared_bytes(options.stages, tile, kept=bool(DIRECT & set(target.features)))


def least_shared_bytes(takes: Footprint, options: KernelOptions, tile: Mapping[str, int] = {}) -> int:
    """What no kernel takes less of: products of few rows have one tile less in flight, and hold their rows in registers."""
    return takes.shared_bytes(max(1, options.stages - 1), tile, kept=False)


def _specializes(options: KernelOptions, target: Target) -> bool:
    """Whether warps can have different work, where that is asked for: one loop, all fetched by descriptors; four warps for wgmma."""
    if not options.warp_specialize:
        return True
    return options.descriptors and options.edge == "mask" and (options.warps == 4 or "wgmma" not in target.features)


def _powers(least: int, most: int) -> Iterator[int]:
    n = ceil_power(least)
    while n <= most:
        yield n
        n *= 2


def _sorted(table: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    return tuple(sorted(table.items(), key=lambda entry: entry[0]))


def _plan_choices(schedule: Schedule) -> tuple[Any, ...]:
    """Choices of the plan; one of a stretch, and online, are what nothing says."""
    return tuple((r, n) for r, n in schedule.split if n > 1), schedule.repeated, schedule.result


def _number(axis: Axis, choice: Any) -> float:
    if choice is None:
        return 0.0
    if isinstance(choice, int) and not isinstance(choice, bool):
        return math.log2(choice)
    return float(axis.choices.index(choice)) if choice in axis.choices else -1.0


def _taken(branch: Branch, point: Schedule) -> tuple[float, float, float]:
    """Of the kernel that takes most: registers a thread, the share of shared memory, and the elements a thread has of the largest tile."""
    rows = [(0.0, 0.0, 0.0)]
    for kernel in branch.kernels:
        tiles, options = branch.tiles(point, kernel), branch.options(point, kernel)
        threads = options.warps * branch.target.limit("warp", 32)
        shared = shared_bytes(kernel.takes, options, branch.target, tiles) / branch.target.limit("shared_memory", 1 << 16)
        rows.append((float(kernel.takes.registers(threads, tiles)), shared, kernel.takes.largest(tiles) / threads))
    return max(row[0] for row in rows), max(row[1] for row in rows), max(row[2] for row in rows)
