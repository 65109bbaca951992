"""The replay of recorded spaces: what is counted, that a result file is continued, and what is said where no tables are."""

from __future__ import annotations

import csv
import gzip
import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def write_table(folder, name, slope, compress):
    """40 points of two parameters; every tenth does not run."""
    rows = [("a", "b", "time_ms", "samples_ms")]
    for i in range(40):
        a, b = i % 8, i // 8
        rows.append((a, b, "fail" if i % 10 == 9 else 1 + slope * abs(a - 3) + b, "1 2"))
    path = folder / (f"{name}.csv.gz" if compress else f"{name}.csv")
    with gzip.open(path, "wt", newline="") if compress else path.open("w", newline="") as file:
        csv.writer(file).writerows(rows)


def replay(*arguments):
    command = [sys.executable, str(ROOT / "benchmarks" / "search.py"), *map(str, arguments)]
    environment = {"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, timeout=120)


def test_without_tables_it_says_so(tmp_path):
    for arguments in ((), ("--spaces", tmp_path)):
        done = replay(*arguments)
        assert done.returncode == 2
        assert "recorded spaces are not part of the repository" in done.stderr
    done = replay("--spaces", tmp_path, "--strategies", "luck")
    assert done.returncode == 2
    assert "no strategy 'luck'" in done.stderr


def test_runs_are_counted_and_a_result_file_is_continued(tmp_path):
    write_table(tmp_path, "made_one", 1.0, True)
    write_table(tmp_path, "made_two", 2.0, False)
    output = tmp_path / "found.json"
    common = ("--spaces", tmp_path, "-o", output, "--budget", 38, "--strategies", "random,warm ranking")
    done = replay(*common, "--seeds", 1)
    assert done.returncode == 0, done.stderr
    first = json.loads(output.read_text())
    done = replay(*common, "--seeds", 3, "--picture", tmp_path / "found.png")
    assert done.returncode == 0, done.stderr
    data = json.loads(output.read_text())
    assert (tmp_path / "found.png").stat().st_size > 1000
    for strategy in ("random", "warm ranking"):
        for name in ("made_one", "made_two"):
            runs = data["runs"][strategy][name]
            assert [r["seed"] for r in runs] == [0, 1, 2]
            assert runs[:1] == first["runs"][strategy][name]
            for run in runs:
                assert run["trials"] == 38
                inside = [n for n, share in run["steps"] if share <= 1.05]
                assert run["reached"] == (inside[0] if inside else None)
                assert run["regret"] == pytest.approx(run["steps"][-1][1] - 1)
        whole = data["summary"][strategy]["all made"]
        assert whole["runs"] == 6
        reached = sorted(r["reached"] or math.inf for runs in data["runs"][strategy].values() for r in runs)
        assert (whole["median_trials"] or math.inf) == (reached[2] + reached[3]) / 2
        assert whole["solved"] == pytest.approx(sum(x < math.inf for x in reached) / 6, abs=1e-4)
    assert replay(*common[:-2], "--strategies", "random", "--batch", 3).returncode == 1
