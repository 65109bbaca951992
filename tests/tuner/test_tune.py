"""Tuning end to end with made-up kernels: what wins, what is recorded, and that no candidate can take the run down."""

from __future__ import annotations

import signal
import sys
from pathlib import Path

import fake_worker as fake
import pytest
from einfall.ir.errors import BuildError, DatabaseError
from einfall.ir.text import parse_cascade
from einfall.schedules.schedule import Schedule
from einfall.schedules.target import load_target
from einfall.tuner import tune as tuning
from einfall.tuner.database import Database
from einfall.tuner.lookup import Lookup
from einfall.tuner.measure import Protocol
from einfall.tuner.search import Failure
from einfall.tuner.tune import Done, Failed, Finals, Incumbent, Measured, Started, tune

COMMAND = (sys.executable, str(Path(fake.__file__)))
QUICK = Protocol(warm_up_ms=1, budget_ms=15, max_samples=6, final_rounds=6, final_budget_ms=30)
CASCADE = """\
cascade scaled_rows(X[b,m,e]: f32, W[e]: f32, scale: f32) -> Y[b,m]
  A[b,m] = sum(e) X[b,m,e] * W[e]
  Y[b,m] = A[b,m] * scale
"""
SIZES = {"b": 2, "m": 9, "e": 16}


class Tiles:
    """A space of tiles of m."""

    def __init__(self, *tiles: int) -> None:
        self.tiles = tiles

    def __iter__(self):
        return iter(Schedule.make(tile={"m": tile}) for tile in self.tiles)

    def __len__(self) -> int:
        return len(self.tiles)

    def features(self, schedule):
        return [float(dict(schedule.tile)["m"])]


def run(path: Path, *tiles: int, default: int = 100, **options):
    """A quick run over these tiles; a tile takes tile * 60 us."""
    settings = {
        "sizes": SIZES, "target": "cpu", "database": path, "scalars": {"scale": 0.5}, "trials": 20, "space": Tiles(*tiles),
        "default": Schedule.make(tile={"m": default}), "workers": 1, "threads": 1, "command": COMMAND, "protocol": QUICK, "timeout_s": 20.0,
    }  # fmt: skip
    return tune(parse_cascade(CASCADE), **{**settings, **options})


def tile_of(schedule: Schedule) -> int:
    return dict(schedule.tile)["m"]


def test_the_fastest_wins_is_recorded_and_is_found_by_the_next_call(path):
    events = []
    result = run(path, 100, 300, 5, 500, on_event=events.append)
    assert tile_of(result.schedule) == 5
    assert result.speedup > 1
    assert result.history.trials[0].point == Schedule.make(tile={"m": 100})
    assert {r.is_winner for r in result.table if tile_of(r.schedule) == 5} == {True}
    assert [r.is_default for r in result.table if tile_of(r.schedule) == 100] == [True]
    assert isinstance(events[0], Started)
    assert [type(e) for e in events[-2:]] == [Finals, Done]
    assert len([e for e in events if isinstance(e, Measured)]) == len(result.history) == 4
    assert tile_of([e for e in events if isinstance(e, Incumbent)][-1].schedule) == 5

    cascade = parse_cascade(CASCADE)
    found = Lookup(path).find(cascade, SIZES, load_target("cpu"))
    assert (found.schedule, found.source) == (result.schedule, "exact")
    with Database.open(path, read_only=True) as db:
        record = db.ls()[0]
        assert record.schedule == result.schedule
        assert record.relative < 1
        trial = next(iter(db.known(record.workload, record.device, record.toolchain, record.policy).values()))
        assert len(trial.samples_ms) >= 3
        evidence = db.evidence(trial.evidence)
    assert {"normal", "offset", "tiny", "uniform"} <= set(evidence.distributions)
    assert len(evidence.shapes) == 4
    assert evidence.largest_error <= evidence.tolerance < 1e-4


def test_the_report_can_be_pasted(path):
    result = run(path, 100, 30)
    names = {}
    exec(repr(result), names)
    assert Schedule.from_dict(names["schedule"]) == result.schedule
    assert "scaled_rows(b=2,e=16,m=9)" in repr(result)
    data = result.to_dict()
    assert data["trials"] == 2
    assert data["speedup"] == pytest.approx(result.speedup)


BAD = {
    fake.CRASH: ("crash", "exit status 3"),
    fake.NAN: ("wrong", "NaN"),
    fake.WRONG: ("wrong", "is off by"),
    fake.OUTSIDE: ("wrong", "outside its bounds"),
    fake.UNSTEADY: ("nondeterministic", "two runs differ"),
    fake.SEGFAULT: ("crash", "SIGSEGV: about to crash"),
    fake.MEMORY: ("memory", "out of memory"),
    fake.ILLEGAL: ("build", "tile[m] is 1009"),
    fake.INPUT: ("wrong", "an input was overwritten"),
    fake.LATE: ("crash", "exit status 4"),
    fake.GARBAGE: ("crash", "makes no sense"),
    fake.UNWRITTEN: ("wrong", "not written"),
}


