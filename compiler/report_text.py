"""The report as text: the cascade, passes, rewrites, the plan's kernels, a GPU's schedule, traffic, footprint, operations, the roofline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ..ir.plan import KernelPlan, LibraryPlan, LoopPlan, Step
from ..ir.text import print_cascade, print_expr, print_statement
from .figures import basis_of, byte_count, duration, missing_hint, quantity
from .operations import by_unit
from .report_schedule import HEAD

if TYPE_CHECKING:
    from .cost import Cost
    from .report import KernelReport, Report


def report_text(report: Report) -> str:
    """The whole report; ends with a newline."""
    sizes = ", ".join(f"{rank}={size}" for rank, size in report.sizes) or "none given"
    target = f"{report.target.name}: {report.target.description} (figures {basis_of(report.target)})"
    sections = [
        print_cascade(report.cascade).rstrip("\n").splitlines(),
        [f"target    {target}", f"extents   {sizes}"],
        _passes(report),
        _rewrites(report),
        _kernels(report),
        _schedule(report),
        *_costs(report),
    ]
    return "\n\n".join("\n".join(lines) for lines in sections if lines) + "\n"


def _passes(report: Report) -> list[str]:
    """A row for each rank that takes more than one pass; the others share one."""
    after, reads = dict(report.after or ()), dict(report.reads_after)
    rows, single = [], []
    for entry in report.before.ranks:
        now = after.get(entry.rank)
        if entry.passes <= 1 and entry.phases <= 1 and (now is None or now <= 1) and not entry.per_step:
            single.append(entry.rank)
            continue
        first = ", ".join(f"{name} {found[-1].number if found else 0}" for name, found in entry.inputs)
        notes = [f"{name} pass {r.number} partial ({', '.join(r.statements)})" for name, found in entry.inputs for r in found if r.partial]
        notes += [f"again in each step of {rank}" for rank in entry.per_step]
        then = ", ".join(f"{name} {count}" for name, count in reads.get(entry.rank, ()))
        rows.append(
            [entry.rank, str(entry.passes), str(entry.phases), first, "-" if now is None else str(now), then, "; ".join(notes)]
        )
    if single:
        rows.append([", ".join(single), "1", "1", "", "1" if report.after is not None else "-", "", ""])
    return ["passes", *_table(["rank", "before", "phases", "by input", "after", "by input", ""], rows)]


def _rewrites(report: Report) -> list[str]:
    lines = []
    if report.rewrites:
        lines += ["rewrites", *_table(None, [[r.name, r.did + (f"; saves {r.saved}" if r.saved else "")] for r in report.rewrites])]
    if report.rejected:
        lines += ["not done", *_table(None, [[r.rewrite, r.statement, r.reason] for r in report.rejected])]
    return lines


def _kernels(report: Report) -> list[str]:
    if not report.kernels:
        return []
    return ["plan", *(line for kernel in report.kernels for line in _kernel(kernel))]


def _headline(step: Step) -> str:
    kind = {KernelPlan: "kernel", LibraryPlan: "library", LoopPlan: "loop"}[type(step)]
    return f"{kind} {step.name}: reads {', '.join(step.inputs) or 'nothing'}, stores {', '.join(step.outputs)}"


def _kernel(kernel: KernelReport) -> list[str]:
    plan = kernel.plan
    moved = "" if kernel.traffic_bytes is None else f", {byte_count(kernel.traffic_bytes)}"
    lines = [f"  {_headline(plan)}{moved}"]
    if isinstance(plan, LoopPlan):
        lines += [f"    in each step, {_headline(step)}" for step in plan.body.steps]
    if not isinstance(plan, KernelPlan):
        lines += [f"    {line}" for s in plan.cascade.body for line in print_statement(s).splitlines()]
    elif plan.kept:
        lines.append(f"    keeps {', '.join(plan.kept)} for its own later streams, rather than summing again")
    for stage in plan.stages:
        lines.append(f"    stream {plan.stream}: {', '.join(r.out for r in stage.reductions)}")
        lines += [f"      where {print_expr(p)}" for p in stage.domain.predicates]
        for state in stage.states:
            terms = " + ".join(name if e is None else f"{print_expr(e)} * {name}" for name, e in state.correction.terms)
            carried = f"   carried by {terms}" if terms else ""
            lines.append(f"      {state.name}[{','.join(state.ranks)}] {state.op} {print_expr(state.summand)}{carried}")
        lines += [f"      origin {o.name}[{','.join(o.ranks)}] = {print_expr(o.expr)}" for o in stage.origins]
    return lines


def _schedule(report: Report) -> list[str]:
    found = report.schedule
    if found is None or not found.kernels:
        return []
    title = f"schedule, the default for {found.target}; nothing is compiled or measured"
    return [title, *_table(HEAD, found.rows()), *(f"  {note}" for note in found.notes)]


def _costs(report: Report) -> list[list[str]]:
    found = report.cost
    if found is None:
        return [[missing_hint(report.missing)]]
    traffic = ", ".join(f"{t.tensor} {byte_count(t.bytes)}{' (partial)' if t.partial else ''}" for t in found.traffic)
    work = ", ".join(f"{unit} {quantity(count)}" for unit, count in by_unit(found.work).items())
    roof = found.roofline
    times = [["memory", byte_count(roof.bytes), duration(roof.memory_us)]]
    for u in roof.units:
        runs = u.dtype if u.runs_as == u.dtype else f"{u.dtype} as {u.runs_as}"
        times.append([f"{u.unit}, {runs}", quantity(u.operations), duration(u.time_us)])
    return [
        [f"traffic     {byte_count(found.traffic_bytes)} at the least: {traffic}"],
        _footprint(found),
        [f"operations  {quantity(found.flops)}: {work}", f"intensity   {found.intensity:.3g} operations a byte"],
        [f"roofline    {duration(roof.time_us)}, bound by {roof.bound_by}", *_table(None, times)],
    ]


def _footprint(found: Cost) -> list[str]:
    """The slices that must be held; intermediates that flow on element by element are left out."""
    held = [x for x in found.footprint if x.whole]
    if not held:
        return ["live footprint, before the rewrites: no intermediate is held whole along any rank"]
    rows = [[f"{x.tensor}[{','.join(x.ranks)}]", "whole along " + ", ".join(x.whole), byte_count(x.bytes or 0)] for x in held]
    return ["live footprint, before the rewrites", *_table(None, rows)]


def _table(head: Sequence[str] | None, rows: Iterable[Sequence[str]]) -> list[str]:
    """Left-aligned columns, two spaces apart, indented by two."""
    cells = [list(row) for row in ([head] if head else [])] + [list(row) for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(cells[0]))] if cells else []
    return [("  " + "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True))).rstrip() for row in cells]
