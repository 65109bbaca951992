"""What a cost model is told of a schedule: what the tile programs do under its tiles, set against the target.

    work         tasks, rounds of the machine, passes of the loops; operations of matrix, vector and special units
    traffic      bytes asked for, bytes past each cache, bytes of the main memory
    roofline     the time of each on the target, and the longest
    intensity    operations a byte at each of these levels: a curve
    room         tiles of a pass against each cache; registers, shared memory and programs at once on a GPU; accumulators of a register tile
                 against the registers and its vectors on a CPU

A program is read once for each choice of the plan; then its figures follow for any tiles, so that thousands of schedules can be asked
about. They order schedules and say nothing certain: masks, latencies and what compilers do are left out.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ..ir.cascade import Cascade
from ..ir.errors import ScheduleError, UnsupportedError
from ..ir.expr import OPS, Cast, Expr, Op, reads, walk
from ..ir.infer import expression_ranks
from ..ir.tile import Dot, Loop, Map, Node, Reduce, Scan, Store, TileProgram, kernel_tiles
from ..ir.types import DType, f32
from ..schedules.footprint import Footprint, footprint
from ..schedules.gpu import fitting_options
from ..schedules.schedule import Schedule
from ..schedules.target import Does, Target

Ranks = tuple[str, ...]
Derive = Callable[[Schedule], tuple[Sequence[TileProgram], Mapping[str, int]]]


@dataclass(frozen=True, slots=True)
class Access:
    """An element of a tensor, read or written at every point of `ranks` in every pass of `loops`, outermost first."""

    tensor: str
    bytes: float
    ranks: Ranks
    loops: Ranks


@dataclass(frozen=True, slots=True)
class Count:
    """`each` operations of a unit at every point of `ranks` in every pass of `loops`."""

    does: Does
    dtype: DType
    each: int
    ranks: Ranks
    loops: Ranks


@dataclass(frozen=True, slots=True)
class Profile:
    """What a program does, apart from its tiles. `whole` are the ranks and the element of every tensor."""

    name: str
    grid: Ranks
    accesses: tuple[Access, ...]
    counts: tuple[Count, ...]
    whole: tuple[tuple[str, Ranks, float], ...]
    takes: Footprint

    def sizes(self, schedule: Schedule) -> dict[str, int]:
        """The tile of every rank under a schedule; those it leaves open are the program's."""
        table, sizes = dict(schedule.tile), dict(self.takes.sizes)
        return {rank: table.get(f"{self.name}.{rank}", table.get(rank, size)) for rank, size in sizes.items()}


def profile(program: TileProgram) -> Profile:
    """The profile of a program."""
    tiles = {name: ranks for name, (ranks, _) in kernel_tiles(program.body).items()}
    types = {t.name: t.dtype for t in program.inputs} | {t.name: t.dtype for t in program.outputs}
    accesses, counts = [], []
    for node, loops in _nodes(program.body, ()):
        for e, ranks in _expressions(node, tiles):
            accesses += [
                Access(r.tensor, types[r.tensor].bytes, tuple(x for c in r.coords for x in expression_ranks(c, tiles)), loops)
                for r in dict.fromkeys(reads(e))
            ]
            counts += [Count(does, f32, n, ranks, loops) for does, n in _operations(e)]
        match node:
            case Dot():
                counts.append(Count("matrix", node.dtype, 2, (*node.ranks, *node.over), loops))
            case Reduce() | Scan():
                over = node.over if isinstance(node, Reduce) else ()
                counts.append(Count("vector", f32, 1, tuple(dict.fromkeys((*node.ranks, *over))), loops))
            case Store():
                ranks = tuple(dict.fromkeys(x for c in node.coords for x in expression_ranks(c, tiles)))
                accesses.append(Access(node.tensor, types[node.tensor].bytes, ranks, loops))
    whole = [(t.name, t.ranks, t.dtype.bytes) for t in program.inputs] + [(t.name, t.ranks, t.dtype.bytes) for t in program.outputs]
    grid = tuple(axis.rank for axis in program.grid)
    return Profile(program.name, grid, tuple(accesses), tuple(counts), tuple(whole), footprint(program))


def _nodes(body: tuple[Node, ...], loops: Ranks) -> Iterator[tuple[Node, Ranks]]:
    for node in body:
        yield node, (*loops, node.rank) if isinstance(node, Loop) else loops
        if isinstance(node, Loop):
            yield from _nodes(node.body, (*loops, node.rank))


def _expressions(node: Node, tiles: Mapping[str, Ranks]) -> Iterator[tuple[Expr, Ranks]]:
    """The expressions of a node with the ranks at whose points they are worked out."""
    match node:
        case Map():
            yield node.expr, node.ranks
        case Reduce():
            yield node.expr, (*node.ranks, *node.over)
        case Scan():
            yield node.expr, node.ranks
        case Dot():
            yield from ((e, expression_ranks(e, tiles)) for e in (node.a, node.b))
            yield from ((e, node.ranks) for e in (node.update, node.post) if e is not None)
        case Store():
            yield node.expr, tuple(dict.fromkeys(r for c in node.coords for r in expression_ranks(c, tiles)))
        case Loop():
            yield from ((state.next, state.ranks) for state in node.states)


