"""Measurements made up for the tests of the database."""

from __future__ import annotations

from einfall.schedules.schedule import Schedule
from einfall.tuner.database.records import Device, Evidence, Measurement, Policy, Toolchain, Workload, content_id

CASCADE = "cascade cascade(X[m]: f32) -> Y[m]\n  Y[m] = X[m]"
EVIDENCE = Evidence((0,), ("normal",), ((("m", 4),),), 1e-6, 1e-7)


def workload(**extents: int) -> Workload:
    """A workload of one family with these extents."""
    return Workload(content_id(CASCADE, "contiguous", 64), tuple(sorted((extents or {"m": 4}).items())), CASCADE, "made_up")


def measurement(tile: int, *samples: float, **changes: object) -> Measurement:
    """A verified trial of the schedule with that tile of m."""
    fields: dict[str, object] = {
        "workload": workload(), "device": Device("cpu", "a processor", "x86_64", 2), "toolchain": Toolchain("0.1.0", 1, "tvm", "tvm 0.27"),
        "policy": Policy(), "schedule": Schedule.make(tile={"m": tile}), "status": "ok", "samples_ms": samples, "evidence": EVIDENCE,
    }  # fmt: skip
    return Measurement(**{**fields, **changes})  # type: ignore[arg-type]


def failed(tile: int, status: str, reason: str = "it did not work") -> Measurement:
    """A recorded failure."""
    return measurement(tile, status=status, reason=reason, evidence=None)
