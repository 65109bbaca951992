"""What a search has measured, in order; as JSON data and back, so that a search can be continued elsewhere."""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

P = TypeVar("P", bound=Hashable)


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


class History(Generic[P]):
    """What was measured, in order. `pending` are points that were proposed and are not measured: where a search was cut off."""

    def __init__(self) -> None:
        self._trials: list[Trial[P]] = []
        self._seen: set[P] = set()
        self._pending: dict[P, None] = {}

    @property
    def trials(self) -> tuple[Trial[P], ...]:
        return tuple(self._trials)

    @property
    def pending(self) -> tuple[P, ...]:
        return tuple(self._pending)

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

    def propose(self, points: Sequence[P]) -> None:
        """Notes points as about to be measured."""
        self._pending.update(dict.fromkeys(p for p in points if p not in self._seen))

    def add(self, point: P, result: object) -> Trial[P]:
        """Appends a result. What is neither a positive finite time nor a `Failure` is kept as a failure.

        Raises `ValueError` for a point that has a result.
        """
        if point in self._seen:
            raise ValueError(f"{point!r} was measured before")
        trial = Trial(len(self._trials), point, _checked(result))
        self._trials.append(trial)
        self._seen.add(point)
        self._pending.pop(point, None)
        return trial

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON data. Points that offer `to_dict` become that, numbers, text and tuples of them stay, others become text."""
        return {
            "trials": [
                {
                    "index": t.index,
                    "point": _plain(t.point),
                    **({"failure": t.result.reason} if isinstance(t.result, Failure) else {"time_ms": t.result}),
                }
                for t in self._trials
            ],
            "pending": [_plain(p) for p in self._pending],
            "best": None if self.best is None else self.best.index,
        }

    @staticmethod
    def from_dict(data: Mapping[str, Any], point: Callable[[Any], Any] | None = None) -> History[Any]:
        """The inverse of `to_dict`; `point` reads a point that is neither number, text nor a tuple of them.

        Raises `ValueError` for what is no such data, and what `point` raises.
        """
        read = _point if point is None else point
        history: History[Any] = History()
        trials, pending = data.get("trials"), data.get("pending", [])
        if not isinstance(trials, list) or not isinstance(pending, list):
            raise ValueError("a history is a table with lists of trials and of pending points")
        for entry in trials:
            if not isinstance(entry, Mapping) or "point" not in entry or ("failure" in entry) == ("time_ms" in entry):
                raise ValueError(f"a trial is a table with a point and either time_ms or failure, found {entry!r}")
            result = Failure(str(entry["failure"])) if "failure" in entry else entry["time_ms"]
            history.add(read(entry["point"]), result)
        history.propose([read(p) for p in pending])
        return history


def _checked(result: object) -> float | Failure:
    if isinstance(result, Failure):
        return result
    if isinstance(result, (int, float)) and not isinstance(result, bool) and 0 < result < math.inf:
        return float(result)
    return Failure(f"{result!r} is no time")


def _plain(point: object) -> Any:
    to_dict = getattr(point, "to_dict", None)
    if callable(to_dict):
        return to_dict()
    if isinstance(point, (bool, int, float, str)) or point is None:
        return point
    return [_plain(x) for x in point] if isinstance(point, tuple) else str(point)


def _point(data: object) -> Any:
    return tuple(_point(x) for x in data) if isinstance(data, list) else data
