"""Every operation of the table against Python's own arithmetic, one element at a time."""

import math
import struct

import pytest
import torch
from builders import at, cascade, op
from einfall.ir.cascade import Einsum
from einfall.ir.errors import CascadeError
from einfall.ir.expr import OPS, Bitcast, Cast, Const, Index, Scalar
from einfall.ir.reference import evaluate, to_torch
from einfall.ir.types import DTYPES, dtype
from hypothesis import given
from hypothesis import strategies as st

INF, NAN = math.inf, math.nan
FINITE = st.floats(-50, 50, width=32)
ANY = st.one_of(FINITE, st.sampled_from([0.0, -0.0, INF, -INF, NAN, 0.5, -1.5, 2.5]))


def apply(expression, dtype_=torch.float64, scalars=None, **tensors):
    """The expression over the inputs X, Y, Z of one rank i."""
    kinds = {torch.float32: "f32", torch.float64: "f64", torch.bool: "bool", torch.bfloat16: "bf16", torch.int32: "i32", torch.int8: "i8"}
    kinds |= {torch.uint8: "u8", torch.int64: "i64", torch.int16: "i16", torch.float16: "f16"}
    inputs = [f"{name}: i = {kinds[t.dtype]}" for name, t in tensors.items()]
    c = cascade(inputs=inputs, body=[Einsum("R", ("i",), expression)], outputs="R: i", scalars=tuple(scalars or {}))
    return evaluate(c, tensors, scalars, dtype=dtype_)["R"]


def guarded(function):
    """A function of `math` with IEEE results instead of exceptions."""

    def call(x):
        try:
            return function(x)
        except OverflowError:
            return INF
        except ValueError:
            return NAN

    return call


def logarithm(base):
    return guarded(lambda x: -INF if x == 0 else base(x))


def sign(x):
    return float((x > 0) - (x < 0))


def half_even(x):
    return x if not math.isfinite(x) else math.copysign(float(round(x)), x)


def whole(function):
    return lambda x: x if not math.isfinite(x) else math.copysign(float(function(x)), x if function(x) == 0 else function(x))


UNARY = {
    "neg": lambda x: -x,
    "abs": abs,
    "sign": sign,
    "exp": guarded(math.exp),
    "exp2": guarded(lambda x: 2.0**x),
    "log": logarithm(math.log),
    "log2": logarithm(math.log2),
    "log1p": guarded(lambda x: -INF if x == -1 else math.log1p(x)),
    "sqrt": guarded(math.sqrt),
    "rsqrt": guarded(lambda x: math.copysign(INF, x) if x == 0 else 1 / math.sqrt(x)),
    "sin": guarded(math.sin),
    "cos": guarded(math.cos),
    "tanh": math.tanh,
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)) if x > -700 else NAN if math.isnan(x) else 0.0,
    "erf": math.erf,
    "floor": whole(math.floor),
    "ceil": whole(math.ceil),
    "trunc": whole(math.trunc),
    "round": half_even,
    "exact": lambda x: x,
}


def quotient(a, b):
    if b == 0:
        return NAN if a == 0 or math.isnan(a) else math.copysign(INF, a) * math.copysign(1, b)
    return a / b


BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "div": quotient,
    "minimum": lambda a, b: NAN if a != a or b != b else min(a, b),
    "maximum": lambda a, b: NAN if a != a or b != b else max(a, b),
}
COMPARE = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "lt": lambda a, b: a < b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
}
TEST = {"isnan": math.isnan, "isinf": math.isinf, "isfinite": math.isfinite}
INTEGER = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "mul": lambda a, b: a * b,
    "floordiv": lambda a, b: a // b if b else 0,
    "mod": lambda a, b: a % b if b else 0,
    "and": lambda a, b: a & b,
    "or": lambda a, b: a | b,
    "xor": lambda a, b: a ^ b,
    "minimum": min,
    "maximum": max,
}


def wrap(value, kind):
    """An integer as two's complement of the width of `kind` holds it."""
    value &= (1 << kind.bits) - 1
    return value - (1 << kind.bits) if kind.kind == "int" and value >> (kind.bits - 1) else value


def close(result, expected):
    torch.testing.assert_close(result, torch.tensor(expected, dtype=result.dtype), rtol=1e-12, atol=1e-14, equal_nan=True)


