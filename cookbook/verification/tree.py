"""Verification of a tree of drafts: the mask of ancestors as bits, attention under it, and the longest path that is accepted.

Node 0 is the last token that is certain; every other node continues its parent. All nodes go through the target model at once: a node
attends to the cache and to its own ancestors. A node stands if every node of its path is accepted, and the deepest such node wins.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])
import einfall as ef
import torch

from cookbook.recipe import Recipe, Step, serve

NODES = 64  # a path is a set of bits


def bit(n):
    """The number whose only bit is n."""
    return (n * 0 + 1).to(ef.i64) << n.to(ef.i64)


@ef.kernel
def ancestors(parent: "b m") -> ("b m", "b m"):
    """The path A of each node, bit n for node n, itself included, and its depth. Five doublings reach over 64 levels."""

    def double(A, J):
        """A is the path over so many levels, J the node so many levels up: twice as many."""
        return {"A": A | A.at(m=J), "J": J.at(m=J)}

    up = ef.maximum(parent, 0)  # the root is its own parent
    A, _ = ef.iterate("level", init={"A": bit(up) | bit(ef.index("m")), "J": up.at(m=up)}, step=double, size=5)
    depth = ef.popcount(A) - 1
    return A, depth


@ef.kernel
def attention(Q: "b h m e", K: "b h p e", V: "b h p f", L: "b", A: "b m", *, scale: float) -> "b h m f":
    """Sequence b has L[b] tokens in the cache; behind them lie the keys of its tree's nodes, in their order."""
    node = ef.index("p") - L
    ancestor = (A >> ef.minimum(ef.maximum(node, 0), NODES - 1).to(ef.i64)) & 1
    there = ef.index("p") < L + ef.extent("m")  # the same for all nodes: what lies behind is not even read
    S = ((Q * K).sum("e") * scale).where(there).where((node < 0) | (ancestor == 1))
    return (ef.softmax(S, over="p") * V).sum("p")


def longest(accepted, A, best):
    """The deepest node all of whose path is accepted, how many drafts that are, and the target's choice after it."""
    path = (A & ~(accepted.to(ef.i64) << ef.index("m").to(ef.i64)).sum("m")) == 0
    reach = ef.where(path, ef.popcount(A) - 1, -1)
    node = reach.argmax("m")
    return node, reach.max("m"), best.at(m=node)


@ef.kernel
def greedy(Z: "b m v", X: "b m", parent: "b m", A: "b m") -> ("b", "b", "b"):
    """A node is accepted if its token X is the target's first choice at its parent; Z are the logits after each node."""
    best = Z.argmax("v")
    accepted = (parent < 0) | (best.at(m=ef.maximum(parent, 0)) == X)
    node, N, Y = longest(accepted, A, best)
    return node, N, Y


@ef.kernel
def typical(Z: "b m v", X: "b m", parent: "b m", A: "b m", *, heat: float, eps: float, delta: float) -> ("b", "b", "b"):
    """A node is accepted if p(X) > min(eps, delta exp(-H)), p the target's distribution at its parent and H its entropy."""
    S = Z * heat
    M = S.max("v")
    N = ef.exp(S - M)
    D = N.sum("v")
    H = M + ef.log(D) - (N * ef.where(ef.isinf(S), 0.0, S)).sum("v") / D
    least = ef.minimum(eps, delta * ef.exp(-H))
    up = ef.maximum(parent, 0)
    accepted = (parent < 0) | (ef.exp(S.at(m=up, v=X) - M.at(m=up)) / D.at(m=up) > least.at(m=up))
    node, N, Y = longest(accepted, A, Z.argmax("v"))
    return node, N, Y


def walk(parent, m):
    """The nodes from m to the root."""
    path = [m]
    while parent[path[-1]] >= 0:
        path.append(parent[path[-1]])
    return path


