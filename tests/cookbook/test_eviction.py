"""The eviction recipes beyond their oracles: masks, windows and budgets at their limits, other implementations."""

from __future__ import annotations

import einfall as ef
import pytest
import torch

from cookbook.eviction import common, h2o


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def extents(step, **changed):
    return {**step.sizes, **{rank: low for rank, (low, _) in step.ranges.items()}, **changed}


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


def test_a_budget_of_the_whole_cache_is_a_permutation_and_a_larger_one_an_error():
    S, K = torch.rand(1, 1, 6), torch.rand(1, 1, 6, 2)
    *_, I = h2o.keep.reference(S, K, K, budget=6, window=2)
    assert sorted(I.flatten().tolist()) == list(range(6))
    with pytest.raises(ef.BindingError, match=r"rank p\b"):
        h2o.keep.reference(S, K, K, budget=7, window=2)
