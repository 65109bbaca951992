"""Reductions, scans and products of few rows: the thread's own points, then the threads of the block together."""

from __future__ import annotations

from dataclasses import replace
from math import prod

from ...ir.check_tiles import nodes
from ...ir.errors import UnsupportedError
from ...ir.expr import Expr, Op, Tile
from ...ir.infer import expression_ranks
from ...ir.tile import Dot, Reduce, Scan, TileProgram, kernel_tiles
from ..tvm import script as ts
from ..tvm.arithmetic import compute_type
from ..tvm.evaluate import Active
from ..tvm.reductions import combine, identity
from ..tvm.script import Alloc, Comment, Evaluate, If, Let, Set, Statement, Value
from .kernel import UNROLLED, Kernel, Nest
from .spread import Block
from .steps import Whole, as_reduction

MATRIX = 8  # a product of tiles with so many rows and so many columns is work for tensor cores


def emit_reduce(kernel: Kernel, row: Reduce, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """`row.dst` = the reduction over the tile, the same in every thread that holds the element."""
    if row.op in ("argmax", "argmin"):
        _emit_arg_reduce(kernel, row, loops, out)
        return
    start = kernel.nest(row.ranks, loops, out)
    registers = kernel.evaluator.registers[row.dst]
    start.body.append(Set(registers.at(start.at.slots), identity(row.op, registers.dtype)))
    accumulate(kernel, row, loops, out)
    across(kernel, row.dst, row.ranks, row.op, row.over, loops, out)


def accumulate(kernel: Kernel, row: Reduce, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """The thread's own points into the registers of `row.dst`; what lies beyond the tile, in its padding, counts nothing."""
    evaluator = kernel.evaluator
    registers = evaluator.registers[row.dst]
    nest = kernel.nest((*row.ranks, *row.over), loops, out, (row.expr,))
    v = evaluator.value(row.expr, nest.at, nest.body)
    v = evaluator.cast(evaluator.cast(v, "bool") if row.op in ("any", "all") else v, registers.dtype)
    inside = evaluator.inside_tile(row.over, nest.at)
    if inside is not None:
        v = evaluator.select(inside, v, identity(row.op, registers.dtype))
    held = registers.at(nest.at.slots)
    nest.body.append(Set(held, combined(kernel, row.op, held, v)))


def combined(kernel: Kernel, op: str, a: Value, b: Value) -> Value:
    """Two partial results as one."""
    if op in ("max", "min") and a.dtype in ts.FLOATS:  # a NaN stays one
        return kernel.evaluator.operation("maximum" if op == "max" else "minimum", [b, a])
    return combine(op, a, b)


def across(
    kernel: Kernel, tile: str, ranks: tuple[str, ...], op: str, over: tuple[str, ...], loops: tuple[Active, ...], out: list[Statement]
) -> None:
    """Every thread's part becomes the reduction over the threads along `over`."""
    bits = kernel.block.bits(over)
    if not bits:
        return
    nest = kernel.nest(ranks, loops, out)
    held = kernel.evaluator.registers[tile].at(nest.at.slots)
    dtype = held.dtype if held.dtype in ("float32", "float64", "int64") else "int32"
    word = {"any": "max", "all": "min"}.get(op, op)
    function = f"{word}_{dtype}_over_{bits:x}_of_{kernel.block.threads}"
    kernel.evaluator.helpers.add(function)
    whole = ts.extern(function, kernel.evaluator.cast(held, dtype), dtype=dtype)
    nest.body.append(Set(held, kernel.evaluator.cast(whole, held.dtype)))


def _emit_arg_reduce(kernel: Kernel, row: Reduce, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """Values beside their coordinates; of equals the lowest coordinate."""
    evaluator = kernel.evaluator
    if len(row.over) != 1:
        raise UnsupportedError(f"{row.op} over several ranks", statement=row.dst, hint="reduce one rank after the other")
    (rank,) = row.over
    compute = compute_type(evaluator.type_of(row.expr))
    dtype = compute if compute in ("float32", "float64", "int64") else "int32"
    places = evaluator.registers[row.dst]
    best = kernel.names.fresh("best", row.dst)
    held = replace(places, name=best, dtype=dtype)
    out.append(Alloc(best, (places.size,), dtype))
    start = kernel.nest(row.ranks, loops, out)
    start.body.append(Set(held.at(start.at.slots), identity(row.op, dtype)))
    start.body.append(Set(places.at(start.at.slots), ts.constant((1 << 31) - 1, "int32")))
    nest = kernel.nest((*row.ranks, rank), loops, out, (row.expr,))
    v = evaluator.bind(evaluator.cast(evaluator.value(row.expr, nest.at, nest.body), dtype), row.dst, nest.body)
    index = ts.narrow(evaluator.index(rank, nest.at))
    x, i = held.at(nest.at.slots), places.at(nest.at.slots)
    body: list[Statement] = [Set(x, v), Set(i, index)]
    nest.body.append(_taken(kernel, row.op, v, x, index, i, evaluator.inside_tile((rank,), nest.at), body))
    bits = kernel.block.bits(row.over)
    if bits:
        across = kernel.nest(row.ranks, loops, out)
        function = f"{row.op}_{dtype}_over_{bits:x}_of_{kernel.block.threads}"
        evaluator.helpers.add(function)
        pointers = [Value(f"T.address_of({r.at(across.at.slots).text})", "handle") for r in (held, places)]
        across.body.append(Evaluate(ts.extern(function, *pointers, dtype="int32")))


def _taken(kernel: Kernel, op: str, v: Value, x: Value, index: Value, i: Value, inside: Value | None, body: list[Statement]) -> If:
    """The assignments of `body` where v is better than x, or equal at a lower coordinate; NaN is better than any number."""
    evaluator = kernel.evaluator
    better = evaluator.compare(">" if op == "argmax" else "<", v, x)
    equal = evaluator.compare("==", v, x)
    if v.dtype in ts.FLOATS:
        new, old = evaluator.operation("isnan", [v]), evaluator.operation("isnan", [x])
        better = Value(f"T.Or({better.text}, T.And({new.text}, {evaluator.operation('not', [old]).text}))", "bool")
        equal = Value(f"T.Or({equal.text}, T.And({new.text}, {old.text}))", "bool")
    lower = Value(f"T.And({equal.text}, {index.text} < {i.text})", "bool")
    taken = Value(f"T.Or({better.text}, {lower.text})", "bool")
    return If(taken if inside is None else Value(f"T.And({inside.text}, {taken.text})", "bool"), body)


def emit_dot(kernel: Kernel, dot: Dot, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """A product of few rows: multiplied and summed."""
    emit_reduce(kernel, as_reduction(dot), loops, out)
    if dot.update is None and dot.post is None:
        return
    e: Expr = Tile(dot.dst)
    e = e if dot.update is None else Op("add", (e, dot.update))
    nest = kernel.nest(dot.ranks, loops, out, tuple(x for x in (dot.update, dot.post) if x is not None))
    v = kernel.evaluator.value(e, nest.at, nest.body)
    if dot.post is not None:
        v = kernel.evaluator.bind(v, dot.dst, nest.body)
        v = kernel.evaluator.value(dot.post, replace(nest.at, values={**nest.at.values, dot.dst: v}), nest.body)
    nest.body.append(kernel.set(dot.dst, nest.at, v))


def emit_scan(kernel: Kernel, scan: Scan, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """Step by step along the rank: the thread's own elements after what comes before them, in this step and in those before."""
    evaluator, spread = kernel.evaluator, kernel.block.spreads[scan.over]
    registers = evaluator.registers[scan.dst]
    dtype = registers.dtype if registers.dtype in ("float32", "float64", "int64") else "int32"
    lines = tuple(r for r in scan.ranks if r != scan.over)
    nest = kernel.nest(lines, loops, out)
    carried, before = kernel.names.fresh("carried", scan.dst), kernel.names.fresh("before", scan.dst)
    carry, running = Value(f"{carried}[0]", dtype), Value(f"{before}[0]", dtype)
    first = identity(scan.op, dtype) if scan.start is None else evaluator.value(scan.start, nest.at, nest.body)
    nest.body += [Alloc(carried, (1,), dtype), Alloc(before, (1,), dtype), Set(carry, evaluator.cast(first, dtype))]
    name = kernel.names.fresh("own", scan.dst)
    nest.body.append(Alloc(name, (spread.vector,), dtype))
    step = kernel.open(nest, "k", scan.over, spread.steps, "T.unroll" if spread.held <= UNROLLED else "range")
    whole = nest.body
    kernel.place(nest, scan.over, step, ts.integer(0))
    loaded = kernel.loaded((scan.expr,), scan.over, nest) if spread.vector > 1 else {}

    def each() -> tuple[Nest, Value]:
        inner = Nest(whole, nest.at)
        element = kernel.open(inner, "e", scan.over, spread.vector, "T.unroll")
        kernel.place(inner, scan.over, step, element)
        inner.at = replace(inner.at, loaded={key: replace(v, text=f"{v.text}[{element.text}]") for key, v in loaded.items()})
        return inner, Value(f"{name}[{element.text}]", dtype)

    whole.append(Set(running, identity(scan.op, dtype)))
    inner, own = each()
    v = evaluator.cast(evaluator.value(scan.expr, inner.at, inner.body), dtype)
    inside = evaluator.inside_tile((scan.over,), inner.at)
    v = v if inside is None else evaluator.select(inside, v, identity(scan.op, dtype))
    inner.body += [Set(own, v), Set(running, combined(kernel, scan.op, running, own))]
    total = _scan_across(kernel, scan.op, dtype, before, kernel.block.bits((scan.over,)), whole)
    whole.append(Set(running, combined(kernel, scan.op, carry, running)))
    inner, own = each()
    after = [Set(running, combined(kernel, scan.op, running, own))]
    store = [kernel.set(scan.dst, inner.at, running)]
    inner.body += [*store, *after] if scan.exclusive else [*after, *store]
    whole.append(Set(carry, combined(kernel, scan.op, carry, total)))


def _scan_across(kernel: Kernel, op: str, dtype: str, before: str, bits: int, out: list[Statement]) -> Value:
    """The thread's sum in `before` becomes that of the threads before it; returns the sum of all."""
    total = kernel.names.fresh("total")
    held = Value(f"{before}[0]", dtype)
    if not bits:
        out += [Let(total, held), Set(held, identity(op, dtype))]
        return Value(total, dtype)
    function = f"scan{op}_{dtype}_over_{bits:x}_of_{kernel.block.threads}"
    kernel.evaluator.helpers.add(function)
    out.append(Let(total, ts.extern(function, Value(f"T.address_of({held.text})", "handle"), dtype=dtype)))
    return Value(total, dtype)


def emit_whole(kernel: Kernel, step: Whole, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """The parts of all threads together, and what the state was before the loop."""
    out.append(Comment(f"{step.dst}: {step.op} over {', '.join(step.over)} across threads"))
    across(kernel, step.dst, step.ranks, step.op, step.over, loops, out)
    nest = kernel.nest(step.ranks, loops, out)
    held = kernel.evaluator.registers[step.dst].at(nest.at.slots)
    first = kernel.evaluator.registers[step.first].at(nest.at.slots)
    nest.body.append(Set(held, combined(kernel, step.op, held, first)))


def check_dots(program: TileProgram, block: Block) -> None:
    """Raises `UnsupportedError` for a product of matrices, which is work for tensor cores."""
    tiles = {name: ranks for name, (ranks, _) in kernel_tiles(program.body).items()}
    for dot, _, _ in nodes(program):
        if not isinstance(dot, Dot):
            continue
        left, right = ({r for r in expression_ranks(e, tiles) if r in block.spreads} - set(dot.over) for e in (dot.a, dot.b))
        rows, columns = (prod(block.spreads[r].size for r in side) for side in (left - right, right - left))
        if min(rows, columns) >= MATRIX:
            raise UnsupportedError(
                f"a product of {rows} by {columns} needs tensor cores, which TVM for CUDA does not use here",
                statement=dot.dst,
                hint="the Triton emitter: the target without +tvm",
            )
