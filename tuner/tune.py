"""Tuning: search the schedules of a cascade on this machine, check every candidate, record what was measured, settle who is best.

    space -> candidates -> built and checked in killable children -> timed one at a time -> database -> interleaved finals -> winner

Every measurement is in the database before the next is taken, so whatever ends a run early, what was measured stays.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeAlias

from ..compiler.binding import complete_sizes
from ..ir.cascade import Cascade
from ..ir.errors import BuildError
from ..ir.types import DType
from ..schedules.schedule import Schedule
from ..schedules.target import Target, load_target
from .database import Database, Device, Evidence, Measurement, Policy, Sampled, Toolchain, Workload, ulid
from .device import describe_device, describe_toolchain, host_name, source_commit
from .features import described
from .lookup import with_dtypes
from .measure import METHOD, Protocol
from .pool import COMMAND, Outcome, WorkerPool
from .prior import database_priors
from .search import Evolution, Failure, History, Stop, minimize
from .worker import Job

FINALISTS = 3
MAX_SEEDS = 3  # winners of earlier runs, other shapes and other toolchains that are tried right after the default


@dataclass(frozen=True, slots=True)
class Started:
    """The run begins: at most `trials` candidates; `known` of them were measured before and are not measured again."""

    workload: Workload
    target: str
    device: str
    trials: int
    known: int


@dataclass(frozen=True, slots=True)
class Measured:
    """A candidate was timed."""

    trial: int
    schedule: Schedule
    time_ms: float
    recalled: bool = False


@dataclass(frozen=True, slots=True)
class Failed:
    """A candidate gave no time; the reason is recorded."""

    trial: int
    schedule: Schedule
    status: str
    reason: str


@dataclass(frozen=True, slots=True)
class Incumbent:
    """A candidate is the fastest so far. `speedup` is over the default, None while that has no time."""

    trial: int
    schedule: Schedule
    time_ms: float
    speedup: float | None


@dataclass(frozen=True, slots=True)
class Finals:
    """The search is over; the default and the fastest are now timed in turns."""

    schedules: tuple[Schedule, ...]


@dataclass(frozen=True, slots=True)
class Done:
    """The run has ended."""

    result: TuneResult


Event: TypeAlias = Started | Measured | Failed | Incumbent | Finals | Done


@dataclass(frozen=True, slots=True)
class Row:
    """A finalist: its times and how it compares with the default of the same interleaved run."""

    schedule: Schedule
    median_ms: float
    relative: float | None
    samples: int
    is_default: bool
    is_winner: bool


@dataclass(frozen=True, slots=True)
class TuneResult:
    """What a run found. Its `repr` is a report that can be pasted.

    Args:
        schedule: the winner, as the next call will find it in the database.
        best_ms, default_ms: medians, from the interleaved finals where they took place.
        table: the finalists, fastest first.
        interrupted: whether the run was ended early by the user.
    """

    workload: Workload
    target: str
    device: Device
    schedule: Schedule
    best_ms: float
    default_ms: float | None
    table: tuple[Row, ...]
    history: History[Schedule] = field(repr=False)
    database: Path
    run: str
    seconds: float
    interrupted: bool = False

    @property
    def speedup(self) -> float | None:
        """How many times faster than the default the winner is."""
        return None if self.default_ms is None else self.default_ms / self.best_ms

    @property
    def failures(self) -> int:
        """How many candidates gave no time."""
        return sum(isinstance(t.result, Failure) for t in self.history)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "cascade": self.workload.name, "workload": self.workload.id, "extents": dict(self.workload.extents), "target": self.target,
            "device": self.device.model, "schedule": self.schedule.to_dict(), "schedule_id": self.schedule.hash,
            "best_ms": self.best_ms, "default_ms": self.default_ms, "speedup": self.speedup, "trials": len(self.history),
            "failures": self.failures, "seconds": self.seconds, "interrupted": self.interrupted, "database": str(self.database),
            "run": self.run, "history": self.history.to_dict(),
            "finals": [
                {"schedule_id": r.schedule.hash, "median_ms": r.median_ms, "relative": r.relative, "samples": r.samples,
                 "default": r.is_default, "winner": r.is_winner}
                for r in self.table
            ],
        }  # fmt: skip

    def __repr__(self) -> str:
        ended = ", interrupted" if self.interrupted else ""
        lines = [
            f"# {self.workload.name}({self.workload.extents_text}) on {self.target}: {self.device.model}",
            f"# {len(self.history)} trials ({self.failures} failed) in {self.seconds:.1f} s{ended}, recorded in {self.database}",
        ]
        for row in self.table:
            ratio = "" if row.relative is None else f"  {1 / row.relative:5.2f}x"
            mark = " <- winner" if row.is_winner else ""
            name = "default" if row.is_default else row.schedule.hash
            lines.append(f"#   {name:<16}  {row.median_ms:10.4f} ms{ratio}{mark}")
        lines.append(f"schedule = {self.schedule.to_dict()!r}")
        return "\n".join(lines)


def tune(
    cascade: Cascade,
    *,
    sizes: Mapping[str, int],
    target: Target | str,
    database: str | Path,
    dtypes: Mapping[str, str | DType] | None = None,
    scalars: Mapping[str, float] | None = None,
    trials: int = 64,
    seed: int = 0,
    timeout_s: float = 30.0,
    on_event: Callable[[Event], None] | None = None,
    resume: bool = False,
    policy: Literal["cold", "warm"] = "cold",
    space: Any = None,
    default: Schedule | None = None,
    workers: int = 2,
    threads: int | None = None,
    command: Sequence[str] = COMMAND,
    protocol: Protocol | None = None,
) -> TuneResult:
    """The fastest schedule found for `cascade` at these extents on this machine, recorded in `database`.

    Args:
        sizes: extents of the inputs' ranks.
        dtypes: types of inputs, where they differ from the cascade's.
        scalars: values of the scalar arguments.
        trials: candidates to measure at most, the default among them.
        timeout_s: the longest a candidate may take to build, to be checked, or to be timed.
        on_event: told of everything as it happens.
        resume: take what the database already holds of this workload, device and toolchain as measured; with the seed of an earlier
            run the search then continues where that one ended.
        policy: whether inputs are out of the cache when they are timed.
        space, default: other candidates than those of the plan, and the schedule they are compared with.
        workers: children that build and check at the same time; timing is always one at a time.
        threads: threads of a kernel; None leaves them to the target, as in a call.
        command: the program of a child.

    Raises:
        DatabaseError: the file cannot be used; nothing is measured then.
        BuildError: no candidate gave a time; the failures are recorded.
    """
    cascade = with_dtypes(cascade, dtypes or {})
    machine = load_target(target) if isinstance(target, str) else target
    full = complete_sizes(cascade, {r: n for r, n in sizes.items() if r in {x for t in cascade.inputs for x in t.ranks}})
    describe_device(machine)  # refused before anything is derived or built
    if space is None or default is None:
        found_space, found_default = plan_space(cascade, full, machine)
        space, default = space if space is not None else found_space, default if default is not None else found_default
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="einfall-tune-") as cache, closing(Database.open(database, create=True)) as opened:
        job = Job(
            cascade=str(cascade), sizes=tuple(full.items()), scalars=tuple((scalars or {}).items()), schedule=default,
            target=machine.to_json(), seed=seed, policy=policy, cache=cache, protocol=protocol or Protocol(),
        )  # fmt: skip
        run = _Run(opened, Workload.of(cascade, full), machine, job, on_event or (lambda event: None), resume=resume)
        with WorkerPool(workers=workers, threads=threads, timeout_s=timeout_s, command=command) as pool:
            run.search(space, pool, trials)
            run.hold_finals(pool)
        result = run.result(time.monotonic() - began)
    run.emit(Done(result))
    return result


def plan_space(cascade: Cascade, sizes: Mapping[str, int], target: Target) -> tuple[Any, Schedule]:
    """The schedules that the plan of `cascade` allows on `target`, and the default among them.

    On a GPU the default is what a call gets: it is built, and made smaller where the target has no room for it.
    """
    from ..compiler.search_space import search_space  # loads the algebra system
    from ..schedules.space_gpu import GpuSpace

    space, default = search_space(cascade, sizes, target)
    if isinstance(space, GpuSpace):
        from ..compiler.driver import compile_cascade

        default = space.nearest(compile_cascade(cascade, sizes=sizes, target=target).schedule)
    return described(space, cascade, sizes, target), default


class _Run:
    """The state of one run: what was measured, by whom it is recorded, and who leads."""

    def __init__(
        self, database: Database, workload: Workload, target: Target, job: Job, emit: Callable[[Event], None], *, resume: bool
    ) -> None:
        self.database, self.workload, self.job, self.emit = database, workload, job, emit
        self.target = target.name
        self.device: Device = describe_device(target)
        self.toolchain: Toolchain = describe_toolchain(target)
        self.policy = Policy(cache=job.policy, method=METHOD)
        self.run = ulid()
        self.interrupted = False
        self.history: History[Schedule] = History()
        self._host, self._commit = host_name(), source_commit()
        self._resumed = resume
        self._known: dict[str, Sampled] = database.known(*self._ids, self.policy.id) if resume else {}
        self._evidence: dict[str, Evidence] = {}
        self._count = 0
        self._times: dict[str, float] = {}
        self._schedules: dict[str, Schedule] = {job.schedule.hash: job.schedule}
        self._finals: dict[str, tuple[float, ...]] = {}

    @property
    def default(self) -> Schedule:
        return self.job.schedule

    @property
    def _ids(self) -> tuple[str, str, str]:
        return self.workload.id, self.device.id, self.toolchain.id

    def search(self, space: Any, pool: WorkerPool, trials: int) -> None:
        """Measures up to `trials` candidates. Ctrl-C ends it and keeps what there is."""
        self.emit(Started(self.workload, self.target, self.device.model, trials, len(self._known)))
        priors = database_priors(self.database, self.workload.family, self._ids, self.policy.id, space.features)
        strategy = Evolution(space, budget=trials, seed=self.job.seed, prior=priors, seeds=[self.default, *self._seeds()])

        def measure(points: list[Schedule]) -> list[float | Failure]:
            return self._measure(points, pool)

        self.history = minimize(space, measure, budget=trials, seed=self.job.seed, strategy=strategy)

    def hold_finals(self, pool: WorkerPool) -> None:
        """Times the default and the fastest candidates in turns, and records them."""
        if self.interrupted:
            return
        others = [name for name in self._ranked() if name != self.default.hash]
        if self.default.hash not in self._times or not others:
            return
        reigning = self.database.best(*self._ids)
        if reigning is not None and reigning.schedule.hash in others[FINALISTS:]:
            others.insert(FINALISTS - 1, reigning.schedule.hash)
        for count in (FINALISTS, 1):  # one of them may fail when run again: then the fastest alone meets the default
            names = [self.default.hash, *others[:count]]
            schedules = tuple(self._schedules[name] for name in names)
            self.emit(Finals(schedules))
            try:
                samples = pool.finals([replace(self.job, schedule=schedule) for schedule in schedules])
            except KeyboardInterrupt:
                self.interrupted = True
                return
            if not isinstance(samples, Outcome):
                self._record_finals(schedules, samples)
                return
            self.emit(Failed(self._count, schedules[-1], samples.status, f"in the finals: {samples.reason}"))

    def result(self, seconds: float) -> TuneResult:
        """What was found. Raises `BuildError` if no candidate gave a time."""
        if not self._times:
            first = next((t.result.reason for t in self.history if isinstance(t.result, Failure)), "the search was interrupted")
            raise BuildError(
                f"none of {len(self.history)} candidates of {self.workload.name} ran and was right; the default: {first}",
                hint=f"`einfall db show {self.workload.id} --db {self.database.path}` lists them",
            )
        record = self.database.best(*self._ids)
        winner = record.schedule if record is not None else self._schedules[self._ranked()[0]]
        times = {name: statistics.median(found) for name, found in self._finals.items()} or self._times
        best_ms = times.get(winner.hash, record.median_ms if record is not None else 0.0)
        return TuneResult(
            workload=self.workload,
            target=self.target,
            device=self.device,
            schedule=winner,
            best_ms=best_ms,
            default_ms=times.get(self.default.hash),
            table=tuple(self._table(times, winner)),
            history=self.history,
            database=self.database.path,
            run=self.run,
            seconds=seconds,
            interrupted=self.interrupted,
        )

    def _seeds(self) -> list[Schedule]:
        """Winners worth trying early: of this workload under any toolchain, then of the family's other extents and devices.

        A resumed run leaves out this workload's own: they came after the run that it continues had begun.
        """
        records = self.database.relatives(self.workload.family)
        own = [] if self._resumed else [r.schedule for r in records if r.workload == self.workload.id]
        other = [r.schedule for r in records if r.workload != self.workload.id]
        return list(dict.fromkeys(own + other))[:MAX_SEEDS]

    def _measure(self, points: list[Schedule], pool: WorkerPool) -> list[float | Failure]:
        """The result of each point, recorded as it comes; recalled where it is known. Raises `Stop` on Ctrl-C."""
        fresh = [replace(self.job, schedule=p) for p in points if p.hash not in self._known]
        outcomes: Iterator[Outcome] = pool.evaluate(fresh, self._incumbent)
        results: list[float | Failure] = []
        try:
            for point in points:
                known = self._known.get(point.hash)
                results.append(self._recall(point, known) if known is not None else self._take(point, next(outcomes)))
        except KeyboardInterrupt:
            self.interrupted = True
            raise Stop(results) from None
        return results

    def _ranked(self) -> list[str]:
        """The schedules that have a time, fastest first."""
        return sorted(self._times, key=lambda name: (self._times[name], name))

    def _incumbent(self) -> float | None:
        return min(self._times.values(), default=None)

    def _recall(self, point: Schedule, known: Sampled) -> float | Failure:
        """What an earlier run found of a point."""
        evidence = None if known.evidence is None else self.database.evidence(known.evidence)
        if known.status != "ok" or evidence is None:
            self.emit(Failed(self._count, point, known.status, known.reason))
            self._count += 1
            return Failure(f"{known.status}: {known.reason}")
        return self._lead(point, statistics.median(known.samples_ms), evidence, recalled=True)

    def _take(self, point: Schedule, outcome: Outcome) -> float | Failure:
        """Records a fresh outcome."""
        self.database.record(self._measurement(point, outcome))
        if outcome.status != "ok" or outcome.evidence is None:
            self.emit(Failed(self._count, point, outcome.status, outcome.reason))
            self._count += 1
            return Failure(f"{outcome.status}: {outcome.reason}")
        return self._lead(point, statistics.median(outcome.samples_ms), outcome.evidence)

    def _lead(self, point: Schedule, time_ms: float, evidence: Evidence, *, recalled: bool = False) -> float:
        leader = self._incumbent()
        self._times[point.hash], self._schedules[point.hash], self._evidence[point.hash] = time_ms, point, evidence
        self.emit(Measured(self._count, point, time_ms, recalled))
        if leader is None or time_ms < leader:
            default_ms = self._times.get(self.default.hash)
            self.emit(Incumbent(self._count, point, time_ms, None if default_ms is None else default_ms / time_ms))
        self._count += 1
        return time_ms

    def _measurement(self, point: Schedule, outcome: Outcome) -> Measurement:
        return Measurement(
            workload=self.workload, device=self.device, toolchain=self.toolchain, policy=self.policy, schedule=point,
            status=outcome.status, reason=outcome.reason, samples_ms=outcome.samples_ms, evidence=outcome.evidence, code=outcome.code,
            facts=outcome.facts, run=self.run, trial=self._count, host=self._host, seed=self.job.seed, commit=self._commit,
        )  # fmt: skip

    def _record_finals(self, schedules: Sequence[Schedule], samples: Sequence[tuple[float, ...]]) -> None:
        """Records interleaved samples in one transaction, each with the default's median as its baseline."""
        baseline = statistics.median(samples[0])
        found = []
        for schedule, values in zip(schedules, samples, strict=True):
            outcome = Outcome("ok", samples_ms=values, evidence=self._evidence[schedule.hash])
            found.append(replace(self._measurement(schedule, outcome), role="final", baseline_ms=baseline))
            self._finals[schedule.hash] = values
        self.database.record_all(found)

    def _table(self, times: Mapping[str, float], winner: Schedule) -> Iterator[Row]:
        baseline = times.get(self.default.hash)
        shown = sorted(times.items(), key=lambda item: (item[1], item[0]))
        kept = [name for name, _ in shown[:FINALISTS]]
        for name, median in shown:
            if name not in (*kept, self.default.hash, winner.hash):
                continue
            yield Row(
                schedule=self._schedules[name],
                median_ms=median,
                relative=None if baseline is None else median / baseline,
                samples=len(self._finals.get(name, ())),
                is_default=name == self.default.hash,
                is_winner=name == winner.hash,
            )
