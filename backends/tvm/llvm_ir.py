"""LLVM IR as text: the lines of one imported helper over the lanes of a vector, or of its scalar form."""

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
MANGLED = {"float": "f32", "double": "f64"}


def _hex(value: float) -> str:
    """An LLVM float literal: the hexadecimal double of the value rounded to f32."""
    rounded = struct.unpack("<f", struct.pack("<f", value))[0]
    return f"float 0x{struct.unpack('<Q', struct.pack('<d', rounded))[0]:016X}"


def suffix(lanes: int) -> str:
    """What ends a helper's name: `s` for the scalar form, `v16` for vectors of sixteen."""
    return "s" if lanes == 1 else f"v{lanes}"


class Ir:
    """The lines of one helper over `n` lanes; operations return the name of their result. One lane is a plain scalar."""

    def __init__(self, head: str, lanes: int) -> None:
        self.lanes = lanes
        self.f = self.kind("float")
        self.i = self.kind("i32")
        self.lines = [f"define {head} alwaysinline {{"]
        self.declared: dict[str, None] = {}
        self._next = 0

    @staticmethod
    def define(stem: str, lanes: int, result: str, *operands: str) -> Ir:
        """A helper from vectors of the element types `operands`, named %x, %y, ..., to one of `result`."""
        given = ", ".join(f"{_kind(t, lanes)} %{v}" for t, v in zip(operands, "xyz", strict=False))
        return Ir(f"{_kind(result, lanes)} @{stem}_{suffix(lanes)}({given})", lanes)

    def kind(self, element: str) -> str:
        """The type of a vector of `element`."""
        return _kind(element, self.lanes)

    def op(self, text: str) -> str:
        self._next += 1
        self.lines.append(f"  %r{self._next} = {text}")
        return f"%r{self._next}"

    def call(self, result: str, function: str, *args: tuple[str, str]) -> str:
        self.declared[f"declare {result} @{function}({', '.join(t for t, _ in args)})"] = None
        return self.op(f"call {result} @{function}({', '.join(f'{t} {v}' for t, v in args)})")

    def intrinsic(self, function: str, element: str, *args: str) -> str:
        """A lanewise intrinsic of operands and result of one type."""
        kind = self.kind(element)
        return self.call(kind, f"llvm.{function}.{self.overload(element)}", *((kind, a) for a in args))

    def overload(self, element: str) -> str:
        """How the name of an intrinsic spells vectors of `element`."""
        mangled = MANGLED.get(element, element)
        return mangled if self.lanes == 1 else f"v{self.lanes}{mangled}"

    def constant(self, element: str, value: int) -> str:
        """An integer in all lanes."""
        return str(value) if self.lanes == 1 else "<" + ", ".join([f"{element} {value}"] * self.lanes) + ">"

    def real(self, value: float) -> str:
        return _hex(value).removeprefix("float ") if self.lanes == 1 else "<" + ", ".join([_hex(value)] * self.lanes) + ">"

    def number(self, element: str, value: float) -> str:
        """A float in all lanes, of a type and value that decimals spell exactly."""
        return repr(value) if self.lanes == 1 else "<" + ", ".join([f"{element} {value!r}"] * self.lanes) + ">"

    def infinity(self, element: str, sign: str = "") -> str:
        """Infinity in all lanes."""
        text = "0xFFF0000000000000" if sign == "-" else "0x7FF0000000000000"
        return text if self.lanes == 1 else "<" + ", ".join([f"{element} {text}"] * self.lanes) + ">"

    def whole(self, value: int) -> str:
        return self.constant("i32", value)

    def cast(self, how: str, value: str, source: str, target: str) -> str:
        """A conversion such as `zext` or `bitcast` between element types."""
        return self.op(f"{how} {self.kind(source)} {value} to {self.kind(target)}")

    def fma(self, a: str, b: str, c: str) -> str:
        return self.intrinsic("fma", "float", a, b, c)

    def horner(self, x: str, coefficients: tuple[float, ...]) -> str:
        """The polynomial with the highest coefficient first."""
        result = self.real(coefficients[0])
        for c in coefficients[1:]:
            result = self.fma(result, x, self.real(c))
        return result

    def select(self, condition: str, a: str, b: str, element: str = "float") -> str:
        return self.op(f"select {self.kind('i1')} {condition}, {self.kind(element)} {a}, {self.kind(element)} {b}")

    def unary(self, function: str, x: str) -> str:
        return self.intrinsic(function, "float", x)

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


def _kind(element: str, lanes: int) -> str:
    return element if lanes == 1 else f"<{lanes} x {element}>"
