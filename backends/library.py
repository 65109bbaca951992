"""Statements that a plan leaves to PyTorch: sorts, selections, scatters and concatenations of tensors in memory.

    library_function(cascade, sizes)(*inputs, *outputs, *scalars)

`cascade` holds the one statement; its operands are the inputs at their own indices. A call writes the outputs and returns nothing, as
a kernel's launch does. Nothing is compiled: a sort of a library is better than one of ours, and the plan says where it is used.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ir.cascade import Axis, Cascade, Concat, Populate, Scatter, Statement
from ..ir.errors import UnsupportedError
from ..ir.expr import Const, Expr, Extent, Read, Scalar

Ranks = tuple[str, ...]
Function = Callable[..., None]


@dataclass(frozen=True, slots=True)
class _Operands:
    """The tensors and scalars of a call, by name, and the extents."""

    cascade: Cascade
    sizes: Mapping[str, int]
    tensors: Mapping[str, Tensor]
    scalars: Mapping[str, float]

    def spread(self, e: Expr, ranks: Ranks) -> Tensor:
        """The operand `e` with exactly these ranks, in this order; those it lacks are broadcast."""
        assert isinstance(e, Read)
        own = self.cascade.tensor_ranks()[e.tensor]
        x = self.tensors[e.tensor]
        order = [own.index(r) for r in ranks if r in own]
        x = x.permute(order)[tuple(slice(None) if r in own else None for r in ranks)]
        return x.expand([self.sizes[r] for r in ranks])

    def number(self, e: Expr, ranks: Ranks) -> Tensor | float:
        """A parameter: a number, or a tensor to compare with one of these ranks."""
        match e:
            case Const(value=value):
                return value
            case Scalar(name=name):
                return self.scalars[name]
            case Extent(rank=rank):
                return self.sizes[rank]
            case _:
                return self.spread(e, ranks)


def library_function(cascade: Cascade, sizes: Mapping[str, int]) -> Function:
    """The call that computes the statement of `cascade` at these extents."""
    (statement,) = cascade.body
    inputs, outputs, scalars = cascade.inputs, cascade.outputs, cascade.scalars
    counts = len(inputs), len(inputs) + len(outputs)

    def call(*given: Any) -> None:
        tensors = {t.name: logical_view(x, t.axes, sizes) for t, x in zip(inputs, given[: counts[0]], strict=True)}
        numbers = {s.name: x for s, x in zip(scalars, given[counts[1] :], strict=True)}
        results = _run(statement, _Operands(cascade, sizes, tensors, numbers))
        for o, memory in zip(outputs, given[counts[0] : counts[1]], strict=True):
            values, ranks = results[o.name]
            logical_view(memory, o.axes, sizes).copy_(values.permute([ranks.index(r) for r in o.ranks]))

    return call


def _run(s: Statement, given: _Operands) -> dict[str, tuple[Tensor, Ranks]]:
    """What the statement defines, each with the ranks of its dimensions."""
    match s:
        case Populate():
            return _populate(s, given)
        case Scatter():
            return _scatter(s, given)
        case Concat():
            return _concat(s, given)
        case _:
            raise UnsupportedError(f"{type(s).__name__} is no library call", cascade=given.cascade.name)


def logical_view(x: Tensor, axes: tuple[Axis, ...], sizes: Mapping[str, int]) -> Tensor:
    """A tensor in memory with one dimension a rank."""
    for i, axis in reversed(list(enumerate(axes))):
        if len(axis) > 1:
            x = x.view([*x.shape[:i], *(sizes[r] for r in axis), *x.shape[i + 1 :]])
    return x


def _populate(s: Populate, given: _Operands) -> dict[str, tuple[Tensor, Ranks]]:
    batch = tuple(r for r in s.ranks if r != s.into)
    x = given.spread(s.expr, (*batch, s.over))
    valid = None if s.where is None else given.spread(s.where, (*batch, s.over)).bool()
    slots = given.sizes[s.into]
    if s.rule == "threshold":
        assert s.parameter is not None
        kept = x >= given.number(s.parameter, (*batch, s.over))
        kept = kept if valid is None else kept & valid
        order = torch.argsort(~kept, dim=-1, stable=True)
        kept = kept.gather(-1, order)
    else:
        order = torch.argsort(x, dim=-1, descending=True, stable=True)
        if valid is None:
            kept = torch.ones_like(order, dtype=torch.bool)
        else:
            order = order.gather(-1, torch.argsort(~valid.gather(-1, order), dim=-1, stable=True))
            kept = valid.gather(-1, order)
    values = x.gather(-1, order).masked_fill(~kept, 0)
    if s.rule == "mass":
        assert s.parameter is not None
        total = (values.float() if values.dtype != torch.float64 else values).cumsum(-1)
        before = torch.nn.functional.pad(total[..., :-1], (1, 0)) if total.shape[-1] else total
        reached = (before < given.number(s.parameter, (*batch, s.over))).cummin(-1).values
        kept = kept & reached
        values = values.masked_fill(~reached, 0)
    places = order.masked_fill(~kept, -1)
    spare = (0, max(slots - x.shape[-1], 0))
    values = torch.nn.functional.pad(values[..., :slots], spare)
    places = torch.nn.functional.pad(places[..., :slots], spare, value=-1)
    ranks = (*batch, s.into)
    return {s.values: (values, ranks), s.coords: (places, ranks)}


def _scatter(s: Scatter, given: _Operands) -> dict[str, tuple[Tensor, Ranks]]:
    named = dict(s.at)
    batch = tuple(r for r in s.ranks if r not in named)
    space = (*batch, *s.over)
    x = given.spread(s.expr, space)
    if x.is_floating_point() and x.dtype != torch.float64:
        x = x.float()
    place = torch.zeros((), dtype=torch.int64, device=x.device)
    inside = torch.ones((), dtype=torch.bool, device=x.device)
    for i, rank in enumerate((*batch, *named)):
        n = given.sizes[rank]
        if rank in named:
            at = given.spread(named[rank], space)
        else:
            at = torch.arange(n, device=x.device).view([n if j == i else 1 for j in range(len(space))])
        inside = inside & (at >= 0) & (at < n)
        place = place * n + at
    ranks = (*batch, *named)
    result = x.new_zeros([given.sizes[r] for r in ranks])
    inside, place = inside.expand(x.shape), place.expand(x.shape)
    result.view(-1).index_add_(0, place[inside], x[inside])
    return {s.out: (result, ranks)}


def _concat(s: Concat, given: _Operands) -> dict[str, tuple[Tensor, Ranks]]:
    parts = [given.spread(e, tuple(piece if r == s.rank else r for r in s.ranks)) for piece, e in s.parts]
    return {s.out: (torch.cat(parts, s.ranks.index(s.rank)), s.ranks)}
