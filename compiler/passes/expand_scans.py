"""`expand_scans`: a scan over a short rank becomes a reduction over a copy of that rank.

    C[b,i] = cumprod(i) A[b,i]        ->    C[b,i] = prod(i_before where i_before <= i) A[b,i_before]

It does more operations, on values that are at hand, and needs no order among the elements; so it fuses as any reduction does.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

from ...ir.cascade import Cascade, Einsum, RankDecl, Scan, Statement
from ...ir.expr import Expr, Extent, Index, Op
from .graph import at_coordinates, fresh

SHORT, SHORT_NOW = 64, 16  # elements of a rank of declared extent, and of one that may grow by the next call


def expand_scans(cascade: Cascade, sizes: Mapping[str, int] | None = None) -> Cascade:
    """No scan over a short rank is left, as far as extents are declared or given."""
    declared_sizes, known = cascade.static_sizes(), cascade.solve_sizes(sizes or {})
    taken = {*cascade.tensor_ranks(), *cascade.all_ranks()}
    declared: list[RankDecl] = []
    body: list[Statement] = []
    for s in cascade.body:
        short = isinstance(s, Scan) and (declared_sizes.get(s.over, SHORT + 1) <= SHORT or known.get(s.over, SHORT_NOW + 1) <= SHORT_NOW)
        if not isinstance(s, Scan) or not short:
            body.append(s)
            continue
        before = fresh(f"{s.over}_before", taken)
        taken.add(before)
        declared.append(RankDecl(before, cascade.size_of(s.over) or Extent(s.over)))
        moved: dict[str, Expr] = {s.over: Index(before)}
        reached = Op("lt" if s.exclusive else "le", (Index(before), Index(s.over)))
        where = reached if s.where is None else Op("and", (reached, at_coordinates(s.where, moved)))
        expr = at_coordinates(s.expr, moved)
        body.append(Einsum(s.out, s.ranks, expr, s.op, (before,), where, s.location))
    if not declared:
        return cascade
    return replace(cascade, ranks=(*cascade.ranks, *declared), body=tuple(body))
