"""From a measurement to the rows that say it, and the statements that add them."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from typing import Any, get_args

from ...ir.errors import DatabaseError
from ...schedules.schedule import Schedule
from . import rows
from .records import (
    FASTEST_MS,
    MAX_SAMPLES,
    SLOWEST_MS,
    Basis,
    Device,
    Evidence,
    Invalid,
    Measurement,
    Policy,
    Role,
    Sampled,
    Status,
    Toolchain,
    Workload,
    evidence_from_row,
    parse_extents,
    parse_schedule,
)  # fmt: skip
from .rows import MAX_WHOLE, Table, canonical

MAX_REASON = 4000
REMEMBERED = 1024
STATUSES, ROLES, BASES = (frozenset(get_args(kind)) for kind in (Status, Role, Basis))


def insertion(table: Table) -> str:
    """The statement that adds a row of `table` unless it is there."""
    return f"INSERT OR IGNORE INTO {table.name} ({', '.join(table.names)}) VALUES ({', '.join('?' * len(table.names))})"


INSERTIONS = {table.name: insertion(table) for table in rows.TABLES}


def description_rows(m: Measurement) -> Iterator[tuple[Table, tuple[Any, ...]]]:
    """The rows that a measurement refers to."""
    yield rows.WORKLOAD, workload_row(m.workload)
    yield rows.DEVICE, device_row(m.device)
    yield rows.TOOLCHAIN, toolchain_row(m.toolchain)
    yield rows.POLICY, policy_row(m.policy)
    yield rows.SCHEDULE, schedule_row(m.schedule)
    if m.code is not None:
        yield rows.CODE, code_row(m)
    if m.evidence is not None:
        yield rows.EVIDENCE, evidence_row(m.evidence)


@lru_cache(REMEMBERED)
def workload_row(w: Workload) -> tuple[Any, ...]:
    """A workload as it is stored."""
    return rows.WORKLOAD.row(
        {"family": w.family, "cascade": w.cascade, "layout": w.layout, "alignment": w.alignment, "extents": w.extents_text}
    )


@lru_cache(REMEMBERED)
def device_row(d: Device) -> tuple[Any, ...]:
    """A device as it is stored."""
    return rows.DEVICE.row({"vendor": d.vendor, "model": d.model, "arch": d.arch, "units": d.units, "power_cap_w": d.power_cap_w})


@lru_cache(REMEMBERED)
def toolchain_row(t: Toolchain) -> tuple[Any, ...]:
    """A toolchain as it is stored."""
    return rows.TOOLCHAIN.row({"version": t.version, "abi": t.abi, "backend": t.backend, "compiler": t.compiler})


@lru_cache(REMEMBERED)
def policy_row(p: Policy) -> tuple[Any, ...]:
    """A policy as it is stored."""
    return rows.POLICY.row({"mode": p.mode, "cache": p.cache, "timer": p.timer, "method": p.method})


@lru_cache(REMEMBERED)
def schedule_row(schedule: Schedule) -> tuple[Any, ...]:
    """A schedule as it is stored."""
    return rows.SCHEDULE.row({"json": schedule.to_json()})


def code_row(m: Measurement) -> tuple[Any, ...]:
    """The emitted program of a measurement: the hash of its source, and what is known of its binary."""
    return rows.CODE.row({"source": m.code, "backend": m.toolchain.backend, "facts": canonical(dict(m.facts))})


@lru_cache(REMEMBERED)
def evidence_row(evidence: Evidence) -> tuple[Any, ...]:
    """Evidence as it is stored."""
    data = evidence.to_dict()
    return rows.EVIDENCE.row({name: canonical(value) if isinstance(value, list) else value for name, value in data.items()})


def measurement_row(m: Measurement) -> tuple[Any, ...]:
    """A measurement as it is stored, its name first."""
    return rows.MEASUREMENT.row(
        {
            "workload": workload_row(m.workload)[0], "device": device_row(m.device)[0], "toolchain": toolchain_row(m.toolchain)[0],
            "policy": policy_row(m.policy)[0], "schedule": schedule_row(m.schedule)[0], "code": None if m.code is None else code_row(m)[0],
            "evidence": None if m.evidence is None else evidence_row(m.evidence)[0], "basis": m.basis, "status": m.status,
            "reason": m.reason[:MAX_REASON], "role": m.role, "samples_ms": canonical([float(x) for x in m.samples_ms]),
            "samples": len(m.samples_ms), "median_ms": m.median_ms, "baseline_ms": m.baseline_ms, "name": m.workload.name, "run": m.run,
            "trial": m.trial, "host": m.host, "driver": m.device.driver, "memory_bytes": m.device.memory_bytes, "seed": m.seed,
            "code_commit": m.commit, "event": m.event,
        }
    )  # fmt: skip


def rows_of(m: Measurement) -> list[tuple[str, tuple[Any, ...]]]:
    """All rows of a measurement by table, its own last. Raises `DatabaseError` for one that no reader would take."""
    try:
        found = [(table.name, row) for table, row in description_rows(m)]
        found.append(("measurement", measurement_row(m)))
        check_measurement(m)
    except Invalid as error:
        what = f"this measurement cannot be recorded: {error}"
        raise DatabaseError(what, hint="samples are times in ms; only status ok has them") from None
    return found


def check_measurement(m: Measurement) -> None:
    """Raises `Invalid` for a measurement that readers would pass over."""
    if m.status not in STATUSES or m.role not in ROLES or m.basis not in BASES:
        raise Invalid(f"status, role and basis are {m.status}, {m.role} and {m.basis}")
    if (m.status == "ok") != bool(m.samples_ms) or len(m.samples_ms) > MAX_SAMPLES:
        raise Invalid(f"status {m.status} with {len(m.samples_ms)} samples")
    for time_ms in m.samples_ms if m.baseline_ms is None else (*m.samples_ms, m.baseline_ms):
        if not FASTEST_MS <= time_ms <= SLOWEST_MS:
            raise Invalid(f"a sample is {time_ms} ms")
    if not 0 <= m.trial < MAX_WHOLE or not 0 <= m.device.memory_bytes < MAX_WHOLE or not -MAX_WHOLE <= m.seed < MAX_WHOLE:
        raise Invalid("a number is out of bounds")


def check_descriptions(table: Table, row: tuple[Any, ...]) -> None:
    """Raises `Invalid` for a row whose values say nothing that a reader could use, though they hash to its name."""
    named = dict(zip(table.names, row, strict=True))
    match table.name:
        case "workload":
            parse_extents(named["extents"])
        case "schedule":
            parse_schedule(named["json"], named["id"])
        case "evidence":
            evidence_from_row(named)
        case "measurement":
            Sampled.from_row(named)
