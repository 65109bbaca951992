"""The derivation: single passes where the algebra allows them, the reason where it does not, and the same numbers always."""

from __future__ import annotations

import einfall as ef
import pytest
import torch
from cascades import CASES, Case, make_inputs, traced
from einfall.compiler.analysis import passes
from einfall.compiler.passes import PIPELINE, make_plan
from einfall.compiler.passes.write_streams import write_streams
from einfall.compiler.trace import trace
from einfall.ir.check import check_cascade
from einfall.ir.plan import LoopPlan
from einfall.ir.reference import evaluate

by_name = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)


def differences(a, b):
    return max(float((x.double() - y.double()).abs().max()) for x, y in zip(a.values(), b.values(), strict=True))


@by_name
def test_one_pass_over_the_reduced_rank(case: Case):
    cascade = traced(case)
    plan = make_plan(cascade, case.sizes)
    assert len(plan.kernels) == 1
    assert plan.kernels[0].stream == case.reduced
    assert [len(k.stages) for k in plan.kernels] == [1]
    assert passes(write_streams(plan), case.reduced) == 1


@by_name
def test_every_rewrite_keeps_the_reference(case: Case):
    tensors = make_inputs(case, case.sizes, seed=1)
    cascade = traced(case)
    expected = evaluate(cascade, tensors, case.scalars, dtype=torch.float64)
    for rewrite, _ in PIPELINE:
        cascade = rewrite(cascade)
        check_cascade(cascade)
        assert differences(evaluate(cascade, tensors, case.scalars, dtype=torch.float64), expected) < 1e-12, rewrite.__name__


@by_name
def test_the_streamed_text_keeps_the_reference(case: Case):
    tensors = make_inputs(case, case.sizes, seed=2)
    cascade = traced(case)
    streamed = write_streams(make_plan(cascade, case.sizes))
    check_cascade(streamed)
    expected = evaluate(cascade, tensors, case.scalars, dtype=torch.float64)
    assert differences(evaluate(streamed, tensors, case.scalars, dtype=torch.float64), expected) < 1e-11


@by_name
def test_the_reference_agrees_with_an_independent_oracle(case: Case):
    tensors = make_inputs(case, case.sizes, seed=3)
    wide = [t.double() if t.is_floating_point() else t for t in tensors.values()]
    expected = case.oracle(*wide, *case.scalars.values())
    expected = expected if isinstance(expected, tuple) else (expected,)
    found = evaluate(traced(case), tensors, case.scalars, dtype=torch.float64)
    assert differences(found, dict(enumerate(expected))) < 1e-10


def scaled_by_its_own_sum(X: "m p") -> m:
    return ef.exp(X * X.sum("p")).sum("p")


def softmax_of_softmax(X: "m p", V: "m p") -> m:
    return (ef.softmax(ef.softmax(X, over="p"), over="p") * V).sum("p")


def excess_over_the_mean(X: "m p") -> m:
    return ef.maximum(X - X.mean("p"), 0.0).sum("p")


def rounded_by_its_maximum(X: "m p") -> m:
    return ef.round(X / X.max("p")).sum("p")


def cast_after_centring(X: "m p") -> m:
    return (X - X.mean("p")).to(ef.bf16).to(ef.f32).sum("p")


def poor_origin(X: "m p") -> m:
    C = X - X.sum("p") / 7.0
    return (C * C).sum("p")


@pytest.mark.parametrize(
    ("function", "stages", "reason"),
    [
        (scaled_by_its_own_sum, 2, "product of an element"),
        (softmax_of_softmax, 2, "exponential"),
        (excess_over_the_mean, 2, "maximum mixes"),
        (rounded_by_its_maximum, 2, "round mixes"),
        (cast_after_centring, 2, "rounding point"),
        (poor_origin, 2, "poor origin"),
    ],
    ids=lambda v: getattr(v, "__name__", None),
)
def test_what_rightly_takes_another_pass_says_why(function, stages, reason):
    plan = make_plan(trace(function), {"m": 5, "p": 2000})
    assert len(plan.kernels[0].stages) >= stages
    reasons = [r.reason for s in plan.kernels[0].stages for r in s.rejected]
    assert any(reason in text for text in reasons), reasons


def test_repeat_takes_a_pass_for_each_dependent_reduction():
    case = next(c for c in CASES if c.name == "plain")
    plan = make_plan(traced(case), case.sizes, repeat=frozenset({"p"}))
    assert len(plan.kernels[0].stages) == 3
    tensors = make_inputs(case, case.sizes, seed=4)
    expected = evaluate(traced(case), tensors, case.scalars, dtype=torch.float64)
    assert differences(evaluate(write_streams(plan), tensors, case.scalars, dtype=torch.float64), expected) < 1e-12


def test_a_block_of_unknown_length_is_a_loop_over_kernels():
    def walk(X: "m p") -> "m":
        return ef.iterate("p", init=0.0, step=lambda x: ef.maximum(x, X) * 0.5)

    (loop,) = make_plan(trace(walk), {"m": 3, "p": 9}).steps
    assert isinstance(loop, LoopPlan)
    assert [t.name for t in loop.step.inputs] == ["X", loop.step.inputs[1].name, "step"]
    assert [k.outputs for k in loop.body.kernels] == [(f"{loop.step.inputs[1].name}_next",)]
