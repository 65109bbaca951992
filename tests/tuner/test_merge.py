"""The union of databases, and segments: lossless, the same in any order, however often, and after any interruption."""

from __future__ import annotations

import gzip
import hashlib
import json
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import uuid
from dataclasses import replace
from pathlib import Path

import pytest
from einfall.ir.errors import DatabaseError
from einfall.tuner.database import Database, Device, Toolchain, merge, rows, segments, ulid
from einfall.tuner.database.merge import content
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from made_up import EVIDENCE, failed, measurement, workload

SETTINGS = settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def measurements(draw):
    """A measurement out of a small world, so that two databases share workloads, schedules and whole rows."""
    number = draw(st.integers(0, 40))
    status = draw(st.sampled_from(["ok", "ok", "ok", "ok", "crash"]))
    samples = draw(st.lists(st.sampled_from([1.0, 1.01, 1.02, 1.5, 2.0]), min_size=2, max_size=4)) if status == "ok" else ()
    return measurement(
        draw(st.integers(1, 5)), *samples, status=status, workload=workload(m=draw(st.sampled_from([4, 8]))), trial=number,
        device=Device("cpu", draw(st.sampled_from(["one", "two"])), "x86_64", 2, driver=draw(st.sampled_from(["5", "6"]))),
        toolchain=Toolchain("0.1.0", draw(st.integers(1, 2)), "tvm", "tvm 0.27"), event=f"event{number}",
        basis=draw(st.sampled_from(["measured", "measured", "estimated"])), reason=draw(st.sampled_from(["", "é \U0001f525 '; --"])),
        evidence=draw(st.sampled_from([EVIDENCE, EVIDENCE, replace(EVIDENCE, largest_error=1.0), None])) if status == "ok" else None,
        code=draw(st.sampled_from([None, "a" * 64])), facts=(("registers", float(number % 2)),),
        **draw(st.sampled_from([{}, {"role": "final", "baseline_ms": 1.25}])),
    )  # fmt: skip


databases = st.lists(measurements(), max_size=12)


class Folder:
    """Database files in a folder of their own."""

    def __init__(self):
        self.path = Path(tempfile.mkdtemp(prefix="merge"))

    def __enter__(self):
        return self

    def __exit__(self, *error):
        shutil.rmtree(self.path)

    def write(self, found):
        path = self.path / f"{uuid.uuid4().hex}.db"
        with Database.open(path, create=True) as db:
            if found:
                db.record_all(found)
        return path

    def union(self, *paths):
        """The content of a copy of the first after the others were merged into it, one by one."""
        copy = self.path / f"{uuid.uuid4().hex}.db"
        shutil.copy(paths[0], copy)
        with Database.open(copy) as db:
            for path in paths[1:]:
                merge.merge(db, path)
        return copy


def read(path):
    with Database.open(path, read_only=True) as db:
        db.check()
        return content(db)


@SETTINGS
@given(databases, databases, databases)
def test_a_union_does_not_depend_on_order_or_number(a, b, c):
    with Folder() as folder:
        a_, b_, c_ = map(folder.write, (a, b, c))
        ab = folder.union(a_, b_)
        assert read(ab) == read(folder.union(b_, a_))
        assert read(folder.union(a_, a_)) == read(a_)
        assert read(folder.union(ab, b_, a_)) == read(ab)
        assert read(folder.union(ab, c_)) == read(folder.union(a_, folder.union(b_, c_)))
        # and it is what one database would hold had it recorded everything itself
        assert read(ab) == read(folder.write([*a, *b]))
        assert {row[0] for row in read(ab)["measurement"]} == {m.id for m in (*a, *b)}


@SETTINGS
@given(databases, databases)
def test_segments_carry_what_a_merge_would(a, b):
    with Folder() as folder:
        a_, b_ = map(folder.write, (a, b))
        store = f"memory://{uuid.uuid4().hex}"
        for path in (a_, b_):
            with Database.open(path) as db:
                segments.export_segments(db, store)
        into = folder.write([])
        with Database.open(into) as db:
            first = segments.import_segments(db, store)
            again = segments.import_segments(db, store)
            assert (again.segments, again.taken.measurements, first.refused) == ((), 0, ())
        assert read(into) == read(folder.union(a_, b_))
        with Database.open(a_) as db:
            segments.import_segments(db, store)
        assert read(a_) == read(into)


