"""From a cascade to an executable: look up, derive, lower, build, and keep what was built on disk by content.

Two kinds of entries are kept. `artifact`: a binary under the hash of its emitted source, the toolchain and the target. `compiled`:
which kernels a cascade became at some extents under a schedule. So the same call in another process runs nothing but a few file
reads, and two cascades or extents that come out as the same source share one binary.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..backends.base import Source
from ..backends.registry import backend_for
from ..configuration import current
from ..ir.cascade import Cascade, Einsum
from ..ir.errors import BuildError, EinfallError, ScheduleError, UnsupportedError
from ..ir.infer import declared_types
from ..ir.plan import KernelPlan, LibraryPlan, LoopPlan, Plan
from ..ir.tile import TileProgram, kernel_tiles
from ..schedules.default import default_schedule
from ..schedules.fit import TooLarge, roomier, smaller
from ..schedules.schedule import Schedule
from ..schedules.target import Target, load_target
from .cache import DiskCache, key_of, package_fingerprint
from .default_plan import default_plan
from .executable import Executable
from .parts import Call, LibraryPart, LoopPart, Part
from .store import executable_of, manifest, toolchain

FORMAT = 1  # of the entries; raised when their layout changes
SOURCE, BINARY = "kernel.py", "kernel"  # and the ending that the backend's files have
TRIES = 3  # of a smaller schedule where registers spill
CROWDED = 128  # bytes that a kernel of a default schedule may spill
Parts = list[Part | LibraryPart | LoopPart]
Lookup = Callable[[Cascade, Mapping[str, int], Target], Schedule | None]


@dataclass(frozen=True, slots=True)
class Lowered:
    """What stands before the toolchain: the plan, the schedule it is lowered by, the programs and their sources."""

    plan: Plan
    schedule: Schedule
    programs: tuple[TileProgram, ...]
    sources: tuple[Source, ...]


@dataclass(frozen=True, slots=True)
class Built:
    """A plan with its kernels built, and where the files of each part are."""

    lowered: Lowered
    parts: Parts
    files: list[dict[str, Any]]

    def executable(self, order: Order, *, inner: bool = False) -> Executable:
        """The parts as something to call."""
        made = Executable(order.cascade, order.target, self.lowered.schedule, order.sizes, self.parts, order.strided, inner=inner)
        made.remember(self.lowered.plan, self.lowered.programs)
        return made


@dataclass(frozen=True, slots=True)
class Order:
    """What is to be compiled: a cascade at some extents and layouts for a machine."""

    cascade: Cascade
    sizes: Mapping[str, int]
    target: Target
    strided: frozenset[str]

    def key(self, schedule: Schedule | None) -> str:
        """The name under which the result is kept: everything that the derivation depends on."""
        return key_of(
            str(FORMAT),
            package_fingerprint(),
            str(self.cascade),
            json.dumps([dict(self.sizes), sorted(self.strided)], sort_keys=True),
            machine_text(self.target),
            "default" if schedule is None else schedule.to_json(),
        )


def compile_cascade(
    cascade: Cascade,
    *,
    sizes: Mapping[str, int],
    target: str | Target = "cpu",
    schedule: Schedule | None = None,
    database: Lookup | None = None,
    fall_back: bool = False,
    strided: frozenset[str] = frozenset(),
    cache: DiskCache | Path | str | None = None,
) -> Executable:
    """Build `cascade` for `target`.

    Args:
        sizes: the extent of every rank at the call. The kernels serve other extents as well, except those they are specialised to.
        schedule: None asks `database`, and takes the default where that knows nothing.
        fall_back: whether a given schedule is only a suggestion: one that cannot be built here is replaced by the default.
        strided: inputs whose last axis need not be contiguous.
        cache: the disk cache or its folder; that of the settings if None.

    Raises `UnsupportedError`, `ScheduleError` or `BuildError`.
    """
    machine = load_target(target) if isinstance(target, str) else target
    order = Order(cascade, dict(sizes), machine, strided)
    store = cache if isinstance(cache, DiskCache) else DiskCache(current().cache if cache is None else Path(cache))
    if schedule is None and database is not None:
        schedule, fall_back = database(cascade, sizes, machine), True
    try:
        return _compile(order, schedule, store)
    except (ScheduleError, UnsupportedError, BuildError) as error:
        if schedule is None or not fall_back:
            raise
        _say(f"the schedule {schedule.hash} cannot be built here, the default is taken", error)
        return _compile(order, None, store)


def _compile(order: Order, schedule: Schedule | None, store: DiskCache) -> Executable:
    key = order.key(schedule)
    found = _from_cache(order, key, store)
    if found is not None:
        return found
    built = _built(order, lower_cascade(order, schedule), store, given=schedule is not None)
    executable = built.executable(order)
    store.put("compiled", key, manifest(executable, built.files), {})
    return executable


def _built(order: Order, lowered: Lowered, store: DiskCache, *, given: bool) -> Built:
    """The parts of a plan and their files.

    A schedule that nobody has given is made smaller until the target has room for every kernel, and further while that saves spills.
    """
    built = _with_room(order, lowered, store, given=given)
    for _ in range(0 if given or order.target.kind == "cpu" else TRIES):
        spills = [int(part.facts.get("spill_bytes", 0)) for part in built.parts if isinstance(part, Part)]
        schedule = built.lowered.schedule
        for program, spilled in zip(built.lowered.programs, spills, strict=True):
            if spilled > CROWDED:
                schedule = roomier(schedule, program, order.target) or schedule
        if schedule == built.lowered.schedule:
            break
        _say(f"{sum(spills)} bytes of registers spill; a smaller schedule is tried", schedule.to_json())
        tried = _with_room(order, lower_plan(order, lowered.plan, schedule), store, given=False)
        if sum(int(part.facts.get("spill_bytes", 0)) for part in tried.parts if isinstance(part, Part)) >= sum(spills):
            break
        built = tried
    return built


def _with_room(order: Order, lowered: Lowered, store: DiskCache, *, given: bool) -> Built:
    """The parts of a plan, of a smaller schedule where the target has no room for a kernel and nobody has given the schedule."""
    while True:
        try:
            return Built(lowered, *_parts(order, lowered, store))
        except TooLarge as error:
            if given:
                raise
            lowered = _less(order, lowered, error)


def _less(order: Order, lowered: Lowered, error: TooLarge) -> Lowered:
    """The plan lowered by a schedule so much smaller that there may be room. Raises `error` where nothing is left to take away."""
    _say("a smaller schedule is tried", error.what)
    for _ in range(error.halvings):
        entries = {source.entry: program for program, source in zip(lowered.programs, lowered.sources, strict=True)}
        less = smaller(lowered.schedule, entries[error.kernel], order.target) if error.kernel in entries else None
        if less is None:
            raise error
        lowered = lower_plan(order, lowered.plan, less)
    return lowered


def _parts(order: Order, lowered: Lowered, store: DiskCache) -> tuple[Parts, list[dict[str, Any]]]:
    """The steps of the plan ready to be called, and where the files of each are."""
    parts: Parts = []
    names: list[dict[str, Any]] = []
    kernels = zip(lowered.programs, lowered.sources, strict=True)
    types = declared_types(lowered.plan.cascade)
    for step in lowered.plan.steps:
        match step:
            case LibraryPlan():
                parts.append(LibraryPart.of(step, types))
                names.append({})
            case LoopPlan():
                inner = replace(order, cascade=step.step)
                body = _built(inner, lower_plan(inner, step.body, None), store, given=False)
                parts.append(LoopPart.of(step, types, body.executable(inner, inner=True)))
                names.append({"body": body.files})
            case KernelPlan():
                program, source = next(kernels)
                name = key_of(str(FORMAT), source.text, machine_text(order.target))
                binary = BINARY + backend_for(order.target).suffix
                parts.append(_part(Call.of(program), source, name, binary, store))
                names.append({"artifact": name, "source": SOURCE, "binary": binary})
    return parts, names


def _from_cache(order: Order, key: str, store: DiskCache) -> Executable | None:
    entry = store.get("compiled", key)
    if entry is None:
        return None

    def file(kernel: Mapping[str, Any], kind: str) -> Path:
        artifact = store.get("artifact", str(kernel["artifact"]))
        if artifact is None:
            raise FileNotFoundError
        return artifact.file(str(kernel[kind]))

    try:
        return executable_of(entry.facts, file, order.cascade)
    except FileNotFoundError:  # a binary was damaged and removed, or cleaned away: it is built again
        store.discard("compiled", key)
    except (EinfallError, KeyError, TypeError, ValueError, AttributeError) as error:
        store.drop("compiled", key, f"{type(error).__name__}: {error}")
    return None


def _part(call: Call, source: Source, name: str, file: str, store: DiskCache) -> Part:
    """A kernel from the cache, or built and stored there as `file`."""
    entry = store.get("artifact", name)
    if entry is not None:
        return Part(call, source, path=entry.file(file))
    backend = backend_for(source.target)
    artifact = backend.build(source)
    if store.root is not None:
        with tempfile.TemporaryDirectory(prefix="einfall-") as scratch:
            binary = Path(scratch) / file
            backend.save(artifact, binary)
            tools = list(toolchain(source.target.kind))
            store.put("artifact", name, {"toolchain": tools}, {SOURCE: source.text.encode(), file: binary})
    return Part(call, source, artifact=artifact)


def lower_cascade(order: Order, schedule: Schedule | None = None) -> Lowered:
    """Everything before the toolchain: derive the plan, take the default schedule if none is given, lower and emit."""
    from .passes import make_plan

    if current().debug:
        _trace_passes(order.cascade, order.sizes)
    if schedule is None:
        return lower_plan(order, *default_plan(order.cascade, order.sizes, order.target))
    return lower_plan(order, make_plan(order.cascade, order.sizes, **schedule.plan), schedule)


def lower_plan(order: Order, plan: Plan, schedule: Schedule | None) -> Lowered:
    """The kernels of a plan as sources. The bodies of loops have their own schedule, the default."""
    from .lower import lower

    backend = backend_for(order.target)
    chosen = default_schedule(plan, order.sizes, order.target) if schedule is None else schedule
    programs = lower(plan, chosen, order.sizes, order.target)
    _check_names(plan, programs, chosen)
    if current().debug:
        from ..ir.check import check_program

        for program in programs:
            _say("tile program", program)
            check_program(program)
    return Lowered(plan, chosen, programs, tuple(backend.emit(p, chosen, order.target, strided=order.strided) for p in programs))


def _check_names(plan: Plan, programs: Sequence[TileProgram], schedule: Schedule) -> None:
    """Raise `ScheduleError` for an entry of a schedule that names nothing: it would be ignored, not obeyed."""
    tiles = [tile for program in programs for tile in kernel_tiles(program.body)]
    ranks = list(plan.cascade.all_ranks())
    results = [s.out for s in plan.cascade.body if isinstance(s, Einsum) and s.op is not None]
    ranks_of_kernels = [*ranks, *(f"{kernel.name}.{rank}" for kernel in plan.kernels for rank in ranks)]
    for table, entries, known, hint in (
        ("tile", schedule.tile, ranks_of_kernels, ranks),
        ("stream", schedule.stream, ranks_of_kernels, ranks),
        ("layout", schedule.layout, tiles, tiles),
        ("dot", schedule.dot, tiles, tiles),
        ("group", schedule.group, tiles, tiles),
        ("result", schedule.result, results, results),
        ("split", schedule.split, [*ranks, *(d.name for d in plan.cascade.ranks)], ranks),
    ):
        for name, _ in entries:
            if name not in known:
                what = {id(ranks): "rank", id(results): "reduction"}.get(id(hint), "tile")
                raise ScheduleError(f"{table}[{name}] names no {what} of {plan.cascade.name}", hint=f"its {what}s are {', '.join(hint)}")


def machine_text(target: Target) -> str:
    """What of a machine and its tools decides about code: features and limits, not measured speeds."""
    known = [target.kind, target.name, target.description, target.cores, target.features, target.limits]
    return json.dumps([*known, toolchain(target.kind)])


def _trace_passes(cascade: Cascade, sizes: Mapping[str, int]) -> None:
    """Under the debug setting: print the cascade after every pass that changes it, and check it."""
    from ..ir.check import check_cascade
    from .passes import rewritten

    _say("cascade", cascade)
    for rewrite, changed in rewritten(cascade, sizes):
        if changed != cascade:
            _say(rewrite.__name__, changed)
            check_cascade(changed)
        cascade = changed


def _say(title: str, thing: object) -> None:
    if current().debug:
        sys.stderr.write(f"-- {title}\n{thing}\n")
