"""`explain`: what the compiler makes of a cascade on a target, as data, as text and as a page.

The figures are lower bounds and plans, nothing is measured: passes by `analysis.py`, bytes and operations by `cost.py` and
`operations.py`, kernels from the derived plan, a GPU's default schedule by `report_schedule.py`. Without all extents the counts of passes
remain; the figures in bytes and the schedule are left out.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from inspect import getdoc
from typing import Any

from ..ir.cascade import Cascade
from ..ir.errors import EinfallError
from ..ir.plan import KernelPlan, Plan, Stage, State, Step
from ..ir.text import print_cascade, print_expr
from ..schedules.target import Target
from .analysis import PassReport, input_ranks, pass_report, plan_passes, plan_reads
from .cost import Cost, TensorTraffic, cost, kernel_traffic, live_footprint
from .figures import basis_of, byte_count, quantity
from .flow import fiber
from .operations import by_unit, operations
from .passes import make_plan, rewritten
from .report_html import report_html
from .report_schedule import ScheduleReport, scheduled
from .report_text import report_text
from .sizes import complete_sizes, missing_sizes


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A rewrite that applied: what it did and what that saved, in words ("" where nothing can be said)."""

    name: str
    did: str
    saved: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"name": self.name, "did": self.did, "saved": self.saved}


@dataclass(frozen=True, slots=True)
class Refusal:
    """A rewrite, or the whole plan, that did not apply to a statement, and why."""

    rewrite: str
    statement: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"rewrite": self.rewrite, "statement": self.statement, "reason": self.reason}


@dataclass(frozen=True, slots=True)
class KernelReport:
    """One step of the plan and the bytes it moves, None without all extents."""

    plan: Step
    traffic: tuple[TensorTraffic, ...] | None

    @property
    def traffic_bytes(self) -> int | None:
        return None if self.traffic is None else sum(t.bytes for t in self.traffic)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        stages = self.plan.stages
        return {
            "name": self.plan.name,
            "stream": self.plan.stream,
            "library": None if isinstance(self.plan, KernelPlan) else str(self.plan.cascade),
            "stages": [
                {"reductions": [r.out for r in s.reductions], "domain": [print_expr(p) for p in s.domain.predicates]} for s in stages
            ],
            "states": [_state(x) for s in stages for x in s.states],
            "origins": [{"name": o.name, "expr": print_expr(o.expr), "ranks": list(o.ranks)} for s in stages for o in s.origins],
            "inputs": list(self.plan.inputs),
            "outputs": list(self.plan.outputs),
            "kept": list(self.plan.kept) if isinstance(self.plan, KernelPlan) else [],
            "traffic": None if self.traffic is None else [t.to_dict() for t in self.traffic],
            "traffic_bytes": self.traffic_bytes,
        }


