"""Arithmetic of emitted values: conversions as torch has them, comparisons, selections, and every operation of the table `OPS`."""

from __future__ import annotations

import math
import re
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
_LITERAL = re.compile(r"(T\.broadcast\()?T\.float\d+\([^()]*\)(, \d+\))?")
_ZERO = re.compile(r"(T\.broadcast\()?T\.float\d+\(-?0\.0\)(, \d+\))?")
_ADDS_LITERAL = re.compile(r"[+-] \(?T\.(broadcast\(T\.)?float|T\.float\d+\([^)]*\)(, \d+\))? [+-]")
FLOAT_COMPARISONS = {"==": "feq", "!=": "fne", "<": "flt", "<=": "fle", ">": "fgt", ">=": "fge"}
WRAPPING = {"add": "wadd", "sub": "wsub", "mul": "wmul"}
ROUNDING = {"floor": "floor", "ceil": "ceil", "round": "nearbyint", "trunc": "trunc"}
BITS = {"and": "bitwise_and", "or": "bitwise_or", "xor": "bitwise_xor"}
SHIFTS = {"shl": "shift_left", "shr": "shift_right"}
TESTS = ("isnan", "isinf", "isfinite")
BEYOND = ("minimum", "maximum", "floordiv", "mod", *SHIFTS)  # what a literal that is wrapped to the type of its operand would change
RANK_OF_KIND = {"bool": 0, "uint8": 1, "int8": 1, "int16": 2, "int32": 3, "int64": 4, "float32": 5, "float64": 6}


def _widens(source: str, target: str) -> bool:
    """Whether TVM may convert: between floats, or to an integer type that holds all values. It takes anything else for an index."""
    floats = (source in ts.FLOATS, target in ts.FLOATS)
    if any(floats):
        return all(floats)
    (low, high), (lowest, highest) = ts.limits(source), ts.limits(target)
    return lowest <= low and high <= highest


def _literal(number: float | int | bool, dtype: str) -> float | int | bool:
    """A literal as a value of a type; an infinity among integers is the extreme of the type."""
    if dtype == "bool":
        return bool(number)
    if dtype in ts.FLOATS:
        return float(number)
    if isinstance(number, float) and not math.isfinite(number):
        return 0 if math.isnan(number) else ts.limits(dtype)[0 if number < 0 else 1]
    return ts.wrapped_number(int(number), dtype)


