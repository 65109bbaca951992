"""Leases: one holder at a time, silence ends a lease, poison is not handed out; no clock but the watcher's own."""

from __future__ import annotations

import threading

import pytest
from einfall.tuner.database import Database
from einfall.tuner.database.leases import Leases


@pytest.fixture
def database(path):
    with Database.open(path, create=True) as db:
        yield db


def test_work_is_held_by_one_until_it_is_done(database):
    leases = Leases(database)
    assert leases.state("a") == "free"
    assert leases.take("a", "one") and not leases.take("a", "two") and not leases.take("a", "one")
    assert leases.beat("a", "one") and not leases.beat("a", "two")
    assert not leases.done("a", "two") and leases.done("a", "one")
    assert leases.state("a") == "done" and not leases.take("a", "two") and not leases.beat("a", "one")


def test_work_that_killed_two_workers_is_poison(database):
    leases = Leases(database)
    assert leases.take("a", "one") and leases.died("a", "one") == "free"
    assert leases.died("a", "one") == "free"  # told twice, died once
    assert leases.take("a", "two") and leases.died("a", "two") == "quarantined"
    assert not leases.take("a", "three") and leases.quarantined() == ("a",)


def test_the_silent_lose_their_work_and_the_living_keep_it(database):
    now = [0.0]
    watcher = Leases(database, patience_s=10, clock=lambda: now[0])
    for work in ("lost", "kept"):
        assert watcher.take(work, "worker")
    assert watcher.reap() == ()
    for _ in range(4):
        now[0] += 4
        watcher.beat("kept", "worker")
        reaped = watcher.reap()
        if reaped:
            break
    assert reaped == ("lost",) and now[0] == 12
    assert watcher.state("lost") == "free" and watcher.state("kept") == "held"
    assert not watcher.done("lost", "worker")  # a late answer of a silent holder does not count


def test_a_clock_that_jumps_back_takes_nothing_away(database):
    now = [1e9]
    watcher = Leases(database, patience_s=10, clock=lambda: now[0])
    watcher.take("a", "worker")
    watcher.reap()
    now[0] = 0.0
    assert watcher.reap() == () and watcher.state("a") == "held"


def test_many_hands_reach_for_one_piece_of_work(path, database):
    taken = []

    def reach(name):
        with Database.open(path) as mine:
            leases = Leases(mine)
            taken.extend((name, work) for work in map(str, range(20)) if leases.take(work, name))

    hands = [threading.Thread(target=reach, args=(f"hand{i}",)) for i in range(4)]
    for hand in hands:
        hand.start()
    for hand in hands:
        hand.join()
    assert sorted(work for _, work in taken) == sorted(map(str, range(20)))
