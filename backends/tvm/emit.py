"""A tile program and a schedule as readable TVMScript for the CPU."""

from __future__ import annotations

from collections.abc import Mapping

from ...ir.expr import Const, Expr, Op, Start
from ...ir.infer import expression_ranks
from ...ir.tile import Dot, Loop, TileProgram
from ...ir.types import DType
from ...schedules.layout import complete, padded_sizes
from ...schedules.schedule import Schedule
from ...schedules.target import Target
from ..base import Source
from . import script as ts
from .alias import alias_tiles
from .cpu import Cpu, cpu_of
from .dots import emit_dot
from .evaluate import Active, Evaluator, Point, RankPlace
from .groups import emit_group
from .kernel import Kernel
from .memory import Memory
from .pack import pack_operands
from .partition import Group, partition
from .prepare import Step, Stream, all_steps, program_steps, tile_table, tiles_read
from .script import Alloc, Comment, For, Let, Names, Statement, Value, render
from .tiles import TileBuffer, tile_buffer
from .vector_math import helpers_ir

ENTRY = "main"


def emit(program: TileProgram, schedule: Schedule, target: Target, *, strided: frozenset[str] = frozenset()) -> Source:
    """The kernel as source. `strided` names tensors whose last axis may have a stride other than 1.

    Raises `UnsupportedError` naming statement and operation for what the CPU cannot do, `ScheduleError` for an illegal schedule.
    """
    cpu = cpu_of(target)
    schedule = complete(program, schedule, target)
    names = Names()
    memory = Memory(program, names, strided)
    steps, layouts = pack_operands(program_steps(program), program, schedule, cpu, strided)
    table = tile_table(steps)
    padded = padded_sizes(program, schedule, cpu.lanes)
    buffers, kept, aliases = _buffers(steps, table, layouts, padded, names)
    places = _places(program, padded, names)
    starts = {axis.rank: Value(names.fresh("i", axis.rank), "int64") for axis in program.grid}
    ranks = {name: entry[0] for name, entry in table.items()}
    types: dict[str, DType] = {name: entry[1] for name, entry in table.items()}
    places = {**places, **{axis.rank: RankPlace(Value(names.fresh("s", axis.rank), "int64"), axis.tile, padded[axis.rank], _fits(program, axis.rank, axis.tile)) for axis in program.grid if axis.tile > 1}}
    evaluator = Evaluator(cpu, names, memory, buffers, types, ranks, places, starts)
    kernel = Kernel(
        program, cpu, names, memory, evaluator, buffers, ranks, places, dict(schedule.dot), dict(schedule.group), _readers(kept, aliases)
    )
    task: list[Statement] = []
    used = dict.fromkeys(b.name for b in buffers.values())
    body: list[Statement] = []
    _emit_steps(kernel, kept, (), body)
    text_of_body = "\n".join(render(body))
    for name in used:
        if f"{name}[" in text_of_body:
            buffer = next(b for b in buffers.values() if b.name == name)
            task.append(Alloc(name, buffer.shape, buffer.dtype))
    task += body
    lines = _function(kernel, schedule, starts, task)
    ir = helpers_ir(cpu, tuple(sorted(evaluator.helpers)))
    return Source.make(_module(program, ir, lines), ENTRY, target)


def _module(program: TileProgram, ir: str, lines: list[str]) -> str:
    head = f'"""Kernel {program.name}, emitted by einfall."""\n\nfrom tvm.script import tirx as T\n\n'
    return f"{head}LL = r'''\n{ir}'''\n\n\n" + "\n".join(lines) + "\n"


def _fits(program: TileProgram, rank: str, tile: int) -> bool:
    size = program.static_size(rank)
    return size is not None and size % tile == 0


def _places(program: TileProgram, padded: Mapping[str, int], names: Names) -> dict[str, RankPlace]:
    """Resident ranks and the streamed ranks of all loops; of a loop's rank the start is the loop's business."""
    places = {}
    for rank in program.resident:
        size = program.tile_size(rank)
        places[rank] = RankPlace(ts.integer(0), size, padded[rank], padded[rank] == size)
    for loop in loops_of(program.body):
        largest = max(l.tile for l in loops_of(program.body) if l.rank == loop.rank)
        places.setdefault(loop.rank, RankPlace(ts.integer(0), largest, padded[loop.rank], False))
    del names
    return places


def loops_of(nodes: tuple[object, ...]) -> list[Loop]:
    """Every loop, nested ones included."""
    found = []
    for node in nodes:
        if isinstance(node, Loop):
            found += [node, *loops_of(node.body)]
    return found


