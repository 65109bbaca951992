"""`decide_logic`: any and all become maxima and minima of 0 and 1, so that one set of laws covers all reductions.

    A[m] = any(p) X[m,p] > 0    ->    A_as[m] = max(p) where(X[m,p] > 0, 1.0, 0.0);  A[m] = A_as[m] > 0.5
"""

from __future__ import annotations

from dataclasses import replace

from ...ir.cascade import Cascade, Einsum, Statement
from ...ir.expr import Const, Op, aligned
from .graph import fresh


def decide_logic(cascade: Cascade) -> Cascade:
    """No statement reduces by any or all."""
    taken = set(cascade.tensor_ranks())
    body: list[Statement] = []
    for s in cascade.body:
        if not isinstance(s, Einsum) or s.op not in ("any", "all"):
            body.append(s)
            continue
        name = fresh(f"{s.out}_as", taken)
        taken.add(name)
        number = Op("where", (s.expr, Const(1.0), Const(0.0)))
        body.append(replace(s, out=name, op="max" if s.op == "any" else "min", expr=number))
        body.append(Einsum(s.out, s.ranks, Op("gt", (aligned(name, *s.ranks), Const(0.5))), location=s.location))
    return replace(cascade, body=tuple(body))
