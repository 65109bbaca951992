"""Element types, their promotion and their accumulators.

Promotion of two tensor types follows torch; Python numbers, literals and scalar arguments are *weak*: they take the type of what
they meet unless that would change the kind (an integer tensor times a float literal is f32).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Kind = Literal["bool", "uint", "int", "float"]


@dataclass(frozen=True, slots=True)
class DType:
    """An element type.

    Args:
        name: the spelling in text, such as `bf16`.
        kind: `bool`, `uint`, `int` or `float`.
        bits: storage bits of one element; i4 and f4e2m1 pack two to a byte.
        mantissa: explicit mantissa bits of a float, 0 otherwise.
    """

    name: str
    kind: Kind
    bits: int
    mantissa: int = 0

    def __str__(self) -> str:
        return self.name

    @property
    def bytes(self) -> float:
        """Storage bytes of one element; 0.5 for packed four-bit types."""
        return self.bits / 8

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_integer(self) -> bool:
        return self.kind in ("int", "uint")


f64 = DType("f64", "float", 64, 52)
f32 = DType("f32", "float", 32, 23)
f16 = DType("f16", "float", 16, 10)
bf16 = DType("bf16", "float", 16, 7)
f8e4m3 = DType("f8e4m3", "float", 8, 3)
f8e5m2 = DType("f8e5m2", "float", 8, 2)
f4e2m1 = DType("f4e2m1", "float", 4, 1)
e8m0 = DType("e8m0", "float", 8, 0)
i64 = DType("i64", "int", 64)
i32 = DType("i32", "int", 32)
i16 = DType("i16", "int", 16)
i8 = DType("i8", "int", 8)
i4 = DType("i4", "int", 4)
u8 = DType("u8", "uint", 8)
boolean = DType("bool", "bool", 8)

DTYPES: dict[str, DType] = {
    t.name: t
    for t in (f64, f32, f16, bf16, f8e4m3, f8e5m2, f4e2m1, e8m0, i64, i32, i16, i8, i4, u8, boolean)
}
ALIASES: dict[str, str] = {
    "float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "half": "f16", "float": "f32",
    "float8_e4m3fn": "f8e4m3", "float8_e5m2": "f8e5m2", "float8_e8m0fnu": "e8m0",
    "int64": "i64", "int32": "i32", "int16": "i16", "int8": "i8", "int4": "i4", "uint8": "u8",
}  # fmt: skip


def dtype(name: str | DType) -> DType:
    """The type of that name (`bf16`, or torch's spelling `bfloat16`). Raises `KeyError` for an unknown one."""
    if isinstance(name, DType):
        return name
    return DTYPES[ALIASES.get(name, name)]


_KIND_ORDER = {"bool": 0, "uint": 1, "int": 1, "float": 2}


def promote(a: DType, b: DType) -> DType:
    """The type of an arithmetic result of two tensor types, as torch has it (bf16 with f16 is f32, u8 with i8 is i16)."""
    if a == b:
        return a
    order_a, order_b = _KIND_ORDER[a.kind], _KIND_ORDER[b.kind]
    if order_a != order_b:
        return a if order_a > order_b else b
    if a.is_float:
        if a.bits == b.bits:  # two different formats of one size meet in the next size that holds both
            return f32 if a.bits == 16 else bf16
        if min(a.bits, b.bits) <= 8 and max(a.bits, b.bits) <= 8:
            return bf16
        return a if a.bits > b.bits else b
    if a.kind != b.kind:  # u8 with a signed type
        signed = a if a.kind == "int" else b
        return signed if signed.bits > 8 else i16
    return a if a.bits > b.bits else b


def promote_weak(tensor: DType, weak: DType) -> DType:
    """The type of a tensor of type `tensor` combined with a weak operand of type `weak`."""
    if _KIND_ORDER[weak.kind] <= _KIND_ORDER[tensor.kind]:
        return tensor
    return weak


def accumulator(t: DType) -> DType:
    """The type in which a sum or product of `t` accumulates: f32 for narrow floats, i32 for narrow integers and bool."""
    if t.is_float:
        return t if t.bits >= 32 else f32
    return t if t.bits >= 32 else i32


def reduced(op: str, t: DType) -> DType:
    """The declared type of a reduction by `op` over values of type `t`."""
    if op in ("any", "all"):
        return boolean
    if op in ("argmax", "argmin"):
        return i32
    if op in ("sum", "prod") and not t.is_float:
        return accumulator(t)
    return t
