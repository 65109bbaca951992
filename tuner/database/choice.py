"""Who wins: chosen from the union of the measurements of a key, whatever the order in which they came.

Two databases that hold the same measurements therefore agree. Only correct, comparable measurements take part: measured and not
estimated, with evidence whose largest error is within its tolerance, of one workload, device, toolchain and policy. Interleaved
finals, as ratios to the default of the same group, outrank trials; the medians decide, and within the noise of the medians the
smallest schedule hash does.
"""

from __future__ import annotations

import sqlite3
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, NamedTuple, TypeAlias

from .queries import one
from .records import Invalid, Sampled, bucket_text, parse_schedule, parse_workload
from .rows import EVIDENCE, MEASUREMENT, POLICY

MIN_SAMPLES = 3  # one sample is off its median by up to 6 %
MAX_TIE = 0.02  # noise never makes a schedule win that is slower by more than this
Key: TypeAlias = tuple[str, str, str, str]

_OF_KEY = "workload = ? AND device = ? AND toolchain = ? AND policy = ?"
_USABLE = f"status = 'ok' AND basis = 'measured' AND samples >= {MIN_SAMPLES}"
_CANDIDATES = f"SELECT number, schedule, role, median_ms, baseline_ms FROM measurement WHERE {_OF_KEY} AND {_USABLE} AND role {{}}"
_ANY_ROLE = "IN ('final', 'trial')"
_EVIDENCE = f"SELECT {', '.join(EVIDENCE.names)} FROM evidence WHERE id = ?"
_BATCH = 500


@dataclass(frozen=True, slots=True)
class Choice:
    """The winner of a key: its schedule, one measurement of it, and its medians over all samples."""

    schedule_id: str
    measurement: str
    median_ms: float
    relative: float | None
    samples: int


@dataclass(frozen=True, slots=True)
class Contest:
    """What a choice is made from: samples pooled by schedule, as times or, if `relative`, as ratios to the default."""

    groups: dict[str, list[Sampled]]
    pooled: dict[str, list[float]]
    centre: dict[str, float]
    noise: dict[str, float]
    relative: bool

    @property
    def fastest(self) -> float:
        """The smallest median."""
        return min(self.centre.values())

    @property
    def tied(self) -> tuple[str, ...]:
        """The schedules that cannot be told from the fastest, in the order of their hashes: the first wins."""
        fastest = self.fastest
        least = min(self.noise[name] for name in self.centre if self.centre[name] == fastest)
        return tuple(
            sorted(n for n in self.centre if self.centre[n] - fastest <= min(self.noise[n] + least, MAX_TIE * fastest))
        )


def contest(measurements: Iterable[Sampled]) -> Contest | None:
    """The usable ones among `measurements`, pooled; None without any."""
    usable = [m for m in measurements if is_usable(m)]
    finals = [m for m in usable if is_final(m)]
    groups: dict[str, list[Sampled]] = {}
    for m in finals or usable:
        groups.setdefault(m.schedule_id, []).append(m)
    if not groups:
        return None
    pooled = {name: [x for m in members for x in (_relative(m) if finals else m.samples_ms)] for name, members in groups.items()}
    return Contest(
        groups=groups,
        pooled=pooled,
        centre={name: statistics.median(values) for name, values in pooled.items()},
        noise={name: error_of_median(values) for name, values in pooled.items()},
        relative=bool(finals),
    )


def choose(measurements: Iterable[Sampled]) -> Choice | None:
    """The winner among measurements, or None where none is usable. Independent of their order."""
    found = contest(measurements)
    if found is None:
        return None
    winner = found.tied[0]
    members = found.groups[winner]
    samples = [x for m in members for x in m.samples_ms]
    return Choice(
        schedule_id=winner,
        measurement=max(m.id for m in members),
        median_ms=statistics.median(samples),
        relative=found.centre[winner] if found.relative else None,
        samples=len(samples),
    )


def is_usable(m: Sampled) -> bool:
    """Whether a measurement may take part, as far as it says itself."""
    return m.status == "ok" and m.basis == "measured" and m.evidence is not None and len(m.samples_ms) >= MIN_SAMPLES


