"""A tile program and a schedule as readable TVMScript for the CPU."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from ...ir.expr import Expr, Masked, Start, walk
from ...ir.tile import Dot, GridRank, Loop, Store, TileProgram
from ...ir.types import DType
from ...schedules.layout import complete, padded_sizes
from ...schedules.schedule import Schedule
from ...schedules.target import Target
from ..base import Source
from . import script as ts
from .alias import alias_tiles
from .cpu import cpu_of
from .dots import covered_by_dot, emit_dot
from .evaluate import Active, Evaluator, Point, RankPlace
from .groups import covered_by_group, emit_group
from .kernel import Kernel
from .memory import Memory
from .pack import pack_operands
from .partition import Group, partition
from .prepare import Step, Stream, all_steps, expressions_of, tile_table, tiles_read, to_steps
from .script import Alloc, Comment, For, Let, Names, Statement, Value, render
from .tiles import TileBuffer, tile_buffer
from .vector_math import helpers_ir

ENTRY = "main"
SHORT = 100  # lines of a task's body that may stand twice


def emit(program: TileProgram, schedule: Schedule, target: Target, *, strided: frozenset[str] = frozenset()) -> Source:
    """The kernel as source. `strided` names tensors whose last axis may have a stride other than 1.

    Raises `UnsupportedError` naming statement and operation for what the CPU cannot do, `ScheduleError` for an illegal schedule.
    """
    cpu = cpu_of(target)
    schedule = complete(program, schedule, target)
    names = Names()
    memory = Memory(program, names, strided)
    packed = pack_operands(to_steps(program.body), program, schedule, cpu, strided)
    steps = packed.steps
    table = tile_table(steps)
    padded = padded_sizes(program, schedule, cpu.lanes)
    buffers, kept, aliases = _buffers(steps, table, packed.layouts, padded, names)
    places = _places(program, padded)
    starts = {axis.rank: Value(names.fresh("i", axis.rank), "int64") for axis in program.grid}
    ranks = {name: entry[0] for name, entry in table.items()}
    types: dict[str, DType] = {name: entry[1] for name, entry in table.items()}
    places = {
        **places,
        **{
            axis.rank: RankPlace(
                Value(names.fresh("s", axis.rank), "int64"), axis.tile, padded[axis.rank], _fits(program, axis.rank, axis.tile)
            )
            for axis in program.grid
            if axis.tile > 1
        },
    }
    evaluator = Evaluator(cpu, names, memory, buffers, types, ranks, places, starts)
    kernel = Kernel(
        program,
        cpu,
        names,
        memory,
        evaluator,
        buffers,
        ranks,
        places,
        dict(schedule.dot),
        dict(schedule.group),
        packed.pairs,
        _readers(kept, aliases),
    )
    task: list[Statement] = []
    used = dict.fromkeys(b.name for b in buffers.values())
    body: list[Statement] = []
    _emit_parts(kernel, partition(kept, kernel.info), (), body)
    text_of_body = "\n".join(render(body))
    for name in used:
        if f"{name}[" in text_of_body:
            buffer = next(b for b in buffers.values() if b.name == name)
            task.append(Alloc(name, buffer.shape, buffer.dtype, registers=False))
    task += body
    lines = _function(kernel, schedule, starts, task)
    ir = helpers_ir(cpu, tuple(sorted(evaluator.helpers)))
    return Source.make(_module(program, ir, lines), ENTRY, target)


def _module(program: TileProgram, ir: str, lines: list[str]) -> str:
    head = f'"""Kernel {program.name}, emitted by einfall."""\n\nfrom tvm.script import tirx as T\n\n'
    stack = 'STACK = {"disable_lower_builtin": True}  # not from the heap: LLVM keeps these in registers'
    return f"{head}LL = r'''\n{ir}'''\n\n{stack}\n\n\n" + "\n".join(lines) + "\n"


def _fits(program: TileProgram, rank: str, tile: int) -> bool:
    size = program.static_size(rank)
    return size is not None and size % tile == 0


def _places(program: TileProgram, padded: Mapping[str, int]) -> dict[str, RankPlace]:
    """Resident ranks and the streamed ranks of all loops; of a loop's rank the start is the loop's business."""
    places = {}
    for rank in program.resident:
        size = program.tile_size(rank)
        places[rank] = RankPlace(ts.integer(0), size, padded[rank], padded[rank] == size)
    for loop in loops_of(program.body):
        largest = max(l.tile for l in loops_of(program.body) if l.rank == loop.rank)
        places.setdefault(loop.rank, RankPlace(ts.integer(0), largest, padded[loop.rank], False))
    return places


def loops_of(nodes: tuple[object, ...]) -> list[Loop]:
    """Every loop, nested ones included."""
    found = []
    for node in nodes:
        if isinstance(node, Loop):
            found += [node, *loops_of(node.body)]
    return found


def _buffers(
    steps: tuple[Step, ...],
    table: Mapping[str, tuple[tuple[str, ...], DType]],
    layouts: Mapping[str, tuple[str, ...]],
    padded: Mapping[str, int],
    names: Names,
) -> tuple[dict[str, TileBuffer], tuple[Step, ...], dict[str, str]]:
    """The memory of every tile, after aliasing."""
    own = {}
    for tile, (ranks, dtype) in table.items():
        own[tile] = tile_buffer(names.fresh("t", tile), tile, ranks, layouts.get(tile, ranks), padded, dtype)
    kept, aliases = alias_tiles(steps, {tile: (b.parts, b.shape, b.dtype, b.paired) for tile, b in own.items()})
    return {tile: own[aliases.get(tile, tile)] for tile in own}, kept, aliases


def _readers(steps: tuple[Step, ...], aliases: Mapping[str, str]) -> dict[str, frozenset[int]]:
    """Who reads each tile; the readers of a state count for the tile computed in its place."""
    found: dict[str, set[int]] = {}
    for step in all_steps(steps):
        if isinstance(step, Stream):
            continue
        for tile in tiles_read(step):
            found.setdefault(tile, set()).add(id(step))
    for tile, state in aliases.items():
        found.setdefault(tile, set()).update(found.get(state, set()))
    return {tile: frozenset(ids) for tile, ids in found.items()}


def _emit_parts(kernel: Kernel, parts: list[Group | Dot | Stream], loops: tuple[Active, ...], out: list[Statement]) -> None:
    for part in parts:
        match part:
            case Group():
                emit_group(kernel, part, loops, out)
            case Dot():
                emit_dot(kernel, part, loops, out)
            case Stream():
                _emit_stream(kernel, part, loops, out)


@dataclass(frozen=True, slots=True)
class _Run:
    """Consecutive tiles of a stream that are emitted as one loop."""

    first: Value
    last: Value
    edge: bool


def _emit_stream(kernel: Kernel, stream: Stream, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """The loop as up to three: tiles at the first edge of the domain, tiles wholly inside it, tiles at the last edge."""
    loop = stream.loop
    tile = ts.integer(loop.tile)
    parts = partition(stream.body, kernel.info)
    low, high, runs = _runs(kernel, stream, loops, out)
    for run in runs:
        variable = ts.name(kernel.names.fresh("j", loop.rank), "int64")
        start = Value(kernel.names.fresh("s", loop.rank), "int64")
        body: list[Statement] = [Let(start.text, _int64(ts.mul(variable, tile)))]
        active = Active(loop, start)
        if run.edge:
            valid = ts.name(kernel.names.fresh("count", loop.rank))
            body.append(Let(valid.text, ts.narrow(_int64(ts.smaller(ts.sub(high, start), tile)))))
            span = _span(kernel, parts, loop, loops, valid)
            if span.text != valid.text and span.number is None:
                named = kernel.names.fresh("span", loop.rank)
                body.append(Let(named, span))
                span = ts.name(named)
            active = Active(loop, start, valid, span, low if low.number != 0 else None, high)
        _emit_parts(kernel, parts, (*loops, active), body)
        out.append(Comment(f"{loop.rank}: {loop.tile} at a time, {'at an edge of the domain' if run.edge else 'wholly inside the domain'}"))
        out.append(For(variable.text, run.first, run.last, "range", body))


def _runs(kernel: Kernel, stream: Stream, loops: tuple[Active, ...], out: list[Statement]) -> tuple[Value, Value, list[_Run]]:
    """The first index and the end of the domain, and the runs of tiles; whatever is certain before the call is left out."""
    loop, tile = stream.loop, ts.integer(stream.loop.tile)
    outside = Point(local={}, loops=loops)
    zero, extent = ts.integer(0), kernel.memory.extent(loop.rank)

    def bound(e: Expr) -> Value:
        return kernel.evaluator.coordinate(e, outside, out)

    def least(v: Value) -> Value:
        return v if v.text == extent.text else ts.smaller(v, extent)

    def positive(v: Value) -> Value:
        return v if v.text == extent.text else ts.larger(v, zero)

    def named(v: Value, wanted: str) -> Value:
        return _named(kernel, v, f"{wanted}_{loop.rank}", out)

    low = named(ts.larger(bound(loop.bounds.begin), zero), "begin")
    full = bound(loop.bounds.end).text == extent.text
    high = extent if full else named(least(bound(loop.bounds.end)), "end")
    first = named(ts.quotient(low, tile), "first")
    last = ts.ceil_div(positive(high), loop.tile)
    last = named(last if first.number == 0 else ts.larger(last, first), "last")
    whole = ts.larger(bound(loop.bounds.whole_begin), zero)
    inside = first if whole.number == 0 else named(ts.smaller(ts.larger(ts.ceil_div(whole, loop.tile), first), last), "inside")
    outer = ts.quotient(positive(least(bound(loop.bounds.whole_end))), tile)
    if not (inside.number == 0 and full):
        outer = ts.smaller(ts.larger(outer, inside), last)
    outer = named(outer, "outside")
    if not _maskable(stream) and high.number is not None and high.number % loop.tile == 0 and low.number == 0:
        return low, high, [_Run(first, last, False)]
    runs = [_Run(first, inside, True), _Run(inside, outer, False), _Run(outer, last, True)]
    high = extent if _stores(stream) else high
    return low, high, [r for r in runs if r.first.text != r.last.text]


def _maskable(stream: Stream) -> bool:
    """Whether anything in the body looks at the domain."""
    return any(isinstance(n, Masked) for s in all_steps(stream.body) for e in expressions_of(s) for n in walk(e))


def _span(kernel: Kernel, parts: list[Group | Dot | Stream], loop: Loop, loops: tuple[Active, ...], valid: Value) -> Value:
    """The count of an edge tile rounded up to what every statement of the body covers at once."""
    step = 1
    for part in parts:
        if isinstance(part, Dot):
            step = math.lcm(step, covered_by_dot(kernel, part, loop.rank))
        elif isinstance(part, Group):
            step = math.lcm(step, covered_by_group(kernel, part, loop))
        else:
            return ts.integer(loop.tile)
    if step == 1:
        return valid
    if loop.tile % step or step >= loop.tile:
        return ts.integer(loop.tile)
    return ts.mul(ts.ceil_div(valid, step), ts.integer(step))


def _stores(stream: Stream) -> bool:
    return any(isinstance(s, Store) for s in all_steps(stream.body))


def _int64(v: Value) -> Value:
    if v.dtype == "int64" and v.number is None:
        return v
    return Value(f'T.Cast("int64", {v.text})', "int64")


def _named(kernel: Kernel, v: Value, wanted: str, out: list[Statement]) -> Value:
    """A bound under a name unless it is a constant."""
    if v.number is not None:
        return v
    variable = kernel.names.fresh(wanted)
    out.append(Let(variable, _int64(v)))
    return Value(variable, "int64")


def _depends_on_start(program: TileProgram, rank: str) -> bool:
    return any(rank in _starts(b) for loop in loops_of(program.body) for b in (loop.bounds.begin, loop.bounds.end))


def _starts(e: Expr) -> set[str]:
    return {n.rank for n in walk(e) if isinstance(n, Start)}


def _function(kernel: Kernel, schedule: Schedule, starts: Mapping[str, Value], task: list[Statement]) -> list[str]:
    """The whole function: parameters, extents, the grid."""
    program, memory = kernel.program, kernel.memory
    lines = ["@T.prim_func(s_tir=True)", f"def {ENTRY}({', '.join(memory.parameters())}):"]
    lines += [f"    {line}" for line in ('T.func_attr({"tirx.noalias": True})', *memory.bindings())]
    body: list[Statement] = list(memory.derived)
    counts = {axis.rank: _count_tiles(kernel, axis, body) for axis in program.grid}
    total = ts.integer(1)
    for axis in program.grid:
        total = ts.mul(total, counts[axis.rank])
    inner: list[Statement] = []
    if total.number == 1:
        inner += [Let(starts[axis.rank].text, Value("T.int64(0)", "int64")) for axis in program.grid]
        body += inner
        inner = body
    else:
        _spread(kernel, schedule, starts, counts, ts.name("task", total.dtype), inner)
    for axis in program.grid:
        if axis.tile > 1:
            inner.append(Let(kernel.places[axis.rank].start.text, _int64(ts.mul(starts[axis.rank], ts.integer(axis.tile)))))
    inner += task
    if total.number != 1:
        body += _tasks(kernel, total, inner)
    block = [ts.With('T.attr(T.int32(0), "pragma_import_llvm", LL)', body)] if kernel.evaluator.helpers else body
    return lines + render(block, 1)


def _tasks(kernel: Kernel, total: Value, inner: list[Statement]) -> list[Statement]:
    """The parallel loop. Entering it takes as long as a small kernel, so a short body also stands alone for when there is one task."""
    parallel = For("task", ts.integer(0), total, "T.parallel", inner)
    if total.number is not None or len(render(inner)) > SHORT:
        return [parallel]
    named: list[Statement] = []
    tasks = _named(kernel, total, "tasks", named)
    alone = ts.If(Value(f"{tasks.text} == 1", "bool"), [Let("task", Value("T.int64(0)", "int64")), *inner])
    return [*named, alone, ts.If(Value(f"{tasks.text} != 1", "bool"), [replace(parallel, end=tasks)])]


def _count_tiles(kernel: Kernel, axis: GridRank, out: list[Statement]) -> Value:
    """How many tasks there are along a rank."""
    count = ts.ceil_div(kernel.memory.extent(axis.rank), axis.tile)
    return count if count.text.isidentifier() else _named(kernel, count, f"tiles_{axis.rank}", out)


def _spread(
    kernel: Kernel, schedule: Schedule, starts: Mapping[str, Value], counts: Mapping[str, Value], task: Value, out: list[Statement]
) -> None:
    """The indices of a task along the grid's ranks, the last rank fastest."""
    program = kernel.program
    turning = [axis for axis in program.grid if counts[axis.rank].number != 1]
    for axis in program.grid:
        if axis not in turning:
            out.append(Let(starts[axis.rank].text, Value("T.int64(0)", "int64")))
    rest = task
    for axis in reversed(turning):
        count = counts[axis.rank]
        outermost = axis is turning[0]
        index = rest if outermost else ts.remainder(rest, count)
        order = schedule.grid_order if _depends_on_start(program, axis.rank) else "rising"
        out.append(Let(starts[axis.rank].text, _int64(_ordered(index, count, order))))
        if not outermost:
            rest = _named(kernel, ts.quotient(rest, count), "rest", out)


def _ordered(index: Value, count: Value, order: str) -> Value:
    """The tile a task takes. Later tiles are heavier; a thread gets a run of tasks, so zigzag alternates light and heavy ones."""
    last = ts.sub(count, ts.integer(1))
    if order == "heavy_first":
        return ts.sub(last, index)
    if order == "zigzag":
        half = ts.quotient(index, ts.integer(2))
        even = ts.remainder(index, ts.integer(2))
        return Value(f"T.Select({even.text} == 0, {ts.sub(last, half).text}, {half.text})", "int64")
    return index
