"""`split_reductions`: reductions over a concatenated rank are done piece by piece and merged.

    M[m] = max(p) S[m,p]                        M_s[m] = max(s) S_s[m,s];               M_t[m] = max(t) S_t[m,t]
    D[m] = sum(p) exp(S[m,p] - M[m])      ->    D_s[m] = sum(s) exp(S_s[m,s] - M_s[m]); D_t[m] = sum(t) exp(S_t[m,t] - M_t[m])
                                                M[m]   = maximum(M_s[m], M_t[m])
                                                D[m]   = D_s[m] * exp(M_s[m] - M[m]) + D_t[m] * exp(M_t[m] - M[m])

for p = s + t. Each piece has states at origins of its own; the same corrections that carry a state from one tile to the next carry it
to the common origins (`derivation.md`, "Pieces of a rank"; by hand in arXiv 2402.05099, section 3). A piece then is streamed as any
rank is: it may lack a batch rank that the others have, and need not be copied next to them. A piece without elements holds identities.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from ...ir.cascade import Cascade, Concat, Einsum, RankDecl, Statement, defined
from ...ir.expr import Const, Expr, Extent, Index, Op, Read, Tile, aligned, rewrite
from ...ir.plan import Origin, Stage, State, Value
from .graph import at_coordinates, definitions, drop_unused, fresh, ordered_body
from .stream_reductions import Streamer, in_flight, rebuild

LOWEST = Const(-3.4028234663852886e38)
JOINED = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}


def split_reductions(cascade: Cascade) -> Cascade:
    """No reduction is over a concatenated rank, unless it keeps an index or reads its neighbours."""
    for s in cascade.body:
        if isinstance(s, Concat) and cascade.is_concatenated(s.rank):
            split = _split_rank(cascade, s)
            if split is not None:
                return split_reductions(split)
    return cascade


def split_stream(cascade: Cascade, rank: str, parts: int) -> Cascade:
    """The reductions over `rank` done for `parts` stretches of it apart, as tasks of their own, and merged by a reduction over these.

    For when there are fewer tasks than threads. The cascade as it is where a reduction keeps an index, or reads away from its own place
    along the rank.
    """
    names = [s.out for s in cascade.body if isinstance(s, Einsum) and rank in s.over]
    kinds = {s.op for s in cascade.body if isinstance(s, Einsum) and rank in s.over}
    if parts < 2 or not names or not kinds <= set(JOINED):
        return cascade
    taken = {*cascade.tensor_ranks(), *cascade.all_ranks()}
    part = fresh(f"{rank}_part", taken)
    within = fresh(f"{rank}_in", taken)
    length = Op("floordiv", (Op("add", (Extent(rank), Const(parts - 1))), Const(parts)))
    place = Op("add", (Index(within), Op("mul", (Index(part), Extent(within)))))
    piece = _Piece(within, place, part, Op("lt", (place, Extent(rank))))
    try:
        body = _Splitter(cascade, rank, (piece,)).body(names)
    except _NotSplit:
        return cascade
    declared = (*cascade.ranks, RankDecl(part, Const(parts)), RankDecl(within, length))
    return drop_unused(replace(cascade, ranks=declared, body=body))


@dataclass(frozen=True, slots=True)
class _Piece:
    """A piece of the rank: its own rank, and where it lies in the whole.

    Of equal stretches there is one piece, with the rank `part` that counts them; `inside` says which of its points are any.
    """

    rank: str
    place: Expr
    part: str | None = None
    inside: Expr | None = None


class _NotSplit(Exception):
    """The rank must stay whole."""


def _split_rank(cascade: Cascade, concat: Concat) -> Cascade | None:
    rank = concat.rank
    names = [s.out for s in cascade.body if isinstance(s, Einsum) and rank in s.over]
    kinds = {s.op for s in cascade.body if isinstance(s, Einsum) and rank in s.over}
    if not names or not kinds <= set(JOINED):
        return None
    pieces = []
    before: Expr | None = None
    for piece, _ in concat.parts:
        pieces.append(_Piece(piece, Index(piece) if before is None else Op("add", (Index(piece), before))))
        before = Extent(piece) if before is None else Op("add", (before, Extent(piece)))
    try:
        body = _Splitter(cascade, rank, tuple(pieces)).body(names)
    except _NotSplit:
        return None
    return drop_unused(replace(cascade, body=body))


class _Splitter:
    """Rewrites the reductions over one concatenated rank."""

    def __init__(self, cascade: Cascade, rank: str, pieces: tuple[_Piece, ...]) -> None:
        self.cascade = cascade
        self.rank = rank
        self.pieces = pieces
        self.table = definitions(cascade)
        self.taken = {*cascade.tensor_ranks(), *cascade.all_ranks()}
        self.new: list[Statement] = []
        self.copies: dict[tuple[str, str], str] = {}

    def body(self, names: list[str]) -> tuple[Statement, ...]:
        """The statements of the whole cascade."""
        for stage in Streamer(self.cascade, self.rank, names).stages():
            _StageSplitter(self, stage).write()
        kept: list[Statement] = []
        for s in self.cascade.body:
            if isinstance(s, Einsum) and s.out in names:
                continue
            kept.append(self._joined(s) if isinstance(s, Einsum) and self.rank in s.ranks and self.pieces[0].part is None else s)
        return ordered_body((*kept, *self.new), self.cascade.inputs)

    def name(self, wanted: str) -> str:
        """A name that is not in use."""
        found = fresh(wanted.replace(".", "_"), self.taken)
        self.taken.add(found)
        return found

    def at_piece(self, e: Expr, piece: _Piece) -> Expr:
        """`e` at the elements of a piece, reading the piece's own tensors. Raises `_NotSplit`."""
        moved = at_coordinates(e, {self.rank: piece.place})

        def rule(node: Expr) -> Expr | None:
            if not isinstance(node, Read):
                return None
            if piece.part is not None and not isinstance(self.table.get(node.tensor), Einsum):
                return self._in_memory(node, piece)
            if node.tensor not in self.table:
                return None
            s = self.table[node.tensor]
            ranks = dict(defined(s))[node.tensor]
            if self.rank not in ranks:
                return None
            if node.coords[ranks.index(self.rank)] != piece.place:
                raise _NotSplit
            if isinstance(s, Concat) and s.rank == self.rank:
                others = {r: c for r, c in zip(ranks, node.coords, strict=True) if r != self.rank}
                return at_coordinates(dict(s.parts)[piece.rank], others) if piece.rank in dict(s.parts) else self._refuse()
            if isinstance(s, Einsum):
                own = {r: Index(piece.rank) if r == self.rank else c for r, c in zip(ranks, node.coords, strict=True)}
                coords = (*([] if piece.part is None else [Index(piece.part)]), *own.values())
                return replace(node, tensor=self._copy(s, piece), coords=coords)
            raise _NotSplit

        return rewrite(moved, rule)

    def _in_memory(self, node: Read, piece: _Piece) -> Read:
        """A read where a stretch lies; the last one may be cut short, and no read leaves the tensor for it."""
        last = Op("sub", (Extent(self.rank), Const(1)))
        return replace(node, coords=tuple(Op("minimum", (c, last)) if c == piece.place else c for c in node.coords))

    def _refuse(self) -> Expr:
        raise _NotSplit

    def _copy(self, s: Einsum, piece: _Piece) -> str:
        """The statement `s` for the elements of a piece."""
        key = (s.out, piece.rank)
        if key not in self.copies:
            name = self.copies[key] = self.name(f"{s.out}_{piece.rank}")
            ranks = tuple(piece.rank if r == self.rank else r for r in s.ranks)
            ranks = _with_part(ranks, piece)
            where = None if s.where is None else self.at_piece(s.where, piece)
            self.new.append(replace(s, out=name, ranks=ranks, expr=self.at_piece(s.expr, piece), where=where))
        return self.copies[key]

    def _joined(self, s: Einsum) -> Statement:
        """A result that has the rank, put together from its pieces for whoever needs it whole."""
        try:
            parts = tuple((p.rank, aligned(self._copy(s, p), *(p.rank if r == self.rank else r for r in s.ranks))) for p in self.pieces)
        except _NotSplit:
            return s
        return Concat(s.out, s.ranks, self.rank, parts, s.location)