def is_final(m: Sampled) -> bool:
    """Whether it was interleaved with the default."""
    return m.role == "final" and m.baseline_ms is not None


def _relative(m: Sampled) -> list[float]:
    return [x / (m.baseline_ms or 1.0) for x in m.samples_ms]


def error_of_median(values: Sequence[float]) -> float:
    """The standard error of the median, from the median absolute deviation: robust against a few slow samples."""
    centre = statistics.median(values)
    deviation = statistics.median(abs(x - centre) for x in values)
    return float(1.2533 * 1.4826 * deviation / len(values) ** 0.5)


def settle(connection: sqlite3.Connection, key: Key) -> bool:
    """Brings the row of `best` of one key up to date; whether it has one now."""
    connection.execute(f"DELETE FROM best WHERE {_OF_KEY}", key)
    row = best_row(connection, key)
    if row is None:
        return False
    connection.execute(f"INSERT INTO best ({', '.join(row)}) VALUES ({', '.join('?' * len(row))})", tuple(row.values()))
    return True


def may_win(connection: sqlite3.Connection, key: Key, m: Sampled) -> bool:
    """Whether a measurement that was just added could change the winner: most trials of a search are plainly slower.

    It cannot if no measurement of its schedule comes as near to the winner as a tie may be.
    """
    if not is_usable(m):
        return False
    sql = f"SELECT median_ms, relative FROM best WHERE {_OF_KEY}"
    current = connection.execute(sql, key).fetchone()
    if current is None or is_final(m) or not isinstance(current[0], float):
        return True
    if current[1] is not None:
        return False  # finals outrank trials
    if statistics.median(m.samples_ms) <= current[0] * (1 + MAX_TIE):
        return True
    lowest = f"SELECT min(median_ms) FROM measurement WHERE {_OF_KEY} AND schedule = ? AND {_USABLE} AND role {_ANY_ROLE}"
    found = connection.execute(lowest, (*key, m.schedule_id)).fetchone()[0]
    return not isinstance(found, float) or found <= current[0] * (1 + MAX_TIE)


def best_row(connection: sqlite3.Connection, key: Key) -> dict[str, Any] | None:
    """The row of `best` that the measurements of `key` (workload, device, toolchain, policy) give, or None."""
    workload = one(connection, "SELECT family, extents FROM workload WHERE id = ?", key[:1])
    policy = connection.execute("SELECT id, mode, cache, timer, method FROM policy WHERE id = ?", key[3:]).fetchone()
    if workload is None or policy is None or not POLICY.is_named_right(policy[0], policy[1:]):
        return None
    try:
        extents = parse_workload(key[0], workload["family"], workload["extents"])
    except Invalid:
        return None
    found = _choose_valid(connection, key)
    if found is None:
        return None
    choice, text = found
    return {
        **dict(zip(("workload", "device", "toolchain", "policy"), key, strict=True)),
        **workload,
        "bucket": bucket_text(extents),
        "preference": 2 * (policy[1] != "eager") + (policy[2] != "cold"),
        "schedule": choice.schedule_id,
        "schedule_json": text,
        "measurement": choice.measurement,
        "median_ms": choice.median_ms,
        "relative": choice.relative,
        "samples": choice.samples,
    }  # fmt: skip


def _choose_valid(connection: sqlite3.Connection, key: Key) -> tuple[Choice, str] | None:
    """The choice among the rows that can be used, with the winner's schedule.

    The median of pooled samples lies between the smallest and the largest median of what was pooled. A schedule can only win or tie if
    its smallest is not above the smallest of the largest ones: all but a few rows need not be read. Where one that was read cannot be
    used, what it may have hidden is looked at in the next round.
    """
    finals = connection.execute(_CANDIDATES.format("= 'final' AND baseline_ms IS NOT NULL"), key).fetchall()
    return _choose_among(connection, finals) or _choose_among(connection, connection.execute(_CANDIDATES.format(_ANY_ROLE), key).fetchall())


