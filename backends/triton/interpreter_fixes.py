"""Corrections of Triton's interpreter, which computes bf16 on raw bits and rounds narrow floats wrongly. Importing it imports Triton.

`install()` replaces the builder behind the interpreted language by one that

- computes bf16 in f32 and rounds to nearest even: arithmetic, comparisons, fused multiply-adds, unary functions, dots, literals, casts,
- converts to and from fp8 as torch does, saturating as the hardware does (`cvt.rn.satfinite`), and refuses fp8 arithmetic,
- takes the number of a pair with one NaN in `maximum` and `minimum`, as devices do, and rounds operands of tf32 dots to tf32,
- reduces and scans by trees of whole tensors with the combining function itself, in order; the stock ones go element by element, and
  take the place of an extreme from numpy whatever indices are given,
- gives the indices of `tl.range` as scalars of the kernel, where the stock one gives Python's numbers,
- evaluates `and`, `or` and `not` of tensors element by element,
- translates pointers: those of a launch are addresses in `Memory`, which knows every tensor's bounds.

Tried with Triton 3.6.0, 3.7.1 and 3.9.0. Anything else is held against what is expected before it is used.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from triton.runtime import interpreter as it

from ...ir.errors import UnsupportedError

__all__ = ["Handle", "Memory", "install", "installed", "it", "round_to_bf16", "tl"]
TRIED = "3.6.0, 3.7.1 and 3.9.0"
Array = Any  # a numpy array; numpy's own types say nothing of values that change their type
Handle = it.TensorHandle

_FLOAT_OPS = (
    np.add, np.subtract, np.multiply, np.divide, np.fmod, np.minimum, np.maximum, np.fmin, np.fmax,
    np.less, np.less_equal, np.greater, np.greater_equal, np.equal, np.not_equal,
)  # fmt: skip
_FP8 = {
    tl.float8e4nv: (torch.float8_e4m3fn, 448.0), tl.float8e5: (torch.float8_e5m2, 57344.0),
    tl.float8e4b8: (torch.float8_e4m3fnuz, 240.0), tl.float8e5b16: (torch.float8_e5m2fnuz, 57344.0),
}  # fmt: skip
_NAN = 0x7FC0


def widen(bits: Array) -> Array:
    """bf16 bits (uint16) as float32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


