"""A tile program as readable TVMScript for a GPU without tensor cores: a block of threads a task, tiles in registers."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from pprint import pformat

from ...ir.tile import GridRank, TileProgram, kernel_tiles
from ...schedules.fit import TooLarge
from ...schedules.schedule import Schedule
from ...schedules.target import Target
from ..base import Source
from ..triton.analysis import precise_tiles
from ..triton.memory import memories
from ..triton.signature import Parameter, Signature
from ..tvm import script as ts
from ..tvm.evaluate import RankPlace
from ..tvm.memory import Memory
from ..tvm.prepare import Step as CommonStep
from ..tvm.prepare import Stream, tile_table, to_steps
from ..tvm.script import Alloc, Let, Names, Statement, Value, render
from ..tvm.streams import as_int64
from ..tvm.tiles import storage_type
from .body import emit_steps
from .evaluate import Registers, ThreadEvaluator
from .helpers import helpers_c
from .kernel import Kernel
from .reductions import check_dots
from .spread import THREADS, WARP, Block, Spread, loops_of, spread_tiles, tile_sizes
from .steps import Partial, Step, Whole, keep_partial, read_once

SHARED = 64  # elements of a tile of what is read once that a thread has room for
MOST = 256  # elements of a tile that a thread may hold
RESERVED = ("task", "tid", "CU", "T")  # names that the source has already


def emit(program: TileProgram, schedule: Schedule, target: Target, *, strided: frozenset[str] = frozenset()) -> Source:
    """The kernel as source. `strided` names tensors whose last axis may have a stride other than 1.

    Of the schedule only the warps of the kernel's options are asked; tiles are in the program, and how they lie over threads follows.
    Raises `UnsupportedError` naming the statement for what needs tensor cores or has no CUDA helper, `TooLarge` for tiles that a block
    cannot hold.
    """
    names = Names()
    for reserved in RESERVED:
        names.fresh(reserved)
    entry = names.fresh(re.sub(r"\W", "_", program.name))
    memory = Memory(program, names, strided)
    types = {t.name: t.dtype for t in program.inputs}
    block = _block(program, schedule, target)
    check_dots(program, block)
    steps: tuple[Step, ...] = keep_partial(to_steps(program.body))
    steps = read_once(steps, types, tile_sizes(program), lambda ranks: _held(block, ranks) <= SHARED)
    table = tile_table(_common(steps))
    registers = {}
    for tile, (ranks, dtype) in table.items():
        registers[tile] = Registers(names.fresh("t", tile), ranks, storage_type(dtype), block.spreads)
        if registers[tile].size > MOST:
            what = f"each of {block.threads} threads of {entry} would hold {registers[tile].size} elements of {tile}, {MOST} at most"
            raise TooLarge(what, kernel=entry, hint="smaller tiles in the schedule")
    starts = {axis.rank: Value(names.fresh("i", axis.rank), "int64") for axis in program.grid}
    evaluator = ThreadEvaluator(
        names, memory, registers, {n: entry[1] for n, entry in table.items()}, _places(program, block, names), starts, block
    )
    digits = {rank: ts.name(names.fresh("tid", rank)) for rank, s in block.spreads.items() if s.threads > 1}
    kernel = Kernel(program, names, evaluator, block, digits)
    task: list[Statement] = []
    emit_steps(kernel, steps, (), task)
    lines = _function(kernel, entry, starts, [*_allocations(registers, task), *task])
    signature = pformat(signature_of_kernel(entry, program, memory, block).to_literal(), width=136, sort_dicts=False)
    head = f'"""Kernel {program.name} for {target.name}, emitted by einfall: {block.threads} threads a block.\n\n{_layout(block)}\n"""'
    helpers = helpers_c(tuple(sorted(evaluator.helpers)))
    constants = f"SIGNATURE = {signature}\n\nCU = r'''\n{helpers}\n'''"
    return Source.make(f"{head}\n\nfrom tvm.script import tirx as T\n\n{constants}\n\n\n" + "\n".join(lines) + "\n", entry, target)


def _block(program: TileProgram, schedule: Schedule, target: Target) -> Block:
    """How tiles lie over threads: as many as the schedule says; else as usual, and more where one thread would hold too much."""
    types = {t.name: t.dtype for t in program.inputs} | {o.name: o.dtype for o in program.outputs}
    options, limit = dict(schedule.kernel).get(program.name), target.limit("threads", THREADS)
    if options is not None:
        return spread_tiles(program, types, 1 << (min(options.warps * WARP, limit).bit_length() - 1))
    most = THREADS
    while True:
        block = spread_tiles(program, types, most)
        if most * 2 > limit or all(_held(block, ranks) <= MOST for ranks, _ in kernel_tiles(program.body).values()):
            return block
        most *= 2


def signature_of_kernel(entry: str, program: TileProgram, memory: Memory, block: Block) -> Signature:
    """How the kernel is launched. Its parameters come in the order of TVM's: that of the CUDA C, which may leave some of them out."""
    kinds = {"float32": "fp32", "float64": "fp64"}
    parameters: list[Parameter] = []
    for name, array in memory.arrays.items():
        parameters.append(Parameter(f"{array.name}_ptr", "pointer", name, f"*{array.dtype}"))
        strides = [(i, s) for i, s in enumerate(array.strides) if s.isidentifier()]
        parameters += [Parameter(s, "stride", name, "i64", i) for i, s in strides]
    told = _told(memory)
    parameters += [Parameter(v.text, "extent", rank, "i64") for rank, v in memory.extents.items() if v.text in told]
    parameters += [Parameter(v.text, "scalar", name, kinds[v.dtype]) for name, v in memory.scalars.items()]
    sizes = {d.name: program.static_size(d.name) for d in program.ranks}
    inputs, outputs = memories(program)
    return Signature(
        entry=entry,
        inputs=inputs,
        outputs=outputs,
        scalars=tuple(s.name for s in program.scalars),
        parameters=tuple(parameters),
        sizes=tuple((rank, n) for rank, n in sizes.items() if n is not None),
        grid=tuple((axis.rank, axis.tile) for axis in program.grid),
        aligned=(),
        warps=block.threads // WARP,
        fusion=not precise_tiles(program) and all(o.dtype.is_float and o.dtype.bits >= 16 for o in program.outputs),
    )