def walked(parent):
    """The paths of a batch as bits, and the depths, by walking."""
    paths = [[walk(row, m) for m in range(len(row))] for row in parent.tolist()]
    bits = [[sum(1 << n for n in path) for path in row] for row in paths]
    signed = [[x - 2**64 if x >= 2**63 else x for x in row] for row in bits]
    depths = [[len(path) - 1 for path in row] for row in paths]
    return torch.tensor(signed, dtype=torch.int64), torch.tensor(depths, dtype=torch.int32)


def masked_attention(Q, K, V, L, A, scale):
    """Attention with the whole mask [m, p] of each sequence written out from the bits."""
    results = []
    for q, k, v, length, paths in zip(Q, K, V, L.tolist(), A.tolist(), strict=True):
        mask = torch.zeros(q.shape[1], k.shape[1], dtype=torch.bool)
        mask[:, :length] = True
        for m, path in enumerate(paths):
            for n in range(len(paths)):
                mask[m, length + n] = bool(path >> n & 1)
        results.append(torch.softmax((q @ k.mT * scale).masked_fill(~mask, float("-inf")), -1) @ v)
    return torch.stack(results)


def longest_walk(parent, stands, best):
    """Of each sequence the deepest node whose walk to the root meets standing nodes alone, its depth and `best` there; ties: the first."""
    found = []
    for row, good, choice in zip(parent.tolist(), stands, best.tolist(), strict=True):
        depths = [len(walk(row, m)) - 1 if all(good(n) for n in walk(row, m)) else -1 for m in range(len(row))]
        node = depths.index(max(depths))
        found.append((node, depths[node], choice[node]))
    return tuple(torch.tensor(list(column), dtype=torch.int32) for column in zip(*found, strict=True))


def greedy_walk(Z, X, parent, A):
    best = Z.argmax(-1)
    stands = [lambda n, b=b: parent[b, n] < 0 or best[b, parent[b, n]] == X[b, n] for b in range(len(Z))]
    return longest_walk(parent, stands, best)


def typical_walk(Z, X, parent, A, heat, eps, delta):
    target = torch.distributions.Categorical(logits=Z * heat)
    least = torch.clamp(delta * torch.exp(-target.entropy()), max=eps)

    def standing(b):
        return lambda n: parent[b, n] < 0 or target.probs[b, parent[b, n], X[b, n]] > least[b, parent[b, n]]

    return longest_walk(parent, [standing(b) for b in range(len(Z))], Z.argmax(-1))


def random_trees(generator, b, m):
    """Parents [b, m]: node 0 is the root, every other continues an earlier one."""
    share = torch.rand(b, m, generator=generator)
    return (share * torch.arange(m)).floor().to(torch.int32) - (torch.arange(m) == 0).to(torch.int32)


def trees(generator: torch.Generator, sizes: Mapping[str, int]):
    return (random_trees(generator, sizes["b"], sizes["m"]),)


def queries(generator: torch.Generator, sizes: Mapping[str, int]):
    """A cache of 0 to p - m tokens a sequence, and behind them the tree; what lies behind that belongs to nobody."""
    b, h, m, e, f = (sizes[r] for r in "bhmef")
    p = sizes["s"] + m
    Q, K, V = (torch.randn(b, h, n, w, generator=generator) for n, w in ((m, e), (p, e), (p, f)))
    L = torch.randint(0, sizes["s"] + 1, (b,), generator=generator, dtype=torch.int32)
    return Q, K, V, L, walked(random_trees(generator, b, m))[0]


def choices(generator: torch.Generator, sizes: Mapping[str, int]):
    """Nodes that mostly hold the first choice at their parents."""
    b, m, v = (sizes[r] for r in "bmv")
    parent = random_trees(generator, b, m)
    Z = torch.randn(b, m, v, generator=generator)
    first = Z.argmax(-1).gather(1, parent.clamp(min=0).long())
    other = torch.randint(0, v, (b, m), generator=generator)
    X = torch.where(torch.rand(b, m, generator=generator) < 0.7, first, other).to(torch.int32)
    return Z, X, parent, walked(parent)[0]


