"""Search for the fastest point of a space with few measurements. Knows nothing of kernels: a space may be a recorded table.

    space     iterates hashable points, has len() and features(point); or offers sample(rng) and neighbours(point)
    measure   answers each point with a time in ms or a Failure; at most `batch` points at once, no point twice
    strategy  proposes the next points from the history; a learned cost model enters as `prior` or as another strategy

A space may name the points to be measured before all others as `seeds` (the default first).
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar, runtime_checkable

P = TypeVar("P", bound=Hashable)
ENUMERATED = 4096  # a larger space is sampled, if it can be, rather than listed
PriorFunction = Callable[[Sequence[Any]], Sequence[float]]


@dataclass(frozen=True, slots=True)
class Failure:
    """A point that gave no time, and why."""

    reason: str


@dataclass(frozen=True, slots=True)
class Trial(Generic[P]):
    """A measured point. `index` counts from 0 in the order of proposal."""

    index: int
    point: P
    result: float | Failure

    @property
    def time_ms(self) -> float:
        """The time; infinity for a failure, so that trials sort."""
        return self.result if isinstance(self.result, float) else math.inf


class Stop(Exception):
    """Raised by a measure function to end the search early; `results` answer the first points of the batch."""

    def __init__(self, results: Sequence[float | Failure] = ()) -> None:
        super().__init__("the search was stopped")
        self.results = tuple(results)


class History(Generic[P]):
    """What was measured, in order."""

    def __init__(self) -> None:
        self._trials: list[Trial[P]] = []
        self._seen: set[P] = set()

    @property
    def trials(self) -> tuple[Trial[P], ...]:
        return tuple(self._trials)

    @property
    def best(self) -> Trial[P] | None:
        """The fastest trial, the earlier of equals; None if none succeeded."""
        best = min(self._trials, key=lambda t: (t.time_ms, t.index), default=None)
        return best if best is not None and best.time_ms < math.inf else None

    def __len__(self) -> int:
        return len(self._trials)

    def __iter__(self) -> Iterator[Trial[P]]:
        return iter(self.trials)

    def __contains__(self, point: object) -> bool:
        return point in self._seen

    def fastest(self, count: int) -> list[Trial[P]]:
        """The `count` fastest successful trials, best first."""
        ranked = sorted((t for t in self._trials if t.time_ms < math.inf), key=lambda t: (t.time_ms, t.index))
        return ranked[:count]

    def curve(self) -> list[float]:
        """The best time after each trial; infinity until one succeeds."""
        best, found = math.inf, []
        for trial in self._trials:
            best = min(best, trial.time_ms)
            found.append(best)
        return found

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data; points that offer `to_dict` are written as that, others as text."""
        return {
            "trials": [
                {
                    "index": t.index,
                    "point": _plain(t.point),
                    **({"failure": t.result.reason} if isinstance(t.result, Failure) else {"time_ms": t.result}),
                }
                for t in self._trials
            ],
            "best": None if self.best is None else self.best.index,
        }

    def add(self, point: P, result: object) -> Trial[P]:
        """Appends a result. What is neither a positive finite time nor a `Failure` is kept as a failure."""
        trial = Trial(len(self._trials), point, _checked(result))
        self._trials.append(trial)
        self._seen.add(point)
        return trial


@runtime_checkable
class Enumerable(Protocol[P]):
    """A space small enough to list."""

    def __iter__(self) -> Iterator[P]: ...

    def __len__(self) -> int: ...

    def features(self, point: P, /) -> Sequence[float]: ...


@runtime_checkable
class Sampled(Protocol[P]):
    """A space too large to list."""

    def sample(self, rng: random.Random, /) -> P: ...

    def neighbours(self, point: P, /) -> Sequence[P]: ...


class Strategy(Protocol[P]):
    """Proposes points that are not in the history, at most `count`, none twice. None at all means the space is exhausted."""

    def propose(self, count: int, history: History[P]) -> Sequence[P]: ...


