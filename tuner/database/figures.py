"""What pages show: winners with their distance from the roof, tuning curves, machines; and the drawings, written as SVG.

The pages are those of the server and of `einfall report`.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from html import escape
from math import ceil, floor, log10
from typing import Any

from ...compiler.cost import cost
from ...ir.errors import EinfallError
from ...ir.text import parse_cascade
from ...ir.types import DTYPES
from ...schedules.target import Target, load_target, target_names
from ..device import describe_device
from . import Database, Record, queries
from .records import event_time

MAX_WINNERS = 500
MAX_DRAWN = 2000
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 320, 70, 20, 24, 44


def winners(database: Database) -> list[dict[str, Any]]:
    """The winners, each with its operations and bytes, and the least time its device could take where it is described."""
    cascades = dict(database.read("SELECT id, cascade FROM workload"))
    devices = {row["id"]: row for row in queries.rows(database.connection, "SELECT * FROM device")}
    return [winner_figures(r, cascades.get(r.workload, ""), devices.get(r.device, {})) for r in database.ls()[:MAX_WINNERS]]


def winner_figures(r: Record, cascade: str, device: Mapping[str, Any]) -> dict[str, Any]:
    """A winner with its operations and bytes, and the least time its device could take; None for what is not known."""
    target = target_of(str(device.get("id", "")), str(device.get("vendor", "")), str(device.get("arch", "")))
    work = _work(cascade, r.extents, target or "cpu")
    floor_ms = None if work is None or target is None else work[2] / 1e3
    return {
        **r.to_dict(),
        "extents_text": ", ".join(f"{rank}={extent}" for rank, extent in r.extents),
        "flops": None if work is None else work[0],
        "bytes": None if work is None else work[1],
        "floor_ms": floor_ms,
        "of_roof": None if floor_ms is None else floor_ms / r.median_ms,
        "target": target,
    }


@lru_cache(1024)
def _work(text: str, extents: tuple[tuple[str, int], ...], target: str) -> tuple[int, int, float] | None:
    """Operations, bytes and the least microseconds of a cascade; None for one that cannot be read."""
    try:
        found = cost(parse_cascade(text), dict(extents), load_target(target))
    except (EinfallError, RecursionError, OverflowError, ZeroDivisionError):
        return None
    return found.flops, found.traffic_bytes, found.roofline.time_us


@lru_cache(256)
def target_of(device: str, vendor: str, arch: str) -> str | None:
    """The description that fits a device: that of its architecture, or of this machine if it is the same; None if there is none."""
    if vendor == "cpu":
        return "cpu" if describe_device(load_target("cpu")).id == device else None
    return next((name for name in target_names() if vendor == "nvidia" and name == f"cuda:{arch}"), None)


def rooflines(found: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """A drawing for each device: the rate of its winners over their intensity, under its roof where that is known."""
    shown = []
    for device in dict.fromkeys(w["device"] for w in found):
        mine = [w for w in found if w["device"] == device and w["flops"] and w["bytes"]]
        if mine:
            target = load_target(mine[0]["target"]) if mine[0]["target"] else None
            known = "" if target is None else target.name
            shown.append({"device": mine[0]["device_model"], "known": known, "svg": _roofline(mine, target)})
    return shown


def _roofline(found: Sequence[Mapping[str, Any]], target: Target | None) -> str:
    points = [(w["flops"] / w["bytes"], w["flops"] / w["median_ms"] * 1e3, f"{w['name']} {w['extents_text']}") for w in found]
    roofs = [] if target is None else [(target.peak("matrix", DTYPES[name])[2], name) for name in ("f32", "bf16")]
    bandwidth = 0.0 if target is None else target.memory.bandwidth
    rates = [rate for _, rate, _ in points] + [peak for peak, _ in roofs]
    knees = [peak / bandwidth for peak, _ in roofs]
    axes = Axes(_decades([x for x, _, _ in points] + knees), _decades(rates), logarithmic=(True, True))
    lines = axes.grid("operations a byte", "operations a second")
    for peak, name in roofs:
        begin = max(10.0 ** axes.x[0], 10.0 ** axes.y[0] / bandwidth)
        lines.append(axes.path([(begin, bandwidth * begin), (peak / bandwidth, peak), (10.0 ** axes.x[1], peak)], "roof"))
        x, y = axes.at(10.0 ** axes.x[1], peak)
        lines.append(f'<text x="{x - 4:.1f}" y="{y - 5:.1f}" text-anchor="end">{name}</text>')
    lines.extend(axes.dot(x, y, label, "won") for x, y, label in points)
    return axes.svg(lines, "roofline")


def curves(database: Database, workload: str, key: tuple[str, str, str] | None = None) -> list[dict[str, Any]]:
    """A tuning curve for each run of a workload: every trial, and the best so far.

    `key`, a device, a toolchain and a policy, leaves out the others.
    """
    runs: dict[str, list[dict[str, Any]]] = {}
    for row in trial_rows(database, workload, key):
        runs.setdefault(str(row["run"]), []).append(row)
    return [
        {
            "run": run, "host": trials[0]["host"], "seed": trials[0]["seed"], "time": event_time(str(trials[0]["event"])),
            "trials": len(trials), "failures": sum(t["status"] != "ok" for t in trials), "svg": _curve(trials),
        }
        for run, trials in runs.items()
    ]  # fmt: skip


def trial_rows(database: Database, workload: str, key: tuple[str, str, str] | None = None) -> list[dict[str, Any]]:
    """The trials of a workload by run and in their order, `MAX_DRAWN` at most."""
    sql = (
        "SELECT run, trial, schedule, status, median_ms, host, seed, driver, memory_bytes, code_commit, event FROM measurement "
        "WHERE workload = ? AND role = 'trial' AND basis = 'measured'"
    )
    only = "" if key is None else " AND device = ? AND toolchain = ? AND policy = ?"
    return list(queries.rows(database.connection, f"{sql}{only} ORDER BY run, trial, number LIMIT ?", (workload, *(key or ()), MAX_DRAWN)))


def is_time(value: object) -> bool:
    """Whether a value out of a file is a time that can be drawn."""
    return isinstance(value, float) and 0 < value < 1e300


def _curve(trials: Sequence[Mapping[str, Any]]) -> str:
    timed = [t for t in trials if is_time(t["median_ms"])]
    if not timed:
        return ""
    times = [t["median_ms"] for t in timed]
    span = (log10(min(times)), log10(max(times)))
    margin = 0.05 * (span[1] - span[0]) + 0.01
    axes = Axes((0, max(len(trials), 2)), (span[0] - margin, span[1] + margin), logarithmic=(False, True))
    lines = axes.grid("trials", "milliseconds")
    best: list[tuple[float, float]] = []
    for number, t in enumerate(trials):
        if t["status"] != "ok":
            lines.append(axes.dot(number, 10 ** axes.y[0], f"{t['status']} {t['schedule']}", "failed"))
    for number, t in enumerate(trials):
        if t in timed:
            lines.append(axes.dot(number, t["median_ms"], f"{t['median_ms']:.5g} ms {t['schedule']}", "tried"))
            if best:
                best.append((number, best[-1][1]))
            best.append((number, min(t["median_ms"], best[-1][1] if best else t["median_ms"])))
    lines.append(axes.path([*best, (len(trials), best[-1][1])], "roof"))
    return axes.svg(lines, "tuning curve")


def rank_plot(points: Sequence[tuple[int, int, str]]) -> str:
    """Predicted ranks across, measured ranks upwards; the diagonal is a model that is always right."""
    most = max(2, *(max(x, y) for x, y, _ in points))
    axes = Axes((0, most), (0, most), logarithmic=(False, False))
    lines = [*axes.grid("predicted rank", "measured rank"), axes.path([(0, 0), (most, most)], "roof")]
    lines.extend(axes.dot(x, y, label, "tried") for x, y, label in points)
    return axes.svg(lines, "predicted and measured ranks")


def machines(database: Database) -> list[dict[str, Any]]:
    """Who measured what where."""
    sql = (
        "SELECT host, device.model AS device, driver, measurement.name AS kernel, count(DISTINCT workload) AS workloads, "
        "count(*) AS measurements, sum(status <> 'ok') AS failures, count(DISTINCT run) AS runs, max(event) AS latest FROM measurement "
        "JOIN device ON device.id = measurement.device GROUP BY host, device.id, driver, measurement.name "
        "ORDER BY measurements DESC LIMIT 500"
    )
    try:
        return [{**row, "latest": event_time(str(row["latest"]))} for row in queries.rows(database.connection, sql)]
    except sqlite3.Error:
        return []


def _decades(values: Iterable[float]) -> tuple[float, float]:
    known = [v for v in values if 0 < v < 1e300]
    return floor(log10(min(known)) - 0.1), ceil(log10(max(known)) + 0.1)


class Axes:
    """A plane of two ranges, those of a logarithmic axis in decades, and the marks on it."""

    def __init__(self, x: tuple[float, float], y: tuple[float, float], *, logarithmic: tuple[bool, bool]) -> None:
        self.x, self.y, self._logarithmic = x, y, logarithmic

    def at(self, x: float, y: float) -> tuple[float, float]:
        """Where a point of the plane is on the drawing."""
        across, up = (log10(v) if log else v for v, log in zip((x, y), self._logarithmic, strict=True))
        right = (across - self.x[0]) / (self.x[1] - self.x[0])
        above = (up - self.y[0]) / (self.y[1] - self.y[0])
        return LEFT + right * (WIDTH - LEFT - RIGHT), HEIGHT - BOTTOM - above * (HEIGHT - TOP - BOTTOM)

    def grid(self, across: str, up: str) -> list[str]:
        """Lines and labels."""
        lines = []
        for v in _ticks(self.x, self._logarithmic[0]):
            x, _ = self.at(v, 10 ** self.y[0] if self._logarithmic[1] else self.y[0])
            lines.append(f'<path class="grid" d="M{x:.1f} {TOP}V{HEIGHT - BOTTOM}"/>')
            lines.append(f'<text x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{v:.3g}</text>')
        for v in _ticks(self.y, self._logarithmic[1]):
            _, y = self.at(10 ** self.x[0] if self._logarithmic[0] else self.x[0], v)
            lines.append(f'<path class="grid" d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}"/>')
            lines.append(f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{v:.3g}</text>')
        lines.append(f'<text x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 8}" text-anchor="middle">{escape(across)}</text>')
        lines.append(f'<text x="{LEFT}" y="{TOP - 8}">{escape(up)}</text>')
        return lines

    def dot(self, x: float, y: float, label: str, kind: str) -> str:
        """A point that tells its label when pointed at."""
        across, up = self.at(x, y)
        return f'<circle class="{kind}" cx="{across:.1f}" cy="{up:.1f}" r="4"><title>{escape(label)}</title></circle>'

    def path(self, points: Sequence[tuple[float, float]], kind: str) -> str:
        """A line through points."""
        places = "L".join(f"{x:.1f} {y:.1f}" for x, y in (self.at(*point) for point in points))
        return f'<path class="{kind}" d="M{places}"/>'

    def svg(self, lines: Sequence[str], label: str) -> str:
        """The drawing."""
        return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" role="img" aria-label="{escape(label)}">{"".join(lines)}</svg>'


def _ticks(span: tuple[float, float], logarithmic: bool) -> list[float]:
    if not logarithmic:
        step = max(1, ceil((span[1] - span[0]) / 8))
        return [float(v) for v in range(int(span[0]), int(span[1]) + 1, step)]
    decades = [10.0**d for d in range(ceil(span[0]), floor(span[1]) + 1)]
    if len(decades) >= 2:
        return decades
    return [10 ** (span[0] + (span[1] - span[0]) * part / 4) for part in range(5)]
