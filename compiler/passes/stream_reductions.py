"""`stream_reductions`: dependent reductions over one rank, done in as few passes as the algebra allows.

    M[m] = max(p) S[m,p]                           for each tile of p:
    D[m] = sum(p) exp(S[m,p] - M[m])          ->     M' = max(M, max of the tile)
    O[m] = sum(p) exp(S[m,p] - M[m]) * V[p]          D' = D * exp(M - M') + sum of the tile's exp(S - M')
                                                     O' = O * exp(M - M') + sum of the tile's exp(S - M') * V

The reductions over a rank are taken in dependency order. A reduction joins the stage of those it depends on if its summand has a
finite basis closed under their movement (`algebra.close`); otherwise it opens the next stage, where they are constants, and the
reason is kept. The result is the `Stage`s of a kernel: semantic, free of tiles.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

import sympy as sp

from ...ir.cascade import Cascade, Einsum, Scan
from ...ir.expr import Const, Expr, Extent, Index, Op, Read, Tile, children, reads, with_children
from ...ir.infer import expression_ranks
from ...ir.plan import Correction, Domain, Origin, Rejected, Stage, State, Value
from .algebra import Barrier, Closure, Symbols, close, to_expr, to_sympy
from .factor_reductions import factor_reductions
from .graph import conjunction, conjuncts, definitions, dependencies, fresh, inline, maps
from .signs import built_of_maxima, is_positive, is_running, runs

IDENTITY = {"sum": 0.0, "prod": 1.0, "max": float("-inf"), "min": float("inf"), "argmax": -1, "argmin": -1}


@dataclass(slots=True)
class _Draft:
    """A stage while it is being built."""

    index: int
    reductions: list[Einsum] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    states: list[State] = field(default_factory=list)
    values: list[Value] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)


class Streamer:
    """Derives the stages of the reductions over `rank` in `cascade`.

    Args:
        online: whether reductions may move within a stage; if not, each dependent reduction opens a stage of its own.
    """

    def __init__(self, cascade: Cascade, rank: str, reductions: Iterable[str], *, online: bool = True) -> None:
        self.cascade = cascade
        self.rank = rank
        self.online = online
        self.statements = {name: s for name, s in definitions(cascade).items() if isinstance(s, Einsum)}
        self.scans = frozenset(s.out for s in cascade.body if isinstance(s, Scan))
        self.bodies = maps(cascade)
        self.depends = dependencies(cascade)
        self.names = tuple(reductions)
        self.stage_of: dict[str, int] = {}
        self.drafts: list[_Draft] = []

    def stages(self) -> tuple[Stage, ...]:
        """The stages, in order."""
        for name in self.names:
            self._place(self.statements[name])
        return tuple(self._finish(draft) for draft in self.drafts)

    def _place(self, r: Einsum) -> None:
        needs = [n for n in self.names if n in self.depends[r.out]]
        k = max((self.stage_of[n] for n in needs), default=0)
        moving = frozenset(n for n in needs if self.stage_of[n] == k)
        if moving:
            trial = self._copy(k)
            try:
                if not self.online:
                    raise Barrier("the schedule asks for repeated passes")
                self._derive(r, moving, trial)
            except Barrier as why:
                k += 1
                self._draft(k).rejected.append(Rejected("stream_reductions", r.out, str(why)))
            else:
                self.drafts[k] = trial
                self.stage_of[r.out] = k
                return
        self._derive(r, frozenset(), self._draft(k))
        self.stage_of[r.out] = k

    def _draft(self, k: int) -> _Draft:
        while len(self.drafts) <= k:
            self.drafts.append(_Draft(len(self.drafts)))
        return self.drafts[k]

    def _copy(self, k: int) -> _Draft:
        d = self._draft(k)
        return _Draft(d.index, list(d.reductions), list(d.origins), list(d.states), list(d.values), list(d.rejected))

    # one reduction ---------------------------------------------------------------------------------------------------

    def _derive(self, r: Einsum, moving: frozenset[str], draft: _Draft) -> None:
        """Adds the reduction's states, origins and value to the draft. Raises `Barrier`."""
        summand = self._inlined(r.expr, moving)
        self._check_inner(summand, moving, r)
        if r.where is not None and self._moves(r.where, moving):
            raise Barrier("its predicate depends on a value that moves while the rank is streamed")
        peeled, inside = self._peel(r, summand, moving)
        symbols = Symbols()
        over = frozenset(r.over)

        def classify(e: Expr) -> str:
            varies = bool(over & set(expression_ranks(e)))
            moves = self._moves(e, moving)
            return {(True, True): "mixed", (True, False): "x", (False, True): "d", (False, False): "c"}[(varies, moves)]

        factored = factor_reductions(r.op or "sum", to_sympy(inside, symbols, classify), symbols, lambda e: is_positive(e, self.statements))
        terms: list[tuple[Expr | None, str]] = []
        for term in factored.terms:
            state = self._state(r, term.inside, symbols, draft)
            outside = sp.Mul(term.outside)
            factors = [*peeled] if outside == 1 else [*peeled, to_expr(outside, symbols, symbols.meaning)]
            terms.append((_product(factors), state))
        added = None if factored.added == 0 else to_expr(factored.added, symbols, symbols.meaning)
        guarded = r.where is not None and r.op == "sum"
        draft.values.append(Value(r.out, r.op or "sum", tuple(terms), added, guarded))
        draft.reductions.append(r)

    def _inlined(self, e: Expr, moving: frozenset[str]) -> Expr:
        """`e` with the maps that depend on a reduction over the rank written out; others stay opaque reads."""
        mine = frozenset(self.names)
        return inline(e, self.bodies, lambda name: bool(self.depends[name] & mine) or self._is_free(name))

    def _is_free(self, name: str) -> bool:
        return self.rank not in self.bodies[name].ranks

    def _moves(self, e: Expr, moving: frozenset[str]) -> bool:
        return any(r.tensor in moving or self.depends.get(r.tensor, frozenset()) & moving for r in reads(e))

    def _check_inner(self, e: Expr, moving: frozenset[str], r: Einsum) -> None:
        for read in reads(e):
            statement = self.statements.get(read.tensor)
            if read.tensor in self.scans and self.depends[read.tensor] & moving:
                raise Barrier(f"the scan {read.tensor} runs over a value that moves while {self.rank} is streamed")
            if statement is not None and read.tensor not in moving and self.depends[read.tensor] & moving:
                kind = "a reduction over another rank" if statement.op else "a map read away from its own indices"
                raise Barrier(f"{statement.out}, {kind}, depends on a value that moves while {self.rank} is streamed")

    def _peel(self, r: Einsum, e: Expr, moving: frozenset[str]) -> tuple[list[Expr], Expr]:
        """Factors of the summand of a sum that do not vary along the reduced ranks, and the rest."""
        if r.op != "sum":
            return [], e
        over = set(r.over)

        def free(x: Expr) -> bool:
            return not over & set(expression_ranks(x)) and x != Const(1.0)

        match e:
            case Op(name="mul", args=(a, b)):
                if free(a):
                    outside, inside = self._peel(r, b, moving)
                    return [a, *outside], inside
                if free(b):
                    outside, inside = self._peel(r, a, moving)
                    return [b, *outside], inside
                left, x = self._peel(r, a, moving)
                right, y = self._peel(r, b, moving)
                return [*left, *right], Op("mul", (x, y))
            case Op(name="div", args=(a, b)):
                left, x = self._peel(r, a, moving)
                if free(b):
                    return [*left, Op("div", (Const(1.0), b))], x
                return left, Op("div", (x, b))
            case Op(name="neg", args=(a,)):
                outside, inside = self._peel(r, a, moving)
                return [Const(-1.0), *outside], inside
            case _:
                return [], e

    # states and origins ------------------------------------------------------------------------------------------------

    def _state(self, r: Einsum, g: sp.Expr, symbols: Symbols, draft: _Draft) -> str:
        """The name of the state for the reduction of `g`; it, its basis and its origins are made if they are new."""
        ds = symbols.select(g, "d")
        if not ds:
            return self._keep(r, to_expr(g, symbols, symbols.meaning), draft)
        if r.op not in ("sum", "max", "min", "argmax", "argmin"):
            raise Barrier(f"{r.op} of a summand that moves")
        closure = close(g, symbols.select(g, "xi"), ds, symbols)
        if r.op != "sum" and len(closure.basis) > 1:
            raise Barrier(f"{r.op} of a summand that would need several functions")
        mine = frozenset(self.names)
        divided = {v.reduction for v in draft.values if all(outside is not None and runs(outside, mine) for outside, _ in v.terms)}
        for d in closure.polynomial:
            if not is_running(symbols.meaning(d), self.statements, mine, divided):
                raise Barrier("poor origin: a sum that moves is not divided by anything that runs with it")
        meaning = self._meanings(closure, symbols, draft)
        names: list[str] = []
        for function in closure.basis:
            names.append(self._keep(r, to_expr(function, symbols, meaning), draft))
        for i, name in enumerate(names):
            row = [(names[j], None if t == 1 else to_expr(t, symbols, meaning)) for j, t in enumerate(closure.transition.row(i)) if t != 0]
            if r.op != "sum" and not all(c is None or is_positive(c, self.statements) for _, c in row):
                raise Barrier(f"{r.op} of a summand whose scale moves with unknown sign")
            if row != [(name, None)]:
                self._correct(name, Correction(tuple(row)), draft)
        return names[0]

    def _meanings(self, closure: Closure, symbols: Symbols, draft: _Draft) -> Callable[[sp.Symbol], Expr]:
        """symbol -> expression, with a moving value as the tile of its origin: new for d, `.old` for its old value."""
        tiles: dict[sp.Symbol, Expr] = {}
        for d, old in closure.old.items():
            name = self._origin(symbols.meaning(d), draft, exponential=d not in closure.polynomial)
            tiles[d], tiles[old] = Tile(name), Tile(f"{name}.old")
        return lambda symbol: tiles[symbol] if symbol in tiles else symbols.meaning(symbol)

    def _origin(self, e: Expr, draft: _Draft, *, exponential: bool) -> str:
        """The origin that holds `e`, made if it is new. One that enters polynomially must always be finite, so it is carried."""
        plain = {v.reduction for v in draft.values if v.added is None and [outside for outside, _ in v.terms] == [None]}
        kind: Literal["max", "free"] = "max" if exponential and built_of_maxima(e, self.statements, plain) else "free"
        for i, known in enumerate(draft.origins):
            if known.expr == e:
                draft.origins[i] = replace(known, kind="free" if "free" in (kind, known.kind) else "max")
                return known.name
        base = f"{e.tensor}_now" if isinstance(e, Read) else "origin"
        name = fresh(base, [o.name for d in (*self.drafts, draft) for o in d.origins])
        needs = tuple(n for n in self.names if any(r.tensor == n for r in reads(e)))
        draft.origins.append(Origin(name, e, expression_ranks(e), kind, needs))
        return name

    def _keep(self, r: Einsum, summand: Expr, draft: _Draft) -> str:
        """The name of the state with this summand, made if there is none yet."""
        op = r.op or "sum"
        ranks = self._ranks(r, summand, draft)
        for s in draft.states:
            if (s.op, s.over, s.summand, s.where, s.ranks) == (op, r.over, summand, r.where, ranks):
                return s.name
        taken = [s.name for d in (*self.drafts, draft) for s in d.states]
        name = fresh(r.out, taken)
        draft.states.append(State(name, op, Const(IDENTITY[op]), ranks, r.over, summand, r.where, Correction(()), r.out))
        return name

    def _correct(self, name: str, correction: Correction, draft: _Draft) -> None:
        draft.states = [replace(s, correction=correction) if s.name == name else s for s in draft.states]

    def _ranks(self, r: Einsum, summand: Expr, draft: _Draft) -> tuple[str, ...]:
        """The ranks of a state: those of its own summand and predicate, in the order of the reduction's result."""
        origins = {o.name: o.ranks for o in draft.origins}
        found = {*expression_ranks(summand, origins), *(expression_ranks(r.where) if r.where is not None else ())}
        return tuple(rank for rank in r.ranks if rank in found)

    # the finished stage ----------------------------------------------------------------------------------------------------

    def _finish(self, draft: _Draft) -> Stage:
        """The draft with what all its states' predicates share as the domain of the stage; a scan must see every element."""
        scanned = any(self.scans & {r.out, *self.depends[r.out]} for r in draft.reductions)
        shared = [c for c in conjuncts(draft.states[0].where) if self._bounds_stream(c) and not scanned]
        for state in draft.states[1:]:
            mine = conjuncts(state.where)
            shared = [c for c in shared if c in mine]
        states = tuple(replace(s, where=conjunction(c for c in conjuncts(s.where) if c not in shared)) for s in draft.states)
        return Stage(
            index=draft.index,
            reductions=tuple(draft.reductions),
            origins=tuple(draft.origins),
            states=states,
            values=tuple(draft.values),
            domain=Domain(tuple(shared)),
            rejected=tuple(draft.rejected),
        )

    def _bounds_stream(self, condition: Expr) -> bool:
        """Whether the condition compares the stream rank's index, plus or minus something free of it, with something free of it."""
        return bound_of(condition, self.rank) is not None


