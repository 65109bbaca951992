"""Every operation of the table where arithmetic is special: infinities, NaN, zeros of both signs, subnormals, ties; against torch."""

from __future__ import annotations

import math

import programs as p
import pytest
import torch
from einfall.ir import reference_ops
from einfall.ir.errors import CascadeError
from einfall.ir.expr import OPS, Const, Op, aligned
from einfall.ir.infer import operation_type
from einfall.ir.types import boolean, f32, f64
from hypothesis import given, settings
from hypothesis import strategies as st
from kernels import run

A, B = aligned("A", "i", "j"), aligned("B", "i", "j")
INF = math.inf
SPECIAL = [
    0.0, -0.0, INF, -INF, math.nan, 1.0, -1.0, 0.5, -0.5, 1.5, 2.5, -2.5, 3.0, 7.0, -7.0, 1e-40, -1e-40, 1.4e-45, 1.1754944e-38,
    3.4028235e38, -3.4028235e38, 1e30, -1e30, 88.0, -88.0, 100.0, -104.0, 1e-8, 8388609.0, 0.99999994, 16777216.0, -3.7, 2.0, 4.0, 0.1,
]  # fmt: skip
TORCH = {f32: torch.float32, f64: torch.float64}
UNITS = {f32: (2.0**-23, 2.0**-149), f64: (2.0**-52, 2.0**-1074)}
EXACT = (
    "add", "sub", "mul", "div", "floordiv", "mod", "neg", "minimum", "maximum", "abs", "sign", "floor", "ceil", "round",
    "trunc", "exact",
)  # fmt: skip


def float_operations(t):
    """The operations of one or two operands that take floats."""
    for name, info in OPS.items():
        if info.arity < 3 and info.kind not in ("bit", "count"):
            yield name, info.arity, operation_type(name, [(t, False)] * info.arity)[0]


def same(actual, expected):
    """Equal, or both NaN."""
    return (actual == expected) | (actual.isnan() & expected.isnan())


def apply(expr, tensors, declared, out, tile=64, narrowed=False):
    inputs = tuple(p.tensor(name, "i j", declared) for name in tensors)
    program = p.elementwise(expr, inputs, out, tile=tile)
    return run(program, {name: t[None] for name, t in tensors.items()}, narrowed=narrowed)["Y"][0]


@pytest.mark.parametrize(("tile", "narrowed"), [(64, False), (1, False), (64, True)], ids=["vectors", "scalars", "avx2"])
@pytest.mark.parametrize("t", [f32, f64], ids=str)
def test_every_operation_on_special_values(t, tile, narrowed):
    values = torch.tensor(SPECIAL, dtype=torch.float64).to(TORCH[t])
    a, b = values.repeat_interleave(len(values)), values.repeat(len(values))
    unit, least = UNITS[t]
    for name, arity, result in float_operations(t):
        args = [values] if arity == 1 else [a, b]
        expected = reference_ops.settle(reference_ops.apply(name, args, t), result, weak=False, promoted=False)
        actual = apply(Op(name, (A, B)[:arity]), dict(zip("AB", args, strict=False)), t, result, tile, narrowed)
        if result == boolean:
            assert torch.equal(actual, expected), name
            continue
        right = same(actual, expected)
        if name not in EXACT:
            wide = expected.double()
            right |= (actual.double() - wide).abs() <= 3 * (wide.abs() * unit).clamp(min=least)
        signed = (actual.signbit() == expected.signbit()) | expected.isnan() | (name in ("minimum", "maximum"))
        right &= signed  # of a zero of each sign, either is the larger
        if name in ("mod", "floordiv"):  # torch's vectors give up where the quotient is beyond exact whole numbers
            right |= (args[0] / args[1]).abs() > 1 / unit
        wrong = [(*(x[i].item() for x in args), expected[i].item(), actual[i].item()) for i in (~right).nonzero()[:5, 0]]
        assert not wrong, (name, wrong)


def op(name, *args):
    return Op(name, tuple(Const(a) if isinstance(a, float) else a for a in args))


