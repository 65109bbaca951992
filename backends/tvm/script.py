"""TVMScript as data: typed values, statements, and the printer.

value      =  Value(text, dtype, lanes)                               an expression of the target language with its type
statement  =  Comment | Let | Set | Alloc | Evaluate | For | If | With
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

ATOM, PRODUCT, SUM, OTHER = 9, 7, 6, 0
INTEGERS = ("int8", "int16", "int32", "int64", "uint8")
FLOATS = ("float32", "float64")


@dataclass(frozen=True, slots=True)
class Value:
    """An expression. `number` is its value where constant; a `weak` one takes the type of what it meets; `binding` as in Python.

    `data` marks what comes from memory: integers among it may wrap around, which indices never do.
    """

    text: str
    dtype: str
    lanes: int = 1
    number: float | int | bool | None = None
    weak: bool = False
    binding: int = ATOM
    data: bool = False

    @property
    def type_name(self) -> str:
        return self.dtype if self.lanes == 1 else f"{self.dtype}x{self.lanes}"


def constant(number: float | int | bool, dtype: str, weak: bool = False) -> Value:
    """A literal. Plain integers print bare, everything else with its type."""
    if dtype == "bool":
        return Value(f"T.bool({bool(number)})", dtype, number=bool(number), weak=weak)
    if dtype in FLOATS:
        number = float(number)
        text = repr(number) if math.isfinite(number) else f'"{number}"'
        return Value(f"T.{dtype}({text})", dtype, number=number, weak=weak)
    number = int(number)
    return Value(str(number) if dtype == "int32" else f"T.{dtype}({number})", dtype, number=number, weak=weak)


def limits(dtype: str) -> tuple[int, int]:
    """The least and the greatest number of an integer type."""
    bits = int(dtype.lstrip("uint"))
    return (0, (1 << bits) - 1) if dtype.startswith("u") else (-(1 << (bits - 1)), (1 << (bits - 1)) - 1)


def wrapped_number(number: int, dtype: str) -> int:
    """`number` as an integer type holds it."""
    low, high = limits(dtype)
    return (number - low) % (high - low + 1) + low


def integer(number: int) -> Value:
    """An index constant."""
    return constant(number, "int32")


def name(text: str, dtype: str = "int32", lanes: int = 1) -> Value:
    """A variable."""
    return Value(text, dtype, lanes)


def wrapped(v: Value, binding: int) -> str:
    """The text of `v` as an operand of an operator that binds as tightly as `binding`."""
    negative = v.number is not None and not isinstance(v.number, bool) and v.dtype == "int32" and v.number < 0
    return v.text if v.binding >= binding and not negative else f"({v.text})"


def _wide(a: Value, b: Value) -> str:
    return "int64" if "int64" in (a.dtype, b.dtype) else "int32"


def add(a: Value, b: Value) -> Value:
    """The sum of two indices, constants folded."""
    if a.number is not None and b.number is not None:
        return constant(a.number + b.number, _wide(a, b))
    if a.number == 0:
        return b
    if b.number == 0:
        return a
    if b.number is not None and b.number < 0 and b.dtype == "int32":
        return Value(f"{wrapped(a, SUM)} - {-b.number}", _wide(a, b), binding=SUM)
    return Value(f"{wrapped(a, SUM)} + {wrapped(b, SUM)}", _wide(a, b), binding=SUM)


def sub(a: Value, b: Value) -> Value:
    """The difference of two indices."""
    if b.number is not None:
        return add(a, constant(-b.number, "int32"))
    return Value(f"{wrapped(a, SUM)} - {wrapped(b, PRODUCT)}", _wide(a, b), binding=SUM)


def mul(a: Value, b: Value) -> Value:
    """The product of two indices."""
    if a.number is not None and b.number is not None:
        return constant(a.number * b.number, _wide(a, b))
    for x, y in ((a, b), (b, a)):
        if x.number == 1:
            return y
        if x.number == 0:
            return integer(0)
    return Value(f"{wrapped(a, PRODUCT)} * {wrapped(b, PRODUCT)}", _wide(a, b), binding=PRODUCT)


def floor_div(a: Value, n: Value) -> Value:
    """The quotient of two indices, rounded down."""
    if n.number == 1:
        return a
    if a.number is not None and n.number is not None:
        return constant(int(a.number) // int(n.number), _wide(a, n))
    return Value(f"{wrapped(a, PRODUCT)} // {wrapped(n, ATOM)}", _wide(a, n), binding=PRODUCT)


def floor_mod(a: Value, n: Value) -> Value:
    """The remainder of two indices, of the sign of the divisor."""
    if n.number == 1:
        return integer(0)
    if a.number is not None and n.number is not None:
        return constant(int(a.number) % int(n.number), _wide(a, n))
    return Value(f"{wrapped(a, PRODUCT)} % {wrapped(n, ATOM)}", _wide(a, n), binding=PRODUCT)


def quotient(a: Value, n: Value) -> Value:
    """The quotient of two indices that are not negative. TVM takes very long over rounding rules for signs it cannot tell."""
    if n.number == 1:
        return a
    if a.number is not None and n.number is not None:
        return constant(int(a.number) // int(n.number), _wide(a, n))
    return Value(f"T.truncdiv({a.text}, {n.text})", _wide(a, n))


def remainder(a: Value, n: Value) -> Value:
    """The remainder of two indices that are not negative."""
    if n.number == 1:
        return integer(0)
    if a.number is not None and n.number is not None:
        return constant(int(a.number) % int(n.number), _wide(a, n))
    return Value(f"T.truncmod({a.text}, {n.text})", _wide(a, n))


def ceil_div(a: Value, n: int) -> Value:
    """The quotient of an index that is not negative and a constant, rounded up."""
    return quotient(add(a, integer(n - 1)), integer(n))


def smaller(a: Value, b: Value) -> Value:
    """The lesser of two indices."""
    if a.number is not None and b.number is not None:
        return constant(min(a.number, b.number), _wide(a, b))
    if a.text == b.text:
        return a
    return Value(f"T.min({a.text}, {b.text})", _wide(a, b))


def larger(a: Value, b: Value) -> Value:
    """The greater of two indices."""
    if a.number is not None and b.number is not None:
        return constant(max(a.number, b.number), _wide(a, b))
    if a.text == b.text:
        return a
    return Value(f"T.max({a.text}, {b.text})", _wide(a, b))


def narrow(v: Value) -> Value:
    """An index as an i32."""
    if v.number is not None:
        return integer(int(v.number))
    return v if v.dtype == "int32" else Value(f'T.Cast("int32", {v.text})', "int32")


def broadcast(v: Value, lanes: int) -> Value:
    """`v` in every lane."""
    if v.lanes == lanes:
        return v
    return Value(f"T.broadcast({v.text}, {lanes})", v.dtype, lanes, weak=v.weak)


def ramp(base: Value, lanes: int) -> Value:
    """base, base + 1, ... in the lanes."""
    return base if lanes == 1 else Value(f"T.ramp({base.text}, 1, {lanes})", base.dtype, lanes)


def extern(function: str, *args: Value, dtype: str, lanes: int = 1) -> Value:
    """A call of an imported helper."""
    result = Value("", dtype, lanes).type_name
    return Value(f'T.call_extern("{result}", "{function}", {", ".join(a.text for a in args)})', dtype, lanes)


@dataclass(frozen=True, slots=True)
class Comment:
    text: str


@dataclass(frozen=True, slots=True)
class Let:
    """`name: T.let[T.type] = value`: a scalar or vector that never changes."""

    name: str
    value: Value


@dataclass(frozen=True, slots=True)
class Set:
    """`buffer[index] = value`."""

    target: Value
    value: Value


@dataclass(frozen=True, slots=True)
class Alloc:
    """A buffer of the innermost enclosing block; `registers` keeps it on the stack, where LLVM turns it into registers."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    registers: bool = True


