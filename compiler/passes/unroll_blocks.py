"""`unroll_blocks`: an iterative block of few steps becomes its steps, one after the other.

    iterate i                                       X_1[m] = 0.5 * (A[m] + A[m] / A[m])
      X[m] = A[m] then Y[m]                   ->    X[m]   = 0.5 * (X_1[m] + A[m] / X_1[m])
      Y[m] = 0.5 * (X[m] + A[m] / X[m])

with i of extent 2. Every other rewrite then applies to the steps. After the step in which `until` came true the states keep their
values. Longer blocks, and those whose extent is known only at the call, are loops over a plan of their own.
"""

from __future__ import annotations

from dataclasses import replace

from ...ir.cascade import Cascade, Concat, Einsum, Iterate, IterState, Populate, Scan, Scatter, Statement, defined
from ...ir.expr import Const, Expr, Index, Op, Read, aligned, rewrite
from .graph import fresh, map_expressions

STEPS = 16


def unroll_blocks(cascade: Cascade) -> Cascade:
    """No block of at most `STEPS` steps, known before the call, is left."""
    taken = {*cascade.tensor_ranks(), *cascade.all_ranks()}
    body: list[Statement] = []
    for s in cascade.body:
        steps = cascade.static_sizes().get(s.rank) if isinstance(s, Iterate) else None
        if isinstance(s, Iterate) and steps is not None and steps <= STEPS:
            body.extend(_Unrolled(s, steps, taken).statements())
        else:
            body.append(s)
    result = replace(cascade, body=tuple(body))
    again = any(isinstance(s, Iterate) and cascade.static_sizes().get(s.rank, STEPS + 1) <= STEPS for s in body)
    return unroll_blocks(result) if again else result


class _Unrolled:
    """The steps of one block. Names of the last step are those of the states."""

    def __init__(self, block: Iterate, steps: int, taken: set[str]) -> None:
        self.block = block
        self.steps = steps
        self.taken = taken
        self.done: list[Statement] = []

    def statements(self) -> list[Statement]:
        """The initial values, then every step."""
        names = {s.name: self._state(s, s.init, last=self.steps == 0) for s in self.block.states}
        stopped: str | None = None
        for step in range(self.steps):
            last = step == self.steps - 1
            table = dict(names)
            for inner in self.block.body:
                table = self._inner(inner, table, step)
            new = {}
            for s in self.block.states:
                value = self._moved(s.next, table, step)
                if stopped is not None:
                    value = Op("where", (aligned(stopped), aligned(names[s.name], *s.ranks), value))
                new[s.name] = self._state(s, value, last=last)
            names = new
            if self.block.until is not None and not last:
                stopped = self._stop({**table, **names}, stopped, step)
        return self.done

    def _name(self, wanted: str) -> str:
        name = fresh(wanted, self.taken)
        self.taken.add(name)
        return name

    def _state(self, s: IterState, value: Expr, *, last: bool) -> str:
        name = s.name if last else self._name(s.name)
        self.done.append(Einsum(name, s.ranks, value, location=self.block.location))
        return name

    def _inner(self, s: Statement, table: dict[str, str], step: int) -> dict[str, str]:
        new = map_expressions(s, lambda e: self._moved(e, table, step))
        renamed = {name: self._name(name) for name, _ in defined(s)}
        self.done.append(_renamed(new, renamed))
        return {**table, **renamed}

    def _stop(self, table: dict[str, str], stopped: str | None, step: int) -> str:
        assert self.block.until is not None
        condition = self._moved(self.block.until, table, step)
        if stopped is not None:
            condition = Op("or", (aligned(stopped), condition))
        name = self._name("stopped")
        self.done.append(Einsum(name, (), condition, location=self.block.location))
        return name

    def _moved(self, e: Expr, table: dict[str, str], step: int) -> Expr:
        """`e` in step `step`, with the names of `table`."""

        def rule(node: Expr) -> Expr | None:
            if node == Index(self.block.rank):
                return Const(step)
            if isinstance(node, Read) and node.tensor in table:
                return replace(node, tensor=table[node.tensor])
            return None

        return rewrite(e, rule)


def _renamed(s: Statement, names: dict[str, str]) -> Statement:
    """The statement with the tensors it defines renamed; a block's own body too."""
    match s:
        case Iterate():
            inner = {name: names.get(name, name) for name, _ in defined(s)}

            def rule(node: Expr) -> Expr | None:
                return replace(node, tensor=inner[node.tensor]) if isinstance(node, Read) and node.tensor in inner else None

            moved = map_expressions(s, lambda e: rewrite(e, rule))
            assert isinstance(moved, Iterate)
            return replace(moved, states=tuple(replace(state, name=inner[state.name]) for state in moved.states))
        case Populate():
            return replace(s, values=names[s.values], coords=names[s.coords])
        case Einsum() | Scan() | Scatter() | Concat():
            return replace(s, out=names[s.out])
