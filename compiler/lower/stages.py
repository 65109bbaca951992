"""One stage of the plan as a loop: origins, corrections and states, tile after tile.

Reductions come in dependency order. The origins a state needs are formed from reductions already updated in this tile; a state is
corrected from the old origins to the new ones and takes in the tile's own reduction. `Tile(state)` is the value before this tile,
`Tile(state_new)` the one after it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from ...ir.expr import Const, Expr, Extent, Masked, Op, Read, Seen, Start, Tile, rewrite, walk
from ...ir.plan import Origin, Stage, State
from ...ir.tile import Dot, Loop, LoopState, Map, Node, Reduce, Store
from ...ir.types import DType, f32, i32
from ..passes.stream_reductions import in_flight, rebuild
from .bounds import loop_bounds
from .contractions import contraction_type, factors, find_contraction, product
from .values import IDENTITY, INTEGER_IDENTITY, Mode, Section, Values

LOWEST = Const(-3.4028234663852886e38)
HIGHEST = Const(3.4028234663852886e38)
EXPONENT_LIMIT = Const(126 * math.log(2.0))


@dataclass(slots=True)
class _Progress:
    """What the loop has so far: the new value of each state, the new and old value of each origin, the loop's states."""

    new: dict[str, Expr] = field(default_factory=dict)
    origins: dict[str, Expr] = field(default_factory=dict)
    carried: list[LoopState] = field(default_factory=list)


