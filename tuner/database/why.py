"""Why a schedule was chosen: who took part, how they fared and how sure that is, what was proven, on which machine, and where each
measurement came from."""

from __future__ import annotations

import sqlite3
import statistics
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ...ir.errors import DatabaseError
from . import Database, choice, queries, schema
from .records import Invalid, Sampled, event_time, evidence_from_row
from .rows import MEASUREMENT

SURE = 1.96  # standard errors to either side: 95 %


@dataclass(frozen=True, slots=True)
class Entrant:
    """A schedule that was measured.

    Args:
        verdict: `wins`, `ties` (within the noise, with a larger hash), `slower`, or why it does not take part.
        median, low, high: in ms, or times of the default's if `relative`; the interval is that of the median, 95 %.
    """

    schedule_id: str
    verdict: str
    relative: bool
    median: float | None = None
    low: float | None = None
    high: float | None = None
    samples: int = 0
    measurements: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "schedule_id": self.schedule_id, "verdict": self.verdict, "relative": self.relative, "median": self.median, "low": self.low,
            "high": self.high, "samples": self.samples, "measurements": list(self.measurements),
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class Why:
    """One choice, explained. `key` has the rows of workload, device, toolchain and policy; `sources` those of the winner's measurements."""

    name: str
    key: Mapping[str, Mapping[str, Any]]
    winner: str | None
    reason: str
    entrants: tuple[Entrant, ...]
    evidence: Mapping[str, Any] | None
    sources: tuple[Mapping[str, Any], ...]
    schedule: str | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "name": self.name, **{kind: dict(row) for kind, row in self.key.items()}, "winner": self.winner, "reason": self.reason,
            "candidates": [e.to_dict() for e in self.entrants], "evidence": self.evidence, "sources": [dict(s) for s in self.sources],
            "schedule": self.schedule,
        }  # fmt: skip


def why(database: Database, name: str) -> list[Why]:
    """The choices for a kernel, by its name or the beginning of a workload's id, one for each device, toolchain and policy.

    Raises `DatabaseError` if nothing was measured for it.
    """
    connection = database.connection
    with schema.explained(database.path):
        sql = (
            "SELECT DISTINCT workload, device, toolchain, policy FROM measurement "
            "WHERE name = ? OR (length(?) >= 4 AND substr(workload, 1, length(?)) = ?) ORDER BY workload, device, toolchain, policy"
        )
        found = [_explain(connection, key) for key in connection.execute(sql, (name,) * 4).fetchall()]
    if not found:
        known = sorted({plain_name(row[0]) for row in database.read("SELECT DISTINCT name FROM measurement LIMIT 50")})
        raise DatabaseError(f"nothing was measured for {name!r}", hint=f"measured were {', '.join(known) or 'none'}")
    return found


def plain_name(name: object) -> str:
    """A name out of a file for a message: quoted and escaped unless it is a plain word."""
    text = str(name)
    return text if text.isidentifier() and text.isascii() else repr(text[:80])


def _explain(connection: sqlite3.Connection, key: choice.Key) -> Why:
    columns = ", ".join(MEASUREMENT.names)
    sql = f"SELECT number, {columns} FROM measurement WHERE workload = ? AND device = ? AND toolchain = ? AND policy = ? ORDER BY number"
    rows = list(queries.rows(connection, sql, key))
    usable: list[Sampled] = []
    outside: dict[str, dict[str, int]] = {}
    for row in rows:
        m, reason = _use(connection, row)
        if m is not None:
            usable.append(m)
        else:
            reasons = outside.setdefault(str(row["schedule"]), {})
            reasons[reason] = reasons.get(reason, 0) + 1
    held = choice.contest(usable)
    chosen = connection.execute(
        "SELECT schedule, schedule_json FROM best WHERE workload = ? AND device = ? AND toolchain = ? AND policy = ?", key
    ).fetchone()
    winner = None if chosen is None else str(chosen[0])
    entrants = _entrants(held, winner, usable, outside)
    members = [m.id for m in held.groups.get(winner or "", ())] if held is not None else []
    mine = [row for row in rows if row["id"] in members]
    return Why(
        name=str(mine[0]["name"] if mine else rows[0]["name"]),
        key={kind: _row(connection, kind, value) for kind, value in zip(("workload", "device", "toolchain", "policy"), key, strict=True)},
        winner=winner,
        reason=_reason(held, winner, len(rows)),
        entrants=entrants,
        evidence=_evidence(connection, mine),
        sources=tuple(_source(connection, row) for row in mine),
        schedule=None if chosen is None else str(chosen[1]),
    )


