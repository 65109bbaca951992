"""The schedule database: what is written is there, what is damaged is refused or missed, and nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import pytest
from einfall.ir.errors import DatabaseError
from einfall.tuner.database import Database, queries, schema
from einfall.tuner.database.choice import choose, error_of_median
from einfall.tuner.database.records import Evidence, Sampled, bucket_text, ulid
from made_up import EVIDENCE, failed, measurement, workload

KEY = tuple(getattr(measurement(1, 1.0), name).id for name in ("workload", "device", "toolchain", "policy"))


def edit(path: Path, sql: str, *parameters: object) -> None:
    """Changes a file behind the database's back."""
    with sqlite3.connect(path) as connection:
        connection.execute(sql, parameters)
    connection.close()


# What is written ------------------------------------------------------------------------------------------------------------------


def test_a_measurement_is_kept_as_it_was_taken(path):
    m = measurement(8, 3.0, 1.0, 2.0, host="here", seed=7, trial=4, commit="abc", run=ulid())
    with Database.open(path, create=True) as db:
        db.record(m)
    with Database.open(path, read_only=True) as db:
        shown = db.show(m.id)
        best = db.best(m.workload.id, m.device.id, m.toolchain.id)
    assert shown["samples_ms"] == "[3.0,1.0,2.0]"
    assert (shown["host"], shown["seed"], shown["trial"], shown["code_commit"], shown["status"]) == ("here", 7, 4, "abc", "ok")
    assert shown["evidence"]["oracle"] == "reference in float64"
    assert best.schedule == m.schedule
    assert (best.median_ms, best.samples, best.relative) == (2.0, 3, None)
    assert (best.name, best.device_model, best.extents) == ("made_up", "a processor", (("m", 4),))


def test_failures_are_kept_and_never_win(path):
    with Database.open(path, create=True) as db:
        for status in ("crash", "timeout", "memory", "wrong", "nondeterministic", "build", "error"):
            db.record(failed(8, status))
        w = workload()
        assert db.ls() == ()
        assert sum(db.show(w.id)["measurements"].values()) == 7
        assert db.known(w.id, measurement(1, 1.0).device.id, measurement(1, 1.0).toolchain.id, measurement(1, 1.0).policy.id)


def test_the_evidence_comes_back(path):
    evidence = Evidence((1, 2), ("normal", "holes"), ((("m", 4), ("p", 7)), (("m", 1), ("p", 1))), 1e-5, 3e-6)
    m = measurement(8, 1.0, 1.0, 1.0, evidence=evidence)
    with Database.open(path, create=True) as db:
        db.record(m)
        assert db.evidence(db.show(m.id)["evidence"]["id"]) == evidence
        assert db.evidence("nothing") is None


def test_nothing_without_evidence_wins(path):
    with Database.open(path, create=True) as db:
        db.record(measurement(8, 1.0, 1.0, 1.0, evidence=None))
        assert db.ls() == ()


def test_show_takes_the_beginning_of_an_id_and_says_when_it_is_not_enough(path):
    with Database.open(path, create=True) as db:
        db.record(measurement(8, 1.0, 1.0, 1.0))
        w = workload()
        assert db.show(w.id[:10])["kind"] == "workload"
        with pytest.raises(DatabaseError, match=r"nothing in .* begins with 'zz'"):
            db.show("zz")
        for i in range(40):
            db.record(measurement(i + 9, 2.0, 2.0, 2.0))
        with pytest.raises(DatabaseError, match="several ids"):
            db.show("0")


def test_rolled_back_as_one(path):
    good, bad = measurement(8, 1.0, 1.0, 1.0), measurement(16, 1.0, float("nan"), 1.0)
    with Database.open(path, create=True) as db:
        with pytest.raises(DatabaseError, match="cannot be recorded: a sample is nan"):
            db.record_all([good, bad])
        assert db.ls() == ()
        with pytest.raises(DatabaseError), db.writing() as connection:
            connection.execute("DELETE FROM measurement")
            connection.execute("INSERT INTO nothing VALUES (1)")
        db.record(good)
        assert len(db.ls()) == 1


