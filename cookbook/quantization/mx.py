"""OCP microscaling formats: fp8 or fp4 elements under one power of two for every 32 of them, and the rounding of that power named."""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])
import einfall as ef
import ml_dtypes
import numpy as np
import torch

from cookbook.quantization.common import relative
from cookbook.recipe import Recipe, Step, serve

BLOCK = 32
MODES = ("floor", "rceil", "even", "ceil")
# of an element type: the exponent of its largest number, that number, its mantissa bits
E4M3, E2M1 = (8, 448.0, 3), (2, 6.0, 1)
NAN = 255  # the scale of a block with an element that is not finite


def scale_code(top, element, mode):
    """The e8m0 code, an exponent + 127, for blocks of largest magnitude `top`.

    floor   2 ** (floor(log2(top)) - emax), the OCP specification's; elements may saturate
    ceil    2 ** (ceil(log2(top)) - emax)
    even    floor, after `top` is rounded to the elements' mantissa bits
    rceil   the least power of two that is not below top / max, NVIDIA's
    """
    emax, most, mantissa = element
    bits = top.bitcast(ef.i32)
    if mode == "floor":
        code = (bits >> 23) - emax
    elif mode == "ceil":
        code = (bits + 0x7FFFFF >> 23) - emax
    elif mode == "even":
        code = (bits + (1 << (22 - mantissa)) >> 23) - emax
    elif mode == "rceil":
        bits = (top / most).bitcast(ef.i32)
        code = ef.where(bits <= 0x400000, 0, bits + 0x7FFFFF >> 23)  # up to 2**-127, a subnormal, the least scale will do
    else:
        raise ValueError(f"no rounding mode {mode!r}: one of {', '.join(MODES)}")
    return ef.maximum(code, 0)


def quantize(X, over, element, mode):
    """Elements in f32, in the range of their type, and e8m0 codes."""
    usable = ef.isfinite(X).all(over)
    code = scale_code(ef.abs(X).max(over), element, mode)
    scaled = X * ((254 - code) << 23).bitcast(ef.f32)  # by a power of two: exact, or below all elements
    M = ef.minimum(ef.maximum(scaled, -element[1]), element[1])
    return ef.where(usable, M, 0.0), ef.where(usable, code, NAN).to(ef.u8).bitcast(ef.e8m0)


@ef.kernel
def quantize8(X: "m (n j=32)", *, mode: str = "floor") -> ("m (n j)", "m n"):
    """MXFP8: f8e4m3 elements."""
    M, S = quantize(X, "j", E4M3, mode)
    E = M.to(ef.f8e4m3)
    return E, S


@ef.kernel
def quantize4(X: "m (s=2 c j=32)", *, mode: str = "floor") -> ("m (c j)", "m (s c)"):
    """MXFP4: f4e2m1 elements, packed: byte x holds element x in its low and element x + K/2 in its high nibble."""
    M, S = quantize(X, "j", E2M1, mode)
    code = M.to(ef.f4e2m1).bitcast(ef.i4).to(ef.i32) & 15
    P = (code << (4 * ef.index("s"))).sum("s").to(ef.u8)
    return P, S


@ef.kernel
def matmul8(A: "m (n j=32)", As: "m n", B: "o (n j)", Bs: "o n") -> "m o":
    """The product of two MXFP8 matrices."""
    return (A.to(ef.f32) * As.to(ef.f32) * (B.to(ef.f32) * Bs.to(ef.f32))).sum("n j")


def unpack(P):
    """The elements of packed bytes; they gain the rank s."""
    return (P.to(ef.i32) >> (4 * ef.index("s", size=2)) & 15).to(ef.i4).bitcast(ef.f4e2m1).to(ef.f32)


@ef.kernel
def matmul4(A: "m (c j=32)", As: "m (s=2 c)", B: "o (c j)", Bs: "o (s c)") -> "m o":
    """The product of two MXFP4 matrices."""
    return (unpack(A) * As.to(ef.f32) * (unpack(B) * Bs.to(ef.f32))).sum("s c j")


# The oracles, on positions: the casts of ml_dtypes, powers of two by frexp and ldexp.


def wanted_exponent(top, element, mode):
    """The exponent of the scale for largest magnitudes `top`, float32, before it is clamped to -127."""
    emax, most, mantissa = element
    if mode == "rceil":
        fraction, exponent = np.frexp((top / np.float32(most)).astype(np.float64))
        return np.where(fraction > 0.5, exponent, np.where(fraction == 0.5, exponent - 1, -127))
    fraction, exponent = np.frexp(top.astype(np.float64))  # fraction in 0.5 .. 1
    if mode == "even":
        steps = 2.0 ** (mantissa + 1)
        fraction, carried = np.frexp(np.round(fraction * steps) / steps)
        exponent = exponent + carried
    return exponent - (0 if mode == "ceil" else 1) - emax - ((fraction == 0.5) if mode == "ceil" else 0)


def blocks_of(X):
    return X.numpy().reshape(*X.shape[:-1], -1, BLOCK)


def quantized(X, element, mode):
    """Elements as float64 within the range of their type, and e8m0 codes as bytes."""
    blocks = blocks_of(X)
    good = np.isfinite(blocks).all(-1)
    top = np.where(good, np.abs(blocks).max(-1), 0)
    exponent = np.where(top > 0, np.maximum(wanted_exponent(top, element, mode), -127), -127)
    scaled = np.ldexp(np.where(good[..., None], blocks, 0).astype(np.float64), -exponent[..., None])
    codes = np.where(good, exponent + 127, NAN).astype(np.uint8)
    return np.clip(scaled, -element[1], element[1]).reshape(X.shape), codes


