"""`expand_scans`: a scan over a short rank becomes a reduction over a copy of that rank.

    C[b,i] = cumprod(i) A[b,i]        ->    C[b,i] = prod(i_before where i_before <= i) A[b,i_before]

It does more operations, on values that are at hand, and needs no order among the elements; so it fuses as any reduction does.
"""

from __future__ import annotations

from dataclasses import replace

from ...ir.cascade import Cascade, Einsum, RankDecl, Scan, Statement
from ...ir.expr import Const, Expr, Index, Op
from .graph import at_coordinates, fresh

SHORT = 64


def expand_scans(cascade: Cascade) -> Cascade:
    """No scan over a rank of at most `SHORT` elements, known before the call, is left."""
    sizes = cascade.static_sizes()
    taken = {*cascade.tensor_ranks(), *cascade.all_ranks()}
    declared: list[RankDecl] = []
    body: list[Statement] = []
    for s in cascade.body:
        if not isinstance(s, Scan) or sizes.get(s.over, SHORT + 1) > SHORT:
            body.append(s)
            continue
        before = fresh(f"{s.over}_before", taken)
        taken.add(before)
        declared.append(RankDecl(before, Const(sizes[s.over])))
        moved: dict[str, Expr] = {s.over: Index(before)}
        reached = Op("lt" if s.exclusive else "le", (Index(before), Index(s.over)))
        where = reached if s.where is None else Op("and", (reached, at_coordinates(s.where, moved)))
        expr = at_coordinates(s.expr, moved)
        body.append(Einsum(s.out, s.ranks, expr, s.op, (before,), where, s.location))
    if not declared:
        return cascade
    return replace(cascade, ranks=(*cascade.ranks, *declared), body=tuple(body))
