"""What a plan's kernels compute, written as a cascade: states, the values rebuilt from them, and the maps between, on demand.

Each kernel has names of its own for what it does not store, since it computes that again. The running origins stand as plain maps:
the cascade has the plan's work, and its meaning once every stream has ended.
"""

from __future__ import annotations

from dataclasses import replace

from ..ir.cascade import Cascade, Einsum, Scan, Statement
from ..ir.expr import Const, Expr, Op, Read, Tile, aligned, reads, rewrite
from ..ir.plan import KernelPlan, Plan, Stage, Value
from .passes.graph import dependencies


def planned_cascade(plan: Plan) -> Cascade:
    """The statements of all steps in launch order."""
    body: list[Statement] = []
    for number, step in enumerate(plan.steps):
        body.extend(_Kernel(step, number).statements() if isinstance(step, KernelPlan) else step.cascade.body)
    return replace(plan.cascade, body=tuple(body))


def storing_streams(cascade: Cascade, kernel: KernelPlan) -> dict[str, int]:
    """For each output along the stream the number of the kernel's stream that stores it.

    It is the first that visits every element, once no reduction of its own or of a later one is needed; else one after all stages.
    What the kernel alone reads back need not be stored where the stream does not go.
    """
    depends, ranks = dependencies(cascade), cascade.tensor_ranks()
    found = {}
    for name in kernel.outputs:
        if kernel.stream not in ranks[name]:
            continue
        closed = [s for s in kernel.stages if not _open(kernel, s) & depends[name]]
        able = (s.index for s in closed if name in kernel.kept or not s.domain.predicates)
        found[name] = next(able, len(kernel.stages))
    return found


def _open(kernel: KernelPlan, stage: Stage) -> frozenset[str]:
    """The reductions that are not complete while `stage` runs."""
    return frozenset(r.out for s in kernel.stages if s.index >= stage.index for r in s.reductions)


class _Kernel:
    def __init__(self, kernel: KernelPlan, number: int) -> None:
        self.kernel = kernel
        self.number = number
        self.origins = {o.name: o for stage in kernel.stages for o in stage.origins}
        self.table: dict[str, Einsum | Scan] = {s.out: s for s in kernel.statements}
        self.states: list[str] = []
        for stage in kernel.stages:
            self._stage(stage)

    def statements(self) -> list[Einsum | Scan]:
        """Everything the stored tensors and the states need, operands first."""
        ordered: dict[str, Einsum | Scan] = {}
        for name in (*self.states, *self.kernel.outputs):
            self._visit(name, ordered)
        return list(ordered.values())

    def _stage(self, stage: Stage) -> None:
        domain = None
        for predicate in stage.domain.predicates:
            domain = predicate if domain is None else Op("and", (domain, predicate))
        for origin in stage.origins:
            self.table[_origin(origin.name)] = Einsum(_origin(origin.name), origin.ranks, origin.expr)
        ranks = {}
        for state in stage.states:
            name = _state(state.name)
            where = domain if state.where is None else state.where if domain is None else Op("and", (domain, state.where))
            self.table[name] = Einsum(name, state.ranks, state.summand, state.op, state.over, where)
            self.states.append(name)
            ranks[state.name] = state.ranks
        results = {r.out: r.ranks for r in stage.reductions}
        for value in stage.values:
            self.table[value.reduction] = Einsum(value.reduction, results[value.reduction], _rebuilt(value, ranks))

    def _visit(self, name: str, ordered: dict[str, Einsum | Scan]) -> None:
        s = self.table.get(name)
        if s is None or name in ordered:
            return
        expr, where = self._spelled(s.expr), None if s.where is None else self._spelled(s.where)
        for e in (s.expr, *([s.where] if s.where is not None else [])):
            for read in reads(self._with_origins(e)):
                self._visit(read.tensor, ordered)
        ordered[name] = replace(s, out=self._name(name), expr=expr, where=where)

    def _with_origins(self, e: Expr) -> Expr:
        """`e` with each running origin as a tensor."""
        return rewrite(e, lambda n: aligned(_origin(n.name), *self.origins[n.name].ranks) if isinstance(n, Tile) else None)

    def _spelled(self, e: Expr) -> Expr:
        return rewrite(self._with_origins(e), lambda n: replace(n, tensor=self._name(n.tensor)) if isinstance(n, Read) else None)

    def _name(self, name: str) -> str:
        own = name in self.table and name not in self.kernel.outputs
        return f"{name}.{self.number}" if own else name


def _rebuilt(value: Value, ranks: dict[str, tuple[str, ...]]) -> Expr:
    """A reduction as the sum of coefficient * state."""
    result = value.added
    for coefficient, name in value.terms:
        state = aligned(_state(name), *ranks[name])
        term: Expr = state if coefficient is None else Op("mul", (coefficient, state))
        result = term if result is None else Op("add", (result, term))
    return Const(0.0) if result is None else result


def _state(name: str) -> str:
    return f"state {name}"


def _origin(name: str) -> str:
    return f"origin {name}"
