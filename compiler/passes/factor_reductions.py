"""`factor_reductions`: what does not vary along the reduced rank leaves the reduction.

    O[m,f] = sum(p) N[m,p] / D[m] * V[p,f]    ->    O0[m,f] = sum(p) N[m,p] * V[p,f];  O[m,f] = O0[m,f] / D[m]

Laws. sum: terms of a top-level + separate, unless one of them is free of the rank and moves (x - mu stays centred); a product is
distributed over + only if every term varies along the rank; factors free of the rank leave. max and min: addends free of the rank
leave, and provably positive factors. An exponential is never split.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import sympy as sp

from ...ir.expr import Expr
from .algebra import Barrier, Symbols


@dataclass(frozen=True, slots=True)
class Term:
    """outside * reduction(inside)."""

    outside: sp.Expr
    inside: sp.Expr


@dataclass(frozen=True, slots=True)
class Factored:
    """A reduction as a sum of terms, plus `added` for max and min (which have exactly one term)."""

    terms: tuple[Term, ...]
    added: sp.Expr


def factor_reductions(op: str, g: sp.Expr, symbols: Symbols, positive: Callable[[Expr], bool]) -> Factored:
    """The reduction `op` of `g` with everything free of the rank outside."""
    if op == "sum":
        return Factored(tuple(_factors(t, symbols) for t in _terms(g, symbols)), sp.Integer(0))
    if op in ("max", "min", "argmax", "argmin"):
        return _order(g, symbols, positive)
    return Factored((Term(sp.Integer(1), g),), sp.Integer(0))


def _varies(e: sp.Expr, symbols: Symbols) -> bool:
    return any(symbols.kind(s) == "x" or symbols.kind(s) == "i" for s in e.free_symbols)


def _terms(g: sp.Expr, symbols: Symbols) -> list[sp.Expr]:
    """The terms of `g` that may be summed apart."""
    g = sp.expand_power_base(g, force=True)
    parts = list(sp.Add.make_args(g))
    centred = any(not _varies(t, symbols) and symbols.select(t, "d") for t in parts)
    if centred:
        return [g]
    done: list[sp.Expr] = []
    for part in parts:
        spread = _distribute(part, symbols)
        done.extend([part] if spread == part else _terms(spread, symbols))
    return done


def _distribute(term: sp.Expr, symbols: Symbols) -> sp.Expr:
    """A product multiplied out over its first factor that is a sum of varying terms, if that separates a moving value."""
    for factor in sp.Mul.make_args(term):
        apart = factor.is_Add and all(_varies(t, symbols) for t in factor.args) and symbols.select(factor, "d")
        if apart and any(symbols.select(sp.Mul(*_free(t, symbols)), "d") for t in factor.args):
            rest = term / factor
            return sp.Add(*(t * rest for t in factor.args))
    return term


def _free(term: sp.Expr, symbols: Symbols) -> list[sp.Expr]:
    return [f for f in sp.Mul.make_args(term) if not _varies(f, symbols)]


def _factors(term: sp.Expr, symbols: Symbols) -> Term:
    outside = sp.Mul(*_free(term, symbols))
    inside = sp.Mul(*(f for f in sp.Mul.make_args(term) if _varies(f, symbols)))
    return Term(outside, inside)


def _order(g: sp.Expr, symbols: Symbols, positive: Callable[[Expr], bool]) -> Factored:
    """max(a + x) = a + max(x) and max(c x) = c max(x) for c > 0."""
    added = sp.Add(*(t for t in sp.Add.make_args(g) if not _varies(t, symbols)))
    rest = g - added
    if not _varies(rest, symbols):
        return Factored((Term(sp.Integer(1), g),), sp.Integer(0))
    leaving: list[sp.Expr] = []
    for factor in _free(rest, symbols):
        known = factor.is_number and factor > 0
        if known or (factor.is_Symbol and positive(symbols.meaning(factor))):
            leaving.append(factor)
        elif symbols.select(factor, "d"):
            raise Barrier("a moving factor of unknown sign does not leave a maximum")
    outside = sp.Mul(*leaving)
    return Factored((Term(outside, sp.Mul(*(f for f in sp.Mul.make_args(rest) if f not in leaving))),), added)
