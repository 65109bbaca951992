"""A property check of one kernel: random extents and values, each compared with the reference in float64.

It runs where the target is: on this processor, or on a GPU of this machine. Where there is none, the emitted kernels are interpreted on
the CPU over small extents, which tells their numbers and nothing else, and the report says so.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..compiler.binding import complete_sizes
from ..compiler.devices import capability_of, runs_on
from ..compiler.executable import Executable
from ..compiler.interpreted import INTERPRETED, interpreted
from ..ir.cascade import Cascade
from ..ir.errors import BindingError, EinfallError
from ..schedules.target import Target, load_target
from .placement import moved, place_of
from .verify import Oracle, Rejected, verify

Ran = Literal["device", "interpreter"]
_EXTENTS = (1, 2, 3, 5, 7, 8, 13, 16, 17, 31, 32, 33, 63, 64, 65, 96, 127, 128, 130)
_MAX_POINTS = 1 << 22  # of all input ranks together, so that a trial takes well under a second
_FEW_EXTENTS, _FEW_POINTS = tuple(n for n in _EXTENTS if n <= 33), 1 << 12  # where a program takes milliseconds and they run one by one


@dataclass(frozen=True, slots=True)
class Trial:
    """One set of extents: the largest error found and the one allowed, relative to the result's magnitude, or what went wrong."""

    sizes: tuple[tuple[str, int], ...]
    largest_error: float | None
    tolerance: float | None
    failure: str = ""


@dataclass(frozen=True, slots=True)
class CheckReport:
    """What a check found. `ran` tells whether the kernels ran on a device of the target or in an interpreter."""

    cascade: str
    target: str
    seed: int
    trials: tuple[Trial, ...]
    ran: Ran = "device"

    @property
    def passed(self) -> bool:
        """Whether every trial was right."""
        return all(not t.failure for t in self.trials)

    @property
    def title(self) -> str:
        """What was checked and where it ran."""
        return f"{self.cascade} on {self.target}" + (": interpreted, not run on a device" if self.ran == "interpreter" else "")

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        return {
            "cascade": self.cascade, "target": self.target, "ran": self.ran, "seed": self.seed, "passed": self.passed,
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
        if self.executable.target.kind == "cpu":
            self.executable(*inputs, out=tuple(outputs), **self.scalars)
            return
        with moved((*inputs, *outputs), place_of(self.executable.target)) as tensors:
            self.executable(*tensors[: len(inputs)], out=tuple(tensors[len(inputs) :]), **self.scalars)


def ran_where(target: Target) -> Ran:
    """Where kernels for `target` are checked here: on a device that this machine has, or in the interpreter."""
    if target.kind not in INTERPRETED:
        return "device"
    present = target.kind == "cuda" and torch.cuda.is_available() and torch.version.hip is None
    return "device" if present and runs_on(capability_of(target.name), torch.cuda.get_device_capability()) else "interpreter"


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

    Without a device for `target` the default schedule's kernels are interpreted instead, over smaller extents.

    Args:
        scalars: values of the scalars; those not given are drawn.
        fixed: extents that are not drawn.
        on_trial: called after each trial.
    """
    machine = load_target(target)
    ran = ran_where(machine)
    if ran == "interpreter":

        def build(sizes: Mapping[str, int]) -> Executable:
            return interpreted(cascade, sizes=sizes, target=machine)

    rng = random.Random(seed)
    values = {s.name: scalars.get(s.name, round(rng.uniform(0.1, 1.0), 3)) for s in cascade.scalars}
    found = []
    for number in range(trials):
        sizes = draw_sizes(cascade, fixed, rng, few=ran == "interpreter")
        trial = _try(cascade, sizes, build, values, seed + number)
        found.append(trial)
        if on_trial is not None:
            on_trial(trial)
    return CheckReport(cascade.name, target, seed, tuple(found), ran)


def draw_sizes(cascade: Cascade, fixed: Mapping[str, int], rng: random.Random, *, few: bool = False) -> dict[str, int]:
    """Random extents that hang together: 1, odd ones, powers of two and their neighbours; with `few` small ones.

    Raises `BindingError` where none are found.
    """
    extents, most = (_FEW_EXTENTS, _FEW_POINTS) if few else (_EXTENTS, _MAX_POINTS)
    declared = {d.name for d in cascade.ranks}
    free = [r for r in dict.fromkeys(r for t in cascade.inputs for r in t.ranks) if r not in declared and r not in fixed]
    refused: BindingError | None = None
    for _ in range(100):
        drawn = {**fixed, **{r: rng.choice(extents) for r in free}}
        while free and _points(drawn) > most:
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
