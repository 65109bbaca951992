"""The parent's side of the workers: start, ask, wait with a deadline, kill and replace.

Candidates are built and verified by all workers at once, then timed one at a time. A worker that crashes, hangs or runs out of memory
costs the candidate it had; a fresh one takes its place.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, cast, get_args

from ..ir.errors import BuildError
from .database.records import Evidence, Invalid, Status
from .measure import ENVIRONMENT
from .worker import Job

START_SECONDS = 120.0
REFERENCE_SECONDS = 300.0  # the reference of a cascade is worked out once a worker; that is not the candidate's time
MAX_LINE = 1 << 24
COMMAND = (sys.executable, "-m", "einfall.tuner.worker")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a candidate: samples and evidence, or a status other than `ok` with its reason."""

    status: Status
    reason: str = ""
    samples_ms: tuple[float, ...] = ()
    evidence: Evidence | None = None
    code: str | None = None
    facts: tuple[tuple[str, float], ...] = ()


class Died(Exception):
    """A worker that will not answer: it crashed, hung (and was killed), or said something senseless."""

    def __init__(self, status: Status, reason: str) -> None:
        super().__init__(reason)
        self.status = status
        self.reason = reason


class Worker:
    """One child process, started when first asked and again after it died."""

    def __init__(self, command: Sequence[str], threads: int | None) -> None:
        self._command = tuple(command)
        self._threads = threads
        self._process: subprocess.Popen[bytes] | None = None
        self._stderr: Any = None
        self._to_child = self._from_child = -1
        self._buffer = b""

    def send(self, message: Mapping[str, Any]) -> None:
        """Sends a request, starting the child if there is none. Raises `BuildError` if it cannot be started."""
        if self._process is None:
            self._start()
        data = json.dumps(message).encode() + b"\n"
        with contextlib.suppress(BrokenPipeError):  # the child is gone; `receive` finds out how
            while data:
                data = data[os.write(self._to_child, data) :]

    def receive(self, timeout_s: float) -> dict[str, Any]:
        """The answer to the last request. Each stage may take `timeout_s`. Raises `Died`; the child is gone then."""
        stage, deadline = "build", time.monotonic() + timeout_s
        while True:
            message = self._message(deadline)
            if message is None:
                self.stop()
                raise Died("timeout", f"no answer in {timeout_s:g} s ({stage})")
            if "stage" not in message:
                return message
            stage = str(message["stage"])
            deadline = time.monotonic() + (max(timeout_s, REFERENCE_SECONDS) if stage == "reference" else timeout_s)

    def stop(self) -> None:
        """Kills the child, with whatever it has started."""
        process, self._process = self._process, None
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        os.close(self._to_child)
        os.close(self._from_child)
        self._stderr.close()

    def _start(self) -> None:
        child_reads, self._to_child = os.pipe()
        self._from_child, child_writes = os.pipe()
        self._buffer = b""
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - lives as long as the child
        threads = str(self._threads or 0)
        limits = {"OMP_NUM_THREADS": threads, "TVM_NUM_THREADS": threads} if self._threads else {}
        try:
            self._process = subprocess.Popen(
                [*self._command, str(child_reads), str(child_writes), threads],
                pass_fds=(child_reads, child_writes),
                stdin=subprocess.DEVNULL,
                stdout=self._stderr,
                stderr=self._stderr,
                start_new_session=True,  # Ctrl-C is the parent's to handle
                env={**os.environ, **ENVIRONMENT, **limits},
            )
        except OSError as error:
            raise BuildError(f"a tuning worker cannot be started: {error}", hint="`einfall doctor` checks the installation") from None
        finally:
            os.close(child_reads)
            os.close(child_writes)
        self._await_ready()

    def _await_ready(self) -> None:
        try:
            message = self._message(time.monotonic() + START_SECONDS)
        except Died as died:
            raise BuildError(f"a tuning worker does not start: {died.reason}", hint="`einfall doctor` checks the installation") from None
        if message is None or "ready" not in message:
            self.stop()
            raise BuildError("a tuning worker does not start", hint="`einfall doctor` checks the installation")

    def _message(self, deadline: float) -> dict[str, Any] | None:
        """The next line from the child, or None at the deadline. Raises `Died` if there is no child to say one."""
        while b"\n" not in self._buffer:
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._from_child], [], [], left)[0]:
                return None
            data = os.read(self._from_child, 1 << 16)
            if not data:
                raise self._death()
            self._buffer += data
            if len(self._buffer) > MAX_LINE:
                self.stop()
                raise Died("crash", "the worker answered without end")
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except (ValueError, RecursionError):
            message = None
        if not isinstance(message, dict):
            self.stop()
            raise Died("crash", "the worker's answer makes no sense; the candidate may have overwritten its memory")
        return message

    def _death(self) -> Died:
        """How the child ended."""
        assert self._process is not None
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            code = 0
        size = self._stderr.seek(0, os.SEEK_END)
        self._stderr.seek(max(0, size - 1000))
        said = self._stderr.read().decode("utf-8", "replace").strip().splitlines()
        self.stop()
        last = f": {said[-1][:300]}" if said else ""
        if code == -signal.SIGKILL:
            return Died("memory", "killed by the system, most likely for want of memory")
        if code < 0:
            return Died("crash", f"crashed with {signal.Signals(-code).name}{last}")
        return Died("crash", f"ended with exit status {code}{last}")


