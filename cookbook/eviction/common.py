"""What the eviction recipes share: three helpers on traced values, a prompt to score, and the picture of what is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import einfall as ef
import torch

INK, QUIET, BLUE, ORANGE = "#1b1f24", "#b6bfc8", "#0969da", "#d1741a"


# --- on traced values ------------------------------------------------------------------------------------------------------------------
def last_queries(Q, K, m):
    """Causal attention weights of the last queries, whose rank is `m`, over the tokens p; a query sees itself and what is before it."""
    seen = ef.index("p") <= ef.index(m) + ef.extent("p") - ef.extent(m)
    return ef.softmax(((Q * K).sum("e") / ef.sqrt(ef.extent("e"))).where(seen), over="p")


def pooled(X, size):
    """The average of `size` neighbours along p, an odd number; beyond the ends there are zeros, and they count."""
    return X.at(p=ef.index("p") + ef.index("c", size=size) - size // 2).sum("c") / size


def keep(S, budget, window):
    """The coordinates of the last `window` tokens, then of the highest scores among the others: `budget` in all, over the rank s."""
    recent = ef.index("p") >= ef.extent("p") - window
    _, I = ef.where(recent, math.inf, S).topk("p", k=budget, into="s")
    return I


# --- inputs ----------------------------------------------------------------------------------------------------------------------------
def prompt(g: torch.Generator, n: Mapping[str, int], m: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Q [b, (g r), m, e], K [b, g, p, e], V [b, g, p, f] of a made-up prompt: a tenth of its keys draw every query."""
    b, heads, groups, p, e = n["b"], n["g"], n["r"], n["p"], n["e"]
    topic = torch.randn(b, heads, 1, e, generator=g)
    drift = torch.randn(b, heads, p, e, generator=g).cumsum(2) / math.sqrt(p)
    heavy = torch.rand(b, heads, p, 1, generator=g) < 0.1
    key = torch.randn(b, heads, p, e, generator=g) + drift + heavy * topic * (0.3 + 0.3 * torch.rand(b, heads, p, 1, generator=g))
    query = torch.randn(b, heads, groups, n[m], e, generator=g) + topic[:, :, None]
    query[..., max(0, n[m] - p) :, :] += drift[:, :, None, max(0, p - n[m]) :]
    return query.flatten(1, 2), key, torch.randn(b, heads, p, n["f"], generator=g)


def window(g: torch.Generator, n: Mapping[str, int]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The same with the last w queries alone."""
    return prompt(g, n, "w")


# What a step that scores tokens by a window of queries is tried on: queries and keys.
SCORED: Mapping[str, Any] = {
    "inputs": lambda g, n: window(g, {**n, "f": 1})[:2],
    "sizes": {"b": 1, "g": 4, "r": 2, "w": 32, "p": 512, "e": 64},
    "ranges": {"b": (1, 2), "g": (1, 3), "r": (1, 3), "w": (1, 37), "p": (1, 131), "e": (1, 33)},
}


def without_ties(
    make: Callable[[torch.Generator, Mapping[str, int]], tuple[torch.Tensor, ...]],
    score: Callable[..., torch.Tensor],
    top: int,
    gap: float = 1e-5,
) -> Callable[[torch.Generator, Mapping[str, int]], tuple[torch.Tensor, ...]]:
    """`make`, drawn again until the `top` highest scores of every row and the next are at least `gap` apart, relative to themselves."""

    def inputs(g: torch.Generator, n: Mapping[str, int]) -> tuple[torch.Tensor, ...]:
        for _ in range(100):
            tensors = make(g, n)
            falling = score(*(t.double() for t in tensors)).sort(-1, descending=True).values[..., : top + 1]
            if bool((falling.diff() < -gap * falling[..., 1:]).all()):
                return tensors
        raise ValueError(f"a hundred draws with ties at {dict(n)}")

    return inputs


# --- figures ---------------------------------------------------------------------------------------------------------------------------
def attend(q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, kept: torch.Tensor | None = None) -> torch.Tensor:
    """Plain attention of queries [b, g, r, e] over the tokens, or over those at the coordinates `kept` [b, g, s] only."""
    if kept is not None:
        K, V = (x.gather(2, kept.long()[..., None].expand(*kept.shape, x.shape[-1])) for x in (K, V))
    weights = torch.softmax(q @ K.mT / math.sqrt(K.shape[-1]), -1)
    return weights @ V


def lost(q: torch.Tensor, K: torch.Tensor, V: torch.Tensor, kept: torch.Tensor) -> float:
    """How far the attention of q over the kept tokens is from that over all, relative to the latter."""
    full = attend(q, K, V)
    return float((attend(q, K, V, kept) - full).norm() / full.norm())


def drawn(q: torch.Tensor, K: torch.Tensor, kept: torch.Tensor) -> float:
    """The part of the attention of q [b, g, r, e] that falls on the kept tokens, on the average over batch and heads."""
    weights = torch.softmax(q @ K.mT / math.sqrt(K.shape[-1]), -1)
    return float(weights.gather(-1, kept.long()[:, :, None].expand(*weights.shape[:-1], kept.shape[-1])).sum(-1).mean())


def draw(path: Path, title: str, rows: Sequence[tuple[str, torch.Tensor, torch.Tensor]], log: bool = True) -> None:
    """Score against position, one panel a row of (label, score [p], kept coordinates): kept tokens in colour, and as a strip below."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 1.9 * len(rows) + 0.5), layout="constrained")
    panels = figure.subplots(2 * len(rows), 1, squeeze=False, height_ratios=[9, 1] * len(rows))[:, 0]
    for (label, score, kept), above, strip in zip(rows, panels[::2], panels[1::2], strict=True):
        held = torch.zeros(len(score), dtype=torch.bool)
        held[kept[kept >= 0].long()] = True
        at = torch.arange(len(score))
        for chosen, colour, name in ((~held, QUIET, "evicted"), (held, BLUE, f"kept, {int(held.sum())} of {len(score)}")):
            above.scatter(at[chosen], score[chosen], s=9, color=colour, label=name, linewidths=0)
        above.set(ylabel=label, xlim=(-1, len(score)), xticks=[], yscale="log" if log else "linear")
        above.legend(loc="lower right", bbox_to_anchor=(1, 0.97), fontsize=8, frameon=False, ncols=2)
        above.spines[["top", "right"]].set_visible(False)
        strip.bar(at[held], 1, width=1, color=BLUE)
        strip.set(xlim=(-1, len(score)), ylim=(0, 1), yticks=[])
        strip.spines[["top", "right", "left"]].set_visible(False)
    panels[-1].set_xlabel("token")
    figure.suptitle(title, fontsize=11, color=INK)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
