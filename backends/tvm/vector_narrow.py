"""Helpers for floats of fewer than 32 bits: to f32, from f32 as torch rounds, and their codes.

f8e4m3  no infinity: beyond 448 it is 448, 0x7f is NaN            f8e5m2  as the high byte of an f16
e8m0    powers of two: no sign, no zero, 0xff is NaN              f4e2m1  kept in the codes of f8e4m3; beyond 6 it is 6, NaN too
"""

from __future__ import annotations

from .llvm_ir import Ir

CODES = {"bf16": "i16", "f16": "i16", "f8e4m3": "i8", "f8e5m2": "i8", "e8m0": "i8", "f4e2m1": "i8"}


def widen(ir: Ir, t: str, code: str) -> str:
    """Codes as f32, exactly."""
    match t:
        case "bf16":
            shifted = ir.op(f"shl {ir.i} {ir.cast('zext', code, 'i16', 'i32')}, {ir.whole(16)}")
            return ir.cast("bitcast", shifted, "i32", "float")
        case "f16":
            return ir.cast("fpext", ir.cast("bitcast", code, "i16", "half"), "half", "float")
        case "f8e5m2":
            high = ir.op(f"shl {ir.kind('i16')} {ir.cast('zext', code, 'i8', 'i16')}, {ir.constant('i16', 8)}")
            return widen(ir, "f16", high)
        case "e8m0":
            return _widen_e8m0(ir, code)
        case _:
            return _widen_e4m3(ir, code)


def _widen_e4m3(ir: Ir, code: str) -> str:
    """The exponent moved into an f16, which has subnormals too, and then 2**8 times that."""
    short = ir.kind("i16")
    eight, seven, nan = (ir.constant("i16", n) for n in (8, 7, 0x7F))
    wide = ir.cast("zext", code, "i8", "i16")
    magnitude = ir.op(f"and {short} {wide}, {nan}")
    sign = ir.op(f"and {short} {ir.op(f'shl {short} {wide}, {eight}')}, {ir.constant('i16', -0x8000)}")
    signed = ir.op(f"or {short} {ir.op(f'shl {short} {magnitude}, {seven}')}, {sign}")
    is_nan = ir.cast("sext", ir.op(f"icmp eq {short} {magnitude}, {nan}"), "i1", "i16")
    quiet = ir.op(f"and {short} {is_nan}, {ir.constant('i16', 0x7E00)}")
    return ir.op(f"fmul {ir.f} {widen(ir, 'f16', ir.op(f'or {short} {signed}, {quiet}'))}, {ir.real(256.0)}")


def _widen_e8m0(ir: Ir, code: str) -> str:
    """The code is the exponent; the least is a subnormal of f32."""
    wide = ir.cast("zext", code, "i8", "i32")
    power = ir.op(f"shl {ir.i} {wide}, {ir.whole(23)}")
    least = ir.op(f"icmp eq {ir.i} {wide}, {ir.whole(0)}")
    nan = ir.op(f"icmp eq {ir.i} {wide}, {ir.whole(0xFF)}")
    bits = ir.select(nan, ir.whole(0x7FC00000), ir.select(least, ir.whole(0x00400000), power, "i32"), "i32")
    return ir.cast("bitcast", bits, "i32", "float")


def narrow(ir: Ir, t: str, x: str) -> str:
    """f32 as codes, rounded to nearest, ties to even."""
    match t:
        case "f16":
            return ir.cast("bitcast", ir.cast("fptrunc", x, "float", "half"), "half", "i16")
        case "bf16":
            return ir.cast("trunc", ir.op(f"lshr {ir.i} {rounded_bf16(ir, x)}, {ir.whole(16)}"), "i32", "i16")
        case "e8m0":
            return _narrow_e8m0(ir, x)
        case "f8e5m2":
            return _narrow_byte(ir, x, 2, 15, 0x47800000, 0x7C)
        case "f4e2m1":
            return narrow(ir, "f8e4m3", _round_f4(ir, x))
        case _:
            return _narrow_byte(ir, x, 3, 7, 0x43E80000, 0x7E)