class WorkerPool:
    """Several workers. Use as a context manager: leaving it kills them all."""

    def __init__(self, *, workers: int, threads: int | None, timeout_s: float, command: Sequence[str] = COMMAND) -> None:
        self._workers = [Worker(command, threads) for _ in range(max(1, workers))]
        self._timeout_s = timeout_s

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Kills the workers."""
        for worker in self._workers:
            worker.stop()

    def evaluate(self, jobs: Sequence[Job], incumbent_ms: Callable[[], float | None]) -> Iterator[Outcome]:
        """The outcome of each job, in order, as soon as it is known."""
        count = len(self._workers)
        for start in range(0, len(jobs), count):
            group = list(zip(self._workers, jobs[start : start + count], strict=False))
            for worker, job in group:
                worker.send({"op": "prepare", "job": job.to_dict()})
            prepared = [self._prepared(worker) for worker, _ in group]
            for (worker, job), outcome in zip(group, prepared, strict=True):
                yield outcome if outcome.status != "ok" else self._measured(worker, job, outcome, incumbent_ms())

    def finals(self, jobs: Sequence[Job]) -> list[tuple[float, ...]] | Outcome:
        """Interleaved samples of each job, or what went wrong."""
        worker = self._workers[0]
        try:
            worker.send({"op": "finals", "jobs": [job.to_dict() for job in jobs]})
            reply = worker.receive(self._timeout_s * (1 + len(jobs)))
            if reply.get("status") != "ok":
                return _failed(reply)
            samples = reply.get("samples_ms")
            if not isinstance(samples, list) or len(samples) != len(jobs):
                raise Invalid("the number of sample lists")
            return [_samples(found) for found in samples]
        except Died as died:
            return Outcome(died.status, died.reason)
        except Invalid as error:
            return Outcome("crash", f"the worker's answer makes no sense: {error}")

    def _prepared(self, worker: Worker) -> Outcome:
        try:
            reply = worker.receive(self._timeout_s)
            if reply.get("status") != "ok":
                return _failed(reply)
            facts = reply.get("facts")
            return Outcome(
                "ok",
                evidence=Evidence.from_dict(reply.get("evidence") or {}),
                code=str(reply.get("code")),
                facts=tuple((str(k), float(v)) for k, v in facts.items()) if isinstance(facts, dict) else (),
            )
        except Died as died:
            return Outcome(died.status, died.reason)
        except (Invalid, TypeError, ValueError) as error:
            return Outcome("crash", f"the worker's answer makes no sense: {error}")

    def _measured(self, worker: Worker, job: Job, prepared: Outcome, incumbent_ms: float | None) -> Outcome:
        try:
            worker.send({"op": "measure", "job": job.to_dict(), "incumbent_ms": incumbent_ms})
            reply = worker.receive(self._timeout_s)
            if reply.get("status") != "ok":
                return _failed(reply)
            samples = _samples(reply.get("samples_ms"))
            return Outcome("ok", samples_ms=samples, evidence=prepared.evidence, code=prepared.code, facts=prepared.facts)
        except Died as died:
            return Outcome(died.status, died.reason)
        except Invalid as error:
            return Outcome("crash", f"the worker's answer makes no sense: {error}")


def _failed(reply: Mapping[str, Any]) -> Outcome:
    status = reply.get("status")
    if status not in get_args(Status) or status == "ok":
        return Outcome("crash", "the worker's answer makes no sense")
    return Outcome(cast(Status, status), str(reply.get("reason", ""))[:4000])


def _samples(values: object) -> tuple[float, ...]:
    """Samples from a worker. Raises `Invalid` for anything but positive finite numbers."""
    if not isinstance(values, list) or not values:
        raise Invalid("samples")
    for value in values:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 1e300:
            raise Invalid(f"a sample of {value!r}")
    return tuple(float(v) for v in values)