def _choose_among(connection: sqlite3.Connection, found: list[tuple[Any, ...]]) -> tuple[Choice, str] | None:
    candidates = [Candidate(*row) for row in found if _has_times(row)]
    read: dict[int, Sampled | None] = {}
    while True:
        near = _near([c for c in candidates if read.get(c.number, c) is not None])
        fresh = [c.number for c in near if c.number not in read]
        read.update(_read(connection, fresh))
        if any(read[number] is None for number in fresh):
            continue
        choice = choose(m for c in near if (m := read[c.number]) is not None)
        if choice is None:
            return None
        text = connection.execute("SELECT json FROM schedule WHERE id = ?", (choice.schedule_id,)).fetchone()
        try:
            parse_schedule(None if text is None else text[0], choice.schedule_id)
        except Invalid:
            read.update({c.number: None for c in candidates if c.schedule == choice.schedule_id})
            continue
        return choice, text[0]


class Candidate(NamedTuple):
    """What is read of every measurement of a key."""

    number: int
    schedule: str
    role: str
    median_ms: float
    baseline_ms: float | None


def _has_times(row: tuple[Any, ...]) -> bool:
    return isinstance(row[3], float) and row[3] > 0 and (row[4] is None or (isinstance(row[4], float) and row[4] > 0))


def _near(candidates: list[Candidate]) -> list[Candidate]:
    """Those that can win or tie, and all others of their schedules."""
    finals = [c for c in candidates if c.role == "final" and c.baseline_ms is not None]
    low: dict[str, float] = {}
    high: dict[str, float] = {}
    for c in finals or candidates:
        x = c.median_ms / (c.baseline_ms or 1.0) if finals else c.median_ms
        low[c.schedule] = min(x, low.get(c.schedule, x))
        high[c.schedule] = max(x, high.get(c.schedule, x))
    limit = min(high.values(), default=0.0) * (1 + 2 * MAX_TIE)
    return [c for c in finals or candidates if low[c.schedule] <= limit]


def _read(connection: sqlite3.Connection, numbers: list[int]) -> Iterator[tuple[int, Sampled | None]]:
    """The measurements of these numbers, None for each that cannot be used."""
    yield from ((number, None) for number in numbers)
    columns = ", ".join(("number", *MEASUREMENT.names))
    proven: dict[str | None, bool] = {}
    for begin in range(0, len(numbers), _BATCH):
        asked = ", ".join(map(str, numbers[begin : begin + _BATCH]))
        for number, *row in connection.execute(f"SELECT {columns} FROM measurement WHERE number IN ({asked})").fetchall():
            m = _sound(tuple(row))
            if m is None:
                continue
            if m.evidence not in proven:
                proven[m.evidence] = has_evidence(connection, m.evidence)
            if proven[m.evidence]:
                yield number, m


@lru_cache(8192)
def _sound(row: tuple[Any, ...]) -> Sampled | None:
    """The measurement that a row says, if it hashes to its name and can be used. Many writers settle the same rows again and again."""
    if not MEASUREMENT.is_named_right(row[0], row[1:]):
        return None
    try:
        return Sampled.from_row(dict(zip(MEASUREMENT.names, row, strict=True)))
    except Invalid:
        return None


def has_evidence(connection: sqlite3.Connection, name: str | None) -> bool:
    """Whether that evidence is there, hashes to its name, and found no error above its tolerance."""
    row = None if name is None else connection.execute(_EVIDENCE, (name,)).fetchone()
    return row is not None and _is_proof(row)


@lru_cache(8192)
def _is_proof(row: tuple[Any, ...]) -> bool:
    return EVIDENCE.is_named_right(row[0], row[1:]) and bool(row[-1] <= row[-2])


def rebuild(connection: sqlite3.Connection) -> int:
    """Derives every winner again; returns how many there are."""
    connection.execute("DELETE FROM best")
    keys = connection.execute("SELECT DISTINCT workload, device, toolchain, policy FROM measurement").fetchall()
    return sum(settle(connection, key) for key in keys if all(isinstance(name, str) for name in key))