MAGIC = 12582912.0
COMPOSED = {  # what is an identity of real numbers but not of floats
    "difference": (op("sub", A, A), lambda a, b: a - a),
    "product by zero": (op("mul", A, 0.0), lambda a, b: a * 0.0),
    "rounding": (op("sub", op("add", A, MAGIC), MAGIC), lambda a, b: (a + MAGIC) - MAGIC),
    "rounding from the left": (op("sub", op("add", MAGIC, A), MAGIC), lambda a, b: (MAGIC + a) - MAGIC),
    "quotient": (op("div", A, A), lambda a, b: a / a),
    "quotient of zero": (op("div", 0.0, A), lambda a, b: torch.zeros_like(a) / a),
    "sum with zero": (op("add", A, 0.0), lambda a, b: a + 0.0),
    "negation": (op("sub", 0.0, A), lambda a, b: 0.0 - a),
    "sum and back": (op("sub", op("add", A, B), B), lambda a, b: (a + b) - b),
    "error of a sum": (op("sub", A, op("sub", A, B)), lambda a, b: a - (a - b)),
    "two literals": (op("add", op("add", A, 1.0), -1.0), lambda a, b: (a + 1.0) + -1.0),
    "clamped": (op("minimum", op("maximum", A, -1.0), 1.0), lambda a, b: a.clamp(-1, 1)),
    "a power of a half": (op("pow", A, 0.5), lambda a, b: torch.pow(a.double(), 0.5 * torch.ones_like(a).double()).float()),
    "equal to itself": (op("eq", A, A), lambda a, b: a == a),
    "at most itself": (op("le", A, A), lambda a, b: a <= a),
    "less or not": (op("or", op("lt", A, B), op("ge", A, B)), lambda a, b: (a < b) | (a >= b)),
    "not less": (op("not", op("lt", A, B)), lambda a, b: ~(a < b)),
    "more than one more": (op("gt", op("add", A, 1.0), A), lambda a, b: a + 1 > a),
    "order of sums": (op("lt", op("add", A, 1.0), op("add", B, 1.0)), lambda a, b: a + 1 < b + 1),
    "the larger is no less": (op("ge", op("maximum", A, B), A), lambda a, b: torch.maximum(a, b) >= a),
}


@pytest.mark.parametrize("tile", [64, 1], ids=["vectors", "scalars"])
@pytest.mark.parametrize("case", COMPOSED)
def test_floats_are_not_taken_for_real_numbers(case, tile):
    expr, function = COMPOSED[case]
    values = torch.tensor(SPECIAL)
    a, b = values.repeat_interleave(len(values)), values.repeat(len(values))
    expected = function(a, b)
    out = boolean if expected.dtype == torch.bool else f32
    tensors = {"A": a, "B": b} if "'B'" in repr(expr) else {"A": a}
    actual = apply(expr, tensors, f32, out, tile)
    right = actual == expected if out == boolean else same(actual, expected) & (actual.isnan() | (actual.signbit() == expected.signbit()))
    wrong = [(a[i].item(), b[i].item(), expected[i].item(), actual[i].item()) for i in (~right).nonzero()[:5, 0]]
    assert not wrong, wrong


FLOATS = st.floats(width=32, allow_nan=True, allow_infinity=True)


@settings(deadline=None, max_examples=40)
@given(name=st.sampled_from([n for n, _, _ in float_operations(f32) if n in EXACT]), a=st.lists(FLOATS, min_size=1, max_size=40), b=FLOATS)
def test_exact_operations_on_any_floats(name, a, b):
    arity = OPS[name].arity
    x, y = torch.tensor(a), torch.tensor([b] * len(a))
    args = [x, y][:arity]
    expected = reference_ops.apply(name, args, f32)
    actual = apply(Op(name, (A, B)[:arity]), dict(zip("AB", args, strict=False)), f32, f32)
    beyond = (x / y).abs() > 2.0**23 if name in ("mod", "floordiv") else torch.zeros(len(a), dtype=torch.bool)
    assert bool((same(actual, expected) | beyond).all()), (name, a, b, expected, actual)


def test_what_takes_no_floats_is_refused_by_name():
    for name in ("popcount", "clz"):
        with pytest.raises(CascadeError, match=name):
            reference_ops.apply(name, [torch.ones(1)], f32)
