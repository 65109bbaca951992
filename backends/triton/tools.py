"""The tools that come with Triton: where they are, and what they print of a binary."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import tempfile
from functools import cache
from pathlib import Path


@cache
def tool(name: str) -> str | None:
    """The program of that name beside Triton, or the one that Triton is told to use; None where there is none. Triton is not loaded."""
    told = os.environ.get(f"TRITON_{name.upper()}_PATH")
    if told:
        return told
    spec = importlib.util.find_spec("triton")
    for place in (spec.submodule_search_locations if spec is not None else None) or ():
        path = Path(place) / "backends" / "nvidia" / "bin" / name
        if path.is_file():
            return str(path)
    return None


def run_tool(name: str, option: str, binary: bytes) -> str | None:
    """What the tool prints of a binary; None where there is no such tool or it fails."""
    program = tool(name)
    if program is None:
        return None
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        try:
            done = subprocess.run([program, option, file.name], capture_output=True, text=True, timeout=60, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return None
    return done.stdout if done.returncode == 0 else None
