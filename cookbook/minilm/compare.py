"""Several attentions in one model, timed in turns: A B C D, A B C D, ..., so that whatever else the machine does meets all of them."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from encoder import Batch, Encoder, Stopwatch

MIN_ROUNDS, MAX_ROUNDS = 2, 25


@dataclass(frozen=True)
class Entry:
    """One attention: milliseconds inside its function and in the whole model, round by round, and how its embeddings compare."""

    name: str
    attention_ms: tuple[float, ...]
    model_ms: tuple[float, ...]
    worst_cosine: float
    same_neighbours: bool

    def to_dict(self) -> dict[str, object]:
        return {
            "name": self.name,
            "attention_ms": list(self.attention_ms),
            "model_ms": list(self.model_ms),
            "worst_cosine": self.worst_cosine,
            "same_neighbours": self.same_neighbours,
        }


def median(samples: Sequence[float]) -> float:
    return statistics.median(samples)


def spread(samples: Sequence[float]) -> float:
    """The distance between the quartiles over the median; between the extremes where there are few samples."""
    low, high = (min(samples), max(samples)) if len(samples) < 5 else statistics.quantiles(samples, n=4)[::2]
    return (high - low) / median(samples)


def compare(
    encoder: Encoder,
    batches: Sequence[Batch],
    names: Sequence[tuple[str, str]],
    watch: Stopwatch,
    seconds: float,
    on_round: Callable[[int], None],
) -> list[Entry]:
    """Embeds all batches with each implementation in turn, for about `seconds`.

    Args:
        names: for each attention the name it is shown under and the name it is registered under, as `watch` times it.
        on_round: told how many rounds are done.
    """
    wanted = encoder.embed(batches, "sdpa")  # the model as it comes
    found = {name: encoder.embed(batches, name) for _, name in names}  # warms up, and compiles
    attention: dict[str, list[float]] = {name: [] for _, name in names}
    model: dict[str, list[float]] = {name: [] for _, name in names}
    until = time.perf_counter() + seconds
    for done in range(1, MAX_ROUNDS + 1):
        for _, name in names:
            watch.read()
            start = time.perf_counter()
            encoder.embed(batches, name)
            model[name].append((time.perf_counter() - start) * 1e3)
            attention[name].append(watch.read() * 1e3)
        on_round(done)
        if done >= MIN_ROUNDS and time.perf_counter() > until:
            break
    return [
        Entry(shown, tuple(attention[name]), tuple(model[name]), worst_cosine(wanted, found[name]), same_neighbours(wanted, found[name]))
        for shown, name in names
    ]


def worst_cosine(wanted: torch.Tensor, found: torch.Tensor) -> float:
    """The smallest cosine between corresponding embeddings, in float64."""
    return float(torch.cosine_similarity(wanted.double(), found.double(), dim=-1).min())


def neighbours(embeddings: torch.Tensor) -> torch.Tensor:
    """For each embedding of length 1 the one nearest to it."""
    return (embeddings @ embeddings.mT).fill_diagonal_(-2.0).argmax(-1)


def same_neighbours(wanted: torch.Tensor, found: torch.Tensor) -> bool:
    return bool((neighbours(wanted) == neighbours(found)).all())
