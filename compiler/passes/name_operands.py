"""`name_operands`: statements over whole tensors (populates, scatters, concatenations, blocks) read plain tensors, nothing else.

    V[b,s], I[b,s] = topk(p -> s, 8 where p < N[b]) A[b,p] * W[p]
                                                                  V_of[b,p]    = A[b,p] * W[p]
                                                            ->    V_where[b,p] = p < N[b]
                                                                  V[b,s], I[b,s] = topk(p -> s, 8 where V_where[b,p]) V_of[b,p]

A sort or a scatter works on memory, so what it works on is computed by a kernel first.
"""

from __future__ import annotations

from dataclasses import replace

from ...ir.cascade import Cascade, Concat, Einsum, Iterate, Populate, Scan, Scatter, Statement
from ...ir.expr import Const, Expr, Op, Read, Scalar, aligned
from ...ir.infer import expression_ranks
from .graph import fresh


def name_operands(cascade: Cascade) -> Cascade:
    """Every populate, scatter and concatenation reads tensors at their own indices."""
    naming = _Naming(cascade)
    for s in cascade.body:
        naming.body.append(naming.named(s))
    return replace(cascade, body=tuple(naming.body))


class _Naming:
    def __init__(self, cascade: Cascade) -> None:
        self.table = cascade.tensor_ranks()
        self.taken = set(self.table)
        self.body: list[Statement] = []

    def named(self, s: Statement) -> Statement:
        """The statement over named operands; what they are is appended to the body."""
        match s:
            case Populate():
                where = None if s.where is None else self._operand(s.where, f"{s.values}_where", s)
                parameter = None if s.parameter is None else self._number(s.parameter, f"{s.values}_by", s)
                return replace(s, expr=self._operand(s.expr, f"{s.values}_of", s), where=where, parameter=parameter)
            case Scatter():
                expr = s.expr if s.where is None else Op("where", (s.where, s.expr, Const(0)))
                at = tuple((rank, self._operand(e, f"{s.out}_{rank}", s)) for rank, e in s.at)
                return replace(s, expr=self._operand(expr, f"{s.out}_of", s), at=at, where=None)
            case Concat():
                return replace(s, parts=tuple((piece, self._operand(e, f"{s.out}_{piece}", s)) for piece, e in s.parts))
            case Iterate():
                states = (replace(state, init=self._number(state.init, f"{state.name}_init", s)) for state in s.states)
                return replace(s, states=tuple(states))
            case Einsum() | Scan():  # these are computed in kernels
                return s

    def _operand(self, e: Expr, name: str, s: Statement) -> Expr:
        """`e` as a tensor read at its own indices."""
        if isinstance(e, Read) and e == aligned(e.tensor, *self.table.get(e.tensor, ())):
            return e
        name = fresh(name, self.taken)
        self.taken.add(name)
        ranks = expression_ranks(e)
        self.body.append(Einsum(name, ranks, e, location=s.location))
        return aligned(name, *ranks)

    def _number(self, e: Expr, name: str, s: Statement) -> Expr:
        return e if isinstance(e, Const) or (isinstance(e, Scalar) and not isinstance(s, Iterate)) else self._operand(e, name, s)