def _operations(e: Expr) -> Iterator[tuple[Does, int]]:
    found = {"vector": 0, "special": 0}
    for node in walk(e):
        unit = OPS[node.name].unit if isinstance(node, Op) else "vector" if isinstance(node, Cast) else "none"
        if unit in found:
            found[unit] += 1
    vector: Does = "vector"
    special: Does = "special"
    yield from ((does, n) for does, n in ((vector, found["vector"]), (special, found["special"])) if n)


@dataclass(frozen=True, slots=True)
class Figures:
    """What one program does under some tiles. `bytes` by level: asked for, past each cache of the target, main memory."""

    tasks: int
    passes: int
    operations: tuple[tuple[Does, float], ...]
    seconds: tuple[tuple[Does, float], ...]
    bytes: tuple[float, ...]
    pass_bytes: float


def figures(p: Profile, tiles: Mapping[str, int], extents: Mapping[str, int], target: Target) -> Figures:
    """The figures of a program whose ranks have these tiles and extents."""

    def number(ranks: Sequence[str]) -> float:
        return float(math.prod(min(tiles.get(r, 1), extents.get(r, tiles.get(r, 1))) for r in dict.fromkeys(ranks)))

    def passes(rank: str) -> int:
        return -(-extents.get(rank, 1) // tiles.get(rank, 1))

    tasks = math.prod(passes(rank) for rank in p.grid)
    operations: dict[Does, float] = {"matrix": 0.0, "vector": 0.0, "special": 0.0}
    seconds = dict(operations)
    for c in p.counts:
        done = c.each * number(c.ranks) * math.prod(passes(r) for r in c.loops) * tasks
        operations[c.does] += done
        seconds[c.does] += done / target.peak(c.does, c.dtype)[2]
    pass_bytes = sum(a.bytes * number(a.ranks) for a in p.accesses)
    levels = [0.0, *(c.bytes / (c.shared_by or target.cores) for c in target.caches)]

    def moved(room: float) -> dict[str, float]:
        """Bytes of each tensor that all tasks fetch past a memory with so much room for each: in every pass, unless all of it stays."""
        found: dict[str, float] = {}
        for a in p.accesses:
            again = (passes(r) for r in a.loops if r in a.ranks or pass_bytes > room)
            found[a.tensor] = found.get(a.tensor, 0.0) + a.bytes * number(a.ranks) * math.prod(again) * tasks
        return found

    past = [moved(room) for room in levels]
    last = max((c.bytes for c in target.caches), default=0)
    whole = {name: size * math.prod(extents.get(r, 1) for r in ranks) for name, ranks, size in p.whole}
    main = sum(min(n, whole[t]) if sum(whole.values()) <= last else max(n, whole[t]) for t, n in past[-1].items())
    return Figures(
        tasks=tasks,
        passes=math.prod(passes(r) for r in dict.fromkeys(r for a in p.accesses for r in a.loops)),
        operations=tuple(operations.items()),
        seconds=tuple(seconds.items()),
        bytes=(*(sum(level.values()) for level in past), main),
        pass_bytes=pass_bytes,
    )


def feature_names(target: Target) -> tuple[str, ...]:
    """The names of `kernel_features` on a target, in order."""
    caches = [c.name for c in target.caches]
    levels = ["asked", *(f"past {name}" for name in caches), "memory"]
    room = ("accumulators", "vectors", "idle lanes") if target.kind == "cpu" else ("registers", "shared", "warps", "stages", "unoccupied")
    return (
        "tasks", "idle", "passes", "matrix operations", "vector operations", "special operations", *(f"bytes {x}" for x in levels),
        "matrix time", "vector time", "special time", "memory time", "roofline", *(f"intensity {x}" for x in levels),
        *(f"room {name}" for name in caches), *room,
    )  # fmt: skip


def kernel_features(profiles: Sequence[Profile], schedule: Schedule, extents: Mapping[str, int], target: Target) -> dict[str, float]:
    """The features of a schedule by name. Amounts are logarithms to base 2, of several kernels together; shares are of the worst kernel."""
    found = [(p, tiles, figures(p, tiles, extents, target)) for p in profiles for tiles in (p.sizes(schedule),)]
    levels = ["asked", *(f"past {c.name}" for c in target.caches), "memory"]
    units: tuple[Does, ...] = ("matrix", "vector", "special")
    work = {does: sum(dict(f.operations)[does] for _, _, f in found) for does in units}
    seconds = {does: sum(dict(f.seconds)[does] for _, _, f in found) for does in units}
    moved = {level: sum(f.bytes[i] for _, _, f in found) for i, level in enumerate(levels)}
    memory = moved["memory"] / target.memory.bandwidth
    row = {
        "tasks": _log(sum(f.tasks for _, _, f in found)),
        "idle": max((1 - f.tasks / (target.cores * -(-f.tasks // target.cores)) for _, _, f in found if f.tasks), default=0.0),
        "passes": _log(sum(f.passes for _, _, f in found)),
        **{f"{does} operations": _log(n) for does, n in work.items()},
        **{f"bytes {level}": _log(n) for level, n in moved.items()},
        **{f"{does} time": _log(1e9 * n) for does, n in seconds.items()},
        "memory time": _log(1e9 * memory),
        "roofline": _log(1e9 * max(memory, *seconds.values())),
        **{f"intensity {level}": _log(sum(work.values())) - _log(n) for level, n in moved.items()},
        **{
            f"room {c.name}": max(_log(f.pass_bytes) - _log(c.bytes / (c.shared_by or target.cores)) for _, _, f in found)
            for c in target.caches
        },
    }
    rooms = [_gpu_room(p, tiles, schedule, target) for p, tiles, _ in found] if target.kind != "cpu" else [_cpu_room(schedule, target)]
    return row | {name: max(room[name] for room in rooms) for name in rooms[0]}


def _gpu_room(p: Profile, tiles: Mapping[str, int], schedule: Schedule, target: Target) -> dict[str, float]:
    """What a program takes of a multiprocessor: registers of a thread, shares, and how much of the machine's warps is not in use."""
    options = dict(schedule.kernel).get(p.name) or fitting_options(p.takes, target, tiles)
    threads = options.warps * target.limit("warp", 32)
    registers = min(p.takes.registers(threads, tiles), target.limit("registers", 255))
    shared = p.takes.shared_bytes(options.stages, tiles)
    at_once = min(
        target.limit("registers_per_core", 65536) // max(1, threads * registers),
        target.limit("shared_memory_per_core", 65536) // max(1, shared),
        target.limit("threads_per_core", 2048) // threads,
    )
    return {
        "registers": float(p.takes.registers(threads, tiles)),
        "shared": shared / target.limit("shared_memory", 65536),
        "warps": float(options.warps),
        "stages": float(options.stages),
        "unoccupied": 1 - min(1.0, at_once * threads / target.limit("threads_per_core", 2048)),
    }


def _cpu_room(schedule: Schedule, target: Target) -> dict[str, float]:
    """Accumulators of the largest register tile against the registers, its vectors, and the lanes of a vector that are idle."""
    width, row = target.limit("vector_width", 4), {"accumulators": math.nan, "vectors": math.nan, "idle lanes": math.nan}
    for _, dot in schedule.dot:
        lane = dict(dot.register).get(dot.lane or "")
        if lane is not None:
            vectors = -(-lane // width)
            taken = math.prod(n for rank, n in dot.register if rank != dot.lane) * vectors / target.limit("registers", 16)
            largest = {"accumulators": taken, "vectors": float(vectors), "idle lanes": 1 - lane / (vectors * width)}
            row = {name: largest[name] if math.isnan(old) else max(old, largest[name]) for name, old in row.items()}
    return row


def _log(amount: float) -> float:
    return math.log2(amount) if amount > 0 else -1.0


class KernelSpace:
    """A space of schedules whose features also tell what its tile programs do on the target."""

    def __init__(self, space: Any, derive: Derive, target: Target) -> None:
        """`derive` gives the programs of a schedule and the extent of every rank of theirs.

        It is asked once for each choice of the plan, with the first schedule seen that has it.
        """
        self._space, self._derive, self._target = space, derive, target
        self._profiles: dict[tuple[Any, ...], tuple[tuple[Profile, ...], Mapping[str, int]] | None] = {}

    def __len__(self) -> int:
        return len(self._space)

    def __iter__(self) -> Iterator[Schedule]:
        return iter(self._space)

    def sample(self, rng: random.Random) -> Schedule:
        """A random point."""
        point: Schedule = self._space.sample(rng)
        return point

    def neighbours(self, point: Schedule) -> list[Schedule]:
        """The points one choice away."""
        return list(self._space.neighbours(point))

    def features(self, point: Schedule) -> list[float]:
        """The space's own features, then the programs'; nan for what cannot be lowered."""
        found = self._profile(point)
        own = [float(x) for x in self._space.features(point)]
        if found is None:
            return [*own, *(math.nan for _ in feature_names(self._target))]
        row = kernel_features(found[0], point, found[1], self._target)
        return [*own, *(row[name] for name in feature_names(self._target))]

    def _profile(self, point: Schedule) -> tuple[tuple[Profile, ...], Mapping[str, int]] | None:
        key = (point.stream, point.result, point.split)
        if key not in self._profiles:
            try:
                programs, extents = self._derive(point)
                self._profiles[key] = tuple(profile(program) for program in programs), extents
            except (ScheduleError, UnsupportedError):
                self._profiles[key] = None
        return self._profiles[key]


def described(space: Any, cascade: Cascade, sizes: Mapping[str, int], target: Target) -> KernelSpace:
    """`space` with the features of the tile programs of `cascade` at `sizes` on `target`."""
    from ..compiler.lower import lower
    from ..compiler.passes import make_plan  # loads the algebra system

    def derive(point: Schedule) -> tuple[Sequence[TileProgram], Mapping[str, int]]:
        plan = make_plan(cascade, sizes, **point.plan)
        extents = plan.cascade.solve_sizes(sizes)
        return lower(plan, point, extents, target), extents

    return KernelSpace(space, derive, target)
