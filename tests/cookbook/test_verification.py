"""What is emitted has the target's distribution; the trees' decisions against walks from node to node."""

import einfall as ef
import pytest
import torch

from cookbook.verification import speculative

RULES = pytest.mark.parametrize("rule", ["reference", "kernel"])


@pytest.fixture(autouse=True)
def no_database():
    with ef.configure(database=None):
        yield


def sampler(rule):
    return speculative.sample.reference if rule == "reference" else speculative.sample


@RULES
@pytest.mark.parametrize("seed", range(3))
def test_emitted_tokens_have_the_target_distribution(rule, seed):
    """Significance 1e-3 for each of three chi-square tests over 20,000 samples."""
    assert min(speculative.significance(sampler(rule), seed=seed)) > 1e-3


@pytest.mark.parametrize("wrong", [speculative.always_accept, speculative.redraw_from_target])
def test_nearly_right_rules_fail_the_same_test(wrong, monkeypatch):
    monkeypatch.setattr(speculative, "sample", speculative.sample.reference)
    assert min(speculative.significance(wrong)) < 1e-12


def test_the_second_token_is_tested_where_the_first_was_accepted(monkeypatch):
    """A rule that is wrong from the second position on only: its first token passes."""

    def careless(P, Q, X, U, R):
        return speculative.sample.reference(P, Q, X, U * torch.tensor([1.0, 0.0]), R)

    first, second, _ = speculative.significance(careless)
    assert first > 1e-3 and second < 1e-12


@RULES
def test_transformers_decides_alike(rule, monkeypatch):
    """`_speculative_sampling` with its random numbers replaced by ours: it draws one sequence at a time."""
    theirs = pytest.importorskip("transformers.generation.utils")._speculative_sampling
    step = speculative.RECIPE.steps[1]
    L, Q, X, U, R = step.tensors(5, {"b": 40, "i": 4, "v": 23})
    L, Q, U, R = L.double(), Q.double(), U.double(), R.double()
    run = step.kernel.reference if rule == "reference" else step.kernel
    N, Y = run(*(t.float() if t.is_floating_point() else t for t in (L, Q, X, U, R)), heat=1.0)
    for b in range(len(L)):
        monkeypatch.setattr(torch, "rand_like", lambda like, b=b: U[b].view_as(like))

        def by_inverse(weights, num_samples, b=b):
            assert num_samples == 1
            return torch.searchsorted(weights.cumsum(-1) / weights.sum(), R[b].view(1, 1), right=True)

        monkeypatch.setattr(torch, "multinomial", by_inverse)
        tokens, matches = theirs(X[b : b + 1].long(), Q[b : b + 1].log(), X.shape[1], L[b : b + 1])
        assert int(matches) == int(N[b])
        assert tokens[0].tolist() == [*X[b, : N[b]].tolist(), int(Y[b])]
    assert len(set(N.tolist())) > 2


def alone(P, Q, X, U, R, rule):
    """N and Y of one sequence, from lists."""
    X = torch.tensor([X], dtype=torch.int32)
    N, Y = sampler(rule)(torch.tensor([P]), torch.tensor([Q]), X, torch.tensor([U]), torch.tensor([R]))
    return int(N), int(Y)


@RULES
def test_tokens_the_target_excludes_are_never_emitted(rule):
    P = [[0.5, 0.0, 0.5, 0.0], [0.0, 0.25, 0.0, 0.75]]
    Q = [[0.25, 0.75, 0.0, 0.0]]
    most = 1 - 2.0**-24
    assert alone(P, Q, [1], [most], 0.0, rule) == (0, 0)
    assert alone(P, Q, [1], [2.0**-24], most, rule) == (0, 2)  # only u = 0 accepts what has probability 0
    assert alone(P, Q, [0], [most], 0.0, rule) == (1, 1)  # the bonus skips the weights 0 in front ...
    assert alone(P, Q, [0], [most], most, rule) == (1, 3)  # ... and ends at the last that is not


@RULES
def test_equal_distributions_accept_everything(rule):
    P = torch.softmax(torch.randn(50, 4, 9, generator=torch.Generator().manual_seed(1)), -1)
    Q = P[:, :3].contiguous()
    X = speculative.draw(Q, torch.Generator().manual_seed(2))
    N, _ = sampler(rule)(P, Q, X, torch.full((50, 3), 1 - 2.0**-24), torch.rand(50))
    assert N.tolist() == [3] * 50


@RULES
def test_a_draft_stands_where_rounding_leaves_nothing_to_draw(rule):
    """p <= q everywhere can only be rounding; a rejection there must not give a token out of range."""
    assert alone([[0.5, 0.25], [0.5, 0.5]], [[0.5, 0.5]], [1], [0.75], 0.5, rule) == (0, 1)


@RULES
def test_all_uniforms_zero_emit_the_first_possible_token(rule):
    P = torch.softmax(torch.randn(6, 3, 11, generator=torch.Generator().manual_seed(3)), -1)
    Q, X = P.flip(-1)[:, :2].contiguous(), torch.zeros(6, 2, dtype=torch.int32)
    N, Y = sampler(rule)(P, Q, X, torch.zeros(6, 2), torch.zeros(6))
    assert N.tolist() == [2] * 6 and Y.tolist() == [0] * 6
