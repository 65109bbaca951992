"""The schedule database: what was measured where, and which schedule won. One file, many writers, nothing executable inside."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ...ir.errors import DatabaseError
from . import queries, schema
from .records import (
    Device,
    Evidence,
    Invalid,
    Measurement,
    Policy,
    Record,
    Sampled,
    Status,
    Toolchain,
    Workload,
    canonical,
    evidence_from_row,
    parse_schedule,
    ulid,
)  # fmt: skip

__all__ = [
    "Database", "Device", "Evidence", "Invalid", "Measurement", "Policy", "Record", "Sampled", "Status", "Toolchain", "Workload",
    "parse_schedule", "ulid",
]  # fmt: skip


class Database:
    """A tuning database. `Database.open(path, create=True)` for a tuning run, `read_only=True` to look.

    Every method raises `DatabaseError` with what to do; stored values that cannot be used are passed over.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection) -> None:
        self.path = path
        self._connection = connection
        from sqlite_utils import Database as Tables

        self._tables = Tables(connection, execute_plugins=False, recursive_triggers=False)
        self._written: set[tuple[str, str]] = set()

    @staticmethod
    def open(path: str | Path, *, create: bool = False, read_only: bool = False) -> Database:
        """The database at `path`; made if it is missing and `create` is given."""
        place = Path(path).expanduser()
        if read_only:
            return Database(place, schema.open_for_reading(place)[0])
        return Database(place, schema.open_for_writing(place, create=create))

    def close(self) -> None:
        """Lets go of the file."""
        self._connection.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def record(self, measurement: Measurement) -> str:
        """Adds one measurement, in one transaction; returns its id."""
        return self.record_all((measurement,))[0]

    def record_all(self, measurements: Sequence[Measurement]) -> tuple[str, ...]:
        """Adds measurements that belong together in one transaction, all or none, and settles who is best."""
        fresh: set[tuple[str, str]] = set()
        with self._writing():
            for m in measurements:
                self._describe(m, fresh)
                self._tables["measurement"].insert(_measurement_row(m))
            for key in dict.fromkeys(_key(m) for m in measurements if self._may_win(m)):
                self._settle(key)
        self._written |= fresh
        return tuple(m.id for m in measurements)

    def best(self, workload: str, device: str, toolchain: str) -> Record | None:
        """The winner for these ids, or None if there is none that can be used."""
        with schema.explained(self.path):
            where = "best.workload = ? AND best.device = ? AND best.toolchain = ?"
            return next(queries.best_records(self._connection, where, (workload, device, toolchain)), None)

    def ls(self) -> tuple[Record, ...]:
        """Every winner, by name and extents."""
        with schema.explained(self.path):
            return tuple(queries.best_records(self._connection))

    def show(self, name: str) -> dict[str, Any]:
        """Everything about the one thing that `name`, an id or the beginning of one, stands for; a winner's id is its workload's."""
        with schema.explained(self.path):
            found = queries.describe(self._connection, name) if name else []
            if not found:
                raise DatabaseError(f"nothing in {self.path} has an id that begins with {name!r}", hint="`einfall db ls` lists the ids")
            if len(found) > 1:
                some = ", ".join(f"{row['kind']} {row['id']}" for row in found[:5])
                raise DatabaseError(f"{name!r} is the beginning of several ids: {some}", hint="give more digits")
            row = found[0]
            if row["kind"] == "workload":
                row["best"] = [r.to_dict() for r in queries.best_records(self._connection, "best.workload = ?", (row["id"],))]
                row["measurements"] = queries.count_statuses(self._connection, row["id"])
            if row["kind"] == "measurement" and row["evidence"] is not None:
                row["evidence"] = queries.one(self._connection, "SELECT * FROM evidence WHERE id = ?", (row["evidence"],))
            return row

    def known(self, workload: str, device: str, toolchain: str, policy: str) -> dict[str, Sampled]:
        """What earlier runs found of this key's schedules, failures included, by schedule hash."""
        with schema.explained(self.path):
            return queries.known_results(self._connection, (workload, device, toolchain, policy))

    def evidence(self, name: str) -> Evidence | None:
        """The evidence of that id, or None if it is not there or cannot be used."""
        with schema.explained(self.path):
            row = queries.one(self._connection, "SELECT * FROM evidence WHERE id = ?", (name,))
        try:
            return None if row is None else evidence_from_row(row)
        except Invalid:
            return None

    def relatives(self, family: str) -> tuple[Record, ...]:
        """Winners of the same family: other extents, devices and toolchains. Seeds for a search, never answers."""
        with schema.explained(self.path):
            return tuple(queries.best_records(self._connection, "best.family = ?", (family,)))

    def rebuild_best(self) -> int:
        """Derives every winner again from the measurements; returns how many there are."""
        with self._writing():
            self._connection.execute("DELETE FROM best")
            return sum(self._settle(key) for key in queries.all_keys(self._connection))

    def check(self) -> None:
        """Raises `DatabaseError` if SQLite finds the file damaged."""
        with schema.explained(self.path):
            answer = self._connection.execute("PRAGMA integrity_check").fetchone()[0]
            if answer != "ok":
                raise DatabaseError(f"{self.path} is damaged: {answer}", hint="restore it from a copy, or remove it and tune again")

    @contextmanager
    def _writing(self) -> Iterator[None]:
        with schema.explained(self.path), schema.immediate(self._connection):
            yield

    def _describe(self, m: Measurement, fresh: set[tuple[str, str]]) -> None:
        """Writes what the measurement is of, where this connection has not done so before."""
        for table, row in _description(m):
            name = (table, row["id"])
            if name not in self._written and name not in fresh:
                self._tables[table].insert(row, pk="id", ignore=True)
                fresh.add(name)
        if m.evidence is not None:
            self._tables["evidence"].insert({"id": m.id, **_evidence_row(m.evidence)})

    def _may_win(self, m: Measurement) -> bool:
        """Whether settling again could change the winner: most trials of a search are plainly slower."""
        if m.status != "ok" or m.evidence is None:
            return False
        sql = "SELECT median_ms, relative FROM best WHERE workload = ? AND device = ? AND toolchain = ? AND policy = ?"
        current = queries.one(self._connection, sql, _key(m))
        if current is None or m.role == "final":
            return True
        if not isinstance(current["median_ms"], float):
            return True
        slowest = current["median_ms"] * (1 + queries.MAX_TIE)
        return current["relative"] is None and m.median_ms is not None and m.median_ms <= slowest

    def _settle(self, key: queries.Key) -> int:
        """Brings the row of `best` of one key up to date; returns the number of rows it has now."""
        sql = "DELETE FROM best WHERE workload = ? AND device = ? AND toolchain = ? AND policy = ?"
        self._connection.execute(sql, key)
        row = queries.best_row(self._connection, key)
        if row is None:
            return 0
        self._tables["best"].insert(row)
        return 1


