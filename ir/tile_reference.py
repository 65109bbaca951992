"""The meaning of a tile program: an interpreter that runs tasks and tiles one after the other, as an emitter's code would.

It is strict where emitters go wrong. Lanes outside an extent read as *garbage* (NaN unless told otherwise), except along the stream,
where an edge tile reads at indices clamped to the loop's bounds: a reduction that `Masked` does not guard shows either way. In a tile
that the bounds declare wholly inside the domain `Masked` does nothing, so wrong bounds show. Outputs are poisoned, so elements that no
task stores show; an element that two tasks store is an error.

Floats are computed in `dtype` and rounded only by casts, by the declared type of a tile or an output, and by `Dot.dtype`; with float64
only explicit casts to fewer than 32 bits round, so that the algorithm alone is compared with the reference.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import reference_ops as ops
from .binding import solve_extents
from .cascade import Cascade
from .errors import BindingError, CascadeError
from .expr import (
    OPS,
    Bitcast,
    Cast,
    Const,
    Count,
    Expr,
    Extent,
    Index,
    Masked,
    Op,
    Read,
    Scalar,
    Seen,
    Start,
    Tile,
)
from .infer import combine, operation_type
from .named import Ranks, Value, aligned, union
from .tile import Dot, GridRank, Loop, Map, Node, Reduce, Scan, Store, TileOutput, TileProgram
from .types import DType, boolean, f32, i32, i64

Array = np.ndarray[Any, Any]


@dataclass(frozen=True, slots=True)
class _Lanes:
    """The indices of a rank in the current tile: `size` of them from `start`. A rank of which a task has one index is no rank of a tile."""

    start: int
    size: int
    is_number: bool = False
    within: tuple[int, int] | None = None  # along the stream in an edge tile, memory is read at indices clamped to these


@dataclass(frozen=True, slots=True)
class _Task:
    """What a node runs in. `domain` are the enclosing loop's predicates, or None where Masked has nothing to do."""

    program: TileProgram
    number: int
    inputs: Mapping[str, Value]
    outputs: Mapping[str, _Result]
    scalars: Mapping[str, float]
    extents: Mapping[str, int]
    lanes: Mapping[str, _Lanes]
    tiles: dict[str, Value]
    promoted: bool
    garbage: float | None
    domain: Value | None = None
    clamped: bool = False


@dataclass(frozen=True, slots=True)
class _Result:
    """An output over its logical ranks and, for each element, the task that stored it, -1 where none has."""

    output: TileOutput
    data: Tensor
    owner: Tensor


