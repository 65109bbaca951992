"""A kernel against its peers, interleaved in one run: the default schedule, eager PyTorch, optionally torch.compile, and the roofline."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..compiler.executable import Executable
from ..ir.cascade import Cascade
from ..ir.reference import evaluate
from .inputs import make_inputs
from .measure import Protocol, Subject, argument_sets, interleave
from .placement import clock_of, place_of

Run = Callable[[Sequence[torch.Tensor]], object]


@dataclass(frozen=True, slots=True)
class Entry:
    """One competitor: raw samples in milliseconds, in the order they were taken."""

    name: str
    samples_ms: tuple[float, ...]

    @property
    def median_ms(self) -> float:
        return statistics.median(self.samples_ms)

    @property
    def spread(self) -> float:
        """The distance between the quartiles over the median."""
        if len(self.samples_ms) < 4:
            return 0.0
        low, _, high = statistics.quantiles(self.samples_ms, n=4)
        return (high - low) / self.median_ms


@dataclass(frozen=True, slots=True)
class Comparison:
    """Competitors in one interleaved run, the kernel first, and what the machine allows."""

    cascade: str
    sizes: tuple[tuple[str, int], ...]
    entries: tuple[Entry, ...]
    roofline_ms: float | None

    def speedup(self, entry: Entry) -> float:
        """How many times as long `entry` takes as the kernel."""
        return entry.median_ms / self.entries[0].median_ms

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data."""
        kernel = self.entries[0].median_ms
        return {
            "cascade": self.cascade,
            "sizes": dict(self.sizes),
            "roofline_ms": self.roofline_ms,
            "of_roofline": None if self.roofline_ms is None else self.roofline_ms / kernel,
            "entries": [
                {"name": e.name, "median_ms": e.median_ms, "spread": e.spread, "ratio": self.speedup(e), "samples_ms": list(e.samples_ms)}
                for e in self.entries
            ],
        }


def compare(
    cascade: Cascade,
    sizes: Mapping[str, int],
    executables: Sequence[tuple[str, Executable]],
    *,
    scalars: Mapping[str, float],
    roofline_ms: float | None = None,
    compiled: bool = False,
    peers: Sequence[tuple[str, Callable[..., object]]] = (),
    cache_bytes: int = 0,
    seed: int = 0,
    protocol: Protocol | None = None,
) -> Comparison:
    """Time `executables`, the eager reference and `peers` in turns on the same random inputs.

    Args:
        peers: further functions of the input tensors, in order.
        compiled: whether the reference under torch.compile competes as well.
        cache_bytes: the last-level cache, to be kept cold; 0 leaves it warm.
    """
    place = place_of(executables[0][1].target)
    tensors = {name: t.to(place) for name, t in make_inputs(cascade, sizes, "normal", seed).items()}
    names = [t.name for t in cascade.inputs]
    inputs = [tensors[name] for name in names]

    def eager(given: Sequence[torch.Tensor]) -> object:
        return evaluate(cascade, dict(zip(names, given, strict=True)), scalars)

    runs: list[tuple[str, Run]] = [(name, _spread(executable, scalars)) for name, executable in executables]
    runs.append(("eager", eager))
    if compiled:
        runs.append(("torch.compile", torch.compile(eager)))
    runs += [(name, _spread(function, {})) for name, function in peers]
    sets = argument_sets(inputs, [], "cold" if cache_bytes else "warm", cache_bytes)
    subjects = [Subject(_without_outputs(run), sets, clock_of(place)) for _, run in runs]
    samples = interleave(subjects, protocol or Protocol())
    entries = tuple(Entry(name, tuple(found)) for (name, _), found in zip(runs, samples, strict=True))
    return Comparison(cascade.name, tuple(sizes.items()), entries, roofline_ms)


def _spread(function: Callable[..., object], scalars: Mapping[str, float]) -> Run:
    """`function` called with the tensors one by one."""
    return lambda given: function(*given, **scalars)


def _without_outputs(run: Run) -> Callable[[Sequence[torch.Tensor], Sequence[torch.Tensor]], object]:
    """`run` as a subject is called: it allocates its outputs itself, as its user would have it."""
    return lambda given, _: run(given)