def test_every_operation_has_a_test_here():
    others = {"where", "not", "shl", "shr", "pow", "popcount", "clz"}
    assert set(OPS) == UNARY.keys() | BINARY.keys() | COMPARE.keys() | TEST.keys() | INTEGER.keys() | others


@pytest.mark.parametrize("name", UNARY)
@given(values=st.lists(ANY, min_size=1, max_size=7))
def test_unary(name, values):
    close(apply(op(name, at("X i")), X=torch.tensor(values, dtype=torch.float64)), [UNARY[name](v) for v in values])


@pytest.mark.parametrize("name", BINARY)
@given(pairs=st.lists(st.tuples(ANY, ANY), min_size=1, max_size=7))
def test_binary(name, pairs):
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    close(apply(op(name, at("X i"), at("Y i")), X=x, Y=y), [BINARY[name](a, b) for a, b in pairs])


@pytest.mark.parametrize("name", COMPARE)
@given(pairs=st.lists(st.tuples(ANY, ANY), min_size=1, max_size=7))
def test_compare(name, pairs):
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    assert apply(op(name, at("X i"), at("Y i")), X=x, Y=y).tolist() == [COMPARE[name](a, b) for a, b in pairs]


@pytest.mark.parametrize("name", TEST)
@given(values=st.lists(ANY, min_size=1, max_size=7))
def test_tests_of_a_float(name, values):
    assert apply(op(name, at("X i")), X=torch.tensor(values)).tolist() == [TEST[name](v) for v in values]


@pytest.mark.parametrize("name", INTEGER)
@pytest.mark.parametrize("kind", ["i32", "i8", "u8", "i64"])
@given(data=st.data())
def test_integers_wrap_around(name, kind, data):
    kind = dtype(kind)
    low, high = (0, 255) if kind.kind == "uint" else (-(1 << (kind.bits - 1)), (1 << (kind.bits - 1)) - 1)
    number = st.one_of(st.integers(low, high), st.integers(max(low, -3), 3))
    pairs = data.draw(st.lists(st.tuples(number, number), min_size=1, max_size=7))
    x, y = (torch.tensor(column, dtype=to_torch(kind)) for column in zip(*pairs, strict=True))
    result = apply(op(name, at("X i"), at("Y i")), None, X=x, Y=y)
    assert result.dtype == to_torch(kind)
    assert result.tolist() == [wrap(INTEGER[name](a, b), kind) for a, b in pairs]


