"""Quantizers, from f32: whole numbers and minifloats under a scale for every 32 channels. A copy of the same bytes bounds them.

The peers in PyTorch do without what the recipes do for values that are not finite.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import einfall as ef
import torch

from benchmarks import cascades
from benchmarks.case import CHECKED_ROWS, EAGER, Aim, Case, Function, Pairs, Peer, Size, Tensors
from cookbook.quantization import bfp, int4_groups, mx

GROUP = 32
WIDTH = 128
ROUGHLY = 1e-4  # of a step: a value so near to the middle between two codes may have either
E4M3 = (8, 3, -6, 448.0)  # exponent of the largest element, bits of the mantissa, least exponent of a normal element, largest element


def quantize_rows(size: Size) -> Iterator[Case]:
    """int8, int4, MXFP8, block floating point of eight and of four bits."""
    shape = (1, 2, 24, WIDTH) if size == "tiny" else (1, 8, 16384, WIDTH)
    flat = (math.prod(shape[:-1]), WIDTH)
    yield quantize_case("int8", cascades.quantize_int8, flat, int8, int8_check, 1 + 2 / GROUP)
    yield quantize_case("int4", int4_groups.quantize, shape, int4, int4_check, 0.5 + 4 / GROUP)
    yield quantize_case("MXFP8", mx.quantize8, flat, mxfp8, mxfp8_check, 1 + 1 / GROUP)
    yield quantize_case("BFP8", bfp.encode8, shape, bfp8, bfp8_check, 1 + 1 / GROUP)
    yield quantize_case("BFP4", bfp.encode4, shape, bfp4, bfp4_check, 0.5 + 1 / GROUP)


def quantize_case(name: str, kernel: ef.Kernel, shape: tuple[int, ...], eager: Function, wanted: Function, written: float) -> Case:
    """A row for a quantizer that writes so many bytes a value.

    Args:
        wanted: (values, results) in float64 -> what the results should be.
    """
    values = math.prod(shape)

    def make(g: torch.Generator) -> tuple[torch.Tensor, ...]:
        loud = torch.exp2(4 * torch.rand(*shape[:-1], shape[-1] // GROUP, 1, generator=g))
        return ((torch.randn(*shape, generator=g).unflatten(-1, (-1, GROUP)) * loud).flatten(-2),)

    def check(tensors: Tensors, results: Tensors) -> Pairs:
        checked = [as_bytes(x).flatten(0, -2)[-CHECKED_ROWS:] for x in (*tensors, *results)]
        return tuple(zip(checked[1:], wanted(checked[0].double(), *checked[1:]), strict=True))

    return Case(
        name=f"quantize {name} {' x '.join(map(str, shape))}",
        group="quantize",
        dtype="f32",
        kernel=kernel,
        make=make,
        peers=(Peer(EAGER, eager),),
        check=check,
        flops=3.0 * values,  # at the least: a comparison for the scale, a product and a rounding
        bytes=values * (4 + written),
        roof="copy",
        aims=(Aim("of_roof", 0.85),),
    )


def as_bytes(x: torch.Tensor) -> torch.Tensor:
    """Powers of two as their bytes, exponent + 127; others as they are."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e8m0fnu else x


def grouped(x: torch.Tensor) -> torch.Tensor:
    """Values by their groups [..., group, place]."""
    return x.unflatten(-1, (-1, GROUP))


def packed(codes: torch.Tensor) -> torch.Tensor:
    """Two codes of four bits to a byte, the first half of the channels in the low nibbles."""
    low, high = codes.chunk(2, -1)
    return low | high << 4


def unpacked(bytes_: torch.Tensor) -> torch.Tensor:
    """The codes 0 .. 15 of such bytes."""
    return torch.cat([bytes_ & 15, bytes_ >> 4], -1)


def nearest(exact: torch.Tensor, found: torch.Tensor, least: int, most: int) -> torch.Tensor:
    """The whole numbers next to `exact`; where it lies all but in the middle of two, the one that was found if it is one of them."""
    in_range = exact.clamp(least, most)
    return torch.where((in_range - found.double()).abs() <= 0.5 + ROUGHLY, found.double(), in_range.round())


