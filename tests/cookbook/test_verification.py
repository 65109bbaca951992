"""What is emitted has the target's distribution; the trees' decisions against walks from node to node."""

import re
from pathlib import Path

import einfall as ef
import pytest
import torch

from cookbook.verification import speculative, tree

RULES = pytest.mark.parametrize("rule", ["reference", "kernel"])


@pytest.fixture(autouse=True)
def no_database():
    with ef.configure(database=None):
        yield


def pick(kernel, rule):
    return kernel.reference if rule == "reference" else kernel


def sampler(rule):
    return pick(speculative.sample, rule)


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
    N, Y = pick(step.kernel, rule)(*(t.float() if t.is_floating_point() else t for t in (L, Q, X, U, R)), heat=1.0)
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


def bits(*nodes):
    return sum(1 << n for n in nodes)


@RULES
def test_paths_of_a_known_tree(rule):
    parent = torch.tensor([[-1, 0, 0, 1, 3, 2]], dtype=torch.int32)
    A, depth = pick(tree.ancestors, rule)(parent)
    assert A.tolist() == [[bits(0), bits(0, 1), bits(0, 2), bits(0, 1, 3), bits(0, 1, 3, 4), bits(0, 2, 5)]]
    assert depth.tolist() == [[0, 1, 1, 2, 3, 2]]


@RULES
def test_a_chain_of_64_nodes_sets_all_bits(rule):
    parent = torch.arange(-1, 63, dtype=torch.int32)[None]
    A, depth = pick(tree.ancestors, rule)(parent)
    assert A[0, 63] == -1 and A[0, 62] == 2**63 - 1
    assert depth[0].tolist() == list(range(64))


@RULES
def test_a_node_sees_what_plain_attention_over_its_path_sees(rule):
    step = tree.RECIPE.steps[1]
    Q, K, V, L, A = step.tensors(7, {"b": 3, "h": 2, "m": 9, "s": 20, "e": 8, "f": 5})
    found = pick(tree.attention, rule)(Q, K, V, L, A, scale=0.3)
    for b in range(3):
        for m in range(9):
            seen = [*range(int(L[b])), *(int(L[b]) + n for n in range(9) if int(A[b, m]) >> n & 1)]
            wanted = torch.nn.functional.scaled_dot_product_attention(Q[b, :, m : m + 1], K[b][:, seen], V[b][:, seen], scale=0.3)
            torch.testing.assert_close(found[b, :, m], wanted[:, 0], rtol=1e-4, atol=1e-5)


@RULES
def test_keys_behind_the_tree_are_not_read(rule):
    step = tree.RECIPE.steps[1]
    Q, K, V, L, A = step.tensors(8, {"b": 4, "h": 1, "m": 3, "s": 30, "e": 4, "f": 4})
    L[0], wanted = 0, None
    for value in (0.0, float("nan")):
        for b in range(4):
            K[b, :, L[b] + 3 :] = V[b, :, L[b] + 3 :] = value
        found = pick(tree.attention, rule)(Q, K, V, L, A, scale=1.0)
        wanted = found if wanted is None else wanted
        torch.testing.assert_close(found, wanted)


@RULES
@pytest.mark.parametrize("widths", [(1,) * 12, (2, 2, 2), (4, 3), (30,)])
def test_greedy_trees_emit_what_the_target_alone_would(rule, widths):
    """The target's next choice depends on the whole path here, not on the last token alone."""
    table = torch.randn(2003, 7, generator=torch.Generator().manual_seed(11))
    parents, children = tree.grown(widths)
    parent = torch.tensor([parents], dtype=torch.int32)

    def logits(text):
        return table[hash(tuple(text)) % 2003]

    def drafts(text, child):
        """Mostly the target's choice first, now and then another."""
        order = logits(text).argsort(descending=True)
        return int(order[(child + (sum(text) % 3 == 0)) % 7])

    text, lengths = [3], []
    while len(text) < 60:
        texts = [text]
        for m in range(1, len(parents)):
            before = texts[parents[m]]
            texts.append([*before, drafts(before, children[m])])
        Z = torch.stack([logits(t) for t in texts])[None]
        X = torch.tensor([[t[-1] for t in texts]], dtype=torch.int32)
        node, N, Y = pick(tree.greedy, rule)(Z, X, parent, pick(tree.ancestors, rule)(parent)[0])
        assert len(texts[int(node)]) == len(text) + int(N)
        text = [*texts[int(node)], int(Y)]
        lengths.append(int(N))
    wanted = [3]
    while len(wanted) < len(text):
        wanted.append(int(logits(wanted).argmax()))
    assert text == wanted
    assert max(lengths) > 0


@RULES
def test_typical_acceptance_follows_the_entropy(rule):
    """A token of 5 % stands where the target is unsure and falls where it is sure."""
    unsure, sure = torch.full((20,), 0.05), torch.tensor([0.05, 0.95, *[0.0] * 18])
    parent, X = torch.tensor([[-1, 0]], dtype=torch.int32), torch.tensor([[0, 0]], dtype=torch.int32)
    A = torch.tensor([[bits(0), bits(0, 1)]])
    for row, length in ((unsure, 1), (sure, 0)):  # thresholds: 0.3 / 20, and 0.09
        Z = row.log().expand(1, 2, 20).contiguous()
        assert pick(tree.typical, rule)(Z, X, parent, A, heat=1.0, eps=0.09, delta=0.3)[1].tolist() == [length]


@RULES
def test_an_accepted_node_below_a_rejected_one_does_not_stand(rule):
    Z = torch.zeros(1, 4, 3)
    Z[0, :, 1] = 1.0  # the target wants token 1 everywhere
    X = torch.tensor([[0, 2, 1, 1]], dtype=torch.int32)
    parent = torch.tensor([[-1, 0, 1, 0]], dtype=torch.int32)
    A = torch.tensor([[bits(0), bits(0, 1), bits(0, 1, 2), bits(0, 3)]])
    node, N, Y = pick(tree.greedy, rule)(Z, X, parent, A)
    assert (int(node), int(N), int(Y)) == (3, 1, 1)


@pytest.mark.parametrize("module", [speculative, tree], ids=lambda module: module.__name__.rpartition(".")[2])
def test_cascades_on_the_page_are_those_of_the_recipe(module):
    page = Path(module.__file__).with_suffix(".md").read_text(encoding="utf-8")
    shown = re.findall(r"```cascade\n(.*?)```", page, re.DOTALL)
    assert shown
    wide = {"greedy": {"A": ef.i64}, "typical": {"A": ef.i64}}
    texts = {str(step.kernel.trace(dtypes=wide.get(step.name))).strip() for step in module.RECIPE.steps}
    assert {text.strip() for text in shown} <= texts
