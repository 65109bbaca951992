"""`lift_predicates`: masks become the domain of the reductions that they mask.

    S[m,p] = where(p <= m, X[m,p], -inf)              M[m] = max(p where p <= m) X[m,p]
    M[m]   = max(p) S[m,p]                      ->    D[m] = sum(p where p <= m) exp(X[m,p] - M[m])
    D[m]   = sum(p) exp(S[m,p] - M[m])

f(where(c, a, b)) is where(c, f(a), f(b)); exp(-inf) is 0; 0 times anything counts as 0 (a kernel may be finite where eager is NaN);
and a reduction of where(c, f, identity) is the reduction of f over the points where c holds. Skipping whole tiles of a causal or
windowed domain depends on this pass.
"""

from __future__ import annotations

import math
from dataclasses import replace

from ...ir.cascade import Cascade, Einsum, Statement
from ...ir.expr import Const, Expr, Op, reads, rewrite, walk
from .graph import conjunction, conjuncts, drop_unused, inline, map_expressions, maps

ABSORBING = {"sum": 0.0, "max": -math.inf, "min": math.inf, "argmax": -math.inf, "argmin": math.inf}
_TO_ZERO_AT_MINUS_INF = ("exp", "exp2", "sigmoid")


def lift_predicates(cascade: Cascade) -> Cascade:
    """Every reduction carries as `where` the conditions under which its summand differs from the identity."""
    bodies = maps(cascade)
    masked = _masked_maps(bodies)
    body: list[Statement] = []
    for statement in cascade.body:
        new = map_expressions(statement, lambda e: inline(e, bodies, lambda name: name in masked))
        body.append(_lift(new) if isinstance(new, Einsum) and new.op in ABSORBING else new)
    return drop_unused(replace(cascade, body=tuple(body)))


def _masked_maps(bodies: dict[str, Einsum]) -> set[str]:
    """Maps that select against 0 or an infinity, or read such a map."""
    found: set[str] = set()
    for name, statement in bodies.items():
        selects = any(isinstance(n, Op) and n.name == "where" and _mask_value(n.args[2]) for n in walk(statement.expr))
        if selects or any(r.tensor in found for r in reads(statement.expr)):
            found.add(name)
    return found


def _mask_value(e: Expr) -> bool:
    return isinstance(e, Const) and not isinstance(e.value, bool) and (e.value == 0 or math.isinf(e.value))


def _lift(statement: Einsum) -> Einsum:
    known = conjuncts(statement.where)
    expr = statement.expr
    while True:
        expr = _under(expr, known)
        conditions, inner = _split(expr, ABSORBING[statement.op or "sum"])
        new = tuple(dict.fromkeys((*known, *conditions)))
        if new == known and inner == expr:
            return replace(statement, expr=expr, where=conjunction(known))
        known, expr = new, inner


def _under(e: Expr, known: tuple[Expr, ...]) -> Expr:
    """`e` where all of `known` hold: selections decided by them are gone."""

    def rule(node: Expr) -> Expr | None:
        if isinstance(node, Op) and node.name == "where" and set(conjuncts(node.args[0])) <= set(known):
            return node.args[1]
        return None

    return rewrite(e, rule) if known else e


def _split(e: Expr, absorbing: float) -> tuple[tuple[Expr, ...], Expr]:
    """(conditions, inner) such that e is `inner` where the conditions hold and `absorbing` elsewhere."""
    match e:
        case Op(name="where", args=(c, a, Const(value=value))) if not isinstance(value, bool) and value == absorbing:
            more, inner = _split(a, absorbing)
            return (*conjuncts(c), *more), inner
        case Op(name="mul" as name, args=(a, b)) if absorbing == 0:
            left, x = _split(a, 0.0)
            right, y = _split(b, 0.0)
            return (*left, *right), Op(name, (x, y))
        case Op(name="div" as name, args=(a, b)) if absorbing == 0:
            left, x = _split(a, 0.0)
            return left, Op(name, (x, b))
        case Op(name="neg" | "exact" as name, args=(a,)):
            conditions, x = _split(a, -absorbing if name == "neg" else absorbing)
            return conditions, Op(name, (x,))
        case Op(name=name, args=(a,)) if absorbing == 0 and name in _TO_ZERO_AT_MINUS_INF:
            conditions, x = _split(a, -math.inf)
            return conditions, Op(name, (x,))
        case Op(name="add", args=(a, b)) if math.isinf(absorbing):
            left, x = _split(a, absorbing)
            right, y = _split(b, absorbing)
            return (*left, *right), Op("add", (x, y))
        case Op(name="sub", args=(a, b)) if math.isinf(absorbing):
            left, x = _split(a, absorbing)
            return left, Op("sub", (x, b))
        case Op(name="mul" | "div" as name, args=(a, Const(value=value))) if math.isinf(absorbing) and value > 0:
            conditions, x = _split(a, absorbing)
            return conditions, Op(name, (x, Const(value)))
        case _:
            return (), e
