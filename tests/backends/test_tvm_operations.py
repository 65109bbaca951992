"""Every operation of the table on the CPU, vector and scalar, with and without AVX-512, against torch in float64."""

from __future__ import annotations

import math

import programs as p
import pytest
import torch
from einfall.ir.errors import UnsupportedError
from einfall.ir.expr import OPS, Bitcast, Cast, Const, Masked, Op, Tile, aligned
from einfall.ir.tile import GridRank, LoopState, Reduce, Store, TileProgram
from einfall.ir.types import bf16, boolean, f16, f32, f64, i8, i16, i32, i64, u8
from kernels import run

A, B = aligned("A", "i", "j"), aligned("B", "i", "j")
EDGES = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 126.9, -126.0, -149.0, -151.0, 88.7, 88.8, -87.3, -104.0, 1e-40, -1e-40])
WIDE = torch.cat(
    [torch.linspace(-100, 100, 4001), torch.linspace(-1, 1, 4001), torch.logspace(-44, 38, 2000), -torch.logspace(-44, 38, 2000), EDGES]
)
FLOAT = {
    "exp": torch.exp, "exp2": torch.exp2, "log": torch.log, "log2": torch.log2, "log1p": torch.log1p, "sqrt": torch.sqrt,
    "rsqrt": torch.rsqrt, "sin": torch.sin, "cos": torch.cos, "tanh": torch.tanh, "sigmoid": torch.sigmoid, "erf": torch.erf,
    "floor": torch.floor, "ceil": torch.ceil, "round": torch.round, "trunc": torch.trunc, "abs": torch.abs, "sign": torch.sign,
    "neg": torch.neg, "exact": lambda x: x,
}  # fmt: skip
TESTS = {"isnan": torch.isnan, "isinf": torch.isinf, "isfinite": torch.isfinite}
PAIRS = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "div": torch.div, "minimum": torch.minimum, "maximum": torch.maximum,
    "floordiv": lambda a, b: (a / b).floor(), "mod": torch.remainder, "pow": torch.pow,
}  # fmt: skip
COMPARE = {"eq": torch.eq, "ne": torch.ne, "lt": torch.lt, "le": torch.le, "gt": torch.gt, "ge": torch.ge}
INTEGER = {
    "add": torch.add, "sub": torch.sub, "mul": torch.mul, "minimum": torch.minimum, "maximum": torch.maximum, "mod": torch.remainder,
    "floordiv": lambda a, b: torch.div(a, b, rounding_mode="floor"), "and": torch.bitwise_and, "or": torch.bitwise_or,
    "xor": torch.bitwise_xor,
}  # fmt: skip
TORCH = {
    f64: torch.float64,
    f32: torch.float32,
    f16: torch.float16,
    bf16: torch.bfloat16,
    i64: torch.int64,
    i32: torch.int32,
    i16: torch.int16,
}
TORCH |= {i8: torch.int8, u8: torch.uint8, boolean: torch.bool}


def apply(expr, tensors, out, *, narrowed=False, tile=64):
    """The map `expr` over tensors A (and B) of one row."""
    names = {t.dtype: d for d, t in ((d, torch.empty(0, dtype=t)) for d, t in TORCH.items())}
    inputs = tuple(p.tensor(name, "i j", names[t.dtype]) for name, t in tensors.items())
    program = p.elementwise(expr, inputs, out, tile=tile)
    return run(program, {name: t[None] for name, t in tensors.items()}, narrowed=narrowed)["Y"][0]


def units_apart(actual, expected):
    """The distance in units in the last place of the rounded result; equal values and NaNs are 0 apart."""
    rounded = expected.float()
    same = (actual == rounded) | (actual.isnan() & rounded.isnan())
    unit = torch.maximum(2.0 ** torch.floor(torch.log2(expected.abs())) * 2**-23, torch.tensor(2.0**-149, dtype=torch.float64))
    return torch.where(same, 0.0, (actual.double() - expected).abs() / unit)