def _layout(block: Block) -> str:
    """A line a rank of tiles: how it lies over the threads."""
    rows = []
    for s in block.spreads.values():
        place = f"{s.threads} threads from bit {s.shift} of tid" if s.threads > 1 else "one thread"
        rows.append(f"    {s.rank}: {s.size} a tile = {s.steps} steps x {place} x vectors of {s.vector}")
    return "\n".join(rows) or "    no rank of tiles"


def _held(block: Block, ranks: tuple[str, ...]) -> int:
    held = 1
    for rank in ranks:
        held *= block.spreads[rank].held
    return held


def _common(steps: tuple[Step, ...]) -> tuple[CommonStep, ...]:
    """The steps that define tiles as the CPU's table knows them."""
    kept: list[CommonStep] = []
    for step in steps:
        if isinstance(step, Stream):
            kept.append(replace(step, body=_common(step.body)))
        elif not isinstance(step, (Partial, Whole)):
            kept.append(step)
    return tuple(kept)


def _allocations(registers: Mapping[str, Registers], body: list[Statement]) -> list[Statement]:
    """The registers that the body mentions."""
    text = "\n".join(render(body))
    return [Alloc(r.name, (r.size,), r.dtype) for r in registers.values() if f"{r.name}[" in text]


def _places(program: TileProgram, block: Block, names: Names) -> dict[str, RankPlace]:
    """The ranks of tiles: resident ones, those streamed (whose start is the loop's business), and the grid's."""
    spreads: Mapping[str, Spread] = block.spreads
    places = {}
    for rank in program.resident:
        size = program.tile_size(rank)
        places[rank] = RankPlace(ts.integer(0), size, spreads[rank].padded, spreads[rank].padded == size)
    for loop in loops_of(program.body):
        places.setdefault(loop.rank, RankPlace(ts.integer(0), spreads[loop.rank].size, spreads[loop.rank].padded, False))
    for axis in program.grid:
        if axis.tile > 1:
            known = program.static_size(axis.rank)
            fits = known is not None and known % axis.tile == 0
            start = Value(names.fresh("s", axis.rank), "int64")
            places[axis.rank] = RankPlace(start, axis.tile, spreads[axis.rank].padded, fits)
    return places