# PyTorch, eager.


def int8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = grouped(x)
    scale = (groups.abs().amax(-1) / 127).half()
    divisor = torch.where(scale > 0, scale.float(), 1.0)
    return (groups / divisor[..., None]).round().clamp(-127, 127).to(torch.int8).flatten(-2), scale


def int4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    groups = grouped(x)
    low, high = groups.amin(-1), groups.amax(-1)
    zero, scale = low.half(), ((high - low) / 15).half()
    divisor = torch.where(scale > 0, scale.float(), 1.0)
    codes = ((groups - zero.float()[..., None]) / divisor[..., None]).round().clamp(0, 15).to(torch.uint8)
    return packed(codes.flatten(-2)), scale, zero


def mxfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    groups = grouped(x)
    code = ((groups.abs().amax(-1).view(torch.int32) >> 23) - E4M3[0]).clamp(min=0)
    scaled = groups * ((254 - code) << 23).view(torch.float32)[..., None]
    elements = scaled.clamp(-E4M3[3], E4M3[3]).to(torch.float8_e4m3fn).flatten(-2)
    return elements, code.to(torch.uint8)  # as bytes: torch.compile knows no e8m0


def mantissas(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Whole numbers of `bits` bits and the exponent of each group: x is close to m * 2**(exponent + 2 - bits)."""
    groups = grouped(x)
    exponent = ((groups.abs().amax(-1).view(torch.int32) >> 23) - 127).clamp(min=bfp.LEAST)
    inverse = ((bits - 2 - exponent + 127) << 23).view(torch.float32)
    most = 2 ** (bits - 1) - 1
    return (groups * inverse[..., None]).round().clamp(-most, most).to(torch.int8).flatten(-2), exponent.to(torch.int8)


def bfp8(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return mantissas(x, 8)


def bfp4(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    whole, exponent = mantissas(x, 4)
    return packed((whole & 15).view(torch.uint8)), exponent


# Float64, on some of the rows. Codes are held against the scale that was found, scales against the values.


def int8_check(x: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    exact = grouped(x) / scale.double()[..., None]
    return nearest(exact, grouped(codes), -127, 127).flatten(-2), grouped(x).abs().amax(-1) / 127


def int4_check(x: torch.Tensor, bytes_: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor) -> tuple[torch.Tensor, ...]:
    groups = grouped(x)
    exact = (groups - zero.double()[..., None]) / scale.double()[..., None]
    codes = nearest(exact, grouped(unpacked(bytes_)), 0, 15).to(torch.uint8).flatten(-2)
    return packed(codes), (groups.amax(-1) - groups.amin(-1)) / 15, groups.amin(-1)


def top_exponent(x: torch.Tensor) -> torch.Tensor:
    """The exponent of the largest magnitude of each group: 2**e <= largest < 2**(e + 1)."""
    return torch.frexp(grouped(x).abs().amax(-1)).exponent - 1


def mxfp8_check(x: torch.Tensor, elements: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, ...]:
    largest, bits, least, most = E4M3
    exponent = top_exponent(x) - largest
    scaled = torch.ldexp(grouped(x), -exponent[..., None])
    step = torch.ldexp(torch.ones_like(scaled), (torch.frexp(scaled).exponent - 1).clamp(min=least) - bits)
    return ((scaled / step).round() * step).clamp(-most, most).flatten(-2), exponent + 127


def whole_numbers(x: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    exponent = top_exponent(x)
    most = 2 ** (bits - 1) - 1
    return torch.ldexp(grouped(x), (bits - 2 - exponent)[..., None]).round().clamp(-most, most).flatten(-2), exponent


def bfp8_check(x: torch.Tensor, codes: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return whole_numbers(x, 8)


def bfp4_check(x: torch.Tensor, bytes_: torch.Tensor, exponents: torch.Tensor) -> tuple[torch.Tensor, ...]:
    whole, exponent = whole_numbers(x, 4)
    return packed((whole.long() % 16).to(torch.uint8)), exponent
