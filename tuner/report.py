"""What a tuning run did, as its database has it: curve, candidates, accuracy of the cost model, winner against default and floor.

Predictions are not stored. They are made again: at points along a run the model of the search learns from the trials until then and ranks
those that followed. What cannot be made again, such as the features on a device that is not described here, is left out with the reason.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from ..ir.errors import DatabaseError, EinfallError
from ..schedules.schedule import Schedule
from ..schedules.target import load_target
from .cost_model import Ranking, kendall_tau
from .database import Database, Invalid, parse_schedule, queries, schema
from .database.figures import curves, is_time, target_of, trial_rows, winner_figures
from .database.records import Sampled, event_time, parse_workload
from .database.why import Entrant, Why, why

MAX_CHOICES = 20  # on one page
LEAST = 4  # trials to learn from, and trials to rank
STEPS = 8  # points of a run at which the model is made again, at most
Key: TypeAlias = tuple[str, str, str]


@dataclass(frozen=True, slots=True)
class Step:
    """A model that learned from the first `known` trials of a run, and how its ranking of the `later` ones agrees with their times."""

    known: int
    later: int
    tau: float

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {"known": self.known, "later": self.later, "tau": self.tau}


@dataclass(frozen=True, slots=True)
class Accuracy:
    """How well the cost model ranks the trials of a run.

    Args:
        steps: along the run.
        ranks: of the model that knows the first half, for each later trial: schedule, predicted and measured rank, 1 the fastest.
        missing: why there are no steps; empty if there are.
    """

    steps: tuple[Step, ...] = ()
    ranks: tuple[tuple[str, int, int], ...] = ()
    missing: str = ""

    @property
    def half(self) -> Step | None:
        """The step of `ranks`."""
        return next((s for s in self.steps if s.later == len(self.ranks)), None)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        ranks = [{"schedule_id": name, "predicted": predicted, "measured": measured} for name, predicted, measured in self.ranks]
        half = None if self.half is None else self.half.tau
        return {"tau": half, "steps": [s.to_dict() for s in self.steps], "ranks": ranks, "missing": self.missing or None}


@dataclass(frozen=True, slots=True)
class Run:
    """A tuning run: who made it, `best` as trial number and best time so far for each trial with a time, and its drawing."""

    about: Mapping[str, Any]
    best: tuple[tuple[int, float], ...]
    svg: str
    accuracy: Accuracy

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**self.about, "best_so_far": [list(point) for point in self.best], "cost_model": self.accuracy.to_dict()}


@dataclass(frozen=True, slots=True)
class Candidate:
    """A schedule that was measured: its place in the choice, and the median of its first trial, None for a failure."""

    entrant: Entrant
    schedule: str | None
    trial_ms: float | None

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {**self.entrant.to_dict(), "schedule": self.schedule, "trial_ms": self.trial_ms}


@dataclass(frozen=True, slots=True)
class TuningReport:
    """One workload on one device, built by one toolchain and timed by one policy.

    Args:
        winner: the row of the winner with operations, bytes and the least time its device could take; None without a winner.
        default: schedule and median of the default; None where it is not known.
    """

    choice: Why
    winner: Mapping[str, Any] | None
    default: tuple[str, float] | None
    candidates: tuple[Candidate, ...]
    runs: tuple[Run, ...] = field(repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        default = None if self.default is None else {"schedule_id": self.default[0], "median_ms": self.default[1]}
        return {
            **self.choice.to_dict(), "winner": None if self.winner is None else dict(self.winner), "default": default,
            "candidates": [c.to_dict() for c in self.candidates], "runs": [r.to_dict() for r in self.runs],
        }  # fmt: skip


def tuning_reports(database: Database, name: str | None = None) -> tuple[TuningReport, ...]:
    """A report for each choice for a kernel, by its name or the beginning of a workload's id; without, for what was measured last.

    Raises `DatabaseError` if nothing was measured, or too much for one page.
    """
    if name is None:
        latest = database.read("SELECT workload FROM measurement ORDER BY number DESC LIMIT 1")
        if not latest:
            hint = f"`einfall tune REF --db {database.path}` measures something"
            raise DatabaseError(f"nothing was measured in {database.path}", hint=hint)
        name = str(latest[0][0])
    found = why(database, name)
    if len(found) > MAX_CHOICES:
        what = f"{len(found)} choices were made for {name!r}, a page has {MAX_CHOICES} at most"
        raise DatabaseError(what, hint="give the beginning of a workload's id; `einfall db ls` lists them")
    with schema.explained(database.path):
        return tuple(_report(database, choice) for choice in found)


def _report(database: Database, choice: Why) -> TuningReport:
    workload, *rest = (str(choice.key[kind]["id"]) for kind in ("workload", "device", "toolchain", "policy"))
    key: Key = (rest[0], rest[1], rest[2])
    rows = trial_rows(database, workload, key)
    schedules = _schedules(database, choice)
    trials = database.known(workload, *key)
    where = "best.workload = ? AND best.device = ? AND best.toolchain = ? AND best.policy = ?"
    record = next(queries.best_records(database.connection, where, (workload, *key)), None)
    cascade = str(choice.key["workload"].get("cascade", ""))
    return TuningReport(
        choice=choice,
        winner=None if record is None else winner_figures(record, cascade, choice.key["device"]),
        default=_default(database, workload, key, rows),
        candidates=tuple(Candidate(e, _text(schedules, e.schedule_id), _median(trials.get(e.schedule_id))) for e in choice.entrants),
        runs=_runs(database, workload, key, rows, _Replay(choice, schedules)),
    )


def _schedules(database: Database, choice: Why) -> dict[str, Schedule]:
    """The schedules of the candidates; one that cannot be used is none."""
    found: dict[str, Schedule] = {}
    for entrant in choice.entrants:
        for text, name in database.read("SELECT json, id FROM schedule WHERE id = ?", (entrant.schedule_id,)):
            try:
                found[entrant.schedule_id] = parse_schedule(text, name)
            except Invalid:
                continue
    return found


def _text(schedules: Mapping[str, Schedule], name: str) -> str | None:
    return schedules[name].to_json() if name in schedules else None


def _median(m: Sampled | None) -> float | None:
    """The median of a measurement, None for a failure or for none."""
    return statistics.median(m.samples_ms) if m is not None and m.samples_ms else None


def _default(database: Database, workload: str, key: Key, rows: Sequence[Mapping[str, Any]]) -> tuple[str, float] | None:
    """The default: in the finals it is the one that all are compared with; without finals the first trial of the latest run."""
    sql = (
        "SELECT * FROM measurement WHERE workload = ? AND device = ? AND toolchain = ? AND policy = ? AND role = 'final' "
        "AND basis = 'measured' AND status = 'ok' ORDER BY number"
    )
    first = {str(row["schedule"]) for row in rows if row["trial"] == 0}
    own = [m for m in queries.valid_samples(queries.rows(database.connection, sql, (workload, *key))) if _median(m) == m.baseline_ms]
    own = [m for m in own if m.schedule_id in first] or own
    if own:
        return own[-1].schedule_id, float(own[-1].baseline_ms or 0.0)
    runs = [str(row["run"]) for row in rows]
    begun = [row for row in rows if row["run"] and row["run"] == max(runs) and row["trial"] == 0 and is_time(row["median_ms"])]
    return (str(begun[0]["schedule"]), float(begun[0]["median_ms"])) if len(begun) == 1 else None


def _runs(database: Database, workload: str, key: Key, rows: Sequence[Mapping[str, Any]], replay: _Replay) -> tuple[Run, ...]:
    found = []
    for curve in curves(database, workload, key):
        mine = [row for row in rows if str(row["run"]) == curve["run"]]
        about = {name: curve[name] for name in ("run", "host", "seed", "time", "trials", "failures")}
        about |= {"driver": mine[0]["driver"], "memory_bytes": mine[0]["memory_bytes"], "commit": mine[0]["code_commit"]}
        about["ended"] = event_time(str(mine[-1]["event"]))
        best: list[tuple[int, float]] = []
        for number, row in enumerate(mine):
            if is_time(row["median_ms"]):
                best.append((number, min(row["median_ms"], best[-1][1] if best else math.inf)))
        found.append(Run(about, tuple(best), curve["svg"], replay.accuracy(mine)))
    return tuple(found)


class _Replay:
    """The cost model of the search over the trials of a workload, each described by the features that the search uses."""

    def __init__(self, choice: Why, schedules: Mapping[str, Schedule]) -> None:
        self._choice, self._schedules = choice, schedules
        self._space: Any = None
        self._missing = ""

    def accuracy(self, rows: Sequence[Mapping[str, Any]]) -> Accuracy:
        """How well the model ranks the trials of a run, given in their order."""
        trials = [row for row in rows if str(row["schedule"]) in self._schedules]
        if len(trials) < 2 * LEAST:
            return Accuracy(missing=f"{len(trials)} trials are too few to learn from some and rank the others")
        space = self._described()
        if space is None:
            return Accuracy(missing=self._missing)
        import numpy as np

        names = [str(row["schedule"]) for row in trials]
        try:
            table = np.array([list(space.features(self._schedules[name])) for name in names], dtype=np.float64)
        except (EinfallError, RecursionError, ArithmeticError, LookupError, ValueError) as error:
            return Accuracy(missing=f"the features of a schedule cannot be worked out: {type(error).__name__}")
        times = np.array([row["median_ms"] if is_time(row["median_ms"]) else math.inf for row in trials])
        seed = rows[0]["seed"] if isinstance(rows[0]["seed"], int) else 0
        return _replayed(names, table, times, seed)

    def _described(self) -> Any:
        """The space with its features; None, with the reason kept, where it cannot be derived."""
        if self._space is None and not self._missing:
            try:
                self._space = self._derive()
            except (EinfallError, RecursionError, ArithmeticError, LookupError, ValueError) as error:
                self._missing = f"the space of schedules cannot be derived again: {str(error).splitlines()[0] if str(error) else error!r}"
        return self._space

    def _derive(self) -> Any:
        from ..compiler.binding import complete_sizes
        from ..compiler.search_space import search_space  # loads the algebra system
        from ..ir.text import parse_cascade
        from .features import described

        device, row = self._choice.key["device"], self._choice.key["workload"]
        name = target_of(str(device.get("id", "")), str(device.get("vendor", "")), str(device.get("arch", "")))
        if name is None:
            self._missing = "its features need a description of the device, and there is none here"
            return None
        target, cascade = load_target(name), parse_cascade(str(row.get("cascade", "")))
        sizes = complete_sizes(cascade, dict(parse_workload(row.get("id"), row.get("family"), row.get("extents"))))
        return described(search_space(cascade, sizes, target)[0], cascade, sizes, target)


def _replayed(names: Sequence[str], table: Any, times: Any, seed: int) -> Accuracy:
    """The model made again at points along the run, half of it among them."""
    import numpy as np

    half, last = len(names) // 2, len(names) - LEAST
    counts = {half, *(LEAST + (last - LEAST) * part // STEPS for part in range(STEPS))}
    steps: list[Step] = []
    ranks: tuple[tuple[str, int, int], ...] = ()
    for known in sorted(counts):
        if not np.isfinite(times[:known]).any():
            continue
        expected = -Ranking().scores(table[:known], times[:known], table[known:], seed=seed)
        steps.append(Step(known, len(names) - known, kendall_tau(expected, times[known:])))
        if known == half:
            predicted, measured = (np.unique(values, return_inverse=True)[1] + 1 for values in (expected, times[known:]))
            ranks = tuple(zip(names[known:], predicted.tolist(), measured.tolist(), strict=True))
    return Accuracy(tuple(steps), ranks, "" if steps else "no trial gave a time before the last ones")
