"""Search for the fastest point of a space with few measurements. Knows nothing of kernels: a space may be a recorded table.

    space     iterates hashable points, has len() and features(point); or offers sample(rng) and neighbours(point), and features
    measure   answers each point with a time in ms or a Failure; at most `batch` points at once, no point twice
    prior     what other sources expect of points, a guide that is dropped where it misleads
    strategy  proposes the next points from the history

A space may name the points to be measured before all others as `seeds` (the default first), and with `identity(point)` which points
are one thing to measure.
"""

from __future__ import annotations

import heapq
import math
import random
import time
from collections.abc import Callable, Hashable, Sequence
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias

from .candidates import Enumerable, P, Pool, Sampled, pool_of
from .cost_model import CostModel, Prior, Ranking
from .history import Failure, History, Trial

if TYPE_CHECKING:
    from .cost_model import Matrix

__all__ = [
    "Enumerable", "Evolution", "Failure", "History", "Pool", "PriorFunction", "Sampled", "Stop", "Strategy", "Trial", "minimize", "pool_of",
]  # fmt: skip

PriorFunction: TypeAlias = Callable[[Sequence[Any]], Sequence[float]]


class Stop(Exception):
    """Raised by a measure function to end the search early; `results` answer the first points of the batch."""

    def __init__(self, results: Sequence[float | Failure] = ()) -> None:
        super().__init__("the search was stopped")
        self.results = tuple(results)


class Strategy(Protocol[P]):
    """Proposes points that are not in the history, at most `count`, none twice. None at all means the space is exhausted."""

    def propose(self, count: int, history: History[P]) -> Sequence[P]: ...