def _buffers(
    steps: tuple[Step, ...], table: Mapping[str, tuple[tuple[str, ...], DType]], layouts: Mapping[str, tuple[str, ...]], padded: Mapping[str, int], names: Names
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
            for e in step.loop.conditions:
                del e
            continue
        for tile in tiles_read(step):
            found.setdefault(tile, set()).add(id(step))
    for tile, state in aliases.items():
        found.setdefault(tile, set()).update(found.get(state, set()))
    return {tile: frozenset(ids) for tile, ids in found.items()}


def _emit_steps(kernel: Kernel, steps: tuple[Step, ...], loops: tuple[Active, ...], out: list[Statement]) -> None:
    for part in partition(steps, kernel.info):
        match part:
            case Group():
                emit_group(kernel, part, loops, out)
            case Dot():
                emit_dot(kernel, part, loops, out)
            case Stream():
                _emit_stream(kernel, part, loops, out)


def _emit_stream(kernel: Kernel, stream: Stream, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """The loop as up to three: tiles at the first edge of the domain, tiles wholly inside it, tiles at the last edge."""
    loop = stream.loop
    names = kernel.names
    outside = Point(local={}, loops=loops)
    extent = kernel.memory.extent(loop.rank)
    tile = loop.tile

    def bound(e: Expr) -> Value:
        return kernel.evaluator.coordinate(e, outside, out)

    begin = ts.floor_div(ts.larger(bound(loop.bounds.begin), ts.integer(0)), ts.integer(tile))
    stop = ts.smaller(bound(loop.bounds.end), extent) if loop.bounds.end != Const(0) else ts.integer(0)
    end = ts.larger(ts.ceil_div(stop, tile), begin)
    whole_begin = ts.ceil_div(ts.larger(bound(loop.bounds.whole_begin), ts.integer(0)), tile)
    whole_end = ts.floor_div(ts.smaller(bound(loop.bounds.whole_end), extent), ts.integer(tile))
    begin, end = (_named(kernel, v, f"{w}_{loop.rank}", out) for v, w in ((begin, "first"), (end, "last")))
    start_inside = _named(kernel, ts.smaller(ts.larger(whole_begin, begin), end), f"inside_{loop.rank}", out)
    end_inside = _named(kernel, ts.smaller(ts.larger(whole_end, start_inside), end), f"outside_{loop.rank}", out)
    out.append(Comment(f"stream over {loop.rank}, {tile} at a time"))
    last = extent if _stores(stream) else stop
    for low, high, edge in ((begin, start_inside, True), (start_inside, end_inside, False), (end_inside, end, True)):
        if low.text == high.text or (low.number is not None and high.number is not None and low.number >= high.number):
            continue
        variable = ts.name(names.fresh("j", loop.rank), "int64")
        body: list[Statement] = []
        start = Value(names.fresh("s", loop.rank), "int64")
        body.append(Let(start.text, _int64(ts.mul(variable, ts.integer(tile)))))
        valid = None
        if edge:
            valid = ts.name(names.fresh("count", loop.rank))
            body.append(Let(valid.text, ts.narrow(_int64(ts.smaller(ts.sub(last, start), ts.integer(tile))))))
        _emit_steps(kernel, stream.body, (*loops, Active(loop, start, valid)), body)
        out.append(For(variable.text, low, high, "range", body))


def _stores(stream: Stream) -> bool:
    from ...ir.tile import Store

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
    return any(
        rank in _starts(b) for loop in loops_of(program.body) for b in (loop.bounds.begin, loop.bounds.end)
    )


def _starts(e: Expr) -> set[str]:
    from ...ir.expr import walk

    return {n.rank for n in walk(e) if isinstance(n, Start)}


def _function(kernel: Kernel, schedule: Schedule, starts: Mapping[str, Value], task: list[Statement]) -> list[str]:
    """The whole function: parameters, extents, the grid."""
    program, memory = kernel.program, kernel.memory
    lines = ["@T.prim_func(s_tir=True)", f"def {ENTRY}({', '.join(memory.parameters())}):"]
    lines += [f"    {line}" for line in ('T.func_attr({"tirx.noalias": True})', *memory.bindings())]
    body: list[Statement] = list(memory.derived)
    counts = {axis.rank: ts.ceil_div(memory.extent(axis.rank), axis.tile) for axis in program.grid}
    total = ts.integer(1)
    for axis in program.grid:
        total = ts.mul(total, counts[axis.rank])
    inner: list[Statement] = []
    if total.number == 1:
        inner += [Let(starts[axis.rank].text, Value("T.int64(0)", "int64")) for axis in program.grid]
        body += inner
        inner = body
    else:
        if program.grid:
            body.append(For("task", ts.integer(0), total, "T.parallel", inner))
        rest = ts.name("task", total.dtype)
        for position, axis in enumerate(reversed(program.grid)):
            outermost = position == len(program.grid) - 1
            index = rest if outermost else ts.floor_mod(rest, counts[axis.rank])
            rest = ts.floor_div(rest, counts[axis.rank])
            order = schedule.grid_order if _depends_on_start(program, axis.rank) else "rising"
            inner.append(Let(starts[axis.rank].text, _int64(_ordered(index, counts[axis.rank], order))))
    for axis in program.grid:
        if axis.tile > 1:
            inner.append(Let(kernel.places[axis.rank].start.text, _int64(ts.mul(starts[axis.rank], ts.integer(axis.tile)))))
    inner += task
    block = [ts.With('T.attr(T.int32(0), "pragma_import_llvm", LL)', body)] if kernel.evaluator.helpers else body
    return lines + render(block, 1)


def _ordered(index: Value, count: Value, order: str) -> Value:
    """The tile a task takes. Later tiles are heavier; a thread gets a run of tasks, so zigzag alternates light and heavy ones."""
    last = ts.sub(count, ts.integer(1))
    if order == "heavy_first":
        return ts.sub(last, Value(f"({index.text})", index.dtype))
    if order == "zigzag":
        half = f"(({index.text}) // 2)"
        return Value(f"T.Select(({index.text}) % 2 == 0, {last.text} - {half}, {half})", index.dtype)
    return index


def rank_order(e: Expr) -> tuple[str, ...]:
    """The ranks of an expression in order."""
    return expression_ranks(e) if not isinstance(e, Op) else expression_ranks(e)


def cpu_features(target: Target) -> Cpu:
    """The processor a target describes."""
    return cpu_of(target)