@dataclass(frozen=True, slots=True)
class Evaluate:
    value: Value


@dataclass(frozen=True, slots=True)
class For:
    """A loop from `begin` to `end`. kind: range, T.unroll or T.parallel."""

    var: str
    begin: Value
    end: Value
    kind: str = "range"
    body: list[Statement] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class If:
    condition: Value
    body: list[Statement] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class With:
    """A `with` block, such as a pragma."""

    head: str
    body: list[Statement] = field(default_factory=list)


Statement: TypeAlias = Comment | Let | Set | Alloc | Evaluate | For | If | With


def render(body: Sequence[Statement], depth: int = 0) -> list[str]:
    """The lines of `body`; comments that nothing follows and loops that never run are kept, empty blocks are `T.evaluate(0)`."""
    pad = "    " * depth
    lines: list[str] = []
    for s in body:
        match s:
            case Comment(text):
                lines.append(f"{pad}# {text}")
            case Let(variable, value):
                lines.append(f"{pad}{variable}: T.let[T.{value.type_name}] = {value.text}")
            case Set(target, value):
                lines.append(f"{pad}{target.text} = {value.text}")
            case Alloc(variable, shape, dtype, registers):
                dims = ", ".join(map(str, shape)) + ("," if len(shape) == 1 else "")
                place = "annotations=STACK" if registers else 'scope="global"'
                lines.append(f'{pad}{variable} = T.alloc_buffer(({dims}), "{dtype}", {place})')
            case Evaluate(value):
                lines.append(f"{pad}T.evaluate({value.text})")
            case For(variable, begin, end, kind, inner):
                bounds = end.text if begin.number == 0 else f"{begin.text}, {end.text}"
                lines += [f"{pad}for {variable} in {kind}({bounds}):", *_block(inner, depth + 1)]
            case If(condition, inner):
                lines += [f"{pad}if {condition.text}:", *_block(inner, depth + 1)]
            case With(head, inner):
                lines += [f"{pad}with {head}:", *_block(inner, depth + 1)]
    return lines


def _block(body: Sequence[Statement], depth: int) -> list[str]:
    lines = render(body, depth)
    if all(line.lstrip().startswith("#") for line in lines):
        lines.append("    " * depth + "T.evaluate(0)")
    return lines


class Names:
    """Identifiers of one function: each asked for name becomes a legal one, never twice the same."""

    def __init__(self) -> None:
        self._used: set[str] = set()

    def fresh(self, prefix: str, wanted: str = "") -> str:
        """`prefix_wanted` made legal, with a number where it is taken."""
        stem = re.sub(r"\W", "_", wanted.replace("'", "_next")).strip("_")
        stem = f"{prefix}_{stem}" if stem else prefix
        candidate, n = stem, 1
        while candidate in self._used:
            n += 1
            candidate = f"{stem}_{n}"
        self._used.add(candidate)
        return candidate
