"""Sharing without a server: measurements as immutable files, each named by the SHA-256 of its content, in any store fsspec reaches.

A segment is JSON lines, gzipped: a header, then rows table by table, sorted by name, each with all that it refers to. Many may write
to one store, for no file is ever changed; who reads twice, or in another order, or both of two overlapping segments, has the same in
the end. A file that does not hash to its name is refused by that name, and so is a row that does not hash to its own.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ...ir.errors import DatabaseError
from . import Database
from .merge import Taken, scratch, unite
from .records import ulid
from .rows import MEASUREMENT, TABLES, Invalid, Table

FORMAT = {"format": "einfall segment", "version": 1}
MAX_ROWS = 20_000
MAX_BYTES = 1 << 28  # unpacked
_NAME = re.compile(r"([0-9a-f]{64})\.jsonl\.gz")
_encode = json.JSONEncoder(separators=(",", ":")).encode
Advance = Callable[[str], object]


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows as a file: `name` is the hash of what `data` unpacks to; `first` and `last` are the numbers of its measurements here."""

    name: str
    data: bytes
    rows: int
    first: int
    last: int


@dataclass(frozen=True, slots=True)
class Shared:
    """What an export or import did.

    Args:
        segments: the segments that were written or read now; those known before are not among them.
        refused: names of segments that were not taken, with the reason.
    """

    taken: Taken
    segments: tuple[str, ...] = ()
    refused: tuple[tuple[str, str], ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**self.taken.to_dict(), "segments": list(self.segments), "segments_refused": dict(self.refused)}


def pack(database: Database, after: int, limit: int = MAX_ROWS) -> Segment | None:
    """The segment of up to `limit` measurements whose numbers are above `after`, or None if there is none."""
    columns = ", ".join(MEASUREMENT.names)
    found = database.read(f"SELECT number, {columns} FROM measurement WHERE number > ? ORDER BY number LIMIT ?", (after, limit))
    if not found:
        return None
    sound = {MEASUREMENT.name: list(MEASUREMENT.verified(row[1:] for row in found))}
    for table in TABLES[:-1]:
        at = MEASUREMENT.names.index(table.name)
        sound[table.name] = list(_referred(database, table, {row[at] for row in sound["measurement"]} - {None}))
    lines = [_encode({**FORMAT, "tables": {table.name: list(table.names) for table in TABLES}})]
    for table in TABLES:
        lines.extend(_encode([table.name, *row]) for row in sorted(sound[table.name]))
    text = ("\n".join(lines) + "\n").encode()
    data = gzip.compress(text, 6, mtime=0)
    return Segment(hashlib.sha256(text).hexdigest(), data, len(sound["measurement"]), after + 1, found[-1][0])


def _referred(database: Database, table: Table, names: set[Any]) -> Iterator[tuple[Any, ...]]:
    ordered = sorted(names)
    for begin in range(0, len(ordered), 500):
        batch = ordered[begin : begin + 500]
        marks = ", ".join("?" * len(batch))
        yield from table.verified(database.read(f"SELECT {', '.join(table.names)} FROM {table.name} WHERE id IN ({marks})", batch))


def unpack(name: str, data: bytes) -> dict[str, list[tuple[Any, ...]]]:
    """The rows of a segment by table, as they came. Raises `Invalid` unless the data unpacks to what hashes to `name`."""
    text = _inflate(data)
    found = hashlib.sha256(text).hexdigest()
    if found != name:
        raise Invalid(f"its content hashes to {found[:12]}..., not to its name")
    try:
        header, *lines = [json.loads(line) for line in text.decode().splitlines()]
    except (ValueError, RecursionError) as error:
        raise Invalid(f"it is not JSON lines: {error}") from None
    if not isinstance(header, dict) or {key: header.get(key) for key in FORMAT} != FORMAT:
        raise Invalid("it is no segment of a version that this einfall reads; upgrade einfall")
    if header.get("tables") != {table.name: list(table.names) for table in TABLES}:
        raise Invalid("it has other tables than this einfall reads; upgrade einfall")
    rows: dict[str, list[tuple[Any, ...]]] = {table.name: [] for table in TABLES}
    for line in lines:
        if not isinstance(line, list) or not line or not isinstance(line[0], str) or line[0] not in rows:
            raise Invalid(f"it has a row of no table: {str(line)[:60]}")
        rows[line[0]].append(tuple(line[1:]))
    return rows


def _inflate(data: bytes) -> bytes:
    unpacker = zlib.decompressobj(wbits=31)
    try:
        text = unpacker.decompress(data, MAX_BYTES)
    except zlib.error as error:
        raise Invalid(f"it cannot be unpacked: {error}") from None
    if unpacker.unconsumed_tail:
        raise Invalid(f"it unpacks to more than {MAX_BYTES} bytes")
    if not unpacker.eof:
        raise Invalid("it is truncated")
    return text


