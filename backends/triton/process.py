"""Processes that compile with Triton (`worker.py`): started when needed, kept between jobs, ended when they hang or die.

A job that kills its process costs that process alone: the caller gets a `BuildError` with the compiler's words, the next job a new one.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...ir.errors import BuildError

VERSION = "3.7.1"  # of Triton, which the tests run with
SECONDS = 180.0  # of a job before its process is ended; a kernel takes about one
JOBS = 256  # a process serves before it is replaced: LLVM keeps memory
LONGEST = 2000  # characters of the compiler's words in an error
DROPPED = ("TRITON_INTERPRET", "TRITON_OVERRIDE_ARCH")  # variables that would make something else of a job


@dataclass(frozen=True, slots=True)
class Compiled:
    """What a worker answers: the stages of the kernel by name, Triton's metadata, the log of the assembler, and its version."""

    files: Mapping[str, bytes]
    metadata: Mapping[str, Any]
    log: str
    triton: str


class Worker:
    """A process, with a folder of its own that goes with it."""

    def __init__(self) -> None:
        self.scratch = Path(tempfile.mkdtemp(prefix="einfall-triton-"))
        environment = {key: value for key, value in os.environ.items() if key not in DROPPED}
        environment.update(
            TMPDIR=str(self.scratch), TRITON_CACHE_DIR=str(self.scratch / "cache"), TRITON_ALWAYS_COMPILE="1", TRITON_DUMP_PTXAS_LOG="1"
        )
        self.words = open(self.scratch / "words", "wb+")  # noqa: SIM115  closed with the process
        self.served = 0
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("worker.py")), str(self.scratch)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.words, env=environment, start_new_session=True,
        )  # fmt: skip

    @property
    def alive(self) -> bool:
        """Whether it runs."""
        return self.process.poll() is None

    def compile(self, job: Mapping[str, Any], seconds: float) -> Compiled:
        """The result of a job. Raises `BuildError`; after one that says that the process ended or hangs it must be closed."""
        self.served += 1
        start = self.words.seek(0, os.SEEK_END)
        folder = Path(tempfile.mkdtemp(prefix="job-", dir=self.scratch))
        reply = self._ask({**job, "folder": str(folder), "seconds": seconds}, seconds, start)
        try:
            if not reply["ok"]:
                said = _first([str(reply["error"]), self._words(start)])
                raise BuildError(f"Triton refused the kernel {job['entry']} for {_target(job)}: {reply['kind']}: {said}", hint=_REPORT)
            files = {str(stage): (folder / str(name)).read_bytes() for stage, name in reply["files"].items()}
            return Compiled(files, reply["metadata"], str(reply["log"]), str(reply["triton"]))
        finally:
            shutil.rmtree(folder, ignore_errors=True)
            shutil.rmtree(self.scratch / "cache", ignore_errors=True)

    def _ask(self, job: Mapping[str, Any], seconds: float, start: int) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        end, pipe, text = time.monotonic() + seconds, self.process.stdout.fileno(), b""
        with contextlib.suppress(BrokenPipeError):  # it has ended; reading says so
            self.process.stdin.write(json.dumps(job).encode() + b"\n")
            self.process.stdin.flush()
        while not text.endswith(b"\n"):
            ready, _, _ = select.select([pipe], [], [], max(0.0, end - time.monotonic()))
            if not ready:
                self.close()
                what = f"Triton had not compiled {job['entry']} for {_target(job)} after {seconds:g} s and was stopped"
                raise BuildError(what, hint="smaller tiles, or fewer unrolled steps")
            piece = os.read(pipe, 1 << 16)
            if not piece:
                code, said = self.process.wait(), self._words(start)
                self.close()
                raise BuildError(f"Triton ended ({_ending(code)}) at {job['entry']} for {_target(job)}: {said}", hint=_REPORT)
            text += piece
        answer: dict[str, Any] = json.loads(text)
        return answer

    def _words(self, start: int) -> str:
        """What was written to stderr since the byte `start`: the errors in it, or its end."""
        if self.words.closed:
            return ""
        with open(self.scratch / "words", "rb") as file:
            file.seek(start)
            lines = [line.rstrip() for line in file.read().decode(errors="replace").splitlines() if line.strip()]
        errors = [line for line in lines if any(mark in line for mark in ("error:", "ERROR:", "Assertion", "fatal", "Fatal"))]
        return "\n".join(errors[:10] or lines[-10:])[:LONGEST]

    def close(self) -> None:
        """End it, and what it has started, and remove its folder."""
        if self.alive:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self.process.pid, signal.SIGKILL)  # with the assembler it may be waiting for
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout, self.words):
            if stream is not None:
                with contextlib.suppress(OSError):
                    stream.close()
        shutil.rmtree(self.scratch, ignore_errors=True)


class Workers:
    """The processes of this one. Several threads may compile at once, each with its own."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._idle: list[Worker] = []
        self._owner = 0

    def compile(self, job: Mapping[str, Any], seconds: float = SECONDS) -> Compiled:
        """The result of a job. Raises `BuildError` with the compiler's words."""
        worker = self._take()
        try:
            return worker.compile(job, seconds)
        except BuildError:
            raise
        except BaseException:  # interrupted: its answer would be taken for that of the next job
            worker.close()
            raise
        finally:
            self._give(worker)

    def _take(self) -> Worker:
        with self._lock:
            if self._owner != os.getpid():  # the first, or those of the process that this one is a fork of
                self._owner, self._idle = os.getpid(), []
                atexit.register(self.close)
            while self._idle:
                worker = self._idle.pop()
                if worker.alive:
                    return worker
                worker.close()
        check_installed()
        return Worker()

    def _give(self, worker: Worker) -> None:
        with self._lock:
            if worker.alive and worker.served < JOBS and len(self._idle) < (os.cpu_count() or 1):
                self._idle.append(worker)
                return
        worker.close()

    def close(self) -> None:
        """End those that have nothing to do."""
        with self._lock:
            idle, self._idle = (self._idle, []) if self._owner == os.getpid() else ([], self._idle)
        for worker in idle:
            worker.close()


WORKERS = Workers()
_REPORT = "another schedule; if every schedule is refused, please report it with the source"


def check_installed() -> None:
    """Raise `BuildError` where there is no Triton. It is not loaded."""
    if importlib.util.find_spec("triton") is None:
        raise BuildError("Triton, which compiles for GPUs, is not installed", hint=f"pip install triton=={VERSION} (Linux)")


def _target(job: Mapping[str, Any]) -> str:
    kind, arch, _ = job["target"]
    return f"{kind}:sm_{arch}" if kind == "cuda" else f"{kind}:{arch}"


def _ending(code: int) -> str:
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"killed by {signal.Signals(-code).name}"
    return f"exit status {code}"


def _first(texts: list[str]) -> str:
    return next((text.strip()[:LONGEST] for text in texts if text.strip()), "it gave no reason")
