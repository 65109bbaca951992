"""Where an index expression may lie, by interval arithmetic over the extents of ranks: what need not be clamped when memory is read.

A bound is a polynomial in the extents that are not known, each of which is 1 or more: a rank without elements is never read along.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import combinations

from ...ir.expr import Const, Expr, Extent, Index, Op, Start

Polynomial = Mapping[tuple[str, ...], int]
ONE: Polynomial = {(): 1}
ZERO: Polynomial = {}


def plus(a: Polynomial, b: Polynomial, factor: int = 1) -> Polynomial:
    """a + factor * b."""
    found = dict(a)
    for term, coefficient in b.items():
        found[term] = found.get(term, 0) + factor * coefficient
    return {term: c for term, c in found.items() if c}


def times(a: Polynomial, b: Polynomial) -> Polynomial:
    """a * b."""
    found: dict[tuple[str, ...], int] = {}
    for x, m in a.items():
        for y, n in b.items():
            term = tuple(sorted((*x, *y)))
            found[term] = found.get(term, 0) + m * n
    return {term: c for term, c in found.items() if c}


def is_natural(a: Polynomial) -> bool:
    """Whether `a` is certainly 0 or more: with each extent written as 1 + x, x >= 0, no coefficient is negative."""
    shifted: dict[tuple[str, ...], int] = {}
    for term, coefficient in a.items():
        for size in range(len(term) + 1):
            for part in combinations(term, size):
                shifted[part] = shifted.get(part, 0) + coefficient
    return all(c >= 0 for c in shifted.values())


def _divided(a: Polynomial, by: Polynomial) -> Polynomial | None:
    """a / by where that is a polynomial; `by` has one term."""
    if len(by) != 1:
        return None
    (divisor, number), found = next(iter(by.items())), {}
    for term, coefficient in a.items():
        rest = list(term)
        for extent in divisor:
            if extent not in rest:
                return None
            rest.remove(extent)
        if coefficient % number:
            return None
        found[tuple(rest)] = coefficient // number
    return found


@dataclass(frozen=True, slots=True)
class Interval:
    """The least and the greatest value; None where nothing is known."""

    low: Polynomial | None = None
    high: Polynomial | None = None

    @property
    def natural(self) -> bool:
        return self.low is not None and is_natural(self.low)


class Reach:
    """Intervals of index expressions.

    Args:
        size: the extent of a rank: its number, or what it was declared as, or itself.
    """

    def __init__(self, size: Callable[[str], int | Expr | None]) -> None:
        self._size = size
        self._extents: dict[str, Polynomial] = {}

    def extent(self, rank: str) -> Polynomial:
        """The extent of a rank as a polynomial in those that are not known."""
        if rank not in self._extents:
            self._extents[rank] = {(rank,): 1}  # while its own size is being looked at
            size = self._size(rank)
            if size is not None:
                found = self.interval(Const(size) if isinstance(size, int) else size, frozenset())
                if found.low is not None and found.low == found.high:
                    self._extents[rank] = found.low
        return self._extents[rank]

    def within(self, e: Expr, rank: str, ragged: frozenset[str]) -> tuple[bool, bool]:
        """Whether `e` is certainly 0 or more, and certainly below the extent of `rank`; indices of `ragged` ranks have no end."""
        found = self.interval(e, ragged)
        return found.natural, found.high is not None and is_natural(plus(plus(self.extent(rank), ONE, -1), found.high, -1))

    def interval(self, e: Expr, ragged: frozenset[str]) -> Interval:
        """The least and the greatest value of `e`."""
        match e:
            case Const(value=value) if isinstance(value, int):
                number = plus(ZERO, {(): int(value)})
                return Interval(number, number)
            case Index(rank=rank) | Start(rank=rank):
                return Interval(ZERO, None if rank in ragged else plus(self.extent(rank), ONE, -1))
            case Extent(rank=rank):
                return Interval(self.extent(rank), self.extent(rank))
            case Op(name=name, args=(a, b)) if name in _RULES:
                return _RULES[name](self.interval(a, ragged), self.interval(b, ragged))
            case Op(name="where", args=(_, a, b)):
                x, y = self.interval(a, ragged), self.interval(b, ragged)
                return Interval(_lesser(x.low, y.low), _greater(x.high, y.high))
            case _:
                return Interval()


def _both(a: Polynomial | None, b: Polynomial | None, rule: Callable[[Polynomial, Polynomial], Polynomial]) -> Polynomial | None:
    return None if a is None or b is None else rule(a, b)


def _lesser(a: Polynomial | None, b: Polynomial | None) -> Polynomial | None:
    """The lesser of two bounds where that is certain."""
    if a is None or b is None:
        return None
    return b if is_natural(plus(a, b, -1)) else a if is_natural(plus(b, a, -1)) else None


def _greater(a: Polynomial | None, b: Polynomial | None) -> Polynomial | None:
    """The greater of two bounds where that is certain."""
    if a is None or b is None:
        return None
    return a if is_natural(plus(a, b, -1)) else b if is_natural(plus(b, a, -1)) else None


def _add(a: Interval, b: Interval) -> Interval:
    return Interval(_both(a.low, b.low, plus), _both(a.high, b.high, plus))


def _sub(a: Interval, b: Interval) -> Interval:
    return Interval(_both(a.low, b.high, lambda x, y: plus(x, y, -1)), _both(a.high, b.low, lambda x, y: plus(x, y, -1)))


def _mul(a: Interval, b: Interval) -> Interval:
    """Of two that are not negative, or one of them a constant."""
    if a.natural and b.natural:
        return Interval(_both(a.low, b.low, times), _both(a.high, b.high, times))
    for x, y in ((a, b), (b, a)):
        if x.low is not None and x.low == x.high and is_natural(plus(ZERO, x.low, -1)):
            return Interval(_both(x.low, y.high, times), _both(x.low, y.low, times))
        if x.low is not None and x.low == x.high and x.natural:
            return Interval(_both(x.low, y.low, times), _both(x.low, y.high, times))
    return Interval()


def _divisor(b: Interval) -> Polynomial | None:
    """A divisor that is one certain number of 1 or more."""
    return b.low if b.low is not None and b.low == b.high and is_natural(plus(b.low, ONE, -1)) else None


def _floordiv(a: Interval, b: Interval) -> Interval:
    by = _divisor(b)
    if by is None:
        return Interval()
    high = a.high
    if high is not None:
        whole = _divided(plus(high, ONE), by)  # (by * q - 1) // by = q - 1
        exact = _divided(high, by) if whole is None else plus(whole, ONE, -1)
        high = exact if exact is not None else high if is_natural(high) else None
    return Interval(ZERO if a.natural else None, high)


def _mod(a: Interval, b: Interval) -> Interval:
    by = _divisor(b)
    return Interval() if by is None else Interval(ZERO, plus(by, ONE, -1))


def _minimum(a: Interval, b: Interval) -> Interval:
    """Below either end; where it is not known which is the lower, that of the second operand is taken, which is the limit as a rule."""
    low = _lesser(a.low, b.low) if not (a.natural and b.natural) else ZERO
    ends = [end for end in (a.high, b.high) if end is not None]
    return Interval(low, (_lesser(ends[0], ends[-1]) or ends[-1]) if ends else None)


def _maximum(a: Interval, b: Interval) -> Interval:
    starts = [start for start in (a.low, b.low) if start is not None]
    low = next((s for s in starts if is_natural(s)), starts[-1] if starts else None)
    return Interval(low, _greater(a.high, b.high))


_RULES: dict[str, Callable[[Interval, Interval], Interval]] = {
    "add": _add, "sub": _sub, "mul": _mul, "floordiv": _floordiv, "mod": _mod, "minimum": _minimum, "maximum": _maximum,
}  # fmt: skip
