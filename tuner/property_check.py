"""A property check of one kernel: random extents and values, each compared with the reference in float64."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..compiler.binding import complete_sizes
from ..compiler.executable import Executable
from ..ir.cascade import Cascade
from ..ir.errors import BindingError, EinfallError
from .verify import Oracle, Rejected, verify

_EXTENTS = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 130)
_MAX_POINTS = 1 << 22  # of all input ranks together, so that a trial takes well under a second


@dataclass(frozen=True, slots=True)
class Trial:
    """One set of extents: the largest error found and the one allowed, relative to the result's magnitude, or what went wrong."""

    sizes: tuple[tuple[str, int], ...]
    largest_error: float | None
    tolerance: float | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found."""

    cascade: str
    target: str
    seed: int
    trials: tuple[Trial, ...]

    @property
    def passed(self) -> bool:
        """Whether every trial was right."""
        return all(not t.failure for t in self.trials)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "cascade": self.cascade, "target": self.target, "seed": self.seed, "passed": self.passed,
            "trials": [
                {"sizes": dict(t.sizes), "largest_error": t.largest_error, "tolerance": t.tolerance, "failure": t.failure}
                for t in self.trials
            ],
        }  # fmt: skip


@dataclass(frozen=True, slots=True)
class _Runner:
    """An executable as the correctness gate calls it."""

    executable: Executable
    scalars: Mapping[str, float]

    @property
    def static(self) -> Mapping[str, int]:
        return self.executable.static

    def run(self, inputs: Sequence[torch.Tensor], outputs: Sequence[torch.Tensor]) -> None:
        self.executable(*inputs, out=tuple(outputs), **self.scalars)


def check_kernel(
    cascade: Cascade,
    build: Callable[[Mapping[str, int]], Executable],
    *,
    target: str,
    scalars: Mapping[str, float],
    fixed: Mapping[str, int],
    trials: int = 10,
    seed: int = 0,
    on_trial: Callable[[Trial], None] | None = None,
) -> CheckReport:
    """Compare what `build(sizes)` gives with the reference, for `trials` sets of random extents.

    Args:
        scalars: values of the scalars; those not given are drawn.
        fixed: extents that are not drawn.
        on_trial: called after each trial.
    """
    rng = random.Random(seed)
    values = {s.name: scalars.get(s.name, round(rng.uniform(0.1, 1.0), 3)) for s in cascade.scalars}
    found = []
    for number in range(trials):
        sizes = draw_sizes(cascade, fixed, rng)
        trial = _try(cascade, sizes, build, values, seed + number)
        found.append(trial)
        if on_trial is not None:
            on_trial(trial)
    return CheckReport(cascade.name, target, seed, tuple(found))


def draw_sizes(cascade: Cascade, fixed: Mapping[str, int], rng: random.Random) -> dict[str, int]:
    """Random extents that hang together: 1, odd ones, powers of two and their neighbours. Raises `BindingError` where none are found."""
    declared = {d.name for d in cascade.ranks}
    free = [r for r in dict.fromkeys(r for t in cascade.inputs for r in t.ranks) if r not in declared and r not in fixed]
    refused: BindingError | None = None
    for _ in range(100):
        drawn = {**fixed, **{r: rng.choice(_EXTENTS) for r in free}}
        while free and _points(drawn) > _MAX_POINTS:
            largest = max(free, key=lambda r: drawn[r])
            drawn[largest] = max(1, drawn[largest] // 2)
        try:
            return complete_sizes(cascade, drawn)
        except BindingError as error:
            refused = error
    raise refused or BindingError("no extents fit", cascade=cascade.name)


def _points(sizes: Mapping[str, int]) -> int:
    points = 1
    for size in sizes.values():
        points *= size
    return points


def _try(
    cascade: Cascade, sizes: Mapping[str, int], build: Callable[[Mapping[str, int]], Executable], scalars: Mapping[str, float], seed: int
) -> Trial:
    extents = tuple(sizes.items())
    try:
        evidence = verify(_Runner(build(sizes), scalars), Oracle(cascade, sizes, scalars, seed))
    except Rejected as rejected:
        return Trial(extents, None, None, rejected.reason)
    except EinfallError as error:
        return Trial(extents, None, None, f"{type(error).__name__}: {error}")
    return Trial(extents, evidence.largest_error, evidence.tolerance)
