"""Writing outputs: vectors where elements are adjacent, masked at tails, one by one elsewhere."""

from __future__ import annotations

from dataclasses import replace

from ...ir.expr import Bitcast, Cast
from ...ir.tile import Store
from ...ir.types import i4
from ..tvm import script as ts
from ..tvm.arithmetic import compute_type
from ..tvm.evaluate import CODE_TYPES, Active
from ..tvm.script import Alloc, Evaluate, If, Set, Statement, Value
from ..tvm.tiles import storage_type
from .evaluate import ThreadPoint
from .kernel import UNROLLED, Kernel, Nest
from .spread import adjacent_rank


def emit_store(kernel: Kernel, store: Store, loops: tuple[Active, ...], out: list[Statement]) -> None:
    """The elements of one thread; of threads that hold the same element the first one writes it."""
    ranks = kernel.tiled(store.coords)
    array = kernel.evaluator.memory.arrays[store.tensor]
    idle = (kernel.block.threads - 1) & ~kernel.block.bits(ranks)
    if idle:
        body: list[Statement] = []
        out.append(If(Value(f"T.bitwise_and(tid, {idle}) == 0", "bool", binding=ts.OTHER), body))
        out = body
    lane = adjacent_rank(store.coords)
    if lane in ranks and array.unit and kernel.block.spreads[str(lane)].vector > 1:
        _store_vectors(kernel, store, str(lane), ranks, loops, out)
        return
    nest = kernel.nest(ranks, loops, out, (store.expr,))
    inside = kernel.evaluator.inside_extents(ranks, nest.at)
    if inside is not None:
        body = []
        nest.body.append(If(inside, body))
        nest.body = body
    kind, v = _stored(kernel, store, nest)
    target = _target(kernel, store, nest.at, nest.body)
    if array.dtype.is_float and array.dtype.bits < 32:
        kernel.evaluator.helpers.add(f"store_{kind}_s")
        pointer = Value(f"T.address_of({target.text})", "handle")
        nest.body.append(Evaluate(ts.extern(f"store_{kind}_s", pointer, v, dtype="int32")))
    else:
        nest.body.append(Set(target, v))


def _target(kernel: Kernel, store: Store, at: ThreadPoint, out: list[Statement]) -> Value:
    array = kernel.evaluator.memory.arrays[store.tensor]
    coords = tuple(kernel.evaluator.coordinate(c, at, out) for c in store.coords)
    return array.element(tuple(array.axis_index(i, coords, kernel.evaluator.memory.extents) for i in range(len(array.axes))))


def _stored(kernel: Kernel, store: Store, nest: Nest) -> tuple[str, Value]:
    """The stored type as helpers spell it, and the value as they take it. Bits of the stored type are stored as they are."""
    evaluator, t, e = kernel.evaluator, kernel.evaluator.memory.arrays[store.tensor].dtype, store.expr
    if t.is_float and t.bits in (8, 16) and isinstance(e, Bitcast) and e.dtype == t and not evaluator.type_of(e.x).is_float:
        code = CODE_TYPES[t.bits]
        return code, evaluator.cast(evaluator.value(e.x, nest.at, nest.body), code)
    if isinstance(e, Cast) and e.dtype == t and t.is_float and t.bits < 32:
        e = e.x
    v = evaluator.value(e, nest.at, nest.body)
    v = evaluator.rounded(v, t) if t == i4 else evaluator.cast(v, compute_type(t))
    return evaluator.memory.arrays[store.tensor].helper_type, v


def _store_vectors(
    kernel: Kernel, store: Store, lane: str, ranks: tuple[str, ...], loops: tuple[Active, ...], out: list[Statement]
) -> None:
    """Adjacent elements at once: computed into registers, then written as wide as their address allows."""
    evaluator, spread = kernel.evaluator, kernel.block.spreads[lane]
    others = tuple(r for r in ranks if r != lane)
    outer = kernel.nest(others, loops, out)
    step = kernel.open(outer, "k", lane, spread.steps, "T.unroll" if spread.held <= UNROLLED else "range")
    kernel.place(outer, lane, step, ts.integer(0))
    inside = evaluator.inside_extents(others, outer.at)
    if inside is not None:
        body: list[Statement] = []
        outer.body.append(If(inside, body))
        outer.body = body
    loaded = kernel.loaded((store.expr,), lane, outer)
    name = kernel.names.fresh("y", store.tensor)
    room = Alloc(name, (spread.vector,), "")
    outer.body.append(room)
    inner = Nest(outer.body, outer.at)
    element = kernel.open(inner, "e", lane, spread.vector, "T.unroll")
    kernel.place(inner, lane, step, element)
    inner.at = replace(inner.at, loaded={key: replace(v, text=f"{v.text}[{element.text}]") for key, v in loaded.items()})
    kind, v = _stored(kernel, store, inner)
    array = evaluator.memory.arrays[store.tensor]
    dtype = kind if kind.startswith("int") else storage_type(array.dtype)
    outer.body[outer.body.index(room)] = Alloc(name, (spread.vector,), dtype)
    inner.body.append(Set(Value(f"{name}[{element.text}]", dtype), evaluator.cast(v, dtype)))
    function = f"store_{kind}_v{spread.vector}"
    evaluator.helpers.add(function)
    pointer = Value(f"T.address_of({_target(kernel, store, outer.at, outer.body).text})", "handle")
    limit = _room(kernel, lane, outer.at)
    outer.body.append(Evaluate(ts.extern(function, pointer, Value(f"T.address_of({name}[0])", "handle"), limit, dtype="int32")))


def _room(kernel: Kernel, lane: str, at: ThreadPoint) -> Value:
    """How many elements from the point on lie within the tile and the extent."""
    evaluator, spread = kernel.evaluator, kernel.block.spreads[lane]
    room = ts.integer(spread.vector)
    if evaluator.ragged(lane, at):
        left = ts.sub(evaluator.memory.extent(lane), evaluator.index(lane, at))
        room = ts.narrow(ts.smaller(left, room))
    size = evaluator.size(lane, at)
    if spread.padded > size:
        room = ts.smaller(room, ts.sub(ts.integer(size), at.local[lane]))
    return room
