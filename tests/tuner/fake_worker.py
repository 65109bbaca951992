"""A worker whose kernels are eager PyTorch, and which misbehaves as the tile of `m` in the schedule says. Run as a program."""

from __future__ import annotations

import os
import signal
import sys
import time

import torch
from einfall.ir.errors import ScheduleError
from einfall.ir.reference import evaluate
from einfall.tuner.worker import Job, main, parse_job_cascade

CRASH, HANG, NAN, WRONG, OUTSIDE, UNSTEADY, SEGFAULT, MEMORY, ILLEGAL, INPUT, NOISY, LATE, GARBAGE, UNWRITTEN = range(1001, 1015)


class Fake:
    """Takes `tile` * 60 microseconds a call, 200 tiles at most."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self.cascade = parse_job_cascade(job)
        self.tile = dict(job.schedule.tile)["m"]
        self.code = job.schedule.hash
        self.facts = {"spills": 0.0}
        self.static: dict[str, int] = {}
        self.calls = 0

    def run(self, inputs, outputs) -> None:
        self.calls += 1
        tensors = dict(zip([t.name for t in self.cascade.inputs], inputs, strict=True))
        found = evaluate(self.cascade, tensors, dict(self.job.scalars))
        for output, declared in zip(outputs, self.cascade.outputs, strict=True):
            output.copy_(found[declared.name])
        self.misbehave(inputs, outputs[0])
        time.sleep(min(self.tile, 200) * 60e-6)

    def misbehave(self, inputs, output) -> None:
        match self.tile:
            case 1001:
                os._exit(3)
            case 1002:
                time.sleep(600)
            case 1003:
                output.view(-1)[-1] = float("nan")
            case 1004:
                output.view(-1)[0] += output.abs().max() * 0.01 + 1e-20
            case 1005:
                torch.as_strided(output, (output.numel() + 1,), (1,)).fill_(1.0)
            case 1006:
                output.view(-1)[0] *= 1 + 1e-6 * (self.calls % 2)
            case 1007:
                print("about to crash", file=sys.stderr, flush=True)
                os.kill(os.getpid(), signal.SIGSEGV)
            case 1010:
                inputs[0].view(-1)[0] += 1
            case 1011:
                print("{}")
                os.write(1, b"noise\n")
            case 1012 if output.storage_offset() == 0:  # not between guard bands: it is being timed
                os._exit(4)
            case 1013:
                os.write(int(sys.argv[2]), b"\xff\x00 senseless\n")
                time.sleep(600)
            case 1014:
                output.fill_(float("nan"))


def build(job: Job) -> Fake:
    match dict(job.schedule.tile)["m"]:
        case 1008:
            raise MemoryError
        case 1009:
            raise ScheduleError("tile[m] is 1009", hint="a smaller one")
    return Fake(job)


if __name__ == "__main__":
    main(build)
