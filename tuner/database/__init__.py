"""The schedule database: what was measured where, and which schedule won. One file, many writers, nothing executable inside."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from ...ir.errors import DatabaseError
from . import choice, queries, schema, storing
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
        self.connection = connection
        self._described: set[str] = set()

    @staticmethod
    def open(path: str | Path, *, create: bool = False, read_only: bool = False) -> Database:
        """The database at `path`; made if it is missing and `create` is given."""
        place = Path(path).expanduser()
        if read_only:
            return Database(place, schema.open_for_reading(place)[0])
        return Database(place, schema.open_for_writing(place, create=create))

    def close(self) -> None:
        """Lets go of the file."""
        self.connection.close()

    def __enter__(self) -> Database:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def record(self, measurement: Measurement) -> str:
        """Adds one measurement, in one transaction; returns its id."""
        return self.record_all((measurement,))[0]

    def record_all(self, measurements: Sequence[Measurement]) -> tuple[str, ...]:
        """Adds measurements that belong together in one transaction, all or none, and settles who is best.

        Raises `DatabaseError`, and adds nothing, for one that no reader would take.
        """
        found = [storing.rows_of(m) for m in measurements]
        described = [(name, row) for rows in found for name, row in rows[:-1] if row[0] not in self._described]
        with self.writing() as connection:
            for name, row in dict.fromkeys(described):
                connection.execute(storing.INSERTIONS[name], row)
            for rows in found:
                connection.execute(storing.INSERTIONS["measurement"], rows[-1][1])
            contested = (self._contested(m, rows[-1][1]) for m, rows in zip(measurements, found, strict=True))
            for key in dict.fromkeys(key for key in contested if key is not None):
                choice.settle(connection, key)
        # they stay, for a measurement of this connection refers to them; evidence is rarely said twice
        self._described.update(row[0] for name, row in described if name != "evidence")
        return tuple(rows[-1][1][0] for rows in found)

    def best(self, workload: str, device: str, toolchain: str) -> Record | None:
        """The winner for these ids, or None if there is none that can be used."""
        with schema.explained(self.path):
            where = "best.workload = ? AND best.device = ? AND best.toolchain = ?"
            return next(queries.best_records(self.connection, where, (workload, device, toolchain)), None)

    def ls(self) -> tuple[Record, ...]:
        """Every winner, by name and extents."""
        with schema.explained(self.path):
            return tuple(queries.best_records(self.connection))

    def show(self, name: str) -> dict[str, Any]:
        """Everything about the one thing that `name`, an id or the beginning of one, stands for; a winner's id is its workload's."""
        with schema.explained(self.path):
            found = queries.describe(self.connection, name) if name else []
            if not found:
                raise DatabaseError(f"nothing in {self.path} has an id that begins with {name!r}", hint="`einfall db ls` lists the ids")
            if len(found) > 1:
                some = ", ".join(f"{row['kind']} {row['id']}" for row in found[:5])
                raise DatabaseError(f"{name!r} is the beginning of several ids: {some}", hint="give more digits")
            row = found[0]
            if row["kind"] == "workload":
                row["best"] = [r.to_dict() for r in queries.best_records(self.connection, "best.workload = ?", (row["id"],))]
                row["measurements"] = queries.count_statuses(self.connection, row["id"])
            if row["kind"] == "measurement" and row["evidence"] is not None:
                row["evidence"] = queries.one(self.connection, "SELECT * FROM evidence WHERE id = ?", (row["evidence"],))
            return row

    def known(self, workload: str, device: str, toolchain: str, policy: str) -> dict[str, Sampled]:
        """What earlier runs found of this key's schedules, failures included, by schedule hash."""
        with schema.explained(self.path):
            return queries.known_results(self.connection, (workload, device, toolchain, policy))

    def evidence(self, name: str) -> Evidence | None:
        """The evidence of that id, or None if it is not there or cannot be used."""
        with schema.explained(self.path):
            row = queries.one(self.connection, "SELECT * FROM evidence WHERE id = ?", (name,))
        try:
            return None if row is None else evidence_from_row(row)
        except Invalid:
            return None

    def relatives(self, family: str) -> tuple[Record, ...]:
        """Winners of the same family: other extents, devices and toolchains. Seeds for a search, never answers."""
        with schema.explained(self.path):
            return tuple(queries.best_records(self.connection, "best.family = ?", (family,)))

    def rebuild_best(self) -> int:
        """Derives every winner again from the measurements; returns how many there are."""
        with self.writing() as connection:
            return choice.rebuild(connection)

    def check(self) -> None:
        """Raises `DatabaseError` if SQLite finds the file damaged."""
        with schema.explained(self.path):
            answer = self.connection.execute("PRAGMA integrity_check").fetchone()[0]
            if answer != "ok":
                raise DatabaseError(f"{self.path} is damaged: {answer}", hint="restore it from a copy, or remove it and tune again")

    @contextmanager
    def writing(self) -> Iterator[sqlite3.Connection]:
        """One write transaction: all of the body is written, or nothing if it raises."""
        with schema.explained(self.path), schema.immediate(self.connection):
            yield self.connection

    def read(self, sql: str, parameters: Sequence[object] = ()) -> list[tuple[Any, ...]]:
        """The rows of a query."""
        with schema.explained(self.path):
            return self.connection.execute(sql, tuple(parameters)).fetchall()

    def _contested(self, m: Measurement, row: tuple[Any, ...]) -> choice.Key | None:
        """The key of a measurement that was just added, if it may change who is best there."""
        key: choice.Key = row[1:5]
        sampled = Sampled(row[0], row[5], m.status, m.reason, m.role, m.samples_ms, m.baseline_ms, row[7], m.basis)
        return key if choice.may_win(self.connection, key, sampled) else None
