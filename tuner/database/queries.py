"""Reading a database, and choosing a winner from measurements: pure functions over a connection or over rows.

A winner is chosen from the union of the measurements of a key, whatever the order in which they came, so that two databases
that hold the same measurements agree. Interleaved finals, as ratios to the default of the same group, outrank trials; the
medians decide, and within the noise of the medians the smallest schedule hash does.
"""

from __future__ import annotations

import sqlite3
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from .records import Invalid, Record, Sampled, parse_schedule, parse_workload

MIN_SAMPLES = 3  # one sample is off its median by up to 6 %
MAX_TIE = 0.02  # noise never makes a schedule win that is slower by more than this
Key = tuple[str, str, str, str]
Row = Mapping[str, Any]

_KEYED = "SELECT * FROM measurement WHERE workload = ? AND device = ? AND toolchain = ? AND policy = ? AND status = 'ok'"
_BEST = (
    "SELECT best.*, workload.name AS name, device.model AS model FROM best "
    "JOIN workload ON workload.id = best.workload JOIN device ON device.id = best.device"
)


@dataclass(frozen=True, slots=True)
class Choice:
    """The winner of a key: its schedule, the latest measurement of it, and its medians over all samples."""

    schedule_id: str
    measurement: str
    median_ms: float
    relative: float | None
    samples: int


def choose(measurements: Iterable[Sampled]) -> Choice | None:
    """The winner among verified measurements, or None without any. Independent of their order."""
    usable = [m for m in measurements if m.status == "ok" and m.evidence is not None and len(m.samples_ms) >= MIN_SAMPLES]
    finals = [m for m in usable if m.role == "final" and m.baseline_ms is not None]
    groups: dict[str, list[Sampled]] = {}
    for m in finals or usable:
        groups.setdefault(m.schedule_id, []).append(m)
    if not groups:
        return None
    pooled = {name: [x for m in members for x in (_relative(m) if finals else m.samples_ms)] for name, members in groups.items()}
    centre = {name: statistics.median(values) for name, values in pooled.items()}
    fastest = min(centre.values())
    noise = {name: error_of_median(values) for name, values in pooled.items()}
    least = min(noise[name] for name in centre if centre[name] == fastest)
    tied = [name for name in centre if centre[name] - fastest <= min(noise[name] + least, MAX_TIE * fastest)]
    winner = min(tied)
    members = groups[winner]
    samples = [x for m in members for x in m.samples_ms]
    return Choice(
        schedule_id=winner,
        measurement=max(m.id for m in members),
        median_ms=statistics.median(samples),
        relative=centre[winner] if finals else None,
        samples=len(samples),
    )


def _relative(m: Sampled) -> list[float]:
    return [x / (m.baseline_ms or 1.0) for x in m.samples_ms]


def error_of_median(values: Sequence[float]) -> float:
    """The standard error of the median, from the median absolute deviation: robust against a few slow samples."""
    centre = statistics.median(values)
    deviation = statistics.median(abs(x - centre) for x in values)
    return float(1.2533 * 1.4826 * deviation / len(values) ** 0.5)


def valid_samples(rows: Iterable[Row]) -> Iterator[Sampled]:
    """The rows of `measurement` that can be used; the others are passed over."""
    for row in rows:
        try:
            yield Sampled.from_row(row)
        except Invalid:
            continue


def best_row(connection: sqlite3.Connection, key: Key) -> dict[str, Any] | None:
    """The row of `best` that the measurements of `key` (workload, device, toolchain, policy) give, or None."""
    choice = choose(valid_samples(rows(connection, _KEYED, key)))
    if choice is None:
        return None
    workload = one(connection, "SELECT family, extents, bucket FROM workload WHERE id = ?", key[:1])
    schedule = one(connection, "SELECT json FROM schedule WHERE id = ?", (choice.schedule_id,))
    policy = one(connection, "SELECT mode, cache FROM policy WHERE id = ?", key[3:])
    if workload is None or schedule is None or policy is None:
        return None
    try:
        parse_workload(key[0], workload["family"], workload["extents"])
        parse_schedule(schedule["json"], choice.schedule_id)
    except Invalid:
        return None
    return {
        **dict(zip(("workload", "device", "toolchain", "policy"), key, strict=True)),
        **workload,
        "preference": 2 * (policy["mode"] != "eager") + (policy["cache"] != "cold"),
        "schedule": choice.schedule_id, "schedule_json": schedule["json"], "measurement": choice.measurement,
        "median_ms": choice.median_ms, "relative": choice.relative, "samples": choice.samples,
    }  # fmt: skip


def all_keys(connection: sqlite3.Connection) -> list[Key]:
    """Every (workload, device, toolchain, policy) with a successful measurement."""
    sql = "SELECT DISTINCT workload, device, toolchain, policy FROM measurement WHERE status = 'ok' ORDER BY 1, 2, 3, 4"
    return [tuple(row) for row in connection.execute(sql)]


def best_records(connection: sqlite3.Connection, where: str = "", parameters: Sequence[object] = ()) -> Iterator[Record]:
    """The usable rows of `best`, preferred policy first within a key."""
    order = " ORDER BY workload.name, best.extents, best.device, best.toolchain, best.preference"
    for row in rows(connection, _BEST + (f" WHERE {where}" if where else "") + order, parameters):
        try:
            yield Record.from_row(row)
        except Invalid:
            continue


def known_results(connection: sqlite3.Connection, key: Key) -> dict[str, Sampled]:
    """The first usable trial of every schedule of a key, failures included, by schedule hash: what a resumed run need not measure."""
    sql = (
        "SELECT * FROM measurement WHERE workload = ? AND device = ? AND toolchain = ? AND policy = ? AND role = 'trial' "
        "ORDER BY schedule, id"
    )
    grouped = groupby(valid_samples(rows(connection, sql, key)), key=lambda m: m.schedule_id)
    return {schedule: next(members) for schedule, members in grouped}


def describe(connection: sqlite3.Connection, name: str) -> list[dict[str, Any]]:
    """What an id, or the beginning of one, names: rows of any table, each with its table under `kind`."""
    found: list[dict[str, Any]] = []
    for kind in ("workload", "device", "toolchain", "policy", "schedule", "code", "measurement"):
        sql = f"SELECT * FROM {kind} WHERE substr(id, 1, length(?)) = ? ORDER BY id LIMIT 20"
        found.extend({"kind": kind, **row} for row in rows(connection, sql, (name, name)))
    return found


def count_statuses(connection: sqlite3.Connection, workload: str) -> dict[str, int]:
    """How many measurements of a workload ended how."""
    sql = "SELECT status, count(*) AS number FROM measurement WHERE workload = ? GROUP BY status ORDER BY status"
    return {str(row["status"]): int(row["number"]) for row in rows(connection, sql, (workload,))}


def rows(connection: sqlite3.Connection, sql: str, parameters: Sequence[object] = ()) -> Iterator[dict[str, Any]]:
    """The rows of a query as dictionaries."""
    cursor = connection.execute(sql, tuple(parameters))
    names = [column[0] for column in cursor.description]
    return (dict(zip(names, row, strict=True)) for row in cursor)


def one(connection: sqlite3.Connection, sql: str, parameters: Sequence[object] = ()) -> dict[str, Any] | None:
    """The first row of a query, or None."""
    return next(rows(connection, sql, parameters), None)


