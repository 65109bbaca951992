"""Spaces as the search sees them: points to draw, points near a point, and their features as rows of numbers.

    listed    the space iterates its points: all of them are candidates
    drawn     the space is too large to list: it offers sample(rng) and neighbours(point)

A space may say with `identity(point)` which points are the same thing to measure; one of them stands for all.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Hashable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from typing import TYPE_CHECKING, Any, Generic, Protocol, TypeAlias, TypeVar, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix: TypeAlias = NDArray[np.float64]

P = TypeVar("P", bound=Hashable)
ENUMERATED = 1024  # a larger space is sampled, if it can be, rather than listed
Known: TypeAlias = AbstractSet[Hashable]  # what `same` gives for the points that are not wanted


@runtime_checkable
class Enumerable(Protocol[P]):
    """A space small enough to list."""

    def __iter__(self) -> Iterator[P]: ...

    def __len__(self) -> int: ...

    def features(self, point: P, /) -> Sequence[float]: ...


@runtime_checkable
class Sampled(Protocol[P]):
    """A space too large to list. It may offer features(point); without, proposals are made without a cost model."""

    def sample(self, rng: random.Random, /) -> P: ...

    def neighbours(self, point: P, /) -> Sequence[P]: ...


class Pool(Protocol[P]):
    """What a strategy needs of either kind of space. `complete` if `candidates` are all points that there are."""

    complete: bool

    def draw(self, rng: random.Random, count: int, known: Known) -> list[P]:
        """At most `count` different points that are not known, fewer only if there are no more to be found."""

    def near(self, rng: random.Random, point: P, known: Known) -> list[P]:
        """The neighbours of `point` that are not known, in any order; empty if there are none."""

    def candidates(self, rng: random.Random, elites: Sequence[P], known: Known) -> list[P]:
        """The points among which a cost model chooses."""

    def rows(self, points: Sequence[P]) -> Matrix | None:
        """A row of features for each point; None if the space has none."""

    def same(self, point: P) -> Hashable:
        """What is equal for points that need one measurement."""


def pool_of(space: Any) -> Pool[Any]:
    """The space as a pool: listed if it can be, sampled otherwise. Raises `TypeError` for what is neither."""
    if isinstance(space, Enumerable) and (len(space) <= ENUMERATED or not isinstance(space, Sampled)):
        return Listed(space)
    if isinstance(space, Sampled):
        return Drawn(space)
    raise TypeError(f"{type(space).__name__} is no space: it needs iteration, len() and features(), or sample() and neighbours()")


class Listed(Generic[P]):
    """All points of a space. Without `neighbours` of the space, points are neighbours if they differ in one feature."""

    complete = True

    def __init__(self, space: Enumerable[P]) -> None:
        import numpy as np

        self._space = space
        self._identity: Callable[[P], Hashable] | None = getattr(space, "identity", None)
        self._around: Callable[[P], Sequence[P]] | None = getattr(space, "neighbours", None)
        self._points = list(dict.fromkeys(space))
        self._index = {p: i for i, p in enumerate(self._points)}
        self._table = _matrix([space.features(p) for p in self._points])
        self._levels = np.zeros(self._table.shape, dtype=np.int64)
        for i, column in enumerate(self._table.T):
            self._levels[:, i] = np.unique(column, return_inverse=True)[1]

    def draw(self, rng: random.Random, count: int, known: Known) -> list[P]:
        attempts = (self._points[rng.randrange(len(self._points))] for _ in range(8 * count if self._points else 0))
        found: dict[P, None] = {}
        for point in attempts:
            if len(found) == count:
                break
            if self.same(point) not in known:
                found[point] = None
        if len(found) < count:  # few are left
            left = [p for p in self._points if p not in found and self.same(p) not in known]
            found.update(dict.fromkeys(rng.sample(left, min(count - len(found), len(left)))))
        return list(found)

    def near(self, rng: random.Random, point: P, known: Known) -> list[P]:
        if self._around is not None:
            return [p for p in dict.fromkeys(self._around(point)) if p in self._index and self.same(p) not in known]
        index = self._index.get(point)
        if index is None:  # a seed from outside the space has no neighbours in it
            return []
        differing = (self._levels != self._levels[index]).sum(axis=1)
        near = [self._points[i] for i in (differing == 1).nonzero()[0]]
        return [p for p in near if self.same(p) not in known]

    def candidates(self, rng: random.Random, elites: Sequence[P], known: Known) -> list[P]:
        if self._identity is None:
            return [p for p in self._points if p not in known]
        return [p for p in self._points if self._identity(p) not in known]

    def rows(self, points: Sequence[P]) -> Matrix | None:
        import numpy as np

        found = np.fromiter((self._index.get(p, -1) for p in points), dtype=np.int64, count=len(points))
        rows = self._table[found]
        rows[found < 0] = np.nan  # a seed from outside the space
        return rows

    def same(self, point: P) -> Hashable:
        return point if self._identity is None else self._identity(point)


class Drawn(Generic[P]):
    """A sampled space. Candidates are random points and the neighbours of the fastest."""

    ATTEMPTS = 50
    SAMPLES = 256
    complete = False

    def __init__(self, space: Sampled[P]) -> None:
        self._space = space
        self._features: Callable[[P], Sequence[float]] | None = getattr(space, "features", None)
        self._identity: Callable[[P], Hashable] | None = getattr(space, "identity", None)
        self._row_of: dict[P, list[float]] = {}

    def draw(self, rng: random.Random, count: int, known: Known) -> list[P]:
        found: dict[P, None] = {}
        for _ in range(self.ATTEMPTS * count):
            if len(found) == count:
                break
            point = self._space.sample(rng)
            if self.same(point) not in known:
                found[point] = None
        return list(found)

    def near(self, rng: random.Random, point: P, known: Known) -> list[P]:
        return [p for p in dict.fromkeys(self._space.neighbours(point)) if self.same(p) not in known]

    def candidates(self, rng: random.Random, elites: Sequence[P], known: Known) -> list[P]:
        found = dict.fromkeys(self._space.sample(rng) for _ in range(self.SAMPLES))
        for elite in elites:
            found.update(dict.fromkeys(self._space.neighbours(elite)))
        return [p for p in found if self.same(p) not in known]

    def rows(self, points: Sequence[P]) -> Matrix | None:
        if self._features is None:
            return None
        for point in points:
            if point not in self._row_of:
                self._row_of[point] = [float(x) for x in self._features(point)]
        return _matrix([self._row_of[p] for p in points])

    def same(self, point: P) -> Hashable:
        return point if self._identity is None else self._identity(point)


def _matrix(rows: Sequence[Sequence[float]]) -> Matrix:
    import numpy as np

    return np.array([list(row) for row in rows], dtype=np.float64).reshape(len(rows), len(rows[0]) if rows else 0)