def test_a_measurement_is_one_however_often_it_is_recorded(path):
    m = measurement(8, 1.0, 1.0, 1.0)
    with Database.open(path, create=True) as db:
        assert db.record(m) == db.record(m) == m.id
        assert sum(db.show(workload().id)["measurements"].values()) == 1
        again = replace(m, event=ulid())  # the same samples, taken another time
        assert db.record(again) == again.id != m.id
        assert sum(db.show(workload().id)["measurements"].values()) == 2


@pytest.mark.parametrize(
    "changes",
    [
        {"samples_ms": ()}, {"status": "crash"}, {"status": "fine"}, {"role": "boss"}, {"basis": "guessed"}, {"samples_ms": (1.0, -1.0)},
        {"samples_ms": (1.0, 1e-9)}, {"samples_ms": (float("inf"),)}, {"baseline_ms": 0.0}, {"trial": -1}, {"seed": 1 << 70},
    ],
    ids=str,
)  # fmt: skip
def test_what_no_reader_would_take_is_not_written(path, changes):
    with Database.open(path, create=True) as db:
        with pytest.raises(DatabaseError, match="cannot be recorded"):
            db.record(replace(measurement(8, 1.0, 1.0, 1.0), **changes))
        assert db.show(db.record(failed(8, "crash", "\ud800\x00 " + "long " * 5000)))["reason"].startswith("?\ufffd long")


def test_an_estimate_never_wins(path):
    with Database.open(path, create=True) as db:
        db.record(measurement(8, 0.1, 0.1, 0.1, basis="estimated"))
        assert db.ls() == () and db.known(*KEY) == {}
        db.record(measurement(16, 1.0, 1.0, 1.0))
        assert dict(db.ls()[0].schedule.tile) == {"m": 16}
        assert db.rebuild_best() == 1 and dict(db.ls()[0].schedule.tile) == {"m": 16}


def test_nothing_wins_whose_error_is_above_its_tolerance(path):
    wrong = replace(EVIDENCE, largest_error=2e-6)
    with Database.open(path, create=True) as db:
        db.record(measurement(8, 0.1, 0.1, 0.1, evidence=wrong))
        assert db.ls() == ()
        db.record(measurement(16, 1.0, 1.0, 1.0))
        assert dict(db.ls()[0].schedule.tile) == {"m": 16}


# Who wins -------------------------------------------------------------------------------------------------------------------------


def sampled(schedule: str, *samples: float, role: str = "trial", baseline: float | None = None, name: str = "") -> Sampled:
    return Sampled(name or ulid(), schedule, "ok", "", role, samples, baseline, "evidence")  # type: ignore[arg-type]


def test_the_fastest_median_wins_not_the_fastest_sample():
    slow_but_lucky = sampled("aa", 0.1, 5.0, 5.0, 5.0, 5.0)
    steady = sampled("bb", 2.0, 2.0, 2.0, 2.0, 2.0)
    assert choose([slow_but_lucky, steady]).schedule_id == "bb"


def test_ties_inside_the_noise_go_to_the_smallest_hash():
    a = sampled("bb", 1.00, 1.02, 0.98, 1.01, 0.99)
    b = sampled("aa", 1.005, 1.02, 0.98, 1.01, 0.99)
    assert choose([a, b]).schedule_id == choose([b, a]).schedule_id == "aa"
    clear = sampled("aa", 1.2, 1.22, 1.18, 1.21, 1.19)
    assert choose([a, clear]).schedule_id == "bb"


def test_noise_never_lets_a_much_slower_schedule_win():
    noisy = sampled("bb", 0.5, 1.0, 1.5)
    slower = sampled("aa", 0.6, 1.1, 1.6)
    assert choose([noisy, slower]).schedule_id == "bb"


