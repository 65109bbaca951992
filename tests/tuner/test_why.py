"""Explaining a choice, counting, comparing, verifying and tidying up; and the commands that do so."""

from __future__ import annotations

import json
import sqlite3
from dataclasses import replace

import einfall as ef
import pytest
from einfall.cli import run
from einfall.ir.errors import DatabaseError
from einfall.tuner.database import Database, Device, Policy, Toolchain, merge, ulid
from einfall.tuner.database.merge import content
from einfall.tuner.database.upkeep import diff, gc, stats, verify
from einfall.tuner.database.why import why
from made_up import EVIDENCE, failed, measurement, workload


def edit(path, sql, *parameters):
    with sqlite3.connect(path) as connection:
        connection.execute(sql, parameters)
    connection.close()


def finals(*times, **changes):
    """Interleaved finals of the schedules 1, 2, ... against a default of 2 ms."""
    return [measurement(i + 1, *[x] * 5, role="final", baseline_ms=2.0, host="lab", **changes) for i, x in enumerate(times)]


# why --------------------------------------------------------------------------------------------------------------------------------------


def test_why_tells_the_finals_from_the_rest(path):
    with Database.open(path, create=True) as db:
        db.record_all([*finals(2.0, 1.0, 1.5), measurement(9, 0.1, 0.1, 0.1), failed(10, "crash", "signal 11")])
        db.record(measurement(11, 0.1, 0.1))
        db.record(measurement(12, 0.1, 0.1, 0.1, evidence=None))
        db.record(measurement(13, 0.1, 0.1, 0.1, basis="estimated"))
        db.record(measurement(14, 0.1, 0.1, 0.1, evidence=replace(EVIDENCE, largest_error=1.0)))
        (found,) = why(db, "made_up")
        assert why(db, workload().id[:8]) == [found]
        winner = db.ls()[0].schedule.hash
    verdicts = {e.schedule_id: e for e in found.entrants}
    assert found.winner == winner and verdicts[winner].verdict == "wins"
    assert (verdicts[winner].median, verdicts[winner].low, verdicts[winner].high, verdicts[winner].samples) == (0.5, 0.5, 0.5, 5)
    told = [verdicts[measurement(tile, 1.0).schedule.hash].verdict for tile in (1, 3, 9, 10, 11, 12, 13, 14)]
    assert told == [
        "slower", "slower", "not in the finals", "crash: signal 11", "fewer than 3 samples", "no evidence that it is right",
        "estimated, not measured", "no evidence that it is right",
    ]  # fmt: skip
    assert "interleaved finals" in found.reason and "50.0 % ahead of the next" in found.reason
    assert found.evidence["oracle"] == EVIDENCE.oracle
    assert [s["origin"] for s in found.sources] == ["recorded here"] and found.sources[0]["host"] == "lab"


def test_why_names_a_tie_and_its_rule(path):
    with Database.open(path, create=True) as db:
        db.record_all([measurement(i, 1.0 + i / 1e4, 1.02, 0.98, 1.01, 0.99) for i in (1, 2)])
        (found,) = why(db, "made_up")
    assert sorted(e.verdict for e in found.entrants) == ["ties", "wins"]
    assert found.winner == min(e.schedule_id for e in found.entrants) and "smallest hash" in found.reason
    assert all(e.low < e.median < e.high for e in found.entrants)


def test_why_names_the_file_that_a_measurement_came_from(tmp_path):
    a, b = tmp_path / "a.db", tmp_path / "b.db"
    for place, tile, time_ms in ((a, 8, 2.0), (b, 16, 1.0)):
        with Database.open(place, create=True) as db:
            db.record(measurement(tile, *[time_ms] * 3, host=place.stem))
    with Database.open(a) as db:
        merge.merge(db, b)
        (found,) = why(db, "made_up")
        assert [(s["host"], s["origin"]) for s in found.sources] == [("b", f"merge {b}")]


def test_devices_toolchains_and_policies_are_explained_apart(path):
    with Database.open(path, create=True) as db:
        db.record(measurement(8, 1.0, 1.0, 1.0))
        db.record(measurement(16, 0.5, 0.5, 0.5, toolchain=Toolchain("0.2.0", 2, "tvm", "tvm 0.28")))
        db.record(measurement(32, 0.2, 0.2, 0.2, policy=Policy(cache="warm")))
        found = why(db, "made_up")
        assert len({w.winner for w in found}) == 3 and all("alone" in w.reason for w in found)
        with pytest.raises(DatabaseError, match="nothing was measured for 'other'"):
            why(db, "other")


