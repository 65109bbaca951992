"""Narrow types on the CPU, every code of them: read, written, rounded to and taken as bits, against torch and ml_dtypes."""

from __future__ import annotations

import math

import ml_dtypes
import numpy as np
import programs as p
import pytest
import torch
from einfall.ir.binding import to_torch
from einfall.ir.expr import Bitcast, Cast, Const, Index, Op, Read, aligned
from einfall.ir.reference_ops import round_f4
from einfall.ir.types import bf16, e8m0, f4e2m1, f8e4m3, f8e5m2, f16, f32, i4, i8, i16, i32, i64, u8
from kernels import run, source_of, strided_copy

A = aligned("A", "i", "j")
BYTES = (f8e4m3, f8e5m2, e8m0)
ML = {f8e4m3: ml_dtypes.float8_e4m3fn, f8e5m2: ml_dtypes.float8_e5m2, f4e2m1: ml_dtypes.float4_e2m1fn}
FOURS = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])
WIDTHS = pytest.mark.parametrize(("tile", "narrowed"), [(64, False), (1, False), (64, True)], ids=["vectors", "scalars", "avx2"])


def apply(expr, x, declared, out, *, tile=64, narrowed=False, **options):
    """Y = expr of one row A of declared type; an odd length, so that the last vector is cut off."""
    program = p.elementwise(expr, (p.tensor("A", "i j", declared),), out, tile=tile)
    return run(program, {"A": x.contiguous()[None]}, narrowed=narrowed, **options)["Y"][0]


def codes(t):
    """Every code of a type of eight bits, and a few of them again."""
    return torch.cat([torch.arange(256, dtype=torch.uint8), torch.arange(7, dtype=torch.uint8)]).view(to_torch(t))


def patterns():
    """Every bf16 and every f16, what lies just beside the middle between codes, and any bits, as f32."""
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)
    narrow = [torch.arange(256, dtype=torch.uint8).view(to_torch(t)).float() for t in BYTES]
    middles = []
    for values in (*narrow, FOURS, -FOURS):
        values = values[values.isfinite()].unique()
        middle = ((values[1:].double() + values[:-1].double()) / 2).float()
        middles += [middle, middle.nextafter(torch.tensor(math.inf)), middle.nextafter(torch.tensor(-math.inf))]
    anything = torch.randint(-(1 << 31), (1 << 31) - 1, (20001,), generator=torch.Generator().manual_seed(1)).to(torch.int32)
    return torch.cat([every.view(torch.bfloat16).float(), every.view(torch.float16).float(), *middles, anything.view(torch.float32)])


def same_bits(actual, expected):
    assert torch.equal(actual.contiguous().view(torch.uint8), expected.contiguous().view(torch.uint8))


@WIDTHS
@pytest.mark.parametrize("t", [*BYTES, f4e2m1], ids=str)
def test_every_code_is_read(t, tile, narrowed):
    x = codes(t) if t != f4e2m1 else torch.cat([FOURS, -FOURS]).repeat(3)[:-3].to(torch.float8_e4m3fn)
    actual = apply(A, x, t, f32, tile=tile, narrowed=narrowed)
    torch.testing.assert_close(actual, x.float(), rtol=0, atol=0, equal_nan=True)
    assert torch.equal(actual.signbit(), x.float().signbit()) or t == e8m0
    if t in ML and t != f4e2m1:
        independent = torch.from_numpy(x.view(torch.uint8).numpy().view(ML[t]).astype(np.float32))
        torch.testing.assert_close(actual, independent, rtol=0, atol=0, equal_nan=True)


@WIDTHS
@pytest.mark.parametrize("t", [*BYTES, f16, bf16], ids=str)
def test_what_is_written_is_rounded_as_torch_rounds(t, tile, narrowed):
    x = patterns() if tile > 1 else patterns()[::37]
    expected = x.to(to_torch(t))
    nan = expected.float().isnan()
    for expr in (A, Cast(A, t)):
        actual = apply(expr, x, f32, t, tile=tile, narrowed=narrowed)
        same_bits(actual[~nan], expected[~nan])
        assert actual[nan].float().isnan().all()
        if t in BYTES:
            same_bits(actual, expected)
    rounded = apply(Cast(A, t), x, f32, f32, tile=tile, narrowed=narrowed)
    torch.testing.assert_close(rounded, expected.float(), rtol=0, atol=0, equal_nan=True)


def test_rounding_agrees_with_an_independent_implementation():
    x = patterns()
    x = x[x.isfinite()]
    for t in (f8e4m3, f8e5m2):
        with np.errstate(over="ignore"):
            expected = torch.from_numpy(x.numpy().astype(ML[t]).view(np.uint8))
        actual = apply(A, x, f32, t).view(torch.uint8)
        within = x.abs() <= (464 if t == f8e4m3 else math.inf)  # beyond, torch saturates and ml_dtypes gives NaN
        assert torch.equal(actual[within], expected[within])
        assert set(actual[~within].tolist()) <= {0x7E, 0xFE}


@WIDTHS
def test_four_bit_floats(tile, narrowed):
    x = patterns() if tile > 1 else patterns()[::37]
    expected = round_f4(x).float()
    for out in (f4e2m1, f32):
        actual = apply(Cast(A, f4e2m1), x, f32, out, tile=tile, narrowed=narrowed).float()
        assert torch.equal(actual, expected) and torch.equal(actual.signbit(), x.signbit())
    finite = x[x.isfinite()]
    independent = torch.from_numpy(finite.numpy().astype(ML[f4e2m1]).astype(np.float32))
    assert torch.equal(expected[x.isfinite()], independent)
    values = torch.cat([FOURS, -FOURS])
    nibbles = apply(Bitcast(A, i4), values.to(torch.float8_e4m3fn), f4e2m1, i4, tile=tile, narrowed=narrowed)
    assert nibbles.tolist() == [*range(8), *range(-8, 0)]
    back = apply(Bitcast(A, f4e2m1), nibbles, i4, f4e2m1, tile=tile, narrowed=narrowed).float()
    assert torch.equal(back, values) and torch.equal(back.signbit(), values.signbit())


