"""Cascades of every kind through the interpreter and through the CPU backend, against float64."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from einfall.compiler.driver import compile_cascade
from einfall.compiler.passes import make_plan
from einfall.ir.binding import bind_sizes
from einfall.ir.plan import LoopPlan
from einfall.ir.reference import evaluate
from plans import run_plan
from variety import VARIETY

by_name = pytest.mark.parametrize("name", VARIETY)


def assert_near(found, entry, tensors):
    expected = evaluate(entry.cascade(), tensors, dtype=torch.float64)
    eager = evaluate(entry.cascade(), tensors)
    for name, reference in expected.items():
        exact = reference.double().numpy()
        result = np.asarray(found[name], dtype=np.float64).reshape(exact.shape)
        bound = 2 * np.abs(eager[name].double().numpy() - exact).max() + 2e-6 * max(1.0, np.abs(exact).max())
        assert np.abs(result - exact).max() <= bound, name


@by_name
def test_lowered(name):
    entry = VARIETY[name]
    tensors = entry.tensors(seed=1)
    arrays = {n: t.numpy() for n, t in tensors.items()}
    sizes = bind_sizes(entry.cascade(), tensors)
    plan = make_plan(entry.cascade(), sizes)
    if any(isinstance(step, LoopPlan) for step in plan.steps):
        pytest.skip("a loop over kernels, tested compiled")
    assert_near(run_plan(plan, sizes, arrays), entry, tensors)


@by_name
def test_compiled(name):
    entry = VARIETY[name]
    tensors = entry.tensors(seed=2)
    cascade = entry.cascade()
    results = compile_cascade(cascade, sizes=bind_sizes(cascade, tensors), target="cpu")(*tensors.values())
    results = results if isinstance(results, tuple) else (results,)
    assert_near({o.name: r.numpy() for o, r in zip(cascade.outputs, results, strict=True)}, entry, tensors)
