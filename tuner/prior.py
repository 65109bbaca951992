"""What a database knows of other extents, devices and toolchains, as a prior of a search.

Of each of them a model of the times is learned from all that was measured there, in terms of the features of the space at hand: so it has
an opinion on schedules that were never measured. It is an opinion: the search holds it against its own trials and drops it if it misleads.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from ..schedules.schedule import Schedule
from .cost_model import Regression
from .database import Database
from .database.records import Invalid, parse_schedule
from .search import PriorFunction

MOST = 4  # sources, the first in the order of the database
LEAST = 12  # usable times of a source

Features = Callable[[Schedule], Sequence[float]]
Key = tuple[str, str, str]


def database_priors(database: Database, family: str, own: Key, policy: str, features: Features) -> tuple[PriorFunction, ...]:
    """One prior for each workload, device and toolchain of `family` but `own` that was measured under `policy`, `MOST` at most."""
    keys = dict.fromkeys((r.workload, r.device, r.toolchain) for r in database.relatives(family))
    found: list[PriorFunction] = []
    for key in keys:
        if key == own or len(found) == MOST:
            continue
        times = measured_times(database, key, policy)
        if len(times) >= LEAST:
            found.append(learned(times, features))
    return tuple(found)


def measured_times(database: Database, key: Key, policy: str) -> dict[Schedule, float]:
    """The median time of every schedule that ran there."""
    known = {name: m for name, m in database.known(*key, policy).items() if m.status == "ok"}
    times: dict[Schedule, float] = {}
    for name, text in database.read("SELECT id, json FROM schedule ORDER BY id"):
        if name in known:
            try:
                times[parse_schedule(text, name)] = statistics.median(known[name].samples_ms)
            except Invalid:  # an entry that cannot be used is none
                continue
    return times


def learned(times: dict[Schedule, float], features: Features) -> PriorFunction:
    """What a model of `times` expects of schedules: smaller is faster, the scale has no meaning."""
    import numpy as np

    rows = np.array([list(features(point)) for point in times], dtype=np.float64)
    values = np.array(list(times.values()), dtype=np.float64)

    def expected(points: Sequence[Schedule]) -> list[float]:
        candidates = np.array([list(features(point)) for point in points], dtype=np.float64).reshape(len(points), rows.shape[1])
        return [-float(score) for score in Regression().scores(rows, values, candidates, seed=0)]

    return expected