def _use(connection: sqlite3.Connection, row: Mapping[str, Any]) -> tuple[Sampled | None, str]:
    """The measurement if it takes part in the choice, else why it does not."""
    if not MEASUREMENT.is_named_right(row["id"], [row[name] for name in MEASUREMENT.names[1:]]):
        return None, "damaged: does not hash to its name"
    try:
        m = Sampled.from_row(row)
    except Invalid as error:
        return None, f"unusable: {error}"
    if m.status != "ok":
        return None, f"{m.status}: {m.reason[:60]}".rstrip(": ")
    if m.basis != "measured":
        return None, "estimated, not measured"
    if len(m.samples_ms) < choice.MIN_SAMPLES:
        return None, f"fewer than {choice.MIN_SAMPLES} samples"
    if not choice.has_evidence(connection, m.evidence):
        return None, "no evidence that it is right"
    return m, ""


def _entrants(
    held: choice.Contest | None, winner: str | None, usable: list[Sampled], outside: Mapping[str, Mapping[str, int]]
) -> tuple[Entrant, ...]:
    found = []
    for name in sorted(held.centre, key=lambda n: (held.centre[n], n)) if held is not None else ():
        assert held is not None
        verdict = "wins" if name == winner else "ties" if name in held.tied else "slower"
        margin = SURE * held.noise[name]
        centre, ids = held.centre[name], tuple(m.id for m in held.groups[name])
        found.append(Entrant(name, verdict, held.relative, centre, centre - margin, centre + margin, len(held.pooled[name]), ids))
    inside = {e.schedule_id for e in found}
    left: dict[str, list[Sampled]] = {}
    for m in usable:
        if m.schedule_id not in inside:
            left.setdefault(m.schedule_id, []).append(m)
    for name, members in sorted(left.items(), key=lambda item: (min(statistics.median(m.samples_ms) for m in item[1]), item[0])):
        samples = [x for m in members for x in m.samples_ms]
        ids = tuple(m.id for m in members)
        found.append(Entrant(name, "not in the finals", False, statistics.median(samples), samples=len(samples), measurements=ids))
        inside.add(name)
    for name, reasons in sorted(outside.items()):
        if name not in inside:
            found.append(Entrant(name, "; ".join(reasons), False))
    return tuple(found)


def _reason(held: choice.Contest | None, winner: str | None, count: int) -> str:
    if held is None or winner is None:
        return f"none of {count} measurements is correct, measured and comparable"
    how = "interleaved finals, as ratios to the default of the same run" if held.relative else "trials, as medians; no finals were held"
    tied = [name for name in held.tied if name != winner]
    if winner not in held.centre or (tied and winner > min(tied)):
        return f"the row of the winner is out of date: `einfall db gc` derives it again; by {how}"
    if tied:
        return f"by {how}: not to be told from {', '.join(tied)} within the noise; the smallest hash is taken, so that all agree"
    others = sorted(x for name, x in held.centre.items() if name != winner)
    ahead = f", {100 * (others[0] / held.centre[winner] - 1):.1f} % ahead of the next" if others else ", alone"
    return f"by {how}{ahead}"


def _row(connection: sqlite3.Connection, table: str, name: str) -> Mapping[str, Any]:
    return queries.one(connection, f"SELECT * FROM {table} WHERE id = ?", (name,)) or {"id": name}


def _evidence(connection: sqlite3.Connection, rows: list[dict[str, Any]]) -> Mapping[str, Any] | None:
    """That of the winner's latest measurement."""
    row = queries.one(connection, "SELECT * FROM evidence WHERE id = ?", (rows[-1]["evidence"],)) if rows else None
    try:
        return None if row is None else evidence_from_row(row).to_dict()
    except Invalid:
        return None


def _source(connection: sqlite3.Connection, row: Mapping[str, Any]) -> Mapping[str, Any]:
    """Where one measurement was taken, and how it came into this file."""
    sql = "SELECT kind, place FROM transfer WHERE kind <> 'export' AND first <= ? AND ? <= last ORDER BY number LIMIT 1"
    transfer = connection.execute(sql, (row["number"], row["number"])).fetchone()
    return {
        "measurement": row["id"], "role": row["role"], "median_ms": row["median_ms"], "samples": row["samples"], "host": row["host"],
        "driver": row["driver"], "run": row["run"], "trial": row["trial"], "seed": row["seed"], "commit": row["code_commit"],
        "time": event_time(str(row["event"])),
        "origin": "recorded here" if transfer is None else f"{transfer[0]} {transfer[1]}",
    }  # fmt: skip
