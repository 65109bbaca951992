"""The benchmarks are a package beside the tests, not part of einfall: found through the root of the repository."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session", autouse=True)
def root_on_path():
    sys.path.append(str(ROOT))
    yield
    sys.path.remove(str(ROOT))
