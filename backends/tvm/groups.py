"""Groups as loops: rows over the common ranks, stages inside, reductions with several accumulators, values in registers."""

from __future__ import annotations

import math
from dataclasses import replace

from ...ir.tile import Loop, Map, Reduce, Store
from . import script as ts
from .arithmetic import compute_type
from .evaluate import Active, Point
from .kernel import Kernel, Nest
from .partition import Group, Row, Stage, stages
from .prepare import Assign
from .reductions import Accumulators, accumulate, finish_reduction, start_reduction
from .script import Comment, For, Statement, Value
from .stores import emit_store, write_pair, write_tile

UNROLL = 4


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
    accumulators = {r.dst: start_reduction(kernel, r, replace(at, lanes=lanes), unroll, out) for r in stage.rows if isinstance(r, Reduce)}
    nest = Nest(out, replace(at, lanes=lanes))
    for rank in order[:-1]:
        pairs = rank == paired
        count = kernel.span(rank, at.loops)
        nest.loop(
            kernel.names,
            rank,
            ts.ceil_div(count, 2) if pairs else count,
            step=2 if pairs else 1,
            prefix="w",
            exact=not pairs and kernel.spans_exactly(rank, at.loops),
        )
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
    _rows(
        kernel,
        stage.rows,
        stage.rows,
        _variants(nest.point, paired if paired in stage.inner else None),
        {k: (a, slots) for k, a in accumulators.items()},
        nest.body,
    )
    return {name: finish_reduction(kernel, group, a, at, out) for name, a in accumulators.items()}


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
                emit_store(kernel, row, point, out)
            elif isinstance(row, Reduce):
                a, slots = accumulators[row.dst]
                slot = slots["same"] if "same" in slots else ts.add(slots["unroll"], ts.integer(turn))
                accumulate(kernel, a, slot, point, out)
            else:
                values[row.dst] = _map(kernel, row, scope, point, out)
        results.append(values)
    for row in rows:
        if isinstance(row, Map) and kernel.buffers[row.dst].paired is not None and kernel.leaves(row.dst, scope):
            write_pair(kernel, row, variants, [r[row.dst] for r in results], out)
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
