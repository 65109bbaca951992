"""The look-up of a kernel call: exact, bucket, nearest; and a miss, never an error, whatever the file holds."""

from __future__ import annotations

import os
import sqlite3
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
from einfall.ir.text import parse_cascade
from einfall.schedules.schedule import Schedule
from einfall.schedules.target import load_target
from einfall.tuner import lookup as looking
from einfall.tuner.database import Database, Workload
from einfall.tuner.database.records import family_of
from einfall.tuner.device import describe_device, describe_toolchain
from einfall.tuner.lookup import Lookup, best_schedule
from made_up import measurement

pytestmark = pytest.mark.filterwarnings("ignore:einfall. kernels run with what is known:RuntimeWarning")

TEXT = """\
cascade rows(X[m,p]: f32) -> Y[m]
  Y[m] = sum(p) X[m,p]
"""
CASCADE = parse_cascade(TEXT)
TARGET = load_target("cpu")


def store(path: Path, tile: int, cascade=CASCADE, **sizes: int) -> Schedule:
    """Records a winner at these extents, twice as fast as the default was beside it."""
    m = measurement(
        tile, 1.0, 1.0, 1.0, workload=Workload.of(cascade, sizes), device=describe_device(TARGET), toolchain=describe_toolchain(TARGET),
        role="final", baseline_ms=2.0,
    )  # fmt: skip
    with Database.open(path, create=True) as db:
        db.record(m)
    return m.schedule


def edit(path: Path, sql: str, *parameters: object) -> None:
    with sqlite3.connect(path) as connection:
        connection.execute(sql, parameters)
    connection.close()


def test_exact_then_bucket_then_nearest_then_nothing(path):
    a, b = store(path, 8, m=64, p=1000), store(path, 16, m=64, p=4096)
    lookup = Lookup(path)

    def find(m, p):
        found = lookup.find(CASCADE, {"m": m, "p": p}, TARGET)
        return None if found is None else (found.schedule, found.source)

    assert find(64, 1000) == (a, "exact")
    assert find(64, 4096) == (b, "exact")
    assert find(64, 1024) == (a, "bucket")
    assert find(33, 513) == (a, "bucket")
    assert find(64, 3000) == (b, "bucket")
    assert find(64, 8192) == (b, "nearest")
    assert find(100, 2000) == (a, "nearest")
    assert find(1, 1) is None
    assert find(64, 65536) is None


def test_the_nearest_of_a_bucket(path):
    store(path, 8, m=40, p=1000)
    close = store(path, 16, m=62, p=1000)
    assert Lookup(path).find(CASCADE, {"m": 60, "p": 990}, TARGET).schedule == close


def test_the_name_of_the_function_does_not_matter_but_what_it_computes_does(path):
    schedule = store(path, 8, m=64, p=64)
    sizes = {"m": 64, "p": 64}
    assert best_schedule(replace(CASCADE, name="other"), sizes, None, TARGET, path) == schedule
    assert best_schedule(parse_cascade(TEXT.replace("sum", "max")), sizes, None, TARGET, path) is None
    assert best_schedule(parse_cascade(TEXT.replace("f32", "bf16")), sizes, None, TARGET, path) is None
    assert best_schedule(CASCADE, sizes, {"X": "bf16"}, TARGET, path) is None
    assert best_schedule(CASCADE, sizes, {"X": "f32"}, TARGET, path) == schedule
    assert best_schedule(CASCADE, sizes, None, TARGET, None) is None


def test_another_device_or_toolchain_is_a_miss(path):
    store(path, 8, m=64, p=64)
    sizes = {"m": 64, "p": 64}
    assert Lookup(path).find(CASCADE, sizes, replace(TARGET, description="another processor")) is None
    assert Lookup(path).find(CASCADE, sizes, replace(TARGET, cores=TARGET.cores + 1)) is None
    with Database.open(path) as db:
        (seed,) = db.relatives(family_of(CASCADE))
    edit(path, "UPDATE best SET toolchain = 'another'")
    assert Lookup(path).find(CASCADE, sizes, TARGET) is None
    with Database.open(path) as db:  # no answer any more, but still a seed of a search
        assert [(r.schedule, r.toolchain) for r in db.relatives(family_of(CASCADE))] == [(seed.schedule, "another")]


