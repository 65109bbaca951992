"""The steps of a kernel's body in order, and loops over a stream: tiles wholly inside the domain have a body without conditions."""

from __future__ import annotations

from ...ir.expr import Expr, Read, walk
from ...ir.tile import Dot, Map, Reduce, Scan, Store
from ..tvm import script as ts
from ..tvm.evaluate import Active
from ..tvm.prepare import Assign, Stream, expressions_of
from ..tvm.script import Comment, Evaluate, For, If, Let, Statement, Value
from ..tvm.streams import as_int64
from .evaluate import ThreadPoint
from .kernel import Kernel
from .reductions import accumulate, emit_dot, emit_reduce, emit_scan, emit_whole
from .steps import Partial, Step, Whole
from .stores import emit_store


def emit_steps(kernel: Kernel, steps: tuple[Step, ...], loops: tuple[Active, ...], out: list[Statement]) -> None:
    """All steps of a body, in order."""
    stored: set[str] = set()
    for step in steps:
        _name(kernel, step)
        if not loops and stored & _memory_read(step):
            out.append(Comment("what other threads of the block have stored is read"))
            out.append(Evaluate(Value('T.tvm_storage_sync("shared")', "handle")))
            stored = set()
        match step:
            case Map() | Assign():
                _comment(kernel, step, out)
                _emit_map(kernel, step.dst, step.ranks, step.expr, loops, out)
            case Reduce():
                _comment(kernel, step, out)
                emit_reduce(kernel, step, loops, out)
            case Dot():
                _comment(kernel, step, out)
                emit_dot(kernel, step, loops, out)
            case Scan():
                _comment(kernel, step, out)
                emit_scan(kernel, step, loops, out)
            case Store():
                _comment(kernel, step, out)
                emit_store(kernel, step, loops, out)
            case Partial(row=row):
                out.append(Comment(f"{kernel.text(row)}, the part of this thread"))
                accumulate(kernel, row, loops, out)
            case Whole():
                emit_whole(kernel, step, loops, out)
            case Stream():
                _emit_stream(kernel, step, loops, out)
        stored |= _memory_written(step)


def _name(kernel: Kernel, step: Step) -> None:
    if isinstance(step, Store):
        kernel.evaluator.statement = f"store {step.tensor}"
    elif not isinstance(step, Stream):
        kernel.evaluator.statement = step.dst


def _comment(kernel: Kernel, step: Map | Assign | Reduce | Dot | Scan | Store, out: list[Statement]) -> None:
    shown = Map(step.dst, step.ranks, step.expr, step.dtype, step.note) if isinstance(step, Assign) else step
    out.append(Comment(kernel.text(shown)))


def _emit_map(kernel: Kernel, dst: str, ranks: tuple[str, ...], e: Expr, loops: tuple[Active, ...], out: list[Statement]) -> None:
    nest = kernel.nest(ranks, loops, out, (e,))
    v = kernel.evaluator.value(e, nest.at, nest.body)
    nest.body.append(kernel.set(dst, nest.at, v))


def _emit_stream(kernel: Kernel, stream: Stream, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """The loop over tiles that meet the domain; those wholly inside it have a body without conditions."""
    loop = stream.loop
    evaluator, tile, extent = kernel.evaluator, ts.integer(loop.tile), kernel.evaluator.memory.extent(loop.rank)
    outside = ThreadPoint(local={}, loops=loops)

    def bound(e: Expr, wanted: str) -> Value:
        v = evaluator.coordinate(e, outside, out)
        return v if v.text == extent.text else kernel.named(v, f"{wanted}_{loop.rank}", out)

    low = kernel.named(ts.larger(bound(loop.bounds.begin, "begin"), ts.integer(0)), f"low_{loop.rank}", out)
    end = bound(loop.bounds.end, "end")
    high = extent if end.text == extent.text else kernel.named(ts.smaller(end, extent), f"high_{loop.rank}", out)
    whole_begin, whole_end = bound(loop.bounds.whole_begin, "whole_begin"), bound(loop.bounds.whole_end, "whole_end")
    whole_end = extent if whole_end.text == extent.text else ts.smaller(whole_end, extent)
    first = ts.quotient(low, tile)
    last = ts.ceil_div(high if high.text == extent.text else ts.larger(high, ts.integer(0)), loop.tile)
    last = kernel.named(last if first.number == 0 else ts.larger(last, first), f"last_{loop.rank}", out)
    variable = kernel.names.fresh("j", loop.rank)
    counted = "int32" if first.number is not None and last.number is not None else "int64"
    start = Value(kernel.names.fresh("s", loop.rank), "int64")
    body: list[Statement] = [Let(start.text, as_int64(ts.mul(ts.name(variable, counted), tile)))]
    out.append(Comment(f"{loop.rank}: {loop.tile} at a time"))
    out.append(For(variable, first, last, "range", body))
    whole = Active(loop, start)
    edge = Active(loop, start, tile, tile, low if low.number != 0 else None, high)
    exact = end.text == extent.text and extent.number is not None and int(extent.number) % loop.tile == 0 and low.number == 0
    if exact and not loop.conditions:
        emit_steps(kernel, stream.body, (*loops, whole), body)
        return
    tests = [f"{start.text} + {loop.tile} <= {whole_end.text}"]
    if whole_begin.number != 0:
        tests.append(f"{start.text} >= {whole_begin.text}")
    inside = kernel.names.fresh("inside", loop.rank)
    test = tests[0] if len(tests) == 1 else f"T.And({tests[0]}, {tests[1]})"
    body.append(Let(inside, Value(test, "bool")))
    bodies: tuple[list[Statement], list[Statement]] = ([], [])
    emit_steps(kernel, stream.body, (*loops, whole), bodies[0])
    emit_steps(kernel, stream.body, (*loops, edge), bodies[1])
    body += [
        If(Value(inside, "bool"), [Comment("a tile wholly inside the domain"), *bodies[0]]),
        If(Value(f"T.Not({inside})", "bool"), [Comment("a tile at an edge of the domain"), *bodies[1]]),
    ]


def _memory_read(step: Step) -> set[str]:
    match step:
        case Stream(loop=loop, body=body):
            own = {n.tensor for c in loop.conditions for n in walk(c) if isinstance(n, Read)}
            return own.union(*(_memory_read(s) for s in body))
        case Whole():
            return set()
        case Partial(row=row):
            return _memory_read(row)
        case _:
            return {n.tensor for e in expressions_of(step) for n in walk(e) if isinstance(n, Read)}


def _memory_written(step: Step) -> set[str]:
    if isinstance(step, Stream):
        return {t for s in step.body for t in _memory_written(s)}
    return {step.tensor} if isinstance(step, Store) else set()
