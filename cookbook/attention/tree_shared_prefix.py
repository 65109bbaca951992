"""Verifying draft trees over a shared prefix: Hydragen's sharing and SpecInfer's tree mask in one kernel (arXiv 2402.05099, 2305.09781).

Each request of a batch has a tree of m draft tokens. All of them attend to the prefix of the batch, to the suffix of their request, and
to their own ancestors in the tree. `ancestors` makes the tree's mask from the parent of each node.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])
import einfall as ef
import torch
from matplotlib.figure import Figure

from cookbook.attention.common import attend, eager, merge, moved
from cookbook.attention.hydragen import HEADS, PREFIX, SUFFIX, unshared
from cookbook.recipe import Recipe, Step, serve


@ef.kernel
def ancestors(parent: "b m", *, rounds: int = 4) -> ("b m k", "b m"):
    """Which nodes k a node sees, its ancestors and itself, and its depth. The parent of a root is negative.

    Each round squares the relation and so doubles how far up a node sees: enough for paths of 2^rounds edges.
    """
    here = ef.index("m")
    there = here.rename(m="k")

    def step(reach):
        further = (reach.rename(k="j") & reach.rename(m="j")).any("j")
        return {"reach": further}

    (reach,) = ef.iterate("i", init={"reach": (there == here) | (there == parent)}, step=step, size=rounds)
    depth = reach.sum("k") - 1
    return reach, depth


@ef.kernel
def verify(
    Q: "b m (g r) e", Kp: "s g e", Vp: "s g f", Kt: "b t g e", Vt: "b t g f", Kn: "b k g e", Vn: "b k g f", L: "b", tree: "b m k",
    *, scale: float,
) -> "b m (g r) f":  # fmt: skip
    """One softmax over the prefix, the L[b] tokens of the suffix, and those of the tree's keys that a node sees."""
    parts = ("s", "t", "k")
    K = ef.concat(Kp, Kt, Kn, rank="p", parts=parts)
    V = ef.concat(Vp, Vt, Vn, rank="p", parts=parts)
    seen = ef.concat(ef.index("s") >= 0, ef.index("t") < L, tree != 0, rank="p", parts=parts)
    S = ((Q * K).sum("e") * scale).where(seen)
    return (ef.softmax(S, "p") * V).sum("p")


@ef.kernel
def merged(
    Q: "b m (g r) e", Kp: "s g e", Vp: "s g f", Kt: "b t g e", Vt: "b t g f", Kn: "b k g e", Vn: "b k g f", L: "b", tree: "b m k",
    *, scale: float,
) -> "b m (g r) f":  # fmt: skip
    """The same as three attentions and their merge."""
    S = (Q * Kp).sum("e") * scale
    T = ((Q * Kt).sum("e") * scale).where(ef.index("t") < L)
    N = ((Q * Kn).sum("e") * scale).where(tree)
    return merge(attend(S, Vp, "s"), attend(T, Vt, "t"), attend(N, Vn, "k"))


def path(parents, node):
    """A node and its ancestors, by walking up."""
    found = []
    while node >= 0:
        found.append(node)
        node = parents[node]
    return found


def oracle_ancestors(parent, *, rounds):
    """Walks up from every node."""
    batch, nodes = parent.shape
    reach, depth = torch.zeros(batch, nodes, nodes, dtype=torch.bool), torch.zeros(batch, nodes, dtype=torch.int32)
    for b, parents in enumerate(parent.tolist()):
        for node in range(nodes):
            found = path(parents, node)
            reach[b, node, found], depth[b, node] = True, len(found) - 1
    return reach, depth


def oracle(q, kp, vp, kt, vt, kn, vn, length, tree, *, scale):
    """Copies the prefix into every request and masks one softmax over all keys."""
    batch, nodes = tree.shape[:2]
    k, v = (torch.cat([p.expand(batch, *p.shape), t, n], dim=1).transpose(1, 2) for p, t, n in ((kp, kt, kn), (vp, vt, vn)))
    in_suffix = (torch.arange(kt.shape[1]) < length[:, None])[:, None].expand(batch, nodes, -1)
    seen = torch.cat([torch.ones(batch, nodes, kp.shape[0], dtype=torch.bool), in_suffix, tree], dim=-1)
    return eager(q.transpose(1, 2), k, v, seen[:, None], scale).transpose(1, 2)


def forest(generator, batch, nodes):
    """Random parents: a node hangs from one of the nodes before it, or from none; paths of at most 16 edges."""
    parents = torch.stack([(torch.rand(batch, generator=generator) * (i + 1)).int() - 1 for i in range(nodes)], dim=1)
    _, depth = oracle_ancestors(parents, rounds=4)
    return parents.where(depth.amax(1, keepdim=True) <= 16, -1)