def rounded_bf16(ir: Ir, x: str) -> str:
    """The bits of f32 rounded to the nearest bf16, ties to even; a NaN stays one."""
    bits = ir.cast("bitcast", x, "float", "i32")
    odd = ir.op(f"and {ir.i} {ir.op(f'lshr {ir.i} {bits}, {ir.whole(16)}')}, {ir.whole(1)}")
    carried = ir.op(f"add {ir.i} {ir.op(f'add {ir.i} {bits}, {ir.whole(0x7FFF)}')}, {odd}")
    cut = ir.op(f"and {ir.i} {carried}, {ir.whole(-65536)}")
    quiet = ir.op(f"or {ir.i} {bits}, {ir.whole(0x400000)}")
    return ir.select(ir.op(f"fcmp uno {ir.f} {x}, {x}"), quiet, cut, "i32")


def _magnitude(ir: Ir, x: str) -> str:
    return ir.op(f"and {ir.i} {ir.cast('bitcast', x, 'float', 'i32')}, {ir.whole(0x7FFFFFFF)}")


def _narrow_byte(ir: Ir, x: str, mantissa: int, bias: int, limit: int, beyond: int) -> str:
    """A byte of sign, exponent and mantissa; magnitudes of bits `limit` and more are `beyond`, NaN is 0x7f.

    A subnormal is rounded by adding the number whose last place is the subnormals' step.
    """
    drop = 23 - mantissa
    magic = (127 - bias + 1 + drop) << 23
    bits = ir.cast("bitcast", x, "float", "i32")
    size = ir.op(f"and {ir.i} {bits}, {ir.whole(0x7FFFFFFF)}")
    shifted = ir.op(f"fadd {ir.f} {ir.cast('bitcast', size, 'i32', 'float')}, {ir.cast('bitcast', ir.whole(magic), 'i32', 'float')}")
    small = ir.op(f"sub {ir.i} {ir.cast('bitcast', shifted, 'float', 'i32')}, {ir.whole(magic)}")
    odd = ir.op(f"and {ir.i} {ir.op(f'lshr {ir.i} {size}, {ir.whole(drop)}')}, {ir.whole(1)}")
    moved = ir.op(f"add {ir.i} {size}, {ir.whole(((bias - 127) << 23) + (1 << (drop - 1)) - 1)}")
    normal = ir.op(f"lshr {ir.i} {ir.op(f'add {ir.i} {moved}, {odd}')}, {ir.whole(drop)}")
    tiny = ir.op(f"icmp slt {ir.i} {size}, {ir.whole((128 - bias) << 23)}")
    large = ir.op(f"icmp sge {ir.i} {size}, {ir.whole(limit)}")
    nan = ir.op(f"icmp sgt {ir.i} {size}, {ir.whole(0x7F800000)}")
    code = ir.select(large, ir.select(nan, ir.whole(0x7F), ir.whole(beyond), "i32"), ir.select(tiny, small, normal, "i32"), "i32")
    sign = ir.op(f"and {ir.i} {ir.op(f'lshr {ir.i} {bits}, {ir.whole(24)}')}, {ir.whole(0x80)}")
    return ir.cast("trunc", ir.op(f"or {ir.i} {code}, {sign}"), "i32", "i8")


def _narrow_e8m0(ir: Ir, x: str) -> str:
    """The nearest power of two, a tie to the larger one; among the subnormals of f32 a tie to the smaller one. The sign is lost."""
    size = _magnitude(ir, x)
    exponent = ir.op(f"lshr {ir.i} {size}, {ir.whole(23)}")
    rest = ir.op(f"and {ir.i} {size}, {ir.whole(0x7FFFFF)}")
    subnormal = ir.op(f"icmp eq {ir.i} {exponent}, {ir.whole(0)}")
    least = ir.select(subnormal, ir.whole(0x400001), ir.whole(0x400000), "i32")
    up = ir.cast("zext", ir.op(f"icmp sge {ir.i} {rest}, {least}"), "i1", "i32")
    special = ir.op(f"icmp eq {ir.i} {exponent}, {ir.whole(0xFF)}")
    code = ir.select(special, exponent, ir.op(f"add {ir.i} {exponent}, {up}"), "i32")
    return ir.cast("trunc", code, "i32", "i8")


