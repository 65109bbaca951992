"""Reductions within a tile: several accumulators in flight, combined at the end; arg reductions carry coordinates along."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ...ir.errors import UnsupportedError
from ...ir.expr import REDUCTIONS
from ...ir.tile import Reduce
from . import script as ts
from .arithmetic import compute_type
from .evaluate import Point
from .kernel import Kernel
from .partition import Group
from .script import Alloc, For, Let, Set, Statement, Value
from .stores import write_tile


@dataclass(frozen=True, slots=True)
class Accumulators:
    """The running values of one reduction, `unroll` vectors of `lanes`; `index` holds the coordinates of an arg reduction."""

    row: Reduce
    buffer: str
    dtype: str
    unroll: int
    lanes: int
    index: str | None = None

    def at(self, u: Value) -> Value:
        return self._element(self.buffer, self.dtype, u)

    def index_at(self, u: Value) -> Value:
        return self._element(str(self.index), "int32", u)

    def _element(self, buffer: str, dtype: str, u: Value) -> Value:
        last = ts.ramp(ts.integer(0), self.lanes).text
        return Value(f"{buffer}[{u.text}, {last}]", dtype, self.lanes)


def identity(op: str, dtype: str) -> Value:
    """What a reduction starts from."""
    if op in ("any", "all"):
        return ts.constant(int(op == "all"), dtype)
    largest = op in ("max", "argmax")
    if op in ("max", "min", "argmax", "argmin"):
        if dtype in ts.FLOATS:
            return ts.constant(float("-inf") if largest else float("inf"), dtype)
        bound = ts.limits(dtype)[0 if largest else 1]
        return Value(f"T.{dtype}({bound})", dtype, number=bound)
    neutral = REDUCTIONS[op]
    assert neutral is not None
    return ts.constant(neutral, dtype)


def start_reduction(kernel: Kernel, row: Reduce, at: Point, unroll: int, out: list[Statement]) -> Accumulators:
    """Accumulators at the identity."""
    if row.op in ("any", "all"):
        dtype = "int32"
    elif row.op in ("argmax", "argmin"):
        dtype = compute_type(kernel.evaluator.type_of(row.expr))
        dtype = "int32" if dtype == "bool" else dtype
    else:
        dtype = compute_type(row.dtype)
    varies = at.lane in row.ranks or at.lane in row.over
    lanes = at.lanes if varies else 1
    buffer = kernel.names.fresh("acc")
    index = kernel.names.fresh("arg") if row.op in ("argmax", "argmin") else None
    a = Accumulators(row, buffer, dtype, unroll, lanes, index)
    if index is not None and len(row.over) != 1:
        raise UnsupportedError(f"{row.op} over several ranks", statement=row.dst, hint="reduce one rank after the other")
    u = ts.name(kernel.names.fresh("u")) if unroll > 1 else ts.integer(0)
    body: list[Statement] = [Set(a.at(u), ts.broadcast(identity(row.op, dtype), lanes) if lanes > 1 else identity(row.op, dtype))]
    out.append(Alloc(buffer, (unroll, lanes), dtype))
    if index is not None:
        out.append(Alloc(index, (unroll, lanes), "int32"))
        first = kernel.evaluator.index(row.over[0], replace(at, local={**at.local, row.over[0]: ts.integer(0)}))
        body.append(Set(a.index_at(u), ts.broadcast(ts.narrow(first), lanes) if lanes > 1 else ts.narrow(first)))
    if unroll > 1:
        out.append(For(u.text, ts.integer(0), ts.integer(unroll), "T.unroll", body))
    else:
        out.extend(body)
    return a


def combine(op: str, a: Value, b: Value) -> Value:
    """Two partial results of a reduction as one."""
    match op:
        case "sum":
            return Value(f"({a.text} + {b.text})", a.dtype, a.lanes)
        case "prod":
            return Value(f"({a.text} * {b.text})", a.dtype, a.lanes)
        case "max" | "any":
            return Value(f"T.max({a.text}, {b.text})", a.dtype, a.lanes)
        case _:
            return Value(f"T.min({a.text}, {b.text})", a.dtype, a.lanes)


def accumulate(kernel: Kernel, a: Accumulators, slot: Value, at: Point, out: list[Statement]) -> None:
    """One point into its accumulator; what lies beyond the tile, in its padding, counts nothing."""
    evaluator = kernel.evaluator
    v = evaluator.cast(evaluator.value(a.row.expr, at, out), a.dtype)
    if a.lanes > 1:
        v = ts.broadcast(v, a.lanes)
    for rank in a.row.over:
        size = evaluator.size(rank, at)
        width = at.lanes if rank == at.lane else 1
        if rank == at.lane and size % width:
            inside = Value(
                f"{ts.ramp(at.local[rank], width).text} < {ts.broadcast(ts.integer(size), width).text}", "bool", width, binding=ts.OTHER
            )
            v = evaluator.select(inside, v, identity(a.row.op, a.dtype))
    current = a.at(slot)
    if a.index is None:
        out.append(Set(current, combine(a.row.op, current, v)))
        return
    v = evaluator.bind(v, a.row.dst, out)
    rank = a.row.over[0]
    base = ts.narrow(evaluator.index(rank, at))
    coordinate = ts.ramp(base, at.lanes) if rank == at.lane and at.lanes > 1 else base
    better = evaluator.compare(">" if a.row.op == "argmax" else "<", v, current)
    out.append(Set(a.index_at(slot), evaluator.select(better, coordinate, a.index_at(slot))))
    out.append(Set(current, evaluator.select(better, v, current)))


def finish_reduction(kernel: Kernel, group: Group, a: Accumulators, at: Point, out: list[Statement]) -> Value:
    """The accumulators combined into one value of the row, written where it is read outside the group."""
    if a.index is not None:
        return _finish_arg(kernel, group, a, at, out)
    parts = [a.at(ts.integer(u)) for u in range(a.unroll)]
    while len(parts) > 1:
        parts = [combine(a.row.op, parts[i], parts[i + 1]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
    v = parts[0]
    if a.lanes > 1 and at.lane in a.row.over:
        operation = {"any": "max", "all": "min"}.get(a.row.op, a.row.op)
        function = f"h{operation}_{a.dtype}_v{a.lanes}"
        kernel.evaluator.helpers.add(function)
        v = ts.extern(function, v, dtype=a.dtype)
    v = kernel.evaluator.bind(v, a.row.dst, out)
    return _result(kernel, group, a, at, v, out)


def _result(kernel: Kernel, group: Group, a: Accumulators, at: Point, v: Value, out: list[Statement]) -> Value:
    compute = compute_type(a.row.dtype)
    stored = "int8" if compute == "bool" else compute
    if v.dtype != stored:
        v = kernel.evaluator.bind(kernel.evaluator.cast(v, stored), a.row.dst, out)
    if kernel.leaves(a.row.dst, group.rows):
        write_tile(kernel, a.row.dst, at, v, out)
    return kernel.evaluator.cast(v, compute)


def _finish_arg(kernel: Kernel, group: Group, a: Accumulators, at: Point, out: list[Statement]) -> Value:
    """The best of all accumulators, the lower coordinate where values are equal."""
    symbol = ">" if a.row.op == "argmax" else "<"
    horizontal = a.lanes > 1 and at.lane in a.row.over
    count = a.unroll * a.lanes if horizontal else a.unroll
    if not horizontal:
        first, second = (a.at(ts.integer(0)), a.index_at(ts.integer(0)))
        for u in range(1, count):
            _keep_better(kernel, symbol, (first, second), (a.at(ts.integer(u)), a.index_at(ts.integer(u))), out)
        v = kernel.evaluator.bind(second, a.row.dst, out)
        return _result(kernel, group, a, at, v, out)
    outer, inner = ts.name(kernel.names.fresh("u")), ts.name(kernel.names.fresh("l"))
    best = (Value(f"{a.buffer}[0, 0]", a.dtype), Value(f"{a.index}[0, 0]", "int32"))
    other = (Value(f"{a.buffer}[{outer.text}, {inner.text}]", a.dtype), Value(f"{a.index}[{outer.text}, {inner.text}]", "int32"))
    body: list[Statement] = []
    _keep_better(kernel, symbol, best, other, body)
    loop = For(inner.text, ts.integer(0), ts.integer(a.lanes), "range", body)
    out.append(For(outer.text, ts.integer(0), ts.integer(a.unroll), "range", [loop]))
    v = kernel.evaluator.bind(best[1], a.row.dst, out)
    return _result(kernel, group, a, at, v, out)


def _keep_better(kernel: Kernel, symbol: str, best: tuple[Value, Value], other: tuple[Value, Value], out: list[Statement]) -> None:
    """best = other where its value is better, or equal at a lower coordinate."""
    evaluator = kernel.evaluator
    lanes = best[0].lanes
    better = evaluator.compare(symbol, other[0], best[0])
    equal = evaluator.compare("==", other[0], best[0])
    lower = evaluator.compare("<", other[1], best[1])
    test = Value(f"T.Or({better.text}, T.And({equal.text}, {lower.text}))", "bool", lanes)
    name = kernel.names.fresh("take")
    flag = evaluator.cast(test, "int32")
    out.append(Let(name, flag))
    chosen = evaluator.cast(Value(name, "int32", lanes), "bool")
    out.append(Set(best[0], evaluator.select(chosen, other[0], best[0])))
    out.append(Set(best[1], evaluator.select(chosen, other[1], best[1])))