def test_why_passes_over_what_was_damaged(path):
    with Database.open(path, create=True) as db:
        db.record_all([measurement(8, 1.0, 1.0, 1.0), measurement(16, 2.0, 2.0, 2.0)])
    edit(path, "UPDATE measurement SET samples_ms = '[1e-5,1e-5,1e-5]', median_ms = 1e-5 WHERE median_ms = 2.0")
    edit(path, "UPDATE evidence SET seeds = x'ff'")
    with Database.open(path) as db:
        (found,) = why(db, "made_up")
        assert found.winner is not None and {e.verdict for e in found.entrants} == {
            "no evidence that it is right", "damaged: does not hash to its name",
        }  # fmt: skip
        db.rebuild_best()
        assert why(db, "made_up")[0].winner is None


# stats, diff, verify, gc ------------------------------------------------------------------------------------------------------------


def test_stats_counts(path):
    with Database.open(path, create=True) as db:
        db.record_all([*finals(2.0, 1.0, run=ulid()), failed(10, "crash"), measurement(13, 0.1, 0.1, 0.1, basis="estimated")])
        found = stats(db)
    assert found["rows"]["measurement"] == 4 and found["rows"]["best"] == 1 and found["rows"]["schedule"] == 4
    assert found["statuses"] == {"crash": 1, "ok": 3} and found["bases"] == {"estimated": 1, "measured": 3}
    assert sum(row["measurements"] for row in found["measured"]) == 4 and {row["host"] for row in found["measured"]} == {"lab", ""}
    assert found["bytes"] == path.stat().st_size or found["bytes"] > 0


def test_diff_names_what_only_one_has(tmp_path):
    a, b = tmp_path / "a.db", tmp_path / "b.db"
    shared = measurement(8, 1.0, 1.0, 1.0)
    with Database.open(a, create=True) as first, Database.open(b, create=True) as second:
        first.record(shared)
        second.record_all([shared, measurement(16, 0.5, 0.5, 0.5), measurement(8, 1.0, 1.0, 1.0, workload=workload(m=64))])
        found = diff(first, second)
        assert found["measurements"] == {"both": 1, "first": 0, "second": 2}
        changed = {tuple(w["extents"].items()): (w["first"], w["second"]) for w in found["winners"]}
        assert changed[("m", 64),][0] is None and changed[("m", 4),][1]["median_ms"] == 0.5
        assert diff(first, first)["winners"] == []


FAULTS = [
    ("UPDATE measurement SET median_ms = 0.5", "hash to its name"),
    ("UPDATE device SET model = 'other'", "hash to its name"),
    ("DELETE FROM evidence", "its evidence"),
    ("DELETE FROM schedule", "its schedule"),
    ("UPDATE best SET median_ms = 0.1", "the winner is not the one"),
    ("DELETE FROM best", "the winner is not the one"),
    ("INSERT INTO best SELECT 'w', device, toolchain, policy, family, extents, bucket, preference, schedule, schedule_json, measurement, "
     "median_ms, relative, samples FROM best", "the winner is not the one"),
]  # fmt: skip


@pytest.mark.parametrize(("sql", "fault"), FAULTS)
def test_verify_finds_what_was_changed_and_gc_mends_what_can_be(path, sql, fault):
    with Database.open(path, create=True) as db:
        db.record_all([measurement(8, 1.0, 1.0, 1.0), failed(16, "crash")])
        assert verify(db) == []
    edit(path, sql)
    with Database.open(path) as db:
        assert any(fault in row["fault"] for row in verify(db))
        gc(db, damaged=True)
        assert not any("winner" in row["fault"] or "hash" in row["fault"] for row in verify(db))


def test_verify_finds_a_sensible_looking_row_whose_values_are_not(path):
    """The name is right, so it is as it was written; but nobody could have measured it."""
    from einfall.tuner.database.rows import MEASUREMENT

    with Database.open(path, create=True) as db:
        db.record(measurement(8, 1.0, 1.0, 1.0))
        (row,) = db.read(f"SELECT {', '.join(MEASUREMENT.names)} FROM measurement")
        values = dict(zip(MEASUREMENT.names, row, strict=True)) | {"samples_ms": "[1.0,-1.0,1.0]"}
        bad = MEASUREMENT.row(values)
        with db.writing() as connection:
            connection.execute(f"INSERT INTO measurement ({', '.join(MEASUREMENT.names)}) VALUES ({', '.join('?' * len(bad))})", bad)
        assert [(f["id"], f["fault"]) for f in verify(db)] == [(bad[0], "a sample is -1.0 ms")]


def test_gc_removes_what_nothing_refers_to_and_no_measurement(path):
    with Database.open(path, create=True) as db:
        db.record_all([measurement(i, 1.0 + i, 1.0 + i, 1.0 + i) for i in range(1, 30)])
        before = content(db)
        with db.writing() as connection:
            connection.execute("INSERT INTO schedule VALUES ('orphan', '{}')")
            connection.execute("INSERT INTO lease VALUES ('a', '', 1, 0, 'done'), ('b', '', 1, 2, 'quarantined')")
        found = gc(db)
        assert found["removed"]["schedule"] == 1 and found["removed"]["lease"] == 1 and found["winners"] == 1
        assert content(db) == before and db.read("SELECT work FROM lease") == [("b",)]
        assert verify(db) == []


