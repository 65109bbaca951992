"""Connections to a tuning database, which refuse what is not one.

A database is one SQLite file in WAL mode. It names itself by `application_id` and its schema by `user_version`; a file that
lacks the first or has a larger second is refused rather than guessed at. Every write transaction is BEGIN IMMEDIATE, because a
deferred one that starts by reading fails at once when it meets another writer, whatever the busy timeout. The tables are made by
the ordered changes of `migrations.py`.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from urllib.parse import quote

from ...ir.errors import DatabaseError

APPLICATION_ID = 0x45494E46  # "EINF"
SCHEMA_VERSION = 2
BUSY_SECONDS = 30.0
_ACTIVE = (
    "SELECT CASE WHEN type = 'table' THEN 'virtual table' ELSE type END, name FROM sqlite_master "
    "WHERE type NOT IN ('table', 'index') OR sql LIKE 'CREATE VIRTUAL%' LIMIT 1"
)

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
            check_header(connection, path, may_be_empty=create, may_be_old=True)
            _set_journal(connection)
            with immediate(connection):
                check_header(connection, path, may_be_empty=create, may_be_old=True)
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


def check_header(connection: sqlite3.Connection, path: Path, *, may_be_empty: bool = False, may_be_old: bool = False) -> None:
    """Raises `DatabaseError` unless the file is a tuning database of a schema this version reads; an empty one if allowed."""
    with _snapshot(connection):
        application = connection.execute("PRAGMA application_id").fetchone()[0]
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        active = connection.execute(_ACTIVE).fetchone()
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
    if version < SCHEMA_VERSION and not may_be_old:
        raise DatabaseError(
            f"{path} has schema {version}, from an earlier einfall",
            hint=f"`einfall db gc --db {path}` brings it up to date; so does the next tuning run",
        )
    if active is not None:
        what = f"{path} has the {active[0]} {str(active[1])[:60]!r}: a tuning database has none, for it would run when the file is read"
        raise DatabaseError(what, hint="drop it with sqlite3 if it is yours, or take the file from another source")
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
        raise explain(path, error) from error


def missing(path: Path) -> DatabaseError:
    """The error for a file that is not there."""
    return DatabaseError(f"there is no tuning database at {path}", hint=f"`einfall tune ... --db {path}` creates it")


def explain(path: Path, error: Exception) -> DatabaseError:
    """The error that says what an error of SQLite or of the system means for the file."""
    text = str(error).lower()
    if "not a database" in text:
        return DatabaseError(f"{path} is not an SQLite database", hint="name another file with --db; this one is left as it is")
    if "malformed" in text or "corrupt" in text:
        return DatabaseError(f"{path} is damaged or truncated ({error})", hint="restore it from a copy, or remove it and tune again")
    if "disk i/o" in text:
        hint = "look at the disk, its space and your quota, then `einfall db verify`; what was written before is kept"
        return DatabaseError(f"{path} cannot be read or written ({error})", hint=hint)
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
    connection = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, check_same_thread=False, isolation_level=None)
    # a damaged text is a value that fails validation, not an exception in a fetch
    connection.text_factory = partial(str, encoding="utf-8", errors="replace")
    return connection


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
    version = connection.execute("PRAGMA user_version").fetchone()[0]
    if version == SCHEMA_VERSION:
        return
    from sqlite_utils import Database as Tables  # a kernel call reads with plain sqlite3; only a writer pays for loading more

    from .choice import rebuild
    from .migrations import migrations

    connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
    migrations().apply(Tables(connection, execute_plugins=False))
    if version:
        rebuild(connection)
