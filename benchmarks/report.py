"""The findings as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.case import EAGER
from benchmarks.floors import Floor
from benchmarks.protocol import Samples
from benchmarks.run import DEFAULT, INDUCTOR, METASCHEDULE, TUNED, Row, figures

TITLES = {
    "prefill": "Attention over a whole prompt",
    "decode": "Decode steps",
    "quantize": "Quantizers",
    "verify": "Verification of drafts",
    "fused": "Other fused cascades",
    "dispatch": "What a call costs beside its kernel",
}
OWN, TORCH = "own", "SDPA / torch"
EMPTY = "–"
COLORS = {
    DEFAULT: "#1b6ca8", TUNED: "#0b3c5d", OWN: "#6fa8dc", TORCH: "#7fb069", INDUCTOR: "#d9a441", METASCHEDULE: "#8d6cab", EAGER: "#c9c9c9",
}  # fmt: skip


def limits_table(limits: Sequence[tuple[Floor, Samples]]) -> Table:
    """What the machine can do at best."""
    table = Table(title="What this machine can do", title_justify="left")
    for column in ("", "median", "best", "spread"):
        table.add_column(column, justify="left" if not column else "right")
    for floor, samples in limits:
        unit = "GB/s" if floor.kind == "bytes" else "GFLOP/s"
        best = floor.amount / min(samples.ms) / 1e6
        table.add_row(floor.name, f"{floor.rate(samples):.0f} {unit}", f"{best:.0f}", f"{samples.spread:.0%}")
    return table


def rows_table(rows: Sequence[Row], group: str) -> Table:
    """One line a case: our times, the shares of peak and bandwidth, the distance to the floor, how many times as long each peer takes, and
    the aims. Columns that say nothing of any row are left out."""
    caption = (
        "× a peer: how many times as long it takes as einfall, the tuned one if there is one · × own: our kernel without the feature\n"
        "× floor: how many times as long einfall takes as it must · ✓ ✗ whether these figures meet the aim"
    )
    table = Table(title=TITLES[group], title_justify="left", caption=caption, caption_justify="left")
    lines = [_cells(row) for row in rows if row.group == group]
    for head in COLUMNS:
        if any(cells.get(head, EMPTY) != EMPTY for cells in lines):
            table.add_column(head, justify="left" if head in ("", "aim") else "right")
    for cells in lines:
        table.add_row(*(cells.get(str(column.header), EMPTY) for column in table.columns))
    return table


def line(row: Row) -> str:
    """A row in short, for a log."""
    found = figures(row)
    if not found:
        return f"{row.name}: failed, {row.failed.splitlines()[0] if row.failed else 'not timed'}"
    ours = found.get(TUNED) or found[DEFAULT]
    speeds = ", ".join(f"{_times(ratio)} {peer}" for peer, ratio in ours["speed"].items())
    near = f"{_percent(ours['of_peak'])} of the peak" if row.group == "prefill" else f"{_times(ours['over_floor'])} the floor"
    return f"{row.name}: {ours['ms']:.2f} ms, {near}, {speeds}"


COLUMNS = (
    "", "einfall ms", "tuned ms", "spread", "GFLOP/s", "of peak", "GB/s", "of roof", "× floor", "best peer ms", "× own", "× SDPA/torch",
    "× eager", "× inductor", "× MetaSchedule", "aim",
)  # fmt: skip


def _cells(row: Row) -> dict[str, str]:
    """What a row has to say under each heading."""
    found = figures(row)
    if not found:
        return {"": row.name, "einfall ms": f"[red]{row.failed.splitlines()[0] if row.failed else 'not timed'}[/red]"}
    ours = found.get(TUNED) or found[DEFAULT]
    best, speed = ours["best_peer"], ours["speed"]
    theirs = next((name for name in row.peers if name not in (*row.own, EAGER)), "")
    tuned = f"{found[TUNED]['ms']:.2f}" if TUNED in found else "= default" if row.same else "failed" if TUNED in row.skipped else EMPTY
    moves = row.group != "prefill"
    computes = row.group in ("prefill", "decode", "fused")
    return {
        "": row.name,
        "einfall ms": f"{found[DEFAULT]['ms']:.2f}",
        "tuned ms": tuned,
        "spread": f"{ours['spread']:.0%}",
        "GFLOP/s": f"{ours['gflops']:.0f}" if computes else EMPTY,
        "of peak": _percent(ours["of_peak"]) if computes else EMPTY,
        "GB/s": f"{ours['gbytes']:.1f}" if moves else EMPTY,
        "of roof": _percent(ours["of_roof"]) if moves else EMPTY,
        "× floor": _times(ours["over_floor"]),
        "best peer ms": f"{row.samples[best].median:.2f} {best}" if best else EMPTY,
        "× own": _times(next((speed[name] for name in row.own if name in speed), None)),
        "× SDPA/torch": _times(speed.get(theirs)),
        "× eager": _times(speed.get(EAGER)),
        "× inductor": _times(speed.get(INDUCTOR)),
        "× MetaSchedule": _times(speed.get(METASCHEDULE)),
        "aim": ", ".join(_aim(aim) for aim in ours["aims"]) or EMPTY,
    }


def _aim(aim: dict[str, Any]) -> str:
    """An aim, and whether it is met where that is known."""
    return aim["aim"] if aim["met"] is None else f"{aim['aim']} {'✓' if aim['met'] else '✗'}"


def _percent(share: float | None) -> str:
    return EMPTY if share is None else f"{share:.0%}"


def _times(ratio: float | None) -> str:
    return EMPTY if ratio is None else f"{ratio:.2f}×"


def to_json(machine: dict[str, Any], limits: Sequence[tuple[Floor, Samples]], rows: Sequence[Row], options: dict[str, Any]) -> str:
    """Everything, raw samples included."""
    floors = [{"kind": f.kind, "amount": f.amount, "rate": f.rate(s), **s.to_dict()} for f, s in limits]
    found = {"machine": machine, "options": options, "limits": floors, "rows": [r.to_dict() for r in rows]}
    return json.dumps(found, indent=1, default=str)


def draw(rows: Sequence[Row], machine: dict[str, Any], path: Path) -> None:
    """A bar for every subject of every row: how many times as fast as the first peer it is, and where the floor lies."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    timed = [row for row in rows if figures(row)]
    heights = [len(row.subjects) + 1 for row in timed]
    figure = Figure(figsize=(9, 1.2 + 0.17 * sum(heights)), layout="constrained")
    axes = figure.add_subplot()
    y, ticks = 0.0, []
    named: set[str] = set()
    for row in timed:
        first = row.samples[row.first].median
        bars = row.subjects
        ticks.append((y + (len(bars) - 1) / 2, row.name))
        least = figures(row)["floor_ms"]
        for name in bars:
            label = name if name in COLORS else OWN if name in row.own else TORCH
            speed = first / row.samples[name].median
            axes.barh(y, speed, 0.9, color=COLORS[label], label=None if label in named else label)
            named.add(label)
            y += 1
        if least:
            label = None if "floor" in named else "floor"
            axes.plot([first / least] * 2, [y - len(bars) - 0.6, y - 0.4], color="#b00020", lw=1.5, label=label)
            named.add("floor")
        y += 1
    axes.axvline(1, color="#888888", lw=0.8)
    axes.set_yticks([place for place, _ in ticks], [name for _, name in ticks], fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("speed, as a multiple of the row's first peer:\ntorch SDPA, our kernel without the feature, or eager PyTorch")
    versions = machine.get("versions", {})
    title = f"{machine.get('processor')}, {machine.get('cores')} cores · torch {versions.get('torch')} · {str(machine.get('commit'))[:12]}"
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, loc="lower right")
    FigureCanvasAgg(figure).print_png(str(path))
