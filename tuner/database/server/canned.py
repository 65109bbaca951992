"""The questions that people ask most, as SQL that Datasette shows and lets them change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_BEST = (
    "SELECT measurement.name AS kernel, best.extents, device.model AS device, round(best.median_ms, 5) AS ms, "
    "round(best.relative, 3) AS against_default, best.samples, toolchain.version || ' ' || toolchain.compiler AS toolchain, "
    "best.workload, best.schedule FROM best JOIN measurement ON measurement.id = best.measurement "
    "JOIN device ON device.id = best.device JOIN toolchain ON toolchain.id = best.toolchain"
)

QUERIES: Mapping[str, Mapping[str, Any]] = {
    "winners": {
        "title": "Winners",
        "description": "The best schedule known for each kernel, extents, device and toolchain.",
        "sql": _BEST + " ORDER BY kernel, best.extents, device",
    },
    "winners_of": {
        "title": "Winners of a kernel",
        "params": ["kernel"],
        "sql": _BEST + " WHERE measurement.name = :kernel ORDER BY best.extents, device",
    },
    "who_measured_what_where": {
        "title": "Who measured what where",
        "description": "Measurements by host, device and kernel.",
        "sql": (
            "SELECT host, device.model AS device, measurement.driver, measurement.name AS kernel, count(DISTINCT workload) AS workloads, "
            "count(*) AS measurements, sum(status <> 'ok') AS failures, count(DISTINCT run) AS runs "
            "FROM measurement JOIN device ON device.id = measurement.device "
            "GROUP BY host, device.id, measurement.driver, measurement.name ORDER BY measurements DESC"
        ),
    },
    "curve": {
        "title": "Tuning curve",
        "description": "Every trial of a workload in the order of its run.",
        "params": ["workload"],
        "sql": (
            "SELECT run, trial, schedule, status, median_ms, min(median_ms) OVER (PARTITION BY run ORDER BY trial) AS best_so_far_ms "
            "FROM measurement WHERE workload = :workload AND role = 'trial' AND basis = 'measured' ORDER BY run, trial"
        ),
    },
    "failures": {
        "title": "Failures",
        "description": "What gave no time, and why.",
        "sql": (
            "SELECT status, reason, count(*) AS measurements, count(DISTINCT schedule) AS schedules, max(name) AS a_kernel "
            "FROM measurement WHERE status <> 'ok' GROUP BY status, reason ORDER BY measurements DESC LIMIT 500"
        ),
    },
    "transfers": {
        "title": "What came from elsewhere",
        "sql": "SELECT kind, place, content, first, last, last - first + 1 AS measurements FROM transfer ORDER BY number",
    },
}
