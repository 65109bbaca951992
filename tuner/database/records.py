"""What a tuning database holds, as frozen data, each value checked as it is read.

A row that is malformed, out of bounds or does not hash to its own name raises `Invalid` here; every reader turns that into a
miss. Rows are named by their content (`rows.py`), events by ULIDs, whose time is shown and decides nothing.
"""

from __future__ import annotations

import json
import math
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, cast, get_args

from ...ir.cascade import Cascade
from ...ir.errors import BindingError, ScheduleError
from ...schedules.schedule import Schedule
from .rows import MAX_TEXT, Invalid, canonical, content_id, workload_id

__all__ = [
    "Basis", "Device", "Evidence", "Invalid", "Measurement", "Policy", "Record", "Role", "Sampled", "Status", "Toolchain", "Workload",
    "bucket_text", "canonical", "content_id", "event_time", "evidence_from_row", "extents_of", "extents_text", "family_of",
    "parse_extents", "parse_json", "parse_samples", "parse_schedule", "parse_workload", "ulid", "workload_id",
]  # fmt: skip

Status = Literal["ok", "build", "crash", "timeout", "memory", "wrong", "nondeterministic", "error"]
Role = Literal["trial", "final"]
Basis = Literal["measured", "estimated"]
MAX_SAMPLES = 100_000
FASTEST_MS, SLOWEST_MS = 1e-6, 1e9  # a sample outside was not taken with a clock
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"


def ulid() -> str:
    """A new name of 26 characters that sorts by time of creation: 48 bits of milliseconds, 80 random bits."""
    number = (int(time.time() * 1000) & ((1 << 48) - 1)) << 80 | int.from_bytes(os.urandom(10), "big")
    return "".join(_CROCKFORD[(number >> shift) & 31] for shift in range(125, -5, -5))


def event_time(name: str) -> str:
    """When a ULID was made, as its maker's clock had it: `2026-03-01 12:00:00`; the empty string for anything else."""
    if len(name) != 26 or any(c not in _CROCKFORD for c in name):
        return ""
    milliseconds = 0
    for c in name[:10]:
        milliseconds = milliseconds << 5 | _CROCKFORD.index(c)
    try:
        return time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime(milliseconds / 1000))
    except (ValueError, OverflowError, OSError):
        return ""


@dataclass(frozen=True, slots=True)
class Workload:
    """A cascade with its types, its layout and the extents of one call.

    Args:
        family: the hash of the cascade's text without its name, layout and alignment; no extents.
        extents: the extents of the inputs' ranks, sorted by rank.
        cascade: the text without its name, for people and for a rebuild.
        name: what the cascade was called; it tells nothing apart and is kept with the measurement.
    """

    family: str
    extents: tuple[tuple[str, int], ...]
    cascade: str
    name: str
    layout: str = "contiguous"
    alignment: int = 64

    @staticmethod
    def of(cascade: Cascade, sizes: Mapping[str, int], *, layout: str = "contiguous", alignment: int = 64) -> Workload:
        """The workload of a call of `cascade` with these extents."""
        return Workload(
            family=family_of(cascade, layout, alignment),
            extents=extents_of(cascade, sizes),
            cascade=_nameless(cascade),
            name=cascade.name,
            layout=layout,
            alignment=alignment,
        )

    @property
    def id(self) -> str:
        return workload_id(self.family, self.extents_text)

    @property
    def extents_text(self) -> str:
        """`b=1,h=8,m=1024`: the key of an exact look-up."""
        return extents_text(self.extents)

    @property
    def bucket(self) -> str:
        """`b=0,h=3,m=10`: the extents rounded up to powers of two."""
        return bucket_text(self.extents)


def family_of(cascade: Cascade, layout: str = "contiguous", alignment: int = 64) -> str:
    """The hash that all calls of a cascade share, whatever their extents and whatever the function was called."""
    return content_id(_nameless(cascade), layout, alignment)


def _nameless(cascade: Cascade) -> str:
    return str(replace(cascade, name="cascade"))


