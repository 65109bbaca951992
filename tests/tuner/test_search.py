"""The search: its contract with measure functions, and that it finds more than chance does."""

from __future__ import annotations

import math
import random
import statistics

import pytest
from einfall.tuner.search import Evolution, Failure, History, Stop, minimize


class Grid:
    """A table of made-up times over four parameters: a narrow valley, a tenth of the points failing."""

    sizes = (8, 8, 6, 4)

    def __init__(self, seed: int = 0) -> None:
        rng = random.Random(seed)
        self.optimum = tuple(rng.randrange(n) for n in self.sizes)
        points = [(a, b, c, d) for a in range(8) for b in range(8) for c in range(6) for d in range(4)]
        self.time = {p: self._time(p) * rng.uniform(1, 1.02) for p in points}
        self.broken = {p for p in points if rng.random() < 0.1 and p != self.optimum}

    def _time(self, p: tuple[int, ...]) -> float:
        far = sum(abs(x - y) * weight for x, y, weight in zip(p, self.optimum, (1.0, 0.6, 0.4, 1.5), strict=True))
        return 1 + 0.3 * far + (0.5 if p[0] % 2 != self.optimum[0] % 2 else 0)

    def __iter__(self):
        return iter(self.time)

    def __len__(self) -> int:
        return len(self.time)

    def features(self, p):
        return [2.0 ** p[0], 2.0 ** p[1], float(p[2]), float(p[3])]

    def measure(self, points):
        return [Failure("broken") if p in self.broken else self.time[p] for p in points]