@SETTINGS
@given(databases, databases, st.integers(0, 7))
def test_an_interrupted_merge_changes_nothing_and_can_be_done_again(a, b, when):
    with Folder() as folder:
        a_, b_ = map(folder.write, (a, b))
        expected = read(folder.union(a_, b_))
        before = read(a_)
        copies = []

        def stop(connection, table):
            copies.append(table)
            if len(copies) > when:
                raise KeyboardInterrupt
            return original(connection, table)

        original, merge._copy = merge._copy, stop
        try:
            with Database.open(a_) as db, pytest.raises(KeyboardInterrupt):
                merge.merge(db, b_)
        finally:
            merge._copy = original
        assert read(a_) == before
        assert read(folder.union(a_, b_)) == expected


KILLED = """
import sys, time
from einfall.tuner.database import Database, choice, merge
settle = choice.settle
def slow(connection, key):
    print("settling", flush=True)
    time.sleep(60)
    return settle(connection, key)
choice.settle = slow
merge.merge(Database.open(sys.argv[1]), sys.argv[2])
"""


def test_a_merge_killed_in_the_middle_changes_nothing(tmp_path):
    a, b = tmp_path / "a.db", tmp_path / "b.db"
    for path, tiles in ((a, range(1, 40)), (b, range(20, 80))):
        with Database.open(path, create=True) as db:
            db.record_all([measurement(i, 1.0 + i, 1.0 + i, 1.0 + i) for i in tiles])
    before = read(a)
    child = subprocess.Popen([sys.executable, "-c", KILLED, str(a), str(b)], stdout=subprocess.PIPE)
    assert child.stdout.readline() == b"settling\n"
    child.send_signal(signal.SIGKILL)
    child.communicate(timeout=60)
    assert read(a) == before
    with Database.open(a) as db:
        assert merge.merge(db, b).measurements == 60
        assert merge.merge(db, b).measurements == 0


# Where a row came from ----------------------------------------------------------------------------------------------------------------


def test_the_diary_says_which_rows_came_from_where(tmp_path):
    a, b = tmp_path / "a.db", tmp_path / "b.db"
    for path, tile in ((a, 8), (b, 16)):
        with Database.open(path, create=True) as db:
            db.record(measurement(tile, float(tile), 1.0, 1.0))
    with Database.open(a) as db:
        merge.merge(db, b)
        merge.merge(db, b)
        ((kind, place, first, last),) = db.read("SELECT kind, place, first, last FROM transfer")
        assert (kind, place, first, last) == ("merge", str(b), 2, 2)


# What is damaged ----------------------------------------------------------------------------------------------------------------------


def damage(path, sql, *parameters):
    with sqlite3.connect(path) as connection:
        connection.execute(sql, parameters)
    connection.close()


@pytest.mark.parametrize(
    "sql",
    [
        "UPDATE measurement SET samples_ms = '[1e-5,1e-5,1e-5]', median_ms = 1e-5 WHERE trial = 3",
        "UPDATE measurement SET schedule = (SELECT schedule FROM measurement WHERE trial = 1) WHERE trial = 3",
        "UPDATE schedule SET json = '{}'",
        "UPDATE evidence SET tolerance = 1e9",
        "UPDATE device SET model = 'a faster one'",
        "UPDATE workload SET extents = 'm=5'",
        "UPDATE measurement SET host = x'ff'",
        "UPDATE measurement SET id = 7 WHERE trial = 3",
        "DELETE FROM evidence",
    ],
)
def test_what_was_changed_behind_the_back_is_mended_by_a_sound_copy_and_spoils_none(tmp_path, sql):
    """Both orders give what the sound one had."""
    a, b = tmp_path / "a.db", tmp_path / "b.db"
    with Database.open(a, create=True) as db:
        db.record_all([measurement(i, *[1 + i / 10] * 3, trial=i, host="here") for i in range(1, 6)])
    expected = read(a)
    shutil.copy(a, b)
    damage(b, sql)
    for first, second in ((a, b), (b, a)):
        copy = tmp_path / "copy.db"
        shutil.copy(first, copy)
        with Database.open(copy) as db:
            merge.merge(db, second)
            db.rebuild_best()
        assert read(copy) == expected
        copy.unlink()


