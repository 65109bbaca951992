"""Expressions: one closed set of nodes for both levels, cascades and tile programs.

    expr  =  Const(value) | Scalar(name) | Index(rank) | Extent(rank)        numbers, scalar arguments, rank indices, extents
          |  Read(tensor, coords, fill)                                      an element of a tensor; one coordinate a rank
          |  Op(name, args) | Cast(x, dtype) | Bitcast(x, dtype)             maps
          |  Tile(name) | Masked(x, identity) | Start(r) | Count(r) | Seen(r)     tile programs only

A coordinate is an expression: `Index(r)` where the tensor is read at the rank's own index, an affine expression for shifts and
windows, a `Read` of an integer tensor for a gather. Nodes are frozen, so equal expressions are equal objects by value.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

from .types import DType


@dataclass(frozen=True, slots=True)
class Const:
    """A literal. Weak in promotion. inf and nan are allowed."""

    value: float | int | bool

    def __eq__(self, other: object) -> bool:  # nan equals nan, 1 differs from 1.0 and from True, 0.0 from -0.0
        return isinstance(other, Const) and type(self.value) is type(other.value) and repr(self.value) == repr(other.value)

    def __hash__(self) -> int:
        return hash((type(self.value), repr(self.value)))


@dataclass(frozen=True, slots=True)
class Scalar:
    """A run-time scalar argument of the cascade. Weak in promotion."""

    name: str


@dataclass(frozen=True, slots=True)
class Index:
    """The index along `rank` of the element being computed, an i32."""

    rank: str


@dataclass(frozen=True, slots=True)
class Extent:
    """The extent of `rank`, an i32. In a tile program: elements that take part, over the whole stream."""

    rank: str


@dataclass(frozen=True, slots=True)
class Read:
    """The element of `tensor` at `coords`, one coordinate for each of its ranks in order.

    `fill` is read where an affine coordinate leaves the tensor; None means that every coordinate is known to be inside.
    """

    tensor: str
    coords: tuple[Expr, ...]
    fill: Const | None = None


@dataclass(frozen=True, slots=True)
class Op:
    """An operation of the table `OPS`."""

    name: str
    args: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Cast:
    """`x` converted to `dtype`: a rounding point that no rewrite removes or crosses."""

    x: Expr
    dtype: DType


@dataclass(frozen=True, slots=True)
class Bitcast:
    """The bits of `x` read as `dtype` of the same size."""

    x: Expr
    dtype: DType


@dataclass(frozen=True, slots=True)
class Tile:
    """A tile of a tile program, read at the indices of its own named ranks."""

    name: str


@dataclass(frozen=True, slots=True)
class Masked:
    """`x` where the enclosing loop's domain holds, `identity` elsewhere. Costs nothing in a tile wholly inside the domain."""

    x: Expr
    identity: Const


@dataclass(frozen=True, slots=True)
class Start:
    """The first index along the stream rank of the current tile."""

    rank: str


@dataclass(frozen=True, slots=True)
class Count:
    """How many elements of the current tile along the stream rank lie below its extent."""

    rank: str


@dataclass(frozen=True, slots=True)
class Seen:
    """How many elements along the stream rank have been seen when this tile is done: `Start + Count`."""

    rank: str


Expr: TypeAlias = Const | Scalar | Index | Extent | Read | Op | Cast | Bitcast | Tile | Masked | Start | Count | Seen


@dataclass(frozen=True, slots=True)
class OpInfo:
    """What is known of an operation.

    Args:
        arity: the number of operands.
        kind: `arith` promotes; `float` promotes and needs floats (integers become f32); `compare` gives bool; `bit` keeps
            integers or bools; `test` gives bool of one float; `select` is where; `count` gives i32.
        unit: `vector`, `special` (one result of the special function unit) or `none` (no work).
        symbol: the infix or prefix spelling, if any.
        precedence: of that spelling; larger binds tighter.
    """

    arity: int
    kind: str
    unit: str = "vector"
    symbol: str = ""
    precedence: int = 0


