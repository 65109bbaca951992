"""The tables of a tuning database, their migrations, and connections that refuse what is not one.

A database is one SQLite file in WAL mode. It names itself by `application_id` and its schema by `user_version`; a file that
lacks the first or has a larger second is refused rather than guessed at. Every write transaction is BEGIN IMMEDIATE, because a
deferred one that starts by reading fails at once when it meets another writer, whatever the busy timeout.

    workload  device  toolchain  policy  schedule  code        what a measurement is of: content-named, written once
    measurement  evidence                                      append-only facts, named by ULID
    best                                                       derived from the measurements, rebuilt at will
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from ...ir.errors import DatabaseError

if TYPE_CHECKING:  # a kernel call reads with plain sqlite3; only a writer pays for loading more
    from sqlite_utils import Database as Tables
    from sqlite_utils import Migrations

APPLICATION_ID = 0x45494E46  # "EINF"
SCHEMA_VERSION = 1
BUSY_SECONDS = 30.0

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


def migrations() -> Migrations:
    """The ordered changes that bring a file to `SCHEMA_VERSION`. A released one is never edited; a new one is added below it."""
    from sqlite_utils import Migrations

    steps = Migrations("einfall.tuner")
    steps(name="001_first_schema")(_first_schema)
    return steps


def _first_schema(db: Tables) -> None:
    for statement in _FIRST_SCHEMA.split(";"):
        if statement.strip():
            db.execute(statement)
    db.execute("PRAGMA user_version = 1")


def open_for_writing(path: Path, *, create: bool) -> sqlite3.Connection:
    """A connection that may write, its file created or brought up to date. Raises `DatabaseError` saying what to do."""
    if not path.exists():
        if not create:
            raise missing(path)
        path.parent.mkdir(parents=True, exist_ok=True)
    with explained(path):
        _check_magic(path)
        connection = _connect(path, "rwc" if create else "rw")
        try:
            check_header(connection, path, may_be_empty=create)
            _set_journal(connection)
            with immediate(connection):
                check_header(connection, path, may_be_empty=create)
                _migrate(connection)
        except BaseException:
            connection.close()
            raise
    return connection


def open_for_reading(path: Path) -> tuple[sqlite3.Connection, bool]:
    """A connection that cannot write, and whether it takes the file as unchanging. Raises `DatabaseError`.

    A file in WAL mode on a read-only directory has no place for its index; it can then only be read as unchanging.
    """
    if not path.exists():
        raise missing(path)
    with explained(path):
        _check_magic(path)
        immutable = False
        connection = _connect(path, "ro")
        try:
            try:
                check_header(connection, path)
            except sqlite3.OperationalError as error:
                if "unable to open" not in str(error) and "readonly" not in str(error):
                    raise
                connection.close()
                immutable = True
                connection = _connect(path, "ro", immutable=True)
                check_header(connection, path)
        except BaseException:
            connection.close()
            raise
    return connection, immutable


def _check_magic(path: Path) -> None:
    """Raises `DatabaseError` for a file that is neither empty nor SQLite's; a very short one SQLite would take as empty."""
    if path.is_file():
        with path.open("rb") as file:
            begin = file.read(16)
        if begin and begin != b"SQLite format 3\x00":
            raise DatabaseError(f"{path} is not an SQLite database", hint="name another file with --db; this one is left as it is")


def check_header(connection: sqlite3.Connection, path: Path, *, may_be_empty: bool = False) -> None:
    """Raises `DatabaseError` unless the file is a tuning database of a schema this version reads; an empty one if allowed."""
    with _snapshot(connection):
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    if application != APPLICATION_ID:
        if application == 0 and version == 0 and tables == 0:
            if may_be_empty:
                return
            raise DatabaseError(f"{path} is an empty file, not a tuning database", hint="remove it, or tune into it with --db")
        raise DatabaseError(f"{path} is a database of another application", hint="name another file with --db; this one is left as it is")
    if version > SCHEMA_VERSION:
        raise DatabaseError(
            f"{path} has schema {version}, this einfall reads up to {SCHEMA_VERSION}",
            hint="upgrade einfall, or name another file with --db",
        )
    if version < 1 or tables == 0:
        raise DatabaseError(f"{path} is a tuning database without its tables", hint="restore it from a copy, or remove it and tune again")


@contextmanager
def _snapshot(connection: sqlite3.Connection) -> Iterator[None]:
    """One state of the file for all reads of the body, whatever another process commits meanwhile."""
    if connection.in_transaction:
        yield
        return
    connection.execute("BEGIN")
    try:
        yield
    finally:
        connection.execute("ROLLBACK")


@contextmanager
def immediate(connection: sqlite3.Connection) -> Iterator[None]:
    """One write transaction: BEGIN IMMEDIATE, then COMMIT, or ROLLBACK if the body raises."""
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        if connection.in_transaction:
            connection.execute("ROLLBACK")
        raise


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """SQLite's errors in the body as `DatabaseError`s that say what to do."""
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise _explain(path, error) from error


def missing(path: Path) -> DatabaseError:
    """The error for a file that is not there."""
    return DatabaseError(f"there is no tuning database at {path}", hint=f"`einfall tune ... --db {path}` creates it")


def _explain(path: Path, error: Exception) -> DatabaseError:
    text = str(error).lower()
    if "not a database" in text:
        return DatabaseError(f"{path} is not an SQLite database", hint="name another file with --db; this one is left as it is")
    if "malformed" in text or "disk i/o" in text or "corrupt" in text:
        return DatabaseError(f"{path} is damaged or truncated ({error})", hint="restore it from a copy, or remove it and tune again")
    if "readonly" in text or "read-only" in text or isinstance(error, PermissionError):
        return DatabaseError(f"{path} cannot be written ({error})", hint="change its permissions, or name another file with --db")
    if "unable to open" in text or isinstance(error, OSError):
        return DatabaseError(f"{path} cannot be opened ({error})", hint="check that it is a file in a folder you may read and write")
    if "full" in text:
        return DatabaseError(f"{path} cannot grow, the disk is full", hint="free some space; what was written before is kept")
    if "locked" in text or "busy" in text:
        return DatabaseError(f"{path} stayed locked for {BUSY_SECONDS:.0f} s", hint="another process holds it in a transaction; try again")
    return DatabaseError(f"{path}: {error}", hint="`einfall db verify` checks the file")


def _connect(path: Path, mode: str, *, immutable: bool = False) -> sqlite3.Connection:
    uri = f"file:{quote(str(path.absolute()))}?mode={mode}" + ("&immutable=1" if immutable else "")
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=False)
    connection.text_factory = _text  # a damaged text is a value that fails validation, not an exception in a fetch
    return connection


def _text(data: bytes) -> str:
    return data.decode("utf-8", "replace")


def _set_journal(connection: sqlite3.Connection) -> None:
    """WAL mode; entering it needs the file for a moment, and the busy timeout does not always cover that."""
    deadline = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            if connection.execute("PRAGMA journal_mode").fetchone()[0] != "wal":
                connection.execute("PRAGMA journal_mode = WAL")
            break
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
    connection.execute("PRAGMA synchronous = NORMAL")


def _migrate(connection: sqlite3.Connection) -> None:
    """Pending migrations, inside the caller's transaction."""
    if connection.execute("PRAGMA user_version").fetchone()[0] == SCHEMA_VERSION:
        return
    from sqlite_utils import Database as Tables

    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    migrations().apply(Tables(connection, execute_plugins=False))