def _key(m: Measurement) -> queries.Key:
    return (m.workload.id, m.device.id, m.toolchain.id, m.policy.id)


def _description(m: Measurement) -> Iterator[tuple[str, dict[str, Any]]]:
    w, d, t, p = m.workload, m.device, m.toolchain, m.policy
    yield "workload", {
        "id": w.id, "family": w.family, "name": w.name, "cascade": w.cascade, "dtypes": canonical(dict(w.dtypes)), "layout": w.layout,
        "alignment": w.alignment, "extents": w.extents_text, "bucket": w.bucket,
    }  # fmt: skip
    yield "device", {
        "id": d.id, "vendor": d.vendor, "model": d.model, "arch": d.arch, "units": d.units, "memory_bytes": d.memory_bytes,
        "power_cap_w": d.power_cap_w, "driver": d.driver,
    }  # fmt: skip
    yield "toolchain", {"id": t.id, "version": t.version, "abi": t.abi, "backend": t.backend, "compiler": t.compiler}
    yield "policy", {"id": p.id, "mode": p.mode, "cache": p.cache, "timer": p.timer, "method": p.method}
    yield "schedule", {"id": m.schedule.hash, "version": m.schedule.version, "json": m.schedule.to_json()}
    if m.code is not None:
        yield "code", {"id": m.code, "backend": t.backend, "facts": canonical(dict(m.facts))}


def _evidence_row(e: Evidence) -> dict[str, Any]:
    data = e.to_dict()
    return {name: canonical(value) if isinstance(value, list) else value for name, value in data.items()}


def _measurement_row(m: Measurement) -> dict[str, Any]:
    workload, device, toolchain, policy = _key(m)
    return {
        "id": m.id, "workload": workload, "device": device, "toolchain": toolchain, "policy": policy, "schedule": m.schedule.hash,
        "code": m.code, "evidence": None if m.evidence is None else m.id, "status": m.status, "reason": m.reason, "role": m.role,
        "samples_ms": canonical(list(m.samples_ms)), "median_ms": m.median_ms, "baseline_ms": m.baseline_ms, "run": m.run,
        "trial": m.trial, "host": m.host, "seed": m.seed, "code_commit": m.commit,
    }  # fmt: skip
