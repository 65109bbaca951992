"""A worker for a GPU that is not there: kernels are eager PyTorch, and take as long as the schedule's warps say. Run as a program."""

from __future__ import annotations

import time

import torch
from einfall.compiler.driver import Order, lower_cascade
from einfall.ir.errors import ScheduleError
from einfall.ir.reference import evaluate
from einfall.schedules.schedule import Schedule
from einfall.schedules.target import Target
from einfall.tuner import worker
from einfall.tuner.worker import Job, main, parse_job_cascade

SLOW_MS = {2: 1.0, 4: 2.0, 8: 4.0, 16: 8.0}
UNSAID_MS = 6.0  # where the schedule says nothing of the kernel


def slow_ms(schedule: Schedule) -> float:
    """How long the kernels of a schedule take."""
    return min((SLOW_MS[options.warps] for _, options in schedule.kernel), default=UNSAID_MS)


class Eager:
    """What the schedule's kernels would compute; their sources are emitted and thrown away."""

    def __init__(self, job: Job) -> None:
        self.job, self.cascade = job, parse_job_cascade(job)
        lowered = lower_cascade(Order(self.cascade, dict(job.sizes), Target.from_json(job.target), frozenset()), job.schedule)
        self.code = "".join(source.text for source in lowered.sources)[:64]
        self.facts: dict[str, float] = {}
        self.static: dict[str, int] = {}

    def run(self, inputs, outputs) -> None:
        tensors = dict(zip([t.name for t in self.cascade.inputs], inputs, strict=True))
        found = evaluate(self.cascade, tensors, dict(self.job.scalars))
        for output, declared in zip(outputs, self.cascade.outputs, strict=True):
            output.copy_(found[declared.name])
        time.sleep(slow_ms(self.job.schedule) * 1e-3)


def build(job: Job) -> Eager:
    if any(o.stages == 4 for _, o in job.schedule.kernel):
        raise ScheduleError("a kernel takes 300000 bytes of shared memory, and a block has 232448", hint="fewer stages")
    return Eager(job)


if __name__ == "__main__":
    worker.place_of = lambda target: torch.device("cpu")
    main(build)
