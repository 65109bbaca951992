"""Device functions that emitted files bring along: what Triton has no operation for. Each is printed into a file only where it is used.

They use plain arithmetic on f32 and i32 alone, so they mean the same on every target, in every version of Triton and in its
interpreter. Codes of narrow floats are i32 here:

    f8e4m3  no infinity: beyond 448 it is 448, 0x7f is NaN            f8e5m2  as the high byte of an f16
    e8m0    powers of two: no sign, no zero, 0xff is NaN              f4e2m1  kept in the codes of f8e4m3; beyond 6 it is 6, NaN too
"""

from __future__ import annotations

import re

HELPERS: dict[str, str] = {
    "floor_div": '''
@triton.jit
def floor_div(a, b):
    """The quotient of integers rounded down; by zero it is 0."""
    d = tl.where(b == 0, 1, b).to(b.dtype)
    rest = a % d
    return tl.where(b == 0, 0, a // d - ((rest != 0) & ((rest < 0) != (d < 0))).to(a.dtype)).to(a.dtype)
''',
    "floor_mod": '''
@triton.jit
def floor_mod(a, b):
    """The remainder of integers with the sign of the divisor; by zero it is 0."""
    d = tl.where(b == 0, 1, b).to(b.dtype)
    rest = a % d
    return tl.where(b == 0, 0, tl.where((rest != 0) & ((rest < 0) != (d < 0)), rest + d, rest)).to(a.dtype)
''',
    "float_mod": '''
@triton.jit
def float_mod(a, b):
    """The remainder of floats with the sign of the divisor."""
    rest = a % b
    return tl.where((rest != 0) & ((rest < 0) != (b < 0)), rest + b, rest)
''',
    "float_floor_div": '''
@triton.jit
def float_floor_div(a, b):
    """The quotient of floats rounded down."""
    far = (tl.abs(b) == float("inf")) & (tl.abs(a) < float("inf"))
    near = tl.where(b == 0, a / b, tl.floor((a - float_mod(a, b)) / b + 0.5))
    return tl.where(far, tl.where((a != 0) & ((a < 0) != (b < 0)), -1.0, 0.0), near)
''',
    "shift_left": '''
@triton.jit
def shift_left(x, by, BITS: tl.constexpr):
    """A shift; by what is not within the width it gives 0."""
    inside = (by >= 0) & (by < BITS)
    return tl.where(inside, x << tl.where(inside, by, 0).to(x.dtype), 0).to(x.dtype)
''',
    "shift_right": '''
@triton.jit
def shift_right(x, by, BITS: tl.constexpr):
    """A shift; by what is not within the width it leaves the sign."""
    wide = x.to(tl.int64)
    return (wide >> tl.where((by >= 0) & (by < BITS), by, 63).to(tl.int64)).to(x.dtype)
''',
    "round_even": '''
@triton.jit
def round_even(x):
    """To the nearest whole number, ties to even."""
    size = tl.abs(x)
    whole = tl.where(size < 8388608.0, (size + 8388608.0) - 8388608.0, size)
    return tl.where(x < 0, -whole, whole)
''',
    "toward_zero": '''
@triton.jit
def toward_zero(x):
    """The whole part."""
    return tl.where(x < 0, tl.ceil(x), tl.floor(x))
''',
    "sign_of": '''
@triton.jit
def sign_of(x):
    """1, -1 or 0, of the type of x."""
    return (x > 0).to(x.dtype) - (x < 0).to(x.dtype)
''',
    "tanh": '''
@triton.jit
def tanh(x):
    """Through the exponential; near zero, where that cancels, by its series."""
    size = tl.abs(x)
    power = tl.exp(-2.0 * size)
    far = (1.0 - power) / (1.0 + power)
    square = x * x
    near = size * (1.0 + square * (-0.33333334 + square * (0.13333334 - square * 0.053968254)))
    value = tl.where(size < 0.1, near, far)
    return tl.where(x < 0, -value, value)
''',
    "log1p": '''
@triton.jit
def log1p(x):
    """log(1 + x) with what 1 + x rounds away put back."""
    u = 1.0 + x
    small = (u == 1.0) | (u == float("inf"))
    return tl.where(small, x, tl.log(u) * tl.div_rn(x, tl.where(small, 1.0, u - 1.0)))
''',
    "power": '''
@triton.jit
def power(a, b):
    """a to the power b; of a negative number for whole b only."""
    size = tl.where(b == 1, tl.abs(a), tl.where(tl.abs(a) == 1, 1.0, tl.exp2(b * tl.log2(tl.abs(a)))))
    whole = tl.floor(b) == b
    odd = tl.floor(b * 0.5) * 2.0 != b
    signed = tl.where(whole & odd, -size, tl.where(whole | (a == float("-inf")), size, float("nan")))
    return tl.where((b == 0) | (a == 1.0), 1.0, tl.where(a < 0, signed, size))
''',
    "root": '''
@triton.jit
def root(x):
    """x to the power of a half: unlike a square root it is inf at -inf, and 0 at -0."""
    return tl.where(x == float("-inf"), float("inf"), tl.sqrt_rn(x + 0.0))
''',
    "popcount": '''
@triton.jit
def popcount(x, BITS: tl.constexpr):
    """The ones among the low bits."""
    v = x.to(tl.int64) & ((1 << BITS) - 1) if BITS < 64 else x.to(tl.int64)
    v = v - ((v >> 1) & 0x5555555555555555)
    v = (v & 0x3333333333333333) + ((v >> 2) & 0x3333333333333333)
    v = (v + (v >> 4)) & 0x0F0F0F0F0F0F0F0F
    v = v + (v >> 8)
    v = v + (v >> 16)
    return ((v + (v >> 32)) & 127).to(tl.int32)
''',
    "clz": '''
@triton.jit
def clz(x, BITS: tl.constexpr):
    """The zeros before the first one among the low bits."""
    v = x.to(tl.int64) & ((1 << BITS) - 1) if BITS < 64 else x.to(tl.int64)
    v = v | ((v >> 1) & 0x7FFFFFFFFFFFFFFF)
    v = v | ((v >> 2) & 0x3FFFFFFFFFFFFFFF)
    v = v | ((v >> 4) & 0x0FFFFFFFFFFFFFFF)
    v = v | ((v >> 8) & 0x00FFFFFFFFFFFFFF)
    v = v | ((v >> 16) & 0x0000FFFFFFFFFFFF)
    v = v | ((v >> 32) & 0x00000000FFFFFFFF)
    return BITS - popcount(v, 64)
''',
    "wrap_nibble": '''
@triton.jit
def wrap_nibble(x):
    """The low four bits with their sign, as i8."""
    low = x.to(tl.int32) & 15
    return (low - ((low & 8) << 1)).to(tl.int8)
''',
    "narrow_code": '''
@triton.jit
def narrow_code(x, MANTISSA: tl.constexpr, BIAS: tl.constexpr, LIMIT: tl.constexpr, BEYOND: tl.constexpr):
    """f32 as a byte of sign, exponent and mantissa, to nearest even; from the bits LIMIT on it is BEYOND, NaN is 0x7f."""
    DROP: tl.constexpr = 23 - MANTISSA
    MAGIC: tl.constexpr = (127 - BIAS + 1 + DROP) << 23
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    magic = tl.full(size.shape, MAGIC, tl.int32).to(tl.float32, bitcast=True)  # its last place is the step of subnormals
    small = (size.to(tl.float32, bitcast=True) + magic).to(tl.int32, bitcast=True) - MAGIC
    normal = (size + ((BIAS - 127) << 23) + (1 << (DROP - 1)) - 1 + ((size >> DROP) & 1)) >> DROP
    code = tl.where(size < ((128 - BIAS) << 23), small, normal)
    code = tl.where(size >= LIMIT, BEYOND, code)
    code = tl.where(size > 0x7F800000, 0x7F, code)
    return code | ((bits >> 24) & 0x80)
''',
    "code_f8e4m3": '''
@triton.jit
def code_f8e4m3(x):
    """The code of the nearest f8e4m3."""
    return narrow_code(x, 3, 7, 0x43E80000, 0x7E)
''',
    "code_f8e5m2": '''
@triton.jit
def code_f8e5m2(x):
    """The code of the nearest f8e5m2."""
    return narrow_code(x, 2, 15, 0x47800000, 0x7C)
''',
    "code_e8m0": '''
@triton.jit
def code_e8m0(x):
    """The code of the nearest power of two, a tie to the larger; among the subnormals of f32 to the smaller."""
    size = x.to(tl.int32, bitcast=True) & 0x7FFFFFFF
    exponent = size >> 23
    up = (size & 0x7FFFFF) >= tl.where(exponent == 0, 0x400001, 0x400000)
    return tl.where(exponent == 0xFF, exponent, exponent + up.to(tl.int32))
''',
    "round_f4e2m1": '''
@triton.jit
def round_f4e2m1(x):
    """The nearest f4e2m1 as f32; a magnitude beyond 6 is 6, and so is a NaN, for the format has none."""
    size = tl.where(tl.abs(x) < 6.0, tl.abs(x), 6.0)
    step = tl.where(size < 2.0, 0.5, tl.where(size < 4.0, 1.0, 2.0))
    bits = (round_even(size / step) * step).to(tl.int32, bitcast=True)
    return (bits | (x.to(tl.int32, bitcast=True) & -2147483648)).to(tl.float32, bitcast=True)
''',
    "code_f4e2m1": '''
@triton.jit
def code_f4e2m1(x):
    """The nearest f4e2m1 as a code of f8e4m3."""
    return code_f8e4m3(round_f4e2m1(x))
''',
    "nibble_f4e2m1": '''
@triton.jit
def nibble_f4e2m1(x):
    """The code of an f4e2m1 value in four bits, with the sign in the upper ones."""
    bits = x.to(tl.int32, bitcast=True)
    size = bits & 0x7FFFFFFF
    code = tl.where(size >= 0x3F800000, (size >> 22) - 252, (size >= 0x3F000000).to(tl.int32))
    return code | ((bits >> 31) << 3)
''',
    "from_nibble_f4e2m1": '''
@triton.jit
def from_nibble_f4e2m1(code):
    """The value of a code in four bits."""
    wide = code.to(tl.int32)
    size = wide & 7
    half = (size.to(tl.float32) * 0.5).to(tl.int32, bitcast=True)
    bits = tl.where(size < 2, half, (size + 252) << 22) | ((wide & 8) << 28)
    return bits.to(tl.float32, bitcast=True)
''',
    "from_f8e4m3": '''
@triton.jit
def from_f8e4m3(code):
    """The value of a code."""
    wide = code.to(tl.int32)
    size = wide & 127
    small = (size.to(tl.float32) * 0.001953125).to(tl.int32, bitcast=True)
    bits = tl.where(size < 8, small, (size << 20) + 0x3C000000)
    bits = tl.where(size == 127, 0x7FC00000, bits) | ((wide & 128) << 24)
    return bits.to(tl.float32, bitcast=True)
''',
    "from_f8e5m2": '''
@triton.jit
def from_f8e5m2(code):
    """The value of a code."""
    return ((code.to(tl.int32) & 255) << 8).to(tl.int16).to(tl.float16, bitcast=True).to(tl.float32)
''',
    "from_e8m0": '''
@triton.jit
def from_e8m0(code):
    """The value of a code; the least is a subnormal of f32."""
    wide = code.to(tl.int32) & 255
    bits = tl.where(wide == 0, 0x00400000, wide << 23)
    return tl.where(wide == 255, 0x7FC00000, bits).to(tl.float32, bitcast=True)
''',
    "product_of": '''
@triton.jit
def product_of(a, b):
    """The product, to reduce by."""
    return a * b
''',
    "greater_of": '''
@triton.jit
def greater_of(a, b):
    """The maximum, to scan by."""
    return tl.maximum(a, b)
''',
    "lesser_of": '''
@triton.jit
def lesser_of(a, b):
    """The minimum, to scan by."""
    return tl.minimum(a, b)
''',
}  # fmt: skip

ALIASES = {"from_f4e2m1": "from_f8e4m3"}  # kept in the codes of the larger format


def sources(used: set[str]) -> list[str]:
    """The texts of the helpers used and of those they use, in the order of the table."""
    needed: set[str] = set()
    waiting = set(used)
    while waiting:
        name = waiting.pop()
        needed.add(name)
        waiting |= {other for other in HELPERS if other not in needed and re.search(rf"\b{other}\(", HELPERS[name])}
    return [text.strip("\n") for name, text in HELPERS.items() if name in needed]