@given(pairs=st.lists(st.tuples(FINITE, FINITE.filter(lambda b: abs(b) > 1e-3)), min_size=1, max_size=7))
def test_floor_division_of_floats(pairs):
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    close(apply(op("floordiv", at("X i"), at("Y i")), X=x, Y=y), [a // b for a, b in pairs])
    close(apply(op("mod", at("X i"), at("Y i")), X=x, Y=y), [a % b for a, b in pairs])


@given(pairs=st.lists(st.tuples(st.floats(0.1, 20), st.floats(-3, 3)), min_size=1, max_size=7))
def test_pow(pairs):
    x, y = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    close(apply(op("pow", at("X i"), at("Y i")), X=x, Y=y), [a**b for a, b in pairs])
    close(apply(op("pow", at("X i"), 2), X=x), [a * a for a, _ in pairs])


@given(rows=st.lists(st.tuples(st.booleans(), ANY, ANY), min_size=1, max_size=7))
def test_where_selects_and_never_multiplies(rows):
    c, a, b = (torch.tensor(column) for column in zip(*rows, strict=True))
    a, b = a.double(), b.double()
    close(apply(op("where", at("C i"), at("A i"), at("B i")), C=c, A=a, B=b), [x if chosen else y for chosen, x, y in rows])


@pytest.mark.parametrize("kind", ["i8", "u8", "i16", "i32", "i64"])
@given(data=st.data())
def test_bits(kind, data):
    kind = dtype(kind)
    low = 0 if kind.kind == "uint" else -(1 << (kind.bits - 1))
    values = data.draw(st.lists(st.integers(low, low + (1 << kind.bits) - 1), min_size=1, max_size=7))
    by = data.draw(st.integers(0, kind.bits + 1))
    x = torch.tensor(values, dtype=to_torch(kind))
    patterns = [v & ((1 << kind.bits) - 1) for v in values]
    assert apply(op("popcount", at("X i")), None, X=x).tolist() == [bin(p).count("1") for p in patterns]
    assert apply(op("clz", at("X i")), None, X=x).tolist() == [kind.bits - p.bit_length() for p in patterns]
    assert apply(op("not", at("X i")), None, X=x).tolist() == [wrap(~v, kind) for v in values]
    assert apply(op("shl", at("X i"), by), None, X=x).tolist() == [wrap(v << by, kind) for v in values]
    assert apply(op("shr", at("X i"), by), None, X=x).tolist() == [v >> by for v in values]


def test_bools_stay_bools():
    x, y = torch.tensor([False, False, True, True]), torch.tensor([False, True, False, True])
    assert apply(op("and", at("X i"), at("Y i")), None, X=x, Y=y).tolist() == (x & y).tolist()
    assert apply(op("or", at("X i"), at("Y i")), None, X=x, Y=y).tolist() == (x | y).tolist()
    assert apply(op("xor", at("X i"), at("Y i")), None, X=x, Y=y).tolist() == (x ^ y).tolist()
    assert apply(op("not", at("X i")), None, X=x).tolist() == (~x).tolist()
    assert apply(op("add", at("X i"), at("Y i")), None, X=x, Y=y).tolist() == (x + y).tolist()


def test_rounding_of_integers_changes_nothing():
    x = torch.tensor([-7, 0, 9], dtype=torch.int32)
    for name in ("floor", "ceil", "round", "trunc"):
        result = apply(op(name, at("X i")), None, X=x)
        assert result.dtype == torch.int32 and result.tolist() == x.tolist()


@pytest.mark.parametrize("name", ["add", "mul", "exp", "div", "tanh", "pow"])
@pytest.mark.parametrize("kind", [torch.bfloat16, torch.float16, torch.float32])
def test_declared_types_round_as_eager_torch_does(name, kind):
    generator = torch.Generator().manual_seed(1)
    x, y = (torch.rand(200, generator=generator).mul(4).add(0.1).to(kind) for _ in range(2))
    functions = {"add": torch.add, "mul": torch.mul, "div": torch.div, "pow": torch.pow, "exp": torch.exp, "tanh": torch.tanh}
    tensors = {"X": x} if OPS[name].arity == 1 else {"X": x, "Y": y}
    result = apply(op(name, *(at(f"{tensor} i") for tensor in tensors)), None, **tensors)
    assert result.dtype == kind
    torch.testing.assert_close(result, functions[name](*tensors.values()), rtol=0 if kind != torch.float32 else 1e-6, atol=0)


def test_weak_operands_keep_the_type_of_the_tensor():
    x = torch.tensor([1.0, 3.0], dtype=torch.bfloat16)
    result = apply(op("mul", at("X i"), op("add", Scalar("s"), 0.1)), None, scalars={"s": 0.2}, X=x)
    assert result.dtype == torch.bfloat16 and torch.equal(result, x * (0.2 + 0.1))
    integer = torch.tensor([3], dtype=torch.int32)
    assert apply(op("mul", at("X i"), 0.5), None, X=integer).dtype == torch.float32
    assert apply(op("add", at("X i"), 2), None, X=integer).dtype == torch.int32


def test_float64_keeps_every_intermediate_wide_but_for_explicit_casts():
    x = torch.tensor([1 / 3], dtype=torch.float32)
    assert apply(op("mul", at("X i"), 0.1), X=x).item() == x.double().item() * 0.1
    assert apply(Cast(at("X i"), dtype("f32")), X=x.double()).item() == x.double().item()
    rounded = apply(op("mul", Cast(at("X i"), dtype("bf16")), 3.0), X=x)
    assert rounded.dtype == torch.float64 and rounded.item() == x.to(torch.bfloat16).double().item() * 3


@pytest.mark.parametrize("kind", ["f16", "bf16", "f8e4m3", "f8e5m2", "e8m0", "f32", "f64"])
@given(values=st.lists(st.floats(2.0**-6, 400, width=32), min_size=1, max_size=7))
def test_casts_between_floats(kind, values):
    x = torch.tensor(values)
    expected = x.to(to_torch(dtype(kind)))
    assert torch.equal(apply(Cast(at("X i"), dtype(kind)), None, X=x).float(), expected.float())
    assert torch.equal(apply(Cast(at("X i"), dtype(kind)), torch.float64, X=x), expected.float().double())


@given(values=st.lists(st.floats(-8, 8, width=32), min_size=1, max_size=9))
def test_cast_to_f4_takes_the_nearest_value_ties_to_even(values):
    table = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]

    def nearest(v):
        return math.copysign(min(enumerate(table), key=lambda entry: (abs(entry[1] - abs(v)), entry[0] % 2))[1], v)

    result = apply(Cast(at("X i"), dtype("f4e2m1")), None, X=torch.tensor(values))
    assert result.dtype == torch.float8_e4m3fn
    assert result.float().tolist() == [nearest(v) for v in values]


@pytest.mark.parametrize("kind", ["i8", "i4", "u8", "i16", "i32", "i64"])
@given(values=st.lists(st.floats(-300, 300, width=32), min_size=1, max_size=7))
def test_cast_to_an_integer_truncates_and_wraps(kind, values):
    result = apply(Cast(at("X i"), dtype(kind)), None, X=torch.tensor(values))
    assert result.dtype == to_torch(dtype(kind))
    assert result.tolist() == [wrap(math.trunc(v), dtype(kind)) for v in values]


def test_cast_to_bool_asks_for_nonzero():
    assert apply(Cast(at("X i"), dtype("bool")), None, X=torch.tensor([0.0, -0.0, 0.5, NAN])).tolist() == [False, False, True, True]


@given(values=st.lists(st.floats(width=32), min_size=1, max_size=7))
def test_bitcast_is_the_bit_pattern(values):
    x = torch.tensor(values)
    ordinary = [k for k, v in enumerate(values) if v == v]
    patterns = [struct.unpack("<i", struct.pack("<f", v))[0] for v in values]
    for mode in (None, torch.float64):
        bits = apply(Bitcast(at("X i"), dtype("i32")), mode, X=x)
        assert [bits[k].item() for k in ordinary] == [patterns[k] for k in ordinary]
        back = apply(Bitcast(Bitcast(at("X i"), dtype("i32")), dtype("f32")), mode, X=x)
        torch.testing.assert_close(back.float(), x, rtol=0, atol=0, equal_nan=True)


def test_bitcast_of_four_bit_types_and_bad_sizes():
    codes = torch.arange(-8, 8, dtype=torch.int8)
    e = Cast(Bitcast(Cast(at("X i"), dtype("i4")), dtype("f4e2m1")), dtype("f32"))
    half = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]
    assert apply(e, None, X=codes).tolist() == [-v for v in half] + half
    back = Cast(Bitcast(Bitcast(Cast(at("X i"), dtype("i4")), dtype("f4e2m1")), dtype("i4")), dtype("i8"))
    assert apply(back, None, X=codes).tolist() == codes.tolist()
    with pytest.raises(CascadeError, match=r"16 bits of bf16 do not make a i32 of 32 bits"):
        apply(Bitcast(at("X i"), dtype("i32")), None, X=torch.zeros(1, dtype=torch.bfloat16))


def test_literals_and_indices():
    x = torch.zeros(4)
    assert apply(op("add", at("X i"), Index("i")), None, X=x).tolist() == [0, 1, 2, 3]
    assert apply(op("maximum", at("X i"), Const(-INF)), None, X=x).tolist() == [0] * 4
    assert apply(op("sub", 2, Index("i")), None, X=x).tolist() == [2, 1, 0, -1]


@pytest.mark.parametrize("name", ["popcount", "clz", "and", "not"])
def test_bit_operations_refuse_floats(name):
    args = [at("X i")] * OPS[name].arity
    with pytest.raises(CascadeError, match=r"integer"):
        apply(op(name, *args), None, X=torch.zeros(1))


def test_every_type_has_a_torch_type():
    assert {name: to_torch(t) for name, t in DTYPES.items()}["i4"] == torch.int8
    assert len({to_torch(t) for t in DTYPES.values()}) == len(DTYPES) - 2