@pytest.mark.parametrize("tile", [64, 1], ids=["vectors", "scalars"])
@pytest.mark.parametrize("narrowed", [False, True], ids=["host", "avx2"])
@pytest.mark.parametrize("name", FLOAT)
def test_functions_of_one_float(name, narrowed, tile):
    if tile == 1 and narrowed:
        pytest.skip("the scalar forms are one lane of the vector forms")
    x = WIDE if tile > 1 else torch.cat([WIDE[::97], EDGES])
    if name == "sigmoid":
        x = x[~(x < -87)]  # the exponential overflows, the result is a subnormal
    actual = apply(Op(name, (A,)), {"A": x}, f32, narrowed=narrowed, tile=tile)
    assert units_apart(actual, FLOAT[name](x.double())).max() <= 2.5


@pytest.mark.parametrize("name", TESTS)
def test_tests_of_floats(name):
    assert torch.equal(apply(Op(name, (A,)), {"A": WIDE}, boolean), TESTS[name](WIDE))


@pytest.mark.parametrize("name", PAIRS)
def test_functions_of_two_floats(name):
    a = torch.tensor([7.5, -7.5, 3.0, 0.5, 0.0, 2.0, 9.0, -8.0, 1e20, 0.1])
    b = torch.tensor([2.0, 2.0, -2.0, 0.5, 3.0, -1.0, 0.5, 3.0, 7.0, -0.3])
    actual = apply(Op(name, (A, B)), {"A": a, "B": b}, f32)
    expected = PAIRS[name](a, b) if name in ("mod", "floordiv") else PAIRS[name](a.double(), b.double())
    assert units_apart(actual, expected.double()).max() <= 1


@pytest.mark.parametrize("name", COMPARE)
def test_comparisons(name):
    a, b = torch.tensor([1.0, 2.0, math.nan, -math.inf, 0.0]), torch.tensor([2.0, 2.0, 1.0, -math.inf, -0.0])
    assert torch.equal(apply(Op(name, (A, B)), {"A": a, "B": b}, boolean), COMPARE[name](a, b))


@pytest.mark.parametrize("dtype", [i64, i32, i16, i8], ids=str)
@pytest.mark.parametrize("name", INTEGER)
def test_integers(name, dtype):
    a = torch.arange(-50, 50).to(TORCH[dtype])
    b = (torch.arange(100) % 7 - 3).to(TORCH[dtype])
    b[b == 0] = 5
    assert torch.equal(apply(Op(name, (A, B)), {"A": a, "B": b}, dtype), INTEGER[name](a, b))


def test_bits():
    a = torch.tensor([0, 1, 2, 3, 255, 1 << 20, -1, -(1 << 31), 12345678], dtype=torch.int32)
    three = Const(3)
    assert torch.equal(apply(Op("shl", (A, three)), {"A": a}, i32), a << 3)
    assert torch.equal(apply(Op("shr", (A, three)), {"A": a}, i32), a >> 3)
    assert torch.equal(apply(Op("not", (A,)), {"A": a}, i32), ~a)
    bits = [bin(int(x) & 0xFFFFFFFF)[2:].zfill(32) for x in a]
    assert apply(Op("popcount", (A,)), {"A": a}, i32).tolist() == [b.count("1") for b in bits]
    assert apply(Op("clz", (A,)), {"A": a[1:]}, i32).tolist() == [len(b) - len(b.lstrip("0")) for b in bits[1:]]
    x = torch.tensor([1.5, -2.25, 0.0, 1e-30])
    assert torch.equal(apply(Bitcast(A, i32), {"A": x}, i32), x.view(torch.int32))
    assert torch.equal(apply(Bitcast(A, f32), {"A": x.view(torch.int32)}, f32), x)
    half = x.bfloat16()
    assert torch.equal(apply(Bitcast(A, i16), {"A": half}, i16), half.view(torch.int16))
    assert torch.equal(apply(Bitcast(A, bf16), {"A": half.view(torch.int16)}, bf16), half)


