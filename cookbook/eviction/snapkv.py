"""SnapKV: the last queries of a prompt vote for the tokens before them; votes are pooled over neighbours (arXiv 2404.14469)."""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import einfall as ef
import torch

from cookbook.eviction import common
from cookbook.recipe import Recipe, Step, serve


def votes(Q, K, pool):
    """What the window's queries and the group's heads give a token on the average, smoothed; the window's own tokens get none."""
    older = ef.index("p") < ef.extent("p") - ef.extent("w")
    A = common.last_queries(Q, K, "w")
    C = A.sum("r w") / (ef.extent("r") * ef.extent("w"))
    return ef.where(older, common.pooled(ef.where(older, C, 0.0), pool), 0.0)


@ef.kernel
def score(Q: "b (g r) w e", K: "b g p e", *, pool: int = 5) -> "b g p":
    """The votes alone. Q: the queries of the window, the last w tokens of the p."""
    return votes(Q, K, pool)


@ef.kernel
def snapkv(Q: "b (g r) w e", K: "b g p e", V: "b g p f", *, pool: int = 5, budget: int = 64) -> ("b g s e", "b g s f", "b g s"):
    """The cache after the prompt: the window, and the tokens with most votes."""
    S = votes(Q, K, pool)
    I = common.keep(S, budget, ef.extent("w"))
    Ks, Vs = K.at(p=I), V.at(p=I)
    return Ks, Vs, I


# --- the oracle: Listing 1 of the paper, with the mean over the group ------------------------------------------------------------------
def score_oracle(q, k, pool):
    batch, heads, window, width = q.shape
    held, tokens = k.shape[1], k.shape[2]
    logits = q @ k.repeat_interleave(heads // held, dim=1).transpose(2, 3) / width**0.5
    mask = torch.full((window, tokens), -torch.inf, dtype=q.dtype).triu(tokens - window + 1)
    weights = torch.softmax(logits + mask, dim=-1).nan_to_num(0.0)  # a window longer than the prompt has rows without any key
    result = torch.zeros(batch, held, tokens, dtype=q.dtype)
    older = tokens - window
    if older > 0:
        mean = weights[..., :older].mean(dim=-2)
        smooth = torch.nn.functional.avg_pool1d(mean, kernel_size=pool, padding=pool // 2, stride=1)
        result[..., :older] = smooth.view(batch, held, heads // held, older).mean(2)
    return result


def snapkv_oracle(q, k, v, pool, budget):
    window, tokens = q.shape[2], k.shape[2]
    older = tokens - window
    heavy = score_oracle(q, k, pool)[..., :older].topk(budget - window, dim=-1).indices
    chosen = torch.cat([torch.arange(older, tokens).expand(*heavy.shape[:2], window), heavy], dim=-1)
    pick = chosen.unsqueeze(-1)
    keys, values = (x.gather(2, pick.expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    return keys, values, chosen.int()


# --- inputs and figure ----------------------------------------------------------------------------------------------------------------
def show(folder):
    n = {**RECIPE.steps[0].sizes, "b": 1, "g": 2, "p": 512, "w": 32, "f": 64}
    Q, K, V = common.window(torch.Generator().manual_seed(0), n)
    later = Q.unflatten(1, (n["g"], n["r"]))[..., -1, :]
    lines = ["| pooled over | budget | runs of neighbours kept | error of the next output |", "|---|---|---|---|"]
    for pool in (1, 5, 9):
        for budget in (64, 128):
            *_, I = snapkv(Q, K, V, pool=pool, budget=budget)
            runs = [int((row.sort().values.diff() > 1).sum()) + 1 for row in I[0]]
            lines.append(f"| {pool} | {budget} | {' and '.join(map(str, runs))} | {common.lost(later, K, V, I):.3f} |")
    rows = []
    for pool in (1, 5):
        S, (*_, I) = score(Q, K, pool=pool), snapkv(Q, K, V, pool=pool, budget=96)
        rows.append((f"pooled over {pool}", S[0, 0].where(S[0, 0] > 0, torch.nan), I[0, 0]))
    common.draw(folder / "snapkv.png", "SnapKV: votes of the last 32 queries, and the 96 tokens kept (first head)", rows)
    return lines


RECIPE = Recipe(
    name="snapkv",
    title="SnapKV: the last queries of a prompt vote, votes are pooled over neighbours, and the cache is cut once",
    source="2404.14469, Listing 1; the mean over the query heads of a group as in kvpress (FasterDecoding/SnapKV issue 22)",
    steps=(
        Step(
            name="score",
            kernel=score,
            oracle=score_oracle,
            **common.SCORED,
            static={"pool": 5},
        ),
        Step(
            name="snapkv",
            kernel=snapkv,
            oracle=snapkv_oracle,
            inputs=common.without_ties(common.window, lambda q, k, v: score_oracle(q, k, 3)[..., : k.shape[2] - q.shape[2]], top=31),
            sizes={"b": 1, "g": 4, "r": 2, "w": 16, "p": 256, "e": 64, "f": 64},
            ranges={"b": (1, 2), "g": (1, 3), "r": (1, 3), "w": (1, 17), "p": (31, 101), "e": (7, 33), "f": (1, 19)},
            static={"pool": 3, "budget": 31},
            exact=True,
        ),
    ),
    show=show,
)

if __name__ == "__main__":
    serve(RECIPE)
