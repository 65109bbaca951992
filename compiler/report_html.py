"""The report as one self-contained page: the sections of the text, and the roofline drawn by hand as SVG."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from ..ir.text import print_cascade
from .figures import basis_of, byte_count, duration, missing_hint, quantity
from .operations import by_unit
from .report_schedule import HEAD
from .report_text import report_text
from .roofline_svg import roofline_svg

if TYPE_CHECKING:
    from .cost import Cost
    from .report import Report

PAGE_STYLE = """
:root { color-scheme: light dark; --ink: #1c2024; --faint: #6b7280; --line: #d7dbe0; --ground: #ffffff;
  --accent: #0b6bcb; --mark: #c2410c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e8ea; --faint: #9aa3ad; --line: #3a4048; --ground: #16191d; --accent: #6cb2ff; --mark: #ff9c66; }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--ground);
  max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.5rem; margin-bottom: 0; } h2 { font-size: 1.1rem; margin-top: 2rem; }
p.sub { color: var(--faint); margin-top: .2rem; }
pre { background: color-mix(in srgb, var(--ink) 5%, transparent); padding: .8rem 1rem; border-radius: 6px;
  overflow-x: auto; font-size: 13px; }
table { border-collapse: collapse; } th { text-align: left; color: var(--faint); font-weight: 500; }
th, td { padding: .25rem 1.2rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td.n { text-align: right; font-variant-numeric: tabular-nums; }
svg { max-width: 100%; height: auto; } svg text { font: 12px system-ui, sans-serif; fill: var(--faint); }
"""


def report_html(report: Report) -> str:
    """A whole page; it loads nothing."""
    name = escape(report.cascade.name)
    sizes = escape(", ".join(f"{rank}={size}" for rank, size in report.sizes) or "no extents given")
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">',
        f"<title>{name} · einfall explain</title>",
        f"<style>{PAGE_STYLE}</style></head><body>",
        f"<h1>{name}</h1>",
        f'<p class="sub">{escape(report.target.description)} (figures {basis_of(report.target)}) · {sizes}</p>',
        f"<pre>{escape(print_cascade(report.cascade))}</pre>",
        _passes(report),
        _changes(report),
        _kernels(report),
        _schedule(report),
        _costs(report.cost) if report.cost else f"<p>{escape(missing_hint(report.missing))}</p>",
        f"<details><summary>as text</summary><pre>{escape(report_text(report))}</pre></details>",
        "</body></html>",
    ]
    return "\n".join(part for part in parts if part) + "\n"


def _passes(report: Report) -> str:
    after, reads = dict(report.after or ()), dict(report.reads_after)
    rows = []
    for entry in report.before.ranks:
        first = ", ".join(f"{name} {found[-1].number if found else 0}" for name, found in entry.inputs)
        partial = ", ".join(f"{name} in pass {r.number}" for name, found in entry.inputs for r in found if r.partial)
        then = ", ".join(f"{name} {count}" for name, count in reads.get(entry.rank, ()))
        rows.append([entry.rank, entry.passes, entry.phases, first, partial, after.get(entry.rank, "–"), then])
    return section("Passes", ["rank", "before", "phases", "by input", "partial", "after", "by input"], rows)


def _changes(report: Report) -> str:
    done = section("Rewrites", ["rewrite", "what it did", "saved"], [[r.name, r.did, r.saved] for r in report.rewrites])
    return done + section("Not done", ["rewrite", "statement", "why"], [[r.rewrite, r.statement, r.reason] for r in report.rejected])


def _kernels(report: Report) -> str:
    rows = []
    for k in report.kernels:
        stages = "; ".join(", ".join(r.out for r in s.reductions) for s in k.plan.stages)
        moved = "–" if k.traffic_bytes is None else byte_count(k.traffic_bytes)
        rows.append([k.plan.name, k.plan.stream or "–", stages, ", ".join(k.plan.inputs), ", ".join(k.plan.outputs), moved])
    return section("Plan", ["kernel", "stream", "stages", "reads", "stores", "bytes"], rows)


def _schedule(report: Report) -> str:
    found = report.schedule
    if found is None:
        return ""
    notes = "".join(f"<li>{escape(note)}</li>" for note in found.notes)
    table = section(f"Schedule, the default for {found.target}", HEAD, found.rows())
    return f"{table}<p>Nothing is compiled or measured.</p>" + (f"<ul>{notes}</ul>" if notes else "") if table else ""


def _costs(found: Cost) -> str:
    traffic = [[t.tensor, t.direction + (", partial" if t.partial else ""), byte_count(t.bytes)] for t in found.traffic]
    live = [[x.tensor, ", ".join(x.whole) or "one element at a time", byte_count(x.bytes or 0)] for x in found.footprint]
    units = [
        [u.unit, u.dtype if u.dtype == u.runs_as else f"{u.dtype} as {u.runs_as}", quantity(u.operations), duration(u.time_us)]
        for u in found.roofline.units
    ]
    roof = found.roofline
    memory = ["memory", "", byte_count(roof.bytes), duration(roof.memory_us)]
    work = ", ".join(f"{unit} {quantity(count)}" for unit, count in by_unit(found.work).items())
    return "\n".join(
        (
            f"<h2>Roofline</h2><p>{duration(roof.time_us)}, bound by {escape(roof.bound_by)}. {quantity(found.flops)} operations ({work}), "
            f"{byte_count(found.traffic_bytes)}, {found.intensity:.3g} operations a byte.</p>",
            roofline_svg(found),
            section("Units", ["unit", "type", "operations", "time"], [memory, *units]),
            section("Traffic at the least", ["tensor", "", "bytes"], traffic),
            section("Live footprint before the rewrites", ["intermediate", "whole along", "bytes"], live),
        )
    )


def section(title: str, head: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """A heading and a table, nothing for no rows."""
    if not rows:
        return ""
    top = "".join(f"<th>{escape(h)}</th>" for h in head)
    body = "".join("<tr>" + "".join(_cell(c) for c in row) + "</tr>" for row in rows)
    return f"<h2>{escape(title)}</h2><table><tr>{top}</tr>{body}</table>"


def _cell(content: object) -> str:
    return f'<td class="n">{content}</td>' if isinstance(content, int) else f"<td>{escape(str(content))}</td>"
