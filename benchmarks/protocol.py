"""The measuring protocol: everything that is compared runs in one process, warmed up, in turns, and raw samples are kept.

    subjects = [Subject("einfall", run), Subject("SDPA", peer)]
    table = interleave(subjects, rounds=15)           {"einfall": Samples, "SDPA": Samples}, one sample each a round: A B C A B C

A figure is a ratio of medians of one such run: the machine's clock, its other tenants and its temperature then meet all subjects
alike. On a machine that is busy with other things, one thread and the processor time of that thread (`thread_time`) still give
figures that repeat within a few percent; wall-clock time and all cores are what a user sees.

`prepare()` must be called before torch is imported: OpenMP threads that spin after a torch call halve the speed of the kernel that
follows on the same cores.
"""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = {"OMP_WAIT_POLICY": "passive", "TVM_THREAD_POOL_SPIN_COUNT": "1000"}
ONE_THREAD = {"OMP_NUM_THREADS": "1", "TVM_NUM_THREADS": "1"}
PACKAGES = ("torch", "triton", "apache-tvm", "apache-tvm-ffi", "numpy")
ROUNDS = 15
LEAST_ROUNDS = 3
SAMPLE_MS = 5.0  # calls shorter than this are repeated within a sample
WARM_UP_MS = 60.0
CPUINFO = Path("/proc/cpuinfo")

Clock = Callable[[], float]


def prepare(*, one_thread: bool = False) -> None:
    """Set the thread-spin settings where the environment leaves them open, and with `one_thread` one thread for every side.

    Raises `RuntimeError` once torch is imported and something would have to be set.
    """
    wanted = {**ENVIRONMENT, **(ONE_THREAD if one_thread else {})}
    missing = {n: v for n, v in wanted.items() if n not in os.environ or (n in ONE_THREAD and os.environ[n] != v)}
    if missing and "torch" in sys.modules:
        raise RuntimeError("torch is imported already: call prepare() first, or set " + ", ".join(f"{n}={v}" for n, v in missing.items()))
    os.environ.update(missing)


@dataclass(frozen=True, slots=True)
class Subject:
    """Something to time: a name and a function of nothing."""

    name: str
    run: Callable[[], object]


@dataclass(frozen=True, slots=True)
class Samples:
    """The raw samples of a subject in milliseconds a call, in the order they were taken; `calls` were made for each."""

    name: str
    ms: tuple[float, ...]
    calls: int = 1

    @property
    def median(self) -> float:
        return statistics.median(self.ms)

    @property
    def fastest(self) -> float:
        return min(self.ms)

    @property
    def quartiles(self) -> tuple[float, float]:
        """The lower and the upper quartile."""
        if len(self.ms) < 2:
            return self.ms[0], self.ms[0]
        low, _, high = statistics.quantiles(self.ms, n=4, method="inclusive")
        return low, high

    @property
    def spread(self) -> float:
        """The distance of the quartiles over the median."""
        low, high = self.quartiles
        return (high - low) / self.median

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data, raw samples included."""
        low, high = self.quartiles
        figures = {"median_ms": self.median, "low_quartile_ms": low, "high_quartile_ms": high}
        return {"name": self.name, **figures, "calls": self.calls, "samples_ms": list(self.ms)}


def interleave(
    subjects: Sequence[Subject],
    *,
    rounds: int = ROUNDS,
    sample_ms: float = SAMPLE_MS,
    warm_up_ms: float = WARM_UP_MS,
    budget_s: float = math.inf,
    clock: Clock = time.perf_counter,
) -> dict[str, Samples]:
    """Time `subjects` in turns: each is warmed up, then gives one sample a round.

    Args:
        rounds: samples of each subject; fewer, but at least three, for one that has used up its share of `budget_s`.
        sample_ms: how long a sample lasts at least, in whole calls.
        warm_up_ms: how long a subject is called, at least twice, before it is timed.
    """
    names = [s.name for s in subjects]
    if len(set(names)) != len(names):
        raise ValueError(f"two subjects have one name: {', '.join(names)}")
    calls = [_warmed(subject, warm_up_ms, sample_ms, clock) for subject in subjects]
    found: list[list[float]] = [[] for _ in subjects]
    spent = [0.0 for _ in subjects]
    for done in range(rounds):
        for i, subject in enumerate(subjects):
            if done >= LEAST_ROUNDS and spent[i] > budget_s / len(subjects):
                continue  # a slow peer does not cost the quick ones their samples
            began = clock()
            for _ in range(calls[i]):
                subject.run()
            took = clock() - began
            spent[i] += took
            found[i].append(took * 1e3 / calls[i])
    return {s.name: Samples(s.name, tuple(ms), count) for s, ms, count in zip(subjects, found, calls, strict=True)}


def _warmed(subject: Subject, warm_up_ms: float, sample_ms: float, clock: Clock) -> int:
    """Calls the subject until it is warm; returns how many calls make a sample."""
    subject.run()
    subject.run()
    best, start = math.inf, clock()
    while True:
        began = clock()
        subject.run()
        now = clock()
        best = min(best, (now - began) * 1e3)
        if (now - start) * 1e3 >= warm_up_ms:
            return max(1, math.ceil(sample_ms / max(best, 1e-6)))


def ratio(of: Samples, to: Samples) -> float:
    """How many times as long `to` takes as `of`, by medians."""
    return to.median / of.median


def machine() -> dict[str, Any]:
    """What the figures depend on: processor, cores, threads, settings, versions, commit and date."""
    import einfall
    import torch

    text = CPUINFO.read_text(encoding="utf-8", errors="replace") if CPUINFO.exists() else ""
    fields = dict(line.split(":", 1) for line in text.partition("\n\n")[0].splitlines() if ":" in line)
    known = {key.strip(): value.strip() for key, value in fields.items()}
    flags = known.get("flags", "").split()
    return {
        "processor": known.get("model name") or platform.processor() or platform.machine(),
        "family": known.get("cpu family", ""),
        "model": known.get("model", ""),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "features": [f for f in flags if f.startswith(("avx", "amx", "fma"))],
        "threads": {"torch": torch.get_num_threads(), "einfall": einfall.settings.threads or "one a core"},
        "load": list(os.getloadavg()) if hasattr(os, "getloadavg") else [],
        "environment": {name: os.environ.get(name, "") for name in (*ENVIRONMENT, *ONE_THREAD)},
        "system": f"{platform.system()} {platform.release()}",
        "versions": {"python": platform.python_version(), "einfall": einfall.__version__, **versions()},
        "commit": commit(),
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def versions() -> dict[str, str]:
    """The versions of the packages that matter."""
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def commit() -> str:
    """The commit that was measured, with `+` where files differ from it; empty outside a repository."""
    try:
        head = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
        changed = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head + ("+" if changed.strip() else "")
