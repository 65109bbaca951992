"""The eviction recipes behind one interface: what the layers saw of a prompt -> for any budget, which tokens each layer keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

import einfall as ef
import torch

from cookbook.decoder.model import Cache, Decoder, Seen, frequencies
from cookbook.eviction import cake, defensivekv, h2o, snapkv, triattention

WINDOW = 16  # the last tokens, which every method keeps
Keeper = Callable[[int], list[torch.Tensor]]  # budget -> for each layer, what is kept [b, g, p]
Method = Callable[[Decoder, Sequence[Seen]], Keeper]


@ef.kernel
def cut(S: "b g p", B: "b", *, window: int = WINDOW) -> "b g p":
    """Which tokens stay if sequence b keeps B[b]: the last `window`, then those of the highest scores."""
    recent = ef.index("p") >= ef.extent("p") - window
    _, I = ef.where(recent, math.inf, S).sort("p", into="s")
    within = (ef.index("s") < B).to(ef.i32)
    return within.scatter_add(s=I, into="p", size=ef.extent("p")) > 0


def by_score(scores: Sequence[torch.Tensor]) -> Keeper:
    """The same budget for every layer and head."""

    def keeper(budget: int) -> list[torch.Tensor]:
        return [cut(S, torch.full((len(S),), budget, dtype=torch.int32)) for S in scores]

    return keeper


def last(Q: torch.Tensor) -> torch.Tensor:
    """The queries of the window."""
    return Q[:, :, -WINDOW:].contiguous()


def keep_recent(model: Decoder, seen: Sequence[Seen]) -> Keeper:
    """The last tokens."""
    return by_score([torch.arange(float(s.cache.K.shape[2])).expand(s.cache.kept.shape).contiguous() for s in seen])


def keep_random(model: Decoder, seen: Sequence[Seen]) -> Keeper:
    """The window and others by lot."""
    generator = torch.Generator().manual_seed(0)
    return by_score([torch.rand(s.cache.kept.shape, generator=generator) for s in seen])


def keep_h2o(model: Decoder, seen: Sequence[Seen]) -> Keeper:
    return by_score([h2o.scored_attention(s.Q, s.cache.K, s.cache.V)[1] for s in seen])


def keep_snapkv(model: Decoder, seen: Sequence[Seen]) -> Keeper:
    return by_score([snapkv.score(last(s.Q), s.cache.K) for s in seen])


def keep_cake(model: Decoder, seen: Sequence[Seen]) -> Keeper:
    """Every sequence's budget for all layers is shared among them by CAKE's preference."""
    scores, spread, change = zip(*(cake.window(last(s.Q), s.cache.K, gamma=200.0) for s in seen), strict=True)
    parts = cake.share(torch.stack(spread), torch.stack(change), tau1=1.0, tau2=3.0)
    tokens = scores[0].shape[-1]

    def keeper(budget: int) -> list[torch.Tensor]:
        extra = shared_out(parts, (budget - WINDOW) * len(seen), tokens - WINDOW)
        return [cut(S, B + WINDOW) for S, B in zip(scores, extra, strict=True)]

    return keeper


def shared_out(parts: torch.Tensor, total: int, most: int) -> torch.Tensor:
    """Whole numbers [l, b] close to `parts` of `total`, none above `most`: what a full layer cannot take goes to the others."""
    given, open_ = torch.zeros_like(parts), torch.ones_like(parts, dtype=torch.bool)
    for _ in range(len(parts)):
        left = total - given.sum(0)
        weights = torch.where(open_, parts, 0)
        given = (given + left * weights / weights.sum(0).clamp(min=1e-30)).clamp(max=most)
        open_ = given < most
    down = given.floor()
    short = (total - down.sum(0)).round()
    order = (given - down).argsort(0, descending=True).argsort(0)  # the largest remainders are rounded up
    return (down + (order < short)).clamp(max=most).to(torch.int32)


def keep_defensive(model: Decoder, seen: Sequence[Seen]) -> Keeper:
    """Its own rule of what is kept, beside its score: attention up to a mass of 0.9 first."""
    scored = []
    for layer, s in zip(model.layers, seen, strict=True):
        size = layer.size
        out = layer.out.weight.detach().view(size.width, size.heads, size.channels).permute(1, 2, 0).contiguous()
        scored.append(defensivekv.score(last(s.Q), s.cache.K, s.cache.V, out))

    def keeper(budget: int) -> list[torch.Tensor]:
        kept = []
        for (S, A), s in zip(scored, seen, strict=True):
            _, _, I = defensivekv.keep(S, A, s.cache.K, s.cache.V, budget=budget, window=WINDOW)
            kept.append(torch.zeros_like(s.cache.kept).scatter(-1, I.long(), True))
        return kept

    return keeper


def keep_triattention(calibration: torch.Tensor) -> Method:
    """Scores from the centres of the queries, which are measured on the prompts `calibration`."""

    def method(model: Decoder, seen: Sequence[Seen]) -> Keeper:
        size = model.size
        omega = frequencies(size.channels, size.base).float()
        scores = []
        for known, s in zip(model.read(calibration), seen, strict=True):
            q = known.Q_plain.transpose(0, 1).flatten(1, 2).unflatten(0, (size.groups, -1))  # [g, r, b p, e]
            sizes = torch.complex(*q.chunk(2, -1)).abs().mean(2)
            now = torch.full((len(s.Q),), s.Q.shape[2], dtype=torch.int32)
            statistics = (q.mean(2), sizes, omega, torch.ones_like(omega), 2.0 ** torch.arange(7))
            scores.append(triattention.score_rotated(s.cache.K, now, *statistics)[1])
        return by_score(scores)

    return method


def methods(calibration: torch.Tensor) -> Mapping[str, Method]:
    """All of them, by name, the two baselines first."""
    return {
        "random": keep_random,
        "recent": keep_recent,
        "H2O": keep_h2o,
        "SnapKV": keep_snapkv,
        "CAKE": keep_cake,
        "DefensiveKV": keep_defensive,
        "TriAttention": keep_triattention(calibration),
    }


def left(seen: Sequence[Seen], kept: Sequence[torch.Tensor]) -> list[Cache]:
    """The caches with only the kept tokens."""
    return [replace(s.cache, kept=k) for s, k in zip(seen, kept, strict=True)]
