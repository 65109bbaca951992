"""What a database says of other extents and devices, as a prior: which measurements count, and that it orders schedules by them."""

from __future__ import annotations

import dataclasses

from einfall.tuner.database import Database, Device, Toolchain
from einfall.tuner.prior import LEAST, MOST, database_priors, measured_times
from made_up import failed, measurement, workload


def tile_of(schedule):
    return dict(schedule.tile)["m"]


def features(schedule):
    return [float(tile_of(schedule))]


def tuned(db, slope, count=LEAST, **changes):
    """Measurements of tiles 1, 2, ...: the time falls or rises with the tile."""
    rows = [measurement(n, *([50.0 + slope * n] * 3), **changes) for n in range(1, count + 1)]
    db.record_all(rows)
    first = rows[0]
    return (first.workload.id, first.device.id, first.toolchain.id), first.policy.id


def test_other_extents_are_a_prior_and_the_own_are_not(path):
    with Database.open(path, create=True) as db:
        own, policy = tuned(db, 1)
        tuned(db, -2, workload=workload(m=64))
        (prior,) = database_priors(db, workload().family, own, policy, features)
        asked = [measurement(n, 1.0).schedule for n in (2, 11)]
        slow, fast = prior(asked)
        assert fast < slow
        (own_as_prior,) = database_priors(db, workload().family, (workload(m=64).id, *own[1:]), policy, features)
        fast, slow = own_as_prior(asked)
        assert fast < slow
        assert prior([]) == []


def test_sources_are_devices_toolchains_and_extents_of_the_family_with_enough_times(path):
    with Database.open(path, create=True) as db:
        own, policy = tuned(db, 1)
        assert database_priors(db, workload().family, own, policy, features) == ()
        tuned(db, 1, count=LEAST - 1, workload=workload(m=8))
        assert database_priors(db, workload().family, own, policy, features) == ()
        tuned(db, 1, device=Device("cpu", "another", "x86_64", 8))
        tuned(db, 1, toolchain=Toolchain("0.1.0", 2, "tvm", "tvm 0.28"))
        assert len(database_priors(db, workload().family, own, policy, features)) == 2
        assert database_priors(db, "another family", own, policy, features) == ()
        assert database_priors(db, workload().family, own, "another policy", features) == ()
        for m in range(100, 100 + MOST):
            tuned(db, 1, workload=workload(m=m))
        assert len(database_priors(db, workload().family, own, policy, features)) == MOST


def test_failures_and_damaged_schedules_are_left_out(path):
    with Database.open(path, create=True) as db:
        key, policy = tuned(db, 1, count=3)
        db.record_all([failed(9, "crash"), dataclasses.replace(measurement(10, 2.0), workload=workload(m=5))])
        assert {tile_of(s): t for s, t in measured_times(db, key, policy).items()} == {1: 51.0, 2: 52.0, 3: 53.0}
        with db.writing() as connection:
            connection.execute('UPDATE schedule SET json = \'{"tile": {"m": 777}}\' WHERE id = ?', (measurement(2, 1.0).schedule.hash,))
        assert {tile_of(s) for s in measured_times(db, key, policy)} == {1, 3}