def test_every_way_to_misbehave_costs_one_candidate_and_is_recorded(path):
    events = []
    result = run(path, 100, *BAD, fake.NOISY, 5, trials=40, workers=2, on_event=events.append)
    assert tile_of(result.schedule) in (100, fake.NOISY, 5)
    assert result.failures == len(BAD)
    failed = {tile_of(e.schedule): e for e in events if isinstance(e, Failed)}
    for tile, (status, reason) in BAD.items():
        assert (failed[tile].status, reason in failed[tile].reason) == (status, True), failed[tile]
    assert fake.NOISY not in failed
    with Database.open(path, read_only=True) as db:
        counts = db.show(result.workload.id)["measurements"]
        record = db.ls()[0]
        known = db.known(record.workload, record.device, record.toolchain, record.policy)
    assert {s: counts[s] for s in ("crash", "wrong", "nondeterministic", "memory", "build")} == {
        "crash": 4, "wrong": 5, "nondeterministic": 1, "memory": 1, "build": 1,
    }  # fmt: skip
    assert all(m.reason for m in known.values() if m.status != "ok")


def test_a_hang_is_ended_and_costs_one_candidate(path):
    result = run(path, 100, fake.HANG, 5, timeout_s=8.0)
    reasons = [t.result.reason for t in result.history if isinstance(t.result, Failure)]
    assert reasons == ["timeout: no answer in 8 s (verify)"]
    assert tile_of(result.schedule) == 5


def test_a_default_that_fails_does_not_stop_the_search(path):
    result = run(path, 50, 5, default=fake.NAN)
    assert tile_of(result.schedule) == 5
    assert result.default_ms is None
    assert result.speedup is None
    assert "5" in repr(result)


def test_when_nothing_works_the_error_says_why_and_the_failures_are_kept(path):
    with pytest.raises(BuildError, match=r"none of 2 candidates.*NaN") as caught:
        run(path, fake.WRONG, default=fake.NAN)
    assert "einfall db show" in str(caught.value)
    with Database.open(path, read_only=True) as db:
        assert db.ls() == ()
        workload = str(caught.value).split("db show ")[1].split()[0]
        assert db.show(workload)["measurements"] == {"wrong": 2}


def test_a_worker_that_cannot_start_is_not_blamed_on_candidates(path):
    with pytest.raises(BuildError, match=r"worker does not start.*exit status 7"):
        run(path, 100, command=(sys.executable, "-c", "import sys; sys.exit(7)"))
    with pytest.raises(BuildError, match="cannot be started"):
        run(path, 100, command=("/no/such/program",))


def test_an_unusable_database_is_noticed_before_anything_is_measured(path):
    path.write_text("not a database, but some text that is somewhat longer than that")
    events = []
    with pytest.raises(DatabaseError, match="not an SQLite database"):
        run(path, 100, on_event=events.append)
    assert events == []


def test_interrupting_keeps_what_was_measured_and_resuming_goes_on(path):
    tiles = (100, 190, 180, 170, 160, 150, 140, 5)

    class Interrupt:
        """Ctrl-C after a few candidates."""

        def __init__(self) -> None:
            self.measured = 0

        def __call__(self, event) -> None:
            if isinstance(event, Measured):
                self.measured += 1
                if self.measured == 3:
                    signal.raise_signal(signal.SIGINT)

    first = run(path, *tiles, on_event=Interrupt(), seed=5)
    assert first.interrupted
    with Database.open(path, read_only=True) as db:
        kept = db.show(first.workload.id)["measurements"]["ok"]
        assert kept >= len(first.history) >= 2
        assert len(db.ls()) == 1

    events = []
    second = run(path, *tiles, resume=True, seed=5, on_event=events.append)
    assert not second.interrupted
    recalled = [e for e in events if isinstance(e, Measured) and e.recalled]
    assert len(recalled) == kept
    assert [t.point for t in second.history][: len(first.history)] == [t.point for t in first.history]
    assert len(second.history) == len(tiles)
    assert tile_of(second.schedule) == 5

    third = []
    run(path, *tiles, resume=True, seed=5, on_event=third.append)
    assert all(e.recalled for e in third if isinstance(e, Measured))


def test_failures_are_recalled_too(path):
    run(path, 100, fake.NAN, 30)
    events = []
    result = run(path, 100, fake.NAN, 30, resume=True, on_event=events.append)
    assert result.failures == 1
    assert [e.status for e in events if isinstance(e, Failed)] == ["wrong"]
    with Database.open(path, read_only=True) as db:
        assert db.show(result.workload.id)["measurements"]["wrong"] == 1


def test_equal_seeds_propose_the_same_candidates(tmp_path):
    # what comes after the first random points depends on times, which are never equal; the proposals before do not
    tiles = tuple(range(10, 60))
    runs = [run(tmp_path / f"{i}.db", *tiles, default=10, trials=4, seed=1) for i in range(2)]
    points = [[t.point for t in r.history] for r in runs]
    assert points[0] == points[1]


def test_the_winner_of_other_extents_is_tried_early(path):
    run(path, 100, 5)
    result = run(path, 100, 90, 80, 70, trials=2, sizes={**SIZES, "m": 64})
    assert tile_of(result.schedule) == 5
    assert result.workload.extents == (("b", 2), ("e", 16), ("m", 64))


def test_a_failing_final_falls_back_on_the_fastest_alone(path, monkeypatch):
    asked = []
    real = tuning.WorkerPool.finals

    def finals(self, jobs):
        asked.append([tile_of(job.schedule) for job in jobs])
        return tuning.Outcome("crash", "made up") if len(jobs) > 2 else real(self, jobs)

    monkeypatch.setattr(tuning.WorkerPool, "finals", finals)
    result = run(path, 100, 60, 10)
    assert [len(tiles) for tiles in asked] == [3, 2]
    assert asked[1][0] == 100
    assert result.speedup is not None
