"""Which running state lets a reduction be done in one pass although its summand depends on earlier results of the same rank?

R = sum over p of G(x_p, d), where the d are complete reductions over p (a maximum, a mean, a log-sum ...) that move while p is
streamed. Instead of one number, keep the sums of a basis g_1 = G, g_2, ..., g_n of functions of (x, d), evaluated at the current d.
If every derivative dg_i/dd is a combination of the basis with constant coefficients, dg/dd = A_d g, then sums taken at an old d
become sums at the new one by T = prod_d exp((d - d_old) A_d): no inverse, no division, exponentials of differences only.
A basis of one is the running rescaling of Milakov and Gimelshein (arXiv 1805.02867); (x - mu)**2 gives the merge of variances of
Chan, Golub and LeVeque (1979); nothing here knows either.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fractions import Fraction

import sympy as sp

from ...ir.expr import Const, Expr, Op

LIMIT = 6


class Barrier(Exception):
    """The reduction needs another pass; the message says why."""


class Symbols:
    """Opaque subexpressions and their symbols: x (indexed by a reduced rank), d (moving), c (constant of the pass), i (an indicator)."""

    def __init__(self) -> None:
        self._symbols: dict[tuple[str, Expr], sp.Symbol] = {}
        self._meaning: dict[sp.Symbol, tuple[str, Expr]] = {}

    def of(self, kind: str, e: Expr) -> sp.Symbol:
        """The symbol that stands for `e`; the same for equal expressions of one kind."""
        key = (kind, e)
        if key not in self._symbols:
            symbol = sp.Symbol(f"{kind}{len(self._symbols)}", real=True)
            self._symbols[key] = symbol
            self._meaning[symbol] = key
        return self._symbols[key]

    def kind(self, symbol: sp.Symbol) -> str:
        """x, d, c or i; `o` is the old value of a d."""
        return self._meaning[symbol][0]

    def meaning(self, symbol: sp.Symbol) -> Expr:
        """The expression the symbol stands for."""
        return self._meaning[symbol][1]

    def select(self, e: sp.Expr, kinds: str) -> list[sp.Symbol]:
        """The symbols of these kinds in `e`, in order of creation."""
        found = [s for s in e.free_symbols if self._meaning[s][0] in kinds]
        return sorted(found, key=lambda s: int(s.name[1:]))


def to_number(value: float | int | bool) -> sp.Expr | None:
    """A literal as an exact number, or None if it is not finite or not a short fraction (it then stays a symbol)."""
    if isinstance(value, bool) or not math.isfinite(value):
        return None
    fraction = Fraction(value)
    return sp.Rational(fraction.numerator, fraction.denominator) if fraction.denominator <= 1024 else None


def to_sympy(e: Expr, symbols: Symbols, classify: Callable[[Expr], str]) -> sp.Expr:
    """`e` in symbols. `classify` tells x, d, c or `mixed`; only + - * / neg, whole powers, exp and where may join x and d.

    Raises `Barrier` naming the operation that mixes them.
    """
    if isinstance(e, Const):
        number = to_number(e.value)
        if number is not None:
            return number
    kind = classify(e)
    if kind != "mixed":
        return symbols.of(kind, e)

    def convert(x: Expr) -> sp.Expr:
        return to_sympy(x, symbols, classify)

    match e:
        case Op(name="add", args=(a, b)):
            return convert(a) + convert(b)
        case Op(name="sub", args=(a, b)):
            return convert(a) - convert(b)
        case Op(name="mul", args=(a, b)):
            return convert(a) * convert(b)
        case Op(name="neg", args=(a,)):
            return -convert(a)
        case Op(name="exact", args=(a,)):
            return convert(a)
        case Op(name="div", args=(a, b)) if classify(b) != "mixed":
            return convert(a) * _reciprocal(b, symbols, classify)
        case Op(name="pow", args=(a, Const(value=int(n)))) if not isinstance(n, bool) and 0 <= n <= 8:
            return convert(a) ** n
        case Op(name="exp", args=(a,)):
            return sp.exp(convert(a))
        case Op(name="exp2", args=(a,)):
            return sp.exp(convert(a) * symbols.of("c", Const(math.log(2.0))))
        case Op(name="where", args=(c, a, b)) if classify(c) in "xc":
            return symbols.of("i", c) * convert(a) + symbols.of("i", Op("not", (c,))) * convert(b)
        case Op(name=name):
            raise Barrier(f"{name} mixes elements of the rank with a value that moves while it is streamed")
        case _:
            raise Barrier("a rounding point mixes elements of the rank with a value that moves while it is streamed")


def _reciprocal(b: Expr, symbols: Symbols, classify: Callable[[Expr], str]) -> sp.Expr:
    number = to_number(b.value) if isinstance(b, Const) else None
    if number is not None and number != 0:
        return 1 / number
    return symbols.of(classify(b), Op("div", (Const(1.0), b)))


def to_expr(e: sp.Expr, symbols: Symbols, meaning: Callable[[sp.Symbol], Expr]) -> Expr:
    """The inverse of `to_sympy`; `meaning` gives the expression of each symbol."""
    match e:
        case sp.Symbol():
            return meaning(e)
        case sp.Integer() | sp.Rational() | sp.Float():
            return Const(float(e))
        case sp.Add():
            return _sum(e, symbols, meaning)
        case sp.Mul():
            return _product(e, symbols, meaning)
        case sp.exp():
            return Op("exp", (to_expr(e.args[0], symbols, meaning),))
        case sp.Pow() if e.exp.is_Integer and e.exp > 0:
            base = to_expr(e.base, symbols, meaning)
            result = base
            for _ in range(int(e.exp) - 1):
                result = Op("mul", (result, base))
            return result
        case _:
            raise Barrier(f"no expression for {e}")


def _sum(e: sp.Expr, symbols: Symbols, meaning: Callable[[sp.Symbol], Expr]) -> Expr:
    """Positive terms first, then the negative ones subtracted."""
    terms = sorted(e.args, key=lambda t: (t.could_extract_minus_sign(), sp.default_sort_key(t)))
    first = to_expr(terms[0], symbols, meaning)
    for term in terms[1:]:
        if term.could_extract_minus_sign():
            first = Op("sub", (first, to_expr(-term, symbols, meaning)))
        else:
            first = Op("add", (first, to_expr(term, symbols, meaning)))
    return first


def _product(e: sp.Expr, symbols: Symbols, meaning: Callable[[sp.Symbol], Expr]) -> Expr:
    indicators = [f for f in e.args if isinstance(f, sp.Symbol) and symbols.kind(f) == "i"]
    rest = sp.Mul(*(f for f in e.args if f not in indicators))
    if indicators:
        value = to_expr(rest, symbols, meaning)
        for indicator in indicators:
            value = Op("where", (meaning(indicator), value, Const(0.0)))
        return value
    coefficient, factors = e.as_coeff_mul()
    parts = [to_expr(f, symbols, meaning) for f in sorted(factors, key=sp.default_sort_key)]
    if coefficient not in (1, -1):
        parts.insert(0, Const(float(abs(coefficient) if coefficient < 0 else coefficient)))
    value = parts[0]
    for part in parts[1:]:
        value = Op("mul", (value, part))
    return Op("neg", (value,)) if coefficient < 0 else value


@dataclass(frozen=True, slots=True)
class Closure:
    """A basis, its transition and the symbols of the old origins: sums(basis at d) = transition * sums(basis at d_old)."""

    basis: tuple[sp.Expr, ...]
    transition: sp.Matrix
    old: dict[sp.Symbol, sp.Symbol]
    polynomial: tuple[sp.Symbol, ...]


def close(g: sp.Expr, xs: Iterable[sp.Symbol], ds: Iterable[sp.Symbol], symbols: Symbols) -> Closure:
    """The smallest basis found that holds `g` and is closed under the derivatives by every d. Raises `Barrier`."""
    xs, ds = list(xs), list(ds)
    _check_separable(g, set(xs), set(ds))
    moving = {*xs, *ds}
    basis, rows = [g], [_monomials(g, moving)]
    derivatives: dict[sp.Symbol, list[list[sp.Expr]]] = {d: [] for d in ds}
    i = 0
    while i < len(basis):
        for d in ds:
            slope = sp.diff(basis[i], d)
            derivatives[d].append(_combination(slope, basis, rows, moving))
        i += 1
    n = len(basis)
    old = {d: symbols.of("o", symbols.meaning(d)) for d in ds}
    transition, polynomial = sp.eye(n), []
    for d in ds:
        a = sp.Matrix([[*row, *[0] * (n - len(row))] for row in derivatives[d]])
        rate = a.trace() / n
        nilpotent = a - rate * sp.eye(n)
        delta = d - old[d]
        if nilpotent**n == sp.zeros(n):
            powers = ((delta**k / sp.factorial(k)) * nilpotent**k for k in range(1, n))
            step = sum(powers, sp.eye(n)) * sp.exp(rate * delta)
        else:
            step = (a * delta).exp()
        if nilpotent != sp.zeros(n):
            polynomial.append(d)
        transition = step * transition
    joined = transition.applyfunc(lambda entry: sp.powsimp(entry, combine="exp"))
    return Closure(tuple(basis), joined, old, tuple(polynomial))


def _combination(slope: sp.Expr, basis: list[sp.Expr], rows: list[dict[sp.Expr, sp.Expr]], moving: set[sp.Symbol]) -> list[sp.Expr]:
    """Constants a with slope = sum a_j basis_j; extends the basis by the simplest of slope, slope +- g_j if there are none."""
    if slope == 0:
        return [sp.Integer(0)] * len(basis)
    target = _monomials(slope, moving)
    row = _solve(rows, target)
    if row is not None:
        return row
    options = [sp.powsimp(sp.factor(slope + k * b), combine="exp") for b in basis for k in (0, 1, -1)]
    simplest = min((o for o in options if o != 0), key=sp.count_ops)
    basis.append(_primitive(simplest.as_independent(*moving, as_Add=False)[1]))
    rows.append(_monomials(basis[-1], moving))
    if len(basis) > LIMIT:
        raise Barrier(f"its running state would need more than {LIMIT} values")
    row = _solve(rows, target)
    if row is None:
        raise Barrier("its derivative is no combination of a finite basis")
    return row


def _primitive(e: sp.Expr) -> sp.Expr:
    """`e` without its numeric factor, with the sign that leaves most terms positive: x - d, never 2 d - 2 x."""
    _, e = sp.factor_terms(e).as_coeff_Mul()
    if isinstance(e, sp.Add):
        e = e.primitive()[1]
        elements = [t for t in e.args if any(s.name.startswith("x") for s in t.free_symbols)]
        if elements and all(t.could_extract_minus_sign() for t in elements):
            e = -e
    return e


def _monomials(e: sp.Expr, moving: set[sp.Symbol]) -> dict[sp.Expr, sp.Expr]:
    """{monomial in x and d: coefficient}, exponentials joined."""
    table: dict[sp.Expr, sp.Expr] = {}
    for term in sp.Add.make_args(sp.expand(e, power_exp=False)):
        coefficient, monomial = term.as_independent(*moving, as_Add=False)
        monomial = sp.powsimp(monomial, combine="exp")
        monomial = monomial.replace(lambda q: isinstance(q, sp.exp), lambda q: sp.exp(sp.expand(q.args[0])))
        table[monomial] = table.get(monomial, 0) + coefficient
    return {k: v for k, v in table.items() if v != 0}


def _check_separable(g: sp.Expr, xs: set[sp.Symbol], ds: set[sp.Symbol]) -> None:
    def mixes(e: sp.Expr) -> bool:
        return bool(e.free_symbols & xs) and bool(e.free_symbols & ds)

    for f in g.atoms(sp.Function, sp.Pow):
        if not mixes(f):
            continue
        if isinstance(f, sp.exp):
            if not any(mixes(term) for term in sp.Add.make_args(sp.expand(f.args[0]))):
                continue
            raise Barrier("an exponential holds a product of an element of the rank and a moving value")
        if not (f.is_Pow and f.exp.is_Integer and f.exp > 0):
            raise Barrier(f"{f.func.__name__} mixes elements of the rank with a moving value")


def _solve(rows: list[dict[sp.Expr, sp.Expr]], target: dict[sp.Expr, sp.Expr]) -> list[sp.Expr] | None:
    """Constants a_j with target = sum a_j rows_j, or None."""
    if not all(any(key in row for row in rows) for key in target):
        return None
    keys = sorted({k for r in [*rows, target] for k in r}, key=sp.default_sort_key)
    unknown = sp.symbols(f"a0:{len(rows)}")
    system = sp.Matrix([[r.get(k, 0) for r in rows] for k in keys])
    solution = sp.linsolve((system, sp.Matrix([target.get(k, 0) for k in keys])), *unknown)
    if not solution:
        return None
    return [q.subs(dict.fromkeys(unknown, 0)) for q in next(iter(solution))]
