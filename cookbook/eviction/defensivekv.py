"""DefensiveKV: a token is worth what the most interested query and head give it, times what it can change (arXiv 2510.13334)."""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import math

import einfall as ef
import torch

from cookbook.eviction import common, snapkv
from cookbook.eviction.h2o import keep as keep_heavy
from cookbook.recipe import Recipe, Step, serve


@ef.kernel
def score(Q: "b (g r) w e", K: "b g p e", V: "b g p f", W: "(g r) f d", *, pool: int = 5) -> ("b g p", "b g p"):
    """The defensive score S, and the mean attention A, which sums to 1, of the tokens before the window. W: the output projection."""
    older = ef.index("p") < ef.extent("p") - ef.extent("w")
    a = ef.where(older, common.last_queries(Q, K, "w"), 0.0)
    X = common.pooled(a, pool).where(older)
    total, smooth = a.sum("p"), X.sum("p")
    worst = (X * ef.where(smooth > 0.0, total / smooth, 0.0)).max("r w")  # pooling moves attention, but loses none of a query's
    floored = ef.maximum(worst, worst.mean("p"))
    change = ef.abs((V * W).sum("f")).sum("d r") / ef.extent("r")
    S = floored * change / change.sum("g")
    seen = a.sum("r w")
    A = seen / seen.sum("p")
    return S, ef.where(older, A, 0.0)


@ef.kernel
def keep(
    S: "b g p", A: "b g p", K: "b g p e", V: "b g p f", *, reach: float = 0.9, budget: int = 64, window: int = 32
) -> ("b g s e", "b g s f", "b g s"):
    """The window, the tokens with most attention until they have `reach` of it, and for what is left of the budget the highest scores."""
    _, C = A.mass("p", reach, into="c")
    first = ef.where(C >= 0, 1.0, 0.0).where(ef.index("c") < budget - window)
    critical = first.scatter_add(c=C, into="p") > 0.0
    I = common.keep(ef.where(critical, math.inf, S), budget, window)
    Ks, Vs = K.at(p=I), V.at(p=I)
    return Ks, Vs, I


