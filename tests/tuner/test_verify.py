"""The correctness gate: right kernels pass, subtly wrong ones do not, whatever the cascade."""

from __future__ import annotations

import math

import pytest
import torch
from einfall.ir.reference import evaluate
from einfall.ir.text import parse_cascade
from einfall.tuner.inputs import DISTRIBUTIONS, integer_ranges, make_inputs
from einfall.tuner.shapes import MAX_ELEMENTS, MAX_OPERATIONS, reference_cost, shapes_for
from einfall.tuner.verify import Oracle, Rejected, verify

VARIANCE = """\
cascade variance(X[m,p]: f32) -> V[m]
  S[m] = sum(p) X[m,p]
  U[m] = S[m] / extent(p)
  D[m,p] = X[m,p] - U[m]
  Q[m] = sum(p) D[m,p] * D[m,p]
  V[m] = Q[m] / extent(p)
"""
SOFTMAX = """\
cascade rows(X[m,p]: bf16) -> Y[m,p]
  M[m] = max(p) X[m,p]
  N[m,p] = exp(X[m,p] - M[m])
  D[m] = sum(p) N[m,p]
  Y[m,p] = N[m,p] / D[m]
"""
ARGMAX = """\
cascade where_largest(X[m,p]: f32) -> I[m]
  I[m] = argmax(p) X[m,p]
"""
GATHER = """\
cascade pages(K[g,j,e]: f32, T[b,n]: i32, L[b]: i32, Q[b,e]: f32) -> S[b]
  A[b,n,j] = sum(e) Q[b,e] * K[T[b,n],j,e]
  S[b] = sum(n, j where n < L[b]) A[b,n,j]
"""


class Python:
    """A candidate from a function of the inputs."""

    def __init__(self, function, static=None) -> None:
        self.function = function
        self.static = static or {}
        self.shapes = []

    def run(self, inputs, outputs) -> None:
        self.shapes.append(tuple(inputs[0].shape))
        found = self.function(*inputs)
        for output, value in zip(outputs, found if isinstance(found, tuple) else (found,), strict=True):
            output.copy_(value)


def oracle(text: str, **sizes: int) -> Oracle:
    return Oracle(parse_cascade(text), sizes, {}, seed=0)


def rejection(text: str, function, **sizes: int) -> Rejected:
    with pytest.raises(Rejected) as caught:
        verify(Python(function), oracle(text, **sizes))
    return caught.value


def test_a_right_kernel_passes_with_evidence():
    candidate = Python(lambda x: x.var(1, correction=0))
    evidence = verify(candidate, oracle(VARIANCE, m=40, p=300))
    assert set(evidence.distributions) >= {"normal", "uniform", "offset", "tiny"}
    assert [dict(s) for s in evidence.shapes] == [{"m": 40, "p": 300}, {"m": 25, "p": 151}, {"m": 5, "p": 3}, {"m": 1, "p": 1}]
    assert 0 < evidence.largest_error <= evidence.tolerance < 1e-5
    assert set(candidate.shapes) == {(40, 300), (25, 151), (5, 3), (1, 1)}


def test_catastrophic_cancellation_is_caught():
    """E[x^2] - E[x]^2 is right on paper and on normal inputs, and loses its digits where the mean is large."""
    rejected = rejection(VARIANCE, lambda x: (x * x).mean(1) - x.mean(1) ** 2, m=40, p=300)
    assert (rejected.status, "offset" in rejected.reason) == ("wrong", True)


def test_another_order_of_summation_passes_where_the_sum_is_large():
    """One running sum loses more than eager's several, and an exponential behind it shows that: not a fault of the kernel."""
    text = """\
cascade scores(X[m,e]: f32, W[e]: f32, scale: f32) -> Y[m]
  S[m] = sum(e) X[m,e] * W[e]
  M[] = max(m) S[m]
  Y[m] = exp((S[m] - M[]) * scale)
"""

    def in_order(x, w):
        s = (x * w).cumsum(1)[:, -1]
        return torch.exp((s - s.max()) * 0.05)

    asked = Oracle(parse_cascade(text), {"m": 64, "e": 500}, {"scale": 0.05}, seed=0)
    assert verify(Python(in_order), asked).tolerance < 0.05
    with pytest.raises(Rejected):
        verify(Python(lambda x, w: in_order(x[:, 1:], w[1:])), asked)


