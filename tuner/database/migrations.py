"""The ordered changes that bring a file to the schema this version reads. A released one is never edited; a new one is added below.

    workload  device  toolchain  policy  schedule  code  evidence    what a measurement is of and why it is right: written once
    measurement                                                      append-only facts; `number` counts them in this file
    best                                                             derived from the measurements, rebuilt at will
    transfer                                                         this file's own diary: which numbers came from where
    lease                                                            which work is in whose hands, and how often it cost a worker
    about                                                            the name of this file
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from . import rows

if TYPE_CHECKING:
    from sqlite_utils import Database as Tables
    from sqlite_utils import Migrations

_FIRST_SCHEMA = """
CREATE TABLE workload (id TEXT PRIMARY KEY, family TEXT NOT NULL, name TEXT NOT NULL, cascade TEXT NOT NULL, dtypes TEXT NOT NULL,
    layout TEXT NOT NULL, alignment INTEGER NOT NULL, extents TEXT NOT NULL, bucket TEXT NOT NULL);
CREATE TABLE device (id TEXT PRIMARY KEY, vendor TEXT NOT NULL, model TEXT NOT NULL, arch TEXT NOT NULL, units INTEGER NOT NULL,
    memory_bytes INTEGER NOT NULL, power_cap_w REAL, driver TEXT NOT NULL);
CREATE TABLE toolchain (id TEXT PRIMARY KEY, version TEXT NOT NULL, abi INTEGER NOT NULL, backend TEXT NOT NULL, compiler TEXT NOT NULL);
CREATE TABLE policy (id TEXT PRIMARY KEY, mode TEXT NOT NULL, cache TEXT NOT NULL, timer TEXT NOT NULL, method INTEGER NOT NULL);
CREATE TABLE schedule (id TEXT PRIMARY KEY, version INTEGER NOT NULL, json TEXT NOT NULL);
CREATE TABLE code (id TEXT PRIMARY KEY, backend TEXT NOT NULL, facts TEXT NOT NULL);
CREATE TABLE evidence (id TEXT PRIMARY KEY, oracle TEXT NOT NULL, seeds TEXT NOT NULL, distributions TEXT NOT NULL, shapes TEXT NOT NULL,
    tolerance REAL NOT NULL, largest_error REAL NOT NULL);
CREATE TABLE measurement (id TEXT PRIMARY KEY, workload TEXT NOT NULL REFERENCES workload(id), device TEXT NOT NULL REFERENCES device(id),
    toolchain TEXT NOT NULL REFERENCES toolchain(id), policy TEXT NOT NULL REFERENCES policy(id),
    schedule TEXT NOT NULL REFERENCES schedule(id), code TEXT, evidence TEXT, status TEXT NOT NULL, reason TEXT NOT NULL,
    role TEXT NOT NULL, samples_ms TEXT NOT NULL, median_ms REAL, baseline_ms REAL, run TEXT NOT NULL, trial INTEGER NOT NULL,
    host TEXT NOT NULL, seed INTEGER NOT NULL, code_commit TEXT NOT NULL);
CREATE INDEX measurement_key ON measurement (workload, device, toolchain, policy, status);
CREATE TABLE best (workload TEXT NOT NULL, device TEXT NOT NULL, toolchain TEXT NOT NULL, policy TEXT NOT NULL, family TEXT NOT NULL,
    extents TEXT NOT NULL, bucket TEXT NOT NULL, preference INTEGER NOT NULL, schedule TEXT NOT NULL, schedule_json TEXT NOT NULL,
    measurement TEXT NOT NULL, median_ms REAL NOT NULL, relative REAL, samples INTEGER NOT NULL,
    PRIMARY KEY (workload, device, toolchain, policy));
