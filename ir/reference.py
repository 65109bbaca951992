"""The meaning of a cascade: eager PyTorch, statement by statement, on tensors broadcast by rank name. It shares no code with lowering.

In the declared types each operation rounds to its type, as eager torch does; with `dtype=torch.float64` every float is a float64, and only
an explicit cast to a float of fewer than 32 bits still rounds. Where the language leaves a choice, this module is the definition:

- A sum forms the product it sums over in its accumulator (f32 for narrow floats, i32 for narrow integers) and rounds once.
- Points that a predicate skips, or that the other side of a select discards, are not read: a gather there may be out of range.
- An arg reduction gives the first occurrence, NaN being the extreme; over several ranks the position in row-major order; over nothing -1.
- A map with a predicate stores 0 where it is false. A scan passes a skipped point by: there its result is that of the point before.
- An integer divided by zero gives 0.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from . import reference_ops as ops
from .binding import bind_sizes, from_torch, to_torch
from .cascade import Cascade, Concat, Einsum, Iterate, Output, Populate, Scan, Scatter, Statement, defined
from .errors import BindingError, CascadeError, EinfallError
from .expr import OPS, Bitcast, Cast, Const, Expr, Extent, Index, Op, Read, Scalar, reads
from .infer import combine, declared_types, expression_type
from .named import Ranks, Value, aligned, union
from .types import DType, accumulator, boolean, f32, i32, i64, reduced

__all__ = ["bind_sizes", "evaluate", "from_torch", "to_torch"]


@dataclass(frozen=True, slots=True)
class _Frame:
    """What an expression is evaluated in. `steps` are the current indices of the ranks of enclosing iterative blocks."""

    cascade: Cascade
    statement: Statement
    types: Mapping[str, DType]
    sizes: Mapping[str, int]
    scalars: Mapping[str, float]
    promoted: bool
    device: torch.device
    values: dict[str, Value]
    steps: Mapping[str, int] = field(default_factory=dict)


Guards = tuple[Value, ...]


def evaluate(
    cascade: Cascade,
    tensors: Mapping[str, Tensor],
    scalars: Mapping[str, float] | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> dict[str, Tensor]:
    """The outputs of `cascade` by name, in their declared types or, with `dtype=torch.float64`, in float64 throughout.

    Raises:
        BindingError: if a tensor or scalar is missing or does not fit, or a gathered index is out of range.
        CascadeError: if the cascade is malformed.
    """
    if dtype not in (None, torch.float64):
        raise BindingError(f"the reference runs in the declared types or in float64, not in {dtype}", cascade=cascade.name)
    sizes = bind_sizes(cascade, tensors, dtype=dtype)
    types = declared_types(cascade)
    promoted = dtype is not None
    device = next((t.device for t in tensors.values()), torch.device("cpu"))
    bound = _bind_scalars(cascade, scalars or {})
    with torch.no_grad():
        values = {}
        for declared in cascade.inputs:
            data = tensors[declared.name].reshape([sizes[rank] for rank in declared.ranks])
            values[declared.name] = Value(_kept(data, declared.dtype, promoted), declared.ranks, declared.dtype)
        for statement in cascade.body:
            frame = _Frame(cascade, statement, types, sizes, bound, promoted, device, values)
            values.update(_run(frame))
        return {output.name: _output(output, values, cascade, sizes) for output in cascade.outputs}


def _kept(data: Tensor, dtype: DType, promoted: bool) -> Tensor:
    """An input as values are kept; a narrow float goes through f32, the one conversion that every narrow type has."""
    target = ops.storage_type(dtype, weak=False, promoted=promoted)
    return data if data.dtype == target else data.to(torch.float32 if data.element_size() == 1 else target).to(target)


def _bind_scalars(cascade: Cascade, scalars: Mapping[str, float]) -> dict[str, float]:
    names = [declared.name for declared in cascade.scalars]
    for name in names:
        if name not in scalars:
            raise BindingError(f"no value given for scalar {name}", cascade=cascade.name, hint=f"pass {name}=...")
    for name in scalars:
        if name not in names:
            raise BindingError(f"'{name}' is no scalar", cascade=cascade.name, hint=f"the scalars are {', '.join(names) or '(none)'}")
    return {name: float(scalars[name]) for name in names}


def _output(output: Output, values: Mapping[str, Value], cascade: Cascade, sizes: Mapping[str, int]) -> Tensor:
    """A result in the axes it is returned in, as a fresh contiguous tensor."""
    if output.name not in values:
        raise CascadeError(f"output {output.name} is defined by no statement", cascade=cascade.name)
    value = values[output.name]
    if sorted(value.ranks) != sorted(output.ranks):
        raise CascadeError(f"output {output.name} is declared over {output.ranks}, but defined over {value.ranks}", cascade=cascade.name)
    shape = [1] * len(output.axes)
    for position, axis in enumerate(output.axes):
        for rank in axis:
            shape[position] *= sizes[rank]
    return aligned(value, output.ranks).clone(memory_format=torch.contiguous_format).reshape(shape)


def _run(frame: _Frame) -> dict[str, Value]:
    """What a statement defines. Errors name the statement."""
    try:
        match frame.statement:
            case Einsum(op=None) as s:
                return {s.out: _map(frame, s)}
            case Einsum() as s:
                return {s.out: _reduction(frame, s, s.op or "")}
            case Scan() as s:
                return {s.out: _scan(frame, s)}
            case Populate() as s:
                return _populate(frame, s)
            case Scatter() as s:
                return {s.out: _scatter(frame, s)}
            case Concat() as s:
                return {s.out: _concat(frame, s)}
            case Iterate() as s:
                return _iterate(frame, s)
    except EinfallError as error:
        if error.statement is not None:
            raise
        names = ", ".join(name for name, _ in defined(frame.statement))
        where = frame.statement.location
        raise type(error)(error.what, cascade=frame.cascade.name, statement=names, location=where, hint=error.hint) from None


# Ranks ------------------------------------------------------------------------------------------------------------------------------


def _spread(frame: _Frame, value: Value, ranks: Ranks) -> Tensor:
    """`value` broadcast to every point of `ranks`, as a view."""
    return aligned(value, ranks).expand([frame.sizes[rank] for rank in ranks])


def _computed(frame: _Frame, value: Value, t: DType, weak: bool = False) -> Value:
    """`value` in the compute type of `t`."""
    data = value.data
    target = ops.compute_type(t, weak=weak, promoted=frame.promoted)
    if data.element_size() == 1 and data.is_floating_point():
        data = data.to(torch.float32)
    return replace(value, data=data.to(target))


def _settled(frame: _Frame, data: Tensor, ranks: Ranks, t: DType, weak: bool = False) -> Value:
    return Value(ops.settle(data, t, weak=weak, promoted=frame.promoted), ranks, t, weak)


def _defined(frame: _Frame, name: str, value: Value, ranks: Ranks) -> Value:
    """`value` as the tensor `name[ranks]` in its declared type."""
    t = frame.types[name]
    settled = _settled(frame, _computed(frame, value, t).data, value.ranks, t)
    return Value(_spread(frame, settled, ranks), ranks, t)


# Expressions ------------------------------------------------------------------------------------------------------------------------


def _evaluate(frame: _Frame, e: Expr, guards: Guards = ()) -> Value:
    """The value of an expression. Only the points at which all `guards` hold count."""
    match e:
        case Const(value=literal):
            dtype = torch.bool if isinstance(literal, bool) else torch.int64 if isinstance(literal, int) else torch.float64
            t, weak = expression_type(e, frame.types)
            return Value(torch.tensor(literal, dtype=dtype, device=frame.device), (), t, weak)
        case Scalar(name=name):
            if name not in frame.scalars:
                raise CascadeError(f"unknown scalar '{name}'")
            return Value(torch.tensor(frame.scalars[name], dtype=torch.float64, device=frame.device), (), f32, True)
        case Index(rank=rank) if rank in frame.steps:
            return Value(torch.tensor(frame.steps[rank], dtype=torch.int32, device=frame.device), (), i32)
        case Index(rank=rank):
            return Value(torch.arange(frame.sizes[rank], dtype=torch.int32, device=frame.device), (rank,), i32)
        case Extent(rank=rank):
            return Value(torch.tensor(frame.sizes[rank], dtype=torch.int32, device=frame.device), (), i32)
        case Read():
            return _read(frame, e, guards)
        case Cast(x=x, dtype=t):
            value = _evaluate(frame, x, guards)
            return Value(ops.cast(value.data, t, promoted=frame.promoted), value.ranks, t)
        case Bitcast(x=x, dtype=t):
            return _bitcast(frame, _evaluate(frame, x, guards), t)
        case Op(name="where", args=(condition, a, b)):
            return _select(frame, e, _evaluate(frame, condition, guards), a, b, guards)
        case Op(name=name, args=args):
            return _operation(frame, e, name, [_evaluate(frame, arg, guards) for arg in args])
        case _:
            raise CascadeError(f"{type(e).__name__} belongs to tile programs only")


def _operation(frame: _Frame, e: Op, name: str, args: list[Value]) -> Value:
    t, weak = expression_type(e, frame.types)
    kind = OPS[name].kind
    joined = (args[0].dtype, args[0].weak)
    for arg in args[1:]:
        joined = combine(joined, (arg.dtype, arg.weak))
    common, common_weak = (t, weak) if kind in ("arith", "float") else joined
    ranks = union(*args)
    operands = [aligned(_computed(frame, arg, common, common_weak), ranks) for arg in args]
    return _settled(frame, ops.apply(name, operands, common), ranks, t, weak)


def _select(frame: _Frame, e: Op, condition: Value, a: Expr, b: Expr, guards: Guards) -> Value:
    t, weak = expression_type(e, frame.types)
    chosen = replace(condition, data=condition.data != 0, dtype=boolean)
    yes = _computed(frame, _evaluate(frame, a, (*guards, chosen)), t, weak)
    no = _computed(frame, _evaluate(frame, b, (*guards, replace(chosen, data=~chosen.data))), t, weak)
    ranks = union(chosen, yes, no)
    return _settled(frame, torch.where(aligned(chosen, ranks), aligned(yes, ranks), aligned(no, ranks)), ranks, t, weak)


def _bitcast(frame: _Frame, value: Value, t: DType) -> Value:
    source = value.dtype
    if value.weak and source == i64 and t.bits == 32:
        source = i32
    held = ops.settle(_computed(frame, value, source).data, source, weak=False, promoted=False)
    return Value(_kept(ops.bitcast(held, source, t), t, frame.promoted), value.ranks, t)


def _read(frame: _Frame, e: Read, guards: Guards) -> Value:
    tensor = frame.values.get(e.tensor)
    if tensor is None:
        raise CascadeError(f"'{e.tensor}' is read before it is defined")
    if len(e.coords) != len(tensor.ranks):
        raise CascadeError(f"{e.tensor}[{', '.join(tensor.ranks)}] is read with {len(e.coords)} coordinates")
    names = tuple(c.rank for c in e.coords if isinstance(c, Index) and c.rank not in frame.steps)
    if len(set(names)) == len(e.coords) and [frame.sizes[rank] for rank in names] == list(tensor.data.shape):
        return replace(tensor, ranks=names)
    coordinates = [_computed(frame, _evaluate(frame, c, guards), i64) for c in e.coords]
    ranks = union(*coordinates)
    indices, inside = [], torch.tensor(True, device=frame.device)
    for c, coordinate, extent, rank in zip(e.coords, coordinates, tensor.data.shape, tensor.ranks, strict=True):
        fits = replace(coordinate, data=(coordinate.data >= 0) & (coordinate.data < extent))
        if not fits.data.all():
            _check_outside(e, c, coordinate, fits, rank, extent, guards)
            inside = inside & aligned(fits, ranks)
        indices.append(aligned(coordinate, ranks).clamp(0, max(extent - 1, 0)))
    if 0 in tensor.data.shape:
        data = tensor.data.new_zeros([]).expand([frame.sizes[rank] for rank in ranks])
    else:
        data = tensor.data[tuple(indices)] if indices else tensor.data
    if not inside.all():
        fill = _settled(frame, _computed(frame, _evaluate(frame, e.fill or Const(0)), tensor.dtype).data, (), tensor.dtype)
        data = torch.where(inside, data, fill.data)
    return replace(tensor, data=data, ranks=ranks)


def _check_outside(e: Read, c: Expr, coordinate: Value, fits: Value, rank: str, extent: int, guards: Guards) -> None:
    """Raises if a coordinate that counts leaves the tensor and no fill value covers it; a gathered one must never leave it."""
    gathered = next(reads(c), None)
    if gathered is None and e.fill is not None:
        return
    ranks = union(coordinate, *guards)
    bad = ~aligned(fits, ranks)
    for guard in guards:
        bad = bad & aligned(guard, ranks)
    if not bad.any():
        return
    found = int(aligned(coordinate, ranks).expand(bad.shape)[bad][0])
    if gathered is not None:
        raise BindingError(
            f"gathered index {found} from {gathered.tensor} is outside rank {rank} of {e.tensor}, which has extent {extent}",
            hint=f"indices must lie in 0 .. {extent - 1}, or be skipped by a predicate",
        )
    raise BindingError(
        f"index {found} is outside rank {rank} of {e.tensor}, which has extent {extent}",
        hint="give the access a fill value, or restrict it by a predicate",
    )


# Statements -------------------------------------------------------------------------------------------------------------------------


def _predicate(frame: _Frame, where: Expr | None) -> Value | None:
    if where is None:
        return None
    value = _evaluate(frame, where)
    return replace(value, data=value.data != 0, dtype=boolean)


def _guarded(frame: _Frame, e: Expr, where: Value | None) -> Value:
    return _evaluate(frame, e, () if where is None else (where,))


def _points(frame: _Frame, value: Value, where: Value | None, ranks: Ranks) -> tuple[Tensor, Tensor | None]:
    """`value` in its compute type and the predicate, both broadcast to all points of `ranks`."""
    data = _spread(frame, _computed(frame, value, value.dtype), ranks)
    return data, None if where is None else _spread(frame, where, ranks)


def _map(frame: _Frame, s: Einsum) -> Value:
    where = _predicate(frame, s.where)
    value = _guarded(frame, s.expr, where)
    if where is not None:
        ranks = union(where, value)
        data = aligned(_computed(frame, value, value.dtype, value.weak), ranks)
        value = _settled(frame, torch.where(aligned(where, ranks), data, 0), ranks, value.dtype, value.weak)
    return _defined(frame, s.out, value, s.ranks)


def _reduction(frame: _Frame, s: Einsum, op: str) -> Value:
    where = _predicate(frame, s.where)
    value = _summand(frame, s.expr, where) if op == "sum" else _guarded(frame, s.expr, where)
    if isinstance(value, list):
        contracted = _contraction(s.over, value, where)
        if contracted is not None:
            return _defined(frame, s.out, contracted, s.ranks)
        value = _product(value)
    free = union(value, () if where is None else where)
    kept = tuple(rank for rank in s.ranks if rank in free and rank not in s.over)
    x, valid = _points(frame, value, where, (*kept, *s.over))
    result = ops.reduce(op, x, valid, value.dtype, len(s.over))
    return _defined(frame, s.out, Value(result, kept, reduced(op, value.dtype)), s.ranks)


def _summand(frame: _Frame, e: Expr, where: Value | None) -> Value | list[Value]:
    """What a sum adds up; the factors, in the compute type of the accumulator, if it is a product."""
    if not (isinstance(e, Op) and e.name == "mul"):
        return _guarded(frame, e, where)
    t = accumulator(expression_type(e, frame.types)[0])
    return [replace(_computed(frame, _guarded(frame, factor, where), t), dtype=t) for factor in _factors(e)]


def _factors(e: Expr) -> list[Expr]:
    if isinstance(e, Op) and e.name == "mul":
        return [factor for arg in e.args for factor in _factors(arg)]
    return [e]


def _product(factors: list[Value]) -> Value:
    ranks = union(*factors)
    data = aligned(factors[0], ranks)
    for factor in factors[1:]:
        data = data * aligned(factor, ranks)
    return Value(data, ranks, factors[0].dtype)


def _contraction(over: Ranks, factors: list[Value], where: Value | None) -> Value | None:
    """The sum of a product of floats by `torch.einsum`, or None unless that saves the product of more ranks than any factor has."""
    if where is not None:
        factors = _selected(factors, where)
    ranks = union(*factors)
    if not factors or not factors[0].dtype.is_float or not set(over) <= set(ranks) or any(len(f.ranks) == len(ranks) for f in factors):
        return None
    letters = {rank: chr(ord("a") + k) for k, rank in enumerate(ranks)}
    kept = tuple(rank for rank in ranks if rank not in over)
    spelled = [",".join("".join(letters[rank] for rank in f.ranks) for f in factors), "".join(letters[rank] for rank in kept)]
    return Value(torch.einsum("->".join(spelled), *(f.data for f in factors)), kept, factors[0].dtype)


def _selected(factors: list[Value], where: Value) -> list[Value]:
    """`factors` with one of them 0 where the predicate is false; none if no factor has its ranks or another factor is not finite."""
    home = next((k for k, f in enumerate(factors) if set(where.ranks) <= set(f.ranks)), None)
    if home is None or not all(bool(torch.isfinite(f.data).all()) for k, f in enumerate(factors) if k != home):
        return []
    masked = torch.where(aligned(where, factors[home].ranks), factors[home].data, 0)
    return [replace(f, data=masked) if k == home else f for k, f in enumerate(factors)]


def _scan(frame: _Frame, s: Scan) -> Value:
    where = _predicate(frame, s.where)
    value = _guarded(frame, s.expr, where)
    ranks = (*(rank for rank in s.ranks if rank != s.over), s.over)
    x, valid = _points(frame, value, where, ranks)
    if valid is not None:
        x = torch.where(valid, x, ops.identity(s.op, value.dtype))
    return _defined(frame, s.out, Value(ops.scan(s.op, x, value.dtype, exclusive=s.exclusive), ranks, value.dtype), s.ranks)


def _populate(frame: _Frame, s: Populate) -> dict[str, Value]:
    where = _predicate(frame, s.where)
    value = _guarded(frame, s.expr, where)
    batch = tuple(rank for rank in s.ranks if rank != s.into)
    x, valid = _points(frame, value, where, (*batch, s.over))
    valid = torch.ones_like(x, dtype=torch.bool) if valid is None else valid
    if s.rule == "threshold":
        keep = valid & (x >= _parameter(frame, s, batch))
        order = torch.sort((~keep).to(torch.int8), dim=-1, stable=True).indices
        keep = keep.gather(-1, order)
    else:
        order = torch.sort(x, dim=-1, descending=True, stable=True).indices
        order = order.gather(-1, torch.sort((~valid.gather(-1, order)).to(torch.int8), dim=-1, stable=True).indices)
        keep = valid.gather(-1, order)
    if s.rule == "mass":
        before = ops.scan("sum", torch.where(keep, x.gather(-1, order), 0), value.dtype, exclusive=True)
        keep = keep & (before < _parameter(frame, s, batch)).to(torch.int8).cumprod(-1).bool()
    slots = min(frame.sizes[s.into], order.shape[-1])
    spare = (0, frame.sizes[s.into] - slots)
    found = torch.where(keep, x.gather(-1, order), 0)[..., :slots]
    places = torch.where(keep, order, -1)[..., :slots]
    ranks = (*batch, s.into)
    return {
        s.values: _defined(frame, s.values, Value(torch.nn.functional.pad(found, spare), ranks, value.dtype), s.ranks),
        s.coords: _defined(frame, s.coords, Value(torch.nn.functional.pad(places, spare, value=-1), ranks, i32), s.ranks),
    }


def _parameter(frame: _Frame, s: Populate, batch: Ranks) -> Tensor:
    if s.parameter is None:
        raise CascadeError(f"populate by {s.rule} needs a parameter")
    value = _evaluate(frame, s.parameter)
    return aligned(_computed(frame, value, value.dtype, value.weak), (*batch, s.over))


def _scatter(frame: _Frame, s: Scatter) -> Value:
    where = _predicate(frame, s.where)
    value = _guarded(frame, s.expr, where)
    coordinates = {rank: _computed(frame, _guarded(frame, e, where), i64) for rank, e in s.at}
    space = union(tuple(rank for rank in s.ranks if rank not in coordinates), s.over)
    x, valid = _points(frame, value, where, space)
    place = torch.zeros((), dtype=torch.int64, device=frame.device)
    keep = torch.ones((), dtype=torch.bool, device=frame.device) if valid is None else valid
    for rank in s.ranks:
        coordinate = coordinates.get(rank)
        index = aligned(_evaluate(frame, Index(rank)) if coordinate is None else coordinate, space)
        keep = keep & (index >= 0) & (index < frame.sizes[rank])
        place = place * frame.sizes[rank] + index
    shape = [frame.sizes[rank] for rank in s.ranks]
    keep, place = keep.expand(x.shape), place.expand(x.shape)
    flat = x.new_zeros(torch.Size(shape).numel())
    flat.index_add_(0, place[keep], x[keep])
    return _defined(frame, s.out, Value(flat.reshape(shape), s.ranks, reduced("sum", value.dtype)), s.ranks)


def _concat(frame: _Frame, s: Concat) -> Value:
    t = frame.types[s.out]
    parts = []
    for piece, e in s.parts:
        ranks = tuple(piece if rank == s.rank else rank for rank in s.ranks)
        parts.append(_spread(frame, _computed(frame, _evaluate(frame, e), t), ranks))
    return _defined(frame, s.out, Value(torch.cat(parts, s.ranks.index(s.rank)), s.ranks, t), s.ranks)


def _iterate(frame: _Frame, s: Iterate) -> dict[str, Value]:
    states = {state.name: _defined(frame, state.name, _evaluate(frame, state.init), state.ranks) for state in s.states}
    for step in range(frame.sizes[s.rank]):
        inner = replace(frame, values={**frame.values, **states}, steps={**frame.steps, s.rank: step})
        for statement in s.body:
            inner.values.update(_run(replace(inner, statement=statement)))
        states = {state.name: _defined(frame, state.name, _evaluate(inner, state.next), state.ranks) for state in s.states}
        if s.until is not None:
            stop = _evaluate(replace(inner, values={**inner.values, **states}), s.until)
            if stop.ranks:
                raise CascadeError(f"the stop condition varies over {', '.join(stop.ranks)}, expected one value")
            if bool(stop.data):
                break
    return states
