"""Reading a database: pure functions over a connection. What cannot be used is passed over."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any, TypeAlias

from .records import Invalid, Record, Sampled

Row: TypeAlias = Mapping[str, Any]

_BEST = (
    "SELECT best.*, measurement.name AS name, device.model AS model FROM best "
    "JOIN measurement ON measurement.id = best.measurement JOIN device ON device.id = best.device"
)
_KINDS = ("workload", "device", "toolchain", "policy", "schedule", "code", "evidence", "measurement")


def valid_samples(found: Iterable[Row]) -> Iterator[Sampled]:
    """The rows of `measurement` that can be used; the others are passed over."""
    for row in found:
        try:
            yield Sampled.from_row(row)
        except Invalid:
            continue


def best_records(connection: sqlite3.Connection, where: str = "", parameters: Sequence[object] = ()) -> Iterator[Record]:
    """The usable rows of `best`, preferred policy first within a key."""
    order = " ORDER BY measurement.name, best.extents, best.device, best.toolchain, best.preference, best.workload"
    for row in rows(connection, _BEST + (f" WHERE {where}" if where else "") + order, parameters):
        try:
            yield Record.from_row(row)
        except Invalid:
            continue


def known_results(connection: sqlite3.Connection, key: Sequence[str]) -> dict[str, Sampled]:
    """The first usable trial of every schedule of a key, failures included, by schedule hash: what a resumed run need not measure."""
    sql = (
        "SELECT * FROM measurement WHERE workload = ? AND device = ? AND toolchain = ? AND policy = ? AND role = 'trial' "
        "AND basis = 'measured' ORDER BY schedule, number"
    )
    grouped = groupby(valid_samples(rows(connection, sql, key)), key=lambda m: m.schedule_id)
    return {schedule: next(members) for schedule, members in grouped}


def describe(connection: sqlite3.Connection, name: str) -> list[dict[str, Any]]:
    """What an id, or the beginning of one, names: rows of any table, each with its table under `kind`."""
    found: list[dict[str, Any]] = []
    for kind in _KINDS:
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