def test_what_is_written_later_is_seen(path, monkeypatch):
    lookup = Lookup(path)
    sizes = {"m": 64, "p": 64}
    assert lookup.find(CASCADE, sizes, TARGET) is None
    assert "no tuning database" in lookup.problem
    first = store(path, 8, **sizes)
    lookup.forget()
    assert lookup.find(CASCADE, sizes, TARGET).schedule == first
    assert lookup.problem is None

    monkeypatch.setattr(looking, "TRUST_SECONDS", 0.0)
    with Database.open(path) as db:
        better = measurement(
            16, 0.5, 0.5, 0.5, workload=Workload.of(CASCADE, sizes), device=describe_device(TARGET), toolchain=describe_toolchain(TARGET),
            role="final", baseline_ms=2.0,
        )  # fmt: skip
        db.record(better)
    assert lookup.find(CASCADE, sizes, TARGET).schedule == better.schedule


def test_a_file_replaced_by_another_is_opened_again(path, monkeypatch, tmp_path):
    monkeypatch.setattr(looking, "TRUST_SECONDS", 0.0)
    sizes = {"m": 64, "p": 64}
    store(path, 8, **sizes)
    lookup = Lookup(path)
    assert lookup.find(CASCADE, sizes, TARGET) is not None
    other = store(tmp_path / "other.db", 32, **sizes)
    os.replace(tmp_path / "other.db", path)
    assert lookup.find(CASCADE, sizes, TARGET).schedule == other
    path.unlink()
    assert lookup.find(CASCADE, sizes, TARGET) is None


def test_an_answer_is_remembered(path):
    sizes = {"m": 64, "p": 64}
    store(path, 8, **sizes)
    lookup = Lookup(path)
    first = lookup.find(CASCADE, sizes, TARGET)
    lookup._connection.close()  # type: ignore[union-attr]
    assert lookup.find(CASCADE, dict(sizes), TARGET) is first


@pytest.mark.parametrize(
    "spoil",
    [
        lambda path: path.unlink(),
        lambda path: path.write_bytes(b"some other file that is longer than a header" * 10),
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(path.read_bytes()[:3000]),
        lambda path: path.write_bytes(path.read_bytes()[:100] + b"\xff" * (len(path.read_bytes()) - 100)),
        lambda path: edit(path, "PRAGMA user_version = 99"),
        lambda path: edit(path, "PRAGMA application_id = 1"),
        lambda path: edit(path, "DROP TABLE best"),
        lambda path: edit(path, "ALTER TABLE best RENAME COLUMN schedule_json TO gone"),
        lambda path: (path.unlink(), path.mkdir()),
    ],
)
def test_a_file_that_cannot_be_used_is_a_miss_with_a_reason(path, spoil):
    sizes = {"m": 64, "p": 64}
    store(path, 8, **sizes)
    spoil(path)
    lookup = Lookup(path)
    assert lookup.find(CASCADE, sizes, TARGET) is None
    assert lookup.find(CASCADE, {"m": 1, "p": 3}, TARGET) is None
    assert lookup.problem


HOSTILE = ["", "x" * 100_000, "'; DROP TABLE best; --", "[[[[" * 5000, b"\xff\xfe", -1, 2**62, 1e308, '{"version":99}', '{"tile":{"m":0}}']


@pytest.mark.parametrize("column", ["workload", "family", "extents", "device", "toolchain", "preference", "schedule", "schedule_json"])
def test_a_hostile_value_is_a_miss(path, column):
    sizes = {"m": 64, "p": 64}
    good = store(path, 8, **sizes)
    pristine = path.read_bytes()
    for value in HOSTILE:
        path.write_bytes(pristine)
        edit(path, f"UPDATE best SET {column} = ?", value)
        for asked in (sizes, {"m": 60, "p": 64}, {"m": 128, "p": 64}):
            found = Lookup(path).find(CASCADE, asked, TARGET)
            assert found is None or found.schedule == good