def take(database: Database, name: str, data: bytes, *, kind: str, content: str, place: str) -> Taken:
    """Adds the rows of a segment, in one transaction. Raises `Invalid`, and adds nothing, if it is none."""
    rows = unpack(name, data)
    refused = 0
    with scratch(database) as put:
        for table in TABLES:
            sound = list(table.verified(rows[table.name]))
            refused += len(rows[table.name]) - len(sound)
            put(table, sound)
        return unite(database, database.path, kind=kind, content=content, name=place) + Taken(refused=refused)


def export_segments(database: Database, url: str, on_segment: Advance = lambda name: None) -> Shared:
    """Writes what the store at `url` does not have from here yet. Raises `DatabaseError` if it cannot be written to."""
    written: list[str] = []
    rows = 0
    with _store(url) as (system, path):
        system.makedirs(path, exist_ok=True)
        there = set(_listed(system, path))
        kept = [row for row in _diary(database, url) if row[0] in there]
        after = _first_gap(kept)
        while (segment := pack(database, after)) is not None:
            if segment.rows and segment.name not in there:
                with system.transaction, system.open(f"{path}/{segment.name}.jsonl.gz", "wb") as file:
                    file.write(segment.data)
                written.append(segment.name)
                rows += segment.rows
                on_segment(segment.name)
            with database.writing() as connection:
                diary = "INSERT INTO transfer (kind, place, content, first, last, event) VALUES ('export', ?, ?, ?, ?, ?)"
                connection.execute(diary, (url, segment.name, segment.first, segment.last, ulid()))
            after = segment.last
    return Shared(Taken({"measurement": rows}), tuple(written))


def import_segments(database: Database, url: str, on_segment: Advance = lambda name: None) -> Shared:
    """Adds the segments of the store at `url` that are new here; each is a transaction of its own.

    One that is not what its name says is refused, and the others are taken. Raises `DatabaseError` if the store cannot be read.
    """
    taken, segments, refused = Taken(), [], []
    known = {row[0] for row in database.read("SELECT content FROM transfer WHERE kind IN ('import', 'export')")}
    with _store(url) as (system, path):
        names = _listed(system, path)
    for name in names:
        if name in known:
            continue
        with _store(url) as (system, path):
            data = _contents(system, f"{path}/{name}.jsonl.gz")
        try:
            taken += take(database, name, data, kind="import", content=name, place=url)
            segments.append(name)
            on_segment(name)
        except Invalid as error:
            refused.append((name, str(error)))
    return Shared(taken, tuple(segments), tuple(refused))


def _first_gap(exported: list[tuple[str, int, int]]) -> int:
    """The number up to which everything is in the store."""
    after = 0
    for _, first, last in sorted(exported, key=lambda row: row[1]):
        if first > after + 1:
            break
        after = max(after, last)
    return after


def _diary(database: Database, url: str) -> list[tuple[str, int, int]]:
    rows = database.read("SELECT content, first, last FROM transfer WHERE kind IN ('export', 'import') AND place = ?", (url,))
    return [(str(name), int(first), int(last)) for name, first, last in rows]


@contextmanager
def _store(url: str) -> Iterator[tuple[Any, str]]:
    """The file system and path of a URL; whatever goes wrong with them is a `DatabaseError`."""
    try:
        import fsspec

        system, path = fsspec.core.url_to_fs(url)
        yield system, path.rstrip("/")
    except ImportError as error:
        what = f"{url} needs a package that is not installed: {error}"
        raise DatabaseError(what, hint="pip install einfall[share], s3fs or gcsfs") from error
    except (DatabaseError, KeyboardInterrupt):
        raise
    except Exception as error:  # each kind of store has exceptions of its own
        what = f"{url} cannot be used as a store of segments ({type(error).__name__}: {error})"
        raise DatabaseError(what, hint="check the address and your rights there; what was taken before is kept") from error


def _listed(system: Any, path: str) -> list[str]:
    """The names of the segments in a folder, sorted; a folder that is not there is an error."""
    system.invalidate_cache()
    found = (str(entry).split("?")[0].rstrip("/").rsplit("/", 1)[-1] for entry in system.ls(path, detail=False))
    return sorted({match[1] for entry in found if (match := _NAME.fullmatch(entry))})


def _contents(system: Any, path: str) -> bytes:
    with system.open(path, "rb") as file:
        data: bytes = file.read(MAX_BYTES)
    return data


def header(segment: Segment, identity: str) -> Mapping[str, str]:
    """What a server says about a segment that it sends."""
    return {"x-einfall-segment": segment.name, "x-einfall-last": str(segment.last), "x-einfall-identity": identity}