def bound_of(condition: Expr, rank: str) -> tuple[str, Expr] | None:
    """(comparison, limit) such that `condition` is `rank comparison limit` with a limit free of the rank, or None."""
    flipped = {"lt": "gt", "le": "ge", "gt": "lt", "ge": "le", "eq": "eq"}
    if not isinstance(condition, Op) or condition.name not in flipped:
        return None
    left, right = condition.args
    if rank in expression_ranks(right):
        left, right, name = right, left, flipped[condition.name]
    else:
        name = condition.name
    if rank in expression_ranks(right):
        return None
    while left != Index(rank):
        match left:
            case Op(name="add", args=(a, b)) if rank not in expression_ranks(b):
                left, right = a, Op("sub", (right, b))
            case Op(name="add", args=(a, b)) if rank not in expression_ranks(a):
                left, right = b, Op("sub", (right, a))
            case Op(name="sub", args=(a, b)) if rank not in expression_ranks(b):
                left, right = a, Op("add", (right, b))
            case Op(name="sub", args=(a, b)) if rank not in expression_ranks(a):
                left, right, name = b, Op("sub", (a, right)), flipped[name]
            case _:
                return None
    return name, right


def in_flight(e: Expr, rank: str, moving: Container[str], earlier: Container[str], extent: Expr) -> Expr:
    """`e` with extent(rank) read as `extent`, but where it belongs to a reduction of an earlier stage, which is complete.

    Args:
        moving: the reductions of this stage.
        earlier: those of earlier stages.
    """
    found = [r.tensor for r in reads(e)]
    if any(name in earlier for name in found) and not any(name in moving for name in found):
        return e
    if e == Extent(rank):
        return extent
    return with_children(e, tuple(in_flight(child, rank, moving, earlier, extent) for child in children(e)))


def rebuild(value: Value, state: Callable[[str], Expr], convert: Callable[[Expr], Expr]) -> Expr:
    """A reduction from its states: the sum of outside * state, and what was added.

    Args:
        state: the expression of a state by name.
        convert: what a coefficient reads as at this place.
    """
    total: Expr | None = None
    for outside, name in value.terms:
        term = state(name)
        if outside is not None:
            scaled = Op("mul", (term, convert(outside)))
            term = Op("where", (Op("eq", (term, Const(0.0))), Const(0.0), scaled)) if value.guarded else scaled
        total = term if total is None else Op("add", (total, term))
    if value.added is not None:
        added = convert(value.added)
        total = added if total is None else Op("add", (total, added))
    return total if total is not None else Const(0.0)


def _product(factors: list[Expr]) -> Expr | None:
    result: Expr | None = None
    for factor in factors:
        result = factor if result is None else Op("mul", (result, factor))
    return result
