"""Groups as loops: rows over the common ranks, stages inside, reductions with several accumulators, values in registers."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from ...ir.errors import UnsupportedError
from ...ir.expr import REDUCTIONS
from ...ir.tile import Loop, Map, Reduce, Store
from . import script as ts
from .evaluate import Active, Point, compute_type
from .kernel import Kernel, Nest
from .partition import Group, Row, Stage, stages
from .prepare import Assign
from .script import Alloc, Comment, Evaluate, For, If, Set, Statement, Value

UNROLL = 4


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


def emit_group(kernel: Kernel, group: Group, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """The loops of a group, appended to `out`."""
    lanes = kernel.cpu.lanes if group.lane is not None else 1
    nest = Nest(out, Point(local={}, lane=group.lane, lanes=lanes, loops=loops))
    paired = _paired_rank(kernel, group.rows)
    for rank in group.common:
        if rank != group.lane and rank != paired:
            nest.loop(kernel.names, rank, kernel.span(rank, loops), exact=kernel.spans_exactly(rank, loops))
    if group.lane in group.common:
        assert group.lane is not None
        nest.loop(kernel.names, group.lane, ts.ceil_div(kernel.span(group.lane, loops), lanes), step=lanes)
    if paired in group.common:
        assert paired is not None
        nest.loop(kernel.names, paired, ts.ceil_div(kernel.span(paired, loops), 2), step=2)
    held: dict[str, Value] = {}
    for stage in stages(group, kernel.info):
        kernel.evaluator.statement = ", ".join(_name(row) for row in stage.rows)
        at = replace(nest.point, values=held)
        nest.body.extend(Comment(kernel.text(row)) for row in stage.rows)
        if not stage.inner:
            held.update(_rows(kernel, stage.rows, group.rows, _variants(at, paired), {}, nest.body))
        else:
            held.update(_stage(kernel, group, stage, at, nest.body))


def _name(row: Row) -> str:
    return row.tensor if isinstance(row, Store) else row.dst


def _paired_rank(kernel: Kernel, rows: tuple[Row, ...]) -> str | None:
    found = {kernel.buffers[r.dst].paired for r in rows if isinstance(r, Map)} - {None}
    return next(iter(found), None)


def _variants(at: Point, paired: str | None) -> list[Point]:
    """The two points of a pair, or the point alone."""
    if paired is None or paired not in at.local:
        return [at]
    odd = {**at.local, paired: ts.add(at.local[paired], ts.integer(1))}
    return [at, replace(at, local=odd, exact=at.exact - {paired})]


def _unroll(kernel: Kernel, group: Group, trips: int) -> int:
    """How many vectors are in flight: as the schedule says where it divides the trips, else the most that does."""
    wanted = UNROLL
    for row in group.rows:
        chosen = kernel.groups.get(_name(row))
        if chosen is not None and chosen.unroll is not None:
            wanted = chosen.unroll
    return next(u for u in range(min(wanted, max(trips, 1)), 0, -1) if trips % u == 0)


def _inner_order(kernel: Kernel, group: Group, stage: Stage) -> list[str]:
    """The stage's ranks, the one adjacent in memory or along the vector last."""
    order = list(stage.inner)
    widest = [kernel.buffers[r.dst] for r in stage.rows if isinstance(r, (Map, Assign))]
    if widest:
        place = {p.rank: i for i, p in enumerate(widest[0].parts)}
        order.sort(key=lambda r: place.get(r, -1))
    if group.lane in order:
        order.remove(str(group.lane))
        order.append(str(group.lane))
    return order


