"""What a cascade costs at the least: bytes, live intermediates, and the time a target's bandwidth and units allow.

    minimal_traffic   bytes: each input once, each output once
    live_footprint    bytes of the intermediates that must be held, given the passes
    roofline          the larger of bytes / bandwidth and operations / peak, and which it is

Operations are counted in `operations.py`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

from ..ir.cascade import Cascade, Einsum, Iterate, Statement, defined, expressions
from ..ir.errors import CascadeError, UnsupportedError
from ..ir.expr import Expr, Index, Read, index_ranks, reads
from ..ir.infer import declared_types, stored_types
from ..ir.plan import KernelPlan, Plan, Step
from ..ir.types import DType
from ..schedules.target import Target
from .flow import fiber, trace_flow
from .operations import Work, operations, plan_operations
from .passes import make_plan
from .planned import storing_streams
from .sizes import all_statements, complete_sizes, dims, missing_sizes

# traffic ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class TensorTraffic:
    """Bytes of one input or output that must move; `partial` where only gathered elements of it are read."""

    tensor: str
    direction: str
    bytes: int
    partial: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"tensor": self.tensor, "direction": self.direction, "bytes": self.bytes, "partial": self.partial}


def tensor_bytes(ranks: tuple[str, ...], dtype: DType, sizes: Mapping[str, int]) -> int:
    """Bytes of a tensor in memory; four-bit types lie packed, two to a byte."""
    return ceil(prod(sizes[r] for r in ranks) * dtype.bits / 8)


def minimal_traffic(c: Cascade, sizes: Mapping[str, int]) -> tuple[TensorTraffic, ...]:
    """The bytes that must move: each used input once, each output once. `sizes` must give every rank.

    Of an input that is only gathered from, or read at constants, no more counts than the largest number of places a statement names.
    """
    types = declared_types(c)
    moved = []
    for t in c.inputs:
        found = [r for s in all_statements(c.body) for e in expressions(s) for r in reads(e) if r.tensor == t.name]
        if not found:
            continue
        whole = prod(sizes[r] for r in t.ranks)
        touched = min(whole, max(_touched(t.ranks, read, sizes) for read in found))
        moved.append(TensorTraffic(t.name, "in", ceil(touched * t.dtype.bits / 8), touched < whole))
    for o in c.outputs:
        moved.append(TensorTraffic(o.name, "out", tensor_bytes(o.ranks, types[o.name], sizes)))
    return tuple(moved)


def _touched(ranks: tuple[str, ...], read: Read, sizes: Mapping[str, int]) -> int:
    """How many elements of a tensor of these ranks a read can name: each index counts once, whatever number of coordinates mention it."""
    own = {rank for x, rank in zip(read.coords, ranks, strict=True) if x == Index(rank)}
    other = [rank for rank in ranks if rank not in own]
    indices = {i for x in read.coords for i in index_ranks(x)} - own
    return prod(sizes[r] for r in own) * min(prod(sizes[r] for r in other), prod(sizes[r] for r in indices))


def kernel_traffic(plan: Plan, sizes: Mapping[str, int]) -> tuple[tuple[TensorTraffic, ...], ...]:
    """For each step of a plan the bytes that it moves at the least: an input once for every stream that needs it, an output once.

    What later streams of a kernel read of what it stored counts, too. What is gathered from an input, beside or instead of a stream over
    it, counts as the elements named.
    """
    types = stored_types(plan.cascade)
    table = plan.cascade.tensor_ranks()
    moved = []
    for kernel in plan.steps:
        found = []
        stored = storing_streams(plan.cascade, kernel) if isinstance(kernel, KernelPlan) else {}
        read_back = [name for name in stored if any(_uses(plan, kernel, name))]
        for name in (*kernel.inputs, *read_back):
            elements = sum(_elements(table[name], uses, sizes) for uses in _uses(plan, kernel, name))
            whole = prod(sizes[r] for r in table[name])
            found.append(TensorTraffic(name, "in", ceil(elements * types[name].bits / 8), elements < whole))
        found += [TensorTraffic(name, "out", tensor_bytes(table[name], types[name], sizes)) for name in kernel.outputs]
        moved.append(tuple(found))
    return tuple(moved)


def _uses(plan: Plan, kernel: Step, tensor: str) -> list[list[Read]]:
    """The reads of `tensor` in each of a kernel's streams: its stages with what they store, and what is stored after them.

    Unindexed by a stream, one list.
    """
    streamed = {r.out for stage in kernel.stages for r in stage.reductions}
    owners = {name: s for s in plan.cascade.body for name, _ in defined(s)}
    storing = storing_streams(plan.cascade, kernel) if isinstance(kernel, KernelPlan) else {}
    last = len(kernel.stages)

    def reached(number: int) -> list[Read]:
        reductions = kernel.stages[number].reductions if number < last else ()
        stored = [name for name in kernel.outputs if name not in streamed and name in owners and storing.get(name, last) == number]
        pending = [e for s in (*reductions, *(owners[name] for name in stored)) for e in expressions(s)]
        seen = {*streamed, *kernel.inputs, *(name for name, n in storing.items() if n < number and _is_reduction(owners[name]))}
        found = []
        while pending:
            for read in reads(pending.pop()):
                if read.tensor == tensor:
                    found.append(read)
                elif read.tensor not in seen and read.tensor in owners:
                    seen.add(read.tensor)
                    pending.extend(expressions(owners[read.tensor]))
        return found

    streams = [reached(number) for number in range(last + 1)]
    if kernel.stream not in plan.cascade.tensor_ranks()[tensor]:
        return [[read for found in streams for read in found]]
    if tensor in storing:  # a later stream reads what an earlier one stored
        return streams[storing[tensor] + 1 :] if _is_reduction(owners[tensor]) else []
    return streams


def _is_reduction(s: Statement) -> bool:
    return not isinstance(s, Einsum) or s.op is not None


def _elements(ranks: tuple[str, ...], uses: list[Read], sizes: Mapping[str, int]) -> int:
    """How many elements one stream needs at the least."""
    return min(prod(sizes[r] for r in ranks), max((_touched(ranks, read, sizes) for read in uses), default=0))


# footprint --------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Live:
    """The slice of an intermediate that must be held: `whole` are the ranks held over their full extent, of the others one element."""

    tensor: str
    ranks: tuple[str, ...]
    whole: tuple[str, ...]
    bytes: int | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"tensor": self.tensor, "ranks": list(self.ranks), "whole": list(self.whole), "bytes": self.bytes}


def live_footprint(c: Cascade, sizes: Mapping[str, int] | None = None) -> tuple[Live, ...]:
    """For each intermediate the smallest slice that is live between its producer and its last consumer (arXiv 2406.10491, section III).

    Rank by rank: an intermediate is held whole along a rank if a consumer reads it in a later traversal of that rank than the one that
    produces it, or elsewhere than at its own index; else one element at a time flows from producer to consumer. It says what a machine
    must hold if it neither reads an input again nor recomputes, for the best order of the ranks, each rank taken by itself; the
    accumulators that a particular loop order needs come on top. Without all sizes the bytes are None.
    """
    types = declared_types(c)
    inputs = frozenset(t.name for t in c.inputs)
    table = c.tensor_ranks()
    intermediates = [name for s in all_statements(c.body) for name, _ in defined(s)]
    whole: dict[str, list[str]] = {name: [] for name in intermediates}
    for rank in c.all_ranks():
        flow = trace_flow(c, fiber(c, rank), inputs, every_source=True)
        starts: dict[str, int] = {}
        for step in flow.steps:
            starts[step.statement] = max(starts.get(step.statement, 0), step.effect.done)
        for consumer, e in _consumers(c.body):
            for read in reads(e):
                if read.tensor not in whole or rank not in table[read.tensor] or rank in whole[read.tensor]:
                    continue
                effect = flow.effect(read.tensor)
                later = starts.get(consumer, 0) > effect.done and bool(effect.roots)
                if later or flow.read(read).done > effect.done:
                    whole[read.tensor].append(rank)
    live = []
    used = {r.tensor for _, e in _consumers(c.body) for r in reads(e)}
    for name in dict.fromkeys(intermediates):
        if name not in used:
            continue
        held = tuple(r for r in table[name] if r in whole[name])
        known = sizes is not None and all(r in sizes for r in held)
        live.append(Live(name, table[name], held, tensor_bytes(held, types[name], sizes) if known and sizes is not None else None))
    return tuple(live)


def _consumers(body: tuple[Statement, ...]) -> Iterator[tuple[str, Expr]]:
    """Every expression with the name under which the analysis lists its statement."""
    for s in body:
        if isinstance(s, Iterate):
            yield from _consumers(s.body)
            for state in s.states:
                yield state.name, state.init
                yield state.name, state.next
        else:
            for e in expressions(s):
                yield defined(s)[0][0], e


# roofline ---------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class UnitTime:
    """The time one unit needs for its operations of one type, and the type they run in."""

    unit: str
    does: str
    pipe: str
    dtype: str
    runs_as: str
    operations: int
    time_us: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "unit": self.unit, "does": self.does, "pipe": self.pipe, "dtype": self.dtype, "runs_as": self.runs_as,
            "operations": self.operations, "time_us": self.time_us,
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Roofline:
    """The least time on a target: the slowest of the memory and the pipes, which overlap; units of one pipe take turns."""

    time_us: float
    bound_by: str
    memory_us: float
    bytes: int
    units: tuple[UnitTime, ...]

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "time_us": self.time_us, "bound_by": self.bound_by, "memory_us": self.memory_us, "bytes": self.bytes,
            "units": [u.to_dict() for u in self.units],
        }  # fmt: skip


def roofline(c: Cascade, sizes: Mapping[str, int], target: Target) -> Roofline:
    """The least time of `c` at `sizes` on `target`, with the operations of its derived plan if it has one.

    Raises `CascadeError` naming the ranks whose size is missing.
    """
    plan = None
    if not missing_sizes(c, sizes):
        with suppress(UnsupportedError):
            plan = make_plan(c, complete_sizes(c, sizes))
    return cost(c, sizes, target, plan).roofline


def time_bound(bytes_moved: int, work: tuple[Work, ...], target: Target) -> Roofline:
    """The larger of bytes / bandwidth and, pipe by pipe, operations / peak. Raises `UnsupportedError` for a type no unit can take."""
    memory_us = bytes_moved / target.memory.bandwidth * 1e6
    totals: dict[tuple[Any, DType], int] = {}
    for w in work:
        totals[w.unit, w.dtype] = totals.get((w.unit, w.dtype), 0) + w.operations
    units = []
    for (does, dtype), count in totals.items():
        unit, runs_as, rate = target.peak(does, dtype)
        units.append(UnitTime(unit.name, does, unit.pipe, dtype.name, runs_as, count, count / rate * 1e6))
    pipes: dict[str, float] = {}
    for u in units:
        pipes[u.pipe] = pipes.get(u.pipe, 0.0) + u.time_us
    slowest = max(pipes, key=lambda p: pipes[p], default=None)
    if slowest is None or pipes[slowest] <= memory_us:
        return Roofline(memory_us, "memory", memory_us, bytes_moved, tuple(units))
    largest = max((u for u in units if u.pipe == slowest), key=lambda u: u.time_us)
    return Roofline(pipes[slowest], f"{largest.does} operations ({largest.unit}, {largest.runs_as})", memory_us, bytes_moved, tuple(units))


@dataclass(frozen=True, slots=True)
class Cost:
    """Everything above for one cascade, one set of sizes and one target."""

    sizes: tuple[tuple[str, int], ...]
    traffic: tuple[TensorTraffic, ...]
    work: tuple[Work, ...]
    footprint: tuple[Live, ...]
    roofline: Roofline

    @property
    def traffic_bytes(self) -> int:
        return sum(t.bytes for t in self.traffic)

    @property
    def flops(self) -> int:
        """Operations of all units together."""
        return sum(w.operations for w in self.work)

    @property
    def intensity(self) -> float:
        """Operations a byte."""
        return self.flops / self.traffic_bytes if self.traffic_bytes else 0.0


def cost(c: Cascade, sizes: Mapping[str, int], target: Target, plan: Plan | None = None) -> Cost:
    """The cost of `c` at `sizes` on `target`; operations are those of `plan` if it is given, else of the cascade as it stands.

    Raises `CascadeError` naming the ranks whose size is missing.
    """
    missing = missing_sizes(c, sizes)
    if missing:
        raise CascadeError(f"the size of {', '.join(missing)} is not known", cascade=c.name, hint=f"give it: {dims(missing)}")
    known = complete_sizes(c, sizes)
    traffic = minimal_traffic(c, known)
    work = operations(c, known) if plan is None else plan_operations(plan, complete_sizes(plan.cascade, known))
    return Cost(tuple(known.items()), traffic, work, live_footprint(c, known), time_bound(sum(t.bytes for t in traffic), work, target))
