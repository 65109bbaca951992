"""The schedule a kernel call runs with: the best one known for its extents, found in microseconds, never raising.

Exact extents are asked of the file; then the nearest extents of the same bucket; then the nearest of the family, if near at all. What
was tuned for other extents answers only if it held its own against the default there, side by side. The answer is a suggestion: the
caller checks its legality for the plan at hand and falls back on the default. Whatever is wrong with the file is a miss and one
warning, and `Lookup.problem` says what it was.
"""

from __future__ import annotations

import contextlib
import math
import os
import sqlite3
import threading
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..ir.cascade import Cascade
from ..ir.errors import EinfallError
from ..ir.types import DType, dtype
from ..schedules.schedule import Schedule
from ..schedules.target import Target
from .database import schema
from .database.choice import MAX_TIE
from .database.records import Invalid, extents_of, extents_text, family_of, parse_schedule, parse_workload, workload_id
from .device import describe_device, describe_toolchain

Source = Literal["exact", "bucket", "nearest"]
_Schedules: TypeAlias = dict[tuple[object, object], Schedule]
MAX_DISTANCE = 2.0  # in powers of two, summed over the ranks; beyond it the default is the better guess
TRUST_SECONDS = 0.5  # how long an answer is repeated before the file is asked whether it has changed
MAX_MEMO = 8192
MAX_FAMILY = 20_000
MAX_WARNINGS = 20

# beside min(), SQLite gives the other columns of the row that has it, and NULL without a row: no sorting for one or two rows
_EXACT = "SELECT schedule, schedule_json, min(preference) FROM best WHERE workload = ? AND device = ? AND toolchain = ?"
_FAMILY = (
    "SELECT workload, extents, schedule, schedule_json FROM best WHERE family = ? AND device = ? AND toolchain = ? "
    f"AND relative <= {1 + MAX_TIE} ORDER BY preference, workload LIMIT {MAX_FAMILY}"
)


@dataclass(frozen=True, slots=True)
class Found:
    """A schedule and how it was found; `distance` is that of the extents, in powers of two summed over the ranks."""

    schedule: Schedule
    source: Source
    workload: str
    distance: float = 0.0


@dataclass(frozen=True, slots=True)
class _Key:
    """What a look-up goes by beside the extents; `ranks` are those of the inputs if no extent follows from another."""

    family: str
    device: str
    toolchain: str
    ranks: tuple[str, ...] | None


