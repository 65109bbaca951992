"""Bodies in order, and loops over a stream: tiles at an edge of the domain apart from those wholly inside it."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ...ir.expr import Expr, Masked, walk
from ...ir.tile import Dot, Loop, Scan
from . import script as ts
from .dots import covered_by_dot, emit_dot
from .evaluate import Active, Point
from .groups import covered_by_group, emit_group
from .kernel import Kernel
from .partition import Group, Part, partition
from .prepare import Stream, all_steps, expressions_of
from .scans import covered_by_scan, emit_scan
from .script import Comment, For, Let, Statement, Value


def emit_parts(kernel: Kernel, parts: list[Part], loops: tuple[Active, ...], out: list[Statement]) -> None:
    for part in parts:
        match part:
            case Group():
                emit_group(kernel, part, loops, out)
            case Dot():
                emit_dot(kernel, part, loops, out)
            case Scan():
                emit_scan(kernel, part, loops, out)
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
        counted = "int32" if run.first.number is not None and run.last.number is not None else "int64"  # TVM types it by the bounds
        variable = ts.name(kernel.names.fresh("j", loop.rank), counted)
        start = Value(kernel.names.fresh("s", loop.rank), "int64")
        body: list[Statement] = [Let(start.text, as_int64(ts.mul(variable, tile)))]
        active = Active(loop, start)
        if run.edge:
            valid = ts.name(kernel.names.fresh("count", loop.rank))
            body.append(Let(valid.text, ts.narrow(as_int64(ts.smaller(ts.sub(high, start), tile)))))
            span = _span(kernel, parts, loop, loops, valid)
            if span.text != valid.text and span.number is None:
                named = kernel.names.fresh("span", loop.rank)
                body.append(Let(named, span))
                span = ts.name(named)
            active = Active(loop, start, valid, span, low if low.number != 0 else None, high)
        emit_parts(kernel, parts, (*loops, active), body)
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
        return named_index(kernel, v, f"{wanted}_{loop.rank}", out)

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
    return low, high, [r for r in runs if r.first.text != r.last.text]


def _maskable(stream: Stream) -> bool:
    """Whether anything in the body looks at the domain."""
    return any(isinstance(n, Masked) for s in all_steps(stream.body) for e in expressions_of(s) for n in walk(e))


def _span(kernel: Kernel, parts: list[Part], loop: Loop, loops: tuple[Active, ...], valid: Value) -> Value:
    """The count of an edge tile rounded up to what every statement of the body covers at once."""
    step = 1
    for part in parts:
        if isinstance(part, Dot):
            step = math.lcm(step, covered_by_dot(kernel, part, loop.rank))
        elif isinstance(part, Scan):
            step = math.lcm(step, covered_by_scan(kernel, part, loop.rank))
        elif isinstance(part, Group):
            step = math.lcm(step, covered_by_group(kernel, part, loop))
        else:
            return ts.integer(loop.tile)
    if step == 1:
        return valid
    if loop.tile % step or step >= loop.tile:
        return ts.integer(loop.tile)
    return ts.mul(ts.ceil_div(valid, step), ts.integer(step))


def as_int64(v: Value) -> Value:
    if v.dtype == "int64" and v.number is None:
        return v
    return Value(f'T.Cast("int64", {v.text})', "int64")


def named_index(kernel: Kernel, v: Value, wanted: str, out: list[Statement]) -> Value:
    """A bound under a name unless it is a constant."""
    if v.number is not None:
        return v
    variable = kernel.names.fresh(wanted)
    out.append(Let(variable, as_int64(v)))
    return Value(variable, "int64")
