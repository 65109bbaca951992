"""What a caller gives, sorted and checked: extents by rank, arguments by position or name, tensors to write."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

from ..ir.binding import bind_sizes, from_torch, to_torch
from ..ir.cascade import Axis, Cascade
from ..ir.errors import BindingError
from ..ir.types import DTYPES, DType
from .scalars import converter


def complete_sizes(cascade: Cascade, dims: Mapping[str, int]) -> dict[str, int]:
    """The extent of every rank from those of the inputs' ranks.

    Raises:
        BindingError: `dims` names an unknown rank, contradicts a declared size, holds no whole number, or leaves an input's rank open.
    """
    ranks = cascade.all_ranks()
    for rank, extent in dims.items():
        if rank not in ranks:
            near = get_close_matches(rank, ranks, 1)
            hint = f"did you mean {near[0]}? " if near else ""
            raise BindingError(f"the cascade has no rank {rank!r}", cascade=cascade.name, hint=f"{hint}its ranks are {', '.join(ranks)}")
        if isinstance(extent, bool) or not isinstance(extent, int) or extent < 0:
            raise BindingError(f"rank {rank} is given the extent {extent!r}", cascade=cascade.name, hint="a whole number of 0 or more")
    sizes = cascade.solve_sizes({**dims, **cascade.static_sizes()})
    missing = dict.fromkeys(rank for tensor in cascade.inputs for rank in tensor.ranks if rank not in sizes)
    if missing:
        names = ", ".join(missing)
        raise BindingError(
            f"no extent given for rank{'s' if len(missing) > 1 else ''} {names}",
            cascade=cascade.name,
            hint="give every rank of the inputs, such as " + ",".join(f"{rank}={64}" for rank in missing),
        )
    shapes = {tensor.name: shape_of(tensor.axes, sizes) for tensor in cascade.inputs}
    found = bind_sizes(
        cascade, {t.name: torch.empty(shapes[t.name], dtype=to_torch(t.dtype), device="meta") for t in cascade.inputs}
    )
    for rank, extent in dims.items():
        if found[rank] != extent:
            raise BindingError(f"rank {rank} is given the extent {extent}, but the cascade makes it {found[rank]}", cascade=cascade.name)
    return found


def types_of(given: Mapping[str, object], kernel: str) -> dict[str, DType]:
    """The element types of the tensors among `given`. Raises `BindingError` naming one of a type that einfall does not have."""
    types = {}
    for name, value in given.items():
        if isinstance(value, torch.Tensor):
            try:
                types[name] = from_torch(value.dtype)
            except BindingError:
                hint = "one of " + ", ".join(DTYPES)
                raise BindingError(f"{name} is of {value.dtype}, a type that kernels do not have", cascade=kernel, hint=hint) from None
    return types


def shape_of(axes: Sequence[Axis], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape of a tensor with these axes."""
    shape = []
    for axis in axes:
        size = 1
        for rank in axis:
            size *= sizes[rank]
        shape.append(size)
    return tuple(shape)


def spell(axes: Sequence[Axis]) -> str:
    """Axes in einops spelling: `b (n j)`."""
    return " ".join(axis[0] if len(axis) == 1 else f"({' '.join(axis)})" for axis in axes)


