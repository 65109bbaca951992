"""Passes and phases: how often a cascade must traverse a rank of its inputs, before and after the rewrites.

A *pass* over rank R of an input reads every element along R; another begins where an element is needed again after a value that
depends on all of them (arXiv 2406.10491, section III). The count is a property of the cascade: no schedule goes below it
without holding the whole fiber. With start(s) and roots(s) as `flow.py` has them, passes(R) is the maximum of start(s) + 1 over all
statements s with X in roots(s), over the inputs X taken one at a time; phases(R) is the same with all inputs at once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..ir.cascade import Cascade
from ..ir.plan import Plan
from .flow import Step, fiber, trace_flow


@dataclass(frozen=True, slots=True)
class PassRead:
    """One pass over an input: its number (from 1), the statements that take part, and whether all of them read it partially."""

    number: int
    statements: tuple[str, ...]
    partial: bool


@dataclass(frozen=True, slots=True)
class RankPasses:
    """The passes over one rank, input by input. `per_step` names iterations each step of which takes these passes again."""

    rank: str
    passes: int
    phases: int
    inputs: tuple[tuple[str, tuple[PassRead, ...]], ...]
    per_step: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        reads_of = {
            name: [{"pass": r.number, "statements": list(r.statements), "partial": r.partial} for r in found] for name, found in self.inputs
        }
        return {"passes": self.passes, "phases": self.phases, "inputs": reads_of, "per_step": list(self.per_step)}


@dataclass(frozen=True, slots=True)
class PassReport:
    """The passes over every rank that an input carries."""

    cascade: str
    ranks: tuple[RankPasses, ...]

    def of(self, rank: str) -> RankPasses:
        """The entry of a rank. Raises `KeyError` for one that no input carries."""
        for entry in self.ranks:
            if entry.rank == rank:
                return entry
        raise KeyError(rank)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, rank by rank."""
        return {entry.rank: entry.to_dict() for entry in self.ranks}


def passes(c: Cascade, rank: str) -> int:
    """The lower bound of passes over `rank` (a rank, or composed: `(n j)`), the maximum over the inputs; 0 if no input carries it.

    Raises `CascadeError` for an unknown rank. An iteration whose number of steps is unknown counts as one step where each step takes
    further passes; `pass_report` names it.
    """
    along = fiber(c, rank)
    return max((_count(trace_flow(c, along, frozenset({name})).steps) for name in along.inputs), default=0)


def phases(c: Cascade, rank: str) -> int:
    """The dependent traversals of `rank` by all inputs together: kernels are cut by phases. Raises `CascadeError` as `passes` does."""
    along = fiber(c, rank)
    return _count(trace_flow(c, along, frozenset(along.inputs)).steps)


def pass_report(c: Cascade) -> PassReport:
    """Passes and phases of every rank that an input carries, composed ranks included, and what each pass reads."""
    return PassReport(c.name, tuple(_rank_passes(c, rank) for rank in input_ranks(c)))


def plan_passes(plan: Plan, rank: str) -> int:
    """The passes over `rank` that the kernels of a plan make: one a stage, and one more for an output along the rank after the last.

    Reductions of one stage move together, so none of them waits for another. Raises `CascadeError` for an unknown rank.
    """
    c = plan.cascade
    along = fiber(c, rank)
    return max((_count(trace_flow(c, along, frozenset({name}), plan).steps) for name in along.inputs), default=0)


def plan_reads(plan: Plan, rank: str) -> tuple[tuple[str, tuple[PassRead, ...]], ...]:
    """For every input along `rank`: the passes that a plan makes over it."""
    along = fiber(plan.cascade, rank)
    return tuple((name, _reads_of(name, trace_flow(plan.cascade, along, frozenset({name}), plan).steps)) for name in along.inputs)


def input_ranks(c: Cascade) -> tuple[str, ...]:
    """The ranks that some input carries: single ones in order, then composed ones, declared or as the axis of an input `(n j)`."""
    single = dict.fromkeys(rank for t in c.inputs for rank in t.ranks)
    composed = {d.name: None for d in c.ranks if c.components(d.name) and d.name not in single}
    axes = {f"({' '.join(axis)})": None for t in c.inputs for axis in t.axes if len(axis) > 1}
    return tuple(rank for rank in (*single, *composed, *axes) if fiber(c, rank).inputs)


def _count(steps: list[Step]) -> int:
    return max((step.effect.done + 1 for step in steps if step.effect.roots), default=0)


def _rank_passes(c: Cascade, rank: str) -> RankPasses:
    along = fiber(c, rank)
    flows = {name: trace_flow(c, along, frozenset({name})) for name in along.inputs}
    per_step = {r: None for flow in flows.values() for r in flow.per_step}
    return RankPasses(
        rank=rank,
        passes=max((_count(flow.steps) for flow in flows.values()), default=0),
        phases=phases(c, rank),
        inputs=tuple((name, _reads_of(name, flow.steps)) for name, flow in flows.items()),
        per_step=tuple(per_step),
    )


def _reads_of(name: str, steps: list[Step]) -> tuple[PassRead, ...]:
    """The passes over one input that `steps` make."""
    by_pass: dict[int, list[Step]] = {}
    for step in steps:
        if name in step.effect.roots:
            by_pass.setdefault(step.effect.done + 1, []).append(step)
    return tuple(
        PassRead(number, tuple(dict.fromkeys(s.statement for s in found)), all(name not in s.effect.full for s in found))
        for number, found in sorted(by_pass.items())
    )
