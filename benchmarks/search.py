"""Replays recorded tuning spaces: how many trials a search takes to come within 5 % of the best, without the device.

    python benchmarks/search.py --spaces DIR -o search.json --picture search.png     every strategy, 20 seeds, 220 trials
    python benchmarks/search.py --spaces DIR --strategies classifier --seeds 5       one of them, soon done

DIR holds tables NAME_DEVICE.csv or .csv.gz: a row for each point, its parameters, then `time_ms` (`fail` where it did not run) and columns
that are not read. Without --spaces, the variable EINFALL_TUNING_SPACES names the folder. Every point of a space was measured, so the best
is known. The search is not told any of this: it sees points, their parameters as numbers, and the times that it asks for.

`warm` searches have the tables of the same name on other devices as priors. A result file is continued where it ends, run by run.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import math
import os
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from einfall.tuner.cost_model import Classifier, Ranking, Regression
from einfall.tuner.device import source_commit
from einfall.tuner.search import Evolution, Failure, History, minimize

NEAR = 1.05
WARM_UP = 20
STRATEGIES = ("random", "tpe", "regression", "ranking", "classifier", "warm ranking", "warm classifier")
COLUMNS = ("time_ms", "compile_ms", "samples_ms")  # not parameters


@dataclass(frozen=True)
class Recorded:
    """A space of which every point was measured: `times` has infinity for a failure."""

    kernel: str
    device: str
    times: dict[tuple[float, ...], float]

    @property
    def name(self) -> str:
        return f"{self.kernel}_{self.device}"

    @property
    def best(self) -> float:
        return min(self.times.values())

    def __iter__(self) -> Iterator[tuple[float, ...]]:
        return iter(self.times)

    def __len__(self) -> int:
        return len(self.times)

    def features(self, point: tuple[float, ...]) -> tuple[float, ...]:
        return point

    def measure(self, points: Sequence[tuple[float, ...]]) -> list[float | Failure]:
        return [t if (t := self.times[p]) < math.inf else Failure("did not run") for p in points]

    def expected(self, points: Sequence[tuple[float, ...]]) -> list[float]:
        """What this device says of points, as a prior for another."""
        return [self.times.get(p, math.nan) for p in points]


def read_space(path: Path) -> Recorded:
    """The table in a file."""
    kernel, _, device = path.name.split(".")[0].partition("_")
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        rows = list(csv.DictReader(file))
    parameters = [c for c in rows[0] if c not in COLUMNS]
    times = {tuple(float(r[c]) for c in parameters): math.inf if r["time_ms"] == "fail" else float(r["time_ms"]) for r in rows}
    return Recorded(kernel, device, times)


def run(strategy: str, space: Recorded, others: Sequence[Recorded], *, seed: int, budget: int, batch: int) -> History[Any]:
    """One search."""
    if strategy == "random":
        return minimize(space, space.measure, budget=budget, batch=batch, strategy=Chance(space, seed))
    if strategy == "tpe":
        return parzen(space, seed, budget)
    warm, name = strategy.startswith("warm "), strategy.split()[-1]
    model = {"classifier": Classifier, "ranking": Ranking, "regression": Regression}[name]
    prior = [o.expected for o in others] if warm else None
    chosen: Evolution[Any] = Evolution(space, budget=budget, seed=seed, prior=prior, model=model())
    return minimize(space, space.measure, budget=budget, batch=batch, strategy=chosen)


class Chance:
    """Points in random order."""

    def __init__(self, space: Recorded, seed: int) -> None:
        self._points = list(space)
        random.Random(seed).shuffle(self._points)

    def propose(self, count: int, history: History[Any]) -> list[Any]:
        return [self._points.pop() for _ in range(min(count, len(self._points)))]


def parzen(space: Recorded, seed: int, budget: int) -> History[Any]:
    """Optuna's TPE, point by point, with as many random trials first as the other strategies have.

    A parameter is a whole number, the position of its value. What is no point of the space, and what it proposes again, is refused and
    costs no trial. After five proposals a trial the rest is chance.
    """
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    levels = [sorted({p[i] for p in space}) for i in range(len(next(iter(space))))]
    varying = [i for i, values in enumerate(levels) if len(values) > 1]
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=WARM_UP)
    study = optuna.create_study(sampler=sampler)
    history: History[Any] = History()
    for _ in range(5 * budget):
        if len(history) == budget:
            return history
        trial = study.ask()
        chosen = {i: trial.suggest_int(f"p{i}", 0, len(levels[i]) - 1) for i in varying}
        point = tuple(values[chosen.get(i, 0)] for i, values in enumerate(levels))
        answer = space.times.get(point, math.inf)
        if point in history or answer == math.inf:
            study.tell(trial, state=optuna.trial.TrialState.FAIL)
        else:
            study.tell(trial, answer)
        if point in space.times and point not in history:
            history.add(point, space.measure([point])[0])
    left = [p for p in space if p not in history]
    for point in random.Random(seed).sample(left, budget - len(history)):
        history.add(point, space.measure([point])[0])
    return history


def figures(space: Recorded, history: History[Any], seed: int) -> dict[str, Any]:
    """What is kept of a run: the trial that came within 5 % of the best, and every improvement."""
    curve = [t / space.best for t in history.curve()]
    steps = [[i + 1, round(x, 5)] for i, x in enumerate(curve) if x < math.inf and (i == 0 or x < curve[i - 1])]
    reached = next((i + 1 for i, x in enumerate(curve) if x <= NEAR), None)
    return {"seed": seed, "trials": len(history), "reached": reached, "regret": round(curve[-1] - 1, 5), "steps": steps}


def summary(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median trials to within 5 % (None if more than half of the runs never came there), the share that did, and the regret at the end."""
    reached = statistics.median(math.inf if r["reached"] is None else r["reached"] for r in runs)
    return {
        "runs": len(runs),
        "median_trials": None if reached == math.inf else reached,
        "solved": round(sum(r["reached"] is not None for r in runs) / len(runs), 4),
        "median_regret": round(statistics.median(r["regret"] for r in runs), 5),
        "mean_regret": round(statistics.mean(r["regret"] for r in runs), 5),
        "worst_regret": max(r["regret"] for r in runs),
    }


