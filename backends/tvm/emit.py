"""A tile program and a schedule as readable TVMScript for the CPU."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...ir.expr import Expr, Start, walk
from ...ir.tile import GridRank, Loop, TileProgram
from ...ir.types import DType
from ...schedules.layout import complete, padded_sizes
from ...schedules.operands import fold_operands
from ...schedules.schedule import Schedule
from ...schedules.target import Target
from ..base import Source
from . import script as ts
from .alias import alias_tiles
from .cpu import cpu_of
from .evaluate import Evaluator, RankPlace
from .kernel import Kernel
from .memory import Memory
from .pack import pack_operands
from .partition import partition
from .prepare import Step, Stream, all_steps, tile_table, tiles_read, to_steps
from .script import Alloc, For, Let, Names, Statement, Value, render
from .streams import as_int64, emit_parts, named_index
from .tiles import TileBuffer, tile_buffer
from .vector_math import helpers_ir

ENTRY = "main"
SHORT = 100  # lines of a task's body that may stand twice


def emit(program: TileProgram, schedule: Schedule, target: Target, *, strided: frozenset[str] = frozenset()) -> Source:
    """The kernel as source. `strided` names tensors whose last axis may have a stride other than 1.

    Raises `UnsupportedError` naming statement and operation for what the CPU cannot do, `ScheduleError` for an illegal schedule.
    """
    cpu = cpu_of(target)
    program = fold_operands(program, schedule)
    schedule = complete(program, schedule, target)
    names = Names()
    memory = Memory(program, names, strided)
    packed = pack_operands(to_steps(program.body), program, schedule, cpu, strided)
    steps = packed.steps
    table = tile_table(steps)
    padded = padded_sizes(program, schedule, cpu.lanes)
    buffers, kept, aliases = _buffers(steps, table, packed.layouts, padded, names)
    starts = {axis.rank: Value(names.fresh("i", axis.rank), "int64") for axis in program.grid}
    places = _places(program, padded, names)
    ranks = {name: entry[0] for name, entry in table.items()}
    types: dict[str, DType] = {name: entry[1] for name, entry in table.items()}
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
    body: list[Statement] = []
    emit_parts(kernel, partition(kept, kernel.info), (), body)
    task = [*_allocations(buffers, body), *body]
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


def _allocations(buffers: Mapping[str, TileBuffer], body: list[Statement]) -> list[Statement]:
    """The tiles that the body mentions; values that never leave their loops need no memory."""
    text = "\n".join(render(body))
    distinct = {b.name: b for b in buffers.values()}
    return [Alloc(b.name, b.shape, b.dtype, registers=False) for b in distinct.values() if f"{b.name}[" in text]


def _places(program: TileProgram, padded: Mapping[str, int], names: Names) -> dict[str, RankPlace]:
    """The ranks of tiles: resident ones, those streamed (whose start is the loop's business), and the grid's."""
    places = {}
    for rank in program.resident:
        size = program.tile_size(rank)
        places[rank] = RankPlace(ts.integer(0), size, padded[rank], padded[rank] == size)
    for loop in loops_of(program.body):
        largest = max(l.tile for l in loops_of(program.body) if l.rank == loop.rank)
        places.setdefault(loop.rank, RankPlace(ts.integer(0), largest, padded[loop.rank], False))
    for axis in program.grid:
        if axis.tile > 1:
            start = Value(names.fresh("s", axis.rank), "int64")
            places[axis.rank] = RankPlace(start, axis.tile, padded[axis.rank], _fits(program, axis.rank, axis.tile))
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
            inner.append(Let(kernel.places[axis.rank].start.text, as_int64(ts.mul(starts[axis.rank], ts.integer(axis.tile)))))
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
    tasks = named_index(kernel, total, "tasks", named)
    alone = ts.If(Value(f"{tasks.text} == 1", "bool"), [Let("task", Value("T.int64(0)", "int64")), *inner])
    return [*named, alone, ts.If(Value(f"{tasks.text} != 1", "bool"), [replace(parallel, end=tasks)])]


def _count_tiles(kernel: Kernel, axis: GridRank, out: list[Statement]) -> Value:
    """How many tasks there are along a rank."""
    count = ts.ceil_div(kernel.memory.extent(axis.rank), axis.tile)
    return count if count.text.isidentifier() else named_index(kernel, count, f"tiles_{axis.rank}", out)


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
        out.append(Let(starts[axis.rank].text, as_int64(_ordered(index, count, order))))
        if not outermost:
            rest = named_index(kernel, ts.quotient(rest, count), "rest", out)


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
