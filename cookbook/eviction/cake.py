"""CAKE: tokens scored by mean and variance of the attention they draw, layers by its entropy and variance (arXiv 2503.12491)."""

import sys
from pathlib import Path

if not __package__:  # run as a script: the folder above holds the package `cookbook`
    sys.path[0] = str(Path(__file__).resolve().parents[2])

import einfall as ef
import torch

from cookbook.eviction import common
from cookbook.eviction.h2o import keep
from cookbook.recipe import Recipe, Step, serve


@ef.kernel
def window(Q: "b (g r) w e", K: "b g p e", *, gamma: float, pool: int = 5) -> ("b g p", "b", "b"):
    """The scores S of the tokens before the window, and of the layer how its attention spreads, H, and how it changes, V."""
    older = ef.index("p") < ef.extent("p") - ef.extent("w")
    A = common.last_queries(Q, K, "w").where(older)
    mean = A.sum("w") / ef.extent("w")
    C = A - mean
    var = (C * C).sum("w") / ef.maximum(ef.extent("w") - 1, 1)
    S = common.pooled(ef.where(older, (mean + gamma * var).sum("r") / ef.extent("r"), 0.0), pool)
    S = ef.where(older, S, 0.0)
    H = -(A * ef.log(A + 1e-10)).sum("g r w p")
    V = var.sum("g r p")
    return S, H, V


@ef.kernel
def share(H: "l b", V: "l b", *, tau1: float, tau2: float) -> "l b":
    """What part of all layers' budget each layer gets."""
    P = H ** (1.0 / tau1) * V ** (1.0 / tau2)
    return P / P.sum("l")


# --- the oracle: as in the authors' code, a request at a time --------------------------------------------------------------------------
def window_oracle(q, k, gamma, pool):
    batch, heads, size, width = q.shape
    held, tokens = k.shape[1], k.shape[2]
    logits = q @ k.repeat_interleave(heads // held, dim=1).mT / width**0.5
    mask = torch.ones(size, tokens, dtype=torch.bool).tril(tokens - size)
    older = tokens - size
    if older <= 0:
        return torch.zeros(batch, held, tokens, dtype=q.dtype), *torch.zeros(2, batch, dtype=q.dtype)
    weights = torch.softmax(logits.masked_fill(~mask, -torch.inf), -1).nan_to_num(0.0)[..., :older]
    entropy = -(weights * torch.log(weights + 1e-10)).flatten(1).sum(1)
    variance = weights.var(dim=-2, correction=1 if size > 1 else 0)
    indicator = weights.mean(-2) + gamma * variance
    smooth = torch.nn.functional.avg_pool1d(indicator, kernel_size=pool, padding=pool // 2, stride=1)
    score = torch.nn.functional.pad(smooth.reshape(batch, held, heads // held, older).mean(2), (0, size))
    return score, entropy, variance.flatten(1).sum(1)


def share_oracle(entropy, variance, tau1, tau2):
    preference = entropy.pow(1 / tau1) * variance.pow(1 / tau2)
    return preference / preference.sum(0)


# --- inputs and figure ----------------------------------------------------------------------------------------------------------------
def layers(g, n):
    """Entropies and variances as large as those of real windows: sums over heads, queries and tokens."""
    return 1 + 200 * torch.rand(n["l"], n["b"], generator=g), 1e-3 + torch.rand(n["l"], n["b"], generator=g)


def show(folder):
    n = {**RECIPE.steps[0].sizes, "b": 1, "g": 1, "p": 512, "w": 32, "f": 64}
    prompts, spread, change, scores = [], [], [], []
    for layer, sharpness in enumerate((0.25, 0.5, 1.0, 1.5)):
        Q, K, V = common.window(torch.Generator().manual_seed(layer), n)
        S, H, X = window(Q * sharpness, K, gamma=200.0)
        prompts.append((Q * sharpness, K, V))
        spread, change, scores = [*spread, H], [*change, X], [*scores, S]
    parts = share(torch.stack(spread), torch.stack(change), tau1=1.0, tau2=3.0)[:, 0]
    lines = [
        "| layer | entropy H | variance V | share | kept | attention on them | with equal parts |",
        "|---|---|---|---|---|---|---|",
    ]
    rows = []
    for layer, ((Q, K, V), S) in enumerate(zip(prompts, scores, strict=True)):
        budget = n["w"] + min(round(float(parts[layer]) * 4 * 64), n["p"] - n["w"])
        own, equal = (keep(S, K, V, budget=size, window=n["w"])[3] for size in (budget, n["w"] + 64))
        later = Q.unflatten(1, (n["g"], n["r"]))[..., -1, :]
        figures = [f"{float(spread[layer]):.0f}", f"{float(change[layer]):.3f}", f"{float(parts[layer]):.0%}", str(budget)]
        figures += [f"{common.drawn(later, K, I):.1%}" for I in (own, equal)]
        lines.append(f"| {layer} | " + " | ".join(figures) + " |")
        rows.append((f"layer {layer}", S[0, 0].where(S[0, 0] > 0, torch.nan), own[0, 0]))
    common.draw(folder / "cake.png", "CAKE: scores of four layers, and the tokens kept of one budget for all", rows)
    return lines


RECIPE = Recipe(
    name="cake",
    title="CAKE: mean and variance of the attention over a window score the tokens, its entropy and variance the layers",
    source="2503.12491; the formulas read from a copy of the authors' code (antgroup/cakekv), not from the paper",
    steps=(
        Step(
            name="window",
            kernel=window,
            oracle=window_oracle,
            **common.SCORED,
            scalars={"gamma": 5.0},
            static={"pool": 5},
            tolerance=5e-5,
        ),
        Step(
            name="share",
            kernel=share,
            oracle=share_oracle,
            inputs=layers,
            sizes={"l": 32, "b": 1},
            ranges={"l": (1, 41), "b": (1, 5)},
            scalars={"tau1": 1.6, "tau2": 0.4},
        ),
    ),
    show=show,
)

if __name__ == "__main__":
    serve(RECIPE)
