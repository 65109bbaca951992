"""`canonicalize_exponentials`: logarithms leave exponents.

    exp(x - log(D) - M)    ->    exp(x - M) / D
    log(exp(x - M) / D)    ->    x - M - log(D)

This removes an origin that would have to be carried, and an exponential an element, from divergences and log-probabilities; and what
is a logarithm of a moving exponential becomes a difference.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...ir.cascade import Cascade, Einsum
from ...ir.expr import Expr, Op, children, reads, rewrite, walk
from .graph import definitions, drop_unused, inline, map_expressions, maps
from .signs import is_positive


def canonicalize_exponentials(cascade: Cascade) -> Cascade:
    """No exponent holds the logarithm of a provably positive value as a term, and no logarithm an exponential as a factor."""
    bodies = maps(cascade)
    statements = {n: s for n, s in definitions(cascade).items() if isinstance(s, Einsum)}
    logarithmic, exponential = _holding(bodies, "log"), _holding(bodies, "exp")

    def rule(node: Expr) -> Expr | None:
        if _is_log(node):
            return _of_product(inline(children(node)[0], bodies, lambda name: name in exponential), statements)
        if not isinstance(node, Op) or node.name != "exp":
            return None
        exponent = inline(node.args[0], bodies, lambda name: name in logarithmic)
        rest, over, under = _logs(exponent, statements)
        if not over and not under:
            return None
        value: Expr = Op("exp", (rest,))
        for b in under:
            value = Op("div", (value, b))
        for b in over:
            value = Op("mul", (value, b))
        return value

    body = tuple(map_expressions(s, lambda e: rewrite(e, rule)) for s in cascade.body)
    return drop_unused(replace(cascade, body=body))


def _holding(bodies: Mapping[str, Einsum], name: str) -> set[str]:
    """The maps that apply this function, or read a map that does."""
    found: set[str] = set()
    for out, s in bodies.items():
        if any(isinstance(n, Op) and n.name == name for n in walk(s.expr)) or any(r.tensor in found for r in reads(s.expr)):
            found.add(out)
    return found


def _of_product(e: Expr, statements: Mapping[str, Einsum]) -> Expr | None:
    """log(e) for a product or quotient of positive values with an exponential among them, written out; else None."""
    over, under = _quotient(e)
    if not any(isinstance(f, Op) and f.name == "exp" for f in over) or not all(is_positive(f, statements) for f in (*over, *under)):
        return None
    terms = [f.args[0] if isinstance(f, Op) and f.name == "exp" else Op("log", (f,)) for f in over]
    value = terms[0]
    for term in terms[1:]:
        value = Op("add", (value, term))
    for f in under:
        value = Op("sub", (value, Op("log", (f,))))
    return value


def _quotient(e: Expr) -> tuple[list[Expr], list[Expr]]:
    match e:
        case Op(name="mul", args=(a, b)):
            (x, y), (u, v) = _quotient(a), _quotient(b)
            return [*x, *u], [*y, *v]
        case Op(name="div", args=(a, b)):
            (x, y), (u, v) = _quotient(a), _quotient(b)
            return [*x, *v], [*y, *u]
        case _:
            return [e], []


def _is_log(e: Expr) -> bool:
    return isinstance(e, Op) and e.name == "log"


def _logs(e: Expr, statements: Mapping[str, Einsum]) -> tuple[Expr, list[Expr], list[Expr]]:
    """(rest, over, under) with exp(e) = exp(rest) * over / under; something always remains as the rest."""
    if not isinstance(e, Op) or e.name not in ("add", "sub"):
        return e, [], []
    a, b = e.args
    for first, second in ((a, b), (b, a)):
        leaves = _is_log(second) and isinstance(second, Op) and is_positive(second.args[0], statements)
        if leaves and isinstance(second, Op) and (e.name == "add" or second is b):
            rest, over, under = _logs(first, statements)
            return (rest, [*over, second.args[0]], under) if e.name == "add" else (rest, over, [*under, second.args[0]])
    left, over, under = _logs(a, statements)
    right, more_over, more_under = _logs(b, statements)
    if e.name == "sub":
        more_over, more_under = more_under, more_over
    return Op(e.name, (left, right)), [*over, *more_over], [*under, *more_under]