def _stage(kernel: Kernel, group: Group, stage: Stage, at: Point, out: list[Statement]) -> dict[str, Value]:
    """The loops of a stage; returns its reductions' results as values of the row."""
    order = _inner_order(kernel, group, stage)
    last = order[-1]
    width = at.lanes if last == group.lane else 1
    size = kernel.size(last, at.loops)
    paired = _paired_rank(kernel, stage.rows)
    trips = -(-size // width)
    unroll = _unroll(kernel, group, trips)
    pair = paired == last
    if pair and unroll % 2:
        unroll = 2
    lanes = at.lanes if group.lane in (*group.common, *stage.inner) else 1
    accumulators = {r.dst: _start(kernel, r, replace(at, lanes=lanes), unroll, out) for r in stage.rows if isinstance(r, Reduce)}
    nest = Nest(out, replace(at, lanes=lanes))
    for rank in order[:-1]:
        pairs = rank == paired
        count = kernel.span(rank, at.loops)
        nest.loop(kernel.names, rank, ts.ceil_div(count, 2) if pairs else count, step=2 if pairs else 1, prefix="w", exact=not pairs and kernel.spans_exactly(rank, at.loops))
    exact = unroll == 1 and width == 1 and kernel.spans_exactly(last, at.loops)
    nest.loop(kernel.names, last, ts.ceil_div(kernel.span(last, at.loops), unroll * width), step=unroll * width, prefix="w", exact=exact)
    turns = unroll // 2 if pair else unroll
    u = ts.integer(0)
    if turns > 1:
        u = ts.name(kernel.names.fresh("u"))
        inner: list[Statement] = []
        nest.body.append(For(u.text, ts.integer(0), ts.integer(turns), "T.unroll", inner))
        nest.body = inner
        local = ts.add(nest.point.local[last], ts.mul(u, ts.integer(width * (2 if pair else 1))))
        nest.point = replace(nest.point, local={**nest.point.local, last: local})
    slots = {"unroll": ts.mul(u, ts.integer(2)) if pair else u}
    if paired is not None and not pair and paired in stage.inner:
        slots["same"] = u
    _rows(kernel, stage.rows, stage.rows, _variants(nest.point, paired if paired in stage.inner else None), {k: (a, slots) for k, a in accumulators.items()}, nest.body)
    return {name: _finish(kernel, group, a, at, out) for name, a in accumulators.items()}


def _rows(
    kernel: Kernel,
    rows: tuple[Row, ...],
    scope: tuple[Row, ...],
    variants: list[Point],
    accumulators: dict[str, tuple[Accumulators, dict[str, Value]]],
    out: list[Statement],
) -> dict[str, Value]:
    """The statements at one point, or at both points of a pair; tiles that leave `scope` are written. Returns the values."""
    results: list[dict[str, Value]] = []
    for turn, at in enumerate(variants):
        values = dict(at.values)
        for row in rows:
            point = replace(at, values=values)
            if isinstance(row, Store):
                _store(kernel, row, point, out)
            elif isinstance(row, Reduce):
                a, slots = accumulators[row.dst]
                slot = slots["same"] if "same" in slots else ts.add(slots["unroll"], ts.integer(turn))
                _accumulate(kernel, a, slot, point, out)
            else:
                values[row.dst] = _map(kernel, row, scope, point, out)
        results.append(values)
    for row in rows:
        if isinstance(row, Map) and kernel.buffers[row.dst].paired is not None and kernel.leaves(row.dst, scope):
            _write_pair(kernel, row, variants, [r[row.dst] for r in results], out)
    return {row.dst: results[0][row.dst] for row in rows if isinstance(row, Map)}


def _map(kernel: Kernel, row: Map | Assign, scope: tuple[Row, ...], at: Point, out: list[Statement]) -> Value:
    """The value of a map, held under a name and written where it is read elsewhere."""
    buffer = kernel.buffers[row.dst]
    v = kernel.evaluator.cast(kernel.evaluator.value(row.expr, at, out), compute_type(row.dtype))
    stored = v.dtype if v.dtype != "bool" else "int8"
    v = kernel.evaluator.bind(kernel.evaluator.cast(v, stored), row.dst, out)
    if isinstance(row, Assign) or (buffer.paired is None and kernel.leaves(row.dst, scope)):
        write_tile(kernel, row.dst, at, v, out)
    return kernel.evaluator.cast(v, compute_type(row.dtype))


def write_tile(kernel: Kernel, tile: str, at: Point, v: Value, out: list[Statement]) -> None:
    """`tile` at the point = v."""
    buffer = kernel.buffers[tile]
    lane = at.lane if at.lane in buffer.ranks and at.lanes > 1 else None
    if lane is None:
        if v.lanes > 1:
            raise UnsupportedError("a value varies along a rank its tile does not have", statement=tile)
        out.append(Set(buffer.at(at.local), v))
        return
    v = ts.broadcast(v, at.lanes)
    if buffer.contiguous(lane, at.lanes):
        out.append(Set(buffer.at(at.local, lane, at.lanes), v))
        return
    spill, var = kernel.names.fresh("g"), kernel.names.fresh("l")
    local = {**at.local, lane: ts.add(at.local[lane], ts.name(var))}
    out.append(Alloc(spill, (at.lanes,), v.dtype))
    out.append(Set(Value(f"{spill}[T.ramp(0, 1, {at.lanes})]", v.dtype, at.lanes), v))
    out.append(For(var, ts.integer(0), ts.integer(at.lanes), "range", [Set(buffer.at(local), Value(f"{spill}[{var}]", v.dtype))]))


def _write_pair(kernel: Kernel, row: Map, variants: list[Point], values: list[Value], out: list[Statement]) -> None:
    """Both values of a pair, rounded to bf16 and packed; in an edge tile a value beyond the extent is 0, so that it adds nothing."""
    buffer = kernel.buffers[row.dst]
    rank = str(buffer.paired)
    packed = []
    for at, v in zip(variants, values, strict=True):
        lanes = at.lanes
        v = ts.broadcast(v, lanes)
        if kernel.evaluator.ragged(rank, at):
            limit = ts.narrow(kernel.memory.extent(rank))
            inside = Value(f"{ts.wrapped(ts.narrow(kernel.evaluator.index(rank, at)), ts.SUM)} < {limit.text}", "bool", binding=ts.OTHER)
            v = kernel.evaluator.select(inside, v, ts.constant(0, "float32"))
        packed.append(v)
    at = variants[0]
    kernel.evaluator.helpers.add(f"pack_bf16_v{at.lanes}")
    both = ts.extern(f"pack_bf16_v{at.lanes}", *packed, dtype="int32", lanes=at.lanes)
    out.append(Set(buffer.at(at.local, at.lane, at.lanes), both))


def _identity(row: Reduce, dtype: str) -> Value:
    """What the reduction starts from."""
    if row.op in ("any", "all"):
        return ts.constant(int(row.op == "all"), dtype)
    largest = row.op in ("max", "argmax")
    if row.op in ("max", "min", "argmax", "argmin"):
        if dtype in ts.FLOATS:
            return ts.constant(float("-inf") if largest else float("inf"), dtype)
        bits = int(dtype.lstrip("uint") or 8)
        low, high = (0, (1 << bits) - 1) if dtype.startswith("u") else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        bound = low if largest else high
        return Value(f"T.{dtype}({bound})", dtype, number=bound)
    identity = REDUCTIONS[row.op]
    assert identity is not None
    return ts.constant(identity, dtype)


def _start(kernel: Kernel, row: Reduce, at: Point, unroll: int, out: list[Statement]) -> Accumulators:
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
    body: list[Statement] = [Set(a.at(u), ts.broadcast(_identity(row, dtype), lanes) if lanes > 1 else _identity(row, dtype))]
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


def _combine(op: str, a: Value, b: Value) -> Value:
    match op:
        case "sum":
            return Value(f"({a.text} + {b.text})", a.dtype, a.lanes)
        case "prod":
            return Value(f"({a.text} * {b.text})", a.dtype, a.lanes)
        case "max" | "any":
            return Value(f"T.max({a.text}, {b.text})", a.dtype, a.lanes)
        case _:
            return Value(f"T.min({a.text}, {b.text})", a.dtype, a.lanes)


def _accumulate(kernel: Kernel, a: Accumulators, slot: Value, at: Point, out: list[Statement]) -> None:
    """One point into its accumulator; what lies beyond the tile, in its padding, counts nothing."""
    evaluator = kernel.evaluator
    v = evaluator.cast(evaluator.value(a.row.expr, at, out), a.dtype)
    if a.lanes > 1:
        v = ts.broadcast(v, a.lanes)
    for rank in a.row.over:
        size = evaluator.size(rank, at)
        width = at.lanes if rank == at.lane else 1
        if rank == at.lane and size % width:
            inside = Value(f"{ts.ramp(at.local[rank], width).text} < {ts.broadcast(ts.integer(size), width).text}", "bool", width, binding=ts.OTHER)
            v = evaluator.select(inside, v, _identity(a.row, a.dtype))
    current = a.at(slot)
    if a.index is None:
        out.append(Set(current, _combine(a.row.op, current, v)))
        return
    v = evaluator.bind(v, a.row.dst, out)
    rank = a.row.over[0]
    base = ts.narrow(evaluator.index(rank, at))
    coordinate = ts.ramp(base, at.lanes) if rank == at.lane and at.lanes > 1 else base
    better = evaluator.compare(">" if a.row.op == "argmax" else "<", v, current)
    out.append(Set(a.index_at(slot), evaluator.select(better, coordinate, a.index_at(slot))))
    out.append(Set(current, evaluator.select(better, v, current)))


def _finish(kernel: Kernel, group: Group, a: Accumulators, at: Point, out: list[Statement]) -> Value:
    """The accumulators combined into one value of the row, written where it is read outside the group."""
    if a.index is not None:
        return _finish_arg(kernel, group, a, at, out)
    parts = [a.at(ts.integer(u)) for u in range(a.unroll)]
    while len(parts) > 1:
        parts = [_combine(a.row.op, parts[i], parts[i + 1]) if i + 1 < len(parts) else parts[i] for i in range(0, len(parts), 2)]
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
    out.append(ts.Let(name, flag))
    chosen = evaluator.cast(Value(name, "int32", lanes), "bool")
    out.append(Set(best[0], evaluator.select(chosen, other[0], best[0])))
    out.append(Set(best[1], evaluator.select(chosen, other[1], best[1])))


def _store(kernel: Kernel, row: Store, at: Point, out: list[Statement]) -> None:
    """One element or vector of an output; what lies beyond an extent is not written."""
    evaluator = kernel.evaluator
    array = kernel.memory.arrays[row.tensor]
    ranks = kernel.info(row).ranks
    body: list[Statement] = []
    tests = [_inside(kernel, r, at) for r in ranks if r != at.lane and evaluator.ragged(r, at)]
    guard = evaluator.all_of(tests)
    lane = at.lane if at.lanes > 1 and at.lane in ranks else None
    if lane is None:
        v = evaluator.value(row.expr, replace(at, lanes=1, lane=None), body)
        body.append(_store_scalar(kernel, row, replace(at, lanes=1, lane=None), v, body))
    else:
        moving = any(lane in evaluator_ranks(kernel, c) for c in row.coords[:-1])
        if array.unit and not moving and row.coords and evaluator.stride(row.coords[-1], at) == 1:
            _store_vector(kernel, row, at, body)
        else:
            _store_lanes(kernel, row, at, body)
    out.extend([If(guard, body)] if guard is not None else body)


def evaluator_ranks(kernel: Kernel, e: object) -> tuple[str, ...]:
    """The ranks a coordinate varies over."""
    from ...ir.infer import expression_ranks

    return expression_ranks(e, kernel.ranks)  # type: ignore[arg-type]


def _inside(kernel: Kernel, rank: str, at: Point) -> Value:
    """Whether the index along a rank lies within both the tile and the extent."""
    evaluator = kernel.evaluator
    index = evaluator.index(rank, at)
    test = Value(f"{ts.wrapped(index, ts.SUM)} < {kernel.memory.extent(rank).text}", "bool", binding=ts.OTHER)
    size = evaluator.size(rank, at)
    if kernel.places[rank].padded > size:
        within = Value(f"{ts.wrapped(at.local[rank], ts.SUM)} < {size}", "bool", binding=ts.OTHER)
        return Value(f"T.And({test.text}, {within.text})", "bool")
    return test


def _output(kernel: Kernel, row: Store, v: Value) -> tuple[str, Value]:
    """The stored type's name among the helpers, and the value in its compute type."""
    array = kernel.memory.arrays[row.tensor]
    compute = compute_type(array.dtype)
    v = kernel.evaluator.cast(v, compute)
    return (array.dtype.name if array.dtype.name in ("bf16", "f16") else array.memory_type), v


def _store_scalar(kernel: Kernel, row: Store, at: Point, v: Value, out: list[Statement]) -> Statement:
    evaluator = kernel.evaluator
    array = kernel.memory.arrays[row.tensor]
    _, v = _output(kernel, row, v)
    coords = tuple(evaluator.coordinate(c, at, out) for c in row.coords)
    index = tuple(array.axis_index(i, coords, kernel.memory.extents) for i in range(len(array.axes)))
    target = array.element(index) if index else Value(f"{array.name}[()]", array.memory_type)
    if array.memory_type != v.dtype:
        v = Value(f'T.Cast("{array.memory_type}", {v.text})', array.memory_type)
    return Set(target, v)


def _store_vector(kernel: Kernel, row: Store, at: Point, out: list[Statement]) -> None:
    """Adjacent elements at once, masked where the lane's tail may stick out."""
    evaluator = kernel.evaluator
    array = kernel.memory.arrays[row.tensor]
    lane = str(at.lane)
    v = evaluator.value(row.expr, at, out)
    name, v = _output(kernel, row, v)
    v = ts.broadcast(v, at.lanes)
    coords = tuple(evaluator.coordinate(c, at, out) for c in row.coords)
    index = tuple(array.axis_index(i, coords, kernel.memory.extents) for i in range(len(array.axes)))
    ragged = evaluator.ragged(lane, at)
    if not ragged and v.dtype == array.memory_type and v.dtype != "bool":
        out.append(Set(array.element((*index[:-1], ts.ramp(index[-1], at.lanes))), v))
        return
    if v.dtype == "bool":
        v = evaluator.cast(v, "int8")
    function = f"{'mstore' if ragged else 'store'}_{name}_v{at.lanes}"
    evaluator.helpers.add(function)
    args = [Value(f"T.address_of({array.element(index).text})", "handle"), v]
    if ragged:
        left = ts.sub(kernel.memory.extent(lane), evaluator.index(lane, at))
        size = evaluator.size(lane, at)
        args.append(ts.narrow(ts.smaller(left, ts.sub(ts.integer(size), at.local[lane]))))
    out.append(Evaluate(ts.extern(function, *args, dtype="int32")))


def _store_lanes(kernel: Kernel, row: Store, at: Point, out: list[Statement]) -> None:
    """Lane by lane, where the lanes are not adjacent in memory."""
    evaluator = kernel.evaluator
    lane = str(at.lane)
    v = evaluator.value(row.expr, at, out)
    stored = "int8" if v.dtype == "bool" else v.dtype
    v = ts.broadcast(evaluator.cast(v, stored), at.lanes)
    spill, var = kernel.names.fresh("g"), kernel.names.fresh("l")
    out.append(Alloc(spill, (at.lanes,), stored))
    out.append(Set(Value(f"{spill}[T.ramp(0, 1, {at.lanes})]", stored, at.lanes), v))
    one = evaluator.at_lane(at, var, row.coords, out)
    body: list[Statement] = []
    element = Value(f"{spill}[{var}]", stored)
    body.append(_store_scalar(kernel, row, one, evaluator.cast(element, "bool") if v.dtype != stored else element, body))
    if evaluator.ragged(lane, at):
        body = [If(_inside(kernel, lane, one), body)]
    out.append(For(var, ts.integer(0), ts.integer(at.lanes), "range", body))



def covered_by_group(kernel: Kernel, group: Group, loop: Loop) -> int:
    """How many elements along the loop's rank the group computes at once."""
    step = 1
    lanes = kernel.cpu.lanes if group.lane == loop.rank else 1
    if loop.rank in group.common:
        step = lanes
    for stage in stages(group, kernel.info):
        if loop.rank in stage.inner and _inner_order(kernel, group, stage)[-1] == loop.rank:
            step = math.lcm(step, lanes * _unroll(kernel, group, -(-loop.tile // lanes)))
        elif loop.rank in stage.inner:
            step = math.lcm(step, lanes)
    return math.lcm(step, 2) if _paired_rank(kernel, group.rows) == loop.rank else step
