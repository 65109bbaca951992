"""The child process that builds, checks and times candidates, so that none of them can take the tuner down with it.

It reads one JSON object a line and answers with one, and with `stage` lines in between that say what the time is spent on:

    {"op": "prepare", "job": {...}}                  build and verify: {"status": "ok", "evidence": {...}, "code": ..., "facts": {...}}
    {"op": "measure", "job": {...}, "incumbent_ms"}  {"status": "ok", "samples_ms": [...]}
    {"op": "finals", "jobs": [...]}                  {"status": "ok", "samples_ms": [[...], ...]}, interleaved

A job is data: text, numbers and a schedule. Code never crosses the pipe, in either direction.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from io import TextIOWrapper
from pathlib import Path
from typing import Any, Literal

import torch

from ..compiler.binding import shape_of
from ..ir.binding import to_torch
from ..ir.cascade import Cascade
from ..ir.errors import EinfallError
from ..ir.infer import declared_types
from ..schedules.schedule import Schedule
from ..schedules.target import Target
from .inputs import make_inputs
from .measure import Protocol, Subject, argument_sets, interleave, measure
from .placement import clock_of, moved, place_of
from .verify import Candidate, Oracle, Rejected, verify


@dataclass(frozen=True, slots=True)
class Job:
    """A candidate to build: everything by value, as plain data.

    Args:
        cascade: its text.
        target: the target as JSON.
        cache: the folder of built kernels, or None.
    """

    cascade: str
    sizes: tuple[tuple[str, int], ...]
    scalars: tuple[tuple[str, float], ...]
    schedule: Schedule
    target: str
    seed: int = 0
    policy: Literal["cold", "warm"] = "cold"
    cache: str | None = None
    protocol: Protocol = field(default_factory=Protocol)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "cascade": self.cascade, "sizes": dict(self.sizes), "scalars": dict(self.scalars), "schedule": self.schedule.to_dict(),
            "target": self.target, "seed": self.seed, "policy": self.policy, "cache": self.cache, "protocol": asdict(self.protocol),
        }  # fmt: skip

    @staticmethod
    def from_dict(data: Mapping[str, Any]) -> Job:
        """The inverse of `to_dict`."""
        return Job(
            cascade=data["cascade"],
            sizes=tuple(data["sizes"].items()),
            scalars=tuple(data["scalars"].items()),
            schedule=Schedule.from_dict(data["schedule"]),
            target=data["target"],
            seed=data["seed"],
            policy=data["policy"],
            cache=data["cache"],
            protocol=Protocol(**data["protocol"]),
        )


class Built(Candidate):
    """A candidate that can also say what it was built from."""

    code: str
    facts: Mapping[str, float]


Builder = Callable[[Job], Built]


class _Compiled(Built):
    """An executable as a candidate."""

    def __init__(self, executable: Any, scalars: Mapping[str, float]) -> None:
        self._executable = executable
        self._scalars = [scalars[s.name] if s.dtype.is_float else int(scalars[s.name]) for s in executable.cascade.scalars]
        self.code = hashlib.sha256(executable.source.encode()).hexdigest()[:32]
        self.facts = {str(k): float(v) for k, v in _flat(executable.facts) if isinstance(v, (int, float)) and not isinstance(v, bool)}

    @property
    def static(self) -> Mapping[str, int]:
        return dict(self._executable.static)

    def run(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        """Run where the kernels do; tensors that lie on the CPU are moved there and back, with the memory around them."""
        place = place_of(self._executable.target)
        if outputs[0].device.type == place.type:
            self._launch(inputs, outputs)
            return
        with moved((*inputs, *outputs), place) as tensors:
            self._launch(tensors[: len(inputs)], tensors[len(inputs) :])

    def _launch(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        bound = self._executable.bind(inputs)
        self._executable.launch(bound, inputs, self._scalars, tuple(outputs))


def build_candidate(job: Job) -> Built:
    """The candidate of a job, through the compiler."""
    from ..compiler.cache import DiskCache
    from ..compiler.driver import compile_cascade

    executable = compile_cascade(
        parse_job_cascade(job),
        sizes=dict(job.sizes),
        target=Target.from_json(job.target),
        schedule=job.schedule,
        cache=DiskCache(None if job.cache is None else Path(job.cache)),
    )
    return _Compiled(executable, dict(job.scalars))


def parse_job_cascade(job: Job) -> Cascade:
    """The cascade of a job."""
    from ..ir.text import parse_cascade

    return parse_cascade(job.cascade)


def serve(build: Builder, requests: int, replies: int) -> None:
    """Answers requests from the pipe `requests` on the pipe `replies` until it ends."""
    with os.fdopen(requests, "r", encoding="utf-8") as reader, os.fdopen(replies, "w", encoding="utf-8") as writer:
        session = _Session(build, lambda stage: _say(writer, {"stage": stage}))
        _say(writer, {"ready": os.getpid()})
        for line in reader:
            _say(writer, session.answer(json.loads(line)))


def _say(writer: TextIOWrapper, message: Mapping[str, Any]) -> None:
    writer.write(json.dumps(message) + "\n")
    writer.flush()


class _Session:
    """What a worker keeps between requests: the references of a cascade, and the candidate that was prepared last."""

    def __init__(self, build: Builder, announce: Callable[[str], None]) -> None:
        self._build = build
        self._announce = announce
        self._oracle: tuple[object, Oracle] | None = None
        self._prepared: dict[Job, Built] = {}

    def answer(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request; whatever goes wrong is a status with its reason."""
        try:
            match message["op"]:
                case "prepare":
                    return self._prepare(Job.from_dict(message["job"]))
                case "measure":
                    return self._measure(Job.from_dict(message["job"]), message.get("incumbent_ms"))
                case "finals":
                    return self._finals([Job.from_dict(job) for job in message["jobs"]])
                case other:
                    return {"status": "error", "reason": f"unknown request {other!r}"}
        except Rejected as rejected:
            return {"status": rejected.status, "reason": rejected.reason}
        except EinfallError as error:
            return {"status": "build", "reason": str(error)}
        except MemoryError:
            return {"status": "memory", "reason": "out of memory"}
        except Exception as error:  # a candidate may raise anything; all of it is this candidate's failure
            status = "memory" if "memory" in str(error).lower() and isinstance(error, RuntimeError) else "error"
            return {"status": status, "reason": f"{type(error).__name__}: {error}"[:2000]}

    def _prepare(self, job: Job) -> dict[str, Any]:
        self._prepared.clear()
        self._announce("build")
        built = self._build(job)
        oracle = self._oracle_of(job)
        self._announce("reference")
        oracle.cases(built.static)
        self._announce("verify")
        evidence = verify(built, oracle)
        self._prepared[job] = built
        return {"status": "ok", "evidence": evidence.to_dict(), "code": built.code, "facts": dict(built.facts)}

    def _measure(self, job: Job, incumbent_ms: float | None) -> dict[str, Any]:
        self._announce("measure")
        samples = measure(self._subject(job), job.protocol, incumbent_ms)
        return {"status": "ok", "samples_ms": samples}

    def _finals(self, jobs: Sequence[Job]) -> dict[str, Any]:
        subjects = []
        for job in jobs:
            self._announce("build")
            subjects.append(self._subject(job))
        self._announce("finals")
        return {"status": "ok", "samples_ms": interleave(subjects, jobs[0].protocol)}

    def _subject(self, job: Job) -> Subject:
        built = self._prepared.get(job) or self._build(job)
        cascade = parse_job_cascade(job)
        sizes, types = dict(job.sizes), declared_types(cascade)
        target = Target.from_json(job.target)
        place = place_of(target)
        tensors = {name: t.to(place) for name, t in make_inputs(cascade, sizes, "normal", job.seed).items()}
        outputs = [(shape_of(o.axes, sizes), to_torch(types[o.name])) for o in cascade.outputs]
        cache_bytes = max((c.bytes for c in target.caches), default=32 << 20)
        sets = argument_sets([tensors[t.name] for t in cascade.inputs], outputs, job.policy, cache_bytes, place)
        return Subject(built.run, sets, clock_of(place))

    def _oracle_of(self, job: Job) -> Oracle:
        key = (job.cascade, job.sizes, job.scalars, job.seed)
        if self._oracle is None or self._oracle[0] != key:
            self._oracle = (key, Oracle(parse_job_cascade(job), dict(job.sizes), dict(job.scalars), job.seed))
        return self._oracle[1]


def _flat(facts: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    found: list[tuple[str, Any]] = []
    for name, value in facts.items():
        found.extend(_flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else [(prefix + str(name), value)])
    return found


def settle_in(threads: int) -> None:
    """Makes this process a good child: it dies with its parent, goes first when memory is short, and leaves no core file."""
    if sys.platform == "linux":
        ctypes.CDLL(None, use_errno=True).prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
        with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "w", encoding="ascii") as file:
            file.write("900")
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    if threads:
        torch.set_num_threads(threads)
    os.dup2(2, 1)  # whatever a kernel prints must not reach the protocol


def main(build: Builder = build_candidate) -> None:
    """The program of a worker: `worker REQUESTS REPLIES THREADS`: two inherited descriptors, and 0 threads for all there are."""
    requests, replies, threads = (int(value) for value in sys.argv[1:4])
    settle_in(threads)
    serve(build, requests, replies)


if __name__ == "__main__":
    main()
