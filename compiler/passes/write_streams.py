"""`write_streams`: a derived plan as a cascade again, its stages as iterative blocks.

    M[m] = max(p) S[m,p]                     iterate p
    D[m] = sum(p) exp(S[m,p] - M[m])   ->      M[m] = -inf then M_new[m]
                                               D[m] = 0.0 then D_new[m]
                                               M_new[m] = maximum(M[m], S[m,p])
                                               D_new[m] = D[m] * exp(M[m] - M_new[m]) + exp(S[m,p] - M_new[m])

The block takes one element of the rank a step, so the reference evaluator runs the derivation itself and the pass count of the
analysis applies to it unchanged (arXiv 2406.10491 writes its one-pass cascade this way). `explain` prints it.
"""

from __future__ import annotations

from dataclasses import replace

from ...ir.cascade import Cascade, Einsum, Iterate, IterState, Statement, defined, expressions
from ...ir.expr import Const, Expr, Extent, Index, Op, Read, Tile, aligned, reads, rewrite
from ...ir.plan import KernelPlan, Origin, Plan, Stage, State, Value
from .graph import definitions, dependencies, drop_unused, fresh
from .stream_reductions import in_flight, rebuild

LOWEST = Const(-3.4028234663852886e38)


def write_streams(plan: Plan) -> Cascade:
    """The cascade with every streamed reduction computed in an iterative block. Raises nothing: a plan is always writable."""
    cascade = plan.cascade
    streamed = {r.out for k in plan.kernels for s in k.stages for r in s.reductions}
    body: list[Statement] = []
    written: set[str] = set()
    depends = dependencies(cascade)
    stages = [(k, s) for k in plan.kernels for s in k.stages]
    statements = definitions(cascade)

    def write(name: str) -> None:
        if name in written or name not in statements or name in streamed:
            return
        written.update(other for other, _ in defined(statements[name]))
        for e in expressions(statements[name]):
            for r in reads(e):
                write(r.tensor)
        body.append(statements[name])

    taken = set(cascade.tensor_ranks()) | set(cascade.all_ranks())
    for kernel, stage in stages:
        mine = {r.out for r in stage.reductions}
        needed = frozenset[str]().union(*(depends[name] for name in mine))
        for name in statements:
            if name in needed and not depends[name] & mine:
                write(name)
        if not mine <= written:  # a reduction that two kernels compute is written once
            body.extend(_StageWriter(kernel, stage, taken).statements(written))
            written.update(mine)
    for name in statements:
        write(name)
    return drop_unused(replace(cascade, body=tuple(body)))


