"""Every operation as a GPU kernel, interpreted, against torch: special floats, extreme integers, casts, bits, narrow types.

How a GPU rounds its own exponentials and quotients is not told by it.
"""

from __future__ import annotations

import programs as p
import pytest
import torch
from einfall.ir import reference_ops
from einfall.ir.binding import to_torch
from einfall.ir.errors import UnsupportedError
from einfall.ir.expr import Bitcast, Cast, Const, Index, Op, Read, aligned
from einfall.ir.types import bf16, boolean, e8m0, f4e2m1, f8e4m3, f8e5m2, f16, f32, f64, i4, i8, i16, i32, i64, u8
from kernels import strided_copy
from test_tvm_narrow import FOURS, codes, patterns
from test_tvm_operations import TORCH, extremes
from test_tvm_specials import COMPOSED, EXACT, SPECIAL, float_operations, same
from triton_kernels import run

A, B = aligned("A", "i", "j"), aligned("B", "i", "j")
BYTES = (f8e4m3, f8e5m2, e8m0)
TYPES = {to_torch(t): t for t in (f64, f32, f16, bf16, i64, i32, i16, i8, u8, boolean)}


def apply(expr, tensors, out, declared=None):
    """Y = expr of tensors A (and B) of one row, in one or two tiles."""
    n = next(iter(tensors.values())).numel()
    inputs = tuple(p.tensor(name, "i j", declared or TYPES[t.dtype]) for name, t in tensors.items())
    program = p.elementwise(expr, inputs, out, tile=1 << max(4, (n - 1).bit_length() - 1))
    return run(program, {name: t[None] for name, t in tensors.items()})["Y"][0]


def same_bits(actual, expected):
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@pytest.mark.parametrize(("name", "arity", "result"), list(float_operations(f32)), ids=lambda x: x if isinstance(x, str) else "")
def test_operations_on_special_floats(name, arity, result):
    values = torch.tensor(SPECIAL)
    a, b = values.repeat_interleave(len(values)), values.repeat(len(values))
    args = [values] if arity == 1 else [a, b]
    expected = reference_ops.settle(reference_ops.apply(name, args, f32), result, weak=False, promoted=False)
    actual = apply(Op(name, (A, B)[:arity]), dict(zip("AB", args, strict=False)), result)
    if result == boolean:
        assert torch.equal(actual, expected)
        return
    right = same(actual, expected)
    if name not in EXACT:
        wide = expected.double()
        right |= (actual.double() - wide).abs() <= 4 * (wide.abs() * 2.0**-23).clamp(min=2.0**-149)
    # the sign of a zero is kept by what only moves or multiplies: a negation is 0 - x on some devices
    kept = name in ("add", "sub", "mul", "div", "exact", "abs", "floor", "ceil", "trunc", "sqrt")
    right &= (actual.signbit() == expected.signbit()) | expected.isnan() | (not kept)
    if name == "pow":  # a power is 2 to the power b log2(a), with the error that has
        relative = (args[1] * torch.log2(args[0].abs())).abs().double().nan_to_num(0, 0, 0).clamp(min=4) * 2.0**-23
        right |= (actual.double() - expected.double()).abs() <= relative * expected.double().abs()
        right |= (args[0] == 0) & (args[1] < 0)  # which infinity a zero of either sign gives
    if name in ("mod", "floordiv"):
        right |= (args[0] / args[1]).abs() > 2.0**23
    wrong = [(*(x[i].item() for x in args), expected[i].item(), actual[i].item()) for i in (~right).nonzero()[:5, 0]]
    assert not wrong, wrong


@pytest.mark.parametrize("case", COMPOSED)
def test_floats_are_not_taken_for_real_numbers(case):
    expr, function = COMPOSED[case]
    values = torch.tensor(SPECIAL)
    a, b = values.repeat_interleave(len(values)), values.repeat(len(values))
    expected = function(a, b)
    out = boolean if expected.dtype == torch.bool else f32
    actual = apply(expr, {"A": a, "B": b} if "'B'" in repr(expr) else {"A": a}, out)
    right = actual == expected if out == boolean else same(actual, expected) & (actual.isnan() | (actual.signbit() == expected.signbit()))
    wrong = [(a[i].item(), b[i].item(), expected[i].item(), actual[i].item()) for i in (~right).nonzero()[:5, 0]]
    assert not wrong, wrong


@pytest.mark.parametrize("dtype", [i64, i32, i16, i8, u8], ids=str)
def test_integers_wrap_around(dtype):
    values = extremes(dtype)[::2].contiguous()
    a, b = values.repeat_interleave(len(values)), values.repeat(len(values))
    info = torch.iinfo(TORCH[dtype])
    size = 1 << info.bits
    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]

    def wrapped(numbers):
        return torch.tensor([(n - info.min) % size + info.min for n in numbers]).to(TORCH[dtype])

    python = {
        "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "floordiv": lambda x, y: x // y if y else 0,
        "mod": lambda x, y: x % y if y else 0, "shl": lambda x, y: x << y if 0 <= y < info.bits else 0,
        "shr": lambda x, y: x >> (y if 0 <= y < info.bits else 64),
        "minimum": min, "maximum": max, "and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y,
    }  # fmt: skip
    wrong = []
    for name, function in python.items():
        if not torch.equal(apply(Op(name, (A, B)), {"A": a, "B": b}, dtype), wrapped([function(x, y) for x, y in pairs])):
            wrong.append(name)
    single = {"neg": lambda x: -x, "abs": abs, "not": lambda x: ~x, "sign": lambda x: (x > 0) - (x < 0)}
    for name, function in single.items():
        if not torch.equal(apply(Op(name, (A,)), {"A": values}, dtype), wrapped([function(int(x)) for x in values])):
            wrong.append(name)
    bits = [int(x) & (size - 1) for x in values]
    for name, counts in (("popcount", [bin(x).count("1") for x in bits]), ("clz", [info.bits - x.bit_length() for x in bits])):
        if apply(Op(name, (A,)), {"A": values}, i32).tolist() != counts:
            wrong.append(name)
    assert not wrong, wrong