def _function(kernel: Kernel, entry: str, starts: Mapping[str, Value], task: list[Statement]) -> list[str]:
    """The whole function: parameters, extents, the grid, the thread's digits."""
    program, memory, block = kernel.program, kernel.evaluator.memory, kernel.block
    # an extent that a composed axis tells is an argument as well: TVM would put its formula in its place, which no launcher can fill in
    told = [let for let in memory.derived if let.name in _told(memory)]
    parameters = [*memory.parameters(), *(f"{let.name}: T.int64" for let in told)]
    lines = ["@T.prim_func(s_tir=True)", f"def {entry}({', '.join(parameters)}):", '    T.func_attr({"tirx.noalias": True})']
    lines += [f"    {line.replace(', offset_factor=1', '')}" for line in memory.bindings()]
    total = ts.integer(1)
    inner: list[Statement] = [let for let in memory.derived if let not in told]
    counts = {}
    for axis in program.grid:
        count = ts.ceil_div(memory.extent(axis.rank), axis.tile)
        total = ts.mul(total, count)
        counts[axis.rank] = _named_count(kernel, axis, count, inner)
    lines += [f'    task = T.launch_thread("blockIdx.x", {total.text})', f'    tid = T.launch_thread("threadIdx.x", {block.threads})']
    _split(kernel, starts, counts, inner)
    for axis in program.grid:
        if axis.tile > 1:
            start = kernel.evaluator.places[axis.rank].start.text
            inner.append(Let(start, as_int64(ts.mul(starts[axis.rank], ts.integer(axis.tile)))))
    for rank, digit in kernel.digits.items():
        spread = block.spreads[rank]
        own = ts.quotient(ts.name("tid"), ts.integer(1 << spread.shift))
        highest = spread.threads << spread.shift == block.threads
        inner.append(Let(digit.text, own if highest else ts.remainder(own, ts.integer(spread.threads))))
    inner += task
    head = ['    with T.attr(T.int32(0), "pragma_import_c", CU):'] if kernel.evaluator.helpers else []
    return [*lines, *head, *(line.replace("annotations=STACK", 'scope="local"') for line in render(inner, 1 + len(head)))]


def _told(memory: Memory) -> set[str]:
    """The names of the extents that shapes of tensors tell."""
    ranks = {rank for array in memory.arrays.values() for axis in array.axes for rank in axis}
    return {v.text for rank, v in memory.extents.items() if rank in ranks and v.number is None}


def _named_count(kernel: Kernel, axis: GridRank, count: Value, out: list[Statement]) -> Value:
    """How many tasks there are along a rank, under a name within the task: what stands outside would be an argument of the launch."""
    if count.number is not None or count.text.isidentifier():
        return count
    name = kernel.names.fresh(f"tiles_{axis.rank}")
    out.append(Let(name, as_int64(count)))
    return Value(name, "int64")


def _split(kernel: Kernel, starts: Mapping[str, Value], counts: Mapping[str, Value], out: list[Statement]) -> None:
    """The indices of a task along the grid's ranks, the last rank fastest."""
    turning = [axis for axis in kernel.program.grid if counts[axis.rank].number != 1]
    for axis in kernel.program.grid:
        if axis not in turning:
            out.append(Let(starts[axis.rank].text, Value("T.int64(0)", "int64")))
    rest = Value('T.Cast("int64", task)', "int64")
    for axis in reversed(turning):
        count = counts[axis.rank]
        if axis is turning[0]:
            out.append(Let(starts[axis.rank].text, rest))
            continue
        out.append(Let(starts[axis.rank].text, as_int64(ts.remainder(rest, count))))
        name = kernel.names.fresh("rest")
        out.append(Let(name, as_int64(ts.quotient(rest, count))))
        rest = Value(name, "int64")
