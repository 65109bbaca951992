"""Triton source as data: typed values over named axes, statements, and the printer.

    value      =  Value(text, type, dtype, axes)                    an expression of the kernel
    statement  =  Comment | Assign | Call | For | If

Operators of values are built here and nowhere glued from text, so that precedence and broadcasting are right everywhere.
"""

from __future__ import annotations

import builtins
import keyword
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from ...ir.types import DType, boolean, f32, i32, i64

ATOM, UNARY, PRODUCT, SUM, SHIFT, AND, XOR, OR, COMPARE, OTHER = 9, 8, 7, 6, 5, 4, 3, 2, 1, 0
BINDING = {
    "*": PRODUCT, "/": PRODUCT, "//": PRODUCT, "%": PRODUCT, "+": SUM, "-": SUM, "<<": SHIFT, ">>": SHIFT, "&": AND, "^": XOR, "|": OR,
    "<": COMPARE, "<=": COMPARE, ">": COMPARE, ">=": COMPARE, "==": COMPARE, "!=": COMPARE,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Value:
    """An expression of the kernel.

    Args:
        text: in Python.
        type: how it is held: `float32`, `bfloat16`, `int32`, `int1`, ...
        dtype: the declared type; a narrow float may be held in its own type, and is computed in f32.
        axes: the axes of the tensor in order; a scalar has none.
        binding: how tightly the outermost operator of `text` binds.
        number: its value where constant.
        weak: whether it takes the type of what it meets.
        clean: the axes along which lanes that hold no element are 0.
    """

    text: str
    type: str = "int32"
    dtype: DType = i32
    axes: tuple[str, ...] = ()
    binding: int = ATOM
    number: float | int | bool | None = None
    weak: bool = False
    clean: frozenset[str] = frozenset()

    def wrapped(self, binding: int) -> str:
        """The text as an operand of an operator that binds so tightly."""
        return self.text if self.binding >= binding else f"({self.text})"

    def over(self, axes: tuple[str, ...]) -> str:
        """The text shaped for broadcasting against a tensor with `axes`."""
        if not self.axes or self.axes == axes:
            return self.text
        index = ", ".join(":" if axis in self.axes else "None" for axis in axes)
        return f"{self.wrapped(ATOM)}[{index}]"

    def shaped(self, axes: tuple[str, ...]) -> Value:
        """`over`, as a value."""
        return self if not self.axes or self.axes == axes else replace(self, text=self.over(axes), axes=axes, binding=ATOM)


def number_text(number: float | int | bool) -> str:
    """A literal in Python."""
    if isinstance(number, bool) or not isinstance(number, float):
        return str(number)
    if math.isfinite(number):
        return repr(number)
    return f"float('{number}')"


def constant(number: float | int | bool, dtype: DType | None = None, *, weak: bool = False) -> Value:
    """A literal. Python's own types are i32 (i64 where it takes that), f32 and bool."""
    if dtype is None:
        dtype = boolean if isinstance(number, bool) else f32 if isinstance(number, float) else i32 if abs(number) < 1 << 31 else i64
    held = held_type(dtype)
    negative = not isinstance(number, bool) and (number < 0 or (isinstance(number, float) and math.copysign(1, number) < 0))
    plain = negative and math.isfinite(number)
    return Value(number_text(number), held, dtype, binding=UNARY if plain else ATOM, number=number, weak=weak)


def scalar(text: str, dtype: DType = i32) -> Value:
    """A variable without axes."""
    return Value(text, held_type(dtype), dtype)


def held_type(t: DType) -> str:
    """The type in which values of `t` are computed."""
    if t.is_float:
        return "float64" if t.bits == 64 else "float32"
    if t.kind == "bool":
        return "int1"
    return "uint8" if t.name == "u8" else f"int{max(t.bits, 8)}"


def union(axes: Sequence[str], order: Sequence[str]) -> tuple[str, ...]:
    """The axes, each once, in the order of the kernel."""
    return tuple(axis for axis in order if axis in axes)


def infix(symbol: str, a: Value, b: Value, order: Sequence[str], type: str, dtype: DType) -> Value:
    """`a symbol b`, broadcast."""
    axes = union((*a.axes, *b.axes), order)
    x, y, binding = a.shaped(axes), b.shaped(axes), BINDING[symbol]
    left = x.wrapped(SUM if binding == COMPARE else binding)
    right = y.wrapped(SUM if binding == COMPARE else binding + 1)
    return Value(f"{left} {symbol} {right}", type, dtype, axes, binding)


def call(function: str, *args: Value | str, order: Sequence[str] = (), type: str = "float32", dtype: DType = f32) -> Value:
    """`function(args)`, operands broadcast against each other where there are several tensors."""
    tensors = [a for a in args if isinstance(a, Value)]
    axes = union([axis for a in tensors for axis in a.axes], order) if order else (tensors[0].axes if tensors else ())
    texts = [a.over(axes) if isinstance(a, Value) else a for a in args]
    return Value(f"{function}({', '.join(texts)})", type, dtype, axes)


def method(v: Value, name: str, *args: str, type: str, dtype: DType) -> Value:
    """`v.name(args)`."""
    return replace(v, text=f"{v.wrapped(ATOM)}.{name}({', '.join(args)})", type=type, dtype=dtype, binding=ATOM, number=None)


# --- indices: i32 scalars and tiles, constants folded -----------------------------------------------------------------------------


def add(a: Value, b: Value, order: Sequence[str] = ()) -> Value:
    """The sum of two indices."""
    if a.number is not None and b.number is not None:
        return constant(int(a.number) + int(b.number))
    if a.number == 0:
        return b
    if b.number == 0:
        return a
    if b.number is not None and b.number < 0:
        return infix("-", a, constant(-int(b.number)), order, a.type, a.dtype)
    return infix("+", a, b, order, a.type, a.dtype)


def mul(a: Value, b: Value, order: Sequence[str] = ()) -> Value:
    """The product of two indices."""
    if a.number is not None and b.number is not None:
        return constant(int(a.number) * int(b.number))
    for x, y in ((a, b), (b, a)):
        if x.number == 1:
            return y
        if x.number == 0:
            return constant(0)
    return infix("*", a, b, order, a.type, a.dtype)


def least(a: Value, b: Value, order: Sequence[str] = ()) -> Value:
    """The lesser of two indices."""
    return _extreme("tl.minimum", a, b, order)


def greatest(a: Value, b: Value, order: Sequence[str] = ()) -> Value:
    """The greater of two indices."""
    return _extreme("tl.maximum", a, b, order)


def _extreme(function: str, a: Value, b: Value, order: Sequence[str]) -> Value:
    if a.number is not None and b.number is not None:
        choose = min if function == "tl.minimum" else max
        return constant(choose(int(a.number), int(b.number)))
    if a.text == b.text:
        return a
    return call(function, a, b, order=order, type="int32", dtype=i32)


# --- statements -------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comment:
    """A line of its own."""

    text: str


@dataclass(frozen=True, slots=True)
class Assign:
    """`name = value`."""

    name: str
    value: str


@dataclass(frozen=True, slots=True)
class Call:
    """An expression for its effect."""

    text: str


@dataclass(frozen=True, slots=True)
class For:
    """`for variable in iterable:`."""

    variable: str
    iterable: str
    body: list[Statement] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class If:
    """`if condition:`."""

    condition: str
    body: list[Statement] = field(default_factory=list)


Statement: TypeAlias = Comment | Assign | Call | For | If


def render(body: Sequence[Statement], depth: int = 0) -> list[str]:
    """The lines of `body`."""
    pad = "    " * depth
    lines: list[str] = []
    for s in body:
        match s:
            case Comment(text):
                lines.append(f"{pad}# {text}")
            case Assign(name, value):
                lines.append(f"{pad}{name} = {value}")
            case Call(text):
                lines.append(f"{pad}{text}")
            case For(variable, iterable, inner):
                lines += [f"{pad}for {variable} in {iterable}:", *render(inner, depth + 1)]
            case If(condition, inner):
                lines += [f"{pad}if {condition}:", *render(inner, depth + 1)]
    return lines


class Names:
    """Identifiers of one function: each name asked for becomes a legal one, never twice the same."""

    def __init__(self, *taken: str) -> None:
        self._used: set[str] = set(taken)

    def fresh(self, wanted: str) -> str:
        """`wanted` made legal, with a number where it is taken."""
        stem = re.sub(r"\W", "_", wanted.replace("'", "_next")) or "x"
        if keyword.iskeyword(stem) or stem in dir(builtins):
            stem += "_"
        candidate, n = stem, 1
        while candidate in self._used:
            n += 1
            candidate = f"{stem}_{n}"
        self._used.add(candidate)
        return candidate
