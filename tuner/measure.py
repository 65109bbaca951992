"""Timing that can be trusted: warmed up, long enough for the timer, raw samples kept, inputs out of the cache where asked for.

A sample is the mean of a few back-to-back calls, at least `SAMPLE_MS` long. The first calls are discarded. Finalists are interleaved
(A B C A B C), so that what the machine does meanwhile meets all of them. What looks too fast is measured again.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch

METHOD = 1  # raised when the protocol changes so much that times are no longer comparable
SAMPLE_MS = 1.0
MIN_SAMPLES = 5
CLEARLY_SLOWER = 1.6  # given up after MIN_STOP samples, all of which are this much slower than the best known
MIN_STOP = 3
SUSPICIOUS = 0.75  # faster than the best known by this factor: measured twice
MAX_COPIES, MAX_COPY_BYTES = 256, 1 << 30
ENVIRONMENT = {  # for a process that times kernels beside torch: spinning threads of one pool starve the other
    "OMP_WAIT_POLICY": "passive",
    "TVM_THREAD_POOL_SPIN_COUNT": "1000",
}

Clock = Callable[[], float]


@dataclass(frozen=True, slots=True)
class Protocol:
    """How long to measure, in milliseconds and samples."""

    warm_up_ms: float = 20.0
    budget_ms: float = 250.0
    max_samples: int = 30
    final_rounds: int = 20
    final_budget_ms: float = 1500.0


class Subject:
    """A kernel with the argument sets it is timed on, used in turn; one set if the cache may stay warm.

    `run` is called with the inputs and the outputs of a set.
    """

    def __init__(
        self,
        run: Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], object],
        sets: Sequence[tuple[Sequence[torch.Tensor], Sequence[torch.Tensor]]],
        clock: Clock = time.perf_counter,
    ) -> None:
        self._run = run
        self._sets = list(sets)
        self._clock = clock
        self._next = 0
        self._calls = 1

    def warm_up(self, milliseconds: float) -> None:
        """Calls the kernel at least twice and for `milliseconds`, and settles how many calls make a sample."""
        self._call(1)
        start = self._clock()
        calls = 0
        while calls == 0 or ((self._clock() - start) * 1e3 < milliseconds and calls < 100_000):
            self._call(1)
            calls += 1
        each_ms = max((self._clock() - start) * 1e3 / calls, 1e-6)
        self._calls = max(1, round(SAMPLE_MS / each_ms))

    def sample(self) -> float:
        """Milliseconds of one call, the mean of enough of them."""
        start = self._clock()
        self._call(self._calls)
        return max((self._clock() - start) * 1e3 / self._calls, 1e-9)

    def _call(self, count: int) -> None:
        for _ in range(count):
            inputs, outputs = self._sets[self._next]
            self._next = (self._next + 1) % len(self._sets)
            self._run(inputs, outputs)


def measure(subject: Subject, protocol: Protocol, incumbent_ms: float | None = None, clock: Clock = time.perf_counter) -> list[float]:
    """Raw samples of one candidate, in order. Stops early where it is clearly slower than `incumbent_ms`, and starts over where it
    seems much faster: those samples count as well."""
    subject.warm_up(protocol.warm_up_ms)
    samples = _collect(subject, protocol, incumbent_ms, clock)
    if incumbent_ms is not None and statistics.median(samples) < SUSPICIOUS * incumbent_ms:
        subject.warm_up(protocol.warm_up_ms)
        samples += _collect(subject, protocol, None, clock)
    return samples


def _collect(subject: Subject, protocol: Protocol, incumbent_ms: float | None, clock: Clock) -> list[float]:
    samples: list[float] = []
    start = clock()
    while len(samples) < protocol.max_samples:
        samples.append(subject.sample())
        if incumbent_ms is not None and len(samples) == MIN_STOP and min(samples) > CLEARLY_SLOWER * incumbent_ms:
            break
        if len(samples) >= MIN_SAMPLES and (clock() - start) * 1e3 > protocol.budget_ms:
            break
    return samples


def interleave(subjects: Sequence[Subject], protocol: Protocol, clock: Clock = time.perf_counter) -> list[list[float]]:
    """Samples of several candidates taken in turns, one list each, all of the same length."""
    for subject in subjects:
        subject.warm_up(protocol.warm_up_ms)
    samples: list[list[float]] = [[] for _ in subjects]
    start = clock()
    for done in range(1, protocol.final_rounds + 1):
        for subject, found in zip(subjects, samples, strict=True):
            found.append(subject.sample())
        if done >= MIN_SAMPLES and (clock() - start) * 1e3 > protocol.final_budget_ms * len(subjects):
            break
    return samples


def argument_sets(
    inputs: Sequence[torch.Tensor],
    outputs: Sequence[tuple[tuple[int, ...], torch.dtype]],
    cache: Literal["cold", "warm"],
    cache_bytes: int,
    place: torch.device | None = None,
) -> list[tuple[list[torch.Tensor], list[torch.Tensor]]]:
    """The arguments to call with in turn: copies that together are twice the last-level cache if it is to be cold, else one set.

    `inputs` lie on `place`, where the outputs are made; the CPU if it is None.
    """
    each = sum(t.numel() * t.element_size() for t in inputs)
    each += sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in outputs)
    copies = 1
    if cache == "cold":
        copies = min(-(-2 * cache_bytes // max(each, 1)) + 1, MAX_COPIES, max(1, MAX_COPY_BYTES // max(each, 1)))
    sets: list[tuple[list[torch.Tensor], list[torch.Tensor]]] = []
    for i in range(copies):
        given = [t if i == 0 else t.clone() for t in inputs]
        sets.append((given, [torch.empty(shape, dtype=dtype, device=place) for shape, dtype in outputs]))
    return sets