def test_finals_outrank_trials_and_are_compared_by_their_own_default():
    quiet = [sampled("default", 1.0, 1.0, 1.0, role="final", baseline=1.0), sampled("x", 0.8, 0.8, 0.8, role="final", baseline=1.0)]
    # on a busy day everything takes twice as long; y beats the default by more than x did
    busy = [sampled("default", 2.0, 2.0, 2.0, role="final", baseline=2.0), sampled("y", 1.4, 1.4, 1.4, role="final", baseline=2.0)]
    lucky_trial = [sampled("z", 0.1, 0.1, 0.1)]
    choice = choose([*quiet, *busy, *lucky_trial])
    assert (choice.schedule_id, choice.relative) == ("y", pytest.approx(0.7))


def test_too_few_samples_do_not_win():
    assert choose([sampled("aa", 0.1, 0.1)]) is None
    assert choose([]) is None


def test_the_choice_does_not_depend_on_the_order():
    rng = random.Random(0)
    found = [
        sampled(f"{i % 7:02}", *[rng.uniform(1, 1.1) for _ in range(5)], role=rng.choice(["trial", "final"]), baseline=rng.uniform(1, 1.1))
        for i in range(40)
    ]
    answers = set()
    for _ in range(20):
        rng.shuffle(found)
        answers.add(choose(found))
    assert len(answers) == 1


def test_the_error_of_a_median_ignores_a_few_wild_samples():
    steady = [1.0, 1.01, 0.99, 1.02, 0.98, 1.0, 1.0]
    assert error_of_median([*steady, 50.0]) < 0.02
    assert error_of_median([1.0]) == 0.0


def test_best_can_be_rebuilt_and_comes_out_the_same(path):
    rng = random.Random(1)
    with Database.open(path, create=True) as db:
        for i in range(60):
            base = 1 + (i % 6) / 10
            db.record(measurement(i % 6 + 1, *[base + rng.uniform(0, 0.02) for _ in range(4)], workload=workload(m=2 ** (i % 3))))
        before = db.ls()
        assert len(before) == 3
        edit(path, "UPDATE best SET schedule = 'none', median_ms = 1e-9")
        assert db.ls() == ()
        assert db.rebuild_best() == 3
        assert db.ls() == before


def test_a_late_loser_does_not_replace_the_winner(path):
    with Database.open(path, create=True) as db:
        db.record(measurement(8, 1.0, 1.0, 1.0))
        db.record(measurement(16, 3.0, 3.0, 3.0))
        assert dict(db.ls()[0].schedule.tile) == {"m": 8}
        db.record(measurement(32, 0.5, 0.5, 0.5))
        assert dict(db.ls()[0].schedule.tile) == {"m": 32}


def test_the_winner_measured_again_and_slower_is_settled_again(path):
    with Database.open(path, create=True) as db:
        db.record(measurement(8, 1.0, 1.0, 1.0))
        db.record(measurement(16, 1.5, 1.5, 1.5))
        for _ in range(3):
            db.record(measurement(8, 4.0, 4.0, 4.0))
        assert dict(db.ls()[0].schedule.tile) == {"m": 16}


def test_settling_by_steps_is_settling_at_once(path):
    """What each transaction leaves is what all measurements give: the filters that spare work change nothing."""
    rng = random.Random(2)
    with Database.open(path, create=True) as db:
        for i in range(150):
            base = rng.choice([1.0, 1.01, 1.02, 1.05, 1.5])
            samples = [base * rng.choice([0.99, 1.0, 1.0, 1.02, 3.0]) for _ in range(rng.randint(2, 6))]
            final = {"role": "final", "baseline_ms": 1.1} if rng.random() < 0.1 and i > 80 else {}
            db.record(measurement(rng.randint(1, 9), *samples, **final))
            rows = [Sampled.from_row(row) for row in queries.rows(db.connection, "SELECT * FROM measurement")]
            choice = choose(rows)
            found = db.ls()
            assert (choice is None) == (found == ())
            if choice is not None:
                kept = (found[0].schedule.hash, found[0].measurement, found[0].median_ms, found[0].relative, found[0].samples)
                assert kept == (choice.schedule_id, choice.measurement, choice.median_ms, choice.relative, choice.samples)