# The commands -----------------------------------------------------------------------------------------------------------------------------


@pytest.fixture
def call(tmp_path, monkeypatch, capfd):
    """Runs `einfall db`; its status, stdout and stderr."""
    monkeypatch.chdir(tmp_path)

    def answer(*words):
        with ef.configure(database=tmp_path / "tuned.db"):
            status = run(["db", *(str(w) for w in words)])
        captured = capfd.readouterr()
        return status, captured.out, captured.err

    with Database.open(tmp_path / "tuned.db", create=True) as db:
        db.record_all(finals(2.0, 1.0))
    with Database.open(tmp_path / "other.db", create=True) as db:
        db.record_all([*finals(2.0, 0.5), failed(7, "crash", "\x1b[31mred")])
    return answer


def test_every_command_answers_in_text_and_in_json(call, tmp_path):
    for words in (
        ["ls"], ["best", "made_up"], ["why", "made_up"], ["show", workload().id[:12]], ["stats"], ["diff", "other.db"],
        ["merge", "other.db"], ["export", "store"], ["import", "store"], ["pull", "store"], ["verify"], ["gc"],
    ):  # fmt: skip
        status, out, err = call(*words)
        assert (status, err) == (0, "") and out, words
        assert "\x1b[31m" not in out
        status, out, err = call(*words, "--json")
        assert (status, err) == (0, ""), words
        json.loads(out)


def test_hostile_names_are_text_in_a_terminal(call, tmp_path):
    """Neither markup of tables nor escape sequences come through, and none of them ends a command with a traceback."""
    hostile = "[/b]\x1b[2J\x07[red]\u202e"
    known = {"workload": replace(workload(), name=hostile), "device": Device("cpu", hostile, hostile, 2), "host": hostile}
    with Database.open(tmp_path / "bad.db", create=True) as db:
        db.record_all([measurement(8, 1.0, 1.0, 1.0, **known), failed(9, "crash", hostile)])
    for words in (["ls"], ["best", hostile], ["why", hostile], ["show", workload().id[:12]], ["stats"], ["diff", "other.db"], ["verify"]):
        status, out, err = call(*words, "--db", "bad.db")
        assert (status, err) == (0, ""), words
        assert not set("\x1b\x07\u202e") & set(out), words
    for command in ("why", "best"):
        status, out, err = call(command, "none", "--db", "bad.db")
        assert status == 2 and not set("\x1b\x07\u202e") & set(err)


def test_the_text_of_why_names_the_winner_its_evidence_and_its_source(call):
    call("merge", "other.db")
    _, out, _ = call("why", "made_up")
    for words in ("made_up m=4 on a processor", "interleaved finals", "reference in float64", "by lab", "merge other.db"):
        assert words in out, words
    assert "0.375 of the default" in out  # five ratios of 0.5 and five of 0.25


def test_a_merge_makes_the_file_and_twice_changes_nothing(call):
    first = json.loads(call("merge", "tuned.db", "other.db", "--db", "team.db", "--json")[1])
    assert [s["added"]["measurement"] for s in first["sources"].values()] == [2, 3]
    again = json.loads(call("merge", "other.db", "tuned.db", "--db", "team.db", "--json")[1])
    assert all(s["added"] == {} for s in again["sources"].values()) and again["winners"] == 1


def test_a_refused_segment_is_named_and_the_status_says_so(call, tmp_path):
    name = json.loads(call("export", "store", "--json")[1])["segments"][0]
    (tmp_path / "store" / f"{name}.jsonl.gz").write_bytes(b"spoilt")
    status, _, err = call("import", "store", "--db", "new.db")
    assert status == 1 and name in err and "refused" in err
    assert call("verify", "--db", "new.db")[0] == 0


def test_verify_ends_with_1_for_a_fault(call, tmp_path):
    edit(tmp_path / "tuned.db", "UPDATE device SET model = 'other'")
    status, out, _ = call("verify")
    assert status == 1 and "does not hash to its name" in out
    assert json.loads(call("verify", "--json")[1])["sound"] is False
    assert call("gc", "--damaged")[0] == 0 and call("merge", "other.db")[0] == 0 and call("verify")[0] == 0


@pytest.mark.parametrize(
    "words",
    [
        ["merge", "none.db"], ["diff", "none.db"], ["why", "none"], ["import", "none"], ["pull", "http://127.0.0.1:9"],
        ["serve", "none.db"],
    ],
)  # fmt: skip
def test_a_mistake_is_one_message_and_status_2(call, words):
    status, out, err = call(*words)
    assert (status, out) == (2, "") and err.startswith("einfall: DatabaseError") and "try:" in err
