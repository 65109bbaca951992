"""The shapes a candidate is checked at, and what the reference costs there."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TypeAlias

from ..compiler.binding import complete_sizes
from ..ir.cascade import Cascade, Concat, Einsum, Iterate, Populate, Scan, Scatter, Statement
from ..ir.errors import BindingError
from ..ir.expr import Expr, Op, Read, index_ranks

Sizes: TypeAlias = dict[str, int]
MAX_ELEMENTS = 1 << 22  # of the largest tensor the reference makes
MAX_OPERATIONS = 1 << 29  # of its largest statement
_SMALL = (5, 3, 7, 2, 9, 1)


def shapes_for(cascade: Cascade, sizes: Mapping[str, int], static: Mapping[str, int]) -> list[Sizes]:
    """The shapes to check: the asked one, cut where it is too large; then an odd one, a small one and one of extents 1.

    Ranks in `static` keep their extents; without any other rank there is the asked shape alone.
    """
    declared = {d.name for d in cascade.ranks}
    ranks = list(dict.fromkeys(r for t in cascade.inputs for r in t.ranks))
    free = [r for r in ranks if r not in static and r not in declared]
    asked = {r: sizes[r] for r in ranks if r not in declared or r in cascade.static_sizes()}
    first = _cut(cascade, asked, free)
    wanted = [
        first,
        {**first, **{r: _odd(first[r]) for r in free}},
        {**first, **{r: _SMALL[i % len(_SMALL)] for i, r in enumerate(free)}},
        {**first, **dict.fromkeys(free, 1)},
    ]
    found: list[Sizes] = []
    for shape in wanted:
        try:
            full = complete_sizes(cascade, shape)
        except BindingError:  # ranks hang together in a way only the cascade knows
            continue
        if full not in found and all(full.get(r, n) == n for r, n in static.items()):
            found.append(full)
    return found or [dict(sizes)]


def _odd(extent: int) -> int:
    """An odd extent below, no more than 150 elements, that fills a few tiles and part of another."""
    return extent if extent <= 2 else min(extent * 5 // 8, 150) | 1


def _cut(cascade: Cascade, asked: Sizes, free: Sequence[str]) -> Sizes:
    """`asked` with its largest free extents halved (and made odd) until the reference can afford it."""
    shape = dict(asked)
    while True:
        try:
            elements, operations = reference_cost(cascade, complete_sizes(cascade, shape))
        except BindingError:
            return dict(asked)
        largest = max(free, key=lambda r: shape[r], default=None)
        if largest is None or shape[largest] < 4 or (elements <= MAX_ELEMENTS and operations <= MAX_OPERATIONS):
            return shape
        shape[largest] = shape[largest] // 2 | 1


def reference_cost(cascade: Cascade, sizes: Mapping[str, int]) -> tuple[int, int]:
    """Elements of the largest tensor that the reference makes, and operations of its largest statement."""
    elements = operations = 1
    for ranks, over, products in _iteration_spaces(cascade.body):
        points = math.prod(sizes.get(r, 1) for r in ranks)
        kept = [r for r in ranks if r not in over] if products else ranks
        elements = max(elements, math.prod(sizes.get(r, 1) for r in kept))
        operations = max(operations, points)
    return elements, operations


def _iteration_spaces(body: Sequence[Statement]) -> list[tuple[list[str], tuple[str, ...], bool]]:
    """For each statement: the ranks of its points, those reduced, and whether it is a plain sum of products."""
    spaces: list[tuple[list[str], tuple[str, ...], bool]] = []
    for s in flatten(body):
        match s:
            case Einsum():
                plain = s.op == "sum" and s.where is None and _is_product(s.expr)
                spaces.append((list(dict.fromkeys((*s.ranks, *index_ranks(s.expr)))), s.over, plain))
            case Scan() | Populate() | Scatter():
                spaces.append((list(dict.fromkeys((*s.ranks, *index_ranks(s.expr)))), (), False))
            case Concat():
                spaces.append((list(s.ranks), (), False))
            case Iterate():
                continue
    return spaces


def flatten(body: Sequence[Statement]) -> list[Statement]:
    """Every statement, those of iterative blocks after their block."""
    return [inner for s in body for inner in (s, *(flatten(s.body) if isinstance(s, Iterate) else ()))]


def over_of(statement: Einsum | Scan) -> tuple[str, ...]:
    """The ranks a statement reduces or scans."""
    return statement.over if isinstance(statement, Einsum) else (statement.over,)


def _is_product(e: Expr) -> bool:
    match e:
        case Read():
            return True
        case Op(name="mul", args=args):
            return all(_is_product(a) for a in args)
        case _:
            return False