def test_bools():
    a, b = torch.tensor([True, True, False, False]), torch.tensor([True, False, True, False])
    for name, fn in {"and": torch.logical_and, "or": torch.logical_or, "xor": torch.logical_xor}.items():
        assert torch.equal(apply(Op(name, (A, B)), {"A": a, "B": b}, boolean), fn(a, b))
    assert torch.equal(apply(Op("not", (A,)), {"A": a}, boolean), ~a)
    x = torch.tensor([1.0, math.nan, 3.0, 4.0])
    assert torch.equal(apply(Op("not", (Op("lt", (A, Const(2.0))),)), {"A": x}, boolean), ~(x < 2))
    x = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert torch.equal(apply(Op("where", (A, B, Const(-1.0))), {"A": a, "B": x}, f32), torch.where(a, x, -1.0))


@pytest.mark.parametrize("source", TORCH, ids=str)
@pytest.mark.parametrize("result", [f64, f32, f16, bf16, i32, i8, boolean], ids=str)
def test_casts(source, result):
    x = torch.tensor([0.0, 1.0, 2.0, 3.0, 100.0, 1.0]).to(TORCH[source])
    assert torch.equal(apply(Cast(A, result), {"A": x}, result), x.to(TORCH[result]))


@pytest.mark.parametrize("dtype", [bf16, f16], ids=str)
def test_narrow_floats_round_to_nearest_even(dtype):
    x = torch.cat([torch.linspace(-3, 3, 1001), torch.tensor([1.00390625, 1.01171875, 65504.0, 3.3e38, math.inf, -math.inf, math.nan])])
    rounded = x.to(TORCH[dtype])
    torch.testing.assert_close(apply(A, {"A": x}, dtype), rounded, rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(apply(Cast(A, dtype), {"A": x}, f32), rounded.float(), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(apply(A, {"A": rounded}, f32), rounded.float(), rtol=0, atol=0, equal_nan=True)


def test_double_precision():
    a, b = torch.randn(100, dtype=torch.float64), torch.randn(100, dtype=torch.float64)
    expr = Op("sqrt", (Op("add", (Op("mul", (A, A)), Op("exp", (Op("sub", (B, Const(0.1))),)))),))
    torch.testing.assert_close(apply(expr, {"A": a, "B": b}, f64), (a * a + (b - 0.1).exp()).sqrt(), rtol=1e-14, atol=0)


def test_what_the_cpu_cannot_do_is_refused_by_name():
    whole = torch.ones(3, dtype=torch.int32)
    with pytest.raises(UnsupportedError, match=r"(?s)'pow' of int32.*statement Y.*try: cast to f32"):
        apply(Op("pow", (A, B)), {"A": whole, "B": whole}, i32)
    with pytest.raises(UnsupportedError, match="'shl' of bools"):
        apply(Op("shl", (A, A)), {"A": whole.bool()}, boolean)


def test_every_operation_is_covered():
    tested = {*FLOAT, *TESTS, *PAIRS, *COMPARE, *INTEGER, "shl", "shr", "not", "popcount", "clz", "where"}
    assert tested == set(OPS)


def extremes(dtype):
    """The ends of a type, what lies around zero and powers of two, and anything."""
    info = torch.iinfo(TORCH[dtype])
    some = [info.min, info.min + 1, info.max, info.max - 1, 0, 1, 2, 3, 5, 7, 16, 17, 63, 64, 100]
    some += [-x for x in some if info.min < 0 and x != info.min]
    anything = torch.randint(info.min, info.max, (60,), generator=torch.Generator().manual_seed(5))
    return torch.cat([torch.tensor(some), anything]).to(TORCH[dtype])


@pytest.mark.parametrize("tile", [64, 1], ids=["vectors", "scalars"])
@pytest.mark.parametrize("dtype", [i64, i32, i16, i8, u8], ids=str)
def test_integers_wrap_around(dtype, tile):
    """Every pair of extreme values, through Python's own numbers."""
    values = extremes(dtype)
    a, b = values.repeat_interleave(len(values)), values.repeat(len(values))
    info = torch.iinfo(TORCH[dtype])
    size = 1 << info.bits

    def wrapped(numbers):
        return torch.tensor([(n - info.min) % size + info.min for n in numbers]).to(TORCH[dtype])

    pairs = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    python = {
        "add": lambda x, y: x + y, "sub": lambda x, y: x - y, "mul": lambda x, y: x * y, "floordiv": lambda x, y: x // y if y else 0,
        "mod": lambda x, y: x % y if y else 0, "shl": lambda x, y: x << y if 0 <= y < info.bits else 0,
        "shr": lambda x, y: x >> (y if 0 <= y < info.bits else 64),
        "minimum": min, "maximum": max, "and": lambda x, y: x & y, "or": lambda x, y: x | y, "xor": lambda x, y: x ^ y,
    }  # fmt: skip
    for name, function in python.items():
        actual = apply(Op(name, (A, B)), {"A": a, "B": b}, dtype, tile=tile)
        assert torch.equal(actual, wrapped([function(x, y) for x, y in pairs])), name
    unsigned = [x & (size - 1) for x, _ in pairs]
    single = {
        "neg": [-x for x, _ in pairs], "abs": [abs(x) for x, _ in pairs], "not": [~x for x, _ in pairs],
        "sign": [(x > 0) - (x < 0) for x, _ in pairs],
    }  # fmt: skip
    for name, expected in single.items():
        assert torch.equal(apply(Op(name, (A,)), {"A": a}, dtype, tile=tile), wrapped(expected)), name
    assert apply(Op("popcount", (A,)), {"A": a}, i32, tile=tile).tolist() == [bin(x).count("1") for x in unsigned]
    assert apply(Op("clz", (A,)), {"A": a}, i32, tile=tile).tolist() == [info.bits - x.bit_length() for x in unsigned]


@pytest.mark.parametrize("dtype", [i32, i8, u8], ids=str)
def test_literals_beyond_a_type_are_compared_as_numbers(dtype):
    x = extremes(dtype)
    for literal in (300, -300, 1 << 40):
        assert torch.equal(apply(Op("lt", (A, Const(literal))), {"A": x}, boolean), x.long() < literal)
        expected = torch.maximum(x.long(), torch.tensor(literal)).to(TORCH[dtype])
        assert torch.equal(apply(Op("maximum", (A, Const(literal))), {"A": x}, dtype), expected)


def test_data_is_not_taken_for_indices():
    """What TVM may assume of an index, which never overflows: x + 1 > x, and (x * 4) // 4 = x."""
    x = extremes(i32)
    later = Op("gt", (Op("add", (A, Const(1))), A))
    assert torch.equal(apply(later, {"A": x}, boolean), x + 1 > x)
    scaled = Op("floordiv", (Op("mul", (A, Const(4))), Const(4)))
    assert torch.equal(apply(scaled, {"A": x}, i32), torch.div(x * 4, 4, rounding_mode="floor"))
    signed = Op("lt", (Cast(Op("and", (A, Const(255))), i8), Const(0)))
    assert torch.equal(apply(signed, {"A": x}, boolean), (x & 255).to(torch.int8) < 0)


def test_masks_of_integers_are_their_extremes():
    """The largest of integers under a mask of -inf, over a rank that no tile divides."""
    x = torch.full((2, 21), -100, dtype=torch.int8)
    for word, expected in (("max", -100), ("min", -100)):
        masked = Masked(aligned("X", "m", "p"), Const(-math.inf if word == "max" else math.inf))
        state = LoopState("s", ("m",), Const(-128 if word == "max" else 127), Op(f"{word}imum", (Tile("s"), Tile("t"))), i8)
        loop = p.loop("p", 16, (state,), Reduce("t", ("m",), word, ("p",), masked, i8))
        program = TileProgram(
            "extreme", (p.tensor("X", "m p", i8),), (p.output("Y", "m", i8),), (), (), (GridRank("m", 2),), (),
            (loop, Store("Y", p.idx("m"), Tile("s"))),
        )  # fmt: skip
        assert run(program, {"X": x})["Y"].tolist() == [expected] * 2