@pytest.mark.parametrize("source", [f32, f16, bf16, i64, i32, i16, i8, u8, boolean], ids=str)
def test_casts(source):
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0, 1.0]).to(TORCH[source])
    for result in (f32, f16, bf16, i64, i32, i16, i8, u8, boolean):
        assert torch.equal(apply(Cast(A, result), {"A": x}, result), x.to(TORCH[result])), result


def test_casts_from_wide_integers():
    x = torch.tensor([0, 1, -1, 255, 256, -129, 1 << 33, -(1 << 40) + 5, (1 << 62) + 3])
    for t in (i32, i16, i8, u8):
        assert torch.equal(apply(Cast(A, t), {"A": x}, t), x.to(to_torch(t)))
        assert torch.equal(apply(Cast(Cast(A, t), f32), {"A": x}, f32), x.to(to_torch(t)).float())


@pytest.mark.parametrize("t", [*BYTES, f4e2m1], ids=str)
def test_every_code_is_read(t):
    x = codes(t) if t != f4e2m1 else torch.cat([FOURS, -FOURS]).repeat(3)[:-3].to(torch.float8_e4m3fn)
    actual = apply(A, {"A": x}, f32, t)
    torch.testing.assert_close(actual, x.float(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("t", [*BYTES, f16, bf16, f4e2m1], ids=str)
def test_what_is_written_is_rounded_as_torch_rounds(t):
    x = patterns()[::3].contiguous()
    expected = x.to(to_torch(t)) if t != f4e2m1 else reference_ops.round_f4(x).to(torch.float8_e4m3fn)
    nan = expected.float().isnan()
    for expr in (A, Cast(A, t)):
        actual = apply(expr, {"A": x}, t)
        wrong = actual.float() != expected.float()
        assert not (wrong & ~nan).any(), [
            (x[i].item(), actual[i].float().item(), expected[i].float().item()) for i in wrong.nonzero()[:5, 0]
        ]
        assert actual[nan].float().isnan().all()


@pytest.mark.parametrize("t", [*BYTES, f16, bf16], ids=str)
def test_bits_are_exact(t):
    if t in BYTES:
        x = codes(t)
        number = ~x.float().isnan()  # one NaN stands for all of them
        same_bits(apply(Bitcast(A, u8), {"A": x}, u8, t)[number], x[number])
        same_bits(apply(Bitcast(A, t), {"A": x.view(torch.uint8)}, t)[number], x[number])
        return
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    same_bits(apply(Bitcast(A, i16), {"A": every.view(to_torch(t))}, i16), every)
    same_bits(apply(Bitcast(A, t), {"A": every}, t), every)
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (500,), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    same_bits(apply(Bitcast(A, f32), {"A": words}, f32), words)
    same_bits(apply(Bitcast(A, i32), {"A": words.view(torch.float32)}, i32), words)


def test_integers_of_four_bits():
    x = torch.arange(-8, 8, dtype=torch.int8)
    assert torch.equal(apply(Op("mul", (A, Const(3))), {"A": x}, i4, i4).long(), (x.long() * 3 + 8) % 16 - 8)
    given = torch.arange(-40, 40, dtype=torch.int32)
    assert torch.equal(apply(Cast(A, i4), {"A": given}, i8).long(), (given.long() + 8) % 16 - 8)


@pytest.mark.parametrize("t", [*BYTES, f16, bf16], ids=str)
def test_reversed_shifted_and_strided_codes(t):
    x = torch.rand(3, 70, generator=torch.Generator().manual_seed(3)).add(0.3).to(to_torch(t))
    declared = (p.tensor("A", "i j", t),)
    backwards = Read("A", (Index("i"), Op("sub", (Const(69), Index("j")))))
    assert torch.equal(run(p.elementwise(backwards, declared, f32), {"A": x})["Y"], x.float().flip(1))
    shifted = Read("A", (Index("i"), Op("sub", (Index("j"), Const(1)))), Const(1.0))
    filled = run(p.elementwise(shifted, declared, f32), {"A": x})["Y"]
    assert torch.equal(filled, torch.cat([torch.ones(3, 1), x.float()[:, :-1]], 1))
    if t not in BYTES:
        given = strided_copy(x.view(torch.int16), last=True).view(to_torch(t))
        assert torch.equal(run(p.elementwise(A, declared, f32), {"A": given}, strided=frozenset("A"))["Y"], x.float())


def test_tensors_of_f64_are_refused_by_name():
    with pytest.raises(UnsupportedError, match="f64"):
        apply(A, {"A": torch.ones(3, dtype=torch.float64)}, f64)