def arguments(cascade: Cascade, tensors: Sequence[Any], named: Mapping[str, Any]) -> tuple[tuple[torch.Tensor, ...], list[float | int]]:
    """Arguments sorted into the cascade's inputs and scalars. Raises `BindingError` for one that is missing, doubled or unknown."""
    names = [t.name for t in cascade.inputs]
    scalars = {s.name: s.dtype for s in cascade.scalars}
    if len(tensors) > len(names):
        raise BindingError(
            f"{len(tensors)} tensors given, expected {len(names)}: {', '.join(names)}",
            cascade=cascade.name,
            hint="scalars are given by name",
        )
    given = dict(zip(names, tensors, strict=False))
    values: dict[str, float | int] = {}
    for name, value in named.items():
        if name in scalars:
            values[name] = _number(cascade, name, value, scalars[name])
        elif name not in names:
            near = get_close_matches(name, [*names, *scalars], 1)
            known = ", ".join((*names, *scalars))
            raise BindingError(
                f"there is no argument {name!r}",
                cascade=cascade.name,
                hint=f"did you mean {near[0]}? The arguments are {known}" if near else f"the arguments are {known}",
            )
        elif name in given:
            raise BindingError(f"{name} is given twice, by position and by name", cascade=cascade.name)
        else:
            given[name] = value
    for name in names:
        if name not in given:
            axes = next(spell(t.axes) for t in cascade.inputs if t.name == name)
            order = ", ".join(names)
            raise BindingError(f"{name}[{axes}] is not given", cascade=cascade.name, hint=f"the tensors are {order}, in this order")
        if not isinstance(given[name], torch.Tensor):
            kind = type(given[name]).__name__
            raise BindingError(f"{name} is a {kind}, expected a torch.Tensor", cascade=cascade.name, hint=f"torch.as_tensor({name})")
        if given[name].layout is not torch.strided:
            raise BindingError(f"{name} has the layout {given[name].layout}", cascade=cascade.name, hint=f"{name}.to_dense()")
    for name in scalars:
        if name not in values:
            raise BindingError(f"the scalar {name} is not given", cascade=cascade.name, hint=f"{name}=... by name")
    return tuple(given[name] for name in names), [values[name] for name in scalars]


def _number(cascade: Cascade, name: str, value: Any, dtype: DType) -> float | int:
    try:
        return converter(dtype)(value)  # type: ignore[no-any-return]
    except (TypeError, ValueError, RuntimeError, OverflowError):
        kind = "a number" if dtype.is_float else "a whole number"
        raise BindingError(f"the scalar {name} is {value!r}, expected {kind}", cascade=cascade.name) from None


def strided_inputs(tensors: Mapping[str, torch.Tensor]) -> frozenset[str]:
    """The tensors whose elements along the last axis do not follow each other in memory."""
    return frozenset(name for name, t in tensors.items() if t.ndim and t.shape[-1] > 1 and t.stride(-1) != 1)


def given_outputs(
    cascade: Cascade,
    tensors: Sequence[torch.Tensor],
    out: torch.Tensor | Sequence[torch.Tensor],
    expected: Sequence[tuple[tuple[int, ...], torch.dtype]],
    device: torch.device,
) -> list[torch.Tensor]:
    """The tensors of `out` as a list, each fit to be written. Raises `BindingError` for a wrong one, or one that shares memory."""
    given = [out] if isinstance(out, torch.Tensor) else list(out)
    if len(given) != len(cascade.outputs):
        names = ", ".join(o.name for o in cascade.outputs)
        raise BindingError(f"out gives {len(given)} tensors, expected {len(cascade.outputs)}: {names}", cascade=cascade.name)
    others = list(zip((t.name for t in cascade.inputs), tensors, strict=True))
    for declared, tensor, (shape, dtype) in zip(cascade.outputs, given, expected, strict=True):
        what = f"out {declared.name}[{spell(declared.axes)}]"
        if not isinstance(tensor, torch.Tensor):
            raise BindingError(f"{what} is a {type(tensor).__name__}, expected a torch.Tensor", cascade=cascade.name)
        if tuple(tensor.shape) != shape or tensor.dtype != dtype or tensor.device != device:
            raise BindingError(
                f"{what} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}, expected {dtype} {list(shape)} on {device}",
                cascade=cascade.name,
                hint="leave out= away to have it allocated",
            )
        if tensor.requires_grad or any(n > 1 and s == 0 for n, s in zip(tensor.shape, tensor.stride(), strict=True)):
            raise BindingError(f"{what} is an expanded view or requires a gradient", cascade=cascade.name, hint="a tensor of its own")
        if strided_inputs({declared.name: tensor}):
            raise BindingError(f"{what} is not contiguous along its last axis", cascade=cascade.name, hint="leave out= away")
        for name, other in others:
            if _overlap(tensor, other):
                raise BindingError(f"{what} shares memory with {name}", cascade=cascade.name, hint="kernels do not work in place")
        others.append((f"out {declared.name}", tensor))
    return given


def _overlap(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether the ranges of bytes from the first to the last element meet."""
    if a.numel() == 0 or b.numel() == 0:
        return False
    return a.data_ptr() < b.data_ptr() + _span(b) and b.data_ptr() < a.data_ptr() + _span(a)


def _span(tensor: torch.Tensor) -> int:
    return (1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))) * tensor.element_size()