def quantize8_oracle(X, *, mode):
    values, codes = quantized(X, E4M3, mode)
    elements = values.astype(np.float32).astype(ml_dtypes.float8_e4m3fn).view(np.uint8)
    return torch.from_numpy(elements).view(torch.float8_e4m3fn), torch.from_numpy(codes).view(torch.float8_e8m0fnu)


def quantize4_oracle(X, *, mode):
    values, codes = quantized(X, E2M1, mode)
    nibbles = values.astype(np.float32).astype(ml_dtypes.float4_e2m1fn).view(np.uint8)
    first, second = np.split(nibbles, 2, -1)
    return torch.from_numpy(first | second << 4), torch.from_numpy(codes).view(torch.float8_e8m0fnu)


def scaled(elements, scales):
    return (elements.unflatten(-1, (-1, BLOCK)) * scales[..., None]).flatten(-2)


def matmul8_oracle(A, As, B, Bs):
    return scaled(A, As) @ scaled(B, Bs).mT


def unpacked(P):
    """The elements of packed bytes, as ml_dtypes reads them, in float64."""
    nibbles = np.concatenate([P.numpy() & 15, P.numpy() >> 4], -1)
    return torch.from_numpy(nibbles.view(ml_dtypes.float4_e2m1fn).astype(np.float64))


def matmul4_oracle(A, As, B, Bs):
    return scaled(unpacked(A), As.double()) @ scaled(unpacked(B), Bs.double()).mT


# Inputs.


def normal(generator, rows, columns):
    """Normal values, each block times a power of its own."""
    sizes = torch.exp2(torch.rand(rows, columns // BLOCK, 1, generator=generator) * 40 - 20)
    return (torch.randn(rows, columns // BLOCK, BLOCK, generator=generator) * sizes).reshape(rows, columns)


def matrix(generator, n):
    return (normal(generator, n["m"], n["n"] * BLOCK),)


def matrix4(generator, n):
    return (normal(generator, n["m"], 2 * n["c"] * BLOCK),)


def matrices(generator, n):
    a, b = (torch.randn(n[rank], n["n"] * BLOCK, generator=generator) for rank in "mo")
    return *quantize8_oracle(a, mode="floor"), *quantize8_oracle(b, mode="rceil")


def matrices4(generator, n):
    a, b = (torch.randn(n[rank], 2 * n["c"] * BLOCK, generator=generator) for rank in "mo")
    return *quantize4_oracle(a, mode="even"), *quantize4_oracle(b, mode="floor")


def show(folder):
    """The error of each rounding mode, and where it comes from."""
    generator = torch.Generator().manual_seed(0)
    normals = torch.randn(256, 1024, generator=generator)
    tailed = normals / torch.sqrt(torch.randn(256, 1024, 4, generator=generator).square().mean(-1))  # Student's t, 4 degrees of freedom
    lines = ["| elements | mode | error, normal | error, heavy tails | saturated | largest of a block |", "|---|---|---|---|---|---|"]
    for name, element, kernel in (("f8e4m3", E4M3, quantize8), ("f4e2m1", E2M1, quantize4)):
        for mode in MODES:
            errors, share, largest = [], 0.0, 0.0
            for X in (normals, tailed):
                stored, S = kernel.reference(X, mode=mode)
                numbers = stored.double() if kernel is quantize8 else unpacked(stored)
                found = scaled(numbers, S.double())
                errors.append(relative(found, X))
                if X is normals:
                    beyond = X.double().abs() > scaled(torch.full_like(numbers, element[1]), S.double())
                    share = float(beyond.double().mean())
                    place = X.unflatten(-1, (-1, BLOCK)).abs().argmax(-1, keepdim=True)
                    x, y = (t.unflatten(-1, (-1, BLOCK)).gather(-1, place).double() for t in (X, found))
                    largest = float(((x - y) / x).abs().mean())
            lines.append(f"| {name} | {mode} | {errors[0]:.4f} | {errors[1]:.4f} | {share:.2%} | {largest:.4f} |")
    return lines


SIZES = {"m": 64, "n": 8, "c": 4, "o": 48}
RANGES = {"m": (1, 37), "n": (1, 3), "c": (1, 2), "o": (1, 23)}


def _step(name, kernel, oracle, inputs, ranks, **rest):
    return Step(name, kernel, oracle, inputs, {r: SIZES[r] for r in ranks}, {r: RANGES[r] for r in ranks}, **rest)


RECIPE = Recipe(
    name="mx",
    title="Microscaling formats: MXFP8 and MXFP4 with the rounding of the shared scale named",
    source="OCP Microscaling Formats (MX) Specification 1.0, sections 5 and 6; the modes as torchao.prototype.mx_formats names them",
    steps=(
        *(_step(f"quantize8_{m}", quantize8, quantize8_oracle, matrix, "mn", static={"mode": m}, exact=True) for m in MODES),
        *(_step(f"quantize4_{m}", quantize4, quantize4_oracle, matrix4, "mc", static={"mode": m}, exact=True) for m in ("floor", "even")),
        _step("matmul8", matmul8, matmul8_oracle, matrices, "mno"),
        _step("matmul4", matmul4, matmul4_oracle, matrices4, "mco"),
    ),
    show=show,
)

if __name__ == "__main__":
    serve(RECIPE)
