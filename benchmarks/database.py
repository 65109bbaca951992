"""What the tuning database takes: concurrent writers, look-ups among a million measurements, merging, segments.

    python benchmarks/database.py                   everything, as JSON on stdout; a few minutes
    python benchmarks/database.py --rows 20000      smaller

Each process that writes records measurements as tuning runs do, of workloads of its own, one transaction each, all into one file. A
look-up is timed as a kernel call makes it, by extents and with an empty memo, and again with a full one. What is merged are two files of
which neither has a measurement of the other; each has 200 measurements a workload, four of them finals. The load of the machine is told
with the figures.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from einfall.ir.text import parse_cascade
from einfall.schedules.schedule import Schedule
from einfall.schedules.target import load_target
from einfall.tuner.database import Database, Evidence, Measurement, Policy, Workload, choice, segments, storing, ulid
from einfall.tuner.database.merge import merge
from einfall.tuner.device import describe_device, describe_toolchain
from einfall.tuner.lookup import Lookup

CASCADE = parse_cascade("cascade rows(X[m,p]: f32) -> Y[m]\n  Y[m] = sum(p) X[m,p]\n")
TARGET = load_target("cpu")
TRIALS, FINALS = 196, 4
WRITER = """
import sys
from benchmarks.database import write
write(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
"""


def measurements(count: int, seed: int, first: int = 0) -> Iterator[Measurement]:
    """Tuning runs one after the other, each of one workload, numbered from `first`."""
    rng = random.Random(seed)
    device, toolchain, policy = describe_device(TARGET), describe_toolchain(TARGET), Policy()
    schedules = [Schedule.make(tile={"m": 1 << (i % 8), "p": 1 + i}) for i in range(TRIALS)]
    run, workload = "", None
    for i in range(count):
        trial = i % (TRIALS + FINALS)
        if trial == 0 or workload is None:
            run, workload = ulid(), Workload.of(CASCADE, extents(first + i // (TRIALS + FINALS)))
        final = trial >= TRIALS
        base = 1.0 + (0.1 * (trial - TRIALS) if final else rng.expovariate(1.0))
        yield Measurement(
            workload=workload, device=device, toolchain=toolchain, policy=policy, schedule=schedules[trial % TRIALS], status="ok",
            samples_ms=tuple(base * (1 + rng.random() / 50) for _ in range(20 if final else 7)),
            evidence=Evidence((seed,), ("normal", "holes"), ((("m", 4), ("p", 8)),), 1e-6, rng.random() * 1e-6),
            role="final" if final else "trial", baseline_ms=2.0 if final else None, run=run, trial=trial, host=f"host{seed}", seed=seed,
        )  # fmt: skip


def extents(number: int) -> dict[str, int]:
    """The extents of the workload of that number; there is none twice."""
    return {"m": 1 + number % 1000, "p": 64 * (1 + number // 1000)}


def fill(path: Path, count: int, seed: int) -> None:
    """A file of so many measurements, written in large transactions."""
    with Database.open(path, create=True) as db:
        found = measurements(count, seed)
        for _ in range(0, count, 50_000):
            with db.writing() as connection:
                for _, m in zip(range(50_000), found, strict=False):
                    for name, row in storing.rows_of(m):
                        connection.execute(storing.INSERTIONS[name], row)
        db.rebuild_best()
        db.connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")


def write(path: str, count: int, seed: int) -> None:
    """Records measurements one by one, after a line on stdin says go; says when it began and ended."""
    found = list(measurements(count, seed, first=seed * count))
    with Database.open(path, create=True) as db:
        print("ready", flush=True)
        sys.stdin.readline()
        begin = time.time()
        for m in found:
            db.record(m)
    print(json.dumps([begin, time.time()]), flush=True)


def concurrent_writes(folder: Path, processes: int, count: int) -> dict[str, float]:
    """Transactions a second of so many processes into one file, and how many measurements are not there afterwards."""
    path = folder / "many.db"
    Database.open(path, create=True).close()
    root = str(Path(__file__).resolve().parent.parent)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([root, os.environ.get("PYTHONPATH", "")])}
    children = [
        subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path), str(count), str(seed)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )
        for seed in range(processes)
    ]
    for child in children:
        assert child.stdout is not None and child.stdout.readline() == "ready\n"
    for child in children:
        assert child.stdin is not None
        child.stdin.write("go\n")
        child.stdin.flush()
    spans = [json.loads(child.communicate()[0]) for child in children]
    seconds = max(end for _, end in spans) - min(begin for begin, _ in spans)
    with Database.open(path) as db:
        kept = db.read("SELECT count(*) FROM measurement")[0][0]
        db.check()
    total = processes * count
    return {"processes": processes, "transactions": total, "lost": total - kept, "seconds": seconds, "transactions_per_s": total / seconds}


def lookups(path: Path, workloads: int, count: int = 4000) -> dict[str, float]:
    """Microseconds of a look-up that the file answers, of one that the family answers, and of one that the memo answers."""
    rng = random.Random(0)
    lookup = Lookup(path)
    asked = [extents(rng.randrange(workloads)) for _ in range(count)]
    near = [{"m": sizes["m"], "p": sizes["p"] + 1} for sizes in asked[:500]]
    found = lookup.find(CASCADE, asked[0], TARGET)
    assert found is not None and found.source == "exact"
    exact = timed(lookup, asked, again=False)
    assert lookup.find(CASCADE, near[0], TARGET) is not None
    nearest = timed(lookup, near, again=False)
    memo = timed(lookup, [asked[0]] * 20_000, again=True)
    return {
        "exact_p50_us": statistics.median(exact), "exact_p99_us": statistics.quantiles(exact, n=100)[98],
        "nearest_p50_us": statistics.median(nearest), "memo_p50_us": statistics.median(memo),
    }  # fmt: skip


def timed(lookup: Lookup, asked: list[dict[str, int]], *, again: bool) -> list[float]:
    """Microseconds of each look-up, the timer's own subtracted; the memo forgets each answer unless it may be given again."""
    clock = time.perf_counter_ns
    timer = statistics.median(-(clock() - clock()) for _ in range(1000))
    samples = []
    for sizes in asked:
        if not again:
            lookup._memo.clear()
        lookup._checked = time.monotonic()  # the question whether the file has changed comes every half second
        begin = clock()
        lookup.find(CASCADE, sizes, TARGET)
        samples.append((clock() - begin - timer) / 1e3)
    return samples


def merges(folder: Path, count: int) -> dict[str, float]:
    """Seconds to merge, to merge again, to export and to import."""
    a, b, c = (folder / f"{name}.db" for name in "abc")
    fill(a, count, 1)
    fill(b, count, 2)
    seconds = []
    for _ in range(3):
        for suffix in ("", "-wal", "-shm"):
            c.with_name(c.name + suffix).unlink(missing_ok=True)
        shutil.copy(a, c)
        with Database.open(c) as db:
            begin = time.perf_counter()
            taken = merge(db, b)
            seconds.append(time.perf_counter() - begin)
            assert taken.measurements == count
            begin = time.perf_counter()
            assert merge(db, b).measurements == 0
            again = time.perf_counter() - begin
    with Database.open(a) as db:
        begin = time.perf_counter()
        segments.export_segments(db, str(folder / "store"))
        export_s = time.perf_counter() - begin
    with Database.open(folder / "d.db", create=True) as db:
        begin = time.perf_counter()
        segments.import_segments(db, str(folder / "store"))
        import_s = time.perf_counter() - begin
    return {
        "measurements_each": count, "merge_s": min(seconds), "merge_s_samples": seconds, "merge_again_s": again,  # type: ignore[dict-item]
        "export_s": export_s, "import_s": import_s,
    }  # fmt: skip


def settle(path: Path) -> dict[str, float]:
    """Seconds to derive every winner again."""
    with Database.open(path) as db:
        begin = time.perf_counter()
        with db.writing() as connection:
            winners = choice.rebuild(connection)
        return {"winners": winners, "rebuild_best_s": time.perf_counter() - begin}


def main() -> None:
    """Everything, as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_000_000, help="measurements among which a look-up finds its own")
    parser.add_argument("--merge-rows", type=int, default=100_000, help="measurements of each file that is merged")
    parser.add_argument("--processes", type=int, default=8)
    parser.add_argument("--transactions", type=int, default=2000, help="of each process")
    options = parser.parse_args()
    load = os.getloadavg()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        found: dict[str, object] = {"writers": concurrent_writes(folder, options.processes, options.transactions)}
        found["merge"] = merges(folder, options.merge_rows)
        large = folder / "large.db"
        fill(large, options.rows, 3)
        found["lookup"] = {"measurements": options.rows, "bytes": large.stat().st_size, **lookups(large, options.rows // (TRIALS + FINALS))}
        found["settle"] = settle(large)
    machine = {"processor": TARGET.description, "cores": os.cpu_count(), "python": platform.python_version()}
    print(json.dumps({"machine": machine, "load_before": load, "load_after": os.getloadavg(), **found}, indent=2))


if __name__ == "__main__":
    main()