def test_extents_of_another_call_cannot_be_passed_off(path):
    """A row whose extents were edited does not hash to its workload: it answers the call it was made for, and no other."""
    schedule = store(path, 8, m=64, p=64)
    edit(path, "UPDATE best SET extents = 'm=1,p=1'")
    with pytest.warns(RuntimeWarning, match="is not that of its extents"):
        assert Lookup(path).find(CASCADE, {"m": 1, "p": 1}, TARGET) is None
    assert Lookup(path).find(CASCADE, {"m": 64, "p": 64}, TARGET).schedule == schedule


def test_other_extents_answer_only_with_what_held_its_own_against_the_default(path):
    known = {"device": describe_device(TARGET), "toolchain": describe_toolchain(TARGET)}
    sizes = [{"m": 64, "p": 1000 + 100 * i} for i in range(3)]
    trial = measurement(8, 1.0, 1.0, 1.0, workload=Workload.of(CASCADE, sizes[0]), **known)
    slower = measurement(16, 1.0, 1.0, 1.0, workload=Workload.of(CASCADE, sizes[1]), role="final", baseline_ms=0.9, **known)
    better = measurement(32, 1.0, 1.0, 1.0, workload=Workload.of(CASCADE, sizes[2]), role="final", baseline_ms=1.1, **known)
    with Database.open(path, create=True) as db:
        db.record_all([trial, slower])
    assert Lookup(path).find(CASCADE, {"m": 64, "p": 1010}, TARGET) is None
    assert Lookup(path).find(CASCADE, sizes[0], TARGET).schedule == trial.schedule  # its own extents need no such proof
    with Database.open(path) as db:
        db.record(better)
    assert Lookup(path).find(CASCADE, {"m": 64, "p": 1010}, TARGET).schedule == better.schedule


def test_a_file_that_cannot_be_used_warns_once_and_never_raises(path):
    sizes = {"m": 64, "p": 64}
    store(path, 8, **sizes)
    edit(path, "UPDATE best SET schedule_json = '{}'")
    lookup = Lookup(path)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for i in range(20):
            lookup.forget()
            assert lookup.find(CASCADE, {"m": 64, "p": 64 + i % 2}, TARGET) is None
    assert [str(w.message) for w in told if "cannot be used" in str(w.message)] != [] and len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Lookup(path).find(CASCADE, sizes, TARGET) is None
        path.write_bytes(b"no database at all" * 20)
        assert Lookup(path).find(CASCADE, sizes, TARGET) is None


def test_a_file_that_is_not_there_is_no_fault(path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        lookup = Lookup(path)
        assert lookup.find(CASCADE, {"m": 64, "p": 64}, TARGET) is None
    assert "no tuning database" in lookup.problem


def test_a_clock_that_jumps_decides_nothing(path, monkeypatch):
    """Names of events hold a time, for people; who wins, what is found and what is new do not depend on it."""
    import time

    sizes = {"m": 64, "p": 64}
    answers = []
    for clock in ([1e9, 2e9, 3e9], [3e9, 1e9, -5.0]):
        path.unlink(missing_ok=True)
        for tile, now in zip((8, 16, 32), clock, strict=True):
            monkeypatch.setattr(time, "time", lambda now=now: now)
            store(path, tile, **sizes)
        answers.append(Lookup(path).find(CASCADE, sizes, TARGET).schedule)
    assert answers[0] == answers[1]


def test_missing_extents_are_a_miss(path):
    store(path, 8, m=64, p=64)
    lookup = Lookup(path)
    assert lookup.find(CASCADE, {"m": 64}, TARGET) is None
    assert "no extent given for rank p" in lookup.problem


def test_a_fork_does_not_share_the_connection(path, unprivileged):
    sizes = {"m": 64, "p": 64}
    schedule = store(path, 8, **sizes)
    lookup = Lookup(path)
    assert lookup.find(CASCADE, sizes, TARGET) is not None
    before = lookup._connection

    def in_child() -> None:
        lookup._checked = -1e9
        if os.getuid() == 0:  # the folder is the parent's
            assert lookup.find(CASCADE, sizes, TARGET).schedule == schedule
            assert lookup._connection is not before
        else:
            lookup.find(CASCADE, sizes, TARGET)
            assert lookup._connection is not before

    assert unprivileged(in_child) == 0
    assert lookup.find(CASCADE, sizes, TARGET).schedule == schedule
