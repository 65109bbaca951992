"""Arithmetic of emitted values: conversions as torch has them, comparisons, selections, and every operation of the table `OPS`."""

from __future__ import annotations

import math
from dataclasses import replace

from ...ir.errors import UnsupportedError
from ...ir.types import DType
from . import script as ts
from .cpu import Cpu
from .script import Let, Names, Statement, Value

ARITHMETIC = {"add": "+", "sub": "-", "mul": "*"}
COMPARISONS = {"eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">="}
IMPORTED = ("exp", "exp2", "log", "log2", "tanh", "sigmoid")
LIBRARY = ("erf", "log1p", "sin", "cos")
ROUNDING = {"floor": "floor", "ceil": "ceil", "round": "nearbyint", "trunc": "trunc"}
BITS = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor", "shl": "shift_left", "shr": "shift_right"}
RANK_OF_KIND = {"bool": 0, "uint8": 1, "int8": 1, "int16": 2, "int32": 3, "int64": 4, "float32": 5, "float64": 6}


def compute_type(t: DType) -> str:
    """The type in which values of `t` are computed: narrow floats in f32."""
    if t.is_float:
        return "float64" if t.bits == 64 else "float32"
    if t.kind == "bool":
        return "bool"
    return "uint8" if t.name == "u8" else f"int{max(t.bits, 8)}"


class Arithmetic:
    """Builds values from values; remembers the helpers it used and names the statement in errors."""

    def __init__(self, cpu: Cpu, names: Names) -> None:
        self.cpu = cpu
        self.names = names
        self.helpers: set[str] = set()
        self.statement = ""

    def helper(self, stem: str, *args: Value, dtype: str) -> Value:
        """A call of the imported helper, of the width of its widest argument."""
        lanes = max(a.lanes for a in args)
        function = f"{stem}_v{lanes}" if lanes > 1 else f"{stem}_s"
        self.helpers.add(function)
        wide = [ts.broadcast(a, lanes) if lanes > 1 else a for a in args]
        return ts.extern(function, *wide, dtype=dtype, lanes=lanes)

    def cast(self, v: Value, dtype: str) -> Value:
        """`v` converted to a compute type, as torch does."""
        if v.dtype == dtype:
            return replace(v, weak=False)
        if v.number is not None:
            number = v.number
            if dtype not in ts.FLOATS and dtype != "bool" and isinstance(number, float) and not math.isfinite(number):
                number = 0
            return ts.constant(number, dtype)
        type_name = Value("", dtype, v.lanes).type_name
        if dtype == "bool":
            zero = ts.broadcast(ts.constant(0, v.dtype), v.lanes)
            return Value(f"{v.text} != {zero.text}", "bool", v.lanes, binding=ts.OTHER)
        if v.dtype == "bool":
            one, zero = (ts.broadcast(ts.constant(x, dtype), v.lanes) for x in (1, 0))
            return Value(f"T.Select({v.text}, {one.text}, {zero.text})", dtype, v.lanes)
        if v.dtype == "int32" and dtype == "float32":  # not by T.Cast: TVM's analyser takes floats it knows the bounds of for integers
            return self.helper("float_int32", v, dtype=dtype)
        return Value(f'T.Cast("{type_name}", {v.text})', dtype, v.lanes)

    def unify(self, *values: Value) -> list[Value]:
        """Operands brought to one type and width."""
        strong = [v for v in values if not v.weak] or list(values)
        dtype = max((v.dtype for v in strong), key=lambda d: RANK_OF_KIND[d])
        signs = {v.dtype for v in strong}
        if dtype in ("int8", "uint8") and {"int8", "uint8"} <= signs:
            dtype = "int16"
        for v in values:
            if v.weak and (v.dtype in ts.FLOATS) and dtype not in ts.FLOATS:
                dtype = "float32"
            elif v.weak and dtype == "bool" and v.dtype != "bool":
                dtype = "int32" if v.dtype == "int64" else v.dtype
        lanes = max(v.lanes for v in values)
        return [ts.broadcast(self.cast(v, dtype), lanes) if lanes > 1 else self.cast(v, dtype) for v in values]

    def all_of(self, tests: list[Value]) -> Value | None:
        """The conjunction."""
        result: Value | None = None
        for test in tests:
            if result is None:
                result = test
                continue
            a, b = self.unify(result, test)
            result = Value(f"T.And({a.text}, {b.text})", "bool", a.lanes)
        return result

    def compare(self, symbol: str, a: Value, b: Value) -> Value:
        """A comparison as a bool."""
        x, y = self.unify(a, b)
        return Value(f"{ts.wrapped(x, ts.SUM)} {symbol} {ts.wrapped(y, ts.SUM)}", "bool", x.lanes, binding=ts.OTHER)

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        """`a` where the condition holds, else `b`; both are computed."""
        x, y = self.unify(a, b)
        lanes = max(x.lanes, condition.lanes)
        c, x, y = (ts.broadcast(v, lanes) if lanes > 1 else v for v in (condition, x, y))
        return Value(f"T.Select({c.text}, {x.text}, {y.text})", x.dtype, lanes)

    def operation(self, name: str, args: list[Value]) -> Value:
        if name == "exact":
            return args[0]
        if name == "where":
            return self.select(self.cast(args[0], "bool"), args[1], args[2])
        if name == "ne" and any(a.dtype in ts.FLOATS for a in args):  # TVM's own test is false for NaN
            a, b = self.unify(*args)
            if a.dtype == "float32":
                return self.cast(self.helper("differ", a, b, dtype="int32"), "bool")
        if name in COMPARISONS:
            return self.compare(COMPARISONS[name], args[0], args[1])
        if name in ("isnan", "isinf", "isfinite"):
            if args[0].dtype not in ts.FLOATS:
                return ts.constant(name == "isfinite", "bool")
            return self.cast(self.helper(name, self.cast(args[0], "float32"), dtype="int32"), "bool")
        if name in ("popcount", "clz"):
            bits = args[0].dtype
            wide = self.cast(args[0], "int32") if bits in ("int8", "int16", "uint8", "bool") else args[0]
            counted = self.helper(f"{name}_{wide.dtype}", wide, dtype=wide.dtype)
            return self.cast(counted, "int32")
        if name in (*IMPORTED, *LIBRARY, "sqrt", "rsqrt"):
            x = args[0] if args[0].dtype == "float64" and not args[0].weak else self.cast(args[0], "float32")
            return self._float(name, x)
        if name == "div":
            a, b = self.unify(*args)
            if a.dtype not in ts.FLOATS:
                a, b = self.cast(a, "float32"), self.cast(b, "float32")
            return self._infix("/", a, b)
        if name == "pow":
            return self._power(args)
        operands = self.unify(*args)
        return self._arithmetic(name, operands)

    def _infix(self, symbol: str, a: Value, b: Value) -> Value:
        return Value(f"({ts.wrapped(a, ts.SUM)} {symbol} {ts.wrapped(b, ts.ATOM)})", a.dtype, a.lanes)

    def _arithmetic(self, name: str, operands: list[Value]) -> Value:
        a = operands[0]
        floating = a.dtype in ts.FLOATS
        if name in ARITHMETIC:
            return self._infix(ARITHMETIC[name], *operands)
        if name in ("minimum", "maximum"):
            return Value(f"T.{name[:3]}({a.text}, {operands[1].text})", a.dtype, a.lanes)
        if name in BITS and a.dtype == "bool":
            return self._logic(name, *operands)
        if name in BITS:
            return Value(f"T.{BITS[name]}({a.text}, {operands[1].text})", a.dtype, a.lanes)
        if name == "not":
            return self._negated(a) if a.dtype == "bool" else Value(f"T.bitwise_not({a.text})", a.dtype, a.lanes)
        zero = ts.broadcast(ts.constant(0, a.dtype), a.lanes)
        if name == "neg":
            if floating:  # 0 - x loses the sign of zero
                return self._infix("*", a, ts.broadcast(ts.constant(-1, a.dtype), a.lanes))
            return self._infix("-", zero, a)
        if name == "abs":
            return (
                Value(f"T.abs({a.text})", a.dtype, a.lanes)
                if floating
                else Value(f"T.max({a.text}, {zero.text} - {a.text})", a.dtype, a.lanes)
            )
        if name == "sign":
            one, minus = (ts.broadcast(ts.constant(x, a.dtype), a.lanes) for x in (1, -1 if a.dtype != "uint8" else 0))
            negative = Value(f"T.Select({a.text} < {zero.text}, {minus.text}, {zero.text})", a.dtype, a.lanes)
            return Value(f"T.Select({a.text} > {zero.text}, {one.text}, {negative.text})", a.dtype, a.lanes)
        if name in ROUNDING:
            return Value(f"T.{ROUNDING[name]}({a.text})", a.dtype, a.lanes) if floating else a
        if name in ("floordiv", "mod"):
            return self._division(name, *operands)
        raise UnsupportedError(f"the CPU backend has no operation {name!r}", statement=self.statement)

    def _negated(self, a: Value) -> Value:
        """The negation, by way of bits: TVM takes the negation of a < b for a >= b, wrong for NaN."""
        bits, one = self.cast(a, "int8"), ts.broadcast(ts.constant(1, "int8"), a.lanes)
        return self.cast(Value(f"T.bitwise_xor({bits.text}, {one.text})", "int8", a.lanes), "bool")

    def _logic(self, name: str, a: Value, b: Value) -> Value:
        if name in ("and", "or"):
            return Value(f"T.{name.capitalize()}({a.text}, {b.text})", "bool", a.lanes)
        if name == "xor":
            x, y = self.cast(a, "int8"), self.cast(b, "int8")
            return self.cast(Value(f"T.bitwise_xor({x.text}, {y.text})", "int8", a.lanes), "bool")
        raise UnsupportedError(f"the CPU backend has no {name!r} of bools", statement=self.statement, hint="cast to an integer first")

    def _division(self, name: str, a: Value, b: Value) -> Value:
        """The quotient rounded down, or the remainder with the divisor's sign."""
        if a.dtype in ts.FLOATS:
            if name == "floordiv":
                return Value(f"T.floor({self._infix('/', a, b).text})", a.dtype, a.lanes)
            rest = self.helper("fmod", self.cast(a, "float32"), self.cast(b, "float32"), dtype="float32")
            zero = ts.broadcast(ts.constant(0, "float32"), rest.lanes)
            below = f"T.And({rest.text} < {zero.text}, {b.text} > {zero.text})"
            above = f"T.And({rest.text} > {zero.text}, {b.text} < {zero.text})"
            other = f"T.Or({below}, {above})"
            return Value(f"T.Select({other}, {rest.text} + {b.text}, {rest.text})", "float32", rest.lanes)
        if b.number is None:  # lanes outside an extent hold zeros, and the processor traps
            zero, one = (ts.broadcast(ts.constant(x, b.dtype), b.lanes) for x in (0, 1))
            b = Value(f"T.Select({b.text} == {zero.text}, {one.text}, {b.text})", b.dtype, b.lanes)
        function = {"floordiv": "floordiv", "mod": "floormod"}[name]
        return Value(f"T.{function}({a.text}, {b.text})", a.dtype, a.lanes)

    def _float(self, name: str, x: Value) -> Value:
        if name == "sqrt":
            return Value(f"T.sqrt({x.text})", x.dtype, x.lanes)
        if name == "rsqrt":
            one = ts.broadcast(ts.constant(1, x.dtype), x.lanes)
            return self._infix("/", one, Value(f"T.sqrt({x.text})", x.dtype, x.lanes))
        if x.dtype == "float64":
            if name in ("exp", "exp2", "log", "log2", "sin", "cos", "tanh"):
                return Value(f"T.{name}({x.text})", x.dtype, x.lanes)
            raise UnsupportedError(f"the CPU backend has no {name!r} of f64", statement=self.statement, hint="cast to f32 first")
        return self.helper(name, x, dtype="float32")

    def _power(self, args: list[Value]) -> Value:
        base, exponent = args
        number = exponent.number
        if number is not None and not isinstance(number, bool) and number in (1, 2, 3, 4):
            result = base if base.dtype != "bool" else self.cast(base, "int32")
            for _ in range(int(number) - 1):
                result = self._infix("*", result, base)
            return result
        a, b = self.unify(base, exponent)
        if a.dtype == "float32":
            if number == 0.5:
                return Value(f"T.sqrt({a.text})", a.dtype, a.lanes)
            return self.helper("pow", a, b, dtype="float32")
        raise UnsupportedError(
            f"the CPU backend has no power of {a.dtype} by this exponent", statement=self.statement, hint="cast to f32 first"
        )

    def bind(self, v: Value, wanted: str, out: list[Statement]) -> Value:
        """`v` under a name, so that its text is not repeated."""
        if v.number is not None or v.text.isidentifier():
            return v
        variable = self.names.fresh("v", wanted)
        out.append(Let(variable, v))
        return Value(variable, v.dtype, v.lanes)
