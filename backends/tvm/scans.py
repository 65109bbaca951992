"""Running reductions within a tile: a loop along the scanned rank, or whole vectors of prefixes where the lane lies along it."""

from __future__ import annotations

from dataclasses import replace

from ...ir.tile import Scan
from . import script as ts
from .arithmetic import compute_type
from .evaluate import Active, Point
from .kernel import Kernel, Nest
from .reductions import identity
from .script import Alloc, Comment, Set, Statement, Value
from .stores import write_tile

COMBINE = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}


def emit_scan(kernel: Kernel, scan: Scan, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """The loops of a scan, appended to `out`: the scanned rank innermost, what is carried in a register."""
    kernel.evaluator.statement = scan.dst
    out.append(Comment(kernel.text(scan)))
    lane = kernel.scan_lane(scan)
    lanes = kernel.cpu.lanes if lane is not None else 1
    nest = Nest(out, Point(local={}, lane=lane, lanes=lanes, loops=loops))
    for rank in scan.ranks:
        if rank not in (lane, scan.over):
            nest.loop(kernel.names, rank, kernel.span(rank, loops), exact=kernel.spans_exactly(rank, loops))
    along = lane == scan.over
    if lane is not None and not along:
        nest.loop(kernel.names, lane, ts.ceil_div(kernel.span(lane, loops), lanes), step=lanes)
    compute = compute_type(scan.dtype)
    dtype = "int8" if compute == "bool" else compute
    buffer = kernel.names.fresh("acc")
    carried = Value(f"{buffer}[{ts.ramp(ts.integer(0), lanes).text}]", dtype, lanes)
    before = replace(nest.point, lane=None, lanes=1) if along else nest.point
    nest.body += [Alloc(buffer, (lanes,), dtype), Set(carried, _start(kernel, scan, dtype, lanes, before, nest.body))]
    span = kernel.span(scan.over, loops)
    if along:
        nest.loop(kernel.names, scan.over, ts.ceil_div(span, lanes), step=lanes, prefix="w")
        _prefixes(kernel, scan, carried, nest.point, nest.body)
    else:
        nest.loop(kernel.names, scan.over, span, prefix="w", exact=kernel.spans_exactly(scan.over, loops))
        _one_after_the_other(kernel, scan, carried, nest.point, nest.body)


def _start(kernel: Kernel, scan: Scan, dtype: str, lanes: int, at: Point, out: list[Statement]) -> Value:
    """What is carried into the tile."""
    if scan.start is not None:
        v = kernel.evaluator.cast(kernel.evaluator.value(scan.start, at, out), dtype)
    elif scan.dtype.kind == "bool":
        v = ts.constant(int(scan.op in ("min", "prod")), dtype)
    else:
        v = identity(scan.op, dtype)
    return ts.broadcast(v, lanes) if lanes > 1 else v


def _element(kernel: Kernel, scan: Scan, dtype: str, at: Point, out: list[Statement]) -> Value:
    v = kernel.evaluator.cast(kernel.evaluator.value(scan.expr, at, out), dtype)
    return ts.broadcast(v, at.lanes) if at.lanes > 1 else v


def _write(kernel: Kernel, scan: Scan, v: Value, at: Point, out: list[Statement]) -> None:
    narrow = v if scan.dtype.kind == "bool" else kernel.evaluator.rounded(v, scan.dtype)
    write_tile(kernel, scan.dst, at, narrow, out)


def _one_after_the_other(kernel: Kernel, scan: Scan, carried: Value, at: Point, out: list[Statement]) -> None:
    """One step along the scanned rank, of as many rows as a vector has lanes."""
    x = kernel.evaluator.bind(_element(kernel, scan, carried.dtype, at, out), scan.dst, out)
    if scan.exclusive:
        _write(kernel, scan, carried, at, out)
    out.append(Set(carried, _combined(kernel, scan, carried, x)))
    if not scan.exclusive:
        _write(kernel, scan, carried, at, out)


def _prefixes(kernel: Kernel, scan: Scan, carried: Value, at: Point, out: list[Statement]) -> None:
    """A vector along the scanned rank: its own prefixes, each with what came before; the carry waits for one operation only."""
    evaluator, lanes = kernel.evaluator, at.lanes
    x = _element(kernel, scan, carried.dtype, at, out)
    prefix = evaluator.bind(_helper(kernel, "prefix", scan.op, x), scan.dst, out)
    total = _helper(kernel, "last", scan.op, prefix)
    shifted = _helper(kernel, "shift", scan.op, prefix) if scan.exclusive else prefix
    _write(kernel, scan, _combined(kernel, scan, carried, shifted), replace(at, lanes=lanes), out)
    out.append(Set(carried, _combined(kernel, scan, carried, total)))


def _combined(kernel: Kernel, scan: Scan, a: Value, b: Value) -> Value:
    return kernel.evaluator.operation(COMBINE[scan.op], [replace(a, data=True), b])


def _helper(kernel: Kernel, verb: str, op: str, v: Value) -> Value:
    function = f"{verb}{op}_{v.dtype}_v{v.lanes}"
    kernel.evaluator.helpers.add(function)
    return ts.extern(function, v, dtype=v.dtype, lanes=v.lanes)


def covered_by_scan(kernel: Kernel, scan: Scan, rank: str) -> int:
    """How many elements along `rank` the scan computes at once."""
    return kernel.cpu.lanes if kernel.scan_lane(scan) == rank else 1