@pytest.mark.parametrize("bad", ["missing", "foreign", "truncated", "newer", "old", "folder"])
def test_a_source_that_cannot_be_used_is_named_and_changes_nothing(tmp_path, bad):
    a, b = tmp_path / "a.db", tmp_path / "b.db"
    for path in (a, b):
        with Database.open(path, create=True) as db:
            db.record_all([measurement(i + 1, 1.0, 1.0, 1.0) for i in range(200)])
    before = read(a)
    match bad:
        case "missing":
            b.unlink()
        case "foreign":
            b.write_bytes(b"not a database" * 1000)
        case "truncated":
            b.write_bytes(b.read_bytes()[: b.stat().st_size // 2])
        case "newer":
            damage(b, "PRAGMA user_version = 99")
        case "old":
            damage(b, "PRAGMA user_version = 1")
        case "folder":
            b.unlink()
            b.mkdir()
    with Database.open(a) as db:
        with pytest.raises(DatabaseError, match=r"b\.db"):
            merge.merge(db, b)
        db.record(measurement(500, 1.0, 1.0, 1.0))  # the connection is as good as before
        assert db.rebuild_best() == 1
    assert len(read(a)["measurement"]) == len(before["measurement"]) + 1


def test_a_merge_without_room_changes_nothing_and_names_the_file_that_is_full(tmp_path):
    a, b = tmp_path / "a.db", tmp_path / "b.db"
    for path, count in ((a, 1), (b, 400)):
        with Database.open(path, create=True) as db:
            db.record_all([measurement(i + 1, 1.0 + i, 1.0, 1.0) for i in range(count)])
    before = read(a)
    with Database.open(a) as db:
        pages = db.read("PRAGMA page_count")[0][0]
        db.read(f"PRAGMA max_page_count = {pages + 5}")
        with pytest.raises(DatabaseError, match=r"a\.db cannot grow, the disk is full"):
            merge.merge(db, b)
        db.check()
    assert read(a) == before


def test_a_file_that_may_not_be_written_can_be_merged_from(tmp_path, unprivileged):
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o777)
        source = folder / "source"
        source.mkdir()
        with Database.open(source / "b.db", create=True) as db:
            db.record(measurement(8, 1.0, 1.0, 1.0))
        (source / "b.db").chmod(0o444)
        source.chmod(0o555)

        def look():
            with Database.open(folder / "a.db", create=True) as db:
                assert merge.merge(db, source / "b.db").measurements == 1

        status = unprivileged(look)
        source.chmod(0o755)
        assert status == 0


# Segments -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def store(tmp_path):
    """A folder with one segment of two measurements, and its file."""
    with Database.open(tmp_path / "source.db", create=True) as db:
        db.record_all([measurement(8, 1.0, 1.0, 1.0), failed(16, "crash")])
        (name,) = segments.export_segments(db, str(tmp_path / "store")).segments
    return tmp_path / "store" / f"{name}.jsonl.gz"


def take_all(tmp_path, store):
    with Database.open(tmp_path / "into.db", create=True) as db:
        shared = segments.import_segments(db, str(store.parent))
        return shared, len(db.ls()), db.read("SELECT count(*) FROM measurement")[0][0]


def rename(store, lines):
    """Writes lines as a segment under the name that they hash to."""
    text = "".join(line + "\n" for line in lines).encode()
    store.unlink()
    name = hashlib.sha256(text).hexdigest()
    store.with_name(f"{name}.jsonl.gz").write_bytes(gzip.compress(text))
    return name


def test_a_segment_is_named_by_its_content_and_never_written_twice(tmp_path, store):
    text = gzip.decompress(store.read_bytes())
    assert hashlib.sha256(text).hexdigest() == store.name.removesuffix(".jsonl.gz")
    stamp = store.stat().st_mtime_ns
    with Database.open(tmp_path / "source.db") as db:
        assert segments.export_segments(db, str(store.parent)).segments == ()
        db.record(measurement(32, 0.5, 0.5, 0.5))
        (second,) = segments.export_segments(db, str(store.parent)).segments
    assert store.stat().st_mtime_ns == stamp
    added = [json.loads(line) for line in gzip.decompress(store.with_name(f"{second}.jsonl.gz").read_bytes()).splitlines()]
    assert [line[0] for line in added[1:]].count("measurement") == 1  # only what was new, with what it refers to
    assert take_all(tmp_path, store)[1:] == (1, 3)


def test_a_segment_that_was_lost_is_written_again(tmp_path, store):
    store.unlink()
    with Database.open(tmp_path / "source.db") as db:
        assert segments.export_segments(db, str(store.parent)).segments
    assert store.exists()


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda data: data[:-20], "truncated"),
        (lambda data: b"", "truncated"),
        (lambda data: b"not gzip at all", "cannot be unpacked"),
        (lambda data: gzip.compress(gzip.decompress(data) + b"\n"), "hashes to"),
        (lambda data: gzip.compress(gzip.decompress(data).replace(b"[1.0,1.0,1.0]", b"[0.1,0.1,0.1]")), "hashes to"),
    ],
)
def test_a_segment_that_is_not_what_its_name_says_is_refused_by_name_and_the_others_are_taken(tmp_path, store, spoil, reason):
    with Database.open(tmp_path / "other.db", create=True) as db:
        db.record(measurement(64, 3.0, 3.0, 3.0))
        segments.export_segments(db, str(store.parent))
    good = store.read_bytes()
    store.write_bytes(spoil(good))
    shared, winners, count = take_all(tmp_path, store)
    ((name, why),) = shared.refused
    assert store.name.startswith(name) and reason in why
    assert (winners, count, len(shared.segments)) == (1, 1, 1)
    store.write_bytes(good)
    assert take_all(tmp_path, store)[2] == 3