def samples(generator: torch.Generator, sizes: Mapping[str, int]):
    """Nodes drawn from the target, away from where a last bit would decide."""
    Z, X, parent, A = choices(generator, sizes)
    target = torch.distributions.Categorical(logits=3 * Z.double())
    rows = torch.arange(len(Z))[:, None], parent.clamp(min=0).long()
    logs = target.logits[rows]
    least = torch.clamp(DELTA * torch.exp(-target.entropy()), max=EPS).log()[rows]
    drawn = torch.multinomial(logs.exp().flatten(0, 1), 4, replacement=True, generator=generator).view(*X.shape, 4)
    distance = (logs.gather(-1, drawn) - least[..., None]).abs()
    X = drawn.gather(-1, distance.argmax(-1, keepdim=True))[..., 0].to(torch.int32)
    return Z, X, parent, A


EPS, DELTA = 0.09, 0.3  # of the released Medusa models: delta is the root of eps


def grown(widths):
    """A tree of which every node of a level has as many children as `widths` says: parents, and for each node which child it is."""
    parents, children, level = [-1], [0], [0]
    for width in widths:
        below = []
        for node in level:
            below += range(len(parents), len(parents) + width)
            parents += [node] * width
            children += range(width)
        level = below
    return parents, children


def speculate(widths, step, count, seed):
    """Trees of a draft that is a noisy copy of the target, a Markov chain over 32 tokens: the drafts accepted in each of `count` calls."""
    generator = torch.Generator().manual_seed(seed)
    target = 2 * torch.randn(32, 32, generator=generator)
    likely = (target + torch.randn(32, 32, generator=generator)).argsort(-1, descending=True)
    parents, children = grown(widths)
    X = torch.empty(count, len(parents), dtype=torch.int64)
    X[:, 0] = torch.randint(0, 32, (count,), generator=generator)
    for m in range(1, len(parents)):
        X[:, m] = likely[X[:, parents[m]], children[m]]
    parent = torch.tensor(parents, dtype=torch.int32).expand(count, -1).contiguous()
    return step.kernel(target[X], X.to(torch.int32), parent, ancestors(parent)[0], **step.arguments())[1]


def show(folder: Path) -> Sequence[str]:
    """The table: drafts accepted a call for trees of 15 and 16 nodes under both rules."""
    lines = ["| children of a node, level by level | nodes | greedy: accepted a call | typical: accepted a call |", "|---|---|---|---|"]
    for widths in ((1,) * 15, (2, 2, 2), (3, 2, 1), (5, 2), (15,)):
        means = (float(speculate(widths, step, 2000, 0).double().mean()) for step in RECIPE.steps[2:])
        lines.append(f"| {' '.join(map(str, widths))} | {len(grown(widths)[0])} | " + " | ".join(f"{mean:.2f}" for mean in means) + " |")
    return lines


RECIPE = Recipe(
    name="tree",
    title="Verification of a tree of drafts: ancestors, attention, the longest accepted path",
    source="Miao et al.: SpecInfer (arXiv 2305.09781), token tree verification; Cai et al.: Medusa (arXiv 2401.10774), typical acceptance.",
    steps=(
        Step("ancestors", ancestors, walked, trees, {"b": 8, "m": 64}, {"b": (1, 4), "m": (1, 64)}, exact=True),
        Step("attention", attention, masked_attention, queries, {"b": 2, "h": 4, "m": 31, "s": 512, "e": 64, "f": 64},
             {"b": (1, 3), "h": (1, 3), "m": (1, 64), "s": (0, 67), "e": (1, 17), "f": (1, 13)}, scalars={"scale": 0.125}),
        Step("greedy", greedy, greedy_walk, choices, {"b": 4, "m": 31, "v": 8000}, {"b": (1, 4), "m": (1, 64), "v": (1, 37)}, exact=True),
        Step("typical", typical, typical_walk, samples, {"b": 4, "m": 31, "v": 8000}, {"b": (1, 4), "m": (1, 64), "v": (1, 37)},
             scalars={"heat": 3.0, "eps": EPS, "delta": DELTA}, exact=True),
    ),
    show=show,
)  # fmt: skip

if __name__ == "__main__":
    serve(RECIPE)
