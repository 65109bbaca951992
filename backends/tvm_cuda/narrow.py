"""CUDA C for floats of fewer than 32 bits: to f32, from f32 as torch rounds, and their codes.

f8e4m3  no infinity: beyond 448 it is 448, 0x7f is NaN            f8e5m2  as the high byte of an f16
e8m0    powers of two: no sign, no zero, 0xff is NaN              f4e2m1  kept in the codes of f8e4m3; beyond 6 it is 6, NaN too
"""

from __future__ import annotations

NARROW = {"bf16": "short", "f16": "short", "f8e4m3": "signed char", "f8e5m2": "signed char", "e8m0": "signed char", "f4e2m1": "signed char"}
INLINE = "__device__ __forceinline__"
_F16_WIDEN = """#ifdef __CUDACC__
  float x; asm("cvt.f32.f16 %0, %1;" : "=f"(x) : "h"(code)); return x;
#else
  return half_to_float(code);
#endif"""
_F16_NARROW = """#ifdef __CUDACC__
  short code; asm("cvt.rn.f16.f32 %0, %1;" : "=h"(code) : "f"(x)); return code;
#else
  return float_to_half(x);
#endif"""
_F4_ROUND = """  float size = fminf(fabsf(x), 6.0f);
  float step = size < 2.0f ? 0.5f : size < 4.0f ? 1.0f : 2.0f, steps = size < 2.0f ? 2.0f : size < 4.0f ? 1.0f : 0.5f;
  return copysignf(rintf(size * steps) * step, x);"""
_WIDEN = {
    "bf16": "  return __int_as_float((int)(unsigned short)code << 16);",
    "f16": _F16_WIDEN,
    "f8e4m3": """  int size = code & 0x7f, sign = (code & 0x80) << 24;
  float x = __int_as_float(size << 20) * 1.329227995784916e36f;  // 2 ** 120 moves the exponent; subnormals come out right
  return __int_as_float((size == 0x7f ? 0x7fc00000 : __float_as_int(x)) | sign);""",
    "f8e5m2": """  int size = code & 0x7f, sign = (code & 0x80) << 24;
  float x = __int_as_float(size << 21) * 5.192296858534828e33f;  // 2 ** 112
  return __int_as_float((size >= 0x7c ? 0x7f800000 | (size & 3) << 21 : __float_as_int(x)) | sign);""",
    "e8m0": """  int size = code & 0xff;
  return __int_as_float(size == 0xff ? 0x7fc00000 : size == 0 ? 0x00400000 : size << 23);""",
    "f4e2m1": "  return from_bits_f8e4m3_s(code);",
    "nibble": """  int size = code & 7;
  int bits = size < 2 ? __float_as_int(0.5f * (float)size) : (size + 252) << 22;
  return __int_as_float(bits | (code & 8) << 28);""",
}
_NARROW = {
    "bf16": """  int bits = __float_as_int(x);
  return (short)((x != x ? bits | 0x400000 : (int)((unsigned)bits + 0x7fffu + (((unsigned)bits >> 16) & 1u))) >> 16);""",
    "f16": _F16_NARROW,
    "f8e4m3": "{byte}",
    "f8e5m2": "{byte}",
    "e8m0": """  int size = __float_as_int(x) & 0x7fffffff, exponent = size >> 23, rest = size & 0x7fffff;
  int up = rest >= (exponent == 0 ? 0x400001 : 0x400000);  // a tie goes to the larger power, among the subnormals to the smaller
  return (signed char)(exponent == 0xff ? exponent : exponent + up);""",
    "f4e2m1": "  return bits_f8e4m3_s(round_f4e2m1_s(x));",
    "nibble": """  int bits = __float_as_int(x), size = bits & 0x7fffffff;
  int code = size >= 0x3f800000 ? (size >> 22) - 252 : size >= 0x3f000000;
  return (signed char)(code | (bits >> 31) << 3);""",
}


def _byte(mantissa: int, bias: int, limit: int, beyond: int) -> str:
    """A byte of sign, exponent and mantissa; magnitudes of bits `limit` and more are `beyond`, NaN is 0x7f.

    A subnormal is rounded by adding the number whose last place is the subnormals' step.
    """
    drop = 23 - mantissa
    magic = (127 - bias + 1 + drop) << 23
    offset = ((bias - 127) << 23) + (1 << (drop - 1)) - 1
    return f"""  int bits = __float_as_int(x), size = bits & 0x7fffffff, sign = (int)((unsigned)bits >> 24) & 0x80;
  int small = __float_as_int(__int_as_float(size) + __int_as_float({magic:#x})) - {magic:#x};
  int normal = (size + ({offset}) + ((size >> {drop}) & 1)) >> {drop};
  int code = size >= {limit:#x} ? (size > 0x7f800000 ? 0x7f : {beyond:#x}) : size < {(128 - bias) << 23:#x} ? small : normal;
  return (signed char)(code | sign);"""


def narrow_c(stem: str) -> str:
    """`from_bits_<t>`: the value of a code. `bits_<t>`: the code of f32. `round_<t>`: f32 to the nearest value. `wrap_nibble`."""
    if stem == "wrap_nibble":
        return f"{INLINE} signed char wrap_nibble_s(signed char x) {{ return (signed char)((signed char)(x << 4) >> 4); }}"
    verb, _, t = stem.replace("from_bits", "from").partition("_")
    code = NARROW.get(t, "signed char")
    if verb == "from":
        return f"{INLINE} float from_bits_{t}_s({code} code) {{\n{_WIDEN[t]}\n}}"
    if verb == "bits":
        byte = {"f8e4m3": (3, 7, 0x43E80000, 0x7E), "f8e5m2": (2, 15, 0x47800000, 0x7C)}.get(t)
        return f"{INLINE} {code} bits_{t}_s(float x) {{\n{_byte(*byte) if byte else _NARROW[t]}\n}}"
    body = _F4_ROUND if t == "f4e2m1" else f"  return from_bits_{t}_s(bits_{t}_s(x));"
    return f"{INLINE} float round_{t}_s(float x) {{\n{body}\n}}"