def _simplified(name: str, a: Value, b: Value) -> bool:
    """Whether TVM would compute as with real numbers: x - x, (x + c) - c, 0 / x. It must not see such."""
    if any(_ZERO.fullmatch(v.text) for v in (a, b)):
        return True
    if name in ("mul", "div"):
        return a.text == b.text and name == "div"
    for x, y in ((a, b), (b, a)):
        if _LITERAL.fullmatch(x.text):
            if _ADDS_LITERAL.search(y.text):
                return True
        elif re.search(rf"(?<!\w){re.escape(x.text)}(?!\w)", y.text):
            return True
    return False


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
            return ts.constant(_literal(v.number, dtype), dtype)
        if dtype == "bool":
            zero = ts.broadcast(ts.constant(0, v.dtype), v.lanes)
            if v.dtype in ts.FLOATS:
                return self.compare("!=", v, zero)
            return Value(f"{v.text} != {zero.text}", "bool", v.lanes, binding=ts.OTHER)
        if v.dtype == "bool":
            one, zero = (ts.broadcast(ts.constant(x, dtype), v.lanes) for x in (1, 0))
            return Value(f"T.Select({v.text}, {one.text}, {zero.text})", dtype, v.lanes)
        if _widens(v.dtype, dtype):
            return Value(f'T.Cast("{Value("", dtype, v.lanes).type_name}", {v.text})', dtype, v.lanes)
        return self.helper(f"cast_{v.dtype}_{dtype}", v, dtype=dtype)

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
        if x.dtype in ts.FLOATS:
            return self.cast(self.helper(f"{FLOAT_COMPARISONS[symbol]}_{x.dtype}", x, y, dtype="int32"), "bool")
        return Value(f"{ts.wrapped(x, ts.SUM)} {symbol} {ts.wrapped(y, ts.SUM)}", "bool", x.lanes, binding=ts.OTHER)

    def select(self, condition: Value, a: Value, b: Value) -> Value:
        """`a` where the condition holds, else `b`; both are computed."""
        x, y = self.unify(a, b)
        lanes = max(x.lanes, condition.lanes)
        c, x, y = (ts.broadcast(v, lanes) if lanes > 1 else v for v in (condition, x, y))
        return Value(f"T.Select({c.text}, {x.text}, {y.text})", x.dtype, lanes)

    def operation(self, name: str, args: list[Value]) -> Value:
        """An operation of the table `OPS`. The result of weak operands is weak, that of data is data."""
        result = self._operation(name, args)
        weak = all(a.weak for a in args) and result.number is None
        return replace(result, data=any(a.data for a in args), weak=weak or result.weak)

    def _operation(self, name: str, args: list[Value]) -> Value:
        if name == "exact":
            return args[0]
        if name == "where":
            return self.select(self.cast(args[0], "bool"), args[1], args[2])
        wide = self._beyond(name, args)
        if wide is not None:
            return wide
        if name in COMPARISONS:
            return self.compare(COMPARISONS[name], args[0], args[1])
        if name in TESTS:
            x = args[0]
            if x.dtype not in ts.FLOATS:
                return ts.constant(name == "isfinite", "bool")
            return self.cast(self.helper(name if x.dtype == "float32" else f"{name}64", x, dtype="int32"), "bool")
        if name in ("popcount", "clz"):
            x = self.cast(args[0], "uint8") if args[0].dtype == "bool" else args[0]
            return self.helper(f"{name}_{x.dtype}", x, dtype="int32")
        if name in (*IMPORTED, *LIBRARY, "sqrt", "rsqrt"):
            x = args[0] if args[0].dtype == "float64" and not args[0].weak else self.cast(args[0], "float32")
            return self._float(name, x)
        if name == "div":
            a, b = self.unify(*args)
            if a.dtype not in ts.FLOATS:
                a, b = self.cast(a, "float32"), self.cast(b, "float32")
            return self.helper(f"fdiv_{a.dtype}", a, b, dtype=a.dtype) if _simplified("div", a, b) else self._infix("/", a, b)
        if name == "pow":
            return self._power(args)
        operands = self.unify(*args)
        a = operands[0]
        if a.dtype in ts.FLOATS:
            return self._floating(name, *operands)
        return self._logic(name, *operands) if a.dtype == "bool" else self._integer(name, any(v.data for v in args), *operands)

    def _beyond(self, name: str, args: list[Value]) -> Value | None:
        """An operation of integers and a literal that their type does not hold, in 64 bits; None for any other."""
        integers = [v for v in args if v.dtype in ts.INTEGERS]
        strong = [v for v in integers if not v.weak]
        if len(integers) < len(args) or not strong or (name not in COMPARISONS and name not in BEYOND):
            return None
        dtype = self.unify(*strong)[0].dtype
        low, high = ts.limits(dtype)
        if all(v.number is None or not v.weak or low <= v.number <= high for v in args):
            return None
        result = self._operation(name, [self.cast(v, "int64") for v in args])
        return result if result.dtype == "bool" else self.cast(result, dtype)

    def _infix(self, symbol: str, a: Value, b: Value) -> Value:
        return Value(f"({ts.wrapped(a, ts.SUM)} {symbol} {ts.wrapped(b, ts.ATOM)})", a.dtype, a.lanes)

    def _unknown(self, name: str, what: str, hint: str) -> UnsupportedError:
        return UnsupportedError(f"the CPU backend has no {name!r} of {what}", statement=self.statement, hint=hint)

    def _floating(self, name: str, a: Value, b: Value | None = None) -> Value:
        """Arithmetic of floats of one type."""
        if name in ARITHMETIC and b is not None:
            if _simplified(name, a, b):
                return self.helper(f"f{name}_{a.dtype}", a, b, dtype=a.dtype)
            return self._infix(ARITHMETIC[name], a, b)
        if name in ("minimum", "maximum") and b is not None:
            operands = (b, a) if _LITERAL.fullmatch(b.text) else (a, b)
            return self.helper(f"{name}_{a.dtype}", *operands, dtype=a.dtype)
        if name == "neg":  # 0 - x loses the sign of zero
            return self._infix("*", a, ts.broadcast(ts.constant(-1, a.dtype), a.lanes))
        if name == "abs":
            return Value(f"T.abs({a.text})", a.dtype, a.lanes)
        if name == "sign":
            one, minus, zero = (ts.broadcast(ts.constant(x, a.dtype), a.lanes) for x in (1, -1, 0))
            negative = Value(f"T.Select({a.text} < {zero.text}, {minus.text}, {zero.text})", a.dtype, a.lanes)
            return Value(f"T.Select({a.text} > {zero.text}, {one.text}, {negative.text})", a.dtype, a.lanes)
        if name in ROUNDING:
            return Value(f"T.{ROUNDING[name]}({a.text})", a.dtype, a.lanes)
        if name in ("floordiv", "mod") and b is not None:
            return self.helper(f"{'quotient' if name == 'floordiv' else 'remainder'}_{a.dtype}", a, b, dtype=a.dtype)
        raise self._unknown(name, "floats", "cast to an integer type, or take the bits with .bitcast")

    def _integer(self, name: str, data: bool, a: Value, b: Value | None = None) -> Value:
        """Arithmetic of integers of one type. Indices are left to TVM, whose analysis needs them; data may wrap around."""
        if name in ROUNDING:
            return a
        if name in BITS and b is not None:
            return Value(f"T.{BITS[name]}({a.text}, {b.text})", a.dtype, a.lanes)
        if name == "not":
            return Value(f"T.bitwise_not({a.text})", a.dtype, a.lanes)
        if name in ("minimum", "maximum") and b is not None:
            return Value(f"T.{name[:3]}({a.text}, {b.text})", a.dtype, a.lanes)
        zero, one, minus = (ts.broadcast(ts.constant(x, a.dtype), a.lanes) for x in (0, 1, -1 if a.dtype != "uint8" else 0))
        if name == "sign":
            negative = Value(f"T.Select({a.text} < {zero.text}, {minus.text}, {zero.text})", a.dtype, a.lanes)
            return Value(f"T.Select({a.text} > {zero.text}, {one.text}, {negative.text})", a.dtype, a.lanes)
        if name == "abs":
            return self.helper(f"wabs_{a.dtype}", a, dtype=a.dtype)
        if name == "neg":
            return self._integer("sub", data, zero, a)
        if b is None:
            raise self._unknown(name, a.dtype, "cast to f32 first")
        if name in ARITHMETIC:
            return self.helper(f"{WRAPPING[name]}_{a.dtype}", a, b, dtype=a.dtype) if data else self._infix(ARITHMETIC[name], a, b)
        if name in SHIFTS:
            return self._shift(name, data, a, b)
        known = b.number is not None and b.number not in (0, -1)
        if name in ("floordiv", "mod") and known:
            return Value(f"T.{'floordiv' if name == 'floordiv' else 'floormod'}({a.text}, {b.text})", a.dtype, a.lanes)
        if name in ("floordiv", "mod"):
            return self.helper(f"{name}_{a.dtype}", a, b, dtype=a.dtype)
        raise self._unknown(name, a.dtype, "cast to f32 first")

    def _shift(self, name: str, data: bool, a: Value, b: Value) -> Value:
        """A shift; one by what is not known to lie within the width gives 0, or the sign."""
        low, high = ts.limits(a.dtype)
        inside = b.number is not None and 0 <= b.number < (high - low).bit_length()
        if inside and (name == "shr" or not data):
            return Value(f"T.{SHIFTS[name]}({a.text}, {b.text})", a.dtype, a.lanes)
        return self.helper(f"{name}_{a.dtype}", a, b, dtype=a.dtype)

    def _negated(self, a: Value) -> Value:
        """The negation, by way of bits: TVM takes the negation of a < b for a >= b, wrong for NaN."""
        bits, one = self.cast(a, "int8"), ts.broadcast(ts.constant(1, "int8"), a.lanes)
        return self.cast(Value(f"T.bitwise_xor({bits.text}, {one.text})", "int8", a.lanes), "bool")

    def _logic(self, name: str, a: Value, b: Value | None = None) -> Value:
        if name == "not":
            return self._negated(a)
        if name in ("and", "or") and b is not None:
            return Value(f"T.{name.capitalize()}({a.text}, {b.text})", "bool", a.lanes)
        if name == "xor" and b is not None:
            x, y = self.cast(a, "int8"), self.cast(b, "int8")
            return self.cast(Value(f"T.bitwise_xor({x.text}, {y.text})", "int8", a.lanes), "bool")
        raise self._unknown(name, "bools", "cast to an integer first")

    def _float(self, name: str, x: Value) -> Value:
        if name == "sqrt":
            return Value(f"T.sqrt({x.text})", x.dtype, x.lanes)
        if name == "rsqrt":
            one = ts.broadcast(ts.constant(1, x.dtype), x.lanes)
            return self._infix("/", one, Value(f"T.sqrt({x.text})", x.dtype, x.lanes))
        if x.dtype == "float64":
            if name == "sigmoid":
                power = self._float("exp", self._infix("*", x, ts.broadcast(ts.constant(-1, x.dtype), x.lanes)))
                one = ts.broadcast(ts.constant(1, x.dtype), x.lanes)
                return self._infix("/", one, self._infix("+", power, one))
            if name in ("tanh", "erf", "log1p"):
                return self.helper(f"{name}64", x, dtype="float64")
            return Value(f"T.{name}({x.text})", x.dtype, x.lanes)
        return self.helper(name, x, dtype="float32")

    def _power(self, args: list[Value]) -> Value:
        """Small whole exponents multiply; a square root is one but for -inf and -0, whose power of a half is inf and 0."""
        base, exponent = args
        number = exponent.number if not isinstance(exponent.number, bool) else None
        if number is not None and number in (1, 2, 3, 4):
            result = base = base if base.dtype != "bool" else self.cast(base, "int32")
            for _ in range(int(number) - 1):
                result = self._operation("mul", [result, base])
            return result
        a, b = self.unify(base, exponent)
        if a.dtype not in ts.FLOATS:
            raise self._unknown("pow", f"{a.dtype} by this exponent", "cast to f32 first, or multiply")
        if number in (0.5, -0.5):
            root = self.helper(f"root_{a.dtype}", a, dtype=a.dtype)
            return root if number == 0.5 else self._infix("/", ts.broadcast(ts.constant(1, a.dtype), a.lanes), root)
        return self.helper("pow" if a.dtype == "float32" else "pow64", a, b, dtype=a.dtype)

    def bind(self, v: Value, wanted: str, out: list[Statement]) -> Value:
        """`v` under a name, so that its text is not repeated."""
        if v.number is not None or v.text.isidentifier():
            return v
        variable = self.names.fresh("v", wanted)
        out.append(Let(variable, v))
        return Value(variable, v.dtype, v.lanes, data=v.data)