# --- the oracle: as in the authors' code ------------------------------------------------------------------------------------------------
def score_oracle(q, k, v, w, pool):
    batch, heads, window, width = q.shape
    held, tokens = k.shape[1], k.shape[2]
    groups, older = heads // held, tokens - window
    if older <= 0:
        return tuple(torch.zeros(2, batch, held, tokens, dtype=q.dtype))
    mask = torch.full((window, tokens), -torch.inf, dtype=q.dtype).triu(tokens - window + 1)
    weights = torch.softmax(q @ k.repeat_interleave(groups, dim=1).mT / width**0.5 + mask, -1)[..., :older]
    average = weights.view(batch, held, groups, window, older).mean(dim=(2, 3))
    smooth = torch.nn.functional.avg_pool1d(weights.flatten(0, 1), kernel_size=pool, padding=pool // 2, stride=1).view_as(weights)
    smooth = smooth / smooth.sum(-1, keepdim=True) * weights.sum(-1, keepdim=True)
    worst = smooth.view(batch, held, groups * window, older).max(dim=2).values
    worst = torch.maximum(worst, worst.mean(dim=-1, keepdim=True))
    projected = v.repeat_interleave(groups, dim=1)[:, :, :older] @ w
    norm = torch.linalg.vector_norm(projected, ord=1, dim=-1).view(batch, held, groups, older).mean(2)
    defended = worst * norm / norm.sum(1, keepdim=True)
    return tuple(torch.nn.functional.pad(x, (0, window)) for x in (defended, average / average.sum(-1, keepdim=True)))


def keep_oracle(score, attention, k, v, reach, budget, window):
    older = score.shape[-1] - window
    kept = []
    for one, drawn in zip(score.flatten(0, 1), attention.flatten(0, 1), strict=True):
        order = drawn[:older].argsort(descending=True)
        enough = int((drawn[order].cumsum(0) < reach).sum()) + 1
        critical = order[: min(enough, budget - window, older)].sort().values.tolist()
        rest = [i for i in one[:older].argsort(descending=True).tolist() if i not in critical]
        kept.append([*critical, *range(older, score.shape[-1]), *rest[: budget - window - len(critical)]])
    chosen = torch.tensor(kept).view(*score.shape[:2], budget)
    keys, values = (x.gather(2, chosen[..., None].expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    return keys, values, chosen.int()


# --- inputs and figure ----------------------------------------------------------------------------------------------------------------
def prompt(g, n):
    projection = torch.randn(n["g"] * n["r"], n["f"], n["d"], generator=g)
    return *common.window(g, n), projection


def scored(g, n):
    """Scores and attention as of a window of 7, without ties, and a cache."""
    older = torch.arange(n["p"]) < n["p"] - 7
    S, A = ((torch.rand(2, n["b"], n["g"], n["p"], generator=g).argsort(-1) + 1.0) / n["p"]).square() * older
    cache = (torch.randn(n["b"], n["g"], n["p"], n[rank], generator=g) for rank in "ef")
    return S, A / A.sum(-1, keepdim=True), *cache


def show(folder):
    n = {**RECIPE.steps[0].sizes, "b": 1, "g": 2, "p": 512, "w": 32, "f": 64}
    Q, K, V, W = prompt(torch.Generator().manual_seed(0), n)
    Q[:, :, 5] = 4.0 * K[:, :, 90].repeat_interleave(n["r"], dim=1)  # one query of the window wants one old token
    votes, (S, A) = snapkv.score(Q, K), score(Q, K, V, W)
    wish = Q.unflatten(1, (n["g"], n["r"]))[..., 5, :]
    later = Q.unflatten(1, (n["g"], n["r"]))[..., -1, :]
    lines = ["| budget | kept by mass alone | query 5: mean | query 5: defended | last query: mean | last query: defended |"]
    lines.append("|---|---|---|---|---|---|")
    for budget in (48, 64, 128):
        mean, I = keep_heavy(votes, K, V, budget=budget, window=n["w"])[3], keep(S, A, K, V, budget=budget)[2]
        alone = [min(int((row.sort(descending=True).values.cumsum(0) < 0.9).sum()) + 1, budget - n["w"]) for row in A[0]]
        drawn = (common.drawn(q, K, kept) for q in (wish, later) for kept in (mean, I))
        lines.append(f"| {budget} | {' and '.join(map(str, alone))} | " + " | ".join(f"{x:.1%}" for x in drawn) + " |")
    rows = []
    for name, x, kept in (("mean", votes, keep_heavy(votes, K, V, window=n["w"])[3]), ("defended", S, keep(S, A, K, V)[2])):
        rows.append((name, x[0, 0].where(x[0, 0] > 0, torch.nan), kept[0, 0]))
    common.draw(folder / "defensivekv.png", "The mean of the votes, and the defended score; the 64 tokens kept (first head)", rows)
    return lines


RECIPE = Recipe(
    name="defensivekv",
    title="DefensiveKV: the largest vote floored by the mean, times the norm of the projected value; most of the attention is kept first",
    source="2510.13334, read from the authors' code (FFY0/DefensiveKV); what differs is said on the page",
    steps=(
        Step(
            name="score",
            kernel=score,
            oracle=score_oracle,
            inputs=prompt,
            sizes={"b": 1, "g": 4, "r": 2, "w": 32, "p": 512, "e": 64, "f": 64, "d": 512},
            ranges={"b": (1, 2), "g": (1, 3), "r": (1, 3), "w": (1, 37), "p": (1, 101), "e": (1, 33), "f": (1, 19), "d": (1, 43)},
            static={"pool": 5},
        ),
        Step(
            name="keep",
            kernel=keep,
            oracle=keep_oracle,
            inputs=scored,
            sizes={"b": 1, "g": 4, "p": 256, "e": 64, "f": 64},
            ranges={"b": (1, 2), "g": (1, 3), "p": (24, 101), "e": (1, 33), "f": (1, 19)},
            scalars={"reach": 0.5},
            static={"budget": 24, "window": 7},
            exact=True,
        ),
    ),
    show=show,
)

if __name__ == "__main__":
    serve(RECIPE)