OPS: dict[str, OpInfo] = {
    "where": OpInfo(3, "select"),
    "or": OpInfo(2, "bit", symbol="|", precedence=1),
    "xor": OpInfo(2, "bit", symbol="^", precedence=2),
    "and": OpInfo(2, "bit", symbol="&", precedence=3),
    "eq": OpInfo(2, "compare", symbol="==", precedence=4),
    "ne": OpInfo(2, "compare", symbol="!=", precedence=4),
    "lt": OpInfo(2, "compare", symbol="<", precedence=4),
    "le": OpInfo(2, "compare", symbol="<=", precedence=4),
    "gt": OpInfo(2, "compare", symbol=">", precedence=4),
    "ge": OpInfo(2, "compare", symbol=">=", precedence=4),
    "shl": OpInfo(2, "bit", symbol="<<", precedence=5),
    "shr": OpInfo(2, "bit", symbol=">>", precedence=5),
    "add": OpInfo(2, "arith", symbol="+", precedence=6),
    "sub": OpInfo(2, "arith", symbol="-", precedence=6),
    "mul": OpInfo(2, "arith", symbol="*", precedence=7),
    "div": OpInfo(2, "arith", "special", symbol="/", precedence=7),
    "floordiv": OpInfo(2, "arith", symbol="//", precedence=7),
    "mod": OpInfo(2, "arith", symbol="%", precedence=7),
    "neg": OpInfo(1, "arith", symbol="-", precedence=8),
    "not": OpInfo(1, "bit", symbol="~", precedence=8),
    "pow": OpInfo(2, "arith", "special", symbol="**", precedence=9),
    "minimum": OpInfo(2, "arith"),
    "maximum": OpInfo(2, "arith"),
    "abs": OpInfo(1, "arith"),
    "sign": OpInfo(1, "arith"),
    "exp": OpInfo(1, "float", "special"),
    "exp2": OpInfo(1, "float", "special"),
    "log": OpInfo(1, "float", "special"),
    "log2": OpInfo(1, "float", "special"),
    "log1p": OpInfo(1, "float", "special"),
    "sqrt": OpInfo(1, "float", "special"),
    "rsqrt": OpInfo(1, "float", "special"),
    "sin": OpInfo(1, "float", "special"),
    "cos": OpInfo(1, "float", "special"),
    "tanh": OpInfo(1, "float", "special"),
    "sigmoid": OpInfo(1, "float", "special"),
    "erf": OpInfo(1, "float", "special"),
    "floor": OpInfo(1, "arith"),
    "ceil": OpInfo(1, "arith"),
    "round": OpInfo(1, "arith"),
    "trunc": OpInfo(1, "arith"),
    "isnan": OpInfo(1, "test"),
    "isinf": OpInfo(1, "test"),
    "isfinite": OpInfo(1, "test"),
    "popcount": OpInfo(1, "count"),
    "clz": OpInfo(1, "count"),
    "exact": OpInfo(1, "arith", "none"),
}

REDUCTIONS: dict[str, float | int | bool | None] = {  # operation -> identity; arg reductions take theirs from max and min
    "sum": 0.0, "prod": 1.0, "max": float("-inf"), "min": float("inf"), "any": False, "all": True, "argmax": None, "argmin": None,
}  # fmt: skip
SCANS = ("sum", "prod", "max", "min")


def children(e: Expr) -> tuple[Expr, ...]:
    """The direct subexpressions of `e`, coordinates included, in reading order."""
    match e:
        case Read(coords=coords):
            return coords
        case Op(args=args):
            return args
        case Cast(x=x) | Bitcast(x=x) | Masked(x=x):
            return (x,)
        case _:
            return ()


def with_children(e: Expr, new: tuple[Expr, ...]) -> Expr:
    """`e` with its direct subexpressions replaced, the same object if nothing changed."""
    if all(a is b for a, b in zip(children(e), new, strict=True)):
        return e
    match e:
        case Read(tensor=tensor, fill=fill):
            return Read(tensor, new, fill)
        case Op(name=name):
            return Op(name, new)
        case Cast(dtype=dtype):
            return Cast(new[0], dtype)
        case Bitcast(dtype=dtype):
            return Bitcast(new[0], dtype)
        case Masked(identity=identity):
            return Masked(new[0], identity)
        case _:
            raise AssertionError(f"a leaf has no children: {e!r}")


def walk(e: Expr) -> Iterator[Expr]:
    """`e` and everything below it, parents first."""
    yield e
    for child in children(e):
        yield from walk(child)


def rewrite(e: Expr, rule: Callable[[Expr], Expr | None]) -> Expr:
    """`rule` applied to every node from the leaves up; None keeps a node. The one traversal that changes expressions."""
    rebuilt = with_children(e, tuple(rewrite(child, rule) for child in children(e)))
    result = rule(rebuilt)
    return rebuilt if result is None else result


def substitute(e: Expr, table: dict[Expr, Expr]) -> Expr:
    """`e` with every occurrence of a key replaced by its value, largest first (no value is searched again)."""
    if e in table:
        return table[e]
    return with_children(e, tuple(substitute(child, table) for child in children(e)))


def reads(e: Expr) -> Iterator[Read]:
    """Every tensor access in `e`, index tensors inside coordinates included."""
    return (node for node in walk(e) if isinstance(node, Read))


def index_ranks(e: Expr) -> dict[str, None]:
    """The ranks whose index `e` depends on, in order of first appearance (a dict used as an ordered set).

    Assumes that reads are written out, as in a cascade; a `Tile` contributes nothing here.
    """
    return {node.rank: None for node in walk(e) if isinstance(node, Index)}


def aligned(tensor: str, *ranks: str) -> Read:
    """`tensor` read at the indices of its own ranks."""
    return Read(tensor, tuple(Index(r) for r in ranks))