class Lookup:
    """Look-ups in one file, which need not exist yet. Keeps a connection and what it has answered; safe across threads."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).expanduser()
        self.problem: str | None = None
        self._lock = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._stamp: object = None
        self._immutable = False
        self._owner = os.getpid()
        self._checked = -math.inf
        # the memo holds the cascade and target it was asked about, so that their ids stay theirs
        self._memo: dict[tuple[object, ...], tuple[Cascade, Target, Found | None]] = {}
        self._families: dict[_Key, _Family] = {}
        self._schedules: _Schedules = {}
        self._keys: dict[tuple[object, ...], tuple[Cascade, Target, _Key]] = {}
        self._told: set[str] = set()

    def find(
        self, cascade: Cascade, sizes: Mapping[str, int], target: Target, dtypes: Mapping[str, str | DType] | None = None
    ) -> Found | None:
        """The best schedule known for this call, or None. Never raises for what is in the file."""
        key = (id(cascade), id(target), *sizes.items(), *(dtypes.items() if dtypes else ()))
        if time.monotonic() - self._checked < TRUST_SECONDS:
            known = self._memo.get(key)
            if known is not None:
                return known[2]
        with self._lock:
            if time.monotonic() - self._checked >= TRUST_SECONDS or self._owner != os.getpid():
                self._refresh()
            known = self._memo.get(key)
            if known is None:
                if len(self._memo) >= MAX_MEMO:
                    self._memo.clear()
                known = (cascade, target, self._search(cascade, sizes, target, dtypes))
                self._memo[key] = known
            return known[2]

    def forget(self) -> None:
        """Drops what was answered, so that the next call sees what has just been written."""
        with self._lock:
            self._checked = -math.inf
            self._clear()

    def close(self) -> None:
        """Lets go of the file."""
        with self._lock:
            self._disconnect()
            self._clear()

    def _clear(self) -> None:
        self._memo.clear()
        self._families.clear()

    def _refresh(self) -> None:
        """Sees to it that the connection is to the file as it is now, and that nothing is remembered of an earlier state."""
        self._checked = time.monotonic()
        if self._owner != os.getpid():  # a connection must not be used on both sides of a fork; it is not closed here either
            self._connection, self._owner = None, os.getpid()
            self._clear()
        try:
            stamp = self._stamp_of()
            if self._connection is None or stamp != self._stamp:
                self._disconnect()
                self._clear()
                self._connection, self._immutable = schema.open_for_reading(self.path)
                self._stamp = self._stamp_of()
            self.problem = None
        except (EinfallError, OSError) as error:
            self._disconnect()
            self._clear()
            if os.path.lexists(self.path):
                self._complain(str(error))
            else:  # nothing was tuned yet: that is no fault
                self.problem = str(schema.missing(self.path))

    def _complain(self, problem: str) -> None:
        """Keeps what was wrong, and warns of it once; a warning that was made an error must not end the call."""
        self.problem = problem
        if problem not in self._told and len(self._told) < MAX_WARNINGS:
            self._told.add(problem)
            with contextlib.suppress(RuntimeWarning):
                warnings.warn(f"einfall: kernels run with what is known without {self.path}: {problem}", RuntimeWarning, stacklevel=6)

    def _stamp_of(self) -> object:
        """What changes when the file is replaced or written to."""
        status = os.stat(self.path)
        place = (status.st_dev, status.st_ino)
        if self._connection is None:
            return place
        if self._immutable:
            return (*place, status.st_mtime_ns, status.st_size)
        try:
            return (*place, self._connection.execute("PRAGMA data_version").fetchone()[0])
        except sqlite3.Error:
            return place

    def _disconnect(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _search(
        self, cascade: Cascade, sizes: Mapping[str, int], target: Target, dtypes: Mapping[str, str | DType] | None
    ) -> Found | None:
        connection = self._connection
        if connection is None:
            return None
        try:
            key = self._key(cascade, target, dtypes)
            ranks = key.ranks
            extents = extents_of(cascade, sizes) if ranks is None else tuple([(rank, sizes[rank]) for rank in ranks])
            return self._exact(connection, key, extents) or self._family(connection, key).nearest(extents, self._schedules)
        except KeyError as error:
            self.problem = f"no extent given for rank {error.args[0]}"
            return None
        except EinfallError as error:  # the call itself: its own check says so better than a warning
            self.problem = str(error)
            return None
        except sqlite3.Error as error:
            self._complain(f"{type(error).__name__}: {error}")
            return None

    def _key(self, cascade: Cascade, target: Target, dtypes: Mapping[str, str | DType] | None) -> _Key:
        name = (id(cascade), id(target), *(dtypes.items() if dtypes else ()))
        known = self._keys.get(name)
        if known is None:
            if len(self._keys) >= MAX_MEMO:
                self._keys.clear()
            family = family_of(with_dtypes(cascade, dtypes or {}))
            ranks = None if cascade.ranks else tuple(sorted({rank for tensor in cascade.inputs for rank in tensor.ranks}))
            known = (cascade, target, _Key(family, describe_device(target).id, describe_toolchain(target).id, ranks))
            self._keys[name] = known
        return known[2]

    def _exact(self, connection: sqlite3.Connection, key: _Key, extents: tuple[tuple[str, int], ...]) -> Found | None:
        workload = workload_id(key.family, extents_text(extents))
        row = connection.execute(_EXACT, (workload, key.device, key.toolchain)).fetchone()
        if row[0] is None:
            return None
        try:
            return Found(_schedule(row[1], row[0], self._schedules), "exact", workload)
        except Invalid as error:
            self._complain(f"the winner of workload {workload} cannot be used, {error}; `einfall db verify` tells more")
            return None

    def _family(self, connection: sqlite3.Connection, key: _Key) -> _Family:
        family = self._families.get(key)
        if family is None:
            rows = connection.execute(_FAMILY, (key.family, key.device, key.toolchain)).fetchall()
            family = self._families[key] = _Family(key.family, rows)
            if family.problem is not None:
                self._complain(f"{family.problem}; `einfall db verify` tells more")
        return family


class _Family:
    """The winners of a family, their extents as an array of logarithms: the nearest of thousands in some ten microseconds."""

    def __init__(self, family: str, rows: list[tuple[Any, ...]]) -> None:
        import numpy as np

        self.problem: str | None = None
        usable: dict[str, tuple[tuple[tuple[str, int], ...], object, object]] = {}
        for workload, text, schedule, schedule_json in rows:
            try:
                extents = parse_workload(workload, family, text)
            except Invalid as error:
                self.problem = str(error)
                continue
            if all(extent > 0 for _, extent in extents):
                usable.setdefault(workload, (extents, schedule, schedule_json))
        # extents of one family name the same ranks; a row that does not is of no use
        self._ranks = next(([rank for rank, _ in extents] for extents, _, _ in usable.values()), [])
        kept = [(name, *row) for name, row in usable.items() if [rank for rank, _ in row[0]] == self._ranks]
        self._rows = kept
        table = np.array([[extent for _, extent in extents] for _, extents, _, _ in kept], dtype=np.float64)
        table = table.reshape(len(kept), len(self._ranks))
        self._logs = np.log2(table)
        self._buckets = np.ceil(self._logs)

    def nearest(self, extents: tuple[tuple[str, int], ...], schedules: _Schedules) -> Found | None:
        """The nearest row of the same bucket, else the nearest of all within `MAX_DISTANCE`; None without a usable one.

        Of equally near ones the first: rows are in order of policy and workload.
        """
        import numpy as np

        if not self._rows or [rank for rank, _ in extents] != self._ranks or any(extent < 1 for _, extent in extents):
            return None
        logs = np.log2([float(extent) for _, extent in extents])
        distances = np.abs(self._logs - logs).sum(axis=1)
        same = (self._buckets == np.ceil(logs)).all(axis=1)
        cost = np.where(same, distances - 1e6, np.where(distances <= MAX_DISTANCE, distances, np.inf))
        while True:
            i = int(cost.argmin())
            if cost[i] == np.inf:
                return None
            workload, _, schedule, schedule_json = self._rows[i]
            try:
                parsed = _schedule(schedule_json, schedule, schedules)
            except Invalid:
                cost[i] = np.inf
                continue
            return Found(parsed, "bucket" if same[i] else "nearest", workload, float(distances[i]))


def best_schedule(
    cascade: Cascade,
    sizes: Mapping[str, int],
    dtypes: Mapping[str, str | DType] | None,
    target: Target,
    database: Lookup | str | Path | None,
) -> Schedule | None:
    """The schedule to try for this call, or None. Give a `Lookup` where calls repeat: a path is opened and closed each time."""
    if database is None:
        return None
    if isinstance(database, Lookup):
        found = database.find(cascade, sizes, target, dtypes)
        return None if found is None else found.schedule
    lookup = Lookup(database)
    try:
        return best_schedule(cascade, sizes, dtypes, target, lookup)
    finally:
        lookup.close()


def with_dtypes(cascade: Cascade, dtypes: Mapping[str, str | DType]) -> Cascade:
    """`cascade` with the types of some inputs set."""
    if not dtypes:
        return cascade
    return replace(cascade, inputs=tuple(replace(t, dtype=dtype(dtypes.get(t.name, t.dtype))) for t in cascade.inputs))


def _schedule(text: object, name: object, known: _Schedules) -> Schedule:
    """A stored schedule; parsed once, since many extents share one."""
    schedule = known.get((text, name))
    if schedule is None:
        schedule = known[(text, name)] = parse_schedule(text, name)
    return schedule
