"""What several recipes of this folder share: attention as states that can be merged, and the eager attention of their oracles."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import einfall as ef
import torch


def attend(S, V, over):
    """Attention over the keys `over` before its division: the maximum of the scores, the sum of their exponentials, the weighted values."""
    M = S.max(over)
    N = ef.exp(S - M)
    return M, N.sum(over), (N * V).sum(over)


def merge(*states):
    """Attention over all the keys from what `attend` gives for disjoint sets of them. At least one set must have a key for each query.

    A set without a key has the state (-inf, 0, 0) and weighs exp(-inf) = 0.
    """
    top = functools.reduce(ef.maximum, [M for M, _, _ in states])
    shares = [ef.exp(M - top) for M, _, _ in states]
    D = sum(share * d for share, (_, d, _) in zip(shares, states, strict=True))
    O = sum(share * o for share, (_, _, o) in zip(shares, states, strict=True))
    return O / D


def eager(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, seen: torch.Tensor, scale: float) -> torch.Tensor:
    """Masked attention of [b, h, m, e] queries over [b, g, p, e] keys, each key head repeated for its group; `seen` is [b, 1, m, p].

    A query that sees nothing gets zeros.
    """
    groups = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(groups, dim=1), v.repeat_interleave(groups, dim=1)
    weights = torch.softmax((q @ k.mT * scale).masked_fill(~seen, -torch.inf), dim=-1)
    return weights.masked_fill(~seen, 0.0) @ v


def moved(kernel: ef.Kernel, dims: Mapping[str, int]) -> tuple[float, float, float]:
    """What `explain` says of a call in bf16: megabytes of keys and values at the least and as planned, operations per byte."""
    types = {t.name: {"L": "i32", "tree": "bool"}.get(t.name, "bf16") for t in kernel.cascade.inputs}
    data = kernel.explain(dims=dims, dtypes=types, show=False).to_dict()
    planned = [tensor for k in data["kernels"] for tensor in k["traffic"]]
    least, whole = (sum(t["bytes"] for t in traffic if t["tensor"][0] in "KV") / 1e6 for traffic in (data["traffic"], planned))
    return least, whole, data["intensity"]
