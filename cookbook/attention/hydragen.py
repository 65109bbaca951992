"""Hydragen: a batch of requests attends to one shared prefix and each to a suffix of its own (arXiv 2402.05099).

The prefix has no batch rank. That is all that has to be said: its keys and values are one tensor, read once for the queries of the whole
batch. `hydragen` says what is computed, one softmax over both parts; `decomposed` is how the paper does it, two attentions and their merge.
"""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])
import einfall as ef
import torch

from cookbook.attention.common import attend, eager, merge, moved
from cookbook.recipe import Recipe, Step, serve


@ef.kernel
def hydragen(Q: "b m (g r) e", Kp: "s g e", Vp: "s g f", Kt: "b t g e", Vt: "b t g f", L: "b", *, scale: float) -> "b m (g r) f":
    """Attention over prefix and suffix, one softmax. The m new tokens of a request, causal, follow L earlier ones in its suffix."""
    K = ef.concat(Kp, Kt, rank="p", parts=("s", "t"))
    V = ef.concat(Vp, Vt, rank="p", parts=("s", "t"))
    seen = ef.concat(ef.index("s") >= 0, ef.index("t") <= L + ef.index("m"), rank="p", parts=("s", "t"))
    S = ((Q * K).sum("e") * scale).where(seen)
    return (ef.softmax(S, "p") * V).sum("p")


@ef.kernel
def decomposed(Q: "b m (g r) e", Kp: "s g e", Vp: "s g f", Kt: "b t g e", Vt: "b t g f", L: "b", *, scale: float) -> "b m (g r) f":
    """The same as attention over the prefix and attention over the suffix, merged by their maxima and sums."""
    seen = ef.index("t") <= L + ef.index("m")
    S = (Q * Kp).sum("e") * scale
    T = ((Q * Kt).sum("e") * scale).where(seen)
    return merge(attend(S, Vp, "s"), attend(T, Vt, "t"))


@ef.kernel
def unshared(Q: "b m (g r) e", K: "b p g e", V: "b p g f", L: "b", *, scale: float) -> "b m (g r) f":
    """What is run without sharing: every request has a copy of the prefix in front of its suffix."""
    seen = ef.index("p") <= L + ef.index("m")
    S = ((Q * K).sum("e") * scale).where(seen)
    return (ef.softmax(S, "p") * V).sum("p")


def oracle(q, kp, vp, kt, vt, length, *, scale):
    """Copies the prefix into every request and masks one softmax over all of its keys."""
    batch, queries, prefix, suffix = q.shape[0], q.shape[1], kp.shape[0], kt.shape[1]
    k = torch.cat([kp.expand(batch, *kp.shape), kt], dim=1)
    v = torch.cat([vp.expand(batch, *vp.shape), vt], dim=1)
    own = length.long()[:, None] + torch.arange(queries)  # the place of each query in the suffix
    in_suffix = torch.arange(suffix) <= own[..., None]
    seen = torch.cat([torch.ones(batch, queries, prefix, dtype=torch.bool), in_suffix], dim=-1)
    out = eager(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), seen[:, None], scale)
    return out.transpose(1, 2)


def inputs(generator, n):
    """Normal queries, keys and values; before the new tokens, suffixes of any length from 0 that leaves them room."""

    def normal(*shape):
        return torch.randn(shape, generator=generator)

    b, m, g, h, s, t, e, f = n["b"], n["m"], n["g"], n["g"] * n["r"], n["s"], n["t"], n["e"], n["f"]
    length = torch.randint(0, max(t - m, 0) + 1, (b,), generator=generator, dtype=torch.int32)
    return normal(b, m, h, e), normal(s, g, e), normal(s, g, f), normal(b, t, g, e), normal(b, t, g, f), length


BATCHES = (1, 4, 16, 64, 256)
HEADS = {"g": 8, "r": 4, "e": 128, "f": 128}
PREFIX, SUFFIX = 4096, 256


def show(out: Path) -> list[str]:
    """Bytes of keys and values that a decode step moves, with and without sharing, by the size of the batch."""
    lines = [
        "| requests | copied, MB | shared, MB | less by | as planned: `hydragen` | `decomposed` | operations a byte, copied | shared |",
        "|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for batch in BATCHES:
        step = {"b": batch, "m": 1, **HEADS}
        copied, _, before = moved(unshared, {**step, "p": PREFIX + SUFFIX})
        shared, one, after = moved(hydragen, {**step, "s": PREFIX, "t": SUFFIX})
        _, two, _ = moved(decomposed, {**step, "s": PREFIX, "t": SUFFIX})
        lines.append(
            f"| {batch} | {copied:.1f} | {shared:.1f} | {copied / shared:.1f} x | {one:.1f} | {two:.1f} | {before:.1f} | {after:.1f} |"
        )
    return lines


COMMON = {
    "oracle": oracle,
    "inputs": inputs,
    "sizes": {"b": 4, "m": 2, "g": 2, "r": 3, "s": 96, "t": 24, "e": 32, "f": 32},
    "ranges": {"b": (1, 5), "m": (1, 5), "g": (1, 3), "r": (1, 4), "s": (1, 37), "t": (1, 19), "e": (1, 17), "f": (1, 17)},
    "scalars": {"scale": 0.2},
}

RECIPE = Recipe(
    name="hydragen",
    title="Hydragen: attention over a shared prefix and own suffixes",
    source="Hydragen: High-Throughput LLM Inference with Shared Prefixes, arXiv 2402.05099; checked against its public implementation",
    steps=(Step(name="hydragen", kernel=hydragen, **COMMON), Step(name="decomposed", kernel=decomposed, **COMMON)),
    show=show,
)

if __name__ == "__main__":
    serve(RECIPE)
