"""Fixtures of the tuner's tests."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "tuned.db"


@pytest.fixture
def unprivileged() -> Callable[[Callable[[], None]], int]:
    """Runs a function in a child that may not ignore file permissions; gives its exit status, 0 if it returned."""
    def run(function: Callable[[], None]) -> int:
        child = os.fork()
        if child == 0:
            status = 1
            try:
                if os.getuid() == 0:
                    os.setuid(65534)
                function()
                status = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(status)
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])

    return run