@pytest.mark.parametrize(
    "lines",
    [
        ["{}"], ["[]"], ["null"], ["[" * 100_000], ['{"format":"einfall segment","version":2,"tables":{}}'],
        ['{"format":"einfall segment","version":1,"tables":{}}'],
    ],
)  # fmt: skip
def test_a_segment_of_another_form_is_refused(tmp_path, store, lines):
    name = rename(store, lines)
    shared, winners, count = take_all(tmp_path, store)
    assert [refused for refused, _ in shared.refused] == [name] and (winners, count) == (0, 0)


HOSTILE = [
    None, "", "x" * 100_000, "\ud800", "\x00", "'; DROP TABLE best", -1, 1 << 70, 1e308, float("nan"), float("inf"), True, [1], {"a": 1},
]  # fmt: skip


@pytest.mark.parametrize("table", [t.name for t in rows.TABLES])
def test_a_row_that_does_not_hash_to_its_name_is_refused_whatever_it_holds(tmp_path, store, table):
    lines = gzip.decompress(store.read_bytes()).decode().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith(f'["{table}"')) if table != "code" else len(lines)
    row = json.loads(lines[at]) if at < len(lines) else ["code", "id", "source", "tvm", "{}"]
    count = 0
    for column in range(1, len(row)):
        for value in HOSTILE:
            if row[column] == value and type(row[column]) is type(value):
                continue
            count += 1
            lines.append(json.dumps([*row[:column], value, *row[column + 1 :]]))
    lines += [json.dumps([table]), json.dumps([table, *row]), json.dumps(row[:-1])]
    name = rename(store, lines)
    shared, winners, measured = take_all(tmp_path, store.with_name(name))
    assert shared.taken.refused >= count + 3
    assert (winners, measured) == (1, 2)