def test_a_bucket_is_a_power_of_two():
    assert bucket_text((("a", 1), ("b", 2), ("c", 3), ("d", 4), ("e", 5), ("f", 1024), ("g", 1025))) == "a=0,b=1,c=2,d=2,e=3,f=10,g=11"


# Files that cannot be used ----------------------------------------------------------------------------------------------------------


def test_a_missing_file_is_named_and_not_made(path):
    for options in ({}, {"read_only": True}):
        with pytest.raises(DatabaseError, match=r"no tuning database at .*tuned.db") as caught:
            Database.open(path, **options)
        assert "einfall tune" in str(caught.value)
    assert not path.exists()


def test_folders_are_made_on_the_way(tmp_path):
    with Database.open(tmp_path / "a" / "b" / "tuned.db", create=True) as db:
        assert db.ls() == ()


@pytest.mark.parametrize("content", [b"just some text, long enough to be looked at as a header\n" * 100, b"\x00" * 5000, b"x"])
def test_a_file_that_is_no_database_is_refused_and_left_alone(path, content):
    path.write_bytes(content)
    for options in ({"create": True}, {}, {"read_only": True}):
        with pytest.raises(DatabaseError, match=r"tuned.db"):
            Database.open(path, **options)
    assert path.read_bytes() == content


def test_an_empty_file_is_only_filled_when_asked(path):
    path.touch()
    with pytest.raises(DatabaseError, match="empty file"):
        Database.open(path)
    with Database.open(path, create=True) as db:
        assert db.ls() == ()


def test_the_database_of_another_application_is_refused_and_left_alone(path):
    edit(path, "CREATE TABLE customers (name TEXT)")
    before = path.read_bytes()
    for options in ({"create": True}, {}, {"read_only": True}):
        with pytest.raises(DatabaseError, match="another application"):
            Database.open(path, **options)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    ("sql", "kind"),
    [
        ("ALTER TABLE best RENAME TO hidden; CREATE VIEW best AS WITH RECURSIVE n(x) AS (SELECT 1 UNION ALL SELECT x FROM n) "
         "SELECT x AS workload, x AS device FROM n", "view"),
        ("CREATE TRIGGER t AFTER INSERT ON measurement BEGIN DELETE FROM measurement; END", "trigger"),
        ("CREATE VIRTUAL TABLE f USING fts5(x)", "virtual table"),
    ],
)  # fmt: skip
def test_a_file_with_something_that_would_run_is_refused(path, sql, kind):
    """An endless view in the place of a table would hang the call of a kernel."""
    Database.open(path, create=True).close()
    with sqlite3.connect(path) as connection:
        connection.executescript(sql)
    connection.close()
    for options in ({}, {"read_only": True}):
        with pytest.raises(DatabaseError, match=f"has the {kind}"):
            Database.open(path, **options)


def test_a_newer_schema_is_refused(path):
    Database.open(path, create=True).close()
    edit(path, f"PRAGMA user_version = {schema.SCHEMA_VERSION + 1}")
    for options in ({"create": True}, {}, {"read_only": True}):
        with pytest.raises(DatabaseError, match=f"schema {schema.SCHEMA_VERSION + 1}.*reads up to {schema.SCHEMA_VERSION}") as caught:
            Database.open(path, **options)
        assert "upgrade" in str(caught.value)


