"""Older files come up to date with all they hold; the tables are those that rows are made for."""

from __future__ import annotations

import json
import sqlite3

import pytest
from einfall.ir.errors import DatabaseError
from einfall.tuner.database import Database, migrations, rows, schema
from made_up import CASCADE, EVIDENCE, measurement, workload


def write_first_schema(path, *measurements):
    """A file as the first schema had it."""
    connection = sqlite3.connect(path)
    connection.executescript(migrations._FIRST_SCHEMA)
    connection.execute(f"PRAGMA application_id = {schema.APPLICATION_ID}")
    connection.execute("PRAGMA user_version = 1")
    connection.execute('CREATE TABLE "_sqlite_migrations" (id INTEGER PRIMARY KEY, migration_set TEXT, name TEXT, applied_at TEXT)')
    connection.execute("INSERT INTO _sqlite_migrations VALUES (1, 'einfall.tuner', '001_first_schema', '2026-01-01')")
    for m in measurements:
        w, d, t, p = m.workload, m.device, m.toolchain, m.policy
        named = CASCADE.replace("cascade cascade(", "cascade made_up(")
        rows_ = {
            "workload": (w.id, w.family, w.name, named, "{}", w.layout, w.alignment, w.extents_text, w.bucket),
            "device": (d.id, d.vendor, d.model, d.arch, d.units, 7, d.power_cap_w, "a driver"),
            "toolchain": (t.id, t.version, t.abi, t.backend, t.compiler),
            "policy": (p.id, p.mode, p.cache, p.timer, p.method),
            "schedule": (m.schedule.hash, 1, m.schedule.to_json()),
            "code": (f"source{m.trial}", "tvm", '{"size":3.0}'),
            "evidence": (m.event, EVIDENCE.oracle, "[0]", '["normal"]', '[{"m":4}]', EVIDENCE.tolerance, EVIDENCE.largest_error),
            "measurement": (
                m.event, w.id, d.id, t.id, p.id, m.schedule.hash, f"source{m.trial}", m.event, m.status, m.reason, m.role,
                json.dumps(m.samples_ms), m.median_ms, m.baseline_ms, m.run, m.trial, "a host", m.seed, m.commit,
            ),
        }  # fmt: skip
        for table, row in rows_.items():
            connection.execute(f"INSERT OR IGNORE INTO {table} VALUES ({', '.join('?' * len(row))})", row)
    connection.commit()
    connection.close()


def test_a_file_of_the_first_schema_keeps_every_measurement(path):
    old = [measurement(i, *[1 + i / 10] * 3, trial=i, workload=workload(m=2 ** (i % 2))) for i in range(1, 21)]
    write_first_schema(path, *old)
    with pytest.raises(DatabaseError, match="schema 1, from an earlier einfall"):
        Database.open(path, read_only=True)
    with Database.open(path) as db:
        winners = [(r.schedule, r.median_ms, r.name) for r in db.ls()]
        assert winners == [(old[1].schedule, 1.2, "made_up"), (old[0].schedule, 1.1, "made_up")]
        kept = db.read(f"SELECT {', '.join(rows.MEASUREMENT.names)} FROM measurement")
        assert len(kept) == 20 and len(list(rows.MEASUREMENT.verified(kept))) == 20
        for table in rows.TABLES:
            stored = db.read(f"SELECT {', '.join(table.names)} FROM {table.name}")
            assert stored and len(list(table.verified(stored))) == len(stored), table.name
        shown = next(db.show(row[0]) for row in kept if row[-1] == old[4].event)
        assert (shown["driver"], shown["memory_bytes"], shown["host"], shown["trial"]) == ("a driver", 7, "a host", 5)
        assert shown["evidence"]["shapes"] == '[{"m":4}]'
    with Database.open(path, read_only=True) as db:
        assert len(db.ls()) == 2


def test_a_row_of_the_first_schema_that_says_nothing_stays_out(path):
    write_first_schema(path, measurement(1, 1.0, 1.0, 1.0, trial=1), measurement(2, 2.0, 2.0, 2.0, trial=2))
    with sqlite3.connect(path) as connection:
        connection.execute("UPDATE schedule SET json = x'ff' WHERE id = (SELECT schedule FROM measurement WHERE trial = 1)")
    connection.close()
    with Database.open(path) as db:
        assert [dict(r.schedule.tile) for r in db.ls()] == [{"m": 2}]


def test_a_new_file_has_the_columns_that_rows_are_made_for(path):
    with Database.open(path, create=True) as db:
        for table in rows.TABLES:
            found = {row[1]: (row[2], row[3]) for row in db.read(f"PRAGMA table_info({table.name})")}
            kinds = {"text": ("TEXT", 1), "whole": ("INTEGER", 1), "real": ("REAL", 1), "text?": ("TEXT", 0), "real?": ("REAL", 0)}
            assert {name: found[name] for name, _ in table.columns} == {name: kinds[kind] for name, kind in table.columns}
            assert set(found) - set(table.names) <= {"number"}