class _StageWriter:
    """One stage as a block and the maps that rebuild its reductions after it."""

    def __init__(self, kernel: KernelPlan, stage: Stage, taken: set[str]) -> None:
        self.stage = stage
        self.stream = kernel.stream or ""
        self.taken = taken
        self.values = {v.reduction: v for v in stage.values}
        self.earlier = {r.out for s in kernel.stages for r in s.reductions} - set(self.values)
        self.ranks = {r.out: r.ranks for r in stage.reductions}
        self.of_state = {s.name: s for s in stage.states}
        self.state_name = {s.name: self._name(f"{s.name}_run") for s in stage.states}
        self.new_name = {s.name: self._name(f"{s.name}_new") for s in stage.states}
        self.origin_name = {o.name: self._name(o.name) for o in stage.origins}
        self.old_name = {o.name: self._name(f"{o.name}_old") for o in stage.origins}
        self.body: list[Statement] = []
        self.states: list[IterState] = []

    def _name(self, wanted: str) -> str:
        name = fresh(wanted.replace(".", "_"), self.taken)
        self.taken.add(name)
        return name

    def statements(self, written: set[str]) -> list[Statement]:
        """The block and the maps after it, but for reductions already written."""
        done: set[str] = set()
        for r in self.stage.reductions:
            owned = [s for s in self.stage.states if s.owner == r.out]
            for state in owned:
                for origin in self.stage.origins:
                    named = [state.summand, *(c for _, c in state.correction.terms if c is not None)]
                    if origin.name not in done and any(_mentions(e, origin.name) for e in named):
                        done.add(origin.name)
                        self._origin(origin)
            for state in owned:
                self._state(state)
        block = Iterate(self.stream, tuple(self.states), tuple(self.body))
        end = Extent(self.stream)
        new = [r for r in self.stage.reductions if r.out not in written]
        after = [Einsum(r.out, r.ranks, self._rebuilt(self.values[r.out], self.state_name, end)) for r in new]
        return [block, *after]

    def _rebuilt(self, value: Value, names: dict[str, str], extent: Expr) -> Expr:
        return rebuild(
            value, lambda state: aligned(names[state], *self.of_state[state].ranks), lambda e: self._moving(e, names, extent)
        )

    def _moving(self, e: Expr, names: dict[str, str], extent: Expr) -> Expr:
        """`e` while `extent` elements of the rank have been seen."""
        return self._resolved(in_flight(e, self.stream, self.values, self.earlier, extent), names, extent)

    def _resolved(self, e: Expr, names: dict[str, str], extent: Expr) -> Expr:
        """`e` with reductions of this stage rebuilt from `names` (`extent` elements seen) and origins as statements."""

        def rule(node: Expr) -> Expr | None:
            match node:
                case Read(tensor=tensor) if tensor in self.values:
                    return self._rebuilt(self.values[tensor], names, extent)
                case Tile(name=name) if name.endswith(".old"):
                    origin = self._origin_of(name.removesuffix(".old"))
                    return aligned(self.old_name[origin.name], *origin.ranks)
                case Tile(name=name):
                    return aligned(self.origin_name[name], *self._origin_of(name).ranks)
                case _:
                    return None

        return rewrite(e, rule)

    def _origin_of(self, name: str) -> Origin:
        return next(o for o in self.stage.origins if o.name == name)

    def _origin(self, o: Origin) -> None:
        seen = Op("add", (Index(self.stream), Const(1)))
        value = self._moving(o.expr, self.new_name, seen)
        old = aligned(self.old_name[o.name], *o.ranks)
        if o.kind == "max":
            new: Expr = Op("maximum", (value, LOWEST))
            init: Expr = LOWEST
        else:
            new = Op("where", (Op("isfinite", (value,)), value, old))
            init = Const(0.0)
        self.body.append(Einsum(self.origin_name[o.name], o.ranks, new))
        self.states.append(IterState(self.old_name[o.name], o.ranks, init, aligned(self.origin_name[o.name], *o.ranks)))

    def _state(self, s: State) -> None:
        seen = Op("add", (Index(self.stream), Const(1)))
        summand = self._resolved(s.summand, self.new_name, seen)
        condition: Expr | None = s.where
        for predicate in self.stage.domain.predicates:
            condition = predicate if condition is None else Op("and", (condition, predicate))
        others = tuple(r for r in s.over if r != self.stream)
        if others:
            part = self._name(f"{s.name}_part")
            self.body.append(Einsum(part, s.ranks, summand, s.op, others, condition))
            summand = aligned(part, *s.ranks)
        elif condition is not None and s.op not in ("argmax", "argmin"):
            summand = Op("where", (condition, summand, s.identity))
        if s.op in ("argmax", "argmin"):
            self._extreme(s, summand, condition)
            return
        previous: Expr = aligned(self.state_name[s.name], *s.ranks)
        for i, (name, coefficient) in enumerate(s.correction.terms):
            term: Expr = aligned(self.state_name[name], *self.of_state[name].ranks)
            if coefficient is not None:
                zero = Op("eq", (term, self.of_state[name].identity))
                scaled = Op("mul", (term, self._resolved(coefficient, self.new_name, seen)))
                term = Op("where", (zero, term, scaled))
            previous = term if i == 0 else Op("add", (previous, term))
        joined = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}[s.op]
        self.body.append(Einsum(self.new_name[s.name], s.ranks, Op(joined, (previous, summand))))
        self.states.append(IterState(self.state_name[s.name], s.ranks, s.identity, aligned(self.new_name[s.name], *s.ranks)))

    def _extreme(self, s: State, summand: Expr, condition: Expr | None) -> None:
        """The first index whose summand beats the best so far, and that best."""
        largest = s.op == "argmax"
        best, newer = self._name(f"{s.name}_best"), self._name(f"{s.name}_best_new")
        identity = Const(float("-inf") if largest else float("inf"))
        if condition is not None:
            summand = Op("where", (condition, summand, identity))
        better = Op("gt" if largest else "lt", (summand, aligned(best, *s.ranks)))
        chosen = Op("where", (better, Index(self.stream), aligned(self.state_name[s.name], *s.ranks)))
        self.body.append(Einsum(self.new_name[s.name], s.ranks, chosen))
        self.body.append(Einsum(newer, s.ranks, Op("maximum" if largest else "minimum", (aligned(best, *s.ranks), summand))))
        self.states.append(IterState(self.state_name[s.name], s.ranks, Const(0), aligned(self.new_name[s.name], *s.ranks)))
        self.states.append(IterState(best, s.ranks, identity, aligned(newer, *s.ranks)))


def _mentions(e: Expr, origin: str) -> bool:
    names = (origin, f"{origin}.old")
    found = False

    def rule(node: Expr) -> Expr | None:
        nonlocal found
        found = found or (isinstance(node, Tile) and node.name in names)
        return None

    rewrite(e, rule)
    return found
