"""A database as a whole: what is in it, how two differ, whether it is sound, and tidying up."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from . import Database, choice, queries, schema
from .rows import MEASUREMENT, TABLES, Invalid, Table
from .storing import check_descriptions

MAX_FAULTS = 1000


def stats(database: Database) -> dict[str, Any]:
    """How much of what is in the file: rows, outcomes, machines, runs, transfers."""
    connection = database.connection
    with schema.explained(database.path):
        pages, size = (connection.execute(f"PRAGMA {name}").fetchone()[0] for name in ("page_count", "page_size"))
        counted = {table.name: connection.execute(f"SELECT count(*) FROM {table.name}").fetchone()[0] for table in TABLES}
        measured = (
            "SELECT device.model AS device, measurement.host AS host, toolchain.version AS version, toolchain.abi AS abi, "
            "toolchain.backend AS backend, count(*) AS measurements, count(DISTINCT run) AS runs, "
            "count(DISTINCT workload) AS workloads, sum(status = 'ok') AS ok "
            "FROM measurement JOIN device ON device.id = measurement.device JOIN toolchain ON toolchain.id = measurement.toolchain "
            "GROUP BY measurement.device, measurement.host, measurement.toolchain ORDER BY 1, 2, 3, 4"
        )
        return {
            "path": str(database.path),
            "identity": _identity(connection),
            "schema": connection.execute("PRAGMA user_version").fetchone()[0],
            "bytes": pages * size,
            "rows": {**counted, "best": connection.execute("SELECT count(*) FROM best").fetchone()[0]},
            "statuses": dict(connection.execute("SELECT status, count(*) FROM measurement GROUP BY status ORDER BY status").fetchall()),
            "bases": dict(connection.execute("SELECT basis, count(*) FROM measurement GROUP BY basis ORDER BY basis").fetchall()),
            "measured": list(queries.rows(connection, measured)),
            "transfers": list(queries.rows(connection, "SELECT kind, place, content, first, last FROM transfer ORDER BY number")),
        }


def _identity(connection: sqlite3.Connection) -> str:
    row = connection.execute("SELECT value FROM about WHERE name = 'identity'").fetchone()
    return "" if row is None else str(row[0])


def diff(a: Database, b: Database) -> dict[str, Any]:
    """What one file knows and the other does not, and where they disagree on the winner."""
    names = [{row[0] for row in each.read("SELECT id FROM measurement")} for each in (a, b)]
    winners = [{(r.workload, r.device, r.toolchain, r.policy): r for r in each.ls()} for each in (a, b)]
    changed = []
    for key in sorted({*winners[0], *winners[1]}):
        before, after = winners[0].get(key), winners[1].get(key)
        if before is not None and after is not None and before.schedule == after.schedule:
            continue
        known = before or after
        assert known is not None
        changed.append({
            "workload": known.workload, "name": known.name, "extents": dict(known.extents), "device": known.device,
            "device_model": known.device_model, "toolchain": known.toolchain, "policy": known.policy,
            "first": None if before is None else {"schedule_id": before.schedule.hash, "median_ms": before.median_ms},
            "second": None if after is None else {"schedule_id": after.schedule.hash, "median_ms": after.median_ms},
        })  # fmt: skip
    return {
        "first": str(a.path), "second": str(b.path),
        "measurements": {"both": len(names[0] & names[1]), "first": len(names[0] - names[1]), "second": len(names[1] - names[0])},
        "winners": changed,
    }  # fmt: skip


def verify(database: Database) -> list[dict[str, str]]:
    """Everything that is wrong with the file, up to a thousand faults; empty for a sound one.

    The file's structure, whether each row hashes to its name and holds sensible values, whether what it refers to is there, and
    whether the winners are those that the measurements give.
    """
    found = _faults(database)
    return [{"table": table, "id": name, "fault": fault} for (table, name, fault), _ in zip(found, range(MAX_FAULTS), strict=False)]


def _faults(database: Database) -> Iterator[tuple[str, str, str]]:
    connection = database.connection
    with schema.explained(database.path):
        for (line,) in connection.execute("PRAGMA integrity_check").fetchall():
            if line != "ok":
                yield "", "", f"SQLite says: {line}"
        for table in TABLES:
            yield from _rows_at_fault(connection, table)
        for name in ("workload", "device", "toolchain", "policy", "schedule", "code", "evidence"):
            sql = f"SELECT id, {name} FROM measurement WHERE {name} IS NOT NULL AND {name} NOT IN (SELECT id FROM {name})"
            for own, other in connection.execute(sql).fetchall():
                yield "measurement", str(own), f"its {name} {other} is missing"
        yield from _winners_at_fault(connection)


def _rows_at_fault(connection: sqlite3.Connection, table: Table) -> Iterator[tuple[str, str, str]]:
    for row in connection.execute(f"SELECT {', '.join(table.names)} FROM {table.name}"):
        if not table.is_named_right(row[0], row[1:]):
            yield table.name, str(row[0])[:40], "it does not hash to its name"
            continue
        try:
            check_descriptions(table, row)
        except Invalid as error:
            yield table.name, row[0], str(error)


def _winners_at_fault(connection: sqlite3.Connection) -> Iterator[tuple[str, str, str]]:
    columns = ("workload", "device", "toolchain", "policy")
    sql = f"SELECT {', '.join(columns)} FROM {{}}"
    keys = {*connection.execute(sql.format("best")).fetchall(), *connection.execute(sql.format("measurement")).fetchall()}
    where = " AND ".join(f"{name} = ?" for name in columns)
    for key in sorted(keys, key=str):
        kept = queries.one(connection, f"SELECT * FROM best WHERE {where}", key)
        if kept != choice.best_row(connection, key):
            yield "best", str(key[0])[:40], "the winner is not the one that the measurements give; `einfall db gc` derives it again"


def gc(database: Database, *, damaged: bool = False) -> dict[str, Any]:
    """Removes what nothing refers to, derives the winners again, and gives space back; what was removed, by table.

    Measurements stay, unless `damaged` ones that do not hash to their name are to go as well.
    """
    removed: dict[str, int] = {}
    with database.writing() as connection:
        if damaged:
            for table in TABLES:
                removed[table.name] = _remove_damaged(connection, table)
        for table in TABLES[:-1]:
            sql = f"DELETE FROM {table.name} WHERE id NOT IN (SELECT {table.name} FROM measurement WHERE {table.name} IS NOT NULL)"
            removed[table.name] = removed.get(table.name, 0) + connection.execute(sql).rowcount
        removed["lease"] = connection.execute("DELETE FROM lease WHERE state = 'done'").rowcount
        winners = choice.rebuild(connection)
    before = _size(database.path)
    with schema.explained(database.path):
        database.connection.execute("VACUUM")
        database.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return {"removed": removed, "winners": winners, "bytes_before": before, "bytes_after": _size(database.path)}


def _remove_damaged(connection: sqlite3.Connection, table: Table) -> int:
    key = "number" if table is MEASUREMENT else "id"
    rows = connection.execute(f"SELECT {key}, {', '.join(table.names)} FROM {table.name}").fetchall()
    keys = [(row[0],) for row in rows if not table.is_named_right(row[1], row[2:])]
    connection.executemany(f"DELETE FROM {table.name} WHERE {key} IS ?", keys)
    return len(keys)


def _size(path: Path) -> int:
    def sizes() -> Iterable[int]:
        for name in (path, path.with_name(path.name + "-wal")):
            with contextlib.suppress(OSError):
                yield name.stat().st_size

    return sum(sizes())