def test_a_truncated_file_is_an_error_that_says_what_to_do(path):
    with Database.open(path, create=True) as db:
        for i in range(300):
            db.record(measurement(i + 1, 1.0, 1.0, 1.0))
    data = path.read_bytes()
    assert len(data) > 40_000
    for length in (10, 100, 5000, len(data) // 2):
        path.write_bytes(data[:length])
        with pytest.raises(DatabaseError, match=r"tuned.db") as caught, Database.open(path, read_only=True) as db:
            db.ls()
            db.check()
        assert "try:" in str(caught.value)


def test_a_folder_is_no_database(tmp_path):
    with pytest.raises(DatabaseError, match="cannot be opened"):
        Database.open(tmp_path, create=True)


def test_a_read_only_file_can_be_read_and_says_why_it_cannot_be_written(unprivileged):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tuned.db"
        with Database.open(path, create=True) as db:
            db.record(measurement(8, 1.0, 1.0, 1.0))
        path.chmod(0o444)
        Path(folder).chmod(0o555)

        def look() -> None:
            with Database.open(path, read_only=True) as db:
                assert len(db.ls()) == 1
            with pytest.raises(DatabaseError, match=r"cannot be (written|opened)"):
                Database.open(path, create=True)

        status = unprivileged(look)
        Path(folder).chmod(0o755)
        assert status == 0


def test_a_write_to_a_full_disk_is_an_error_and_loses_nothing(path):
    with Database.open(path, create=True) as db:
        db.record(measurement(8, 1.0, 1.0, 1.0))
        pages = db.connection.execute("PRAGMA page_count").fetchone()[0]
        db.connection.execute(f"PRAGMA max_page_count = {pages}")
        with pytest.raises(DatabaseError, match="disk is full"):
            for i in range(2000):
                db.record(measurement(i + 9, *[1.0 + i] * 50))
        db.check()
        assert len(db.ls()) == 1


LIMITED = """
import resource, signal, sys
sys.path.insert(0, {folder!r})
from made_up import measurement
from einfall.ir.errors import DatabaseError
from einfall.tuner.database import Database
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
db = Database.open({path!r})
resource.setrlimit(resource.RLIMIT_FSIZE, ({size}, {size}))
try:
    for i in range(100_000):
        print(db.record(measurement(i + 1, *[1.0 + i] * 20)), flush=True)
except DatabaseError as error:
    print("refused", error.what)
"""


def test_a_file_that_may_not_grow_keeps_all_that_was_written(path):
    """As with a full disk or a quota, wherever in SQLite's writing it strikes."""
    with Database.open(path, create=True) as db:
        db.record(measurement(200_000, 0.5, 0.5, 0.5))
    for room in (40_000, 300_000, 1_500_000):
        code = LIMITED.format(folder=str(Path(__file__).parent), path=str(path), size=path.stat().st_size + room)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        *ids, last = done.stdout.splitlines()
        assert last.startswith("refused") and str(path) in last, done.stdout[-200:]
        with Database.open(path) as db:
            db.check()
            kept = {row[0] for row in db.read("SELECT id FROM measurement")}
            assert kept >= set(ids)
            assert db.ls()[0].median_ms == 0.5
            db.record(measurement(200_000, 0.5, 0.5, 0.5))  # with room again, it goes on


# Values that cannot be used ---------------------------------------------------------------------------------------------------------

HOSTILE = [
    "", "x" * 100_000, "'; DROP TABLE best; --", "\x00", "[1e999]", "[NaN]", "[-1]", "[]", "[1,", "{}", "[[[[" * 5000, "null", b"\xff\xfe",
    -1, 0, 2**62, 1e308, -1e308, None, '{"version":1,"tile":{"m":-4}}', '{"version":99}', '{"version":1,"tile":{"m":1e9}}',
]  # fmt: skip
COLUMNS = [
    ("best", c) for c in
    ("workload", "family", "extents", "device", "toolchain", "policy", "preference", "schedule", "schedule_json", "measurement",
     "median_ms", "relative", "samples", "bucket")
] + [("measurement", c) for c in ("samples_ms", "status", "role", "baseline_ms", "schedule", "evidence", "reason", "median_ms",
                                        "name", "id")] + [
    ("schedule", "json"), ("workload", "extents"), ("workload", "family"), ("workload", "cascade"), ("device", "model"),
    ("policy", "cache"),
    ("evidence", "seeds"), ("evidence", "shapes"), ("evidence", "tolerance"), ("evidence", "largest_error"),
]  # fmt: skip


@pytest.mark.parametrize("column", COLUMNS, ids=lambda c: ".".join(c))
def test_a_hostile_value_is_a_miss_and_never_a_wrong_schedule(tmp_path, column):
    table, name = column
    source = tmp_path / "source.db"
    with Database.open(source, create=True) as db:
        good = measurement(8, 1.0, 1.0, 1.0)
        db.record(good)
    for i, value in enumerate(HOSTILE):
        path = tmp_path / f"{i}.db"
        path.write_bytes(source.read_bytes())
        try:
            edit(path, f"UPDATE {table} SET {name} = ?", value)
        except sqlite3.Error:  # NOT NULL keeps this value out
            continue
        with Database.open(path) as db:
            for rebuild in (False, True):
                if rebuild:
                    db.rebuild_best()
                found = db.best(good.workload.id, good.device.id, good.toolchain.id)
                assert found is None or found.schedule == good.schedule
                assert all(r.schedule == good.schedule for r in db.ls())
            db.known(good.workload.id, good.device.id, good.toolchain.id, good.policy.id)
            db.relatives(good.workload.family)
            db.record(measurement(16, 5.0, 5.0, 5.0))


def test_a_swapped_schedule_is_noticed(path):
    with Database.open(path, create=True) as db:
        db.record(measurement(8, 1.0, 1.0, 1.0))
        other = measurement(16, 5.0, 5.0, 5.0)
        db.record(other)
        edit(path, "UPDATE best SET schedule_json = ?", other.schedule.to_json())
        assert db.ls() == ()


# Many writers -----------------------------------------------------------------------------------------------------------------------

WRITER = """
import sys
sys.path.insert(0, {folder!r})
from made_up import measurement
from einfall.tuner.database import Database
db = Database.open({path!r}, create=True)
for i in range({count}):
    m = measurement(i % 40 + 1, *[1 + (i * 37 % 101) / 100] * 3, host=sys.argv[1], trial=i)
    db.record(m)
    print(m.id, flush=True)
"""


def writer(path: Path, count: int, name: str) -> subprocess.Popen[bytes]:
    code = WRITER.format(folder=str(Path(__file__).parent), path=str(path), count=count)
    return subprocess.Popen([sys.executable, "-c", code, name], stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_four_processes_write_at_once_and_nothing_is_lost(path):
    children = [writer(path, 80, f"writer{i}") for i in range(4)]
    told = []
    for child in children:
        out, err = child.communicate(timeout=120)
        assert child.returncode == 0, err.decode()
        told += out.decode().split()
    assert len(told) == 320
    with Database.open(path, read_only=True) as db:
        db.check()
        assert sum(db.show(workload().id)["measurements"].values()) == 320
        assert {m["id"] for m in (db.show(name) for name in told[::16])} == set(told[::16])


def test_a_writer_killed_in_the_middle_keeps_what_it_had_committed(path):
    child = writer(path, 1_000_000, "victim")
    told = [child.stdout.readline() for _ in range(30)]  # type: ignore[union-attr]
    child.send_signal(signal.SIGKILL)
    rest, _ = child.communicate(timeout=60)
    ids = [line.decode().strip() for line in told] + [line for line in rest.decode().split("\n") if len(line) == 32]
    with Database.open(path) as db:
        db.check()
        assert sum(db.show(workload().id)["measurements"].values()) >= len(ids) >= 30
        for name in ids:
            assert db.show(name)["status"] == "ok"
        before = db.ls()
        db.rebuild_best()
        assert db.ls() == before
        db.record(measurement(8, 1.0, 1.0, 1.0))


def test_a_writer_waits_for_another_transaction(path):
    Database.open(path, create=True).close()
    holder = sqlite3.connect(path, isolation_level=None)
    holder.execute("BEGIN IMMEDIATE")
    child = writer(path, 1, "patient")
    time.sleep(0.5)
    holder.execute("COMMIT")
    holder.close()
    out, err = child.communicate(timeout=60)
    assert child.returncode == 0, err.decode()
    assert len(out.split()) == 1
    assert os.path.exists(path)