class _StageSplitter:
    """The states of one stage, piece by piece and merged, and the reductions rebuilt from them."""

    def __init__(self, splitter: _Splitter, stage: Stage) -> None:
        self.splitter = splitter
        self.stage = stage
        self.values = {v.reduction: v for v in stage.values}
        self.ranks = {r.out: r.ranks for r in stage.reductions}
        self.of_state = {s.name: s for s in stage.states}
        self.origins = {o.name: o for o in stage.origins}
        self.of_piece: dict[tuple[str, str], str] = {}
        self.local: dict[tuple[str, str], str] = {}
        self.common: dict[str, str] = {}
        self.merged: dict[str, str] = {}

    def write(self) -> None:
        """Adds the statements of the stage."""
        for r in self.stage.reductions:
            owned = [s for s in self.stage.states if s.owner == r.out]
            for state in owned:
                for piece in self.splitter.pieces:
                    self._piece(state, piece)
            for state in owned:  # a state may be corrected by any other of the reduction's
                self._merge(state)
            value = self._value(self.values[r.out], lambda s: aligned(self.merged[s], *self.of_state[s].ranks), self._whole)
            self.splitter.new.append(Einsum(r.out, r.ranks, value, location=r.location))

    # a piece -------------------------------------------------------------------------------------------------------------

    def _piece(self, state: State, piece: _Piece) -> None:
        condition = state.where
        for predicate in self.stage.domain.predicates:
            condition = predicate if condition is None else Op("and", (predicate, condition))
        name = self.of_piece[state.name, piece.rank] = self.splitter.name(f"{state.name}_{piece.rank}")
        over = tuple(piece.rank if r == self.splitter.rank else r for r in state.over)
        where = None if condition is None else self.splitter.at_piece(condition, piece)
        summand = self._at_origins(self.splitter.at_piece(state.summand, piece), lambda o: self._local(o, piece))
        if piece.inside is not None:
            where = piece.inside if where is None else Op("and", (piece.inside, where))
        self.splitter.new.append(Einsum(name, _with_part(state.ranks, piece), summand, state.op, over, where))

    def _local(self, o: Origin, piece: _Piece) -> Expr:
        """An origin formed from the piece's own reductions."""
        key = (o.name, piece.rank)
        if key not in self.local:
            self.local[key] = self.splitter.name(f"{o.name}_{piece.rank}")
            e = in_flight(o.expr, self.splitter.rank, self.values, (), Extent(piece.rank))
            value = self._resolved(e, lambda s: self._of_piece(s, piece), Extent(piece.rank))
            self.splitter.new.append(Einsum(self.local[key], _with_part(o.ranks, piece), _finite(o, value)))
        return aligned(self.local[key], *_with_part(o.ranks, piece))

    def _of_piece(self, state: str, piece: _Piece) -> Read:
        return aligned(self.of_piece[state, piece.rank], *_with_part(self.of_state[state].ranks, piece))

    # merged --------------------------------------------------------------------------------------------------------------

    def _merge(self, state: State) -> None:
        total: Expr | None = None
        for piece in self.splitter.pieces:
            term = self._carried(state, piece)
            total = term if total is None else Op(JOINED[state.op], (total, term))
        assert total is not None
        name = self.merged[state.name] = self.splitter.name(f"{state.name}_all")
        part = self.splitter.pieces[0].part
        merged = Einsum(name, state.ranks, total) if part is None else Einsum(name, state.ranks, total, state.op, (part,))
        self.splitter.new.append(merged)

    def _carried(self, state: State, piece: _Piece) -> Expr:
        """The state of a piece, carried to the common origins. What is still the identity stays it."""
        own = self._of_piece(state.name, piece)
        total: Expr | None = None
        for name, coefficient in state.correction.terms:
            other = self.of_state[name]
            before = self._of_piece(name, piece)
            term: Expr = before
            if coefficient is not None:
                carried = self._at_origins(coefficient, self._common, lambda o: self._local(o, piece))
                term = Op("where", (Op("eq", (before, other.identity)), before, Op("mul", (before, carried))))
            total = term if total is None else Op("add", (total, term))
        return own if total is None else total

    def _common(self, o: Origin) -> Expr:
        """An origin formed from the merged reductions."""
        if o.name not in self.common:
            self.common[o.name] = self.splitter.name(f"{o.name}_all")
            value = self._resolved(o.expr, lambda s: aligned(self.merged[s], *self.of_state[s].ranks), Extent(self.splitter.rank))
            self.splitter.new.append(Einsum(self.common[o.name], o.ranks, _finite(o, value)))
        return aligned(self.common[o.name], *o.ranks)

    # expressions ---------------------------------------------------------------------------------------------------------

    def _whole(self, e: Expr) -> Expr:
        return e

    def _value(self, value: Value, state: Callable[[str], Expr], convert: Callable[[Expr], Expr]) -> Expr:
        return rebuild(value, state, convert)

    def _resolved(self, e: Expr, state: Callable[[str], Expr], extent: Expr) -> Expr:
        """`e` with the reductions of this stage rebuilt from their states."""

        def rule(node: Expr) -> Expr | None:
            if isinstance(node, Read) and node.tensor in self.values:
                inner = lambda x: self._resolved(in_flight(x, self.splitter.rank, self.values, (), extent), state, extent)  # noqa: E731
                return self._value(self.values[node.tensor], state, inner)
            return None

        return rewrite(e, rule)

    def _at_origins(self, e: Expr, new: Callable[[Origin], Expr], old: Callable[[Origin], Expr] | None = None) -> Expr:
        def rule(node: Expr) -> Expr | None:
            if not isinstance(node, Tile):
                return None
            name = node.name.removesuffix(".old")
            return new(self.origins[name]) if name == node.name or old is None else old(self.origins[name])

        return rewrite(e, rule)


def _with_part(ranks: tuple[str, ...], piece: _Piece) -> tuple[str, ...]:
    return ranks if piece.part is None else (piece.part, *ranks)


def _finite(o: Origin, value: Expr) -> Expr:
    """An origin is any finite number: the maximum of a piece without elements is not."""
    return Op("maximum", (value, LOWEST)) if o.kind == "max" else value