class StageLowering:
    """Lowers one stage. `final` gives reductions of earlier stages."""

    def __init__(self, values: Values, stage: Stage, final: Callable[[str], Expr]) -> None:
        self.values = values
        self.stage = stage
        self.final = final
        self.stream = values.kernel.stream or ""
        self.progress = _Progress()
        self.by_reduction = {v.reduction: v for v in stage.values}
        self.states = {s.name: s for s in stage.states}

    def loop(self, stores: Callable[[], list[Store]]) -> Loop:
        """The stage as a loop over the stream; `stores` gives what is stored in it."""
        v = self.values
        v.body, v.inside = Section(), set()
        for state in self.stage.states:
            if self.counts(state) is None:
                v.declare(state.name, self._ranks(state.ranks), self._dtype(state))
        conditions = tuple(v.convert(c, self._running()) for c in self.stage.domain.predicates)
        for r in self.stage.reductions:
            owned = [s for s in self.stage.states if s.owner == r.out]
            for state in owned:
                self._prepare_origins(state)
            for state in owned:
                self._update(state)
        v.body.nodes.extend(stores())
        bounds = loop_bounds(self.stream, conditions, self._tile_or_whole, lambda e: not v.type_of(e).is_float)
        body, carried = v.body.nodes, (*self.progress.carried, *v.body.carried)
        v.body = None
        return Loop(self.stream, v.size(self.stream), conditions, bounds, carried, tuple(body))

    def value(self, name: str, state: Callable[[State], Expr], extent: Expr, mode: Mode) -> Expr:
        """A reduction of this stage, rebuilt from its states, with `extent` elements of the rank seen."""
        return rebuild(
            self.by_reduction[name], lambda s: state(self.states[s]), lambda e: self.values.convert(self._in_flight(e, extent), mode)
        )

    def _in_flight(self, e: Expr, extent: Expr) -> Expr:
        earlier = self.values.streamed - set(self.by_reduction)
        return in_flight(e, self.stream, self.by_reduction, earlier, extent)

    def counts(self, state: State) -> tuple[Expr, Expr, Expr] | None:
        """(before, after, at the end) of a state that only counts the elements of the rank, which needs no state; else None."""
        if not state.is_count or state.where is not None or self.stage.domain.predicates:
            return None
        others: Expr = Const(1.0)
        for rank in state.over:
            if rank != self.stream:
                others = Op("mul", (others, Extent(rank)))

        def times(e: Expr) -> Expr:
            return Op("mul", (others, e))

        return times(Start(self.stream)), times(Seen(self.stream)), times(Extent(self.stream))

    # modes -----------------------------------------------------------------------------------------------------------

    def _mode(self, state: Callable[[State], Expr], extent: Expr) -> Mode:
        def value(name: str) -> Expr:
            if name in self.by_reduction:
                return self.value(name, state, extent, self._mode(state, extent))
            return self.final(name)

        return Mode(value, self.progress.origins)

    def _running(self) -> Mode:
        return self._mode(self._after, Seen(self.stream))

    def _old(self) -> Mode:
        return self._mode(self._before, Start(self.stream))

    def _before(self, state: State) -> Expr:
        count = self.counts(state)
        return count[0] if count else Tile(state.name)

    def _after(self, state: State) -> Expr:
        count = self.counts(state)
        return count[1] if count else self.progress.new[state.name]

    def at_end(self, state: State) -> Expr:
        """The state after the loop."""
        count = self.counts(state)
        return count[2] if count else Tile(state.name)

    # origins ---------------------------------------------------------------------------------------------------------

    def _prepare_origins(self, state: State) -> None:
        named = [state.summand, *(c for _, c in state.correction.terms if c is not None)]
        wanted = {n.name.removesuffix(".old") for e in named for n in walk(e) if isinstance(n, Tile)}
        for origin in self.stage.origins:
            if origin.name in wanted and origin.name not in self.progress.origins:
                self._origin(origin)

    def _origin(self, o: Origin) -> None:
        """The origin's value for this tile. A maximum is only kept above -inf; any other is carried and kept while not finite."""
        v = self.values
        running = v.convert(self._in_flight(o.expr, Seen(self.stream)), self._running())
        if o.kind == "max":
            new: Expr = Op("maximum", (running, LOWEST))
            self.progress.origins[f"{o.name}.old"] = v.convert(self._in_flight(o.expr, Start(self.stream)), self._old())
        else:
            carried = v.new_name(f"{o.name}_old")
            ranks = v.ranks_of(running)
            v.declare(carried, ranks)
            value = v.materialize(running, f"{o.name}_raw")
            new = Op("where", (Op("isfinite", (value,)), value, Tile(carried)))
            self.progress.origins[f"{o.name}.old"] = Tile(carried)
        self.progress.origins[o.name] = v.materialize(new, o.name, note=o.name)
        if o.kind == "free":
            self.progress.carried.append(LoopState(carried, ranks, Const(0.0), self.progress.origins[o.name]))

    def _coefficient(self, e: Expr, state: str) -> Expr:
        """A correction's coefficient as a tile; bounded where an origin may jump either way."""
        free = {o.name for o in self.stage.origins if o.kind == "free"}
        risky = any(isinstance(n, Tile) and n.name.removesuffix(".old") in free for n in walk(e))
        value = self.values.convert(e, self._running())
        if risky:
            value = rewrite(value, _bounded_exponent)
            value = Op("minimum", (Op("maximum", (value, LOWEST)), HIGHEST))
        return self.values.materialize(value, f"{state}_by")

    # states ----------------------------------------------------------------------------------------------------------

    def _update(self, state: State) -> None:
        if self.counts(state) is not None:
            return
        v = self.values
        dtype = self._dtype(state)
        new = v.new_name(f"{state.name}_new")
        summand = v.convert(state.summand, self._running())
        where = None if state.where is None else v.convert(state.where, self._running())
        if state.op in ("argmax", "argmin"):
            self._update_extreme(state, summand, where, new)
            return
        previous = self._corrected(state)
        if state.op == "sum":
            self._update_sum(state, summand, where, previous, new)
        else:
            part = self._reduce(state, f"{state.name}_tile", guard(summand, where, IDENTITY[state.op]), dtype)
            joined = {"max": "maximum", "min": "minimum", "prod": "mul"}[state.op]
            self._map(new, self._ranks(state.ranks), Op(joined, (previous, part)), dtype, state.name)
        self.progress.new[state.name] = Tile(new)
        init = state.identity if dtype == f32 else INTEGER_IDENTITY[state.op]
        self.progress.carried.append(LoopState(state.name, self._ranks(state.ranks), init, Tile(new), dtype))

    def _corrected(self, state: State) -> Expr:
        """The state at the new origins, before this tile's elements."""
        if not state.correction.terms:
            return Tile(state.name)
        total: Expr | None = None
        for name, coefficient in state.correction.terms:
            before = term = self._before(self.states[name])
            if coefficient is not None:
                term = Op("mul", (before, self._coefficient(coefficient, state.name)))
            if coefficient is not None and state.op != "sum":  # an identity of -inf times 0 is no number
                term = Op("where", (Op("eq", (before, state.identity)), before, term))
            total = term if total is None else Op("add", (total, term))
        return total if total is not None else Tile(state.name)

    def _update_sum(self, state: State, summand: Expr, where: Expr | None, previous: Expr, new: str) -> None:
        v = self.values
        ranks = self._ranks(state.ranks)
        over = tuple(r for r in state.over if r in v.tile)
        found = None
        if self._dtype(state) == f32:
            found = find_contraction(summand, ranks, over, v.tiles, v.size)
        sides = None if found is None else self._masked_sides(found.left, found.right, where)
        if sides is None:
            masked = mask_sum(summand, where, self._finite())
            if where is not None and len(factors(masked)) > 1:  # a factor beside the exponential may hide a NaN where the mask is off
                masked = Op("where", (where, masked, Const(0.0)))
            part = self._reduce(state, f"{state.name}_tile", masked, self._dtype(state))
            self._map(new, ranks, Op("add", (previous, part)), self._dtype(state), state.name)
            return
        a = v.operand(sides[0], f"{state.name}_lhs", v.body or v.outer)
        b = v.operand(sides[1], f"{state.name}_rhs", v.body or v.outer)
        v.declare(new, ranks)
        self._emit(Dot(new, ranks, over, a, b, previous, None, contraction_type(state.summand, v.input_types()), note=state.name))

    def _masked_sides(self, left: Expr, right: Expr, where: Expr | None) -> tuple[Expr, Expr] | None:
        """Both sides of a contraction, 0 on one of them outside the domain; None if no side has the ranks of the predicate.

        A predicate that looks at values may hide such as are not finite, so it is laid on every side that it can be.
        """
        if _has_exponential(right) or (not _has_exponential(left) and self._elements(right) < self._elements(left)):
            left, right = right, left
        if where is None:
            return mask_sum(left, None, self._finite()), right
        v = self.values
        able = [set(v.ranks_of(where)) <= set(v.ranks_of(side)) for side in (left, right)]
        if not any(able):
            return None
        left = mask_sum(left, where if able[0] else None, self._finite())
        looks = any(isinstance(n, (Read, Tile)) for n in walk(where))
        if able[1] and (looks or not able[0]):
            right = Op("where", (where, right, Const(0.0)))
        return left, right

    def _finite(self) -> frozenset[Expr]:
        """The tiles that are finite in every row: the origins."""
        return frozenset(self.progress.origins[o.name] for o in self.stage.origins if o.name in self.progress.origins)

    def _elements(self, e: Expr) -> int:
        return math.prod(self.values.size(r) for r in self.values.ranks_of(e))

    def _update_extreme(self, state: State, summand: Expr, where: Expr | None, new: str) -> None:
        """The index of the first extreme element travels with the extreme itself."""
        largest = state.op == "argmax"
        v = self.values
        ranks = self._ranks(state.ranks)
        best = v.new_name(f"{state.name}_best")
        v.declare(best, ranks)
        identity = IDENTITY[state.op]
        masked = guard(summand, where, identity)
        part = self._reduce(state, f"{state.name}_extreme", masked, f32, op="max" if largest else "min")
        at = self._reduce(state, f"{state.name}_tile", masked, i32)
        better = Op("gt" if largest else "lt", (part, Tile(best)))
        self._map(new, ranks, Op("where", (better, at, Tile(state.name))), i32, state.name)
        newer = v.new_name(f"{best}_new")
        self._map(newer, ranks, Op("maximum" if largest else "minimum", (Tile(best), part)), f32, state.name)
        self.progress.new[state.name] = Tile(new)
        self.progress.carried.append(LoopState(state.name, ranks, Const(0), Tile(new), i32))
        self.progress.carried.append(LoopState(best, ranks, identity, Tile(newer)))

    # nodes -------------------------------------------------------------------------------------------------------------

    def _reduce(self, state: State, name: str, e: Expr, dtype: DType, *, op: str | None = None) -> Tile:
        v = self.values
        dst = v.new_name(name)
        ranks = self._ranks(state.ranks)
        over = tuple(r for r in state.over if r in v.tile)
        v.declare(dst, ranks, dtype)
        self._emit(Reduce(dst, ranks, op or state.op, over, e, dtype, note=state.owner))
        return Tile(dst)

    def _map(self, dst: str, ranks: tuple[str, ...], e: Expr, dtype: DType, note: str) -> None:
        self.values.declare(dst, ranks, dtype)
        self._emit(Map(dst, ranks, e, dtype, note))

    def _emit(self, node: Node) -> None:
        assert self.values.body is not None
        self.values.body.nodes.append(node)

    def _ranks(self, ranks: tuple[str, ...]) -> tuple[str, ...]:
        return tuple(r for r in self.values.tile if r in ranks)

    def _dtype(self, state: State) -> DType:
        if state.op in ("argmax", "argmin"):
            return i32
        if state.is_count:
            return f32
        return self.values.type_of(Read(state.owner, ()))

    def _tile_or_whole(self, rank: str) -> int | None:
        v = self.values
        return None if rank in v.resident else v.size(rank)


