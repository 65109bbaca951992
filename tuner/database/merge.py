"""The union of two databases: lossless, the same however often and in whichever order.

Rows are named by what they hold, so a row is there or it is not: nothing is renumbered and nothing overwritten. Where two files have
other values under one name, one of the two is damaged, and only the one that hashes to its name is taken. Winners are derived again
from the union. One transaction: all of it happens, or nothing.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import quote

from . import Database, choice, schema
from .records import ulid
from .rows import MEASUREMENT, TABLES, Table

CACHE_KIB = 128 * 1024


@dataclass(frozen=True, slots=True)
class Taken:
    """What a transfer brought: rows added by table; rows mended that were damaged here; rows refused that did not hash to their names."""

    added: dict[str, int] = field(default_factory=dict)
    mended: int = 0
    refused: int = 0

    @property
    def measurements(self) -> int:
        """How many measurements are new here."""
        return self.added.get("measurement", 0)

    def __add__(self, other: Taken) -> Taken:
        tables = dict.fromkeys((*self.added, *other.added))
        added = {t: self.added.get(t, 0) + other.added.get(t, 0) for t in tables}
        return Taken(added, self.mended + other.mended, self.refused + other.refused)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"added": {name: n for name, n in self.added.items() if n}, "mended": self.mended, "refused": self.refused}


def merge(database: Database, source: str | Path) -> Taken:
    """Adds everything in the file `source` to `database`. Raises `DatabaseError`, and changes nothing, if either cannot be used."""
    place = Path(source).expanduser()
    connection, immutable = schema.open_for_reading(place)
    try:
        with schema.explained(place):
            identity = str(connection.execute("SELECT value FROM about WHERE name = 'identity'").fetchone()[0])
    finally:
        connection.close()
    uri = f"file:{quote(str(place.absolute()))}?mode=ro" + ("&immutable=1" if immutable else "")
    with _attached(database, place, uri):
        return unite(database, place, kind="merge", content=identity, name=str(place))


def unite(database: Database, source: Path, *, kind: str, content: str, name: str) -> Taken:
    """Adds what the attached schema `other` holds, in one transaction, and writes down which rows came from there."""
    with database.writing() as connection:
        before = _last(connection)
        try:
            found = Taken()
            for table in TABLES:
                added, there = _copy(connection, table)
                mended, refused = _mend(connection, table) if there else (0, 0)
                found += Taken({table.name: added}, mended, refused)
        except sqlite3.Error as error:
            raise schema.explain(source if _is_damaged(connection) else database.path, error) from error
        if found.mended:
            choice.rebuild(connection)
        else:
            keys = "SELECT DISTINCT workload, device, toolchain, policy FROM measurement WHERE number > ?"
            for key in connection.execute(keys, (before,)).fetchall():
                choice.settle(connection, key)
        if found.measurements or kind != "merge":
            diary = "INSERT INTO transfer (kind, place, content, first, last, event) VALUES (?, ?, ?, ?, ?, ?)"
            connection.execute(diary, (kind, name, content, before + 1, _last(connection), ulid()))
    return found


@contextmanager
def _attached(database: Database, place: Path, uri: str) -> Iterator[None]:
    connection = database.connection
    with schema.explained(place):
        connection.execute("ATTACH ? AS other", (uri,))
        for name in ("main", "other"):  # names are random: pages in memory are what makes adding them fast
            connection.execute(f"PRAGMA {name}.cache_size = -{CACHE_KIB}")
    try:
        yield
    finally:
        connection.execute("DETACH other")


@contextmanager
def scratch(database: Database) -> Iterator[Callable[[Table, list[tuple[Any, ...]]], None]]:
    """An empty schema `other`, and the function that puts rows, as they came, into it."""
    with _attached(database, database.path, ""):
        for table in TABLES:
            database.connection.execute(f"CREATE TABLE other.{table.name} (number INTEGER PRIMARY KEY, {', '.join(table.names)})")

        def put(table: Table, found: list[tuple[Any, ...]]) -> None:
            sql = f"INSERT INTO other.{table.name} ({', '.join(table.names)}) VALUES ({', '.join('?' * len(table.names))})"
            with schema.explained(database.path), schema.immediate(database.connection):
                database.connection.executemany(sql, found)

        yield put


def _copy(connection: sqlite3.Connection, table: Table) -> tuple[int, bool]:
    """Adds the rows that are not here yet; how many they are, and whether some were here. Readers ask whether they can be used."""
    columns = ", ".join(table.names)
    order = " ORDER BY number" if table is MEASUREMENT else " ORDER BY id"
    added = connection.execute(
        f"INSERT OR IGNORE INTO main.{table.name} ({columns}) SELECT {columns} FROM other.{table.name} "
        f"WHERE typeof(id) = 'text' AND length(id) <= 32{order}"
    ).rowcount
    return added, bool(added < connection.execute(f"SELECT count(*) FROM other.{table.name}").fetchone()[0])


def _is_damaged(connection: sqlite3.Connection) -> bool:
    """Whether it is the other file that SQLite cannot read."""
    try:
        return bool(connection.execute("PRAGMA other.quick_check(1)").fetchone()[0] != "ok")
    except sqlite3.Error:
        return True


def _mend(connection: sqlite3.Connection, table: Table) -> tuple[int, int]:
    """Takes the rows that have other values here and are the sound ones; how many they are, and how many are not sound."""
    columns = ", ".join(f"o.{name}" for name in table.names)
    differs = " OR ".join(f"o.{name} IS NOT m.{name}" for name in table.names[1:])
    sql = f"SELECT {columns} FROM other.{table.name} AS o JOIN main.{table.name} AS m ON m.id = o.id WHERE {differs}"
    found = connection.execute(sql).fetchall()
    sound = list(table.verified(found))
    update = f"UPDATE main.{table.name} SET {', '.join(f'{name} = ?' for name in table.names[1:])} WHERE id = ?"
    connection.executemany(update, [(*values, name) for name, *values in sound])
    return len(sound), len(found) - len(sound)


def _last(connection: sqlite3.Connection) -> int:
    return int(connection.execute("SELECT coalesce(max(seq), 0) FROM sqlite_sequence WHERE name = 'measurement'").fetchone()[0])


def content(database: Database) -> dict[str, frozenset[tuple[Any, ...]]]:
    """Everything a database says, as sets of sound rows: two files with equal content know the same."""
    found = {}
    for table in TABLES:
        stored = database.read(f"SELECT {', '.join(table.names)} FROM {table.name}")
        found[table.name] = frozenset(table.verified(stored))
    found["best"] = frozenset(database.read("SELECT * FROM best"))
    return found