def test_an_error_only_at_odd_extents_is_caught():
    """A kernel that forgets the tail of a tile of 4 is right at the asked extents."""
    rejected = rejection(VARIANCE, lambda x: x[:, : max(x.shape[1] // 4 * 4, 1)].var(1, correction=0), m=40, p=300)
    assert "p=151" in rejected.reason


def test_ranks_the_candidate_was_specialised_to_keep_their_extents():
    candidate = Python(lambda x: x.var(1, correction=0), static={"p": 300})
    verify(candidate, oracle(VARIANCE, m=40, p=300))
    assert set(candidate.shapes) == {(40, 300), (25, 300), (5, 300), (1, 300)}


def test_a_kernel_that_keeps_more_precision_than_eager_passes_and_a_coarser_one_does_not():
    right = verify(Python(lambda x: torch.softmax(x.float(), 1).bfloat16()), oracle(SOFTMAX, m=20, p=50))
    assert right.largest_error < 0.01
    rejected = rejection(SOFTMAX, lambda x: (torch.softmax(x.float(), 1) * 32).round() / 32, m=20, p=50)
    assert rejected.status == "wrong"


def test_masked_elements_are_among_the_inputs():
    def unguarded(x):
        return torch.softmax(torch.nan_to_num(x.float(), neginf=2.0), 1).bfloat16()

    rejected = rejection(SOFTMAX, unguarded, m=20, p=50)
    assert "holes" in rejected.reason


def test_nan_where_the_reference_is_finite_is_caught_and_where_it_is_nan_allowed():
    text = "cascade roots(X[m]: f32) -> Y[m]\n  Y[m] = sqrt(X[m])\n"
    verify(Python(lambda x: torch.where(x < 0, 7.0, x.sqrt())), oracle(text, m=50))
    rejected = rejection(text, lambda x: torch.where(x < 0.001, math.nan, x.sqrt()), m=50)
    assert "NaN" in rejected.reason
    text = "cascade logs(X[m]: f32) -> Y[m]\n  Y[m] = log(X[m] - X[m] + 1.0) / X[m] * X[m] + log(maximum(X[m], 0.0))\n"
    rejected = rejection(text, lambda x: torch.nan_to_num(torch.log(x.clamp_min(0)), neginf=-100.0), m=50)
    assert "infinite" in rejected.reason


def test_indices_are_compared_by_how_many_differ():
    verify(Python(lambda x: x.argmax(1)), oracle(ARGMAX, m=30, p=64))
    rejected = rejection(ARGMAX, lambda x: x.argmax(1).clamp_max(60), m=3000, p=64)
    assert rejected.status == "wrong"


def test_unsteady_results_are_caught():
    state = torch.Generator().manual_seed(0)

    def unsteady(x):
        return x.var(1, correction=0) * (1 + 1e-7 * torch.rand(1, generator=state))

    assert rejection(VARIANCE, unsteady, m=40, p=300).status == "nondeterministic"


def test_gathered_indices_stay_inside_and_lengths_cover_all():
    cascade = parse_cascade(GATHER)
    sizes = {"g": 9, "j": 4, "e": 8, "b": 50, "n": 6}
    assert integer_ranges(cascade, sizes) == {"T": (0, 8), "L": (0, 6)}
    inputs = make_inputs(cascade, sizes, "normal", 3)
    assert (int(inputs["T"].min()), int(inputs["T"].max())) == (0, 8)
    assert (int(inputs["L"].min()), int(inputs["L"].max())) == (0, 6)

    def right(k, t, lengths, q):
        scores = torch.einsum("be,bnje->bnj", q, k[t.long()])
        alive = torch.arange(t.shape[1])[None, :] < lengths[:, None]
        return torch.where(alive[:, :, None], scores, 0.0).sum((1, 2))

    verify(Python(right), oracle(GATHER, **sizes))


@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_inputs_are_the_same_for_the_same_seed(distribution):
    cascade = parse_cascade(GATHER)
    sizes = {"g": 9, "j": 4, "e": 8, "b": 5, "n": 6}
    one, same, other = (make_inputs(cascade, sizes, distribution, seed, holed="Q") for seed in (1, 1, 2))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["K"], other["K"])
    assert torch.isinf(one["Q"]).any() == (distribution == "holes")
    assert all(one[t.name].dtype == (torch.float32 if t.dtype.is_float else torch.int32) for t in cascade.inputs)


def test_a_shape_too_large_for_the_reference_is_cut_and_still_run():
    text = "cascade outer(X[m]: f32, Y[p]: f32) -> Z[m]\n  T[m,p] = exp(X[m] * Y[p])\n  Z[m] = sum(p) T[m,p]\n"
    cascade = parse_cascade(text)
    sizes = {"m": 1 << 14, "p": 1 << 13}
    elements, operations = reference_cost(cascade, sizes)
    assert elements == operations == 1 << 27
    cut = shapes_for(cascade, sizes, {})[0]
    assert reference_cost(cascade, cut)[0] <= MAX_ELEMENTS
    assert reference_cost(cascade, cut)[1] <= MAX_OPERATIONS

    seen = []

    def only_small(x, y):
        seen.append(len(x))
        if len(x) == 1 << 14:
            return torch.full_like(x, math.nan)
        return torch.exp(x[:, None] * y[None, :]).sum(1)

    rejected = rejection(text, only_small, **sizes)
    assert "at the asked shape" in rejected.reason
    assert seen[-1] == 1 << 14


def test_composed_and_declared_ranks_make_consistent_shapes():
    text = """\
cascade blocks(X[m,(n j)]: f32) -> Y[m,n]
  rank j = 8
  Y[m,n] = sum(j) X[m,n,j]
"""
    candidate = Python(lambda x: x.reshape(x.shape[0], -1, 8).sum(2))
    evidence = verify(candidate, oracle(text, m=10, n=20))
    assert all(dict(s)["j"] == 8 for s in evidence.shapes)
    assert len(evidence.shapes) == 4


def test_a_result_that_is_zero_at_a_degenerate_shape_may_be_off_by_a_rounding():
    """The logarithm of a sum of one exponential, less its argument, is exactly zero; a kernel in base two is not."""
    text = """\
cascade loss(X[m,p]: f32) -> Y[m]
  M[m] = max(p) X[m,p]
  D[m] = sum(p) exp(X[m,p] - M[m])
  Y[m] = log(D[m]) + M[m] - X[m,0]
"""

    def base_two(x, wrong=0.0):
        y = x * 1.4426950408889634
        return (torch.log2(torch.exp2(y - y.amax(1, keepdim=True)).sum(1)) + y.amax(1)) * 0.6931471805599453 - x[:, 0] + wrong

    verify(Python(base_two), oracle(text, m=20, p=30))
    rejection(text, lambda x: base_two(x, wrong=1e-4 * (x.shape[1] == 1)), m=20, p=30)


def test_nothing_to_compare_is_no_evidence():
    text = "cascade never(X[m]: f32) -> Y[m]\n  Y[m] = log(-1.0 - X[m] * X[m])\n"
    assert "nothing can be checked" in rejection(text, torch.log, m=5).reason


def test_the_reference_itself_passes_on_several_outputs():
    text = """\
cascade both(X[m,p]: f32) -> S[m], A[m], N[m]
  S[m] = sum(p) X[m,p]
  A[m] = argmax(p) X[m,p]
  N[m] = any(p) (X[m,p] > 2.0)
"""
    cascade = parse_cascade(text)
    found = verify(Python(lambda x: tuple(evaluate(cascade, {"X": x}).values())), oracle(text, m=12, p=33))
    assert found.largest_error <= found.tolerance


@pytest.mark.parametrize("fails", [False, True])
def test_what_one_candidate_overwrites_the_next_does_not_see(fails):
    def overwriting(x):
        x.mul_(3)
        if fails:
            raise MemoryError
        return x.var(1, correction=0)

    shared = oracle(VARIANCE, m=5, p=40)
    with pytest.raises(MemoryError if fails else Rejected):
        verify(Python(overwriting), shared)
    verify(Python(lambda x: x.var(1, correction=0)), shared)