def run_program(
    p: TileProgram,
    tensors: Mapping[str, Array],
    scalars: Mapping[str, float] | None = None,
    *,
    dtype: type[np.floating[Any]] = np.float32,
    garbage: float | None = float("nan"),
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """The outputs of a tile program by name.

    Args:
        p: the program.
        tensors: its inputs in their declared axes; narrow floats as any float array, four-bit types one element an entry.
        scalars: its scalar arguments.
        dtype: float32, or float64 to take rounding out of the comparison.
        garbage: what float lanes outside an extent read; None: the element at the nearest index inside, as clamped loads give.
        sizes: extents of the call, for ranks that no array of this kernel has.

    Elements that no task stored are NaN, in an integer output its lowest value. A narrow float output comes as float32.

    Raises:
        BindingError: if an input or scalar is missing or does not fit.
        CascadeError: if two tasks store one element, or a bool output is left incomplete.
    """
    promoted = np.dtype(dtype) == np.float64
    arrays = {declared.name: _given(p, declared.name, tensors) for declared in p.inputs}
    extents = _extents(p, {name: array.shape for name, array in arrays.items()}, sizes or {})
    inputs = {}
    for declared in p.inputs:
        data = _tensor(arrays[declared.name], declared.dtype, promoted).reshape([extents[rank] for rank in declared.ranks])
        inputs[declared.name] = Value(data, declared.ranks, declared.dtype)
    missing = [declared.name for declared in p.scalars if declared.name not in (scalars or {})]
    if missing:
        raise BindingError(f"no value given for scalar {', '.join(missing)}", statement=p.name)
    outputs = {output.name: _poisoned(output, extents, promoted) for output in p.outputs}
    for number, lanes in enumerate(_tasks(p, extents)):
        task = _Task(p, number, inputs, outputs, scalars or {}, extents, lanes, {}, promoted, garbage)
        _run(task, p.body)
    return {name: _array(result, extents, p.name) for name, result in outputs.items()}


def run_programs(
    programs: Iterable[TileProgram],
    tensors: Mapping[str, Array],
    scalars: Mapping[str, float] | None = None,
    *,
    dtype: type[np.floating[Any]] = np.float32,
    garbage: float | None = float("nan"),
    sizes: Mapping[str, int] | None = None,
) -> dict[str, Array]:
    """The outputs of all kernels of a plan, run in launch order; what one stores, later ones may read."""
    known = dict(tensors)
    results: dict[str, Array] = {}
    for p in programs:
        results.update(run_program(p, known, scalars, dtype=dtype, garbage=garbage, sizes=sizes))
        known.update(results)
    return results


# Arrays in and out ------------------------------------------------------------------------------------------------------------------


def _given(p: TileProgram, name: str, tensors: Mapping[str, Array]) -> Array:
    if name not in tensors:
        raise BindingError(f"no array given for {name}", statement=p.name)
    return tensors[name]


def _extents(p: TileProgram, shapes: Mapping[str, tuple[int, ...]], sizes: Mapping[str, int]) -> dict[str, int]:
    extents = {**sizes, **solve_extents(Cascade(p.name, p.inputs, p.scalars, p.ranks, (), ()), shapes)}
    streams = [node.rank for node in p.body if isinstance(node, Loop)]
    needed = [axis.rank for axis in p.grid] + list(p.resident) + streams + [rank for output in p.outputs for rank in output.ranks]
    for rank in needed:
        if rank not in extents:
            raise BindingError(f"nothing determines the extent of rank {rank}", statement=p.name, hint=f"declare the size of {rank}")
    return extents


def _tensor(array: Array, t: DType, promoted: bool) -> Tensor:
    """An array in the storage type of `t`; types that NumPy itself lacks go through float32."""
    native = array if array.dtype.kind in "biu" or array.dtype in (np.float64, np.float32, np.float16) else array.astype(np.float32)
    data = torch.from_numpy(np.array(native, order="C"))
    return (data.to(ops.compute_type(t, weak=False, promoted=promoted)) if t.is_float else data).to(_storage(t, promoted))


def _storage(t: DType, promoted: bool) -> torch.dtype:
    return ops.storage_type(t, weak=False, promoted=promoted)


def _poisoned(output: TileOutput, extents: Mapping[str, int], promoted: bool) -> _Result:
    shape = [extents[rank] for rank in output.ranks]
    t = output.dtype
    data = torch.full(shape, _poison(t), dtype=torch.float32 if t.bits < 32 and t.is_float and not promoted else _storage(t, promoted))
    return _Result(output, data, torch.full(shape, -1, dtype=torch.int64))


def _poison(t: DType) -> float:
    """What stands where nothing was stored."""
    return float("nan") if t.is_float else float(ops.identity("max", t))


def _array(result: _Result, extents: Mapping[str, int], program: str) -> Array:
    output = result.output
    if output.dtype == boolean and bool((result.owner < 0).any()):
        raise CascadeError(f"no task stores {int((result.owner < 0).sum())} elements of {output.name}", statement=program)
    shape = [int(np.prod([extents[rank] for rank in axis], dtype=np.int64)) for axis in output.output.axes]
    array: Array = result.data.reshape(shape).numpy()
    return array


# Tasks and tiles --------------------------------------------------------------------------------------------------------------------


def _tasks(p: TileProgram, extents: Mapping[str, int]) -> Iterator[dict[str, _Lanes]]:
    """The lanes of every rank for each task of the grid, resident ranks included."""
    resident = {rank: _Lanes(0, extents[rank]) for rank in p.resident}

    def starts(axis: GridRank) -> range:
        return range(0, extents[axis.rank], axis.tile)

    for place in product(*(starts(axis) for axis in p.grid)):
        tiles = {axis.rank: _Lanes(start, axis.tile, axis.tile == 1) for axis, start in zip(p.grid, place, strict=True)}
        yield {**resident, **tiles}


def _run(task: _Task, nodes: tuple[Node, ...]) -> None:
    """Runs nodes in order; each tile they define is added to `task.tiles`."""
    for node in nodes:
        match node:
            case Map():
                _define(task, node.dst, node.ranks, _evaluate(task, node.expr), node.dtype)
            case Reduce():
                _define(task, node.dst, node.ranks, _reduce(task, node), node.dtype)
            case Scan():
                _define(task, node.dst, node.ranks, _scan(task, node), node.dtype)
            case Dot():
                _dot(task, node)
            case Store():
                _store(task, node)
            case Loop():
                _loop(task, node)


def _loop(task: _Task, loop: Loop) -> None:
    extent, tile = task.extents[loop.rank], loop.tile
    begin, whole_begin, whole_end, end = (
        _number(task, bound) for bound in (loop.bounds.begin, loop.bounds.whole_begin, loop.bounds.whole_end, loop.bounds.end)
    )
    for state in loop.states:
        _define(task, state.name, state.ranks, _evaluate(task, state.init), state.dtype)
    first, last = max(begin, 0) // tile * tile, min(end, extent)
    for start in range(first, last, tile):
        whole = start >= whole_begin and start + tile <= min(whole_end, extent)
        inner = replace(task, lanes={**task.lanes, loop.rank: _Lanes(start, tile)}, tiles=dict(task.tiles), domain=None)
        if not whole:
            edge = {**inner.lanes, loop.rank: _Lanes(start, tile, within=(max(begin, 0), last - 1))}
            inner = replace(inner, domain=_domain(inner, loop), lanes=edge)
        _run(inner, loop.body)
        following = [_evaluate(inner, state.next) for state in loop.states]
        for state, value in zip(loop.states, following, strict=True):
            _define(task, state.name, state.ranks, value, state.dtype)


def _domain(task: _Task, loop: Loop) -> Value:
    """Where the domain of `loop` holds in the current tile."""
    index = _index(task, loop.rank)
    holds = replace(index, data=index.data < task.extents[loop.rank], dtype=boolean)
    for condition in loop.conditions:
        value = _evaluate(task, condition)
        ranks = union(holds, value)
        holds = Value(aligned(holds, ranks) & (aligned(value, ranks) != 0), ranks, boolean)
    return holds


def _number(task: _Task, e: Expr) -> int:
    value = _evaluate(task, e)
    if value.ranks:
        raise CascadeError(f"a bound varies over {', '.join(value.ranks)}, expected one number", statement=task.program.name)
    return int(value.data)


def _define(task: _Task, name: str, ranks: Ranks, value: Value, t: DType) -> None:
    data = ops.settle(_computed(task, value, t).data, t, weak=False, promoted=task.promoted)
    shape = [_lanes_of(task, rank).size for rank in ranks]
    task.tiles[name] = Value(aligned(replace(value, data=data), ranks).expand(shape), ranks, t)


def _lanes_of(task: _Task, rank: str) -> _Lanes:
    lanes = task.lanes.get(rank)
    if lanes is None or lanes.is_number:
        raise CascadeError(f"no tile has a rank {rank} here", statement=task.program.name)
    return lanes


def _reduce(task: _Task, node: Reduce) -> Value:
    value = _evaluate(task, node.expr)
    kept = tuple(rank for rank in node.ranks if rank in value.ranks)
    ranks = (*kept, *node.over)
    x = aligned(_computed(task, value, value.dtype), ranks).expand([_lanes_of(task, rank).size for rank in ranks])
    if node.op not in ("argmax", "argmin"):
        return Value(ops.reduce(node.op, x, None, value.dtype, len(node.over)), kept, node.dtype)
    place = ops.reduce(node.op, x, None, value.dtype, len(node.over))
    return Value(place + (task.lanes[node.over[0]].start if len(node.over) == 1 else 0), kept, i32)


def _scan(task: _Task, node: Scan) -> Value:
    ranks = (*(rank for rank in node.ranks if rank != node.over), node.over)
    shape = [_lanes_of(task, rank).size for rank in ranks]
    x = aligned(_computed(task, _evaluate(task, node.expr), node.dtype), ranks).expand(shape)
    first = Value(torch.tensor(ops.identity(node.op, node.dtype)), (), node.dtype) if node.start is None else _evaluate(task, node.start)
    carried = aligned(_computed(task, first, node.dtype), ranks).expand([*shape[:-1], 1])
    running = ops.scan(node.op, torch.cat([carried, x], -1), node.dtype, exclusive=False)
    return Value(running[..., :-1] if node.exclusive else running[..., 1:], ranks, node.dtype)


def _dot(task: _Task, node: Dot) -> None:
    a, b = (_rounded(task, _evaluate(task, operand), node.dtype) for operand in (node.a, node.b))
    t = node.dtype if node.dtype.bits == 64 else f32
    ranks = union(a, b)
    missing = [rank for rank in node.over if rank not in ranks]
    if missing:
        raise CascadeError(f"neither operand of dot {node.dst} has rank {', '.join(missing)}", statement=task.program.name)
    letters = {rank: chr(ord("a") + k) for k, rank in enumerate(ranks)}
    kept = tuple(rank for rank in ranks if rank not in node.over)
    spelled = ",".join("".join(letters[rank] for rank in v.ranks) for v in (a, b)) + "->" + "".join(letters[rank] for rank in kept)
    total = Value(torch.einsum(spelled, *(_computed(task, v, t).data for v in (a, b))), kept, t)
    if node.update is not None:
        total = _apply(task, "add", [total, _evaluate(task, node.update)])
    _define(task, node.dst, node.ranks, total, t)
    if node.post is not None:
        _define(task, node.dst, node.ranks, _evaluate(task, node.post), t)


def _rounded(task: _Task, value: Value, t: DType) -> Value:
    """An operand as a matrix unit of type `t` takes it."""
    if task.promoted or not t.is_float or t.bits >= 32:
        return value
    return replace(value, data=ops.cast(_computed(task, value, f32).data, t, promoted=False), dtype=t)


def _store(task: _Task, node: Store) -> None:
    result = task.outputs[node.tensor]
    coordinates = [_computed(task, _evaluate(task, c), i64) for c in node.coords]
    ranks = union(*coordinates)
    value = _evaluate(task, node.expr)
    t = result.output.dtype
    settled = replace(value, data=ops.settle(_computed(task, value, t).data, t, weak=False, promoted=task.promoted))
    shape = [_lanes_of(task, rank).size for rank in ranks]
    inside = _valid(task, ranks).expand(shape)
    indices = [aligned(c, ranks).expand(shape) for c in coordinates]
    for index, extent in zip(indices, result.data.shape, strict=True):
        inside = inside & (index >= 0) & (index < extent)
    place = tuple(index[inside] for index in indices)
    owners = result.owner[place]
    if bool(((owners >= 0) & (owners != task.number)).any()):
        raise CascadeError(f"two tasks store the same element of {node.tensor}", statement=task.program.name)
    result.owner[place] = task.number
    result.data[place] = aligned(settled, ranks).expand(shape)[inside].to(result.data.dtype)


# Expressions ------------------------------------------------------------------------------------------------------------------------


def _evaluate(task: _Task, e: Expr) -> Value:
    match e:
        case Const(value=literal):
            t = boolean if isinstance(literal, bool) else i64 if isinstance(literal, int) else f32
            return Value(torch.tensor(literal, dtype=_compute(task, t) if t.is_float else None), (), t, True)
        case Scalar(name=name):
            return Value(torch.tensor(float(task.scalars[name]), dtype=_compute(task, f32)), (), f32, True)
        case Index(rank=rank):
            return _index(task, rank)
        case Extent(rank=rank):
            return _integer(task.extents[rank])
        case Start(rank=rank):
            return _integer(task.lanes[rank].start)
        case Count(rank=rank):
            lanes = task.lanes[rank]
            return _integer(min(lanes.size, task.extents[rank] - lanes.start))
        case Seen(rank=rank):
            lanes = task.lanes[rank]
            return _integer(min(lanes.start + lanes.size, task.extents[rank]))
        case Tile(name=name):
            if name not in task.tiles:
                raise CascadeError(f"tile {name} is read before it is defined", statement=task.program.name)
            return task.tiles[name]
        case Read():
            return _read(task, e)
        case Masked(x=x, identity=identity):
            return _masked(task, _evaluate(task, x), identity)
        case Cast(x=x, dtype=t):
            inner = _evaluate(task, x)
            return Value(ops.cast(inner.data, t, promoted=task.promoted), inner.ranks, t)
        case Bitcast(x=x, dtype=t):
            return _bitcast(task, _evaluate(task, x), t)
        case Op(name=name, args=args):
            return _apply(task, name, [_evaluate(task, arg) for arg in args])
    raise AssertionError(f"not an expression: {e!r}")


def _integer(value: int) -> Value:
    return Value(torch.tensor(value), (), i32)


def _index(task: _Task, rank: str) -> Value:
    lanes = task.lanes[rank]
    if lanes.is_number:
        return _integer(lanes.start)
    indices = torch.arange(lanes.start, lanes.start + lanes.size)
    if task.clamped and lanes.within is not None:
        indices = indices.clamp(*lanes.within)
    return Value(indices, (rank,), i32)


def _compute(task: _Task, t: DType) -> torch.dtype:
    return ops.compute_type(t, weak=False, promoted=task.promoted)


def _computed(task: _Task, value: Value, t: DType) -> Value:
    data = value.data
    if data.element_size() == 1 and data.is_floating_point():
        data = data.to(torch.float32)
    return replace(value, data=data.to(_compute(task, t)))


def _apply(task: _Task, name: str, args: list[Value]) -> Value:
    """An operation; floats stay in the compute type, integers wrap around to theirs."""
    t, weak = operation_type(name, [(arg.dtype, arg.weak) for arg in args])
    ranks = union(*args)
    if name == "where":
        condition = aligned(args[0], ranks) != 0
        yes, no = (aligned(_computed(task, arg, t), ranks) for arg in args[1:])
        result = torch.where(condition, yes, no)
    else:
        joined = (args[0].dtype, args[0].weak)
        for arg in args[1:]:
            joined = combine(joined, (arg.dtype, arg.weak))
        common = t if OPS[name].kind in ("arith", "float") else joined[0]
        result = ops.apply(name, [aligned(_computed(task, arg, common), ranks) for arg in args], common)
    data = result.to(_compute(task, t)) if t.is_float else ops.settle(result, t, weak=weak, promoted=task.promoted)
    return Value(data, ranks, t, weak)


def _masked(task: _Task, value: Value, identity: Const) -> Value:
    if task.domain is None:
        return value
    ranks = union(value, task.domain)
    x = _computed(task, value, value.dtype)
    chosen = torch.where(aligned(task.domain, ranks), aligned(x, ranks), _literal(identity, value.dtype, x.data.dtype))
    return replace(value, data=chosen, ranks=ranks)


def _literal(literal: Const, t: DType, held: torch.dtype) -> Tensor:
    """A literal as an element of type `t`; an infinity among integers is the extreme of the type."""
    if not t.is_float and literal.value in (float("-inf"), float("inf")):
        return torch.tensor(ops.identity("max" if literal.value < 0 else "min", t)).to(held)
    return torch.tensor(literal.value).to(held)


def _bitcast(task: _Task, value: Value, t: DType) -> Value:
    source = i32 if value.weak and value.dtype == i64 and t.bits == 32 else value.dtype
    held = ops.settle(_computed(task, value, source).data, source, weak=False, promoted=False)
    result = Value(ops.bitcast(held, source, t), value.ranks, t)
    return _computed(task, result, t) if t.is_float else result


def _valid(task: _Task, ranks: Ranks) -> Tensor:
    """Which points of the current tile lie inside all extents."""
    valid = torch.ones((), dtype=torch.bool)
    for rank in ranks:
        index = _index(task, rank)
        valid = valid & (aligned(index, ranks) < task.extents[rank])
    return valid


def _read(task: _Task, e: Read) -> Value:
    """The elements at the coordinates: the fill, or garbage, where they leave the tensor; garbage in lanes outside an extent."""
    tensor = task.inputs.get(e.tensor)
    if tensor is None and e.tensor in task.outputs:  # what the task stored itself; the rest of it is poisoned
        result = task.outputs[e.tensor]
        own = torch.where(result.owner == task.number, result.data, torch.full_like(result.data, _poison(result.output.dtype)))
        tensor = Value(own, result.output.ranks, result.output.dtype)
    if tensor is None:
        raise CascadeError(f"'{e.tensor}' is no input", statement=task.program.name)
    reading = replace(task, clamped=True)
    coordinates = [_computed(task, _evaluate(reading, c), i64) for c in e.coords]
    ranks = union(*coordinates)
    valid = _valid(reading, ranks)
    inside, indices = torch.ones((), dtype=torch.bool), []
    for coordinate, extent in zip(coordinates, tensor.data.shape, strict=True):
        index = aligned(coordinate, ranks)
        inside = inside & (index >= 0) & (index < extent)
        indices.append(index.clamp(0, max(extent - 1, 0)))
    found = tensor.data[tuple(indices)] if tensor.data.numel() else tensor.data.new_zeros([]).expand(inside.shape)
    value = Value(found, ranks, tensor.dtype)
    x = _computed(task, value, tensor.dtype).data if tensor.dtype.is_float else found
    garbage = _garbage(task, tensor.dtype, x)
    outside = garbage if e.fill is None else _literal(e.fill, tensor.dtype, x.dtype)
    return replace(value, data=torch.where(valid, torch.where(inside, x, outside), garbage))


def _garbage(task: _Task, t: DType, clamped: Tensor) -> Tensor:
    """What a lane outside reads; of an integer the lowest value, of a bool True."""
    if task.garbage is None:
        return clamped
    if t.is_float:
        return torch.tensor(task.garbage, dtype=clamped.dtype)
    return torch.tensor(True if t == boolean else ops.identity("max", t)).to(clamped.dtype)