def test_a_row_with_the_right_name_and_a_senseless_value_never_wins(tmp_path, store):
    lines = gzip.decompress(store.read_bytes()).decode().splitlines()
    at = next(i for i, line in enumerate(lines) if line.startswith('["measurement"') and '"ok"' in line)
    _, _, *values = json.loads(lines[at])
    names = rows.MEASUREMENT.names[1:]
    for column, value in (
        ("samples_ms", "[0.1,0.1,0.1]"), ("median_ms", 0.001), ("samples", 7), ("status", "very ok"), ("basis", "estimated"),
        ("evidence", "f" * 32), ("schedule", "f" * 16), ("workload", "f" * 32), ("samples_ms", "[1e-9,1e-9,1e-9]"),
        ("median_ms", float("inf")),
    ):  # fmt: skip
        changed = [value if name == column else old for name, old in zip(names, values, strict=True)]
        lines.append(json.dumps(["measurement", rows.MEASUREMENT.name_of(changed), *changed]))
    name = rename(store, lines)
    shared, winners, measured = take_all(tmp_path, store.with_name(name))
    assert shared.taken.refused == 0 and (winners, measured) == (1, 12)
    with Database.open(tmp_path / "into.db") as db:
        assert db.ls()[0].median_ms == 1.0
        assert db.rebuild_best() == 1 and db.ls()[0].median_ms == 1.0


def test_a_bomb_is_not_unpacked(tmp_path, store, monkeypatch):
    monkeypatch.setattr(segments, "MAX_BYTES", 10_000)
    store.write_bytes(gzip.compress(b" " * 1_000_000))
    (refused,) = take_all(tmp_path, store)[0].refused
    assert "more than 10000 bytes" in refused[1]


@pytest.mark.parametrize("url", ["file:///proc/no/such", "http://127.0.0.1:9/store", "nothing://a/b", "memory://never/made"])
def test_a_store_that_cannot_be_reached_is_named(tmp_path, url):
    with Database.open(tmp_path / "a.db", create=True) as db:
        db.record(measurement(8, 1.0, 1.0, 1.0))
        with pytest.raises(DatabaseError, match=url.split("//")[1]) as caught:
            segments.import_segments(db, url)
        assert "try:" in str(caught.value)
        if not url.startswith("memory"):
            with pytest.raises(DatabaseError):
                segments.export_segments(db, url)
        assert len(db.ls()) == 1


def test_a_large_database_goes_in_several_segments(tmp_path, monkeypatch):
    monkeypatch.setattr(segments, "MAX_ROWS", 10)
    monkeypatch.setattr(segments.pack, "__defaults__", (10,))
    with Database.open(tmp_path / "a.db", create=True) as db:
        db.record_all([measurement(i + 1, 1.0 + i, 1.0 + i, 1.0 + i) for i in range(35)])
        assert len(segments.export_segments(db, str(tmp_path / "store")).segments) == 4
        expected = content(db)
    with Database.open(tmp_path / "b.db", create=True) as db:
        assert segments.import_segments(db, str(tmp_path / "store")).taken.measurements == 35
        assert content(db) == expected
        # what was taken from a store is in it already
        assert segments.export_segments(db, str(tmp_path / "store")).segments == ()


def test_the_names_of_things_do_not_depend_on_the_machine():
    """Ids are a format: a change of them would make every shared file foreign."""
    m = measurement(8, 1.0, 1.5, 2.0, event="01ARZ3NDEKTSV4RRFFQ69G5FAV", host="here", trial=3)
    assert m.id == measurement(8, 1.0, 1.5, 2.0, event="01ARZ3NDEKTSV4RRFFQ69G5FAV", host="here", trial=3).id
    assert m.workload.id == hashlib.sha256(f"{m.workload.family} m=4".encode()).hexdigest()[:32]
    text = '["cpu","a processor","x86_64",2,null]'
    assert m.device.id == hashlib.sha256(text.encode()).hexdigest()[:32]
    assert len({ulid() for _ in range(100)}) == 100