def _round_f4(ir: Ir, x: str) -> str:
    """f32 rounded to f4e2m1; a magnitude beyond 6 is 6, and so is a NaN, for the format has none."""
    size = ir.intrinsic("minnum", "float", ir.unary("fabs", x), ir.real(6.0))
    low, middle = (ir.op(f"fcmp olt {ir.f} {size}, {ir.real(bound)}") for bound in (2.0, 4.0))
    step = ir.select(low, ir.real(0.5), ir.select(middle, ir.real(1.0), ir.real(2.0)))
    steps = ir.select(low, ir.real(2.0), ir.select(middle, ir.real(1.0), ir.real(0.5)))
    rounded = ir.op(f"fmul {ir.f} {ir.unary('rint', ir.op(f'fmul {ir.f} {size}, {steps}'))}, {step}")
    return ir.intrinsic("copysign", "float", rounded, x)


def convert_ir(verb: str, t: str, n: int) -> str:
    """`round`: f32 to the nearest value of `t` as f32. `bits`: its code. `from_bits`: the value of a code."""
    code = CODES[t]
    if verb == "from_bits":
        ir = Ir.define(f"from_bits_{t}", n, "float", code)
        return ir.finish(ir.f, widen(ir, t, "%x"))
    ir = Ir.define(f"{verb}_{t}", n, "float" if verb == "round" else code, "float")
    if verb == "bits":
        return ir.finish(ir.kind(code), narrow(ir, t, "%x"))
    if t == "bf16":
        return ir.finish(ir.f, ir.cast("bitcast", rounded_bf16(ir, "%x"), "i32", "float"))
    return ir.finish(ir.f, _round_f4(ir, "%x") if t == "f4e2m1" else widen(ir, t, narrow(ir, t, "%x")))


def nibble_ir(verb: str, n: int) -> str:
    """`bits_nibble`: the code of an f4e2m1 value as an i4. `from_bits_nibble`: the value of such a code."""
    if verb == "bits":
        ir = Ir.define("bits_nibble", n, "i8", "float")
        size = _magnitude(ir, "%x")
        large = ir.op(f"sub {ir.i} {ir.op(f'lshr {ir.i} {size}, {ir.whole(22)}')}, {ir.whole(252)}")
        some = ir.cast("zext", ir.op(f"icmp sge {ir.i} {size}, {ir.whole(0x3F000000)}"), "i1", "i32")
        code = ir.select(ir.op(f"icmp sge {ir.i} {size}, {ir.whole(0x3F800000)}"), large, some, "i32")
        sign = ir.op(f"ashr {ir.i} {ir.cast('bitcast', '%x', 'float', 'i32')}, {ir.whole(31)}")
        signed = ir.op(f"or {ir.i} {code}, {ir.op(f'shl {ir.i} {sign}, {ir.whole(3)}')}")
        return ir.finish(ir.kind("i8"), ir.cast("trunc", signed, "i32", "i8"))
    ir = Ir.define("from_bits_nibble", n, "float", "i8")
    wide = ir.cast("sext", "%x", "i8", "i32")
    size = ir.op(f"and {ir.i} {wide}, {ir.whole(7)}")
    half = ir.op(f"fmul {ir.f} {ir.cast('sitofp', size, 'i32', 'float')}, {ir.real(0.5)}")
    bits = ir.op(f"shl {ir.i} {ir.op(f'add {ir.i} {size}, {ir.whole(252)}')}, {ir.whole(22)}")
    small = ir.op(f"icmp slt {ir.i} {size}, {ir.whole(2)}")
    value = ir.select(small, ir.cast("bitcast", half, "float", "i32"), bits, "i32")
    sign = ir.op(f"shl {ir.i} {ir.op(f'and {ir.i} {wide}, {ir.whole(8)}')}, {ir.whole(28)}")
    return ir.finish(ir.f, ir.cast("bitcast", ir.op(f"or {ir.i} {value}, {sign}"), "i32", "float"))