def summaries(runs: dict[str, dict[str, list[dict[str, Any]]]]) -> dict[str, dict[str, Any]]:
    """By strategy, for each space and for all spaces of a kernel together."""
    found: dict[str, dict[str, Any]] = {}
    for strategy, spaces in runs.items():
        groups: dict[str, list[dict[str, Any]]] = {}
        for name, members in spaces.items():
            groups.setdefault(f"all {name.partition('_')[0]}", []).extend(members)
            groups[name] = list(members)
        found[strategy] = {name: summary(members) for name, members in sorted(groups.items()) if members}
    return found


def draw(data: dict[str, Any], path: Path) -> None:
    """For each space, the share of runs that are within 5 % of the best after so many trials."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = sorted({name for spaces in data["runs"].values() for name in spaces})
    columns = 3
    rows = -(-len(names) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.2 * columns, 3.1 * rows), squeeze=False, sharex=True, sharey=True)
    for axis, name in zip(axes.flat, names):
        for i, (strategy, spaces) in enumerate(data["runs"].items()):
            runs = spaces.get(name, [])
            if runs:
                reached = sorted(r["reached"] for r in runs if r["reached"] is not None)
                x, y = [0, *reached, data["budget"]], [j / len(runs) for j in (*range(len(reached) + 1), len(reached))]
                axis.step(x, y, where="post", label=strategy, color=f"C{i}", linestyle="--" if strategy.startswith("warm") else "-")
        axis.set_title(f"{name.replace('_', ', ')}", fontsize=10)
        axis.grid(alpha=0.3)
    for axis in axes[-1]:
        axis.set_xlabel("trials")
    for axis in axes[:, 0]:
        axis.set_ylabel("runs within 5 % of the best")
    axes.flat[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def machine() -> dict[str, str]:
    """What the figures depend on beside the code: versions. Times do not enter."""
    import importlib.metadata as metadata

    versions = {}
    for name in ("numpy", "xgboost-cpu", "optuna"):
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = "not installed"
    return {"python": sys.version.split()[0], **versions}


def replay(options: argparse.Namespace, spaces: Sequence[Recorded], say: Callable[[str], None]) -> dict[str, Any]:
    """Every run that is asked for and not in the result file yet. The file is written after each group."""
    data: dict[str, Any] = {"near": NEAR, "budget": options.budget, "batch": options.batch, "versions": machine(), "runs": {}}
    path = options.output
    if path is not None and path.exists():
        earlier = json.loads(path.read_text())
        if (earlier["budget"], earlier["batch"]) != (options.budget, options.batch):
            raise SystemExit(f"{path} holds runs of another budget or batch")
        data["runs"] = earlier["runs"]
    for strategy in options.strategies:
        for space in spaces:
            if options.only and options.only not in space.name:
                continue
            runs = data["runs"].setdefault(strategy, {}).setdefault(space.name, [])
            done, began = {r["seed"] for r in runs}, time.process_time()
            others = [o for o in spaces if o.kernel == space.kernel and o is not space]
            for seed in range(options.first_seed, options.first_seed + options.seeds):
                if seed not in done:
                    found = run(strategy, space, others, seed=seed, budget=options.budget, batch=options.batch)
                    runs.append(figures(space, found, seed))
            s = summary(runs)
            say(
                f"{strategy:16} {space.name:22} median {s['median_trials'] or f'> {options.budget}'!s:>6}  solved {s['solved']:5.0%}  "
                f"regret {s['median_regret']:6.1%}  {time.process_time() - began:6.1f} s"
            )
            data["summary"], data["commit"] = summaries(data["runs"]), source_commit()
            if path is not None:
                path.write_text(json.dumps(data, indent=1) + "\n")
    return data


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--spaces", type=Path, default=os.environ.get("EINFALL_TUNING_SPACES"), help="folder of recorded spaces")
    parser.add_argument("--strategies", type=lambda text: text.split(","), default=list(STRATEGIES), help=", ".join(STRATEGIES))
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--first-seed", type=int, default=0)
    parser.add_argument("--budget", type=int, default=220)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--only", default="", help="spaces whose name contains this")
    parser.add_argument("-o", "--output", type=Path, help="JSON of all runs; continued if it exists")
    parser.add_argument("--picture", type=Path)
    options = parser.parse_args()
    unknown = set(options.strategies) - set(STRATEGIES)
    if unknown:
        parser.error(f"no strategy {sorted(unknown)[0]!r}; there are {', '.join(STRATEGIES)}")
    files = [] if options.spaces is None else sorted(p for p in Path(options.spaces).glob("*_*.csv*") if p.is_file())
    if not files:
        where = "--spaces and EINFALL_TUNING_SPACES name no folder" if options.spaces is None else f"no tables in {options.spaces}"
        parser.error(f"recorded spaces are not part of the repository: {where}")
    spaces = [read_space(path) for path in files]
    data = replay(options, spaces, lambda line: print(line, flush=True))
    for strategy in options.strategies:
        for name, s in data["summary"].get(strategy, {}).items():
            if name.startswith("all "):
                median = s["median_trials"] or f"> {options.budget}"
                print(f"{strategy:16} {name:22} median {median!s:>6}  solved {s['solved']:5.0%}  mean regret {s['mean_regret']:6.1%}")
    if options.picture is not None:
        draw(data, options.picture)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