def extents_of(cascade: Cascade, sizes: Mapping[str, int]) -> tuple[tuple[str, int], ...]:
    """The extents of the inputs' ranks, sorted by rank; every other extent follows from them. Raises `BindingError` for a missing one."""
    known = cascade.solve_sizes({**sizes, **cascade.static_sizes()})
    ranks = sorted({rank for tensor in cascade.inputs for rank in tensor.ranks})
    missing = [rank for rank in ranks if rank not in known]
    if missing:
        raise BindingError(f"no extent given for rank {missing[0]}", cascade=cascade.name, hint="give every rank of the inputs")
    return tuple((rank, int(known[rank])) for rank in ranks)


def extents_text(extents: Sequence[tuple[str, int]]) -> str:
    """`b=1,h=8`: extents as one key."""
    return ",".join(f"{rank}={extent}" for rank, extent in extents)


def bucket_text(extents: Sequence[tuple[str, int]]) -> str:
    """`b=0,h=3`: the exponents of the powers of two that hold the extents."""
    return ",".join(f"{rank}={max(extent - 1, 0).bit_length()}" for rank, extent in extents)


def parse_extents(text: object) -> tuple[tuple[str, int], ...]:
    """The inverse of `extents_text`. Raises `Invalid`."""
    pairs = []
    for item in _text(text, "extents").split(",") if text else ():
        rank, _, extent = item.partition("=")
        if not rank.isidentifier() or not extent.isascii() or not extent.isdigit() or len(extent) > 12:
            raise Invalid(f"extents hold {item!r}")
        pairs.append((rank, int(extent)))
    return tuple(pairs)


@dataclass(frozen=True, slots=True)
class Device:
    """What ran it. Memory and driver tell no devices apart, since they change without it: they are kept with the measurement."""

    vendor: str
    model: str
    arch: str
    units: int
    memory_bytes: int = 0
    power_cap_w: float | None = None
    driver: str = ""

    @property
    def id(self) -> str:
        cap = None if self.power_cap_w is None else float(self.power_cap_w)
        return content_id(self.vendor, self.model, self.arch, self.units, cap)


@dataclass(frozen=True, slots=True)
class Toolchain:
    """What built it: this package, the number of its code generation, the backend and its compiler."""

    version: str
    abi: int
    backend: str
    compiler: str

    @property
    def id(self) -> str:
        return content_id(self.version, self.abi, self.backend, self.compiler)


@dataclass(frozen=True, slots=True)
class Policy:
    """How it was timed. Times of two policies are never compared."""

    mode: Literal["eager", "graph"] = "eager"
    cache: Literal["cold", "warm"] = "cold"
    timer: str = "perf_counter"
    method: int = 1

    @property
    def id(self) -> str:
        return content_id(self.mode, self.cache, self.timer, self.method)

    @property
    def preference(self) -> int:
        """Which policy answers a look-up where several have a winner: the smallest, eager and cold first."""
        return 2 * (self.mode != "eager") + (self.cache != "cold")


@dataclass(frozen=True, slots=True)
class Evidence:
    """Why a candidate is taken to be right.

    Args:
        largest_error: the error that came nearest to what is allowed, relative to the largest magnitude of its output.
        tolerance: what is allowed there, measured the same way.
    """

    seeds: tuple[int, ...]
    distributions: tuple[str, ...]
    shapes: tuple[tuple[tuple[str, int], ...], ...]
    tolerance: float
    largest_error: float
    oracle: str = "reference in float64"

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "seeds": list(self.seeds), "distributions": list(self.distributions), "shapes": [dict(s) for s in self.shapes],
            "tolerance": self.tolerance, "largest_error": self.largest_error, "oracle": self.oracle,
        }  # fmt: skip

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Evidence:
        """The inverse of `to_dict`, every value checked. Raises `Invalid`."""
        shapes = data.get("shapes")
        if not isinstance(shapes, list) or not all(isinstance(s, dict) for s in shapes):
            raise Invalid("evidence.shapes is no list of tables")
        return Evidence(
            seeds=tuple(_whole(s, "seed") for s in _list(data.get("seeds"), "seeds")),
            distributions=tuple(_text(d, "distribution") for d in _list(data.get("distributions"), "distributions")),
            shapes=tuple(tuple((_text(k, "rank"), _whole(v, "extent")) for k, v in s.items()) for s in shapes),
            tolerance=_number(data.get("tolerance"), "tolerance"),
            largest_error=_number(data.get("largest_error"), "largest_error"),
            oracle=_text(data.get("oracle"), "oracle"),
        )


