"""The findings as a table, as JSON and as a picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.floors import Floor
from benchmarks.protocol import Samples
from benchmarks.run import DEFAULT, INDUCTOR, METASCHEDULE, TUNED, Row, figures

TITLES = {"prefill": "Attention over a whole prompt", "fused": "Other fused cascades"}
COLORS = {DEFAULT: "#1b6ca8", TUNED: "#0b3c5d", INDUCTOR: "#d9a441", METASCHEDULE: "#8d6cab", "eager": "#c9c9c9"}


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
    """One line a case: our times, the share of the peak, the distance to the floor, and how many times as long each peer takes."""
    caption = "× a peer: how many times as long it takes as einfall's best; × floor: how many times as long einfall takes as it must"
    table = Table(title=TITLES[group], title_justify="left", caption=caption, caption_justify="left")
    ours = ("", "einfall ms", "tuned ms", "spread", "GFLOP/s", "of peak", "× floor")
    heads = (*ours, "best peer ms", "× SDPA/torch", "× eager", "× inductor")
    others = any(METASCHEDULE in row.samples for row in rows)
    for column in (*heads, *(("× MetaSchedule",) if others else ())):
        table.add_column(column, justify="left" if not column else "right")
    for row in rows:
        if row.group == group:
            table.add_row(*_cells(row, others))
    return table


def line(row: Row) -> str:
    """A row in short, for a log."""
    found = figures(row)
    if not found:
        return f"{row.name}: failed, {row.failed.splitlines()[0] if row.failed else 'not timed'}"
    ours = found.get(TUNED) or found[DEFAULT]
    speeds = ", ".join(f"{_times(ratio)} {peer}" for peer, ratio in ours["speed"].items())
    return f"{row.name}: {ours['ms']:.2f} ms, {_percent(ours['of_peak'])} of the peak, {speeds}"


def _cells(row: Row, others: bool) -> list[str]:
    found = figures(row)
    if not found:
        return [row.name, f"[red]{row.failed.splitlines()[0] if row.failed else 'not timed'}[/red]"]
    ours = found.get(TUNED) or found[DEFAULT]
    first = row.peers[0] if row.peers[0] != "eager" else None
    best = ours["best_peer"]
    tuned = f"{found[TUNED]['ms']:.2f}" if TUNED in found else "–"
    cells = [
        row.name,
        f"{found[DEFAULT]['ms']:.2f}",
        tuned,
        f"{ours['spread']:.0%}",
        f"{ours['gflops']:.0f}",
        _percent(ours["of_peak"]),
        _times(ours["over_floor"]),
        f"{row.samples[best].median:.2f} {best}" if best else "–",
        *(_times(ours["speed"].get(peer)) for peer in (first, "eager", INDUCTOR)),
    ]
    return [*cells, _times(ours["speed"].get(METASCHEDULE))] if others else cells


def _percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.0%}"


def _times(ratio: float | None) -> str:
    return "–" if ratio is None else f"{ratio:.2f}×"


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
    heights = [len(_bars(row)) + 1 for row in timed]
    figure = Figure(figsize=(9, 1.2 + 0.17 * sum(heights)), layout="constrained")
    axes = figure.add_subplot()
    y, ticks = 0.0, []
    named: set[str] = set()
    for row in timed:
        first = row.samples[row.peers[0]].median
        bars = _bars(row)
        ticks.append((y + (len(bars) - 1) / 2, row.name))
        least = figures(row)["floor_ms"]
        for name in bars:
            label = name if name in COLORS else "SDPA / torch"
            speed = first / row.samples[name].median
            axes.barh(y, speed, 0.9, color=COLORS.get(label, "#7fb069"), label=None if label in named else label)
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
    axes.set_xlabel("speed, as a multiple of the first peer (torch SDPA for attention)")
    versions = machine.get("versions", {})
    title = f"{machine.get('processor')}, {machine.get('cores')} cores · torch {versions.get('torch')} · {str(machine.get('commit'))[:12]}"
    axes.set_title(title, fontsize=9)
    axes.legend(fontsize=7, loc="lower right")
    FigureCanvasAgg(figure).print_png(str(path))


def _bars(row: Row) -> list[str]:
    """The subjects that are drawn, ours first; floors are drawn as lines."""
    floors = {name for name, _, _ in row.floors}
    return [name for name in row.samples if name not in floors]
