"""`sink_accesses`: shifted, affine and gathered reads move down to inputs.

    P[b,v] = exp(L[b,v] - M[b])                   T[b] = exp(L[b, X[b]] - M[b])
    T[b]   = P[b, X[b]]                     ->

    Z[t,v] = sum(e) A[t,e] * W[v,e]               Z_at[t] = sum(e) A[t,e] * W[Y[t], e]
    T[t]   = Z[t, Y[t]]                     ->    T[t]    = Z_at[t]

Without it a single element read from a value would keep the whole value in memory. Through a reduction the access makes a new
reduction, and only where that is less work than storing the old one. Other reads, and those through scans, populates, concatenations
and blocks, stay as they are: what they read is stored by a kernel first. So is a map that would grow beyond `LIMIT` nodes, and one that
gathers and is gathered from: a chain of those doubles with every link.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from itertools import islice
from math import prod

from ...ir.cascade import Cascade, Einsum, Statement
from ...ir.expr import Const, Expr, Extent, Index, Op, Read, aligned, reads, rewrite, walk
from ...ir.infer import expression_ranks
from .graph import at_coordinates, definitions, drop_unused, fresh, map_expressions

LIMIT = 64
STORED = 16  # what an element costs that is stored and read again, in operations


def sink_accesses(cascade: Cascade, sizes: Mapping[str, int] | None = None) -> Cascade:
    """No map is read but at its own indices; a reduction neither, if the elements read are a part of it."""
    table = definitions(cascade)
    known = cascade.solve_sizes(sizes or {})
    taken = {*table, *(t.name for t in cascade.inputs)}
    made: dict[Read, str] = {}
    sunk: dict[Read, Expr | None] = {}
    body: list[Statement] = []
    extra: list[Statement] = []

    def rule(node: Expr) -> Expr | None:
        if not isinstance(node, Read):
            return None
        statement = table.get(node.tensor)
        if not isinstance(statement, Einsum) or node.coords == tuple(Index(r) for r in statement.ranks):
            return None
        if node not in sunk:
            sunk[node] = moved(node, statement)
        return sunk[node]

    def moved(node: Read, statement: Einsum) -> Expr | None:
        coordinates = dict(zip(statement.ranks, node.coords, strict=True))
        if any(_gathers(c) for c in node.coords) and any(_gathers(c) for r in reads(statement.expr) for c in r.coords):
            return None
        if statement.op is None:
            value: Expr | None = sink(at_coordinates(statement.expr, coordinates))
            if value is not None and sum(1 for _ in islice(walk(value), LIMIT + 1)) > LIMIT:
                return None
        else:
            value = reduced_at(replace(node, fill=None), statement, coordinates)
        if value is None:
            return None
        return value if node.fill is None else Op("where", (_inside(coordinates), _filled(value), node.fill))

    def reduced_at(node: Read, statement: Einsum, coordinates: dict[str, Expr]) -> Expr | None:
        ranks = tuple(dict.fromkeys(r for c in node.coords for r in expression_ranks(c)))
        if set(ranks) & set(statement.over) or not _pays(statement, ranks, known):
            return None
        if node not in made:
            made[node] = fresh(f"{statement.out}_at", taken)
            taken.add(made[node])
            where = None if statement.where is None else sink(at_coordinates(statement.where, coordinates))
            new = replace(statement, out=made[node], ranks=ranks, expr=sink(at_coordinates(statement.expr, coordinates)), where=where)
            table[new.out] = new
            extra.append(new)
        return aligned(made[node], *ranks)

    def sink(e: Expr) -> Expr:
        return rewrite(e, rule)

    for statement in cascade.body:
        new = map_expressions(statement, sink)
        body.extend(extra)
        extra.clear()
        body.append(new)
    return drop_unused(replace(cascade, body=tuple(body)))


def _pays(statement: Einsum, ranks: tuple[str, ...], sizes: Mapping[str, int]) -> bool:
    """Whether reducing again for the elements read is less work than to store all results; of fewer ranks where extents are unknown."""
    if not {*ranks, *statement.ranks, *statement.over} <= set(sizes):
        return len(ranks) < len(statement.ranks)
    again = prod(sizes[r] for r in (*ranks, *statement.over))
    return len(ranks) < len(statement.ranks) and again < STORED * prod(sizes[r] for r in statement.ranks)


def _gathers(coordinate: Expr) -> bool:
    """Whether a coordinate is read from a tensor."""
    return any(True for _ in reads(coordinate))


def _filled(e: Expr) -> Expr:
    """`e` whose reads at moved coordinates give 0 outside the tensor: the select around it hides them, but they must not leave memory."""

    def rule(node: Expr) -> Expr | None:
        if isinstance(node, Read) and node.fill is None and not all(isinstance(c, Index) for c in node.coords):
            return replace(node, fill=Const(0))
        return None

    return rewrite(e, rule)


def _inside(coordinates: dict[str, Expr]) -> Expr:
    """The condition that every coordinate which is not its own rank's index lies inside the tensor."""
    condition: Expr = Const(True)
    for rank, c in coordinates.items():
        if c != Index(rank):
            both = Op("and", (Op("ge", (c, Const(0))), Op("lt", (c, Extent(rank)))))
            condition = both if condition == Const(True) else Op("and", (condition, both))
    return condition