@dataclass(frozen=True, slots=True)
class Measurement:
    """One candidate, run or failed: a fact that is only ever added.

    Args:
        basis: `measured` on the device, or `estimated` by a model; an estimate never wins.
        samples_ms: the raw samples in the order they were taken; empty for a failure.
        role: `trial` during the search, `final` where it was interleaved with the default and other finalists.
        baseline_ms: the median of the default schedule in the same interleaved group.
        code: the hash of the emitted source; `facts` is what is known of the binary.
        run: the tuning run it belongs to, `trial` its number there.
        event: the name of this taking of the measurement; equal samples taken twice are two measurements.
    """

    workload: Workload
    device: Device
    toolchain: Toolchain
    policy: Policy
    schedule: Schedule
    status: Status
    reason: str = ""
    samples_ms: tuple[float, ...] = ()
    baseline_ms: float | None = None
    role: Role = "trial"
    evidence: Evidence | None = None
    code: str | None = None
    facts: tuple[tuple[str, float], ...] = ()
    run: str = ""
    trial: int = 0
    host: str = ""
    seed: int = 0
    commit: str = ""
    basis: Basis = "measured"
    event: str = field(default_factory=ulid)

    @property
    def id(self) -> str:
        """The name of the measurement: the hash of all that it says."""
        from .storing import measurement_row

        return str(measurement_row(self)[0])

    @property
    def median_ms(self) -> float | None:
        return statistics.median(self.samples_ms) if self.samples_ms else None


@dataclass(frozen=True, slots=True)
class Sampled:
    """A stored measurement as far as choosing and resuming need it."""

    id: str
    schedule_id: str
    status: Status
    reason: str
    role: Role
    samples_ms: tuple[float, ...]
    baseline_ms: float | None
    evidence: str | None
    basis: Basis = "measured"

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> Sampled:
        """A row of `measurement`, every value checked. Raises `Invalid`."""
        status = _one_of(row["status"], get_args(Status), "status")
        samples = parse_samples(row["samples_ms"])
        if (status == "ok") != bool(samples) or row["samples"] != len(samples):
            raise Invalid(f"status {status} with {len(samples)} samples, said to be {str(row['samples'])[:20]}")
        told = row["median_ms"]
        if (told is None) != (not samples) or (samples and not math.isclose(_positive(told, "median_ms"), statistics.median(samples))):
            raise Invalid(f"median_ms is {str(told)[:20]} and not that of the samples")
        baseline, evidence = row["baseline_ms"], row["evidence"]
        return Sampled(
            id=_text(row["id"], "id"),
            schedule_id=_text(row["schedule"], "schedule"),
            status=cast(Status, status),
            reason=_text(row["reason"], "reason"),
            role=cast(Role, _one_of(row["role"], get_args(Role), "role")),
            samples_ms=samples,
            baseline_ms=None if baseline is None else _time(baseline, "baseline_ms"),
            evidence=None if evidence is None else _text(evidence, "evidence"),
            basis=cast(Basis, _one_of(row["basis"], get_args(Basis), "basis")),
        )