def trees(generator, n):
    """Random parents alone."""
    return (forest(generator, n["b"], n["m"]),)


def inputs(generator, n):
    """Normal queries, keys and values; suffixes of any length from 0; random trees."""

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    b, m, g, h, s, t, e, f = n["b"], n["m"], n["g"], n["g"] * n["r"], n["s"], n["t"], n["e"], n["f"]
    length = torch.randint(0, t + 1, (b,), generator=generator, dtype=torch.int32)
    tree, _ = oracle_ancestors(forest(generator, b, m), rounds=4)
    keys = [normal(*shape) for room in ((s,), (b, t), (b, m)) for shape in ((*room, g, e), (*room, g, f))]
    return normal(b, m, h, e), *keys, length, tree


TREE = (-1, 0, 0, 1, 1, 2, 3, 3, 5)
BATCHES = (1, 4, 16, 64)
NODES = 64


def draw(path_out: Path) -> None:
    """A tree, and what its nodes see of a prefix of 8 tokens, a suffix of 4 out of 5, and of each other."""
    tree, depth = (x[0].tolist() for x in oracle_ancestors(torch.tensor([TREE]), rounds=4))
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 2.2))
    row = {node: i for i, node in enumerate(sorted(range(len(TREE)), key=lambda node: path(TREE, node)[::-1]))}
    for node, parent in enumerate(TREE):
        if parent >= 0:
            left.plot([depth[parent], depth[node]], [row[parent], row[node]], color="#8c959f", zorder=1)
        left.scatter(depth[node], row[node], s=320, color="#0969da", zorder=2)
        left.text(depth[node], row[node], str(node), color="white", ha="center", va="center")
    left.set(xlabel="depth", xticks=range(max(depth) + 1), yticks=[], xlim=(-0.5, max(depth) + 0.5), ylim=(len(TREE) - 0.4, -0.6))
    for node, ancestry in enumerate(tree):
        seen = [(p, "#8c959f") for p in range(8)] + [(p, "#1a7f37") for p in range(8, 12)]
        seen += [(13 + i, "#0969da") for i, above in enumerate(ancestry) if above]
        for p, colour in seen:
            right.broken_barh([(p + 0.05, 0.9)], (node + 0.05, 0.9), color=colour)
    right.set(xlim=(0, 13 + len(TREE)), ylim=(len(TREE), 0), ylabel="node", yticks=[i + 0.5 for i in range(len(TREE))])
    right.set_yticklabels([str(i) for i in range(len(TREE))])
    right.set_xticks([4, 10.5, 13 + len(TREE) / 2], ["prefix, shared by the batch", "suffix", "tree"])
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(length=0)
    figure.savefig(path_out, dpi=130)


def show(out: Path) -> list[str]:
    """Draws the mask; then the bytes of keys and values of one verification, with and without sharing, by the size of the batch."""
    draw(out / "tree_shared_prefix.png")
    lines = ["| requests | copied, MB | shared, MB | less by | operations a byte, copied | shared |", "|---:|---:|---:|---:|---:|---:|"]
    for batch in BATCHES:
        step = {"b": batch, "m": NODES, **HEADS}
        _, copied, before = moved(unshared, {**step, "p": PREFIX + SUFFIX + NODES})
        _, shared, after = moved(verify, {**step, "s": PREFIX, "t": SUFFIX, "k": NODES})
        lines.append(f"| {batch} | {copied:.1f} | {shared:.1f} | {copied / shared:.1f} x | {before:.0f} | {after:.0f} |")
    return lines


COMMON = {
    "oracle": oracle,
    "inputs": inputs,
    "sizes": {"b": 3, "m": 12, "g": 2, "r": 2, "s": 96, "t": 24, "e": 32, "f": 32},
    "ranges": {"b": (1, 3), "m": (1, 13), "g": (1, 3), "r": (1, 3), "s": (1, 23), "t": (1, 11), "e": (1, 17), "f": (1, 17)},
    "scalars": {"scale": 0.2},
}

RECIPE = Recipe(
    name="tree_shared_prefix",
    title="Draft trees verified over a prefix that the batch shares",
    source="Hydragen, arXiv 2402.05099, and SpecInfer, arXiv 2305.09781 (tree attention), composed",
    steps=(
        Step(
            name="ancestors",
            kernel=ancestors,
            oracle=oracle_ancestors,
            inputs=trees,
            sizes={"b": 3, "m": 12},
            ranges={"b": (1, 5), "m": (1, 40)},
            static={"rounds": 4},
            exact=True,
        ),
        Step(name="verify", kernel=verify, **COMMON),
        Step(name="merged", kernel=merged, **COMMON),
    ),
    show=show,
)

if __name__ == "__main__":
    serve(RECIPE)
