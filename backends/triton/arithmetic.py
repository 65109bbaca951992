"""Arithmetic of emitted values: conversions as torch has them, and every operation of the table `OPS`.

A result that is rounded to bits or decides something (`precise`) is divided as IEEE 754 says; elsewhere the quick division of the
target is taken, which is off by at most two units in the last place.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import replace

from ...ir.errors import UnsupportedError
from ...ir.expr import OPS
from ...ir.infer import combine, operation_type
from ...ir.types import DType, boolean, f32, f64, i32, i64
from . import script as ts
from .script import Value, held_type

SYMBOLS = {"add": "+", "sub": "-", "mul": "*", "and": "&", "or": "|", "xor": "^"}
FOLDED = {"add": operator.add, "sub": operator.sub, "mul": operator.mul}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
FUNCTIONS = {
    "exp": "tl.exp", "exp2": "tl.exp2", "log": "tl.log", "log2": "tl.log2", "sin": "tl.sin", "cos": "tl.cos", "rsqrt": "tl.rsqrt",
    "sigmoid": "tl.sigmoid", "erf": "tl.erf", "floor": "tl.floor", "ceil": "tl.ceil", "sqrt": "tl.sqrt",
}  # fmt: skip
HELPED = {"tanh": "tanh", "log1p": "log1p", "round": "round_even", "trunc": "toward_zero"}
BYTES = ("f8e4m3", "f8e5m2", "e8m0", "f4e2m1")  # floats that memory holds as codes of a byte
DECIDING = ("floor", "ceil", "round", "trunc", "floordiv", "mod", *COMPARISONS)
NAN = "tl.PropagateNan.ALL"


class Arithmetic:
    """Builds values from values; remembers the helpers it used and names the statement in errors."""

    def __init__(self, order: Sequence[str]) -> None:
        self.order = tuple(order)
        self.helpers: set[str] = set()
        self.statement = ""

    def helper(self, name: str, *args: Value | str, type: str = "float32", dtype: DType = f32) -> Value:
        """A call of a helper."""
        self.helpers.add(name)
        return ts.call(name, *args, order=self.order, type=type, dtype=dtype)

    # -- conversions ---------------------------------------------------------------------------------------------------------------

    def computed(self, v: Value) -> Value:
        """`v` in the type in which its declared type is computed."""
        return self.held(v, held_type(v.dtype))

    def held(self, v: Value, type: str) -> Value:
        """`v` converted to a type of Triton, without rounding to a declared one."""
        if v.type == type:
            return v
        if v.number is not None:
            return replace(ts.constant(_literal(v.number, type)), type=type, dtype=v.dtype, weak=v.weak)
        if type == "int1":
            return replace(self.infix("!=", v, ts.constant(0)), dtype=v.dtype)
        if not v.axes:  # it may be a number of Python's in the interpreter
            return replace(ts.call("tl.cast", v, f"tl.{type}", type=type, dtype=v.dtype), weak=v.weak)
        return replace(ts.method(v, "to", f"tl.{type}", type=type, dtype=v.dtype), clean=v.clean)

    def cast(self, v: Value, t: DType) -> Value:
        """`v` rounded to a declared type."""
        if t.name in ("bf16", "f16"):
            source = self.held(v, "float32") if v.type not in ("float32", "bfloat16", "float16") else v
            rounded = self.held(source, "bfloat16" if t.name == "bf16" else "float16")
            return replace(rounded, dtype=t, weak=False, number=None)
        if t.name in BYTES:
            if v.dtype == t:
                return v
            return replace(self.decode(self.encode(v, t), t), clean=frozenset())
        if t.name == "i4":
            return self.helper("wrap_nibble", self.computed(v), type="int8", dtype=t)
        return replace(self.held(self.computed(v), held_type(t)), dtype=t, weak=False)

    def encode(self, v: Value, t: DType) -> Value:
        """The code of the nearest value of a narrow float, as an i32."""
        return self.helper(f"code_{t.name}", self.held(self.computed(v), "float32"), type="int32", dtype=i32)

    def decode(self, code: Value, t: DType) -> Value:
        """The value of a code in f32, of declared type `t`."""
        return self.helper("from_f8e4m3" if t.name == "f4e2m1" else f"from_{t.name}", code, type="float32", dtype=t)

    def expanded(self, v: Value, axes: tuple[str, ...], shape: Sequence[str]) -> Value:
        """`v` as a tensor with all `axes`."""
        if v.axes == axes:
            return v
        if not v.axes:
            return replace(ts.call("tl.full", f"[{', '.join(shape)}]", v, f"tl.{v.type}", type=v.type, dtype=v.dtype), axes=axes)
        text = f"tl.broadcast_to({v.over(axes)}, [{', '.join(shape)}])"
        return replace(v, text=text, axes=axes, binding=ts.ATOM)

    # -- operations ----------------------------------------------------------------------------------------------------------------

    def infix(self, symbol: str, a: Value, b: Value, type: str | None = None, dtype: DType | None = None) -> Value:
        """`a symbol b`; a comparison gives a bool."""
        compares = symbol in COMPARISONS.values()
        return ts.infix(symbol, a, b, self.order, type or ("int1" if compares else a.type), dtype or (boolean if compares else a.dtype))

    def all_of(self, tests: Sequence[Value]) -> Value | None:
        """The conjunction; None of none."""
        result: Value | None = None
        for test in tests:
            result = test if result is None else self.infix("&", result, test, "int1", boolean)
        return result

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        """`a` where the condition holds, else `b`, both of one type."""
        return ts.call("tl.where", condition, a, b, order=self.order, type=a.type, dtype=a.dtype)

    def operation(self, name: str, args: list[Value], *, precise: bool = False, known: bool = False) -> Value:
        """An operation of the table `OPS`.

        `precise` asks for exact division. `known` says that integer operands are not negative, or that floats are no NaN.
        """
        if name == "exact":
            return args[0]
        t, weak = operation_type(name, [(a.dtype, a.weak) for a in args])
        if t == f64 and not weak:
            raise UnsupportedError(f"{name} of f64: kernels compute in f32", statement=self.statement, hint="cast to f32 first")
        if name == "where":
            condition = self.held(self.computed(args[0]), "int1")
            a, b = (self.held(self.computed(x), held_type(t)) for x in args[1:])
            return replace(self.select(condition, a, b), dtype=t, weak=weak)
        joined = (args[0].dtype, args[0].weak)
        for arg in args[1:]:
            joined = combine(joined, (arg.dtype, arg.weak))
        common = t if OPS[name].kind in ("arith", "float") else joined[0]
        if weak and common == i64:
            common = i32 if all(a.type != "int64" for a in args) else i64
        if not common.is_float and any(_is_beyond(a, common) for a in args):
            common = i64
        operands = [replace(self.held(self.computed(a), held_type(common)), dtype=common) for a in args]
        result = self._apply(name, operands, common, precise, known)
        return replace(result, dtype=t if result.type == held_type(t) else result.dtype, weak=weak, clean=frozenset())

    def _apply(self, name: str, args: list[Value], t: DType, precise: bool, known: bool) -> Value:
        a = args[0]
        b = args[1] if len(args) > 1 else a
        if name in COMPARISONS:
            return self.infix(COMPARISONS[name], a, b)
        if name in FOLDED and not t.is_float and all(isinstance(v.number, int) for v in (a, b)):
            return ts.constant(FOLDED[name](int(a.number or 0), int(b.number or 0)))
        if name in SYMBOLS and (name not in ("and", "or", "xor") or not t.is_float):
            return self._four_bits(self.infix(SYMBOLS[name], a, b), t)
        if name in ("shl", "shr"):
            return self._four_bits(self._shift(name, a, b, t), t)
        if name in ("minimum", "maximum"):
            marks = () if known or not t.is_float else (NAN,)
            return ts.call(f"tl.{name}", a, b, *marks, order=self.order, type=a.type, dtype=t)
        if t.is_float:
            return self._float(name, a, b, precise)
        return self._integer(name, a, b, t, known)

    def _float(self, name: str, a: Value, b: Value, precise: bool) -> Value:
        if name == "div":
            if precise:
                return ts.call("tl.div_rn", self._tensor(a), self._tensor(b), order=self.order)
            return self.infix("/", a, b)
        if name == "sqrt" and precise:
            return ts.call("tl.sqrt_rn", self._tensor(a))
        if name in FUNCTIONS:
            return ts.call(FUNCTIONS[name], self._tensor(a))
        if name in HELPED:
            return self.helper(HELPED[name], self._tensor(a))
        match name:
            case "neg":
                return replace(a, text=f"-{a.wrapped(ts.UNARY)}", binding=ts.UNARY, number=None)
            case "abs":
                return ts.call("tl.abs", self._tensor(a))
            case "sign":
                return self.helper("sign_of", self._tensor(a))
            case "isnan":
                return self.infix("!=", a, a)
            case "isinf":
                return self.infix("==", ts.call("tl.abs", self._tensor(a)), ts.constant(math.inf))
            case "isfinite":
                return self.infix("<", ts.call("tl.abs", self._tensor(a)), ts.constant(math.inf))
            case "floordiv":
                self.helpers.add("float_mod")
                return self.helper("float_floor_div", a, b)
            case "mod":
                return self.helper("float_mod", a, b)
            case "pow":
                return self._power(a, b)
        hint = "cast to an integer type, or take the bits with .bitcast"
        raise UnsupportedError(f"{name} of floats", statement=self.statement, hint=hint)

    def _tensor(self, v: Value) -> Value:
        """A literal as something that functions of tensors take."""
        if v.number is None:
            return v
        return replace(v, text=f"tl.full([], {v.text}, tl.{v.type})", number=None, binding=ts.ATOM)

    def _power(self, a: Value, b: Value) -> Value:
        """Small whole exponents multiply; a square root is one but for -inf and -0."""
        if b.number in (1, 2, 3, 4):
            result = a
            for _ in range(int(b.number or 1) - 1):
                result = self.infix("*", result, a)
            return result
        if b.number in (0.5, -0.5):
            root = self.helper("root", a)
            return root if b.number == 0.5 else self.infix("/", ts.constant(1.0), root)
        return self.helper("power", a, self._tensor(b))

    def _integer(self, name: str, a: Value, b: Value, t: DType, known: bool) -> Value:
        bits = str(t.bits if t.kind != "bool" else 1)
        match name:
            case "div":
                x, y = (replace(self.held(v, "float32"), dtype=f32) for v in (a, b))
                return self._float("div", x, y, True)
            case "floordiv" | "mod":
                if known and b.number is not None and b.number > 0:
                    return self._whole("//" if name == "floordiv" else "%", a, b)
                function = "floor_div" if name == "floordiv" else "floor_mod"
                return self.helper(function, self._tensor(a), self._tensor(b), type=a.type, dtype=t)
            case "not":
                if t.kind == "bool":
                    return self.infix("==", self.held(a, "int32"), ts.constant(0))
                return replace(a, text=f"~{a.wrapped(ts.UNARY)}", binding=ts.UNARY, number=None)
            case "neg":
                return replace(a, text=f"-{a.wrapped(ts.UNARY)}", binding=ts.UNARY, number=None)
            case "abs":
                return ts.call("tl.abs", self._tensor(a), type=a.type, dtype=t)
            case "sign":
                return self.helper("sign_of", self._tensor(a), type=a.type, dtype=t)
            case "floor" | "ceil" | "round" | "trunc":
                return a
            case "isnan" | "isinf":
                return ts.constant(False)
            case "isfinite":
                return ts.constant(True)
            case "popcount":
                return self.helper("popcount", self._tensor(a), bits, type="int32", dtype=i32)
            case "clz":
                self.helpers.add("popcount")
                return self.helper("clz", self._tensor(a), bits, type="int32", dtype=i32)
            case "pow" if b.number in (1, 2, 3, 4):
                return self._power(a, b)
            case "pow":
                raise UnsupportedError(f"a power of {t} by this exponent", statement=self.statement, hint="cast to f32 first, or multiply")
            case "exp" | "exp2" | "log" | "log2" | "log1p" | "sqrt" | "rsqrt" | "sin" | "cos" | "tanh" | "sigmoid" | "erf":
                return self._float(name, replace(self.held(a, "float32"), dtype=f32), b, False)
        raise UnsupportedError(f"{name} of {t}", statement=self.statement, hint="cast to f32 first")

    def _whole(self, symbol: str, a: Value, b: Value) -> Value:
        """A quotient or remainder of what is not negative, folded where it is known."""
        if b.number == 1:
            return a if symbol == "//" else ts.constant(0)
        if a.number is not None and b.number is not None:
            return ts.constant(int(a.number) // int(b.number) if symbol == "//" else int(a.number) % int(b.number))
        return self.infix(symbol, a, b)

    def _shift(self, name: str, a: Value, b: Value, t: DType) -> Value:
        """A shift; one by what is not known to lie within the width gives 0, or the sign."""
        if a.number is not None and b.number is not None and 0 <= b.number < 31 and 0 <= a.number < 1 << 20:
            return ts.constant(int(a.number) << int(b.number) if name == "shl" else int(a.number) >> int(b.number))
        if b.number is not None and 0 <= b.number < t.bits:
            return a if b.number == 0 else self.infix("<<" if name == "shl" else ">>", a, ts.constant(int(b.number)), a.type, t)
        function = "shift_left" if name == "shl" else "shift_right"
        return self.helper(function, self._tensor(a), self._tensor(b), str(t.bits), type=a.type, dtype=t)

    def _four_bits(self, v: Value, t: DType) -> Value:
        """Four-bit integers are computed in eight, and wrap around."""
        return self.helper("wrap_nibble", v, type="int8", dtype=t) if t.name == "i4" else v


def _is_beyond(v: Value, t: DType) -> bool:
    """Whether a whole literal is none of an integer type."""
    if v.number is None or isinstance(v.number, (bool, float)) or t.kind == "bool":
        return False
    low, high = (0, (1 << t.bits) - 1) if t.kind == "uint" else (-(1 << (t.bits - 1)), (1 << (t.bits - 1)) - 1)
    return not low <= v.number <= high


def _literal(number: float | int | bool, type: str) -> float | int | bool:
    """A literal as a value of a type of Triton; an infinity among integers is the extreme of the type."""
    if type == "int1":
        return bool(number)
    if type.startswith(("float", "bfloat")):
        return float(number)
    if isinstance(number, float) and not math.isfinite(number):
        bits = int(type.lstrip("uint"))
        low, high = (0, (1 << bits) - 1) if type.startswith("u") else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)
        return 0 if math.isnan(number) else low if number < 0 else high
    return int(number)
