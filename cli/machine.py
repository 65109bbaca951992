"""`einfall targets` and `einfall doctor`: what this machine can do, and what stands in its way."""

from __future__ import annotations

import os
import platform
import shutil
import sys
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Literal

import click

from ..configuration import current
from .options import json_option, print_json, table

_PACKAGES = ("torch", "apache-tvm", "apache-tvm-ffi", "numpy", "sympy", "lark", "sqlite-utils", "click", "rich")
_PINNED = {"torch": "2.13.0", "apache-tvm": "0.27.0.post1", "apache-tvm-ffi": "0.1.14.post1", "triton": "3.7.1"}


@click.command("targets")
@json_option
def targets_command(as_json: bool) -> None:
    """List the targets, and what this machine can build for and run."""
    from ..backends.registry import backend_for
    from ..ir.errors import UnsupportedError
    from ..schedules.target import load_target, target_names

    found: list[dict[str, Any]] = []
    for name in target_names():
        target = load_target(name)
        try:
            backend_for(target)
            builds = True
        except UnsupportedError:
            builds = False
        found.append({"name": name, "kind": target.kind, "builds": builds, "runs": name == "cpu", "description": target.description})
    if as_json:
        print_json(found)
        return
    yes = {True: "yes", False: "-"}
    rows = [[t["name"], yes[t["builds"]], yes[t["runs"]], "yes", t["description"]] for t in found]
    table("", ["target", "builds", "runs", "explains", "description"], rows)


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: `ok`, `warn` (works, but not well) or `bad` (does not work), and what to do."""

    what: str
    found: str
    state: Literal["ok", "warn", "bad"] = "ok"
    fix: str = ""


@click.command("doctor")
@json_option
@click.pass_context
def doctor_command(ctx: click.Context, as_json: bool) -> int:
    """Check versions, threads, devices, the cache and the database, and say what to fix."""
    findings = [*_versions(), *_tools(), *_threads(ctx.obj or ()), *_devices(), *_places()]
    if as_json:
        print_json([asdict(f) for f in findings])
    else:
        rows = [[f.what, {"ok": "ok", "warn": "!", "bad": "FAILED"}[f.state], f.found, f.fix] for f in findings]
        table("", ["", "", "found", "to do"], rows)
    return 1 if any(f.state == "bad" for f in findings) else 0


def _versions() -> list[Finding]:
    python = platform.python_version()
    right = (3, 10) <= sys.version_info[:2] <= (3, 13)
    findings = [Finding("Python", python, "ok" if right else "bad", "" if right else "use Python 3.10 to 3.13")]
    for name in (*_PACKAGES, *(("triton",) if sys.platform == "linux" else ())):
        try:
            found = version(name)
        except PackageNotFoundError:
            findings.append(Finding(name, "not installed", "bad", f"pip install {name}"))
            continue
        pin = _PINNED.get(name)
        wrong = pin is not None and found.split("+")[0] != pin
        findings.append(Finding(name, found, "warn" if wrong else "ok", f"tested with {pin}" if wrong else ""))
    return findings


def _tools() -> list[Finding]:
    compiler = next((tool for tool in ("cc", "gcc", "clang") if shutil.which(tool)), None)
    if compiler is None:
        return [Finding("C compiler", "none", "bad", "install gcc or clang: binaries are linked with it")]
    return [Finding("C compiler", str(shutil.which(compiler)))]


def _threads(unset: tuple[str, ...]) -> list[Finding]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    findings = [Finding("cores", str(cores)), Finding("threads", str(current().threads or "one a core"))]
    for name, good, why in (
        ("OMP_WAIT_POLICY", "passive", "a thread that spins after a torch call takes the core from the kernel that follows"),
        ("TVM_THREAD_POOL_SPIN_COUNT", "1000", "a kernel's threads that spin slow the torch call that follows"),
    ):
        value = "not set" if name in unset else os.environ.get(name, "not set")
        right = value == good
        findings.append(Finding(name, value, "ok" if right else "warn", "" if right else f"export {name}={good}: {why}"))
    return findings


def _devices() -> list[Finding]:
    from ..schedules.target import load_target

    target = load_target("cpu")
    features = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16", "asimd", "sve") if target.has(f)]
    return [Finding("processor", target.description), Finding("instructions", ", ".join(features) or "generic")]


def _places() -> list[Finding]:
    from ..compiler.cache import DiskCache

    settings = current()
    findings = []
    if settings.cache is None:
        findings.append(Finding("cache", "switched off", "warn", "set EINFALL_CACHE to keep built kernels"))
    else:
        entries, size = DiskCache(settings.cache).usage()
        writable = _writable(settings.cache)
        found = f"{settings.cache}: {entries} entries, {size / 1e6:.1f} MB"
        findings.append(Finding("cache", found, "ok" if writable else "warn", "" if writable else "cannot be written: set EINFALL_CACHE"))
    findings.append(_database(settings.database))
    return findings


def _database(path: Path | None) -> Finding:
    from ..ir.errors import DatabaseError
    from ..tuner.database import Database

    if path is None:
        return Finding("database", "switched off", "warn", "set EINFALL_DB to use and keep tuned schedules")
    if not path.exists():
        return Finding("database", f"{path}: none yet", "ok", "einfall tune makes it")
    try:
        with Database.open(path, read_only=True) as database:
            return Finding("database", f"{path}: {len(database.ls())} winners")
    except DatabaseError as error:
        return Finding("database", error.what, "bad", error.hint or "")


def _writable(path: Path) -> bool:
    place = path
    while not place.exists() and place != place.parent:
        place = place.parent
    return os.access(place, os.W_OK)