CREATE INDEX best_lookup ON best (family, extents, device, toolchain, preference);
"""

_SECOND_SCHEMA = """
CREATE TABLE workload (id TEXT PRIMARY KEY, family TEXT NOT NULL, cascade TEXT NOT NULL, layout TEXT NOT NULL, alignment INTEGER NOT
    NULL, extents TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE device (id TEXT PRIMARY KEY, vendor TEXT NOT NULL, model TEXT NOT NULL, arch TEXT NOT NULL, units INTEGER NOT NULL,
    power_cap_w REAL) WITHOUT ROWID;
CREATE TABLE toolchain (id TEXT PRIMARY KEY, version TEXT NOT NULL, abi INTEGER NOT NULL, backend TEXT NOT NULL, compiler TEXT NOT
    NULL) WITHOUT ROWID;
CREATE TABLE policy (id TEXT PRIMARY KEY, mode TEXT NOT NULL, cache TEXT NOT NULL, timer TEXT NOT NULL, method INTEGER NOT NULL)
    WITHOUT ROWID;
CREATE TABLE schedule (id TEXT PRIMARY KEY, json TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE code (id TEXT PRIMARY KEY, source TEXT NOT NULL, backend TEXT NOT NULL, facts TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE evidence (id TEXT PRIMARY KEY, oracle TEXT NOT NULL, seeds TEXT NOT NULL, distributions TEXT NOT NULL, shapes TEXT NOT
    NULL, tolerance REAL NOT NULL, largest_error REAL NOT NULL) WITHOUT ROWID;
CREATE TABLE measurement (number INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, workload TEXT NOT NULL REFERENCES
    workload(id), device TEXT NOT NULL REFERENCES device(id), toolchain TEXT NOT NULL REFERENCES toolchain(id), policy TEXT NOT NULL
    REFERENCES policy(id), schedule TEXT NOT NULL REFERENCES schedule(id), code TEXT REFERENCES code(id), evidence TEXT REFERENCES
    evidence(id), basis TEXT NOT NULL, status TEXT NOT NULL, reason TEXT NOT NULL, role TEXT NOT NULL, samples_ms TEXT NOT NULL, samples
    INTEGER NOT NULL, median_ms REAL, baseline_ms REAL, name TEXT NOT NULL, run TEXT NOT NULL, trial INTEGER NOT NULL, host TEXT NOT
    NULL, driver TEXT NOT NULL, memory_bytes INTEGER NOT NULL, seed INTEGER NOT NULL, code_commit TEXT NOT NULL, event TEXT NOT NULL);
CREATE TABLE best (workload TEXT NOT NULL, device TEXT NOT NULL, toolchain TEXT NOT NULL, policy TEXT NOT NULL, family TEXT NOT NULL,
    extents TEXT NOT NULL, bucket TEXT NOT NULL, preference INTEGER NOT NULL, schedule TEXT NOT NULL, schedule_json TEXT NOT NULL,
    measurement TEXT NOT NULL, median_ms REAL NOT NULL, relative REAL, samples INTEGER NOT NULL,
    PRIMARY KEY (workload, device, toolchain, policy)) WITHOUT ROWID;
CREATE INDEX best_lookup ON best (family, extents, device, toolchain, preference);
CREATE INDEX measurement_key ON measurement (workload, role, schedule);
CREATE TABLE transfer (number INTEGER PRIMARY KEY, kind TEXT NOT NULL, place TEXT NOT NULL, content TEXT NOT NULL,
    first INTEGER NOT NULL, last INTEGER NOT NULL, event TEXT NOT NULL);
CREATE TABLE lease (work TEXT PRIMARY KEY, holder TEXT NOT NULL, beat INTEGER NOT NULL, deaths INTEGER NOT NULL, state TEXT NOT NULL);
CREATE TABLE about (name TEXT PRIMARY KEY, value TEXT NOT NULL);
INSERT INTO about VALUES ('identity', lower(hex(randomblob(16))));
"""
_OLD = ("workload", "device", "toolchain", "policy", "schedule", "code", "evidence", "measurement")


def migrations() -> Migrations:
    """The changes, in order."""
    from sqlite_utils import Migrations

    steps = Migrations("einfall.tuner")
    steps(name="001_first_schema")(_first_schema)
    steps(name="002_rows_are_named_by_content")(_name_rows_by_content)
    return steps


def _first_schema(db: Tables) -> None:
    _run(db, _FIRST_SCHEMA)
    db.execute("PRAGMA user_version = 1")


def _name_rows_by_content(db: Tables) -> None:
    """Rows were named by event, and told things that their names did not: two files could disagree on a row.

    The winners are derived again by whoever asked for the change, with the rules of its day.
    """
    _run(db, "DROP INDEX measurement_key; DROP TABLE best")
    for name in _OLD:
        db.execute(f"ALTER TABLE {name} RENAME TO old_{name}")
    _run(db, _SECOND_SCHEMA)
    old = {name: {row["id"]: row for row in db.query(f"SELECT * FROM old_{name}")} for name in _OLD}
    for measurement in old["measurement"].values():
        _rename(db, old, measurement)
    for name in reversed(_OLD):
        db.execute(f"DROP TABLE old_{name}")
    db.execute("PRAGMA user_version = 2")


def _rename(db: Tables, old: Mapping[str, Mapping[str, dict[str, Any]]], measurement: dict[str, Any]) -> None:
    """A measurement of the first schema with all that it refers to, under the names of the second; one that refers to nothing stays out."""
    refers = {name: old[name].get(measurement[name]) for name in ("workload", "device", "toolchain", "policy", "schedule")}
    if None in refers.values():
        return
    found = {name: dict(row) for name, row in refers.items() if row is not None}
    workload, device = found["workload"], found["device"]
    workload["cascade"] = re.sub(r"\Acascade \w+\(", "cascade cascade(", str(workload["cascade"]))
    code = old["code"].get(measurement["code"])
    if code is not None:
        found["code"] = {**code, "source": code["id"]}
    evidence = old["evidence"].get(measurement["evidence"])
    if evidence is not None:
        found["evidence"] = dict(evidence)
    try:
        stored = {table.name: table.row(found[table.name]) for table in rows.TABLES if table.name in found}
        row = rows.MEASUREMENT.row({
            **measurement, **{name: stored[name][0] if name in stored else None for name in _OLD[:-1]},
            "basis": "measured", "samples": str(measurement["samples_ms"]).count(",") + (measurement["status"] == "ok"),
            "name": workload["name"], "driver": device["driver"], "memory_bytes": device["memory_bytes"], "event": measurement["id"],
        })  # fmt: skip
    except rows.Invalid:
        return  # a value of no sensible type: no reader ever took it
    if not all(values[0] for values in stored.values()):
        return
    for name, values in (*stored.items(), ("measurement", row)):
        names = next(table.names for table in rows.TABLES if table.name == name)
        db.execute(f"INSERT OR IGNORE INTO {name} ({', '.join(names)}) VALUES ({', '.join('?' * len(names))})", values)


def _run(db: Tables, script: str) -> None:
    for statement in script.split(";"):
        if statement.strip():
            db.execute(statement)
