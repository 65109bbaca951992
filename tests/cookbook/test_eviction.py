"""The eviction recipes beyond their oracles: masks, windows and budgets at their limits, other implementations."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace

import einfall as ef
import pytest
import torch

from cookbook.eviction import cake, common, defensivekv, h2o, int4_h2o, snapkv, triattention

RECIPES = (h2o, snapkv, cake, defensivekv, triattention, int4_h2o)
TYPES = {torch.float32: "f32", torch.float16: "f16", torch.int32: "i32", torch.uint8: "u8"}
NEEDS_KVPRESS = "kvpress pins transformers below 5.3 and brings datasets and peft with it"


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def extents(step, **changed):
    return {**step.sizes, **{rank: low for rank, (low, _) in step.ranges.items()}, **changed}


def weights_of(Q, K):
    """Causal attention weights [b, h, m, p], every query head with its own copy of the keys."""
    keys = K.repeat_interleave(Q.shape[1] // K.shape[1], dim=1)
    mask = torch.ones(Q.shape[2], K.shape[2], dtype=torch.bool).tril(K.shape[2] - Q.shape[2])
    return torch.softmax((Q @ keys.mT / Q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf), -1)


def press_score(press, Q, K):
    """The score of a press of kvpress, which is given the attention weights and so needs no model."""
    heads = SimpleNamespace(num_attention_heads=Q.shape[1], num_key_value_heads=K.shape[1])
    module = SimpleNamespace(config=heads, head_dim=K.shape[-1])
    return press.score(module, torch.zeros(len(K), K.shape[2], 1), K, K, weights_of(Q, K), {})


def sets(I):
    return [[set(row.tolist()) for row in heads] for heads in I]


@pytest.mark.parametrize("module", RECIPES, ids=lambda module: module.RECIPE.name)
def test_the_cascades_of_a_page_are_those_of_its_recipe(module):
    traced = set()
    for step in module.RECIPE.steps:
        given = step.tensors(0, extents(step))
        types = {tensor.name: TYPES[t.dtype] for tensor, t in zip(step.kernel.cascade.inputs, given, strict=True)}
        traced.add(str(step.kernel.trace(dtypes=types)).strip())
    page = Path(module.__file__).with_suffix(".md").read_text()
    shown = [block.strip() for block in re.findall(r"```cascade\n(.*?)```", page, re.DOTALL)]
    assert shown and set(shown) <= traced


# --- h2o -------------------------------------------------------------------------------------------------------------------------------
def test_every_query_gives_away_one():
    n = extents(h2o.RECIPE.steps[0], g=2, r=3, m=11, p=29, e=8, f=4)
    _, S = h2o.scored_attention.reference(*common.prompt(generator(), n, "m"), dtype=torch.float64)
    torch.testing.assert_close(S.sum(-1), torch.full((1, 2), 33.0, dtype=torch.float64))


def test_the_scores_of_a_prompt_are_those_of_its_chunks_and_of_its_tokens():
    n = extents(h2o.RECIPE.steps[0], g=2, r=2, m=24, p=24, e=8, f=4)
    Q, K, V = common.prompt(generator(), n, "m")
    for ends in ([24], [7, 17, 24], range(1, 25)):
        total, outputs, begin = torch.zeros(1, 2, 24), [], 0
        for end in ends:
            O, S = h2o.scored_attention(Q[:, :, begin:end], K[:, :, :end], V[:, :, :end])
            total[..., :end] += S
            outputs.append(O)
            begin = end
        once, scores = h2o.scored_attention.reference(Q, K, V)
        torch.testing.assert_close(torch.cat(outputs, 2), once, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(total, scores, rtol=1e-4, atol=1e-5)


def test_queries_without_keys_give_and_receive_nothing():
    n = extents(h2o.RECIPE.steps[0], m=9, p=4, e=8, f=5)
    tensors = common.prompt(generator(), n, "m")
    for O, S in (h2o.scored_attention.reference(*tensors), h2o.scored_attention(*tensors)):
        assert O[:, :, :5].eq(0).all() and O[:, :, 5:].ne(0).all()
        torch.testing.assert_close(S.sum(), torch.tensor(4.0))


def test_the_window_comes_first_then_the_heavy_hitters():
    S = torch.tensor([[[3.0, 9.0, 1.0, 7.0, 5.0, 0.0, 0.0, 0.0]]])
    K = torch.arange(8.0).view(1, 1, 8, 1)
    *_, kept, I = h2o.keep.reference(S, K, K, budget=5, window=2)
    assert I.tolist() == [[[6, 7, 1, 3, 4]]] and kept.tolist() == [[[0.0, 0.0, 9.0, 7.0, 5.0]]]


def test_a_window_as_long_as_the_prompt_keeps_its_first_tokens():
    S, K = torch.rand(1, 1, 6), torch.rand(1, 1, 6, 2)
    for window in (6, 9):
        *_, I = h2o.keep.reference(S, K, K, budget=4, window=window)
        assert I.tolist() == [[[0, 1, 2, 3]]]


@pytest.mark.parametrize("run", ["reference", "__call__"])
def test_a_budget_of_the_whole_cache_is_a_permutation_and_a_larger_one_an_error(run):
    S, K = torch.rand(1, 1, 6), torch.rand(1, 1, 6, 2)
    cut = getattr(h2o.keep, run)
    *_, I = cut(S, K, K, budget=6, window=2)
    assert sorted(I.flatten().tolist()) == list(range(6))
    with pytest.raises(ef.BindingError, match=r"rank p\b"):
        cut(S, K, K, budget=7, window=2)
    with pytest.raises(ef.CascadeError, match="size 0"):
        cut(S, K, K, budget=0, window=2)


@pytest.mark.parametrize("run", ["reference", "__call__"])
def test_a_score_that_is_no_number_counts_as_the_largest(run):
    S, K = torch.tensor([[[1.0, 4.0, torch.nan, 3.0, 2.0]]]), torch.rand(1, 1, 5, 2)
    *_, I = getattr(h2o.keep, run)(S, K, K, budget=3, window=1)
    assert I.tolist() == [[[2, 4, 1]]]


def test_the_scores_are_those_of_kvpress_observed_attention():
    kvpress = pytest.importorskip("kvpress", reason=NEEDS_KVPRESS)
    n = extents(h2o.RECIPE.steps[0], b=2, g=2, r=3, m=37, p=37, e=16, f=4)
    Q, K, V = common.prompt(generator(), n, "m")
    mean = press_score(kvpress.ObservedAttentionPress(), Q, K)  # over the heads of the group and over the queries that see the token
    _, S = h2o.scored_attention.reference(Q, K, V)
    torch.testing.assert_close(S, mean * 3 * torch.arange(37, 0, -1), rtol=1e-4, atol=1e-6)


# --- snapkv ----------------------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("pool", [1, 5])
def test_snapkv_keeps_the_tokens_that_kvpress_keeps(groups, pool):
    kvpress = pytest.importorskip("kvpress", reason=NEEDS_KVPRESS)
    n = extents(snapkv.RECIPE.steps[1], b=2, g=2, r=groups, w=64, p=64, e=16, f=4)
    Q, K, V = common.prompt(generator(), n, "w")
    *_, I = snapkv.snapkv.reference(Q[:, :, -8:], K, V, pool=pool, budget=24)
    wanted = press_score(kvpress.SnapKVPress(window_size=8, kernel_size=pool), Q, K)
    assert sets(I) == sets(wanted.topk(24).indices)  # the sets: kvpress lifts the window above the largest score of the whole batch


@pytest.mark.parametrize("window", [12, 17])
def test_a_window_as_long_as_the_prompt_scores_nothing(window):
    n = extents(snapkv.RECIPE.steps[1], w=window, p=12, e=8, f=4)
    Q, K, V = common.prompt(generator(), n, "w")
    for run in (snapkv.score.reference, snapkv.score):
        assert run(Q, K).eq(0).all()
    *_, I = snapkv.snapkv.reference(Q, K, V, budget=12)
    assert I.tolist() == [[list(range(12))]]


def test_pooling_ends_at_the_window_and_counts_zeros_beyond_the_ends():
    K = torch.zeros(1, 1, 6, 4)  # every query gives what it sees the same
    S = snapkv.score.reference(torch.zeros(1, 1, 1, 4), K, pool=3)
    torch.testing.assert_close(S, torch.tensor([[[2, 3, 3, 3, 2, 0]]]) / 18)


# --- cake ------------------------------------------------------------------------------------------------------------------------------
def test_even_attention_has_the_entropy_of_its_count_and_no_variance():
    Q, K = torch.zeros(1, 2, 3, 4), torch.randn(1, 2, 9, 4, generator=generator())
    S, H, V = cake.window.reference(Q, K, gamma=1000.0, pool=1, dtype=torch.float64)
    counts = torch.tensor([7.0, 8.0, 9.0], dtype=torch.float64)  # each query of the window sees one token more
    weights = (1 / counts).mean()
    torch.testing.assert_close(V, 2 * 6 * (1 / counts).var()[None])
    torch.testing.assert_close(H, (2 * 6 * counts.log() / counts).sum()[None], rtol=1e-8, atol=0)
    torch.testing.assert_close(S[..., :6], (weights + 1000 * (1 / counts).var()).expand(1, 2, 6))


def test_a_token_of_changing_importance_is_above_a_steady_one():
    K = torch.eye(8)[None, None]
    Q = torch.zeros(1, 1, 4, 8)
    Q[..., 0] = 4.0  # all of the window look at token 0 a little
    Q[:, :, 1, 1] = 8.0  # one looks hard at token 1
    steady = cake.window.reference(Q, K, gamma=0.0, pool=1)[0]
    moving = cake.window.reference(Q, K, gamma=10.0, pool=1)[0]
    assert steady[0, 0, 0] > steady[0, 0, 1] and moving[0, 0, 1] > moving[0, 0, 0]


def test_a_window_of_one_query_has_no_variance():
    n = extents(cake.RECIPE.steps[0], w=1, p=12, e=8, f=1)
    Q, K, _ = common.prompt(generator(), n, "w")
    S, _, V = cake.window.reference(Q, K, gamma=5.0)
    assert V.eq(0).all() and torch.equal(S, snapkv.score.reference(Q, K))


def test_a_layer_without_variance_gets_nothing():
    parts = cake.share.reference(torch.ones(3, 1), torch.tensor([[0.0], [1.0], [3.0]]), tau1=1.0, tau2=1.0)
    torch.testing.assert_close(parts, torch.tensor([[0.0], [0.25], [0.75]]))
    assert cake.share.reference(torch.ones(3, 1), torch.zeros(3, 1), tau1=1.0, tau2=1.0).isnan().all()


# --- defensivekv -----------------------------------------------------------------------------------------------------------------------
def test_the_wish_of_one_query_among_many_is_kept():
    n = extents(defensivekv.RECIPE.steps[0], g=1, r=1, w=16, p=96, e=32, f=8, d=8)
    Q, K, V, W = defensivekv.prompt(generator(), n)
    Q[:, :, 5] = 4.0 * K[:, :, 40]
    S, A = defensivekv.score.reference(Q, K, V, W, pool=1)
    *_, defended = defensivekv.keep.reference(S, A, K, V, budget=20, window=16, reach=0.0)
    assert 40 in defended.flatten() and S[0, 0, :80].argmax() == 40
    assert A[0, 0].argmax() != 40


def test_no_token_is_worth_less_than_the_mean_of_the_largest_votes():
    n = extents(defensivekv.RECIPE.steps[0], g=2, r=2, w=4, p=40, e=8, f=3, d=5)
    Q, K, _, W = defensivekv.prompt(generator(), n)
    V = torch.ones(1, 2, 40, 3)  # every value changes as much: the score is the floored maximum, but for a factor
    S, _ = defensivekv.score.reference(Q, K, V, W, pool=3, dtype=torch.float64)
    floor = S[..., :36].amin(-1, keepdim=True)
    assert (S[..., :36] == floor).sum(-1).min() > 18  # more than half of them: it is a floor, not a least value
    assert S[..., 36:].eq(0).all()


def test_the_first_stage_ends_with_the_token_that_reaches_the_mass():
    A = torch.tensor([[[0.0625, 0.5, 0.0625, 0.125, 0.25, 0.0]]])
    S = torch.tensor([[[9.0, 0.0, 8.0, 7.0, 0.0, 0.0]]])
    K = torch.arange(6.0).view(1, 1, 6, 1)
    found = {}
    for reach in (0.0, 0.5, 0.75, 0.76, 2.0):
        *_, I = defensivekv.keep.reference(S, A, K, K, reach=reach, budget=4, window=1)
        found[reach] = sorted(I.flatten().tolist())
    # tokens by attention: 1, 4, 3, 0, 2; by score: 0, 2, 3; 5 is the window
    assert found == {0.0: [0, 2, 3, 5], 0.5: [0, 1, 2, 5], 0.75: [0, 1, 4, 5], 0.76: [1, 3, 4, 5], 2.0: [1, 3, 4, 5]}


@pytest.mark.parametrize("window", [12, 17])
def test_nothing_is_defended_where_all_is_window(window):
    n = extents(defensivekv.RECIPE.steps[0], w=window, p=12, e=8, f=4, d=6)
    S, A = defensivekv.score.reference(*defensivekv.prompt(generator(), n))
    assert S.eq(0).all() and A.eq(0).all()


# --- triattention ----------------------------------------------------------------------------------------------------------------------
def calibrated(**changed):
    n = {"b": 1, "g": 1, "r": 1, "p": 19, "f": 8, "d": 4, **changed}
    return [t.double() if t.is_floating_point() else t for t in triattention.calibrated(generator(), n)]


def test_a_query_at_its_centre_and_one_distance_give_the_logit_itself():
    K, P, T, C, _, omega, _, _ = calibrated()
    nothing = torch.complex(C[..., :8], C[..., 8:]).abs()  # every query is the centre, nothing spreads
    one, at = torch.ones_like(omega), torch.tensor([5.0], dtype=torch.float64)
    X, _ = triattention.score.reference(K, P, T, C, nothing, omega, one, at, dtype=torch.float64)
    query = triattention.turned(C[0], T + 5, omega)
    torch.testing.assert_close(X[0, 0, 0], triattention.turned(K[0, 0], P[0, 0], omega) @ query[0])


def test_a_rotated_cache_scores_as_its_keys_did_before_rotation():
    K, P, T, *statistics = calibrated(b=2, g=2, r=3)
    plain = triattention.score.reference(K, P, T, *statistics, dtype=torch.float64)
    cache = triattention.turned(K, P, statistics[2])
    for found, wanted in zip(triattention.score_rotated.reference(cache, T, *statistics, dtype=torch.float64), plain, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


def test_keys_that_are_alike_score_nothing():
    K, _, T, *statistics = calibrated()
    _, S = triattention.score_rotated.reference(K[:, :, :1].expand(-1, -1, 19, -1), T, *statistics, dtype=torch.float64)
    assert S.abs().max() < 1e-6


# --- int4 decode with the score --------------------------------------------------------------------------------------------------------
STEPS = {step.name: step for step in int4_h2o.RECIPE.steps}
LAYOUTS = pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)


@LAYOUTS
def test_the_score_over_four_bits_is_that_over_what_they_stand_for(step):
    n = {**extents(step), "b": 2, "g": 2, "r": 3, "p": 40, "c": 1, "n": 2, "x": 16}
    Q, *cache, _ = step.tensors(3, n)
    axis = -1 if step.kernel is int4_h2o.decode else -2
    K, V = int4_h2o.expanded(*cache[:3], axis, torch.float64), int4_h2o.expanded(*cache[3:], -1, torch.float64)
    full = torch.full((2,), K.shape[2], dtype=torch.int32)
    O, S = step.kernel.reference(Q, *cache, full, dtype=torch.float64)
    wanted, scores = h2o.scored_attention.reference(Q[:, :, None].double(), K, V, dtype=torch.float64)
    torch.testing.assert_close(O, wanted[:, :, 0], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(S, scores, rtol=1e-9, atol=1e-12)


@LAYOUTS
@pytest.mark.parametrize("run", ["reference", "__call__"])
def test_what_lies_behind_the_length_is_never_seen(step, run):
    n = {**extents(step), "b": 3, "g": 2, "r": 2, "p": 67, "n": 2, "x": 16}
    Q, *cache, _ = step.tensors(4, n)
    tokens = cache[0].shape[2]
    L = torch.tensor([0, 34 if tokens == 67 else 32, tokens], dtype=torch.int32)
    dirty = [t.clone() for t in cache]
    for t in dirty:
        if t.is_floating_point():
            t[0] = torch.nan
            t[1, :, -(t.shape[2] // 2) :] = torch.inf
    kernel = getattr(step.kernel, run)
    for found, wanted in zip(kernel(Q, *dirty, L), kernel(Q, *cache, L), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        assert found[0].eq(0).all()
    torch.testing.assert_close(kernel(Q, *cache, L)[1].sum(-1), torch.tensor([[0.0] * 2, [2.0] * 2, [2.0] * 2]))


def test_groups_of_scale_nothing_are_their_zero_point():
    Q, Kp, Ks, Kz, Vp, Vs, Vz, L = STEPS["groups along the channels"].tensors(5, {"b": 1, "g": 1, "r": 1, "p": 6, "c": 1, "d": 1})
    for kernel in (int4_h2o.decode.reference, int4_h2o.decode):
        O, S = kernel(Q, Kp, Ks * 0, Kz * 0 + 1, Vp, Vs * 0, Vz * 0 + 3, L)  # every key alike, every value 3
        torch.testing.assert_close(O, torch.full_like(O, 3.0))
        torch.testing.assert_close(S, torch.full_like(S, 1 / 6))


def test_a_group_that_is_no_number_is_felt_in_its_row_alone():
    Q, Kp, Ks, Kz, Vp, Vs, Vz, _ = STEPS["groups along the channels"].tensors(6, {"b": 2, "g": 1, "r": 2, "p": 6, "c": 1, "d": 1})
    Kz[0, 0, 2, 0] = torch.nan
    for kernel in (int4_h2o.decode.reference, int4_h2o.decode):
        O, S = kernel(Q, Kp, Ks, Kz, Vp, Vs, Vz, torch.tensor([6, 6], dtype=torch.int32))
        assert O[0].isnan().all() and S[0].isnan().all() and O[1].isfinite().all() and S[1].isfinite().all()


def test_what_a_kernel_keeps_is_stored_once_the_statistics_it_needs_are_there():
    step = next(s for s in defensivekv.RECIPE.steps if s.name == "score")
    extents = dict.fromkeys(("b", "g", "r", "e", "f", "d"), 1) | {"w": 3, "p": 4}
    tensors = step.tensors(0, {**step.sizes, **extents})
    with ef.configure(database=None):
        assert not step.compare(step.kernel(*tensors, **step.arguments()), tensors)
