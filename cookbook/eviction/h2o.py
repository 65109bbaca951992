"""H2O: the tokens that drew most attention so far stay in the cache, together with the most recent ones (arXiv 2306.14048)."""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import einfall as ef
import torch

from cookbook.eviction import common
from cookbook.recipe import Recipe, Step, serve


@ef.kernel
def scored_attention(Q: "b (g r) m e", K: "b g p e", V: "b g p f") -> ("b (g r) m f", "b g p"):
    """Causal attention of the last m tokens, and what attention each cached token received from them: the column sums."""
    A = common.last_queries(Q, K, "m")
    O = (A * V).sum("p")
    S = A.sum("r m")
    return O, S


@ef.kernel
def keep(S: "b g p", K: "b g p e", V: "b g p f", *, budget: int = 64, window: int = 16) -> ("b g s e", "b g s f", "b g s", "b g s"):
    """The cache cut to `budget` tokens, with their scores, to which later queries add, and their places."""
    I = common.keep(S, budget, window)
    Ks, Vs, Ss = K.at(p=I), V.at(p=I), S.at(p=I)
    return Ks, Vs, Ss, I


# --- the oracle: Algorithm 1 of the paper, for a prompt at once -----------------------------------------------------------------------
def scored_attention_oracle(q, k, v):
    batch, heads, queries, width = q.shape
    held, tokens = k.shape[1], k.shape[2]
    k, v = (x.repeat_interleave(heads // held, dim=1) for x in (k, v))
    mask = torch.ones(queries, tokens, dtype=torch.bool).tril(tokens - queries)
    logits = (q @ k.transpose(-1, -2) / width**0.5).masked_fill(~mask, -torch.inf)
    weights = torch.softmax(logits, dim=-1).nan_to_num(0.0)  # a row without any key
    return weights @ v, weights.sum(-2).view(batch, held, heads // held, tokens).sum(2)


def keep_oracle(score, k, v, budget, window):
    batch, heads, tokens = score.shape
    recent = torch.arange(tokens - window, tokens).expand(batch, heads, window)
    heavy = score[..., : tokens - window].topk(budget - window, dim=-1).indices
    chosen = torch.cat([recent, heavy], -1)
    row, head = torch.arange(batch)[:, None, None], torch.arange(heads)[None, :, None]
    return k[row, head, chosen], v[row, head, chosen], score[row, head, chosen], chosen.int()


# --- inputs and figure ----------------------------------------------------------------------------------------------------------------
def prompt(g, n):
    return common.prompt(g, n, "m")


def scores(g, n):
    """Scores without ties, and a cache."""
    order = torch.rand(n["b"], n["g"], n["p"], generator=g).argsort(-1)
    cache = (torch.randn(n["b"], n["g"], n["p"], n[rank], generator=g) for rank in "ef")
    return ((order + 1.0) / n["p"], *cache)


def show(folder):
    n = {**RECIPE.steps[0].sizes, "b": 1, "g": 2, "m": 512, "p": 512}
    Q, K, V = prompt(torch.Generator().manual_seed(0), n)
    _, S = scored_attention(Q, K, V)
    later = Q.unflatten(1, (n["g"], n["r"]))[..., -1, :]
    lines = ["| budget | attention kept | error of the next output | error with as many recent tokens |", "|---|---|---|---|"]
    for budget in (32, 64, 128, 256):
        *_, held, I = keep(S, K, V, budget=budget)
        recent = torch.arange(n["p"] - budget, n["p"]).expand_as(I)
        errors = (common.lost(later, K, V, kept) for kept in (I, recent))
        lines.append("| " + " | ".join([str(budget), f"{float(held.sum() / S.sum()):.0%}", *(f"{e:.3f}" for e in errors)]) + " |")
    *_, I = keep(S, K, V, budget=64)
    common.draw(folder / "h2o.png", "H2O: attention received, and the 64 tokens kept", [(f"head {h}", S[0, h], I[0, h]) for h in range(2)])
    return lines


RECIPE = Recipe(
    name="h2o",
    title="H2O: attention that also sums what each token received, and a cache cut to the heavy hitters and the recent tokens",
    source="2306.14048, Algorithm 1 (the sum over the queries, top-(B-W) of the older tokens, the last W); read from the authors' code",
    steps=(
        Step(
            name="scored attention",
            kernel=scored_attention,
            oracle=scored_attention_oracle,
            inputs=prompt,
            sizes={"b": 1, "g": 4, "r": 2, "m": 256, "p": 256, "e": 64, "f": 64},
            ranges={"b": (1, 2), "g": (1, 3), "r": (1, 3), "m": (1, 67), "p": (1, 131), "e": (1, 33), "f": (1, 19)},
        ),
        Step(
            name="keep",
            kernel=keep,
            oracle=keep_oracle,
            inputs=scores,
            sizes={"b": 1, "g": 4, "p": 256, "e": 64, "f": 64},
            ranges={"b": (1, 2), "g": (1, 3), "p": (24, 131), "e": (1, 33), "f": (1, 19)},
            static={"budget": 24, "window": 7},
            exact=True,
        ),
    ),
    show=show,
)

if __name__ == "__main__":
    serve(RECIPE)