def guard(e: Expr, where: Expr | None, identity: Const) -> Expr:
    """`e` inside the domain and where its own predicate holds, the identity elsewhere."""
    return Masked(e if where is None else Op("where", (where, e, identity)), identity)


def mask_sum(e: Expr, where: Expr | None, finite: frozenset[Expr]) -> Expr:
    """A summand that is 0 outside the domain: through the argument of its exponential if it has exactly one, else as a whole.

    What is subtracted stays outside the mask only if it is one of the `finite` tiles: the maximum of a row without elements is -inf.
    """
    parts = factors(e)
    exponentials = [p for p in parts if isinstance(p, Op) and p.name in ("exp", "exp2")]
    safe = len(exponentials) == 1 and not any(isinstance(n, Op) and n.name in ("div", "log") for p in parts for n in walk(p))
    if not safe:
        return guard(e, where, Const(0.0))
    exponential = exponentials[0]
    assert isinstance(exponential, Op)
    argument = exponential.args[0]
    match argument:
        case Op(name="sub", args=(x, d)) if d in finite:
            inner: Expr = Op("sub", (guard(x, where, Const(float("-inf"))), d))
        case _:
            inner = guard(argument, where, Const(float("-inf")))
    masked = Op(exponential.name, (inner,))
    return product(tuple(masked if p is exponential else p for p in parts))


def _bounded_exponent(node: Expr) -> Expr | None:
    if isinstance(node, Op) and node.name == "exp":
        return Op("exp", (Op("minimum", (node.args[0], EXPONENT_LIMIT)),))
    return None


def _has_exponential(e: Expr) -> bool:
    return any(isinstance(n, Op) and n.name in ("exp", "exp2") for n in walk(e))
