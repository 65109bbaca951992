"""The timing protocol, on a clock that is made up: no test here depends on how fast the machine is."""

from __future__ import annotations

import torch
from einfall.tuner.measure import MIN_SAMPLES, MIN_STOP, SAMPLE_MS, Protocol, Subject, argument_sets, interleave, measure


class Clock:
    """Time that passes only when a kernel says so."""

    def __init__(self) -> None:
        self.now = 0.0
        self.calls: list[object] = []

    def __call__(self) -> float:
        return self.now

    def kernel(self, *milliseconds: float, name: str = "k"):
        """A kernel whose calls take these times in turn, the last for ever."""
        left = list(milliseconds)

        def run(inputs, outputs):
            self.now += (left.pop(0) if len(left) > 1 else left[0]) / 1e3
            self.calls.append((name, inputs))

        return run


def subject(clock: Clock, *milliseconds: float, sets=(("in", "out"),), name: str = "k") -> Subject:
    return Subject(clock.kernel(*milliseconds, name=name), sets, clock)  # type: ignore[arg-type]


def test_the_first_calls_are_discarded():
    clock = Clock()
    samples = measure(subject(clock, 500.0, 80.0, 2.0), Protocol(warm_up_ms=10), clock=clock)
    assert all(abs(s - 2.0) < 1e-9 for s in samples)


def test_a_sample_of_a_short_kernel_is_many_calls():
    clock = Clock()
    protocol = Protocol(warm_up_ms=0.1, max_samples=5, budget_ms=1e9)
    samples = measure(subject(clock, 0.01), protocol, clock=clock)
    assert len(samples) == 5
    assert all(abs(s - 0.01) < 1e-9 for s in samples)
    assert len(clock.calls) >= 5 * SAMPLE_MS / 0.01


def test_the_budget_ends_it_after_enough_samples():
    clock = Clock()
    assert len(measure(subject(clock, 100.0), Protocol(budget_ms=1), clock=clock)) == MIN_SAMPLES
    assert len(measure(subject(clock, 1.0), Protocol(budget_ms=1e9, max_samples=17), clock=clock)) == 17


def test_a_clearly_slower_candidate_is_given_up_after_three_samples():
    clock = Clock()
    assert len(measure(subject(clock, 10.0), Protocol(), incumbent_ms=5.0, clock=clock)) == MIN_STOP
    assert len(measure(subject(clock, 5.5), Protocol(), incumbent_ms=5.0, clock=clock)) > MIN_STOP
    # one fast sample among the three keeps it in
    assert len(measure(subject(clock, 10.0, 10.0, 10.0, 4.0, 10.0), Protocol(warm_up_ms=0), incumbent_ms=5.0, clock=clock)) > MIN_STOP


def test_what_looks_too_fast_is_measured_again_and_all_samples_count():
    clock = Clock()
    protocol = Protocol(warm_up_ms=0, budget_ms=1e9, max_samples=6)
    kernel = subject(clock, *[1.0] * 8, 5.0)  # fast at first, for no good reason
    samples = measure(kernel, protocol, incumbent_ms=5.0, clock=clock)
    assert len(samples) == 12
    assert [round(s) for s in samples[-6:]] == [5] * 6
    assert len(measure(subject(clock, 4.9), protocol, incumbent_ms=5.0, clock=clock)) == 6


def test_finalists_take_turns():
    clock = Clock()
    kernels = [subject(clock, 2.0, name="a"), subject(clock, 3.0, name="b"), subject(clock, 4.0, name="c")]
    samples = interleave(kernels, Protocol(warm_up_ms=0, final_rounds=7, final_budget_ms=1e9), clock)
    assert [len(s) for s in samples] == [7, 7, 7]
    assert [round(s[0], 6) for s in samples] == [2.0, 3.0, 4.0]
    assert [name for name, _ in clock.calls[-6:]] == ["a", "b", "c"] * 2


def test_arguments_take_turns():
    clock = Clock()
    kernel = subject(clock, 5.0, sets=[(i, None) for i in range(3)])
    kernel.warm_up(0)
    for _ in range(4):
        kernel.sample()
    assert [arguments for _, arguments in clock.calls] == [0, 1, 2, 0, 1, 2]


def test_cold_arguments_outgrow_the_cache_and_hold_the_same_values():
    x = torch.arange(1000.0)
    cold = argument_sets([x], [((10,), torch.float32)], "cold", cache_bytes=64_000)
    each = 4000 + 40
    assert sum(each for _ in cold) >= 2 * 64_000
    assert len({inputs[0].data_ptr() for inputs, _ in cold}) == len(cold)
    assert all(torch.equal(inputs[0], x) for inputs, _ in cold)
    assert len(argument_sets([x], [((10,), torch.float32)], "warm", cache_bytes=64_000)) == 1