def _state(x: State) -> dict[str, Any]:
    return {
        "name": x.name, "op": x.op, "ranks": list(x.ranks), "summand": print_expr(x.summand), "corrected": bool(x.correction.terms),
    }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Report:
    """What `explain` found. `cost` is None while `missing` names ranks without an extent; `after` is None without a plan.

    `schedule` is the default's on a GPU, None for other targets and without extents.
    """

    cascade: Cascade
    target: Target
    sizes: tuple[tuple[str, int], ...]
    missing: tuple[str, ...]
    before: PassReport
    after: tuple[tuple[str, int], ...] | None
    reads_after: tuple[tuple[str, tuple[tuple[str, int], ...]], ...]
    kernels: tuple[KernelReport, ...]
    rewrites: tuple[Rewrite, ...]
    rejected: tuple[Refusal, ...]
    cost: Cost | None
    schedule: ScheduleReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data. Figures that need extents which are not given are None; `missing` names the ranks."""
        found = self.cost
        return {
            "cascade": self.cascade.name,
            "text": print_cascade(self.cascade),
            "target": {"name": self.target.name, "description": self.target.description, "basis": basis_of(self.target)},
            "sizes": dict(self.sizes),
            "missing": list(self.missing),
            "passes": {"before": {r.rank: r.passes for r in self.before.ranks}, "after": dict(self.after or ())},
            "phases": {r.rank: r.phases for r in self.before.ranks},
            "reads": {"before": self.before.to_dict(), "after": {rank: dict(inputs) for rank, inputs in self.reads_after}},
            "kernels": [k.to_dict() for k in self.kernels],
            "schedule": self.schedule.to_dict() if self.schedule else None,
            "traffic_bytes": found.traffic_bytes if found else None,
            "traffic": [t.to_dict() for t in found.traffic] if found else [],
            "flops": found.flops if found else None,
            "operations": dict(by_unit(found.work)) if found else {},
            "intensity": found.intensity if found else None,
            "footprint": [x.to_dict() for x in (found.footprint if found else live_footprint(self.cascade))],
            "roofline_us": found.roofline.time_us if found else None,
            "roofline": found.roofline.to_dict() if found else None,
            "rewrites": [r.to_dict() for r in self.rewrites],
            "rejected": [r.to_dict() for r in self.rejected],
        }

    def to_text(self) -> str:
        """The report as plain text, sections one after the other."""
        return report_text(self)

    def to_html(self) -> str:
        """The report as one self-contained page with a drawing of the roofline."""
        return report_html(self)

    def print(self) -> None:
        """Writes `to_text()` to standard output."""
        sys.stdout.write(self.to_text())

    def __str__(self) -> str:
        return self.to_text()


def explain(cascade: Cascade, sizes: Mapping[str, int], target: Target, *, plan: Plan | None = None) -> Report:
    """What becomes of `cascade` at `sizes` on `target`; `plan` is derived if it is not given.

    Extents may be missing: what needs them is left out and the report names them. A cascade that cannot be planned is still analysed,
    the reason standing among the rejected rewrites. Raises `CascadeError` for a rank that the cascade does not have.
    """
    known = complete_sizes(cascade, sizes)
    missing = missing_sizes(cascade, sizes)
    refusals: list[Refusal] = []
    if plan is None:
        try:
            plan = make_plan(cascade, known)
        except EinfallError as error:
            refusals.append(Refusal("make_plan", error.statement or "", error.what))
    if plan is not None:
        refusals += [Refusal(r.rewrite, r.statement, r.reason) for k in plan.kernels for s in k.stages for r in s.rejected]
        refusals += [Refusal(r.rewrite, r.statement, r.reason) for r in plan.cuts]
    schedule = None
    if plan is not None and not missing:
        try:
            schedule = scheduled(cascade, plan, known, target)
        except EinfallError as error:
            refusals.append(Refusal("schedule", error.statement or "", error.what))
    before = pass_report(cascade)
    reads_after = _reads_after(cascade, plan) if plan else ()
    found = None if missing else cost(cascade, known, target, plan)
    return Report(
        cascade=cascade,
        target=target,
        sizes=tuple(known.items()),
        missing=missing,
        before=before,
        after=tuple((rank, plan_passes(plan, rank)) for rank, _ in reads_after) if plan else None,
        reads_after=reads_after,
        kernels=_kernels(plan, known) if plan else (),
        rewrites=(*_preparation(cascade, plan, known), *_streaming(before, reads_after, plan, found)) if plan else (),
        rejected=tuple(dict.fromkeys(refusals)),
        cost=found,
        schedule=schedule,
    )


def _reads_after(c: Cascade, plan: Plan) -> tuple[tuple[str, tuple[tuple[str, int], ...]], ...]:
    """For every rank of the cascade that the plan still has: how often each input is read."""
    ranks = plan.cascade.all_ranks()
    kept = [rank for rank in input_ranks(c) if fiber(c, rank).ranks <= set(ranks)]
    return tuple((rank, tuple((name, reads[-1].number if reads else 0) for name, reads in plan_reads(plan, rank))) for rank in kept)


def _kernels(plan: Plan, sizes: Mapping[str, int]) -> tuple[KernelReport, ...]:
    known = complete_sizes(plan.cascade, {r: n for r, n in sizes.items() if r in plan.cascade.all_ranks()})
    if missing_sizes(plan.cascade, known):
        return tuple(KernelReport(k, None) for k in plan.steps)
    return tuple(KernelReport(k, moved) for k, moved in zip(plan.steps, kernel_traffic(plan, known), strict=True))


def _preparation(c: Cascade, plan: Plan, sizes: Mapping[str, int]) -> list[Rewrite]:
    """The rewrites of the pipeline that the plan went through, each with what it changed in statements and operations."""
    found: list[Rewrite] = []
    for rewrite, new in rewritten(c, sizes):
        name = rewrite.__name__
        if new != c and name in plan.notes:
            did = (getdoc(rewrite) or "").partition("\n")[0].rstrip(".")
            found.append(Rewrite(name, did, _less_work(c, new, sizes)))
        c = new
    return found


def _less_work(old: Cascade, new: Cascade, sizes: Mapping[str, int]) -> str:
    words = []
    if len(new.body) < len(old.body):
        words.append(_count(len(old.body) - len(new.body), "statement"))
    if not missing_sizes(old, sizes) and not missing_sizes(new, sizes):
        was, now = (sum(w.operations for w in operations(c, complete_sizes(c, sizes))) for c in (old, new))
        less = was - now
        if less > 0:
            words.append(quantity(less) + " operations")
    return ", ".join(words)


def _streaming(
    before: PassReport, after: tuple[tuple[str, tuple[tuple[str, int], ...]], ...], plan: Plan, found: Cost | None
) -> list[Rewrite]:
    """What streaming made of each kernel's reductions, and the passes it saved over each rank."""
    counts = {rank: dict(inputs) for rank, inputs in after}
    result = []
    for kernel in plan.kernels:
        for stage in kernel.stages:
            if len(stage.reductions) < 2:
                continue
            rank = kernel.stream or ""
            result.append(Rewrite("stream_reductions", _streamed(stage, rank), _saved_passes(before, rank, counts.get(rank), found)))
    return result


def _streamed(stage: Stage, rank: str) -> str:
    names = ", ".join(r.out for r in stage.reductions)
    corrected = [s.name for s in stage.states if s.correction.terms]
    how = f", {', '.join(corrected)} corrected as {', '.join(o.name for o in stage.origins)} moves" if corrected else ""
    return f"{names} share one stream over {rank}{how}"


def _saved_passes(before: PassReport, rank: str, after: Mapping[str, int] | None, found: Cost | None) -> str:
    entry = next((r for r in before.ranks if r.rank == rank), None)
    if entry is None or after is None:
        return ""
    saved = {name: (reads[-1].number if reads else 0) - after.get(name, 0) for name, reads in entry.inputs}
    most = max(saved.values(), default=0)
    if most <= 0:
        return ""
    text = _count(most, "pass") + f" over {rank}"
    if found is not None:
        sizes = {t.tensor: t.bytes for t in found.traffic if t.direction == "in"}
        text += f", {byte_count(sum(n * sizes.get(name, 0) for name, n in saved.items()))} read again"
    return text


def _count(n: int, noun: str) -> str:
    return f"1 {noun}" if n == 1 else f"{n} {noun}{'es' if noun.endswith('s') else 's'}"
