"""Writing tiles and outputs: vectors where elements are adjacent, masked at tails, lane by lane elsewhere."""

from __future__ import annotations

from dataclasses import replace

from ...ir.errors import UnsupportedError
from ...ir.expr import Bitcast, Cast
from ...ir.infer import expression_ranks
from ...ir.tile import Map, Store
from ...ir.types import DType, i4
from . import script as ts
from .arithmetic import compute_type
from .evaluate import CODE_TYPES, Point
from .kernel import Kernel
from .script import Alloc, Evaluate, For, If, Set, Statement, Value


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


def write_pair(kernel: Kernel, row: Map, variants: list[Point], values: list[Value], out: list[Statement]) -> None:
    """Both values of a pair, rounded to bf16 and packed; in an edge tile a value beyond the extent is 0, so that it adds nothing."""
    buffer = kernel.buffers[row.dst]
    rank = str(buffer.paired)
    vector = variants[0].lanes > 1 and variants[0].lane in buffer.ranks
    lanes = variants[0].lanes if vector else 1
    packed = []
    for at, v in zip(variants, values, strict=True):
        v = ts.broadcast(v, lanes) if vector else v
        if kernel.evaluator.ragged(rank, at):
            limit = ts.narrow(kernel.memory.extent(rank))
            inside = Value(f"{ts.wrapped(ts.narrow(kernel.evaluator.index(rank, at)), ts.SUM)} < {limit.text}", "bool", binding=ts.OTHER)
            v = kernel.evaluator.select(inside, v, ts.constant(0, "float32"))
        packed.append(v)
    at = variants[0]
    function = f"pack_bf16_v{lanes}" if vector else "pack_bf16_s"
    kernel.evaluator.helpers.add(function)
    both = ts.extern(function, *packed, dtype="int32", lanes=lanes)
    out.append(Set(buffer.at(at.local, at.lane, lanes) if vector else buffer.at(at.local), both))


def emit_store(kernel: Kernel, row: Store, at: Point, out: list[Statement]) -> None:
    """One element or vector of an output; what lies beyond an extent is not written."""
    evaluator = kernel.evaluator
    array = kernel.memory.arrays[row.tensor]
    ranks = kernel.info(row).ranks
    body: list[Statement] = []
    tests = [_inside(kernel, r, at) for r in ranks if r != at.lane and evaluator.ragged(r, at)]
    guard = evaluator.all_of(tests)
    lane = at.lane if at.lanes > 1 and at.lane in ranks else None
    if lane is None:
        one = replace(at, lanes=1, lane=None)
        name, v = _stored(kernel, row, one, body)
        body.append(_store_scalar(kernel, row, one, name, v, body))
    else:
        moving = any(lane in expression_ranks(c, kernel.ranks) for c in row.coords[:-1])
        if array.unit and not moving and row.coords and evaluator.stride(row.coords[-1], at) == 1:
            _store_vector(kernel, row, at, body)
        else:
            _store_lanes(kernel, row, at, body)
    out.extend([If(guard, body)] if guard is not None else body)


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


def _stored(kernel: Kernel, row: Store, at: Point, out: list[Statement]) -> tuple[str, Value]:
    """The stored type's name among the helpers, and the value in its compute type.

    A cast to the stored type is left to the store, and so are bits read as the stored type: they are stored as they are.
    """
    evaluator = kernel.evaluator
    array = kernel.memory.arrays[row.tensor]
    t, e = array.dtype, row.expr
    if t.is_float and t.bits in (8, 16) and isinstance(e, Bitcast) and e.dtype == t and not evaluator.type_of(e.x).is_float:
        code = CODE_TYPES[t.bits]
        return code, evaluator.cast(evaluator.value(e.x, at, out), code)
    if isinstance(e, Cast) and e.dtype == t and t.is_float and t.bits < 32:
        e = e.x
    return array.helper_type, _narrowed(kernel, t, evaluator.value(e, at, out))


def _narrowed(kernel: Kernel, t: DType, v: Value) -> Value:
    """A value as the store of a type takes it."""
    return kernel.evaluator.rounded(v, t) if t == i4 else kernel.evaluator.cast(v, compute_type(t))


def _store_scalar(kernel: Kernel, row: Store, at: Point, name: str, v: Value, out: list[Statement]) -> Statement:
    evaluator = kernel.evaluator
    array = kernel.memory.arrays[row.tensor]
    coords = tuple(evaluator.coordinate(c, at, out) for c in row.coords)
    index = tuple(array.axis_index(i, coords, kernel.memory.extents) for i in range(len(array.axes)))
    target = array.element(index)
    if array.dtype.is_float and array.dtype.bits < 32:
        evaluator.helpers.add(f"store_{name}_s")
        return Evaluate(ts.extern(f"store_{name}_s", Value(f"T.address_of({target.text})", "handle"), v, dtype="int32"))
    return Set(target, v)


def _store_vector(kernel: Kernel, row: Store, at: Point, out: list[Statement]) -> None:
    """Adjacent elements at once, masked where the lane's tail may stick out."""
    evaluator = kernel.evaluator
    array = kernel.memory.arrays[row.tensor]
    lane = str(at.lane)
    name, v = _stored(kernel, row, at, out)
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
    name, v = _stored(kernel, row, at, out)
    was_bool = v.dtype == "bool"
    stored = "int8" if was_bool else v.dtype
    v = ts.broadcast(evaluator.cast(v, stored), at.lanes)
    spill, var = kernel.names.fresh("g"), kernel.names.fresh("l")
    out.append(Alloc(spill, (at.lanes,), stored))
    out.append(Set(Value(f"{spill}[T.ramp(0, 1, {at.lanes})]", stored, at.lanes), v))
    one = evaluator.at_lane(at, var, row.coords, out)
    body: list[Statement] = []
    element = Value(f"{spill}[{var}]", stored)
    body.append(_store_scalar(kernel, row, one, name, evaluator.cast(element, "bool") if was_bool else element, body))
    if evaluator.ragged(lane, at):
        body = [If(_inside(kernel, lane, one), body)]
    out.append(For(var, ts.integer(0), ts.integer(at.lanes), "range", body))