def round_to_bf16(x: Array) -> Array:
    """float32 as bf16 bits (uint16), to nearest even."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return np.where(np.isnan(x), np.uint16(_NAN), ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16))


def round_to_tf32(x: Array) -> Array:
    """float32 with ten bits of mantissa, to nearest, ties away from zero."""
    bits = np.asarray(x, np.float32).view(np.uint32).astype(np.uint64)
    return np.where(np.isfinite(x), ((bits + 0x1000) & 0xFFFFE000).astype(np.uint32).view(np.float32), x)


def _from_fp8(bits: Array, kind: Any) -> Array:
    codes = torch.from_numpy(np.ascontiguousarray(bits).view(np.uint8))
    return codes.view(_FP8[kind][0]).to(torch.float32).numpy().reshape(np.shape(bits))


def _to_fp8(x: Array, kind: Any) -> Array:
    dtype, limit = _FP8[kind]
    values = torch.from_numpy(np.ascontiguousarray(np.clip(x.astype(np.float32), -limit, limit)))
    return values.to(dtype).view(torch.uint8).numpy().reshape(np.shape(x))


def _is(handle: Any, kind: Any) -> bool:
    return bool(handle.dtype.scalar == kind) and handle.data.dtype != np.bool_


def _values(handle: Any) -> Array:
    """The numbers a handle stands for, in a type that numpy computes in."""
    if _is(handle, tl.bfloat16):
        return widen(handle.data)
    kind = handle.dtype.scalar
    return _from_fp8(handle.data, kind) if kind in _FP8 and handle.data.dtype != np.bool_ else handle.data


@dataclass(frozen=True, slots=True)
class Memory:
    """The tensors of a launch. A pointer holds the number of its tensor in the high bits and a place in it in the low ones.

    Args:
        names: of the tensors.
        addresses: of their first elements, in bytes.
        sizes: from the first byte to behind the last one.
    """

    names: tuple[str, ...]
    addresses: Array
    sizes: Array

    SHIFT = 44  # bits of a place; it starts in the middle, so that a place before the tensor is one too
    MIDDLE = 1 << 43

    @staticmethod
    def of(names: Sequence[str], addresses: Sequence[int], sizes: Sequence[int]) -> Memory:
        """The memory of these tensors."""
        return Memory(tuple(names), np.array(addresses, np.int64), np.array(sizes, np.int64))

    def pointer(self, number: int) -> int:
        """A pointer to the first element of a tensor, aligned as the tensor is."""
        return (number << self.SHIFT) + self.MIDDLE + int(self.addresses[number]) % 128

    def addresses_of(self, pointers: Array, mask: Array, width: int, what: str) -> Array:
        """The addresses behind pointers to elements of `width` bytes. Raises `IndexError` where one that is used leaves its tensor."""
        numbers = (pointers >> np.uint64(self.SHIFT)).astype(np.int64)
        known = (numbers >= 0) & (numbers < len(self.names))
        numbers = np.where(known, numbers, 0)
        start = self.addresses[numbers]
        place = (pointers & np.uint64((1 << self.SHIFT) - 1)).astype(np.int64) - self.MIDDLE - start % 128
        wrong = mask & ~(known & (place >= 0) & (place + width <= self.sizes[numbers]))
        if wrong.any():
            first = tuple(i[0] for i in np.nonzero(np.atleast_1d(wrong)))
            number, at = int(np.atleast_1d(numbers)[first]), int(np.atleast_1d(place)[first])
            raise IndexError(
                f"{what} byte {at} of {self.names[number]}, which has {int(self.sizes[number])} (lane {list(map(int, first))})"
            )
        return (start + place).astype(np.uint64)


class Builder(it.InterpreterBuilder):  # type: ignore[misc]
    """See the module.

    Attributes:
        memory: that of the running launch; without one, pointers are addresses.
        patched: the names by which the helper functions called since it began know the language, now the interpreted one.
    """

    memory: Memory | None
    patched: set[str]

    def begin(self, memory: Memory | None) -> None:
        """Set the memory of a launch that begins, or None where one ends."""
        self.memory, self.patched = memory, set()

    # numbers --------------------------------------------------------------------------------------------------------------------

    def get_bf16(self, value: float) -> Any:
        return Handle(round_to_bf16(np.array([value], np.float32)), tl.bfloat16)

    def get_all_ones_value(self, type: Any) -> Any:
        kind = it._get_np_dtype(type)
        return Handle(np.array([True]) if kind == np.bool_ else np.array([-1]).astype(kind), type.scalar)

    def binary_op(self, lhs: Any, rhs: Any, op: Any) -> Any:
        if op in _FLOAT_OPS and _is(lhs, tl.bfloat16) and _is(rhs, tl.bfloat16):
            out = op(widen(lhs.data), widen(rhs.data))
            return Handle(out, tl.int1) if out.dtype == np.bool_ else Handle(round_to_bf16(out), tl.bfloat16)
        if op in _FLOAT_OPS and lhs.dtype.scalar in _FP8 and lhs.data.dtype != np.bool_:
            raise TypeError(f"{op.__name__} of {lhs.dtype.scalar}: no device computes in it")
        out = super().binary_op(lhs, rhs, op)
        return Handle(out.data, tl.int1) if out.data.dtype == np.bool_ else out

    def create_maxnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmax)

    def create_minnumf(self, lhs: Any, rhs: Any) -> Any:
        return self.binary_op(lhs, rhs, np.fmin)

    def create_clampf(self, arg: Any, lo: Any, hi: Any, propagate_nans: Any) -> Any:
        every = propagate_nans == it._ir.PROPAGATE_NAN.ALL
        above, below = (np.maximum, np.minimum) if every else (np.fmax, np.fmin)
        return self.binary_op(self.binary_op(arg, lo, above), hi, below)

    def unary_op(self, arg: Any, op: Any) -> Any:
        if _is(arg, tl.bfloat16):
            return Handle(round_to_bf16(op(widen(arg.data))), tl.bfloat16)
        return super().unary_op(arg, op)

    def create_fma(self, x: Any, y: Any, z: Any) -> Any:
        wide = np.float64 if z.dtype.scalar in (tl.float32, tl.float64) else np.float32
        out = _values(x).astype(wide) * _values(y).astype(wide) + _values(z).astype(wide)
        return Handle(round_to_bf16(out) if _is(z, tl.bfloat16) else out.astype(z.data.dtype), z.dtype.scalar)

    def create_dot(self, a: Any, b: Any, d: Any, input_precision: Any, max_num_imprecise_acc: Any) -> Any:
        x, y = _values(a), _values(b)
        if input_precision == it._ir.INPUT_PRECISION.TF32 and x.dtype == np.float32 == y.dtype and not _is(a, tl.bfloat16):
            x, y = round_to_tf32(x), round_to_tf32(y)
        if d.data.dtype.kind in "iu":  # exact in f64, and much faster than numpy's products of integers
            out = np.matmul(x.astype(np.float64), y.astype(np.float64)).astype(np.int64).astype(d.data.dtype)
        else:
            out = np.matmul(x.astype(np.float32), y.astype(np.float32)) if d.data.dtype != np.float64 else np.matmul(x, y)
        return Handle((out + d.data).astype(d.data.dtype), d.dtype.scalar)

    # casts ----------------------------------------------------------------------------------------------------------------------

    def cast_impl(self, src: Any, dst_type: Any) -> Any:
        target = dst_type.scalar
        if target == tl.bfloat16:
            return src if _is(src, tl.bfloat16) else Handle(round_to_bf16(src.data.astype(np.float32)), target)
        if _is(src, tl.bfloat16):
            return Handle(widen(src.data).astype(it._get_np_dtype(dst_type)), target)
        return super().cast_impl(src, dst_type)

    def create_fp_to_fp(self, src: Any, dst_type: Any, rounding_mode: Any) -> Any:
        source, target = src.dtype.scalar, dst_type.scalar
        if target in _FP8:
            return Handle(_to_fp8(_values(src), target), target)
        if source in _FP8:
            return self.cast_impl(Handle(_values(src), tl.float32), dst_type)
        if rounding_mode in (None, it._ir.ROUNDING_MODE.RTNE):
            return self.cast_impl(src, dst_type)
        return super().create_fp_to_fp(src, dst_type, rounding_mode)

    # memory ---------------------------------------------------------------------------------------------------------------------

    def _translated(self, pointers: Any, mask: Any, width: int, what: str) -> Any:
        if self.memory is None:
            return pointers
        used = np.broadcast_to(mask.data, pointers.data.shape)
        return Handle(self.memory.addresses_of(pointers.data, used, width, what), pointers.dtype)

    def create_masked_load(self, ptrs: Any, mask: Any, *rest: Any, **options: Any) -> Any:  # descriptors give options by name
        width = it._get_np_dtype(ptrs.get_element_ty()).itemsize
        return super().create_masked_load(self._translated(ptrs, mask, width, "a load reads"), mask, *rest, **options)

    def create_masked_store(self, ptrs: Any, value: Any, mask: Any, *rest: Any) -> Any:
        return super().create_masked_store(self._translated(ptrs, mask, value.data.itemsize, "a store writes"), value, mask, *rest)

    def create_atomic_rmw(self, rmwOp: Any, ptr: Any, val: Any, mask: Any, *rest: Any) -> Any:
        if _is(val, tl.bfloat16):
            raise TypeError("atomics of bf16 are not interpreted")
        return super().create_atomic_rmw(rmwOp, self._translated(ptr, mask, val.data.itemsize, "an atomic changes"), val, mask, *rest)

    def create_atomic_cas(self, ptr: Any, cmp: Any, val: Any, *rest: Any) -> Any:
        mask = Handle(np.ones_like(ptr.data, dtype=bool), tl.int1)
        return super().create_atomic_cas(self._translated(ptr, mask, val.data.itemsize, "an atomic changes"), cmp, val, *rest)


def _plain(x: Any) -> bool:
    """Whether numpy reduces values of this type as a device does, apart from the order."""
    return bool(x.dtype in (tl.float32, tl.float64) or x.dtype.is_int())


class ReduceOps(it.ReduceOps):  # type: ignore[misc]
    """Reductions by pairs of neighbours, which keeps their order."""

    def apply_impl(self, input: Any) -> Any:
        if len(input) == 1 and _plain(input[0]):
            if self.combine_fn == tl.standard._sum_combine:
                return self.sum(input[0])
            for combine, ufunc in ((tl.standard._elementwise_max, np.fmax), (tl.standard._elementwise_min, np.fmin)):
                if self.combine_fn == combine:
                    out = ufunc.reduce(input[0].handle.data, axis=self.axis, keepdims=self.keep_dims)
                    return self.to_tensor(out, input[0].dtype)
        return self.generic_reduce(input)

    def generic_reduce(self, input: Any) -> Any:
        whole, axis = input, self.axis
        input, axis = self.unravel(input, axis)
        lanes = [np.moveaxis(x.handle.data, axis, 0) for x in input]
        while len(lanes[0]) > 1:
            lanes = _combined(self, [x[0::2] for x in lanes], [x[1::2] for x in lanes], input)
        found = [x[0] for x in lanes]
        if self.keep_dims:
            found = [np.expand_dims(x, tuple(range(len(whole[0].shape))) if self.axis is None else axis) for x in found]
        return [self.to_tensor(x, source.dtype) for x, source in zip(found, input, strict=True)]


class ScanOps(it.ScanOps):  # type: ignore[misc]
    """Scans in as many steps as the extent has bits."""

    def generic_scan(self, input: Any) -> Any:
        lanes = [np.moveaxis(x.handle.data, self.axis, 0) for x in input]
        size, distance = len(lanes[0]), 1
        while distance < size:
            before = [np.concatenate([x[:distance], x[:-distance]]) for x in lanes]
            lanes = [
                np.concatenate([x[:distance], y[distance:]]) for x, y in zip(lanes, _combined(self, before, lanes, input), strict=True)
            ]
            distance *= 2
        return [self.to_tensor(np.moveaxis(x, 0, self.axis), source.dtype) for x, source in zip(lanes, input, strict=True)]


def _combined(op: Any, before: list[Array], after: list[Array], like: Any) -> list[Array]:
    """The combining function on whole tensors."""
    given = [op.to_tensor(x, source.dtype) for part in (before, after) for x, source in zip(part, like, strict=True)]
    found = op.combine_fn.rewrite()(*given)
    found = found if isinstance(found, tuple) else (found,)
    kinds = [x.dtype for x in before]
    return [np.broadcast_to(f.handle.data, x.shape).astype(kind) for f, x, kind in zip(found, before, kinds, strict=True)]


class Transformer(it.ASTTransformer):  # type: ignore[misc]
    """`and`, `or` and `not` of tensors, element by element as in a compiled kernel; Python's own take a tensor for one truth."""

    def visit_Assign(self, node: ast.Assign) -> Any:
        node.value = self.visit(node.value)
        return super().visit_Assign(node)

    def visit_BoolOp(self, node: ast.BoolOp) -> ast.expr:
        self.generic_visit(node)
        later = [ast.Lambda(ast.arguments([], [], None, [], [], None, []), value) for value in node.values[1:]]
        word = "both" if isinstance(node.op, ast.And) else "either"
        return ast.Call(ast.Name(f"_{word}", ast.Load()), [node.values[0], *later], [])

    def visit_UnaryOp(self, node: ast.UnaryOp) -> ast.expr:
        self.generic_visit(node)
        return ast.Call(ast.Name("_neither", ast.Load()), [node.operand], []) if isinstance(node.op, ast.Not) else node


