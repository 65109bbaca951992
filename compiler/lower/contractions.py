"""Products that are summed: which two sides make a matrix product, and in which type it may be done."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

from ...ir.expr import Const, Expr, Op, Read, Tile
from ...ir.infer import expression_ranks
from ...ir.types import DType, bf16, f16, f32


@dataclass(frozen=True, slots=True)
class Contraction:
    """sum over `over` of left * right."""

    left: Expr
    right: Expr


def factors(e: Expr) -> tuple[Expr, ...]:
    """The factors of a product."""
    match e:
        case Op(name="mul", args=(a, b)):
            return (*factors(a), *factors(b))
        case Op(name="exact", args=(a,)):
            return factors(a)
        case _:
            return (e,)


def product(parts: tuple[Expr, ...]) -> Expr:
    """The inverse of `factors`; 1 for none."""
    if not parts:
        return Const(1.0)
    result = parts[0]
    for part in parts[1:]:
        result = Op("mul", (result, part))
    return result


def find_contraction(
    e: Expr, ranks: tuple[str, ...], over: tuple[str, ...], tiles: Mapping[str, tuple[str, ...]], size: Callable[[str], int]
) -> Contraction | None:
    """The cheapest split of the product `e` into two sides that both vary along `over` and each lack a result rank, or None.

    The cost of a side is the number of elements to materialize: none for a tile or a plain read.
    """
    parts = factors(e)
    wide = {r for r in ranks if size(r) > 1}
    best: tuple[int, Contraction] | None = None
    for count in range(1, len(parts)):
        for chosen in combinations(range(len(parts)), count):
            left = product(tuple(parts[i] for i in chosen))
            right = product(tuple(p for i, p in enumerate(parts) if i not in chosen))
            a, b = set(expression_ranks(left, tiles)), set(expression_ranks(right, tiles))
            if not (set(over) <= a and set(over) <= b and wide - a and wide - b):
                continue
            cost = _elements(left, a, size) + _elements(right, b, size)
            if best is None or cost < best[0]:
                best = (cost, Contraction(left, right))
    return best[1] if best else None


def _elements(e: Expr, ranks: set[str], size: Callable[[str], int]) -> int:
    if is_plain(e):
        return 0
    count = 1
    for rank in ranks:
        count *= size(rank)
    return count


def is_plain(e: Expr) -> bool:
    """Whether `e` is a tile or one element of memory: something a matrix product can read as it is."""
    return isinstance(e, (Tile, Read))


def contraction_type(e: Expr, types: Mapping[str, DType]) -> DType:
    """The type to which the operands may be rounded: the narrowest float among the tensors that are factors of the summand itself.

    f32 if the summand says `exact`. A target without a unit for the type multiplies in f32.
    """
    if _is_exact(e):
        return f32
    narrow = [types[f.tensor] for f in factors(e) if isinstance(f, Read) and f.tensor in types]
    return bf16 if bf16 in narrow else f16 if f16 in narrow else f32


def _is_exact(e: Expr) -> bool:
    match e:
        case Op(name="exact"):
            return True
        case Op(name="mul", args=(a, b)):
            return _is_exact(a) or _is_exact(b)
        case _:
            return False