@dataclass(frozen=True, slots=True)
class Record:
    """The winner of a workload on a device under a toolchain.

    Args:
        relative: its time over the default schedule's in the same interleaved run; None if they never ran together.
    """

    workload: str
    family: str
    extents: tuple[tuple[str, int], ...]
    device: str
    toolchain: str
    policy: str
    schedule: Schedule
    measurement: str
    median_ms: float
    relative: float | None
    samples: int
    name: str = ""
    device_model: str = ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "workload": self.workload, "name": self.name, "family": self.family, "extents": dict(self.extents),
            "device": self.device, "device_model": self.device_model, "toolchain": self.toolchain, "policy": self.policy,
            "schedule_id": self.schedule.hash, "schedule": self.schedule.to_dict(), "measurement": self.measurement,
            "median_ms": self.median_ms, "relative": self.relative, "samples": self.samples,
        }  # fmt: skip

    @staticmethod
    def from_row(row: Mapping[str, Any]) -> Record:
        """A row of `best`, every value checked. Raises `Invalid`."""
        relative = row["relative"]
        return Record(
            workload=row["workload"],
            family=row["family"],
            extents=parse_workload(row["workload"], row["family"], row["extents"]),
            device=_text(row["device"], "device"),
            toolchain=_text(row["toolchain"], "toolchain"),
            policy=_text(row["policy"], "policy"),
            schedule=parse_schedule(row["schedule_json"], row["schedule"]),
            measurement=_text(row["measurement"], "measurement"),
            median_ms=_positive(row["median_ms"], "median_ms"),
            relative=None if relative is None else _positive(relative, "relative"),
            samples=_whole(row["samples"], "samples"),
            name=_text(row["name"], "name"),
            device_model=_text(row["model"], "model"),
        )


def evidence_from_row(row: Mapping[str, Any]) -> Evidence:
    """A row of `evidence`, every value checked. Raises `Invalid`."""
    lists = {name: parse_json(row[name], name) for name in ("seeds", "distributions", "shapes")}
    return Evidence.from_dict({**row, **lists})


def parse_workload(name: object, family: object, extents: object) -> tuple[tuple[str, int], ...]:
    """The extents of a stored workload whose family and extents hash to its own name. Raises `Invalid`."""
    found = parse_extents(extents)
    if workload_id(_text(family, "family"), _text(extents, "extents")) != name:
        raise Invalid(f"workload {str(name)[:80]!r} is not that of its extents")
    return found


def parse_schedule(text: object, name: object) -> Schedule:
    """A stored schedule that is well-formed and hashes to its own name. Raises `Invalid`."""
    try:
        schedule = Schedule.from_json(_text(text, "schedule"))
    except ScheduleError as error:
        raise Invalid(error.what) from None
    if schedule.hash != name:
        raise Invalid(f"schedule {name!r} hashes to {schedule.hash}")
    return schedule


def parse_samples(text: object) -> tuple[float, ...]:
    """Stored samples: a JSON list of positive finite numbers. Raises `Invalid`."""
    values = _list(parse_json(text, "samples_ms"), "samples_ms")
    if len(values) > MAX_SAMPLES:
        raise Invalid(f"{len(values)} samples")
    if all(v.__class__ is float and FASTEST_MS <= v <= SLOWEST_MS for v in values):
        return tuple(values)
    return tuple(_time(v, "a sample") for v in values)


def parse_json(text: object, what: str) -> object:
    """JSON data of bounded size. Raises `Invalid`."""
    try:
        return json.loads(_text(text, what))
    except (ValueError, RecursionError) as error:
        raise Invalid(f"{what} is not JSON: {error}") from None


def _text(value: object, what: str) -> str:
    if not isinstance(value, str) or len(value) > MAX_TEXT:
        raise Invalid(f"{what} is {str(value)[:80]!r}")
    return value


def _list(value: object, what: str) -> list[Any]:
    if not isinstance(value, list):
        raise Invalid(f"{what} is {str(value)[:80]!r}")
    return value


def _whole(value: object, what: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 63:
        raise Invalid(f"{what} is {str(value)[:80]!r}")
    return value


def _number(value: object, what: str) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not -1e300 < value < 1e300:
        raise Invalid(f"{what} is {str(value)[:80]!r}")
    return float(value)


def _one_of(value: object, known: tuple[str, ...], what: str) -> str:
    if not isinstance(value, str) or value not in known:
        raise Invalid(f"{what} is {str(value)[:80]!r}")
    return value


def _time(value: object, what: str) -> float:
    number = _number(value, what)
    if not FASTEST_MS <= number <= SLOWEST_MS:
        raise Invalid(f"{what} is {number} ms")
    return number


def _positive(value: object, what: str) -> float:
    number = _number(value, what)
    if number <= 0:
        raise Invalid(f"{what} is {number}")
    return number