def minimize(
    space: Any,
    measure: Callable[[list[Any]], Sequence[float | Failure]],
    *,
    budget: int,
    batch: int = 8,
    seed: int = 0,
    prior: PriorFunction | Sequence[PriorFunction] | None = None,
    on_trial: Callable[[Trial[Any]], None] | None = None,
    strategy: Strategy[Any] | None = None,
    seconds: float | None = None,
    history: History[Any] | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> History[Any]:
    """The history of a search for the fastest point of `space`.

    Args:
        measure: see the module; it may raise `Stop` with the results it has.
        budget: trials in all, those of `history` included.
        prior: expected times of points on any scale, smaller is faster, nan where nothing is expected; one function for each source.
        on_trial: told of each trial as it enters the history.
        strategy: another strategy than the evolutionary one.
        seconds: no batch begins later than this after the call.
        history: an earlier search to continue, in place. With the same arguments it goes on as if it had never been cut off.
        clock: the seconds that have passed since some moment.
    """
    if budget < 0 or batch < 1:
        raise ValueError(f"a budget of {budget} and a batch of {batch}; at least 0 and 1 are needed")
    history = History() if history is None else history
    proposer = strategy if strategy is not None else Evolution(space, budget=budget, seed=seed, prior=prior)
    began = clock()
    while len(history) < budget and (seconds is None or clock() - began < seconds):
        wanted = min(batch, budget - len(history))
        if not history.pending:
            history.propose([p for p in dict.fromkeys(proposer.propose(wanted, history)) if p not in history][:wanted])
        points = history.pending[:wanted]
        if not points:
            break
        stopped = False
        try:
            results = tuple(measure(list(points)))
            if len(results) != len(points):
                raise ValueError(f"measure answered {len(results)} of {len(points)} points")
        except Stop as stop:
            results, stopped = stop.results, True
        for point, result in zip(points, results, strict=False):
            trial = history.add(point, result)
            if on_trial is not None:
                on_trial(trial)
        if stopped:
            break
    return history


class Evolution(Generic[P]):
    """Seeds; what a prior expects to be fastest, or random points; then what a cost model likes best, in turns near and anywhere.

        near       the neighbours of the fastest point, until all are measured
        anywhere   all points of a listed space; of a drawn one random points and generations of neighbours of what the model likes best

    What is proposed depends on the seed and the history alone, so a search can be continued from its history. A prior leads the first
    trials. Then some are taken at random against it, and from there on each of its sources is a feature of the model as long as it agrees
    with what was measured, beside a model that does not know of it. When it leads to nothing better for a while, the search begins anew
    without it, away from where it led. The last trials go to the neighbours of the fastest point of all.
    """

    WARM_UP = 20  # trials before the model is asked
    LED = 8  # trials that a prior chooses
    CONTROLLED = 8  # trials after these that it and chance choose in turns
    PATIENCE = 16  # trials without anything better until a prior is left out
    ELITES = 6
    DESCENT = 10  # the last tenth of the trials are neighbours of the fastest
    PARENTS = 16  # of a generation, and how many of them
    GENERATIONS = 2

    def __init__(
        self,
        space: Any,
        *,
        budget: int,
        seed: int = 0,
        prior: PriorFunction | Sequence[PriorFunction] | None = None,
        seeds: Sequence[P] | None = None,
        model: CostModel | None = None,
    ) -> None:
        self._seed, self._budget = seed, budget
        self._pool: Pool[P] = pool_of(space)
        self._seeds: list[P] = list(dict.fromkeys(getattr(space, "seeds", ()) if seeds is None else seeds))
        self._sources: tuple[PriorFunction, ...] = () if prior is None else (prior,) if callable(prior) else tuple(prior)
        self._expected: dict[P, tuple[float, ...]] = {}
        self._model: CostModel = Ranking() if model is None else model
        self._warm_up = min(self.WARM_UP, max(4, budget // 4))
        self._led = min(self.LED, max(2, budget // 8))

    def propose(self, count: int, history: History[P]) -> Sequence[P]:
        rng = random.Random(f"{self._seed}/{len(history)}")
        batch = _Batch(count, history, self._pool)
        batch.extend(self._seeds)
        if not batch.full and self._sources and len(history) < self._led + self.CONTROLLED:
            self._follow_prior(rng, batch, history)
        descending = len(history) >= self._budget - self._budget // self.DESCENT
        start, led = self._start(history), self._sources and len(history) < self._led + self.CONTROLLED
        opening = start + self._warm_up if start or not self._sources else self._led + self.CONTROLLED
        if descending and history.best is not None:
            self._follow_model(rng, batch, history, 0, [], near=1)
        elif not led and len(history) >= opening and any(t.time_ms < math.inf for t in history.trials[start:]):
            self._follow_model(rng, batch, history, start, [] if start else self._trusted(history, len(history)), near=2)
        batch.extend(self._pool.draw(rng, count, batch.known))
        return batch.points

    def _follow_prior(self, rng: random.Random, batch: _Batch[P], history: History[P]) -> None:
        """The points that all sources together expect to be fastest; after the first of them in turns with random ones."""
        pool = self._candidates(rng, history, batch)
        order = self._prior(pool).order(list(range(len(self._sources))))
        ranked = [pool[i] for i in sorted(range(len(pool)), key=lambda i: float(order[i])) if order[i] < math.inf]
        if not ranked:
            return
        for point in ranked:
            if batch.full:
                break
            if batch.number >= self._led and batch.number % 2:
                batch.extend(self._pool.draw(rng, 1, batch.known))
            batch.add(point)

    def _start(self, history: History[P]) -> int:
        """The trial with which the search began anew without its prior; 0 if it has not come to that.

        It does if no source agrees with the first trials, or once some trials brought nothing better.
        """
        first = self._led + self.CONTROLLED
        if not self._sources or len(history) < first:
            return 0
        if not self._trusted(history, first):
            return first
        best, since = math.inf, first
        for trial in history:
            if trial.time_ms < best:
                best, since = trial.time_ms, max(since, trial.index)
            elif trial.index - since >= self.PATIENCE:
                return trial.index + 1
        return 0

    def _trusted(self, history: History[P], count: int) -> list[int]:
        """The sources of the prior that agree with the first `count` results."""
        if not self._sources:
            return []
        points = [t.point for t in history.trials[:count]]
        return self._prior(points).trusted(list(range(count)), _times(history)[:count])

    def _prior(self, points: Sequence[P]) -> Prior:
        import numpy as np

        new = [p for p in points if p not in self._expected]
        if new:
            columns = [[float(x) for x in source(new)] for source in self._sources]
            self._expected.update(zip(new, zip(*columns, strict=True), strict=True))
        return Prior(np.array([self._expected[p] for p in points], dtype=np.float64).reshape(len(points), len(self._sources)))

    def _follow_model(self, rng: random.Random, batch: _Batch[P], history: History[P], start: int, trusted: list[int], near: int) -> None:
        """The best by the model: each `near`th of the neighbours of the fastest, the others of all candidates.

        With a prior, every other two by the model that does not know of it.
        """
        models = [self._scored(rng, batch, history, start, sources) for sources in ([trusted, []] if trusted else [[]])]
        leading = [heapq.nlargest(batch.room, s, key=s.__getitem__) for s in models if s is not None]  # more are not chosen
        fastest = min(history.trials[start:], key=lambda t: t.time_ms).point
        while not batch.full:
            turn = batch.number // 2 % len(models)
            scored = models[turn]
            if scored is None:
                self._follow_neighbours(rng, batch, history)
                return
            point = None
            if batch.number % near == 0:
                around = self._pool.near(rng, fastest, batch.known)
                point = max((p for p in around if p in scored), key=scored.__getitem__, default=None)
            if point is None:
                point = next((p for p in leading[turn] if not batch.holds(p)), None)
            if point is None:
                return
            batch.add(point)

    def _follow_neighbours(self, rng: random.Random, batch: _Batch[P], history: History[P]) -> None:
        """Without features: a neighbour of one of the fastest, the faster the likelier, in turns with random points."""
        elites = [t.point for t in history.fastest(self.ELITES)]
        weights = [1.0 / (rank + 1) for rank in range(len(elites))]
        for _ in range(4 * batch.room):
            if batch.full:
                return
            near = self._pool.near(rng, rng.choices(elites, weights)[0], batch.known)
            batch.extend([rng.choice(near)] if near and rng.random() < 0.8 else self._pool.draw(rng, 1, batch.known))

    def _candidates(self, rng: random.Random, history: History[P], batch: _Batch[P]) -> list[P]:
        return self._pool.candidates(rng, [t.point for t in history.fastest(self.ELITES)], batch.known)

    def _scored(self, rng: random.Random, batch: _Batch[P], history: History[P], start: int, trusted: list[int]) -> dict[P, float] | None:
        """The model's score of every candidate, and of further ones near to the best of them; None if there are no features."""
        rows = self._rows([t.point for t in history], trusted)
        if rows is None:
            return None
        import numpy as np

        seed, times = rng.getrandbits(31), _times(history)
        times[:start] = math.inf  # what came before the search began anew is known not to be wanted
        chance = np.random.default_rng(seed)
        scored: dict[P, float] = {}
        pool = self._candidates(rng, history, batch)
        for _ in range(1 if self._pool.complete else 1 + self.GENERATIONS):
            if not pool:
                break
            found = self._rows(pool, trusted)
            if found is None:
                return None
            scores = self._model.scores(rows, times, found, seed=seed) + 1e-6 * chance.random(len(pool))  # equals in no order
            scored.update(zip(pool, scores.tolist(), strict=True))
            if not self._pool.complete:
                parents = heapq.nlargest(self.PARENTS, scored, key=scored.__getitem__)
                near = dict.fromkeys(p for parent in parents for p in self._pool.near(rng, parent, batch.known))
                pool = [p for p in near if p not in scored]
        return scored

    def _rows(self, points: Sequence[P], trusted: list[int]) -> Matrix | None:
        """The features of points, and what the trusted sources expect of them."""
        import numpy as np

        rows = self._pool.rows(points)
        if rows is None or not trusted:
            return rows
        return np.hstack([rows, self._prior(points).columns(trusted)])


class _Batch(Generic[P]):
    """The points of one proposal: none measured, none twice, and none that is the same to measure as another."""

    def __init__(self, count: int, history: History[P], pool: Pool[P]) -> None:
        self._count, self._begin, self._pool = count, len(history), pool
        self.known: set[Hashable] = {pool.same(t.point) for t in history}
        self._chosen: dict[P, None] = {}

    @property
    def points(self) -> list[P]:
        return list(self._chosen)

    @property
    def room(self) -> int:
        return self._count - len(self._chosen)

    @property
    def full(self) -> bool:
        return self.room <= 0

    @property
    def number(self) -> int:
        """The number of the next trial."""
        return self._begin + len(self._chosen)

    def holds(self, point: P) -> bool:
        """Whether `point` or one like it was measured or is chosen."""
        return self._pool.same(point) in self.known

    def add(self, point: P) -> None:
        if not self.full and not self.holds(point):
            self._chosen[point] = None
            self.known.add(self._pool.same(point))

    def extend(self, points: Sequence[P]) -> None:
        for point in points:
            self.add(point)


def _times(history: History[Any]) -> Matrix:
    import numpy as np

    return np.array([t.time_ms for t in history], dtype=np.float64)
