"""Which unmeasured points are worth measuring, learned from those that are measured. Boosted trees (XGBoost), one thread, seeded.

    Classifier    how likely a point is among the fastest, each of those weighted by its margin: expected improvement without a
                  model of the times (Song, Yu, Neiswanger, Ermon: A General Recipe for Likelihood-free Bayesian Optimization)
    Ranking       pairs of points in the right order (rank:pairwise)
    Regression    squared error of the logarithm of the time

Which of them the search uses, and the figures behind that, is in `docs/decisions`. A point that failed is data: it is none of the
fastest, and slower than any that ran.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    Matrix: TypeAlias = NDArray[np.float64]

TREES = 60
PARAMETERS: dict[str, Any] = {
    "nthread": 1, "verbosity": 0, "tree_method": "exact", "max_depth": 6, "eta": 0.1, "min_child_weight": 0.0, "subsample": 0.8,
    "colsample_bytree": 0.8,
}  # fmt: skip


class CostModel(Protocol):
    """Scores points by what was measured of others."""

    def scores(self, rows: Matrix, times: Matrix, candidates: Matrix, *, seed: int) -> Matrix:
        """A number for each row of `candidates`, larger for what is better worth measuring.

        `rows` are the features of the measured points and `times` their results, infinity for a failure; at least one is finite.
        A feature may be nan where it is unknown.
        """


class Classifier:
    """Separates the fastest `share` from all points. The log-odds grow with the expected improvement over the slowest of them."""

    def __init__(self, share: float = 0.3) -> None:
        self._share = share

    def scores(self, rows: Matrix, times: Matrix, candidates: Matrix, *, seed: int) -> Matrix:
        import numpy as np

        count = max(3, math.ceil(self._share * len(times)))
        threshold = np.sort(times)[min(count, len(times) - 1)]
        if not np.isfinite(threshold):
            threshold = times[np.isfinite(times)].max() * 1.0001
        good = times < threshold
        if not good.any():  # all of them equal
            return np.zeros(len(candidates))
        margin = np.log(threshold) - np.log(times[good]) + 1e-3  # never quite zero, so that the threshold's equals count
        weights = margin * (count / margin.sum())
        labels = np.concatenate([np.zeros(len(rows)), np.ones(len(weights))])
        data = np.concatenate([rows, rows[good]])
        return _boost("binary:logistic", data, labels, candidates, seed, weights=np.concatenate([np.ones(len(rows)), weights]))


class Ranking:
    """Orders pairs of points."""

    def scores(self, rows: Matrix, times: Matrix, candidates: Matrix, *, seed: int) -> Matrix:
        import numpy as np

        labels = np.argsort(np.argsort(-times, kind="stable"), kind="stable").astype(np.float64)
        labels[~np.isfinite(times)] = 0.0
        more = {"lambdarank_pair_method": "mean", "lambdarank_num_pair_per_sample": 8}
        return _boost("rank:pairwise", rows, labels, candidates, seed, groups=[len(rows)], parameters=more)


class Regression:
    """Predicts the logarithm of the time; a failure counts as twice the slowest."""

    def scores(self, rows: Matrix, times: Matrix, candidates: Matrix, *, seed: int) -> Matrix:
        import numpy as np

        ran = np.isfinite(times)
        return _boost("reg:squarederror", rows, -np.log(np.where(ran, times, 2 * times[ran].max())), candidates, seed)


def _boost(
    objective: str,
    rows: Matrix,
    labels: Matrix,
    candidates: Matrix,
    seed: int,
    *,
    weights: Matrix | None = None,
    groups: list[int] | None = None,
    parameters: dict[str, Any] | None = None,
) -> Matrix:
    """Trains on `rows` and gives the raw score of each candidate."""
    import numpy as np
    import xgboost

    least, most = np.finfo(np.float32).min, np.finfo(np.float32).max  # features are kept in f32, without infinities
    data = xgboost.DMatrix(np.clip(rows, least, most), label=labels, weight=weights, nthread=1)
    if groups is not None:
        data.set_group(groups)
    settings = {**PARAMETERS, **(parameters or {}), "objective": objective, "seed": seed % (1 << 31)}
    booster = xgboost.train(settings, data, num_boost_round=TREES)
    found: Matrix = booster.predict(xgboost.DMatrix(np.clip(candidates, least, most), nthread=1), output_margin=True).astype(np.float64)
    return found


class Prior:
    """What other sources expect of points: columns for the model, and an order to begin with. A source that misleads is left out.

    Sources are on any scale; they enter as ranks. A source is trusted as long as it agrees with what was measured: the share of pairs
    in its order less that in the other, Kendall's tau, is at least `AGREEMENT`.
    """

    AGREEMENT = 0.15

    def __init__(self, columns: Matrix) -> None:
        """`columns[i, j]`: the time that source j expects of point i; nan where it expects nothing."""
        import numpy as np

        self._columns = columns
        self._ranks = np.full(columns.shape, np.nan)
        for j, column in enumerate(columns.T):
            known = ~np.isnan(column)
            self._ranks[known, j] = np.unique(column[known], return_inverse=True)[1]

    def columns(self, sources: list[int]) -> Matrix:
        """What these sources expect, as features."""
        return self._columns[:, sources]

    def order(self, trusted: list[int]) -> Matrix:
        """A rank for each point by the sources in `trusted` together, smaller is faster; infinity where none expects anything."""
        import numpy as np

        ranks = self._ranks[:, trusted]
        known = ~np.isnan(ranks)
        count = known.sum(axis=1)
        total = np.where(known, ranks, 0.0).sum(axis=1)
        return np.where(count > 0, total / np.maximum(count, 1), np.inf)

    def trusted(self, measured: list[int], times: Matrix) -> list[int]:
        """The sources that agree with the results of the points numbered `measured`."""
        return [j for j in range(self._columns.shape[1]) if kendall_tau(self._columns[measured, j], times) >= self.AGREEMENT]


def kendall_tau(expected: Matrix, times: Matrix) -> float:
    """Kendall's tau-a over the pairs of which the source knows both; 0 without any. Failures are the slowest, equal among themselves."""
    import numpy as np

    known = ~np.isnan(expected)
    most = np.finfo(np.float64).max
    x, y = np.minimum(expected[known], most), np.minimum(times[known], most)
    pairs = len(x) * (len(x) - 1)
    if not pairs:
        return 0.0
    agreeing = np.sign(x[:, None] - x[None, :]) * np.sign(y[:, None] - y[None, :])
    return float(agreeing.sum() / pairs)
