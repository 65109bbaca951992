"""The benchmark of the database runs, at a tiny size, and loses nothing."""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_benchmark_of_the_database_answers():
    sizes = ["--rows", "600", "--merge-rows", "400", "--processes", "2", "--transactions", "20"]
    done = subprocess.run([sys.executable, "benchmarks/database.py", *sizes], cwd=ROOT, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["writers"]["lost"] == 0 and found["writers"]["transactions"] == 40
    assert found["merge"]["measurements_each"] == 400 and found["settle"]["winners"] == 3
    assert 0 < found["lookup"]["memo_p50_us"] < found["lookup"]["exact_p50_us"]
