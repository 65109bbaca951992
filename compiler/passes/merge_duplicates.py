"""`merge_duplicates`: statements that compute the same thing become one.

    A[m] = max(p) X[m,p]              A[m] = max(p) X[m,p]
    B[m] = max(p) X[m,p]        ->    Y[m] = A[m] + A[m]
    Y[m] = A[m] + B[m]

Known as common subexpression elimination. Outputs keep their names: a duplicate that is an output stays as a copy.
"""

from __future__ import annotations

from dataclasses import replace

from ...ir.cascade import Cascade, Concat, Einsum, Iterate, Populate, Scan, Scatter, Statement, defined
from ...ir.expr import Expr, Read, aligned, rewrite
from .graph import drop_unused, map_expressions


def merge_duplicates(cascade: Cascade) -> Cascade:
    """One statement for each distinct computation; later ones read the first."""
    outputs = {o.name for o in cascade.outputs}
    names: dict[str, str] = {}
    first: dict[Statement, tuple[str, ...]] = {}
    body: list[Statement] = []

    def renamed(e: Expr) -> Expr:
        def rule(node: Expr) -> Expr | None:
            return replace(node, tensor=names[node.tensor]) if isinstance(node, Read) and node.tensor in names else None

        return rewrite(e, rule)

    for statement in cascade.body:
        new = map_expressions(statement, renamed)
        defines = tuple(name for name, _ in defined(new))
        if isinstance(new, Iterate) or (isinstance(new, Einsum) and isinstance(new.expr, Read) and new.op is None):
            body.append(new)
            continue
        key = _anonymous(new)
        known = first.get(key)
        if known is None:
            first[key] = defines
            body.append(new)
        elif any(name in outputs for name in defines):
            if isinstance(new, Einsum):
                body.append(Einsum(new.out, new.ranks, aligned(known[0], *new.ranks), location=new.location))
            else:
                body.append(new)
        else:
            names.update(zip(defines, known, strict=True))
    return drop_unused(replace(cascade, body=tuple(body)))


def _anonymous(statement: Statement) -> Statement:
    match statement:
        case Einsum() | Scan() | Scatter() | Concat():
            return replace(statement, out="")
        case Populate():
            return replace(statement, values="", coords="")
        case Iterate():
            return statement