def _tensor(x: Any) -> bool:
    return isinstance(x, tl.tensor) and x.handle.data.size > 1


def _both(first: Any, *later: Callable[[], Any]) -> Any:
    for other in later:
        first = first & other() if _tensor(first) else first and other()
    return first


def _either(first: Any, *later: Callable[[], Any]) -> Any:
    for other in later:
        first = first | other() if _tensor(first) else first or other()
    return first


def _neither(x: Any) -> Any:
    return x == 0 if _tensor(x) else not x


class _Function(it.InterpretedFunction):  # type: ignore[misc]
    """Calls of helper functions. The stock one patches the language again at each; once a launch for every module it names is enough."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        missing = {name for name, value in self.fn.__globals__.items() if value is tl or value is tl.core} - it.interpreter_builder.patched
        if missing:
            it._patch_lang(self.fn)
            it.interpreter_builder.patched |= missing
        return self.rewrite()(*args, **kwargs)


def _range(first: Any, second: Any = None, step: Any = 1, **options: Any) -> Iterator[Any]:
    """The indices of a loop as scalars of the kernel, which they are on a device; stages and the like change nothing here."""
    begin, end = (0, first) if second is None else (first, second)
    for i in range(begin, end, step):
        yield it.interpreter_semantic.to_tensor(i)


def _patch_core(language: Any, scope: Any) -> None:
    _STOCK_PATCH(language, scope)
    scope.set_attr(language, "range", _range)


_STOCK_PATCH = it._patch_lang_core
_EXPECTED = {
    it.InterpreterBuilder: (
        "binary_op", "unary_op", "cast_impl", "create_fp_to_fp", "create_fp_trunc", "create_fp_ext", "create_si_to_fp", "create_dot",
        "create_fma", "create_maxnumf", "create_minnumf", "create_clampf", "create_masked_load", "create_masked_store", "create_load",
        "get_all_ones_value",
        "create_store", "set_grid_idx", "create_atomic_rmw", "create_atomic_cas", "create_fadd", "create_fcmpOLT", "create_bitcast",
    ),
    it.ReduceOps: ("apply_impl", "generic_reduce", "unravel", "to_tensor", "sum"),
    it.ScanOps: ("apply_impl", "generic_scan"),
    it.InterpretedFunction: ("rewrite", "rewritten_fn", "__call__"),
    it.FunctionRewriter: ("ast_transformer",),
    tl.standard: ("_sum_combine", "_elementwise_max", "_elementwise_min"),
}  # fmt: skip


def install() -> None:
    """Put the corrections in place; a second time it does nothing. Raises `UnsupportedError` where Triton is not what is expected."""
    if installed():
        return
    missing = [f"{owner.__name__}.{name}" for owner, names in _EXPECTED.items() for name in names if not hasattr(owner, name)]
    missing += [
        name
        for name in ("interpreter_builder", "interpreter_semantic", "_get_np_dtype", "_patch_lang", "InterpreterOptions")
        if not hasattr(it, name)
    ]
    if missing:
        raise _unexpected(f"lacks {', '.join(missing)}")
    builder = it.interpreter_builder
    builder.__class__ = Builder
    builder.begin(None)
    builder.options = it.InterpreterOptions(sanitize_overflow=False)  # checks that cost a quarter of the time and report to nobody
    it.ReduceOps, it.ScanOps = ReduceOps, ScanOps
    it._patch_lang_core = _patch_core
    it.InterpretedFunction.__call__ = _Function.__call__
    it.InterpretedFunction.rewritten_fn.clear()
    it.FunctionRewriter.ast_transformer = Transformer()
    it._both, it._either, it._neither = _both, _either, _neither  # what stands in that module, a rewritten function sees
    _try(builder)


def installed() -> bool:
    """Whether the corrections are in place."""
    return type(it.interpreter_builder).__name__ == "Builder" and it.ReduceOps is ReduceOps and it.ScanOps is ScanOps


def _try(builder: Any) -> None:
    """Hold a few numbers against what they must be: methods that no longer go through those that were replaced show here."""
    one, third = builder.get_bf16(1.0), builder.get_bf16(1 / 3)
    fine = builder.create_fadd(one, third).data[0] == round_to_bf16(np.float32(1 + widen(third.data)[0]))
    fine &= bool(builder.create_fcmpOLT(builder.get_bf16(-1.0), one).data[0])
    fine &= builder.create_fp_trunc(builder.get_fp32(1.0078126), tl.bfloat16).data[0] == 0x3F81
    fine &= builder.create_si_to_fp(builder.get_int32(3), tl.bfloat16).data[0] == 0x4040
    fine &= builder.create_fp_ext(one, tl.float32).data[0] == 1
    fine &= builder.create_fp_to_fp(builder.get_fp32(17.0), tl.float8e4nv, it._ir.ROUNDING_MODE.RTNE).data[0] == 0x58
    if not fine:
        raise _unexpected("computes by other ways than the corrected ones")


def _unexpected(what: str) -> UnsupportedError:
    return UnsupportedError(f"the interpreter of Triton {triton.__version__} {what}", hint=f"tried with Triton {TRIED}")
