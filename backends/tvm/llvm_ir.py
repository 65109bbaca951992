"""LLVM IR as text: the lines of one imported helper over the lanes of a vector."""

from __future__ import annotations

import struct

LLVM_TYPES = {
    "float32": "float",
    "float64": "double",
    "int8": "i8",
    "uint8": "i8",
    "int16": "i16",
    "int32": "i32",
    "int64": "i64",
    "bool": "i8",
}


def _hex(value: float) -> str:
    """An LLVM float literal: the hexadecimal double of the value rounded to f32."""
    rounded = struct.unpack("<f", struct.pack("<f", value))[0]
    return f"float 0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"


class Ir:
    """The lines of one helper over `n` lanes; operations return the name of their result."""

    def __init__(self, head: str, lanes: int) -> None:
        self.lanes = lanes
        self.f = f"<{lanes} x float>"
        self.i = f"<{lanes} x i32>"
        self.lines = [f"define {head} alwaysinline {{"]
        self.declared: dict[str, None] = {}
        self._next = 0

    def op(self, text: str) -> str:
        self._next += 1
        self.lines.append(f"  %r{self._next} = {text}")
        return f"%r{self._next}"

    def call(self, result: str, function: str, *args: tuple[str, str]) -> str:
        self.declared[f"declare {result} @{function}({', '.join(t for t, _ in args)})"] = None
        return self.op(f"call {result} @{function}({', '.join(f'{t} {v}' for t, v in args)})")

    def real(self, value: float) -> str:
        return "<" + ", ".join([_hex(value)] * self.lanes) + ">"

    def whole(self, value: int) -> str:
        return "<" + ", ".join([f"i32 {value}"] * self.lanes) + ">"

    def fma(self, a: str, b: str, c: str) -> str:
        return self.call(self.f, f"llvm.fma.v{self.lanes}f32", (self.f, a), (self.f, b), (self.f, c))

    def horner(self, x: str, coefficients: tuple[float, ...]) -> str:
        """The polynomial with the highest coefficient first."""
        result = self.real(coefficients[0])
        for c in coefficients[1:]:
            result = self.fma(result, x, self.real(c))
        return result

    def select(self, condition: str, a: str, b: str) -> str:
        return self.op(f"select <{self.lanes} x i1> {condition}, {self.f} {a}, {self.f} {b}")

    def unary(self, function: str, x: str) -> str:
        return self.call(self.f, f"llvm.{function}.v{self.lanes}f32", (self.f, x))

    def scale(self, x: str, exponent: str) -> str:
        """x * 2**exponent for integral float exponents in -252 .. 252, in two exact steps, so that subnormal results are right."""
        e = self.op(f"fptosi {self.f} {exponent} to {self.i}")
        half = self.op(f"ashr {self.i} {e}, {self.whole(1)}")
        rest = self.op(f"sub {self.i} {e}, {half}")
        for part in (half, rest):
            biased = self.op(f"shl {self.i} {self.op(f'add {self.i} {part}, {self.whole(127)}')}, {self.whole(23)}")
            x = self.op(f"fmul {self.f} {x}, {self.op(f'bitcast {self.i} {biased} to {self.f}')}")
        return x

    def finish(self, result_type: str, result: str) -> str:
        return "\n".join([*self.declared, *self.lines, f"  ret {result_type} {result}", "}"]) + "\n"