@WIDTHS
@pytest.mark.parametrize("t", BYTES, ids=str)
def test_the_bits_of_bytes(t, tile, narrowed):
    x = codes(t)
    options = {"tile": tile, "narrowed": narrowed}
    same_bits(apply(Bitcast(A, u8), x, t, u8, **options), x)
    same_bits(apply(Bitcast(A, i8), x, t, i8, **options), x)
    same_bits(apply(Bitcast(A, t), x.view(torch.uint8), u8, t, **options), x)
    computed = apply(Bitcast(Cast(A, t), u8), x.float(), f32, u8, **options)
    same_bits(computed, x.float().to(to_torch(t)))
    read = apply(Op("add", (Bitcast(A, t), Const(0.0))), x.view(torch.int8), i8, f32, **options)
    torch.testing.assert_close(read, x.float(), rtol=0, atol=0, equal_nan=True)


@WIDTHS
@pytest.mark.parametrize("t", [f16, bf16], ids=str)
def test_the_bits_of_sixteen(t, tile, narrowed):
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.int16)[:: 1 if tile > 1 else 41].contiguous()
    x = every.view(to_torch(t))
    options = {"tile": tile, "narrowed": narrowed}
    same_bits(apply(Bitcast(A, i16), x, t, i16, **options), x)
    same_bits(apply(Bitcast(A, t), every, i16, t, **options), x)
    finite = ~x.isnan()
    computed = apply(Bitcast(Op("mul", (A, Const(1.0))), i16), x, t, i16, **options)
    same_bits(computed[finite], x[finite])


@pytest.mark.parametrize("tile", [64, 1])
def test_bits_of_words(tile):
    words = torch.randint(-(1 << 31), (1 << 31) - 1, (5003,), generator=torch.Generator().manual_seed(2)).to(torch.int32)
    same_bits(apply(Bitcast(A, f32), words, i32, f32, tile=tile), words)
    same_bits(apply(Bitcast(A, i32), words.view(torch.float32), f32, i32, tile=tile), words)
    same_bits(apply(Bitcast(A, i8), words.to(torch.uint8), u8, i8, tile=tile), words.to(torch.uint8))


@pytest.mark.parametrize("t", [*BYTES, f16, bf16], ids=str)
def test_gathered_and_strided_codes(t):
    x = torch.rand(5, 300, generator=torch.Generator().manual_seed(3)).add(0.3).to(to_torch(t))
    program = p.elementwise(A, (p.tensor("A", "i j", t),), f32)
    given = strided_copy(x.view(torch.int8 if t in BYTES else torch.int16), last=True).view(to_torch(t)) if t not in BYTES else None
    backwards = Read("A", (Index("i"), Op("sub", (Const(299), Index("j")))))
    reverse = p.elementwise(backwards, (p.tensor("A", "i j", t),), f32)
    assert torch.equal(run(reverse, {"A": x})["Y"], x.float().flip(1))
    if given is not None:
        assert torch.equal(run(program, {"A": given}, strided=frozenset("A"))["Y"], x.float())
    shifted = Read("A", (Index("i"), Op("sub", (Index("j"), Const(1)))), Const(1.0))
    filled = run(p.elementwise(shifted, (p.tensor("A", "i j", t),), f32), {"A": x})["Y"]
    assert torch.equal(filled, torch.cat([torch.ones(5, 1), x.float()[:, :-1]], 1))


@pytest.mark.parametrize("tile", [64, 1])
def test_integers_of_four_bits_wrap_around(tile):
    x = torch.arange(-8, 8, dtype=torch.int8)
    expected = (x.long() * 3 + 8) % 16 - 8
    assert torch.equal(apply(Op("mul", (A, Const(3))), x, i4, i4, tile=tile).long(), expected)
    assert torch.equal(apply(Cast(Op("mul", (A, Const(3))), f32), x, i4, f32, tile=tile), expected.float())
    given = torch.arange(-40, 40, dtype=torch.int32)
    assert torch.equal(apply(Cast(A, i4), given, i32, i8, tile=tile).long(), (given.long() + 8) % 16 - 8)
    counts = [bin(int(v) & 15).count("1") for v in x]
    assert apply(Op("popcount", (A,)), x, i4, i32, tile=tile).tolist() == counts
    assert apply(Op("clz", (A,)), x, i4, i32, tile=tile).tolist() == [4 - (int(v) & 15).bit_length() for v in x]


def test_rows_of_bytes_are_converted_at_once():
    """A vector of codes is one load and lanewise instructions: nothing is done element by element."""
    for t in (u8, i8, *BYTES):
        text = source_of(p.elementwise(Cast(A, f32), (p.tensor("A", "i j", t),), f32)).text
        assert "T.unroll" not in text.partition("def main")[2]


def test_a_cast_from_wide_integers():
    x = torch.tensor([0, 1, -1, 255, 256, -129, 1 << 33, -(1 << 40) + 5, (1 << 62) + 3])
    for t in (i32, i16, i8, u8):
        assert torch.equal(apply(Cast(A, t), x, i64, t), x.to(to_torch(t)))
        assert torch.equal(apply(Cast(Cast(A, t), f32), x, i64, f32), x.to(to_torch(t)).float())
