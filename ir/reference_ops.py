"""Single operations of the eager reference in torch: how a type is computed in and rounded to, maps, casts, reductions of one tensor.

Floats are computed in f32 (f64 for f64, for weak operands and when everything is promoted) and rounded to their type after each operation,
which is what torch does for narrow floats. Integers are computed in int64 and wrap around to their type.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .binding import to_torch
from .errors import CascadeError
from .types import DType

_F4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_TORCH_FUNCTIONS = {
    "or": "bitwise_or", "xor": "bitwise_xor", "and": "bitwise_and", "not": "bitwise_not", "div": "true_divide", "round": "round",
    "add": "add", "sub": "sub", "mul": "mul", "pow": "pow", "eq": "eq", "ne": "ne", "lt": "lt", "le": "le", "gt": "gt", "ge": "ge",
    "neg": "neg", "minimum": "minimum", "maximum": "maximum", "abs": "abs", "sign": "sign",
    "exp": "exp", "exp2": "exp2", "log": "log", "log2": "log2", "log1p": "log1p", "sqrt": "sqrt", "rsqrt": "rsqrt", "sin": "sin",
    "cos": "cos", "tanh": "tanh", "sigmoid": "sigmoid", "erf": "erf", "floor": "floor", "ceil": "ceil", "trunc": "trunc",
    "isnan": "isnan", "isinf": "isinf", "isfinite": "isfinite",
}  # fmt: skip
_ROUNDINGS = ("floor", "ceil", "round", "trunc")


def compute_type(t: DType, *, weak: bool, promoted: bool) -> torch.dtype:
    """The torch type in which values of type `t` are computed."""
    if not t.is_float:
        return torch.int64
    return torch.float64 if weak or promoted or t.bits == 64 else torch.float32


def storage_type(t: DType, *, weak: bool, promoted: bool) -> torch.dtype:
    """The torch type in which values of type `t` are kept between operations."""
    if t.kind == "bool":
        return torch.bool
    if weak or (promoted and t.is_float):
        return compute_type(t, weak=weak, promoted=promoted)
    return to_torch(t)


def settle(x: Tensor, t: DType, *, weak: bool, promoted: bool) -> Tensor:
    """A computed `x` as it is kept: rounded, or wrapped around, to `t`."""
    if t.name == "i4":
        return ((x.to(torch.int64) + 8) & 15).sub(8).to(torch.int8)
    if t.name == "f4e2m1" and not (weak or promoted):
        return round_f4(x).to(torch.float8_e4m3fn)
    return x.to(storage_type(t, weak=weak, promoted=promoted))


def cast(x: Tensor, t: DType, *, promoted: bool) -> Tensor:
    """`x` converted to `t`: promoted or not, a cast to a float of fewer than 32 bits rounds and one to an integer truncates."""
    wide = x
    if x.dtype not in (torch.float64, torch.float32, torch.int64):
        wide = x.to(torch.float32 if x.dtype.is_floating_point else torch.int64)
    if t.kind == "bool":
        return wide != 0
    if not t.is_float:
        return settle(wide.to(torch.int64), t, weak=False, promoted=promoted)
    if t.bits < 32:
        rounded = settle(wide if wide.is_floating_point() else wide.to(torch.float64), t, weak=False, promoted=False)
        return rounded.to(torch.float32).to(torch.float64) if promoted else rounded
    return wide.to(storage_type(t, weak=False, promoted=promoted))


def round_f4(x: Tensor) -> Tensor:
    """`x` rounded to the nearest f4e2m1 value, ties to the even code, saturated at 6; NaN becomes 6, for the format has none."""
    magnitude = x.abs().to(torch.float64)
    step = torch.where(magnitude < 2, 0.5, torch.where(magnitude < 4, 1.0, 2.0))
    rounded = torch.round(magnitude / step) * step
    return torch.copysign(torch.nan_to_num(rounded, nan=6.0, posinf=6.0).clamp(max=6.0), x.to(torch.float64))


def bitcast(x: Tensor, source: DType, target: DType) -> Tensor:
    """The bits of `x`, kept as `source`, read as `target`."""
    if source.bits != target.bits:
        what = f"the {source.bits} bits of {source} do not make a {target} of {target.bits} bits"
        raise CascadeError(what, hint="bitcast to a type of the same size")
    if source.bits == 4:
        return _from_code(_to_code(x, source), target)
    return x.contiguous().view(to_torch(target))


def _to_code(x: Tensor, t: DType) -> Tensor:
    if t.name == "i4":
        return x.to(torch.int64) & 15
    values = torch.tensor(_F4_VALUES, dtype=torch.float32, device=x.device)
    wide = x.to(torch.float32)
    return torch.searchsorted(values, wide.abs()) + 8 * torch.signbit(wide)


def _from_code(code: Tensor, t: DType) -> Tensor:
    if t.name == "i4":
        return ((code + 8) & 15).sub(8).to(torch.int8)
    values = torch.tensor(_F4_VALUES + tuple(-v for v in _F4_VALUES), dtype=torch.float32, device=code.device)
    return values[code].to(torch.float8_e4m3fn)


def apply(name: str, args: list[Tensor], operands: DType) -> Tensor:
    """An operation on aligned tensors that are in the compute type of `operands`, their common type."""
    match name:
        case "exact":
            return args[0]
        case "not" if operands.kind == "bool":
            return args[0] == 0
        case "shl" | "shr":
            return _shift(name, args[0], args[1], operands.bits)
        case "floordiv" | "mod":
            return _floor_division(name, args[0], args[1])
        case "popcount" | "clz":
            return _count(name, args[0], operands)
        case _ if name in _ROUNDINGS and not operands.is_float:
            return args[0]
        case _:
            result: Tensor = getattr(torch, _TORCH_FUNCTIONS[name])(*args)
            return result


def _shift(name: str, x: Tensor, by: Tensor, bits: int) -> Tensor:
    """Shifts by at least the width give 0 to the left and the sign to the right; the right shift of a signed type keeps the sign."""
    if name == "shl":
        return torch.where((by >= 0) & (by < bits), x << by.clamp(0, 63), 0)
    return x >> torch.where((by >= 0) & (by < bits), by, 63)


def _floor_division(name: str, a: Tensor, b: Tensor) -> Tensor:
    """Quotient or remainder with floor semantics; an integer divided by zero gives 0, so that a select may discard it."""
    function = torch.floor_divide if name == "floordiv" else torch.remainder
    if a.is_floating_point():
        return function(a, b)
    zero = b == 0
    return torch.where(zero, 0, function(a, torch.where(zero, 1, b)))


def _count(name: str, x: Tensor, t: DType) -> Tensor:
    if t.is_float:
        raise CascadeError(f"'{name}' needs an integer, found {t}", hint="bitcast to an integer type first")
    result = torch.zeros_like(x)
    unsigned = x if t.bits == 64 else x & ((1 << t.bits) - 1)
    for k in range(t.bits):
        shifted = unsigned >> k
        result += (shifted & 1) if name == "popcount" else (shifted == 0)
    return result


def identity(op: str, t: DType) -> float | int:
    """What a reduction by `op` over no points of type `t` gives; -1 for an arg reduction."""
    match op:
        case "sum" | "any":
            return 0
        case "prod" | "all":
            return 1
        case "argmax" | "argmin":
            return -1
    if t.is_float:
        return float("-inf") if op == "max" else float("inf")
    lowest = {"bool": 0, "uint": 0, "int": -(1 << (t.bits - 1))}[t.kind]
    highest = {"bool": 1, "uint": (1 << t.bits) - 1, "int": (1 << (t.bits - 1)) - 1}[t.kind]
    return lowest if op == "max" else highest


def reduce(op: str, x: Tensor, valid: Tensor | None, t: DType, axes: int) -> Tensor:
    """`op` over the last `axes` dimensions of `x`, whose elements are of type `t`; points where `valid` is false take no part."""
    x = x.flatten(-axes)
    valid = None if valid is None else valid.flatten(-axes)
    if op in ("argmax", "argmin"):
        return _arg_reduce(op, x, valid, t)
    empty = identity(op, t)
    if op in ("any", "all"):
        x = x != 0
        x = x if valid is None else (x & valid if op == "any" else x | ~valid)
        return x.any(-1) if op == "any" else x.all(-1)
    if valid is not None:
        x = torch.where(valid, x, empty)
    if op == "sum":
        return x.sum(-1)
    if op == "prod":
        return x.prod(-1)
    if x.shape[-1] == 0:
        return x.new_full(x.shape[:-1], empty)
    return x.amax(-1) if op == "max" else x.amin(-1)


def _arg_reduce(op: str, x: Tensor, valid: Tensor | None, t: DType) -> Tensor:
    """The first valid position of the extreme value; NaN counts as the extreme, as in torch; -1 where there is none."""
    if x.shape[-1] == 0:
        return torch.full(x.shape[:-1], -1, dtype=torch.int64, device=x.device)
    best = reduce(op.removeprefix("arg"), x, valid, t, 1).unsqueeze(-1)
    hit = (x == best) | (torch.isnan(x) & torch.isnan(best))
    if valid is not None:
        hit &= valid
    first = hit.to(torch.int8).argmax(-1)
    return torch.where(hit.any(-1), first, -1)


def scan(op: str, x: Tensor, t: DType, *, exclusive: bool) -> Tensor:
    """The running reduction along the last dimension."""
    if exclusive:
        first = x.new_full((*x.shape[:-1], 1), identity(op, t))
        x = torch.cat([first, x], -1)[..., :-1]
    match op:
        case "sum":
            return x.cumsum(-1)
        case "prod":
            return x.cumprod(-1)
        case _ if x.shape[-1] == 0:
            return x
        case "max":
            return x.cummax(-1).values
        case _:
            return x.cummin(-1).values