class Large:
    """The same, sampled rather than listed."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid

    def sample(self, rng: random.Random):
        return tuple(rng.randrange(n) for n in Grid.sizes)

    def neighbours(self, p):
        around = [(*p[:i], p[i] + step, *p[i + 1 :]) for i in range(4) for step in (-1, 1)]
        return [q for q in around if all(0 <= x < n for x, n in zip(q, Grid.sizes, strict=True))]


class Random:
    """Chance, to compare with."""

    def __init__(self, space, seed: int) -> None:
        self._points = list(space)
        random.Random(seed).shuffle(self._points)

    def propose(self, count, history):
        return [self._points.pop() for _ in range(min(count, len(self._points)))]


@pytest.mark.parametrize("budget", [0, 1, 7, 8, 9, 50])
@pytest.mark.parametrize("batch", [1, 8])
def test_the_contract_with_measure(budget, batch):
    grid, asked = Grid(), []

    def measure(points):
        assert 0 < len(points) <= batch
        asked.extend(points)
        return grid.measure(points)

    history = minimize(grid, measure, budget=budget, batch=batch)
    assert len(asked) == len(history) == budget
    assert len(set(asked)) == budget
    assert [t.point for t in history] == asked
    assert [t.index for t in history] == list(range(budget))


def test_a_small_space_is_measured_whole_and_once():
    grid = Grid()
    points = list(grid)[:30]

    class Small(Grid):
        def __iter__(self):
            return iter(points + points)

        def __len__(self):
            return 60

    history = minimize(Small(), grid.measure, budget=200)
    assert sorted(t.point for t in history) == sorted(points)


def test_a_sampled_space_is_searched_without_repetition():
    grid = Grid()
    history = minimize(Large(grid), grid.measure, budget=150, seed=3)
    points = [t.point for t in history]
    assert len(set(points)) == len(points) == 150
    assert history.best.time_ms <= 1.2 * grid.time[grid.optimum]


@pytest.mark.parametrize("make", [lambda grid: grid, Large])
def test_equal_seeds_give_equal_histories(make):
    grid = Grid()
    runs = [[t.point for t in minimize(make(grid), grid.measure, budget=60, seed=seed)] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]


def test_it_finds_more_than_chance():
    """Over 12 spaces and seeds: the median of the best after 80 of 1536 points, in units above the optimum."""
    found = {"search": [], "chance": []}
    for seed in range(12):
        grid = Grid(seed)
        best = min(t for p, t in grid.time.items() if p not in grid.broken)
        for name, strategy in (("search", None), ("chance", Random(grid, seed))):
            history = minimize(grid, grid.measure, budget=80, seed=seed, strategy=strategy)
            found[name].append(history.best.time_ms / best)
    assert statistics.median(found["search"]) < 1.05
    assert statistics.median(found["search"]) < statistics.median(found["chance"]) - 0.1


def test_seeds_come_first():
    grid = Grid()
    seeds = [(7, 7, 5, 3), (0, 0, 0, 0)]
    history = minimize(grid, grid.measure, budget=20, strategy=Evolution(grid, budget=20, seeds=seeds))
    assert [t.point for t in history][:2] == seeds
    grid.seeds = seeds
    assert [t.point for t in minimize(grid, grid.measure, budget=5)][:2] == seeds


def test_a_seed_from_outside_the_space_is_measured_and_harmless():
    grid = Grid()
    history = minimize(
        grid, lambda ps: [0.5 if p == "elsewhere" else grid.time[p] for p in ps], budget=60,
        strategy=Evolution(grid, budget=60, seeds=["elsewhere"]),
    )  # fmt: skip
    assert history.best.point == "elsewhere"
    assert len(history) == 60


def test_a_good_prior_helps_and_a_bad_one_does_not_hide_the_optimum():
    medians = {}
    for name, sign in (("good", 1), ("none", 0), ("bad", -1)):
        found = []
        for seed in range(8):
            grid = Grid(seed)

            def prior(points, grid=grid, sign=sign):
                return [sign * grid.time[p] if p[0] else math.nan for p in points]

            history = minimize(grid, grid.measure, budget=40, seed=seed, prior=prior if sign else None)
            found.append(history.best.time_ms / min(grid.time.values()))
        medians[name] = statistics.median(found)
    assert medians["good"] <= medians["none"]
    assert medians["bad"] < 2.5


@pytest.mark.parametrize("answer", [math.nan, math.inf, -1.0, 0, True, None, "fast"])
def test_what_is_no_time_is_a_failure(answer):
    grid = Grid()
    history = minimize(grid, lambda points: [answer] * len(points), budget=4)
    assert history.best is None
    assert all(isinstance(t.result, Failure) and "no time" in t.result.reason for t in history)


def test_all_failing_spaces_end_without_a_best():
    history = minimize(Grid(), lambda points: [Failure("no")] * len(points), budget=30)
    assert len(history) == 30
    assert history.best is None
    assert history.curve() == [math.inf] * 30


def test_stop_keeps_what_was_measured():
    grid, seen = Grid(), []

    def measure(points):
        if seen:
            raise Stop([grid.time[p] for p in points[:3]])
        return [grid.time[p] for p in points]

    history = minimize(grid, measure, budget=100, on_trial=seen.append)
    assert len(history) == len(seen) == 11
    assert history.trials == tuple(seen)


def test_an_answer_of_the_wrong_length_is_an_error():
    with pytest.raises(ValueError, match="answered 1 of 8"):
        minimize(Grid(), lambda points: [1.0], budget=10)


def test_what_is_no_space_is_refused():
    with pytest.raises(TypeError, match="no space"):
        minimize(object(), lambda points: [], budget=1)
    with pytest.raises(ValueError, match="batch of 0"):
        minimize(Grid(), lambda points: [], budget=1, batch=0)


def test_the_history_as_data():
    history: History[int] = History()
    for point, result in ((1, 3.0), (2, Failure("hung")), (3, 2.0), (4, 2.0)):
        history.add(point, result)
    assert history.best.point == 3
    assert history.curve() == [3.0, 3.0, 2.0, 2.0]
    assert [t.point for t in history.fastest(2)] == [3, 4]
    assert 2 in history
    assert 9 not in history
    data = history.to_dict()
    assert data["best"] == 2
    assert data["trials"][1] == {"index": 1, "point": 2, "failure": "hung"}
    assert data["trials"][2] == {"index": 2, "point": 3, "time_ms": 2.0}