class Pool(Protocol[P]):
    """What a strategy needs of either kind of space."""

    def draw(self, rng: random.Random, count: int, taken: Callable[[P], bool]) -> list[P]: ...

    def near(self, rng: random.Random, point: P, count: int, taken: Callable[[P], bool]) -> list[P]: ...


def minimize(
    space: Any,
    measure: Callable[[list[Any]], Sequence[float | Failure]],
    *,
    budget: int,
    batch: int = 8,
    seed: int = 0,
    prior: PriorFunction | None = None,
    on_trial: Callable[[Trial[Any]], None] | None = None,
    strategy: Strategy[Any] | None = None,
) -> History[Any]:
    """The history of a search for the fastest point of `space`.

    Args:
        measure: see the module; it may raise `Stop` with the results it has.
        prior: expected times of points on any scale, smaller is faster, nan where nothing is expected; a guide, never an answer.
        on_trial: told of each trial as it enters the history.
        strategy: another strategy than the evolutionary one.
    """
    if budget < 0 or batch < 1:
        raise ValueError(f"a budget of {budget} and a batch of {batch}; at least 0 and 1 are needed")
    history: History[Any] = History()
    proposer = strategy if strategy is not None else Evolution(space, budget=budget, seed=seed, prior=prior)
    while len(history) < budget:
        wanted = min(batch, budget - len(history))
        points = [p for p in dict.fromkeys(proposer.propose(wanted, history)) if p not in history][:wanted]
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
    """Seeds, then random points, then neighbours of the fastest, with a share of random points to the end.

    With a prior, more points are drawn than asked for and two thirds of the proposals are those it expects to be fastest; the
    rest stay as drawn, so that a misleading prior costs trials but cannot hide a part of the space.
    """

    RANDOM_SHARE = 0.2
    ELITES = 6
    OVERSAMPLE = 8

    def __init__(
        self, space: Any, *, budget: int, seed: int = 0, prior: PriorFunction | None = None, seeds: Sequence[P] | None = None
    ) -> None:
        self._rng = random.Random(seed)
        self._pool: Pool[P] = pool_of(space)
        self._seeds: list[P] = list(dict.fromkeys(getattr(space, "seeds", ()) if seeds is None else seeds))
        self._prior = prior
        self._warm_up = min(20, max(4, budget // 4))

    def propose(self, count: int, history: History[P]) -> Sequence[P]:
        chosen: dict[P, None] = {}

        def taken(point: P) -> bool:
            return point in history or point in chosen

        chosen.update(dict.fromkeys([p for p in self._seeds if p not in history][:count]))
        while len(chosen) < count:
            explore = len(history) + len(chosen) < self._warm_up or self._rng.random() < self.RANDOM_SHARE
            point = None if explore else self._neighbour(history, taken)
            if point is None:
                point = self._drawn(taken)
            if point is None:
                break
            chosen[point] = None
        return list(chosen)

    def _drawn(self, taken: Callable[[P], bool]) -> P | None:
        return self._guided(self._pool.draw(self._rng, self.OVERSAMPLE if self._prior else 1, taken))

    def _neighbour(self, history: History[P], taken: Callable[[P], bool]) -> P | None:
        """An unmeasured neighbour of one of the fastest, the faster the likelier."""
        elites = history.fastest(self.ELITES)
        if not elites:
            return None
        weights = [1.0 / (rank + 1) for rank in range(len(elites))]
        parent = self._rng.choices(elites, weights)[0]
        return self._guided(self._pool.near(self._rng, parent.point, self.OVERSAMPLE if self._prior else 1, taken))

    def _guided(self, points: list[P]) -> P | None:
        if not points:
            return None
        if self._prior is None or self._rng.random() < 1 / 3:
            return points[0]
        expected = [x if x == x else math.inf for x in self._prior(points)]
        return points[min(range(len(points)), key=lambda i: (expected[i], i))]


def pool_of(space: Any) -> Pool[Any]:
    """The space as a pool: listed if it can be, sampled otherwise. Raises `TypeError` for what is neither."""
    if isinstance(space, Enumerable) and (len(space) <= ENUMERATED or not isinstance(space, Sampled)):
        return _Listed(space)
    if isinstance(space, Sampled):
        return _Drawn(space)
    raise TypeError(f"{type(space).__name__} is no space: it needs iteration, len() and features(), or sample() and neighbours()")


class _Listed(Generic[P]):
    """An enumerated space. Points are near if few of their features differ, and those by little."""

    def __init__(self, space: Enumerable[P]) -> None:
        import numpy as np

        self._points = list(dict.fromkeys(space))
        self._index = {p: i for i, p in enumerate(self._points)}
        table = np.array([list(space.features(p)) for p in self._points], dtype=np.float64).reshape(len(self._points), -1)
        # features enter by the rank of their value, so that 1, 2, 4, 8 are evenly spaced and units do not matter
        levels = [np.unique(column, return_inverse=True)[1] for column in table.T]
        self._levels = np.stack(levels, axis=1).reshape(table.shape) if levels else table
        self._spread = np.maximum(self._levels.max(axis=0, initial=0), 1)
        self._left = list(range(len(self._points)))

    def draw(self, rng: random.Random, count: int, taken: Callable[[P], bool]) -> list[P]:
        drawn: list[int] = []
        while self._left and len(drawn) < count:
            at = rng.randrange(len(self._left))
            self._left[at], self._left[-1] = self._left[-1], self._left[at]
            index = self._left.pop()  # a point is dropped once it is taken; one that is only looked at comes back below
            if not taken(self._points[index]):
                drawn.append(index)
        self._left.extend(drawn)
        return [self._points[i] for i in drawn]

    def near(self, rng: random.Random, point: P, count: int, taken: Callable[[P], bool]) -> list[P]:
        import numpy as np

        index = self._index.get(point)
        if index is None:  # a seed from outside the space has no neighbours in it
            return self.draw(rng, count, taken)
        steps = np.abs(self._levels - self._levels[index])
        distance = (steps != 0).sum(axis=1) + (steps / self._spread).sum(axis=1)
        jitter = np.random.default_rng(rng.getrandbits(32)).random(len(distance))
        order = np.argsort(distance + jitter, kind="stable")
        found: list[P] = []
        for i in order:
            if len(found) == count:
                break
            if not taken(self._points[i]):
                found.append(self._points[i])
        return found


class _Drawn(Generic[P]):
    """A sampled space. A neighbour of a neighbour stands in where all neighbours are taken."""

    ATTEMPTS = 50

    def __init__(self, space: Sampled[P]) -> None:
        self._space = space

    def draw(self, rng: random.Random, count: int, taken: Callable[[P], bool]) -> list[P]:
        found: dict[P, None] = {}
        for _ in range(self.ATTEMPTS * count):
            point = self._space.sample(rng)
            if not taken(point):
                found[point] = None
                if len(found) == count:
                    break
        return list(found)

    def near(self, rng: random.Random, point: P, count: int, taken: Callable[[P], bool]) -> list[P]:
        around = list(self._space.neighbours(point))
        free = [p for p in dict.fromkeys(around) if not taken(p)]
        if not free and around:
            free = [p for p in dict.fromkeys(self._space.neighbours(rng.choice(around))) if not taken(p)]
        rng.shuffle(free)
        return free[:count]


def _checked(result: object) -> float | Failure:
    if isinstance(result, Failure):
        return result
    if isinstance(result, (int, float)) and not isinstance(result, bool) and 0 < result < math.inf:
        return float(result)
    return Failure(f"{result!r} is no time")


def _plain(point: object) -> object:
    to_dict = getattr(point, "to_dict", None)
    return to_dict() if callable(to_dict) else str(point)
