"""Tuning of a real kernel through the compiler, small enough to be part of every run of the tests."""

from __future__ import annotations

import torch
from einfall.compiler.driver import compile_cascade
from einfall.ir.text import parse_cascade
from einfall.schedules.target import load_target
from einfall.tuner.database import Database
from einfall.tuner.lookup import Lookup
from einfall.tuner.measure import Protocol
from einfall.tuner.tune import tune

TEXT = """\
cascade mean_square(X[m,p]: f32, W[p]: f32, scale: f32) -> Y[m]
  S[m] = sum(p) X[m,p] * X[m,p] * W[p]
  Y[m] = S[m] * scale
"""


def test_a_kernel_is_tuned_recorded_looked_up_and_runs(path):
    cascade, target = parse_cascade(TEXT), load_target("cpu")
    sizes = {"m": 48, "p": 600}
    result = tune(
        cascade, sizes=sizes, target=target, database=path, scalars={"scale": 0.5}, trials=3, seed=1, workers=1, timeout_s=120,
        protocol=Protocol(warm_up_ms=2, budget_ms=20, final_rounds=6, final_budget_ms=50),
    )  # fmt: skip
    assert result.failures == 0, [t.result for t in result.history]
    assert len(result.history) == 3
    assert result.default_ms is not None

    found = Lookup(path).find(cascade, sizes, target)
    assert (found.schedule, found.source) == (result.schedule, "exact")
    near = Lookup(path).find(cascade, {"m": 33, "p": 1000}, target)
    assert near.source == "bucket"
    with Database.open(path, read_only=True) as db:
        measured = db.show(db.ls()[0].measurement)
        assert measured["status"] == "ok"
        assert measured["evidence"]["largest_error"] <= measured["evidence"]["tolerance"]
        trials = db.known(*(getattr(db.ls()[0], key) for key in ("workload", "device", "toolchain", "policy")))
    assert len(trials) == 3

    run = compile_cascade(cascade, sizes=sizes, target=target, schedule=found.schedule)
    x, w = torch.randn(48, 600), torch.rand(600)
    torch.testing.assert_close(run(x, w, scale=0.5), (x * x * w).sum(1) * 0.5)
